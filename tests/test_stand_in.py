"""What runs on a GPU, on a device that refuses to be mixed and counts waits (stand_in.py)."""

import math
from importlib import import_module

import pytest
import stand_in
import torch
from conftest import HUB, some_slow, write_checkpoint
from stand_in import DEVICE, OnDevice, StandIn

from catcher import Catcher, choose, count_visits
from generate import Sampling, generate
from hellora import METHODS, attach, init_adapters, merge, parse_method
from moe_model import MoEModel
from plumbing.answer_loss import answer_losses
from plumbing.data import Encoded
from train import make_optimizer, train_step

CPU = torch.device("cpu")
RANK = 4  # rows of 16 bytes in fp32
# 5 examples in micro-batches of 2: one ends with a single example
EXAMPLES = [Encoded(list(range(n, 3 * n)), n // 2) for n in (4, 5, 7, 9, 11)]
MICRO_BATCHES = 3
PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7, 8], [1]]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A card with a kernel for F.grouped_mm."""
    monkeypatch.setattr("stand_in.has_kernel", True)
    monkeypatch.setattr(torch, "lazy", torch.cpu, raising=False)  # checkpoint asks for it
    optimizer = import_module("torch.optim.optimizer")  # CUDA has a fused AdamW
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", "lazy"])
    with StandIn():
        yield


@pytest.fixture
def ampere(monkeypatch):
    """A card without. As one_call asks CUDA, it is told here."""
    monkeypatch.setattr("stand_in.has_kernel", False)
    monkeypatch.setattr("moe_model.one_call", lambda x, weight: False)


def built(folder, name, device, matmul="grouped", recompute=False, dtype=torch.float32):
    """A model, every other expert of each layer hot, with `name`'s adapters and B that is not 0."""
    model, method = MoEModel.from_pretrained(folder, dtype, device, matmul), parse_method(name)
    model.recompute = recompute
    n_experts, layers = model.cfg.n_experts, model.cfg.moe_layers
    few, every = list(range(0, n_experts, 2)), list(range(n_experts))
    attach(model, method, dict.fromkeys(layers, few if method.chooses else every), RANK, 8)
    init_adapters(model, 0)
    with torch.no_grad():
        for at, (part, p) in enumerate(model.named_parameters()):
            if part.endswith(".lora.B"):
                draw = torch.Generator().manual_seed(at)
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return model


def watched(layer, in_layer, at):
    """Have the layer's forward add its waits to in_layer[at]. Recomputing may end it early."""
    forward = layer.forward

    def run(*args):
        before = stand_in.waits.total()
        try:
            return forward(*args)
        finally:
            in_layer[at] += stand_in.waits.total() - before

    layer.forward = run


def stepped(model):
    """Two steps' numbers; and of the second, the waits in each layer and in all."""
    optimizer, catcher = make_optimizer(model, 0.01), Catcher(model.cfg.n_experts)
    in_layer, numbers, total = dict.fromkeys(range(len(model.layers)), 0), [], 0
    for step in range(2):
        if step == 1:  # the first makes what is made once, as ids on the device
            for at, layer in enumerate(model.layers):
                watched(layer, in_layer, at)
        before = stand_in.waits.total()
        numbers += train_step(model, optimizer, EXAMPLES, 2, 0.0, catcher)
        total = stand_in.waits.total() - before
    return numbers, in_layer, total, catcher


def a_layer(name, kernel):
    """How often the host may wait in one pass through a layer with experts."""
    return 1 if parse_method(name).chooses or not kernel else 0


def check(folder, name, matmul, recompute, kernel):
    model = built(folder, name, DEVICE, matmul, recompute)
    numbers, in_layer, total, catcher = stepped(model)
    assert all(isinstance(p, OnDevice) for p in model.parameters())
    want, _, _, seen = stepped(built(folder, name, CPU, matmul, recompute))
    # fp32; attention is another function of PyTorch's here
    assert numbers == pytest.approx(want, rel=1e-4)
    for layer, counts in seen.counts.items():
        assert catcher.counts[layer].tolist() == counts.tolist()

    passes = MICRO_BATCHES * (2 if recompute else 1)  # of each layer in a step
    once = a_layer(name, kernel and matmul == "grouped")
    for layer, waited in in_layer.items():
        assert waited == (passes * once if layer in model.cfg.moe_layers else 0), (name, layer)
    # A micro-batch is three copies to the device, and the number of its targets; a step the loss.
    outside = total - sum(in_layer.values())
    assert outside == 4 * MICRO_BATCHES + 1, (name, stand_in.waits)


@pytest.mark.parametrize("family", some_slow(HUB, ["olmoe", "deepseek"]))
@pytest.mark.parametrize(
    ("matmul", "recompute"),
    [("grouped", False), pytest.param("loop", True, marks=pytest.mark.slow)],
)
def test_a_step_mixes_nothing_and_waits_as_often_as_we_say(tmp_path, family, matmul, recompute):
    folder = write_checkpoint(tmp_path / family, HUB[family])
    for name in ("lora", "hellora"):
        check(folder, name, matmul, recompute, kernel=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", some_slow(HUB, ["olmoe", "deepseek"]))
@pytest.mark.parametrize("matmul", ["grouped", "loop"])
@pytest.mark.parametrize("recompute", [False, True])
def test_so_does_a_step_of_every_method(tmp_path, family, matmul, recompute):
    folder = write_checkpoint(tmp_path / family, HUB[family])
    for name in METHODS:
        check(folder, name, matmul, recompute, kernel=True)


@pytest.mark.parametrize("name", ["lora", "hellora"])
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_card_without_the_kernel_waits_once_a_layer(olmoe, ampere, name, recompute):
    """F.grouped_mm would wait in each of its 24 calls there."""
    check(olmoe, name, "grouped", recompute, kernel=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_at_all_for_the_adapted_experts_is_no_obstacle(olmoe, dtype):
    """One token, and in each layer two experts adapted that it does not visit."""
    one = [Encoded([5, 6], 1)]
    model = MoEModel.from_pretrained(olmoe, dtype, DEVICE)
    visits = count_visits(model, one, 1, "count").scores("count")
    attach(model, parse_method("hellora"), choose(visits, 2, "cold"), 8, 8)
    init_adapters(model, 0)
    routing = model(torch.tensor([[5]], device=DEVICE))[1]
    for layer, decided in routing.items():
        adapted = model.layers[layer].moe.experts.adapted
        assert not set(adapted) & set(decided.expert_ids.flatten().tolist())
    optimizer = make_optimizer(model, 0.01)
    numbers = train_step(model, optimizer, one, 1, 0.0, Catcher(8))
    assert all(map(math.isfinite, numbers))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(optimizer.state) == len(trained)  # each had a gradient: AdamW passes over None


def decoded(model, sampling=None, ended=None):
    """Answers of 4 tokens that nothing ends, and the waits of the last token."""
    found, cost = [], []
    for n in (1, 3, 4):  # the first makes what is made once, as ids on the device
        before = stand_in.waits.total()
        found = generate(model, PROMPTS, n, (), 4, sampling=sampling, ended=ended)
        cost.append(stand_in.waits.total() - before)
    return found, cost[2] - cost[1]


@pytest.mark.parametrize("family", some_slow(HUB, ["olmoe"]))
@pytest.mark.parametrize("matmul", ["grouped", pytest.param("loop", marks=pytest.mark.slow)])
def test_decoding_scoring_and_merging_wait_once_a_token(tmp_path, family, matmul):
    folder = write_checkpoint(tmp_path / family, HUB[family])
    n_moe = len(MoEModel.from_pretrained(folder).cfg.moe_layers)
    sampling = Sampling(0.8, 0.9, list(range(len(PROMPTS))))
    for name in ("hellora", "dora"):
        model, reference = (built(folder, name, at, matmul) for at in (DEVICE, CPU))
        live, waited = decoded(model)
        assert live == decoded(reference)[0]
        assert waited == 1 + n_moe * a_layer(name, matmul == "grouped")
        for one in (model, reference):
            merge(one)
        merged, waited = decoded(model, sampling)
        assert merged == decoded(reference, sampling)[0]
        assert waited == 1 + n_moe * (matmul == "loop")
        # what looks at each token's text, as of code, has one wait more, and a copy back
        _, waited = decoded(model, ended=lambda tail: False)
        assert waited == 3 + n_moe * (matmul == "loop")
    # a batch that shrinks: the same answers
    stops = tuple(range(0, 96, 5))
    got, want = (generate(one, PROMPTS, 12, stops, 4) for one in (model, reference))
    assert got == want
    assert len({len(answer) for answer in got}) > 1


@pytest.mark.parametrize("family", some_slow(HUB, ["olmoe", "deepseek"]))
def test_the_catcher_and_losses_are_those_of_the_cpu(tmp_path, family):
    folder = write_checkpoint(tmp_path / family, HUB[family])
    model, reference = (MoEModel.from_pretrained(folder, device=at) for at in (DEVICE, CPU))
    counts = [count_visits(one, EXAMPLES, 2, "count").scores("count") for one in (model, reference)]
    assert {i: c.tolist() for i, c in counts[0].items()} == {
        i: c.tolist() for i, c in counts[1].items()
    }
    got, want = (answer_losses(one, EXAMPLES, 2) for one in (model, reference))
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in want], rel=1e-4)  # fp32


def test_the_stand_in_refuses_to_mix_and_counts():
    """Otherwise the tests above would show nothing."""
    x, y = torch.ones(3), torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="mixes"):
        x + y
    with pytest.raises(RuntimeError, match="mixes"):
        torch.cat([y, x])
    for wait in (
        lambda: y.sum().item(),
        lambda: y.tolist(),
        lambda: y.nonzero(),
        lambda: y[y > 0],
        lambda: y.cpu(),
        lambda: x.to(DEVICE),
        lambda: y[[0, 2]],  # the list is a tensor on the CPU
        lambda: torch.bincount(y.long()),
    ):
        before = stand_in.waits.total()
        wait()
        assert stand_in.waits.total() == before + 1
    before = stand_in.waits.total()
    (y[:2].sum() * 2).clamp(max=torch.tensor(1.0))
    assert stand_in.waits.total() == before
