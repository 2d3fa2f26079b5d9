"""Figures are what the committed results give; the results behind them hold together."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT

from catcher import choose
from paper import figures
from paper.runs.rates import tried

PINNED = re.search(r"matplotlib==(\S+)", (ROOT / "requirements-dev.txt").read_text())[1]


@pytest.fixture
def matplotlib():
    found = pytest.importorskip("matplotlib", reason="needs matplotlib, dev requirements")
    return (
        found
        if found.__version__ == PINNED
        else pytest.skip(f"other bytes than matplotlib {PINNED}'s")
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_committed_figure_is_what_the_command_draws_now(name, matplotlib, tmp_path):
    committed = figures.OUT / f"{name}.svg"
    try:
        figures.draw(name, tmp_path)
    except FileNotFoundError:
        assert not committed.exists()  # no results, no figure
    else:
        assert committed.read_text() == (tmp_path / f"{name}.svg").read_text(), (
            "run python -m paper.figures"
        )
        assert (figures.OUT / f"{name}.png").exists()


def test_a_benchmark_is_drawn_as_soon_as_there_is_one(matplotlib, tmp_path, monkeypatch):
    rows = {name: {"samples_per_s": 2.0, "operations_a_layer": 240} for name in ("lora", "hellora")}
    (tmp_path / "bench-small.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.draw("throughput", tmp_path)
    assert "small: samples per s" in (tmp_path / "throughput.svg").read_text()


def test_without_matplotlib_one_line_says_what_to_install(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python does when there is none
    code, out, err = cli("paper.figures")
    assert (code, out) == (2, "")
    assert err == "error: figures need matplotlib: pip install -r requirements-dev.txt\n"


@pytest.mark.parametrize(
    "path", sorted((figures.RESULTS / "visits").glob("*.json")), ids=lambda p: p.stem
)
def test_counted_visits_are_k_a_token_in_every_layer_and_give_the_hot_list(path):
    saved = json.loads(path.read_text())
    counts = {int(layer): torch.tensor(of) for layer, of in saved["counts"].items()}
    # Top-8 routing, k = 8.
    assert all(c.sum() == saved["k"] * saved["n_tokens"] for c in counts.values())
    assert choose(counts, saved["k"], "hot") == {int(i): ids for i, ids in saved["experts"].items()}
    assert path.stem.startswith(saved["task"])


@pytest.mark.slow
def test_committed_visits_are_what_the_catcher_counts_now(cli, tmp_path):
    name = "tiny-safety-0.1.json"
    code, _, _ = cli(
        "catcher.py", "--task", "tiny-safety", "--batch-size", 50, "--out", tmp_path / name
    )
    assert code == 0
    was, now = (
        json.loads((at / name).read_text()) for at in (figures.RESULTS / "visits", tmp_path)
    )
    for layer, counts in was["counts"].items():
        moved = sum(abs(a - b) for a, b in zip(counts, now["counts"][layer], strict=True))
        # Another CPU rounds otherwise, and near-ties go the other way.
        assert moved <= 0.001 * sum(counts)


def test_a_method_is_drawn_at_one_rate_and_only_when_all_its_rates_were_tried():
    found = figures.cells()
    assert "hellora" in found
    for method, runs in found.items():
        assert len({r["lr"] for r in runs}) == 1
        assert len({r["seed"] for r in runs}) == len(runs)
        assert all(run.result.exists() for run in tried(method))
