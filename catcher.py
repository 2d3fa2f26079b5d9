"""Count which experts a task visits, layer by layer, and choose the ones to adapt.

    python catcher.py --model tiny --task tiny-math      counts on the base model, no training
    python catcher.py --run DIR                          shows the list that a run was trained with

Letters are those of moe_model.py.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import ranks
from checkpoint import MoEConfig, locate, read_config
from data import TASKS, Encoded, collate, default_task, encode, load_examples, micro_batches
from moe_model import IGNORE, MoEModel, Routing
from run import (
    COUNT,
    Parser,
    above_0,
    add_compute_flags,
    command,
    compute,
    read_json,
    read_run,
    seed_number,
    share_of_1,
    write_json,
)
from tokenizer import load_tokenizer


class Catcher:
    """Histogram of expert visits of one task: (token, choice) pairs per layer, over real tokens only."""

    def __init__(self, n_experts: int):
        self.n_experts = n_experts
        self.counts: dict[int, Tensor] = {}  # {MoE layer: visits [E] int64}
        self.gates: dict[int, Tensor] = {}  # {MoE layer: sum of the routing weights [E] float64}
        self.n_tokens = 0

    @torch.no_grad()
    def add(self, routing: dict[int, Routing], real: Tensor) -> None:
        """Count one forward pass. real [B, T] is False on padding. Nothing here waits for the device."""
        self.n_tokens = self.n_tokens + real.sum()
        for layer, decided in routing.items():
            ids = decided.expert_ids.flatten()
            counts = real[..., None].expand_as(decided.expert_ids).flatten()  # 1 for each visit that counts
            if layer not in self.counts:
                self.counts[layer] = ids.new_zeros(self.n_experts)
                self.gates[layer] = ids.new_zeros(self.n_experts, dtype=torch.float64)
            self.counts[layer].index_add_(0, ids, counts.long())
            self.gates[layer].index_add_(0, ids, (decided.gate.flatten() * counts).double())

    def gather(self) -> "Catcher":
        """Add what all ranks have counted, on every rank; itself."""
        for tensor in (*self.counts.values(), *self.gates.values(), self.n_tokens):
            ranks.total(tensor)
        return self

    def scores(self, score: str) -> dict[int, Tensor]:
        """{layer: [E]} on the CPU: "count", the visits, or "gate", the mean routing weight of a token."""
        if score == "gate":
            return {layer: g.cpu() / int(self.n_tokens) for layer, g in self.gates.items()}
        return {layer: c.cpu() for layer, c in self.counts.items()}

    def choose(
        self, *, k: int, rule: str, score: str, seed: int, coverage: float | None, **about: str
    ) -> "HotList":
        """The list for `rule` (RULES). about: model, task, and by which catcher it was counted."""
        experts = choose(self.scores(score), k, rule, seed, coverage)
        k = max(map(len, experts.values()))
        counts = {layer: visits.tolist() for layer, visits in self.scores("count").items()}
        n_tokens = int(self.n_tokens)
        return HotList(
            **about, rule=rule, score=score, k=k, n_tokens=n_tokens, experts=experts, counts=counts
        )


@torch.no_grad()
def count_visits(model: MoEModel, data: list[Encoded], batch_size: int, label: str) -> Catcher:
    """Run `model` over `data` once, without logits, and count."""
    catcher = Catcher(model.cfg.n_experts)
    for group in tqdm(micro_batches(data, batch_size), label, unit="batch", leave=False):
        batch = collate(group, model.device)
        _, routing = model(batch.tokens, targets=torch.full_like(batch.tokens, IGNORE))  # so without logits
        catcher.add(routing, batch.real)
    return catcher.gather()


def sample(data: list[Encoded], share: float, seed: int) -> list[Encoded]:
    """A seeded share of the data, at least one example: what the catcher looks at."""
    draw = torch.Generator().manual_seed(seed)
    n = max(1, min(len(data), round(share * len(data))))
    return [data[i] for i in torch.randperm(len(data), generator=draw)[:n].tolist()]


def default_k(cfg: MoEConfig) -> int:
    """Adapted experts per layer when nothing is said: as many as a token visits, and 12 for DeepSeekMoE.

    12 of 64 is the only number that gives the paper's 23.2 % of LoRA's parameters there (README).
    """
    return 12 if cfg.n_shared else cfg.top_k


# rule -> rank of each expert [E] (the highest are chosen), from its layer's scores, the scores summed over
# layers, and a source of randomness
RULES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "hot": lambda layer, total, draw: layer,
    "cold": lambda layer, total, draw: -layer,
    "global-hot": lambda layer, total, draw: total,
    "random": lambda layer, total, draw: torch.rand(len(layer), generator=draw),
    "all": lambda layer, total, draw: torch.zeros(len(layer)),
}


def choose(
    scores: dict[int, Tensor], k: int, rule: str, seed: int = 0, coverage: float | None = None
) -> dict[int, list[int]]:
    """{layer: the k experts that `rule` ranks highest, ascending}. Of equal experts the lower id wins.

    scores: {layer: [E]}, visits or summed gates. With a coverage in (0, 1), k differs by layer: the fewest
    that together have that share of the layer's score (ESFT's rule). Raises ValueError for a k outside 1..E.
    """
    k = check_k(k, len(next(iter(scores.values())))) if rule != "all" else None
    total, draw = sum(scores.values()), torch.Generator().manual_seed(seed)
    ranked = {i: RULES[rule](s, total, draw).argsort(descending=True, stable=True) for i, s in scores.items()}
    if coverage:
        covered = {i: scores[i][ids].double().cumsum(0) / scores[i].sum() for i, ids in ranked.items()}
        sizes = {i: int((share < coverage).sum()) + 1 for i, share in covered.items()}
    else:
        sizes = dict.fromkeys(scores, k)
    return {layer: sorted(ids[: sizes[layer]].tolist()) for layer, ids in ranked.items()}


def check_k(k: int, n_experts: int) -> int:
    """k itself. Raises ValueError unless it is 1..n_experts."""
    if not 1 <= k <= n_experts:
        raise ValueError(f"k is {k}, but a layer has {n_experts} experts: want 1 <= k <= {n_experts}")
    return k


def overlap(a: dict[int, list[int]], b: dict[int, list[int]]) -> dict[int, float]:
    """{layer: Jaccard overlap of two lists of experts, shared / in either}; Fig. 3 of the paper."""
    return {i: len(set(a[i]) & set(b[i])) / len(set(a[i]) | set(b[i])) for i in a}


def visited_share(counts: dict[int, Tensor], experts: dict[int, list[int]]) -> dict[int, float]:
    """{layer: the share of all visits that goes to its `experts`}; k / E if the router were uniform."""
    return {i: (counts[i][experts[i]].sum() / counts[i].sum()).item() for i in experts}


@dataclass(frozen=True, kw_only=True)
class HotList:
    """hot_experts.json: which experts of each layer were chosen, how, and the visits that rests on."""

    model: str = ""
    task: str = ""
    catcher: str = "file"  # "warmup" or "forward"; a list by other means need not say
    rule: str = "hot"
    score: str = "count"
    k: int = 0
    n_tokens: int = 0
    experts: dict[int, list[int]]  # {MoE layer: ids, ascending}
    counts: dict[int, list[int]] = field(default_factory=dict)  # {MoE layer: visits [E]}, if known

    def show(self) -> str:
        """Each layer's visits as bars, one character an expert, with the chosen ids and their share."""
        if not self.counts:
            return f"a given list of {self.rule} experts; how many visits it rests on is not known"
        counts = {layer: torch.tensor(visits) for layer, visits in self.counts.items()}
        lines, levels = [], " ▁▂▃▄▅▆▇█"
        for layer, share in visited_share(counts, self.experts).items():
            height = (counts[layer] / counts[layer].max().clamp(min=1) * (len(levels) - 1)).ceil().int()
            row = "".join(levels[h] for h in height)
            lines.append(f"layer {layer:2d} │{row}│ {share:5.1%} of visits go to {self.experts[layer]}")
        lines.append(
            f"the {self.rule} {self.sizes()} experts of each layer by {self.score}, from "
            f"{self.n_tokens:,} tokens of {self.task} ({self.catcher})"
        )
        return "\n".join(lines)

    def sizes(self) -> str:
        """How many experts a layer has in the list: "8", or "5 to 9"."""
        sizes = sorted({len(ids) for ids in self.experts.values()})
        return f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])

    def write(self, path: Path) -> None:
        """Keys as ESFT has them: {"experts": {"0": [ids]}, ...}."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path, cfg: MoEConfig) -> "HotList":
        """Raises FileNotFoundError, or ValueError if the file is damaged or was made for another model."""
        form = {f.name: (None, COUNT if f.type is int else str) for f in fields(cls)}
        form |= {"experts": {str: [COUNT]}, "counts": (None, {str: [COUNT]})}
        saved = read_json(path, "a hot_experts.json, as catcher.py --out writes it", form)
        known = {f.name: saved[f.name] for f in fields(cls) if saved.get(f.name) is not None}
        known["experts"] = cfg.by_layer(saved["experts"], path)
        visits, everywhere = known.get("counts", {}), {str(i): cfg.n_experts for i in cfg.moe_layers}
        sizes = {i: len(of) for i, of in visits.items()} or everywhere
        if saved["experts"].keys() != everywhere.keys() or sizes != everywhere:
            raise ValueError(f"{path} lacks experts or visits of a layer: want a list made for this model")
        known["counts"] = {int(i): of for i, of in visits.items()}
        return cls(**known)


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, either = p.add_argument, p.add_mutually_exclusive_group().add_argument
    # fmt: off
    add("--model", default="tiny", help="tiny, a backbone's name, a folder, or a Hub id (default tiny)")
    add("--task", choices=TASKS, help="whose training split is run (default tiny-math; else gsm8k)")
    add("--data", type=Path, help="rows in place of the task's training split")
    add("--k", type=int, help="experts to choose per layer (default: as many as a token visits)")
    add("--coverage", type=share_of_1, help="in place of --k: the fewest experts with this share of visits")
    add("--rule", choices=RULES, default="hot", help="which to choose (default hot)")
    add("--score", choices=["count", "gate"], default="count", help="visits, or mean routing weight")
    add("--share", type=share_of_1, default=0.1, help="share of the split to look at (default 0.1)")
    add("--seed", type=seed_number, default=0, help="picks that share (default 0)")
    add("--batch-size", type=above_0(int), default=16, help="examples in one forward pass (default 16)")
    either("--out", type=Path, help="write hot_experts.json here")
    either("--run", type=Path, metavar="DIR", help="show the list of this run in place of counting")
    # fmt: on
    add_compute_flags(add)
    return p.parse_args()


def main() -> None:
    """Count and choose, or show what a run chose."""
    args = parse_args()
    if args.run:
        source = locate(read_run(args.run)["model"])
        print(HotList.read(args.run / "hot_experts.json", read_config(source)).show())
        return
    device, dtype = compute(args.device, args.dtype)
    task, source = args.task or default_task(args.model), locate(args.model)
    cfg = read_config(source)
    k = check_k(default_k(cfg) if args.k is None else args.k, cfg.n_experts)
    model = MoEModel.from_pretrained(source, dtype, device)
    examples = load_examples(task, args.data or TASKS[task].train.fetch())
    data = sample(encode(examples, load_tokenizer(source), model.cfg.max_len), args.share, args.seed)
    how = {"k": k, "rule": args.rule, "score": args.score, "coverage": args.coverage}
    catcher = count_visits(model, data, args.batch_size, "catch")
    hot = catcher.choose(**how, seed=args.seed, model=args.model, task=task, catcher="forward")
    print(hot.show())
    if args.out:
        hot.write(args.out)


if __name__ == "__main__":
    command(main)
