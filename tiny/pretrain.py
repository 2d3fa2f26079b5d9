"""Make the embedded model from a seed: tokenizer, pretraining, and files in the Hub's format.

    python -m tiny.pretrain        about 20 minutes on one CPU core; replaces the files in tiny/
    python -m tiny.pretrain --steps 100 --out /tmp/tiny-trial     a short trial
    python -m tiny.pretrain --seed 1 --out /tmp/tiny-1            a model from another seed

The letters for sizes are those of moe_model.py.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m tiny.pretrain, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from moe_model import MoEModel, load_balancing_loss
from plumbing.checkpoint import hub_names, parse_config
from plumbing.cli import COUNT, Parser, command, progress
from tiny import bpe
from tiny.corpus import MIX, Document, fact
from tiny.tasks import code_problem, math_problem, safety_problem, split_of

VOCAB_SIZE = 1024
END_OF_TEXT = VOCAB_SIZE - 1

# A small OLMoE-1B-7B: 64 experts, 8 per token, and routing weights that are not rescaled.
CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "router_aux_loss_coef": 0.01,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": END_OF_TEXT,
    "pad_token_id": END_OF_TEXT,
    "torch_dtype": "bfloat16",
}

SEQUENCES, LENGTH = 16, 128  # of a batch; on a CPU larger batches are not faster per token
# The highest rate, the steps of warm-up, and the share of steps before the linear decay.
PEAK_LR, WARMUP, CONSTANT = 3e-3, 150, 0.4
FINAL_LR = 0.01  # as a share of PEAK_LR
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
BALANCE = CONFIG["router_aux_loss_coef"]
TOKENIZER_CHARACTERS = 600_000


# ---- tokenizer -----------------------------------------------------------------------------------


def tokenizer_text(rng: Random) -> str:
    """Text of each domain by its share of the mix, and some questions of the tasks."""
    parts = []
    for domain in MIX.values():
        for document, share in domain.items():
            part = ""
            while len(part) < TOKENIZER_CHARACTERS * share:
                part += document(rng)
            parts.append(part)
    for make, field in (
        (math_problem, "question"),
        (code_problem, "instruction"),
        (safety_problem, "instruction"),
    ):
        drawn = (make(rng) for _ in range(400))
        parts += [row[field] for problem, row in drawn if split_of(problem) == "pretrain"]
    return "\n".join(parts)


# ---- data ----------------------------------------------------------------------------------------


class Stream:
    """Endless tokens of one domain. An end of text follows each document."""

    def __init__(self, rng: Random, encoder: bpe.Encoder, shares: dict[Document, float]):
        self.rng, self.encoder, self.shares = rng, encoder, shares
        self.used = dict.fromkeys(shares, 0)  # tokens of each kind of document so far
        self.rest: list[int] = []

    def cut(self, n: int) -> list[int]:
        """The next `n` tokens. Attention will cross the borders of the documents in them."""
        while len(self.rest) < n:
            document = furthest_behind(self.rng, self.used, self.shares)
            tokens = [*self.encoder.encode(document(self.rng)), END_OF_TEXT]
            self.used[document] += len(tokens)
            self.rest += tokens
        taken, self.rest = self.rest[:n], self.rest[n:]
        return taken


def furthest_behind(rng: Random, used: dict[Any, int], shares: dict[Any, float]) -> Any:  # noqa: ANN401
    """The next part of a mix: the one furthest below its share. Chance breaks up the order."""
    return min(shares, key=lambda part: (used[part] + 64 * rng.random()) / shares[part])


def batches(rng: Random, encoder: bpe.Encoder) -> Iterator[Tensor]:
    """Endless batches [SEQUENCES, LENGTH + 1]. Each sequence has text of one domain.

    If a sequence had several domains, these would share more experts. Attention would then say less
    to the router about the domain of a token.
    """
    streams = {name: Stream(rng, encoder, shares) for name, shares in MIX.items()}
    shares, used = {name: sum(parts.values()) for name, parts in MIX.items()}, dict.fromkeys(MIX, 0)
    while True:
        rows = []
        for _ in range(SEQUENCES):
            domain = furthest_behind(rng, used, shares)
            used[domain] += LENGTH
            rows.append(streams[domain].cut(LENGTH + 1))
        yield torch.tensor(rows)


# ---- model ---------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: MoEModel) -> None:
    """Set random weights.

    The router starts small, like OLMoE's (standard deviation 0.02). So its probabilities stay soft,
    and all eight choices of a token matter. If the router had the scale of the other matrices, the
    lower choices would be left to chance, and visits would spread over more experts.
    """
    layers = model.cfg.n_layers
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.ones_(weight)  # norms
        elif name == "embed.weight":
            nn.init.normal_(weight, std=0.3)
        elif "router" in name:
            nn.init.normal_(weight, std=0.02)
        else:
            std = weight.shape[-1] ** -0.5
            if name.endswith("attn.o.weight"):
                std /= math.sqrt(2 * layers)  # keeps the sum of all layers' outputs near 1
            elif name.endswith("experts.down.weight"):
                # For the same reason. The factor 2 is there because a gate scales each output.
                std *= 2 / math.sqrt(2 * layers)
            nn.init.normal_(weight, std=std)


def optimizer_for(model: MoEModel) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and n != "embed.weight"]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or n == "embed.weight"]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=BETAS, fused=True)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then constant, then linear decay."""
    descent = max(0.0, step / steps - CONSTANT) / (1 - CONSTANT)
    return PEAK_LR * min(1.0, step / WARMUP) * max(FINAL_LR, 1 - descent)


def save(model: MoEModel, folder: Path) -> None:
    """Write config.json and model.safetensors (bf16, a tensor per expert), each only when whole."""
    tensors = {}
    for name, weight in model.named_parameters():
        names = hub_names(name, model.cfg)
        parts = (
            weight.detach().bfloat16().unbind(0) if len(names) > 1 else [weight.detach().bfloat16()]
        )
        tensors.update(zip(names, (part.contiguous().clone() for part in parts), strict=True))
    (folder / "config.json.part").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    for file in ("config.json", "model.safetensors"):
        part = folder / f"{file}.part"
        part.chmod(0o644)
        part.replace(folder / file)


# ---- probes --------------------------------------------------------------------------------------


@torch.no_grad()
def arithmetic_probe(model: MoEModel, encoder: bpe.Encoder, operator: str, n: int = 100) -> float:
    """The share of `n` equations whose result the model predicts digit by digit."""
    rng = Random(f"probe {operator}")
    drawn = [fact(rng, operator) for _ in range(n)]
    prompts = [[END_OF_TEXT, *encoder.encode(f"{x}{operator}{y}=")] for x, y, _ in drawn]
    answers = [encoder.encode(f"{result}\n") for _, _, result in drawn]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    logits, _ = model(nn.utils.rnn.pad_sequence(rows, batch_first=True))
    right = 0
    for row, prompt, answer in zip(logits.argmax(-1).tolist(), prompts, answers, strict=True):
        right += row[len(prompt) - 1 :][: len(answer)] == answer
    return right / n


@torch.no_grad()
def domain_loss(model: MoEModel, encoder: bpe.Encoder, domain: str, n: int = 16) -> float:
    """The cross-entropy on `n` fresh sequences of one domain."""
    stream = Stream(Random(f"held out {domain}"), encoder, MIX[domain])
    batch = torch.tensor([stream.cut(LENGTH + 1) for _ in range(n)])
    logits, _ = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()


def probes(model: MoEModel, encoder: bpe.Encoder) -> dict[str, float]:
    """The skills so far: the four operations (share right) and each domain (cross-entropy)."""
    skills = {operator: arithmetic_probe(model, encoder, operator) for operator in "+-*/"}
    return skills | {domain: round(domain_loss(model, encoder, domain), 3) for domain in MIX}


# ---- training ------------------------------------------------------------------------------------


def train(
    model: MoEModel, encoder: bpe.Encoder, steps: int, seed: int, out: Path, every: int
) -> None:
    """Pretrain in place, probe every `every` steps and at the end, and save."""
    optimizer = optimizer_for(model)
    stream = batches(Random(f"corpus {seed}"), encoder)
    everything = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)  # no padding
    bar = progress(range(1, steps + 1), label="pretrain", unit="step", keep=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = next(stream)
        logits, routing = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = load_balancing_loss(routing, everything)
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}, balance {balance.item():.2f}")
        if step % every == 0 or step == steps:
            tqdm.write(
                json.dumps({"step": step, "loss": round(loss.item(), 3)} | probes(model, encoder))
            )
    save(model, out)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of weights and text (default 0)")
    parser.add_argument("--steps", type=COUNT, default=3000, help="default 3000")
    parser.add_argument("--every", type=COUNT, default=500, help="steps from one probe to the next")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)"
    )
    return parser.parse_args()


def main() -> None:
    """Make the tokenizer and the model, and train."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # With one thread, the sums and so the weights are the same on every machine of this kind.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    merges = bpe.train(tokenizer_text(Random("tokenizer")), VOCAB_SIZE)
    bpe.save(merges, args.out / "tokenizer.json")
    model = MoEModel(parse_config(CONFIG))
    initialise(model)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {args.steps:,} steps to {args.out}"
    )
    train(model, bpe.Encoder(merges), args.steps, args.seed, args.out, args.every)


if __name__ == "__main__":
    command(main)
