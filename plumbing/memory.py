"""What a run takes of a device's memory, by arithmetic on the shapes of its tensors.

A model of shapes alone (meta device) has the tensors that stay: weights, adapters. A training step
adds their gradients, AdamW's two values, what each operation keeps for the backward pass, and what
is there for a moment only. `training` counts these, `problem` what scoring adds to the weights.
tests/test_memory.py holds the sum against what PyTorch really allocates on a CPU.

Letters are those of moe_model.py and hellora.py. Sizes are in bytes, of one device.
"""

import math
from collections import Counter

import torch
from torch import nn

import hellora
from hellora import Method
from moe_model import LOSS_CHUNK, MLP, Block, MoEConfig, MoEModel
from plumbing.checkpoint import empty_model

PARTS = (
    "weights", "gradients", "AdamW", "put together for a moment",
    "kept for the backward pass", "logits, or a layer's gradients",
)  # fmt: skip
STAY = PARTS[:3]  # from the first step to the last


def shapes(
    cfg: MoEConfig, method: Method, k: int, rank: int, alpha: float, dtype: torch.dtype
) -> MoEModel:
    """The model as `method` trains it, without memory: computed in `dtype`, frozen weights too."""
    model = empty_model(cfg, dtype).to(torch.float32 if method.train_base else dtype)
    experts = list(range(cfg.n_experts if method.rule == "all" else k))
    hellora.attach(model, method, dict.fromkeys(cfg.moe_layers, experts), rank, alpha)
    return model


def visits_of(method: Method, k: int, n_experts: int) -> float:
    """The share of visits that adapted experts are reckoned to get: four times an even share.

    It is an estimate. The 8 hot ones of OLMoE's 64 get about a half of what GSM8K visits.
    """
    return min(1.0, 4 * k / n_experts) if method.chooses else 1.0


# ---- training ------------------------------------------------------------------------------------


def training(
    model: MoEModel,
    tokens: int,
    share: float,
    recompute: bool = False,
    n: int = 1,
    cut: bool = False,
    on_cpu: bool = False,
) -> dict[str, int]:
    """{PARTS: bytes} on each of n devices at the worst moment of a step.

    tokens: of a micro-batch, padding included. share: of visits that adapted experts get. cut:
    --shard full. on_cpu: there a norm keeps its input in float32; CUDA's is one kernel.

    The gradients of earlier micro-batches are there, so a step of a single one takes less.
    """
    size, dim = model.dtype.itemsize, model.cfg.dim
    layers = [kept(layer, model, tokens, share, on_cpu, cut) for layer in model.layers]
    # Into the last norm, and out of it.
    ends = tokens * dim * (of_norms(model, on_cpu) + size)
    # log_softmax, and its gradient before and after, in float32.
    logits = 3 * 4 * min(tokens, LOSS_CHUNK) * model.cfg.vocab_size
    passing = max(gradients_of(layer, model, tokens, share) for layer in model.layers)
    if recompute:  # the inputs of all layers, and a layer as it is computed again
        stays = len(layers) * tokens * (dim * size + decided(model))
        moment = max(logits, max(layers) + passing)
    else:
        stays, moment = sum(layers), max(logits, passing)
    return held(model, n, cut) | dict(zip(PARTS[4:], (stays + ends, moment), strict=True))


def held(model: MoEModel, n: int, cut: bool) -> dict[str, int]:
    """The first four of PARTS: what does not depend on the tokens.

    Cut up, a GPU holds its part of each parameter (the largest part: rows are not cut), and besides
    the layer that is computed, the next one on its way, the rest (embedding, norm, head) in one
    piece, and a layer's gradients before and after they are added up. Else the gradients once more,
    in the message that does that.
    """
    full = all(p.requires_grad for p in model.parameters())
    there = dict.fromkeys(("weights", "trained"), 0)
    sent, gradients = Counter(), Counter()  # of each layer, "" for the rest: bytes put together
    for name, p in model.named_parameters():
        part = (-(-p.shape[0] // n) if cut else p.shape[0]) * math.prod(p.shape[1:])
        there["weights"] += part * p.element_size()
        there["trained"] += part * p.requires_grad
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        # Full fine-tuning is sent as it is computed, in bf16.
        size = 2 if full else p.element_size()
        sent[layer] += part * n * size
        gradients[layer] += part * n * (size + 4) * p.requires_grad
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())  # masks; never cut
    rest = sent.pop("")
    of_layers = rest + 2 * max(sent.values()) + max(gradients.values())
    together = of_layers if cut else 4 * there["trained"] * (n > 1)
    sizes = (there["weights"] + buffers, 4 * there["trained"], 8 * there["trained"], together)
    return dict(zip(PARTS[:4], sizes, strict=True))


def kept(layer: Block, model: MoEModel, tokens: int, share: float, on_cpu: bool, cut: bool) -> int:
    """What a layer keeps of a forward pass for its backward pass.

    That is what a gradient is computed from: the inputs of norms, of products of two tensors that
    both change, and of maps whose weight is trained. A frozen map keeps nothing.
    """
    cfg, size, attn = model.cfg, model.dtype.itemsize, layer.attn
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    into_norms = 2 * cfg.dim + (q + kv) * (cfg.qk_norm + cfg.qk_head_norm)
    total = tokens * into_norms * of_norms(model, on_cpu)

    width = 2 * (q + kv)  # of a token: q and k as rotated, v, and what attention returns
    width += cfg.dim * any(map(needs_input, (attn.q, attn.k, attn.v)))
    for m in (attn.q, attn.k, attn.v, attn.o):
        width += added(m)
    mlps = [layer.dense] if layer.moe is None else [layer.moe.shared]
    width += sum(mlp_width(mlp) for mlp in mlps if mlp is not None)
    total += tokens * width * size
    total += copies(layer, size, cut)
    if layer.moe is None:
        return total + tokens * cfg.dim * size * needs_input(layer.dense.gate)

    moe, experts = layer.moe, layer.moe.experts
    shared = moe.shared is not None and needs_input(moe.shared.gate)
    width = cfg.dim * (needs_input(moe.router) or shared) + added(moe.router)
    total += tokens * (width * size + decided(model) + 4 * cfg.n_experts + 8 * cfg.top_k + 48)

    # Rows: gate(x), its silu, up(x) and their product; and which row serves which token.
    rows, adapted = tokens * cfg.top_k, share * tokens * cfg.top_k
    total += rows * (4 * cfg.expert_dim * size + 24)
    width = cfg.dim * needs_input(experts.gate) + cfg.expert_dim * needs_input(experts.down)
    # Here DoRA's factors are rows as well.
    width += sum(2 * added(m) - rank_of(m) for m in (experts.gate, experts.up, experts.down))
    return total + int(adapted * width * size)


def of_norms(model: MoEModel, on_cpu: bool) -> int:
    """Bytes that a norm keeps of a number. On a CPU a trained weight has it keep its output too."""
    if on_cpu:
        return 4 * (1 + model.norm.weight.requires_grad)
    return model.dtype.itemsize


def decided(model: MoEModel) -> int:
    """The Routing of one token in one layer, which is there until the step is counted."""
    return model.cfg.n_experts * model.dtype.itemsize + model.cfg.top_k * (8 + 4)


def mlp_width(mlp: MLP) -> int:
    """Numbers that an MLP keeps of a token: gate(x), its silu, up(x), perhaps their product."""
    hidden = len(mlp.gate.weight)
    extra = added(mlp.gate) + added(mlp.up) + added(mlp.down)
    return (3 + needs_input(mlp.down)) * hidden + extra


def needs_input(m: nn.Module) -> bool:
    """Whether a gradient is computed from the map's input: that of its weight, or of its A."""
    return m.weight.requires_grad or (hasattr(m, "lora") and m.lora.A.requires_grad)


def rank_of(m: nn.Module) -> int:
    """r of an adapted map, else 0."""
    return m.lora.A.shape[-2] if hasattr(m, "lora") else 0


def added(m: nn.Module) -> int:
    """Numbers that an adapter keeps of a row: A x, and for DoRA what its factors multiply."""
    dora = hasattr(m, "lora") and m.lora.magnitude is not None
    return rank_of(m) + dora * m.weight.shape[-2]


def copies(layer: Block, size: int, cut: bool) -> int:
    """What is kept of factors and trained weights, if they are stored in another dtype.

    It is what they are in the dtype of the computation. A masked B is a copy in any case. Cut up, a
    trained weight is put together in that dtype, and let go of.
    """
    total = 0
    for name, p in layer.named_parameters():
        factor = ".lora." in name
        copied = p.element_size() != size and p.ndim > 1
        total += p.numel() * size * (copied and (factor or (p.requires_grad and not cut)))
    masks = [b for name, b in layer.named_buffers() if name.endswith(".mask") and size == 4]
    return total + sum(mask.numel() * size for mask in masks)


def gradients_of(layer: Block, model: MoEModel, tokens: int, share: float) -> int:
    """The gradients that a layer's experts (or its MLP) have at one time in the backward pass.

    Of as many rows as are computed together: two as wide as the layer, two as an expert. By then
    the input of `down`, if it was kept, is let go of.
    """
    cfg = model.cfg
    if layer.moe is None:
        mlp, rows, hidden = layer.dense, tokens, cfg.dense_dim
    else:
        mlp, hidden = layer.moe.experts, cfg.expert_dim
        rows = tokens * cfg.top_k * max(share, 1 - share)
    width = 2 * cfg.dim + (2 - needs_input(mlp.down)) * hidden
    return int((rows * width + tokens * cfg.dim) * model.dtype.itemsize)


# ---- scoring -------------------------------------------------------------------------------------


def problem(cfg: MoEConfig, size: int, longest: int, max_new: int) -> int:
    """What one of the problems that are decoded together adds to the weights.

    That is its cache, and what the first pass holds in one layer: K rows of each token, with the
    experts' input, output and three hidden vectors; queries, keys and values in float32; and one
    number per head for each pair of tokens, where heads share keys. size: bytes of a number.
    """
    length = min(longest + max_new, cfg.max_len)
    cache = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * length * size
    rows = cfg.top_k * (3 * cfg.dim + 4 * cfg.expert_dim) * size
    pairs = 8 * cfg.n_heads * longest if cfg.n_kv_heads < cfg.n_heads else 0
    return cache + longest * (rows + 12 * cfg.dim * 4 + pairs)
