"""Folders, locks, saves, and how a command ends."""

import argparse
import errno
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Literal

import pytest
from conftest import ROOT, slow, small_run, some_slow, write_rows

from plumbing import cli, files, run_folder
from plumbing.base_model import unchanged_base_folder

SETTINGS = {
    "model": "tiny",
    "task": "tiny-math",
    "method": "hellora",
    "k": 8,
    "seed": 0,
    "lr": 0.01,
    "dtype": "fp32",
}


def saved(folder, finished, **changes):
    folder.mkdir(parents=True)
    files.write_json(folder / "run.json", SETTINGS | changes | {"finished": finished})
    return folder


def test_the_default_folder_is_the_first_that_is_free_or_unfinished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def chosen():
        return str(run_folder.choose_folder(SETTINGS, None, resume=False, override=False))

    first = "runs/tiny-tiny-math-hellora-k8-s0"
    assert chosen() == first
    saved(tmp_path / first, finished=True)
    assert chosen() == f"{first}-2"
    saved(tmp_path / f"{first}-2", finished=True, lr=0.5)
    saved(tmp_path / f"{first}-3", finished=False)
    assert chosen() == f"{first}-3"
    assert (
        str(run_folder.choose_folder(SETTINGS, None, resume=True, override=False)) == f"{first}-3"
    )


def test_resume_without_anything_to_resume_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (None, tmp_path / "new"):
        with pytest.raises(ValueError, match="--resume"):
            run_folder.choose_folder(SETTINGS, out, resume=True, override=False)


def test_an_explicit_folder_is_never_overwritten(tmp_path):
    def choose(out, override=False):
        return run_folder.choose_folder(SETTINGS, out, resume=False, override=override)

    with pytest.raises(ValueError, match="done"):
        choose(saved(tmp_path / "done", finished=True))
    other = saved(tmp_path / "other", finished=False, lr=0.5)
    with pytest.raises(ValueError, match=r"lr.*0\.5.*0\.01"):
        choose(other)
    assert choose(other, override=True) == other
    fixed = saved(tmp_path / "fixed", finished=False, lr=0.5, k=4)
    for folder in (fixed, tmp_path / "done", None):  # it says what --override can do
        with pytest.raises(ValueError, match="--out") as refused:
            choose(folder, override=True)
        assert all(flag in str(refused.value) for flag in ("--lr", "--batch-size", "--dev-every"))
        assert "--k" not in str(refused.value)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="home"):
        choose(tmp_path / "home")
    assert choose(tmp_path / "new") == tmp_path / "new"


HOLD = """
import pathlib, sys, time
from plumbing import cli, run_folder

def main():
    with run_folder.lock(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))

cli.command(main)
"""


def hold(folder, seconds):
    """A process that keeps `folder` for some seconds."""
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)


def test_a_folder_belongs_to_one_process(tmp_path):
    with run_folder.lock(tmp_path / "a"):
        other = hold(tmp_path / "a", 0)
        _, said = other.communicate()
        assert other.returncode == 2
        assert len(said.strip().splitlines()) == 1
        assert str(tmp_path / "a") in said
    with run_folder.lock(tmp_path / "a"):
        pass


def test_a_killed_process_lets_its_folder_go_and_its_drafts_are_deleted(tmp_path):
    other = hold(tmp_path, 600)
    assert other.stdout.readline() == "held\n"
    (tmp_path / ".run.json.7.draft").write_text("half")
    with pytest.raises(ValueError, match=tmp_path.name), run_folder.lock(tmp_path):
        pass
    assert (tmp_path / ".run.json.7.draft").exists()
    other.kill()
    other.communicate()
    with run_folder.lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    files.write_atomically(path, lambda draft: draft.write_text("old"))

    def torn(draft):
        draft.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, torn)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@dataclass
class Part:
    name: str
    ids: list[int]


@dataclass
class Whole:
    kind: Literal["a", "b"]
    share: float
    done: bool
    parts: dict[str, Part]
    size: files.Positive | None
    note: str = ""


RIGHT = {
    "kind": "a",
    "share": 1,
    "done": False,
    "parts": {"x": {"name": "n", "ids": [0, 1]}},
    "more": [{}],
}
WRONG = [  # (what changes, what is said)
    ({"kind": "c"}, "kind is 'c', want 'a' or 'b'"),
    ({"kind": ["a"]}, "kind is ['a'], want"),
    ({"share": float("nan")}, "share is nan, want a finite number"),
    ({"share": 10**400}, "share is 1000"),
    ({"share": True}, "share is True, want"),
    ({"share": None}, "share is None, want"),
    ({"done": 0}, "done is 0, want true or false"),
    ({"size": 0}, "size is 0, want an integer from 1 to 2147483647"),
    ({"size": True}, "size is True, want an integer"),
    ({"note": None}, "note is None, want text of one line"),
    ({"note": "a\nb"}, "want text of one line"),
    ({"note": "x" * 10**6}, ""),
    ({"parts": []}, "parts is [], want an object"),
    ({"parts": {"x": {"name": "n", "ids": {}}}}, "parts.x.ids is {}, want a list"),
    ({"parts": {"x": {"name": "n"}}}, "parts.x.ids is None, want a list"),
    (
        {"parts": {"x": {"name": "n", "ids": [0, -1]}}},
        "parts.x.ids[1] is -1, want an integer from 0",
    ),
    ({"parts": {"x": {"name": "n", "ids": [True]}}}, "parts.x.ids[0] is True, want an integer"),
    ({"parts": {"x": {"name": "n", "ids": [2**53]}}}, "parts.x.ids[0] is 9007199254740992, want"),
    ({"parts": {"x": 7}}, "parts.x is 7, want an object"),
]


@pytest.mark.parametrize(("change", "says"), WRONG)
def test_json_of_another_form_is_refused_by_the_first_part_that_is_wrong(tmp_path, change, says):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(RIGHT | change))
    if not says:
        assert files.read_json(path, "this", Whole) == RIGHT | change
        return
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        files.read_json(path, "what was written", Whole)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(": want what was written")
    assert len(str(caught.value)) < 400


def test_json_of_the_right_form_comes_back_as_it_is_with_keys_that_nobody_asked_for(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(RIGHT))
    assert files.read_json(path, "this", Whole) == RIGHT
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"it is \[\], want an object"):
        files.read_json(path, "this")


NUMBERS = [  # (type, what is refused, what is said, what is taken)
    (cli.COUNT, ["0", "-1", "1.5", "", "x", "1_000", "1e3", "٣"], "an integer above 0", {"7": 7}),
    (cli.SEED, ["-1", "2147483648", "+1"], "an integer from 0 up to 2147483647", {"0": 0}),
    (cli.SHARE, ["0", "1.01", "nan", "inf"], "a number above 0 up to 1", {"1": 1.0, ".5": 0.5}),
    (
        cli.number(float, low=0),
        ["-1e-9", "inf", "nan", "x"],
        "a number from 0",
        {"0": 0.0, "1e3": 1e3},
    ),
    (cli.number(int, low=-3), ["-4", "9" * 5000], "an integer from -3", {"-3": -3}),
]


@pytest.mark.parametrize(("kind", "refused", "says", "taken"), NUMBERS)
def test_a_number_of_a_flag_is_in_its_bounds_or_refused_with_them(kind, refused, says, taken):
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=f"want {says}$"):
            kind(text)
    for text, value in taken.items():
        assert kind(text) == value
        assert type(kind(text)) is type(value)


def test_metrics_of_lost_steps_are_dropped(tmp_path):
    metrics = run_folder.Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.add(step=step, loss=1 / 3)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')
    run_folder.Metrics(tmp_path, 2).add(step=3, loss=0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 1 / 3},
        {"step": 3, "loss": 0.5},
    ]


def test_evaluations_that_end_together_lose_nothing(tmp_path):
    """Two processes behind a barrier, 20 rounds. Without a lock each of them lost one."""
    process = multiprocessing.get_context("fork")
    barrier = process.Barrier(2)

    def evaluate(who):
        for n in range(20):
            barrier.wait()
            run_folder.update_results(tmp_path, f"{who}-{n}", {"accuracy": n / 20})

    both = [process.Process(target=evaluate, args=(who,)) for who in "ab"]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
        assert one.exitcode == 0
    want = {f"{who}-{n}": {"accuracy": n / 20} for who in "ab" for n in range(20)}
    assert run_folder.read_results(tmp_path) == want


def test_where_nothing_can_be_written_a_result_is_shown_all_the_same(tmp_path, capsys, monkeypatch):
    """The kernel's own answer on a read-only disk. Permissions alone do not stop root."""

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "replace", read_only)
    run_folder.keep_results(tmp_path, "a", {"accuracy": 1.0}, [])
    assert f"not kept: {tmp_path / 'results.json'}" in capsys.readouterr().err
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="MB free"):
        run_folder.keep_results(tmp_path, "a", {"accuracy": 1.0}, [])


def test_an_evaluation_changes_only_its_own_entry(tmp_path):
    run_folder.update_results(tmp_path, "a", {"base_accuracy": 0.0})
    run_folder.update_results(tmp_path, "b", {"accuracy": 0.5})
    run_folder.update_results(tmp_path, "a", {"accuracy": 1.0})
    assert run_folder.read_results(tmp_path) == {
        "a": {"base_accuracy": 0.0, "accuracy": 1.0},
        "b": {"accuracy": 0.5},
    }


def test_json_lines_hold_any_text_and_are_utf8(tmp_path):
    rows = [{"text": text} for text in ("2 \u2264 é\n", "half \ud800 and \udfff", "\u2028\x85\r")]
    files.write_json_lines(tmp_path / "rows.jsonl", rows)
    lines = (tmp_path / "rows.jsonl").read_bytes().decode("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
    assert lines[-1] == ""


def test_a_base_model_that_cannot_be_read_is_named_and_so_is_its_run(tmp_path):
    for model in (str(tmp_path / "gone"), "org/never-fetched"):  # the tests' Hub is offline
        with pytest.raises(OSError, match=f"{tmp_path / 'a-run'}.*{model}"):
            unchanged_base_folder({"model": model, "hashes": {}}, tmp_path / "a-run")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("a\nb"), 2), (FileNotFoundError("x"), 2), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.command(main)
    assert ended.value.code == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("text", ["\x1b[2Jgone", "a\x9b31m", "ab\u202etxt.exe", "\x07\r\x00"])
def test_what_came_from_a_file_cannot_command_a_terminal(text, capsys):
    cli.say(f"one\n\ttwo é 数 {text}")
    out = capsys.readouterr().out
    assert out.startswith("one\n\ttwo é 数 ")
    assert all(c.isprintable() or c in "\n\t" for c in out)
    assert out.count("?") == sum(not c.isprintable() for c in text)


def test_a_stdout_that_knows_few_characters_stops_no_run(monkeypatch):
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        cli.command(lambda: print("▁▂█ é done"))
    stream.flush()
    assert ended.value.code == 0
    assert raw.getvalue() == b"??? ? done\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.command(lambda: 1 / 0)


BY_SIGNAL = {signal.SIGINT: ["catcher.py"], signal.SIGTERM: ["-m", "paper.reproduce", "params"]}


@pytest.mark.parametrize(("number", "command"), BY_SIGNAL.items())
def test_a_signal_during_the_imports_ends_a_command_in_one_line(number, command):
    words = [sys.executable, *command]
    with subprocess.Popen(words, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.startswith("stopped") and err.count("\n") == 1


EXPORTING = """
import os, signal, sys, time
import export
from plumbing import cli

def stopped(*_):  # in the middle of a write
    os.kill(os.getpid(), signal.{})
    time.sleep(60)

export.{} = stopped
cli.command(export.main)
"""


@pytest.mark.parametrize(
    ("signal_name", "where"), [("SIGINT", "write_tensors"), slow(("SIGTERM", "check"))]
)
def test_a_signal_in_a_command_leaves_nothing_and_says_what_comes_next(
    signal_name, where, toy, tmp_path, cli
):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "1?", "answer": "#### 1"}])
    flags = small_run(toy, rows, "--steps", 1, "--method", "lora", "--out", tmp_path / "run")
    assert cli("train.py", *flags, "--no-eval")[0] == 0
    before = sorted((tmp_path / "run").rglob("*"))
    words = ["--run", str(tmp_path / "run"), "--format", "peft"]
    code = EXPORTING.format(signal_name, where)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 128 + getattr(signal, signal_name)
    assert done.stderr.count("\n") == 1
    assert "the same command" in done.stderr
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_command_in_the_background_of_a_shell_still_ignores_ctrl_c():
    code = "import os, signal; from plumbing.cli import command; "
    code += "command(lambda: os.kill(os.getpid(), signal.SIGINT))"
    done = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code], cwd=ROOT
    )
    assert done.returncode == 0


SIGNALS = {
    # what runs, and the exit code: SIGTERM ends the process at once where it is the second signal,
    # or where the command is done
    "a second signal": ("try: kill(INT)\n  finally: kill(TERM)", -signal.SIGTERM),
    "one at the exit": ("atexit.register(kill, TERM)", -signal.SIGTERM),
    "one in a step": ("with cli.deferred_stop() as asked: kill(TERM)\n  assert asked == [TERM]", 0),
}


@pytest.mark.parametrize("case", some_slow(SIGNALS, ["a second signal"]))
def test_a_signal_at_an_odd_moment_ends_without_a_traceback_or_an_untrue_line(case):
    body, code = SIGNALS[case]
    script = (
        "import plumbing.quiet, atexit, os, time\n"
        "from signal import SIGINT as INT, SIGTERM as TERM\n"
        "from plumbing import cli\n"
        "def kill(number): os.kill(os.getpid(), number); time.sleep(0.1)\n"
        f"def main():\n  {body}\n"
        "cli.command(main)\n"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_step_does_not_note_a_signal_that_the_shell_has_ignored():
    code = "import os, signal; from plumbing.cli import deferred_stop\n"
    code += "with deferred_stop() as asked: os.kill(os.getpid(), signal.SIGINT)\nassert not asked"
    words = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code]
    assert subprocess.run(words, cwd=ROOT).returncode == 0
