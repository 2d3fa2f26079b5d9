"""HELLoRA in transformers 5: the hot experts and adapters of a run of train.py, on an OLMoE there.

    python examples/transformers_hellora.py --run runs/DIR --model OLMOE --prompt "Question: ..."

It is one file to copy from. It imports nothing of this repository. It reads run.json (method, rank,
alpha, adapted experts) and adapter.safetensors. The model can also be trained: only the adapters
have gradients.
"""

import argparse
import json
from pathlib import Path
from types import EllipsisType

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer


class LowRank(nn.Module):
    """scale * B A for one matrix, or for k experts: A [(k,) r, in], B [(k,) out, r]."""

    def __init__(self, saved: dict[str, Tensor], name: str, scale: float, train_a: bool):
        super().__init__()
        self.A = nn.Parameter(saved.pop(f"{name}.lora.A"), requires_grad=train_a)
        self.B = nn.Parameter(saved.pop(f"{name}.lora.B"))
        # LoRI-S trains B where the mask is True.
        self.register_buffer("mask", saved.pop(f"{name}.lora.mask", None))
        self.scale = scale

    def factors(self, expert: int | EllipsisType = ...) -> tuple[Tensor, Tensor]:
        """A and the masked B. expert: the index of the expert, if there are k."""
        return self.A[expert], (self.B if self.mask is None else self.B * self.mask)[expert]

    def of_rows(self, x: Tensor, expert: int | EllipsisType = ...) -> Tensor:
        """[..., in] -> [..., out]"""
        a, b = self.factors(expert)
        return F.linear(F.linear(x, a.to(x.dtype)) * self.scale, b.to(x.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The merged weight, for a module that uses `weight` in its own way (the router)."""
        a, b = self.factors()
        return weight + (self.scale * b @ a).to(weight.dtype)


class LoRALinear(nn.Module):
    """A frozen Linear plus its update."""

    def __init__(self, base: nn.Linear, low: LowRank):
        super().__init__()
        self.base, self.low = base, low

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return self.base(x) + self.low.of_rows(x)


class HotExperts(nn.Module):
    """OlmoeExperts with updates on some experts. Rows of the other experts cost no more."""

    def __init__(self, base: nn.Module, hot: list[int], gate: LowRank, up: LowRank, down: LowRank):
        super().__init__()
        self.base, self.gate, self.up, self.down = base, gate, up, down
        # Hot experts are stored in ascending order.
        self.slot = {expert: i for i, expert in enumerate(hot)}

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """x [M, D], the K experts of each token and their routing weights [M, K] -> [M, D]"""
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, which = (chosen == expert).nonzero(as_tuple=True)
            rows, slot = x[token], self.slot.get(expert)
            gate, up = F.linear(rows, self.base.gate_up_proj[expert]).chunk(2, dim=-1)
            if slot is not None:
                gate, up = gate + self.gate.of_rows(rows, slot), up + self.up.of_rows(rows, slot)
            hidden = F.silu(gate) * up
            out = F.linear(hidden, self.base.down_proj[expert])
            if slot is not None:
                out = out + self.down.of_rows(hidden, slot)
            y.index_add_(0, token, out * weight[token, which, None].to(x.dtype))
        return y


def apply_run(model: nn.Module, folder: Path) -> nn.Module:
    """Put the adapters of a run on its base model, in place, and freeze everything else."""
    run = json.loads((folder / "run.json").read_text())
    saved = load_file(folder / "adapter.safetensors")
    if run["method"].startswith(("fft", "dora")):
        raise ValueError(
            f"{run['method']} is not a plain low-rank update: use export.py --format hub"
        )
    model.requires_grad_(False)

    def take(name: str) -> LowRank:
        return LowRank(
            saved, name, run["alpha"] / run["rank"], train_a="lori-" not in run["method"]
        )

    for i, layer in enumerate(model.model.layers):
        for site in "qkvo":
            if f"layers.{i}.attn.{site}.lora.A" in saved:
                low = take(f"layers.{i}.attn.{site}")
                name = f"{site}_proj"
                setattr(layer.self_attn, name, LoRALinear(getattr(layer.self_attn, name), low))
        if f"layers.{i}.moe.router.lora.A" in saved:
            parametrize.register_parametrization(
                layer.mlp.gate, "weight", take(f"layers.{i}.moe.router")
            )
        if hot := run["adapted"].get(str(i)):
            pairs = [take(f"layers.{i}.moe.experts.{leaf}") for leaf in ("gate", "up", "down")]
            layer.mlp.experts = HotExperts(layer.mlp.experts, hot, *pairs)
    if saved:
        raise ValueError(f"the adapter has {min(saved)}, but the model does not: want an OLMoE")
    return model


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--model", required=True, help="the run's base model: a folder or a Hub id")
    p.add_argument("--prompt", required=True)
    args = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = apply_run(AutoModelForCausalLM.from_pretrained(args.model), args.run)
    batch = tokenizer(args.prompt, return_tensors="pt")
    print(tokenizer.decode(model.generate(**batch, max_new_tokens=64)[0]))
