"""Results of the placement study as its runs would leave them, with effects that are known."""

import base64
import json
import zlib
from math import log
from pathlib import Path

import numpy as np

from paper.studies import placement, placement_runs

LOSS = {"A": 0.1, "P": 0.15, "O": 0.3}  # nats per token of an answer, of hot
EFFECTS = {"A": 0.0, "P": 0.2, "O": -0.08}  # log ratio, other / hot, of arms but those below
ARM_EFFECTS = {("P", "cold"): 3.0, ("A", "all"): 0.03, ("A", "answers"): -0.03}
DEVIATION = {"A": 0.05, "P": 0.12, "O": 0.1}  # of log ratios, by seed
RATE = 0.01


def rates() -> dict:
    """A rate for each arm of each regime."""
    return {
        (name, arm): RATE for name, regime in placement_runs.REGIMES.items() for arm in regime.arms
    }


def simulate(folder: Path, monkeypatch, keep=lambda run: True) -> list:
    """Write the runs that `keep` takes as cells in `folder`, which becomes that of the study."""
    monkeypatch.setattr(placement_runs, "RATES", rates())
    monkeypatch.setattr(placement_runs, "RESULTS", folder)
    placement.finished.cache_clear()
    placement.losses.cache_clear()
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run for run in placement_runs.test_runs() if keep(run)]
    runs += [run for run in placement_runs.tuning_runs() if run.arm in ("hot", "all")]
    sizes = placement.answer_sizes(placement_runs.MODEL, placement_runs.TASK)
    for run in runs:
        run.result.write_text(json.dumps(cell(run, np.array(sizes))))
    return runs


def cell(run: placement_runs.Placed, sizes: np.ndarray) -> dict:
    """What is kept of a run; losses by chance, the same at each call."""
    draw = np.random.default_rng(zlib.crc32(run.name.encode()))
    effect = ARM_EFFECTS.get((run.regime, run.arm), EFFECTS[run.regime])
    effect = 0 if run.arm == "hot" else draw.normal(effect, DEVIATION[run.regime])
    shared = np.random.default_rng(zlib.crc32(f"{run.model}{run.regime}{run.seed}".encode()))
    hard = np.random.default_rng(0).exponential(1, len(sizes))  # how hard each problem is
    scale = LOSS[run.regime] * np.exp(shared.normal(0, 0.1) + effect) * (run.lr / RATE) ** 0.3
    losses = (sizes * scale * hard * draw.uniform(0.8, 1.2, len(sizes))).astype("<f2")
    task = placement_runs.TEST
    if run.seed in placement_runs.TUNING_SEEDS:
        task, losses, sizes = placement_runs.DEV, losses[:500], sizes[:500]
    exact = losses < log(2)
    packed = {
        "loss": base64.b64encode(losses.tobytes()).decode(),
        "exact": base64.b64encode(np.packbits(exact).tobytes()).decode(),
    }
    rests_on = run.rests_on()
    about = {
        name: getattr(run, name) for name in ("model", "regime", "arm", "seed", "method", "lr")
    }
    return {
        **rests_on,
        "hashes": {"model": rests_on.get("model")},
        **about,
        "trained": 161_792,
        "final_loss": 0.01,
        "problems": {task: len(losses)},
        "loss": {task: float(losses.astype(float).sum() / sizes.sum())},
        "exact": {task: float(exact.mean())},
        "items": {task: packed},
    }
