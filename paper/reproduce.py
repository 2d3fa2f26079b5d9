"""The paper's numbers beside ours.

    python -m paper.reproduce params         trained parameters in Tables 2 to 5 and 7, no weights
    python -m paper.reproduce flops          adapter FLOPs per token, by formula and as counted
    python -m paper.reproduce --table 4      a table on the embedded model, over seeds
    python -m paper.reproduce --table 4 --scale paper               on the paper's models and data
    python -m paper.reproduce --table all --scale paper --limit 64  a trial of all commands
    python -m paper.reproduce bases          hot, cold, random experts (also: coverage, lists)
    python -m paper.reproduce placement --scale paper               the same on OLMoE and GSM8K
    python -m paper.reproduce placement      do hot experts matter? (its plan: studies/placement.md)
    python -m paper.reproduce mechanism      what hot, cold, no and all experts change elsewhere
    python -m paper.reproduce methods        each method's learning rate, chosen on dev problems
    python -m paper.reproduce claims         the paper's claims, tested on finished runs
    python -m paper.reproduce routing        how uneven OLMoE's real routing is, beside ours
    python -m paper.reproduce text           the numbers of the paper's text, and their status here
    python -m paper.reproduce forgetting     how much of its pretraining a tuned model forgets
    python -m paper.reproduce merge          adapters of two tasks merged: what each task keeps
    python -m paper.reproduce stability      hot lists over samples, seeds and training
    python -m paper.reproduce all --dry-run  all missing runs, and how long they take

Finished runs are kept in docs/results/cells/ and are not run again. A stopped command continues
when it is given again.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.reproduce, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from catcher import Catcher, visited_share
from hellora import adapter_flops, attach, count_params, init_adapters, parse_method
from moe_model import MoEModel
from paper.plan import shapes
from paper.runs import rates
from paper.runs.grid import Wanted, commands, missing, run_cells
from paper.studies import (
    claims,
    comparison,
    forgetting,
    mechanism,
    merging,
    placement,
    placement_runs,
    routing,
    stability,
    tables,
)
from plumbing.checkpoint import BACKBONES, parse_config
from plumbing.cli import COUNT, SHARE, Parser, command

SMALL = {  # config.json of the model whose FLOPs are counted
    "model_type": "olmoe", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 16, "num_experts_per_tok": 4,
}  # fmt: skip

TRIAL = """The paper's models, data and recipe, on a GPU with enough memory. --model, --data and
--limit are for a trial. Its runs and results stay in runs/trials/. The files of --data:
TASK-train.SUFFIX (gsm8k, code, safety) and TASK-test.SUFFIX (gsm8k, humaneval, safety). For safety,
HEx-PHI is gated: it needs a token, or such a file."""

FIELDS = ("table", "backbone", "method", "k", "printed", "note")
# All percents of parameters that the paper prints, and two that it gives only as a ratio.
PERCENTS = [
    *(
        (c.table, c.backbone, c.method, c.k, c.printed, c.status.why)
        for c in tables.NUMBERS
        if c.metric == "params"
    ),
    ("abstract", tables.DEEPSEEK, "lora", 64, None, "the paper prints only the ratio, 23.2 %"),
    ("abstract", tables.DEEPSEEK, "hellora", 12, None, "k = 12 is our reading (choices.md)"),
]


@cache  # tables repeat rows
def sizes(backbone: str, method: str, k: int) -> dict[str, int]:
    """How many numbers are trained, and how many are stored."""
    model = shapes(BACKBONES[backbone].cfg, method, k)
    return dict(zip(("trained", "stored"), count_params(model, parse_method(method)), strict=True))


def params() -> list[dict]:
    """The rows of PERCENTS with our counts. percent: trained / stored (both count adapters)."""
    rows = [dict(zip(FIELDS, cell, strict=True)) for cell in PERCENTS]
    rows = [row | sizes(row["backbone"], row["method"], row["k"]) for row in rows]
    return [row | {"percent": 100 * row["trained"] / row["stored"]} for row in rows]


def show_params(rows: list[dict]) -> None:
    """Print a table, and two ratios. The paper does not say which of the two it means."""
    head = ("table", 9), ("backbone", 16), ("method", 14)
    print(
        "".join(f"{name:{width}s}" for name, width in head)
        + "  k        trained         stored    ours %  paper %"
    )
    for r in rows:
        printed = "-" if r["printed"] is None else f"{r['printed']:.3f}"
        print(
            f"{r['table']:9s}{r['backbone']:16s}{r['method']:14s}{r['k']:3d}{r['trained']:15,}{r['stored']:15,}"
            f"{r['percent']:9.4f}{printed:>9s}  {r['note']}"
        )
    for backbone, k in (("olmoe-1b-7b", 8), ("mixtral-8x7b", 2), ("deepseekmoe-16b", 12)):
        by_method = {
            r["method"]: r
            for r in rows
            if r["backbone"] == backbone and (r["k"] == k or r["method"] == "lora")
        }
        hot, lora = by_method["hellora"], by_method["lora"]
        percents, counts = (hot[x] / lora[x] for x in ("percent", "trained"))
        print(
            f"{backbone}: HELLoRA / LoRA {percents:.2%} as "
            f"a ratio of percents, {counts:.2%} of counts"
        )


def measured_flops(model: MoEModel, tokens: torch.Tensor) -> int:
    """torch's count for a forward pass with looped_mm. It has no formula for grouped_mm."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    return counter.get_total_flops()


def flops(share: float) -> dict:
    """Adapter FLOPs per token, by formula for OLMoE-1B-7B, and also counted for a small model."""
    cfg = BACKBONES[tables.OLMOE].cfg
    paper = shapes(cfg, "hellora", 8)  # with a share of 1 each visit meets an adapter, as in LoRA
    everywhere, hot = (adapter_flops(paper, dict.fromkeys(cfg.moe_layers, s)) for s in (1.0, share))

    torch.manual_seed(0)
    cfg = parse_config(SMALL)
    tokens = torch.randint(0, cfg.vocab_size, (4, 64))
    model = MoEModel(cfg, matmul="loop").requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    base = measured_flops(model, tokens)
    adapted = {i: list(range(8)) for i in cfg.moe_layers}
    attach(model, parse_method("hellora"), adapted, 8, 16)
    init_adapters(model, 0)
    visits = Catcher(cfg.n_experts)
    visits.add(model.trunk(tokens)[1], torch.ones(tokens.shape, dtype=torch.bool))
    shares = visited_share(visits.scores("count"), adapted)
    counted = (measured_flops(model, tokens) - base) / tokens.numel()
    return {
        "share": share,
        "olmoe_lora": everywhere,
        "olmoe_hellora": hot,
        "saved": 1 - hot / everywhere,
        "small_formula": adapter_flops(model, shares),
        "small_counted": counted,
    }


def show_flops(row: dict) -> None:
    """Print the numbers of the formula, and the difference of the counted ones."""
    print(f"OLMoE-1B-7B, r = 32, forward pass of a token: LoRA {row['olmoe_lora'] / 1e6:.2f} MFLOP")
    print(
        f"  HELLoRA, k = 8, hot share {row['share']:.4f}: {row['olmoe_hellora'] / 1e6:.2f} MFLOP, "
        f"{row['saved']:.1%} less (the paper says 38.7 %, which is a share of 0.5159)"
    )
    off = row["small_counted"] / row["small_formula"] - 1
    print(
        f"a small random model: {row['small_formula']:,.0f} FLOPs by formula, "
        f"{row['small_counted']:,.0f} as "
        f"counted by torch ({off:+.2%})"
    )


def show_printed(numbers: list[dict]) -> None:
    """Print a table of the paper without a miniature: numbers, their status, commands."""
    for c in numbers:
        row = f"{c['backbone']} {c['method']} k={c['k']}" + (
            f" on {c['task']}" if c["task"] else ""
        )
        print(
            f"{row:46s} {c['metric']:11s}{c['printed']:9g}  {c['status'].word}: {c['status'].why}"
        )
    print("by:", *sorted({f"  {c['command']}" for c in numbers}), sep="\n")


def text() -> list[dict]:
    """The numbers of the paper's text, and its figures, each with its status here."""
    quoted = [(c.where, c.says, c.value, c.status) for c in tables.TEXT]
    drawn = [(f"Figure {n}", says, None, tables.DRAWN) for n, says in tables.FIGURES.items()]
    return [
        {"where": where, "says": says, "value": value, **status._asdict()}
        for where, says, value, status in quoted + drawn
    ]


def show_text(rows: list[dict]) -> None:
    """Print what the paper says, the status here, and the command that shows it, if any."""
    for r in rows:
        value = "" if r["value"] is None else f": {r['value']:g}"
        print(f"{r['where']}: {r['says']}{value}")
        print("    " + ": ".join(filter(None, (r["word"], r["why"]))))
        if r["command"]:
            print(f"    {r['command']}")


class Part(NamedTuple):
    """A part of the command: the runs that it needs, its results, and how they are shown."""

    wanted: Callable[[], Wanted]
    results: Callable[[], Any]
    show: Callable[[Any], None]


MODULES = {  # the parts that have a file of their own
    "methods": rates, "placement": placement, "mechanism": mechanism,
    "forgetting": forgetting, "merge": merging, "stability": stability,
}  # fmt: skip


def scale(args: argparse.Namespace) -> comparison.Scale:
    """The scale of the paper's tables. Raises ValueError for flags that do not go with it."""
    trial = {name: getattr(args, name) for name in ("model", "data", "limit", "seeds")}
    if args.what == "placement":
        if given := [f"--{name}" for name, value in trial.items() if value]:
            raise ValueError(f"{', '.join(given)}: only for the paper's tables, omit it")
        return comparison.TINY  # the placement study has its own scale
    if args.scale == "paper":
        if not args.table:
            raise ValueError(
                "--scale paper is for the paper's tables and the placement study: "
                "want --table N, --table all or placement with it"
            )
        return comparison.paper_scale(**trial)
    if given := [f"--{name}" for name, value in trial.items() if value]:
        raise ValueError(f"{', '.join(given)}: only with --scale paper, add that")
    return comparison.TINY


def study_part(name: str, quick: bool, on: comparison.Scale = comparison.TINY) -> Part:
    """A table of studies/comparison.py. In miniature, Table 8 also shows overlaps."""
    study = comparison.study(name, quick, on)
    if name != "8" or quick or on is not comparison.TINY:
        return Part(study.wanted, lambda: comparison.results(study), comparison.show)
    return Part(
        study.wanted,
        lambda: comparison.results(study) | stability.results_of_tasks(),
        lambda found: (comparison.show(found), stability.show_tasks(found)),
    )


def printed_part(number: str) -> Part:
    """A table of the paper without scores, or with numbers that need the real checkpoint."""
    numbers = [c for c in tables.NUMBERS if c.table == number]
    return Part(
        dict, lambda: [c._asdict() | {"command": c.command()} for c in numbers], show_printed
    )


def real_placement() -> dict[str, Part]:
    """The placement study on the paper's model and data."""
    results = partial(placement.results, placement.PAPER)
    return {"placement": Part(placement_runs.real_wanted, results, placement.show)}


def parts(args: argparse.Namespace) -> dict[str, Part]:
    """All parts, in the order of "all"."""
    numbers, on = [str(n) for n in range(1, 9)], scale(args)
    return {
        **{n: study_part(n, args.quick, on) if n in on.seeds else printed_part(n) for n in numbers},
        **{name: study_part(name, args.quick) for name in comparison.OTHERS},
        "claims": Part(dict, claims.results, claims.show),
        "text": Part(dict, text, show_text),
        "routing": Part(dict, routing.results, routing.show),
        **{
            name: Part(dict if args.quick else module.wanted, module.results, module.show)
            for name, module in MODULES.items()
        },
        **(real_placement() if args.scale == "paper" else {}),
        "params": Part(dict, params, show_params),
        "flops": Part(dict, lambda: flops(args.share), show_flops),
    }


def wanted_by(several: Iterable[Part]) -> Wanted:
    """The runs that some parts need together."""
    wanted: Wanted = {}
    for part in several:
        for cell, tasks in part.wanted().items():
            wanted[cell] = wanted.get(cell, set()) | tasks
    return wanted


def plan(wanted: Wanted, jobs: int, where: str | None) -> str:
    """How many runs are missing, and about how long they take. where: on what; None: not known."""
    n, seconds = len(missing(wanted)), commands(wanted)[1] / jobs
    told = f"{n} of {len(wanted)} runs are missing"
    if not n:
        return f"{told}: nothing is left to run"
    if where is None:
        return f"{told}: how long they take has not been measured"
    long = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.0f} minutes"
    return f"{told}: about {long}{where}, {jobs} at a time"


def parse_args(words: list[str] | None) -> argparse.Namespace:
    """The command line, or `words` instead."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    what = p.add_mutually_exclusive_group(required=True).add_argument
    add, scale = p.add_argument, p.add_argument_group("--scale paper", TRIAL).add_argument
    rare = p.add_argument_group("rarely needed").add_argument
    what("what", nargs="?",
         choices=["all", "params", "flops", "claims", "text", "routing", *MODULES,
                  *comparison.OTHERS],
         help="see above")
    what("--table", choices=["all", *map(str, range(1, 9))], help="one of the paper's")
    add("--scale", choices=["tiny", "paper"], default="tiny", help="of tables (default tiny)")
    add("--quick", action="store_true", help="one seed of one base, fewer rows and columns")
    rare("--share", type=SHARE, default=0.5159, help="hot share for flops (default 0.5159)")
    rare("--jobs", type=COUNT, help="runs at a time (default: one a core; at paper scale 1)")
    add("--finished", action="store_true", help="run nothing: show what the finished runs give")
    add("--dry-run", action="store_true", help="list what is missing, and about how long it takes")
    rare("--json", action="store_true", help="print JSON in place of tables")
    scale("--seeds", type=COUNT, metavar="N", help=f"default {tables.N_SEEDS}; 1 with --limit")
    scale("--model", type=Path, metavar="FOLDER", help="a checkpoint in place of each table's")
    scale("--data", type=Path, metavar="FOLDER",
          help="files in place of downloads, as far as they are there")
    scale("--limit", type=COUNT, metavar="N",
          help="first N rows and problems, one short answer each")
    # fmt: on
    args = p.parse_args(words)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    asked, quick = args.what or args.table, ("all", *comparison.N_SEEDS, *comparison.OTHERS)
    if args.quick and (args.scale == "paper" or asked not in quick):
        raise ValueError(f"{asked} has no quick form at --scale {args.scale}: omit --quick")
    if args.dry_run and (args.finished or args.json):
        raise ValueError("--dry-run only lists commands: omit --finished and --json")


def run_missing(wanted: Wanted, args: argparse.Namespace, asked: str, jobs: int) -> None:
    """Say how long it takes, and run it; with --dry-run, print its commands in place of that."""
    on_gpu = " of an H100, an estimate" if asked == "placement" else None
    told = plan(wanted, jobs, "" if args.scale == "tiny" else on_gpu)
    if args.dry_run:
        for words in commands(wanted)[0]:
            print("python", shlex.join(words))
        print(told)
        return
    if missing(wanted):
        print(told, file=sys.stderr)
    try:
        run_cells(wanted, jobs)
    except KeyboardInterrupt as stop:
        raise type(stop)("finished runs are kept, and the same command goes on") from None


def main(words: list[str] | None = None) -> None:
    """Run all missing runs together, and then show each part."""
    args = parse_args(words)
    jobs = args.jobs or (os.cpu_count() if args.scale == "tiny" else 1)
    known, asked = parts(args), args.what or args.table
    chosen = {asked: known[asked]} if asked in known else known
    if args.table == "all":
        chosen = {name: part for name, part in known.items() if name.isdigit()}
    wanted = wanted_by(chosen.values())
    if not args.finished:
        run_missing(wanted, args, asked, jobs)
    if args.dry_run:
        return
    if "stability" in chosen and not (args.finished or args.quick):
        stability.measure()
    values = {name: part.results() for name, part in chosen.items()}
    if args.json:
        print(json.dumps(values if len(values) > 1 else values[asked], indent=1))
        return
    for name, value in values.items():
        print(
            f"\n== {f'Table {name}' if name.isdigit() else name}\n" if len(values) > 1 else "",
            end="",
        )
        chosen[name].show(value)


if __name__ == "__main__":
    command(main)
