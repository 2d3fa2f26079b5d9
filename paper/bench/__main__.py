"""Training speed and memory of our methods, and of transformers + PEFT where they are installed.

    python -m paper.bench --shape small --json FILE          minutes on a CPU
    python -m paper.bench --shape olmoe --json FILE          OLMoE-1B-7B, random weights, on a GPU
    python -m paper.bench --model tiny --only lora,hellora   any checkpoint

All configurations have the same weights, batch and training step (train.train_step). They take
turns, round by round. On a GPU each configuration has all its rounds at once, because together they
need more memory than a GPU has. "-loop" multiplies expert by expert. "peft" is PEFT on
transformers 5. "peft-v4-..." is PEFT on the layout of transformers 4, where each expert is a
module. The paper probably used that layout. Full fine-tuning comes last and alone, because it needs
the memory. With --json the file is written after each round.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.bench, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import json
import platform
import re
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import nn

from catcher import Catcher, default_k
from generate import generate
from hellora import Method, count_params, parse_method
from moe_model import MoEConfig, MoEModel
from paper import plan
from paper.bench import measure
from paper.bench.report import show, summarise
from paper.bench.worlds import (
    LR,
    RANK,
    SHAPES,
    World,
    frozen,
    ours,
    random_world,
    world_of,
    write_checkpoint,
)
from plumbing.cli import (
    COUNT,
    SHARE,
    Parser,
    add_compute_flags,
    command,
    number,
    progress,
)
from plumbing.data import collate
from plumbing.device import DTYPES, compute
from plumbing.files import write_json
from plumbing.run_folder import versions
from train import make_optimizer, train_step

OURS = ("none", "hellora", "lora", "dora", "hellori-s", "fft")
PARTS = ("step", "memory", "generate", "load")
MINUTES = {"cuda": 7, "cpu": 30}
ENDS = {"memory": 0.3, "step": 0.6, "generate": 0.8, "load": 0.85, "fft": 0.9}  # share of minutes
BATCH = 16  # sequences decoded together
PROMPT = 32  # tokens of a prompt, on average


# ---- configurations ------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """One row of the table."""

    build: Callable[[World], nn.Module]  # the model, ready to train
    method: str  # our method whose step it computes
    fewer: Callable[[MoEConfig], int] = lambda cfg: 0  # trained numbers that it lacks


def peers() -> ModuleType | None:
    """paper/bench/peers.py, if the packages that it needs are installed, else None."""
    if not (find_spec("transformers") and find_spec("peft")):
        return None
    from paper.bench import peers as modules

    return modules


def configurations() -> dict[str, Configuration]:
    """Every row that can be measured on this machine, by name."""
    table = {
        name + suffix: Configuration(partial(ours, method=name, matmul=matmul), name)
        for matmul, suffix in (("grouped", ""), ("loop", "-loop"))
        for name in OURS
    }
    table["hellora-recompute"] = Configuration(
        partial(ours, method="hellora", recompute=True), "hellora"
    )
    builders = peers().BUILDERS if peers() else {}
    return table | {name: Configuration(*row) for name, row in builders.items()}


def needed(config: Configuration, cfg: MoEConfig, length: int, shares: dict) -> tuple[float, int]:
    """The FLOPs of a step per token, and the numbers that it trains, from shapes alone."""
    if config.method == "none":
        return measure.step_flops(None, cfg, Method(), length, shares), cfg.dim
    row = parse_method(config.method)
    model = plan.shapes(cfg, config.method, default_k(cfg))
    shares = shares if row.chooses else dict.fromkeys(shares, 1.0)
    trained, _ = count_params(model, row)
    return measure.step_flops(model, cfg, row, length, shares), trained - config.fewer(cfg)


class Session:
    """A configuration that is ready to step. It keeps what its model needs of the world."""

    def __init__(self, world: World, config: Configuration):
        self.model, self.batch, self.cfg = config.build(world), world.batch, world.cfg
        self.optimizer, self.visits = make_optimizer(self.model, LR), Catcher(world.cfg.n_experts)

    def step(self) -> float:
        """One whole training step, the same for our models and peers -> loss per token."""
        size = len(self.batch)
        loss, _ = train_step(self.model, self.optimizer, self.batch, size, 0.0, self.visits)
        return loss

    def begin(self, row: dict) -> None:
        """Check the number of trained parameters, warm up, count operations, measure memory."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if not isinstance(self.model, MoEModel) and trained != (want := row["trained"]):
            raise ValueError(
                f"PEFT trains {trained:,} numbers, want {want:,}: it adapts other tensors"
            )
        row["loss"] = self.step()
        if self.cfg.n_layers > self.cfg.n_dense + 1:
            batch = collate(self.batch, self.model.device)
            row["operations"] = measure.layer_operations(self.model, batch, self.cfg.n_dense)
            row["operations_a_layer"] = sum(
                sum(part.values()) for part in row["operations"].values()
            )
        if self.model.device.type == "cuda":
            row["peak_bytes"] = measure.cuda_peak(self.model, self.optimizer, self.step)
        row["held_bytes"] = measure.held_bytes(self.model, self.optimizer)

    def seconds(self) -> float:
        """The seconds of one turn. On CUDA an extra step goes before, as other work must settle."""
        times = 3 if self.model.device.type == "cuda" else 1
        if times > 1:
            self.step()
        return measure.timed(self.model.device, self.step, times)


def own_peak(name: str, make: Callable[[], World]) -> int:
    """The peak bytes of a step, less the bytes of a process that has only trained a tiny model."""
    config = configurations()[name]
    tiny = random_world(SHAPES["tiny"], 0.5, 64, 32, torch.float32, torch.device("cpu"))
    Session(tiny, config).step()
    measure.forget_peak()
    before = measure.resident("VmRSS")
    Session(make(), config).step()
    return measure.resident("VmHWM") - before


# ---- decoding and loading ------------------------------------------------------------------------


def decoders(world: World, new: int) -> dict[str, Callable[[], list[list[int]]]]:
    """{"case: who": decodes BATCH prompts, greedily}.

    There are two cases. In "equal", prompts have one length. In "uneven", lengths differ and
    answers also stop early. The stop ids are drawn at random, so that a random token is one of them
    with probability 3 / new. All decoders have the same weights and prompts, so their answers end
    at the same places.
    """
    draw, vocab = torch.Generator().manual_seed(2), world.cfg.vocab_size

    def prompts(lengths: list[int]) -> list[list[int]]:
        return [torch.randint(0, vocab, (n,), generator=draw).tolist() for n in lengths]

    stops = tuple(torch.randperm(vocab, generator=draw)[: max(1, 3 * vocab // new)].tolist())
    spread = torch.randint(PROMPT // 2, 3 * PROMPT // 2, (BATCH,), generator=draw).tolist()
    equal = (prompts([PROMPT] * BATCH), new, (), BATCH)
    uneven = (prompts(spread), new, stops, BATCH)
    run = {"ours": partial(generate, frozen(world))}
    if modules := peers():
        run |= {
            "transformers": modules.plain(world).generate,
            "PEFT": modules.peft_fused(world).eval().generate,
        }
    return {f"equal: {name}": partial(work, *equal) for name, work in run.items()} | {
        f"uneven: {name}": partial(work, *uneven) for name, work in run.items() if name != "PEFT"
    }


def loaders(world: World, made: Path) -> dict[str, Callable[[], nn.Module]]:
    """The loaders of the world's checkpoint. A random world is written to `made` (2 layers)."""
    folder = world.source or write_checkpoint(world, made)
    table = {"ours": MoEModel.from_pretrained} | ({"transformers": peers().load} if peers() else {})
    return {name: partial(load, folder, world.dtype, world.device) for name, load in table.items()}


# ---- the run -------------------------------------------------------------------------------------


def attempt(row: dict, stage: str, work: Callable, *args: object) -> object | None:
    """The result of `work`, or None if it failed. Then the row says how it failed."""
    try:
        return work(*args)
    except Exception as error:  # any error: the other configurations must go on
        first = next(iter(str(error).strip().splitlines()), "")
        row["failed"] = f"{stage}: {type(error).__name__}: {first}"[:160]
    measure.free()  # not in the handler: it would keep the tensors of the failed call alive
    return None


class Bench:
    """One run of the benchmark. Its record grows part by part. No exception ends the run."""

    def __init__(self, args: argparse.Namespace):
        if args.json and not args.json.parent.is_dir():
            raise ValueError(f"--json {args.json}: want a folder that exists")
        self.began = time.monotonic()
        self.rounds, self.new, self.path = args.rounds, args.new, args.json
        self.device, self.dtype = compute(args.device, args.dtype)
        self.minutes = args.minutes or MINUTES[self.device.type]
        self.table = configurations()
        names = chosen(args.only, list(self.table), "--only")
        self.parts, self.make = chosen(args.parts, list(PARTS), "--parts"), world_maker(args, self)
        self.rows: dict[str, dict] = {name: {"seconds": []} for name in names}
        dtype = next(name for name, kind in DTYPES.items() if kind == self.dtype)
        # The place of the file is no setting of what it measured.
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        self.record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings | {"dtype": dtype},
            "versions": versions(self.device) | (peers().release() if peers() else {}),
            "hardware": hardware(),
            "clock": measure.clock_of(self.device),
            "rows": self.rows,
        }

    def time_for(self, part: str) -> bool:
        """Whether there is time to begin more work of this part."""
        return time.monotonic() - self.began < self.minutes * 60 * ENDS[part]

    def save(self) -> None:
        """Write the record as far as it is complete."""
        self.record["minutes_used"] = round((time.monotonic() - self.began) / 60, 2)
        summarise(self.record)
        if self.path:
            write_json(self.path, json.loads(json.dumps(self.record, default=str)))

    def memory(self) -> None:
        """Measure each configuration's peak on a CPU, in a process of its own.

        This part comes first, because it forks.
        """
        for name in progress(self.rows, label="memory", unit="configuration"):
            if self.time_for("memory"):
                row, work = {}, partial(measure.in_own_process, own_peak)
                row["peak_bytes"] = attempt(row, "memory", work, name, self.make)
                self.rows[name] |= row

    def describe(self, world: World) -> None:
        """Record what all configurations share, and what a step of each must compute."""
        n_tokens = sum(len(e.ids) - 1 for e in world.batch)
        self.record["world"] = {
            "tokens": n_tokens, "sequences": len(world.batch), "experts": world.hot,
            "hot_share": sum(world.shares.values()) / len(world.shares),
            "weight_bytes": sum(t.numel() * t.element_size() for t in world.base.values()),
        }  # fmt: skip
        for name, row in self.rows.items():
            shapes = world.cfg, n_tokens // len(world.batch), world.shares
            numbers = attempt(row, "shapes", needed, self.table[name], *shapes) or (None, None)
            row["flops_a_token"], row["trained"] = numbers

    def steps(self, names: list[str], world: World, part: str = "step") -> None:
        """Run the rounds of some configurations. All of them are in memory at once."""
        sessions = {}
        for name in progress(names, label="prepare", unit="configuration"):
            row = self.rows[name]
            session = (
                attempt(row, "build", Session, world, self.table[name])
                if self.time_for("fft")
                else None
            )
            attempt(row, "first step", session.begin, row) if session else None
            if session and "failed" not in row:
                sessions[name] = session
        session = None  # a failed session would keep its memory
        for _ in progress(range(self.rounds), label="rounds", unit="round"):
            peak = attempt({}, "peak", measure.matmul_peak, self.device, self.dtype) or 0.0
            self.record["matmul_flops_per_s"] = max(
                peak, self.record.get("matmul_flops_per_s", 0.0)
            )
            self.turn(
                part, self.rows, {name: session.seconds for name, session in sessions.items()}
            )
            for name in [name for name in sessions if "failed" in self.rows[name]]:
                del sessions[name]
                measure.free()
            self.save()

    def turn(self, part: str, rows: dict[str, dict], works: dict[str, Callable[[], float]]) -> None:
        """Add the seconds of each work to its row. The first round is measured in any case."""
        for name, seconds in works.items():
            row = rows[name]
            if "failed" not in row and (not row["seconds"] or self.time_for(part)):
                row["seconds"] += [s for s in [attempt(row, part, seconds)] if s is not None]

    def others(self, part: str, works: dict[str, Callable[[], object]]) -> None:
        """Measure decoding or loading: one turn to warm up (it counts tokens), then two rounds."""
        rows = self.record[part] = {name: {"seconds": []} for name in works}
        for name, work in works.items():
            out = attempt(rows[name], part, work)
            if part == "generate" and out:
                rows[name]["tokens"] = sum(map(len, out))
        seconds = {name: partial(measure.timed, self.device, work) for name, work in works.items()}
        for _ in range(min(self.rounds, 2)):
            self.turn(part, rows, seconds)
        self.save()

    def run(self) -> None:
        """Run all parts."""
        if "memory" in self.parts and self.device.type == "cpu":
            self.memory()
        if self.device.type == "cpu":
            measure.keep_freed_memory()
        check: dict = {}
        checked = attempt(
            check, "grouped_mm", measure.check_grouped_mm, self.device, self.dtype, RANK
        )
        self.record["grouped_mm"] = checked or check
        print(f"grouped_mm with rank {RANK}: {self.record['grouped_mm']}", flush=True)

        world, failures = self.make(), {}
        self.describe(world)
        whole = [
            name for name in self.rows if self.table[name].method == "fft" and "step" in self.parts
        ]
        if "step" in self.parts:
            names = [name for name in self.rows if name not in whole]
            for group in [[name] for name in names] if self.device.type == "cuda" else [names]:
                self.steps(group, world)
                measure.free()
        if "generate" in self.parts:
            attempt(
                failures, "generate", lambda: self.others("generate", decoders(world, self.new))
            )
            measure.free()
        if "load" in self.parts:
            with tempfile.TemporaryDirectory() as made:
                attempt(failures, "load", lambda: self.others("load", loaders(world, Path(made))))
        for name in whole:
            world = None  # the whole memory is needed
            measure.free()
            attempt(
                self.rows[name], "world", lambda name=name: self.steps([name], self.make(), "fft")
            )
        self.record |= failures
        self.save()
        show(self.record)


# ---- the command line ----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(
        prog="python -m paper.bench",  # not __main__.py
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what, add = p.add_mutually_exclusive_group().add_argument, p.add_argument
    rare = p.add_argument_group("rarely needed").add_argument
    # fmt: off
    what("--shape", choices=SHAPES, default="small", help="of a random model (default small)")
    what("--model", help="in place of a shape: tiny, a folder, or a Hub id")
    rare("--tokens", type=COUNT, help="in a step (default: the shape's; 1024)")
    rare("--length", type=COUNT, help="tokens of a sequence (default: the shape's; 256)")
    rare("--share", type=SHARE, default=0.5159,
         help="visits of a shape's hot experts (default 0.5159)")
    rare("--rounds", type=COUNT, default=5, help="turns of each configuration (default 5)")
    rare("--new", type=COUNT, default=64, help="tokens to generate for a prompt (default 64)")
    add("--only", metavar="NAMES", help=f"of {', '.join(configurations())}")
    rare("--parts", metavar="NAMES", default=",".join(PARTS),
         help=f"of {', '.join(PARTS)} (default all)")
    rare("--minutes", type=number(float, above=0),
         help="after which nothing new is begun (default 7; cpu 30)")
    add("--json", type=Path, metavar="FILE", help="where to write everything that was measured")
    # fmt: on
    add_compute_flags(rare)
    return p.parse_args()


def chosen(names: str | None, known: list[str], flag: str) -> list[str]:
    """The names in `names`, in the order of `known`. Raises ValueError for an unknown name."""
    asked = names.split(",") if names else known
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(
            f"{flag} {unknown[0]} cannot be measured here: want some of {', '.join(known)}"
        )
    return [name for name in known if name in asked]


def world_maker(args: argparse.Namespace, on: Bench) -> Callable[[], World]:
    """A function that makes the world, the same one each time."""
    shape = SHAPES[args.shape]
    tokens = args.tokens or (1024 if args.model else shape.tokens)
    length = min(args.length or (256 if args.model else shape.length), tokens)
    make = partial(world_of, args.model) if args.model else partial(random_world, shape, args.share)
    return partial(make, tokens, length, on.dtype, on.device)


def hardware() -> str:
    """The processor's name, and the number of threads that PyTorch uses."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", cpu.read_text() if cpu.exists() else "", re.M)
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Measure everything, and print the table at the end."""
    torch.backends.cuda.matmul.allow_tf32 = True  # for PEFT, whose adapters multiply in fp32
    Bench(parse_args()).run()


if __name__ == "__main__":
    command(main)
