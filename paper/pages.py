"""Fills in the blocks of README.md and docs/ whose text comes from commands or results.

    python -m paper.pages

A block "```text python -m paper.reproduce ..." has the output of that command. A block
"```text docs/results/FILE.json" has the table of that benchmark. A part from "<!-- NAME -->" to
"<!-- end of NAME -->" has the text that the function of that name in PARTS returns. Its numbers and
verdicts come from results. A figure has the alt text of paper/figures.py. A test compares the pages
with all of this.
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
from functools import cache
from io import StringIO
from math import exp

from paper import reproduce
from paper.bench import report
from paper.figures import ALT
from paper.runs.parallel import ROOT
from paper.runs.stats import short_p
from paper.studies import claims, mechanism, placement
from paper.studies.tables import OLMOE
from paper.studies.tables import printed as printed_in_the_paper
from plumbing.cli import Parser, command

NAMES = ("README.md", "docs/claims.md", "docs/routing.md", "docs/speed.md", "docs/tables.md")
PAGES = [ROOT / name for name in NAMES]
BLOCK = re.compile(
    r"^(```text (docs/results/\S+|python -m paper\.reproduce [^\n]*)\n)(.*?)^```$", re.M | re.S
)
PART = re.compile(r"^(<!-- (\w+) -->\n).*?^(<!-- end of \2 -->)$", re.M | re.S)
NO_BREAK = "\u00a0"  # a space at which no line is broken
IMAGE = re.compile(r"^!\[[^\]]*\]\(((?:docs/)?figures/([\w-]+)\.png)\)$", re.M)

# ---- the study of placement ----------------------------------------------------------------------

REGIMES = {  # regime -> its heading, and the head of its column in README.md
    "P": ("Experts alone adapted", "experts alone, 200 problems"),
    "A": ("Experts, attention and router adapted", "attention and router too, 200 problems"),
    "O": ("The same, overfitted", "attention and router too, 60 problems"),
}
ARMS = {
    "cold": "cold experts",
    "random": "random experts",
    "none": "no experts",
    "all": "all experts",
    "model-level": "those hot over the whole model, the same in each layer",
    placement.ANSWERS: "those with most visits from the tokens of answers",
}
BASES = {placement.ONE: "On the embedded base", placement.MANY: "On all bases"}
SHORT = {  # the verdict that hot experts are better -> how large the other loss is
    "holds": "higher",
    "fails": "lower",
    "holds unadjusted": "higher before correction",
    "fails unadjusted": "lower before correction",
    "equivalent": "equal",
    "undecided": "undecided",
}
WAITING = "not measured yet"
Rows = dict[str, dict]  # arm -> its row of placement.results(), the comparison with hot


@cache
def study_results() -> dict:
    """All that the study has found. Several parts of the pages want it, and it takes seconds."""
    return placement.results()


def finished(found: dict, regime: str, bases: str, problems: str = "plain") -> Rows:
    """The rows of a regime. {} while a run of a primary comparison is missing."""
    rows = {
        row["arm"]: row
        for row in found["rows"]
        if (row["regime"], row["bases"], row["problems"]) == (regime, bases, problems)
    }
    arms = [arm for arm in placement.REGIMES[regime].arms if arm in placement.PRIMARY]
    whole = all(arm in rows and rows[arm]["runs"] == rows[arm]["planned"] for arm in arms)
    return rows if whole else {}


def headline(found: dict) -> str:
    """What regimes P and A say together, on all bases or else on the embedded one, or ""."""
    parts = {bases: [finished(found, regime, bases) for regime in ("P", "A")] for bases in BASES}
    bases = placement.MANY if all(parts[placement.MANY]) else placement.ONE
    if not all(parts[bases]):
        return ""
    alone, together = ({arm: row["verdict"] for arm, row in of.items()} for of in parts[bases])
    matters = alone["cold"] == alone["random"] == "holds"
    makes_up = together["cold"] == together["none"] == "equivalent"
    if not matters or not makes_up:
        return ""
    as_good = "Cold and random" if together["random"] == "equivalent" else "Cold"
    few = finished(found, "O", placement.ONE).get("none")
    better = (
        " On the embedded model, after training on 60 problems, adapting no expert is even a "
        "little better."
    )
    where = "the embedded model"
    if bases == placement.MANY:
        where = f"{n_bases(parts[bases][0])} small models: the embedded model, and others that "
        where += "differ from it in the seed of their pretraining"
    hot = printed_in_the_paper("2", "hellora", "gsm8k")
    cold = printed_in_the_paper("4", "hellora_c", "gsm8k")
    return (  # the plan has words for this outcome, but did not foresee the part on no experts
        "A layer's cold experts are those with the fewest visits. **If only experts are trained, "
        "hot experts do better than random ones and than cold ones. HELLoRA trains attention and "
        f"router too. Then hot experts show no advantage: {as_good} experts are equally good "
        "(within 10 %), and so is a run that adapts no "
        f"expert.**{better if few and few['verdict'] == 'fails' else ''} So attention "
        "and router make up for a bad choice of experts. In the paper hot experts are "
        f"{hot - cold:.1f} points better than cold ones, with attention and router trained. We "
        "measured on word problems, "
        f"on {where}. Whether it holds for larger models is not known."
    )


def main_finding() -> str:
    """README.md: the headline."""
    return textwrap.fill(headline(study_results()), 100) + "\n"


def choices() -> str:
    """README.md: the loss with each choice of experts in each regime, and a figure."""
    found = study_results()
    shown = {
        regime: finished(found, regime, placement.MANY) or finished(found, regime, placement.ONE)
        for regime in REGIMES
    }
    heads = [column + behind(shown[regime]) for regime, (_, column) in REGIMES.items()]
    lines = [["adapted experts", *heads], ["---"] + ["--:"] * len(heads)]
    lines += [["hot experts"] + ["1"] * len(heads)]
    for arm in placement.PRIMARY:
        name = ARMS[arm] + (" (LoRA)" if arm == "all" else "")
        lines += [[name, *(in_short(arm, regime, rows) for regime, rows in shown.items())]]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"\n{table}\n![](docs/figures/placement.png)\n\n"


def behind(rows: Rows) -> str:
    """How many runs, from how many pretrained models, are behind a number of a column."""
    if not rows:
        return ""
    n = n_bases(rows)
    models = "the embedded model" if n == "1" else f"{n} models"
    return f" ({runs_of_each(rows)} runs, {models})"


def in_short(arm: str, regime: str, rows: Rows) -> str:
    """The loss with this choice, where that with hot experts is 1, and the verdict, for a cell."""
    if arm not in placement.REGIMES[regime].arms:
        return "-"
    return f"{interval(rows[arm])}, {judged(rows[arm])}" if rows else WAITING


def runs_of_each(rows: Rows) -> str:
    """The number of runs behind a number of a column."""
    return str(next(iter(rows.values()))["runs"])


def n_bases(rows: Rows) -> str:
    """The number of pretrained models behind a column."""
    row = next(iter(rows.values()))
    return str(row["df"] + 1) if row["bases"] == placement.MANY else "1"


def times(log_ratio: float) -> str:
    """A ratio of losses."""
    ratio = exp(log_ratio)
    return f"{ratio:.1f}" if ratio > 10 else f"{ratio:.2f}"


def judged(row: dict) -> str:
    """The verdict on a loss, in short."""
    return SHORT[row["verdict"]] + (", bootstrap disagrees" * row["bootstrap_disagrees"])


def study() -> str:
    """docs/claims.md: the headline, tables for each regime, and a figure."""
    found = study_results()
    parts = [textwrap.fill(headline(found), 100)]
    for regime, (heading, _) in REGIMES.items():
        plan = placement.REGIMES[regime]
        parts += [f"### {heading}", f"{plan.n_rows} training problems, {plan.epochs} times each."]
        tables = [table for bases in BASES if (table := in_full(found, regime, bases))]
        parts += tables or [f"{WAITING.capitalize()}."]
    return "\n" + "\n\n".join(filter(None, parts)) + "\n\n![](figures/placement.png)\n"


def in_full(found: dict, regime: str, bases: str) -> str:
    """The comparisons of a regime with numbers, in a table."""
    rows = finished(found, regime, bases)
    if not rows:
        return ""
    reworded = finished(found, regime, bases, "reworded")
    above = f"{BASES[bases]}, {runs_of_each(rows)} runs of each choice."
    if bases == placement.ONE and "none" in rows:  # attention and router adapted, as in the paper
        above += against_paper(rows["cold"], found["effect"][regime])
    head = "| adapted experts | loss, hot experts = 1 | verdict | p | MDE | reworded problems |"
    lines = [head, "|---|--:|---|--:|--:|--:|"]
    for arm, row in rows.items():
        name = ARMS[arm] + ("" if row["primary"] else " (secondary)")
        cells = [name, interval(row), judged(row), short_p(row["p_corrected"]), times(row["mde"])]
        if arm in reworded:
            cells += [f"{interval(reworded[arm])}, {judged(reworded[arm])}"]
        lines += [f"| {' | '.join(cells)} |"]
    return textwrap.fill(above, 100) + "\n\n" + "\n".join(lines)


def interval(row: dict) -> str:
    """A ratio of losses with its 95 % interval."""
    middle, low, high = (times(row[name]) for name in ("mean", "low", "high"))
    return f"{middle} ({low} to {high})"


def against_paper(cold: dict, effect: dict | None) -> str:
    """Whether the paper's difference between hot and cold experts is possible here."""
    if effect is None:
        return ""
    says = {"below": "excluded", "around": "possible", "above": "exceeded"}[cold["papers_effect"]]
    return (
        " The paper's difference in accuracy between cold and hot experts would be a ratio of "
        f"{times(effect['log_ratio'])} here. It is {says}. (The ratio is read off a line through "
        "our runs, of their loss over their accuracy.)"
    )


# ---- what else changes: the mechanism ------------------------------------------------------------

CHANGES = {  # a number of mechanism.results() -> in words
    "rise": "rise of the loss on the domains of pretraining, nats per token",
    "kept on the task": "share of a token's experts that are still its experts, on word problems",
    "kept elsewhere": "the same on the domains of pretraining",
    "hot share": "rise of the share of visits that go to the hot experts",
    "merged, word problems": "rise of the log loss on word problems when a code run is merged in",
    "merged, code": "rise of the log loss on code by the same merge",
}


def mechanism_found() -> str:
    """docs/claims.md: what each choice of experts changes besides the task, in a table."""
    found = {(row["number"], row["arm"]): row for row in mechanism.results()}
    if not found or found["rise", "hot"]["seeds"] < len(mechanism.SEEDS):
        return f"\n{WAITING.capitalize()}.\n\n"
    arms = mechanism.ARMS
    heads = ["hot experts", *(ARMS[arm] for arm in arms[1:])]
    lines = [["", *heads], ["---"] + ["--:"] * len(arms)]
    for number, words in CHANGES.items():
        lines += [[words, *(changed(found[number, arm]) for arm in arms)]]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    text = (
        f"Means over {len(mechanism.SEEDS)} seeds. Brackets have the difference from hot experts "
        "with its 95 % interval, paired by seed, without correction for the number of comparisons."
    )
    return f"\n{textwrap.fill(text, 100)}\n\n{table}\n"


def changed(row: dict) -> str:
    """A mean, and how far it is from that of hot experts."""
    shown, minus = f"{row['mean']:.3f}", row["minus"]
    if row["arm"] == mechanism.ARMS[0]:
        return shown
    ends = "" if minus["low"] is None else f", {minus['low']:+.3f} to {minus['high']:+.3f}"
    return f"{shown} ({minus['mean']:+.3f}{ends})"


# ---- the other findings --------------------------------------------------------------------------


def lora_found(claim: dict[str, dict]) -> str:
    """HELLoRA against LoRA on all experts."""
    on = {"word problems": "word problems", "code": "code", "harmful requests refused": "safety"}
    found = {where: claim[f"HELLoRA beats LoRA on {x}"] for where, x in on.items()}
    texts = [f"{where} {points(c)}" for where, c in found.items()]
    printed = listed([f"{c['paper']:+.1f}" for c in found.values()])
    better = [where for where, c in found.items() if c["verdict"] == "holds"]
    says = "is more accurate" if better else "is not shown to be more accurate"
    return (
        f"**HELLoRA {says} than LoRA here.** HELLoRA's score minus LoRA's, in points: "
        f"{', '.join(texts)}. The paper has {printed}."
    )


def points(claim: dict) -> str:
    """A difference in points with its 95 % interval."""
    ours = claim["ours"]
    return "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**ours) if ours else WAITING


def reworded_found() -> str:
    """LoRA against HELLoRA on problems in new wordings, or "". The comparison is secondary."""

    def lora(regime: str, bases: str) -> dict | None:
        return finished(study_results(), regime, bases, "reworded").get("all")

    many, few, others = (
        lora("A", placement.ONE),
        lora("O", placement.ONE),
        lora("A", placement.MANY),
    )
    if many is None or few is None:
        return ""
    seems = many["verdict"] == few["verdict"] == "holds unadjusted"
    says, on_all = "Wordings that training never sees.", "On"
    if seems and (others is None or others["verdict"] == "holds unadjusted"):
        says = "HELLoRA may do better than LoRA on wordings that training never sees."
    elif seems:
        on_all = "But on"
        says = "On wordings that training never sees, an advantage of HELLoRA is not confirmed."
    text = (
        f"**{says}** LoRA's loss there, divided by HELLoRA's, is {interval(many)} on the embedded "
        f"model after training on 200 problems, and {interval(few)} after training on 60."
    )
    if others is not None:
        n = n_bases({"all": others})
        text += f" {on_all} all {n} models together it is {interval(others)}, after 200."
    return f"{text} This was not a main question of the plan."


def listed(parts: list[str]) -> str:
    """Words in a row: a, b and c."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def cost_found() -> str:
    """The speed relative to PEFT's LoRA, and the share of OLMoE-1B-7B's parameters trained."""
    record = json.loads((ROOT / "docs/results/speed-1024-tokens.json").read_text())
    faster = {method: row["faster"]["median"] for method, row in record["rows"].items()}
    rows = {(r["backbone"], r["method"], r["k"]): r for r in reproduce.params()}
    hot, lora = rows[OLMOE, "hellora", 8], rows[OLMOE, "lora", 64]
    share = "most" if faster["lora"] ** 2 > faster["hellora"] else "a part"
    return (
        "**HELLoRA costs less than LoRA.** Of OLMoE-1B-7B's parameters it trains "
        f"{hot['percent']:.2f} %, and LoRA {lora['percent']:.2f} %. Speed was measured on "
        "one CPU core, in steps of 1,024 tokens. Compared with LoRA of the library PEFT, our "
        f"HELLoRA is {faster['hellora']:.2f} times as fast, and our LoRA is {faster['lora']:.2f} "
        f"times as fast. So {share} of the gain comes from the code, not from the method "
        "([docs/speed.md](docs/speed.md))."
    )


def findings() -> str:
    """README.md: a list."""
    claim = {row["says"]: row for row in claims.results()}
    found = [lora_found(claim), reworded_found(), cost_found()]
    return "\n" + as_list([*filter(None, found)]) + "\n"


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
        cells = [interval, mde.lstrip("+"), f"{ours['df']:.1f}".removesuffix(".0"), p, corrected]
        if paper and not ours["low"] <= claim["paper"] <= ours["high"]:
            says += ", above the paper" if ours["low"] > claim["paper"] else ", below the paper"
    name = claim["says"].removeprefix("three bases: ").removeprefix("three bases, ")
    return f"| {name} | {paper} | {says} | {' | '.join(cells)} |"


PARTS = {
    "headline": main_finding,
    "choices": choices,
    "findings": findings,
    "study": study,
    "mechanism": mechanism_found,
    "claims": claims_in_tables,
}

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
