"""Everything that a user does with a model, at real size, on a CPU and without a download.

    python -m paper.real_size               OLMoE-1B-7B: 35 GB of disk, 24 GB of memory, 10 minutes
    python -m paper.real_size --rehearse    the same steps at a small size

It writes a random checkpoint with the model's exact shapes, in four files. It trains (with the
default warm-up), stops in the second step, and resumes. It exports in both forms, scores a few
problems, and compares the exported model with transformers where that is installed. Each step is a
process of its own. Its seconds and its peak memory stand beside the plan of plumbing/memory.py. All
files are removed at the end, also after an error.

Accuracies mean nothing here. The text is tiny-math's, in the embedded model's tokens, unless --data
and --tokenizer give others.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.real_size, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from catcher import default_k
from hellora import parse_method
from moe_model import MoEModel
from paper.bench import measure
from paper.runs.parallel import ROOT
from paper.studies.tables import ALPHA, RANK
from plumbing import memory
from plumbing.checkpoint import BACKBONES, INDEX, base_parameters, parse_config
from plumbing.cli import COUNT, Parser, command
from plumbing.data import TASKS, encode, load_examples
from plumbing.device import free_bytes
from plumbing.files import write_json
from plumbing.run_folder import versions
from plumbing.tokenizer import load_tokenizer

SHARDS = 4
SMALL = {  # --rehearse
    "model_type": "olmoe", "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 1024,
}  # fmt: skip
ROWS = 40  # the warm-up takes a tenth of them, one batch
BATCH, MICRO = 4, 2
TOKENS = 96  # for the comparison of the exported model
# Bytes that the arithmetic does not count: 0.4 GB for Python and PyTorch, and 1 GB for the kernels
# that oneDNN compiles for each new size of a product in bf16, and keeps.
PROCESS = 1.4e9
THEIRS = 1.65  # times the weights: the memory that transformers took to load OLMoE-1B-7B
CPU = torch.device("cpu")


def size_of(hub: dict) -> int:
    """The bytes of the checkpoint, in bf16."""
    return 2 * sum(shape.numel() for shape, _ in base_parameters(parse_config(hub)).values())


# ---- the checkpoint ------------------------------------------------------------------------------


def write_checkpoint(hub: dict, folder: Path) -> int:
    """Write a random checkpoint in SHARDS files: 1 for norms, else N(0, 1 / in). Returns bytes."""
    draw, most = torch.Generator().manual_seed(0), -(-size_of(hub) // SHARDS)
    tensors, written, weight_map, total = {}, 0, {}, 0

    def write() -> None:
        nonlocal written
        written += 1
        path = folder / f"model-{written:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, path, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, path.name))
        tensors.clear()

    for shape, names in base_parameters(parse_config(hub)).values():
        for name in names:
            value = tensors[name] = torch.ones(shape[-2:], dtype=torch.bfloat16)
            if value.ndim > 1:
                value.normal_(0, shape[-1] ** -0.5, generator=draw)
            total += value.numel() * 2
            if total >= most * (written + 1):
                write()
    if tensors:
        write()
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", hub)
    return total


def logits(folder: Path, ids: list[int], theirs: bool) -> torch.Tensor:
    """The logits [T, V] in fp32, computed in bf16 by our model or by transformers' model."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        if not theirs:
            return MoEModel.from_pretrained(folder, torch.bfloat16)(tokens)[0][0].float()
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model(tokens).logits[0].float()


# ---- a step in a process of its own --------------------------------------------------------------


class Steps:
    """The table of steps: their seconds and peaks, beside the plan."""

    def __init__(self, out: Path | None, record: dict):
        self.out, self.record = out, record | {"steps": {}}

    def note(self, name: str, began: float, peak: int, plan: float | None = None) -> None:
        """Add a row, print it, and write the record."""
        row = {"seconds": round(time.perf_counter() - began, 1), "peak_bytes": peak}
        if plan:
            row |= {"plan_bytes": round(plan), "peak_over_plan": round(peak / plan, 3)}
        self.record["steps"][name] = row
        beside = f", planned {plan / 1e9:.1f} GB" if plan else ""
        print(f"{name:34s}{row['seconds']:8.1f} s   peak {peak / 1e9:.1f} GB{beside}", flush=True)
        self.save()

    def save(self) -> None:
        """Write the record."""
        if self.out:
            write_json(self.out, self.record)

    def here(self, name: str, work: Callable, plan: float | None = None) -> object:
        """Call `work` in a fork of this process, and return its result."""
        began = time.perf_counter()
        result, peak = measure.in_own_process(and_peak, work)
        self.note(name, began, peak, plan)
        return result

    def run(
        self, name: str, words: list, plan: float | None = None, stop_at: Path | None = None
    ) -> None:
        """Run a command of this repository. Stop it when the file `stop_at` exists.

        Raises ValueError for another exit code than expected.
        """
        began, stopped = time.perf_counter(), False
        words = [sys.executable, *map(str, words)]
        with tempfile.TemporaryFile("w+") as log:
            child = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            try:
                pid = 0
                while not pid:  # wait4 also returns the peak memory, which wait() does not
                    time.sleep(0.1)
                    pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                    if not pid and not stopped and stop_at and stop_at.exists():
                        child.send_signal(signal.SIGTERM)
                        stopped = True
            except BaseException:
                child.kill()
                raise
            child.returncode = os.waitstatus_to_exitcode(status)
            wanted = 128 + signal.SIGTERM if stop_at else 0
            log.seek(0)
            last = (log.read().strip().splitlines() or [""])[-1]
        if child.returncode != wanted:
            raise ValueError(f"{name}: exit code {child.returncode}, want {wanted}: {last}")
        self.note(name, began, usage.ru_maxrss * 1024, plan)


def and_peak(work: Callable) -> tuple[object, int]:
    """The result of `work`, and this process' peak memory in bytes."""
    return work(), measure.resident("VmHWM")


# ---- all steps -----------------------------------------------------------------------------------


def reckoned(hub: dict, tokens: int, method: str) -> float:
    """The planned peak of a training step in bf16 on a CPU, with the process itself."""
    cfg, row = parse_config(hub), parse_method(method)
    k = default_k(cfg)
    model = memory.shapes(cfg, row, k, RANK, ALPHA, torch.bfloat16)
    share = memory.visits_of(row, k, cfg.n_experts)
    return PROCESS + sum(memory.training(model, tokens, share, on_cpu=True).values())


def check_room(hub: dict, plan: float, folder: Path) -> None:
    """Raise ValueError unless there is enough disk and memory."""
    disk, wanted = shutil.disk_usage(folder).free, 2.2 * size_of(hub) + 4 * memory_of_run(hub)
    if disk < wanted:
        raise ValueError(
            f"{folder} has {disk / 1e9:.1f} GB free, but the checkpoint, its export and the run "
            f"take {wanted / 1e9:.1f} GB: want --work DIR on a larger disk"
        )
    free = free_bytes(CPU)
    if free and free < plan:
        raise ValueError(
            f"{free / 1e9:.1f} GB of memory are free, but training should take "
            f"{plan / 1e9:.1f} GB: want a larger machine, or --rehearse"
        )


def memory_of_run(hub: dict) -> int:
    """The bytes of the trained numbers. A save has three times as many, with AdamW's two values."""
    cfg = parse_config(hub)
    row = parse_method("lora")
    model = memory.shapes(cfg, row, default_k(cfg), RANK, ALPHA, torch.bfloat16)
    return memory.held(model, 1, False)["gradients"]


def compare(steps: Steps, hub: dict, folder: Path, ids: list[int]) -> None:
    """Compare the argmax of each token between our exported model and transformers."""
    weights = size_of(hub)
    ours = steps.here("load the export, 96 tokens: ours", partial(logits, folder, ids, False))
    if not find_spec("transformers"):
        print("transformers is not installed, so there is no comparison")
        return
    if free_bytes(CPU) < THEIRS * weights:
        print(f"transformers is left out, as it needs {THEIRS * weights / 1e9:.1f} GB of memory")
        return
    work = partial(logits, folder, ids, True)
    theirs = steps.here("the same: transformers", work)
    agreement = agree(ours, theirs)
    steps.record["transformers"] = agreement
    print(
        "argmax as in transformers: {same_argmax} of {tokens} tokens, logits differ by {rms:.2%} "
        "(rms)".format(**agreement)
    )
    if agreement["same_argmax"] < len(ids):
        print(
            "where it differs, transformers' logits of the two choices differ by at most "
            "{gap:.4f}, and the logits of the two models by {distance:.4f} (rms)".format(
                **agreement
            )
        )


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """How far two models agree, by their logits [T, V] of the same tokens.

    Where the argmax differs, `gap` says how much transformers prefers its own choice, in logits.
    If that is about `distance`, the two choices are a tie within the rounding of bf16.
    """
    own, other = ours.argmax(-1), theirs.argmax(-1)  # [T]
    difference = ours - theirs
    preferred = theirs.gather(-1, other[:, None]) - theirs.gather(-1, own[:, None])  # [T, 1]
    return {
        "tokens": len(own),
        "same_argmax": int((own == other).sum()),
        "rms": float(difference.norm() / theirs.norm()),
        "distance": float(difference.square().mean().sqrt()),
        "gap": float(preferred.max()),
    }


def work_in(folder: Path, args: argparse.Namespace, hub: dict) -> None:
    """Run all steps in `folder`."""
    model, run, rows = folder / "model", folder / "run", folder / "rows.jsonl"
    model.mkdir()
    shutil.copy(args.tokenizer, model / "tokenizer.json")
    (model / "config.json").write_text(json.dumps(hub))
    task = TASKS["tiny-math"]
    lines = (args.data or task.train.fetch()).read_text().splitlines(keepends=True)[:ROWS]
    rows.write_text("".join(lines))
    tokenizer = load_tokenizer(model)
    data = encode(load_examples("tiny-math", rows, task.template), tokenizer, 4096, False)
    tokens = MICRO * max(len(e.ids) - 1 for e in data)
    plan = max(reckoned(hub, tokens, method) for method in ("lora", "hellora"))
    check_room(hub, plan, folder)

    steps = Steps(
        args.out,
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": "small" if args.rehearse else args.model,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": versions(CPU),
            "tokens_of_a_micro_batch": tokens,
        },
    )
    steps.here("write the checkpoint", partial(write_checkpoint, hub, model))
    steps.record["checkpoint_bytes"] = size_of(hub)
    train = ["train.py", "--model", model, "--task", "tiny-math", "--data", rows, "--out", run]
    train += ["--dtype", "bf16", "--device", "cpu", "--batch-size", BATCH, "--micro-batch", MICRO]
    train += ["--rank", RANK, "--alpha", ALPHA, "--no-eval", "--save-every", 1]
    train += ["--steps", 12 if args.rehearse else 3]
    saved = run / "state.safetensors"
    steps.run("warm-up, a step, stopped in the next", train, plan, stop_at=saved)
    steps.run("resumed, to the end", train, reckoned(hub, tokens, "hellora"))
    for form in ("peft", "hub"):
        out = folder / form
        words = ["export.py", "--run", run, "--format", form, "--out", out, "--device", "cpu"]
        steps.run(f"export, {form}", words)
    words = ["eval_gsm8k.py", "--run", run, "--data", rows, "--limit", BATCH, "--max-new", 8]
    steps.run("score 4 problems, 8 tokens each", [*words, "--device", "cpu"])
    ids = [i for e in data for i in e.ids][:TOKENS]
    compare(steps, hub, folder / "hub", ids)
    steps.save()


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    # fmt: off
    add("--model", choices=BACKBONES, default="olmoe-1b-7b",
        help=f"whose shapes: {', '.join(BACKBONES)} (default olmoe-1b-7b)")
    add("--rehearse", action="store_true", help="a small model in its place, nothing is kept")
    add("--data", type=Path, metavar="FILE", help="rows with question and answer")
    add("--tokenizer", type=Path, metavar="FILE", default=ROOT / "tiny" / "tokenizer.json",
        help="a tokenizer.json of the model's (default: the embedded model's)")
    add("--eos", type=COUNT, metavar="ID", help="the token that ends a text in --tokenizer")
    add("--work", type=Path, metavar="DIR", help="where to write the checkpoint (default: /tmp)")
    add("--out", type=Path, metavar="FILE",
        help="the result (default docs/results/real-size-MODEL.json; none with --rehearse)")
    # fmt: on
    args = p.parse_args()
    if args.out is None and not args.rehearse:
        args.out = ROOT / "docs" / "results" / f"real-size-{args.model}.json"
    return args


def main() -> None:
    """Write, train, stop, resume, export, score, compare, clean up."""
    args = parse_args()
    for file in (args.data, args.tokenizer):
        if file and not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
    end = args.eos or json.loads((ROOT / "tiny" / "config.json").read_text())["eos_token_id"]
    hub = (SMALL if args.rehearse else BACKBONES[args.model].hub) | {"eos_token_id": end}
    with tempfile.TemporaryDirectory(dir=args.work, prefix="real-size-") as folder:
        work_in(Path(folder), args, hub)


if __name__ == "__main__":
    command(main)
