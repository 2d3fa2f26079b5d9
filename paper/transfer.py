"""Table 8 in miniature: tuned on one task, scored on all three, before and after; and whose experts are hot.

The embedded model stands for OLMoE-1B-7B, its tasks for GSM8K, CodeAlpaca with HumanEval, and Saferpaca
with HEx-PHI. The paper's cells of the task that a model was tuned on are those of its Table 2.
"""

from itertools import combinations, combinations_with_replacement
from math import comb
from statistics import mean, stdev

from catcher import overlap
from checkpoint import locate, read_config
from job import RECIPES
from paper.grid import MODEL, Base, Cell, run_cells

TASKS = ("tiny-math", "tiny-code", "tiny-safety")
SEEDS = (0, 1, 2)
LR = RECIPES["tiny", False].lr
COLUMNS = {  # score -> the task it is of
    "accuracy": "tiny-math", "pass@1": "tiny-code", "pass@5": "tiny-code", "pass@10": "tiny-code",
    "refusal_rate": "tiny-safety",
}  # fmt: skip
PAPER = {  # tuned on -> percents in the order of COLUMNS; "base": before
    "base": (1.66, 13.41, 16.81, 18.17, 66.75),
    "tiny-math": (29.49, 13.78, 18.94, 20.63, 58.43),
    "tiny-code": (5.86, 17.87, 22.04, 23.82, 63.01),
    "tiny-safety": (2.83, 15.18, 19.51, 21.33, 99.06),
}


def compare(jobs: int) -> dict:
    """Run what is missing; the rows of the table, and the overlaps of hot experts."""
    before = run_cells([Base()], TASKS, jobs)
    cells = [Cell("hellora", LR, seed, task=task) for seed in SEEDS for task in TASKS]
    results = run_cells(cells, TASKS, jobs)
    tuned = {task: [r for r in results if r["task"] == task] for task in TASKS}
    hot = {task: [r["hot_experts"] for r in of] for task, of in tuned.items()}
    return {
        "scores": [row(name, of, before[0]) for name, of in {"base": before, **tuned}.items()],
        "overlap": [overlap_row(a, b, hot) for a, b in combinations_with_replacement(TASKS, 2)],
        "overlap_by_chance": chance(cells[0].k, read_config(locate(MODEL)).n_experts),
    }


def row(tuned_on: str, results: list[dict], before: dict) -> dict:
    """One row: shares of 1 of each seed, their mean and spread, the least gain, and the paper's percents."""
    scores = {}
    for (score, task), paper in zip(COLUMNS.items(), PAPER[tuned_on], strict=True):
        seeds = [r[score][task] for r in results]
        scores[score] = {
            "seeds": seeds,
            "mean": mean(seeds),
            "std": stdev(seeds) if len(seeds) > 1 else None,
            "least_gain": min(seeds) - before[score][task],
            "paper": paper,
        }
    harmless = [r["harmless_refused"][TASKS[-1]] for r in results]
    of = before["harmless_total"][TASKS[-1]]
    return {"tuned_on": tuned_on, **scores, "harmless_refused": harmless, "harmless_total": of}


def overlap_row(a: str, b: str, hot: dict[str, list[dict]]) -> dict:
    """Jaccard overlap of two tasks' hot experts by layer, mean over seeds; a task and itself: two seeds."""
    pairs = combinations(hot[a], 2) if a == b else zip(hot[a], hot[b], strict=True)
    found = [overlap(one, other) for one, other in pairs]
    layers = {layer: mean(f[layer] for f in found) for layer in found[0]}
    return {"tasks": [a, b], "layers": layers, "mean": mean(layers.values())}


def chance(k: int, n: int) -> float:
    """The mean Jaccard overlap of two random choices of k out of n experts."""
    return sum(comb(k, j) * comb(n - k, k - j) * j / (2 * k - j) for j in range(k + 1)) / comb(n, k)


def show(found: dict) -> None:
    """Both tables."""
    print(f"{'%, mean +- std of seeds 0, 1, 2':33s}" + "".join(f"{score:>14s}" for score in COLUMNS))
    for r in found["scores"]:
        of = "before" if r["tuned_on"] == "base" else f"after {r['tuned_on']}"
        ours = (
            f"{100 * r[s]['mean']:.1f}" + ("" if r[s]["std"] is None else f" +- {100 * r[s]['std']:.1f}")
            for s in COLUMNS
        )
        print(f"{of:33s}" + "".join(f"{cell:>14s}" for cell in ours))
        print(f"{'  the paper, OLMoE-1B-7B':33s}" + "".join(f"{r[s]['paper']:14.2f}" for s in COLUMNS))
    for task, r in zip(TASKS, found["scores"][1:], strict=True):
        own = next(score for score, of in COLUMNS.items() if of == task)
        gain = 100 * r[own]["least_gain"]
        print(f"{task}: tuning on it gains {gain:.1f} points of {own} or more in each seed")
    for r in found["scores"]:
        counts = ", ".join(map(str, r["harmless_refused"]))
        print(f"{r['tuned_on']}: refuses {counts} of {r['harmless_total']} harmless requests of tiny-safety")

    print("\nJaccard overlap of hot experts, by layer (mean over seeds; a task and itself: two seeds)")
    for r in found["overlap"]:
        layers = " ".join(f"{value:.3f}" for value in r["layers"].values())
        print(f"{' and '.join(r['tasks']):33s}{layers}   mean {r['mean']:.3f}")
    print(f"{'two random choices':33s}{found['overlap_by_chance']:.3f}")
