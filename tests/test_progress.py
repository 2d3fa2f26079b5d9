"""How far a long command is: a bar in a terminal, a line now and then in a file."""

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, small_run, write_rows

from plumbing import cli

ROWS = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(64)]
# A command of the project, in which a line is due at each step.
AT_ONCE = "import plumbing.quiet, runpy, sys; from plumbing import cli; cli.LINE_EVERY = 0; "
AT_ONCE += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def training(toy, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = small_run(toy, rows, "--steps", 6, "--batch-size", 4, "--out", tmp_path / "run")
    flags += ["--no-eval", "--method", "lora"]
    return [sys.executable, "-c", AT_ONCE, "train.py", *flags]


def test_a_log_file_has_lines_and_no_state_of_a_bar(toy, tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        subprocess.run(training(toy, tmp_path), cwd=ROOT, stdout=file, stderr=file, check=True)
    text = log.read_bytes().decode()
    assert "\r" not in text
    told = re.findall(r"(?m)^train: step (\d) of 6, loss [\d.]+, .*, [\d:]+ (left|in all)$", text)
    assert told == [(str(step), "left") for step in range(1, 6)] + [("6", "in all")]
    # lines of output and of progress stand in the order in which they came about
    assert text.index("parameters are trained") < text.index("train: step") < text.index("done.")


def in_a_terminal(command, **env):
    """What a command writes to a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    env = os.environ | {"TERM": "xterm"} | env
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    found = b""
    try:
        while part := os.read(ours, 65536):
            found += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0, found
    return found.decode()


def test_a_terminal_has_a_bar(toy, tmp_path):
    text = in_a_terminal(training(toy, tmp_path))
    assert re.search(r"\rtrain: 100%\|[^|]+\| 6/6 ", text)
    assert "train: step" not in text


@pytest.mark.parametrize(("term", "bars"), [("xterm", 1), ("dumb", 0)])
def test_a_dumb_terminal_has_lines(term, bars, monkeypatch, capsys):
    monkeypatch.setattr(cli, "LINE_EVERY", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", term)
    list(cli.progress(range(3), label="train", unit="step"))
    err = capsys.readouterr().err
    assert ("\r" in err) == bars
    assert ("train: step 3 of 3" in err) == (not bars)


def test_a_short_loop_has_no_line(capsys):
    assert list(cli.progress("abc", label="train", unit="step")) == list("abc")
    assert capsys.readouterr().err == ""


def test_lines_count_from_where_a_run_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(cli, "LINE_EVERY", 0)
    with cli.progress(label="train", unit="step", total=12, start=10) as bar:
        bar.update()
        bar.update()
    first, last = capsys.readouterr().err.splitlines()
    assert first == "train: step 11 of 12, 00:00 left"
    assert last == "train: step 12 of 12, 00:00 in all"


def test_lines_of_a_loop_that_breaks_off_do_not_say_that_it_was_all(monkeypatch, capsys):
    monkeypatch.setattr(cli, "LINE_EVERY", 0)
    with pytest.raises(ValueError, match="x"), cli.progress(label="a", unit="b", total=3) as bar:
        bar.update()
        raise ValueError("x")
    assert "in all" not in capsys.readouterr().err
    assert list(cli.progress(iter("abc"), label="a", unit="b", total=3)) == list("abc")


def test_a_log_file_has_no_bar_of_a_library_either():
    code = "import plumbing.quiet; from tqdm import tqdm; list(tqdm(range(3)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
