"""The loss of a model on the given answers of a task, for eval_gsm8k.py --loss and studies.

Nothing is generated. This needs far fewer problems than accuracy to show a difference between
models, because each token counts with its probability, and not only as right or wrong.

Letters: B sequences    T tokens per sequence    D width of the model    V vocabulary
"""

import time

import torch
import torch.nn.functional as F

from moe_model import IGNORE, LOSS_CHUNK, MoEModel
from plumbing.cli import progress
from plumbing.data import Encoded, collate


@torch.no_grad()
def answer_losses(
    model: MoEModel, data: list[Encoded], batch_size: int, label: str = "loss"
) -> list[dict]:
    """A record for each example: the loss of `model` on the given answer, eos included.

    loss: the sum of the cross-entropies of the answer's tokens, in nats. tokens: their number.
    exact: whether each token is the model's first choice, so greedy decoding gives this answer.
    """
    records: list[dict] = [{}] * len(data)
    ordered = sorted(range(len(data)), key=lambda i: len(data[i].ids))  # little padding
    for at in progress(range(0, len(ordered), batch_size), label=label, unit="batch"):
        some = ordered[at : at + batch_size]
        batch = collate([data[i] for i in some], model.device)
        x, _ = model.trunk(batch.tokens)  # [B, T, D]
        wanted = batch.targets != IGNORE  # [B, T]
        # Some positions at a time, as in training: all logits at once would be the largest tensor.
        hidden, targets = x[wanted].split(LOSS_CHUNK), batch.targets[wanted].split(LOSS_CHUNK)
        losses, first = [], []
        for some_hidden, some_targets in zip(hidden, targets, strict=True):
            logits = model.logits(some_hidden).float()  # [LOSS_CHUNK or fewer, V]
            losses.append(F.cross_entropy(logits, some_targets, reduction="none"))
            first.append(logits.argmax(-1) == some_targets)
        losses, first = torch.cat(losses), torch.cat(first)  # [targets] each
        sizes = wanted.sum(1).tolist()  # [B]
        for i, loss, right in zip(some, losses.split(sizes), first.split(sizes), strict=True):
            records[i] = {
                "loss": loss.double().sum().item(),
                "tokens": len(loss),
                "exact": bool(right.all()),
            }
    return records


def measure_loss(model: MoEModel, data: list[Encoded], batch_size: int) -> tuple[dict, list[dict]]:
    """The entry TASK-loss of results.json for these examples, and a record for each example.

    loss: nats per answer token, over the tokens of all answers. exact: a share of the problems.
    """
    began = time.perf_counter()
    records = answer_losses(model, data, batch_size)
    tokens = sum(r["tokens"] for r in records)
    return {
        "loss": sum(r["loss"] for r in records) / tokens,
        "exact": sum(r["exact"] for r in records) / len(records),
        "tokens": tokens,
        "total": len(records),
        "seconds": round(time.perf_counter() - began, 2),
    }, records
