"""What one who is new to it types, and gets wrong."""

import json
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from conftest import ROOT, small_run, toy_in, write_rows

import report
import train
from paper import eval_humaneval, eval_safety
from plumbing import flags
from plumbing.checkpoint import locate
from plumbing.cli import did_you_mean, to_type
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


@pytest.mark.parametrize(
    ("words", "typed", "meant"),
    [
        (["train.py", "--task", "tiny-maths"], "tiny-maths", "tiny-math"),
        (["eval_gsm8k.py", "--model", "tiny", "--task", "gsm8"], "gsm8", "gsm8k"),
        (["train.py", "--method", "helora_c"], "helora", "hellora"),
        (["train.py", "--model", "OLMoE-1B-7B"], "OLMoE-1B-7B", "olmoe-1b-7b"),
        (["catcher.py", "--model", "mixtral"], "mixtral", "mixtral-8x7b"),
        (["train.py", "--template", "lroi"], "lroi", "lori"),
        (["train.py", "--modle", "tiny"], "--modle", "--model"),
        (["export.py", "--runs", "r", "--format", "hub"], "--runs", "--run"),
        (["generate.py", "--run", "r", "--tempera=1", "x"], "--tempera", "--temperature"),
    ],
)
def test_a_name_that_is_nearly_known_is_asked_about(words, typed, meant, cli):
    code, out, err = cli(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert did_you_mean(typed, [meant]) in err


def test_a_name_is_asked_about_if_it_is_near():
    known = ["question", "answer", "--lr", "tiny"]
    for word, near in (("Question", "question"), ("anser", "answer"), ("quest", "question")):
        assert near in did_you_mean(word, known)
    for word in ("chess", "x", "", "a", "completion", "--keep", "--lr-scheduler", "tiny-llama"):
        assert did_you_mean(word, [*known, "--k"]) == ""


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lrate", "--lr"),
        ("--learning_rate", "--lr"),
        ("--num-train-epochs", "--epochs"),
        ("--output_dir", "--out"),
        ("--per_device_train_batch_size", "--micro-batch"),
        ("--outdir", "--out"),
    ],
)
def test_the_flags_of_other_trainers_are_known(typed, meant, cli):
    code, out, err = cli("train.py", typed, 1)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert did_you_mean(typed, [meant]) in err and meant in did_you_mean(typed, [meant])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a run "r" on rows of one's own, "own.jsonl", and what that run printed."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"prompt": f"{n}?", "completion": " x"} for n in "abc"]
    rows = write_rows(folder / "own.jsonl", rows)
    words = small_run(toy_in(folder), rows, "--steps", 1, "--out", "r")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *words])
        train.main()
    return folder, out.getvalue()


def test_rows_of_ones_own_are_called_by_their_file(own, cli, monkeypatch):
    """The keys of the files stay those of the task."""
    folder, said = own
    monkeypatch.chdir(folder)
    for line in said.splitlines():
        assert "tiny-math" not in line or "own.jsonl" in line or line.startswith("run folder")
    hot = json.loads(Path("r/hot_experts.json").read_text())
    assert (hot["task"], hot["data"]) == ("tiny-math", "own.jsonl")
    assert report.collect([Path("r")])["runs"][0]["title"].endswith("own.jsonl")

    code, out, _ = cli("eval_gsm8k.py", "--run", "r", "--loss", "--data", "own.jsonl")
    assert code == 0 and "own.jsonl" in out and "tiny-math" not in out
    assert json.loads(Path("r/results.json").read_text()).keys() == {"tiny-math-loss-part"}
    for words in (["--model", "toy", "--data", "own.jsonl"], ["--run", "r"]):
        code, out, _ = cli("catcher.py", *words)
        assert code == 0 and "tokens of own.jsonl" in out
    code, out, _ = cli("export.py", "--run", "r", "--format", "hub")
    assert code == 0 and "tiny-math" not in out
    command = shlex.split(out.splitlines()[-1].partition(": ")[2].replace("FILE", "own.jsonl"))
    assert cli(*command[command.index("python") + 1 :])[0] == 0


@pytest.mark.parametrize(
    ("flags", "n_steps"),
    [
        ([], 3),  # the recipe: 3 epochs of one batch
        (["--epochs", 4, "--batch-size", 2], 8),
        (["--epochs", 30, "--batch-size", 4], None),
        (["--steps", 1], None),  # it was asked for
    ],
)
def test_few_steps_are_warned_of(tmp_path, flags, n_steps, cli):
    rows = write_rows(tmp_path / "own.jsonl", ROWS)
    words = small_run(toy_in(tmp_path), rows, "--no-eval", "--out", tmp_path / "r", *flags)
    said = [line for line in cli("train.py", *words)[1].splitlines() if "optimizer steps" in line]
    assert len(said) == (n_steps is not None)
    assert not said or f"only {n_steps} optimizer steps" in said[0]


OWN = {  # rows of one's own -> whether the word problems are scored
    "problems": ([{"question": "1+3?", "answer": "#### 4"}], True),
    "one of them without a number": ([*ROWS, {"question": "France?", "answer": "Paris"}], True),
    "most of them without": ([*ROWS, *[{"question": "France?", "answer": "Paris"}] * 5], False),
    "a heading": ([{"question": "France?", "answer": "#### Paris"}], False),
    "pairs": ([{"prompt": "1+3=", "completion": "#### 4"}], False),
}


@pytest.mark.parametrize("rows", OWN)
def test_own_rows_are_scored_on_word_problems_only_if_they_are_such(
    rows, tmp_path, cli, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows, scored = OWN[rows]
    rows = write_rows(tmp_path / "own.jsonl", rows)
    flags = ["--steps", 1, "--catcher", "forward", "--eval-limit", 3, "--out", "r"]
    out = cli("train.py", *small_run(toy_in(tmp_path), rows, *flags))[1]
    assert ("3 test problems of tiny-math" in out) == ("on 3 problems" in out) == scored
    assert ("nothing is scored" in out) != scored
    export = cli("export.py", "--run", "r", "--format", "hub")[1]
    for said in (out.splitlines()[-2], export.splitlines()[-1]):  # and the command fits
        words = shlex.split(said.rpartition(": ")[2].replace("FILE", "own.jsonl"))
        assert ("--loss" in words) != scored
        limit = ["--limit", 2] * scored
        assert cli(*words[words.index("python") + 1 :], *limit)[0] == 0


def test_a_run_with_dev_rows_ends_with_the_commands_for_its_best_adapter(
    tmp_path, cli, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "own.jsonl", ROWS)
    flags = ["--steps", 2, "--catcher", "forward", "--dev-data", rows, "--eval-limit", 2]
    out = cli("train.py", *small_run(toy_in(tmp_path), rows, *flags, "--out", "r"))[1]
    scored, asked = out.splitlines()[-2:]
    assert "r/best" in scored and "again" not in scored and "r/best" in asked
    export = cli("export.py", "--run", "r/best", "--format", "hub")[1]
    assert "--loss" not in scored + export.splitlines()[-1]
    words = shlex.split(scored.rpartition(": ")[2])
    assert cli(*words[words.index("python") + 1 :])[0] == 0


def test_own_rows_for_code_are_scored_as_code(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Return {n}.", "output": f"def f(): return {n}"} for n in range(3)]
    rows = write_rows(tmp_path / "own.jsonl", rows)
    flags = ["--steps", 1, "--catcher", "forward", "--task", "tiny-code", "--out", "r"]
    out = cli("train.py", *small_run(toy_in(tmp_path), rows, *flags))[1]
    assert "paper.eval_humaneval" in out.splitlines()[-2]
    assert "paper.eval_humaneval" in json.dumps(report.collect([Path("r")]))


def test_answers_that_have_no_number_are_answered_with_the_loss(own, cli, monkeypatch):
    monkeypatch.chdir(own[0])
    rows = write_rows(Path("capitals.jsonl"), [{"question": "France?", "answer": "Paris"}])
    code, _, err = cli("eval_gsm8k.py", "--run", "r", "--data", rows)
    assert (code, err.count("\n")) == (2, 1) and "--loss" in err


def test_a_run_ends_with_the_command_that_asks_it(own, cli, monkeypatch):
    folder, said = own
    monkeypatch.chdir(folder)
    command = shlex.split(said.splitlines()[-1].partition(": ")[2])
    assert cli(*command[command.index("python") + 1 :], "a?")[0] == 0


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
