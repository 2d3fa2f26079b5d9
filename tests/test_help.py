"""The --help of each command: one sentence, then examples that its own flags take."""

import re
import shlex
import sys
from importlib import import_module

import pytest

from plumbing.cli import Parser

# command -> how many examples it has. Who has no flag, or one, has few ways to be called.
COMMANDS = {
    "train.py": 3, "eval_gsm8k.py": 3, "catcher.py": 3, "export.py": 3, "generate.py": 3,
    "report.py": 3,
    "paper.reproduce": 3, "paper.eval_humaneval": 3, "paper.eval_safety": 3, "paper.figures": 3,
    "paper.plan": 3, "paper.bench": 3, "paper.pages": 1, "paper.walkthrough": 1,
    "paper.studies.forgetting": 3, "paper.studies.mechanism": 3, "paper.studies.routing": 1,
    "tiny.pretrain": 3, "tiny.report": 3, "tiny.tasks": 3,
}  # fmt: skip
RARE = "rarely needed:"


def main_of(command):
    """What a command runs, be it a file, a module, or a package such as paper.bench."""
    module = import_module(command.removesuffix(".py"))
    return getattr(module, "main", None) or import_module(f"{command}.__main__").main


@pytest.fixture
def parsed(monkeypatch):
    """parsed("train.py", "--k", "8"): what its parser makes of these words. Nothing is run."""

    class Done(Exception):
        pass

    def parse_args(self, *words):
        raise Done(original(self, *words))

    original = Parser.parse_args
    monkeypatch.setattr(Parser, "parse_args", parse_args)

    def call(command, *words):
        monkeypatch.setattr(sys, "argv", [command, *words])
        with pytest.raises(Done) as done:
            main_of(command)()
        return done.value.args[0]

    return call


@pytest.fixture
def help_of(monkeypatch, capsys):
    """help_of("train.py"): what --help prints."""

    def call(command):
        monkeypatch.setattr(sys, "argv", [command, "--help"])
        with pytest.raises(SystemExit) as end:
            main_of(command)()
        assert end.value.code == 0
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_a_sentence_and_examples_that_work(command, help_of, parsed):
    sentence, examples, *_ = help_of(command).split("\n\n")
    assert re.fullmatch(r"[A-Z][^.]*(\.[a-z][^.]*)*\.", sentence), sentence  # a dot inside a name
    assert len(sentence.splitlines()) == 1
    own = 0
    for line in examples.splitlines():
        python, *words = shlex.split(re.split(r" {2,}", line.strip())[0], comments=True)
        assert python == "python", line
        name, *flags = words[1:] if words[0] == "-m" else words
        assert parsed(name, *flags), line
        own += name == command
    assert own >= COMMANDS[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_explained_and_rare_ones_come_last(command, help_of, monkeypatch):
    seen = []
    print_help = Parser.print_help
    monkeypatch.setattr(Parser, "print_help", lambda self: (seen.append(self), print_help(self)))
    text = help_of(command)
    assert all(action.help for action in seen[0]._actions)
    if RARE in text:
        after = text.split(RARE)[1]
        assert "--" in after and not re.search(r"(?m)^\S", after)  # no other group follows
