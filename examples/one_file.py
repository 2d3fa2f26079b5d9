"""HELLoRA in one file: LoRA on the most-used experts of a Mixture-of-Experts model.

    python examples/one_file.py              two to three minutes on one core
    python examples/one_file.py --steps 10   half a minute: all parts, but little learning

It is for readers who know PyTorch, but not the paper (arXiv 2605.18795). A Mixture-of-Experts layer
has many small MLPs, its experts, and a router that sends each token to a few of them. A task visits
some experts far more often than others: these are hot. HELLoRA counts the visits. Then it trains
small updates of each layer's hot experts, of attention and of the router. All else stays frozen.

`main`, at the end, is the method step by step. Nothing of this repository is imported. A test
checks that the numbers are those of train.py. Left out are the balancing loss (Eq. 1), LoRI's mask
(Eq. 4), other models and methods, saves and GPUs.

B sequences   T tokens of each   M = B T tokens   V words   D model width   H heads   C = D / H
E experts of a layer   K experts that a token visits   F width of an expert   r rank of an update
"""

import argparse
import json
import re
import time
from math import ceil
from pathlib import Path
from zlib import crc32

import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

TINY = Path(__file__).parent.parent / "tiny"  # an OLMoE of 3.7 M parameters, and word problems
CFG = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
LAYERS, D, H = CFG["num_hidden_layers"], CFG["hidden_size"], CFG["num_attention_heads"]
E, K, END = CFG["num_experts"], CFG["num_experts_per_tok"], CFG["eos_token_id"]
LEAVES = ("gate", "up", "down")  # the matrices of an expert
HOT, RANK, ALPHA = 8, 8, 16  # adapted experts of a layer, r, alpha (the scale is ALPHA / RANK)
BATCH, LR, MAX_NORM, MAX_NEW = 32, 1e-2, 1.0, 64
Problem = tuple[list[int], list[int]]  # a prompt and its answer, as token ids


class LoRALinear(nn.Module):
    """A frozen matrix W, with or without an update: W x + (alpha / r) B A x. Eq. 3 of the paper."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight  # [out, in] It is no nn.Parameter, so it is frozen.
        self.A = self.B = None

    def adapt(self, draw: torch.Generator) -> None:
        """Add an update: A ~ U(-1, 1) / sqrt(in), and B = 0, so that the model starts unchanged."""
        n_out, n_in = self.weight.shape
        self.A = nn.Parameter(torch.empty(RANK, n_in).uniform_(-1, 1, generator=draw) / n_in**0.5)
        self.B = nn.Parameter(torch.zeros(n_out, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        y = x @ self.weight.T
        if self.A is not None:  # x goes through r channels only, so the update is small and cheap
            y = y + ALPHA / RANK * (x @ self.A.T) @ self.B.T
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Put W + (alpha / r) B A in place of W (Eq. 2). The function stays the same."""
        if self.A is not None:
            self.weight = self.weight + ALPHA / RANK * self.B @ self.A
            self.A = self.B = None


def rotate(x: Tensor, start: int) -> Tensor:
    """Rotary positions: turn pairs (channel c, c + C/2) by angles that grow with the position."""
    half = x.shape[-1] // 2
    position = torch.arange(start, start + x.shape[2])[:, None]  # [T, 1]
    angle = position * CFG["rope_theta"] ** (-torch.arange(half) / half)  # [T, C/2]
    a, b = x.chunk(2, -1)  # [B, H, T, C/2] each
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class OLMoE:
    """The decoder: a LoRALinear for each matrix, by its checkpoint name (mlp.gate: the router)."""

    def __init__(self):
        stored = load_file(TINY / "model.safetensors").items()
        w = {name.removesuffix(".weight"): x.float() for name, x in stored}
        self.embed = w.pop("model.embed_tokens")  # [V, D]
        self.norms = {name: x for name, x in w.items() if x.ndim == 1}
        self.linear = {name: LoRALinear(x) for name, x in w.items() if x.ndim == 2}
        self.choice: dict[int, Tensor] = {}  # layer -> the experts that its tokens visited

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm: x / rms(x) * weight. [..., D]"""
        return F.rms_norm(x, (D,), self.norms[name], CFG["rms_norm_eps"])

    def attention(self, x: Tensor, at: str, past: dict) -> Tensor:
        """Causal self-attention [B, T, D]. past: keys and values of earlier tokens, if any."""
        q, k, v = (self.linear[f"{at}.{leaf}_proj"](x) for leaf in "qkv")
        q, k = self.norm(q, f"{at}.q_norm"), self.norm(k, f"{at}.k_norm")  # before the heads
        q, k, v = (x.unflatten(-1, (H, D // H)).transpose(1, 2) for x in (q, k, v))  # [B, H, T, C]
        old_k, old_v = past.get(at, (k[:, :, :0], v[:, :, :0]))  # none before the first token
        start = old_k.shape[2]
        k, v = torch.cat([old_k, rotate(k, start)], 2), torch.cat([old_v, v], 2)
        past[at] = k, v
        # After the prompt there is one new token at a time. It sees all tokens before it.
        y = F.scaled_dot_product_attention(rotate(q, start), k, v, is_causal=not start)
        return self.linear[f"{at}.o_proj"](y.transpose(1, 2).flatten(2))

    def moe(self, x: Tensor, i: int) -> Tensor:
        """Layer i's experts: a token gets the weighted sum of the K that it visits. [B, T, D]"""
        at, tokens = f"model.layers.{i}.mlp", x.flatten(0, 1)  # [M, D]
        weight, choice = self.linear[f"{at}.gate"](tokens).softmax(-1).topk(K)  # [M, K] each
        self.choice[i] = choice.view(*x.shape[:2], K)  # [B, T, K] for train(), which counts visits
        y = torch.zeros_like(tokens)
        for e in range(E):
            token, nth = torch.where(choice == e)  # [n] the tokens that visit e, as nth choice
            rows = tokens[token]  # [n, D]
            gate, up, down = (self.linear[f"{at}.experts.{e}.{leaf}_proj"] for leaf in LEAVES)
            # An expert without visits (n = 0) runs too. So its gradient is zero, and not None.
            # AdamW skips None, but with gradient zero it still moves a parameter by its momentum.
            out = down(F.silu(gate(rows)) * up(rows))  # [n, D] SwiGLU, F channels wide
            y.index_add_(0, token, out * weight[token, nth, None])
        return y.view_as(x)

    def logits(self, tokens: Tensor, past: dict) -> Tensor:
        """Token ids [B, T] -> logits of the next token [B, T, V]."""
        x = self.embed[tokens]  # [B, T, D]
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            x = x + self.attention(self.norm(x, f"{at}.input_layernorm"), f"{at}.self_attn", past)
            x = x + self.moe(self.norm(x, f"{at}.post_attention_layernorm"), i)
        return self.linear["lm_head"](self.norm(x, "model.norm"))

    def adapt(self, experts: list[list[int]]) -> None:
        """Add updates to attention, to the router, and to the given experts of each layer."""
        for i, ids in enumerate(experts):
            at = f"model.layers.{i}"
            groups = {f"attn.{leaf}": [f"{at}.self_attn.{leaf}_proj"] for leaf in "qkvo"}
            groups["moe.router"] = [f"{at}.mlp.gate"]
            for leaf in LEAVES:
                groups[f"moe.experts.{leaf}"] = [f"{at}.mlp.experts.{e}.{leaf}_proj" for e in ids]
            for group, names in groups.items():  # A of seed 0, as in hellora.py, for equal losses
                draw = torch.Generator().manual_seed(crc32(f"0 layers.{i}.{group}".encode()))
                for name in names:
                    self.linear[name].adapt(draw)


def train(model: OLMoE, problems: list[Problem], n_steps: int, decay: bool) -> Tensor:
    """Train the updates -> the visits of each layer's experts during training [LAYERS, E]."""
    trained = [p for linear in model.linear.values() for p in linear.parameters()]  # each A and B
    print(f"training {sum(p.numel() for p in trained):,} numbers, all others are frozen")
    optimizer = torch.optim.AdamW(trained, LR, weight_decay=0.0)
    visits, began = torch.zeros(LAYERS, E, dtype=torch.long), time.time()
    for n in range(n_steps):
        epoch, step = divmod(n, ceil(len(problems) / BATCH))  # each epoch has its own order
        order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(epoch))
        batch = [problems[j] for j in order.split(BATCH)[step].tolist()]
        texts = [torch.tensor(p + a) for p, a in batch]
        answers = [torch.tensor([-100] * len(p) + a) for p, a in batch]  # cross_entropy skips -100
        tokens = pad_sequence(texts, batch_first=True, padding_value=END)[:, :-1]  # [B, T]
        targets = pad_sequence(answers, batch_first=True, padding_value=-100)[:, 1:]  # [B, T]

        loss = F.cross_entropy(model.logits(tokens, {}).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.param_groups[0]["lr"] = LR * (1 - n / n_steps) if decay else LR
        optimizer.step()
        optimizer.zero_grad()
        for i, choice in model.choice.items():  # padding is END, and does not count
            visits[i] += choice[tokens != END].flatten().bincount(minlength=E)
        if n < 10 or n % 30 == 0 or n + 1 == n_steps:
            left = (time.time() - began) / (n + 1) * (n_steps - n - 1)
            print(f"  step {n + 1:3d} of {n_steps}  loss {loss:.4f}  {left:.0f} s left", flush=True)
    return visits


def read_tokenizer() -> tiktoken.Encoding:
    """Byte-pair encoding. The file writes a token with one printable character for each byte."""
    file = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = file["model"]["vocab"]  # a token's spelling -> its id
    byte = {spelled: i for spelled, i in vocab.items() if i < 256}  # the id is the byte itself
    ids = {bytes(byte[c] for c in spelled): i for spelled, i in vocab.items() if i != END}
    words = file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]  # no token leaves a word
    return tiktoken.Encoding("", pat_str=words, mergeable_ranks=ids, special_tokens={"<end>": END})


TOKENIZER, NUMBER = read_tokenizer(), re.compile(r"#### (-?\d+)")


def read_problems(name: str) -> list[Problem]:
    """The problems of a file, in the form of lm-evaluation-harness."""
    rows = [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]
    prompts = [TOKENIZER.encode(f"Question: {row['question']}\nAnswer:") for row in rows]
    answers = [[*TOKENIZER.encode(f" {row['answer']}"), END] for row in rows]
    return list(zip(prompts, answers, strict=True))


@torch.no_grad()
def score(model: OLMoE, problems: list[Problem], when: str) -> None:
    """Decode greedily. Print one answer, and the share of right numbers after ####."""
    right = 0
    for length in {len(prompt) for prompt, _ in problems}:  # equal lengths need no padding
        group = [problem for problem in problems if len(problem[0]) == length]
        tokens, past = torch.tensor([prompt for prompt, _ in group]), {}  # [B, T]
        output = tokens[:, :0]  # [B, 0]
        while output.shape[1] < MAX_NEW and not (output == END).any(1).all():
            tokens = model.logits(tokens, past)[:, -1:].argmax(-1)  # [B, 1] `past` has the others
            output = torch.cat([output, tokens], 1)
        for ids, (_, answer) in zip(output.tolist(), group, strict=True):
            text = TOKENIZER.decode(ids).split("<end>")[0]
            right += NUMBER.findall(text)[:1] == NUMBER.findall(TOKENIZER.decode(answer))
    print(f"{TOKENIZER.decode(group[-1][0])}{text}")
    print(f"{when}: accuracy {right / len(problems):.1%} on {len(problems)} problems")


def main(argv: list[str] | None = None) -> None:
    """The method, step by step."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--steps", type=int, default=282, help="of training (default: 282, 3 epochs)")
    n_steps = p.parse_args(argv).steps
    problems, tests = read_problems("math-train.jsonl"), read_problems("math-test.jsonl")
    score(OLMoE(), tests, "base")  # it knows some arithmetic, but has never seen "####"

    # Count. To see which experts the task visits, train LoRA on all experts, for one pass over a
    # tenth of the problems. The paper calls this its catcher. Only the counts are kept.
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(0)).tolist()
    some = [problems[j] for j in order[: len(problems) // 10]]
    model = OLMoE()
    model.adapt([list(range(E))] * LAYERS)
    visits = train(model, some, ceil(len(some) / BATCH), decay=False)

    # Choose each layer's most visited experts. Of equal ones, the lower id comes first.
    hot = visits.argsort(descending=True, stable=True)[:, :HOT].sort().values.tolist()
    for i, ids in enumerate(hot):
        print(f"layer {i}: {visits[i, ids].sum() / visits[i].sum():.1%} of visits go to {ids}")

    # Train, from the base model again. Now only tokens that visit a hot expert pay for an update.
    model = OLMoE()
    model.adapt(hot)
    train(model, problems, n_steps, decay=True)

    # Merge. The model has its old size and speed again. Then see what it has learned.
    for linear in model.linear.values():
        linear.merge()
    score(model, tests, "after")


if __name__ == "__main__":
    main()
