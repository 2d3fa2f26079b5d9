"""Batched greedy decoding with the KV cache.

Letters: B sequences    T tokens per sequence    V vocabulary
"""

import torch
from tqdm import tqdm

from moe_model import KVCache, MoEModel

SHRINK = 0.75  # finished rows leave the batch when fewer than this share go on: each time costs a cache copy


def generate(
    model: MoEModel,
    prompts: list[list[int]],
    max_new: int,
    stops: tuple[int, ...],
    batch_size: int,
    label: str = "",
) -> list[list[int]]:
    """For each prompt, in order, the tokens that follow it: up to `max_new`, or to the first of `stops`.

    The stop itself is left out, and generation also ends at the model's context. Prompts of like length share
    a batch; with a `label`, a progress bar shows. Raises ValueError for a prompt beyond the context.
    """
    longest = max(map(len, prompts), default=0)
    if longest >= model.cfg.max_len:
        raise ValueError(f"a prompt has {longest} tokens, but the model's context is {model.cfg.max_len}")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    done: dict[int, list[int]] = {}
    with tqdm(total=len(prompts), desc=label, unit="problem", disable=not label, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            done |= zip(
                chosen, decode_batch(model, [prompts[i] for i in chosen], max_new, stops), strict=True
            )
            bar.update(len(chosen))
    return [done[i] for i in range(len(prompts))]


@torch.no_grad()
def decode_batch(
    model: MoEModel, prompts: list[list[int]], max_new: int, stops: tuple[int, ...]
) -> list[list[int]]:
    """`generate` for prompts that go through the model together, padded on the left to one length."""
    width = max(map(len, prompts))
    length = torch.tensor([min(max_new, model.cfg.max_len - len(p)) for p in prompts], device=model.device)
    max_new = int(length.max())
    pad = torch.tensor([width - len(p) for p in prompts], device=model.device)
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)  # [B, T]
    cache = KVCache(model.cfg, pad, width + max_new, model.dtype)
    stop_ids = torch.tensor(stops, device=model.device)
    outputs = torch.zeros(len(prompts), max_new, dtype=torch.long, device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # the rows that are still in the batch
    for step in range(max_new):
        logits, _ = model(tokens, cache)  # [B, 1, V]
        tokens = logits.argmax(-1)  # [B, 1]
        outputs[rows, step] = tokens[:, 0]
        stopped = torch.isin(tokens[:, 0], stop_ids)
        length[rows[stopped]] = length[rows[stopped]].clamp(max=step)
        going_on = length[rows] > step + 1
        n_going_on = int(going_on.sum())
        if n_going_on == 0:
            break
        if n_going_on < SHRINK * len(rows):
            keep = going_on.nonzero().squeeze(1)
            rows, tokens = rows[keep], tokens[keep]
            cache.keep(keep)
    return [row[:n].tolist() for row, n in zip(outputs, length.tolist(), strict=True)]
