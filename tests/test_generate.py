"""Batched, cached, shrinking batches against the slowest way to decode."""

import pytest
import torch

from generate import generate
from moe_model import MoEModel


def slow_greedy(model, prompt, max_new, stops):
    """One prompt, one full forward per token."""
    ids = list(prompt)
    for _ in range(max_new):
        with torch.no_grad():
            token = model(torch.tensor([ids]))[0][0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_batched_cached_decoding_equals_one_by_one_without_cache(checkpoint, batch_size):
    model = MoEModel.from_pretrained(checkpoint)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 96, (n,), generator=draw).tolist() for n in (4, 9, 1, 6, 2, 9, 5)]
    # many, so that rows end at different times and the batch shrinks
    stops = tuple(range(0, 96, 7))
    want = [slow_greedy(model, p, 12, stops) for p in prompts]
    assert len({len(w) for w in want}) > 2
    assert generate(model, prompts, 12, stops, batch_size) == want


def test_generation_ends_at_the_context_and_refuses_a_prompt_beyond_it(olmoe):
    model = MoEModel.from_pretrained(olmoe)  # context 64
    for prompts in ([[1] * 4], [[1] * 60], [[1] * 4, [1] * 60]):  # whoever shares the batch
        want = [min(50, 64 - len(p)) for p in prompts]
        assert [len(a) for a in generate(model, prompts, 50, (), 2)] == want
    with pytest.raises(ValueError, match="context is 64"):
        generate(model, [[1] * 64], 1, (), 1)
    assert generate(model, [], 5, (), 1) == []


@pytest.mark.parametrize("prompts", [[[]], [[], [5, 6, 7]], [[5], [6], []]])
def test_a_prompt_without_tokens_is_refused_whoever_shares_the_batch(olmoe, prompts):
    at = prompts.index([]) + 1
    with pytest.raises(ValueError, match=f"prompt {at} of {len(prompts)}"):
        generate(MoEModel.from_pretrained(olmoe), prompts, 3, (), 2)
