"""The arithmetic of docs/scaling.md. That what is sent is what is said: test_ranks.py."""

import pytest

import hellora
from checkpoint import BACKBONES
from paper import plan


def test_the_page_has_the_tables_that_the_command_makes():
    text = plan.PAGE.read_text()
    assert text.count("```text --model") == 8
    assert plan.page(text) == text


@pytest.mark.parametrize("method", ["fft", "lora", "hellora", "lori-d"])
def test_what_a_gpu_holds_is_what_the_parameters_take(method):
    """Each trained number takes 16 bytes, with gradient and AdamW; a frozen weight 2, a frozen A 4."""
    model = plan.shapes(BACKBONES["olmoe-1b-7b"].cfg, method, 8)
    trained, _ = hellora.count_params(model, hellora.parse_method(method))
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    want = 16 * trained + sum(n * (4 if ".lora." in name else 2) for name, n in frozen.items())
    got = plan.held(model, 1, False, tokens=1)
    assert sum(got.values()) - got["inputs of the layers"] == want


def test_each_of_many_gpus_holds_its_part_and_what_is_put_together():
    model = plan.shapes(BACKBONES["mixtral-8x7b"].cfg, "hellora", 2)
    one, eight = plan.held(model, 1, False, 4096), plan.held(model, 8, True, 4096)
    for what in ("weights", "gradients", "AdamW"):
        assert eight[what] == one[what] // 8
    layer = sum(p.numel() * p.element_size() for p in model.layers[0].parameters())
    outside = sum(m.weight.numel() * 2 for m in (model.embed, model.head, model.norm))
    assert eight["two layers and the rest, put together"] == 2 * layer + outside
