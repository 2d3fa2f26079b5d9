"""Batched decoding with the KV cache: greedy, or sampled.

Letters: B sequences    T tokens per sequence    V vocabulary
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from moe_model import KVCache, MoEModel
from plumbing import ranks
from plumbing.device import free_bytes

BATCH = 100  # prompts decoded together, if they fit
# Finished rows leave the batch when fewer than this share go on: each time costs a cache copy.
SHRINK = 0.75
TAIL = 16  # tokens in which `ended` looks for the end of a text


class Sampling(NamedTuple):
    """How to draw tokens. A prompt's tokens depend on its own seed, not on its batch."""

    temperature: float
    top_p: float
    seeds: list[int]  # one a prompt


def sample(logits: Tensor, temperature: float, top_p: float, at: Tensor) -> Tensor:
    """Tokens [B] from logits [B, V].

    at [B], in [0, 1): where in the nucleus, the likeliest token first. The nucleus is the smallest
    set of likeliest tokens with a share of at least `top_p` (Holtzman et al. 2020).
    """
    share, ids = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    share *= (
        share.cumsum(-1) - share < top_p
    )  # a token stays if those before it do not have top_p yet
    reach = share.cumsum(-1)
    return ids.gather(-1, torch.searchsorted(reach, at[:, None] * reach[:, -1:], right=True))[:, 0]


def generate(
    model: MoEModel,
    prompts: list[list[int]],
    max_new: int,
    stops: tuple[int, ...],
    batch_size: int | None,
    label: str = "",
    sampling: Sampling | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """For each prompt, in order, the tokens that follow it.

    They end before the first of `stops`, after `max_new` tokens, at the model's context, or where
    `ended` is true of the last TAIL tokens, which are kept. Without `sampling`, each token is the
    likeliest. Prompts of like length share a batch, and several ranks share the prompts. Without a
    batch_size it is BATCH, or on a GPU as many as fit. With a `label` a progress bar shows. Raises
    ValueError for a prompt beyond the context, or without any token.
    """
    for n, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {n} of {len(prompts)} has no tokens: want one at least")
    longest = max(map(len, prompts), default=0)
    if longest >= model.cfg.max_len:
        raise ValueError(
            f"a prompt has {longest} tokens, but the model's context is {model.cfg.max_len}"
        )
    if batch_size is None:
        batch_size = fitting_batch(model, longest, max_new)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine, most = order[ranks.rank() :: ranks.world()], -(-len(order) // ranks.world())
    done: dict[int, list[int]] = {}
    quiet = not label or ranks.rank() > 0
    with tqdm(total=len(mine), desc=label, unit="problem", disable=quiet, leave=False) as bar:
        for start in range(0, most, batch_size):
            chosen = mine[start : start + batch_size]
            own = sampling and sampling._replace(seeds=[sampling.seeds[i] for i in chosen])
            answers = decode_batch(model, [prompts[i] for i in chosen], max_new, stops, own, ended)
            done |= zip(chosen, answers, strict=True)
            bar.update(len(chosen))
    for part in ranks.gathered(done):
        done |= part
    return [done[i] for i in range(len(prompts))]


def fitting_batch(model: MoEModel, longest: int, max_new: int) -> int:
    """How many of the longest prompts to decode together: BATCH, or what a GPU has memory for.

    Counted for each: the cache, and what the first pass holds in one layer. That is K rows of each
    token, with the experts' input, output and three hidden vectors; queries, keys and values in
    float32; and one number per head for each pair of tokens, where heads share keys.
    """
    if model.device.type != "cuda":
        return BATCH
    cfg, size = model.cfg, model.dtype.itemsize
    length = min(longest + max_new, cfg.max_len)
    cache = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * length * size
    rows = cfg.top_k * (3 * cfg.dim + 4 * cfg.expert_dim) * size
    pairs = 8 * cfg.n_heads * longest if cfg.n_kv_heads < cfg.n_heads else 0
    each = cache + longest * (rows + 12 * cfg.dim * 4 + pairs)
    free = free_bytes(model.device)
    n = max(1, min(BATCH, int(0.85 * free / each)))
    n = -ranks.largest(-n, model.device)  # the smallest of all ranks': they take equal steps
    if n < BATCH:
        print(f"{n} prompts are decoded together: {free / 1e9:.1f} GB are free")
    return n


@torch.no_grad()
def decode_batch(
    model: MoEModel,
    prompts: list[list[int]],
    max_new: int,
    stops: tuple[int, ...],
    sampling: Sampling | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """`generate` for prompts that go through the model together, padded on the left to one length.

    A model that is cut up needs all ranks for each layer. So all take as many steps as the one with
    the longest answer, and a rank without prompts takes them with a prompt of padding.
    """
    n, prompts = len(prompts), prompts or [[0]]
    if sampling:
        seeds = sampling.seeds or [0]
        draws = [torch.rand(max_new, generator=torch.Generator().manual_seed(s)) for s in seeds]
        at = torch.stack(draws).double().to(model.device)  # [B, max_new]
    width = max(map(len, prompts))
    room = [min(max_new, model.cfg.max_len - len(p)) if n else 0 for p in prompts]
    length = torch.tensor(room, device=model.device)
    max_new = ranks.largest(max(room), model.device)
    pad = torch.tensor([width - len(p) for p in prompts], device=model.device)
    tokens = torch.tensor(
        [[0] * (width - len(p)) + p for p in prompts], device=model.device
    )  # [B, T]
    cache = KVCache(model.cfg, pad, width + max_new, model.dtype)
    stop_ids = torch.tensor(stops, device=model.device)
    outputs = torch.zeros(len(prompts), max_new, dtype=torch.long, device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # the rows that are still in the batch
    for step in range(max_new):
        logits, _ = model(tokens, cache)  # [B, 1, V]
        if sampling:
            tokens = sample(logits[:, 0], sampling.temperature, sampling.top_p, at[rows, step])[
                :, None
            ]
        else:
            tokens = logits.argmax(-1)  # [B, 1]
        outputs[rows, step] = tokens[:, 0]
        stopped = torch.isin(tokens[:, 0], stop_ids)
        length[rows] = torch.where(stopped, length[rows].clamp(max=step), length[rows])
        if ended:
            tails = outputs[rows, max(0, step + 1 - TAIL) : step + 1].tolist()
            stopped = torch.tensor([ended(tail) for tail in tails], device=model.device)
            length[rows] = torch.where(stopped, length[rows].clamp(max=step + 1), length[rows])
        going_on = length[rows] > step + 1
        n_going_on = int(going_on.sum())  # here a GPU's host waits, once a token
        if ranks.largest(n_going_on, model.device) == 0:
            break
        if 0 < n_going_on < SHRINK * len(rows):
            keep = going_on.nonzero().squeeze(1)
            rows, tokens = rows[keep], tokens[keep]
            cache.keep(keep)
    return [row[:end].tolist() for row, end in zip(outputs[:n], length[:n].tolist(), strict=True)]
