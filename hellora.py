"""LoRA, DoRA, LoRI and HELLoRA: which weights get a low-rank update, and what that update is.

Letters added to those of moe_model.py:  r rank    k adapted experts of a layer    n rows that visit them
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from math import sqrt
from pathlib import Path
from types import EllipsisType
from zlib import crc32

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from checkpoint import base_of
from moe_model import Block, GroupedLinear, Linear, MoEModel, Rows
from ranks import on_rank_0, put, whole
from run import read_run, write_atomically
from tokenizer import Tokenizer, load_tokenizer

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
ROUTER = ("moe.router",)
Index = int | EllipsisType  # one matrix of a stack, or all there are
ALWAYS_VISITED = tuple(f"{mlp}.{leaf}" for mlp in ("moe.shared", "dense") for leaf in ("gate", "up", "down"))


@dataclass(frozen=True)
class Method:
    """One row of the paper's tables: where updates go (rule, sites) and what is trained of them."""

    rule: str | None = "all"  # the catcher.RULES entry that picks each layer's adapted experts; None: none
    sites: tuple[str, ...] = (*ATTENTION, *ROUTER)  # adapted linear maps of a layer, besides its experts
    train_a: bool = True  # False: A stays at its random start (LoRI)
    keep: float = 1.0  # share of B's entries that is trained (LoRI-S: 0.1)
    dora: bool = False  # True: also train the length of every row of W + BA
    train_base: bool = False  # True: train every weight, attach nothing


METHODS = {
    "fft": Method(rule=None, sites=(), train_base=True),
    "lora": Method(),
    "dora": Method(dora=True),
    "lori-d": Method(train_a=False),
    "lori-s": Method(train_a=False, keep=0.1),
    "hellora": Method(rule="hot"),
    "hellori-d": Method(rule="hot", train_a=False),
    "hellori-s": Method(rule="hot", train_a=False, keep=0.1),
}
SUFFIXES = {  # they stack: "hellora_pure_c" adapts the coldest experts and nothing else
    "m": {"rule": "global-hot"},  # m, c, pure, gate: Tables 4 to 6
    "c": {"rule": "cold"},
    "pure": {"sites": ()},
    "gate": {"sites": ROUTER},
    "r": {"rule": "random"},  # r, none, attn: controls that the paper lacks
    "none": {"rule": None},
    "attn": {"sites": ATTENTION},
}


def parse_method(name: str) -> Method:
    """Read a method name: "hellora_pure_c" is the METHODS row "hellora" changed by the SUFFIXES pure and c.

    Raises ValueError for an unknown name, and for two suffixes about one thing.
    """
    base, *suffixes = name.split("_")
    known = base in METHODS and all(s in SUFFIXES for s in suffixes) and not (base == "fft" and suffixes)
    changes = [change for s in suffixes for change in SUFFIXES[s].items()] if known else []
    if not known or len(dict(changes)) < len(changes):
        raise ValueError(
            f"unknown method {name!r}: want one of {', '.join(METHODS)}, and after any but fft the suffixes "
            f"_{', _'.join(SUFFIXES)}, each about another thing: hellora_pure_c, but not hellora_m_c"
        )
    method = replace(METHODS[base], **dict(changes))
    if not (method.rule or method.sites or method.train_base):
        raise ValueError(f"method {name!r} adapts nothing: leave out _none or _pure")
    return method


class LowRank(nn.Module):
    """The update scale * B A of one matrix (stack=()) or of k matrices (stack=(k,)); Eq. 3 of the paper.

    With LoRI's mask B is B * mask (Eq. 4). Values are set by `init_adapters`, not here.
    """

    def __init__(self, weight: Tensor, method: Method, stack: tuple[int, ...], rank: int, alpha: float):
        """weight [..., out, in] is what will be updated."""
        super().__init__()
        self.scale = alpha / rank
        *_, out_dim, in_dim = weight.shape
        with torch.device(weight.device):
            self.A = nn.Parameter(torch.empty(*stack, rank, in_dim), requires_grad=method.train_a)
            self.B = nn.Parameter(torch.empty(*stack, out_dim, rank))
            self.magnitude = nn.Parameter(torch.empty(*stack, out_dim)) if method.dora else None
            mask = torch.empty(*stack, out_dim, rank, dtype=torch.bool) if method.keep < 1 else None
        self.register_buffer("mask", mask)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A transposed [*stack, in, r] and B transposed [*stack, r, out], ready to multiply rows."""
        b = self.B if self.mask is None else self.B * self.mask
        return self.A.to(dtype).mT, b.to(dtype).mT

    def delta(self, at: Index = ...) -> Tensor:
        """scale * B A in float32, [*stack, out, in]; or of matrix `at` of the stack only."""
        a_t, b_t = self.factors(torch.float32)
        return self.scale * (a_t[at] @ b_t[at]).mT

    def row_scale(self, weight: Tensor, at: Index = ...) -> Tensor:
        """DoRA: wanted / present length of each row of weight [*stack, out, in] + delta, [*stack, out].

        The present length counts as a constant in the backward pass. Source: PEFT's DoraLinearLayer.forward.
        """
        with torch.no_grad():
            length = (weight.float() + self.delta(at)).norm(dim=-1)
        return self.magnitude[at] / length

    def merged(self, weight: Tensor, at: Index = ...) -> Tensor:
        """weight [*stack, out, in] with the update folded in, in float32."""
        after = weight.float() + self.delta(at)
        return after if self.magnitude is None else after * self.row_scale(weight, at)[..., None]


class LoRALinear(Linear):
    """A frozen Linear plus a low-rank update. It keeps the name `weight`, so checkpoints still fit."""

    def __init__(self, base: Linear, method: Method, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.weight = base.weight
        self.lora = LowRank(base.weight, method, (), rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        a, b = self.lora.factors(x.dtype)
        y, z = super().forward(x), x @ a * self.lora.scale
        y = torch.addmm(y.flatten(0, -2), z.flatten(0, -2), b).view_as(y)  # y + z @ b, in one pass
        if self.lora.magnitude is not None:
            y = y * self.lora.row_scale(self.weight).to(x.dtype)
        return y


class LoRAGroupedLinear(GroupedLinear):
    """A frozen stack of expert weights plus low-rank updates of k of them; rows of the others pay nothing."""

    def __init__(self, base: GroupedLinear, experts: list[int], method: Method, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.weight = base.weight
        self.experts = experts  # [k] ascending; Rows.adapted are the rows that visit them
        self.lora = LowRank(base.weight, method, (len(experts),), rank, alpha)

    def forward(self, x: Tensor, hot_x: Tensor, rows: Rows) -> Tensor:
        """[N, in], of these the rows of adapted experts [n, in] -> [N, out]"""
        y = super().forward(x, hot_x, rows)
        a, b = self.lora.factors(x.dtype)
        z = rows.matmul(hot_x, a, rows.adapted_ends) * self.lora.scale  # [n, r]
        low = rows.matmul(z, b, rows.adapted_ends)  # [n, out]
        if self.lora.magnitude is not None:  # DoRA: (m / length) (y + low) = y + [(m / length) (y + low) - y]
            hot_y = y if rows.adapted is None else y.index_select(0, rows.adapted)
            ratio = self.lora.row_scale(self.weight[self.experts]).to(x.dtype)  # [k, out]
            sizes = rows.adapted_ends.diff(prepend=rows.adapted_ends.new_zeros(1))
            ratio = ratio.repeat_interleave(sizes, dim=0, output_size=len(low))  # [n, out]
            low = ratio * (hot_y + low) - hot_y
        return rows.join(y, low)


def sites(layer: Block, method: Method, linear_router: bool) -> list[str]:
    """Names of the plain linear maps of `layer` that `method` adapts.

    Shared experts and dense layers are visited by every token: they are adapted in full wherever experts
    are. A router that is a bare parameter on the Hub is not: so the paper's 23.2 % for DeepSeekMoE comes out.
    """
    wanted = [*method.sites, *(ALWAYS_VISITED if method.rule else ())]
    wanted = [site for site in wanted if linear_router or site not in ROUTER]
    present = {name for name, m in layer.named_modules() if isinstance(m, Linear)}
    return [site for site in wanted if site in present]


def attach(model: MoEModel, method: Method, experts: dict[int, list[int]], rank: int, alpha: float) -> None:
    """Freeze `model` and put adapters in it, in place, without values (see init_adapters).

    experts: {MoE layer: ids of its adapted experts, ascending}, as catcher.choose gives them; layers that
    are not named, or have an empty list, get no expert adapters.
    """
    model.requires_grad_(method.train_base)
    for i, layer in enumerate(model.layers):
        for site in sites(layer, method, model.cfg.linear_router):
            replace_module(layer, site, LoRALinear(layer.get_submodule(site), method, rank, alpha))
        if method.rule and experts.get(i):
            for leaf in ("gate", "up", "down"):
                base = getattr(layer.moe.experts, leaf)
                setattr(layer.moe.experts, leaf, LoRAGroupedLinear(base, experts[i], method, rank, alpha))
            layer.moe.adapted = torch.tensor(experts[i], device=base.weight.device)


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def adapters(model: nn.Module) -> dict[str, LoRALinear | LoRAGroupedLinear]:
    """Every adapted module of `model` by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear | LoRAGroupedLinear)}


@torch.no_grad()
def init_adapters(model: MoEModel, seed: int | str, start: dict[str, Tensor] | None = None) -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: the adapted model starts as the base model.

    Call it after the weights are loaded. The draw of A depends on `seed` and on the module's name only.
    `start`: values of an adapter_state that are to be taken in place of these (lori_start's masks and A).
    Source: PEFT's LoraLayer.reset_lora_parameters (kaiming_uniform with a = sqrt 5).
    """
    for name, m in adapters(model).items():
        draw = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
        bound = 1 / sqrt(m.lora.A.shape[-1])
        put(m.lora.A, torch.empty(m.lora.A.shape).uniform_(-bound, bound, generator=draw))
        m.lora.B.zero_()
        if m.lora.mask is not None:
            m.lora.mask.fill_(True)
        if m.lora.magnitude is not None:
            put(m.lora.magnitude, adapted_weight(m).float().norm(dim=-1))
    state = adapter_state(model)
    for name, value in (start or {}).items():
        put(state[name], value)
    restore_adapted_ids(model)


def restore_adapted_ids(model: MoEModel) -> None:
    """Set each layer's buffer of adapted experts again: materialising a meta model wipes buffers."""
    for layer in model.layers:
        if layer.moe is not None and isinstance(layer.moe.experts.gate, LoRAGroupedLinear):
            layer.moe.adapted.copy_(torch.tensor(layer.moe.experts.gate.experts))


def adapted_weight(m: LoRALinear | LoRAGroupedLinear) -> Tensor:
    """The part of the frozen weight that the update changes, [out, in] or [k, out, in]."""
    return whole(m.weight)[m.experts] if isinstance(m, LoRAGroupedLinear) else whole(m.weight)


@torch.no_grad()
def merge(model: MoEModel) -> None:
    """Fold every update into its weight, in fp32 and rounded once, and take the adapters out, in place."""
    for m in adapters(model).values():
        after = m.lora.merged(adapted_weight(m))
        if isinstance(m, LoRAGroupedLinear):
            m.weight[m.experts] = after.to(m.weight.dtype)
        else:
            m.weight.copy_(after)
    detach(model)


def detach(model: MoEModel) -> None:
    """Take the adapters out, in place; the base weights stay as they are."""
    for name, m in adapters(model).items():
        *stack, out_dim, in_dim = m.weight.shape
        with torch.device("meta"):
            plain = GroupedLinear(*stack, in_dim, out_dim) if stack else Linear(in_dim, out_dim)
        plain.weight = m.weight
        replace_module(model, name, plain)
    for layer in model.layers:
        if layer.moe is not None:
            layer.moe.adapted = layer.moe.adapted[:0]


def count_params(model: MoEModel, method: Method) -> tuple[int, int]:
    """(trained, stored) numbers; the paper's Params column is their ratio, stored including the adapters.

    Of a masked B what the masks keep is trained; of a model of shapes (meta device), that is
    round(keep * entries of all B).
    """
    b_total = sum(m.lora.B.numel() for m in adapters(model).values())
    b_trained = round(method.keep * b_total)
    if method.keep < 1 and model.device.type != "meta":
        b_trained = sum(int(m.lora.mask.sum()) for m in adapters(model).values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained - b_total + b_trained, sum(p.numel() for p in model.parameters())


def adapter_flops(model: MoEModel, shares: dict[int, float]) -> float:
    """FLOPs that the adapters add to one token's forward pass; the backward pass scales alike.

    shares: {layer: the share of its expert visits that adapted experts get}. A and B cost 2 r (in + out) for
    each row that meets them: every token for a linear map, K * share rows of a token for a stack.
    """
    total = 0.0
    for name, m in adapters(model).items():
        *_, rank, in_dim = m.lora.A.shape
        stacked = isinstance(m, LoRAGroupedLinear)
        rows = model.cfg.top_k * shares[int(name.split(".")[1])] if stacked else 1
        total += rows * 2 * rank * (in_dim + m.lora.B.shape[-2])
    return total


def adapter_state(model: MoEModel) -> dict[str, Tensor]:
    """What a run must keep: A, B (and mask, magnitude) of each adapter; without adapters, every weight."""
    state = model.state_dict()
    if not adapters(model):
        return state
    return {name: value for name, value in state.items() if ".lora." in name}


@torch.no_grad()
def fill(model: MoEModel, saved: dict[str, Tensor], folder: Path) -> None:
    """Put back the adapter_state of `folder`. Raises ValueError for other names or shapes."""
    state = adapter_state(model)
    wrong = saved.keys() ^ state.keys() or {n for n in state if state[n].shape != saved[n].shape}
    if wrong:
        raise ValueError(f"the adapter saved in {folder} does not fit, as {min(wrong)} shows: train again")
    for name, value in saved.items():
        put(state[name], value)


def save_adapter(folder: Path, model: MoEModel) -> None:
    """adapter.safetensors: what `fill` takes. Every rank must take part."""
    state = on_rank_0(adapter_state(model))
    write_atomically(folder / "adapter.safetensors", lambda draft: save_file(state, draft))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """What a run ended with: adapter.safetensors, or if that is damaged the weights of the last save.

    Raises FileNotFoundError, or ValueError if neither is what run.json has the checksum of.
    """
    path, last = folder / "adapter.safetensors", folder / "state.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: want the folder of a run that was trained to its end")
    right = (read_run(folder).get("hashes") or {}).get("adapter")
    for file, place in ((path, ""), (last, "weights/")):
        with suppress(SafetensorError, OSError):
            saved = {n.removeprefix(place): t for n, t in load_file(file).items() if n.startswith(place)}
            if right in (None, sha256(save(saved)).hexdigest()):
                return saved
        print(f"{file} is truncated or corrupt, or not of the last step")
    raise ValueError(f"{path} and {last} are truncated or corrupt: train again")


def attach_run(model: MoEModel, folder: Path) -> dict:
    """Put the adapters of a finished run of train.py, with their values, on its base model; its run.json."""
    run, saved = read_run(folder, "adapted", "rank", "alpha"), read_adapter(folder)
    if {tuple(t.shape[-2:-1]) for name, t in saved.items() if name.endswith(".lora.A")} - {(run["rank"],)}:
        raise ValueError(
            f"{folder / 'run.json'}: rank is {run['rank']}, but not that of the adapter: train again"
        )
    experts = model.cfg.by_layer(run["adapted"], folder / "run.json")
    attach(model, parse_method(run["method"]), experts, run["rank"], run["alpha"])
    for m in adapters(model).values():  # of a model of shapes, the adapters alone get memory
        if m.lora.B.is_meta:
            m.lora.to_empty(device="cpu")
    fill(model, saved, folder)
    return run


def load_run(
    folder: str | Path, merged: bool = True, dtype: torch.dtype = torch.float32, device: object = "cpu"
) -> tuple[MoEModel, Tokenizer, dict]:
    """A finished run of train.py: its model (adapters merged, or live), its tokenizer, and its run.json."""
    source = base_of(Path(folder))
    model = MoEModel.from_pretrained(source, dtype, device)
    run = attach_run(model, Path(folder))
    if merged:
        merge(model)
    return model.requires_grad_(False), load_tokenizer(source), run
