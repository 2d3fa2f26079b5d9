"""HELLoRA in numpy: a port with gradients by hand, compared with golden.json.

    python examples/numpy_port.py

It follows docs/porting.md: count, choose, add adapters, train one step, merge. Each forward
function returns its result and a function `back`. `back` takes the gradient of the result, and
returns the gradient of the input. On its way it adds the gradients of adapters to `grads`. The port
computes in float64, one example and one expert at a time, so that it is easy to read.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch  # only to read and round to bfloat16, which numpy lacks
from numpy import ndarray as Array
from safetensors.torch import load_file

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden.json").read_text())
CONFIG = json.loads((HERE.parent / "tiny/config.json").read_text())
RANK, ALPHA, K = (GOLDEN["about"]["settings"][name] for name in ("rank", "alpha", "k"))
SCALE = ALPHA / RANK
LAYERS, EXPERTS = range(CONFIG["num_hidden_layers"]), range(CONFIG["num_experts"])

Back = Callable[[Array], Array]


def rms_norm(x: Array, weight: Array) -> tuple[Array, Back]:
    """x / rms(x) * weight, over the last axis."""
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"])

    def back(dy: Array) -> Array:
        d = dy * weight
        return r * d - x * r**3 * (d * x).mean(-1, keepdims=True)

    return x * r * weight, back


def softmax(x: Array) -> tuple[Array, Back]:
    """softmax over the last axis."""
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p, lambda dp: p * (dp - (dp * p).sum(-1, keepdims=True))


def rotate(x: Array, direction: int = 1) -> Array:
    """Rotary positions, with halves paired as in the Hub's checkpoints. x: [H, T, d].

    The backward pass rotates in the other direction.
    """
    half = x.shape[-1] // 2
    turn = CONFIG["rope_theta"] ** (-np.arange(half) / half)  # [d / 2] per position
    angle = np.arange(x.shape[1])[:, None] * turn  # [T, d / 2]
    cos, sin = np.cos(angle), direction * np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def heads(x: Array) -> Array:
    """[T, H d] -> [H, T, d]."""
    return x.reshape(len(x), CONFIG["num_attention_heads"], -1).swapaxes(0, 1)


def joined(x: Array) -> Array:
    """[H, T, d] -> [T, H d]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


class Model:
    """The embedded OLMoE, its adapters and their gradients."""

    def __init__(self) -> None:
        stored = load_file(HERE.parent / "tiny/model.safetensors")
        self.w = {name: value.double().numpy() for name, value in stored.items()}
        self.hot: dict[int, list[int]] = {}  # layer -> its adapted experts
        self.adapters: dict[str, Array] = {}  # A: [1 or k, r, in], B: [1 or k, out, r]
        self.grads: dict[str, Array] = {}
        self.visits = np.zeros((len(LAYERS), len(EXPERTS)), dtype=int)

    def linear(self, x: Array, name: str, lora: str, slot: int | None = 0) -> tuple[Array, Back]:
        """Eq. 3: W x + (alpha / r) B A x. x: [n, in].

        slot: the adapter's index in its stack. None: there is no adapter.
        """
        w = self.w[f"{name}.weight"]
        if slot is None or not self.adapters:
            return x @ w.T, lambda dy: dy @ w
        a, b = (self.adapters[f"{lora}.lora.{side}"][slot] for side in "AB")
        z = x @ a.T  # [n, r]

        def back(dy: Array) -> Array:
            dz = SCALE * dy @ b
            self.grads[f"{lora}.lora.A"][slot] += dz.T @ x
            self.grads[f"{lora}.lora.B"][slot] += SCALE * dy.T @ z
            return dy @ w + dz @ a

        return x @ w.T + SCALE * z @ b.T, back

    def attention(self, x: Array, i: int) -> tuple[Array, Back]:
        """Causal attention, with a norm on queries and keys. x: [T, D]."""

        def project(leaf: str, x: Array) -> tuple[Array, Back]:
            return self.linear(
                x, f"model.layers.{i}.self_attn.{leaf}_proj", f"layers.{i}.attn.{leaf}"
            )

        (q, q_back), (k, k_back), (v, v_back) = (project(leaf, x) for leaf in "qkv")
        q, q_norm = rms_norm(q, self.w[f"model.layers.{i}.self_attn.q_norm.weight"])
        k, k_norm = rms_norm(k, self.w[f"model.layers.{i}.self_attn.k_norm.weight"])
        q, k, v = rotate(heads(q)), rotate(heads(k)), heads(v)
        root = np.sqrt(q.shape[-1])
        future = np.triu(np.full((len(x), len(x)), -np.inf), 1)
        share, share_back = softmax(q @ k.swapaxes(1, 2) / root + future)  # [H, T, T]
        out, out_back = project("o", joined(share @ v))

        def back(dy: Array) -> Array:
            d = heads(out_back(dy))
            dscore = share_back(d @ v.swapaxes(1, 2)) / root
            dq, dk = rotate(dscore @ k, -1), rotate(dscore.swapaxes(1, 2) @ q, -1)
            dv = share.swapaxes(1, 2) @ d
            return q_back(q_norm(joined(dq))) + k_back(k_norm(joined(dk))) + v_back(joined(dv))

        return out, back

    def expert(self, x: Array, i: int, e: int) -> tuple[Array, Back]:
        """SwiGLU: down(silu(gate x) * up x). x: [n, D], the rows that visit expert `e`."""
        slot = self.hot[i].index(e) if e in self.hot.get(i, []) else None

        def project(leaf: str, x: Array) -> tuple[Array, Back]:
            name = f"model.layers.{i}.mlp.experts.{e}.{leaf}_proj"
            return self.linear(x, name, f"layers.{i}.moe.experts.{leaf}", slot)

        (gate, gate_back), (up, up_back) = project("gate", x), project("up", x)
        s = 1 / (1 + np.exp(-gate))
        out, out_back = project("down", gate * s * up)

        def back(dy: Array) -> Array:
            dh = out_back(dy)
            return gate_back(dh * up * s * (1 + gate * (1 - s))) + up_back(dh * gate * s)

        return out, back

    def moe(self, x: Array, i: int) -> tuple[Array, Back]:
        """The sum of each token's chosen experts, weighted by the router. x: [T, D]."""
        logits, logits_back = self.linear(x, f"model.layers.{i}.mlp.gate", f"layers.{i}.moe.router")
        weight, weight_back = softmax(logits)  # over all experts: OLMoE does not rescale the chosen
        top_k = CONFIG["num_experts_per_tok"]
        ids = np.argsort(-weight, axis=-1, kind="stable")[:, :top_k]  # [T, K]
        self.visits[i] += np.bincount(ids.ravel(), minlength=len(EXPERTS))
        y, visited = np.zeros_like(x), []
        for e in np.unique(ids):
            rows = (ids == e).any(1).nonzero()[0]
            out, out_back = self.expert(x[rows], i, e)
            y[rows] += weight[rows, e, None] * out
            visited.append((e, rows, out, out_back))

        def back(dy: Array) -> Array:
            dx, dweight = np.zeros_like(x), np.zeros_like(weight)
            for e, rows, out, out_back in visited:
                dweight[rows, e] = (dy[rows] * out).sum(-1)
                dx[rows] += out_back(weight[rows, e, None] * dy[rows])
            return dx + logits_back(weight_back(dweight))  # experts not chosen have gradient 0

        return y, back

    def __call__(self, ids: Array) -> tuple[Array, Back]:
        """Token ids [T] -> logits [T, V]."""
        x, backs = self.w["model.embed_tokens.weight"][ids], []
        for i in LAYERS:
            for norm, part in (
                ("input_layernorm", self.attention),
                ("post_attention_layernorm", self.moe),
            ):
                normed, norm_back = rms_norm(x, self.w[f"model.layers.{i}.{norm}.weight"])
                y, part_back = part(normed, i)
                x = x + y
                backs.append((norm_back, part_back))
        x, last_back = rms_norm(x, self.w["model.norm.weight"])
        head = self.w["lm_head.weight"]

        def back(dlogits: Array) -> Array:
            dx = last_back(dlogits @ head)
            for norm_back, part_back in reversed(backs):
                dx = dx + norm_back(part_back(dx))
            return dx

        return x @ head.T, back

    def loss(self, examples: list[dict], learn: bool = False) -> float:
        """The mean loss over all target tokens. learn: also leave its gradients in `grads`."""
        n_targets = sum(len(e["ids"]) - e["answer"] for e in examples)
        self.grads = {name: np.zeros_like(value) for name, value in self.adapters.items()}
        summed = 0.0
        for e in examples:
            ids = np.array(e["ids"])
            logits, back = self(ids[:-1])
            # The positions that predict a token of the answer.
            at = np.arange(e["answer"] - 1, len(ids) - 1)
            p, _ = softmax(logits)
            summed -= np.log(p[at, ids[at + 1]]).sum()
            if learn:
                dlogits = np.zeros_like(p)
                dlogits[at] = p[at] / n_targets
                dlogits[at, ids[at + 1]] -= 1 / n_targets
                back(dlogits)
        return summed / n_targets

    def attach(self, hot: dict[int, list[int]]) -> None:
        """Add adapters to q, k, v, o, the router and each hot expert, by golden.json's formula."""
        self.hot = hot
        for lora, names in self.sites().items():
            (n_out, n_in), n = self.w[f"{names[0]}.weight"].shape, len(names)
            for side, shape in ("A", (n, RANK, n_in)), ("B", (n, n_out, RANK)):
                i, row, column = np.indices(shape)
                angle = 1 + i + 2 * row + 3 * column
                self.adapters[f"{lora}.lora.{side}"] = (
                    0.1 * np.sin(angle) if side == "A" else 0.01 * np.cos(angle)
                )

    def sites(self) -> dict[str, list[str]]:
        """An adapter's name -> the linear maps of the base that it updates: one, or k experts'."""
        found = {}
        for i in LAYERS:
            base, lora = f"model.layers.{i}.", f"layers.{i}."
            found |= {f"{lora}attn.{leaf}": [f"{base}self_attn.{leaf}_proj"] for leaf in "qkvo"}
            found[f"{lora}moe.router"] = [f"{base}mlp.gate"]
            for leaf in ("gate", "up", "down"):
                names = [f"{base}mlp.experts.{e}.{leaf}_proj" for e in self.hot[i]]
                found[f"{lora}moe.experts.{leaf}"] = names
        return found

    def merge(self) -> None:
        """W + (alpha / r) B A for each W. After this there are no adapters."""
        for lora, names in self.sites().items():
            a, b = (self.adapters[f"{lora}.lora.{side}"] for side in "AB")
            for slot, name in enumerate(names):
                self.w[f"{name}.weight"] += SCALE * b[slot] @ a[slot]
        self.adapters, self.hot = {}, {}


def choose(visits: Array) -> dict[int, list[int]]:
    """Each layer's K most visited experts, ascending. Of equal ones, the lower id is chosen."""
    return {i: sorted(np.argsort(-visits[i], kind="stable")[:K].tolist()) for i in LAYERS}


def numbers() -> dict:
    """The numbers of golden.json, under the same names."""
    model, examples = Model(), GOLDEN["examples"]
    trained = examples[:8]  # as stated in "about"
    found = {"1 loss of the base": model.loss(trained)}
    model.visits[:] = 0
    logits, _ = model(np.array(examples[0]["ids"][:-1]))
    found["1 logits after the first example's inputs, of ids 0 to 4"] = logits[-1, :5].tolist()
    for example in examples[1:]:
        model(np.array(example["ids"][:-1]))
    found["2 visits of each layer's experts"] = {str(i): model.visits[i].tolist() for i in LAYERS}
    hot = choose(model.visits)
    found["2 hot experts"] = {str(i): ids for i, ids in hot.items()}
    model.attach(hot)
    found["3 trained parameters"] = sum(value.size for value in model.adapters.values())
    found["3 loss with adapters"] = model.loss(trained, learn=True)
    found["4 norm of each gradient"] = {n: float(np.linalg.norm(g)) for n, g in model.grads.items()}
    adamw = GOLDEN["about"]["AdamW"]
    # AdamW's first step: its bias-corrected averages are g and g squared.
    for name, g in model.grads.items():
        model.adapters[name] -= adamw["lr"] * g / (np.sqrt(g * g) + adamw["eps"])
    found["4 loss after one step of AdamW"] = model.loss(trained)
    model.merge()
    found["5 loss when merged"] = model.loss(trained)
    model.w = {name: torch.from_numpy(w).bfloat16().double().numpy() for name, w in model.w.items()}
    found["5 loss when merged and rounded to bfloat16"] = model.loss(trained)
    return found


def furthest(ours: object, golden: object) -> float:
    """The largest difference of two numbers in dictionaries or lists of the same form."""
    if isinstance(golden, dict):
        return max(furthest(ours[name], value) for name, value in golden.items())
    if isinstance(golden, list):
        return max(furthest(a, b) for a, b in zip(ours, golden, strict=True))
    return abs(ours - golden)


if __name__ == "__main__":
    for name, ours in numbers().items():
        print(f"{name:60s} differs by {furthest(ours, GOLDEN[name]):.1e} from golden.json")
