"""DeepSeekMoE-16B (model_type "deepseek", v1) in float64 loops: an oracle with no code of ours."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its Hub name, in float64."""
    index = Path(folder) / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {
        key: value.double()
        for shard in shards
        for key, value in load_file(Path(folder) / shard).items()
    }


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, over the last dimension."""
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def swiglu(x: Tensor, w: dict[str, Tensor], prefix: str) -> Tensor:
    """down(silu(gate x) * up x)."""
    gate, up, down = (w[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    gated = x @ gate.T
    return (gated * torch.sigmoid(gated) * (x @ up.T)) @ down.T


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """RoPE of one head vector: dimension i turns with i + half (non-interleaved rotate_half)."""
    half = x.shape[0] // 2
    angle = position / theta ** (torch.arange(half, dtype=torch.float64) / half)  # [half]
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def attention(x: Tensor, w: dict[str, Tensor], prefix: str, config: dict) -> Tensor:
    """Causal attention over one sequence, one head and one query at a time."""
    length, hidden = x.shape  # [T, D]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    theta, size = config.get("rope_theta", 1e4), hidden // heads
    # q is [T, heads * size], k and v are [T, kv_heads * size]
    q, k, v = (x @ w[f"{prefix}.{part}_proj.weight"].T for part in "qkv")
    out = torch.zeros_like(q)  # [T, heads * size]
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        kv_head = head // (heads // kv_heads)
        shared = slice(kv_head * size, (kv_head + 1) * size)
        queries = [rotate(q[t, mine], t, theta) for t in range(length)]
        keys = [rotate(k[t, shared], t, theta) for t in range(length)]
        for t in range(length):
            # of every key so far: [t + 1]
            scores = torch.stack([queries[t] @ keys[s] / math.sqrt(size) for s in range(t + 1)])
            out[t, mine] = torch.softmax(scores, 0) @ v[: t + 1, shared]
    return out @ w[f"{prefix}.o_proj.weight"].T


def moe(x: Tensor, w: dict[str, Tensor], prefix: str, config: dict) -> Tensor:
    """Shared experts plus the weighted top-k routed experts, token by token."""
    top_k, out = config["num_experts_per_tok"], torch.zeros_like(x)  # [T, D]
    for t, token in enumerate(x):
        scores = torch.softmax(w[f"{prefix}.gate.weight"] @ token, 0).tolist()  # [E]
        chosen = sorted(range(config["n_routed_experts"]), key=scores.__getitem__, reverse=True)[
            :top_k
        ]
        total = 1.0
        if (
            config.get("norm_topk_prob", False) and top_k > 1
        ):  # v1 leaves a single expert's weight as it is
            total = sum(scores[e] for e in chosen) + 1e-20
        for e in chosen:
            out[t] += scores[e] / total * swiglu(token, w, f"{prefix}.experts.{e}")
        if config.get("n_shared_experts"):
            out[t] += swiglu(token, w, f"{prefix}.shared_experts")
    return out


def sequence_logits(w: dict[str, Tensor], config: dict, tokens: Tensor) -> Tensor:
    """Logits [T, V] of one sequence [T]."""
    eps = config.get("rms_norm_eps", 1e-6)
    x = w["model.embed_tokens.weight"][tokens]  # [T, D]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        x = x + attention(
            rms_norm(x, w[f"{name}.input_layernorm.weight"], eps), w, f"{name}.self_attn", config
        )
        h = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], eps)
        dense = layer < config.get("first_k_dense_replace", 0)
        x = x + (swiglu(h, w, f"{name}.mlp") if dense else moe(h, w, f"{name}.mlp", config))
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


@torch.no_grad()
def deepseek_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] in float64 of tokens [B, T], from a checkpoint folder in Hub layout."""
    config = json.loads((Path(folder) / "config.json").read_text())
    w = read_tensors(folder)
    return torch.stack([sequence_logits(w, config, row) for row in tokens])


def deepseek_greedy(folder: Path, prompt: list[int], n: int) -> list[int]:
    """The n tokens that follow prompt greedily; everything is run again for each of them."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(deepseek_logits(folder, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]
