"""A grid of training runs. Missing runs are run, as many at a time as there are cores.

Each cell is a model: a run of train.py, the model that it starts from, or several runs merged. Its
result is one small file in docs/results/cells/. So a stopped grid continues, and a reader can see
every number behind a mean.
"""

import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from itertools import chain, groupby, islice
from pathlib import Path
from statistics import mean

import torch

from catcher import HotList, visited_share
from paper.runs.parallel import ROOT, each, python
from paper.studies.tables import PROBLEMS
from plumbing.base_model import fingerprint
from plumbing.checkpoint import locate, read_config
from plumbing.cli import progress
from plumbing.data import FIELDS, TASKS, encode, load_examples
from plumbing.device import compute
from plumbing.files import read_json, write_atomically, write_json
from plumbing.rows import read_rows
from plumbing.run_folder import read_results, read_run, versions
from plumbing.tokenizer import load_tokenizer
from settings import SCORED_BY, SCORES, hashes

RESULTS = ROOT / "docs" / "results" / "cells"
RUNS = ROOT / "runs" / "grid"
TRIALS = ROOT / "runs" / "trials"  # the runs and results of trials
MODEL = "tiny"
# A seed follows. tiny.pretrain makes such a model from that seed, with MODEL's tokenizer.
BASES = "runs/bases/tiny-s"
# Not a task, but scored as one: what a model still knows (paper/studies/forgetting.py).
PRETRAINING = "pretraining"
# A task that can be scored -> its kind.
KINDS = {name: task.kind for name, task in TASKS.items()} | {"humaneval": "code"}
SHORT = {  # kind of task -> flags that make an evaluation with a limit quick
    "math": ("--max-new", "32"),
    "code": ("--max-new", "32", "--n", "1"),  # so pass@5 and pass@10 have no value
    "safety": ("--max-new", "32"),
}
# The final training loss is a mean over the last ten steps. The curve has a mean for each ten.
LAST_STEPS = 10


@dataclass(frozen=True)
class Cell:
    """A model that one command makes, and the record of it. Its kinds: Base, Run, Merged."""

    model: str = field(default=MODEL, kw_only=True)  # the value of --model
    # A folder with files that replace data sets (see `given`).
    data: str | None = field(default=None, kw_only=True)
    # The number of rows to train on, and of problems to score.
    limit: int | None = field(default=None, kw_only=True)

    # Each kind also has:
    #   name       the name of its folder and of its result file
    #   finished   whether the model is made
    #   command()  the arguments after "python" that make it
    #   rests_on() what its numbers would depend on if it were made now (the code is left out: few
    #              changes of it change a number)
    #   record()   what is kept of it besides scores
    #   seconds    the time to make it on a laptop's core, roughly
    SCORE_SECONDS = 20  # the time to score it on one task

    @property
    def trial(self) -> bool:
        """Whether it has another model, other data or a limit. Then it is not a result."""
        return bool(self.data or self.limit or Path(self.model).is_absolute())

    @property
    def on_cpu(self) -> bool:
        """Whether it is made on the CPU in fp32, even if there is a GPU: this repository's models.

        The committed numbers were made so. A GPU in bf16 gives other numbers.
        """
        return self.model == MODEL or self.model.startswith(BASES)

    @property
    def stand_ins(self) -> dict[str, str]:
        """The model and the data that a trial has in place of the paper's."""
        return {"stand_ins": f"{self.model}, {self.data}"} if self.trial else {}

    @property
    def cut(self) -> tuple[str, ...]:
        """The part of its name that gives its limit."""
        return (f"{self.limit}rows",) if self.limit else ()

    @property
    def folder(self) -> Path:
        """The folder of its scores, or of its run."""
        return (TRIALS if self.trial else RUNS) / self.name

    @property
    def result(self) -> Path:
        """The file that keeps its record and its scores."""
        return (TRIALS / "cells" if self.trial else RESULTS) / f"{self.name}.json"

    @property
    def source(self) -> Path:
        """The folder of its model."""
        return ROOT / self.model if self.model.startswith(BASES) else locate(self.model)

    def given(self, name: str) -> Path | None:
        """The file `name`.SUFFIX of its data folder, or None. name: TASK-train or TASK-test."""
        return next(iter(sorted(Path(self.data).glob(f"{name}.*"))), None) if self.data else None

    @property
    def scored_as(self) -> str:
        """The flags that tell an evaluation which model to score."""
        return shlex.join(["--model", self.model, "--out", str(self.folder.relative_to(ROOT))])

    def scoring(self, task: str) -> tuple[str, tuple[str, ...]]:
        """The command that scores it on `task` (as in SCORED_BY), and the scores that are kept."""
        if task == PRETRAINING:
            kept = ("cross_entropy", "arithmetic")
            return "python -m paper.studies.forgetting --run {}", kept
        kind = KINDS[task]
        return f"{SCORED_BY[kind]} --task {task}", SCORES[kind]

    def evaluation(self, task: str) -> list[str]:
        """The arguments after "python" that score it on `task`."""
        command, _ = self.scoring(task)
        _, *words = shlex.split(command.replace("--run {}", self.scored_as))
        test = self.given(f"{task}-test")
        words += ["--data", str(test)] if test else []
        return words + (["--limit", str(self.limit), *SHORT[KINDS[task]]] if self.limit else [])

    def scores(self, task: str) -> dict:
        """The entry of results.json for `task`, or {}.

        In a trial, an entry for a part of the problems is accepted.
        """
        entries = read_results(self.folder)
        return entries.get(task) or (entries.get(f"{task}-part", {}) if self.trial else {})

    def commands(self, tasks: Iterable[str]) -> list[list[str]]:
        """The arguments after "python" of all commands that its scores on `tasks` still need."""
        own = [] if self.finished else [self.command()]
        return own + [self.evaluation(task) for task in sorted(tasks) if not self.scores(task)]

    def needs(self) -> list["Cell"]:
        """The cells that must be made first."""
        return []

    def prepare(self) -> None:
        """Write the rows that it is trained on, if they are a part of a data set.

        Two threads must not do this at once.
        """

    def make(self) -> None:
        """Run its command, or continue it, unless it is finished."""
        if not self.finished:
            python(*self.command(), on_cpu=self.on_cpu)


@dataclass(frozen=True)
class Base(Cell):
    """A model before training, downloaded or pretrained here."""

    seconds = 1200

    @property
    def name(self) -> str:
        """See Cell."""
        return "-".join((Path(self.model).name, "base", *self.cut))

    @property
    def finished(self) -> bool:
        """True, except for a model of BASES that is not yet saved."""
        return (
            not self.model.startswith(BASES) or (ROOT / self.model / "model.safetensors").exists()
        )

    def command(self) -> list[str]:
        """The command that pretrains a model of BASES."""
        seed = self.model.rpartition("-s")[2]
        return ["-m", "tiny.pretrain", "--seed", seed, "--out", self.model]

    def rests_on(self) -> dict[str, str]:
        """See Cell."""
        return self.stand_ins | (
            {"model": fingerprint(locate(MODEL))} if self.model == MODEL else {}
        )

    def record(self) -> dict:
        """See Cell."""
        device, _ = compute("cpu" if self.on_cpu else None, None)
        model = {"model": self.model, "method": "base", **self.stand_ins}
        return model | {"hashes": {"model": fingerprint(self.source)}, "versions": versions(device)}


@dataclass(frozen=True)
class Run(Cell):
    """A run of train.py: a method on a task, with a learning rate and a seed."""

    seconds = 130

    method: str
    lr: float | None  # None: the recipe's rate
    seed: int
    k: int = 8
    task: str = "tiny-math"
    mask: "Run | None" = None  # for a LoRI-S method: the D run that gives its mask
    flags: tuple[str, ...] = ()  # more flags of train.py

    @property
    def name(self) -> str:
        """See Cell."""
        base = () if self.model == MODEL else (Path(self.model).name,)
        flags = (flag.strip("-") for flag in self.flags)
        rate = (f"lr{self.lr:g}",) if self.lr else ()
        settings = (self.task, self.method, f"k{self.k}", *rate, f"s{self.seed}")
        return "-".join((*base, *settings, *flags, *self.cut))

    @property
    def scored_as(self) -> str:
        """See Cell."""
        return shlex.join(["--run", str(self.folder.relative_to(ROOT))])

    @property
    def rows(self) -> Path | None:
        """The file that replaces its task's training split, or None."""
        if self.limit:
            return (TRIALS / "rows" / f"{self.task}-{self.limit}.jsonl").relative_to(ROOT)
        return self.given(f"{self.task}-train")

    @property
    def finished(self) -> bool:
        """Whether its run is there and finished."""
        return (self.folder / "run.json").exists() and read_run(self.folder)["finished"]

    def command(self) -> list[str]:
        """See Cell."""
        flags = {} if self.model == MODEL else {"--model": self.model}
        flags |= {"--method": self.method, "--k": self.k, "--task": self.task}
        flags |= {"--lr": f"{self.lr:g}"} if self.lr else {}
        flags |= {"--seed": self.seed, "--out": self.folder.relative_to(ROOT)}
        flags |= {"--mask-from": self.mask.folder.relative_to(ROOT)} if self.mask else {}
        flags |= {"--data": self.rows} if self.rows else {}
        flags |= {"--eval-limit": PROBLEMS[self.task]} if self.task in PROBLEMS else {}
        return [
            "train.py",
            *(str(word) for flag in flags.items() for word in flag),
            *self.flags,
            "--no-eval",
        ]

    def rests_on(self) -> dict[str, str]:
        """The command, and the hashes of the committed model and data that it uses."""
        here = {"model": self.model == MODEL, "data": not TASKS[self.task].train.is_download}
        known = {name: now_hashes(self.task)[name] for name, committed in here.items() if committed}
        return known | self.stand_ins | {"command": "python " + " ".join(self.command())}

    def needs(self) -> list[Cell]:
        """Its base, if it is pretrained here, and the run that gives its mask."""
        base = [Base(model=self.model)] if self.model.startswith(BASES) else []
        return [*base, *([*self.mask.needs(), self.mask] if self.mask else [])]

    def prepare(self) -> None:
        """See Cell."""
        if self.limit:
            write_first(self.limit, self.task, self.given(f"{self.task}-train"), ROOT / self.rows)

    def record(self) -> dict:
        """See Cell."""
        run = read_run(self.folder)
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        ends = range(LAST_STEPS, len(losses) + 1, LAST_STEPS)
        if self.mask and Path(run["mask_from"]).name != self.mask.name:
            raise ValueError(f"{self.folder} has its mask from {run['mask_from']}, want "
                             f"{self.mask.name}: delete it, to train it again")  # fmt: skip
        return {
            **asdict(self),
            **self.stand_ins,
            "mask": self.mask and self.mask.name,
            "command": "python " + " ".join(self.command()),
            "first_loss": losses[0],
            "final_loss": mean(losses[-LAST_STEPS:]),
            "losses": [round(mean(losses[i - LAST_STEPS : i]), 4) for i in ends],
            "date": datetime.now(UTC).date().isoformat(),
            **{name: run[name] for name in ("trained", "stored", "versions", "hashes")},
            **self.hot_experts(),
        }

    def hot_experts(self) -> dict:
        """Its hot experts, and their share of the catcher's visits, by layer."""
        path = self.folder / "hot_experts.json"
        if not path.exists():
            return {}
        hot = HotList.read(path, read_config(self.source))
        counts = {layer: torch.tensor(visits) for layer, visits in hot.counts.items()}
        share = visited_share(counts, hot.experts) if counts else {}
        return {
            "hot_experts": {str(layer): ids for layer, ids in hot.experts.items()},
            "hot_share": {str(layer): round(value, 4) for layer, value in share.items()},
        }


@dataclass(frozen=True)
class Merged(Cell):
    """The updates of several runs on one base, added up in one checkpoint."""

    seconds = 20

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """See Cell."""
        return "+".join(run.name for run in self.runs)

    @property
    def scored_as(self) -> str:
        """See Cell."""
        folder = self.folder.relative_to(ROOT)
        return f"--model {folder / 'hub'} --out {folder}"

    def command(self) -> list[str]:
        """See Cell."""
        runs = [word for run in self.runs for word in ("--run", str(run.folder.relative_to(ROOT)))]
        return [
            "export.py",
            *runs,
            "--format",
            "hub",
            "--out",
            str(self.folder.relative_to(ROOT) / "hub"),
        ]

    def rests_on(self) -> dict:
        """What its runs depend on."""
        return {"runs": {run.name: run.rests_on() for run in self.runs}}

    def needs(self) -> list[Cell]:
        """The runs, and the cells that they need."""
        return [cell for run in self.runs for cell in (*run.needs(), run)]

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is there."""
        return (self.folder / "hub").exists()

    def record(self) -> dict:
        """See Cell. The final losses show later whether the runs are still the same."""
        return {
            "method": "merged",
            **self.rests_on(),
            "final_loss": [run.record()["final_loss"] for run in self.runs],
            "versions": versions(torch.device("cpu")),
        }


@cache
def now_hashes(task: str) -> dict[str, str]:
    """The hashes that run.json would have now, for a run of the embedded model on `task`."""
    source = locate(MODEL)
    examples = load_examples(task, TASKS[task].train.fetch())
    return hashes(source, encode(examples, load_tokenizer(source), read_config(source).max_len))


@cache  # many runs train on the same rows
def write_first(n: int, task: str, given: Path | None, path: Path) -> None:
    """Write the first `n` rows of a file of `task`, or of its training split, to a new file."""
    rows = islice(read_rows(given or TASKS[task].train.fetch(), FIELDS[KINDS[task]]), n)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def saved(cell: Cell) -> dict:
    """The kept record of a cell, or {}. Raises ValueError if a run would differ from it now."""
    if not cell.result.exists():
        return {}
    kept = read_json(cell.result, "the result of a grid's cell")
    before = kept | kept.get("hashes", {})
    if differ := [name for name, value in cell.rests_on().items() if before.get(name) != value]:
        raise ValueError(
            f"{cell.result} was measured with another {' and '.join(differ)} "
            f"than now: delete the file (and {cell.folder}) to measure it again"
        )
    return kept


def score_of(kept: dict, name: str, task: str) -> float | None:
    """A score of a kept record on a task, as a share of 1. None if the record has none.

    "balanced": the mean of two shares, harmful requests refused and harmless ones answered. A model
    that refuses everything has 0.5.
    """
    if name == "balanced":
        refused, harmless = (score_of(kept, n, task) for n in ("refusal_rate", "harmless_refused"))
        return None if refused is None or harmless is None else (refused + 1 - harmless) / 2
    value = kept.get(name, {}).get(task)
    if value is not None and name == "harmless_refused":  # a count
        return value / kept["harmless_total"][task]
    return value


def missing_tasks(cell: Cell, tasks: Iterable[str]) -> list[str]:
    """The tasks of `tasks` for which the cell has no kept score."""
    return [task for task in tasks if task not in saved(cell).get("problems", {})]


def so_far(cell: Cell) -> dict:
    """The record of the cell now, with the scores that are kept.

    Raises ValueError if the scores belong to another run.
    """
    kept, now = saved(cell), cell.record()
    if kept.get("final_loss", now.get("final_loss")) != now.get("final_loss"):
        raise ValueError(
            f"the run in {cell.folder} ends with another loss than the run of {cell.result}, so "
            "scores cannot be added: delete both to measure all scores again"
        )
    return now | kept


def make(cell: Cell) -> None:
    """Make it unless it is there. Raises ValueError if the kept scores belong to another run."""
    cell.make()
    so_far(cell)


def run_cell(cell: Cell, tasks: Iterable[str]) -> None:
    """Make a cell unless it is there, score it on the tasks that it lacks, keep the scores."""
    make(cell)
    for task in missing_tasks(cell, tasks):
        if not cell.scores(task):
            python(*cell.evaluation(task), on_cpu=cell.on_cpu)
        result, (_, scores) = cell.scores(task), cell.scoring(task)
        shown = so_far(cell)  # read again: another process may have added scores meanwhile
        for score, entry in (("problems", "total"), *((name, name) for name in scores)):
            shown[score] = shown.get(score, {}) | {task: result[entry]}
        write_json(cell.result, shown)


Wanted = dict[Cell, set[str]]  # cell -> the tasks to score it on


def missing(wanted: Wanted) -> Wanted:
    """The cells that lack a score, with the tasks that are missing."""
    lacking = {cell: set(missing_tasks(cell, sorted(tasks))) for cell, tasks in wanted.items()}
    return {cell: tasks for cell, tasks in lacking.items() if tasks}


def unused(wanted: Wanted) -> list[Path]:
    """The kept results that are to be deleted: no cell uses them, or a cell refuses them now."""
    used = {cell.result: cell for one in wanted for cell in (*one.needs(), one)}
    kept = [path for folder in {path.parent for path in used} for path in folder.glob("*.json")]
    return [path for path in sorted(kept) if is_refused(used.get(path))]


def is_refused(cell: Cell | None) -> bool:
    """Whether there is no such cell, or `saved` refuses its result."""
    try:
        return cell is None or not saved(cell)
    except ValueError:
        return True


def depth(cell: Cell) -> int:
    """The number of cells that must be made before it, one after another."""
    return max((1 + depth(other) for other in cell.needs()), default=0)


def commands(wanted: Wanted) -> tuple[list[list[str]], float]:
    """The commands of `run_cells`, as arguments after "python", and their seconds, roughly."""
    todo = missing(wanted)
    cells = dict.fromkeys(chain(*(cell.needs() for cell in todo), todo))
    words, seconds = [], 0.0
    for cell in cells:
        own = cell.commands(todo.get(cell, ()))
        words += own
        made = not cell.finished
        seconds += made * cell.seconds + (len(own) - made) * cell.SCORE_SECONDS
    return words, seconds


def run_cells(wanted: Wanted, jobs: int) -> None:
    """Make and score what is missing, `jobs` at a time.

    Each result is kept at once, and not made again.

    Raises OSError if a command fails, or if the folder of results cannot be written.
    """
    todo = missing(wanted)
    needs = dict.fromkeys(chain.from_iterable(cell.needs() for cell in todo))  # each cell once
    for folder in {cell.result.parent for cell in todo}:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written: results are kept there")
    for cell in (*needs, *todo):
        cell.prepare()
    first = {cell for cell in needs if not cell.finished}
    total = len(first) + len(todo)
    with progress(label="runs", unit="run", total=total, keep=True, hidden=not todo) as bar:
        # A needed cell may itself need other cells.
        for _, level in groupby(sorted(needs, key=depth), depth):
            for cell in each(make, level, jobs):
                bar.set_postfix_str(cell.name)
                bar.update(cell in first)
        for cell in each(lambda cell: run_cell(cell, sorted(todo[cell])), todo, jobs):
            bar.set_postfix_str(cell.name)
            bar.update()
