"""The page of report.py in a headless Chromium: real keys, and numbers against the project's own.

Every number is read from what the page shows. tests/test_report.py has what needs no browser.
"""

import json

import pytest
import torch
from browser import browser, missing
from conftest import ROOT, small_run, write_rows

from catcher import choose, visited_share
from hellora import adapter_flops, attach, count_params, parse_method
from plumbing.checkpoint import empty_model, parse_config
from report import write_page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

DOCS = ROOT / "docs" / "report.html"
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
TABLE = """
return Object.fromEntries([...document.querySelectorAll("#numbers tbody tr")].map((row) =>
  [...row.children].map((cell) => cell.textContent)).map(([name, ...values]) => [name, values]));
"""
CHOSEN = """
const found = [...document.querySelectorAll("#maps svg")].map(() => ({}));
[...document.querySelectorAll("#maps svg")].forEach((svg, run) =>
  svg.querySelectorAll(".mark").forEach(({ dataset }) =>
    (found[run][dataset.layer] ??= []).push(+dataset.expert)));
return found;
"""
CHIPS = """
return [...document.querySelectorAll("#token-reader tr")].map((row) =>
  [...row.querySelectorAll(".chip")].map((x) => [x.textContent, x.classList.contains("hot")]));
"""
FOCUSED = """
const at = document.activeElement;
return at.id || at.getAttribute("class") || at.tagName;
"""
METHODS = ["hellora", "dora", "lora", "hellori-d", "hellori-s", "hellora_none", "fft", "hellora_c"]


@pytest.fixture(scope="module")
def window():
    with browser() as found:
        yield found


@pytest.fixture
def page(cli, toy, tmp_path, monkeypatch):
    """page(question, *methods): the path of a page of toy runs, and their folders."""
    monkeypatch.chdir(tmp_path)

    def made(question, *methods):
        rows = [{"question": f"{question} {n}+1?", "answer": f"#### {n + 1}"} for n in range(30)]
        data = write_rows(tmp_path / "rows.jsonl", rows)
        few = write_rows(tmp_path / "few.jsonl", rows[:4])
        words = small_run(toy, data, "--eval-data", few, "--steps", 2)
        for method in methods:
            more = ["--mask-from", "hellori-d"] if method.endswith("-s") else []
            code, _, err = cli("train.py", *words, "--method", method, "--out", method, *more)
            assert code == 0, err
        code, _, err = cli("report.py", "--run", *methods, "--out", "page.html")
        assert code == 0, err
        return tmp_path / "page.html", [tmp_path / method for method in methods]

    return made


def embedded(window):
    return window.js("return data")


def expected(cfg, method, rank, adapted, counts):
    """The table under the slider, by the project's functions."""
    model = empty_model(cfg, torch.float32)
    attach(model, method, adapted, rank, alpha=1)
    trained, stored = count_params(model, method)
    shares = visited_share(counts, adapted)
    flops = adapter_flops(model, shares)
    whole = empty_model(cfg, torch.float32)
    attach(whole, method, {i: list(range(cfg.n_experts)) for i in adapted}, rank, alpha=1)
    on_all = adapter_flops(whole, dict.fromkeys(shares, 1.0))
    return {
        "share of visits they get, mean over layers": percent(sum(shares.values()) / len(shares)),
        "trained parameters": f"{trained:,}",
        "share of all parameters": percent(trained / stored, 3),
        "FLOPs of the adapters, per token, forward": f"{round(flops):,}",
        "fewer than with all experts adapted": percent(1 - flops / on_all),
    }


def percent(x, digits=1):
    return f"{100 * x:.{digits}f} %"


def slide_to(window, k):
    """Move the slider with the keyboard alone."""
    window.js("document.getElementById('k').focus()")
    window.press("home", *["right"] * (k - 1))
    assert window.js("return state.k") in (k, None if k == 1 else k)


def as_tensors(lists):
    return {i: torch.tensor(of) for i, of in enumerate(lists)}


@pytest.mark.parametrize("rule", ["hot", "cold", "global-hot"])
def test_the_slider_s_numbers_are_those_of_the_project_s_functions(window, rule):
    cfg = parse_config(json.loads((ROOT / "tiny" / "config.json").read_text()))
    window.open(DOCS)
    (run,) = embedded(window)["runs"]
    in_training, when_chosen = (as_tensors(of["counts"]) for of in run["visits"])
    set_select(window, "rule", rule)
    for k in (2, 1, 8, 24, 64):
        slide_to(window, k)
        adapted = choose(when_chosen, k, rule)
        assert window.js(CHOSEN) == [{str(i): ids for i, ids in adapted.items()}]
        for at, counts in enumerate((in_training, when_chosen)):
            set_select(window, "visits", at)
            shown = {name: value for name, (value,) in window.js(TABLE).items()}
            want = expected(cfg, parse_method("hellora"), run["costs"]["rank"], adapted, counts)
            assert shown.items() >= want.items()
            assert shown["chosen experts a layer"] == f"{k} of 64"
        set_select(window, "visits", 0)


def set_select(window, name, value):
    window.js(
        "const at = document.getElementById(arguments[0]); at.value = arguments[1];"
        "at.dispatchEvent(new Event('input', { bubbles: true }))",
        name,
        str(value),
    )


def test_every_method_s_numbers_side_by_side(window, page):
    path, folders = page("What is", *METHODS)
    window.open(path)
    record = json.loads((folders[0] / "run.json").read_text())
    names = [json.loads((folder / "run.json").read_text())["method"] for folder in folders]
    config = json.loads((folders[0].parent / "toy" / "config.json").read_text())
    cfg = parse_config(config)

    # As trained: what run.json and the run's own experts say.
    for i, folder in enumerate(folders):
        own = json.loads((folder / "run.json").read_text())
        assert window.js(TABLE)["trained parameters"][i] == f"{own['trained']:,}"
        marks = {str(layer): ids for layer, ids in own["adapted"].items() if ids}
        assert window.js(CHOSEN)[i] == marks

    runs = embedded(window)["runs"]
    for k in (2, 3, 5, 7, 8):
        slide_to(window, k)
        shown, marked = window.js(TABLE), window.js(CHOSEN)
        for i, (name, run) in enumerate(zip(names, runs, strict=True)):
            scores = as_tensors(run["visits"][-1]["counts"])  # the catcher's, or else training's
            adapted = choose(scores, k, "hot")
            assert marked[i] == {str(layer): ids for layer, ids in adapted.items()}
            counts, method = as_tensors(run["visits"][0]["counts"]), parse_method(name)
            if method.train_base:
                share = visited_share(counts, adapted)
                want = {
                    "share of visits they get, mean over layers": percent(sum(share.values()) / 2)
                }
            else:
                want = expected(cfg, method, record["rank"], adapted, counts)
            assert {row: shown[row][i] for row in want} == want, (name, k)


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_no_error_no_request_and_nothing_beyond_the_edge(window, width, scheme):
    look_at(window, DOCS, width, scheme)


def look_at(window, path, width, scheme):
    """Load a page and use all of it."""
    window.open(path, width, 844, scheme)
    slide_to(window, 3)
    for name, value in (("rule", "random"), ("visits", 0), ("layer", 0), ("text", 0)):
        set_select(window, name, value)
    window.js("document.querySelector('details').open = true")
    for place in ("#loss", "#maps svg", ".tokens"):
        window.js("document.querySelector(arguments[0])?.focus()", place)
        window.press("right", "right", "left", "end")
    window.js("document.getElementById('trained').click()")
    console, asked = window.logs()
    assert console == []
    assert [url for url in asked if not url.startswith(("data:", path.resolve().as_uri()))] == []
    wide = window.js("return document.documentElement.scrollWidth")
    assert wide <= width
    dark = window.js("return matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    # Text stands out from the page: WCAG asks for 4.5 to 1.
    for name in ("ink", "soft", "hot", "right", "wrong"):
        assert contrast(window, name) >= 4.5, (scheme, name)


def contrast(window, name):
    """Of a colour of the style sheet against the page's."""

    def lightness(of):
        value = window.js(
            "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])",
            f"--{of}",
        ).strip("# ")
        digits = value if len(value) == 6 else "".join(2 * c for c in value)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(lightness(of) for of in (name, "page"))
    return (high + 0.05) / (low + 0.05)


def test_every_kind_of_run_draws_without_an_error_on_a_phone(window, page):
    path, folders = page("What is", *METHODS)
    look_at(window, path, 390, "dark")
    for folder in folders:
        look_at(window, folder / "report.html", 390, "light")
    # Runs of before, and one that has only begun.
    (folders[0] / "visits.json").unlink()
    (folders[0] / "hot_experts.json").unlink()
    (folders[0] / "metrics.jsonl").unlink()
    write_page([folders[0]], path)
    window.open(path, 390)
    assert window.logs()[0] == []
    assert "No training step" in window.js("return document.body.innerText")


def test_a_token_selected_by_keys_shows_its_experts(window):
    window.open(DOCS)
    (run,) = embedded(window)["runs"]
    text, adapted = run["texts"][0], [set(ids) for ids in run["adapted"]]
    hot = window.js(
        "return [...document.querySelectorAll('.tokens span')].map((x) => +x.dataset.hot)"
    )
    for t, share in enumerate(hot):
        visits = [e in adapted[i] for i, of in enumerate(text["experts"]) for e in of[t]]
        assert share == pytest.approx(sum(visits) / len(visits))
    window.js("document.querySelector('.tokens').focus()")
    window.press("right", "right", "right")
    chips = window.js(CHIPS)
    for i, row in enumerate(chips):
        gates = text["gates"][i][2]
        assert row == [
            [f"{e} · {gate} %", e in adapted[i]]
            for e, gate in zip(text["experts"][i][2], gates, strict=True)
        ]
    assert (
        window.js("return document.activeElement.getAttribute('aria-activedescendant')")
        == "token-0-2"
    )


def test_keys_alone_reach_every_control_and_read_the_charts(window):
    window.open(DOCS)
    reached = []
    for _ in range(12):
        window.press("tab")
        reached.append(window.js(FOCUSED))
    assert {"loss", "k", "rule", "visits", "trained", "text", "layer", "tokens"} <= set(reached)
    (run,) = embedded(window)["runs"]
    window.js("document.getElementById('loss').focus()")
    window.press("end", "left")
    step = run["loss"]["steps"] - 1
    said = window.js("return document.getElementById('loss-reader').textContent")
    assert said == f"step {step}: loss {run['loss']['values'][step - 1]:.4f}"
    window.js("document.querySelector('#maps svg').focus()")
    window.press("home", "down", "right")
    said = window.js("return document.getElementById('map-reader').textContent")
    counts = run["visits"][0]["counts"][1]
    assert said.startswith(f"layer 1, expert 1: {percent(counts[1] / sum(counts), 2)}")


def test_text_of_a_row_is_shown_and_never_run(window, page):
    evil = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    path, _ = page(evil, "hellora")
    look_at(window, path, 1280, "light")
    assert window.js("return window.hacked === undefined")
    assert evil in window.js("return document.querySelector('.answer').textContent")
    assert evil.replace(" ", "") in window.js(
        "return document.querySelector('.tokens').textContent.replaceAll(' ', '')"
    )
