"""Count which experts a task visits, layer by layer, and choose the ones to adapt.

    python catcher.py --model tiny --task tiny-math      counts on the base model, no training
    python catcher.py --data own.jsonl --k 4 --out hot.json   counts your own rows, keeps the list
    python catcher.py --run DIR                          shows the list that a run was trained with

Read it from top to bottom: counting, the rules of choosing, the list that is kept, the command.
train.py counts in the same way during its warm-up. The paper's name for the step that finds the hot
experts is the catcher. The letters are those of moe_model.py.
"""

if __name__ == "__main__":
    import plumbing.quiet  # noqa: F401  a signal ends it in one line, from here on
    from plumbing import cli, flags

    cli.read_early(flags.catcher, __doc__)  # before torch is imported, which takes seconds

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moe_model import IGNORE, MoEConfig, MoEModel, Routing
from plumbing import flags, ranks
from plumbing.base_model import base_folder
from plumbing.checkpoint import count_base, locate, read_config
from plumbing.cli import command, progress
from plumbing.data import (
    TASKS,
    Encoded,
    collate,
    default_task,
    encode,
    load_examples,
    micro_batches,
    rows_name,
)
from plumbing.device import compute, warn_of_slow_cpu
from plumbing.files import read_json, write_json
from plumbing.run_folder import YOUNGER, by_layer, read_run
from plumbing.tokenizer import load_tokenizer

# ---- counting ------------------------------------------------------------------------------------


class Catcher:
    """Visits of one task: (token, choice) pairs per layer and expert.

    which_tokens: "all" but padding, or "answers": only those that predict a token of an answer.
    """

    def __init__(self, n_experts: int, which_tokens: str = "all"):
        self.n_experts = n_experts
        self.which_tokens = which_tokens  # one of COUNTS
        self.counts: dict[int, Tensor] = {}  # {MoE layer: visits [E] int64}
        self.probabilities: dict[int, Tensor] = {}  # {MoE layer: summed, [E] float64}
        self.n_tokens: int | Tensor = 0

    @torch.no_grad()
    def add(self, routing: dict[int, Routing], counted: Tensor) -> None:
        """Count one forward pass. counted [B, T]: see Batch.counted. The host waits for no GPU."""
        self.n_tokens = self.n_tokens + counted.sum()
        for layer, decided in routing.items():
            if layer not in self.counts:
                self.counts[layer] = torch.zeros(
                    self.n_experts, dtype=torch.long, device=counted.device
                )
                self.probabilities[layer] = self.counts[layer].double()
            # A token that is not counted adds 0. To leave it out, the host would have to wait for
            # the number of the others.
            ids = decided.expert_ids.flatten()  # [B*T*K]
            is_counted = counted[..., None].expand_as(decided.expert_ids).flatten()  # [B*T*K]
            probability = decided.probability.flatten() * is_counted  # [B*T*K]
            self.counts[layer].index_add_(0, ids, is_counted.long())
            self.probabilities[layer].index_add_(0, ids, probability.double())

    def gather(self) -> "Catcher":
        """Add up what all ranks have counted, on every rank. Returns itself."""
        if self.counts:  # else no pass was counted, on any rank
            for tensor in (*self.counts.values(), *self.probabilities.values(), self.n_tokens):
                ranks.total(tensor)
        return self

    def scores(self, score: str) -> dict[int, Tensor]:
        """{layer: [E]} on the CPU. "count": visits. "gate": the mean routing weight.

        The routing weight of an expert is its probability where a token visits it (before any
        rescaling), and 0 where not. The mean is over all counted tokens. ("gate" is ESFT's word.
        --score and hot_experts.json have it too, so it stays.)
        """
        if score == "gate":
            n_tokens = int(self.n_tokens)
            return {layer: total.cpu() / n_tokens for layer, total in self.probabilities.items()}
        return {layer: visits.cpu() for layer, visits in self.counts.items()}


def sample(data: list[Encoded], share: float, seed: int) -> list[Encoded]:
    """A seeded share of the data, at least one example, for the catcher."""
    draw = torch.Generator().manual_seed(seed)
    n = max(1, min(len(data), round(share * len(data))))
    return [data[i] for i in torch.randperm(len(data), generator=draw)[:n].tolist()]


@torch.no_grad()
def count_visits(
    model: MoEModel, data: list[Encoded], batch_size: int, label: str, which_tokens: str = "all"
) -> Catcher:
    """Run `model` over `data` once and count. label: the progress bar's."""
    catcher = Catcher(model.cfg.n_experts, which_tokens)
    for group in progress(micro_batches(data, batch_size), label=label, unit="batch"):
        batch = collate(group, model.device)
        # Only the routing is needed, so there is no target, and no logits are made. (`trunk` would
        # do, but a model that is cut up over ranks must be entered through `forward`.)
        _, routing = model(batch.tokens, targets=torch.full_like(batch.tokens, IGNORE))
        catcher.add(routing, batch.counted(which_tokens))
    return catcher.gather()


def visited_share(counts: dict[int, Tensor], experts: dict[int, list[int]]) -> dict[int, float]:
    """{layer: the share of visits that goes to its `experts`}. A uniform router gives k / E."""
    return {i: (counts[i][experts[i]].sum() / counts[i].sum()).item() for i in experts}


# ---- choosing ------------------------------------------------------------------------------------

RULES = ("hot", "cold", "global-hot", "random", "all")
COUNTS = ("all", "answers")  # whose visits count: see Batch.counted


def preference(rule: str, of_layer: Tensor, of_model: Tensor, draw: torch.Generator) -> Tensor:
    """How much `rule` prefers each expert of a layer [E].

    of_layer [E]: the layer's scores. of_model [E]: the scores of all layers, added up by expert id.
    """
    if rule == "hot":  # HELLoRA
        return of_layer
    if rule == "cold":  # Table 4: the suffix _c of a method
        return -of_layer
    if rule == "global-hot":  # Table 4: the suffix _m. The same experts in every layer
        return of_model
    if rule == "random":  # a control that the paper does not have
        return torch.rand(len(of_layer), generator=draw)
    raise ValueError(f"unknown rule {rule!r}: want one of {', '.join(RULES)}")


def choose(
    scores: dict[int, Tensor], k: int, rule: str, seed: int = 0, coverage: float | None = None
) -> dict[int, list[int]]:
    """{layer: the k experts that `rule` prefers, ascending}. Of two equal scores the lower id wins.

    scores: {layer: [E]}, visits or mean routing weights. coverage: a share in (0, 1] in place of k.
    Each layer takes its preferred experts until they hold this share of its scores. This is the
    rule of ESFT (expert-specialized fine-tuning, arXiv 2407.01906).
    Raises ValueError for a k outside 1..E.
    """
    of_model = sum(scores.values())  # [E]
    draw = torch.Generator().manual_seed(seed)
    chosen = {}
    for layer, of_layer in scores.items():
        if rule == "all":
            chosen[layer] = list(range(len(of_layer)))
            continue
        wanted = preference(rule, of_layer, of_model, draw)
        ids = wanted.argsort(descending=True, stable=True)  # [E] the most wanted first
        if coverage:
            share = of_layer[ids].double().cumsum(0) / of_layer.sum()  # [E] of the first 1, 2, ...
            n = int((share < coverage).sum()) + 1
        else:
            n = check_k(k, len(of_layer))
        chosen[layer] = sorted(ids[:n].tolist())
    return chosen


def default_k(cfg: MoEConfig) -> int:
    """The paper's k: as many experts as a token visits (8 for OLMoE, 2 for Mixtral).

    For DeepSeekMoE, the one backbone with shared experts, it is 12 of 64. Only this number gives
    the paper's 23.2 % of LoRA's parameters there (docs/choices.md).
    """
    return 12 if cfg.n_shared else cfg.top_k


def check_k(k: int, n_experts: int) -> int:
    """k itself. Raises ValueError unless it is 1..n_experts."""
    if not 1 <= k <= n_experts:
        raise ValueError(
            f"k is {k}, but a layer has {n_experts} experts: want 1 <= k <= {n_experts}"
        )
    return k


def overlap(a: dict[int, list[int]], b: dict[int, list[int]]) -> dict[int, float]:
    """{layer: Jaccard overlap of two lists of experts, shared / in either}. Fig. 3 of the paper."""
    return {i: len(set(a[i]) & set(b[i])) / len(set(a[i]) | set(b[i])) for i in a}


# ---- the list that is kept -----------------------------------------------------------------------

# Visits of an expert on average, below which a choice is doubted. On the embedded model and its
# three tasks (20 samples of each size, k = 8) a list from 7 visits has a Jaccard overlap of 0.70 to
# 0.83 with that of all rows. From 30 it is 0.84 to 0.89: up to one of 8 experts differs. From 100
# it is above 0.91. docs/tables.md, Stability, has larger samples: 0.94 from 240. All these visits
# are of the base model. Two warm-ups differ more, for another reason: they train different models.
FEW = 30


@dataclass(frozen=True, kw_only=True)
class HotList:
    """hot_experts.json: which experts of each layer were chosen, how, and from which visits."""

    model: str = ""
    task: str = ""
    data: str = ""  # the name of the file of own rows. "": the task's training split
    catcher: str = "file"  # "warmup" or "forward". A list from elsewhere need not say
    rule: str = "hot"
    score: str = "count"
    count: str = YOUNGER["count"]  # one of COUNTS
    k: int = 0  # the most that a layer has
    n_tokens: int = 0
    experts: dict[int, list[int]]  # {MoE layer: ids, ascending}
    counts: dict[int, list[int]] = field(default_factory=dict)  # {MoE layer: visits [E]}, if known
    gates: dict[int, list[float]] = field(default_factory=dict)  # {MoE layer: mean weight [E]}

    def show(self) -> str:
        """Each layer's visits as bars, one character an expert, with the chosen and their share."""
        if not self.counts:
            return f"a given list of {self.rule} experts, without the visits behind it"
        counts = {layer: torch.tensor(visits) for layer, visits in self.counts.items()}
        lines, levels = [], " ▁▂▃▄▅▆▇█"
        for layer, share in visited_share(counts, self.experts).items():
            relative = counts[layer] / counts[layer].max().clamp(min=1)  # [E]
            bars = "".join(levels[h] for h in (relative * (len(levels) - 1)).ceil().int())
            lines.append(
                f"layer {layer:2d} │{bars}│ {share:5.1%} of visits go to {self.experts[layer]}"
            )
        by = "" if self.rule == "random" else f" by {self.score}"
        lines.append(
            f"the {self.rule} {self.sizes()} experts of each layer{by}, from "
            f"{self.n_tokens:,} {'' if self.count == 'all' else 'answer '}tokens of "
            f"{self.data or self.task} ({self.catcher})"
        )
        return "\n".join(filter(None, [*lines, self.doubt()]))

    def doubt(self) -> str:
        """A warning if so few visits decide that other rows would give other experts, or ""."""
        means = [sum(visits) / len(visits) for visits in self.counts.values()]
        every = all(len(self.experts[i]) == len(visits) for i, visits in self.counts.items())
        if self.rule == "random" or every or min(means, default=FEW) >= FEW:
            return ""
        return (
            f"warning: an expert has only {min(means):.1f} visits on average. Below {FEW}, other "
            "rows of the same kind often choose other experts: want more rows. If only a share of "
            "the rows was counted, catcher.py --share 1 --out FILE counts all (give it the same "
            "--model, --task and --data), and train.py takes the list with --hot-experts FILE"
        )

    def sizes(self) -> str:
        """How many experts a layer has in the list: "8", or "5 to 9"."""
        sizes = sorted({len(ids) for ids in self.experts.values()})
        return f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])

    def write(self, path: Path) -> None:
        """Keys as ESFT has them: {"experts": {"0": [ids]}, ...}."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path, cfg: MoEConfig) -> "HotList":
        """The list in `path`.

        Raises FileNotFoundError, or ValueError for a damaged file or another model's list.
        """
        saved = read_json(path, "a hot_experts.json, as catcher.py --out writes it", HotListFile)
        fields = {}
        for name in HotListFile.__annotations__:
            if saved.get(name) is not None:
                fields[name] = saved[name]

        layers = {str(layer) for layer in cfg.moe_layers}
        if layers - saved["experts"].keys():
            raise ValueError(f"{path} lacks experts of a layer: want a list made for this model")
        for name in ("counts", "gates"):  # a list from elsewhere may have none
            scores = fields.pop(name, {})
            wrong_size = any(len(values) != cfg.n_experts for values in scores.values())
            wrong_layers = scores and scores.keys() != layers
            if wrong_layers or wrong_size:
                raise ValueError(f"{path} lacks visits of a layer: want a list made for this model")
            fields[name] = {int(layer): values for layer, values in scores.items()}
        fields["experts"] = by_layer(cfg, saved["experts"], path)
        return cls(**fields)


@dataclass
class HotListFile:
    """hot_experts.json as read_json checks it. In JSON all keys are text."""

    experts: dict[str, list[int]]
    model: str | None = None
    task: str | None = None
    data: str | None = None
    catcher: str | None = None
    rule: str | None = None
    score: str | None = None
    count: str | None = None
    k: int | None = None
    n_tokens: int | None = None
    counts: dict[str, list[int]] | None = None
    gates: dict[str, list[float]] | None = None


def hot_list(
    visits: Catcher,
    *,
    k: int,
    rule: str,
    score: str,
    seed: int,
    coverage: float | None,
    model: str,
    task: str,
    data: str,
    catcher: str,
) -> HotList:
    """Choose from the visits that were counted (see `choose`), and note where they come from."""
    scores = visits.scores(score)
    experts = choose(scores, k, rule, seed, coverage)
    probabilities = scores if score == "gate" else {}
    return HotList(
        model=model,
        task=task,
        data=data,
        catcher=catcher,
        rule=rule,
        score=score,
        count=visits.which_tokens,
        k=max(len(ids) for ids in experts.values()),
        n_tokens=int(visits.n_tokens),
        experts=experts,
        counts={layer: counts.tolist() for layer, counts in visits.scores("count").items()},
        gates={layer: means.tolist() for layer, means in probabilities.items()},
    )


# ---- the command ---------------------------------------------------------------------------------


def main() -> None:
    """Count and choose, or show what a run chose."""
    args = flags.catcher(__doc__)
    if args.run:
        cfg = read_config(base_folder(read_run(args.run), weights=False))
        print(HotList.read(args.run / "hot_experts.json", cfg).show())
        return
    device, dtype = compute(args.device, args.dtype)
    task, source = args.task or default_task(args.model), locate(args.model)
    cfg = read_config(source)
    warn_of_slow_cpu(count_base(cfg), device, args.device)
    k = check_k(default_k(cfg) if args.k is None else args.k, cfg.n_experts)

    # As train.py --catcher forward counts.
    model = MoEModel.from_pretrained(source, dtype, device)
    examples = load_examples(task, args.data or TASKS[task].train.fetch(), model=source)
    encoded = encode(examples, load_tokenizer(source), cfg.max_len, args.drop_long)
    data = sample(encoded, args.share, args.seed)
    visits = count_visits(model, data, args.batch_size, "catch", args.count)
    hot = hot_list(
        visits, k=k, rule=args.rule, score=args.score, seed=args.seed, coverage=args.coverage,
        model=args.model, task=task, data=rows_name(args.data), catcher="forward",
    )  # fmt: skip
    print(hot.show())
    if args.out:
        hot.write(args.out)


if __name__ == "__main__":
    command(main)
