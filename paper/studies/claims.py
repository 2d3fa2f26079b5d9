"""The paper's claims that one thing is better than another, beside what our model shows.

A claim holds here if the whole 95 % interval of the difference is on its side, and does not hold if
all of it is on the other; else this many runs of this model cannot tell. That includes a tie:
"matches or exceeds" is only told if it exceeds, or falls short.

Of safety one pair is here: the embedded model refuses nearly all that is harmful after any method.
"""

from typing import NamedTuple

from paper.runs.stats import signed
from paper.studies import comparison
from paper.studies.comparison import Study


class Claim(NamedTuple):
    """That one row of a study scores higher than another."""

    where: str  # in the paper; "": it does not look
    says: str
    study: str
    higher: str
    lower: str
    column: str = "gsm8k"


D, S, CODE = "hellori-d", "hellori-s", "pass@1"
CLAIMS = (
    Claim("4.2, Table 2", "HELLoRA beats full fine-tuning on word problems", "2", "hellora", "fft"),
    Claim("4.2, Table 2", "HELLoRA beats full fine-tuning on code", "2", "hellora", "fft", CODE),
    Claim("4.2, Table 2", "HELLoRA beats LoRA on word problems", "2", "hellora", "lora"),
    Claim("4.2, Table 2", "HELLoRA beats LoRA on code", "2", "hellora", "lora", CODE),
    Claim("4.2, Table 2", "HELLoRA beats LoRA on safety", "2", "hellora", "lora", "refusals"),
    Claim("4.2, Table 2", "HELLoRA beats DoRA on word problems", "2", "hellora", "dora"),
    Claim("4.2, Table 2", "HELLoRA beats DoRA on code", "2", "hellora", "dora", CODE),
    Claim("4.2, Table 2", "HELLoRI-D matches or exceeds LoRI-D on word problems", "2", D, "lori-d"),
    Claim("4.2, Table 2", "HELLoRI-D matches or exceeds LoRI-D on code", "2", D, "lori-d", CODE),
    Claim("4.2, Table 2", "HELLoRI-S matches or exceeds LoRI-S on word problems", "2", S, "lori-s"),
    Claim("4.2, Table 2", "HELLoRI-S matches or exceeds LoRI-S on code", "2", S, "lori-s", CODE),
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
    Claim("4.3, Table 5", "HELLoRI-D: attention and router add to the experts",
          "5", D, f"{D}_pure"),
    Claim("4.3, Table 5", "HELLoRI-D: attention adds to experts and router", "5", D, f"{D}_gate"),
    Claim("4.3, Table 5", "HELLoRI-S: attention and router add to the experts",
          "5", S, f"{S}_pure"),
    Claim("4.3, Table 5", "HELLoRI-S: attention adds to experts and router", "5", S, f"{S}_gate"),
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
)  # fmt: skip


def results() -> list[dict]:
    """Each claim with the difference in the paper (points), ours (shares of 1), and the verdict."""
    known: dict[str, Study] = {name: comparison.study(name) for name in {c.study for c in CLAIMS}}
    found = []
    for claim in CLAIMS:
        rows = {row.name: row for row in known[claim.study].rows}
        higher, lower = rows[claim.higher], rows[claim.lower]
        printed = [row.printed.get(claim.column) for row in (higher, lower)]
        ours = comparison.minus(higher, lower, claim.column)
        paper = None if None in printed else printed[0] - printed[1]
        all_run = ours is not None and ours["runs"] == len(higher.runs[claim.column])
        said = verdict(ours) if all_run else "not finished"
        found.append(claim._asdict() | {"ours": ours, "paper": paper, "verdict": said})
    return found


def verdict(ours: dict) -> str:
    """What the interval of a difference says of the claim that it is positive."""
    if ours["low"] is None:
        return "cannot be told"
    return "holds" if ours["low"] > 0 else "does not hold" if ours["high"] < 0 else "cannot be told"


def show(found: list[dict]) -> None:
    """A line each."""
    print(
        f"{'':13s} {'claim, and how much higher':54s}{'paper':>7s} "
        "   points (95 % interval, p), ahead in"
    )
    for c in found:
        paper = "-" if c["paper"] is None else f"{c['paper']:+.2f}"
        ours = signed(c["ours"], 1, 0.01)
        ours += f", {c['ours']['ahead']} of {c['ours']['runs']}" if c["ours"] else ""
        print(f"{c['where']:13s} {c['says']:54s}{paper:>7s}    {c['verdict']:15s}{ours}".rstrip())
