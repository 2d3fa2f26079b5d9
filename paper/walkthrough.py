"""The numbers of docs/walkthrough.md, which follows one token through a HELLoRA layer.

    python -m paper.walkthrough        measures, and writes the page's blocks again

The page is its own template. A block that starts with "```text NAME" has the output of the function
NAME of BLOCKS. All else is prose and quoted code. Nothing is trained or random: A and B are the
waves of examples/golden.py. The terms are computed here from the equations. test_walkthrough.py
compares them with the modules.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.walkthrough, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import re
from copy import deepcopy
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from catcher import Catcher, choose, count_visits, visited_share
from examples.golden import ALPHA, COUNTED, RANK, K, set_waves
from hellora import LowRank, attach, count_params, lori_masks, merge, parse_method
from moe_model import Block, MoEModel, Routing, Rows, load_balancing_loss, positions
from paper.runs.parallel import ROOT
from plumbing.checkpoint import locate
from plumbing.cli import Parser, command
from plumbing.data import TASKS, Encoded, collate, encode, load_examples
from plumbing.tokenizer import load_tokenizer

PAGE = ROOT / "docs" / "walkthrough.md"
LAYER, TOKEN = 1, 14  # the chosen layer, and the chosen token of the first training problem


class Scene(NamedTuple):
    """A model with adapters, and the chosen token in the chosen layer."""

    model: MoEModel
    layer: Block
    data: list[Encoded]
    word: str  # the chosen token as text
    visits: Catcher
    hot: dict[int, list[int]]
    attn_in: Tensor  # [D] the input of q, k and v, for the token
    moe_in: Tensor  # [1, T, D] the input of router and experts, for all tokens
    moe_out: Tensor  # [D] the sum that the experts add to the token
    routing: Routing  # of the layer
    parts: list[Rows]  # its rows: first those of hot experts, then those of the other experts


@cache
@torch.no_grad()
def scene() -> Scene:
    """Count, choose, attach, and run the first problem up to the chosen layer."""
    model, tokenizer = MoEModel.from_pretrained("tiny"), load_tokenizer(locate("tiny"))
    examples = load_examples("tiny-math", TASKS["tiny-math"].train.fetch(), "plain")[:COUNTED]
    data = encode(examples, tokenizer, model.cfg.max_len)
    visits = count_visits(model, data, 16, "count")
    hot = choose(visits.counts, K, "hot")
    attach(model, parse_method("hellora"), hot, RANK, ALPHA)
    set_waves(model)

    tokens, layer = torch.tensor([data[0].ids[:-1]]), model.layers[LAYER]
    at = positions(model.cfg, tokens.shape[1], None, model.device)
    x = model.embed(tokens)
    for before in model.layers[:LAYER]:
        x, _ = before(x, at, None)
    attn_in = layer.attn_norm(x)
    moe_in = layer.mlp_norm(x + layer.attn(attn_in, at, None))

    # The layer sorts its rows itself. A hook on the experts' gate sees each part of the rows.
    parts: list[Rows] = []
    gate = layer.moe.experts.gate
    hook = gate.register_forward_pre_hook(lambda module, given: parts.append(given[1]))
    moe_out, routing = layer.moe(moe_in)
    hook.remove()

    word = tokenizer.decode([data[0].ids[TOKEN]])
    counted = model, layer, data, word, visits, hot
    return Scene(*counted, attn_in[0, TOKEN], moe_in, moe_out[0, TOKEN], routing, parts)


def line(name: str, values: Tensor | list[float], more: str = "...") -> str:
    """A line of a block: a name and the first four numbers."""
    return f"{name:24s}" + " ".join(f"{v:+.3f}" for v in list(values)[:4]) + f" {more}".rstrip()


def update(lora: LowRank, x: Tensor, i: int | None = None) -> tuple[Tensor, Tensor]:
    """Eq. 2 and 3 by hand, for a vector x [in]: A x [r] and scale * B (A x) [out].

    i: the index of the matrix in a stack.
    """
    a, b = (lora.A, lora.B) if i is None else (lora.A[i], lora.B[i])
    return a @ x, lora.scale * (b @ (a @ x))


def count(s: Scene) -> list[str]:
    """The visits of the layer's experts."""
    visits = s.visits.scores("count")[LAYER]
    top = sorted(s.hot[LAYER], key=lambda e: -visits[e])
    share = visited_share({LAYER: visits}, {LAYER: s.hot[LAYER]})[LAYER]
    return [
        f"{int(s.visits.n_tokens):,} tokens x {K} choices = "
        f"{int(visits.sum()):,} visits in layer {LAYER}",
        "most visited            " + "  ".join(f"{e}:{int(visits[e])}" for e in top),
        f"hot experts             {s.hot[LAYER]}",
        f"their share of visits   {share:.3f} (uniform: {K / s.model.cfg.n_experts:.3f})",
    ]


def freeze(s: Scene) -> list[str]:
    """The number of trained parameters."""
    trained, stored = count_params(s.model, parse_method("hellora"))
    return [f"{trained:,} of {stored:,} numbers are trained ({trained / stored:.2%})"]


def attention(s: Scene) -> list[str]:
    """Eq. 3 in q."""
    q = s.layer.attn.q
    low, delta = update(q.lora, s.attn_in)
    return [
        line(f"x of {s.word!r}", s.attn_in, f"... {len(s.attn_in)} numbers"),
        line("W x", q.weight @ s.attn_in),
        line("A x", low, f"... {len(low)} numbers"),
        line("(alpha / r) B (A x)", delta),
        line("their sum", q.weight @ s.attn_in + delta),
        line("what q returns", q(s.attn_in[None])[0]),
    ]


def choices(s: Scene) -> list[tuple[int, float, int]]:
    """The token's choices: (expert, its weight, row among the rows of all tokens)."""
    row = torch.cat([rows.slot for rows in s.parts]).argsort().view(-1, K)  # [T, K] of each slot
    chosen = s.routing.expert_ids[0, TOKEN], s.routing.probability[0, TOKEN], row[TOKEN]
    return list(zip(*(t.tolist() for t in chosen), strict=True))


def router(s: Scene) -> list[str]:
    """The experts of the token."""
    lines = ["expert  weight   row   is it hot?"]
    for expert, weight, row in choices(s):
        lines.append(
            f"{expert:6d}   {weight:.3f}  {row:4d}   {'hot' if expert in s.hot[LAYER] else '-'}"
        )
    n_tokens, (hot, others) = s.moe_in.shape[1], (len(rows.slot) for rows in s.parts)
    return [
        *lines,
        f"{n_tokens} tokens make {hot + others} rows. The first {hot} visit hot experts.",
    ]


@torch.no_grad()
def expert_out(s: Scene, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """One expert by hand: gate x without the update [F], gate x with it [F], its output [D].

    The output is down(silu(gate x) * up x). Here gate is the first matrix of SwiGLU.
    """
    experts, i = s.layer.moe.experts, s.hot[LAYER].index(expert) if expert in s.hot[LAYER] else None

    def linear(m: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        base = m.weight[expert] @ x
        return base, base if i is None else base + update(m.lora, x, i)[1]

    x = s.moe_in[0, TOKEN]
    base, gate = linear(experts.gate, x)
    return base, gate, linear(experts.down, F.silu(gate) * linear(experts.up, x)[1])[1]


def expert(s: Scene) -> list[str]:
    """A hot expert, which has an update, and an expert without one."""
    lines = []
    for kind in (True, False):
        e = next(e for e, *_ in choices(s) if (e in s.hot[LAYER]) == kind)
        base, gate, out = expert_out(s, e)
        name = f"expert {e} ({'hot' if kind else 'not hot'})"
        lines += [
            name,
            line("  gate: W x", base),
            line("  gate: with its update", gate),
            line("  its output", out),
        ]
    return lines


def combine(s: Scene) -> list[str]:
    """The weighted sum of the experts."""
    total = sum(weight * expert_out(s, e)[2] for e, weight, _ in choices(s))
    return [
        f"sum of the {K} weights    {sum(weight for _, weight, _ in choices(s)):.3f}",
        line("sum of weight x output", total),
        line("what the layer adds", s.moe_out),
    ]


def mask(s: Scene) -> list[str]:
    """Eq. 4 in q."""
    q = s.layer.attn.q
    kept = lori_masks({"q": q.lora.B}, 0.1, "matrix")["q"]
    masked = q.lora.scale * (q.lora.B * kept) @ (q.lora.A @ s.attn_in)
    return [
        f"{int(kept.sum())} of {kept.numel()} entries of q's B are kept",
        line("(alpha / r) B (A x)", update(q.lora, s.attn_in)[1]),
        line("with B * mask for B", masked),
    ]


@torch.no_grad()
def balance(s: Scene) -> list[str]:
    """Eq. 1 over the first problems."""
    batch = collate(s.data[:8], "cpu")
    routing = s.model.trunk(batch.tokens)[1]
    n, n_experts = int(batch.real.sum()) * len(routing), s.model.cfg.n_experts
    visits = torch.cat([r.expert_ids[batch.real] for r in routing.values()]).flatten()
    f = torch.bincount(visits, minlength=n_experts) / n
    p = torch.cat([r.logits[batch.real] for r in routing.values()]).softmax(-1).mean(0)
    return [
        f"{n:,} tokens, those of all layers together",
        line("f of experts 0 to 3", f, f"... sum {f.sum():.3f}"),
        line("P of experts 0 to 3", p, f"... sum {p.sum():.3f}"),
        f"E * sum of f P          {n_experts * (f * p).sum():.3f}",
        f"load_balancing_loss     {load_balancing_loss(routing, batch.real):.3f} (least: {K})",
    ]


@torch.no_grad()
def folded(s: Scene) -> list[str]:
    """The logits with the adapters beside the weights, and merged into them."""
    tokens, merged = torch.tensor([s.data[0].ids]), deepcopy(s.model)
    merge(merged)
    return [
        line("logits, not merged", s.model(tokens)[0][0, TOKEN]),
        line("logits, merged", merged(tokens)[0][0, TOKEN]),
    ]


BLOCKS = {
    f.__name__: f
    for f in (count, freeze, attention, router, expert, combine, mask, balance, folded)
}


def filled(page: str) -> str:
    """The page with every block measured again."""
    measured = {name: "\n".join(block(scene())) for name, block in BLOCKS.items()}
    return re.sub(
        r"^```text (\w+)\n.*?^```$",
        lambda match: f"```text {match[1]}\n{measured[match[1]]}\n```",
        page,
        flags=re.M | re.S,
    )


def main() -> None:
    """Write the page again."""
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    command(main)
