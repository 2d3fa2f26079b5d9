"""The numbers that the paper prints (HELLoRA, arXiv 2605.18795), and the status of each here.

A Number comes from a table, with the command that gives ours. A Quote comes from the text. Rates,
accuracies and shares are in percent, as in the paper. Of the figures, only numbers in the text are
here: values read off a picture would be guesses. Tables 4 and 5 vary methods, and Table 2 has the
accuracies of the methods themselves.
"""

from collections.abc import Callable
from typing import NamedTuple

OLMOE, MIXTRAL, DEEPSEEK = "olmoe-1b-7b", "mixtral-8x7b", "deepseekmoe-16b"
RANK, ALPHA = 32, 64  # for all adapters, from Table 1


class Status(NamedTuple):
    """Whether a number of the paper is reproduced here."""

    word: str  # reproduced, contradicted, or out of reach
    command: str = ""  # prints our number; {names} are fields of Number
    why: str = ""


RUN = "runs/{backbone}-{task}-{method}-k{k}-s0"
TRAIN = (
    "python train.py --model {backbone} --task {task} --method {method}{mask} --k {k}{all} "
    "--no-eval --out " + RUN
)
# A run is scored on the whole test split, and not on the 500 problems of train.py (--eval-limit).
PROBLEMS = {"gsm8k": 1319}
N_SEEDS = 10  # for each number, from Table 1
TOO_LARGE = "needs the real checkpoint and a GPU (in miniature: docs/tables.md)"
DEFAULT = Status("reproduced", TRAIN, "the default of train.py")
EXACT = Status("reproduced", "python -m paper.reproduce params")
SPEED = Status("out of reach", "python -m paper.bench --shape olmoe", "measured on two A100")


class Number(NamedTuple):
    """A number of a table."""

    table: str
    backbone: str
    method: str  # in hellora.parse_method's notation; "base": not tuned
    k: int  # adapted experts of a layer
    task: str | None  # the task of the tuning; None if the number does not depend on it
    metric: str
    printed: float
    status: Status

    def command(self) -> str:
        """The command for our number. A LoRI-S method takes its mask from the D run beside it."""
        names = self._asdict() | {"mask": "", "all": ""}
        if "-s" in self.method:
            d_run = RUN.format(**names | {"method": self.method.replace("-s", "-d", 1)})
            names["mask"] = f" --mask-from {d_run}"
        if self.task in PROBLEMS:
            names["all"] = f" --eval-limit {PROBLEMS[self.task]}"
        return self.status.command.format(**names)


class Metric(NamedTuple):
    """A column of the tables."""

    task: str | None  # the task of the tuning, if the table does not give it
    status: Status


class Scorer(NamedTuple):
    """The score of a column: the task of the tuning, and the command."""

    task: str
    command: str


CODE = Scorer("code", "python -m paper.eval_humaneval --task humaneval --allow-code-execution")
SCORERS = {
    "gsm8k": Scorer("gsm8k", "python eval_gsm8k.py --task gsm8k"),
    "pass@1": CODE,
    "pass@5": CODE,
    "pass@10": CODE,
    "refusals": Scorer("safety", "python -m paper.eval_safety --task safety"),
}
RECIPE = ("lr", "epochs", "batch_size", "rank", "alpha")
METRICS = {
    **dict.fromkeys(RECIPE, Metric(None, DEFAULT)),
    "params": Metric(None, EXACT),  # trained / stored; both count the adapters
    "samples/s": Metric("gsm8k", SPEED),
    **{
        name: Metric(
            by.task, Status("out of reach", f"{TRAIN} && {by.command} --run {RUN}", TOO_LARGE)
        )
        for name, by in SCORERS.items()
    },
}
OVERRIDES = {  # (table, method, k, metric) -> a status that replaces the metric's
    ("2", "dora", 64, "params"): Status(
        "contradicted",
        EXACT.command,
        "4.3504 without the router: they left DoRA off it, or rounded",
    ),
    ("7", "hellora", 8, "samples/s"): Status(
        "contradicted", SPEED.command, "Table 6 has 19.08 for the same run"
    ),
    **{
        ("8", "base", 0, name): Status(
            "out of reach", f"{by.command} --model {{backbone}}", TOO_LARGE
        )
        for name, by in SCORERS.items()
    },
}


class Table(NamedTuple):
    """A table of the paper, or the part of it that was tuned on one task."""

    number: str
    columns: tuple[str, ...]  # of METRICS
    # (method, k) -> values. None: the cell is empty, or the value is not known.
    rows: dict[tuple[str, int], tuple[float | None, ...]]
    backbone: str = OLMOE
    task: str | None = None  # None: each column has its own; "": not tuned

    def printed(self, method: str, k: int) -> dict[str, float]:
        """{column: value} of a row, or {} if there is no such row."""
        values = self.rows.get((method, k), (None,) * len(self.columns))
        return {c: v for c, v in zip(self.columns, values, strict=True) if v is not None}


SCORES = tuple(SCORERS)
UNKNOWN = (None,) * len(SCORES)
TABLES = (
    *(
        # "hellora" stands for all methods with adapters.
        Table("1", RECIPE, {("fft", 64): full, ("hellora", 8): adapters}, task=task)
        for task, full, adapters in (
            ("gsm8k", (4e-5, 3, 256, None, None), (4e-4, 3, 128, 32, 64)),
            ("code", (2e-4, 2, 256, None, None), (2e-3, 2, 128, 32, 64)),
            ("safety", (2e-5, 1, 256, None, None), (4e-4, 1, 128, 32, 64)),
        )
    ),
    Table("2", ("params", *SCORES), {
        ("fft", 64): (100.0, 27.64, 16.40, 21.04, 22.38, 97.32),
        ("lora", 64): (4.300, 26.37, 16.52, 21.80, 24.03, 98.75),
        ("dora", 64): (4.350, 26.82, 16.72, 21.93, 23.68, 98.86),
        ("lori-d", 64): (1.900, 28.22, 16.98, 21.85, 23.75, 96.56),
        ("lori-s", 64): (0.190, 25.49, 16.46, 20.22, 22.37, 98.44),
        ("hellora", 8): (0.700, 29.49, 17.87, 22.04, 23.82, 99.06),
        ("hellori-d", 8): (0.300, 28.42, 16.89, 20.89, 22.21, 98.75),
        ("hellori-s", 8): (0.030, 25.10, 16.22, 20.27, 21.76, 97.50),
    }),
    Table("3", ("params", "gsm8k"), {
        ("lora", 8): (1.03, 67.73),
        ("lori-d", 8): (0.59, 64.84),
        ("lori-s", 8): (0.06, 63.98),
        ("hellora", 2): (0.31, 68.28),
        ("hellori-d", 2): (0.17, 64.61),
        ("hellori-s", 2): (0.02, 66.17),
    }, MIXTRAL),
    Table("4", ("params", "gsm8k"), {
        ("hellora", 8): (0.700, None),
        ("hellori-d", 8): (0.300, None),
        ("hellori-s", 8): (0.030, None),
        ("hellora_m", 8): (None, 28.51),
        ("hellori-d_m", 8): (None, 23.14),
        ("hellori-s_m", 8): (None, 23.14),
        ("hellora_c", 8): (None, 25.88),
        ("hellori-d_c", 8): (None, 25.19),
        ("hellori-s_c", 8): (None, 23.04),
    }),
    Table("5", ("params", *SCORES), {
        ("hellora", 8): (0.700, *UNKNOWN),
        ("hellori-d", 8): (0.300, *UNKNOWN),
        ("hellori-s", 8): (0.030, *UNKNOWN),
        ("hellora_pure", 8): (0.543, 26.46, 17.07, 21.19, 22.78, 98.43),
        ("hellori-d_pure", 8): (0.241, 23.24, 17.07, 20.38, 21.89, 91.25),
        ("hellori-s_pure", 8): (0.020, 23.44, 16.15, 20.82, 22.29, 97.81),
        ("hellora_gate", 8): (0.558, 28.03, 17.09, 21.86, 23.28, 97.50),
        ("hellori-d_gate", 8): (0.242, 23.53, 16.95, 21.80, 23.17, 90.32),
        ("hellori-s_gate", 8): (0.020, 23.44, 16.06, 21.17, 22.73, 96.56),
    }),
    Table("6", ("samples/s",), {
        ("lora", 64): (10.44,), ("lora_pure", 64): (10.01,), ("lora_gate", 64): (11.97,),
        ("lori-d", 64): (10.65,), ("lori-d_pure", 64): (10.95,), ("lori-d_gate", 64): (10.98,),
        ("lori-s", 64): (10.00,), ("lori-s_pure", 64): (10.77,), ("lori-s_gate", 64): (10.91,),
        ("hellora", 8): (19.08,), ("hellora_pure", 8): (19.60,), ("hellora_gate", 8): (19.20,),
        ("hellori-d", 8): (19.11,), ("hellori-d_pure", 8): (18.41,),
        ("hellori-d_gate", 8): (19.03,),
        ("hellori-s", 8): (19.07,), ("hellori-s_pure", 8): (19.45,),
        ("hellori-s_gate", 8): (19.02,),
    }),
    # The paper has swapped the labels of the last two rows.
    Table("7", ("params", "gsm8k", "samples/s"), {
        ("hellora", 2): (0.27, 26.72, 20.99),
        ("hellora", 4): (0.41, 26.97, 20.98),
        ("hellora", 8): (0.68, 29.49, 20.08),
        ("hellora", 16): (1.21, 29.69, 16.49),
    }),
    # We take Table 8's model to be HELLoRA with k = 8.
    Table("8", SCORES, {("base", 0): (1.66, 13.41, 16.81, 18.17, 66.75)}, task=""),
    Table("8", SCORES, {("hellora", 8): (None, 13.78, 18.94, 20.63, 58.43)}, task="gsm8k"),
    Table("8", SCORES, {("hellora", 8): (5.86, None, None, None, 63.01)}, task="code"),
    Table("8", SCORES, {("hellora", 8): (2.83, 15.18, 19.51, 21.33, None)}, task="safety"),
)  # fmt: skip


def numbers() -> list[Number]:
    """All numbers of TABLES, in the same order."""
    found = []
    for table in TABLES:
        for method, k in table.rows:
            for metric, value in table.printed(method, k).items():
                task = METRICS[metric].task if table.task is None else table.task
                status = OVERRIDES.get((table.number, method, k, metric), METRICS[metric].status)
                found.append(
                    Number(table.number, table.backbone, method, k, task, metric, value, status)
                )
    return found


NUMBERS = numbers()


def printed(table: str, method: str, metric: str) -> float:
    """The number that the paper prints. Raises ValueError if there is none, or two that differ."""
    (value,) = {
        c.printed for c in NUMBERS if (c.table, c.method, c.metric) == (table, method, metric)
    }
    return value


def ratio(table: str, method: str, below: str, metric: str) -> float:
    """The number of `method`, divided by the number of `below`."""
    return printed(table, method, metric) / printed(table, below, metric)


def wins(method: str, over: str) -> int:
    """The number of Table 2's scores on which `method` matches or exceeds `over`."""
    return sum(ratio("2", method, over, metric) >= 1 for metric in SCORES)


class Quote(NamedTuple):
    """A number of the paper's text or figures."""

    where: str
    says: str
    value: float
    status: Status
    # The value that the paper's own tables give, if they give one.
    from_tables: Callable[[], float] | None = None


PARAMS, FLOPS, REPORT = (
    f"python -m {name}"
    for name in ("paper.reproduce params", "paper.reproduce flops", "tiny.report")
)
TEXT = (
    Quote("abstract", "OLMoE: HELLoRA's trained parameters, percent of LoRA's", 15.74,
          Status("reproduced", PARAMS,
                 "as a ratio of unrounded percents (of the counts it is 15.16)")),
    Quote("abstract", "OLMoE: HELLoRI-S's trained parameters, percent of LoRA's", 0.7,
          Status("reproduced", PARAMS), lambda: 100 * ratio("2", "hellori-s", "lora", "params")),
    Quote("abstract", "DeepSeekMoE: HELLoRA's trained parameters, percent of LoRA's", 23.2,
          Status("reproduced", PARAMS,
                 "as a ratio of percents, if k is 12 (of the counts it is 22.60)")),
    Quote("introduction", "fewer trained parameters than LoRA, percent, up to", 85,
          Status("reproduced", PARAMS)),
    Quote("abstract", "fewer adapter FLOPs than LoRA, percent", 38.7,
          Status("out of reach", FLOPS, "it rests on the share of visits to hot experts on GSM8K")),
    Quote("abstract", "more samples a second than LoRA, percent", 88.80,
          Status("contradicted", SPEED.command, "Table 6 gives less"),
          lambda: 100 * (ratio("6", "hellora", "lora", "samples/s") - 1)),
    Quote("section 4.4", "samples a second, times LoRA's", 1.62,
          Status("contradicted", SPEED.command,
                 "about 1.888 / 1.16: as above, with 16 % for the catcher"),
          lambda: ratio("6", "hellora", "lora", "samples/s")),
    Quote("section 4.4", "samples a second, times full fine-tuning's", 3.5,
          Status("out of reach", SPEED.command, "and at two batch sizes, those of Table 1")),
    Quote("abstract", "accuracy above LoRA's, percent", 9.24,
          Status("contradicted", "",
                 "follows from no table: on GSM8K it is more, on all else less"),
          lambda: 100 * (ratio("2", "hellora", "lora", "gsm8k") - 1)),
    Quote("section 4", "HELLoRA outperforms LoRA: on how many of Table 2's five scores", 5,
          Status("contradicted", "", "not on pass@10"), lambda: wins("hellora", "lora")),
    Quote("section 4", "HELLoRI-D matches or exceeds LoRI-D: on how many", 5,
          Status("contradicted", "", "not on code"), lambda: wins("hellori-d", "lori-d")),
    Quote("section 4", "HELLoRI-S matches or exceeds LoRI-S: on how many", 5,
          Status("contradicted", "", "on pass@5 alone"), lambda: wins("hellori-s", "lori-s")),
    Quote("Eq. 1", "least value of the balancing loss", 1,
          Status("contradicted", "python -m paper.walkthrough",
                 "f sums over the K choices, so it is K")),
    Quote("Figure 1", "OLMoE, layer 7: visits to the hottest 8 experts, percent, more than", 50,
          Status("out of reach", REPORT,
                 "needs the real checkpoint (the command counts the tiny one)")),
    Quote("Figure 3", "OLMoE: layers of 16 where 10 % of the data give the hot 8 of all data", 11,
          Status("out of reach", REPORT,
                 "as above (in the other 5 layers one expert of 8 differs)")),
)  # fmt: skip
# Number -> content. The text gives no values of the figures, except those in TEXT and Table 6.
FIGURES = {
    "1": "share of visits by expert and layer",
    "3": "Jaccard overlap of hot experts by layer",
    "4": "hot experts by layer and task (its caption and the text name different layers)",
    "5": "samples a second",
    "6": "as 4 (it names a layer 32, but Mixtral has 32 and counts from 0)",
}
DRAWN = Status("out of reach", "python -m paper.figures", "drawn for the embedded model")
