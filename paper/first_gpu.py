"""The first minutes on a GPU. Are its results those of a CPU? How fast is it, in how much memory?

    python -m paper.first_gpu               within 8 minutes, into docs/results/
    python -m paper.first_gpu --rehearse    the same code on the CPU at tiny shapes, in a minute

Each part is a process of its own with a time limit. So a kernel that hangs, or an error of the
device, ends that part alone. The JSON file and the page are written after each part. Each part has
a verdict: the result, and whether it is as expected.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.first_gpu, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

import hellora
from catcher import Catcher, default_k
from generate import generate
from paper.bench import measure
from paper.bench.__main__ import Configuration, Session, configurations, hardware, needed
from paper.bench.worlds import ALPHA, RANK, SHAPES, World, frozen, random_world
from paper.runs.parallel import ROOT
from plumbing import memory
from plumbing.checkpoint import Checkpoint, empty_model, load_weights, locate, read_config
from plumbing.cli import Parser, command, lacks_memory
from plumbing.data import TASKS, encode, examples_of_step, load_examples
from plumbing.device import DTYPES, default_dtype, prepare_cuda
from plumbing.files import write_atomically, write_json
from plumbing.run_folder import versions
from plumbing.tokenizer import load_tokenizer
from train import make_optimizer, train_step

MINUTES = 8  # the time limit of all parts together
SHARE = 0.5159  # the share of visits that hot experts get, as in paper.bench
# The relative difference of losses that is accepted. Sums have another order, and bf16 rounds.
AGREES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
LENGTHS = (131, 197, 251, 313, 379)  # lengths of sequences, each new to the device
LONG = (8192, 512)  # tokens of a step, tokens of a sequence
SHORT = (3200, 200)  # 16 rows of a length as in GSM8K


class Place:
    """The device of a part, and its sizes."""

    def __init__(self, rehearse: bool):
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """The default of train.py on this device."""
        return DTYPES[default_dtype(self.device)]

    def world(self, tokens: int, length: int) -> World:
        """A random OLMoE-1B-7B and a batch. In a rehearsal they are tiny."""
        shape = SHAPES["tiny" if self.rehearse else "olmoe"]
        if self.rehearse:
            tokens, length = shape.tokens, shape.length
        return random_world(shape, SHARE, tokens, length, self.dtype, self.device)


# ---- the parts: each returns numbers, a verdict, and whether the result is good -----------------


def card(at: Place) -> dict:
    """The card and its software."""
    if at.rehearse:
        return versions(at.device) | {"name": hardware(), "verdict": "a rehearsal on the CPU"}
    if not torch.cuda.is_available():
        return {"failed": "torch finds no GPU here"}
    gpu = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return versions(at.device) | {
        "name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "cuda": torch.version.cuda,
        "bytes": total, "free_bytes": free,
        "verdict": f"{gpu.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
    }  # fmt: skip


def grouped(at: Place) -> dict:
    """Whether the grouped product is right for groups of rank 32, forward and backward."""
    found = measure.check_grouped_mm(at.device, at.dtype, RANK)
    return found | {"verdict": f"relative error {found['relative_error']:.1e} with rank {RANK}"}


def no_rows(at: Place) -> dict:
    """PyTorch's grouped product where all groups are empty. moe_model.py never calls it so."""
    x = torch.randn(16, 64, device=at.device).to(at.dtype)
    weight = torch.randn(4, 64, 64, device=at.device).to(at.dtype)
    ends = torch.zeros(4, dtype=torch.int32, device=at.device)
    try:
        out = F.grouped_mm(x[:0], weight, offs=ends)
        if at.device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        return {"error": str(error)[:300], "ok": False, "verdict": "an error (pytorch #152668?)"}
    return {"shape": list(out.shape), "verdict": "groups without rows work"}


def attention(at: Place) -> dict:
    """The time that attention takes for a new length, as in train.py and with cuDNN."""
    heads, width, batch = (2, 16, 2) if at.rehearse else (16, 128, 16)
    make = partial(torch.randn, device=at.device, dtype=at.dtype)

    def pass_over(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> None:
        out = F.scaled_dot_product_attention(q, k, k, mask, is_causal=mask is None)
        if q.requires_grad:
            out.sum().backward()

    found = {}
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        first, again, cached = [], [], []
        for length in LENGTHS:
            q = make(batch, heads, length, width).requires_grad_()
            times = [measure.timed(at.device, partial(pass_over, q, q, None)) for _ in range(2)]
            first.append(times[0])
            again.append(times[1])
        with torch.no_grad():
            for length in range(64, 84):
                k = make(batch, heads, length, width)
                mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=at.device)
                work = partial(pass_over, k[:, :, :1], k, mask)
                cached.append(measure.timed(at.device, work))
        choice = torch._fused_sdp_choice(q, q, q, is_causal=True)
        found["cudnn" if cudnn else "as train.py"] = {
            "backend": SDPBackend(choice).name,
            "new_length_ms": 1e3 * mean(first[1:]),  # the first starts the device
            "again_ms": 1e3 * mean(again[1:]),
            "longer_cache_ms": 1e3 * mean(cached[1:]),
        }
    ours, other = found["as train.py"], found["cudnn"]
    return found | {
        "ok": ours["new_length_ms"] < 10 * ours["again_ms"] + 5,
        "verdict": f"{ours['backend']}: a new length takes {ours['new_length_ms']:.1f} ms, a known "
        f"length {ours['again_ms']:.1f} (with cuDNN, {other['backend']}: a new length takes "
        f"{other['new_length_ms']:.1f})",
    }


def curve(
    at: Place,
    device: str,
    dtype: torch.dtype,
    method: str = "hellora",
    matmul: str = "grouped",
    recompute: bool = False,
) -> list[float]:
    """The losses of 20 steps of the embedded model (2 in a rehearsal)."""
    source, task = locate("tiny"), TASKS["tiny-math"]
    cfg, row = read_config(source), hellora.parse_method(method)
    examples = load_examples("tiny-math", task.train.fetch(), task.template)[:640]
    data = encode(examples, load_tokenizer(source), cfg.max_len, False)
    k = default_k(cfg) if row.chooses else cfg.n_experts
    model = empty_model(cfg, dtype, matmul).to(torch.float32 if row.train_base else dtype)
    hellora.attach(model, row, {i: list(range(k)) for i in cfg.moe_layers}, 8, 16)
    load_weights(model, Checkpoint(source), device)
    hellora.init_adapters(model, 0)
    model.recompute = recompute
    optimizer = make_optimizer(model, 3e-3 if row.train_base else 1e-2)
    steps, size, losses = (2, 4, []) if at.rehearse else (20, 32, [])
    for step in range(steps):
        batch = examples_of_step(data, step, size, 0)
        loss, _ = train_step(model, optimizer, batch, size // 2, 0.0, Catcher(cfg.n_experts))
        losses.append(loss)
    return losses


def tiny(at: Place) -> dict:
    """The losses of the embedded model, step by step, beside the CPU's in fp32."""
    device, low = str(at.device), torch.bfloat16
    cases = {
        "fp32": ("hellora", {"dtype": torch.float32}),
        "bf16": ("hellora", {"dtype": low}),
        "bf16, loop": ("hellora", {"dtype": low, "matmul": "loop"}),
        "bf16, recompute": ("hellora", {"dtype": low, "recompute": True}),
        "dora, fp32": ("dora", {"dtype": torch.float32}),
        "fft, bf16": ("fft", {"dtype": low}),
    }
    methods = {method for method, _ in cases.values()}
    on_cpu = {m: curve(at, "cpu", torch.float32, m) for m in sorted(methods)}
    found, off = {"cpu": on_cpu}, {}
    for name, (method, setting) in cases.items():
        losses = found[name] = curve(at, device, method=method, **setting)
        off[name] = max(abs(a / b - 1) for a, b in zip(losses, on_cpu[method], strict=True))
    bad = [name for name, (_, case) in cases.items() if not off[name] <= AGREES[case["dtype"]]]
    shown = ", ".join(f"{name}: {share:.1e}" for name, share in off.items())
    return found | {
        "off": off,
        "ok": not bad,
        "verdict": f"relative difference from the CPU's losses: {shown}",
    }


def speed(at: Place, name: str, tokens: int, length: int) -> dict:
    """The tokens per second of a training step beside the roofline, and peak memory."""
    config = configurations()[name]
    world = at.world(tokens, length)
    tokens = sum(len(e.ids) - 1 for e in world.batch)
    session = Session(world, config)
    session.step()  # the first step chooses kernels
    seconds = measure.timed(at.device, session.step, 1 if at.rehearse else 5)
    flops, _ = needed(config, world.cfg, tokens // len(world.batch), world.shares)
    roof = measure.matmul_peak(at.device, at.dtype) / flops
    found = {"tokens_per_s": tokens / seconds, "roofline_tokens_per_s": roof}
    verdict = f"{tokens / seconds:,.0f} tokens/s, {tokens / seconds / roof:.0%} of the roofline"
    if at.device.type == "cuda":
        found["peak_bytes"] = measure.cuda_peak(session.model, session.optimizer, session.step)
        verdict += f", peak {found['peak_bytes'] / 1e9:.1f} GB"
    if (plan := reckoned(config, name, world, tokens, at)) is not None:
        found["plan_bytes"] = plan
        verdict += f", planned {plan / 1e9:.1f} GB"
        peak = found.get("peak_bytes", plan)
        found["ok"] = abs(peak / plan - 1) <= 0.1
    return found | {"verdict": verdict}


def reckoned(config: Configuration, name: str, world: World, tokens: int, at: Place) -> int | None:
    """The planned bytes of a configuration. None for a peer, and for a model without adapters."""
    if config.method == "none" or name.startswith("peft"):
        return None
    row, k = hellora.parse_method(config.method), default_k(world.cfg)
    model = memory.shapes(world.cfg, row, k, RANK, ALPHA, at.dtype)
    share = mean(world.shares.values()) if row.chooses else 1.0
    recompute, on_cpu = name.endswith("-recompute"), at.device.type == "cpu"
    return sum(memory.training(model, tokens, share, recompute, on_cpu=on_cpu).values())


def busy(at: Place) -> dict:
    """The kernels that take most of the time of a hellora step."""
    session = Session(at.world(*LONG), configurations()["hellora"])
    session.step()
    on_gpu = at.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as seen:
        seconds = measure.timed(at.device, session.step)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, name))
    if on_gpu:  # without this, a kernel would also count for the operation that launched it
        rows = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA]
    spent = sum(getattr(row, name) for row in rows) / 1e6
    top = {row.key[:80]: round(getattr(row, name) / 1e3, 3) for row in rows[:12]}
    calls = sum(row.count for row in rows)
    return {
        "seconds": seconds, "busy_seconds": spent, "calls": calls, "top_ms": top,
        "verdict": f"busy {spent / seconds:.0%} of {1e3 * seconds:.0f} ms, in {calls:,} calls",
    }  # fmt: skip


def decoding(at: Place) -> dict:
    """The milliseconds per token when 100 prompts are decoded together."""
    n, prompt, new = (4, 8, 4) if at.rehearse else (100, 128, 64)
    world = at.world(*SHORT)
    draw = torch.Generator().manual_seed(2)
    prompts = torch.randint(world.cfg.vocab_size, (n, prompt), generator=draw).tolist()
    model = frozen(world)
    generate(model, prompts, 2, (), n)  # the first call chooses kernels
    work = partial(generate, model, prompts, new, (), n)
    seconds = measure.timed(at.device, work)
    return {
        "ms_a_token": 1e3 * seconds / new,
        "verdict": f"{1e3 * seconds / new:.1f} ms per token, {n} prompts together",
    }


def parts() -> dict[str, tuple[Callable[[Place], dict], int]]:
    """{name: (function, its seconds at most)}, in order. Later parts rely on earlier ones."""
    table = {
        "card": (card, 60),
        "grouped product": (grouped, 60),
        "attention": (attention, 60),
        "embedded model": (tiny, 120),
    }
    names = ["hellora", "lora", "none", "hellora-recompute", "dora"]
    # This does not call configurations(), which would import PEFT here. That may start CUDA.
    names += ["peft"] * all(map(find_spec, ("transformers", "peft")))
    table |= {f"{name}, 8,192 tokens": (partial(train, name, LONG), 75) for name in names}
    table |= {f"{n}, 3,200 tokens": (partial(train, n, SHORT), 75) for n in ("hellora", "lora")}
    table |= {"a step, by kernel": (busy, 60), "decoding": (decoding, 60)}
    return table | {"groups without rows": (no_rows, 30)}  # last: it is known to fail on some cards


def train(name: str, size: tuple[int, int], at: Place) -> dict:
    """`speed` for one configuration."""
    return speed(at, name, *size)


# ---- all parts, one after the other --------------------------------------------------------------


def attempt(work: Callable[[Place], dict], seconds: float, rehearse: bool) -> dict:
    """The result of a part that runs in its own process, or how it failed.

    The process is forked. So nothing may use CUDA in this process.
    """
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=answer, args=(theirs, work, rehearse))
    began = time.perf_counter()
    child.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(seconds) else {"failed": f"no answer in {seconds:.0f} s"}
    except EOFError:
        child.join()
        found = {"failed": f"the process died with exit code {child.exitcode}"}
    child.kill()
    child.join(5)  # a process that waits for the device may not end
    return found | {"part_seconds": round(time.perf_counter() - began, 1)}


def answer(to: Connection, work: Callable[[Place], dict], rehearse: bool) -> None:
    """Send the result of a part. This runs in the forked process."""
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        if rehearse:
            torch.set_num_threads(1)
        else:
            prepare_cuda()
        to.send(work(Place(rehearse)))
    except Exception as error:  # any error: the other parts must go on
        if lacks_memory(error):
            to.send({"ok": False, "verdict": "it does not fit into the free memory"})
            return
        first = next(iter(str(error).strip().splitlines()), "")
        to.send({"failed": f"{type(error).__name__}: {first}"[:300]})


def page(record: dict) -> str:
    """The record as Markdown, with a line for each part."""
    rows = [
        f"| {name} | {mark(found)} | {found.get('failed') or found['verdict']} "
        f"| {found['part_seconds']:.0f} |"
        for name, found in record["parts"].items()
    ]
    title = (
        "A rehearsal on a CPU, whose numbers mean nothing"
        if record["rehearsal"]
        else "The first minutes on a GPU"
    )
    head = [
        f"# {title}: {record['card']}",
        "",
        f"{record['date']}, `python -m paper.first_gpu`",
        "",
    ]
    table = ["| part | | found | s |", "|---|---|---|--:|", *rows, ""]
    if ratio := beside_peft(record["parts"]):
        table += [f"hellora trains {ratio:.2f} times as fast as transformers + PEFT's LoRA.", ""]
    return "\n".join([*head, *table])


def beside_peft(found: dict[str, dict]) -> float | None:
    """hellora's tokens per second, divided by those of PEFT's LoRA. None if one is not measured."""
    ours, theirs = (
        found.get(f"{name}, 8,192 tokens", {}).get("tokens_per_s") for name in ("hellora", "peft")
    )
    return ours / theirs if ours and theirs else None


def mark(found: dict) -> str:
    """A word for the result of a part."""
    if "failed" in found:
        return "failed"
    return "good" if found.get("ok", True) else "look at it"


def run(folder: Path, rehearse: bool) -> list[str]:
    """Run all parts, and write into `folder`. Returns the names of those that failed.

    Raises ValueError without a GPU, before anything is written.
    """
    began, record, table = time.monotonic(), {}, parts()
    for name, (work, most) in table.items():
        left = 60 * MINUTES - (time.monotonic() - began)
        found = (
            attempt(work, min(most, left), rehearse)
            if left > 5
            else {"failed": "no time was left", "part_seconds": 0}
        )
        if name == "card":
            if "name" not in found:
                why = found.get("failed") or found["verdict"]
                raise ValueError(f"{why}: want a machine with a free GPU, or --rehearse")
            now = datetime.now(UTC)
            record |= {"date": now.isoformat(timespec="seconds"), "card": found["name"]}
            record |= {"rehearsal": rehearse, "parts": {}}
            slug = re.sub(r"[^a-z0-9]+", "-", found["name"].lower()).strip("-")
            stem = folder / f"first-gpu-{slug}-{now:%Y-%m-%d}"
        record["parts"][name] = found
        print(f"{name:34s}{mark(found):12s}{found.get('failed') or found['verdict']}", flush=True)
        write_json(stem.with_name(stem.name + ".json"), record)
        text = page(record)
        write_atomically(
            stem.with_name(stem.name + ".md"), lambda draft, text=text: draft.write_text(text)
        )
    return [name for name, found in record["parts"].items() if "failed" in found]


def main() -> None:
    """Run the parts, and say which failed."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny shapes")
    p.add_argument("--out", type=Path, metavar="DIR",
        help="where the two files go (default docs/results; nowhere with --rehearse)")  # fmt: skip
    args = p.parse_args()
    if args.out and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: want a folder that exists")
    with tempfile.TemporaryDirectory() as nowhere:
        kept = Path(nowhere) if args.rehearse else ROOT / "docs" / "results"
        failed = run(args.out or kept, args.rehearse)
    if failed:
        raise ValueError(f"{len(failed)} parts failed: {', '.join(failed)}")


if __name__ == "__main__":
    command(main)
