"""What one who is new to it types, and gets wrong."""

import json
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, small_run, toy_in, write_rows

from paper import eval_humaneval, eval_safety
from plumbing import flags
from plumbing.checkpoint import locate
from plumbing.cli import to_type
from plumbing.run_folder import read_run

ROWS = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(4)]


def started(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True
    )


AS_FILES = ["paper/reproduce.py", "paper/bench/__main__.py", "paper/studies/routing.py"]


@pytest.mark.parametrize("name", [*AS_FILES, "tiny/pretrain.py"])
def test_a_part_of_a_package_that_is_started_as_a_file_names_the_command(name, tmp_path):
    done = started(ROOT / name, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    module = name.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    assert f"python -m {module}," in done.stderr


def test_every_part_of_a_package_with_a_command_does():
    commands = [p for wing in ("paper", "tiny") for p in (ROOT / wing).rglob("*.py")]
    commands = [p for p in commands if "command(main)" in p.read_text()]
    assert len(commands) >= 10
    for path in commands:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        assert f"want python -m {module}," in path.read_text()


@pytest.mark.parametrize("name", ["hellora.py", "moe_model.py", "settings.py"])
def test_a_file_without_a_command_says_so(name, capsys):
    runpy.run_path(str(ROOT / name), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "train.py" in out


def test_enough_of_the_output_is_no_error():
    code = "from plumbing.cli import command; command(lambda: [print(n) for n in range(10**6)])"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_command_to_type_works_where_one_stands(tmp_path, monkeypatch):
    run = tmp_path / "é out 1"
    monkeypatch.chdir(ROOT)
    assert shlex.split(to_type("python eval_gsm8k.py --run {}", run))[-1] == str(run)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(to_type("python eval_gsm8k.py --run {} --loss", run.relative_to(tmp_path)))
    assert words == ["cd", str(ROOT), "&&", "python", "eval_gsm8k.py", "--run", str(run), "--loss"]


SEVERAL = {
    "eval_gsm8k.py": lambda: flags.eval_gsm8k(""),
    "report.py": lambda: flags.report(""),
    "paper.eval_humaneval": eval_humaneval.parse_args,
    "paper.eval_safety": eval_safety.parse_args,
}


@pytest.mark.parametrize(("command", "read"), SEVERAL.items(), ids=SEVERAL)
def test_several_runs_may_follow_one_flag_or_each_its_own(command, read, monkeypatch):
    found = []
    for words in (["--run", "a", "b"], ["--run", "a", "--run", "b"]):
        monkeypatch.setattr(sys, "argv", [command, *words])
        found.append(read().run)
    assert found[0] == found[1]
    assert [path.name for path in found[0]] == ["a", "b"]


@pytest.mark.parametrize(("name", "says"), [("mps", "Apple"), ("gpu", "want cpu or cuda")])
def test_a_device_that_is_not_supported_is_refused_with_the_reason(cli, name, says):
    for script, *words in (["train.py"], ["export.py", "--run", "r", "--format", "hub"]):
        code, _, err = cli(script, *words, "--device", name)
        assert code == 2
        assert err.count("\n") == 1
        assert says in err


def test_tiny_has_no_revisions():
    with pytest.raises(FileNotFoundError, match="tiny@main: tiny is no model of the Hub"):
        locate("tiny@main")


def test_a_run_that_was_stopped_early_says_that_its_command_goes_on(tmp_path):
    run = {"model": "tiny", "task": "tiny-math", "method": "hellora", "dtype": "fp32"}
    (tmp_path / "run.json").write_text(json.dumps(run | {"finished": False}))
    with pytest.raises(ValueError, match=r"its experts were chosen.*train.py"):
        read_run(tmp_path, "adapted")


def test_an_export_names_a_command_that_scores_it_as_its_run_was(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows {1}.jsonl", ROWS)
    flags = small_run(toy_in(tmp_path), rows, "--steps", 1, "--catcher", "forward", "--out", "r")
    assert cli("train.py", *flags, "--eval-data", rows)[0] == 0
    code, out, _ = cli("export.py", "--run", "r", "--format", "hub")
    assert code == 0
    command = shlex.split(out.splitlines()[-1].partition("score it with: ")[2])
    code, out, _ = cli(*command[command.index("python") + 1 :])
    assert code == 0
    assert "on 4 problems" in out
