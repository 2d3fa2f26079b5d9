"""How stable a hot list is, over samples, seeds of the warm-up, training, and tasks.

Lists are compared by their Jaccard overlap in each layer (catcher.overlap). The lists that are
counted here are kept in docs/results/stability.json. The lists of warm-ups are in the cells of
their runs.
"""

from collections.abc import Iterable
from itertools import combinations, combinations_with_replacement
from math import comb
from pathlib import Path
from statistics import mean

import torch

from catcher import overlap, sample
from hellora import adapter_state, attach_run, load_run, merge
from moe_model import MoEModel
from paper.runs.grid import MODEL, ROOT, Run, Wanted, make, saved
from paper.runs.rates import SEEDS, TASK, cell
from paper.studies.comparison import OURS
from plumbing import saves
from plumbing.base_model import base_folder
from plumbing.checkpoint import locate, read_config
from plumbing.data import TASKS, encode, load_examples
from plumbing.files import read_json, write_json
from plumbing.run_folder import read_run, versions
from plumbing.tokenizer import load_tokenizer
from tiny.report import hot, visits

RESULT = ROOT / "docs" / "results" / "stability.json"
SHARES, SAMPLES = (0.01, 0.03, 0.1, 0.3), range(5)  # of the training split, seeds of the samples
TENTH = 0.1  # the share that a warm-up trains on
MIDDLE = 141  # a run has 282 steps
Hot = dict[str, list[int]]  # layer -> its hot experts, as in JSON


def runs() -> list[Run]:
    """HELLoRA as in the other tables, but with saves only in the middle and at the end."""
    return [cell("hellora", seed, flags=("--save-every", str(MIDDLE))) for seed in SEEDS]


def wanted() -> Wanted:
    """The cells and scores behind the tables."""
    return {run: {TASK} for run in (*(cell("hellora", seed) for seed in SAMPLES), *runs())}


# ---- counting ------------------------------------------------------------------------------------


def measure() -> None:
    """Count the lists that no run has in its folder, and keep them, unless they are kept."""
    if kept():
        return
    torch.set_num_threads(1)
    for run in runs():
        make(run)  # this does nothing if its folder is there
    source = locate(MODEL)
    base = MoEModel.from_pretrained(source)
    data = encode(
        load_examples(TASK, TASKS[TASK].train.fetch()), load_tokenizer(source), base.cfg.max_len
    )
    lists = {
        f"{share:g}": [hot_experts(base, sample(data, share, seed)) for seed in SAMPLES]
        for share in SHARES
    }
    lists["1"] = [hot_experts(base, data)]
    lists["middle"] = [hot_experts(at_save_before_last(run.folder, MIDDLE), data) for run in runs()]
    lists["end"] = [hot_experts(load_run(run.folder)[0], data) for run in runs()]
    inputs = {"rests_on": rests_on(), "versions": versions(torch.device("cpu"))}
    write_json(RESULT, inputs | {"lists": lists})


def hot_experts(model: MoEModel, data: list) -> Hot:
    """The hot experts of a model, without a warm-up."""
    return {str(layer): ids for layer, ids in hot(model, visits(model, data)).items()}


def at_save_before_last(folder: Path, step: int) -> MoEModel:
    """The merged model of a finished run after `step` steps.

    Raises ValueError if there is no save of that step.
    """
    save = saves.read(folder / saves.BEFORE)
    if save.step != step:
        raise ValueError(
            f"{folder} was saved after step {save.step}, not {step}, as it was stopped and "
            "resumed: delete it, to train it again"
        )
    model = MoEModel.from_pretrained(base_folder(read_run(folder)))
    attach_run(model, folder)
    parts = {tuple(path.split("/", 1)): tensor for path, tensor in save.tensors.items()}
    weights = {name: tensor for (kind, name), tensor in parts.items() if kind == saves.WEIGHTS}
    saves.fill(adapter_state(model), weights, folder)
    merge(model)
    return model


def rests_on() -> list[dict]:
    """The models, data and runs behind the lists."""
    return [run.rests_on() for run in runs()]


def kept() -> dict[str, list[Hot]]:
    """The kept lists, or {}. Raises ValueError if counting now would give other lists."""
    if not RESULT.exists():
        return {}
    found = read_json(RESULT, "what paper.reproduce stability counted")
    if found["rests_on"] != rests_on():
        raise ValueError(
            f"{RESULT} was counted on another model, data or runs: delete it to count again"
        )
    return found["lists"]


# ---- comparing -----------------------------------------------------------------------------------


def results() -> dict:
    """{question: {comparison: its overlaps}}, as far as there are lists."""
    warm = {
        seed: shown["hot_experts"] for seed in SAMPLES if (shown := saved(cell("hellora", seed)))
    }
    cfg = read_config(locate(MODEL))
    return {
        "overlaps": {
            question: {name: compared(pairs) for name, pairs in rows.items()}
            for question, rows in questions(kept(), warm).items()
        },
        "by_chance": chance(cfg.top_k, cfg.n_experts),
    }


def questions(lists: dict[str, list[Hot]], warm: dict[int, Hot]) -> dict[str, dict[str, Iterable]]:
    """{question: {comparison: the pairs of lists}}. warm: seed -> the list of its warm-up."""
    seeds = {"two warm-ups": combinations(warm.values(), 2)}
    if not lists:
        return {"the seed": seeds}
    (full,), middle, end = lists["1"], lists["middle"], lists["end"]
    tenth = lists[f"{TENTH:g}"]
    return {
        "the sample (the base, and all of the data)": {
            f"{share:.0%} of the data": [(one, full) for one in lists[f"{share:g}"]]
            for share in SHARES
        },
        "the seed (10 % of the data)": {
            "two samples, counted on the base": combinations(tenth, 2),
            **seeds,
            "warm-up and base, same sample": [
                (warmed, tenth[seed]) for seed, warmed in warm.items()
            ],
            "warm-up, and base on all data": [(warmed, full) for warmed in warm.values()],
        },
        "training (all of the data)": {
            "base and middle": [(full, one) for one in middle],
            "middle and end": zip(middle, end, strict=True),
            "base and end": [(full, one) for one in end],
            "warm-up, and end": [(warm[seed], end[seed]) for seed in SEEDS if seed in warm],
        },
    }


def compared(pairs: Iterable[tuple[Hot, Hot]]) -> dict:
    """The overlap of each pair (mean over layers), and of each layer (mean over pairs)."""
    found = [overlap(a, b) for a, b in pairs]
    return {
        "overlaps": [mean(by_layer.values()) for by_layer in found],
        "layers": {n: mean(by_layer[n] for by_layer in found) for n in found[0]} if found else {},
    }


def chance(k: int, n: int) -> float:
    """The mean Jaccard overlap of two random choices of k out of n experts."""
    return sum(comb(k, j) * comb(n - k, k - j) * j / (2 * k - j) for j in range(k + 1)) / comb(n, k)


def show(found: dict) -> None:
    """Print means and ranges. Pairs share lists, so they give no interval."""
    print("Jaccard overlap of hot lists     pairs    mean    range             by layer")
    for question, rows in found["overlaps"].items():
        print(f"against {question}")
        for name, r in rows.items():
            values = r["overlaps"]
            numbers = "-"
            if values:
                numbers = f"{mean(values):.3f}   {min(values):.3f} to {max(values):.3f}    "
            layers = " ".join(f"{value:.3f}" for value in r["layers"].values())
            print(f"  {name:34s}{len(values):2d}   {numbers}{layers}".rstrip())
    print(f"{'two random choices':36s}     {found['by_chance']:.3f}")


# ---- hot experts of other tasks: Figures 4 and 6 of the paper ------------------------------------


def results_of_tasks() -> dict:
    """The overlaps of the tasks' hot experts, from the runs of Table 8."""
    runs = {
        task: [saved(cell("hellora", seed, task=task)) for seed in SEEDS] for task in OURS.values()
    }
    hot = {
        task: {seed: r["hot_experts"] for seed, r in enumerate(kept_runs) if r}
        for task, kept_runs in runs.items()
    }
    return {
        "overlap": [
            overlap_row(a, b, hot) for a, b in combinations_with_replacement(OURS.values(), 2)
        ],
        "overlap_by_chance": chance(8, read_config(locate(MODEL)).n_experts),
    }


def overlap_row(a: str, b: str, hot: dict[str, dict[int, Hot]]) -> dict:
    """The overlaps of two tasks' hot experts, seed by seed. One task: the overlaps of two seeds."""
    other_seeds, same_seed = combinations(hot[a].values(), 2), hot[a].keys() & hot[b]
    pairs = other_seeds if a == b else [(hot[a][seed], hot[b][seed]) for seed in same_seed]
    return {"tasks": [a, b], **compared(pairs)}


def show_tasks(found: dict) -> None:
    """Print a line for each two tasks: the overlap in each layer, and the mean."""
    print("\nJaccard overlap of hot experts, by layer (mean over seeds; for one task: two seeds)")
    for r in found["overlap"]:
        if r["overlaps"]:
            layers = " ".join(f"{value:.3f}" for value in r["layers"].values())
            print(f"{' and '.join(r['tasks']):28s}{layers}   mean {mean(r['overlaps']):.3f}")
    print(f"{'two random choices':28s}{found['overlap_by_chance']:.3f}")
