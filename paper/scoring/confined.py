"""The script that runs inside the sandbox of sandbox.py, for a program or for its test.

    python -I -S paper/scoring/confined.py program|test FD SECONDS USER PACKAGES

FD is an open file with the program or the test. Standard input and output are pipes to the other
interpreter. A line from the test is a call, (name, args, kwargs). A line from the program is the
result of that call. Both are literals, and the test reads them with ast.literal_eval. So no object
of a program ever exists in the interpreter of its test. A program that raises or exits has ended:
it gives no more answers.
"""

import errno
import os
import resource
import sys
from io import BufferedReader, FileIO

# The exit statuses of a test. Nothing else here exits with them. SIGALRM ends it when time is up.
PASSED, FAILED, NOT_STARTED, NO_LITERAL = 100, 101, 102, 103
READY = b"ready\n"
MEGABYTE = 1 << 20
LIMITS = {
    resource.RLIMIT_AS: 1024 * MEGABYTE,
    resource.RLIMIT_FSIZE: 16 * MEGABYTE,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_NPROC: 8,  # processes and threads together
    resource.RLIMIT_CORE: 0,
}
LONGEST_ANSWER = MEGABYTE  # bytes of a line from the program
# Values of USER that are not a user's number. SAME: stay the same user, in a new user namespace.
# ANY: there is no sandbox, so change nothing.
SAME, ANY = "same", "any"
KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219}  # asm/unistd.h
JOIN_SESSION = 1  # linux/keyctl.h
NEW_USER = 1 << 28  # linux/sched.h
MY_CAPABILITIES = (0x20080522).to_bytes(4, sys.byteorder) + bytes(4)  # linux/capability.h


# ---- before anything runs ------------------------------------------------------------------------


def drop_rights(user: str) -> None:
    """Give up all capabilities and keys. user: the number of the user to become, or SAME.

    bubblewrap's own process runs without our limits. A program that traced it (ptrace) would escape
    them. So a program started by root becomes another user, and a program started by an ordinary
    user enters a new user namespace. Neither can trace bubblewrap. The session keyring of the login
    is replaced by an empty one.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *args: object) -> None:
        blocked = (errno.EPERM, errno.ENOSYS) if function == "syscall" else ()  # also for programs
        if getattr(libc, function)(*args) < 0 and ctypes.get_errno() not in blocked:
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")

    if user == SAME:
        call("unshare", NEW_USER)
    else:
        os.setgroups([])
        os.setresgid(*[int(user)] * 3)
        os.setresuid(*[int(user)] * 3)
    call("capset", MY_CAPABILITIES, bytes(24))
    call("syscall", KEYCTL[os.uname().machine], JOIN_SESSION, None)


def limit(seconds: float) -> None:
    """Set the kernel's limits. A limit that this system does not have is left out."""
    for resource_name, value in {**LIMITS, resource.RLIMIT_CPU: int(seconds) + 2}.items():
        try:
            resource.setrlimit(resource_name, (value, value))
        except ValueError:
            continue


def take_pipes() -> tuple[BufferedReader, FileIO]:
    """The pipe from the other interpreter, and the pipe to it.

    After this call the standard files lead nowhere.
    """
    incoming, outgoing = BufferedReader(FileIO(os.dup(0))), FileIO(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    return incoming, outgoing


# ---- the two interpreters ------------------------------------------------------------------------


def spell(value: object) -> str:
    """A value as a literal. An instance of a subclass becomes a value of the built-in type.

    So values that are equal in one interpreter are equal across two: a Counter and a dict, a numpy
    scalar and a number. Raises TypeError for all other values, and for nan.
    """
    numpy = sys.modules.get("numpy")
    if numpy and isinstance(value, numpy.generic):
        value = value.item()
    if value is None:
        return "None"
    for kind in (bool, int, complex, str, bytes):
        if isinstance(value, kind):
            # Python reads at most 4,300 decimal digits, so integers are in hexadecimal.
            return int.__format__(value, "#x") if kind is int else kind.__repr__(value)
    if isinstance(value, float) and value == value:
        return float.__repr__(value).replace("inf", "1e999")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spell(k)}: {spell(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(spell, value)) + "]"
    if isinstance(value, tuple):
        return "(" + "".join(spell(item) + ", " for item in value) + ")"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(map(spell, value)) + "}" if value else "set()"
    raise TypeError(f"a {type(value).__name__} has no literal")


def serve(program: str, calls: BufferedReader, answers: FileIO) -> None:
    """Run the program, then its functions when the test calls them, until the calls end."""
    answers.write(READY)
    defined = {}
    exec(program, defined)
    for line in calls:
        name, args, kwargs = eval(line)  # a literal from the test, which holds no program's object
        answers.write(spell(defined[name](*args, **kwargs)).encode() + b"\n")


def decide(
    test: str,
    names: tuple[str, ...],
    helpers: str,
    seconds: float,
    calls: FileIO,
    answers: BufferedReader,
) -> int:
    """Run the test, after `helpers`. `names` are the program's functions in it. Returns a status.

    The time begins with the program. SIGALRM is not caught, so it also ends code that never returns
    to Python.
    """
    from ast import literal_eval
    from collections.abc import Callable
    from signal import ITIMER_REAL, setitimer

    def of_program(name: str) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            try:
                line = spell((name, args, kwargs))
                literal_eval(line)  # a set in a set has no literal
            except TypeError:
                os._exit(NO_LITERAL)
            calls.write(line.encode() + b"\n")
            return literal_eval(answers.readline(LONGEST_ANSWER).decode())

        return call

    if answers.readline(len(READY)) != READY:
        return NOT_STARTED
    setitimer(ITIMER_REAL, seconds)
    try:
        defined = {}
        exec(helpers, defined)
        defined |= {name: of_program(name) for name in names}
        exec(test, defined)
    except BaseException:
        return FAILED
    return PASSED


def main(role: str, file: str, seconds: str, user: str, packages: str) -> None:
    """Become the interpreter of the program, or of the test."""
    if user != ANY:
        drop_rights(user)
    limit(float(seconds))
    sys.path.append(packages)
    given = eval(FileIO(int(file)).read())  # a literal that sandbox.py wrote
    incoming, outgoing = take_pipes()
    if role == "program":
        serve(given, incoming, outgoing)
    else:
        os._exit(decide(*given, float(seconds), outgoing, incoming))


if __name__ == "__main__":
    main(*sys.argv[1:])
