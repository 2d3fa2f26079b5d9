"""HELLoRA: which weights get a low-rank update (LoRA, DoRA, LoRI, hot experts), and what it is.

Read it from top to bottom: the methods as data, the update of one matrix (LoRALinear), the updates
of stacked experts (LoRAGroupedLinear), into a model and out of it (attach, init_adapters, merge).
This is HELLoRA. Then come DoRA, LoRI's mask, what it costs, and a trained run. catcher.py finds the
hot experts. train.py trains.

Adapted experts are those that carry an update: the hot ones (HELLoRA), all (LoRA), or those that a
control chooses.

Letters added to those of moe_model.py (here n_experts is E, and A and B are LoRA's matrices):
    r rank    k adapted experts of a layer
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_model import (
    Block,
    Ends,
    Experts,
    GroupedLinear,
    Linear,
    MoEModel,
    Rows,
    sort_by_expert,
)
from plumbing.ranks import put, whole

# ---- the methods, as data ------------------------------------------------------------------------

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.o")
ROUTER = ("moe.router",)
# Every token visits shared experts and dense layers.
ALWAYS_VISITED = (
    *("moe.shared.gate", "moe.shared.up", "moe.shared.down"),
    *("dense.gate", "dense.up", "dense.down"),
)


@dataclass(frozen=True)
class Method:
    """One row of the paper's tables: where updates go, and which part of them is trained."""

    rule: str | None = "all"  # one of catcher.RULES, which chooses the adapted experts. None: none
    # The adapted linear maps. A method that adapts experts also adapts ALWAYS_VISITED.
    sites: tuple[str, ...] = (*ATTENTION, *ROUTER)
    train_a: bool = True  # False: A stays at its random start (LoRI)
    keep: float = 1.0  # share of B's entries that is trained (LoRI-S: 0.1)
    dora: bool = False  # True: also train the length of every row of W + BA
    train_base: bool = False  # True: train every weight, attach nothing

    @property
    def chooses(self) -> bool:
        """Whether it adapts a choice of experts. Then the catcher counts first.

        Random experts do not need the counts. They are counted too, so that the list shows their
        share of the visits.
        """
        return self.rule not in (None, "all")


# LoRI freezes A. LoRI-D trains all of B. LoRI-S starts again from B = 0. It trains the tenth of B
# that was largest after a LoRI-D run.
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
SUFFIXES = {  # they stack: "hellora_pure_c" adapts the coldest experts, no attention and no router
    # of Tables 4 to 6
    "m": {"rule": "global-hot"},
    "c": {"rule": "cold"},
    "pure": {"sites": ()},
    "gate": {"sites": ROUTER},  # the paper's word for the router
    # controls that the paper does not have
    "r": {"rule": "random"},
    "none": {"rule": None},
    "attn": {"sites": ATTENTION},
}


def parse_method(name: str) -> Method:
    """Read a method's name: "hellora_pure_c" is the row "hellora", changed by two suffixes.

    Raises ValueError for an unknown name, and for two suffixes about one thing.
    """
    unknown = ValueError(
        f"unknown method {name!r}: want one of {', '.join(METHODS)}, and after any but fft the "
        f"suffixes _{', _'.join(SUFFIXES)}, each about another thing: hellora_pure_c, but not "
        "hellora_m_c"
    )
    base, *suffixes = name.split("_")
    if base not in METHODS or (base == "fft" and suffixes):
        raise unknown
    changes = {}
    for suffix in suffixes:
        if suffix not in SUFFIXES or SUFFIXES[suffix].keys() & changes.keys():
            raise unknown
        changes |= SUFFIXES[suffix]
    method = replace(METHODS[base], **changes)
    if not (method.rule or method.sites or method.train_base):
        raise ValueError(f"method {name!r} adapts nothing: leave out _none or _pure")
    return method


# ---- the update of one matrix --------------------------------------------------------------------


class LowRank(nn.Module):
    """The update scale * B A of one matrix, or of each of k stacked matrices.

        y = W x + scale * B (A x)                Eq. 3 of the paper
        y = W x + scale * (B * mask) (A x)       Eq. 4: LoRI-S trains a tenth of B
        A [r, in] or [k, r, in]    B [out, r] or [k, out, r]

    `init_adapters` sets the values.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        scale: float,
        mask: Tensor | None = None,
        magnitude: Tensor | None = None,
    ):
        """mask: bool, like B. magnitude [(k,) out]: DoRA's trained length of each row of W + BA."""
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.register_buffer("mask", mask)
        # DoRA: |w|^2 of each row w of the frozen W, [(k,) out]. dora_scale fills it, once.
        self.register_buffer("square", None, persistent=False)

    @classmethod
    def empty(
        cls, weight: Tensor, method: Method, stack: tuple[int, ...], rank: int, alpha: float
    ) -> "LowRank":
        """An update of `weight` [..., out, in] without values. stack: (), or (k,) of k matrices."""
        *_, out_dim, in_dim = weight.shape
        with torch.device(weight.device):
            # In fp32 even if the weight is bf16, where small steps would be lost.
            A, B = torch.empty(*stack, rank, in_dim), torch.empty(*stack, out_dim, rank)
            mask = torch.empty_like(B, dtype=torch.bool) if method.keep < 1 else None
            magnitude = torch.empty(*stack, out_dim) if method.dora else None
        update = cls(A, B, alpha / rank, mask, magnitude)
        update.A.requires_grad_(method.train_a)  # LoRI freezes A
        return update

    def one(self, index: int) -> "LowRank":
        """The update of one matrix of the stack. It shares memory with the stack."""
        parts = (self.A, self.B, self.mask, self.magnitude)
        A, B, mask, magnitude = (None if t is None else t.detach()[index] for t in parts)
        return LowRank(A, B, self.scale, mask, magnitude)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A^T [*stack, in, r] and B^T [*stack, r, out], ready to multiply rows from the right."""
        # An entry outside the mask counts as zero. Its gradient is zero too.
        b = self.B if self.mask is None else self.B * self.mask
        return self.A.to(dtype).mT, b.to(dtype).mT

    def delta(self) -> Tensor:
        """scale * B A, in fp32, [*stack, out, in]."""
        a_t, b_t = self.factors(torch.float32)
        return self.scale * (a_t @ b_t).mT  # (A^T B^T)^T = B A

    def merged(self, weight: Tensor) -> Tensor:
        """weight [*stack, out, in] with the update folded in, in fp32."""
        after = weight.float() + self.delta()
        return after if self.magnitude is None else dora_merged(after, weight, self.magnitude)


class LoRALinear(nn.Module):
    """A frozen Linear plus a low-rank update. `weight` keeps its name, so checkpoints still fit."""

    def __init__(self, base: Linear, method: Method, rank: int, alpha: float):
        super().__init__()
        self.weight = base.weight
        self.lora = LowRank.empty(base.weight, method, (), rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        a, b = self.lora.factors(x.dtype)  # [in, r], [r, out]
        y = F.linear(x, self.weight.to(x.dtype))  # W x
        y += (x @ a * self.lora.scale) @ b  # + scale B (A x)
        if self.lora.magnitude is not None:  # DoRA, explained further below
            y = y * dora_scale(self.lora, self.weight).to(x.dtype)
        return y


# ---- the updates of stacked experts: HELLoRA's forward pass --------------------------------------


class AdaptedRows(Rows):
    """Rows that all visit adapted experts. In LoRAExperts, plain Rows visit none of them.

    This is a class and not a field of Rows, because moe_model.py knows nothing of adapters.
    """


class LoRAGroupedLinear(nn.Module):
    """A frozen stack of expert weights, plus updates of k of them.

    It works inside LoRAExperts only: plain Rows get no update.
    """

    def __init__(
        self, base: GroupedLinear, adapted: list[int], method: Method, rank: int, alpha: float
    ):
        super().__init__()
        self.weight = base.weight  # [E, out, in]
        self.adapted = adapted  # [k] ids, ascending
        # A and B of all k experts are one parameter each. So an expert that no row visits has a
        # gradient of zero and not None. AdamW moves it by its momentum, where it would skip None.
        self.lora = LowRank.empty(base.weight, method, (len(adapted),), rank, alpha)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """[n, in] -> [n, out]"""
        y = rows.matmul(x, self.weight.to(x.dtype).mT, rows.ends)  # W x
        if not isinstance(rows, AdaptedRows):
            return y
        ends = ends_of(self.adapted, rows.ends)  # of k experts: the others have no rows here
        a, b = self.lora.factors(x.dtype)  # [k, in, r], [k, r, out]
        low = rows.matmul(x, a, ends) * self.lora.scale  # [n, r] scale * A x
        y += rows.matmul(low, b, ends)  # + B low
        if self.lora.magnitude is not None:  # DoRA, explained further below
            stretch = dora_scale(self.lora, adapted_weight(self))  # [k, out]
            y = y * for_rows(stretch, ends, len(y)).to(x.dtype)
        return y


class LoRAExperts(Experts):
    """The experts of a layer. k of them carry updates. Rows of the others meet no update.

    Both kinds of rows go through the same `mlp`. The type of the rows, AdaptedRows or Rows, tells
    gate, up and down whether to add their updates.
    """

    def __init__(self, base: Experts, adapted: list[int], method: Method, rank: int, alpha: float):
        super().__init__(
            gate=LoRAGroupedLinear(base.gate, adapted, method, rank, alpha),
            up=LoRAGroupedLinear(base.up, adapted, method, rank, alpha),
            down=LoRAGroupedLinear(base.down, adapted, method, rank, alpha),
            matmul=base.matmul,
        )
        self.adapted = adapted  # [k] ids, ascending
        n = self.n_experts
        self.key = [e if e in adapted else e + n for e in range(n)]  # [E] what rows are sorted by

    def forward(self, tokens: Tensor, weight: Tensor, expert_ids: Tensor) -> Tensor:
        """Tokens [M, D], routing weights [M, K], experts visited [M, K] -> weighted sums [M, D]."""
        n_experts = self.n_experts
        expert = expert_ids.flatten()  # [N]
        if len(self.adapted) == n_experts:  # LoRA: there are no others
            slot, ends = sort_by_expert(expert, n_experts)
            return self.mlp(tokens, weight, AdaptedRows(slot, ends, self.matmul))
        # One sort puts the rows of adapted experts first, because it takes the others as the
        # experts E to 2E - 1. The weights stay in the order of the ids, so loading, merging and
        # saving do not change.
        key = as_index(self.key, expert.device)[expert]  # [N]
        slot, ends = sort_by_expert(key, 2 * n_experts)
        sizes = ends.sizes  # [2E] the host waits for a GPU here, once a layer
        n = sum(sizes[:n_experts])  # rows of adapted experts
        adapted_ends = Ends(ends.tensor[:n_experts], sizes[:n_experts])
        other_ends = Ends(ends.tensor[n_experts:] - n, sizes[n_experts:])
        adapted = AdaptedRows(slot[:n], adapted_ends, self.matmul)
        others = Rows(slot[n:], other_ends, self.matmul)
        return self.mlp(tokens, weight, adapted) + self.mlp(tokens, weight, others)


def ends_of(experts: list[int], ends: Ends) -> Ends:
    """Where the rows of each of `experts` [k], ascending, end [k]. No rows visit other experts."""
    if len(experts) == len(ends.tensor):
        return ends  # LoRA: of all
    index = as_index(experts, ends.tensor.device)
    return Ends(ends.tensor[index], [ends.sizes[e] for e in experts])


def as_index(ids: Iterable[int], device: torch.device) -> Tensor:
    """Ids as a tensor on `device`. It is made once, because the host waits for a copy to a GPU.

    (A buffer would have no values: models are made without memory, and filled from a checkpoint.)
    """
    return _as_index(tuple(ids), device)


@cache  # for which the ids must be a tuple, and no list
@torch.inference_mode(False)  # training could not use a tensor made in inference mode
def _as_index(ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(ids, device=device)


# ---- into a model and out of it ------------------------------------------------------------------


def attach(
    model: MoEModel, method: Method, adapted: dict[int, list[int]], rank: int, alpha: float
) -> None:
    """Freeze `model` and put adapters in it, in place. `init_adapters` gives them values.

    adapted: {MoE layer: ids of its adapted experts, ascending}, as catcher.choose gives them. A
    layer that is not named, or has an empty list, gets no expert adapters.
    """
    model.requires_grad_(method.train_base)  # freeze all that is there. The adapters come after
    for i, layer in enumerate(model.layers):
        for site in sites_in(layer, method, model.cfg.linear_router):
            base = layer.get_submodule(site)
            layer.set_submodule(site, LoRALinear(base, method, rank, alpha))
        if method.rule and adapted.get(i):
            layer.moe.experts = LoRAExperts(layer.moe.experts, adapted[i], method, rank, alpha)


def sites_in(layer: Block, method: Method, linear_router: bool) -> list[str]:
    """Names of the plain linear maps that `method` adapts and that `layer` has.

    A method that adapts experts also adapts the maps that every token visits. A router that is a
    bare parameter on the Hub is not adapted. With this and k = 12, HELLoRA trains 23.2 % of LoRA's
    parameters on DeepSeekMoE, as in the paper.
    """
    wanted = [*method.sites, *(ALWAYS_VISITED if method.rule else ())]
    if not linear_router:
        wanted = [site for site in wanted if site not in ROUTER]
    modules = dict(layer.named_modules())
    return [site for site in wanted if isinstance(modules.get(site), Linear)]


def adapters(model: nn.Module) -> dict[str, LoRALinear | LoRAGroupedLinear]:
    """Every module of `model` that carries an update, by name."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, LoRALinear | LoRAGroupedLinear)}


def adapted_weight(m: LoRALinear | LoRAGroupedLinear) -> Tensor:
    """The part of the frozen weight that the update changes, [out, in] or [k, out, in]."""
    weight = whole(m.weight)  # with several ranks, each may hold some rows
    if isinstance(m, LoRALinear) or len(m.adapted) == len(weight):
        return weight  # all of it, without a copy
    return weight[as_index(m.adapted, weight.device)]


@torch.no_grad()
def init_adapters(model: MoEModel, seed: int | str, start: dict[str, Tensor] | None = None) -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: the adapted model starts as the base model.

    Call it after the weights are loaded. The random numbers depend only on `seed` and on the
    module's name. In a stack, the first adapted expert gets the first of them, whatever its id.
    start: values of an adapter_state that replace these, such as LoRI's masks. Source: PEFT's
    LoraLayer.reset_lora_parameters (kaiming_uniform, a = sqrt 5).
    """
    for name, m in adapters(model).items():
        # crc32, because Python's hash() of a text differs from one process to the next.
        draw = torch.Generator().manual_seed(crc32(f"{seed} {name}".encode()))
        bound = 1 / sqrt(m.lora.A.shape[-1])
        put(m.lora.A, torch.empty(m.lora.A.shape).uniform_(-bound, bound, generator=draw))
        m.lora.B.zero_()
        if m.lora.mask is not None:
            m.lora.mask.fill_(True)
        m.lora.square = None  # the weights may be other ones now
        if m.lora.magnitude is not None:  # DoRA starts from the lengths that the rows have
            put(m.lora.magnitude, row_length(adapted_weight(m)))
    state = adapter_state(model)
    for name, value in (start or {}).items():
        put(state[name], value)


@torch.no_grad()
def merge(model: MoEModel) -> None:
    """Fold every update into its weight, in fp32 and rounded once. Then take the adapters out."""
    for m in adapters(model).values():
        after = m.lora.merged(adapted_weight(m)).to(m.weight.dtype)
        if isinstance(m, LoRAGroupedLinear):
            m.weight[m.adapted] = after
        else:
            m.weight.copy_(after)
    detach(model)


def detach(model: MoEModel) -> None:
    """Take the adapters out, in place. The base weights stay as they are."""
    for name, m in adapters(model).items():
        *stack, out_dim, in_dim = m.weight.shape
        with torch.device("meta"):  # takes no memory: it gets the weight that is there
            plain = GroupedLinear(*stack, in_dim, out_dim) if stack else Linear(in_dim, out_dim)
        plain.weight = m.weight
        model.set_submodule(name, plain)
    for layer in model.layers:
        if layer.moe is not None and isinstance(layer.moe.experts, LoRAExperts):
            experts = layer.moe.experts
            layer.moe.experts = Experts(experts.gate, experts.up, experts.down, experts.matmul)


# ---- DoRA ----------------------------------------------------------------------------------------
#
# A row of W has the weights of one output. DoRA trains A and B, and one more number for each row,
# its magnitude: the length that the row has in the end. The row of W + scale * B A has another
# length, so the output is multiplied by magnitude / length.


def dora_scale(update: LowRank, weight: Tensor) -> Tensor:
    """Trained length / present length of each row of weight + update.delta(), [*stack, out].

    weight: [*stack, out, in]. The present length is a constant in the backward pass. It is computed
    without a tensor of the weight's size: if b is a row of scale * B, then
    |w + b A|^2 = |w|^2 + 2 (w A^T) b + b (A A^T) b. Source: PEFT's DoraLinearLayer.forward.
    """
    with torch.no_grad():
        if update.square is None:
            update.square = row_length(weight) ** 2  # [*stack, out], once, as W is frozen
        a_t, b_t = update.factors(torch.float32)  # [*stack, in, r], [*stack, r, out]
        b = update.scale * b_t.mT  # [*stack, out, r]
        cross = (weight @ a_t.to(weight.dtype)).float()  # [*stack, out, r]
        grown = (b * (2 * cross + b @ (a_t.mT @ a_t))).sum(-1)  # [*stack, out]
        length = (update.square + grown).clamp(min=0).sqrt()
    return safe_ratio(update.magnitude, clamp_length(length, update.square.sqrt()))


def for_rows(scale: Tensor, ends: Ends, n: int) -> Tensor:
    """dora_scale's factors of k experts [k, out] -> those of their n rows, [n, out]."""
    sizes = ends.tensor.diff(prepend=ends.tensor.new_zeros(1))  # [k]
    expert = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=n)
    # scale.repeat_interleave does the same, but on a GPU its gradient adds in no fixed order.
    return F.embedding(expert, scale)


def dora_merged(after: Tensor, weight: Tensor, magnitude: Tensor) -> Tensor:
    """The updated weight `after` [*stack, out, in], with rows as long as `magnitude` says.

    weight: the same before the update.
    """
    length = clamp_length(row_length(after), row_length(weight))
    return after * safe_ratio(magnitude, length)[..., None]


def row_length(weight: Tensor) -> Tensor:
    """The length of each row of weight [*stack, out, in], in fp32: [*stack, out]."""
    return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32)


def clamp_length(length: Tensor, base_length: Tensor) -> Tensor:
    """The lengths of updated rows, each at least sqrt(eps) times its length without the update.

    A smaller length is the rest of a row that the update nearly cancels. In fp32 its square is
    noise.
    """
    return length.clamp(min=torch.finfo(torch.float32).eps ** 0.5 * base_length)


def safe_ratio(magnitude: Tensor, length: Tensor) -> Tensor:
    """magnitude / length, element by element. 1 where length is 0: a row of zeros, not updated."""
    nonzero = length > 0
    # Two `where`, because a division by 0 has the gradient NaN, even where it is not chosen.
    return torch.where(nonzero, magnitude / torch.where(nonzero, length, 1), 1)


# ---- LoRI's mask: which entries of B a sparse run trains -----------------------------------------
#
# A LoRI-D run trains all of B. The LoRI-S run starts again from B = 0. It trains only the tenth of
# B that was largest at the end of the D run. settings.lori_start calls `lori_masks`.
# LowRank.factors applies the mask.


def lori_masks(trained_b: dict[str, Tensor], keep: float, scope: str) -> dict[str, Tensor]:
    """Mark the `keep` share of largest |B| entries of a trained D run: {tensor name: bool like B}.

    trained_b: {tensor name: B [*stack, out, r]}. scope: the entries compete within the whole
    "model", within a "layer", or within a "matrix" (each expert has its own). Of equal entries the
    first wins, with the tensors in the order of their names. Source: LoRI's extract_mask.py,
    get_model_mask (which keeps all of equal entries, and rounds down).
    """
    if scope == "matrix":
        masks = {}
        for name, b in trained_b.items():
            matrices = b.reshape(-1, *b.shape[-2:])  # [k or 1, out, r]
            parts = [keep_largest([matrix], keep)[0] for matrix in matrices]
            masks[name] = torch.cat(parts).view(b.shape)
        return masks
    groups: dict[str, list[str]] = {}
    for name in sorted(trained_b):
        group = name.split(".")[1] if scope == "layer" else "model"  # layers.3.attn.q is of layer 3
        groups.setdefault(group, []).append(name)
    masks = {}
    for names in groups.values():
        kept = keep_largest([trained_b[name] for name in names], keep)
        masks.update(zip(names, kept, strict=True))
    return masks


def keep_largest(rivals: list[Tensor], keep: float) -> list[Tensor]:
    """Mark the largest |entries| of all `rivals` together: round(keep * their number) of them."""
    sizes = torch.cat([b.flatten() for b in rivals]).abs().float()
    kept = torch.zeros(len(sizes), dtype=torch.bool)
    kept[sizes.argsort(descending=True, stable=True)[: round(keep * len(sizes))]] = True
    parts = kept.split([b.numel() for b in rivals])
    return [part.view(b.shape) for part, b in zip(parts, rivals, strict=True)]


# ---- what it costs -------------------------------------------------------------------------------


def count_params(model: MoEModel, method: Method) -> tuple[int, int]:
    """How many numbers are trained, and how many are stored, adapters included.

    The paper's Params column is trained / stored. Of a masked B, only the entries that the mask
    keeps are trained. A model of shapes (meta device) has no masks yet. There round(keep * all of
    B) entries are trained.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(p.numel() for p in model.parameters())
    if method.keep < 1:
        updates = [m.lora for m in adapters(model).values()]
        b_total = sum(lora.B.numel() for lora in updates)
        if model.device.type == "meta":
            b_kept = round(method.keep * b_total)
        else:
            b_kept = sum(int(lora.mask.sum()) for lora in updates)
        trained += b_kept - b_total
    return trained, stored


def adapter_flops(model: MoEModel, shares: dict[int, float]) -> float:
    """FLOPs that the adapters add to one token's forward pass. The backward pass scales with it.

    shares: {layer: the share of its expert visits that adapted experts get}. A and B cost
    2 r (in + out) for each row that meets them. A linear map meets one row of each token, a stack
    K * share rows.
    """
    total = 0.0
    for name, m in adapters(model).items():
        *_, rank, in_dim = m.lora.A.shape
        stacked = isinstance(m, LoRAGroupedLinear)
        rows = model.cfg.top_k * shares[int(name.split(".")[1])] if stacked else 1
        total += rows * 2 * rank * (in_dim + m.lora.B.shape[-2])
    return total


# ---- a trained run -------------------------------------------------------------------------------
#
# Only this section reads the files of a run. The functions import what they need, so that the
# method itself needs no run folder and no tokenizer.


def adapter_state(model: MoEModel) -> dict[str, Tensor]:
    """What a run must keep: A, B, mask and magnitude of each adapter.

    Of a model without adapters: all weights.
    """
    state = model.state_dict()
    if not adapters(model):
        return state
    return {name: value for name, value in state.items() if ".lora." in name}


def attach_run(model: MoEModel, folder: Path) -> dict:
    """Put the adapters of a finished run of train.py, with their values, on its base model.

    Returns its run.json. Raises FileNotFoundError or ValueError for a run that does not fit.
    """
    from plumbing.run_folder import by_layer, read_run
    from plumbing.saves import fill, read_adapter

    run, saved = read_run(folder, "adapted", "rank", "alpha"), read_adapter(folder)
    found = {t.shape[-2] for name, t in saved.items() if name.endswith(".lora.A")}
    if found - {run["rank"]}:
        raise ValueError(
            f"{folder / 'run.json'}: rank is {run['rank']}, the adapter's is not: train again"
        )
    adapted = by_layer(model.cfg, run["adapted"], folder / "run.json")
    attach(model, parse_method(run["method"]), adapted, run["rank"], run["alpha"])
    for m in adapters(model).values():  # in a model of shapes, only the adapters get memory
        if m.lora.B.is_meta:
            m.lora.to_empty(device="cpu")
    fill(adapter_state(model), saved, folder)
    return run


def load_run(
    folder: str | Path,
    merged: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[MoEModel, object, dict]:
    """The model of a finished run of train.py, its tokenizer, and its run.json.

    The adapters are merged into the weights, or live. Raises FileNotFoundError or ValueError for a
    run that cannot be loaded, OSError or ValueError if its base model is gone or has changed.
    """
    from plumbing.base_model import unchanged_base_folder
    from plumbing.run_folder import read_run
    from plumbing.tokenizer import load_tokenizer

    run = read_run(Path(folder), "hashes")
    source = unchanged_base_folder(run, Path(folder))
    model = MoEModel.from_pretrained(source, dtype, device)
    attach_run(model, Path(folder))
    if merged:
        merge(model)
    return model.requires_grad_(False), load_tokenizer(source, run), run


if __name__ == "__main__":
    print(
        "no command by itself: train.py puts these adapters on a model, see python train.py --help"
    )
