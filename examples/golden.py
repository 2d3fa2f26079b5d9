"""Numbers to check a port against: HELLoRA on the embedded model, without any random draw.

    python examples/golden.py > examples/golden.json

Count, choose, add adapters, one training step, merge: golden.json has what each of them gives (float32, CPU).
A and B are set by a formula in place of a random start: entry [i, r, c] of A (i: which of the layer's adapted
experts, 0 for a plain linear map) is 0.1 sin(1 + i + 2 r + 3 c), and entry [i, r, c] of B is
0.01 cos(1 + i + 2 r + 3 c). Tensors are named and shaped as in adapter.safetensors.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from catcher import count_visits
from checkpoint import locate
from data import TASKS, collate, encode, load_examples
from hellora import adapters, attach, merge, parse_method
from moe_model import MoEModel
from tokenizer import load_tokenizer

COUNTED, TRAINED = 64, 8  # examples of tiny-math's training split, from its first
RANK, ALPHA, K, LR = 8, 16, 8, 0.01


def wave(shape: torch.Size, function: torch.nn.Module) -> torch.Tensor:
    """function(1 + i + 2 r + 3 c) for entry [i, r, c], or [r, c]."""
    i, r, c = torch.meshgrid(*(torch.arange(n) for n in (1, *shape)[-3:]), indexing="ij")
    return function((1 + i + 2 * r + 3 * c).double()).float().view(shape)


def set_waves(model: MoEModel) -> None:
    """Give every adapter of `model` its values by the formula, in place."""
    for m in adapters(model).values():
        m.lora.A.data = 0.1 * wave(m.lora.A.shape, torch.sin)
        m.lora.B.data = 0.01 * wave(m.lora.B.shape, torch.cos)


def golden() -> dict:
    """All numbers."""
    model, tokenizer = MoEModel.from_pretrained("tiny"), load_tokenizer(locate("tiny"))
    model.requires_grad_(False)
    examples = load_examples("tiny-math", TASKS["tiny-math"].train.fetch(), "plain")
    data = encode(examples, tokenizer, model.cfg.max_len)
    batch = collate(data[:TRAINED], "cpu")
    n_targets = int((batch.targets >= 0).sum())

    def loss() -> torch.Tensor:
        return model(batch.tokens, targets=batch.targets)[0] / n_targets

    first = batch.tokens[:1, : len(data[0].ids)]
    logits, routing = model(first)
    found = {
        "prompt": examples[0].prompt + examples[0].answer,
        "tokens": data[0].ids,
        "1 logits of the last token, the first five": logits[0, -1, :5].tolist(),
        "1 experts of the last token": {i: sorted(r.expert_ids[0, -1].tolist()) for i, r in routing.items()},
        "1 loss of the base": loss().item(),
    }
    counts = count_visits(model, data[:COUNTED], 16, "count")
    hot = counts.choose(rule="hot", model="tiny", task="tiny-math", catcher="forward", score="count", k=K,
                        coverage=None, seed=0).experts  # fmt: skip
    found["2 visits of layer 0"] = counts.counts[0].tolist()
    found["2 hot experts"] = hot

    attach(model, parse_method("hellora"), hot, RANK, ALPHA)
    set_waves(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), LR, weight_decay=0.0)
    before = loss()
    before.backward()
    found["3 trained parameters"] = sum(p.numel() for p in trained.values())
    found["3 loss with adapters"] = before.item()
    found["4 norm of each gradient"] = {name: p.grad.norm().item() for name, p in trained.items()}
    optimizer.step()
    found["4 loss after one step of AdamW"] = loss().item()
    merge(model)
    found["5 loss when merged"] = loss().item()
    return found


if __name__ == "__main__":
    print(json.dumps(golden(), indent=1))
