"""Imported first by a command: what has to be there before other files are imported.

A signal during the imports ends the command in one line. A log file gets no state of a bar.
"""

import os
import signal
import sys
from types import FrameType


def end(number: int, _frame: FrameType | None) -> None:
    """Say that the command was stopped, and end the process at once: nothing has begun."""
    print("stopped while starting: nothing was written", file=sys.stderr, flush=True)
    os._exit(128 + number)


for number in (signal.SIGINT, signal.SIGTERM):
    # A shell has it ignored in what runs in its background. That stays so.
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, end)

if not sys.stderr.isatty():
    # tqdm reads this when it is imported. It holds for bars that do not come from cli.progress.
    os.environ.setdefault("TQDM_DISABLE", "1")
