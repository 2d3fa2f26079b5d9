"""A Mixture-of-Experts decoder in plain PyTorch: OLMoE, Mixtral, DeepSeekMoE, Qwen3-MoE.

Read it from top to bottom: sizes, the experts, the router, attention, a layer, the whole model.
This file knows nothing of adapters. Any module here may be replaced by another that is called in
the same way. hellora.py replaces `Linear`, `GroupedLinear` and `Experts`.

Letters for tensor sizes, the same in every file:
    B sequences    T tokens per sequence    S tokens in the key/value cache    V vocabulary
    D model width  H query heads            G key/value heads                  C channels per head
    E experts per layer    K experts per token    F hidden width of one expert
    M tokens = B*T         N rows = M*K: one copy of a token for each expert that it visits
    L layers               n some of these rows (in KVCache: some sequences)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # target of a position that is not trained on: prompt or padding
LOSS_CHUNK = 1024  # positions whose fp32 logits exist at one time: 206 MB for 50,304 words


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Everything in which the supported backbones differ.

    plumbing/checkpoint.py makes it from a config.json. No code below asks for a model's name: each
    difference is a value here.
    """

    family: str  # the Hub's model_type. It decides only the names of the checkpoint's tensors
    vocab_size: int  # V
    dim: int  # D
    n_layers: int
    n_heads: int  # H
    n_kv_heads: int  # G
    n_experts: int  # E
    top_k: int  # K
    expert_dim: int  # F
    norm_topk: bool  # rescale the K routing weights of a token so that they sum to 1
    qk_norm: bool  # RMSNorm on the whole query and the whole key, before the split into heads
    max_len: int  # the context: tokens
    rope_theta: float
    norm_eps: float
    own_head_dim: int = 0  # C where it is not D / H, else 0
    qk_head_norm: bool = False  # RMSNorm on the query and the key of each head
    tied: bool = False  # the output layer is the embedding, transposed
    linear_router: bool = True  # False: on the Hub the router is a parameter, not a Linear
    n_shared: int = 0  # experts that every token visits, kept as one MLP of width n_shared * F
    n_dense: int = 0  # leading layers with one MLP of width dense_dim in place of the experts
    dense_dim: int = 0

    @property
    def head_dim(self) -> int:
        """C"""
        return self.own_head_dim or self.dim // self.n_heads

    @property
    def moe_layers(self) -> range:
        """The layers with experts."""
        return range(self.n_dense, self.n_layers)


class Linear(nn.Module):
    """A linear map without bias. It multiplies in the dtype of its input."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        # Weights come from a checkpoint, so no random values are drawn here.
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return F.linear(x, self.weight.to(x.dtype))


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x)).

    `gate` is SwiGLU's word, and a part of the tensor's name in saved files. It has nothing to do
    with the router, which some papers and checkpoints also call a gate.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = Linear(dim, hidden)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


# ---- experts: the same MLP, with matrices that depend on the row's expert ------------------------
#
# Each token is copied once for each expert that it visits. The copies are the rows. They are sorted
# by expert, so that each expert owns one segment of them and multiplies it by its own matrix.
#
# An example with two tokens, K = 2 and three experts. Token 0 visits the experts 2 and 0, token 1
# the experts 2 and 1. A slot is one (token, choice) pair, and slots are numbered token by token: 0
# and 1 are of token 0, 2 and 3 of token 1. Sorted by expert, the slots are [1, 3, 0, 2]. They visit
# the experts 0, 1, 2, 2. The segments of the three experts end at [1, 2, 4].


class Ends:
    """Where each expert's segment ends: [1, 2, 4] in the example above.

    The host is the program on the CPU. It starts work on a GPU without waiting for it, but it has
    to wait whenever it reads a number from there.
    """

    def __init__(self, tensor: Tensor, sizes: list[int] | None = None):
        """sizes: how many rows each expert has, if the host knows it already."""
        self.tensor = tensor  # [E] int32, one past each expert's last row: a kernel reads this
        self.known = sizes

    @property
    def sizes(self) -> list[int]:
        """[E] how many rows each expert has: a loop needs this.

        The host waits for a GPU here. The sizes are kept, so it waits once a layer.
        """
        if self.known is None:
            self.known = self.tensor.diff(prepend=self.tensor.new_zeros(1)).tolist()
        return self.known


class Rows(NamedTuple):
    """Rows sorted by expert, and the function that multiplies each segment by its own matrix."""

    slot: Tensor  # [n] the slot of each row: [1, 3, 0, 2] in the example above
    ends: Ends  # of E experts
    matmul: Callable[[Tensor, Tensor, Ends], Tensor]  # looped_mm or grouped_mm, see below


def sort_by_expert(expert: Tensor, n_experts: int) -> tuple[Tensor, Ends]:
    """The expert of each slot [N] -> the slots sorted by expert [N], and the experts' ends [E]."""
    in_order, slot = expert.sort(stable=True)
    ends = torch.searchsorted(in_order, torch.arange(n_experts, device=slot.device), right=True)
    return slot, Ends(ends.int())


def looped_mm(x: Tensor, weight: Tensor, ends: Ends) -> Tensor:
    """Multiply each segment of rows by its own matrix, one after the other.

    x [n, in], in E segments that end at `ends`, and weight [E, in, out] -> [n, out].
    """
    if len(x) == 0:
        return x @ weight[0]  # [0, out]. So weight gets a gradient of zero, and not None
    parts = zip(x.split(ends.sizes), weight.unbind(0), strict=True)
    return torch.cat([part @ w for part, w in parts if len(part)])


def grouped_mm(x: Tensor, weight: Tensor, ends: Ends) -> Tensor:
    """The same as looped_mm, in one call. If `weight` is frozen, no x is kept for its gradient.

    The loop is used where the kernel fails: without any rows (pytorch #152668), and where
    `one_call` says no.
    """
    if len(x) == 0 or not one_call(x, weight):
        return looped_mm(x, weight, ends)
    return F.grouped_mm(x, weight, offs=ends.tensor)


def one_call(x: Tensor, weight: Tensor) -> bool:
    """Whether F.grouped_mm can multiply these, and the host need not wait for it.

    On CUDA it is one kernel in bf16 on Hopper and Blackwell (compute capability 9 and 10). On other
    cards, and in fp32, it is a loop too, and the host waits in each call. Source: PyTorch's
    GroupedBlas.cpp.
    """
    if any(size * x.element_size() % 16 for size in weight.shape[1:]):
        return False  # a row must have a multiple of 16 bytes. Rank 2 in fp32 has 8
    if not x.is_cuda:
        return True
    card, _ = torch.cuda.get_device_capability(x.device)
    if card == 10 and weight.requires_grad:
        return False  # the gradient of an expert without rows is wrong (pytorch #172439)
    return card in (9, 10) and x.dtype == torch.bfloat16


MATMULS = {"grouped": grouped_mm, "loop": looped_mm}  # the choices of --experts


class GroupedLinear(nn.Module):
    """E linear maps in one [E, out, in] tensor. A row goes through the map of its expert."""

    def __init__(self, n_experts: int, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_dim, in_dim))

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """[n, in] -> [n, out]"""
        return rows.matmul(x, self.weight.to(x.dtype).mT, rows.ends)


def sum_by_token(y: Tensor, slot: Tensor, n_tokens: int, top_k: int) -> Tensor:
    """Rows [n, D] and their slots [n] -> the sum of the rows of each token [M, D]."""
    # The slots of token t are t * K to t * K + K - 1, so in order of slots its rows are neighbours.
    in_order, row = slot.sort()  # [n] the rows, token by token
    tokens = torch.arange(n_tokens, device=slot.device)  # [M]
    first = torch.searchsorted(in_order, top_k * tokens)  # [M] where each token's rows begin
    # This sums y[row] between one token's first row and the next one's. index_add would do as well,
    # but on a GPU it adds in an order that is not fixed.
    return F.embedding_bag(row, y, first, mode="sum")


class Experts(nn.Module):
    """The routed experts of one layer. This loop computes the same (mistral-inference, moe.py):

        for e, expert in enumerate(experts):
            token, choice = torch.where(expert_ids == e)
            y[token] += weight[token, choice, None] * expert(x[token])

    Rows are sorted by expert only for speed and memory: one product then serves all experts.
    """

    def __init__(
        self, gate: GroupedLinear, up: GroupedLinear, down: GroupedLinear, matmul: Callable
    ):
        super().__init__()
        self.gate, self.up, self.down, self.matmul = gate, up, down, matmul

    def forward(self, tokens: Tensor, weight: Tensor, expert_ids: Tensor) -> Tensor:
        """Tokens [M, D], routing weights [M, K], experts visited [M, K] -> weighted sums [M, D]."""
        slot, ends = sort_by_expert(expert_ids.flatten(), self.n_experts)
        return self.mlp(tokens, weight, Rows(slot, ends, self.matmul))

    @property
    def n_experts(self) -> int:
        """E"""
        return len(self.gate.weight)

    def mlp(self, tokens: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        """Tokens [M, D], routing weights [M, K] -> what these rows add to their tokens [M, D]."""
        n_tokens, top_k = weight.shape
        # Each row is a copy of its token. tokens[rows.slot // top_k] does the same, but on a CPU it
        # takes 1.1 to 2.5 times as long, with its gradient. index_select is as fast, but on a GPU
        # its gradient is a sum in an order that is not fixed (torch.use_deterministic_algorithms).
        x = F.embedding(rows.slot // top_k, tokens)  # [n, D]
        row_weight = weight.flatten()[rows.slot, None].to(x.dtype)  # [n, 1]
        hidden = F.silu(self.gate(x, rows)) * self.up(x, rows)  # [n, F]
        # `down` is linear, so the routing weight may come before it or after it. Its gradient needs
        # what it is multiplied with: hidden [n, F] before, or the output of `down` [n, D] after. In
        # OLMoE F is the smaller.
        hidden = hidden * row_weight
        return sum_by_token(self.down(hidden, rows), rows.slot, n_tokens, top_k)


def recomputed(function: Callable, *args: object) -> object:
    """function(*args). Only `args` are kept, and the backward pass runs the function again.

    This is activation checkpointing: less memory, more time.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class Routing(NamedTuple):
    """What one layer's router decided for each token."""

    expert_ids: Tensor  # [B, T, K] the experts visited
    probability: Tensor  # [B, T, K] their softmax probabilities, before any rescaling
    logits: Tensor  # [B, T, E]


class MoE(nn.Module):
    """Route each token to K of E experts and add up what they return, weighted by the router."""

    def __init__(self, cfg: MoEConfig, matmul: Callable):
        super().__init__()
        n_experts, dim, hidden = cfg.n_experts, cfg.dim, cfg.expert_dim
        self.top_k, self.norm_topk = cfg.top_k, cfg.norm_topk
        self.router = Linear(dim, n_experts)
        self.experts = Experts(
            gate=GroupedLinear(n_experts, dim, hidden),
            up=GroupedLinear(n_experts, dim, hidden),
            down=GroupedLinear(n_experts, hidden, dim),
            matmul=matmul,
        )
        self.shared = MLP(dim, cfg.n_shared * hidden) if cfg.n_shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """[B, T, D] -> [B, T, D] and the routing. Source: transformers' OlmoeSparseMoeBlock."""
        tokens = x.flatten(0, 1)  # [M, D]

        # The router scores all experts. A token visits the K with the highest scores. The softmax
        # comes before the choice, so that a weight is the expert's share among all E. It is in
        # fp32, because in bf16 it would make different scores equal.
        logits = self.router(tokens)  # [M, E]
        probability = logits.softmax(-1, dtype=torch.float32)  # [M, E]
        probability, expert_ids = probability.topk(self.top_k)  # [M, K] each
        weight = probability
        if self.norm_topk:
            weight = probability / probability.sum(-1, keepdim=True)

        y = self.experts(tokens, weight, expert_ids)  # [M, D]
        if self.shared is not None:
            y = y + self.shared(tokens)  # every token visits these, with weight 1

        # The routing is returned, because the catcher counts it and the balancing loss needs it.
        routing = Routing(
            expert_ids=expert_ids.unflatten(0, x.shape[:2]),
            probability=probability.unflatten(0, x.shape[:2]),
            logits=logits.unflatten(0, x.shape[:2]),
        )
        return y.view_as(x), routing


# ---- the rest of a decoder -----------------------------------------------------------------------


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
        """Keys and values of new tokens [B, G, T, C] -> all those of the layer [B, G, S, C]."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, sequences: Tensor) -> None:
        """Keep only these sequences [n] of the batch, ascending. No other memory is taken."""
        n = len(sequences)
        # One layer at a time, because a copy of all layers would take twice the memory.
        for half in (self.k, self.v):
            for layer in half:  # [B, G, S, C]
                layer[:n, :, : self.length] = layer[sequences, :, : self.length]
        self.k, self.v, self.pad = self.k[:, :n], self.v[:, :n], self.pad[sequences]


class Positions(NamedTuple):
    """Where the T tokens of this call stand, and what they may look at. All layers share it."""

    cos: Tensor  # [B or 1, 1, T, C], the second half of the channels repeats the first
    sin: Tensor
    mask: Tensor | None  # [B, 1, T, S] True where a query may see a key. None: plain causal


def positions(
    cfg: MoEConfig, n_tokens: int, cache: KVCache | None, device: torch.device
) -> Positions:
    """Rotary angles and attention mask for the next `n_tokens` tokens."""
    column = torch.arange(n_tokens, device=device)  # [T]
    if cache is None:
        position, mask = column[None], None
    else:
        column = cache.length + column
        position = (column - cache.pad[:, None]).clamp(min=0)  # [B, T], 0 at the first real token
        key = torch.arange(cache.length + n_tokens, device=device)  # [S]
        real = key >= cache.pad[:, None, None]  # [B, 1, S]
        causal = key <= column[:, None]  # [T, S]
        # A padding query sees itself, because a query without any key would give NaN.
        itself = key == column[:, None]  # [T, S]
        mask = ((real & causal) | itself)[:, None]  # [B, 1, T, S]
    channel = torch.arange(0, cfg.head_dim, 2, device=device)
    frequency = cfg.rope_theta ** (-channel / cfg.head_dim).repeat(2)  # [C]
    angle = position[:, None, :, None].float() * frequency
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
        q_dim, kv_dim = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        self.q = Linear(cfg.dim, q_dim)
        self.k = Linear(cfg.dim, kv_dim)
        self.v = Linear(cfg.dim, kv_dim)
        self.o = Linear(q_dim, cfg.dim)
        self.q_norm = RMSNorm(q_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(kv_dim, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        per_head = cfg.qk_head_norm
        self.q_head_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if per_head else nn.Identity()
        self.k_head_norm = RMSNorm(cfg.head_dim, cfg.norm_eps) if per_head else nn.Identity()

    def forward(self, x: Tensor, at: Positions, cache: KVCache | None) -> Tensor:
        """[B, T, D] -> [B, T, D]"""

        def heads(t: Tensor) -> Tensor:  # [B, T, H*C] -> [B, H, T, C]
            return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        # The order is the Hub's: a norm on the whole vector (OLMoE), the split into heads, a norm
        # on each head (Qwen3-MoE), the rotation.
        q = rotate(self.q_head_norm(heads(self.q_norm(self.q(x)))), at)
        k = rotate(self.k_head_norm(heads(self.k_norm(self.k(x)))), at)
        v = heads(self.v(x))
        if cache is not None:  # decoding: the new tokens look at all before them
            k, v = cache.extend(self.layer, k, v)
        if at.mask is not None:
            # With a mask, PyTorch has no fused kernel on a GPU for heads that share keys. It would
            # make a number for each pair of tokens in fp32. So each head gets keys of its own here.
            sharing = q.shape[1] // k.shape[1]  # H / G
            k, v = (t.repeat_interleave(sharing, 1) if sharing > 1 else t for t in (k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, at.mask, is_causal=at.mask is None, enable_gqa=at.mask is None
        )
        return self.o(y.transpose(1, 2).flatten(2))  # heads side by side again: [B, T, D]


class Block(nn.Module):
    """One decoder layer: attention, then experts. Leading dense layers have one MLP instead."""

    def __init__(self, cfg: MoEConfig, layer: int, matmul: Callable):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = Attention(cfg, layer)
        self.mlp_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.moe = MoE(cfg, matmul) if layer >= cfg.n_dense else None
        self.dense = MLP(cfg.dim, cfg.dense_dim) if layer < cfg.n_dense else None

    def forward(
        self, x: Tensor, at: Positions, cache: KVCache | None
    ) -> tuple[Tensor, Routing | None]:
        """[B, T, D] -> [B, T, D] and the routing (None in a dense layer)."""
        x = x + self.attn(self.attn_norm(x), at, cache)
        if self.moe is None:
            return x + self.dense(self.mlp_norm(x)), None
        y, routing = self.moe(self.mlp_norm(x))
        return x + y, routing


class MoEModel(nn.Module):
    """The whole decoder. Activations are in `dtype`. Parameters may be stored in another dtype."""

    def __init__(self, cfg: MoEConfig, dtype: torch.dtype = torch.float32, matmul: str = "grouped"):
        """matmul: how the experts' matrices are multiplied, "grouped" or "loop" (MATMULS)."""
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.recompute = False  # True: keep only each layer's input for the backward pass
        # nn.Embedding(...) would draw random values, only for a checkpoint to replace them.
        words = torch.empty(cfg.vocab_size, cfg.dim)
        self.embed = nn.Embedding.from_pretrained(words, freeze=False)
        self.layers = nn.ModuleList(Block(cfg, i, MATMULS[matmul]) for i in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.head = None if cfg.tied else Linear(cfg.dim, cfg.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embed.weight.device

    def trunk(
        self, tokens: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """tokens [B, T] -> last hidden states [B, T, D] and {MoE layer: Routing}.

        Routing is returned, and not recorded in the modules: `recompute` runs a layer twice, and a
        record would count it twice.
        """
        at = positions(self.cfg, tokens.shape[1], cache, tokens.device)
        x = self.embed(tokens).to(self.dtype)
        routing = {}
        for i, layer in enumerate(self.layers):
            if self.recompute:
                x, decided = recomputed(layer, x, at, cache)
            else:
                x, decided = layer(x, at, cache)
            if decided is not None:
                routing[i] = decided
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x), routing

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """tokens [B, T] -> logits [B, T, V] and {MoE layer: Routing}.

        Padding belongs on the right. With a cache it belongs on the left, and only the logits of
        the last column [B, 1, V] are made, because decoding needs no others. With targets [B, T]
        (IGNORE where there is none) the first result is no logits, but the sum of the
        cross-entropies over all targets.
        """
        x, routing = self.trunk(tokens, cache)
        if targets is not None:
            return self.summed_loss(x, targets), routing
        return self.logits(x if cache is None else x[:, -1:]), routing

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]"""
        if self.head is None:
            return F.linear(x, self.embed.weight.to(x.dtype))
        return self.head(x)

    def summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Hidden states [B, T, D], targets [B, T] -> sum of cross-entropies, a scalar in fp32.

        Only target positions meet the head, LOSS_CHUNK at a time. Their logits are not kept, but
        made again in the backward pass. Those of a whole batch would be the largest tensor of the
        step. The logits of the last chunk are kept. The backward pass begins with them, so this
        saves time and costs no memory at the peak.
        """

        def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:  # [n, D], [n] -> scalar
            return F.cross_entropy(self.logits(x).float(), targets, reduction="sum")

        wanted = (targets != IGNORE).nonzero(as_tuple=True)  # the host waits for their number
        chunks = zip(x[wanted].split(LOSS_CHUNK), targets[wanted].split(LOSS_CHUNK), strict=True)
        *earlier, last = chunks  # without any target there is one chunk, and it is empty
        return sum(recomputed(chunk_loss, *chunk) for chunk in earlier) + chunk_loss(*last)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        matmul: str = "grouped",
    ) -> "MoEModel":
        """The model of a folder with config.json and safetensors, a Hub id, or a backbone's name.

        Raises FileNotFoundError or ValueError that name what is missing, corrupt or not supported.
        """
        # Imported here, because that file imports this one.
        from plumbing.checkpoint import Checkpoint, empty_model, load_weights, locate, read_config

        folder = locate(model)
        built = empty_model(read_config(folder), dtype, matmul)
        load_weights(built, Checkpoint(folder), device)
        return built


def load_balancing_loss(routing: dict[int, Routing], real: Tensor) -> Tensor:
    """Eq. 1 of the paper over the concatenated routers of all layers: E * sum_i f_i P_i, a scalar.

    f_i is the share of tokens that visit expert i. The shares add up to K, so a balanced router
    gives K. P_i is the expert's mean probability. Both are taken over all layers, and over the
    tokens that are `real` [B, T] (False on padding). Source: transformers'
    load_balancing_loss_func.
    """
    logits = torch.cat([r.logits[real] for r in routing.values()]).float()  # [L * tokens, E]
    visits = torch.cat([r.expert_ids[real] for r in routing.values()]).flatten()
    f = torch.bincount(visits, minlength=logits.shape[1]) / len(logits)  # [E]
    p = logits.softmax(-1).mean(0)  # [E]
    return logits.shape[1] * (f * p).sum()


if __name__ == "__main__":
    print("no command by itself: train.py trains this model, see python train.py --help")
