"""docs/walkthrough.md: its numbers are what the model gives now, its quotes what files say."""

import re

import pytest
import torch

from paper import walkthrough

NUMBER = r"-?\d+\.\d+"


@pytest.fixture(scope="module")
def scene():
    return walkthrough.scene()


def page():
    return walkthrough.PAGE.read_text(encoding="utf-8")


def test_the_committed_page_is_what_the_command_writes_now():
    was, now = page(), walkthrough.filled(page())
    assert re.sub(NUMBER, "0", was) == re.sub(NUMBER, "0", now)
    for a, b in zip(re.findall(NUMBER, was), re.findall(NUMBER, now), strict=True):
        # Another CPU rounds float32 otherwise: one step of it.
        last_digit = 10.0 ** -len(a.partition(".")[2])
        assert float(a) == pytest.approx(float(b), abs=1.01 * last_digit)


def test_every_block_stands_on_the_page_once():
    assert re.findall(r"^```text (\w+)$", page(), re.M) == list(walkthrough.BLOCKS)


# The page prints four numbers of each vector; here are all of them. 1e-5: float32, sums in another
# order.


def test_eq_3_by_hand_is_what_q_returns(scene):
    q = scene.layer.attn.q
    by_hand = q.weight @ scene.attn_in + walkthrough.update(q.lora, scene.attn_in)[1]
    torch.testing.assert_close(by_hand, q(scene.attn_in[None])[0], atol=1e-5, rtol=0)


def test_experts_by_hand_add_up_to_what_the_layer_returns(scene):
    chosen = walkthrough.choices(scene)
    hot = [expert in scene.hot[walkthrough.LAYER] for expert, *_ in chosen]
    assert any(hot)
    assert not all(hot)
    total = sum(gate * walkthrough.expert_out(scene, expert)[2] for expert, gate, _ in chosen)
    torch.testing.assert_close(total, scene.moe_out, atol=1e-5, rtol=0)
