"""README.md and docs/: they print what commands print, and quote what the files say."""

import json
import re

import pytest
from conftest import ROOT

from paper import pages, reproduce
from paper.studies import comparison
from paper.studies.tables import OLMOE


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda p: p.name)
def test_printed_blocks_are_what_their_commands_print_now(page):
    text = page.read_text(encoding="utf-8")
    assert pages.BLOCK.search(text)
    assert pages.filled(text) == text


def test_every_quoted_line_stands_in_the_file_it_is_said_to_be_from():
    for page in (ROOT / "README.md", ROOT / "docs" / "walkthrough.md"):
        text = page.read_text(encoding="utf-8")
        quotes = re.findall(r"^```python (\S+)\n(.*?)^```$", text, re.M | re.S)
        assert len(quotes) >= 6
        parts = [
            (name, part)
            for name, code in quotes
            for part in re.split(r"^ *\.\.\.\n", code, flags=re.M)
        ]
        for name, part in parts:
            lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
            quoted = [line.strip() for line in part.splitlines()]
            assert any(lines[i : i + len(quoted)] == quoted for i in range(len(lines))), (
                name,
                part,
            )


def test_links_into_the_code_lead_to_the_functions_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 9
    for name, file, line in links:
        at = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*def {name.rpartition('.')[2]}\(", at), (name, file, line)


def test_the_output_to_expect_is_that_of_a_committed_run():
    text = (ROOT / "README.md").read_text()
    kept = json.loads((ROOT / "docs/results/tiny-math-hellora.json").read_text())
    assert (
        f"after: accuracy {kept['seeds']['0']['tiny-math']['accuracy']:.1%} on 500 problems" in text
    )
    for layer, ids in kept["hot_experts"]["0"].items():
        assert re.search(rf"^layer  {layer} │.* of visits go to {re.escape(str(ids))}$", text, re.M)
    trained, stored = kept["run"]["trained"], kept["run"]["stored"]
    assert f"{trained:,} of {stored:,} parameters are trained ({trained / stored:.3%})" in text


def test_the_exact_percents_in_prose_are_those_of_the_params_table():
    text = " ".join((ROOT / "README.md").read_text().split())
    rows = {(r["backbone"], r["method"], r["k"]): r for r in reproduce.params()}
    lora, hot, dora = (rows[OLMOE, m, k] for m, k in (("lora", 64), ("hellora", 8), ("dora", 64)))
    for name, before, after in (
        ("percent", "The famous ", " % is a ratio"),
        ("trained", "it is ", " %."),
    ):
        assert f"{before}{100 * hot[name] / lora[name]:.2f}{after}" in text
    assert f"{hot['percent']:.4f} rounded to 0.7" in text
    assert f"{dora['percent']:.4f} % with the router adapted" in text


def test_what_the_readme_links_to_is_there():
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert (ROOT / target).exists(), target


def test_the_harmless_requests_that_the_page_of_claims_counts_as_refused_are_those_of_the_runs():
    often = {True: [], False: []}  # HELLoRA and HELLoRI, or not -> whether a run refused over 5 %
    rates = []
    for row in comparison.study("2").rows:
        shown = [comparison.saved(cell) for cell in row.runs["refusals"]]
        often[row.name.startswith("hellor")] += [
            run["harmless_refused"]["tiny-safety"] > 0.05 * run["harmless_total"]["tiny-safety"]
            for run in shown
        ]
        rates.append(sum(run["refusal_rate"]["tiny-safety"] for run in shown) / len(shown))
    ours, others = often[True], often[False]
    assert sum(others) == 0
    said = (
        "over 5 % of the harmless are refused too in "
        f"{sum(ours)} of {len(ours)} runs of HELLoRA and HELLoRI"
    )
    text = " ".join((ROOT / "docs" / "claims.md").read_text().split())  # however lines end
    assert f"{said}, in no other's {len(others)}." in text
    assert f"each method refuses {100 * min(rates):.0f} to {100 * max(rates):.0f} %" in text


def test_each_promise_about_faults_names_a_test_that_is_there():
    rows = re.findall(r"^\| (.+) \| (.+) \|$", (ROOT / "docs/faults.md").read_text(), re.M)
    promises = [row for row in rows if row[0] not in ("promise", "---")]
    assert len(promises) >= 25
    for promise, named in promises:
        file, name = re.fullmatch(r"`(tests/\w+\.py)::(\w+)`", named).groups()
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), promise
