"""Numbers to check a port against: HELLoRA on the embedded model, without tokenizer or randomness.

    python examples/golden.py > examples/golden.json

The steps are: count, choose, add adapters, train one step, merge. golden.json has the result of
each step (float32, CPU), the inputs as token ids, and all settings. A and B start from a formula
(ABOUT), and not from a random A and B = 0. Tensors have the names and shapes of
adapter.safetensors.
"""

import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from catcher import choose, count_visits
from hellora import adapters, attach, merge, parse_method
from moe_model import MoEModel
from plumbing.checkpoint import locate
from plumbing.data import TASKS, collate, encode, load_examples
from plumbing.tokenizer import load_tokenizer

COUNTED, TRAINED = 64, 8  # numbers of examples, the first of tiny-math's training split
RANK, ALPHA, K, LR = 8, 16, 8, 0.01
ABOUT = {
    "model": "tiny/: config.json and model.safetensors, with bfloat16 read as float32",
    "examples": "token ids, and the index at which the answer begins. Inputs are ids[:-1], targets "
    "are ids[answer:]. The last id, an end of text, is never an input. Visits "
    f"count all {COUNTED} examples, losses the first {TRAINED}",
    "loss": f"the summed cross-entropy of the targets of the first {TRAINED} examples, divided by "
    "the number of targets",
    "A[i, row, column]": "0.1 sin(1 + i + 2 row + 3 column), with indices from 0. The angle is "
    "computed in float64, and the value is kept as float32",
    "B[i, row, column]": "0.01 cos(1 + i + 2 row + 3 column)",
    "i": "the index of an expert among its layer's hot experts, or 0 for a linear map outside "
    "experts",
    "settings": {"rank": RANK, "alpha": ALPHA, "k": K},
    "AdamW": {"lr": LR, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0, "clipping": "none"},
    "tolerance": "float32: losses and logits 1e-5, norms of gradients 1e-3 of their value, ids and "
    "visits exact. In layer 2 the 8th expert has only one visit more than the 9th. In bfloat16, "
    "choices of a router tie, and libraries differ in which expert wins",
}


def wave(shape: torch.Size, function: torch.nn.Module) -> torch.Tensor:
    """function(1 + i + 2 row + 3 column) for the entry [i, row, column], or [row, column]."""
    i, row, column = torch.meshgrid(*(torch.arange(n) for n in (1, *shape)[-3:]), indexing="ij")
    return function((1 + i + 2 * row + 3 * column).double()).float().view(shape)


def set_waves(model: MoEModel) -> None:
    """Give each adapter of `model` its values by the formula, in place."""
    for m in adapters(model).values():
        m.lora.A.data = 0.1 * wave(m.lora.A.shape, torch.sin)
        m.lora.B.data = 0.01 * wave(m.lora.B.shape, torch.cos)


def golden() -> dict:
    """All numbers of golden.json."""
    model, tokenizer = MoEModel.from_pretrained("tiny"), load_tokenizer(locate("tiny"))
    model.requires_grad_(False)
    examples = load_examples("tiny-math", TASKS["tiny-math"].train.fetch(), "plain")[:COUNTED]
    data = encode(examples, tokenizer, model.cfg.max_len)
    batch = collate(data[:TRAINED])
    n_targets = int((batch.targets >= 0).sum())

    def loss() -> torch.Tensor:
        return model(batch.tokens, targets=batch.targets)[0] / n_targets

    logits, routing = model(torch.tensor([data[0].ids[:-1]]))
    found = {
        "about": ABOUT,
        "text of the first example": examples[0].prompt + examples[0].answer,
        "examples": [{"ids": e.ids, "answer": e.n_prompt} for e in data],
        "1 logits after the first example's inputs, of ids 0 to 4": logits[0, -1, :5].tolist(),
        "1 experts of its last input": {
            i: sorted(r.expert_ids[0, -1].tolist()) for i, r in routing.items()
        },
        "1 loss of the base": loss().item(),
    }
    counts = count_visits(model, data, 16, "count")
    hot = choose(counts.counts, K, "hot")
    found["2 visits of each layer's experts"] = {
        i: visits.tolist() for i, visits in counts.counts.items()
    }
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
    for p in model.parameters():
        p.data = p.bfloat16().float()
    found["5 loss when merged and rounded to bfloat16"] = loss().item()
    return found


if __name__ == "__main__":
    text = json.dumps(golden(), indent=1)
    print(re.sub(r"\s+(?=[^][{}]*])", " ", text))  # puts a list of numbers on one line
