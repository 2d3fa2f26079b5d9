"""A grid of training runs: what is missing is run, as many at a time as there are cores; then a table.

Each cell of a grid is one run of train.py. What it showed is kept as one small file in docs/results/cells/,
so a grid that was stopped goes on where it was, and a reader sees every number that a mean is made of.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from checkpoint import fingerprint, locate, read_config
from data import TASKS, encode, load_examples
from job import SCORED_BY, SCORES, hashes
from run import read_json, read_results, read_run, versions, write_json
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "cells"
RUNS = ROOT / "runs" / "grid"
MODEL = "tiny"
LAST_STEPS = 10  # a run's final training loss is the mean over these; its curve has a mean for so many


@dataclass(frozen=True)
class Base:
    """The model as it is: a cell with nothing to train."""

    @property
    def name(self) -> str:
        """Its folder and its result file are called so."""
        return f"{MODEL}-base"

    @property
    def folder(self) -> Path:
        """Where its scores are, or its run."""
        return RUNS / self.name

    @property
    def result(self) -> Path:
        """Where what it showed is kept."""
        return RESULTS / f"{self.name}.json"

    @property
    def scored_as(self) -> str:
        """How an evaluation is told what to score."""
        return f"--model {MODEL} --out {self.folder}"

    def rests_on(self) -> dict[str, str]:
        """What its numbers rest on if it is run now, but for the code, whose changes mostly move none."""
        return {"model": fingerprint(locate(MODEL))}

    def train(self) -> None:
        """Nothing to do."""

    def shown(self) -> dict:
        """What is kept of it besides scores."""
        return {"method": "base", "hashes": self.rests_on(), "versions": versions(torch.device("cpu"))}


@dataclass(frozen=True)
class Cell(Base):
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
    def scored_as(self) -> str:
        """How an evaluation is told what to score."""
        return f"--run {self.folder}"

    def command(self) -> list[str]:
        """The arguments after "python" that make its run."""
        flags = {"--method": self.method, "--k": self.k, "--task": self.task, "--lr": f"{self.lr:g}"}
        flags |= {"--seed": self.seed, "--out": self.folder.relative_to(ROOT)}
        if self.mask:
            flags |= {"--mask-from": self.mask.folder.relative_to(ROOT)}
        return ["train.py", *(str(word) for flag in flags.items() for word in flag), "--no-eval"]

    def rests_on(self) -> dict[str, str]:
        """What its numbers rest on if it is run now: model and data, and the command with every setting."""
        return {name: now_hashes(self.task)[name] for name in ("model", "data")} | {
            "command": "python " + " ".join(self.command())
        }

    def train(self) -> None:
        """Make its run, or go on with it, unless it is finished; first the run it takes its mask from."""
        if self.mask:
            self.mask.train()
        record = self.folder / "run.json"
        if not (record.exists() and read_run(self.folder)["finished"]):
            python(*self.command())

    def shown(self) -> dict:
        """What is kept of its run besides scores."""
        run, lists = read_run(self.folder), self.folder / "hot_experts.json"
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        hot = {"hot_experts": read_json(lists, "hot experts")["experts"]} if lists.exists() else {}
        return {
            **asdict(self),
            "mask": self.mask and self.mask.name,
            "command": "python " + " ".join(self.command()),
            "first_loss": losses[0],
            "final_loss": mean(losses[-LAST_STEPS:]),
            "losses": [round(mean(losses[i : i + LAST_STEPS]), 4) for i in range(0, len(losses), LAST_STEPS)],
            "date": datetime.now(UTC).date().isoformat(),
            **{name: run[name] for name in ("trained", "stored", "versions", "hashes")},
            **hot,
        }


@cache
def now_hashes(task: str) -> dict[str, str]:
    """The hashes that run.json would get now for a run on `task`."""
    source = locate(MODEL)
    examples = load_examples(task, TASKS[task].train.fetch())
    return hashes(source, encode(examples, load_tokenizer(source), read_config(source).max_len))


def python(*arguments: str) -> None:
    """Run a command of this repository in a process of its own, on one thread, in the clone's root.

    One thread each is the most work per core, and makes a cell's numbers independent of the cores there are.
    Raises OSError with the command and the last line that it printed if it fails.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        *_, last = ["no message", *done.stderr.split("\n")[:-1]]
        command = f"python {' '.join(arguments)}"
        raise OSError(f"a command of the grid ended with exit code {done.returncode}: {command} ({last})")


def saved(cell: Base) -> dict:
    """What is kept of a cell, {} if nothing is. Raises ValueError if a run would now be another."""
    if not cell.result.exists():
        return {}
    kept = read_json(cell.result, "the result of a grid's cell")
    then = kept | kept.get("hashes", {})
    if differ := [name for name, value in cell.rests_on().items() if then.get(name) != value]:
        raise ValueError(
            f"{cell.result} was measured with another {' and '.join(differ)} than now: take the file away "
            f"(and {cell.folder}) to measure it again"
        )
    return kept


def missing_tasks(cell: Base, tasks: Iterable[str]) -> list[str]:
    """Those of `tasks` for which no score of the cell is kept."""
    return [task for task in tasks if task not in saved(cell).get("problems", {})]


def run_cell(cell: Base, tasks: Iterable[str]) -> None:
    """Train it unless its run is there; score it on those of `tasks` that it lacks; keep what came out."""
    cell.train()
    kept, shown = saved(cell), cell.shown()
    if kept.get("final_loss", shown.get("final_loss")) != shown.get("final_loss"):
        raise ValueError(
            f"the run in {cell.folder} ends with another loss than that of {cell.result}, whose scores "
            "cannot be added to: take that file away to measure all of them on this run"
        )
    shown |= kept
    for task in missing_tasks(cell, tasks):
        kind = TASKS[task].kind
        if task not in read_results(cell.folder):
            _, *words = shlex.split(SCORED_BY[kind].replace("--run {}", cell.scored_as))
            python(*words, "--task", task)
        result = read_results(cell.folder)[task]
        for score, of in (("problems", "total"), *((name, name) for name in SCORES[kind])):
            shown[score] = shown.get(score, {}) | {task: result[of]}
    write_json(cell.result, shown)


def run_cells(cells: Iterable[Base], tasks: Iterable[str], jobs: int) -> list[dict]:
    """What each cell showed, with its scores on all `tasks`, in their order; what is missing is run first.

    `jobs` at a time. A result looks like {"method", ..., "accuracy": {task: share}, "problems": {task: n}};
    the other kinds of task have the scores of job.SCORES in place of an accuracy.
    """
    cells, tasks = list(cells), list(tasks)
    missing = [cell for cell in cells if missing_tasks(cell, tasks)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(missing), unit="run", disable=not missing) as bar:
        masks = {mask for cell in missing if (mask := getattr(cell, "mask", None))}
        list(pool.map(Cell.train, masks))  # once each, before all that ask
        waiting = {pool.submit(run_cell, cell, tasks): cell for cell in missing}
        try:
            for done in as_completed(waiting):
                done.result()
                bar.set_description(waiting[done].name)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the runs that are under way end or are resumed
            raise
    return [saved(cell) for cell in cells]
