"""A device in Python, for want of a GPU: it refuses what CUDA refuses, and counts CUDA's waits.

Its tensors hold theirs on the CPU, where all is computed. They say that they are on "lazy:0", a
device that every PyTorch knows and that no other test uses. (Were it "cuda", autograd would ask for
a guard that PyTorch has only when built for CUDA.) Everything passes through `dispatched`, which
knows of four kinds of operations:

    mixed     Refused: an operation on tensors here and on the CPU. A number (a tensor without
              dimensions) may come from the CPU, as on CUDA.
    moved     A copy from the host or to it. The host waits.
    counted   The size of the result, or a number, depends on values. The host waits.
    rest      The host goes on.

It cannot know of waits inside CUDA's own kernels, but for three which PyTorch's source shows:
bincount, isin with many ids to look for, F.grouped_mm on cards that have no kernel for it.
"""

from collections import Counter
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)

COPIES = {"_to_copy", "copy_"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COUNTED = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select",
    "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip

waits: Counter[str] = Counter()  # {operation: how often the host waited in it}
has_kernel = True  # for F.grouped_mm: as on Hopper, or not, as on A100


class OnDevice(Tensor):
    """A tensor of the stand-in device."""

    @staticmethod
    def __new__(cls, held):
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def tolist(self):
        """PyTorch has none for subclasses."""
        waits["tolist"] += 1
        return self.held.tolist()

    def __repr__(self):
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return dispatched(op, args, kwargs or {})


def is_here(device):
    return device is not None and torch.device(device).type == DEVICE.type


def dispatched(op, args, kwargs):
    """One operation, computed on the CPU."""
    name, tensors = (
        op.overloadpacket.__name__,
        [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)],
    )
    here = [t for t in tensors if isinstance(t, OnDevice)]
    there = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() and not t.is_meta]
    result_is_here = bool(here)
    if kwargs.get("device") is not None:
        result_is_here = is_here(kwargs["device"])
        kwargs = kwargs | ({"device": "cpu"} if result_is_here else {})
    if name == "copy_":
        result_is_here = isinstance(args[0], OnDevice)
    crosses = (
        name in COPIES and (bool(there) or not result_is_here) and bool(here or result_is_here)
    )
    if here and there and not crosses and name not in INDEXED:
        shapes = [tuple(t.shape) for t in (*here, *there)]
        raise RuntimeError(f"{op} mixes the device with the CPU: {shapes}")
    sized = kwargs.get("output_size") is not None  # repeat_interleave need not look
    if (here or result_is_here) and (crosses or host_waits(name, tensors, there, sized)):
        waits[name] += 1

    def bare(x):
        return x.held if isinstance(x, OnDevice) else x

    out = op(*tree_map(bare, args), **tree_map(bare, kwargs))
    known = {id(t.held): t for t in here}  # an operation in place returns what it was given

    def dressed(x):
        if not isinstance(x, Tensor) or not result_is_here:
            return x
        return known.get(id(x)) if id(x) in known else OnDevice(x)

    return tree_map(dressed, out)


def host_waits(name, tensors, there, sized):
    """Whether CUDA's host waits in an operation that does not cross over."""
    if name in INDEXED:  # of a mask it counts the places; an index on the host is copied
        return any(t.dtype == torch.bool for t in tensors[1:]) or bool(there)
    if name == "isin":  # it sorts beyond this, IndexKernel's isin_sorting; PyTorch's own bound
        return tensors[1].numel() >= 10 * tensors[0].numel() ** 0.145
    if name == "repeat_interleave":
        return not sized
    return name in COUNTED or (name == "_grouped_mm" and not has_kernel)


class StandIn(TorchDispatchMode):
    """Inside it, "lazy:0" is there."""

    def __enter__(self):
        # Otherwise torch.tensor(..., device=) makes its tensor out of this mode's sight.
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return dispatched(op, args, kwargs or {})


@contextmanager
def counted():
    """The number of waits inside, in a list with one entry, once left."""
    before, found = waits.total(), []
    yield found
    found.append(waits.total() - before)
