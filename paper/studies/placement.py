"""Do hot experts matter? What the runs of placement_runs.py say; the plan is placement.md.

    python -m paper.reproduce placement               what the finished runs say, after the others
    python -m paper.reproduce placement --dry-run     what is missing, and about how long it takes

A difference is the log ratio of two losses, other arm / hot, of two runs that share base, seed and
rows. Positive: hot is better. On one base it is over seeds; on several it is over the means of
bases.
"""

import json
from collections.abc import Callable, Iterable
from functools import cache
from itertools import groupby
from math import exp, log
from statistics import linear_regression, mean
from typing import NamedTuple

import numpy as np

from paper.runs.grid import MODEL, missing_tasks, saved
from paper.runs.stats import Comparison, compare, holm, verdict
from paper.studies.placement_runs import (
    ANSWERS,
    DEV,
    N_REWORDED,
    N_SCORED,
    REAL,
    REGIMES,
    TASK,
    TEST,
    Placed,
    problems,
    real_test_runs,
    real_tuning_runs,
    test_runs,
    tuning_runs,
    unpack,
    wanted,
)
from paper.studies.tables import printed
from plumbing.checkpoint import locate, read_config
from plumbing.data import TASKS, TEMPLATES, Example, encode, load_examples
from plumbing.tokenizer import load_tokenizer

__all__ = ["results", "show", "wanted"]  # what paper.reproduce asks of a study

MARGIN = log(1.1)
PRIMARY = ("cold", "random", "none", "all")
ORDER = (*PRIMARY, "model-level", ANSWERS)  # of arms in a figure
PLAIN = slice(0, N_SCORED[TEST] - N_REWORDED)  # of TEST's problems
REWORDED = slice(N_SCORED[TEST] - N_REWORDED, N_SCORED[TEST])
DRAWS, CHUNK = 10_000, 1_000  # of the bootstrap; at a time
ONE, MANY = "one base", "bases"


class Pair(NamedTuple):
    """Two runs that share base, seed and rows: of each, the losses of all problems [2500]."""

    model: str
    other: np.ndarray
    hot: np.ndarray


class Scale(NamedTuple):
    """What the study is run on."""

    base: str  # the model that "one base" is about
    compared: Callable[[], Iterable[Placed]]  # the runs that are compared
    tuned: Callable[[], Iterable[Placed]]  # those that were tried for their learning rate
    reworded: bool  # whether REWORDED problems are scored too


TINY = Scale(MODEL, test_runs, tuning_runs, reworded=True)
PAPER = Scale(REAL, real_test_runs, real_tuning_runs, reworded=False)


# ---- the finished runs ---------------------------------------------------------------------------


@cache
def finished(on: Scale) -> dict[str, list[Placed]]:
    """{regime: its runs whose test problems are scored}."""
    found = {name: [] for name in REGIMES}
    for run in on.compared():
        if not missing_tasks(run, [TEST]):
            found[run.regime].append(run)
    return found


@cache
def losses(run: Placed) -> np.ndarray:
    """The loss of each of TEST's problems [2500], in nats."""
    return unpack(saved(run)["items"][TEST])[0]


def pairs(on: Scale, regime: str, arm: str, bases: str) -> list[Pair]:
    """The pairs of an arm and hot that are finished, of one base or of all, in their order."""
    runs = {(run.model, run.seed, run.arm): run for run in finished(on)[regime]}
    found = []
    for (model, seed, of), run in runs.items():
        hot = runs.get((model, seed, "hot"))
        if of == arm and hot and (bases == MANY or model == on.base):
            found.append(Pair(model, losses(run), losses(hot)))
    return sorted(found, key=lambda pair: pair.model)


# ---- what they say -------------------------------------------------------------------------------


def units(values: list[float], models: list[str], bases: str) -> list[float]:
    """The numbers that a test is over: one a seed, or one a base, the mean of its seeds."""
    if bases == ONE:
        return values
    by_base = groupby(zip(models, values, strict=True), key=lambda pair: pair[0])
    return [mean(value for _, value in of) for _, of in by_base]


@cache
def drawn_again(n_problems: int) -> np.ndarray:
    """How often each problem is in each draw of the bootstrap [problems, DRAWS]; the same for all.

    It is kept, as it takes longer to draw than all that is done with it.
    """
    draw = np.random.default_rng(0)
    times = draw.multinomial(n_problems, [1 / n_problems] * n_problems, DRAWS)
    return times.astype(np.uint8).T  # none is drawn 256 times


def bootstrap(some: list[Pair], part: slice, bases: str) -> np.ndarray:
    """Mean log ratios [DRAWS], seeds (or bases) and problems both drawn again.

    It does not assume that differences are normal, nor that these problems are all there are.
    """
    other, hot = (np.stack([pair[i][part] for pair in some]) for i in (1, 2))  # [runs, problems]
    _, group = np.unique([p.model for p in some], return_inverse=True)
    group = np.arange(len(some)) if bases == ONE else group
    average = (group == np.arange(group.max() + 1)[:, None]).astype(float)  # [units, runs]
    average /= average.sum(1, keepdims=True)
    draw, n_units, means = np.random.default_rng(1), len(average), []
    all_times = drawn_again(other.shape[1])
    for start in range(0, DRAWS, CHUNK):
        times = all_times[:, start : start + CHUNK].astype(float)  # [problems, C]
        ratios = average @ np.log((other @ times) / (hot @ times))  # [units, C]
        weights = draw.multinomial(n_units, [1 / n_units] * n_units, CHUNK).T / n_units
        means.append((ratios * weights).sum(0))  # [C]
    return np.concatenate(means)


def middle(means: np.ndarray, share: float) -> tuple[float, float]:
    """The interval with this share of the bootstrap's means. As many are below it as above it."""
    low, high = np.quantile(means, ((1 - share) / 2, (1 + share) / 2))
    return float(low), float(high)


def disagrees(said: str, means: np.ndarray) -> bool:
    """Whether the bootstrap says otherwise than a verdict.

    That a difference is significant wants a 95 % interval without 0. "equivalent" wants a 90 %
    interval inside the margin, which is what TOST at 5 % is. "undecided" wants a 95 % interval
    with 0 in it.
    """
    if said == "equivalent":
        return max(map(abs, middle(means, 0.9))) > MARGIN
    low, high = middle(means, 0.95)
    return (low <= 0 <= high) != (said == "undecided")


def planned(on: Scale, regime: str, arm: str, bases: str) -> int:
    """How many pairs the plan has."""
    runs = [run for run in on.compared() if (run.regime, run.arm) == (regime, arm)]
    return sum(bases == MANY or run.model == on.base for run in runs)


def compare_arms(
    some: dict[str, list[Pair]], bases: str, part: slice
) -> dict[str, tuple[Comparison, float]]:
    """{arm: what its pairs say, and p corrected for the number of primary arms}.

    Arms with fewer than two seeds, or bases, are left out. Only PLAIN problems have primary arms.
    """
    tests = {}
    for arm, of in some.items():
        ratios = [log(pair.other[part].sum() / pair.hot[part].sum()) for pair in of]
        over = units(ratios, [pair.model for pair in of], bases)
        if len(over) > 1:
            tests[arm] = compare(over, MARGIN)
    corrected = {arm: test.p for arm, test in tests.items()}
    if part == PLAIN:
        first = [arm for arm in some if arm in PRIMARY]
        ps = [tests[arm].p if arm in tests else 1.0 for arm in first]  # all count, finished or not
        corrected |= zip(first, holm(ps), strict=True)
    return {arm: (test, corrected[arm]) for arm, test in tests.items()}


def family(on: Scale, regime: str, bases: str, part: slice) -> list[dict]:
    """The comparisons of a regime."""
    some = {arm: pairs(on, regime, arm, bases) for arm in REGIMES[regime].arms if arm != "hot"}
    rows = []
    for arm, (test, corrected) in compare_arms(some, bases, part).items():
        primary, means = arm in PRIMARY and part == PLAIN, bootstrap(some[arm], part, bases)
        said = judged(test, corrected, primary)
        rows.append(
            {
                "regime": regime,
                "bases": bases,
                "problems": "plain" if part == PLAIN else "reworded",
                "arm": arm,
                "primary": primary,
                "runs": len(some[arm]),
                "planned": planned(on, regime, arm, bases),
                **test._asdict(),
                "p_corrected": corrected,
                "verdict": said,
                "bootstrap": middle(means, 0.95),
                "bootstrap_disagrees": disagrees(said, means),
            }
        )
    return rows


def judged(test: Comparison, corrected: float, primary: bool) -> str:
    """The verdict. That of a secondary comparison rests on an uncorrected p, and says so."""
    said = verdict(test, corrected)
    return said if primary or said not in ("holds", "fails") else f"{said} unadjusted"


def papers_effect(on: Scale, regime: str) -> dict | None:
    """What the paper's hot - cold on GSM8K would be here, as a log ratio of losses.

    We assume that the effect in logits of accuracy is the same for every model. A line through all
    runs of the regime on one base tells how many log units of loss one logit is. None with fewer
    than three runs.
    """
    hot, cold = (printed(*of, "gsm8k") / 100 for of in (("2", "hellora"), ("4", "hellora_c")))
    logits = logit(hot) - logit(cold)
    points = [
        (float(exact(run)[PLAIN].mean()), per_token(run, PLAIN))
        for run in finished(on)[regime]
        if run.model == on.base
    ]
    points += [
        (saved(run)["exact"][DEV], saved(run)["loss"][DEV])  # plain problems all
        for run in on.tuned()
        if run.regime == regime and not missing_tasks(run, [DEV])
    ]
    points = [(logit(share), log(loss)) for share, loss in points if 0 < share < 1]
    if len(points) < 3:
        return None
    slope, _ = linear_regression(*zip(*points, strict=True))
    return {"logits": logits, "log_loss_per_logit": slope, "log_ratio": -slope * logits}


def logit(share: float) -> float:
    """log odds."""
    return log(share / (1 - share))


def level(on: Scale, regime: str, arm: str) -> dict | None:
    """What an arm reaches on one base: means over its seeds."""
    runs = [r for r in finished(on)[regime] if (r.arm, r.model) == (arm, on.base)]
    if not runs:
        return None
    return {
        "regime": regime,
        "arm": arm,
        "method": runs[0].method,
        "lr": runs[0].lr,
        "runs": len(runs),
        "trained": saved(runs[0])["trained"],
        "final_loss": mean(saved(run)["final_loss"] for run in runs),
        "loss": mean(per_token(run, PLAIN) for run in runs),
        "reworded": mean(per_token(run, REWORDED) for run in runs) if on.reworded else None,
        "exact": mean(float(exact(run)[PLAIN].mean()) for run in runs),
    }


def per_token(run: Placed, part: slice) -> float:
    """The loss of some of TEST's problems, nats per token of an answer."""
    return float(losses(run)[part].sum()) / sum(answer_sizes(run.model, run.task)[part])


@cache
def answer_sizes(model: str, task: str) -> list[int]:
    """Tokens of the answer of each of TEST's problems, eos included.

    All tiny bases have one tokenizer.
    """
    if task == TASK:
        model, rows = MODEL, [json.loads(line) for line in problems(TEST).splitlines()]
        examples = [Example(*TEMPLATES["math", "plain"](row), row) for row in rows]
    else:
        examples = load_examples(task, TASKS[task].test.fetch())
    source = locate(model)
    data = encode(examples, load_tokenizer(source), read_config(source).max_len)
    return [len(e.ids) - e.n_prompt for e in data]


def exact(run: Placed) -> np.ndarray:
    """Whether the whole answer of each of TEST's problems [2500] is the model's first choice."""
    return unpack(saved(run)["items"][TEST])[1]


def results(on: Scale = TINY) -> dict:
    """Levels, comparisons and the paper's effect, of the runs that are finished."""
    parts = (PLAIN, REWORDED) if on.reworded else (PLAIN,)
    levels = [level(on, name, arm) for name, regime in REGIMES.items() for arm in regime.arms]
    rows = []
    for name in REGIMES:
        several = any(run.model != on.base for run in finished(on)[name])
        for bases in (ONE, MANY) if several else (ONE,):
            for part in parts:
                rows += family(on, name, bases, part)
    effects = {name: papers_effect(on, name) for name in REGIMES}
    return {
        "margin": MARGIN,
        "levels": [found for found in levels if found],
        "effect": effects,
        "rows": [row | {"papers_effect": beside(row, effects[row["regime"]])} for row in rows],
    }


def beside(row: dict, effect: dict | None) -> str | None:
    """Where an interval lies beside the paper's hot - cold: "below", "around" or "above" it.

    "below": hot is not as much better than cold as in the paper. None for other arms, and where the
    effect is not known: it is measured on the plain problems.
    """
    if effect is None or row["problems"] != "plain" or row["arm"] != "cold":
        return None
    if row["high"] < effect["log_ratio"]:
        return "below"
    return "above" if row["low"] > effect["log_ratio"] else "around"


# ---- how it is shown -----------------------------------------------------------------------------


def says(row: dict) -> str:
    """A verdict in words, with what it rests on."""
    word, margin = row["verdict"], f"{100 * (exp(MARGIN) - 1):.0f} %"
    if word == "equivalent":
        word += f" within {margin}"
    elif word == "undecided":
        word += f" (an effect of {row['mde']:.3f} would be found)"
    elif row["p_equivalent"] < 0.05:
        word += f", less than {margin}"
    if row["papers_effect"] in ("below", "above"):
        word += f", {row['papers_effect']} the paper's effect"
    return f"{word} (bootstrap disagrees)" if row["bootstrap_disagrees"] else word


def show(found: dict) -> None:
    """Levels, then a block of comparisons for each regime."""
    print("what each arm reaches on one base, mean over seeds")
    print(f"{'':3s}{'arm':13s}{'method':16s}{'rate':>7s}{'trained':>11s}{'runs':>6s}"
          f"{'training':>10s}{'held out':>10s}{'reworded':>10s}{'exact':>8s}")  # fmt: skip
    for of in found["levels"]:
        reworded = "-" if of["reworded"] is None else f"{of['reworded']:.4f}"
        print(
            f"{of['regime']:3s}{of['arm']:13s}{of['method']:16s}{of['lr']:7g}{of['trained']:11,}"
            f"{of['runs']:6d}{of['final_loss']:10.4f}{of['loss']:10.4f}{reworded:>10s}"
            f"{of['exact']:8.1%}"
        )
    print("\nlog loss of the other arm, less that of hot (positive: hot is better)")
    head = None
    for row in found["rows"]:
        block = (row["regime"], row["bases"], row["problems"])
        if block != head:
            head = block
            about = f"regime {block[0]}, {block[1]}, {block[2]} problems"
            effect = found["effect"][block[0]]
            if effect and block[2] == "plain":
                about += f" (the paper's hot - cold would be {effect['log_ratio']:+.3f})"
            print(f"\n{about}")
        units = f"{row['df'] + 1} {'seeds' if row['bases'] == ONE else 'bases'}"
        part = "" if row["runs"] == row["planned"] else f", {row['runs']} of {row['planned']} runs"
        low, high = row["bootstrap"]
        p = "< 1e-6" if row["p_corrected"] < 1e-6 else f"{row['p_corrected']:.2g}"
        print(
            f"  {row['arm'] + (' *' if row['primary'] else ''):14s}{row['mean']:+.3f} "
            f"({row['low']:+.3f} to {row['high']:+.3f}; bootstrap {low:+.3f} to {high:+.3f}; "
            f"p {p})  {says(row)}; {units}{part}"
        )
    print("\n* primary: p is corrected for the number of these (Holm)")
    others = sum(row["bootstrap_disagrees"] for row in found["rows"])
    print(f"the bootstrap says otherwise than the verdict in {others} of {len(found['rows'])} rows")
