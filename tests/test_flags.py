"""Flags are read before torch is imported, and know the names that other files have."""

import subprocess
import sys
from argparse import ArgumentTypeError

import pytest
from conftest import ROOT

import catcher
import hellora
import moe_model
from plumbing import checkpoint, data, flags
from plumbing.device import DTYPES

COMMANDS = ["train", "eval_gsm8k", "generate", "export", "catcher", "report"]
# What a command does in a Python in which torch cannot be imported.
WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]"
WITHOUT_TORCH += "; runpy.run_path(sys.argv[0], run_name='__main__')"


def without_torch(*words):
    words = [sys.executable, "-c", WITHOUT_TORCH, *words]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_a_wrong_flag_need_no_torch(command):
    done = without_torch(f"{command}.py", "--help")
    assert done.returncode == 0
    assert f"python {command}.py" in done.stdout
    done = without_torch(f"{command}.py", "--no-such-flag")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_flag_that_is_cut_off_is_a_mistake():
    for words in (["generate.py", "--run", "r", "--compar", "x"], ["train.py", "--meth", "lora"]):
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert words[-2] in done.stderr and done.stderr.count("\n") == 1


def test_a_misspelt_method_and_task_need_no_torch():
    for words in (["--method", "helora"], ["--method", "hellora_hot"], ["--task", "tiny-maths"]):
        done = without_torch("train.py", *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert words[1] in done.stderr


@pytest.mark.parametrize("name", ["nonsense", "olmoe", "tiny@main", "", "run", "peft", "file"])
def test_what_is_no_model_needs_no_torch(name, tmp_path):
    for folder, file in (("run", "run.json"), ("peft", "adapter_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    (tmp_path / "file").write_text("")
    name = str(tmp_path / name) if (tmp_path / name).exists() and name else name
    done = without_torch("train.py", "--model", name)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--model" in done.stderr and name in done.stderr


def test_the_early_check_of_a_model_lets_through_what_is_found_later(tmp_path):
    names = ["tiny", *flags.BACKBONES, "org/name", "org/name@main", str(tmp_path)]
    assert [flags.model_name(name) for name in names] == names


@pytest.mark.parametrize("name", ["./nope", "../nope", "/nope", "~/nope", ".hidden/nope"])
def test_a_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ArgumentTypeError, match="no model"):
        flags.model_name(name)


def test_the_names_in_the_flags_are_those_of_the_tables():
    assert list(flags.BACKBONES) == list(checkpoint.BACKBONES)
    assert list(flags.TASKS) == list(data.TASKS)
    assert list(flags.METHODS) == list(hellora.METHODS)
    assert list(flags.SUFFIXES) == list(hellora.SUFFIXES)
    assert flags.RULES == catcher.RULES
    assert flags.COUNTS == catcher.COUNTS
    assert list(flags.MATMULS) == list(moe_model.MATMULS)
    for words, wanted in (["fp32", 0], ["bf16", 0], ["fp16", 2]):
        done = without_torch("train.py", "--dtype", words, "--help")
        assert done.returncode == wanted
        assert (words in DTYPES) == (wanted == 0)
