"""The placement study: its measure, its runs, and its analysis on data whose truth is known."""

import json
import sys
from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HUB, ROOT, slow, small_run, write_checkpoint, write_rows
from test_tables import PARSERS

from catcher import Catcher
from generate import generate
from moe_model import IGNORE, MoEModel, Routing
from paper.runs.grid import saved
from paper.runs.stats import compare, holm, verdict
from paper.studies import mechanism, placement_runs
from paper.studies.placement import (
    MANY,
    MARGIN,
    ONE,
    PLAIN,
    Pair,
    bootstrap,
    compare_arms,
    disagrees,
    judged,
    middle,
)
from plumbing import answer_loss
from plumbing.answer_loss import answer_losses
from plumbing.data import collate, encode, load_examples
from plumbing.run_folder import read_run
from plumbing.tokenizer import load_tokenizer

# ---- the measure ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    model = MoEModel.from_pretrained(ROOT / "tiny")
    tokenizer = load_tokenizer(ROOT / "tiny")
    examples = load_examples("tiny-math", ROOT / "tiny" / "math-test.jsonl")[:24]
    return model, tokenizer, encode(examples, tokenizer, model.cfg.max_len)


def test_the_loss_of_each_answer_is_that_of_the_example_alone(tiny, monkeypatch):
    model, _, data = tiny
    monkeypatch.setattr(answer_loss, "LOSS_CHUNK", 5)  # fewer than the targets of a batch
    for record, example in zip(answer_losses(model, data, 7), data, strict=True):
        ids = torch.tensor([example.ids])
        logits, _ = model(ids[:, :-1])
        wanted = F.cross_entropy(logits[0, example.n_prompt - 1 :], ids[0, example.n_prompt :])
        assert record["tokens"] == len(example.ids) - example.n_prompt
        # a mean of some 20 tokens in fp32, and other lengths of padding
        assert record["loss"] / record["tokens"] == pytest.approx(wanted.item(), rel=1e-5)


def test_an_answer_is_exact_if_greedy_decoding_gives_it(tiny):
    model, tokenizer, data = tiny
    found = generate(model, [e.ids[: e.n_prompt] for e in data], 40, tokenizer.stops, 12)
    # take what the model says as the right answer of every other problem
    made = [
        e._replace(ids=e.ids[: e.n_prompt] + ids + [tokenizer.eos]) if i % 2 else e
        for i, (e, ids) in enumerate(zip(data, found, strict=True))
    ]
    exact = [r["exact"] for r in answer_losses(model, made, 8)]
    wanted = [
        e.ids[e.n_prompt :] == [*ids, tokenizer.eos] for e, ids in zip(made, found, strict=True)
    ]
    ended = [len(ids) < 40 for ids in found]  # one cut off at 40 tokens does not end there
    assert [x for x, e in zip(exact, ended, strict=True) if e] == [
        x for x, e in zip(wanted, ended, strict=True) if e
    ]
    assert any(exact)
    assert not all(exact)


def test_the_command_keeps_the_loss_of_any_task_apart_from_its_scores(cli, tmp_path):
    for task in ("tiny-math", "tiny-code", "tiny-safety"):
        code, out, _ = cli("eval_gsm8k.py", "--model", "tiny", "--task", task, "--loss",
                           "--limit", 5, "--out", tmp_path)  # fmt: skip
        assert code == 0
        assert "nats per answer token" in out
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept.keys() == {f"tiny-{name}-loss-part" for name in ("math", "code", "safety")}
    lines = (tmp_path / "answers-tiny-code-loss-part.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    summed, tokens = (sum(r[x] for r in records) for x in ("loss", "tokens"))
    assert kept["tiny-code-loss-part"]["loss"] == pytest.approx(summed / tokens)
    code, _, err = cli("eval_gsm8k.py", "--model", "tiny", "--task", "tiny-code")
    assert code == 2
    assert "tiny-code" in err


def test_the_loss_of_a_model_whose_output_layer_is_its_embedding(tmp_path, tiny):
    hub = HUB["qwen3_moe"] | {"tie_word_embeddings": True, "vocab_size": 1024}
    model = MoEModel.from_pretrained(write_checkpoint(tmp_path / "tied", hub))
    _, _, data = tiny
    some = [e._replace(ids=e.ids[:40]) for e in data[:3] if e.n_prompt < 39]
    for record, e in zip(answer_losses(model, some, 2), some, strict=True):
        logits, _ = model(torch.tensor([e.ids[:-1]]))
        wanted = F.cross_entropy(logits[0, e.n_prompt - 1 :], torch.tensor(e.ids[e.n_prompt :]))
        assert record["loss"] / record["tokens"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("flags", [("--task", "code"), ("--max-new", 5), ("--task", "safety")])
def test_what_the_loss_cannot_be_measured_of_is_said_before_any_download(cli, flags):
    code, _, err = cli("eval_gsm8k.py", "--model", "tiny", "--loss", *flags)
    assert code == 2
    assert str(flags[-1] if flags[0] == "--task" else flags[0]) in err
    assert len(err.strip().splitlines()) == 1


def test_the_loss_of_ones_own_rows_of_any_task(cli, tmp_path):
    rows = write_rows(tmp_path / "own.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    for task in ("code", "safety"):
        asked = ("--model", "tiny", "--task", task, "--template", "bare", "--data", rows)
        assert cli("eval_gsm8k.py", *asked, "--loss")[0] == 0


# ---- counting the tokens that predict an answer --------------------------------------------------


def test_answers_counts_the_positions_whose_next_token_is_a_target(tiny):
    model, _, data = tiny
    batch = collate(data[:3])
    _, routing = model(batch.tokens)
    catcher = Catcher(model.cfg.n_experts, "answers")
    catcher.add(routing, batch.counted("answers"))
    by_hand = torch.zeros(model.cfg.n_experts, dtype=torch.long)
    for i, example in enumerate(data[:3]):
        for at in range(example.n_prompt - 1, len(example.ids) - 1):
            by_hand[routing[2].expert_ids[i, at]] += 1
    assert torch.equal(catcher.counts[2], by_hand)
    assert int(catcher.n_tokens) == sum(len(e.ids) - e.n_prompt for e in data[:3])
    assert int((batch.targets != IGNORE).sum()) == int(catcher.n_tokens)


@pytest.mark.parametrize("how", [slow("warmup"), "forward"])
def test_a_run_counts_what_it_is_told_and_says_so(cli, toy, tmp_path, how):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"question": "a " * 9, "answer": f"#### {n}"} for n in range(30)]
    )
    seen = {}
    for count in ("all", "answers"):
        out = tmp_path / count
        words = small_run(toy, rows, "--no-eval", "--steps", 1, "--catcher", how, "--out", out)
        assert cli("train.py", *words, "--count", count)[0] == 0
        assert read_run(out)["count"] == count
        seen[count] = json.loads((out / "hot_experts.json").read_text())
        assert seen[count]["count"] == count
    assert seen["answers"]["n_tokens"] < seen["all"]["n_tokens"]
    assert seen["answers"]["counts"] != seen["all"]["counts"]


def test_an_unfinished_run_from_before_the_setting_goes_on_with_all_tokens(cli, toy, tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"question": "a", "answer": f"#### {n}"} for n in range(8)]
    )
    words = small_run(toy, rows, "--no-eval", "--steps", 2, "--out", tmp_path / "run")
    assert cli("train.py", *words)[0] == 0
    path = tmp_path / "run" / "run.json"
    run = json.loads(path.read_text())
    del run["count"]
    path.write_text(json.dumps(run | {"finished": False}))
    assert cli("train.py", *words)[0] == 0
    path.write_text(json.dumps(run | {"finished": False}))
    code, _, err = cli("train.py", *words, "--count", "answers")
    assert code == 2
    assert "count" in err


# ---- the runs ------------------------------------------------------------------------------------


def test_no_problem_is_both_trained_on_and_scored():
    scored = "".join(placement_runs.problems(task) for task in placement_runs.N_SCORED)
    asked = {json.loads(line)["question"] for line in scored.splitlines()}
    assert len(asked) == sum(placement_runs.N_SCORED.values())
    for seed in (0, 1, *placement_runs.TUNING_SEEDS):
        rows = placement_runs.as_lines("math_problem", "train", 200, seed).splitlines()
        assert len(rows) == 200
        assert not asked & {json.loads(row)["question"] for row in rows}


def test_left_over_problems_or_folders_of_another_run_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(placement_runs, "ROOT", tmp_path)
    placement_runs.write_problems("a/b.jsonl", "one\n")
    placement_runs.write_problems("a/b.jsonl", "one\n")
    with pytest.raises(ValueError, match="other problems"):
        placement_runs.write_problems("a/b.jsonl", "two\n")
    run = placement_runs.placed("A", "hot", 0, 0.01)
    run.folder.mkdir(parents=True)
    about = {"model": "tiny", "task": "tiny-math", "method": "hellora", "dtype": "fp32"}
    about |= {"finished": True, "k": 8, "lr": 0.01, "seed": 0, "epochs": 3, "batch_size": 16}
    (run.folder / "run.json").write_text(json.dumps(about | {"count": "all"}))
    with pytest.raises(ValueError, match="epochs"):
        run.check_folder()


def test_losses_survive_packing_to_three_digits():
    draw = np.random.default_rng(0)
    records = [
        {"loss": loss, "exact": bool(loss < 0.1)} for loss in draw.exponential(0.5, 2500) ** 2
    ]
    losses, exact = placement_runs.unpack(placement_runs.pack(records))
    # float16 has 11 bits: each to 2 ** -11, below 6e-5 to 3e-8
    np.testing.assert_allclose(losses, [r["loss"] for r in records], rtol=2**-11, atol=6e-8)
    assert exact.tolist() == [r["exact"] for r in records]


# ---- the analysis, on data whose truth is known --------------------------------------------------

N_SEEDS, N_PROBLEMS = 20, 8
ARMS = ("cold", "random", "none", "all")


def simulated(draw, effect, deviation=0.1, bases=("a",)):
    """{arm: pairs}: log ratios that spread around `effect` by seed, over problems of any size."""
    models = np.repeat(bases, N_SEEDS // len(bases))
    found = {}
    for arm in ARMS:
        hot = draw.exponential(1, (N_SEEDS, N_PROBLEMS))
        other = hot * np.exp(draw.normal(effect, deviation, (N_SEEDS, 1)))
        found[arm] = [Pair(*of) for of in zip(models, other, hot, strict=True)]
    return found


def test_with_no_effect_few_are_found_and_with_the_mde_four_in_five():
    draw, n = np.random.default_rng(0), 1000
    # over 20 seeds, in the way of stats.compare, of the true spread: what the plan counts on
    mde = compare([0.1 * x for x in np.sqrt(19 / 20) * np.tile([1, -1], 10)], MARGIN).mde
    none = [compare_arms(simulated(draw, 0.0), ONE, PLAIN) for _ in range(n)]
    some = [compare_arms(simulated(draw, mde), ONE, PLAIN) for _ in range(n)]
    found = sum(test.p < 0.05 for arms in none for test, _ in arms.values()) / (n * len(ARMS))
    assert found <= 0.06
    any_of_four = sum(any(p < 0.05 for _, p in arms.values()) for arms in none) / n
    assert any_of_four <= 0.06  # Holm
    power = sum(test.p < 0.05 for arms in some for test, _ in arms.values()) / (n * len(ARMS))
    assert abs(power - 0.8) <= 0.05


def test_a_ratio_at_the_margin_is_seldom_called_equivalent_and_none_mostly_is():
    draw, n = np.random.default_rng(1), 500
    at_margin = [compare_arms(simulated(draw, MARGIN), ONE, PLAIN) for _ in range(n)]
    called = [test.p_equivalent < 0.05 for arms in at_margin for test, _ in arms.values()]
    assert sum(called) / len(called) <= 0.06
    none = [compare_arms(simulated(draw, 0.0), ONE, PLAIN) for _ in range(n)]
    called = [test.p_equivalent < 0.05 for arms in none for test, _ in arms.values()]
    assert sum(called) / len(called) > 0.95  # the margin is over four standard errors away


def test_a_comparison_that_is_not_finished_counts_in_the_correction():
    some = simulated(np.random.default_rng(4), 0.06)
    all_done = compare_arms(some, ONE, PLAIN)
    one_done = compare_arms(
        {arm: of if arm == "cold" else [] for arm, of in some.items()}, ONE, PLAIN
    )
    test, corrected = one_done["cold"]
    assert one_done.keys() == {"cold"}
    assert corrected == pytest.approx(min(1, 4 * test.p))
    assert corrected >= all_done["cold"][1] >= test.p


def test_several_bases_are_compared_by_their_means():
    draw = np.random.default_rng(2)
    some = simulated(draw, 0.1, bases=("a", "b", "c", "d"))
    test, _ = compare_arms(some, MANY, PLAIN)["cold"]
    ratios = [log(pair.other.sum() / pair.hot.sum()) for pair in some["cold"]]
    means = [float(np.mean(ratios[i : i + 5])) for i in range(0, N_SEEDS, 5)]
    assert test.df == 3
    assert test.mean == pytest.approx(np.mean(means))
    assert test.error == pytest.approx(np.std(means, ddof=1) / 2)


def test_the_bootstrap_agrees_with_t_where_t_is_right():
    some = simulated(np.random.default_rng(3), 0.1)["cold"]
    low, high = middle(bootstrap(some, PLAIN, ONE), 0.95)
    test = compare([log(pair.other.sum() / pair.hot.sum()) for pair in some], MARGIN)
    # 20 seeds: the bootstrap's interval is narrower than t's by some sqrt(19 / 20) * 1.96 / 2.09
    assert high - low == pytest.approx((test.high - test.low) * 0.914, rel=0.08)
    assert low < test.mean < high


@pytest.mark.parametrize(
    ("said", "low", "high", "otherwise"),
    [
        ("holds", 0.01, 0.2, False),
        ("fails unadjusted", -0.2, -0.01, False),
        ("holds", -0.01, 0.2, True),
        ("undecided", -0.1, 0.2, False),
        ("undecided", 0.01, 0.2, True),
        ("equivalent", -0.09, 0.09, False),
        ("equivalent", 0.02, 0.12, True),
    ],
)
def test_a_verdict_that_the_bootstrap_does_not_share_is_marked(said, low, high, otherwise):
    assert disagrees(said, np.linspace(low, high, 1001)) == otherwise


def test_a_secondary_comparison_holds_unadjusted_at_most():
    test = compare([0.2, 0.21, 0.19, 0.2], MARGIN)
    assert judged(test, test.p, primary=True) == "holds"
    assert judged(test, test.p, primary=False) == "holds unadjusted"
    equal = compare([0.001, -0.001, 0.002, -0.002], MARGIN)
    assert judged(equal, equal.p, primary=False) == "equivalent"


def test_holms_correction_is_that_of_his_paper():
    # by hand: sorted .005 .01 .03 .04 -> x 4, 3, 2, 1, then never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("differences", "corrected", "said"),
    [
        ([0.2, 0.21, 0.19, 0.2], 0.001, "holds"),
        ([-0.2, -0.21, -0.19, -0.2], 0.001, "fails"),
        ([0.001, -0.001, 0.002, -0.002], 0.9, "equivalent"),
        ([0.2, 0.25, 0.15, 0.3], 0.06, "holds unadjusted"),
        ([0.3, -0.3, 0.2, -0.1], 0.9, "undecided"),
    ],
)
def test_each_outcome_has_its_verdict(differences, corrected, said):
    assert verdict(compare(differences, MARGIN), corrected) == said


def test_the_median_of_t_and_its_quantiles_rise():
    found = [compare([0.0, x], MARGIN).mde for x in (0.1, 0.2, 0.4)]
    assert all(b == pytest.approx(2 * a) for a, b in pairwise(found))  # the MDE is a scale


def test_no_result_rests_on_other_settings_than_the_plan_has_now():
    planned = {run.result.name: run for run in placement_runs.wanted()}
    kept = [path.name for path in placement_runs.RESULTS.glob("*.json")]
    assert set(kept) <= planned.keys()
    for name in kept:
        assert saved(planned[name])  # raises ValueError if the run would be another one now


def test_each_arms_rate_is_the_best_on_dev_and_lies_inside_those_tried():
    for (regime, arm), lr in placement_runs.RATES.items():
        assert placement_runs.best_rate(regime, arm) == lr


# ---- the mechanism -------------------------------------------------------------------------------


def test_kept_choices_and_shares_by_hand():
    gate, logits = torch.ones(1, 3, 2), torch.zeros(1, 3, 6)
    before = Routing(torch.tensor([[[0, 1], [2, 3], [0, 1]]]), gate, logits)
    after = Routing(torch.tensor([[[1, 0], [3, 4], [5, 4]]]), gate, logits)
    real = torch.tensor([[True, True, False]])
    assert mechanism.kept_choices(before, after, real) == pytest.approx(3 / 4)
    assert mechanism.counted({0: before}, real)[0].tolist() == [1, 1, 1, 1, 0, 0]


def test_numbers_are_read_off_between_the_rates_up_to_the_best():
    points = [(1.0, {"rise": 4.0}), (2.0, {"rise": 2.0}), (3.0, {"rise": 1.0})]
    assert mechanism.at_loss(points, 1.5) == {"rise": 3.0}
    assert mechanism.at_loss(points, 3.0) == {"rise": 1.0}
    assert mechanism.at_loss(points, 9.0) == {"rise": 1.0}  # no rate tried was that bad
    assert mechanism.at_loss(points, 0.0) == {"rise": 4.0}


def test_a_model_merged_with_the_base_itself_is_itself(tiny):
    model, _, data = tiny
    tuned = MoEModel.from_pretrained(ROOT / "tiny")
    with torch.no_grad():
        tuned.head.weight *= 1.5
    before = answer_losses(tuned, data[:4], 4)
    mechanism.add_update(tuned, model, model)
    assert answer_losses(tuned, data[:4], 4) == before
    mechanism.add_update(model, tuned, MoEModel.from_pretrained(ROOT / "tiny"))
    losses = [r["loss"] for r in answer_losses(model, data[:4], 4)]
    # base + (tuned - base) rounds twice in fp32
    assert losses == pytest.approx([r["loss"] for r in before], rel=1e-4)


# ---- on the paper's model ------------------------------------------------------------------------


def test_the_same_arms_are_planned_on_the_papers_model(cli, monkeypatch):
    code, out, _ = cli("paper.reproduce", "placement", "--scale", "paper", "--dry-run")
    assert code == 0
    *commands, total = out.splitlines()
    trained = [line for line in commands if line.startswith("python train.py")]
    methods = {line.split("--method ")[1].split()[0] for line in trained}
    small = {run.method for run in placement_runs.wanted()}
    assert methods == small
    assert all("--model olmoe-1b-7b" in line and "--task gsm8k" in line for line in trained)
    assert f"{len(trained)} of {len(trained)} runs are missing" in total
    for line in commands:
        monkeypatch.setattr(sys, "argv", line.split()[1:])
        PARSERS[sys.argv[0]]()  # each is one that the script takes
