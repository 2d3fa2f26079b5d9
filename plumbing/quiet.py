"""Imported first by a command: Ctrl-C while torch is being imported ends without a traceback."""

import sys
from types import TracebackType

before = sys.excepthook


def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of whatever ends the process, unless it is the user's Ctrl-C."""
    if not issubclass(kind, KeyboardInterrupt):
        before(kind, error, trace)


sys.excepthook = hook
