"""python tests/faults_driver.py

Runs commands in forked children, each with a real fault at a set moment. Reads trials, each a line
of JSON: {"words": command line, "fault": a FAULTS name or none, "where": a WHERE name, "at": n},
and if need be {"script": other than train, "env": changes of the environment}. The fault comes
before the nth line of Python run there. Answers with a line: {"code", "out", "err", "lines":
{where: n}}.

Forked, as importing torch takes longer than such a run.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from importlib import import_module, reload
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
from plumbing import cli, saves

ROOT = Path(__file__).parent.parent
WHERE = {  # the innermost function of these that is running -> what the moment is called
    train.main.__code__: "between",
    train.catch.__code__: "catcher",
    train.train_step.__code__: "step",
    saves.save.__code__: "save",
}


def fill_disk():
    """From now on no file can grow beyond 4 kB: a write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def fill_memory():
    """From now on the process gets 16 MB more: too little for a step on long rows.

    With none at all, some runs end in SIGABRT: C++ may find no room for the error itself.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24,) * 2)


FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "full disk": fill_disk,
    "full memory": fill_memory,
}


def watch(fault, where, at, lines):
    """A trace function that counts the lines run in each place, and brings the fault in time.

    Lines of this repository and of safetensors; all of torch's as well would take minutes.
    """
    inside = ["start"]

    def trace(frame, event, _arg):
        name = WHERE.get(frame.f_code)
        if event == "call" and name:  # a warm-up's steps are the catcher's
            inside.append("catcher" if inside[-1] == "catcher" else name)
        elif event == "return" and name:
            inside.pop()
        elif event == "line":
            lines[inside[-1]] += 1
            if fault and inside[-1] == where and lines[where] == at:
                FAULTS[fault]()
        file = frame.f_code.co_filename
        return trace if str(ROOT) in file or "safetensors" in file else None

    return trace


def child(script, words, env, fault, where, at, place):
    """Never returns: the forked process is the run."""
    lines, code = Counter(), 1
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / name, os.O_CREAT | os.O_WRONLY), number)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as with a disk
    sys.argv = [f"{script}.py", *words]
    os.environ.update(env)
    if "HF_ENDPOINT" in os.environ:
        reload(import_module("huggingface_hub.constants"))  # it reads the environment once
        time.sleep = lambda _: None  # the client waits longer and longer before it tries again
    try:
        if fault or script == "train":
            sys.settrace(watch(fault, where, at, lines))
        cli.command(import_module(script).main)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.settrace(None)
        with suppress(OSError):  # the disk may be full
            sys.stdout.flush()
        if fault != "full disk":
            (place / "lines").write_text(json.dumps(lines))
        os._exit(code)


def main():
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1)], fused=True)  # imports much, once for all children
    if "HF_ENDPOINT" in os.environ:  # so do these
        for name in ("export", "huggingface_hub.hf_api", "huggingface_hub.file_download"):
            import_module(name)
    for line in sys.stdin:
        trial = json.loads(line)
        with tempfile.TemporaryDirectory() as place:
            place = Path(place)
            if not (pid := os.fork()):
                script, env = trial.get("script") or "train", trial.get("env") or {}
                about = (trial.get(name) for name in ("fault", "where", "at"))
                child(script, trial["words"], env, *about, place)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            lines = json.loads((place / "lines").read_text()) if (place / "lines").exists() else {}
            out, err = ((place / name).read_text() for name in ("out", "err"))
        print(json.dumps({"code": code, "out": out, "err": err, "lines": lines}), flush=True)


if __name__ == "__main__":
    main()
