"""The second half of Table 8's study: what the hot experts of the tasks have in common (Figures 4 and 6).

And how many requests a model refuses that it need not.
"""

from itertools import combinations, combinations_with_replacement
from math import comb
from statistics import mean

from catcher import overlap
from checkpoint import locate, read_config
from paper.grid import MODEL, Base, saved
from paper.methods import SEEDS, cell
from paper.studies import TASKS

SAFETY = TASKS["safety"]


def results() -> dict:
    """The overlaps of hot experts, and the refusals of harmless requests, of the runs that are finished."""
    runs = {task: [saved(cell("hellora", seed, task=task)) for seed in SEEDS] for task in TASKS.values()}
    hot = {task: {seed: r["hot_experts"] for seed, r in enumerate(of) if r} for task, of in runs.items()}
    refused = {
        name: [r["harmless_refused"][SAFETY] for r in of if SAFETY in r.get("harmless_refused", {})]
        for name, of in {"before": [saved(Base())], **{f"after {t}": of for t, of in runs.items()}}.items()
    }
    return {
        "harmless_refused": refused,
        "overlap": [overlap_row(a, b, hot) for a, b in combinations_with_replacement(TASKS.values(), 2)],
        "overlap_by_chance": chance(8, read_config(locate(MODEL)).n_experts),
    }


def overlap_row(a: str, b: str, hot: dict[str, dict[int, dict]]) -> dict:
    """Jaccard overlap of two tasks' hot experts by layer, mean over seeds; a task and itself: two seeds."""
    pairs = (
        combinations(hot[a].values(), 2)
        if a == b
        else ((hot[a][s], hot[b][s]) for s in hot[a].keys() & hot[b])
    )
    found = [overlap(one, other) for one, other in pairs]
    layers = {layer: mean(f[layer] for f in found) for layer in found[0]} if found else {}
    return {"tasks": [a, b], "layers": layers, "mean": mean(layers.values()) if layers else None}


def chance(k: int, n: int) -> float:
    """The mean Jaccard overlap of two random choices of k out of n experts."""
    return sum(comb(k, j) * comb(n - k, k - j) * j / (2 * k - j) for j in range(k + 1)) / comb(n, k)


def show(found: dict) -> None:
    """Both."""
    print(f"\nharmless requests of {SAFETY} that are refused, in each run")
    for name, counts in found["harmless_refused"].items():
        print(f"{name:28s}{', '.join(map(str, counts)) or '-'}")
    print("\nJaccard overlap of hot experts, by layer (mean over seeds; a task and itself: two seeds)")
    for r in found["overlap"]:
        if r["layers"]:
            layers = " ".join(f"{value:.3f}" for value in r["layers"].values())
            print(f"{' and '.join(r['tasks']):28s}{layers}   mean {r['mean']:.3f}")
    print(f"{'two random choices':28s}{found['overlap_by_chance']:.3f}")
