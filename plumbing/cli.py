"""What all commands share: how a command ends, how far it is, the flags of the computation.

Exit code 0: done. 2: a mistake that the user can mend, one line on stderr. 130 and 143: stopped by
Ctrl-C or SIGTERM, one line that says what the same command does next. 141: what read its output is
gone. 1 and a traceback: a fault of ours.

torch is imported in one function only, so --help and a wrong flag do not wait for it (flags.py).
"""

import argparse
import io
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

LOST = (
    "another rank has ended or does not answer, and its own lines say why: start all ranks again "
    "with the same command, which goes on from the last save"
)
AGAIN = "type the same command to start again"
PIPE_CLOSED = 128 + 13  # the exit code that a shell shows for a program that SIGPIPE ended
HERE = Path(__file__).parent.parent  # the folder of the project
LONGEST_LINE = 2000  # characters of an error: a file may have any text where a name should be
LINE_EVERY = 30.0  # seconds between two lines of progress in a log file


# ---- how a command ends --------------------------------------------------------------------------


def command(main: Callable[[], None]) -> NoReturn:
    """Run `main` and end the process with the exit code that its outcome deserves.

    One of several ranks ends at once: what Python does at its exit may wait for the others, or have
    gloo's threads abort it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal or a file may know few characters. In a log file, each line of output stands
        # between the lines of progress before and after it.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    before = raise_signals(alone)
    if alone:
        at_start = getattr(sys.modules.get("plumbing.quiet"), "end", None)
        try:
            sys.exit(outcome(main))
        finally:
            for number, handler in before.items():  # at_start would say that nothing was written
                signal.signal(number, signal.SIG_DFL if handler is at_start else handler)
    try:
        code = outcome(main)
    except SystemExit as end:  # --help
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Terminated(KeyboardInterrupt):
    """SIGTERM: it stops a command as Ctrl-C does, with an exit code of its own."""


def raise_signals(alone: bool) -> dict[int, object]:
    """Have SIGINT and SIGTERM raise KeyboardInterrupt from now on. Returns the handlers before.

    A second signal ends the process at once. With several ranks SIGTERM ends each of them at once
    and without a line, because a rank that waits for the others runs no Python.
    """

    def stop(number: int, _frame: object) -> NoReturn:
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop if alone else signal.SIG_DFL}
    before = {}
    for number, handler in handlers.items():
        if signal.getsignal(number) != signal.SIG_IGN:  # see quiet.py
            before[number] = signal.signal(number, handler)
    return before


def read_early(read: Callable[[str], object], description: str) -> None:
    """Read the flags before torch is imported: --help, or a wrong flag, ends the process here."""
    try:
        read(description)
    except (ValueError, OSError) as error:
        sys.exit(_fail(error))


def outcome(main: Callable[[], None]) -> int:
    """Run `main`. Returns the exit code. A fault of ours is raised."""
    from plumbing import ranks  # here, as it imports torch

    try:
        main()
        sys.stdout.flush()
        ranks.stop()
    except BrokenPipeError:  # whoever read the output has seen enough, as in: ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still unsaid
        return PIPE_CLOSED
    except (ValueError, OSError) as error:  # what the project's files raise for a user's mistake
        return _fail(error)
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            fewer = "train.py --eval-batch N or eval_*.py --batch-size N decodes fewer at a time"
            return _fail(OSError(f"out of memory: if it was scoring, {fewer}"))
        if not ranks.is_lost(error):
            raise
        return _fail(OSError(LOST))
    except KeyboardInterrupt as interrupt:
        line_end = "\n" * sys.stderr.isatty()  # a terminal shows ^C, and perhaps a bar
        print(f"{line_end}stopped: {str(interrupt) or AGAIN}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
    return 0


def _fail(error: Exception) -> int:
    """Print the error as one line. Returns the exit code 2."""
    if os.environ.get(
        "HELLORA_TRACEBACK"
    ):  # for whoever suspects a fault of ours behind the message
        raise error
    rank = os.environ.get("RANK", "0")
    who = f"rank {rank}: " if rank != "0" else ""
    print(f"error: {who}{plain(' '.join(str(error).split()))[:LONGEST_LINE]}", file=sys.stderr)
    return 2


def say(text: str) -> None:
    """Print what came from a file or from a model."""
    print(plain(text))


def plain(text: str) -> str:
    """The text with "?" for characters that could command a terminal, or hide others there."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def to_type(command: str, path: Path) -> str:
    """A command of the project, as one types it where one stands.

    command: as in the project's folder, with {} for `path`.
    """
    if Path.cwd() == HERE:
        return command.format(shlex.quote(str(path)))
    return f"cd {shlex.quote(str(HERE))} && {command.format(shlex.quote(str(path.absolute())))}"


@contextmanager
def deferred_stop() -> Iterator[list[int]]:
    """SIGINT and SIGTERM only note themselves in the list that is yielded, so no step is ever torn.

    A second signal ends the process at once, as usual. A KeyboardInterrupt that is raised after a
    SIGTERM becomes a Terminated.
    """
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN  # see quiet.py
    }
    try:
        yield asked
    except KeyboardInterrupt as interrupt:
        raise (Terminated if signal.SIGTERM in asked else KeyboardInterrupt)(
            *interrupt.args
        ) from None
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
        if not recompute:
            way_out = "add --recompute"
        elif micro_batch > 1:
            way_out = f"add --micro-batch {micro_batch // 2}"
        else:
            way_out = "want more memory"
        raise OSError(
            f"out of memory with --micro-batch {micro_batch}: {way_out}. "
            "The same command goes on from the last save"
        ) from error


# ---- how far it is -------------------------------------------------------------------------------


def progress(
    items: Iterable | None = None,
    *,
    label: str,
    unit: str,
    total: int | None = None,
    start: int = 0,
    keep: bool = False,
    hidden: bool = False,
) -> "tqdm | Lines":
    """`items` as they are, with progress on stderr. Without items, `update` counts up to `total`.

    In a terminal it is a bar, which is taken away at the end unless `keep`. In a file or a pipe it
    is a line now and then. Rank 0 alone shows it. start: how many were done before.
    """
    hidden = hidden or os.environ.get("RANK", "0") != "0"
    if hidden or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb"):
        return tqdm(items, label, total, unit=unit, initial=start, leave=keep, disable=hidden)
    return Lines(items, label, unit, len(items) if total is None else total, start)


class Lines:
    """What the project uses of a tqdm bar, as plain lines: one every LINE_EVERY seconds.

    A last line tells the whole time. A loop that is shorter than LINE_EVERY has no line.
    """

    def __init__(self, items: Iterable | None, label: str, unit: str, total: int, start: int):
        self.items, self.label, self.unit = items, label, unit
        self.n, self.start, self.total = start, start, total
        self.note, self.n_told = "", 0
        self.began = self.told = time.monotonic()

    def __iter__(self) -> Iterator:
        with self:
            for item in self.items:
                yield item
                self.update()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_error: object) -> None:
        if self.n_told and self.n == self.total:
            self.tell(f"{tqdm.format_interval(time.monotonic() - self.began)} in all")

    def set_postfix_str(self, note: str) -> None:
        """What the next line says beside the number."""
        self.note = f", {note}"

    def update(self, n: int = 1) -> None:
        """Count n more."""
        self.n += n
        now = time.monotonic()
        if now - self.told >= LINE_EVERY and self.start < self.n < self.total:
            each = (now - self.began) / (self.n - self.start)
            self.tell(f"{tqdm.format_interval(each * (self.total - self.n))} left")
            self.told = now

    def tell(self, time_spent: str) -> None:
        """Print a line."""
        self.n_told += 1
        shown = f"{self.unit} {self.n:,} of {self.total:,}{self.note}"
        print(f"{self.label}: {shown}, {time_spent}", file=sys.stderr, flush=True)


# ---- flags ---------------------------------------------------------------------------------------

DECIMAL = re.compile("-?[0-9]+")  # int() would take 1_000 and digits of other scripts as well


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes end like all others: one line, exit code 2.

    Its --help begins with the description: a command's docstring, which begins with one sentence
    and some examples. The list of flags comes after it, so usage, the same list, is left out.
    """

    def __init__(self, **options: object):
        # A flag that is cut off is a mistake, and not another spelling.
        super().__init__(usage=argparse.SUPPRESS, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        words = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
        for word in words:
            if word not in self._option_string_actions:
                message += did_you_mean(word, self._option_string_actions)
        raise ValueError(f"{message} (--help lists all flags)")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Called by argparse: is the value one of the flag's choices?"""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices))
            raise


# Flags of other trainers -> ours
ELSEWHERE = {
    "--learning-rate": "--lr",
    "--num-train-epochs": "--epochs",
    "--max-steps": "--steps",
    "--per-device-train-batch-size": "--micro-batch",
    "--model-name-or-path": "--model",
    "--train-file": "--data",
    "--output-dir": "--out",
    "--lora-r": "--rank",
    "--lora-alpha": "--alpha",
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names the known word nearest to `word`, for an error. "" if none is near.

    Near is what other trainers call the same flag. So is a word with a few other letters or with
    other capitals, one that begins with `word`, and one to which `word` adds three letters at most.
    """
    spelt = {name.lower(): name for name in known}
    low = word.lower()
    near = [name for name in [ELSEWHERE.get(low.replace("_", "-"))] if name in spelt]
    near += get_close_matches(low, spelt, 1, 0.75)
    near += [name for name in spelt if len(low) > 2 and name.startswith(low)]
    for name in spelt:
        if len(name.strip("-")) > 1 and low.startswith(name) and len(low) - len(name) <= 3:
            near.append(name)
    return f" (did you mean {spelt[near[0]]} in place of {word}?)" if near else ""


def number(
    kind: type, *, low: float = -inf, above: float = -inf, high: float = inf
) -> Callable[[str], float]:
    """An argparse type: an int or float n with low <= n, above < n and n <= high.

    An int is written in plain decimal digits. A float is finite.
    """
    wanted = "a number" if kind is float else "an integer"
    wanted += f" above {above}" if above > -inf else ""
    wanted += f" from {low}" if low > -inf else ""
    wanted += f" up to {high}" if high < inf else ""

    def parse(text: str) -> float:
        with suppress(ValueError):
            n = kind(text)
            inside = low <= n <= high and above < n and abs(n) < inf
            if inside and (kind is float or DECIMAL.fullmatch(text)):
                return n
        raise argparse.ArgumentTypeError(f"{text!r}, want {wanted}")

    return parse


COUNT = number(int, above=0)
SHARE = number(float, above=0, high=1)
SEED = number(int, low=0, high=2**31 - 1)  # what torch takes on every device


def device_name(text: str) -> str:
    """An argparse type: what --device takes."""
    if text == "mps":
        raise argparse.ArgumentTypeError(
            "'mps', but this project has not been tested on Apple GPUs: want cpu"
        )
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}, want cpu or cuda")
    return text


def add_compute_flags(add: Callable) -> None:
    """The flags that `device.compute` takes. add: an add_argument."""
    # fmt: off
    add("--device", type=device_name, metavar="{cpu,cuda}",
        help="where to compute (default: cuda if there is one)")
    add("--dtype", choices=["fp32", "bf16"],
        help="number format of the computation (default: bf16 on a GPU of compute capability 8 "
             "or newer, else fp32)")
    # fmt: on
