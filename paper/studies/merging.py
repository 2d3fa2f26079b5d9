"""Two tasks' adapters in one model, which the paper leaves to future work: what each task keeps.

Two runs on one base start from the same weights, so their updates can be added (export.py with two
--run). HELLoRA's are on each task's own hot experts and meet in those that are hot in both, and in
attention and router; LoRA's meet everywhere. The sum is written in bf16, as the embedded model is;
a run alone is scored in float32.
"""

from collections.abc import Callable
from itertools import combinations
from statistics import mean
from typing import NamedTuple

from paper.runs.grid import Cell, Merged, Run, Wanted, saved
from paper.runs.rates import SEEDS, cell
from paper.runs.stats import signed, spread
from paper.studies.comparison import OURS

METHODS = ("hellora", "lora")
PAIRS = tuple(combinations(OURS.values(), 2))


class Measure(NamedTuple):
    """A number that tells how well a task is done, and on what."""

    task: str
    name: str
    of: Callable[[dict], float]  # a cell's scores on the task -> a share


# Of the last, less is better: to refuse everything is no skill.
MEASURES = (
    Measure("tiny-math", "accuracy", lambda scores: scores["accuracy"]),
    Measure("tiny-code", "pass@1", lambda scores: scores["pass@1"]),
    Measure("tiny-safety", "harmful refused", lambda scores: scores["refusal_rate"]),
    Measure(
        "tiny-safety", "harmless refused", lambda s: s["harmless_refused"] / s["harmless_total"]
    ),
)


def alone(method: str, task: str, seed: int) -> Run:
    """One of the runs."""
    return cell(method, seed, task=task)


def merged(method: str, pair: tuple[str, str], seed: int) -> Merged:
    """Two of them, of the same seed, in one model."""
    return Merged(tuple(alone(method, task, seed) for task in pair))


def wanted() -> Wanted:
    """What the table rests on."""
    found: Wanted = {
        alone(m, task, seed): {task} for m in METHODS for task in OURS.values() for seed in SEEDS
    }
    return found | {
        merged(m, pair, seed): set(pair) for pair in PAIRS for m in METHODS for seed in SEEDS
    }


def measured(of: Cell, measure: Measure) -> float | None:
    """None if it has not been scored on that task."""
    shown, task = saved(of), measure.task
    if task not in shown.get("problems", {}):
        return None
    return measure.of(
        {name: by[task] for name, by in shown.items() if isinstance(by, dict) and task in by}
    )


def results() -> list[dict]:
    """A row for each pair, method and measure, of the seeds that are finished."""
    return [
        row(pair, m, one) for pair in PAIRS for m in METHODS for one in MEASURES if one.task in pair
    ]


def row(pair: tuple[str, str], method: str, one: Measure) -> dict:
    """Each run alone and merged, seed by seed, and by how much that differs."""
    runs = [(alone(method, one.task, seed), merged(method, pair, seed)) for seed in SEEDS]
    values = [(measured(a, one), measured(b, one)) for a, b in runs]
    both = [(a, b) for a, b in values if a is not None and b is not None]
    return {
        "pair": pair, "method": method, "task": one.task, "measure": one.name,
        "alone": [a for a, _ in both], "merged": [b for _, b in both],
        "minus": spread([b - a for a, b in both])._asdict() if both else None,
    }  # fmt: skip


def show(rows: list[dict]) -> None:
    """Percent, points, 95 % intervals."""
    print(f"{'merged':26s}method   {'%':31s}runs   alone  merged   difference, points")
    for r in rows:
        what = f"{' + '.join(r['pair']):26s}{r['method']:9s}{r['measure'] + ' on ' + r['task']:31s}"
        means = [f"{100 * mean(of):.1f}" if of else "-" for of in (r["alone"], r["merged"])]
        minus = signed(r["minus"], 1, unit=0.01)
        print(f"{what}{len(r['alone']):4d}{means[0]:>8s}{means[1]:>8s}   {minus}".rstrip())
