"""README.md, CONTRIBUTING.md and docs/: what they print, quote, link to and tell you to type."""

import json
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from math import ceil
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import ROOT, small_run, toy_in, write_rows

from paper import pages, reproduce
from paper.runs import rates
from paper.studies import claims, comparison, mechanism, merging, placement
from paper.studies.tables import OLMOE

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [README, CONTRIBUTING, *DOCS]
LINKED = [*WRITTEN, ROOT / "LOG.md", ROOT / "tiny" / "README.md"]
RUN = "runs/tiny-tiny-math-hellora-k8-s0"  # the run of README's first command


def named(path):
    return str(path.relative_to(ROOT))


def blocks(page, kind):
    """The text of each fenced block that begins with ```kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page):
    """A page without its fenced blocks, however its lines end."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def flat(page):
    return " ".join(page.read_text(encoding="utf-8").split())


# ---- what is printed and made from results -------------------------------------------------------


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda p: p.name)
def test_printed_blocks_are_what_their_commands_print_now(page):
    text = page.read_text(encoding="utf-8")
    assert pages.BLOCK.search(text) or pages.PART.search(text)
    assert pages.filled(text) == text


def test_every_claim_has_its_row_on_the_page_of_claims():
    text = (ROOT / "docs" / "claims.md").read_text().partition("<!-- claims -->")[2]
    rows = [line for line in text.splitlines() if re.match(r"\| .* \| [+-]?[\d.]* \| ", line)]
    assert len(rows) == len(claims.CLAIMS)


def pairs_of(ratio, n=12):
    """Pairs of runs in which the other arm's loss is about so many times that of hot experts."""
    draw = torch.Generator().manual_seed(0)
    hot = torch.rand(n, placement.N_SCORED[placement.TEST], generator=draw).numpy() + 0.5
    noise = (1 + 0.01 * torch.randn(n, 1, generator=draw)).numpy()
    return [placement.Pair("tiny", *both) for both in zip(hot * ratio * noise, hot, strict=True)]


@pytest.mark.parametrize(("ratio", "says"), [(1.3, "higher"), (0.7, "lower"), (1.0, "equal")])
def test_findings_have_the_verdict_of_a_finished_placement_study(ratio, says, monkeypatch):
    monkeypatch.setattr(placement, "planned", lambda *_: 12)
    monkeypatch.setattr(
        placement,
        "pairs",
        lambda on, regime, arm, bases: pairs_of(ratio) if bases == placement.ONE else [],
    )
    monkeypatch.setattr(placement, "papers_effect", lambda *_: {"log_ratio": 0.1})
    found = placement.results()
    monkeypatch.setattr(pages, "study_results", lambda: found)
    table, full = pages.choices(), pages.study()
    for arm in placement.PRIMARY:
        (cells,) = [line for line in table.splitlines() if line.startswith(f"| {pages.ARMS[arm]}")]
        shown = re.findall(r"(\d\.\d\d) \([\d.]+ to [\d.]+\), (\w+) \|", cells)
        assert {word for _, word in shown} == {says}
        assert len(shown) == sum(arm in regime.arms for regime in placement.REGIMES.values())
        # The noise of a run is 1 %, and 12 runs are averaged.
        assert all(float(number) == pytest.approx(ratio, abs=0.015) for number, _ in shown)
    assert table.count("(12 runs, the embedded model)") == 3
    flat_text = " ".join(full.split())
    assert ("It is excluded." in flat_text) == (ratio < 1.1)
    assert ("It is exceeded." in flat_text) == (ratio > 1.1)
    assert re.search(rf"\| cold experts \| .* \| {says} \| ", full)
    assert ("On reworded" not in full) and (f", {says} before correction |" in full) == (ratio != 1)
    # The headline wants hot experts to matter alone, and not with attention and router.
    assert pages.headline(found) == ""


def test_findings_say_nothing_of_a_study_that_is_not_finished(monkeypatch):
    monkeypatch.setattr(placement, "planned", lambda *_: 12)
    monkeypatch.setattr(placement, "pairs", lambda *_: pairs_of(1.3, n=11))
    found = placement.results()
    monkeypatch.setattr(pages, "study_results", lambda: found)
    assert pages.choices().count("not measured yet") == 4 + 4 + 3
    assert pages.study().count("Not measured yet.") == 3
    assert not re.search(r"\d\.\d", pages.choices())


def test_merging_at_equal_loss_and_at_own_rates_are_as_the_page_says():
    rows = {(row["number"], row["arm"]): row for row in mechanism.results()}
    assert rows["merged, word problems", "all"]["minus"]["low"] > 0
    (merge,) = [row for row in claims.results() if row["study"] == "merging"]
    assert merge["says"].endswith("HELLoRA keeps more of word problems than LoRA")
    assert merge["verdict"] == "fails"


def test_the_numbers_of_a_run_at_the_real_size_are_those_of_its_record():
    record = json.loads((ROOT / "docs" / "results" / "real-size-olmoe-1b-7b.json").read_text())
    text, steps = flat(ROOT / "docs" / "runs.md"), record["steps"]
    first, second = (
        [f"{steps[name][part] / 1e9:.1f} GB" for part in ("peak_bytes", "plan_bytes")]
        for name in ("warm-up, a step, stopped in the next", "resumed, to the end")
    )
    assert f"peaked at {first[0]} (planned: {first[1]})" in text
    assert f"with hot experts at {second[0]} ({second[1]})" in text
    peer = record["transformers"]
    assert f"On {peer['same_argmax']} of {peer['tokens']} tokens" in text
    assert ("gives both candidates the same logit" in text) == (peer["gap"] == 0)


def test_how_many_runs_and_bases_are_behind_a_column():
    one = {"cold": {"runs": 12, "df": 11, "bases": placement.ONE}}
    many = {"cold": {"runs": 40, "df": 7, "bases": placement.MANY}}
    assert "12 runs, the embedded model" in pages.behind(one)
    assert "40 runs, 8 models" in pages.behind(many)
    assert pages.behind({}) == ""


def test_the_mechanism_is_shown_when_all_its_seeds_are_finished(monkeypatch):
    def row(number, arm, seeds):
        minus = {"mean": 0.02, "low": -0.01, "high": 0.05}
        return {"number": number, "arm": arm, "seeds": seeds, "mean": 0.5, "minus": minus}

    for n_seeds, shown in ((len(mechanism.SEEDS) - 1, False), (len(mechanism.SEEDS), True)):
        rows = [row(n, arm, n_seeds) for n in pages.CHANGES for arm in mechanism.ARMS]
        monkeypatch.setattr(mechanism, "results", lambda rows=rows: rows)
        text = pages.mechanism_found()
        cell = "| 0.500 | 0.500 (+0.020, -0.010 to +0.050)"
        assert text.count(cell) == shown * len(pages.CHANGES)
        assert ("Not measured yet" in text) != shown


def test_the_output_to_expect_is_that_of_a_committed_run():
    text = README.read_text()
    kept = json.loads((ROOT / "docs/results/tiny-math-hellora.json").read_text())
    of = kept["seeds"]["0"]["tiny-math"]
    assert f"base: accuracy {of['base_accuracy']:.1%} on {of['base_total']} problems" in text
    assert f"after: accuracy {of['accuracy']:.1%} on {of['total']} problems" in text
    for layer, ids in kept["hot_experts"]["0"].items():
        assert re.search(rf"^layer  {layer} │.* of visits go to {re.escape(str(ids))}$", text, re.M)
    trained, stored = kept["run"]["trained"], kept["run"]["stored"]
    assert f"{trained:,} of {stored:,} parameters are trained ({trained / stored:.3%})" in text
    n_rows = len((ROOT / "tiny" / "math-train.jsonl").read_text().splitlines())
    assert f"all {n_rows:,} training problems" in text
    answer = re.search(r"-> '(.*)' \(right: 89\)", text)[1]
    assert answer in (ROOT / "docs" / "report.html").read_text()  # the page of this run


def test_the_exact_percents_in_prose_are_those_of_the_params_table():
    text = flat(ROOT / "docs" / "choices.md")
    rows = {(r["backbone"], r["method"], r["k"]): r for r in reproduce.params()}
    lora, hot, dora = (rows[OLMOE, m, k] for m, k in (("lora", 64), ("hellora", 8), ("dora", 64)))
    percents = 100 * hot["percent"] / lora["percent"]
    counts = 100 * hot["trained"] / lora["trained"]
    assert f"**{percents:.2f} %.** It is a ratio of percentages" in text
    assert f"The ratio of the counts is {counts:.2f} %" in text
    assert f"{hot['percent']:.4f} rounded to 0.7" in text
    assert f"{dora['percent']:.4f} % with the router adapted" in text


def test_the_ratios_on_the_page_of_speed_are_those_of_the_committed_measurements():
    page = flat(ROOT / "docs" / "speed.md")
    large, small = (
        json.loads((ROOT / f"docs/results/speed-{n}-tokens.json").read_text()) for n in (1024, 48)
    )
    faster = [f"{record['rows']['hellora']['faster']['median']:.2f}" for record in (large, small)]
    gain = [record["regimes"]["grouped"]["time"] for record in (large, small)]
    memory = large["rows"]["hellora"]["peak_bytes"] / large["rows"]["peft"]["peak_bytes"]
    assert f"trains {faster[0]} times as fast as PEFT's LoRA" in page
    assert f"in {memory:.2f} of its memory, and {faster[1]} times as fast in steps of 48" in page
    says = "it gains {median:.2f} (in five rounds {least:.2f} to {most:.2f})".format(**gain[0])
    assert says + " and {median:.2f} (in nine {least:.2f} to {most:.2f})".format(**gain[1]) in page
    dora = [
        "{:.2f}".format(record["rows"]["dora"]["faster"]["median"]) for record in (large, small)
    ]
    assert "DoRA here is {} and {} times as fast as PEFT's LoRA".format(*dora) in page
    assert [len(record["rows"]["hellora"]["seconds"]) for record in (large, small)] == [5, 9]


def test_the_harmless_requests_that_the_page_of_claims_counts_as_refused_are_those_of_the_runs():
    often = {True: [], False: []}  # HELLoRA and HELLoRI, or not -> whether a run refused over 5 %
    refused = []
    for row in comparison.study("2").rows:
        shown = [comparison.saved(cell) for cell in row.runs["refusals"]]
        often[row.name.startswith("hellor")] += [
            run["harmless_refused"]["tiny-safety"] > 0.05 * run["harmless_total"]["tiny-safety"]
            for run in shown
        ]
        refused.append(sum(run["refusal_rate"]["tiny-safety"] for run in shown) / len(shown))
    ours, others = often[True], often[False]
    said = (
        f"each method refuses {100 * min(refused):.0f} to {100 * max(refused):.0f} % of the "
        f"harmful. Over 5 % of the harmless are refused too in {sum(ours)} of {len(ours)} runs of "
        f"HELLoRA and HELLoRI, and in {sum(others)} of {len(others)} runs of other methods"
    )
    assert said in flat(ROOT / "docs" / "claims.md")


def test_the_rates_of_code_and_safety_have_on_dev_what_the_page_of_tables_says():
    text = flat(ROOT / "docs" / "tables.md")
    assert (
        "At the chosen rate every method has 100 % there. Most have it at other rates too" in text
    )
    rows = [r for r in rates.results() if r["task"] != rates.TASK]
    assert len(rows) == len(rates.OTHERS) * len(rates.MAIN)
    assert all(r["dev"][f"{r['lr']:g}"] == 1 for r in rows)
    others = [sum(score == 1 for score in r["dev"].values()) > 1 for r in rows]
    assert sum(others) > len(others) / 2


def test_what_merging_leaves_of_each_task_is_what_the_page_of_tables_says():
    text = flat(ROOT / "docs" / "tables.md")
    rows = merging.results()
    left = max(mean(r["merged"]) for r in rows if r["task"] == "tiny-code")
    assert f"At most {ceil(100 * left)} % of code is left" in text
    falls = [-100 * r["minus"]["mean"] for r in rows if r["task"] == "tiny-math"]
    assert f"Word problems fall by {min(falls):.0f} to {max(falls):.0f} points" in text


# ---- code on a page ------------------------------------------------------------------------------


def test_the_method_on_the_page_runs_by_itself_and_is_hellora(capsys):
    (code,) = blocks(README, "python")
    before = {}
    exec(code.partition("# 4. Train")[0], before)
    base = {name: w.clone() for name, w in before["W"].items()}
    x, visits, hot = before["x"], before["visits"], before["hot"]
    coldest_hot = min(visits[hot])
    assert all(visits[e] <= coldest_hot for e in range(before["E"]) if e not in hot)
    assert visits.sum() == len(x) * before["TOP"]
    start = before["moe"](x)[0]
    before["A"].clear()
    torch.testing.assert_close(before["moe"](x)[0], start, atol=0, rtol=0)  # B = 0: unchanged

    trained = {}
    steps, merge = code.split("# 5. Merge")
    exec(steps, trained)
    live = trained["moe"](x)[0].detach()
    adapted = set(trained["A"])
    exec("# 5. Merge" + merge, trained)
    merged = trained["moe"](x)[0]
    # 1e-4: float32, sums in another order; training moved the outputs by about 1
    torch.testing.assert_close(merged, live, atol=1e-4, rtol=1e-4)
    assert (live - start).abs().max() > 0.1
    changed = {name for name, w in trained["W"].items() if not torch.equal(w, base[name])}
    assert changed == adapted
    assert adapted == {"router", *hot}
    assert f"go to experts {hot}" in capsys.readouterr().out


def test_runs_are_loaded_in_python_and_in_transformers_as_the_pages_say(
    tmp_path, cli, monkeypatch, capfd
):
    for peer in ("transformers", "peft"):
        pytest.importorskip(peer, reason="dev requirement")
    monkeypatch.chdir(tmp_path)
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(4)]
    )
    flags = small_run(toy_in(tmp_path), rows, "--steps", 1, "--catcher", "forward", "--no-eval")
    assert cli("train.py", *flags, "--out", RUN)[0] == 0
    for form in ("hub", "peft"):
        assert cli("export.py", "--run", RUN, "--format", form)[0] == 0
    monkeypatch.syspath_prepend(ROOT)
    for page, holds in (
        (ROOT / "docs" / "porting.md", "AutoTokenizer"),
        (ROOT / "docs" / "runs.md", "load_run"),
    ):
        (code,) = [code for code in blocks(page, "python") if holds in code]
        capfd.readouterr()
        exec(code, {})
        assert capfd.readouterr().out
    (code,) = [c for c in blocks(ROOT / "docs" / "porting.md", "python") if "PeftModel" in c]
    loaded = {}
    exec(code.replace('"tiny"', '"toy"'), loaded)
    tokens = torch.arange(20)[None]
    merged, adapted = (loaded[name](tokens).logits for name in ("merged", "adapted"))
    # 1e-4: float32, and an update that is merged rounds otherwise
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def test_every_quoted_line_stands_in_the_file_it_is_said_to_be_from():
    found = 0
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8")
        quotes = re.findall(r"^```python (\S+)\n(.*?)^```$", text, re.M | re.S)
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
        found += len(quotes)
    assert found >= 6


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_no_line_outside_tables_is_wider_than_100_columns(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


# ---- links ---------------------------------------------------------------------------------------


def test_links_into_the_code_lead_to_the_functions_they_name():
    links = [
        link
        for page in WRITTEN
        for link in re.findall(r"\[`([\w.]+)`\]\((?:\.\./)?([\w/]+\.py)#L(\d+)\)", page.read_text())
    ]
    assert len(links) >= 8
    for name, file, line in links:
        at = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*def {name.rpartition('.')[2]}\(", at), (name, file, line)


def anchors(page):
    """The names that GitHub gives to a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target
        if re.fullmatch(r"L\d+", anchor):
            assert int(anchor[1:]) <= len(file.read_text().splitlines()), target


# Our files, as pages and code name them: all .py and .md, and whatever is said to be in a folder.
FOLDERS = ("docs", "examples", "paper", "plumbing", "tests", "tiny")
NAMED = re.compile(
    rf"(?<![\w./-])(?:(?:[\w.-]+/)*[\w-]+\.(?:py|md)|(?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)\b"
)
PLACEHOLDER = re.compile(r"(?<![A-Z])(FILE|MODEL|NAME|SHARE|TASK)(?![A-Z])")
OTHERS = {  # files of other projects, named as sources
    "moe.py",  # mistral-inference
    "configuration_deepseek.py",  # DeepSeekMoE
    "eval_model.py", "extract_mask.py", "get_datasets.py",  # LoRI
    "keyword_eval.py",  # Qi et al.
}  # fmt: skip
OURS = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
OURS += [path for path in ROOT.iterdir() if path.is_file()]
TEXTS = sorted({*LINKED, *(path for path in OURS if path.suffix in (".py", ".md"))})


def lost(text, folder):
    """The files that a text names and that are not there. folder: the text's own."""
    alone = {path.name for path in OURS} | OTHERS
    for name in NAMED.findall(text):
        if "/" in name:
            there = any((place / name).exists() for place in (ROOT, folder))
        else:
            there = name in alone
        if not there and not PLACEHOLDER.search(name):
            yield name


def test_a_file_that_is_gone_is_found_wherever_a_text_names_it():
    gone = ["(`python tests/peers/gone.py`, 3", "see gone.py:", "in docs/gone-2.json.", "docs/x.md"]
    assert [len([*lost(text, ROOT)]) for text in gone] == [1, 1, 1, 1]
    there = ["`tests/conftest.py`", "(hellora.py)", "docs/results/stability.json,", "docs/FILE.md"]
    assert [len([*lost(text, ROOT)]) for text in there] == [0, 0, 0, 0]


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_every_file_that_is_named_is_there(path):
    if path != Path(__file__):  # which names some that are not there
        assert [*lost(path.read_text(encoding="utf-8"), path.parent)] == []


@pytest.mark.parametrize("path", LINKED, ids=named)
def test_every_file_in_quotes_is_there(path):
    for name in re.findall(r"`((?:[\w-]+/)+[\w.-]+\.\w+)`", prose(path)):
        made = name.startswith("runs/") or name.split("/")[0] in ("hub", "results")
        assert made or (ROOT / name).exists() or (path.parent / name).exists(), name


def test_the_list_of_pages_has_them_all():
    listed = re.findall(r"\]\(([\w./-]+)\)", (ROOT / "docs" / "README.md").read_text())
    assert {page.name for page in DOCS} - {"README.md"} <= set(listed)


@pytest.mark.parametrize("page", [CONTRIBUTING, *DOCS], ids=named)
def test_a_page_says_first_what_it_answers_and_last_what_to_read(page):
    title, answers, *_, last = [p for p in page.read_text().split("\n\n") if p.strip()]
    assert title.startswith("# ")
    assert re.match(r"This page answers: .*\?$", " ".join(answers.split()))
    assert re.match(r"Read next: .*\]\(|Read next: `", last)


def test_the_tree_on_the_page_names_all_there_is_at_the_top():
    (tree,) = [block for block in blocks(README, "text") if "moe_model.py " in block]
    told = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert told == {p.name for p in ROOT.glob("*.py")} | folders | {"docs", "examples", "tests"}


def test_the_list_of_plumbing_names_each_of_its_files():
    (listed,) = blocks(CONTRIBUTING, "text")
    files = {path.name for path in (ROOT / "plumbing").glob("*.py")} - {"__init__.py"}
    assert {line.split()[0] for line in listed.splitlines()} == files


def test_each_promise_about_faults_names_a_test_that_is_there():
    rows = re.findall(r"^\| (.+) \| (.+) \|$", (ROOT / "docs/faults.md").read_text(), re.M)
    promises = [row for row in rows if row[0] not in ("promise", "---")]
    assert len(promises) >= 25
    for promise, test in promises:
        file, name = re.fullmatch(r"`(tests/\w+\.py)::(\w+)`", test).groups()
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), promise


def test_each_commit_that_is_named_has_that_subject():
    told = re.findall(r"commit `(\w{7})`, \"([^\"]+)\"", flat(CONTRIBUTING))
    assert len(told) >= 5
    log = subprocess.run(["git", "log", "--format=%h %s"], cwd=ROOT, capture_output=True, text=True)
    if log.returncode or len(log.stdout.splitlines()) < 200:
        pytest.skip("the history is not here")
    for commit, subject in told:
        assert re.search(rf"^{commit}\w* {re.escape(subject)}$", log.stdout, re.M), commit


# ---- commands ------------------------------------------------------------------------------------


def typed(page):
    """What a page has one type: the commands of its blocks, and those quoted in its prose."""
    lines = [line for kind in ("sh", "bash") for block in blocks(page, kind)
             for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
    quoted = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    for text in lines + [code for code in quoted if re.match(r"(python|torchrun) .*\S", code)]:
        yield from (part.strip() for part in text.split(" && "))


STARTS = r"python (?:-m )?((?:paper|tiny|tests)\.[\w.]+|[\w/]+\.py)|torchrun .*?(train\.py)"
COMMANDS = sorted(
    {
        (re.sub(r"^torchrun .*?(?=train\.py)", "python ", text), named(page))
        for page in [*WRITTEN, ROOT / "tiny" / "README.md"]  # LOG.md has what was typed once
        for text in typed(page)
        if re.match(STARTS, text) and "..." not in text
    }
)


def test_there_are_commands_on_most_pages():
    assert len(COMMANDS) > 70
    assert len({page for _, page in COMMANDS}) > 10


@pytest.mark.parametrize(("text", "page"), COMMANDS)
def test_every_command_on_a_page_is_one_that_its_parser_takes(text, page, monkeypatch):
    words = [w for w in shlex.split(text, comments=True)[1:] if w != "-m"]
    name, *flags = words
    path = ROOT / name if name.endswith(".py") else ROOT / f"{name.replace('.', '/')}.py"
    if not path.exists():
        path = ROOT / name.replace(".", "/") / "__main__.py"  # python -m paper.bench
    assert path.exists()
    if not re.search(r"parse_args|= flags\.", path.read_text()):
        assert not flags or "sys.argv" in path.read_text()  # a command without flags
        return

    class Parsed(Exception):
        pass

    original = ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        raise Parsed(original(self, *args, **kwargs))

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    with pytest.raises((Parsed, SystemExit)) as ended:
        module.main()
    assert ended.type is Parsed or ended.value.code == 0  # --help and --version end with 0


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_no_page_has_a_word_that_the_list_of_words_rejects(page):
    rejected = ["cannot be told", "untrained", "famous", "popular expert", "burn-in"]
    listed = CONTRIBUTING.read_text()
    assert all(word in listed for word in rejected if word != "famous")
    text = prose(page).partition("## Words")[0] if page == CONTRIBUTING else prose(page)
    assert [word for word in rejected if word in text] == []
