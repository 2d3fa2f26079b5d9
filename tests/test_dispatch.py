"""The hand-written backward passes, against finite differences in float64, and what they keep."""

import pytest
import torch

from data import collate
from dispatch import Combine, Dispatch, Fork, Join, SwiGLU, sort_by_expert
from paper.bench_worlds import SHAPES, ours, random_world

CHOICES = torch.tensor([[2, 0], [2, 1]])  # the example of Rows, with expert 2 adapted
ROWS = sort_by_expert(CHOICES, 3, torch.tensor([2]), matmul=None)


def random(*shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return values.requires_grad_()


@pytest.mark.parametrize(
    "function, inputs",
    [
        (lambda x: Dispatch.apply(x, ROWS.token, ROWS.place), [random(2, 3)]),
        (lambda y: Combine.apply(y, ROWS.token, ROWS.place), [random(4, 3)]),
        (lambda x: Fork.apply(x * 1, ROWS.adapted), [random(4, 3)]),
        # Join changes y in place, and a leaf may not be: so a copy
        (lambda y, low: Join.apply(y * 1, low, ROWS.adapted), [random(4, 3), random(2, 3)]),
        (SwiGLU.apply, [random(4, 3), random(4, 3), random(4, 1)]),
    ],
)
def test_gradients_are_those_of_finite_differences(function, inputs):
    assert torch.autograd.gradcheck(function, inputs)


def test_rows_are_sorted_as_their_example_says():
    assert ROWS.order.tolist() == [1, 3, 0, 2]
    assert ROWS.token.tolist() == [0, 1, 0, 1]
    assert ROWS.place.tolist() == [[2, 0], [3, 1]]
    assert ROWS.ends.tolist() == [1, 2, 4]
    assert (ROWS.adapted.tolist(), ROWS.adapted_ends.tolist()) == ([2, 3], [2])


def test_of_the_rows_a_step_keeps_gate_and_up_alone():
    """N-row tensors are a step's largest: of the experts' 3 matrices and 9 factors only these two keep any.

    Besides them adapters keep their inputs and what A makes of them, for rows that visit hot experts.
    """
    shape, kept = SHAPES["tiny"], {}
    world = random_world(shape, 0.5, shape.tokens, shape.length, torch.float32, torch.device("cpu"))
    model, batch = ours(world, "hellora"), collate(world.batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = model(batch.tokens, targets=batch.targets)
    n, wide = shape.tokens * world.cfg.top_k, [t for t in kept.values() if t.dim() == 2 and t.shape[1] > 1]
    of_rows = [tuple(t.shape) for t in wide if len(t) == n]
    assert of_rows == [(n, world.cfg.expert_dim)] * 2 * world.cfg.n_layers
    assert loss.isfinite()
