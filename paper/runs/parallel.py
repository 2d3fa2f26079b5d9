"""Several commands of this repository at once, each in a process of its own. They stop together."""

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
RUNNING: set[subprocess.Popen] = set()  # the commands that run now


def python(*arguments: str, on_cpu: bool = False) -> None:
    """Run a command of this repository in its own process, on one thread, in the root folder.

    One thread gives the most work per core, and numbers that do not depend on how many cores there
    are. on_cpu: hide the GPUs, so that it computes on the CPU in fp32. Raises OSError if it fails,
    with the command and its last line of output.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    options = {"cwd": ROOT, "env": env, "text": True}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *arguments], **options, **pipes) as child:
        RUNNING.add(child)
        try:
            _, errors = child.communicate()
        except BaseException:  # a signal, if this is the main thread
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

    The first failure, or a signal, ends all. No new item begins, and the running commands get a
    SIGTERM. train.py then saves its state.
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
            # A thread may be between two commands, so try again until all have ended.
            while not all(task.done() for task in waiting):
                with suppress(KeyError):  # RUNNING is empty; threads also remove commands from it
                    while True:
                        RUNNING.pop().terminate()
                wait(waiting, timeout=0.1)
            raise
