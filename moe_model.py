"""A Mixture-of-Experts decoder in plain PyTorch, for OLMoE-1B-7B, Mixtral-8x7B and DeepSeekMoE-16B.

Letters for tensor sizes, the same in every file:
    B sequences    T tokens per sequence    S tokens in the key/value cache    V vocabulary
    D model width  H query heads            G key/value heads                  C channels per head
    E experts per layer    K experts per token    F hidden width of one expert
    M tokens = B*T         N rows = M*K, see dispatch.py
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import ranks
from checkpoint import BACKBONES, Checkpoint, MoEConfig, hub_names, locate, read_config
from dispatch import MATMULS, Combine, Dispatch, Rows, SwiGLU, sort_by_expert

__all__ = ["BACKBONES", "MoEConfig", "MoEModel"]

IGNORE = -100  # target of a position that is not trained on: prompt or padding
LOSS_CHUNK = 1024  # positions whose fp32 logits exist at one time: 206 MB for a vocabulary of 50,304


# ---- layers --------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Bias-free linear map that multiplies in the dtype of its input, whatever dtype it is stored in."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))  # filled from a checkpoint; never drawn here

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return F.linear(x, self.weight.to(x.dtype))


class GroupedLinear(nn.Module):
    """E bias-free linear maps in one [E, out, in] tensor; a row goes through the map of its expert."""

    def __init__(self, n_experts: int, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_dim, in_dim))

    def forward(self, x: Tensor, hot_x: Tensor, rows: Rows) -> Tensor:
        """[N, in] -> [N, out]. hot_x [n, in]: the rows that visit adapted experts, which adapters read."""
        return rows.matmul(x, self.weight.to(x.dtype).transpose(1, 2), rows.ends)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = Linear(dim, hidden)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """The routed experts of one layer: the MLP above, with matrices that depend on the row's expert."""

    def __init__(self, cfg: MoEConfig):
        super().__init__()
        self.gate = GroupedLinear(cfg.n_experts, cfg.dim, cfg.expert_dim)
        self.up = GroupedLinear(cfg.n_experts, cfg.dim, cfg.expert_dim)
        self.down = GroupedLinear(cfg.n_experts, cfg.expert_dim, cfg.dim)

    def forward(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        """Rows [N, D], their routing weights [N] -> weighted outputs [N, D].

        The weight is applied to the F-wide activation, which is narrower than the output; `down` is linear.
        """
        x, hot_x = rows.fork(x)  # [N, D], [n, D]
        hidden = SwiGLU.apply(self.gate(x, hot_x, rows), self.up(x, hot_x, rows), weight[:, None])  # [N, F]
        return self.down(*rows.fork(hidden), rows)


class Routing(NamedTuple):
    """What one layer's router decided for each token."""

    expert_ids: Tensor  # [B, T, K] the experts visited
    gate: Tensor  # [B, T, K] their softmax probabilities, before any rescaling
    logits: Tensor  # [B, T, E]


class MoE(nn.Module):
    """Route each token to K of E experts and add up what they return, weighted by the router."""

    def __init__(self, cfg: MoEConfig, matmul: Callable):
        super().__init__()
        self.top_k, self.norm_topk, self.matmul = cfg.top_k, cfg.norm_topk, matmul
        self.router = Linear(cfg.dim, cfg.n_experts)
        self.experts = Experts(cfg)
        self.shared = MLP(cfg.dim, cfg.n_shared * cfg.expert_dim) if cfg.n_shared else None
        self.register_buffer(
            "adapted", torch.empty(0, dtype=torch.long), persistent=False
        )  # [k], see hellora

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """[B, T, D] -> [B, T, D] and the routing. Source: transformers' OlmoeSparseMoeBlock."""
        tokens = x.flatten(0, 1)  # [M, D]
        logits = self.router(tokens)  # [M, E]
        gate, expert_ids = logits.softmax(-1, dtype=torch.float32).topk(self.top_k, dim=-1)  # [M, K] each
        weight = gate / gate.sum(-1, keepdim=True) if self.norm_topk else gate

        rows = sort_by_expert(expert_ids, logits.shape[1], self.adapted, self.matmul)
        y = Dispatch.apply(tokens, rows.token, rows.place)  # [N, D]
        y = self.experts(y, weight.flatten()[rows.order].to(y.dtype), rows)
        y = Combine.apply(y, rows.token, rows.place)  # [M, D]
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x), Routing(*(t.unflatten(0, x.shape[:2]) for t in (expert_ids, gate, logits)))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean of squares in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class KVCache:
    """Keys and values of the tokens seen so far, for prompts padded on the left to one length."""

    def __init__(self, cfg: MoEConfig, pad: Tensor, max_len: int, dtype: torch.dtype):
        """pad [B]: how many padding tokens stand before each prompt."""
        shape = (cfg.n_layers, len(pad), cfg.n_kv_heads, max_len, cfg.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=pad.device)  # [L, B, G, S, C]
        self.v = torch.empty_like(self.k)
        self.pad = pad
        self.length = 0  # columns filled so far, padding included

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put in the keys and values of new tokens [B, G, T, C]; all of that layer's so far [B, G, S, C]."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences of the batch only."""
        self.k, self.v, self.pad = self.k[:, rows], self.v[:, rows], self.pad[rows]


class Positions(NamedTuple):
    """Where the T tokens of this call stand, and what they may look at; shared by all layers."""

    cos: Tensor  # [B or 1, 1, T, C], the second half of the channels as the first
    sin: Tensor
    mask: Tensor | None  # [B, 1, T, S] True where a query may see a key. None: plain causal


def positions(cfg: MoEConfig, n_tokens: int, cache: KVCache | None, device: torch.device) -> Positions:
    """Rotary angles and attention mask for the next `n_tokens` tokens."""
    column = torch.arange(n_tokens, device=device)  # [T]
    if cache is None:
        place, mask = column[None], None
    else:
        column = cache.length + column
        place = (column - cache.pad[:, None]).clamp(min=0)  # [B, T], 0 at the first real token
        key = torch.arange(cache.length + n_tokens, device=device)  # [S]
        real = key >= cache.pad[:, None, None]  # [B, 1, S]
        causal = key <= column[:, None]  # [T, S]
        itself = key == column[:, None]  # a padding query sees itself: a row with no key at all would be NaN
        mask = ((real & causal) | itself)[:, None]  # [B, 1, T, S]
    channel = torch.arange(0, cfg.head_dim, 2, device=device)
    angle = place[:, None, :, None].float() * cfg.rope_theta ** (-channel / cfg.head_dim).repeat(2)
    return Positions(angle.cos(), angle.sin(), mask)


def rotate(x: Tensor, at: Positions) -> Tensor:
    """Rotary embedding, first half of the channels paired with the second. [B, H, T, C] -> same."""
    a, b = x.float().chunk(2, dim=-1)
    return (x * at.cos + torch.cat((-b, a), dim=-1) * at.sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads. Source: transformers' OlmoeAttention."""

    def __init__(self, cfg: MoEConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, cfg.head_dim
        kv_dim = cfg.n_kv_heads * cfg.head_dim
        self.q = Linear(cfg.dim, cfg.dim)
        self.k = Linear(cfg.dim, kv_dim)
        self.v = Linear(cfg.dim, kv_dim)
        self.o = Linear(cfg.dim, cfg.dim)
        self.q_norm = RMSNorm(cfg.dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(kv_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x: Tensor, at: Positions, cache: KVCache | None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""

        def heads(t: Tensor) -> Tensor:  # [B, T, H*C] -> [B, H, T, C]
            return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = rotate(heads(self.q_norm(self.q(x))), at)
        k = rotate(heads(self.k_norm(self.k(x))), at)
        v = heads(self.v(x))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, at.mask, is_causal=at.mask is None, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One decoder layer: attention, then experts (or, in leading dense layers, one MLP)."""

    def __init__(self, cfg: MoEConfig, layer: int, matmul: Callable):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = Attention(cfg, layer)
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.moe = MoE(cfg, matmul) if layer >= cfg.n_dense else None
        self.dense = MLP(cfg.dim, cfg.dense_dim) if layer < cfg.n_dense else None

    def forward(self, x: Tensor, at: Positions, cache: KVCache | None) -> tuple[Tensor, Routing | None]:
        """[B, T, D] -> [B, T, D] and the routing (None in a dense layer)."""
        x = x + self.attn(self.attn_norm(x), at, cache)
        if self.moe is None:
            return x + self.dense(self.mlp_norm(x)), None
        y, routing = self.moe(self.mlp_norm(x))
        return x + y, routing


class MoEModel(nn.Module):
    """The whole decoder. Activations are in `dtype`; parameters may be stored in another."""

    def __init__(self, cfg: MoEConfig, dtype: torch.dtype = torch.float32, experts: str = "grouped"):
        """experts: "grouped" or "loop", how the experts' matrices are multiplied (MATMULS)."""
        super().__init__()
        self.cfg, self.dtype, self.recompute = cfg, dtype, False
        self.embed = nn.Embedding.from_pretrained(torch.empty(cfg.vocab_size, cfg.dim), freeze=False)
        self.layers = nn.ModuleList(Block(cfg, i, MATMULS[experts]) for i in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = Linear(cfg.dim, cfg.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.head.weight.device

    def trunk(self, tokens: Tensor, cache: KVCache | None = None) -> tuple[Tensor, dict[int, Routing]]:
        """tokens [B, T] -> last hidden states [B, T, D], and the routing of each MoE layer by its index.

        Routing is returned, not recorded inside, so that it is counted once even when `recompute` (keep only
        each layer's input for the backward pass, and run the layer again there) runs a layer twice.
        """
        at = positions(self.cfg, tokens.shape[1], cache, tokens.device)
        x = self.embed(tokens).to(self.dtype)
        routing = {}
        for i, layer in enumerate(self.layers):
            run = (
                partial(recomputed, layer, use_reentrant=False, preserve_rng_state=False)
                if self.recompute
                else layer
            )
            x, decided = run(x, at, cache)
            if decided is not None:
                routing[i] = decided
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x), routing

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """tokens [B, T] -> logits [B, T, V] and {MoE layer: Routing}.

        Padding belongs on the right; with a cache on the left, and then only the last column's logits
        [B, 1, V] are made, which is what decoding needs. With targets [B, T] (IGNORE where there is none) the
        sum of the cross-entropy over all targets comes back in place of the logits.
        """
        x, routing = self.trunk(tokens, cache)
        if targets is not None:
            return self.summed_loss(x, targets), routing
        return self.head(x if cache is None else x[:, -1:]), routing

    def summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Hidden states [B, T, D], targets [B, T] -> sum of cross-entropies, a scalar in float32.

        Only target positions meet the head, LOSS_CHUNK at a time, and their logits are made again for the
        backward pass: for a whole batch they would be the largest tensor of the step.
        """

        def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:  # [n, D], [n]
            return F.cross_entropy(self.head(x).float(), targets, reduction="sum")

        wanted = targets != IGNORE
        chunks = zip(x[wanted].split(LOSS_CHUNK), targets[wanted].split(LOSS_CHUNK), strict=True)
        return sum(
            recomputed(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        experts: str = "grouped",
    ) -> "MoEModel":
        """The model of a folder with config.json and safetensors, of a Hub id, or of a BACKBONES name.

        Raises FileNotFoundError or ValueError that name what is missing, corrupt or not implemented.
        """
        folder = locate(model)
        built = empty_model(read_config(folder), dtype, experts)
        load_weights(built, Checkpoint(folder), device)
        return built


def load_balancing_loss(routing: dict[int, Routing], real: Tensor) -> Tensor:
    """Eq. 1 of the paper over the concatenated routers of all layers: E * sum_i f_i P_i, a scalar.

    f_i is the share of tokens that visit expert i (the shares add up to K, so a balanced router gives K) and
    P_i its mean probability, over all layers and over the real tokens [B, T] (False on padding).
    Source: transformers' load_balancing_loss_func (router_aux_loss_coef scales it).
    """
    logits = torch.cat([layer.logits[real] for layer in routing.values()]).float()  # [n, E]
    visits = torch.cat([layer.expert_ids[real] for layer in routing.values()]).flatten()
    visited_share = torch.bincount(visits, minlength=logits.shape[1]) / len(logits)  # [E]
    return logits.shape[1] * (visited_share * logits.softmax(-1).mean(0)).sum()


# ---- weights: Hub-layout safetensors -------------------------------------------------------------------


def empty_model(cfg: MoEConfig, dtype: torch.dtype, experts: str = "grouped") -> MoEModel:
    """A model of shapes without memory (meta device), to be filled by load_weights."""
    with torch.device("meta"):
        return MoEModel(cfg, dtype, experts).to(dtype)


def base_parameters(cfg: MoEConfig) -> dict[str, tuple[torch.Size, list[str]]]:
    """{our parameter: its shape, the checkpoint's tensors behind it}; knows nothing of adapters."""
    bare = empty_model(cfg, torch.float32)
    return {name: (p.shape, hub_names(name, cfg)) for name, p in bare.named_parameters()}


def check_weights(cfg: MoEConfig, source: Checkpoint) -> None:
    """Raise ValueError unless `source` holds exactly the tensors of a model of this config; reads no data."""
    base = base_parameters(cfg).values()
    source.check({tensor: tuple(shape[-2:]) for shape, tensors in base for tensor in tensors})


@torch.no_grad()
def load_weights(model: MoEModel, source: Checkpoint, device: str | torch.device) -> None:
    """Materialise `model` on `device` and fill its base parameters from `source`.

    Each parameter asks for its own tensors and they are read into place one by one, so the memory on top of
    the model is one tensor of the checkpoint at most. A rank reads the rows that it holds. Adapters, if
    attached, are left uninitialised.
    """
    base = base_parameters(model.cfg)
    check_weights(model.cfg, source)
    if ranks.is_cut(model):
        model.to_empty(device=device)
    else:  # the same without its empty_like of a meta tensor, which imports sympy for two seconds
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
    for name, (_, tensors) in tqdm(base.items(), "load", unit="tensor", delay=2, leave=False):
        param = model.get_parameter(name)
        rows, first = ranks.mine(param), ranks.first_row(param)
        if len(tensors) == 1:
            source.read_into(tensors[0], rows, first)
        else:
            for expert, weight in enumerate(rows, first):
                source.read_into(tensors[expert], weight)
