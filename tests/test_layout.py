"""The house: which file may import which, and whether README's flags exist."""

import ast
import json
import re
import shlex
import sys
from importlib import import_module

import pytest
from conftest import ROOT

import paper

ORDER = [  # a file may import only files before it
    "ranks", "run", "checkpoint", "tokenizer", "dispatch", "moe_model", "data", "catcher", "hellora", "lori",
    "state", "generate", "eval_gsm8k", "job", "train", "export",
]  # fmt: skip


def sources():
    return {p.relative_to(ROOT): p for d in (".", "tiny", "paper") for p in (ROOT / d).glob("*.py")}


def imported(path):
    tree = ast.parse(path.read_text())
    names = [n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names]
    return names + [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_every_file_imports_only_what_stands_below_it():
    assert {p.stem for p in ROOT.glob("*.py")} == set(ORDER)
    for i, name in enumerate(ORDER):
        assert not {m.partition(".")[0] for m in imported(ROOT / f"{name}.py")} & {
            *ORDER[i:],
            "tiny",
            "paper",
        }


def test_no_framework_stands_between_the_reader_and_a_step():
    ours = {"tiny", "paper", "examples", *ORDER}
    allowed = {"torch", "safetensors", "huggingface_hub", "tiktoken", "numpy", "tqdm"} | ours
    peers = {"bench_peers.py": {"transformers", "peft"}, "figures.py": {"matplotlib"}}  # where installed
    for path in sources().values():
        outside = {m.partition(".")[0] for m in imported(path)} - set(sys.stdlib_module_names) - allowed
        assert outside <= peers.get(path.name, set()), path


def readme_commands():
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [p for p in parts if re.match(r"python \w+\.py", p)]


@pytest.mark.parametrize("command", readme_commands())
def test_every_flag_in_the_readme_exists(command, cli, monkeypatch):
    words = shlex.split(command, comments=True)[1:]
    module = import_module(words[0].removesuffix(".py"))
    seen = {}
    stop = SystemExit(0)

    def parsed(self, *args, **kwargs):
        seen["args"] = original(self, *args, **kwargs)
        raise stop

    original = import_module("run").Parser.parse_args
    monkeypatch.setattr("run.Parser.parse_args", parsed)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        module.main()
    assert seen


def test_results_quoted_in_tiny_s_readme_are_the_committed_ones():
    page = (ROOT / "tiny" / "README.md").read_text()
    assert (ROOT / "docs/results/tiny-report.txt").read_text().rstrip() in page
    for name in ("tiny/README.md", "README.md"):
        page = " ".join((ROOT / name).read_text().split())
        seeds = json.loads((ROOT / "docs/results/tiny-math-hellora.json").read_text())["seeds"]
        for task in ("tiny-math", "tiny-math-reworded"):
            assert ", ".join(f"{100 * of[task]['accuracy']:.1f}" for of in seeds.values()) in page


def test_nothing_private_is_committed():
    for path in [p for d in (".", "docs", "paper", "tests", "tiny") for p in (ROOT / d).glob("*.[pm][yd]")]:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", path.read_text()), path


def test_papers_page_of_contents_names_every_file():
    assert set(re.findall(r"\w+", paper.__doc__)) >= {p.stem for p in (ROOT / "paper").glob("[!_]*.py")}
