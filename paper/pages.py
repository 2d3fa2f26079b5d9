"""Fills in the blocks of README.md and docs/ whose text comes from commands or results.

    python -m paper.pages

A block "```text python -m paper.reproduce ..." has the output of that command. A block
"```text docs/results/FILE.json" has the table of that benchmark. A part from "<!-- NAME -->" to
"<!-- end of NAME -->" has the text of the function with that name in PARTS: "findings" in
README.md, "claims" in docs/claims.md. Its numbers and verdicts come from results. A figure has the
alt text of paper/figures.py. A test compares the pages with all of this.
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
IMAGE = re.compile(r"^!\[[^\]]*\]\(((?:docs/)?figures/([\w-]+)\.png)\)$", re.M)

# ---- the findings, in words ----------------------------------------------------------------------

SAYS = {  # the verdict on a claim -> the words for the first of the two
    "holds": "{} is better",
    "fails": "{} is worse",
    "holds unadjusted": "{} is better, unadjusted",
    "fails unadjusted": "{} is worse, unadjusted",
    "equivalent": "equivalent",
    "undecided": "undecided",
    "not finished": "not measured yet",
}
WITHIN = f"{exp(placement.MARGIN) - 1:.0%}".replace("%", " %")
LOSSES = {  # the verdict on "hot is better" -> a sentence about the arms with this verdict
    "holds": "Hot experts are better than {}.",
    "fails": "Hot experts are worse than {}.",
    "holds unadjusted": "Without correction they are better than {}.",
    "fails unadjusted": "Without correction they are worse than {}.",
    "equivalent": f"Hot experts are equivalent, within {WITHIN} of the loss, to {{}}.",
    "undecided": "Undecided: {}.",
}
REGIMES = {
    "A": "Attention, router and experts adapted, as in the paper",
    "P": "Experts alone adapted",
    "O": "As in the paper, trained on few rows until it overfits",
}
ARMS = {"cold": "cold ones", "random": "random ones", "none": "no experts", "all": "all (LoRA)"}


def said(claim: dict, first: str = "HELLoRA") -> str:
    """The verdict on a claim of claims.results(), with the difference and its 95 % interval."""
    ours, words = claim["ours"], SAYS[claim["verdict"]].format(first)
    if not ours:
        return words
    points = claim["unit"] == claims.POINTS.name
    middle, low, high = (f"{ours[x]:+.{1 if points else 3}f}" for x in ("mean", "low", "high"))
    unit = "" if points else f" {claim['unit']}"
    return f"{words} ({middle}{unit}, {low} to {high})"


def placed(regime: str) -> tuple[str, str]:
    """The placement study on a regime: its bases and seeds, and the verdicts.

    On all bases if their runs are there, else on one. Twice "" if runs are missing.
    """
    arms = [arm for arm in placement.REGIMES[regime].arms if arm != "hot"]
    primary = [arm for arm in arms if arm in placement.PRIMARY]
    for bases in (placement.MANY, placement.ONE):
        some = {arm: placement.pairs(placement.TINY, regime, arm, bases) for arm in arms}
        planned = {arm: placement.planned(placement.TINY, regime, arm, bases) for arm in primary}
        if any(len(some[arm]) < planned[arm] for arm in primary):
            continue
        tests = placement.compare_arms(some, bases, placement.PLAIN)
        if set(primary) <= tests.keys():
            n_bases = len({pair.model for pair in some[primary[0]]})
            several = f"{n_bases} bases, {len(some[primary[0]])} seeds"
            on = f"one base, {len(some[primary[0]])} seeds" if n_bases == 1 else several
            return f" ({on})", in_sentences({arm: tests[arm] for arm in primary})
    return "", ""


def in_sentences(tests: dict[str, tuple[placement.Comparison, float]]) -> str:
    """A sentence for each verdict, about the arms that have it: {arm: (comparison, Holm's p)}."""
    arms_by_verdict = {}
    for arm, (test, corrected) in tests.items():
        middle, low, high = (f"{100 * (exp(x) - 1):+.1f}" for x in (test.mean, test.low, test.high))
        numbers = f"({middle} %, {low} to {high})"
        arms_by_verdict.setdefault(verdict(test, corrected), []).append(f"{ARMS[arm]} {numbers}")
    return " ".join(
        LOSSES[v].format(listed(arms_by_verdict[v])) for v in LOSSES if v in arms_by_verdict
    )


def listed(parts: list[str]) -> str:
    """Words in a row: a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def experts_found() -> list[str]:
    """An entry for each regime of the placement study: the loss with hot experts and others."""
    entries = []
    for regime, name in REGIMES.items():
        on, found = placed(regime)
        entries.append(f"**{name}**{on}. {found}" if found else f"**{name}**: not finished.")
    return entries


def lora_found(claim: dict[str, dict]) -> str:
    """HELLoRA against LoRA on all experts."""
    on = {"Word problems": "word problems", "Code": "code", "Refusals": "safety"}
    found = (f"{where}: {said(claim[f'HELLoRA beats LoRA on {x}'])}." for where, x in on.items())
    return f"**HELLoRA against LoRA**, in accuracy. {' '.join(found)}"


def parts_found(claim: dict[str, dict]) -> str:
    """The gain from adapters on attention and router."""
    both = said(claim["HELLoRA: attention and router add to the experts"])
    router = said(claim["HELLoRA: the router adds to the experts"], "the router")
    return (
        f"**HELLoRA against adapters on experts alone**: {both}. Experts and router against "
        f"experts alone: {router}."
    )


def kept_found(claim: dict[str, dict]) -> str:
    """Forgetting and merging."""
    full = said(claim["HELLoRA forgets less of its pretraining than full fine-tuning"])
    lora = said(claim["HELLoRA forgets less of its pretraining than LoRA"])
    merged = said(claim["merged with code, HELLoRA keeps more of word problems than LoRA"])
    return (
        f"**What is kept of pretraining**, against full fine-tuning: {full}. Against LoRA: {lora}. "
        "**What is kept of word problems** after a merge with a run on code, against LoRA: "
        f"{merged}."
    )


def speed_found() -> str:
    """The speed relative to LoRA, PEFT's and ours."""
    found = []
    for tokens in (1024, 48):
        record = json.loads((ROOT / f"docs/results/speed-{tokens}-tokens.json").read_text())
        peft = record["rows"]["hellora"]["faster"]["median"]
        own = record["regimes"]["grouped"]["time"]["median"]
        found += [f"{peft:.2f}", f"{own:.2f}"]
    return (
        "**Speed.** On one CPU core HELLoRA trains {0} times as fast as PEFT's LoRA in "
        "steps of 1,024 tokens, and {2} times as fast in steps of 48. It is {1} and {3} times as "
        "fast as LoRA in this repository. The paper reports {4:.2f} on two A100 GPUs."
    ).format(*found, report.PAPER["ratio"])


def parameters_found() -> str:
    """The share of OLMoE-1B-7B's parameters that is trained."""
    rows = {(r["backbone"], r["method"], r["k"]): r for r in reproduce.params()}
    hot, lora = rows[OLMOE, "hellora", 8], rows[OLMOE, "lora", 64]
    return (
        f"**Trained parameters.** Of OLMoE-1B-7B {hot['percent']:.2f} % with HELLoRA (k = 8), and "
        f"{lora['percent']:.2f} % with LoRA on all experts. The paper prints {hot['printed']} and "
        f"{lora['printed']} %."
    )


def findings() -> str:
    """The list, with some lines for each finding, and a figure."""
    claim = {row["says"]: row for row in claims.results()}
    found = [
        *experts_found(),
        lora_found(claim),
        parts_found(claim),
        kept_found(claim),
        speed_found(),
        parameters_found(),
    ]
    return "".join(f"{wrapped(text)}\n" for text in found) + "\n![](docs/figures/placement.png)\n"


def wrapped(text: str) -> str:
    """An entry of a list, 100 columns wide."""
    return textwrap.fill(f"- {text}", 100, subsequent_indent="  ", break_on_hyphens=False)


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
            "| claim | paper | verdict | ours, 95 % interval | MDE | p |\n|---|--:|---|--:|--:|--:|"
        )
        tables.append("\n".join([f"### {heading}\n", head, *rows]))
    return "\n" + "\n\n".join(tables) + "\n\n"


def claim_row(claim: dict) -> str:
    """A row of the table: one claim."""
    paper = "" if claim["paper"] is None else f"{claim['paper']:+.2f}"
    ours, cells = claim["ours"], ["", "", ""]
    if ours:
        digits = 1 if claim["unit"] == claims.POINTS.name else 3
        middle, low, high, mde = (f"{ours[x]:+.{digits}f}" for x in ("mean", "low", "high", "mde"))
        unit = "" if claim["unit"] == claims.POINTS.name else f" {claim['unit']}"
        p = "<.001" if ours["p"] < 0.0005 else f"{ours['p']:.3f}".lstrip("0")
        cells = [f"{middle}{unit} ({low} to {high})", mde.lstrip("+"), p]
    says = claim["says"].removeprefix("three bases: ").removeprefix("three bases, ")
    return f"| {says} | {paper} | {claim['verdict']} | {' | '.join(cells)} |"


PARTS = {"findings": findings, "claims": claims_in_tables}

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
