"""The arithmetic of docs/scaling.md. That what is sent is what is said: test_ranks.py."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import hellora
from paper import plan
from plumbing import memory, ranks
from plumbing.checkpoint import BACKBONES


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_page_has_the_tables_that_the_command_makes():
    text = plan.PAGE.read_text()
    assert "```text --model" in text
    assert plan.page(text) == text


@pytest.mark.parametrize("method", ["fft", "lora", "hellora", "lori-d"])
def test_what_a_gpu_holds_is_what_the_parameters_take(method):
    """A trained number takes 16 bytes, with gradient and AdamW; a frozen weight 2, a frozen A 4."""
    model = plan.shapes(BACKBONES["olmoe-1b-7b"].cfg, method, 8)
    trained, _ = hellora.count_params(model, hellora.parse_method(method))
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    want = (
        size_of(model.buffers())
        + 16 * trained
        + sum(n * (4 if ".lora." in name else 2) for name, n in frozen.items())
    )
    assert sum(memory.held(model, 1, False).values()) == want


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("mixtral-8x7b", "hellora"),
        ("olmoe-1b-7b", "dora"),
        ("olmoe-1b-7b", "fft"),
        ("qwen3-30b-a3b", "hellora"),
    ],
)
def test_a_gpu_of_16_holds_what_fsdp2_gives_it(model, method):
    """PyTorch's own cut, for the first of 16 ranks: Mixtral has but 8 experts."""
    shapes = plan.shapes(BACKBONES[model].cfg, method, 2)
    want = memory.held(shapes, 16, True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    try:
        ranks.shard(shapes, shapes.layers, None, torch.device("cpu"))
        parts = {p: p.to_local().numel() for p in shapes.parameters()}
    finally:
        dist.destroy_process_group()
    assert want["weights"] == sum(n * p.element_size() for p, n in parts.items()) + size_of(
        shapes.buffers()
    )
    assert want["AdamW"] == sum(8 * n for p, n in parts.items() if p.requires_grad)


def test_more_processes_than_gpus_end_in_one_line(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="want --nproc-per-node 1"):
        ranks.start(torch.device("cuda"))


def test_what_is_put_together_is_two_layers_the_rest_and_gradients():
    model = plan.shapes(BACKBONES["mixtral-8x7b"].cfg, "hellora", 2)
    layer = size_of(model.layers[0].parameters())
    outside = size_of(m.weight for m in (model.embed, model.head, model.norm))
    trained = sum(p.numel() for p in model.layers[0].parameters() if p.requires_grad)
    two = memory.held(model, 2, True)  # which divides all there is
    assert two["put together for a moment"] == 2 * layer + outside + 8 * trained
