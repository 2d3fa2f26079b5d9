"""What other systems lack: modules of Unix, and functions of `os` and `signal`."""

import subprocess
import sys

from conftest import ROOT

# Python on Windows, as far as Linux can play it. Libraries are imported first: theirs is a part for
# each system, which this Linux would not find.
AS_ON_WINDOWS = """
import sys, os, signal
import torch, torch.distributed, tqdm, filelock, tiktoken, jinja2, safetensors.torch, numpy
import huggingface_hub, multiprocessing.popen_fork, concurrent.futures.process, tempfile, asyncio
import torch.distributed.fsdp, torch.nn.attention, torch._dynamo

for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog"):
    sys.modules[name] = None
for name in ("fork", "killpg", "geteuid", "getuid", "setsid", "wait4", "uname", "statvfs", "nice"):
    delattr(os, name)
for name in ("SIGKILL", "SIGALRM", "SIGHUP", "SIGUSR1", "setitimer", "pthread_kill"):
    delattr(signal, name)
for name in {modules!r}:
    __import__(name)

import eval_gsm8k
from plumbing.cli import command
sys.argv = ["eval_gsm8k.py", "--model", "tiny", "--limit", "1", "--max-new", "1", "--out", {out!r}]
command(eval_gsm8k.main)
"""


def test_the_method_and_its_commands_need_nothing_of_unix(tmp_path):
    files = [*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py")]
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files]
    code = AS_ON_WINDOWS.format(modules=[*modules, "examples.one_file"], out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 1 problems" in done.stdout
    assert (tmp_path / "out" / "results.json").exists()
