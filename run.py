"""A run's folder: who may use it, what differs, and files that are either whole or absent.

Also how a command ends: exit code 0 done, 2 a mistake the user can mend (one line on stderr), 130 interrupted
by the user, 1 and a traceback a fault of ours.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import repr as short
from typing import IO, Any, NoReturn

import torch
from safetensors import SafetensorError

import ranks

LONGEST_LINE = 2000  # characters of an error: a file may have any text where a name should be


def command(main: Callable[[], None]) -> NoReturn:
    """Run `main` and end the process with the exit code that its outcome deserves."""
    try:
        main()
    except (ValueError, OSError) as error:  # what the project's files raise for a user's mistake
        sys.exit(_fail(error))
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            less = "if it was scoring, train.py --no-eval leaves it to eval_*.py, with a smaller --batch-size"
            sys.exit(_fail(OSError(f"out of memory: {less}")))
        if not ranks.is_lost(error):
            raise
        sys.exit(_fail(OSError(f"lost the other ranks, see what they say ({str(error).splitlines()[0]})")))
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(130)
    ranks.stop()
    sys.exit(0)


def _fail(error: Exception) -> int:
    """Print the error as one line; the exit code 2."""
    if os.environ.get("HELLORA_TRACEBACK"):  # for whoever suspects a fault of ours behind the message
        raise error
    who = f"rank {ranks.rank()}: " if ranks.rank() else ""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split())[:LONGEST_LINE])
    print(f"error: {who}{line}", file=sys.stderr)
    return 2


@contextmanager
def deferred_stop() -> Iterator[list[int]]:
    """SIGINT and SIGTERM only note themselves in the list that is yielded, so that a step is never torn.

    A second signal ends the process at once, as usual.
    """
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED")


def lacks_memory(error: Exception) -> bool:
    """Whether it says that there is too little memory, on the CPU or on a GPU."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


@contextmanager
def advice(micro_batch: int, recompute: bool) -> Iterator[None]:
    """Have a lack of memory in a training step end in one line that says what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        smaller = f"--micro-batch {micro_batch // 2}" if micro_batch > 1 else "--recompute"
        way_out = "want more memory" if micro_batch == 1 and recompute else f"add {smaller}"
        go_on = "the same command goes on from the last save"
        raise OSError(f"out of memory with --micro-batch {micro_batch}: {go_on}; {way_out}") from error


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the choices of --dtype


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes end like all others: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ValueError(f"{message} (--help lists all flags)")


def above_0(kind: type) -> Callable[[str], float]:
    """An argparse type: an int or float above 0."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if 0 < kind(text) < float("inf"):
                return kind(text)
        raise argparse.ArgumentTypeError(
            f"{text!r}, want {'a number' if kind is float else 'an integer'} above 0"
        )

    return parse


def at_least_0(kind: type) -> Callable[[str], float]:
    """An argparse type: an int or float that may be 0."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if 0 <= kind(text) < float("inf"):
                return kind(text)
        raise argparse.ArgumentTypeError(
            f"{text!r}, want {'a number' if kind is float else 'an integer'} from 0 on"
        )

    return parse


def share_of_1(text: str) -> float:
    """An argparse type: a number above 0, up to 1."""
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}, want a share above 0, up to 1")


def seed_number(text: str) -> int:
    """An argparse type: what torch takes as a seed on every device."""
    if text.isdecimal() and int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}, want an integer from 0 to {2**31 - 1}")


def add_compute_flags(add: Callable) -> None:
    """The flags that `compute` takes. add: an add_argument."""
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--dtype", choices=DTYPES, help="of the computation; default: bf16 on cuda, fp32 on cpu")


def write_atomically(path: Path, write: Callable[[Path], Any], every_rank: bool = False) -> None:
    """Let `write` fill a temporary file, bring it to disk, and only then give it the name `path`.

    Only rank 0 writes, unless `every_rank` wants the file for itself. Raises OSError, whatever error of its
    own the writing library has for a full disk.
    """
    if ranks.rank() and not every_rank:
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with writing(path):
            write(draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.chmod(0o644)  # safetensors makes its files private
            draft.replace(path)
        sync_names(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have a write that fails end in one line that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = "" if isinstance(error, PermissionError) else ": is the disk full?"
        raise OSError(f"{path} could not be written ({error}){why}") from error


def sync_names(folder: Path) -> None:
    """Bring to disk which names the files of `folder` have now: a power cut may otherwise undo a rename."""
    names = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot
        os.fsync(names)
    os.close(names)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


LARGEST_JSON = 1 << 24  # bytes read at once: as Python objects they may take a hundred times as many
COUNT, POSITIVE = range(2**53), range(1, 2**31)  # integers in JSON
WORDS = {str: "text of one line", float: "a finite number", None: "nothing"}  # forms that say too little


def read_json(path: Path, want: str, form: object = {}) -> dict:
    """A JSON object of this `form` (misfit).

    Raises FileNotFoundError or ValueError that name the path and say what is wanted.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or no file: want {want}")
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{size:,} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): want {want}") from error
    if fault := misfit(value, form):
        raise ValueError(f"{path}: {fault}: want {want}")
    return value


def misfit(value: object, form: object, at: str = "") -> str:
    """The first thing in a value from JSON that is not of the `form`, in words; "" if there is none.

    form: str (text of one line), float (a finite number), a range (an integer in it), or the value itself; a
    tuple: one of several; [form]: a list of such; {str: form}: an object of such, under any keys; {key: form}
    an object with these and any other keys. A key that is absent has the value None.
    """
    if isinstance(form, dict) and isinstance(value, dict):
        of = dict.fromkeys(value, form[str]) if str in form else form
        faults = (misfit(value.get(key), one, f"{at}.{key}") for key, one in of.items())
    elif isinstance(form, list) and isinstance(value, list):
        faults = (misfit(one, form[0], f"{at}[{i}]") for i, one in enumerate(value))
    elif fits(value, form):
        faults = ()
    else:
        faults = (f"{at.lstrip('.') or 'it'} is {short(value)}, want {in_words(form)}",)
    return next(filter(None, faults), "")


def fits(value: object, form: object) -> bool:
    """Whether a value is of a `form`, as `misfit` has them, without parts."""
    if isinstance(form, tuple):
        return any(not misfit(value, one) for one in form)
    if isinstance(form, range):
        return type(value) is int and value in form
    if form is float:
        return type(value) in (int, float) and abs(value) < 1e300  # not so NaN
    if form is str:
        return isinstance(value, str) and value.isprintable()
    return type(value) is type(form) and value == form


def in_words(form: object) -> str:
    """What `form` wants."""
    if isinstance(form, tuple):
        return " or ".join(map(in_words, form))
    if isinstance(form, range):
        return f"an integer from {form[0]} to {form[-1]}"
    if isinstance(form, dict):
        return f"an object with {', '.join(form)}" if form and str not in form else "an object"
    return "a list" if isinstance(form, list) else WORDS[form] if form in WORDS else json.dumps(form)


RUN = {  # run.json, as far as it is read again
    "model": str, "task": str, "method": str, "dtype": tuple(DTYPES), "finished": (True, False),
    "k": (None, POSITIVE), "rank": (None, POSITIVE), "alpha": (None, float), "seed": (None, COUNT),
    "template": (None, str), "eval_data": (None, str), "eval_limit": (None, POSITIVE),
    "hashes": (None, {"model": str, "data": str}), "adapted": (None, {str: [COUNT]}),
    "overrides": (None, [[str]]),
}  # fmt: skip


def read_run(folder: Path, *parts: str) -> dict:
    """The run.json of a run's folder, with these `parts` that only a run has that got as far.

    Raises FileNotFoundError or ValueError that say what to do.
    """
    run = read_json(folder / "run.json", "the folder of a run of train.py", RUN)
    if missing := [part for part in parts if run.get(part) is None]:
        raise ValueError(f"{folder / 'run.json'} has no {missing[0]} yet: finish that run first")
    return run


def differences(saved: dict, settings: dict) -> list[str]:
    """What a saved run has otherwise than `settings`: one "name: saved -> asked" each."""
    return [f"{k}: {saved.get(k)} -> {v}" for k, v in settings.items() if saved.get(k) != v]


OVERRIDABLE = {"lr", "epochs", "steps", "batch_size", "balance"}  # what a run may go on with otherwise


def choose_folder(settings: dict, out: Path | None, resume: bool, override: bool) -> Path:
    """The folder to run in: `out`, or the first default one that is free or holds this run unfinished.

    Raises ValueError if `out` holds a finished or another run, or if --resume finds nothing to go on with.
    """
    if out is not None:
        return check_folder(settings, out, resume, override)
    if override:
        raise ValueError("--override needs --out DIR: the unfinished run to go on with")
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
    """`out` itself. Raises ValueError if it holds anything but this run, unfinished."""
    if not (out / "run.json").exists():
        if resume:
            raise ValueError(f"{out} holds no run to resume: omit --resume")
        if out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
            raise ValueError(f"{out} holds other files: want a new or empty folder for --out")
        return out
    saved = read_run(out)
    differ = differences(saved, settings)
    if saved["finished"]:
        raise ValueError(f"{out} holds a finished run{_list(differ)}: choose another --out")
    fixed = [d for d in differ if d.partition(":")[0] not in OVERRIDABLE]
    if fixed or (differ and not override):
        way_out = "choose another --out" + ("" if fixed else ", or --override")
        raise ValueError(f"{out} holds a run with other settings{_list(fixed or differ)}: {way_out}")
    return out


def _list(differ: list[str]) -> str:
    return f" ({'; '.join(differ)})" if differ else ""


def check_shared(folder: Path, record: dict) -> None:
    """Raise OSError on a rank that does not see the run.json of rank 0: a node with a disk of its own."""
    ranks.wait()  # until rank 0 has written it
    path = folder / "run.json"
    if not path.exists() or read_json(path, "this run's") != json.loads(json.dumps(record)):
        raise OSError(f"{folder.resolve()} is not there on this node: want a --out that all nodes share")


def lock(folder: Path) -> IO:
    """Claim `folder` until the returned file is closed. Raises ValueError if another process has it.

    Rank 0 does it for all. What a killed process has left half written is deleted.
    """
    if ranks.rank():
        return Path(os.devnull).open()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}): choose another --out") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(
            f"another process is running in {folder}: wait for it, or choose another --out"
        ) from error
    for draft in folder.glob(".*.draft"):
        if draft.is_file():
            draft.unlink(missing_ok=True)
    return file


class Metrics:
    """metrics.jsonl: one line per training step, in full precision."""

    def __init__(self, folder: Path, step: int):
        """Go on after `step` steps: later lines, of work that a stop has lost, are dropped."""
        path = folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.is_file() else []
        kept = []
        for line in lines:
            with suppress(ValueError, RecursionError):  # the last line may be torn, others damaged
                kept += [] if misfit(json.loads(line), {"step": range(step + 1)}) else [line]
        write_atomically(path, lambda draft: draft.write_bytes(b"".join(line + b"\n" for line in kept)))
        self.file = (Path(os.devnull) if ranks.rank() else path).open("a", buffering=1)

    def add(self, **values: float) -> None:
        """Append one line."""
        with writing(Path(self.file.name)):
            self.file.write(json.dumps(values) + "\n")


def update_results(folder: Path, task: str, values: dict) -> None:
    """Set the keys `values` of results.json's entry for `task`, leaving all others."""
    results = read_results(folder)
    results[task] = results.get(task, {}) | values
    write_json(folder / "results.json", results)


def read_results(folder: Path) -> dict:
    """results.json, {task: {"accuracy": ..., ...}}; empty if nothing has been scored."""
    path, scores = folder / "results.json", {"accuracy": (None, float), "base_accuracy": (None, float)}
    return read_json(path, "what evaluations wrote, or no such file", {str: scores}) if path.exists() else {}


def versions(device: torch.device) -> dict[str, str]:
    """What a result may depend on besides the settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"python": platform.python_version(), "torch": torch.__version__, "device": f"{device} ({name})"}


def sha256(*paths: Path) -> str:
    """One checksum over the contents of files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def compute(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where and in what numbers to compute: the asked, or cuda if there is one; bf16 there, fp32 on cpu.

    Of several ranks each joins the others here, and gets a device of its own.

    Raises ValueError for cuda on a machine without it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch finds no GPU here: want --device cpu, or a CUDA build of torch"
        )
    device = ranks.start(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    return device, DTYPES[dtype or ("bf16" if device.type == "cuda" else "fp32")]
