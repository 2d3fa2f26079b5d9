"""The paper's numbers beside ours.

python -m paper.reproduce params [--json]     every Params cell of Tables 2 to 5 and 7; seconds, no weights
python -m paper.reproduce flops [--json]      adapter FLOPs a token, by formula and as counted
python -m paper.reproduce methods [--json]    every method on the tiny model; runs what is missing, hours
python -m paper.reproduce --table 8 [--json]  tuned on one task, scored on all three; tiny model, hours
"""

import argparse
import json
import os
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from catcher import Catcher, visited_share
from checkpoint import BACKBONES, MoEConfig, parse_config
from hellora import adapter_flops, attach, count_params, init_adapters, parse_method
from moe_model import MoEModel, empty_model
from paper import methods, tables, transfer
from run import Parser, above_0, command, share_of_1

RANK, ALPHA = 32, 64  # Table 1
SMALL = {  # config.json of the model on which FLOPs are counted
    "model_type": "olmoe", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 16, "num_experts_per_tok": 4,
}  # fmt: skip


FIELDS = ("table", "backbone", "method", "k", "printed", "note")
CELLS = [  # all percents of parameters that the paper prints, and two that it gives as a ratio only
    *(
        (c.table, c.backbone, c.method, c.k, c.printed, c.status.why)
        for c in tables.CELLS
        if c.metric == "params"
    ),
    ("abstract", tables.DEEPSEEK, "lora", 64, None, "the paper prints only the ratio, 23.2 %"),
    ("abstract", tables.DEEPSEEK, "hellora", 12, None, "k = 12 is our reading (README)"),
]


def build(cfg: MoEConfig, name: str, k: int) -> MoEModel:
    """A model of shapes with the adapters of method `name` on k experts of each layer."""
    model = empty_model(cfg, torch.float32)
    attach(model, parse_method(name), {i: list(range(k)) for i in cfg.moe_layers}, RANK, ALPHA)
    return model


@cache  # tables repeat rows
def sizes(backbone: str, method: str, k: int) -> dict[str, int]:
    """Numbers that are trained, and all that are stored."""
    model = build(BACKBONES[backbone].cfg, method, k)
    return dict(zip(("trained", "stored"), count_params(model, parse_method(method)), strict=True))


def params() -> list[dict]:
    """Every cell of CELLS with our integers; percent is trained / stored, the adapters included in both."""
    rows = [dict(zip(FIELDS, cell, strict=True)) for cell in CELLS]
    rows = [row | sizes(row["backbone"], row["method"], row["k"]) for row in rows]
    return [row | {"percent": 100 * row["trained"] / row["stored"]} for row in rows]


def show_params(rows: list[dict]) -> None:
    """A table, and the two ratios that the paper does not tell apart."""
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
        of = {
            r["method"]: r
            for r in rows
            if r["backbone"] == backbone and (r["k"] == k or r["method"] == "lora")
        }
        percents, counts = (of["hellora"][x] / of["lora"][x] for x in ("percent", "trained"))
        print(f"{backbone}: HELLoRA / LoRA {percents:.2%} as a ratio of percents, {counts:.2%} of counts")


def measured_flops(model: MoEModel, tokens: torch.Tensor) -> int:
    """What torch counts in one forward pass of the looped form (it has no formula for grouped matmuls)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    return counter.get_total_flops()


def flops(share: float) -> dict:
    """Adapter FLOPs a token: by formula for OLMoE-1B-7B, and as counted too for a small model."""
    paper = build(BACKBONES["olmoe-1b-7b"].cfg, "hellora", 8)
    everywhere, hot = (adapter_flops(paper, dict.fromkeys(range(16), s)) for s in (1.0, share))

    torch.manual_seed(0)
    cfg = parse_config(SMALL)
    tokens = torch.randint(0, cfg.vocab_size, (4, 64))
    model = MoEModel(cfg, experts="loop").requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    base = measured_flops(model, tokens)
    experts = {i: list(range(8)) for i in cfg.moe_layers}
    attach(model, parse_method("hellora"), experts, 8, 16)
    init_adapters(model, 0)
    visits = Catcher(cfg.n_experts)
    visits.add(model.trunk(tokens)[1], torch.ones(tokens.shape, dtype=torch.bool))
    shares = visited_share(visits.scores("count"), experts)
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
    """The formula's numbers, and how near the counted ones are."""
    print(f"OLMoE-1B-7B, r = 32, forward pass of a token: LoRA {row['olmoe_lora'] / 1e6:.2f} MFLOP")
    print(
        f"  HELLoRA, k = 8, hot share {row['share']:.4f}: {row['olmoe_hellora'] / 1e6:.2f} MFLOP, "
        f"{row['saved']:.1%} less (the paper says 38.7 %, which is a share of 0.5159)"
    )
    off = row["small_counted"] / row["small_formula"] - 1
    print(
        f"a small random model: {row['small_formula']:,.0f} FLOPs by formula, {row['small_counted']:,.0f} as "
        f"counted by torch ({off:+.2%})"
    )


TABLES = {  # what is asked for -> how its numbers come about, and how they are shown
    "params": (lambda args: params(), show_params),
    "flops": (lambda args: flops(args.share), show_flops),
    "methods": (lambda args: methods.compare((*methods.MAIN, *methods.PLACEMENTS), args.jobs), methods.show),
    "8": (lambda args: transfer.compare(args.jobs), transfer.show),
}


def main() -> None:
    """One table."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("what", nargs="?", choices=[name for name in TABLES if not name.isdigit()])
    what.add_argument(
        "--table", choices=[name for name in TABLES if name.isdigit()], help="one of the paper's"
    )
    p.add_argument("--share", type=share_of_1, default=0.5159, help="hot share for flops (default 0.5159)")
    p.add_argument(
        "--jobs", type=above_0(int), default=os.cpu_count(), help="runs at a time (default: one a core)"
    )
    p.add_argument("--json", action="store_true", help="print JSON in place of a table")
    args = p.parse_args()
    measure, show = TABLES[args.what or args.table]
    value = measure(args)
    print(json.dumps(value, indent=1)) if args.json else show(value)


if __name__ == "__main__":
    command(main)
