"""The inner half of sandbox.py: a script with two processes. The lower becomes the program.

    python -I -S paper/scoring/confined.py FOLDER SECONDS MODE

Its input is a token and the program, its output the token again.

The upper one never runs a line of the program: it makes the namespaces, keeps the deadline, and
kills. The lower one is process 1 of its own pid namespace, so that everything it has started ends
with it.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from types import FrameType

TOKEN = 32  # bytes
TIMED_OUT = 124  # exit status, as of timeout(1)
MEGABYTE = 1 << 20
LIMITS = {  # one process, and no other beside it
    resource.RLIMIT_AS: 1024 * MEGABYTE,
    resource.RLIMIT_FSIZE: MEGABYTE,
    resource.RLIMIT_NOFILE: 64,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_CORE: 0,
}
NOBODY = 65534
# From linux/sched.h.
NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
READ_ONLY, NO_SETUID, NO_DEVICES, PRIVATE = 1, 2, 4, 1 << 18  # linux/mount.h
# The first is one number on every architecture. The others are from linux/fcntl.h.
MOUNT_SETATTR, HERE, RECURSIVE = 442, -100, 0x8000
DIE_WITH_PARENT, KEEP_CAPABILITIES, NO_NEW_PRIVILEGES = 1, 8, 38  # linux/prctl.h
MAY_READ_ALL = 1 << 2  # linux/capability.h: CAP_DAC_READ_SEARCH


def call(name: str, *args: object) -> None:
    """A function of the C library. Raises OSError where it returns an error."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def write(path: str, text: str) -> None:
    """One write to a file of /proc."""
    with open(path, "w") as file:  # noqa: PTH123  pathlib would cost more than the program
        file.write(text)


def enter_namespaces() -> None:
    """The next child gets its own processes, mounts, network (none) and shared memory."""
    user, group = os.getuid(), os.getgid()
    call("unshare", NEW_NS | NEW_IPC | NEW_PID | NEW_NET | (NEW_USER if user else 0))
    if user:  # whoever is not root may do this only as root of a new user namespace
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {user} 1")
        write("/proc/self/gid_map", f"0 {group} 1")


def hide_files(folder: str) -> None:
    """Nothing can be written but `folder`, which is now in memory; no process can be looked at."""
    call(
        "syscall",
        MOUNT_SETATTR,
        HERE,
        b"/",
        RECURSIVE,
        struct.pack("4Q", READ_ONLY, 0, PRIVATE, 0),
        32,
    )
    flags = NO_SETUID | NO_DEVICES
    call("mount", b"box", folder.encode(), b"tmpfs", flags, b"size=16m,nr_inodes=256")
    call("mount", b"box", b"/proc", b"tmpfs", flags | READ_ONLY, b"size=4k")


def drop_rights(mode: str) -> None:
    """Root becomes nobody, who may read the interpreter's files. No right can be won back."""
    if mode != "process":
        call("prctl", KEEP_CAPABILITIES, 1, 0, 0, 0)
        call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if mode.endswith("user"):
            os.chown(".", NOBODY, NOBODY)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        keep = 0 if os.access(os.__file__, os.R_OK) else MAY_READ_ALL  # a Python in /root, say
        call("capset", struct.pack("Ii", 0x20080522, 0), struct.pack("6I", keep, keep, 0, 0, 0, 0))


def limit(seconds: int) -> None:
    """The kernel's limits; one that this system does not have is left out."""
    for what, value in {**LIMITS, resource.RLIMIT_CPU: seconds}.items():
        try:
            resource.setrlimit(what, (value, value))
        except ValueError:
            continue


def run_program() -> None:
    """Take the token and the program, run it to its end, and only then give the token back.

    The token has no name and is in no file: while the program runs, it lies on this frame's stack.
    A program that raises, exits, or replaces os.write (looked up before it began) never gets to the
    end of that line.
    """
    reply, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.write(reply, (os.read(0, TOKEN), exec(read_program(null), {}))[0])
    os._exit(0)


def read_program(null: int) -> str:
    """The rest of the input; from here on input and outputs lead nowhere."""
    with open(0, "rb", closefd=False) as source:
        text = source.read().decode("utf-8", "surrogatepass")
    for standard in range(3):
        os.dup2(null, standard)
    return text


def main(folder: str, seconds: float, mode: str) -> int:
    """The upper process; its exit status."""
    if mode.startswith("namespaces"):
        enter_namespaces()
    program = os.fork()
    if program == 0:
        if mode.startswith("namespaces"):
            hide_files(folder)
        os.chdir(folder)
        drop_rights(mode)
        limit(int(seconds) + 1)
        run_program()

    def kill(number: int, frame: FrameType | None) -> None:
        nonlocal status
        status = TIMED_OUT
        os.kill(program, signal.SIGKILL)

    status = 0
    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    os.waitpid(program, 0)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3]))
