"""Fills in the blocks of README.md and docs/ whose text comes from commands or results.

    python -m paper.pages

A block "```text python -m paper.reproduce ..." has the output of that command. A block
"```text docs/results/FILE.json" has the table of that benchmark. A part from "<!-- NAME -->" to
"<!-- end of NAME -->" has the text of the function with that name in PARTS: "findings" in
README.md, "study" and "claims" in docs/claims.md. Its numbers and verdicts come from results. A
figure has the alt text of paper/figures.py. A test compares the pages with all of this.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.pages, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from math import exp

from paper import reproduce
from paper.bench import report
from paper.figures import ALT
from paper.runs.parallel import ROOT
from paper.runs.stats import verdict
from paper.studies import claims, placement
from paper.studies.tables import OLMOE
from plumbing.cli import Parser, command

NAMES = ("README.md", "docs/claims.md", "docs/routing.md", "docs/speed.md", "docs/tables.md")
PAGES = [ROOT / name for name in NAMES]
BLOCK = re.compile(
    r"^(```text (docs/results/\S+|python -m paper\.reproduce [^\n]*)\n)(.*?)^```$", re.M | re.S
)
PART = re.compile(r"^(<!-- (\w+) -->\n).*?^(<!-- end of \2 -->)$", re.M | re.S)
NO_BREAK = "\u00a0"  # a space at which no line is broken
IMAGE = re.compile(r"^!\[[^\]]*\]\(((?:docs/)?figures/([\w-]+)\.png)\)$", re.M)

# ---- the findings, in words ----------------------------------------------------------------------

SAYS = {  # the verdict on a claim -> the words for the first of the two
    "holds": "{} is better",
    "fails": "{} is worse",
    "holds unadjusted": "{} is better before correction",
    "fails unadjusted": "{} is worse before correction",
    "equivalent": "equivalent",
    "undecided": "undecided",
    "not finished": "not measured yet",
}
WITHIN = f"{exp(placement.MARGIN) - 1:.0%}".replace("%", " %")
LOSSES = {  # the verdict on "hot is better" -> where the loss lies with these choices of experts
    "holds": "higher with {}",
    "fails": "lower with {}",
    "holds unadjusted": "higher before correction with {}",
    "fails unadjusted": "lower before correction with {}",
    "equivalent": f"within {WITHIN} with {{}}",
    "undecided": "undecided with {}",
}
REGIMES = {
    "A": "Experts, attention and router adapted",
    "P": "Experts alone adapted",
    "O": "Experts, attention and router adapted, overfitted",
}
ARMS = {
    "cold": "cold experts",
    "random": "random experts",
    "none": "no experts",
    "all": "all experts",
    "model-level": "the experts that are hot over all layers together",
    "answers": "experts that answer tokens visit",
}


def said(claim: dict, first: str = "HELLoRA") -> str:
    """The verdict on a claim of claims.results(), with the difference and its 95 % interval."""
    ours, words = claim["ours"], SAYS[claim["verdict"]].format(first)
    if not ours:
        return words
    points = claim["unit"] == claims.POINTS.name
    middle, low, high = (f"{ours[x]:+.{1 if points else 3}f}" for x in ("mean", "low", "high"))
    unit = "" if points else f" {claim['unit']}"
    return f"{words} ({middle}{unit}, {low} to {high})"


Tests = dict[str, tuple[placement.Comparison, float]]  # {arm: (comparison with hot, Holm's p)}


def placed(regime: str) -> tuple[str, str]:
    """The placement study on a regime: how many runs, and what they show.

    On all bases if their runs are there, else on one. Twice "" if runs are missing.
    """
    for bases in (placement.MANY, placement.ONE):
        if tests := finished_tests(regime, bases):
            pairs = placement.pairs(placement.TINY, regime, "cold", bases)
            n_bases = len({pair.model for pair in pairs})
            on = "one base" if n_bases == 1 else f"{n_bases} bases"
            primary = {arm: test for arm, test in tests.items() if arm in placement.PRIMARY}
            texts = [in_words(primary, with_numbers, marked(primary, regime, bases))]
            texts += [reworded(finished_tests(regime, bases, placement.REWORDED))]
            if "none" in tests:  # attention and router are adapted, as in the paper
                texts += [against_paper(tests["cold"][0], regime)]
            n_rows = placement.REGIMES[regime].n_rows
            on = f" ({n_rows} rows, {on}, {len(pairs)} seeds)"
            return on, " ".join(filter(None, texts))
    return "", ""


def finished_tests(regime: str, bases: str, problems: slice = placement.PLAIN) -> Tests:
    """The comparisons of a regime. {} while a run of a primary one is missing."""
    arms = [arm for arm in placement.REGIMES[regime].arms if arm != "hot"]
    primary = [arm for arm in arms if arm in placement.PRIMARY]
    some = {arm: placement.pairs(placement.TINY, regime, arm, bases) for arm in arms}
    planned = {arm: placement.planned(placement.TINY, regime, arm, bases) for arm in primary}
    if any(len(some[arm]) < planned[arm] for arm in primary):
        return {}
    tests = placement.compare_arms(some, bases, problems)
    return tests if set(primary) <= tests.keys() else {}


def marked(tests: Tests, regime: str, bases: str) -> set[str]:
    """The arms for which the bootstrap says otherwise than the verdict."""
    some = {arm: placement.pairs(placement.TINY, regime, arm, bases) for arm in tests}
    means = {arm: placement.bootstrap(of, placement.PLAIN, bases) for arm, of in some.items()}
    return {arm for arm, of in tests.items() if placement.disagrees(verdict(*of), means[arm])}


def in_words(
    tests: Tests, described: Callable[[str, placement.Comparison], str], marks: set[str]
) -> str:
    """A sentence that goes through the verdicts and lists the arms of each, as `described`.

    marks: the arms that `marked` returns.
    """
    arms_by_verdict = {}
    for arm, (test, p) in tests.items():
        words = described(arm, test) + (" (bootstrap disagrees)" if arm in marks else "")
        arms_by_verdict.setdefault(verdict(test, p), []).append(words)
    parts = [
        where.format(listed(arms_by_verdict[outcome]))
        for outcome, where in LOSSES.items()
        if outcome in arms_by_verdict
    ]
    return f"Compared with hot experts, the loss is {', and '.join(parts)}."


def with_numbers(arm: str, test: placement.Comparison) -> str:
    """An arm with its loss relative to that of hot experts, and the 95 % interval."""
    ratios = [exp(x) for x in (test.mean, test.low, test.high)]
    if ratios[0] > 2:
        return "{} ({:.1f} times the loss, {:.1f} to {:.1f})".format(ARMS[arm], *ratios)
    percents = [100 * (ratio - 1) for ratio in ratios]
    return "{} ({:+.1f} %, {:+.1f} to {:+.1f})".format(ARMS[arm], *percents)


def against_paper(cold: placement.Comparison, regime: str) -> str:
    """Whether the paper's difference between hot and cold experts is possible here."""
    effect = placement.papers_effect(placement.TINY, regime)
    if effect is None:
        return ""
    size = f"(about {100 * (exp(effect['log_ratio']) - 1):+.0f} % on this scale)"
    if cold.high < effect["log_ratio"]:
        return f"The paper's difference between cold and hot {size} is excluded here."
    if cold.low > effect["log_ratio"]:
        return f"The difference between cold and hot is larger than the paper's {size}."
    return f"The paper's difference between cold and hot {size} is possible here."


def reworded(tests: Tests) -> str:
    """The same on problems in wordings that training never sees. It is not corrected."""
    differ = [(arm, test) for arm, (test, p) in tests.items() if p < 0.05]
    if not differ:
        return "On reworded problems no difference is significant."
    higher = [with_numbers(arm, test) for arm, test in differ if test.mean > 0]
    lower = [with_numbers(arm, test) for arm, test in differ if test.mean < 0]
    parts = [f"{word} with {listed(arms)}" for word, arms in
             (("higher", higher), ("lower", lower)) if arms]  # fmt: skip
    return f"On reworded problems, before correction, the loss is {listed(parts)}."


def listed(parts: list[str]) -> str:
    """Words in a row: a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def headline() -> list[str]:
    """What regimes A and P say together on the embedded base: one entry, or none."""
    verdicts = {
        (regime, arm): verdict(*test)
        for regime in ("A", "P")
        for arm, test in finished_tests(regime, placement.ONE).items()
    }
    makes_up = verdicts.get(("A", "cold")) == verdicts.get(("A", "none")) == "equivalent"
    if not makes_up or not verdicts.get(("P", "cold")) == verdicts.get(("P", "random")) == "holds":
        return []
    return [  # in the words that the plan has for this outcome
        "**If only experts are trained, the choice of experts matters. If attention and router "
        "are trained too, they make up for a bad choice.** This was measured on the embedded "
        "model and on word problems."
    ]


def experts_found() -> list[str]:
    """An entry for each regime of the placement study: the loss with hot experts and others."""
    entries = []
    for regime, name in REGIMES.items():
        on, found = placed(regime)
        entries.append(f"**{name}**{on}. {found}" if found else f"**{name}**: not measured yet.")
    return entries


def study() -> str:
    """The placement study in full: an entry for each regime, and a figure."""
    return as_list([*headline(), *experts_found()]) + "\n![](figures/placement.png)\n"


def short(regime: str) -> str:
    """What a regime shows, without intervals: on all bases, or else on one."""
    for bases in (placement.MANY, placement.ONE):
        if tests := finished_tests(regime, bases):
            primary = {arm: test for arm, test in tests.items() if arm in placement.PRIMARY}
            return in_words(primary, size, marked(primary, regime, bases))
    return "Not measured yet."


def size(arm: str, test: placement.Comparison) -> str:
    """An arm with its loss relative to that of hot experts."""
    ratio = exp(test.mean)
    number = f"{ratio:.1f} times" if ratio > 2 else f"{100 * (ratio - 1):+.0f} %"
    return f"{ARMS[arm]} ({number})"


def lora_found(claim: dict[str, dict]) -> str:
    """HELLoRA against LoRA on all experts."""
    on = {"Word problems": "word problems", "Code": "code", "Refusals": "safety"}
    texts = [f"{where}: {said(claim[f'HELLoRA beats LoRA on {x}'])}." for where, x in on.items()]
    return f"**HELLoRA against LoRA on all experts**, in points of accuracy. {' '.join(texts)}"


def parts_found(claim: dict[str, dict]) -> str:
    """The gain from adapters on attention and router."""
    both = said(claim["HELLoRA: attention and router add to the experts"], "HELLoRA")
    return f"**HELLoRA against adapters on the hot experts alone**, on word problems: {both}."


def cost_found() -> str:
    """The speed relative to PEFT's LoRA, and the share of OLMoE-1B-7B's parameters trained."""
    faster = []
    for tokens in (1024, 48):
        record = json.loads((ROOT / f"docs/results/speed-{tokens}-tokens.json").read_text())
        faster += [record["rows"]["hellora"]["faster"]["median"]]
    rows = {(r["backbone"], r["method"], r["k"]): r for r in reproduce.params()}
    hot, lora = rows[OLMOE, "hellora", 8], rows[OLMOE, "lora", 64]
    return (
        f"**Cost.** On one CPU core HELLoRA trains {faster[0]:.2f} times as fast as PEFT's LoRA in "
        f"steps of 1,024 tokens, and {faster[1]:.2f} times in steps of 48. It trains "
        f"{hot['percent']:.2f} % of OLMoE-1B-7B's parameters, LoRA {lora['percent']:.2f} %."
    )


def findings() -> str:
    """The list of README.md, with a figure."""
    claim = {row["says"]: row for row in claims.results()}
    found = [
        *headline(),
        *(f"**{REGIMES[regime]}.** {short(regime)}" for regime in ("P", "A", "O")),
        lora_found(claim),
        parts_found(claim),
        cost_found(),
    ]
    return as_list(found) + "\n![](docs/figures/placement.png)\n"


def as_list(entries: list[str]) -> str:
    """The entries of a list, a line or more each."""
    return "".join(f"{wrapped(text)}\n" for text in entries)


def wrapped(text: str) -> str:
    """An entry of a list, 100 columns wide. A number stays on the line of its percent sign."""
    joined = f"- {text}".replace(" %", NO_BREAK + "%")
    lines = textwrap.fill(joined, 100, subsequent_indent="  ", break_on_hyphens=False)
    return lines.replace(NO_BREAK, " ")


# ---- each claim, in tables -----------------------------------------------------------------------

HEADINGS = {  # a table of the paper, or a study -> the heading of its claims
    "2": "Methods (Table 2)",
    "4": "Which experts (Table 4)",
    "5": "Attention and router (Table 5)",
    "7": "How many experts (Table 7)",
    "bases": "Three pretrained bases (not in the paper)",
    "forgetting": "Forgetting (not in the paper)",
    "merging": "Merging two runs (left open in the paper)",
    "stability": "How much data the catcher needs (Figure 3)",
}


def claims_in_tables() -> str:
    """A table of claims for each study."""
    found = claims.results()
    tables = []
    for study, heading in HEADINGS.items():
        rows = [claim_row(claim) for claim in found if claim["study"] == study]
        head = (
            "| claim | paper | verdict | ours, 95 % interval | MDE | df | p | corrected |\n"
            "|---|--:|---|--:|--:|--:|--:|--:|"
        )
        tables.append("\n".join([f"### {heading}\n", head, *rows]))
    return "\n" + "\n\n".join(tables) + "\n\n"


def claim_row(claim: dict) -> str:
    """A row of the table: one claim."""
    paper = "" if claim["paper"] is None else f"{claim['paper']:+.2f}"
    ours, cells, says = claim["ours"], ["", "", "", "", ""], claim["verdict"]
    if ours:
        digits = 1 if claim["unit"] == claims.POINTS.name else 3
        middle, low, high, mde = (f"{ours[x]:+.{digits}f}" for x in ("mean", "low", "high", "mde"))
        unit = "" if claim["unit"] == claims.POINTS.name else f" {claim['unit']}"
        p, corrected = map(short_p, (claim["p"], claim["p_corrected"]))
        interval = f"{middle}{unit} ({low} to {high})"
        cells = [interval, mde.lstrip("+"), str(ours["df"]), p, corrected]
        if paper and not ours["low"] <= claim["paper"] <= ours["high"]:
            says += ", above the paper" if ours["low"] > claim["paper"] else ", below the paper"
    name = claim["says"].removeprefix("three bases: ").removeprefix("three bases, ")
    return f"| {name} | {paper} | {says} | {' | '.join(cells)} |"


def short_p(p: float) -> str:
    """A p-value with three digits."""
    return "<.001" if p < 0.0005 else f"{p:.3f}".removeprefix("0")


PARTS = {"findings": findings, "study": study, "claims": claims_in_tables}

# ---- blocks --------------------------------------------------------------------------------------


def printed(source: str) -> str:
    """The output of a command, or the table of a benchmark's file."""
    with redirect_stdout(StringIO()) as out:
        if source.startswith("docs/"):
            report.show(json.loads((ROOT / source).read_text()))
        else:
            reproduce.main(shlex.split(source)[3:])
    return out.getvalue().strip("\n") + "\n"


def filled(text: str) -> str:
    """The page, with its blocks filled in now."""
    text = BLOCK.sub(lambda block: f"{block[1]}{printed(block[2])}```", text)
    text = PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}{part[3]}", text)
    return IMAGE.sub(lambda image: textwrap.fill(f"![{ALT[image[2]]}]({image[1]})", 100), text)


def main() -> None:
    """Fill in every page."""
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    command(main)
