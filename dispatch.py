"""Tokens to the experts they chose and back: rows sorted by expert, and what multiplies them.

Letters:
    M tokens    K experts per token    N rows = M*K: one copy of a token for each expert it visits
    E experts    k adapted experts    n rows that visit those    D model width
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def looped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [N, in] in E segments that end at `ends` [E], weight [E, in, out] -> [N, out]."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    parts = zip(x.split(sizes), weight.unbind(0), strict=True)
    return torch.cat([part @ w for part, w in parts if len(part)] or [x @ weight[0]])


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """What looped_mm computes, in one call. A frozen weight gets no gradient, and x is not saved for one.

    The kernel wants rows of a multiple of 16 bytes; narrower ones (rank 2, say) go through the loop. So do
    trained weights on Blackwell, where an expert without rows gets a gradient all the same (pytorch #172439).
    """
    narrow = any(size * x.element_size() % 16 for size in weight.shape[1:])
    trained = weight.requires_grad and x.is_cuda
    if narrow or (trained and torch.cuda.get_device_capability(x.device)[0] == 10):
        return looped_mm(x, weight, ends)
    return F.grouped_mm(x, weight, offs=ends)


MATMULS = {"grouped": grouped_mm, "loop": looped_mm}  # the choices of --experts


class Rows(NamedTuple):
    """N token copies sorted by the expert they visit, so that each expert owns one contiguous segment.

    Two tokens, K = 2, three experts, choices [[2, 0], [2, 1]]: order [1, 3, 0, 2] for the experts
    0, 1, 2, 2; token [0, 1, 0, 1]; place [[2, 0], [3, 1]]; ends [1, 2, 4].
    """

    order: Tensor  # [N] row n serves slot order[n]; the slots are all (token, choice) pairs, token by token
    token: Tensor  # [N] the token that row n is a copy of
    place: Tensor  # [M, K] the row that serves each (token, choice): the inverse of `order`
    ends: Tensor  # [E] int32, one past the last row of each expert
    matmul: Callable[[Tensor, Tensor, Tensor], Tensor]  # one of MATMULS
    adapted: Tensor | None = (
        None  # [n] rows that visit an adapted expert, ascending. None: all, no need to look
    )
    adapted_ends: Tensor | None = None  # [k] int32, ends of the adapted experts' segments among those rows

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [N, D] -> the same, and those that visit adapted experts [n, D]"""
        return (x, x) if self.adapted is None else Fork.apply(x, self.adapted)

    def join(self, y: Tensor, low: Tensor) -> Tensor:
        """Rows [N, D], with what adapters add to theirs [n, D] added in place: y is new, and only ours."""
        return y.add_(low) if self.adapted is None else Join.apply(y, low, self.adapted)


def sort_by_expert(expert_ids: Tensor, n_experts: int, adapted: Tensor, matmul: Callable) -> Rows:
    """Choices [M, K] and the adapted experts [k], ascending -> Rows."""
    slots = expert_ids.flatten()
    order = slots.argsort(stable=True)
    expert = slots[order]  # [N] ascending
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(expert, torch.arange(n_experts, device=expert.device), right=True).int()
    rows = Rows(order, order // expert_ids.shape[1], place.view_as(expert_ids), ends, matmul)
    if len(adapted) in (0, n_experts):
        return rows._replace(adapted_ends=ends)
    index = torch.isin(expert, adapted).nonzero().squeeze(1)  # the host waits here: how many rows are there?
    adapted_ends = torch.searchsorted(expert[index], adapted, right=True).int()
    return rows._replace(adapted=index, adapted_ends=adapted_ends)


def sum_of_rows(y: Tensor, place: Tensor) -> Tensor:
    """Rows [N, D] -> for each token the sum of those at its `place` [M, K], [M, D]."""
    return F.embedding_bag(place, y, mode="sum")


class Dispatch(torch.autograd.Function):
    """Tokens [M, D] -> their row copies [N, D]; the transpose of Combine.

    Both directions of both are gathers: plain indexing would scatter with atomics in the backward pass.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        """[M, D] -> [N, D]"""
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        """[N, D] -> [M, D]"""
        (place,) = ctx.saved_tensors
        return sum_of_rows(grad, place), None, None


class Combine(torch.autograd.Function):
    """Rows [N, D] -> for each token the sum of its K rows [M, D]; the transpose of Dispatch."""

    @staticmethod
    def forward(ctx: object, y: Tensor, token: Tensor, place: Tensor) -> Tensor:
        """[N, D] -> [M, D]"""
        ctx.save_for_backward(token)
        return sum_of_rows(y, place)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        """[M, D] -> [N, D]"""
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None


class Fork(torch.autograd.Function):
    """Rows [N, D] -> the same, and a copy of those at `index` [n, D]; the transpose of Join.

    Plain indexing would make a whole [N, D] of zeros in the backward pass, for its gradient to be added to.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> [N, D], [n, D]"""
        ctx.save_for_backward(index)
        return x, x.index_select(0, index)

    @staticmethod
    def backward(ctx: object, grad: Tensor, grad_copy: Tensor) -> tuple[Tensor, None]:
        """[N, D], [n, D] -> [N, D]"""
        (index,) = ctx.saved_tensors
        return grad.index_add_(0, index, grad_copy), None  # in place: a matmul has just made it, for us alone


class Join(torch.autograd.Function):
    """Rows [N, D] with `low` [n, D] added, in place, to those at `index`; the transpose of Fork.

    index_add_ alone would do, but it keeps `low` for the backward pass, only to know its shape there.
    """

    @staticmethod
    def forward(ctx: object, y: Tensor, low: Tensor, index: Tensor) -> Tensor:
        """[N, D], [n, D] -> [N, D]"""
        ctx.save_for_backward(index)
        ctx.mark_dirty(y)
        return y.index_add_(0, index, low)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """[N, D] -> [N, D], [n, D]"""
        (index,) = ctx.saved_tensors
        return grad, grad.index_select(0, index), None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up * weight: what experts hold between their matrices, times the router's weights.

    Of the four [N, F] that autograd would keep it keeps two, and makes silu(gate) again.
    """

    @staticmethod
    def forward(ctx: object, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """[N, F], [N, F], [N, 1] -> [N, F]"""
        ctx.save_for_backward(gate, up, weight)
        return F.silu(gate).mul_(up).mul_(weight)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, F] -> [N, F], [N, F], [N, 1]"""
        gate, up, weight = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_weight = (grad_up * up).sum(-1, keepdim=True)
        grad_gate = torch.ops.aten.silu_backward(up.mul(grad).mul_(weight), gate)
        return grad_gate, grad_up.mul_(weight), grad_weight
