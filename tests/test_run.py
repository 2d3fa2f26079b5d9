"""Folders, locks, saves, and how a command ends."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import run

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
    run.write_json(folder / "run.json", SETTINGS | changes | {"finished": finished})
    return folder


def test_the_default_folder_is_the_first_that_is_free_or_unfinished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def chosen():
        return str(run.choose_folder(SETTINGS, None, resume=False, override=False))

    first = "runs/tiny-tiny-math-hellora-k8-s0"
    assert chosen() == first
    saved(tmp_path / first, finished=True)
    assert chosen() == f"{first}-2"
    saved(tmp_path / f"{first}-2", finished=True, lr=0.5)
    saved(tmp_path / f"{first}-3", finished=False)
    assert chosen() == f"{first}-3"
    assert str(run.choose_folder(SETTINGS, None, resume=True, override=False)) == f"{first}-3"


def test_resume_without_anything_to_resume_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (None, tmp_path / "new"):
        with pytest.raises(ValueError, match="--resume"):
            run.choose_folder(SETTINGS, out, resume=True, override=False)


def test_an_explicit_folder_is_never_overwritten(tmp_path):
    def choose(out, override=False):
        return run.choose_folder(SETTINGS, out, resume=False, override=override)

    with pytest.raises(ValueError, match="done"):
        choose(saved(tmp_path / "done", finished=True))
    other = saved(tmp_path / "other", finished=False, lr=0.5)
    with pytest.raises(ValueError, match=r"lr.*0\.5.*0\.01"):
        choose(other)
    assert choose(other, override=True) == other
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="home"):
        choose(tmp_path / "home")
    assert choose(tmp_path / "new") == tmp_path / "new"


def test_a_folder_belongs_to_one_process(tmp_path):
    with run.lock(tmp_path / "a"):
        other = f"import run, pathlib; run.command(lambda: run.lock(pathlib.Path({str(tmp_path / 'a')!r})))"
        ended = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 2
        assert len(ended.stderr.strip().splitlines()) == 1
        assert str(tmp_path / "a") in ended.stderr
    run.lock(tmp_path / "a").close()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    run.write_atomically(path, lambda draft: draft.write_text("old"))

    def torn(draft):
        draft.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        run.write_atomically(path, torn)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics_of_lost_steps_are_dropped(tmp_path):
    metrics = run.Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.add(step=step, loss=1 / 3)
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "lo')
    run.Metrics(tmp_path, 2).add(step=3, loss=0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 1 / 3}, {"step": 3, "loss": 0.5}]


def test_an_evaluation_changes_only_its_own_entry(tmp_path):
    run.update_results(tmp_path, "a", {"base_accuracy": 0.0})
    run.update_results(tmp_path, "b", {"accuracy": 0.5})
    run.update_results(tmp_path, "a", {"accuracy": 1.0})
    assert run.read_results(tmp_path) == {
        "a": {"base_accuracy": 0.0, "accuracy": 1.0},
        "b": {"accuracy": 0.5},
    }


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("a\nb"), 2), (FileNotFoundError("x"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run.command(main)
    assert ended.value.code == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run.command(lambda: 1 / 0)
