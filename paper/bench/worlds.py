"""What the benchmark runs on: weights, a batch and hot experts. Also our methods on them.

The letters are those of moe_model.py.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from catcher import choose, count_visits, default_k, visited_share
from hellora import adapters, attach, init_adapters, parse_method
from moe_model import MoE, MoEConfig, MoEModel
from paper.studies.tables import ALPHA, RANK
from plumbing.checkpoint import (
    Checkpoint,
    base_parameters,
    empty_model,
    hub_names,
    load_weights,
    locate,
    parse_config,
)
from plumbing.data import TASKS, Encoded, load_examples
from plumbing.tokenizer import load_tokenizer

LR = 1e-6  # so small that routing, and so the work, is the same in every round
LOAD_LAYERS = 2  # layers of a random model in the checkpoint for timing the loaders
BIAS_CHANNEL = 0  # of a random model's hidden state: equal for all tokens (see draw_weights)


class Shape(NamedTuple):
    """A random model, and the step in which it is measured by default."""

    hub: dict  # its config.json
    tokens: int  # in a step
    length: int  # of a sequence


_FEW = {
    "model_type": "olmoe",
    "num_hidden_layers": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
}
SHAPES = {
    "tiny": Shape(
        _FEW | {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4,
                "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 2,
                "vocab_size": 128}, 64, 32),
    "small": Shape(
        _FEW | {"hidden_size": 512, "intermediate_size": 256, "num_attention_heads": 8}, 1024, 256),
    "medium": Shape(
        _FEW | {"hidden_size": 1024, "intermediate_size": 512, "num_attention_heads": 16},
        1024, 256),
    "olmoe": Shape({"model_type": "olmoe", "intermediate_size": 1024}, 8192, 512),
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """The weights and the batch. All configurations use the same."""

    hub: dict  # config.json
    cfg: MoEConfig
    dtype: torch.dtype
    base: dict[str, Tensor]  # our name of a parameter -> its value
    batch: list[Encoded]
    hot: dict[int, list[int]]  # {MoE layer: its hot experts, ascending}
    shares: dict[int, float]  # {MoE layer: the share of its visits that its hot experts get}
    device: torch.device
    source: Path | None = None  # the checkpoint's folder

    def parts(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors with which the Hub stores a parameter, each with its name. They are views."""
        names, value = hub_names(name, self.cfg), self.base[name]
        return zip(names, value if len(names) > 1 else [value], strict=True)


# ---- random weights, and a checkpoint's weights --------------------------------------------------


def random_world(
    shape: Shape, share: float, tokens: int, length: int, dtype: torch.dtype, device: torch.device
) -> World:
    """A random model whose hot experts get the given share of the batch's visits."""
    cfg = parse_config(shape.hub)
    base = draw_weights(cfg, dtype, device)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, cfg.vocab_size, (max(1, tokens // length), length + 1), generator=draw)
    batch = [Encoded(row, 1) for row in ids.tolist()]
    k = default_k(cfg)
    hot = {
        i: sorted(torch.randperm(cfg.n_experts, generator=draw)[:k].tolist())
        for i in cfg.moe_layers
    }
    world = World(shape.hub, cfg, dtype, base, batch, hot, {}, device)
    model = frozen(world)
    for i in cfg.moe_layers:
        model.layers[i].moe.register_forward_pre_hook(skew(hot[i], share))
    visits = count_visits(model, batch, len(batch), "skew the routing")
    world.shares.update(visited_share(visits.scores("count"), hot))
    return world


def draw_weights(cfg: MoEConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random weights: 1 for norms, N(0, 1 / in) for all others.

    `skew` needs one channel of the hidden state. Every embedding is 1 there, layers write almost
    nothing to it, and routers do not read it yet. So the bias that skews the routing needs no
    parameter that OLMoE lacks. (Layers write a little: rows of length 0 would break DoRA, which
    divides by the length.)
    """
    draw, base = torch.Generator(device).manual_seed(0), {}
    for name, (shape, _) in base_parameters(cfg).items():
        value = base[name] = torch.ones(shape, dtype=dtype, device=device)
        if len(shape) > 1:
            value.normal_(0, 1 if name == "embed.weight" else shape[-1] ** -0.5, generator=draw)
        if name == "embed.weight":
            value[:, BIAS_CHANNEL] = 1
        elif name.endswith(("attn.o.weight", "down.weight")):
            value[..., BIAS_CHANNEL, :] *= 1e-3
        elif name.endswith("router.weight"):
            value[:, BIAS_CHANNEL] = 0
    return base


def skew(hot: list[int], share: float, halvings: int = 24) -> Callable:
    """A forward pre-hook for an MoE: a bias gives the `hot` experts the given share of visits.

    The share grows with the bias, so halving an interval finds the bias.
    """

    @torch.no_grad()
    def calibrate(moe: MoE, args: tuple[Tensor]) -> None:
        tokens, low, high = args[0].flatten(0, 1), -256.0, 256.0
        hot_ids = torch.tensor(hot, device=tokens.device)
        for _ in range(halvings):
            moe.router.weight[hot_ids, BIAS_CHANNEL] = middle = (low + high) / 2
            chosen = (
                moe.router(tokens).softmax(-1, dtype=torch.float32).topk(moe.top_k, dim=-1).indices
            )
            too_many = bool(torch.isin(chosen, hot_ids).float().mean() > share)
            low, high = (low, middle) if too_many else (middle, high)

    return calibrate


def world_of(
    model: str, tokens: int, length: int, dtype: torch.dtype, device: torch.device
) -> World:
    """A checkpoint, a batch of text in its tokens, and the experts that the text visits most."""
    source = locate(model)
    hub = json.loads((source / "config.json").read_text(encoding="utf-8"))
    cfg = parse_config(hub)
    model_read = empty_model(cfg, dtype)
    load_weights(model_read, Checkpoint(source), device)
    tokenizer, task = load_tokenizer(source), TASKS["tiny-math"]  # built in
    examples = load_examples("tiny-math", task.train.fetch(), task.template)
    text = chain.from_iterable(tokenizer.encode(e.prompt + e.answer) for e in examples)
    n, length = max(1, tokens // length), min(length, cfg.max_len - 1)
    batch = [Encoded([next(text) for _ in range(length + 1)], 1) for _ in range(n)]
    visits = count_visits(model_read, batch, n, "count visits")
    hot = choose(visits.scores("count"), default_k(cfg), "hot")
    shares = visited_share(visits.scores("count"), hot)
    base = dict(model_read.state_dict())
    return World(hub, cfg, dtype, base, batch, hot, shares, device, source)


def write_checkpoint(world: World, folder: Path) -> Path:
    """Write the first LOAD_LAYERS layers of a random world as the Hub does. Returns the folder."""
    hub = world.hub | {"num_hidden_layers": min(LOAD_LAYERS, world.cfg.n_layers)}
    names = base_parameters(parse_config(hub))
    tensors = {
        hub_name: part.cpu().clone() for name in names for hub_name, part in world.parts(name)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hub))
    return folder


# ---- our methods ---------------------------------------------------------------------------------


def frozen(
    world: World, matmul: str = "grouped", base: dict[str, Tensor] | None = None
) -> MoEModel:
    """Our model without adapters, on the tensors of the world itself. Nothing is copied."""
    model = empty_model(world.cfg, world.dtype, matmul)
    model.load_state_dict(base or world.base, assign=True)
    return model.requires_grad_(False)


def everywhere(cfg: MoEConfig) -> dict[int, list[int]]:
    """Every expert of every layer."""
    return {i: list(range(cfg.n_experts)) for i in cfg.moe_layers}


def ours(world: World, method: str, matmul: str = "grouped", recompute: bool = False) -> MoEModel:
    """Our model, ready to train with `method`.

    fft takes the weights out of the world, and makes fp32 copies of them.
    """
    if method == "fft":
        base = {
            name: world.base.pop(name).to(torch.float32, copy=True) for name in list(world.base)
        }
        model = frozen(world, matmul, base).requires_grad_(True)
    elif method == "none":
        # It trains one norm, so the backward pass goes through all layers for input gradients.
        model = frozen(world, matmul)
        norm = model.layers[0].attn_norm
        norm.weight = nn.Parameter(norm.weight.detach().clone())
    else:
        model = with_adapters(world, method, matmul)
    model.recompute = recompute
    return model


def with_adapters(world: World, method: str, matmul: str) -> MoEModel:
    """Our model with the adapters of a METHODS row, ready to train."""
    model, row = frozen(world, matmul), parse_method(method)
    attach(model, row, world.hot if row.chooses else everywhere(world.cfg), RANK, ALPHA)
    init_adapters(model, 0)
    for m in adapters(model).values():
        if m.lora.mask is not None:  # there is no D run, so draw a random mask of the same size
            draw = torch.Generator(m.lora.mask.device).manual_seed(0)
            m.lora.mask.copy_(torch.empty_like(m.lora.B).uniform_(generator=draw) < row.keep)
    return model
