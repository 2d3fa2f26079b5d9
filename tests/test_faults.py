"""Real faults that a run must survive: killed, stopped, no room left, a poisoned row."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, small_run, toy_in, write_rows
from safetensors.torch import load_file, save_file

from plumbing.tokenizer import load_tokenizer

ROWS = [
    {"question": f"{'Tom ' * (n % 5)}has {n} pens. How many?", "answer": f"#### {n}"}
    for n in range(13)
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """trial(folder, fault, where, at) -> what came of it; see faults_driver.py."""
    place = tmp_path_factory.mktemp("faults")
    rows = write_rows(place / "rows.jsonl", ROWS)
    words = small_run(
        toy_in(place), rows, "--batch-size", 5, "--steps", 8, "--save-every", 2, "--no-eval"
    )
    command = [sys.executable, ROOT / "tests" / "faults_driver.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=place, env=env, **pipes) as driver:

        def run(folder, fault=None, where=None, at=None, words=words):
            asked = {
                "words": [*words, "--out", str(folder)],
                "fault": fault,
                "where": where,
                "at": at,
            }
            driver.stdin.write(json.dumps(asked) + "\n")
            driver.stdin.flush()
            return json.loads(driver.stdout.readline())

        yield run
        driver.stdin.close()


@pytest.fixture(scope="module")
def whole(trial, tmp_path_factory):
    """The run that nothing happens to: its folder, and how many lines of Python it runs where."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = trial(folder)
    assert ended["code"] == 0, ended["err"]
    return folder, ended["lines"]


def numbers(folder):
    """What must be the same to the last bit: the adapter's file, and each step's loss and norm."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(m["step"], m["loss"], m["grad_norm"], m["lr"]) for m in lines]
    return (folder / "adapter.safetensors").read_bytes(), steps


def moments(lines, many):
    """`many` moments of each kind, evenly over the lines that are run there."""
    return [
        (where, 1 + (2 * i + 1) * lines[where] // (2 * n))
        for where, n in many.items()
        for i in range(n)
    ]


def check_kills(trial, whole, tmp_path, many):
    """Kill a run at each moment, run it again; how many of those went on from a save."""
    resumed = 0
    for where, at in moments(whole[1], many):
        folder = tmp_path / f"{where}-{at}"
        assert trial(folder, "kill", where, at)["code"] == -9
        record = folder / "run.json"
        # The page is drawn after the end: who is killed there has a finished run, without a page.
        at_the_end = record.exists() and json.loads(record.read_text())["finished"]
        again = trial(folder)
        assert again["code"] == (2 if at_the_end else 0), (where, at, again["err"])
        assert numbers(folder) == numbers(whole[0]), (where, at)
        assert not list(folder.glob(".*.draft"))
        resumed += "going on after step" in again["out"]
    return resumed


def test_a_run_killed_anywhere_goes_on_to_the_same_numbers(trial, whole, tmp_path):
    assert check_kills(trial, whole, tmp_path, {"catcher": 1, "step": 1, "save": 1}) >= 1


@pytest.mark.slow
def test_50_kills(trial, whole, tmp_path):
    assert (
        check_kills(trial, whole, tmp_path, {"catcher": 8, "step": 18, "save": 18, "between": 6})
        > 20
    )


def test_a_run_that_is_stopped_ends_its_step_and_saves(trial, whole, tmp_path):
    for where, at in moments(whole[1], {"step": 2}):
        folder = tmp_path / f"{where}-{at}"
        stopped = trial(folder, "stop", where, at)
        assert stopped["code"] == 128 + signal.SIGTERM
        assert "saved after step" in stopped["err"]
        assert "going on after step" in trial(folder)["out"]
        assert numbers(folder) == numbers(whole[0])


def test_a_disk_that_is_full_during_a_save_costs_only_the_steps_since_the_one_before(
    trial, whole, tmp_path
):
    at = whole[1]["save"] // 2  # there are four saves: in the second, or between it and the third
    full = trial(tmp_path / "full", "full disk", "save", at)
    assert full["code"] == 2
    assert "could not be written" in full["err"].strip().splitlines()[-1]
    assert not list((tmp_path / "full").glob(".*.draft"))
    again = trial(tmp_path / "full")
    assert again["code"] == 0, again["err"]
    assert "going on after step" in again["out"]
    assert numbers(tmp_path / "full") == numbers(whole[0])


def test_a_lack_of_memory_names_recomputation_and_then_the_micro_batch_to_try(trial, tmp_path):
    # the logits of a step: 32 rows x some 400 tokens x 1024 entries x 4 bytes are over 50 MB
    rows = [{"question": "How many?", "answer": f"{'one ' * 100}#### {n}"} for n in range(32)]
    long = write_rows(tmp_path / "long.jsonl", rows)
    flags = ["--batch-size", 32, "--steps", 2, "--save-every", 1, "--no-eval"]
    words = small_run(toy_in(tmp_path), long, *flags)
    for more, advice in (([], "--recompute"), (["--recompute"], "--micro-batch 8")):
        full = trial(tmp_path / "r", "full memory", "step", 1, words=[*words, *more])
        assert full["code"] == 2, full
        last = full["err"].strip().splitlines()[-1]
        assert re.search(rf"out of memory with --micro-batch 16: add {advice}\. ", last), last
    assert trial(tmp_path / "r", words=words)["code"] == 0
    assert trial(tmp_path / "whole", words=words)["code"] == 0
    assert numbers(tmp_path / "r") == numbers(tmp_path / "whole")


def poison(folder, text):
    """Give the embedding of the token behind `text` an infinite entry."""
    tensors = load_file(folder / "model.safetensors")
    (token,) = load_tokenizer(folder).encode(text)
    tensors["model.embed_tokens.weight"][token, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("poisoned", [1, 13])
def test_a_poisoned_row_costs_its_step_and_many_end_the_run(cli, toy, tmp_path, poisoned):
    """Its steps are skipped and counted, weights stay finite; 11 in a row are too many."""
    poison(toy, "~")
    rows = [
        row | {"question": "~" * (n < poisoned) + row["question"]} for n, row in enumerate(ROWS)
    ]
    words = small_run(
        toy, write_rows(tmp_path / "rows.jsonl", rows), "--batch-size", 5, "--no-eval"
    )
    some = ["--epochs", 5, "--catcher", "forward", "--save-every", 1, "--out", tmp_path / "r"]
    code, out, err = cli("train.py", *words, *some)
    if poisoned == 1:
        assert code == 0, err
        # one in each epoch
        assert "5 of the steps just trained had no finite loss or gradient" in out
        assert all(
            t.isfinite().all() for t in load_file(tmp_path / "r" / "adapter.safetensors").values()
        )
    else:
        assert code == 2
        last = err.strip().splitlines()[-1]  # before it the bar that was not finished
        assert re.search(r"\b11 steps", last)
        assert "--lr" in last
        assert (tmp_path / "r" / "state.safetensors").exists()
