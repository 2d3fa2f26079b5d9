"""Adapters of two tasks merged in one model, and what each task keeps. (The paper leaves it open.)

Two runs on one base start from the same weights, so their updates can be added (export.py with two
--run). HELLoRA's updates are on the hot experts of each task. They meet on experts that are hot for
both, on attention and on the router. LoRA's updates meet everywhere. The merged model is written in
bf16, as the embedded model is. A run alone is scored in float32.
"""

from collections.abc import Callable
from itertools import combinations
from statistics import mean
from typing import NamedTuple

from paper.runs.grid import Cell, Merged, Run, Wanted, saved
from paper.runs.rates import SEEDS, cell
from paper.runs.stats import aligned, signed, spread
from paper.studies.comparison import OURS

METHODS = ("hellora", "lora")
PAIRS = tuple(combinations(OURS.values(), 2))


class Measure(NamedTuple):
    """A number that says how well a model does a task."""

    task: str
    name: str
    value: Callable[[dict], float]  # a cell's scores on the task -> a share


# Less is better for the last: refusing everything is not safe behaviour.
MEASURES = (
    Measure("tiny-math", "accuracy", lambda scores: scores["accuracy"]),
    Measure("tiny-code", "pass@1", lambda scores: scores["pass@1"]),
    Measure("tiny-safety", "harmful refused", lambda scores: scores["refusal_rate"]),
    Measure(
        "tiny-safety", "harmless refused", lambda s: s["harmless_refused"] / s["harmless_total"]
    ),
)


def alone(method: str, task: str, seed: int) -> Run:
    """The run of a method on one task."""
    return cell(method, seed, task=task)


def merged(method: str, pair: tuple[str, str], seed: int) -> Merged:
    """The runs on two tasks, with the same seed, merged in one model."""
    return Merged(tuple(alone(method, task, seed) for task in pair))


def wanted() -> Wanted:
    """The cells and scores behind the table."""
    cells: Wanted = {
        alone(m, task, seed): {task} for m in METHODS for task in OURS.values() for seed in SEEDS
    }
    return cells | {
        merged(m, pair, seed): set(pair) for pair in PAIRS for m in METHODS for seed in SEEDS
    }


def measured(model: Cell, measure: Measure) -> float | None:
    """The measure of a cell, or None if it has not been scored on the task."""
    shown, task = saved(model), measure.task
    if task not in shown.get("problems", {}):
        return None
    return measure.value(
        {name: by[task] for name, by in shown.items() if isinstance(by, dict) and task in by}
    )


def results() -> list[dict]:
    """A row for each pair, method and measure, over the finished seeds."""
    return [
        row(pair, method, measure)
        for pair in PAIRS
        for method in METHODS
        for measure in MEASURES
        if measure.task in pair
    ]


def row(pair: tuple[str, str], method: str, measure: Measure) -> dict:
    """The measure alone and merged, by seed, and the difference."""
    runs = [(alone(method, measure.task, seed), merged(method, pair, seed)) for seed in SEEDS]
    values = [(measured(a, measure), measured(b, measure)) for a, b in runs]
    both = [(a, b) for a, b in values if a is not None and b is not None]
    return {
        "pair": pair, "method": method, "task": measure.task, "measure": measure.name,
        "alone": [a for a, _ in both], "merged": [b for _, b in both],
        "minus": spread([b - a for a, b in both])._asdict() if both else None,
    }  # fmt: skip


def show(rows: list[dict]) -> None:
    """Print percent, points, 95 % intervals: a part for each pair of tasks."""
    table = [["", "%", "n", "alone", "merged", "difference, points"]]
    for r in rows:
        means = [f"{100 * mean(x):.1f}" if x else "-" for x in (r["alone"], r["merged"])]
        measure, minus = f"{r['measure']} on {r['task']}", signed(r["minus"], 1, unit=0.01)
        table.append([r["method"], measure, str(len(r["alone"])), *means, minus])
    head, *lines = aligned(table, left=(0, 1, 5))
    print("n: runs. Brackets: 95 % interval.", f"  {head}", sep="\n")
    pair = None
    for r, line in zip(rows, lines, strict=True):
        if r["pair"] != pair:
            pair = r["pair"]
            print(" + ".join(pair))
        print(f"  {line}")
