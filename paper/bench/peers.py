"""The benchmark's peers: transformers and PEFT on our tensors, with our model's interface."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.olmoe.modeling_olmoe import OlmoeMLP

from paper.bench.worlds import ALPHA, RANK, World, everywhere

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT = ("gate_proj", "up_proj", "down_proj")


class Peer(nn.Module):
    """A transformers model with the interface of ours, so that train.train_step can train it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def decoder(self) -> nn.Module:
        """The module with the layers."""
        with_adapters = hasattr(self.model, "get_base_model")
        return (self.model.get_base_model() if with_adapters else self.model).model

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict]:
        """tokens, targets [B, T] -> the sum of the cross-entropies, and an empty routing."""
        out = self.model(
            input_ids=tokens,
            labels=targets,
            shift_labels=targets,
            num_items_in_batch=1,
            use_cache=False,
        )
        return out.loss, {}

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], max_new: int, stops: tuple[int, ...], _batch_size: int
    ) -> list[list[int]]:
        """Like generate.generate, for prompts of one batch."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self.device)
        real = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device
        )
        out = self.model.generate(
            input_ids=ids, attention_mask=real, do_sample=False, max_new_tokens=max_new,
            eos_token_id=list(stops) or None, pad_token_id=0,
        )  # fmt: skip
        new = out[:, width:].tolist()
        return [row[: next((n for n, t in enumerate(row) if t in stops), max_new)] for row in new]


def transformers_model(
    world: World, layout: Callable[[World, nn.Module], dict[str, Tensor]]
) -> nn.Module:
    """transformers' model on the world's tensors. `layout` gives the experts' parameters."""
    transformers.logging.set_verbosity_error()
    if world.cfg.family != "olmoe":
        raise ValueError(f"the peers are built for olmoe only, not for {world.cfg.family}")
    unset = {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    config = transformers.AutoConfig.for_model(**world.hub | unset)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config,
            dtype=world.dtype,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    state = {}
    for name in world.base:
        parts = list(world.parts(name))
        state |= dict(parts) if len(parts) == 1 else {}
    model.load_state_dict(state | layout(world, model), assign=True)
    with torch.device(world.device):  # the buffers are in no checkpoint
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.requires_grad_(False)


def fused(world: World, model: nn.Module) -> dict[str, Tensor]:
    """transformers 5: gate and up of all experts in one parameter. Only these two are copied."""
    state = {}
    for i in world.cfg.moe_layers:
        ours, theirs = f"layers.{i}.moe.experts.", f"model.layers.{i}.mlp.experts."
        halves = [world.base[f"{ours}{leaf}.weight"] for leaf in ("gate", "up")]
        state[f"{theirs}gate_up_proj"] = torch.cat(halves, dim=1)  # [E, 2F, D]
        state[f"{theirs}down_proj"] = world.base[f"{ours}down.weight"]
    return state


def one_by_one(world: World, model: nn.Module) -> dict[str, Tensor]:
    """transformers 4: each expert is a module, and each matrix a Linear. They are views of ours."""
    with torch.device("meta"):
        for layer in model.model.layers:
            layer.mlp = SparseMoeBlock(model.config)
    # With the name "olmoe", PEFT would turn these targets into the fused ones.
    model.config.model_type = "olmoe-in-transformers-4"
    stacks = [name for name in world.base if ".experts." in name]
    return {part: value for name in stacks for part, value in world.parts(name)}


class SparseMoeBlock(nn.Module):
    """transformers 4's OlmoeSparseMoeBlock, operation by operation. It visits every expert."""

    def __init__(self, config: transformers.OlmoeConfig):
        super().__init__()
        self.n_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.norm_topk = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, self.n_experts, bias=False)
        self.experts = nn.ModuleList(OlmoeMLP(config) for _ in range(self.n_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = hidden.flatten(0, 1)
        weights = F.softmax(self.gate(x), dim=1, dtype=torch.float)
        weights, selected = torch.topk(weights, self.top_k, dim=-1)
        if self.norm_topk:
            weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        final = torch.zeros_like(x)
        mask = F.one_hot(selected, num_classes=self.n_experts).permute(2, 1, 0)  # [E, K, M]
        for e, expert in enumerate(self.experts):
            choice, token = torch.where(mask[e])
            current = x[None, token].reshape(-1, x.shape[-1])
            current = expert(current) * weights[token, choice, None]
            final.index_add_(0, token, current.to(x.dtype))
        return final.view_as(hidden)


def with_lora(model: nn.Module, **targets: object) -> Peer:
    """PEFT's LoRA of the paper's rank on `targets`. A and B are fp32, as usual in PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers
        return Peer(
            peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **targets))
        )


def peft_fused(world: World) -> Peer:
    """LoRA on all experts of the fused layout. PEFT cannot adapt a part of a parameter.

    gate and up share one A there, so a layer has E * r * D numbers fewer than ours.
    """
    parameters = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = transformers_model(world, fused)
    return with_lora(model, target_modules=list(ATTENTION), target_parameters=parameters)


def peft_v4(world: World, experts: dict[int, list[int]]) -> Peer:
    """LoRA on the given experts, in the layout of transformers 4."""
    modules = "|".join(
        rf"{i}\.mlp\.experts\.({'|'.join(map(str, ids))})" for i, ids in experts.items()
    )
    experts_too = rf"({modules})\.({'|'.join(EXPERT)})"
    always = rf"\d+\.(self_attn\.({'|'.join(ATTENTION)})|mlp\.gate)"
    model = transformers_model(world, one_by_one)
    return with_lora(model, target_modules=rf".*layers\.({experts_too}|{always})")


# name -> (builder, our method that it matches, trained numbers that it lacks)
BUILDERS = {
    "peft": (peft_fused, "lora", lambda cfg: len(cfg.moe_layers) * cfg.n_experts * RANK * cfg.dim),
    "peft-v4-lora": (lambda world: peft_v4(world, everywhere(world.cfg)), "lora", lambda cfg: 0),
    "peft-v4-hellora": (lambda world: peft_v4(world, world.hot), "hellora", lambda cfg: 0),
}


def plain(world: World) -> Peer:
    """transformers alone, as with merged adapters."""
    return Peer(transformers_model(world, fused)).eval()


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A checkpoint, read by transformers' own loader."""
    transformers.logging.set_verbosity_error()
    straight = device.type == "cuda" and find_spec("accelerate")  # read onto the GPU at once
    options = {"device_map": str(device)} if straight else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.to(device)


def release() -> dict[str, str]:
    """The versions of transformers and PEFT."""
    return {"transformers": transformers.__version__, "peft": peft.__version__}
