"""CPU time and memory of loading a 2 GB checkpoint, beside the least that reading it can cost.

python tests/peers/load_time.py [--rounds 5]

The checkpoint is random, bf16, in five shards, with the shapes of two layers of OLMoE-1B-7B. The least is
os.preadv of every shard into tensors that are already there. Each measurement is a process of its own, on
files that are in the page cache; the two take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save_file

from checkpoint import parse_config, shard_paths
from moe_model import MoEModel, base_parameters

HUB = {"model_type": "olmoe", "intermediate_size": 1024, "num_hidden_layers": 2}
SHARDS = 5


def write(folder: Path) -> None:
    """The checkpoint."""
    wanted = [(n, s[-2:]) for s, names in base_parameters(parse_config(HUB)).values() for n in names]
    of = {
        name: f"model-{i * SHARDS // len(wanted) + 1:05d}.safetensors" for i, (name, _) in enumerate(wanted)
    }
    for path in set(of.values()):
        tensors = {n: torch.randn(s).bfloat16() for n, s in wanted if of[n] == path}
        save_file(tensors, folder / path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(HUB))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))


def read_shards(folder: Path) -> dict[Path, torch.Tensor]:
    """Every byte of every shard into tensors that are there."""
    rooms = {p: torch.empty(p.stat().st_size, dtype=torch.uint8) for p in shard_paths(folder)}
    for path, tensor in rooms.items():
        room = tensor.numpy()
        file, at = os.open(path, os.O_RDONLY), 0
        while at < len(room):
            at += os.preadv(file, [memoryview(room)[at:]], at)
        os.close(file)
    return rooms


def load(folder: Path) -> MoEModel:
    """Ours."""
    return MoEModel.from_pretrained(folder, torch.bfloat16)


def measure(what: str, folder: Path) -> None:
    """Print CPU seconds and the growth of the peak memory, in bytes; in a process of its own."""
    began, before = time.process_time(), peak_bytes()
    kept = globals()[what](folder)
    seconds, grown = time.process_time() - began, peak_bytes() - before
    print(json.dumps({"seconds": seconds, "bytes": grown, "kept": kept is not None}))


def peak_bytes() -> int:
    """The most memory this process has had, mapped files included (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]))
    else:
        compare(args.rounds)


def compare(rounds: int) -> None:
    """Both, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        size = sum(path.stat().st_size for path in shard_paths(Path(folder)))
        found = {"read_shards": [], "load": []}
        for _ in range(rounds):
            for what, results in found.items():
                command = [sys.executable, __file__, "--measure", what, folder]
                results.append(json.loads(subprocess.check_output(command, cwd=ROOT)))
    for what, results in found.items():
        seconds, peak = (median(r[key] for r in results) for key in ("seconds", "bytes"))
        print(f"{what:12s} {seconds:5.2f} CPU s, peak grows by {peak / size:.3f} of {size:,} bytes")
    ratio = median(r["seconds"] for r in found["load"]) / median(r["seconds"] for r in found["read_shards"])
    print(f"ratio of the medians {ratio:.2f}, want 1.2 at most")
    sys.exit(ratio > 1.2)


if __name__ == "__main__":
    main()
