"""The paper's tables and further ones: rows of runs, their spread, and their differences.

In miniature the embedded model stands for OLMoE-1B-7B, and its tasks for the paper's tasks. The
runs of a row differ in their seed. In one study they also differ in the base. Two rows are compared
run by run: each run with the run of the same base and seed. The interval is over seeds. With
several bases it is over bases, each with its mean over seeds. Another base can reverse a
difference, and seeds of one base cannot show that.
"""

from collections.abc import Iterable
from functools import cache
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from hellora import adapter_flops
from moe_model import MoEModel
from paper.plan import shapes
from paper.runs import rates
from paper.runs.grid import BASES, MODEL, Base, Cell, Wanted, saved, score_of
from paper.runs.stats import aligned, short_p, spread
from paper.studies import tables
from plumbing.checkpoint import BACKBONES, locate, read_config

Columns = dict[str, tuple[str, str]]  # a table's column -> (score, task)


def columns(math: str, code: str, safety: str) -> Columns:
    """The columns of the paper, scored on these tasks."""
    passes = {column: (column, code) for column in ("pass@1", "pass@5", "pass@10")}
    return {"gsm8k": ("accuracy", math), **passes, "refusals": ("refusal_rate", safety)}


OURS = {"gsm8k": "tiny-math", "code": "tiny-code", "safety": "tiny-safety"}  # paper's task -> ours
# The paper has no column "harmless".
COLUMNS = columns(*OURS.values()) | {"harmless": ("harmless_refused", OURS["safety"])}
TRAINED_ON = {column: scorer.task for column, scorer in tables.SCORERS.items()} | {
    "harmless": "safety"
}
ALL = 64  # tables.Number.k if all of OLMoE's experts are adapted


class Row(NamedTuple):
    """One line of a table."""

    name: str
    runs: dict[str, list[Cell]]  # column -> the runs behind its mean
    against: str | None = None  # the name of the row that it is compared with
    printed: dict[str, float] = {}  # column -> the paper's number
    columns: Columns = COLUMNS


class Study(NamedTuple):
    """A table."""

    title: str
    rows: list[Row]

    def wanted(self) -> Wanted:
        """The runs of the table, and the tasks to score them on."""
        cells: Wanted = {}
        for row in self.rows:
            for column, runs in row.runs.items():
                for run in runs:
                    cells.setdefault(run, set()).add(row.columns[column][1])
        return cells


# ---- the paper's tables --------------------------------------------------------------------------

N_SEEDS = {  # table -> the number of seeds of each column
    "2": dict.fromkeys(COLUMNS, 5),
    "4": {"gsm8k": 5},
    "5": {"gsm8k": 3},  # HELLoRA is near 100 % on the other two tasks
    "7": {"gsm8k": 3},
    "8": dict.fromkeys(COLUMNS, 3),
}
TITLES = {
    "2": "every method",
    "3": "Mixtral-8x7B",
    "4": "hot experts of each layer, of the whole model (_m), the coldest (_c)",
    "5": "adapters on experts alone (_pure), on experts and router (_gate)",
    "7": "adapted experts of a layer",
    "8": "tuned on one task, scored on all",
}


class Scale(NamedTuple):
    """The models and tasks on which the paper's tables are run."""

    says: str  # the words for it in a title
    tasks: dict[str, str]  # the paper's task -> the task to train on
    columns: Columns
    seeds: dict[str, dict[str, int]]  # table -> the number of seeds of each column
    models: dict[str, str]  # the paper's backbone -> the value of --model
    settings: dict = {}  # more settings of all cells
    every: int = ALL  # k of the runs that adapt all experts; it is only a part of their name


TINY = Scale(" in miniature", OURS, COLUMNS, N_SEEDS, {tables.OLMOE: MODEL}, every=8)


def paper_scale(
    model: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    seeds: int | None = None,
) -> Scale:
    """The paper's backbones, data sets and recipe, or a trial with others (see grid.Cell).

    Raises FileNotFoundError if a folder does not exist, or has no checkpoint.
    """
    for flag, folder in (("--model", model), ("--data", data)):
        if folder and not folder.is_dir():
            raise FileNotFoundError(f"{flag} {folder}: there is no such folder")
    if model and not (model / "config.json").exists():
        raise FileNotFoundError(
            f"--model {model}: it has no config.json, want a checkpoint's folder"
        )
    seeds = seeds or (1 if limit else tables.N_SEEDS)
    scored = {t.number: [c for c in t.columns if c in tables.SCORERS] for t in tables.TABLES}
    return Scale(
        ", a trial: not the paper's model and data" if model or data or limit else "",
        {task: task for task in OURS},
        columns("gsm8k", "humaneval", "safety"),
        {number: dict.fromkeys(names, seeds) for number, names in scored.items() if names},
        {name: str(model.resolve()) if model else name for name in (tables.OLMOE, tables.MIXTRAL)},
        {"data": data and str(data.resolve()), "limit": limit},
    )


def against(method: str, k: int, main: int = 8) -> tuple[str, int] | None:
    """The (method, k) to compare with: the method without its suffix, or HELLoRA, k = `main`."""
    if "_" in method:
        return method.rpartition("_")[0], k
    return None if (method, k) == ("hellora", main) else ("hellora", main)


def paper_table(number: str, scale: Scale) -> Study:
    """One of the paper's tables of scores.

    A row of OLMoE-1B-7B may lack numbers. They are taken from Table 2.
    """
    rows = []
    table_2 = next(table for table in tables.TABLES if table.number == "2")
    for table in tables.TABLES:
        if table.number == number and table.backbone in scale.models:
            names = {
                (m, k): row_name(number, m, k, scale.tasks.get(table.task)) for m, k in table.rows
            }
            for method, k in table.rows:
                own = {
                    column: runs(table, method, k, column, scale) for column in scale.seeds[number]
                }
                other = names.get(against(method, k, 2 if table.backbone == tables.MIXTRAL else 8))
                printed = table_2.printed(method, k) | table.printed(method, k)
                rows.append(Row(names[method, k], own, other, printed, scale.columns))
    return Study(f"Table {number}{scale.says}: {TITLES[number]}", rows)


def row_name(number: str, method: str, k: int, task: str | None) -> str:
    """The name of a row: the setting in which the rows of its table differ."""
    if number == "8":
        return f"after {task}" if task else "before"
    return f"{method}, k = {k}" if number == "7" else method


def runs(table: tables.Table, method: str, k: int, column: str, scale: Scale) -> list[Cell]:
    """The runs for a number of the paper: one for each seed, or the model before training."""
    which = {"model": scale.models[table.backbone], **scale.settings}
    if method == "base":
        return [Base(**which)]
    which |= {"task": scale.tasks[table.task or TRAINED_ON[column]]}
    which |= {"k": scale.every if k == ALL else k}
    return [rates.cell(method, seed, **which) for seed in range(scale.seeds[table.number][column])]


# ---- comparisons that the paper does not have ----------------------------------------------------


def rows_of(
    names: dict[str, tuple[str | None, dict]], seeds: int, models: Iterable[str] = (MODEL,)
) -> list[Row]:
    """Rows of runs on tiny-math.

    names: name -> (the row that it is compared with, settings of rates.cell).
    """
    return [
        Row(
            name,
            {
                "gsm8k": [
                    rates.cell(**setting, seed=s, model=m) for m in models for s in range(seeds)
                ]
            },
            other,
        )
        for name, (other, setting) in names.items()
    ]


def plain(*names: str) -> dict[str, tuple[str | None, dict]]:
    """Methods under their own names. Each is compared with the method without its last suffix."""
    return {name: (name.rpartition("_")[0] or None, {"method": name}) for name in names}


def hellora(*flags: str, k: int = 8) -> dict:
    """The settings of HELLoRA with more flags."""
    return {"method": "hellora", "k": k, "flags": flags}


# name -> (title, the argument `names` of rows_of, the number of seeds, the bases if not MODEL)
OTHERS = {
    "bases": (
        "hot, cold, random and no experts, with or without attention and router, "
        "from three bases",
        plain(*(f"hellora{s}" for s in ("", "_c", "_r", "_none", "_pure", "_pure_c", "_pure_r"))),
        2,
        (MODEL, f"{BASES}1", f"{BASES}2"),
    ),
    "coverage": (
        "the same k in each layer, or as many experts as get a share P of its visits",
        {
            "k = 8": (None, hellora()),
            "P = 0.25": ("k = 8", hellora("--coverage", "0.25")),
            "P = 0.4": ("k = 8", hellora("--coverage", "0.4")),
            "P = 0.6": ("k = 8", hellora("--coverage", "0.6")),
            "k = 16, of the base": ("k = 8", hellora("--catcher", "forward", k=16)),  # MoE-Sieve
        },
        3,
    ),
    "lists": (
        "hot by the visits of a warm-up, by those of the base, by the mean routing weight",
        {
            "warm-up, visits": (None, hellora()),
            "base, visits": ("warm-up, visits", hellora("--catcher", "forward")),
            "warm-up, weight": ("warm-up, visits", hellora("--score", "gate")),
        },
        3,
    ),
}  # fmt: skip


# Rows with these words are left out by --quick.
NOT_QUICK = ("hellori", "_gate", "_r", "k = 4", "k = 16", "P = 0.25", "P = 0.6", "weight")


def study(name: str, quick: bool = False, scale: Scale = TINY) -> Study:
    """The study of that name, or the paper's table of that number at this scale.

    quick: one seed of one base, on word problems alone (Table 8: all tasks). Outside Table 2, the
    rows of NOT_QUICK are left out.
    """
    if name in scale.seeds:
        full = paper_table(name, scale)
    else:
        title, names, *how = OTHERS[name]
        full = Study(title, rows_of(names, *how))
    if not quick:
        return full
    columns = COLUMNS if name == "8" else ("gsm8k",)
    rows = [
        row._replace(runs={column: row.runs[column][:1] for column in columns})
        for row in full.rows
        if name == "2" or not any(words in row.name for words in NOT_QUICK)
    ]
    return Study(f"{full.title} (quick: the first run of each)", rows)


# ---- results -------------------------------------------------------------------------------------


def score(cell: Cell, column: tuple[str, str]) -> float | None:
    """The kept score of a cell. column: (score, task). None if it has not been run."""
    return score_of(saved(cell), *column)


def units(values: dict[Cell, float], planned: list[Cell]) -> list[float]:
    """The numbers behind an interval: a value per seed, or, with several bases, a mean per base."""
    bases = {model: list(cells) for model, cells in groupby(planned, key=lambda cell: cell.model)}
    if len(bases) == 1:
        return list(values.values())
    return [mean(map(values.get, cells)) for cells in bases.values() if values.keys() >= set(cells)]


def minus(row: Row, other: Row, column: str) -> dict | None:
    """The mean difference of two rows, run by run, with its spread, and how often `row` is ahead.

    None if too few runs are finished. Raises ValueError if two runs on one base started from
    different weights.
    """
    planned, wanted = row.runs[column], row.columns[column]
    differences, started = {}, {}
    for a, b in zip(planned, other.runs[column], strict=True):
        ours, theirs = score(a, wanted), score(b, wanted)
        if None not in (ours, theirs):
            for cell in (a, b):
                first = started.setdefault(cell.model, cell)
                if saved(first)["hashes"]["model"] != saved(cell)["hashes"]["model"]:
                    names = f"{first.name} and {cell.name}"
                    raise ValueError(f"{names} started from different weights: run both again here")
            differences[a] = ours - theirs
    values = units(differences, planned)
    ahead = sum(difference > 0 for difference in differences.values())
    if not values:
        return None
    return {"row": other.name, "runs": len(differences), "ahead": ahead, **spread(values)._asdict()}


@cache
def with_adapters(model: str, method: str) -> MoEModel:
    """A cell's model with a method's adapters, as shapes. All tiny bases have the same shapes."""
    source = MODEL if model.startswith(BASES) else model
    cfg = BACKBONES[model].cfg if model in BACKBONES else read_config(locate(source))
    return shapes(cfg, method, 1)


def cost(cell: Cell, shown: dict) -> float:
    """The FLOPs of a run's adapters, as a share of those of LoRA on all experts."""
    lora = with_adapters(cell.model, "lora")
    everywhere = dict.fromkeys(lora.cfg.moe_layers, 1.0)
    shares = {int(layer): share for layer, share in shown.get("hot_share", {}).items()}
    ours = adapter_flops(with_adapters(cell.model, shown["method"]), shares or everywhere)
    return ours / adapter_flops(lora, everywhere)


def facts(cells: list[Cell]) -> dict:
    """The trained parameters, the hot experts' mean share of visits, and the adapters' FLOPs."""
    kept = {cell: shown for cell in cells if "trained" in (shown := saved(cell))}
    shares = [
        mean(shown["hot_share"].values()) for shown in kept.values() if shown.get("hot_share")
    ]
    trained = sorted(shown["trained"] for shown in kept.values())
    return {
        "trained": trained[len(trained) // 2] if trained else None,
        "hot_share": mean(shares) if shares else None,
        "flops": mean(cost(cell, shown) for cell, shown in kept.items()) if kept else None,
    }


def entry(row: Row, other: Row | None, column: str) -> dict:
    """A number: its runs, their spread, the difference from another row, the paper's number."""
    wanted = row.columns[column]
    ours = {cell: value for cell in row.runs[column] if (value := score(cell, wanted)) is not None}
    values = units(ours, row.runs[column])
    return {
        **facts(row.runs[column]),
        "runs": list(ours.values()),
        "paper": row.printed.get(column),
        **(spread(values)._asdict() if values else {}),
        "minus": minus(row, other, column) if other else None,
    }


def results(table: Study) -> dict:
    """The table as far as its runs are finished."""
    named = {row.name: row for row in table.rows}
    return {
        "title": table.title,
        "columns": {column: row.columns[column] for row in table.rows for column in row.runs},
        "rows": {
            row.name: {column: entry(row, named.get(row.against), column) for column in row.runs}
            for row in table.rows
        },
    }


HEAD = ["", "trained", "hot", "FLOPs", "n", "mean", "sd", "+-", "diff", "+-", "p", "from", "paper"]
LEGEND = """\
hot: share of visits to adapted experts. FLOPs: of the adapters (LoRA on all experts: 1). n: runs.
sd: standard deviation. +-: half of the 95 % interval of the number before it.
diff: difference in points from the row named in "from", with its p."""


def show(found: dict) -> None:
    """Print a block for each column: percent, points, 95 % intervals."""
    print(found["title"], LEGEND, sep="\n")
    for column, (score, task) in found["columns"].items():
        print(f"\n{score} on {task}, %")
        rows = [cells(name, row[column]) for name, row in found["rows"].items()]
        print(*aligned([HEAD, *rows], left=(0, HEAD.index("from"))), sep="\n")


def cells(name: str, number: dict) -> list[str]:
    """A row of one column, as HEAD has it."""
    apart = number["minus"] or {}
    return [
        name,
        shown(number["trained"], ",d") or "-",
        shown(number["hot_share"], ".3f") or "-",
        shown(number["flops"] or None, ".2f") or "-",
        str(len(number["runs"])),
        percent(number.get("mean")),
        percent(number.get("std")),
        percent(reach(number)),
        percent(apart.get("mean"), "+.1f"),
        percent(reach(apart)),
        "" if apart.get("p") is None else short_p(apart["p"]),
        apart.get("row", ""),
        shown(number["paper"], ".2f"),
    ]


def reach(result: dict) -> float | None:
    """Half of a Spread's 95 % interval. None if it has no interval."""
    return None if result.get("low") is None else result["high"] - result["mean"]


def shown(value: float | None, pattern: str) -> str:
    """A number as text. "" for None."""
    return "" if value is None else format(value, pattern)


def percent(share: float | None, pattern: str = ".1f") -> str:
    """A share as a text in percent, or a difference of shares in points. "" for None."""
    return "" if share is None else format(100 * share, pattern)
