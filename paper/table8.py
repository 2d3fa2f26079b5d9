"""What Table 8's runs show besides scores: what the tasks' hot experts have in common (Figures 4 and 6)."""

from itertools import combinations, combinations_with_replacement
from statistics import mean

from checkpoint import locate, read_config
from paper.grid import MODEL, saved
from paper.methods import SEEDS, cell
from paper.stability import Hot, chance, compared
from paper.studies import OURS


def results() -> dict:
    """The overlaps of the hot experts of the runs that are finished."""
    runs = {task: [saved(cell("hellora", seed, task=task)) for seed in SEEDS] for task in OURS.values()}
    hot = {task: {seed: r["hot_experts"] for seed, r in enumerate(of) if r} for task, of in runs.items()}
    return {
        "overlap": [overlap_row(a, b, hot) for a, b in combinations_with_replacement(OURS.values(), 2)],
        "overlap_by_chance": chance(8, read_config(locate(MODEL)).n_experts),
    }


def overlap_row(a: str, b: str, hot: dict[str, dict[int, Hot]]) -> dict:
    """Overlaps of two tasks' hot experts, seed by seed; of a task and itself: of each two seeds."""
    other_seeds, same_seed = combinations(hot[a].values(), 2), hot[a].keys() & hot[b]
    pairs = other_seeds if a == b else [(hot[a][seed], hot[b][seed]) for seed in same_seed]
    return {"tasks": [a, b], **compared(pairs)}


def show(found: dict) -> None:
    """A line for each two tasks: each layer's overlap, and the mean."""
    print("\nJaccard overlap of hot experts, by layer (mean over seeds; a task and itself: two seeds)")
    for r in found["overlap"]:
        if r["overlaps"]:
            layers = " ".join(f"{value:.3f}" for value in r["layers"].values())
            print(f"{' and '.join(r['tasks']):28s}{layers}   mean {mean(r['overlaps']):.3f}")
    print(f"{'two random choices':28s}{found['overlap_by_chance']:.3f}")
