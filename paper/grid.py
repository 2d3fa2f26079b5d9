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
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import chain, groupby
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from catcher import HotList, visited_share
from checkpoint import fingerprint, locate, read_config
from data import TASKS, encode, load_examples
from job import SCORED_BY, SCORES, hashes
from run import read_json, read_results, read_run, versions, write_json
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "cells"
RUNS = ROOT / "runs" / "grid"
MODEL = "tiny"
BASES = (
    "runs/bases/tiny-s"  # what tiny.pretrain makes from the seed that follows; only the tokenizer is MODEL's
)
PRETRAINING = "pretraining"  # no task, but scored as one: what a model can still do (paper/forgetting.py)
LAST_STEPS = 10  # a run's final training loss is the mean over these; its curve has a mean for so many


@dataclass(frozen=True)
class Base:
    """A model as it is: a cell with no run."""

    model: str = field(default=MODEL, kw_only=True)  # what --model takes

    @property
    def name(self) -> str:
        """Its folder and its result file are called so."""
        return f"{Path(self.model).name}-base"

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
        return f"--model {self.model} --out {self.folder}"

    def rests_on(self) -> dict[str, str]:
        """What its numbers rest on if it is run now, but for the code, whose changes mostly move none."""
        return {"model": fingerprint(locate(MODEL))} if self.model == MODEL else {}

    def needs(self) -> list["Base"]:
        """Cells to train before this one."""
        return []

    def train(self) -> None:
        """Nothing to do, but for a model that tiny.pretrain makes."""
        folder = ROOT / self.model
        if self.model.startswith(BASES) and not folder.exists():
            part = folder.with_name(folder.name + ".part")
            seed = folder.name.rpartition("-s")[2]
            python("-m", "tiny.pretrain", "--seed", seed, "--out", str(part))
            part.rename(folder)

    def shown(self) -> dict:
        """What is kept of it besides scores."""
        made = {"model": fingerprint(locate(self.model if self.model == MODEL else ROOT / self.model))}
        return {"method": "base", "hashes": made, "versions": versions(torch.device("cpu"))}


@dataclass(frozen=True)
class Cell(Base):
    """One run of train.py: a method on a task, with a learning rate and a seed."""

    method: str
    lr: float
    seed: int
    k: int = 8
    task: str = "tiny-math"
    mask: "Cell | None" = None  # the D run that gives a LoRI-S method its mask
    flags: tuple[str, ...] = ()  # further ones of train.py

    @property
    def name(self) -> str:
        """Its run folder and its result file are called so."""
        base = () if self.model == MODEL else (Path(self.model).name,)
        flags = (flag.strip("-") for flag in self.flags)
        settings = (self.task, self.method, f"k{self.k}", f"lr{self.lr:g}", f"s{self.seed}")
        return "-".join((*base, *settings, *flags))

    @property
    def scored_as(self) -> str:
        """How an evaluation is told what to score."""
        return f"--run {self.folder}"

    def command(self) -> list[str]:
        """The arguments after "python" that make its run."""
        flags = {} if self.model == MODEL else {"--model": self.model}
        flags |= {"--method": self.method, "--k": self.k, "--task": self.task, "--lr": f"{self.lr:g}"}
        flags |= {"--seed": self.seed, "--out": self.folder.relative_to(ROOT)}
        if self.mask:
            flags |= {"--mask-from": self.mask.folder.relative_to(ROOT)}
        return ["train.py", *(str(word) for flag in flags.items() for word in flag), *self.flags, "--no-eval"]

    def rests_on(self) -> dict[str, str]:
        """What its numbers rest on if it is run now: model and data, and the command with every setting."""
        known = ("model", "data") if self.model == MODEL else ("data",)  # other bases are not committed
        return {name: now_hashes(self.task)[name] for name in known} | {
            "command": "python " + " ".join(self.command())
        }

    def needs(self) -> list[Base]:
        """Its base, if that is to be made first; and the run that it takes its mask from."""
        base = [Base(model=self.model)] if self.model.startswith(BASES) else []
        return [*base, *([*self.mask.needs(), self.mask] if self.mask else [])]

    def train(self) -> None:
        """Make its run, or go on with it, unless it is finished."""
        record = self.folder / "run.json"
        if not (record.exists() and read_run(self.folder)["finished"]):
            python(*self.command())

    def shown(self) -> dict:
        """What is kept of its run besides scores."""
        run = read_run(self.folder)
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        tens = range(LAST_STEPS, len(losses) + 1, LAST_STEPS)
        return {
            **asdict(self),
            "mask": self.mask and self.mask.name,
            "command": "python " + " ".join(self.command()),
            "first_loss": losses[0],
            "final_loss": mean(losses[-LAST_STEPS:]),
            "losses": [round(mean(losses[i - LAST_STEPS : i]), 4) for i in tens],
            "date": datetime.now(UTC).date().isoformat(),
            **{name: run[name] for name in ("trained", "stored", "versions", "hashes")},
            **self.hot_list(),
        }

    def hot_list(self) -> dict:
        """Its hot experts, and the share of the catcher's visits that they get, by layer."""
        path = self.folder / "hot_experts.json"
        if not path.exists():
            return {}
        hot = HotList.read(path, read_config(locate(MODEL)))
        counts = {layer: torch.tensor(visits) for layer, visits in hot.counts.items()}
        share = visited_share(counts, hot.experts) if counts else {}
        return {
            "hot_experts": {str(layer): ids for layer, ids in hot.experts.items()},
            "hot_share": {str(layer): round(value, 4) for layer, value in share.items()},
        }


@dataclass(frozen=True)
class Merged(Base):
    """The updates of several runs on one base, added up in one checkpoint."""

    runs: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """Its folder and its result file are called so."""
        return "+".join(run.name for run in self.runs)

    @property
    def scored_as(self) -> str:
        """How an evaluation is told what to score."""
        return f"--model {self.folder / 'hub'} --out {self.folder}"

    def command(self) -> list[str]:
        """The arguments after "python" that make its checkpoint."""
        runs = [word for run in self.runs for word in ("--run", str(run.folder.relative_to(ROOT)))]
        return ["export.py", *runs, "--format", "hub", "--out", str(self.folder.relative_to(ROOT) / "hub")]

    def rests_on(self) -> dict:
        """What its numbers rest on: the runs."""
        return {"runs": {run.name: run.rests_on() for run in self.runs}}

    def needs(self) -> list[Base]:
        """The runs, and what they need."""
        return [cell for run in self.runs for cell in (*run.needs(), run)]

    def train(self) -> None:
        """Write the checkpoint, unless it is there."""
        if not (self.folder / "hub").exists():
            python(*self.command())

    def shown(self) -> dict:
        """What is kept of it besides scores. The runs' final losses tell if they are still the same."""
        return {
            "method": "merged",
            **self.rests_on(),
            "final_loss": [run.shown()["final_loss"] for run in self.runs],
            "versions": versions(torch.device("cpu")),
        }


@cache
def now_hashes(task: str) -> dict[str, str]:
    """The hashes that run.json would get now for a run of the embedded model on `task`."""
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


def scoring(task: str) -> tuple[str, tuple[str, ...]]:
    """The command that scores a run on `task`, as in job.SCORED_BY, and which scores are kept of it."""
    if task == PRETRAINING:
        return "python -m paper.forgetting --run {}", ("cross_entropy", "arithmetic")
    kind = TASKS[task].kind
    return f"{SCORED_BY[kind]} --task {task}", SCORES[kind]


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
        command, scores = scoring(task)
        if task not in read_results(cell.folder):
            _, *words = shlex.split(command.replace("--run {}", cell.scored_as))
            python(*words)
        result = read_results(cell.folder)[task]
        for score, of in (("problems", "total"), *((name, name) for name in scores)):
            shown[score] = shown.get(score, {}) | {task: result[of]}
    write_json(cell.result, shown)


Wanted = dict[Base, set[str]]  # cell -> tasks to score it on


def missing(wanted: Wanted) -> Wanted:
    """The cells that lack a score, with the tasks that they lack."""
    lacking = {cell: set(missing_tasks(cell, sorted(tasks))) for cell, tasks in wanted.items()}
    return {cell: tasks for cell, tasks in lacking.items() if tasks}


def depth(cell: Base) -> int:
    """How many trainings have to come before its own, one after another."""
    return max((1 + depth(other) for other in cell.needs()), default=0)


def run_cells(wanted: Wanted, jobs: int) -> None:
    """Train and score what is missing, `jobs` at a time. What is done is kept at once, and not done again."""
    todo = missing(wanted)
    needs = dict.fromkeys(chain.from_iterable(cell.needs() for cell in todo))  # once each
    RESULTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), unit="run", disable=not todo) as bar:
        bar.set_description(f"{len(needs)} to come first" if needs else "")
        for _, together in groupby(sorted(needs, key=depth), depth):  # what is needed may itself need others
            list(pool.map(lambda cell: cell.train(), together))
        waiting = {pool.submit(run_cell, cell, sorted(tasks)): cell for cell, tasks in todo.items()}
        try:
            for done in as_completed(waiting):
                done.result()
                bar.set_description(waiting[done].name)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the runs that are under way end or are resumed
            raise
