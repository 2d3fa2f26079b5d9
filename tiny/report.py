"""The numbers in the embedded model's README: skills, routing, and the accuracy of the base.

python -m tiny.report                           about two minutes on one core
python -m tiny.report --shots 2                 after two solved problems instead of four
python -m tiny.report --model /tmp/tiny-1       another model of tiny.pretrain
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m tiny.report, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import mean

import torch
from torch import Tensor

from catcher import choose, count_visits, overlap, sample, visited_share
from eval_gsm8k import evaluate, few_shot, solved_problems
from moe_model import MoEModel
from plumbing.cli import Parser, command
from plumbing.data import TASKS, Encoded, encode, load_examples
from plumbing.tokenizer import Tokenizer, load_tokenizer
from tiny.corpus import MIX
from tiny.pretrain import Stream, probes

BATCH = 50
Counts = dict[int, Tensor]  # layer -> visits of each expert [E]


def visits(model: MoEModel, data: list[Encoded]) -> Counts:
    """The visits of each expert, over prompts and answers."""
    return count_visits(model, data, BATCH, "").scores("count")


def hot(model: MoEModel, counts: Counts) -> dict[int, list[int]]:
    """Each layer's most-visited experts, as many as a token visits."""
    return choose(counts, model.cfg.top_k, "hot")


def show(name: str, values: dict[int, float]) -> None:
    """A row of the routing table: a number for each layer, and their mean."""
    print(
        f"{name:38s} "
        + " ".join(f"{v:.3f}" for v in values.values())
        + f"   mean {mean(values.values()):.3f}"
    )


def report_routing(model: MoEModel, tokenizer: Tokenizer) -> None:
    """Print the share of the hot experts, and the overlap of layers, tasks and samples."""

    def task_data(task: str, source: str) -> list[Encoded]:
        examples = load_examples(task, getattr(TASKS[task], source).fetch())
        return encode(examples, tokenizer, model.cfg.max_len)

    counts = {
        task: visits(model, task_data(task, "test"))
        for task in ("tiny-math", "tiny-code", "tiny-safety")
    }
    for domain, shares in MIX.items():
        stream = Stream(Random(f"routing {domain}"), tokenizer, shares)
        counts[domain] = visits(model, [Encoded(stream.cut(128), 1) for _ in range(32)])
    chosen = {name: hot(model, c) for name, c in counts.items()}
    print(f"share of visits that go to each layer's {model.cfg.top_k} most-visited experts")
    for name, c in counts.items():
        show(name, visited_share(c, chosen[name]))

    print("Jaccard overlap of hot experts, by layer")
    for name in list(counts)[1:]:
        show(f"tiny-math and {name}", overlap(chosen["tiny-math"], chosen[name]))
    training = task_data("tiny-math", "train")
    tenth, full = (hot(model, visits(model, data)) for data in (sample(training, 0.1, 0), training))
    show("tiny-math, 10 % of training and all", overlap(tenth, full))
    layers = {(i, j): overlap({0: chosen["tiny-math"][i]}, {0: chosen["tiny-math"][j]})[0]
              for i, j in combinations(chosen["tiny-math"], 2)}  # fmt: skip
    show("tiny-math, layer and layer (pairs)", layers)


def report_accuracy(model: MoEModel, tokenizer: Tokenizer, shots: int) -> None:
    """Print the accuracy without training: on the prompt alone, and after solved problems."""
    examples, task = load_examples("tiny-math", TASKS["tiny-math"].test.fetch()), TASKS["tiny-math"]
    after = few_shot(examples, solved_problems("tiny-math", task.template), shots)
    for name, prompts in (("0 shots", examples), (f"{shots} shots", after)):
        result, records = evaluate(
            model, tokenizer, prompts, task.template, task.max_new, BATCH, name
        )
        strict, flexible = result["accuracy"], result["accuracy_flexible"]
        print(
            f"tiny-math, {name}: accuracy {strict:.1%} (any "
            f"last number: {flexible:.1%}) of {len(examples)}"
        )
        print(f"  e.g. {records[0]['output'][:80]!r}, right: {records[0]['gold']}")


def main() -> None:
    """Print the whole report."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path(__file__).parent, help="folder (default: this one)"
    )
    parser.add_argument(
        "--shots", type=int, default=4, help="solved problems before each (default 4)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = MoEModel.from_pretrained(args.model), load_tokenizer(args.model)
    for name, value in probes(model, tokenizer).items():
        print(
            f"{name:10s} "
            + (f"{value:.0%} right" if name in "+-*/" else f"cross-entropy {value:.3f}")
        )
    report_routing(model, tokenizer)
    report_accuracy(model, tokenizer, args.shots)


if __name__ == "__main__":
    command(main)
