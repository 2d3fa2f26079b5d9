"""A grid of training runs: what is missing is run, as many at a time as there are cores; then a table.

Each cell of a grid is one run of train.py. What it showed is kept as one small file in docs/results/cells/,
so a grid that was stopped goes on where it was, and a reader sees every number that a mean is made of.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from tqdm import tqdm

from run import read_json, read_results, read_run, write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "cells"
RUNS = ROOT / "runs" / "grid"
DEV = {"tiny-math": "tiny-math-dev"}  # task -> the problems on which settings are chosen
LAST_STEPS = 10  # a run's final training loss is the mean over these


class Cell(NamedTuple):
    """One run of train.py: a method on a task, with a learning rate and a seed."""

    method: str
    lr: float
    seed: int
    k: int = 8
    task: str = "tiny-math"
    mask: "Cell | None" = None  # the D run that gives a LoRI-S method its mask

    @property
    def name(self) -> str:
        """Its run folder and its result file are called so."""
        return f"{self.task}-{self.method}-k{self.k}-lr{self.lr:g}-s{self.seed}"

    @property
    def folder(self) -> Path:
        """Where its run is."""
        return RUNS / self.name

    @property
    def result(self) -> Path:
        """Where what it showed is kept."""
        return RESULTS / f"{self.name}.json"

    def command(self) -> list[str]:
        """The arguments after "python" that make its run."""
        flags = {"--method": self.method, "--k": self.k, "--task": self.task, "--lr": f"{self.lr:g}"}
        flags |= {"--seed": self.seed, "--out": self.folder.relative_to(ROOT)}
        if self.mask:
            flags |= {"--mask-from": self.mask.folder.relative_to(ROOT)}
        return ["train.py", *(str(word) for flag in flags.items() for word in flag), "--no-eval"]


def python(*arguments: str) -> None:
    """Run a command of this repository in a process of its own, on one thread, in the clone's root.

    One thread each is the most work per core, and makes a cell's numbers independent of the cores there are.
    Raises RuntimeError with the end of its output if it fails.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def train(cell: Cell) -> None:
    """Make the cell's run, or go on with it, unless it is finished; first the run it takes its mask from."""
    if cell.mask:
        train(cell.mask)
    record = cell.folder / "run.json"
    if not (record.exists() and read_run(cell.folder)["finished"]):
        python(*cell.command())


def run_cell(cell: Cell) -> None:
    """Train, score on dev and test, and keep what came out."""
    train(cell)
    for task in (cell.task, DEV[cell.task]):
        if task not in read_results(cell.folder):
            python("eval_gsm8k.py", "--run", str(cell.folder), "--task", task)
    run, scores = read_run(cell.folder), read_results(cell.folder)
    lines = (cell.folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    shown = cell._asdict() | {
        "mask": cell.mask and cell.mask.name,
        "command": "python " + " ".join(cell.command()),
        "accuracy": {task: of["accuracy"] for task, of in scores.items()},
        "problems": {task: of["total"] for task, of in scores.items()},
        "first_loss": losses[0],
        "final_loss": mean(losses[-LAST_STEPS:]),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_json(cell.result, shown | {name: run[name] for name in ("trained", "stored", "versions", "hashes")})


def run_cells(cells: Iterable[Cell], jobs: int) -> list[dict]:
    """Run those cells that have no result yet, `jobs` at a time; the results of all, in their order."""
    cells = list(cells)
    missing = [cell for cell in cells if not cell.result.exists()]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), unit="run", disable=not missing) as bar:
        list(pool.map(train, {cell.mask for cell in missing if cell.mask}))  # once each, before all that ask
        waiting = {pool.submit(run_cell, cell): cell for cell in missing}
        try:
            for done in as_completed(waiting):
                done.result()
                bar.set_description(waiting[done].name)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the runs that are under way end or are resumed
            raise
    return [read_json(cell.result, "the result of a grid's cell") for cell in cells]
