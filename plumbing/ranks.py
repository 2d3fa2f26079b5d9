"""One process or several: which part of the work is mine, and how parts come together.

torchrun starts the same command N times; each process is a rank. Without torchrun there is one, and
all of this does nothing. Two ways to share the work (--shard):

    full    Every parameter is cut along its first dimension, a part for each rank. A layer is put
            together when it is needed, and let go again (FSDP2). For models that one device cannot
            hold.
    none    Every rank holds the whole model, and only the adapters' gradients travel.
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # how long a rank waits for others: one may be loading, or saving


def rank() -> int:
    """My number, from 0. Rank 0 prints and writes files."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many ranks there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device) -> torch.device:
    """Join the other ranks, and be quiet unless rank 0; the device that is mine."""
    if world() == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        mine, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if mine >= there:
            raise ValueError(
                f"more processes than the {there} GPUs here: want --nproc-per-node {there}"
            )
        device = torch.device("cuda", mine)
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=PATIENCE, device_id=device if on_gpu else None
    )
    if rank():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        # every bar, wherever it is made: rank 0's are enough
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return device


def stop() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- numbers that all must agree on --------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """The sum of all ranks' x, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def largest(n: int, device: torch.device) -> int:
    """The largest of all ranks' n."""
    if world() == 1:
        return n
    found = torch.tensor(n, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def wait() -> None:
    """Until all ranks are here."""
    if world() > 1:
        dist.barrier()


def is_lost(error: RuntimeError) -> bool:
    """Whether other ranks do not answer. With NCCL, torchrun often ends this one before that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def gathered(x: T) -> list[T]:
    """Every rank's x, in order of rank."""
    found = [x] * world()
    if world() > 1:
        dist.all_gather_object(found, x)
    return found


def once(do: Callable[[], T]) -> T:
    """What rank 0 gets from doing it, for all; the others wait for that."""
    return gathered(None if rank() else do())[0]


def sum_gradients(params: Iterable[nn.Parameter]) -> None:
    """--shard none: add up all ranks' gradients, in one message."""
    grads = [p.grad for p in params]
    flat = total(torch.cat([g.flatten() for g in grads]))
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def backward(loss: Tensor, model: nn.Module) -> None:
    """`loss.backward()` for a loss that is a sum over all ranks, of which each has its part.

    A cut model averages gradients over the ranks (FSDP2), so there the loss is multiplied to give
    sums.
    """
    (loss * world() if is_cut(model) else loss).backward()


def finish_gradients(params: list[nn.Parameter], model: nn.Module) -> None:
    """After the last `backward` of a step, give every rank the gradients of the whole loss.

    A cut model has already done so in its backward passes.
    """
    if world() > 1 and not is_cut(model):
        sum_gradients(params)


# ---- parameters of which each rank has some rows -------------------------------------------------


def shard(
    model: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype | None, device: torch.device
) -> None:
    """--shard full: cut up `model` in place, layer by layer and then the rest.

    dtype: what trained weights are sent and computed in (full fine-tuning); None: as they are
    stored, which is right for a frozen bf16 base with fp32 adapters. Gradients are added up in
    float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for part in (*layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def traffic(model: nn.Module, n: int, cut: bool) -> int:
    """Bytes that each of n ranks gets from the others, in a micro-batch if `cut`, else in a step.

    Cut up, a layer is put together in the forward and again in the backward pass, the rest
    (embedding, head) once, and each rank gets its part of the gradients' sum. Else the gradients go
    round in a ring, twice.
    """
    params = list(model.named_parameters())
    # In full fine-tuning, weights are sent as they are computed.
    full = all(p.requires_grad for _, p in params)
    size = 0
    for name, p in params:
        numel = (
            -(-p.shape[0] // n) * n * math.prod(p.shape[1:]) if cut else p.numel()
        )  # parts of equal size
        if cut:
            times = 2 if name.startswith("layers.") else 1
            size += times * numel * (model.dtype if full else p.dtype).itemsize
        size += numel * 4 * p.requires_grad * (1 if cut else 2)
    return size * (n - 1) // n


def mine(t: Tensor) -> Tensor:
    """The rows of t that this rank holds: all, unless t is cut up."""
    return t.to_local() if hasattr(t, "to_local") else t


def first_row(t: Tensor) -> int:
    """Which row of t the first of `mine(t)` is. FSDP2 cuts as torch.chunk does."""
    return min(rank() * -(-t.shape[0] // world()), t.shape[0]) if hasattr(t, "to_local") else 0


def whole(t: Tensor) -> Tensor:
    """All rows of t. Every rank must ask at the same time."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def on_rank_0(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in one piece each, on the CPU; nothing for the others. Every rank must take part.

    One after another: beside its own rows a rank holds one of them at most, but for rank 0.
    """
    found = {}
    for name, t in tensors.items():
        in_one = whole(t)
        if not rank():
            found[name] = in_one.cpu().contiguous()
        del in_one  # before the next is put together
    return found


def put(t: Tensor, value: Tensor) -> None:
    """Give t a new value, of which each rank knows all rows."""
    rows = mine(t)
    if rows is t:
        t.copy_(value)
    else:
        rows.copy_(value[first_row(t) :][: len(rows)])


def put_together(model: nn.Module, free: int) -> bool:
    """Have every rank keep a cut model in one piece from now on, if `free` bytes of each allow it.

    So its layers are sent once, and not in each pass. It is for passes without gradients. A fifth
    of what is free is left for those. Returns whether it was done.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if not all(gathered(size <= 0.8 * free)):
        return False
    for part in model.modules():
        if hasattr(part, "unshard"):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    return True


def is_cut(model: nn.Module) -> bool:
    """Whether `shard` has cut it up."""
    return any(hasattr(p, "to_local") for p in model.parameters())
