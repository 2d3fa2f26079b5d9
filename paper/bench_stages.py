"""What the benchmark does with each configuration: build, count, step, decode, load.

Nothing here lets one configuration's exception end the others (attempt).
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from catcher import Catcher, default_k
from checkpoint import MoEConfig, parse_config
from data import collate
from generate import generate
from hellora import Method, count_params, parse_method
from moe_model import MoEModel
from paper import bench_measure as measure
from paper.bench_worlds import LR, SHAPES, World, adapted, frozen, ours, random_world
from paper.reproduce import build as shapes_only
from train import make_optimizer, train_step

OURS = ("none", "hellora", "lora", "dora", "hellori-s", "fft")
BATCH = 16  # sequences decoded together
PROMPT = 32  # tokens of a prompt, in the middle
LOAD_LAYERS = 2  # of a random model, in the checkpoint whose loading is timed


class Configuration(NamedTuple):
    """One row of the table."""

    build: Callable[[World], nn.Module]  # the model, ready to train
    method: str  # ours, which says what a step of it has to compute
    fewer: Callable[[MoEConfig], int] | None = None  # of a peer: trained numbers that it has fewer than ours


def peers() -> ModuleType | None:
    """paper.bench_peers, if what it needs is installed."""
    if not (find_spec("transformers") and find_spec("peft")):
        return None
    from paper import bench_peers

    return bench_peers


def configurations() -> dict[str, Configuration]:
    """Every row that can be measured here, by name."""
    table = {
        name + suffix: Configuration(partial(ours, method=name, experts=experts), name)
        for experts, suffix in (("grouped", ""), ("loop", "-loop"))
        for name in OURS
    }
    table["hellora-recompute"] = Configuration(partial(ours, method="hellora", recompute=True), "hellora")
    their = peers().BUILDERS if peers() else {}
    return table | {name: Configuration(*row) for name, row in their.items()}


def needed(method: str, cfg: MoEConfig, length: int, shares: dict[int, float]) -> tuple[float, int]:
    """FLOPs that a step needs for a token, and the numbers it trains, from shapes alone."""
    if method == "none":
        return measure.step_flops(None, cfg, Method(), length, shares), cfg.dim
    row = parse_method(method)
    model = shapes_only(cfg, method, default_k(cfg) if row.rule == "hot" else cfg.n_experts)
    shares = shares if row.rule == "hot" else dict.fromkeys(shares, 1.0)
    return measure.step_flops(model, cfg, row, length, shares), count_params(model, row)[0]


class Session:
    """A configuration that is ready to step. It keeps of the world what its model needs."""

    def __init__(self, world: World, config: Configuration):
        self.model, self.batch, self.device = config.build(world), world.batch, world.device
        self.optimizer = make_optimizer(self.model, LR)
        self.visits, self.n_dense = Catcher(world.cfg.n_experts), world.cfg.n_dense

    def step(self) -> float:
        """One whole training step, of ours and of a peer alike -> loss per token."""
        return train_step(self.model, self.optimizer, self.batch, len(self.batch), 0.0, self.visits)[0]

    def begin(self, config: Configuration, expected: int, cfg: MoEConfig) -> dict:
        """Check the trained count, count operations, warm up, and measure memory: the row's first values."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if config.fewer is not None and trained != expected - config.fewer(cfg):
            want = expected - config.fewer(cfg)
            raise ValueError(f"PEFT trains {trained:,} numbers, want {want:,}: it adapts something else")
        row = {"trained": trained if config.fewer else expected}
        row["loss"] = self.step()
        if cfg.n_layers > cfg.n_dense + 1:
            batch = collate(self.batch, self.device)
            row["operations"] = measure.layer_operations(self.model, batch, self.n_dense)
            row["operations_a_layer"] = sum(sum(part.values()) for part in row["operations"].values())
        if self.device.type == "cuda":
            row["peak_bytes"] = measure.cuda_peak(self.model, self.optimizer, self.step)
        return row | {"held_bytes": measure.held_bytes(self.model, self.optimizer)}

    def turn(self) -> float:
        """Seconds a step. On CUDA one step goes before: what other configurations left must settle."""
        times = 3 if self.device.type == "cuda" else 1
        if times > 1:
            self.step()
        return measure.timed(self.device, self.step, times)


def own_peak(config: Configuration, make: Callable[[], World]) -> int:
    """Bytes by which a step's peak exceeds a process that has only trained a tiny model so far."""
    tiny = random_world(SHAPES["tiny"], 0.5, 64, 32, torch.float32, torch.device("cpu"))
    Session(tiny, config).step()
    del tiny
    measure.forget_peak()
    before = measure.resident("VmRSS")
    session = Session(make(), config)
    session.step()
    measure.forget_peak()
    session.step()
    return measure.resident("VmHWM") - before


def attempt(row: dict, stage: str, work: Callable[[], object]) -> object | None:
    """What `work` returns; None if it failed, and then the row says how."""
    try:
        return work()
    except Exception as error:  # any, so that the other configurations go on
        row["failed"] = f"{stage}: {measure.explain(error)}"
    measure.free()  # outside the handler, which would keep the failed frames' tensors alive
    return None


# ---- decoding ------------------------------------------------------------------------------------------


def decoders() -> dict[str, tuple[Callable[[World], Callable], tuple[str, ...]]]:
    """name -> (a function of the world that gives `generate` for one model, the cases it is measured on)."""
    both = ("equal", "uneven")
    table = {
        "merged": (lambda world: partial(generate, frozen(world)), both),
        "merged-loop": (lambda world: partial(generate, frozen(world, "loop")), both),
        "hellora unmerged": (lambda world: partial(generate, adapted(world, "hellora")), ("equal",)),
    }
    if their := peers():
        table["transformers merged"] = (lambda world: their.plain(world).generate, both)
        table["peft unmerged"] = (lambda world: their.peft_fused(world).eval().generate, ("equal",))
    return table


def decode_cases(vocab: int, new: int) -> dict[str, tuple[list[list[int]], int, tuple[int, ...]]]:
    """case -> prompts, most new tokens, stops: prompts of one length without a stop, and uneven ones with.

    The uneven case's stops are a random few of the vocabulary, such that a random token is one with
    probability 3 / new. All decoders of the same weights meet the same, so answers end alike.
    """
    draw = torch.Generator().manual_seed(2)

    def prompts(lengths: list[int]) -> list[list[int]]:
        return [torch.randint(0, vocab, (n,), generator=draw).tolist() for n in lengths]

    stops = torch.randperm(vocab, generator=draw)[: max(1, 3 * vocab // new)].tolist()
    spread = torch.randint(PROMPT // 2, 3 * PROMPT // 2, (BATCH,), generator=draw).tolist()
    return {"equal": (prompts([PROMPT] * BATCH), new, ()), "uneven": (prompts(spread), new, tuple(stops))}


def decode(world: World, rounds: int, go_on: Callable[[], bool], new: int) -> dict[str, dict]:
    """New tokens a second, greedily, BATCH prompts together; the decoders take turns."""
    cases, table = decode_cases(world.cfg.vocab_size, new), decoders()
    rows: dict[str, dict] = {name: {} for name in table}
    run = {name: attempt(rows[name], "build", partial(make, world)) for name, (make, _) in table.items()}
    turns = [(name, case) for name, (_, of) in table.items() for case in of]
    for name in [name for name in table if run[name]]:  # to warm up
        attempt(rows[name], "warm-up", partial(run[name], cases["equal"][0], 2, (), BATCH))
    for _ in range(rounds):
        for name, case in turns:
            if "failed" in rows[name] or not go_on():
                continue
            outputs: list[list[int]] = []
            args = (*cases[case], BATCH)
            work = partial(lambda f, args, out: out.extend(f(*args)), run[name], args, outputs)
            if seconds := attempt(rows[name], case, partial(measure.timed, world.device, work)):
                count = sum(map(len, outputs))
                rows[name].setdefault(f"{case}_rates", []).append(count / seconds)
                rows[name][f"{case}_mean_length"] = count / len(outputs)
    return rows


# ---- loading -------------------------------------------------------------------------------------------


def write_checkpoint(world: World, folder: Path) -> None:
    """The first layers of a random world as the Hub stores them."""
    hub = world.hub | {"num_hidden_layers": min(LOAD_LAYERS, world.cfg.n_layers)}
    n = parse_config(hub).n_layers
    names = [x for x in world.base if not x.startswith("layers.") or int(x.split(".")[1]) < n]
    tensors = {hub_name: part.cpu().clone() for name in names for hub_name, part in world.parts(name)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hub))


def load(world: World, rounds: int, go_on: Callable[[], bool]) -> dict[str, dict]:
    """Seconds to load the checkpoint, or the first layers of a random model, from files in the page cache."""
    loaders = {"ours": MoEModel.from_pretrained}
    if their := peers():
        loaders["transformers"] = their.load
    rows: dict[str, dict] = {name: {"seconds": []} for name in loaders}
    with tempfile.TemporaryDirectory() as made:
        folder = world.source or Path(made)
        if world.source is None:
            write_checkpoint(world, folder)
        for number in range(rounds + 1):
            for name, loader in loaders.items():
                if "failed" in rows[name] or not go_on():
                    continue
                work = partial(loader, folder, world.dtype, world.device)
                seconds = attempt(rows[name], "load", partial(measure.timed, world.device, work))
                if number and seconds:
                    rows[name]["seconds"].append(seconds)
        rows["bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return rows
