"""Figures are what the committed results give; the results behind them hold together."""

import json
import re
import sys
from itertools import combinations, pairwise

import pytest
import torch
from conftest import ROOT
from placement_cells import simulate

from catcher import choose, overlap, visited_share
from paper import figures
from paper.runs.rates import tried
from paper.studies import placement

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
    row = {"samples_per_s": 2.0, "operations_a_layer": 240, "seconds": [0.4, 0.5, 0.6]}
    rows = {name: row for name in ("lora", "hellora")}
    (tmp_path / "bench-small.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    figures.draw("throughput", tmp_path)
    assert "small: samples of 200 tokens, a second" in (tmp_path / "throughput.svg").read_text()


def texts(fig) -> list[tuple]:
    """All that is written in a figure, each text with its box in pixels and its size in points."""
    from matplotlib.text import Text

    drawn, draw = {}, Text.draw

    def record(text, renderer, *args, **kwargs):
        draw(text, renderer, *args, **kwargs)
        if text.get_visible() and text.get_text().strip():
            drawn[id(text)] = (text.get_text(), text.get_window_extent(), text.get_fontsize())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        fig.canvas.draw()
    return list(drawn.values())


def check_texts(fig):
    """No text is cut off, none lies over another, and none is too small for a phone."""
    width, height = fig.canvas.get_width_height()
    boxes = texts(fig)
    for i, (text, box, size) in enumerate(boxes):
        # a letter's box is a pixel larger than its ink
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
        assert size >= 9  # points: 7 pixels where the figure is as wide as a phone, 360 pixels
        for other, second, _ in boxes[:i]:
            assert not box.padded(-1).overlaps(second), (text, other)
    assert fig.get_size_inches()[0] == figures.WIDTH


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "placement"])
def test_texts_of_a_figure_are_whole_apart_and_large_enough(name, matplotlib):
    plt = figures.pyplot()
    fig = figures.FIGURES[name](plt)
    check_texts(fig)
    assert not [text for text, *_ in texts(fig) if "_" in text]  # words, not names of methods
    plt.close(fig)


def comparison(regime, arm, mean, error, verdict="undecided", bases=placement.ONE, **more):
    """A row of placement.results(), as far as it is drawn."""
    about = {"regime": regime, "arm": arm, "bases": bases, "problems": "plain", "mean": mean}
    about |= {"low": mean - 2 * error, "high": mean + 2 * error, "verdict": verdict}
    about |= {"bootstrap_disagrees": False}
    return about | {"p_equivalent": 0.5, "df": 19, "runs": 20, "planned": 20} | more


SOME = [
    comparison("A", "cold", 0.003, 0.02, "equivalent", p_equivalent=0.001),
    comparison("A", "none", 0.02, 0.005, "holds", p_equivalent=0.001),
    comparison("P", "cold", 3.0, 0.1, "holds", df=11, runs=12, planned=12),
]
MANY = [
    *(comparison("A", arm, 0.01, 0.02) for arm in ("random", "all", "model-level", "answers")),
    *(
        comparison("P", arm, 0.2, 0.04, "holds", df=11, runs=12, planned=12)
        for arm in ("random", "all", "model-level", "answers")
    ),
    *(
        comparison("O", arm, -0.07, 0.05, "fails unadjusted", df=27, runs=28, planned=28)
        for arm in ("cold", "random", "none", "all", "model-level")
    ),
]
BASES = [
    comparison(r["regime"], r["arm"], r["mean"], 0.03, r["verdict"], placement.MANY, df=7)
    for r in SOME + MANY
    if r["regime"] != "O" and r["arm"] != "model-level"
]
EFFECT = {"logits": 0.18, "log_loss_per_logit": -0.8, "log_ratio": 0.144}


@pytest.fixture
def drawn(matplotlib, monkeypatch):
    """Draws the placement study's figure of some rows, with or without the paper's effect."""
    plt = figures.pyplot()

    def draw(rows, effect=None):
        found = {"margin": placement.MARGIN, "rows": rows, "levels": []}
        found["effect"] = dict.fromkeys("APO", effect)
        monkeypatch.setattr(placement, "results", lambda: found)
        return figures.forest(plt)

    yield draw
    plt.close("all")


@pytest.mark.parametrize(
    ("rows", "effect"),
    [
        (SOME[:1], None),
        (SOME, EFFECT),
        (SOME + MANY, EFFECT),
        (SOME + MANY + BASES, EFFECT),
        ([comparison("A", "cold", 0.1, 3.0, df=1, runs=2)], EFFECT),  # two seeds say little
        ([comparison("A", "cold", -9.0, 0.1, "fails", df=4, runs=5)], None),
    ],
)
def test_the_placement_study_can_be_read_with_any_number_of_results(rows, effect, drawn):
    check_texts(drawn(rows, effect))


def test_the_placement_study_says_each_result_and_what_has_none(drawn):
    said = [text for text, *_ in texts(drawn(SOME, EFFECT))]
    assert said.count("equal within 10 % (20 seeds)") == 1
    assert said.count("hot is better, < 10 % (20 seeds)") == 1
    assert said.count("no runs yet") == 4 + 4  # of 6 arms in A, of 5 in P
    assert sum("20 times the loss (16 to 25)" in text for text in said) == 1
    assert not [text for text in said if "60 rows" in text or "several bases" in text]
    few = [text for text, *_ in texts(drawn([comparison("A", "cold", 0, 0.1, df=4, runs=5)]))]
    assert "undecided (5 of 20 seeds)" in few
    assert not [text for text in few if "paper" in text]


def test_each_interval_of_the_placement_study_stands_where_its_numbers_say(drawn):
    rows = SOME + MANY + BASES
    fig = drawn(rows, EFFECT)
    found = set()
    for ax in fig.axes:
        names = [t.get_text() for t in ax.get_yticklabels()]
        for line in ax.lines:
            x, y = line.get_xdata(), line.get_ydata()
            if len(x) == 2 and y[0] == y[1] and x[0] != x[1]:
                arm = next(a for a, words in figures.FOREST.items() if words == names[round(y[0])])
                assert line.get_color() == figures.COLORS[arm]
                found.add((ax.get_title(loc="left")[0], arm, round(x[0], 6), round(x[1], 6)))
    near = [r for r in rows if r["high"] < figures.FAR]
    assert found == {(r["regime"], r["arm"], round(r["low"], 6), round(r["high"], 6)) for r in near}


def test_each_figure_has_a_text_for_those_who_do_not_see_it():
    assert figures.ALT.keys() == figures.FIGURES.keys()
    for text in figures.ALT.values():
        assert 60 < len(text) < 300
        assert text.endswith(".")
        assert not set(text) & set('"[]()')  # it stands in Markdown's ![...](...)


def test_what_these_texts_say_is_so():
    counts, hot = figures.visits(figures.TASK)
    assert all(0.35 < share < 0.45 for share in visited_share(counts, hot).values())
    lists = [figures.visits(task)[1] for task in figures.TASKS]
    between = [x for a, b in combinations(lists, 2) for x in overlap(a, b).values()]
    assert max(between) <= 0.6
    assert sum(x > 8 / 120 for x in between) > len(between) / 2  # two random lists: 1 of 8 shared
    for task, whole in zip(figures.TASKS, lists, strict=True):
        assert figures.visits(task, "0.1")[1] == whole
    ends = {m: [run["final_loss"] for run in runs] for m, runs in figures.cells().items()}
    assert max(max(ends[m]) for m in ("fft", "lora", "hellora")) < 0.02
    order = [ends[f"hellora_pure{suffix}"] for suffix in ("", "_r", "_c")]
    assert all(max(a) < min(b) for a, b in pairwise(order))
    assert min(order[-1]) > 1


@pytest.mark.slow
def test_the_placement_study_is_drawn_from_its_cells(matplotlib, tmp_path, monkeypatch):
    simulate(tmp_path, monkeypatch, lambda run: run.model == "tiny" and run.seed < 2)
    plt = figures.pyplot()
    fig = figures.forest(plt)
    check_texts(fig)
    said = [text for text, *_ in texts(fig)]
    assert sum("(2 of 20 seeds)" in text for text in said) == 6
    assert sum("of 28 seeds" in text for text in said) == 5
    plt.close(fig)
    placement.finished.cache_clear()
    placement.losses.cache_clear()


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
