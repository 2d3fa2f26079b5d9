"""A run's folder: what its files say, how a run differs from a new one, and who may use it.

Read it from top to bottom: run.json, which folder a run gets, the lock, the logs and results.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Literal

import torch
from filelock import FileLock, Timeout

from moe_model import MoEConfig
from plumbing import ranks
from plumbing.base_model import is_same_model
from plumbing.cli import progress
from plumbing.data import Encoded
from plumbing.files import (
    Positive,
    check,
    read_json,
    write_atomically,
    write_json,
    write_json_lines,
    writing,
)
from plumbing.flags import OVERRIDABLE, OVERRIDABLE_FLAGS

# ---- run.json ------------------------------------------------------------------------------------

# Settings that older runs do not have -> their value in such a run.
YOUNGER = {"count": "all", "clip": "all", "bos": None, "drop_long": None}
# Fields of MoEConfig in older runs -> their names now.
RENAMED = {"head_norm": "qk_head_norm"}


@dataclass
class Hashes:
    """The checksums of what a run started from, and of its result."""

    model: str
    data: str
    adapter: str | None  # adapter.safetensors, when the run is finished
    tokenizer: str | None
    code: str | None


@dataclass
class RunRecord:
    """run.json, as far as it is read again. train.py writes more fields."""

    model: str  # as given by --model
    commit: str | None  # the commit that was loaded, for a model of the Hub
    task: str
    method: str
    dtype: Literal["fp32", "bf16"]
    finished: bool
    k: Positive | None
    rank: Positive | None
    alpha: float | None
    seed: int | None
    template: str | None
    bos: int | None  # the token before each prompt
    data: str | None  # the path of own rows
    fields: list[str] | None  # of own rows in another form than the task's. Older runs lack it
    loss_only: bool | None  # see has_loss_only. Older runs lack it
    eval_data: str | None  # a path
    eval_limit: Positive | None  # number of problems
    hashes: Hashes | None
    config: dict | None  # the model's MoEConfig
    adapted: dict[str, list[int]] | None  # {layer: ids of its adapted experts}
    overrides: list[list[str]] | None  # for each --override: what differed
    conditions: list[list[str]] | None  # for each resumption: what may move the last bits
    compute: dict | None
    versions: dict | None


def read_run(folder: Path, *parts: str) -> dict:
    """The run.json of a run's folder, with what an older run does not have (YOUNGER, RENAMED).

    parts: fields that must be there. A run that was stopped early does not have all.
    Raises FileNotFoundError or ValueError that say what to do.
    """
    want = "the folder of a run of train.py"
    if folder.is_file():
        want += f", and not a file of it, as {folder} is"
    elif (folder / "config.json").is_file():
        want += f". {folder} is the folder of a model: give that with --model"
    elif (folder / "adapter_config.json").is_file():
        want += f". {folder} is a PEFT adapter: give the run that it was exported from"
    run = read_json(folder / "run.json", want, RunRecord)
    for setting, value in YOUNGER.items():
        run.setdefault(setting, value)
    config = run.get("config") or {}
    for old, new in RENAMED.items():
        if old in config:
            config[new] = config.pop(old)
    if missing := [part for part in parts if run.get(part) is None]:
        raise ValueError(
            f"{folder} was stopped before its experts were chosen: type its train.py "
            "command again, which goes on"
            if missing[0] == "adapted"
            else f"{folder / 'run.json'} has no {missing[0]}: want a run that train.py finished"
        )
    return run


def has_loss_only(run: dict) -> bool:
    """Whether a run is measured by the loss of rows like its own, and not scored as its task is.

    So it is with own rows in another form than the task's, or without a number that can be scored.
    """
    if run.get("loss_only") is not None:
        return run["loss_only"]
    return bool(run.get("fields")) and not run.get("eval_data")


def saved_commit(folder: Path) -> str | None:
    """The model's commit in the run in `folder`. None without a run, or without a Hub model."""
    return read_run(folder).get("commit") if (folder / "run.json").exists() else None


def by_layer(cfg: MoEConfig, lists: dict[str, list[int]], path: Path) -> dict[int, list[int]]:
    """{layer: expert ids, ascending} from the lists in the file `path`, whose keys are text.

    Raises ValueError for the lists of another model.
    """
    ids_of = {}
    for layer in cfg.moe_layers:
        if str(layer) in lists:
            ids_of[layer] = sorted(set(lists[str(layer)]))
    highest = max((ids[-1] for ids in ids_of.values() if ids), default=0)
    if len(ids_of) < len(lists) or highest >= cfg.n_experts:
        raise ValueError(
            f"{path} lists experts up to {highest} in layers {short([*lists])}, but the model has "
            f"{cfg.n_experts} in each of {len(cfg.moe_layers)}: want a list made for this model"
        )
    return ids_of


def versions(device: torch.device) -> dict[str, str]:
    """The versions that a result may depend on, and the device."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    python = platform.python_version()
    return {"python": python, "torch": torch.__version__, "device": f"{device} ({chip})"}


# ---- which folder a run gets ---------------------------------------------------------------------

OVERRIDES = f"--override goes on with an unfinished run, and can change {OVERRIDABLE_FLAGS} only"


def differences(saved: dict, settings: dict) -> list[str]:
    """What differs between a saved run and `settings`: one "name: saved -> asked" each."""
    ignored = ("commit", "model") if is_same_model(saved, settings) else ("commit",)
    return [
        f"{name}: {saved.get(name)} -> {value}"
        for name, value in settings.items()
        if name not in ignored and saved.get(name) != value
    ]


def choose_folder(settings: dict, out: Path | None, resume: bool, override: bool) -> Path:
    """The folder to run in: `out`, or else the first default folder that is free or half done.

    A half done folder holds an unfinished run with these settings. Raises ValueError if `out` holds
    a finished or another run, or if --resume finds nothing to resume.
    """
    if out is not None:
        return check_folder(settings, out, resume, override)
    if override:
        raise ValueError(f"--override needs --out DIR: {OVERRIDES}")
    model = Path(settings["model"]).name
    first = f"{model}-{settings['task']}-{settings['method']}-k{settings['k']}-s{settings['seed']}"
    folder, n = Path("runs") / first, 1
    while True:
        saved = read_run(folder) if (folder / "run.json").exists() else None
        if saved is None and resume:
            raise ValueError(
                f"there is no unfinished run with these settings in runs/{first}*: omit --resume"
            )
        if saved is None or not (saved["finished"] or differences(saved, settings)):
            return folder
        n += 1
        folder = Path("runs") / f"{first}-{n}"


def check_folder(settings: dict, out: Path, resume: bool, override: bool) -> Path:
    """`out` itself. Raises ValueError if it holds anything else than this run, unfinished."""
    if not (out / "run.json").exists():
        if resume:
            raise ValueError(f"{out} holds no run to resume: omit --resume")
        if out.exists() and not is_empty(out):
            raise ValueError(f"{out} holds other files: want a new or empty folder for --out")
        return out
    saved = read_run(out)
    differ = differences(saved, settings)
    why_not = f" ({OVERRIDES})" if override else ""
    if saved["finished"]:
        raise ValueError(
            f"{out} holds a finished run{listed(differ)}: choose another --out{why_not}"
        )
    fixed = [d for d in differ if d.partition(":")[0] not in OVERRIDABLE]
    if fixed or (differ and not override):
        way_out = "choose another --out" + (why_not if fixed else ", or --override")
        raise ValueError(
            f"{out} holds a run with other settings{listed(fixed or differ)}: {way_out}"
        )
    return out


def is_empty(folder: Path) -> bool:
    """Whether it is a folder without files. Hidden files, such as a lock, do not count."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def listed(differ: list[str]) -> str:
    """The differences in parentheses, if there are any."""
    return f" ({', '.join(differ)})" if differ else ""


# ---- who may use it ------------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    """Wait until this rank sees a file that rank 0 has written, a minute at most.

    Over NFS a node may remember for half a minute that a file was not there.
    """
    until = time.monotonic() + 60
    while ranks.rank() and not path.exists() and time.monotonic() < until:
        time.sleep(1)


def check_shared(folder: Path, record: dict) -> None:
    """Raise OSError on a rank that does not see rank 0's run.json, on a node with its own disk."""
    ranks.wait()  # until rank 0 has written it
    path = folder / "run.json"
    wait_for(path)
    if not path.exists() or read_json(path, "this run's") != json.loads(json.dumps(record)):
        raise OSError(
            f"{folder.resolve()} is not there on this node: want a --out that all nodes share"
        )


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it for this process. Rank 0 does so for all ranks.

    The operating system releases the lock when the process ends, in whatever way. Drafts, which a
    killed process leaves half written, are deleted. Raises ValueError if another process has the
    folder, OSError if it cannot be written.
    """
    if ranks.rank():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise ValueError(
            f"another process is running in {folder}: wait for it, or take another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"{folder} cannot be written ({why}): choose another --out") from error
    with held:
        for draft in folder.glob(".*.draft"):
            if draft.is_file() or draft.is_symlink():
                draft.unlink(missing_ok=True)
        yield


# ---- metrics.jsonl -------------------------------------------------------------------------------


@dataclass
class MetricsLine:
    """One line of metrics.jsonl, as far as it is read again."""

    step: int


class Metrics:
    """metrics.jsonl: one line per training step, in full precision. name: that of another log."""

    def __init__(
        self, folder: Path, step: int, name: str = "metrics.jsonl", log: str | None = None
    ):
        """Go on after `step` steps. Later lines are dropped, because a stop has lost those steps.

        log: "tensorboard" writes the same numbers to FOLDER/tensorboard.
        """
        path, self.board = folder / name, None
        if log and not ranks.rank():
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / log / path.stem, purge_step=step + 1)
        kept = b"".join(line + b"\n" for line in lines_up_to(path, step))
        write_atomically(path, lambda draft: draft.write_bytes(kept))
        self.file = (Path(os.devnull) if ranks.rank() else path).open("a", buffering=1)

    def add(self, **values: float) -> None:
        """Append one line."""
        with writing(Path(self.file.name)):
            self.file.write(json.dumps(values) + "\n")
            for name, value in values.items() if self.board else ():
                self.board.add_scalar(name, value, values["step"])
            if self.board:
                self.board.flush()


class StepLog:
    """What is shown and kept of each training step: a progress bar, and metrics.jsonl."""

    def __init__(self, folder: Path, step: int, n_steps: int, log: str | None):
        """Go on after `step` steps of `n_steps`. log: see Metrics."""
        self.metrics = Metrics(folder, step, log=log)
        self.bar = progress(label="train", unit="step", total=n_steps, start=step, keep=True)
        self.n_skipped = 0

    def add(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        examples: list[Encoded],
        seconds: float,
        skipped: bool,
    ) -> None:
        """Log a step over `examples` that took `seconds`. skipped: it changed nothing."""
        self.n_skipped += skipped
        samples_per_s = len(examples) / seconds
        self.metrics.add(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            samples_per_s=samples_per_s,
            tokens_per_s=sum(len(e.ids) for e in examples) / seconds,
        )
        note = f", {self.n_skipped} skipped" if self.n_skipped else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}, {samples_per_s:.0f} samples/s{note}")
        self.bar.update()

    def report_skipped(self) -> None:
        """Print how many steps were skipped, if any."""
        if self.n_skipped:
            print(
                f"{self.n_skipped} of the steps just trained had no finite loss or gradient: "
                "they changed nothing"
            )


def lines_up_to(path: Path, step: int, schema: object = MetricsLine) -> list[bytes]:
    """The valid lines of a metrics.jsonl up to a step. Torn and damaged lines are left out."""
    kept = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            check(values := json.loads(line), schema)
            if values["step"] <= step:
                kept.append(line)
    return kept


# ---- results.json, answers-TASK.jsonl ------------------------------------------------------------

PATIENCE = 60  # seconds to wait for another evaluation that writes its results


@dataclass
class Scores:
    """A task's entry in results.json, as far as it is read again. Shares from 0 to 1."""

    accuracy: float | None
    base_accuracy: float | None


def update_results(folder: Path, task: str, values: dict) -> None:
    """Set the keys `values` in results.json's entry for `task`. All other keys stay.

    Evaluations that end together wait for each other. Raises PermissionError where nothing can be
    written.
    """
    if ranks.rank():
        return
    path = folder / "results.json"
    with writing(path):  # another lock, because training holds the folder's while it scores
        lock = FileLock(folder / ".results.lock", timeout=PATIENCE).acquire()
    with lock:
        results = read_results(folder)
        results[task] = results.get(task, {}) | values
        write_json(path, results)


def results_folder(run: Path | None, out: Path | None) -> Path | None:
    """Where an evaluation keeps its results: in the run's own folder, or for --model in --out.

    None if there is neither. Raises ValueError for an --out beside a run.
    """
    if run and out:
        raise ValueError(
            "--out is for --model, as the results of a run are kept in its own folder: omit it"
        )
    if out:
        out.mkdir(parents=True, exist_ok=True)
    return run or out


def is_other_dtype(asked: str | None, run: dict) -> bool:
    """Whether --dtype asks for another dtype than the run was trained in."""
    return None not in (asked, run.get("dtype")) and asked != run["dtype"]


def write_answers(folder: Path, task: str, records: list[dict]) -> None:
    """Write answers-TASK.jsonl: what was generated for each problem, or how likely its answer was.

    A record has the generated token ids too, because a text does not determine them.
    """
    write_json_lines(folder / f"answers-{task}.jsonl", records)


def keep_results(folder: Path, task: str, result: dict, records: list[dict]) -> None:
    """Write results.json's entry and answers-TASK.jsonl. Print a line if that is not permitted."""
    try:
        update_results(folder, task, result)
        write_answers(folder, task, records)
    except PermissionError as error:
        print(f"warning: the result was not kept: {error}", file=sys.stderr)


def read_results(folder: Path) -> dict:
    """results.json, {task: {"accuracy": ..., ...}}. Empty if nothing has been scored."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    return read_json(path, "what evaluations wrote, or no such file", dict[str, Scores])
