"""The paper's claims that one thing is better than another, beside what our model shows.

Each claim has the difference here, a verdict, and the smallest true difference that a two-sided
test finds with a power of 80 % (MDE). The verdicts:

    holds, fails    the difference is significant at 5 % after Holm's correction
    ... unadjusted  it is significant only without that correction
    equivalent      a difference as large as the margin is excluded (TOST at 5 %)
    undecided       none of these

"A matches or exceeds B" is a claim that A is not worse (non-inferiority). Not significantly worse
is no proof of that, so it has a test of its own:

    holds           that A is worse by the margin or more is excluded (one-sided, at 5 %)
    fails           this is not excluded, and A is significantly worse (two-sided, at 5 %)
    undecided       neither

Such a claim is never called equivalent. Holm's correction and "unadjusted" are as above.

The paper's claims are one family in Holm's correction. Our own further ones are another: how many
of these we ask must not change a verdict on the paper. A claim whose runs are not finished counts
too.

Runs of one base are compared as two groups (Welch's t): that two runs have the same seed says
nothing of how they differ. Several bases are compared base by base, by their means.
"""

from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

from paper.runs.stats import (
    Comparison,
    at_least,
    compare,
    compare_groups,
    holm,
    verdict,
    verdict_at_least,
)
from paper.studies import comparison, forgetting, merging, stability
from paper.studies.comparison import Study


class Unit(NamedTuple):
    """What a difference is measured in."""

    name: str
    size: float  # what is counted as 1
    margin: float  # differences below it are taken as none


POINTS = Unit("points", 0.01, 0.01)
NATS = Unit("nats a token", 1.0, 0.05)
OVERLAP = Unit("Jaccard", 1.0, 0.05)


class Claim(NamedTuple):
    """That one row of a study scores higher than another."""

    where: str  # in the paper; "": the paper makes no such claim
    says: str
    study: str
    higher: str
    lower: str
    column: str = "gsm8k"
    unit: Unit = POINTS
    at_least: bool = False  # the claim is that `higher` is not worse


D, S, CODE = "hellori-d", "hellori-s", "pass@1"
CLAIMS = (
    Claim("4.2, Table 2", "HELLoRA beats full fine-tuning on word problems", "2", "hellora", "fft"),
    Claim("4.2, Table 2", "HELLoRA beats full fine-tuning on code", "2", "hellora", "fft", CODE),
    Claim("4.2, Table 2", "HELLoRA beats LoRA on word problems", "2", "hellora", "lora"),
    Claim("4.2, Table 2", "HELLoRA beats LoRA on code", "2", "hellora", "lora", CODE),
    Claim("4.2, Table 2", "HELLoRA beats LoRA on code, pass@5", "2", "hellora", "lora", "pass@5"),
    Claim("4.2, Table 2", "HELLoRA beats LoRA on code, pass@10", "2", "hellora", "lora", "pass@10"),
    Claim("4.2, Table 2", "HELLoRA beats LoRA on safety", "2", "hellora", "lora", "refusals"),
    Claim("", "... harmful and harmless balanced", "2", "hellora", "lora", "balanced"),
    Claim("4.2, Table 2", "HELLoRA beats DoRA on word problems", "2", "hellora", "dora"),
    Claim("4.2, Table 2", "HELLoRA beats DoRA on code", "2", "hellora", "dora", CODE),
    Claim("4.2, Table 2", "HELLoRA beats LoRI-D on word problems", "2", "hellora", "lori-d"),
    Claim("4.2, Table 2", "HELLoRA beats LoRI-D on code", "2", "hellora", "lori-d", CODE),
    Claim("4.2, Table 2", "HELLoRA beats LoRI-S on word problems", "2", "hellora", "lori-s"),
    Claim("4.2, Table 2", "HELLoRA beats LoRI-S on code", "2", "hellora", "lori-s", CODE),
    Claim("4.2, Table 2", "HELLoRA beats HELLoRI-D on word problems", "2", "hellora", D),
    Claim("4.2, Table 2", "HELLoRA beats HELLoRI-D on code", "2", "hellora", D, CODE),
    Claim("4.2, Table 2", "HELLoRI-D matches or exceeds LoRI-D on word problems",
          "2", D, "lori-d", at_least=True),
    Claim("4.2, Table 2", "HELLoRI-D matches or exceeds LoRI-D on code",
          "2", D, "lori-d", CODE, at_least=True),
    Claim("4.2, Table 2", "HELLoRI-S matches or exceeds LoRI-S on word problems",
          "2", S, "lori-s", at_least=True),
    Claim("4.2, Table 2", "HELLoRI-S matches or exceeds LoRI-S on code",
          "2", S, "lori-s", CODE, at_least=True),
    Claim("4.3, Table 4", "HELLoRA: each layer's hot experts beat the model's",
          "4", "hellora", "hellora_m"),
    Claim("4.3, Table 4", "HELLoRA: hot experts beat cold ones", "4", "hellora", "hellora_c"),
    Claim("4.3, Table 4", "HELLoRI-D: each layer's hot experts beat the model's", "4", D, f"{D}_m"),
    Claim("4.3, Table 4", "HELLoRI-D: hot experts beat cold ones", "4", D, f"{D}_c"),
    Claim("4.3, Table 4", "HELLoRI-S: each layer's hot experts beat the model's", "4", S, f"{S}_m"),
    Claim("4.3, Table 4", "HELLoRI-S: hot experts beat cold ones", "4", S, f"{S}_c"),
    Claim("4.3, Table 5", "HELLoRA: attention and router add to the experts",
          "5", "hellora", "hellora_pure"),
    Claim("4.3, Table 5", "HELLoRA: attention adds to experts and router",
          "5", "hellora", "hellora_gate"),
    Claim("4.3, Table 5", "HELLoRA: the router adds to the experts",
          "5", "hellora_gate", "hellora_pure"),
    Claim("4.3, Table 5", "HELLoRI-D: attention and router add to the experts",
          "5", D, f"{D}_pure"),
    Claim("4.3, Table 5", "HELLoRI-D: attention adds to experts and router", "5", D, f"{D}_gate"),
    Claim("4.3, Table 5", "HELLoRI-D: the router adds to the experts",
          "5", f"{D}_gate", f"{D}_pure"),
    Claim("4.3, Table 5", "HELLoRI-S: attention and router add to the experts",
          "5", S, f"{S}_pure"),
    Claim("4.3, Table 5", "HELLoRI-S: attention adds to experts and router", "5", S, f"{S}_gate"),
    Claim("4.3, Table 5", "HELLoRI-S: the router adds to the experts",
          "5", f"{S}_gate", f"{S}_pure"),
    Claim("4.3, Table 7", "8 experts beat 2", "7", "hellora, k = 8", "hellora, k = 2"),
    Claim("4.3, Table 7", "8 experts beat 4", "7", "hellora, k = 8", "hellora, k = 4"),
    Claim("4.3, Table 7", "16 experts beat 8", "7", "hellora, k = 16", "hellora, k = 8"),
    Claim("", "three bases: hot experts beat cold ones", "bases", "hellora", "hellora_c"),
    Claim("", "three bases: hot experts beat random ones", "bases", "hellora", "hellora_r"),
    Claim("", "three bases: hot experts beat none at all", "bases", "hellora", "hellora_none"),
    Claim("", "three bases, experts alone: hot beat cold ones",
          "bases", "hellora_pure", "hellora_pure_c"),
    Claim("", "three bases, experts alone: hot beat random ones",
          "bases", "hellora_pure", "hellora_pure_r"),
    Claim("", "HELLoRA forgets less of its pretraining than full fine-tuning",
          "forgetting", "hellora", "fft", unit=NATS),
    Claim("", "HELLoRA forgets less of its pretraining than LoRA",
          "forgetting", "hellora", "lora", unit=NATS),
    Claim("", "merged with code, HELLoRA keeps more of word problems than LoRA",
          "merging", "hellora", "lora"),
    Claim("",
          "a tenth of the data and all of it share more hot experts than in the paper",
          "stability", "tenth", "paper", unit=OVERLAP),
)  # fmt: skip
# 11 of 16 layers choose the same 8 experts, in 5 layers one differs: 7 shared of 9 in either.
PAPERS_OVERLAP = (11 + 5 * 7 / 9) / 16


# ---- the numbers behind a claim ------------------------------------------------------------------


def compared_scores(claim: Claim) -> Comparison | None:
    """Two rows of one of comparison.py's tables; None until all their runs are finished."""
    of: Study = comparison.study(claim.study)
    rows = {row.name: row for row in of.rows}
    samples, models = [], []
    for name in (claim.higher, claim.lower):
        column = "refusals" if claim.column == "balanced" else claim.column
        score, task = rows[name].columns[column]
        score = "balanced" if claim.column == "balanced" else score
        cells = rows[name].runs[column]
        samples.append([comparison.score(cell, (score, task)) for cell in cells])
        models.append([cell.model for cell in cells])
    if None in samples[0] + samples[1]:
        return None
    if len(set(models[0])) == 1:
        return compare_groups(*samples, claim.unit.margin)
    by_base = [
        mean(a for a, m in zip(samples[0], models[0], strict=True) if m == base)
        - mean(b for b, m in zip(samples[1], models[1], strict=True) if m == base)
        for base in dict.fromkeys(models[0])
    ]
    return compare(by_base, claim.unit.margin)


def compared_forgetting(claim: Claim) -> Comparison | None:
    """How much less the loss on the domains of pretraining rises."""
    rows = forgetting.results()["rows"]
    if not {claim.higher, claim.lower} <= rows.keys():
        return None
    kept = [[-rise for rise in rows[name]["rise"]["runs"]] for name in (claim.higher, claim.lower)]
    return compare_groups(*kept, claim.unit.margin)


def compared_merging(claim: Claim) -> Comparison | None:
    """How much less accuracy on word problems falls when a code run's update is added."""
    measure = next(m for m in merging.MEASURES if m.task == "tiny-math")
    pair, methods = ("tiny-math", "tiny-code"), (claim.higher, claim.lower)
    rows = [merging.row(pair, method, measure) for method in methods]
    kept = [[b - a for a, b in zip(r["alone"], r["merged"], strict=True)] for r in rows]
    return compare_groups(*kept, claim.unit.margin) if min(map(len, kept)) > 1 else None


def compared_lists(claim: Claim) -> Comparison | None:
    """The overlap of a tenth's hot lists with that of all the data, less the paper's overlap."""
    sample = stability.results()["overlaps"].get("the sample (the base, and all of the data)", {})
    overlaps = sample.get(f"{stability.TENTH:.0%} of the data", {}).get("overlaps", [])
    differences = [overlap - PAPERS_OVERLAP for overlap in overlaps]
    return compare(differences, claim.unit.margin) if len(differences) > 1 else None


SOURCES: dict[str, Callable[[Claim], Comparison | None]] = {
    "forgetting": compared_forgetting,
    "merging": compared_merging,
    "stability": compared_lists,
}


def papers(claim: Claim) -> float | None:
    """The paper's difference in points, where its tables have both numbers."""
    if claim.study in SOURCES or claim.study == "bases" or claim.column == "balanced":
        return None
    rows = {row.name: row for row in comparison.study(claim.study).rows}
    printed = [rows[name].printed.get(claim.column) for name in (claim.higher, claim.lower)]
    return None if None in printed else printed[0] - printed[1]


# ---- what is said --------------------------------------------------------------------------------


def results() -> list[dict]:
    """Each claim with the difference in the paper (points), ours, and the verdict."""
    found = {claim: SOURCES.get(claim.study, compared_scores)(claim) for claim in CLAIMS}
    ps = {claim: p_of(claim, ours) for claim, ours in found.items()}
    corrected = {}
    for papers_own in (True, False):
        family = [claim for claim in CLAIMS if bool(claim.where) == papers_own]
        corrected |= zip(family, holm([ps[claim] for claim in family]), strict=True)
    return [
        claim._asdict()
        | {"unit": claim.unit.name, "paper": papers(claim)}
        | {
            "ours": ours and in_units(ours, claim.unit),
            "p": ours and ps[claim],
            "p_corrected": ours and corrected[claim],
            "verdict": judged(claim, ours, corrected[claim]) if ours else "not finished",
        }
        for claim, ours in found.items()
    ]


def p_of(claim: Claim, ours: Comparison | None) -> float:
    """p of the claim's own test. 1 while its runs are not finished."""
    if not ours:
        return 1.0
    return at_least(ours)[1] if claim.at_least else ours.p


def judged(claim: Claim, ours: Comparison, corrected: float) -> str:
    """The verdict. corrected: p of the claim's test after `holm`."""
    return (verdict_at_least if claim.at_least else verdict)(ours, corrected)


def in_units(ours: Comparison, unit: Unit) -> dict:
    """A Comparison as a dict, its lengths in what is counted as 1."""
    lengths = ("mean", "error", "low", "high", "mde")
    return {
        name: value / unit.size if name in lengths else value
        for name, value in ours._asdict().items()
    }


def show(found: list[dict]) -> None:
    """A line each, points unless another unit is named."""
    print(
        f"{'':14s}{'claim, and how much higher':65s}{'paper':>6s}   {'verdict':18s}"
        "ours (95 % interval), MDE, p"
    )
    for c in found:
        paper = "-" if c["paper"] is None else f"{c['paper']:+.2f}"
        of, ours = c["ours"], ""
        if of:
            digits = 1 if c["unit"] == POINTS.name else 3
            middle, low, high = (f"{of[x]:+.{digits}f}" for x in ("mean", "low", "high"))
            unit = "" if c["unit"] == POINTS.name else f" {c['unit']}"
            p = "<.001" if c["p"] < 0.0005 else f"{c['p']:.3f}".lstrip("0")
            ours = f"{middle}{unit} ({low} to {high}), {of['mde']:.{digits}f}, {p}"
        print(f"{c['where']:14s}{c['says']:65s}{paper:>6s}   {c['verdict']:18s}{ours}".rstrip())
