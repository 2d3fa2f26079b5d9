"""How likely the given answers of a task are to a model: eval_gsm8k.py --loss, and studies.

Nothing is decoded. A difference of models shows with far fewer problems than in accuracy, as each
token tells how likely it was, and not only whether it was right.

Letters: B sequences    T tokens per sequence    D width of the model    V vocabulary
"""

import time

import torch
import torch.nn.functional as F

from moe_model import IGNORE, MoEModel
from plumbing.cli import progress
from plumbing.data import Encoded, collate


@torch.no_grad()
def answer_losses(
    model: MoEModel, data: list[Encoded], batch_size: int, label: str = "loss"
) -> list[dict]:
    """A record of each example: how likely its given answer, eos included, is to `model`.

    loss: the sum of the cross-entropies of the answer's tokens, in nats. tokens: how many there
    are. exact: whether each is the model's first choice, so that greedy decoding gives this answer.
    """
    records: list[dict] = [{}] * len(data)
    ordered = sorted(range(len(data)), key=lambda i: len(data[i].ids))  # so there is little padding
    for at in progress(range(0, len(ordered), batch_size), label=label, unit="batch"):
        some = ordered[at : at + batch_size]
        batch = collate([data[i] for i in some], model.device)
        x, _ = model.trunk(batch.tokens)  # [B, T, D]
        wanted = batch.targets != IGNORE  # [B, T]
        logits = model.logits(x[wanted]).float()  # [targets, V]
        targets = batch.targets[wanted]  # [targets]
        losses = F.cross_entropy(logits, targets, reduction="none")
        first = logits.argmax(-1) == targets
        sizes = wanted.sum(1).tolist()  # [B]
        for i, loss, right in zip(some, losses.split(sizes), first.split(sizes), strict=True):
            records[i] = {
                "loss": loss.double().sum().item(),
                "tokens": len(loss),
                "exact": bool(right.all()),
            }
    return records


def measure_loss(model: MoEModel, data: list[Encoded], batch_size: int) -> tuple[dict, list[dict]]:
    """results.json's entry TASK-loss for these examples, and a record of each.

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
