"""The benchmark's measurements: time, memory, operations, FLOPs, and the device's best speed."""

import ctypes
import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hellora import Method, adapter_flops
from moe_model import Ends, MoEConfig, MoEModel, grouped_mm, looped_mm
from plumbing.data import Batch

# ---- time ----------------------------------------------------------------------------------------


def clock_of(device: torch.device) -> str:
    """The fair clock. On one CPU thread it is CPU time, which other processes do not stretch."""
    return "CPU time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"


def timed(device: torch.device, work: Callable[[], object], times: int = 1) -> float:
    """The seconds that `work` takes: the mean of `times` calls in a row."""
    now = time.process_time if clock_of(device) == "CPU time" else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = now()
    for _ in range(times):
        work()
    wait()
    return (now() - began) / times


def matmul_peak(device: torch.device, dtype: torch.dtype, tries: int = 6) -> float:
    """The FLOP/s of the fastest of a few square matrix products."""
    size, times = (8192, 10) if device.type == "cuda" else (1024, 1)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    seconds = min(timed(device, lambda: torch.mm(a, b, out=out), times) for _ in range(tries))
    return 2 * size**3 / seconds


# ---- FLOPs and operations ------------------------------------------------------------------------


def step_flops(
    model: MoEModel | None, cfg: MoEConfig, method: Method, length: int, shares: dict
) -> float:
    """The FLOPs that a training step needs per token. An implementation may compute more.

    They are the forward pass and input gradients of all matrix products, causal attention over half
    of the keys, the head on every token, and weight gradients for trained weights only. model: the
    model with the method's adapters, or None.
    """
    q_dim = cfg.n_heads * cfg.head_dim
    attention = 2 * cfg.dim * (q_dim + cfg.n_kv_heads * cfg.head_dim)  # q and o, k and v
    experts = 3 * cfg.dim * cfg.expert_dim * (cfg.top_k + cfg.n_shared) + cfg.dim * cfg.n_experts
    n_moe = len(cfg.moe_layers)
    matrices = (
        cfg.n_layers * attention + n_moe * experts + cfg.n_dense * 3 * cfg.dim * cfg.dense_dim
    )
    forward = 2 * (matrices + cfg.vocab_size * cfg.dim)
    # Queries times keys, and the attention weights times values.
    scores = cfg.n_layers * 2 * q_dim * (length + 1)
    extra = adapter_flops(model, shares) if model is not None else 0.0
    passes = 3 if method.train_a else 2.5  # LoRI computes no gradient for A
    return (3 if method.train_base else 2) * forward + 3 * scores + passes * extra


NO_WORK = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "set_",
}


class Operations(TorchDispatchMode):
    """Counts the ATen calls that do work on the device. Views and allocations do not count."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ):
        if not func.is_view and func.overloadpacket.__name__ not in NO_WORK:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def layer_operations(model: nn.Module, batch: Batch, n_dense: int = 0) -> dict[str, dict[str, int]]:
    """{"forward", "backward": {operation: calls}} of one whole decoder layer.

    It is the count for two MoE layers, less the count for the first of them alone. So embedding,
    head and loss are left out, and the layer must pass on the gradient of its input.
    """
    owner = getattr(model, "decoder", model)
    layers, counted = owner.layers, []
    try:
        for n in (n_dense + 1, n_dense + 2):
            owner.layers = layers[:n]
            with Operations() as forward:
                loss, _ = model(batch.tokens, targets=batch.targets)
            with Operations() as backward:
                loss.backward()
            model.zero_grad()  # sets gradients to None: adding to them would be one more operation
            counted.append((forward.counts, backward.counts))
    finally:
        owner.layers = layers
    names = ("forward", "backward")
    return {name: dict(two - one) for name, one, two in zip(names, *counted, strict=True)}


def check_grouped_mm(
    device: torch.device, dtype: torch.dtype, rank: int, width: int = 2048
) -> dict:
    """Whether F.grouped_mm is right for narrow groups (one is empty), forward and backward."""
    random = {"device": device, "dtype": dtype, "generator": torch.Generator(device).manual_seed(0)}
    ends = Ends(torch.tensor([40, 40, 177, 256], dtype=torch.int32, device=device))
    stored = (
        torch.randn(4, rank, width, **random) / width**0.5,
        torch.randn(4, width, rank, **random),
    )
    x, results = torch.randn(256, width, **random), []
    for matmul in (grouped_mm, looped_mm):
        leaves = [t.clone().requires_grad_() for t in (x, *stored)]
        a, b = (w.mT for w in leaves[1:])  # strided, like the adapters' factors
        y = matmul(matmul(leaves[0], a, ends), b, ends)
        (y * y).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    worst = max(
        float((got - want).norm() / want.norm()) for got, want in zip(*results, strict=True)
    )
    return {
        "rank": rank,
        "relative_error": worst,
        "ok": worst < (1e-4 if dtype == torch.float32 else 3e-2),
    }


# ---- memory --------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory. Otherwise every step pays for its pages again."""
    with suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        # No mmap, no trim, 256 MiB of top pad.
        for parameter, value in ((-4, 0), (-1, -1), (-2, 1 << 28)):
            libc.mallopt(parameter, value)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The bytes of weights, buffers and optimizer state. Tensors that share memory count once."""
    state = (
        t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)
    )
    tensors = chain(model.parameters(), model.buffers(), state)
    storages = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def cuda_peak(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], object]
) -> int:
    """The peak bytes of one configuration's step, without other configurations on the device."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return held_bytes(model, optimizer) + torch.cuda.max_memory_allocated() - before


def free() -> None:
    """Free the memory of objects that are not used any more."""
    gc.collect()
    with suppress(RuntimeError):  # an earlier error may have left the device unusable
        torch.cuda.empty_cache()


def in_own_process(work: Callable, *args: object) -> object:
    """The result of `work` in a forked process.

    Raises the error of `work`, or BrokenProcessPool if the process died.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *args).result()


def resident(kind: str) -> int:
    """The bytes of this process' memory: now (kind "VmRSS"), or at its peak ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Free unused memory, and let VmHWM begin again from now, where the system allows it."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
