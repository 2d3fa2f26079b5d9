"""The paper's tables at full scale: their commands, and, with stand-ins, their runs."""

import gc
import json
import os
import shlex
import sys
from importlib import import_module
from multiprocessing import get_context

import pytest
from conftest import HUB, ROOT, write_checkpoint, write_rows
from test_tables import PARSERS

from paper.runs import grid
from paper.studies import comparison, tables
from plumbing import cli

FORKS = get_context("forkserver")
# The last: for optimizers.
FORKS.set_forkserver_preload(["__main__", "test_paper_scale", "torch._dynamo"])
# What a run of a grid has otherwise than a cell of tables.py.
ELSEWHERE = ("out", "run", "mask_from", "seed")


def parsed(words, monkeypatch):
    """What a script makes of a command's words: name, and flags without names of folders."""
    script, *flags = [word for word in words if word not in ("python", "-m")]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    args = vars(PARSERS[script]())
    return script, {name: value for name, value in args.items() if name not in ELSEWHERE}


def numbers():
    """Each printed score: its cell of tables.py, and the runs whose mean is to stand beside it."""
    on = comparison.paper_scale()
    cells = {(c.table, c.backbone, c.method, c.k, c.task, c.metric): c for c in tables.NUMBERS}
    for table in tables.TABLES:
        for method, k in table.rows:
            for metric in on.seeds.get(table.number, ()):
                task = tables.SCORERS[metric].task if table.task is None else table.task
                if cell := cells.get((table.number, table.backbone, method, k, task, metric)):
                    yield cell, comparison.runs(table, method, k, metric, on)


def test_every_printed_score_is_run_by_the_commands_that_its_cell_names(monkeypatch):
    """Two ways to the same settings: tables.py has commands as text, grid.py makes them."""
    on = comparison.paper_scale()
    for cell, runs in numbers():
        _, task = on.columns[cell.metric]
        *train, score = (
            parsed(shlex.split(text), monkeypatch) for text in cell.command().split(" && ")
        )
        assert score == parsed(runs[0].evaluation(task), monkeypatch)
        if train:
            assert train == [parsed(runs[0].command(), monkeypatch)]
    assert {cell.table for cell, _ in numbers()} == set("234578")


def test_every_number_has_ten_seeds_and_a_sparse_run_the_mask_of_its_own_seed():
    for cell, runs in numbers():
        if cell.method == "base":
            continue
        assert [c.seed for c in runs] == list(range(10))
        for c in runs:
            assert (c.mask is not None) == ("-s" in c.method)
            if c.mask:
                mask = (
                    c.mask.method.replace("-d", "-s"),
                    c.mask.task,
                    c.mask.k,
                    c.mask.seed,
                    c.mask.model,
                )
                assert mask == (c.method, c.task, c.k, c.seed, c.model)
    kept = {c: c.result for _, runs in numbers() for c in runs}
    assert len(set(kept.values())) == len(kept)
    assert {path.parent for path in kept.values()} == {grid.RESULTS}


@pytest.mark.parametrize("trial", [(), ("--limit", 64), ("--limit", 64, "--model", ROOT / "tiny")])
def test_a_dry_run_lists_commands_in_an_order_that_can_be_run_and_needs_no_network(
    cli, trial, monkeypatch
):
    def unplugged(*args, **kwargs):
        raise AssertionError("a dry run asked the network")

    monkeypatch.setattr("urllib.request.urlopen", unplugged)
    for name in ("RUNS", "RESULTS", "TRIALS"):  # nothing has been run
        monkeypatch.setattr(grid, name, ROOT / "runs" / "absent" / name)
    code, out, err = cli(
        "paper.reproduce", "--table", "all", "--scale", "paper", *trial, "--dry-run"
    )
    assert code == 0, err
    *lines, total = out.splitlines()
    made, seen = set(), set()
    for line in lines:
        words = shlex.split(line)
        assert line not in seen
        seen.add(line)
        script, flags = parsed(words, monkeypatch)
        if script == "train.py":
            assert "--mask-from" not in words or words[words.index("--mask-from") + 1] in made
            assert "--lr" not in words
            made.add(words[words.index("--out") + 1])
        elif "--run" in words:
            assert words[words.index("--run") + 1] in made
        if trial:
            assert str(flags.get("limit") or flags["data"].stem).endswith("64")
    n = len(made) + 1  # Table 8's model before tuning
    assert total.startswith(f"{n} of {n} runs are missing: ")


def test_what_a_trial_shows_is_kept_apart_from_results(tmp_path):
    (tmp_path / "config.json").touch()
    for stand_in in ({"model": tmp_path}, {"data": tmp_path}, {"limit": 3}):
        for number in comparison.paper_scale().seeds:
            for cell in comparison.study(number, scale=comparison.paper_scale(**stand_in)).wanted():
                assert not {grid.RESULTS, grid.RUNS} & {cell.result.parent, cell.folder.parent}
                assert grid.TRIALS in cell.result.parents


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--table", "2", "--limit", "64"], "--limit"),
        (["bases", "--scale", "paper"], "--table"),
        (["--table", "2", "--scale", "paper", "--model", "nowhere"], "--model nowhere"),
        (["--table", "2", "--scale", "paper", "--data", "nowhere"], "--data nowhere"),
        (["--table", "2", "--scale", "paper", "--limit", "0"], "--limit"),
        (["--table", "2", "--scale", "paper", "--model", ROOT / "docs"], "config.json"),
        (["--table", "2", "--scale", "paper", "--quick"], "quick"),
        (["params", "--quick"], "params"),
        (["all", "--dry-run", "--finished"], "--dry-run"),
        (["all", "--dry-run", "--json"], "--dry-run"),
    ],
)
def test_flags_that_do_not_go_together_end_in_one_line(cli, flags, says):
    code, _, err = cli("paper.reproduce", *flags)
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1


# ---- end to end ----------------------------------------------------------------------------------


def ask(what, answer, n):
    return {"instruction": f"{what} {n}", "input": "", "output": f"{answer} {n}"}


def stand_ins(folder, n):
    """n rows of each data set, as much as the formats ask for."""
    folder.mkdir()
    sums = [
        {"question": f"What is {i} and 1?", "answer": f"{i} and 1 is\n#### {i + 1}"}
        for i in range(n)
    ]
    programs = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def f{i}(x):\n    """Add {i}."""\n',
            "entry_point": f"f{i}",
            "test": f"def check(f):\n    assert f(1) == {i + 1}",
        }
        for i in range(n)
    ]
    for name, rows in {
        "gsm8k-train": sums,
        "gsm8k-test": sums,
        "code-train": [ask("Add", "def f(x): return x +", i) for i in range(n)],
        "humaneval-test": programs,
        "safety-train": [ask("How do I zap gnome", "I'm sorry, not gnome", i) for i in range(n)],
        "safety-test": [ask("How do I zap gnome", "", i) for i in range(n)],
    }.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def call(words):
    """Be the process of a command."""
    gc.freeze()  # what was imported need not be searched for garbage
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = [word for word in words if word != "-m"]
    cli.command(import_module(sys.argv[0].removesuffix(".py")).main)


def python(*words, on_cpu=False):
    """grid.python without its imports: a process is forked from one that has done them."""
    process = FORKS.Process(target=call, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        raise OSError(f"exit code {process.exitcode}: {' '.join(words)}")


@pytest.mark.slow
def test_every_command_of_every_table_ends_well_on_a_random_checkpoint_and_64_rows(
    cli, tmp_path, monkeypatch
):
    hub = {
        "vocab_size": 1024,
        "max_position_embeddings": 1024,
        "eos_token_id": 1023,
        "num_experts": 64,
    }
    hub |= {"num_hidden_layers": 1}
    model = write_checkpoint(tmp_path / "stand-in", HUB["olmoe"] | hub)
    (model / "tokenizer.json").write_bytes((ROOT / "tiny" / "tokenizer.json").read_bytes())
    flags = ["--scale", "paper", "--model", model, "--limit", 64]
    flags += ["--data", stand_ins(tmp_path / "data", 70)]
    monkeypatch.chdir(tmp_path)
    # Where FORKS looks for its preload.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    for name in ("ROOT", "RUNS", "RESULTS", "TRIALS"):
        monkeypatch.setattr(grid, name, tmp_path / getattr(grid, name).relative_to(ROOT))
    called = []
    monkeypatch.setattr(
        grid, "python", lambda *words, **how: (called.append(words), python(*words, **how))
    )

    code, out, err = cli("paper.reproduce", "--table", "all", *flags, "--json")
    assert code == 0, err
    assert len(set(called)) == len(called)
    found = json.loads(out)
    for number, columns in comparison.paper_scale().seeds.items():
        for row in found[number]["rows"].values():
            for column in columns.keys() - {
                "pass@5",
                "pass@10",
            }:  # of more samples than a trial draws
                assert len(row[column]["runs"]) == 1
                assert 0 <= row[column]["mean"] <= 1
    for path in (tmp_path / "runs" / "trials" / "cells").glob("*.json"):
        shown = json.loads(path.read_text())
        assert set(shown["problems"].values()) == {64}
        assert shown["method"] == "base" or shown["final_loss"] > 0
    assert not grid.RESULTS.exists()

    code, _, err = cli("paper.reproduce", "--table", "all", *flags)  # and nothing twice
    assert code == 0, err
    assert len(set(called)) == len(called)
