"""Training speed and memory of our methods, and of transformers + PEFT where they are installed.

    python -m paper.bench --shape small --json FILE            minutes on a CPU
    python -m paper.bench --shape olmoe --json FILE            OLMoE-1B-7B with random weights, on a GPU
    python -m paper.bench --model tiny --only lora,hellora     any checkpoint

All configurations have the same weights, batch and training step (train.train_step), and take turns, round
by round. "-loop" multiplies expert by expert; "peft" is PEFT on transformers 5; "peft-v4-..." is PEFT on the
layout of transformers 4, where each expert is a module, as it presumably was for the paper. Full fine-tuning
comes after the others, alone, as it needs the memory. With --json the file is written anew after each stage.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from paper import bench_measure as measure
from paper import bench_stages as stages
from paper.bench_report import show, summarise
from paper.bench_worlds import RANK, SHAPES, World, random_world, world_of
from run import DTYPES, Parser, above_0, add_compute_flags, command, compute, share_of_1, versions, write_json

PARTS = ("step", "memory", "generate", "load")
MINUTES = {"cuda": 7, "cpu": 30}
ENDS = {"step": 0.6, "generate": 0.8, "load": 0.85, "prepare": 0.9}  # of the minutes: no more begins then


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what, add = p.add_mutually_exclusive_group().add_argument, p.add_argument
    # fmt: off
    what("--shape", choices=SHAPES, default="small", help="of a random model (default small)")
    what("--model", help="in place of a shape: tiny, a folder, or a Hub id")
    add("--tokens", type=above_0(int), help="in a step (default: the shape's; 1024)")
    add("--length", type=above_0(int), help="tokens of a sequence (default: the shape's; 256)")
    add("--share", type=share_of_1, default=0.5159, help="visits of a shape's hot experts (default 0.5159)")
    add("--rounds", type=above_0(int), default=5, help="turns of each configuration (default 5)")
    add("--new", type=above_0(int), default=64, help="tokens to generate for a prompt (default 64)")
    add("--only", metavar="NAMES", help=f"of {', '.join(stages.configurations())}")
    add("--parts", metavar="NAMES", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default all)")
    add("--minutes", type=above_0(float), help="after which nothing new is begun (default 7; cpu 30)")
    add("--json", type=Path, metavar="FILE", help="where to write everything that was measured")
    # fmt: on
    add_compute_flags(add)
    return p.parse_args()


def chosen(names: str | None, known: list[str], flag: str) -> list[str]:
    """The asked names, in the order of `known`. Raises ValueError for an unknown one."""
    asked = names.split(",") if names else known
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"{flag} {unknown[0]} cannot be measured here: want some of {', '.join(known)}")
    return [name for name in known if name in asked]


def world_maker(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[], World]:
    """A function that makes the world, always the same one."""
    shape = SHAPES[args.shape]
    tokens, length = (1024, 256) if args.model else (shape.tokens, shape.length)
    tokens = args.tokens or tokens
    length = min(args.length or length, tokens)
    if args.model:
        return partial(world_of, args.model, tokens, length, dtype, device)
    return partial(random_world, shape, args.share, tokens, length, dtype, device)


def hardware(device: torch.device) -> dict:
    """What it ran on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {"cpu": names[0] if names else platform.machine(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        at = torch.cuda.get_device_properties(device)
        found |= {"gpu": at.name, "gpu_bytes": at.total_memory, "cuda": torch.version.cuda}
    return found


class Bench:
    """One run of the benchmark: its record grows stage by stage."""

    def __init__(self, args: argparse.Namespace):
        if args.json and not args.json.parent.is_dir():
            raise ValueError(f"--json {args.json}: want a folder that exists")
        self.began = time.monotonic()
        self.device, self.dtype = compute(args.device, args.dtype)
        self.table = stages.configurations()
        self.names = chosen(args.only, list(self.table), "--only")
        self.parts = chosen(args.parts, list(PARTS), "--parts")
        self.make, self.path = world_maker(args, self.device, self.dtype), args.json
        self.minutes = args.minutes or MINUTES[self.device.type]
        self.rounds, self.new = args.rounds, args.new
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        self.rows: dict[str, dict] = {name: {"seconds": []} for name in self.names}
        their = stages.peers()
        self.record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings | {"dtype": next(n for n, d in DTYPES.items() if d == self.dtype)},
            "versions": versions(self.device) | (their.release() if their else {}),
            "hardware": hardware(self.device),
            "clock": measure.clock_of(self.device),
            "rows": self.rows,
        }

    def go_on(self, part: str) -> bool:
        """Is there time to begin something more of this part?"""
        return time.monotonic() - self.began < self.minutes * 60 * ENDS[part]

    def save(self) -> None:
        """Write the record, as far as it goes."""
        self.record["minutes_used"] = round((time.monotonic() - self.began) / 60, 2)
        summarise(self.record)
        if self.path:
            write_json(self.path, json.loads(json.dumps(self.record, default=str)))

    def memory(self) -> None:
        """On a CPU, each configuration's peak in a process of its own. It comes first, as it forks."""
        for name in tqdm(self.names, "memory", leave=False):
            work = partial(measure.in_own_process, partial(stages.own_peak, self.table[name], self.make))
            row: dict = {}
            self.rows[name]["peak_bytes"] = stages.attempt(row, "memory", work)
            self.rows[name] |= row

    def describe(self, world: World) -> None:
        """What is true of all configurations."""
        n_tokens = sum(len(e.ids) - 1 for e in world.batch)
        self.record["world"] = {
            "tokens": n_tokens, "sequences": len(world.batch), "experts": world.experts,
            "hot_share": sum(world.shares.values()) / len(world.shares),
            "weight_bytes": sum(t.numel() * t.element_size() for t in world.base.values()),
        }  # fmt: skip
        for name, row in self.rows.items():
            work = partial(
                stages.needed, self.table[name].method, world.cfg, len(world.batch[0].ids) - 1, world.shares
            )
            row["flops_a_token"], row["expected"] = stages.attempt(row, "shapes", work) or (None, None)

    def prepare(self, name: str, world: World) -> stages.Session | None:
        """Build a configuration and take its first steps; None if that fails."""
        row, config = self.rows[name], self.table[name]
        session = stages.attempt(row, "build", partial(stages.Session, world, config))
        first = session and stages.attempt(
            row, "first step", partial(session.begin, config, row["expected"], world.cfg)
        )
        row |= first or {}
        return session if first else None

    def round(self, sessions: dict[str, stages.Session]) -> None:
        """A turn of each."""
        peak = stages.attempt({}, "peak", partial(measure.matmul_peak, self.device, self.dtype)) or 0.0
        self.record["matmul_flops_per_s"] = max(peak, self.record.get("matmul_flops_per_s", 0.0))
        for name in list(sessions):
            seconds = stages.attempt(self.rows[name], "step", sessions[name].turn)
            if seconds is None:
                del sessions[name]
                measure.free()
            else:
                self.rows[name]["seconds"].append(seconds)

    def steps(self, names: list[str], world: World, until: str = "step") -> None:
        """Rounds over some configurations, all of them in memory; no more begins after ENDS[until]."""
        sessions = {}
        for name in tqdm(names, "prepare", leave=False):
            if not self.go_on("prepare"):
                self.rows[name]["failed"] = f"start: --minutes {self.minutes} were not enough"
            elif session := self.prepare(name, world):
                sessions[name] = session
        for number in tqdm(range(self.rounds), "rounds", leave=False):
            if number and not self.go_on(until):
                print(f"only {number} of {self.rounds} rounds: --minutes {self.minutes} were not enough")
                break
            self.round(sessions)
            self.save()

    def run(self) -> None:
        """All parts."""
        if "memory" in self.parts and self.device.type == "cpu":
            self.memory()
            self.save()
        if self.device.type == "cpu":
            measure.keep_freed_memory()
        check: dict = {}
        checked = partial(measure.check_grouped_mm, self.device, self.dtype, RANK)
        self.record["grouped_mm"] = stages.attempt(check, "grouped_mm", checked) or check
        print(f"grouped_mm with rank {RANK}: {self.record['grouped_mm']}", flush=True)

        world = self.make()
        self.describe(world)
        frozen = [name for name in self.names if self.table[name].method != "fft"]
        if "step" in self.parts and frozen:
            self.steps(frozen, world)
            measure.free()
        for part, work in (("generate", partial(stages.decode, new=self.new)), ("load", stages.load)):
            if part in self.parts:
                row: dict = {}
                go_on = partial(self.go_on, part)
                work = partial(work, world, rounds=min(self.rounds, 2), go_on=go_on)
                self.record[part] = stages.attempt(row, part, work) or row
                measure.free()
                self.save()
        for name in [name for name in self.names if "step" in self.parts and name not in frozen]:
            world = work = None  # the whole memory is needed
            measure.free()
            stages.attempt(
                self.rows[name], "world", lambda name=name: self.steps([name], self.make(), "prepare")
            )
        self.save()
        show(self.record)


def main() -> None:
    """Measure, and print the table last."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # many models share one GPU
    torch.backends.cuda.matmul.allow_tf32 = True  # for PEFT, whose adapters multiply in fp32
    Bench(parse_args()).run()


if __name__ == "__main__":
    command(main)
