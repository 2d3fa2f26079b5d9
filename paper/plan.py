"""What fits on which GPU, and what is sent between GPUs, computed from shapes.

    python -m paper.plan --model mixtral-8x7b --gpus 8    one plan
    python -m paper.plan --method lora --tokens 4096      OLMoE with LoRA, on one GPU
    python -m paper.plan --page                           writes the tables of docs/scaling.md again

Frozen weights are bf16. Trained numbers are fp32, with a gradient and two values of AdamW. The rank
is 32. plumbing/memory.py has the arithmetic, and train.py uses it too. Memory that CUDA takes for
itself is not counted. The smallest card is for train.py's default: training, and for a method that
chooses experts the warm-up before it, with LoRA on all experts. Scoring decodes as many problems at
once as there is room for.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.plan, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import re

import torch

from catcher import check_k, default_k
from hellora import METHODS, parse_method
from moe_model import MoEConfig, MoEModel
from paper.runs.parallel import ROOT
from paper.studies.tables import ALPHA, RANK
from plumbing import memory, ranks
from plumbing.checkpoint import BACKBONES, locate, read_config
from plumbing.cli import COUNT, Parser, command
from plumbing.files import write_atomically
from plumbing.memory import PARTS, problem, training, visits_of

PAGE = ROOT / "docs" / "scaling.md"
CARDS = (16, 24, 32, 40, 48, 80, 96, 141, 192)  # the memory of common GPUs, in GB
FREE = 0.1  # the share of a card that is left free, for what is not counted
WIRES = {"NVLink, 450 GB/s": 450e9, "network, 400 Gbit/s": 50e9, "network, 25 Gbit/s": 3.125e9}
PROBLEM = (200, 512)  # tokens of GSM8K's longest prompt, roughly, and of the longest answer


def shapes(cfg: MoEConfig, method: str, k: int) -> MoEModel:
    """The model without memory, in the dtypes of training."""
    return memory.shapes(cfg, parse_method(method), k, RANK, ALPHA, torch.bfloat16)


def show(name: str, cfg: MoEConfig, args: argparse.Namespace, k: int) -> str:
    """A table. With several GPUs, --shard full stands beside --shard none."""
    n, tokens, method = args.gpus, args.tokens, parse_method(args.method)
    model = shapes(cfg, args.method, k)
    ways = {"--shard full": True, "--shard none": False} if n > 1 else {"one GPU": False}
    share = visits_of(method, k, cfg.n_experts)
    columns = [training(model, tokens, share, args.recompute, n, cut) for cut in ways.values()]
    need = [sum(column.values()) for column in columns]
    rows = [("", list(ways))]
    rows += [(part, [gb(column[part]) for column in columns]) for part in PARTS]
    rows += [("together", list(map(gb, need)))]
    if method.chooses:
        warm = shapes(cfg, "lora", k)
        before = [
            sum(training(warm, tokens, 1.0, args.recompute, n, cut).values())
            for cut in ways.values()
        ]
        rows += [("the warm-up before it, together", list(map(gb, before)))]
        need = [max(pair) for pair in zip(need, before, strict=True)]
    one = problem(cfg, 2, *PROBLEM)
    scoring = [column["weights"] + column["put together for a moment"] for column in columns]
    rows += [
        ("scoring: the weights, and one problem", [gb(size + one) for size in scoring]),
        ("the smallest card for all this, GB", [card(size) for size in need]),
    ]
    if n > 1:
        wires = [ranks.traffic(model, n, cut) for cut in ways.values()]
        rows += [
            ("received: GB per micro-batch, or per step", [f"{wire / 1e9:.3f}" for wire in wires])
        ]
        rows += [
            (f"  seconds by {wire}", [f"{w / rate:.3f}" for w in wires])
            for wire, rate in WIRES.items()
        ]
    adapts = f", k = {k}" if method.chooses else ""
    recompute = ", --recompute" if args.recompute else ""
    gpus = f"{n} GPU{'s' * (n > 1)}"
    batch = f"{tokens:,} tokens a micro-batch{recompute}"
    head = f"{name}, {args.method}{adapts}, {gpus}, {batch}, in GB per GPU"
    return "\n".join(
        [head, *(f"{row:44s}" + "".join(f"{cell:>14s}" for cell in cells) for row, cells in rows)]
    )


def gb(size: float) -> str:
    """Bytes as GB."""
    return f"{size / 1e9:.2f}"


def card(size: float) -> str:
    """The memory of the smallest card on which `size` bytes fit, in GB."""
    return next((str(gb) for gb in CARDS if size <= (1 - FREE) * gb * 1e9), "none")


def page(text: str) -> str:
    """docs/scaling.md, with each block that begins "```text FLAGS" made again."""

    def block(match: re.Match) -> str:
        return f"```text {match[1]}\n{table(parse_args(match[1].split()))}\n```"

    return re.sub(r"^```text (--model .*)\n(?:.*\n)*?```$", block, text, flags=re.M)


def table(args: argparse.Namespace) -> str:
    """The plan for the flags."""
    cfg = BACKBONES[args.model].cfg if args.model in BACKBONES else read_config(locate(args.model))
    k = check_k(default_k(cfg) if args.k is None else args.k, cfg.n_experts)
    return show(args.model, cfg, args, k)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, rare = p.add_argument, p.add_argument_group("rarely needed").add_argument
    add("--model", default="olmoe-1b-7b", help=f"{', '.join(BACKBONES)} (no download), or a folder")
    add("--method", default="hellora", help=f"{', '.join(METHODS)}, and suffixes (default hellora)")
    add("--k", type=int, help="adapted experts per layer (default: as many as a token visits)")
    add("--gpus", type=COUNT, default=1, metavar="N", help="default 1")
    add("--tokens", type=COUNT, default=8192, help="of a micro-batch, on each GPU (default 8192)")
    add("--recompute", action="store_true", help="as train.py's")
    rare("--page", action="store_true", help="write the tables of docs/scaling.md anew")
    return p.parse_args(words)


def main() -> None:
    """Print a plan, or write the page."""
    args = parse_args()
    if args.page:
        text = page(PAGE.read_text())
        write_atomically(PAGE, lambda draft: draft.write_text(text))
    else:
        print(table(args))


if __name__ == "__main__":
    command(main)
