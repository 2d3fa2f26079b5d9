"""The memory that a run takes on a device, computed from the shapes of its tensors.

A model of shapes alone (meta device) has the tensors that stay: weights and adapters. A training
step adds their gradients, AdamW's two values, the tensors kept for the backward pass, and tensors
that live for a moment. `training` adds up these. `problem` gives what scoring adds to the weights.
tests/test_memory.py compares the sum with what PyTorch really allocates on a CPU.

The letters are those of moe_model.py and hellora.py. Sizes are bytes on one device.
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
    """The model as `method` trains it, without memory. Frozen weights have the compute `dtype`."""
    model = empty_model(cfg, dtype).to(torch.float32 if method.train_base else dtype)
    experts = list(range(cfg.n_experts if method.rule == "all" else k))
    hellora.attach(model, method, dict.fromkeys(cfg.moe_layers, experts), rank, alpha)
    return model


def visits_of(method: Method, k: int, n_experts: int) -> float:
    """The assumed share of visits that go to adapted experts: four times an even share.

    This is an estimate. OLMoE's 8 hot experts of 64 get about half of the visits on GSM8K.
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
    """{PARTS: bytes} on each of n devices, at the moment of a step that takes most.

    tokens: those of a micro-batch, with padding. share: the share of visits that go to adapted
    experts. cut: --shard full. on_cpu: a norm keeps its input in float32 there, but CUDA has one
    kernel for it. The gradients of earlier micro-batches count, so a step of a single micro-batch
    takes less.
    """
    size, dim = model.dtype.itemsize, model.cfg.dim
    layers = [kept(layer, model, tokens, share, on_cpu, cut) for layer in model.layers]
    # The input and the output of the last norm.
    ends = tokens * dim * (of_norms(model, on_cpu) + size)
    # log_softmax, its gradient, and the gradient of the logits, in float32.
    logits = 3 * 4 * min(tokens, LOSS_CHUNK) * model.cfg.vocab_size
    passing = max(gradients_of(layer, model, tokens, share) for layer in model.layers)
    if recompute:  # the inputs of all layers, and one layer that is computed again
        stays = len(layers) * tokens * (dim * size + decided(model))
        moment = max(logits, max(layers) + passing)
    else:
        stays, moment = sum(layers), max(logits, passing)
    return held(model, n, cut) | dict(zip(PARTS[4:], (stays + ends, moment), strict=True))


def held(model: MoEModel, n: int, cut: bool) -> dict[str, int]:
    """The first four of PARTS. They do not depend on the tokens.

    cut: a GPU holds its part of each parameter. (Rows are not cut, so this is the largest part.) It
    also holds, in one piece, the layer that is computed, the next layer, and the rest (embedding,
    norm, head), and a layer's gradients before and after they are added up. Without cut, the
    message that adds up the gradients has a copy of them.
    """
    full = all(p.requires_grad for p in model.parameters())
    own = dict.fromkeys(("weights", "trained"), 0)
    sent, gradients = Counter(), Counter()  # bytes put together, by layer ("" for the rest)
    for name, p in model.named_parameters():
        part = (-(-p.shape[0] // n) if cut else p.shape[0]) * math.prod(p.shape[1:])
        own["weights"] += part * p.element_size()
        own["trained"] += part * p.requires_grad
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        # With full fine-tuning, weights are sent in bf16, the dtype of the computation.
        size = 2 if full else p.element_size()
        sent[layer] += part * n * size
        gradients[layer] += part * n * (size + 4) * p.requires_grad
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())  # masks, never cut
    rest = sent.pop("")
    of_layers = rest + 2 * max(sent.values()) + max(gradients.values())
    together = of_layers if cut else 4 * own["trained"] * (n > 1)
    sizes = (own["weights"] + buffers, 4 * own["trained"], 8 * own["trained"], together)
    return dict(zip(PARTS[:4], sizes, strict=True))


def kept(layer: Block, model: MoEModel, tokens: int, share: float, on_cpu: bool, cut: bool) -> int:
    """The bytes that a layer keeps from the forward pass for its backward pass.

    Gradients are computed from them. They are the inputs of norms, of products of two tensors that
    both change, and of maps whose weight is trained. A frozen map keeps nothing.
    """
    cfg, size, attn = model.cfg, model.dtype.itemsize, layer.attn
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    into_norms = 2 * cfg.dim + (q + kv) * (cfg.qk_norm + cfg.qk_head_norm)
    total = tokens * into_norms * of_norms(model, on_cpu)

    width = 2 * (q + kv)  # of a token: rotated q and k, v, and the output of attention
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

    # For each row: gate(x), its silu, up(x), their product, and the number of its token.
    rows, adapted = tokens * cfg.top_k, share * tokens * cfg.top_k
    total += rows * (4 * cfg.expert_dim * size + 24)
    width = cfg.dim * needs_input(experts.gate) + cfg.expert_dim * needs_input(experts.down)
    # DoRA's factors are computed per row here.
    width += sum(2 * added(m) - rank_of(m) for m in (experts.gate, experts.up, experts.down))
    return total + int(adapted * width * size)


def of_norms(model: MoEModel, on_cpu: bool) -> int:
    """The bytes that a norm keeps per number. On a CPU, a trained norm keeps its output too."""
    if on_cpu:
        return 4 * (1 + model.norm.weight.requires_grad)
    return model.dtype.itemsize


def decided(model: MoEModel) -> int:
    """The bytes of one token's Routing in one layer. It is kept until the step is counted."""
    return model.cfg.n_experts * model.dtype.itemsize + model.cfg.top_k * (8 + 4)


def mlp_width(mlp: MLP) -> int:
    """The numbers that an MLP keeps per token: gate(x), its silu, up(x), perhaps their product."""
    hidden = len(mlp.gate.weight)
    extra = added(mlp.gate) + added(mlp.up) + added(mlp.down)
    return (3 + needs_input(mlp.down)) * hidden + extra


def needs_input(m: nn.Module) -> bool:
    """Whether a gradient is computed from the map's input: the gradient of its weight or its A."""
    return m.weight.requires_grad or (hasattr(m, "lora") and m.lora.A.requires_grad)


def rank_of(m: nn.Module) -> int:
    """The rank r of an adapted map, else 0."""
    return m.lora.A.shape[-2] if hasattr(m, "lora") else 0


def added(m: nn.Module) -> int:
    """The numbers that an adapter keeps per row: A x, and with DoRA the input of its factors."""
    dora = hasattr(m, "lora") and m.lora.magnitude is not None
    return rank_of(m) + dora * m.weight.shape[-2]


def copies(layer: Block, size: int, cut: bool) -> int:
    """The bytes kept of factors and trained weights that are stored in another dtype.

    They are copied to the dtype of the computation. A masked B is always a copy. With cut, a
    trained weight is put together in that dtype and freed again, so it does not count.
    """
    total = 0
    for name, p in layer.named_parameters():
        factor = ".lora." in name
        copied = p.element_size() != size and p.ndim > 1
        total += p.numel() * size * (copied and (factor or (p.requires_grad and not cut)))
    masks = [b for name, b in layer.named_buffers() if name.endswith(".mask") and size == 4]
    return total + sum(mask.numel() * size for mask in masks)


def gradients_of(layer: Block, model: MoEModel, tokens: int, share: float) -> int:
    """The bytes of gradients that a layer's experts (or its MLP) have at once in the backward pass.

    The rows are those that are computed together. Each has two gradients of the layer's width, and
    two of the expert's width. By then the input of `down`, if it was kept, is freed.
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
    """The bytes that each problem adds to the weights, when problems are decoded together.

    They are the problem's cache, and what the first pass holds in one layer. In a layer each token
    has K rows, with the experts' input, output and three hidden vectors. It has queries, keys and
    values in float32. Where heads share keys, a layer's keys and values are repeated for each head.
    size: the bytes of a number.
    """
    length = min(longest + max_new, cfg.max_len)
    cache = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * length * size
    rows = cfg.top_k * (3 * cfg.dim + 4 * cfg.expert_dim) * size
    shared = cfg.n_kv_heads < cfg.n_heads
    repeated = 2 * cfg.n_heads * cfg.head_dim * length * size * shared
    return cache + repeated + longest * (rows + 12 * cfg.dim * 4)
