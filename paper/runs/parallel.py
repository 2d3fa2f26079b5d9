"""Commands of this repository, several at a time. Each has its own process; all stop together."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
ROOT = Path(__file__).parent.parent.parent  # of the repository
RUNNING: set[subprocess.Popen] = set()  # the commands under way


def python(*arguments: str, on_cpu: bool = False) -> None:
    """Run a command of this repository in a process of its own, on one thread, in the clone's root.

    One thread each is the most work per core, and makes a cell's numbers independent of the cores
    there are. on_cpu: hide GPUs from it, so that it computes on the CPU in fp32. Raises OSError
    with the command and the last line that it printed if it fails.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    how = {"cwd": ROOT, "env": env, "text": True}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *arguments], **how, **pipes) as child:
        RUNNING.add(child)
        try:
            _, errors = child.communicate()
        except BaseException:  # a signal, if we are the main thread
            child.terminate()
            raise
        finally:
            RUNNING.discard(child)
    if child.returncode:
        *_, last = ["no message", *errors.split("\n")[:-1]]
        command = f"python {' '.join(arguments)}"
        raise OSError(
            f"a command of the grid ended with exit code {child.returncode}: {command} ({last})"
        )


def each(call: Callable[[Item], None], items: Iterable[Item], jobs: int) -> Iterator[Item]:
    """Call a function on each item, `jobs` at a time, in threads. Yields an item when it is done.

    The first failure, or a signal, ends all: nothing more is begun, and the commands under way get
    a SIGTERM, on which train.py saves what it has.
    """
    waiting: dict[Future, Item] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            waiting.update((pool.submit(call, item), item) for item in items)
            for done in as_completed(waiting):
                done.result()
                yield waiting[done]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(
                task.done() for task in waiting
            ):  # one may have been between two commands
                with suppress(
                    KeyError
                ):  # until there is none; a thread may take its own away meanwhile
                    while True:
                        RUNNING.pop().terminate()
                wait(waiting, timeout=0.1)
            raise
