"""The MoE layer with adapters on some experts, against a loop over tokens; what a step keeps."""

import pytest
import torch
import torch.nn.functional as F
from conftest import HUB, write_checkpoint

from hellora import attach, init_adapters, parse_method
from moe_model import MoEModel
from paper.bench.worlds import SHAPES, ours, random_world
from plumbing.data import collate

ADAPTED = {
    "none": [],
    "some": [1, 4, 5],
    "all": list(range(8)),
    "without rows": [2, 7],
    "one of two": [0, 2],
}
AWAY = (2, 7)  # the router is kept from these, so that they have no row


def layer_with(folder, adapted, experts):
    """A model's first MoE layer, whose experts `adapted` have updates that do something."""
    model, method = MoEModel.from_pretrained(folder, matmul=experts), parse_method("hellora_pure")
    attach(model, method, {0: adapted}, 4, 8)
    init_adapters(model, 0)
    draw, moe = torch.Generator().manual_seed(0), model.layers[0].moe
    with torch.no_grad():
        for name, p in moe.named_parameters():
            if name.endswith(".lora.B"):
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
        for e in AWAY:  # with the hidden state's first channel at 4, as `hidden` has it
            moe.router.weight[e, 0] = -10.0
    return moe, model.cfg.top_k


def hidden():
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 4.0
    return x.requires_grad_()


def by_loop(moe, top_k, adapted, x):
    """Token by token, expert by expert, with W + scale B A written out."""
    of = dict(moe.named_parameters())

    def matrix(leaf, e):
        w = of[f"experts.{leaf}.weight"][e]
        if e not in adapted:
            return w
        a, b = (of[f"experts.{leaf}.lora.{part}"][adapted.index(e)] for part in "AB")
        return w + 2.0 * b @ a

    visited, out = set(), []
    for token in x.flatten(0, 1):
        weights, chosen = (of["router.weight"] @ token).softmax(-1).topk(top_k)
        total = torch.zeros_like(token)
        for weight, e in zip(weights, chosen.tolist(), strict=True):
            gate, up, down = (matrix(leaf, e) for leaf in ("gate", "up", "down"))
            total = total + weight * (down @ (F.silu(gate @ token) * (up @ token)))
            visited.add(e)
        out.append(total)
    return torch.stack(out).view_as(x), visited


@pytest.mark.parametrize("experts", ["grouped", "loop"])
@pytest.mark.parametrize("which", ADAPTED)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens_and_experts(olmoe, which, experts):
    adapted, x = ADAPTED[which], hidden()
    moe, top_k = layer_with(olmoe, adapted, experts)
    want, visited = by_loop(moe, top_k, adapted, x)
    assert not visited & set(AWAY)  # experts without rows, and among them adapted ones
    assert bool(visited & set(adapted)) == (which not in ("none", "without rows"))
    got, _ = moe(x)
    assert (got - want).norm() <= 2e-6 * want.norm()  # fp32: other order of products and sums
    params = {n: p for n, p in moe.named_parameters() if p.requires_grad}
    assert len(params) == (6 if adapted else 0)
    sought = {"x": x, **params}
    ours_, theirs = (
        torch.autograd.grad(y.square().sum(), list(sought.values()), allow_unused=True)
        for y in (got, want)
    )
    for name, g, w in zip(sought, ours_, theirs, strict=True):
        # an expert without rows has a gradient of zero, so that AdamW sees it
        assert g is not None, name
        w = torch.zeros_like(g) if w is None else w
        assert (g - w).norm() <= 1e-5 * w.norm() + 1e-6, name  # fp32: other order of sums


@pytest.mark.parametrize("experts", ["grouped", "loop"])
def test_full_fine_tuning_of_the_layer_has_the_gradients_of_the_loop(olmoe, experts):
    x = hidden()
    moe, top_k = layer_with(olmoe, [], experts)
    moe.requires_grad_(True)
    got, (want, _) = moe(x)[0], by_loop(moe, top_k, [], x)
    names = [n for n, _ in moe.named_parameters()]
    grads = [torch.autograd.grad(y.square().sum(), list(moe.parameters())) for y in (got, want)]
    for name, g, w in zip(names, *grads, strict=True):
        assert (g - w).norm() <= 1e-5 * w.norm() + 1e-6, name  # fp32: other order of sums
        if name.startswith("experts."):
            assert all((g[e] == 0).all() for e in AWAY), name


def test_a_layer_whose_tokens_visit_every_expert_is_the_loop_too(tmp_path):
    """3 of 8 experts are adapted, and K = 8."""
    folder = write_checkpoint(tmp_path / "wide", HUB["olmoe"] | {"num_experts_per_tok": 8})
    x, adapted = hidden(), [0, 3, 6]
    moe, top_k = layer_with(folder, adapted, "grouped")
    want, visited = by_loop(moe, top_k, adapted, x)
    assert len(visited) == 8
    assert (moe(x)[0] - want).norm() <= 2e-6 * want.norm()  # fp32: other order of products and sums


@pytest.mark.parametrize(
    ("name", "most"), [("none", 0.65e6), ("hellora", 1.07e6), ("lora", 1.35e6)]
)
def test_a_step_keeps_few_bytes_for_its_backward_pass(name, most):
    """A budget, of all that autograd saves besides weights, at paper.bench's tiny shape.

    With hand-written backward passes it was .46, .79 and .99 MB; 1.35 times that leaves room for a
    simple form, which keeps two more [N, F] in each layer: .13 MB here.
    """
    shape, kept, alive = SHAPES["tiny"], {}, []
    world = random_world(shape, 0.5, shape.tokens, shape.length, torch.float32, torch.device("cpu"))
    model, batch = ours(world, name), collate(world.batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            alive.append(t)  # else its place may be another's
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = model(batch.tokens, targets=batch.targets)
    assert loss.isfinite()
    assert sum(kept.values()) <= most
