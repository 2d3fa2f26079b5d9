"""What fits where, and what goes over the wire, by arithmetic on the shapes, on N GPUs.

    python -m paper.plan --model mixtral-8x7b --gpus 8    one plan
    python -m paper.plan --method lora --tokens 4096      OLMoE with LoRA, on one GPU
    python -m paper.plan --page                           writes the tables of docs/scaling.md anew

Frozen weights are bf16; what is trained is fp32, with a gradient and two values of AdamW; rank 32.
Of activations only what --recompute keeps is counted, and nothing of what CUDA takes for itself.
"""

import argparse
import math
import re
from collections import Counter

import torch

import hellora
from catcher import check_k, default_k
from hellora import METHODS, parse_method
from moe_model import MoEConfig, MoEModel
from paper.runs.parallel import ROOT
from paper.studies.tables import ALPHA, RANK
from plumbing import ranks
from plumbing.checkpoint import BACKBONES, empty_model, locate, read_config
from plumbing.cli import COUNT, Parser, command
from plumbing.files import write_atomically

PAGE = ROOT / "docs" / "scaling.md"
CARDS = (16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB of the GPUs there are
FREE = 0.1  # of a card, left for what is not counted
WIRES = {"NVLink, 450 GB/s": 450e9, "network, 400 Gbit/s": 50e9, "network, 25 Gbit/s": 3.125e9}
HELD = ("weights", "gradients", "AdamW", "put together for a moment", "inputs of the layers")


def shapes(cfg: MoEConfig, method: str, k: int) -> MoEModel:
    """The model without memory, in the dtypes that training has."""
    how = parse_method(method)
    model = empty_model(cfg, torch.bfloat16).to(torch.float32 if how.train_base else torch.bfloat16)
    experts = list(range(cfg.n_experts if how.rule == "all" else k))
    hellora.attach(model, how, dict.fromkeys(cfg.moe_layers, experts), RANK, ALPHA)
    return model


def held(model: MoEModel, n: int, cut: bool, tokens: int) -> dict[str, int]:
    """Bytes on each of n GPUs at the worst moment, `tokens` in a micro-batch.

    Cut up, a GPU holds its part of each parameter (the largest part: rows are not cut), and besides
    the layer that is computed, the next one on its way, the rest (embedding, norm, head) in one
    piece, and a layer's gradients before and after they are added up. Else the gradients once more,
    in the message that does that.
    """
    full = all(p.requires_grad for p in model.parameters())
    kept = dict.fromkeys(("weights", "trained"), 0)
    sent, gradients = Counter(), Counter()  # of each layer, "" for the rest: bytes put together
    for name, p in model.named_parameters():
        part = (-(-p.shape[0] // n) if cut else p.shape[0]) * math.prod(p.shape[1:])
        kept["weights"] += part * p.element_size()
        kept["trained"] += part * p.requires_grad
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        # Full fine-tuning is sent as it is computed, in bf16.
        size = 2 if full else p.element_size()
        sent[layer] += part * n * size
        gradients[layer] += part * n * (size + 4) * p.requires_grad
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())  # masks; never cut
    rest = sent.pop("")
    of_layers = rest + 2 * max(sent.values()) + max(gradients.values())
    together = of_layers if cut else 4 * kept["trained"] * (n > 1)
    inputs = len(model.layers) * tokens * model.cfg.dim * 2
    sizes = (kept["weights"] + buffers, 4 * kept["trained"], 8 * kept["trained"], together, inputs)
    return dict(zip(HELD, sizes, strict=True))


def show(name: str, cfg: MoEConfig, method: str, k: int, n: int, tokens: int) -> str:
    """A table: of several GPUs --shard full beside --shard none."""
    model = shapes(cfg, method, k)
    ways = {"--shard full": True, "--shard none": False} if n > 1 else {"one GPU": False}
    columns = [held(model, n, cut, tokens) for cut in ways.values()]
    wires = [ranks.traffic(model, n, cut) for cut in ways.values()]
    adapts = f", k = {k}" if parse_method(method).chooses else ""
    sums = [sum(column.values()) for column in columns]
    rows = [("", list(ways))]
    rows += [(what, [f"{column[what] / 1e9:.2f}" for column in columns]) for what in HELD]
    rows += [("together", [f"{total / 1e9:.2f}" for total in sums])]
    rows += [("the smallest card for it, GB", [card(total) for total in sums])]
    if n > 1:
        rows += [
            ("got from others: GB a micro-batch; a step", [f"{wire / 1e9:.3f}" for wire in wires])
        ]
        rows += [
            (f"  seconds by {wire}", [f"{w / rate:.3f}" for w in wires])
            for wire, rate in WIRES.items()
        ]
    gpus = f"{n} GPU{'s' * (n > 1)}"
    head = f"{name}, {method}{adapts}, {gpus}, {tokens:,} tokens a micro-batch; GB on each GPU"
    return "\n".join(
        [head, *(f"{what:44s}" + "".join(f"{cell:>14s}" for cell in cells) for what, cells in rows)]
    )


def card(size: float) -> str:
    """GB of the smallest card on which that fits."""
    return next((str(gb) for gb in CARDS if size <= (1 - FREE) * gb * 1e9), "none")


def page(text: str) -> str:
    """docs/scaling.md with each block that begins "```text FLAGS" made anew."""

    def block(match: re.Match) -> str:
        return f"```text {match[1]}\n{table(parse_args(match[1].split()))}\n```"

    return re.sub(r"^```text (--model .*)\n(?:.*\n)*?```$", block, text, flags=re.M)


def table(args: argparse.Namespace) -> str:
    """What the flags ask for."""
    cfg = BACKBONES[args.model].cfg if args.model in BACKBONES else read_config(locate(args.model))
    k = check_k(default_k(cfg) if args.k is None else args.k, cfg.n_experts)
    return show(args.model, cfg, args.method, k, args.gpus, args.tokens)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, rare = p.add_argument, p.add_argument_group("rarely needed").add_argument
    add("--model", default="olmoe-1b-7b", help=f"{', '.join(BACKBONES)} (no download), or a folder")
    add("--method", default="hellora", help=f"{', '.join(METHODS)}, and suffixes (default hellora)")
    add("--k", type=int, help="adapted experts per layer (default: as many as a token visits)")
    add("--gpus", type=COUNT, default=1, metavar="N", help="default 1")
    add("--tokens", type=COUNT, default=8192, help="of a micro-batch, on each GPU (default 8192)")
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
