"""One process or several: which part of the work is mine, and how parts come together.

torchrun starts the same command N times. Each process is a rank. Without torchrun there is one
rank, and all of this does nothing. Two ways to share the work (--shard):

    full    Every parameter is cut along its first dimension, and each rank holds a part. A layer is
            put together when it is needed, and cut again after that (FSDP2). This is for models
            that one device cannot hold.
    none    Every rank holds the whole model. Only the adapters' gradients are sent.
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
PATIENCE = timedelta(minutes=30)  # how long a rank waits for another, which may load or save


def rank() -> int:
    """My number, from 0. Rank 0 prints and writes files."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many ranks there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device) -> torch.device:
    """Join the other ranks, and silence all but rank 0. Returns the device of this rank.

    Raises ValueError for more processes than GPUs.
    """
    if world() == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        local_rank, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise ValueError(
                f"more processes than the {n_gpus} GPUs here: want --nproc-per-node {n_gpus}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=PATIENCE, device_id=device if on_gpu else None
    )
    if rank():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        # All progress bars, wherever they are made. Those of rank 0 are enough.
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
    value = torch.tensor(n, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def wait() -> None:
    """Wait until all ranks are here."""
    if world() > 1:
        dist.barrier()


def is_lost(error: RuntimeError) -> bool:
    """Whether other ranks do not answer. With NCCL, torchrun often ends this rank before that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def gathered(x: T) -> list[T]:
    """Every rank's x, in order of rank."""
    xs = [x] * world()
    if world() > 1:
        dist.all_gather_object(xs, x)
    return xs


def once(do: Callable[[], T]) -> T:
    """The result of do() on rank 0, for all ranks. The others wait for it."""
    return gathered(None if rank() else do())[0]


def sum_gradients(params: Iterable[nn.Parameter]) -> None:
    """--shard none: add up the gradients of all ranks, in one message."""
    grads = [p.grad for p in params]
    flat = total(torch.cat([g.flatten() for g in grads]))
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def backward(loss: Tensor, model: nn.Module) -> None:
    """`loss.backward()`, where the whole loss is the sum of the losses of all ranks.

    A cut model averages gradients over the ranks (FSDP2). There the loss is multiplied, so that the
    averages are sums.
    """
    (loss * world() if is_cut(model) else loss).backward()


def finish_gradients(params: list[nn.Parameter], model: nn.Module) -> None:
    """Give every rank the gradients of the whole loss, after the last `backward` of a step.

    A cut model has done so in its backward passes.
    """
    if world() > 1 and not is_cut(model):
        sum_gradients(params)


# ---- a cut model: each rank has some rows of each parameter --------------------------------------


def shard(
    model: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype | None, device: torch.device
) -> None:
    """--shard full: cut up `model` in place, layer by layer and then the rest.

    dtype: the dtype in which trained weights are sent and computed (full fine-tuning). None: the
    dtype in which they are stored, which is right for a frozen bf16 base with fp32 adapters.
    Gradients are added up in float32.
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

    In a cut model, a layer is put together in the forward pass and again in the backward pass. The
    rest (embedding, head) is put together once. Each rank gets its part of the sum of gradients.
    Without a cut, the gradients go round in a ring, twice.
    """
    params = list(model.named_parameters())
    # In full fine-tuning, weights are sent in the dtype of the computation.
    full = all(p.requires_grad for _, p in params)
    size = 0
    for name, p in params:
        if cut:
            numel = -(-p.shape[0] // n) * n * math.prod(p.shape[1:])  # all parts have one size
            times = 2 if name.startswith("layers.") else 1
            size += times * numel * (model.dtype if full else p.dtype).itemsize
            size += numel * 4 * p.requires_grad
        else:
            size += 2 * p.numel() * 4 * p.requires_grad
    return size * (n - 1) // n


def mine(t: Tensor) -> Tensor:
    """The rows of t that this rank holds. All, unless t is cut up."""
    return t.to_local() if hasattr(t, "to_local") else t


def first_row(t: Tensor) -> int:
    """The index in t of the first row of `mine(t)`. FSDP2 cuts as torch.chunk does."""
    return min(rank() * -(-t.shape[0] // world()), t.shape[0]) if hasattr(t, "to_local") else 0


def whole(t: Tensor) -> Tensor:
    """All rows of t. Every rank must call it at the same time."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def on_rank_0(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, on the CPU of rank 0. {} on the other ranks. Every rank must take part.

    They are put together one after the other, so that a rank other than 0 holds at most one beside
    its own rows.
    """
    result = {}
    for name, t in tensors.items():
        all_rows = whole(t)
        if not rank():
            result[name] = all_rows.cpu().contiguous()
        del all_rows  # before the next is put together
    return result


def put(t: Tensor, value: Tensor) -> None:
    """Set t, which may be cut up, to `value`, of which each rank has all rows."""
    rows = mine(t)
    if rows is t:
        t.copy_(value)
    else:
        rows.copy_(value[first_row(t) :][: len(rows)])


def put_together(model: nn.Module, free: int) -> bool:
    """Let every rank keep the whole of a cut model from now on, if it fits in `free` bytes of each.

    Then its layers are sent once, and not in each pass. This is for passes without gradients. A
    fifth of the free bytes is left for them. Returns whether it was done.
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
