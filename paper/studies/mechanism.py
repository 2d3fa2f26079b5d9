"""How adapters on hot, cold, no or all experts change a model, at equal loss on the task.

    python -m paper.studies.mechanism --run DIR                  measures a run, into its results
    python -m paper.studies.mechanism --run runs/a --with runs/b    and merges runs/b into it
    python -m paper.studies.mechanism --run DIR --data own.jsonl    on other word problems
    python -m paper.reproduce mechanism                          all arms, over rates and seeds

The plan is the last part of placement.md. A method that learns less also forgets less. So each arm
is run at several learning rates, and the arms are compared where all have the same loss on the
task. --with names a run on another task. Its update is added to the first run's, and each task is
scored in the merged model.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.studies.mechanism, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from random import Random
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from catcher import Catcher, choose, visited_share
from hellora import load_run
from moe_model import MoEModel, Routing
from paper.runs.grid import ROOT, Cell, Wanted, missing_tasks, saved
from paper.runs.stats import signed, spread
from paper.studies.placement import PLAIN, per_token
from paper.studies.placement_runs import (
    FIRST_RATES,
    TASK,
    TEST,
    Placed,
    problems_file,
    settings,
)
from plumbing.answer_loss import measure_loss
from plumbing.base_model import unchanged_base_folder
from plumbing.cli import Parser, command
from plumbing.data import TASKS, collate, encode, load_examples
from plumbing.run_folder import read_results, read_run, update_results
from plumbing.tokenizer import Tokenizer, load_tokenizer
from tiny.corpus import MIX
from tiny.pretrain import LENGTH, Stream

SEQUENCES = 32  # for each domain of pretraining
N_PROBLEMS = 400  # of each task, for the routing and for the merged model
K_HOT = 8  # hot experts of a layer
MECHANISM = "mechanism"
RESULTS = ROOT / "docs" / "results" / MECHANISM  # of the runs of this study alone
ARMS, SEEDS = ("hot", "cold", "none", "all"), range(200, 205)
CODE_RATE = 1e-2  # the learning rate of the runs on code, in all arms
OTHER = "tiny-code"

# ---- one run -------------------------------------------------------------------------------------


def texts(tokenizer: Tokenizer, task: str, path: Path, max_len: int) -> dict[str, tuple]:
    """{domain or task: (tokens [B, T], real [B, T])}, the texts for routing and losses."""
    batches = {}
    for domain, documents in MIX.items():
        stream = Stream(Random(f"mechanism {domain}"), tokenizer, documents)
        tokens = torch.tensor([stream.cut(LENGTH + 1) for _ in range(SEQUENCES)])
        batches[domain] = (tokens, torch.ones_like(tokens, dtype=torch.bool))
    data = encode(load_examples(task, path)[:N_PROBLEMS], tokenizer, max_len)
    batch = collate(data)
    batches[task] = (batch.tokens, batch.real)
    return batches


def mean_loss(model: MoEModel, tokens: Tensor) -> float:
    """The cross-entropy of each next token [B, T], in nats per token."""
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def kept_choices(before: Routing, after: Routing, real: Tensor) -> float:
    """The share of a token's experts that stay the same, over the real tokens of a layer."""
    same = before.expert_ids[..., :, None] == after.expert_ids[..., None, :]  # [B, T, K, K]
    return same.any(-1)[real].float().mean().item()


def counted(routing: dict[int, Routing], real: Tensor) -> dict[int, Tensor]:
    """{layer: the visits of each expert [E]}."""
    n_experts = next(iter(routing.values())).logits.shape[-1]
    catcher = Catcher(n_experts)
    catcher.add(routing, real)
    return catcher.scores("count")


@torch.no_grad()
def measure(base: MoEModel, tuned: MoEModel, batches: dict[str, tuple], task: str) -> dict:
    """The entry of results.json. All shares are means over layers.

    rise: how much the loss rises on each domain, in nats per token. kept: the share of a token's
    experts that stay the same, on each domain and on the task. hot_before, hot_after: the share of
    the task's visits that go to the base's hot experts, in the base and in the tuned model.
    """
    rise, kept, hot = {}, {}, {}
    for name, (tokens, real) in batches.items():
        before, after = base.trunk(tokens)[1], tuned.trunk(tokens)[1]
        kept[name] = mean(kept_choices(before[i], after[i], real) for i in before)
        if name == task:
            visits = {"hot_before": counted(before, real), "hot_after": counted(after, real)}
            experts = choose(visits["hot_before"], K_HOT, "hot")
            hot = {when: mean(visited_share(v, experts).values()) for when, v in visits.items()}
        else:
            rise[name] = mean_loss(tuned, tokens) - mean_loss(base, tokens)
    return {"rise": rise, "kept": kept, **hot, "total": len(batches)}


@torch.no_grad()
def add_update(model: MoEModel, other: MoEModel, base: MoEModel) -> None:
    """Add to `model` the difference between `other` and the base of both."""
    parts = zip(model.parameters(), other.parameters(), base.parameters(), strict=True)
    for weight, tuned, start in parts:
        weight += tuned - start


def task_losses(model: MoEModel, tokenizer: Tokenizer, files: dict[str, Path]) -> dict[str, float]:
    """{task: the loss on its problems, in nats per answer token}."""
    losses = {}
    for task, path in files.items():
        examples = load_examples(task, path)[:N_PROBLEMS]
        data = encode(examples, tokenizer, model.cfg.max_len)
        losses[task] = measure_loss(model, data, 100)[0]["loss"]
    return losses


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="a run on word problems")
    add("--with", dest="other", type=Path, metavar="DIR", help="a run on tiny-code to add to it")
    add("--data", type=Path, metavar="FILE", help="word problems (default: the task's test split)")
    return p.parse_args()


def main() -> None:
    """Measure a run, print a line, and keep the result in results.json."""
    args = parse_args()
    run = read_run(args.run, "hashes")
    source = unchanged_base_folder(run, args.run)
    tokenizer, base = load_tokenizer(source), MoEModel.from_pretrained(source)
    tuned, _, _ = load_run(args.run)
    path = args.data or TASKS[run["task"]].test.fetch()
    batches = texts(tokenizer, run["task"], path, base.cfg.max_len)
    result = measure(base, tuned, batches, run["task"])
    if args.other:
        files = {run["task"]: path, OTHER: TASKS[OTHER].test.fetch()}
        code = load_run(args.other)[0]
        result["alone"] = {
            task: task_losses(model, tokenizer, {task: files[task]})[task]
            for task, model in zip(files, (tuned, code), strict=True)
        }
        add_update(tuned, code, base)
        result["merged"] = task_losses(tuned, tokenizer, files)
    on_task, elsewhere = result["kept"][run["task"]], mean(result["kept"][d] for d in MIX)
    print(
        f"{args.run}  loss on {len(MIX)} domains {mean(result['rise'].values()):+.4f}, "
        f"experts kept {on_task:.1%} on the task, {elsewhere:.1%} elsewhere"
    )
    update_results(args.run, MECHANISM, result)


# ---- all arms ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured(Placed):
    """A run of regime A. It is scored, and merged with a code run of the same arm and seed."""

    @property
    def result(self) -> Path:
        """See Cell."""
        return RESULTS / f"{self.name}.json"

    @property
    def code(self) -> Placed:
        """The run on code whose update is added to it."""
        arm = settings(self.regime, self.arm)
        return Placed(**arm, lr=CODE_RATE, seed=self.seed, task=OTHER)

    def needs(self) -> list[Cell]:
        """See Cell."""
        return [self.code]

    def scoring(self, task: str) -> tuple[str, tuple[str, ...]]:
        """See Cell."""
        if task != MECHANISM:
            return super().scoring(task)
        words = f"--with runs/placement/{self.code.name} --data {problems_file(TEST)}"
        scores = ("rise", "kept", "hot_before", "hot_after", "alone", "merged")
        return f"python -m paper.studies.mechanism --run {{}} {words}", scores

    def scores(self, task: str) -> dict:
        """See Cell."""
        if task != MECHANISM:
            return super().scores(task)
        return read_results(self.folder).get(MECHANISM, {})


def measured(arm: str, seed: int) -> list[Measured]:
    """The runs of an arm and seed, by rising learning rate."""
    return [Measured(**settings("A", arm), lr=lr, seed=seed) for lr in FIRST_RATES]


def wanted() -> Wanted:
    """The runs and scores behind the table. All arms of a seed come together."""
    runs = [run for seed in SEEDS for arm in ARMS for run in measured(arm, seed)]
    return {run: {TEST, MECHANISM} for run in runs}


def numbers(run: Measured) -> dict[str, float]:
    """The numbers of a run that are compared: {name: number}."""
    shown = saved(run)
    rise, kept = shown["rise"][MECHANISM], shown["kept"][MECHANISM]
    alone, merged = shown["alone"][MECHANISM], shown["merged"][MECHANISM]
    return {
        "rise": mean(rise.values()),
        "kept on the task": kept[TASK],
        "kept elsewhere": mean(kept[domain] for domain in MIX),
        "hot share": shown["hot_after"][MECHANISM] - shown["hot_before"][MECHANISM],
        "merged, word problems": log(merged[TASK] / alone[TASK]),
        "merged, code": log(merged[OTHER] / alone[OTHER]),
    }


def falling(runs: list[Measured]) -> list[tuple[float, dict[str, float]]]:
    """(log task loss, numbers) for each rate from the best down to the lowest."""
    points = [(log(per_token(run, PLAIN)), numbers(run)) for run in runs]
    best = min(range(len(points)), key=lambda i: points[i][0])
    return points[best::-1]


def at_loss(points: list[tuple[float, dict[str, float]]], loss: float) -> dict[str, float]:
    """The numbers at a log task loss, interpolated between the two points around it."""
    for (low, better), (high, worse) in pairwise(points):
        if low <= loss <= high:
            part = (loss - low) / (high - low)
            return {name: (1 - part) * better[name] + part * worse[name] for name in better}
    return points[0][1] if loss < points[0][0] else points[-1][1]


def at_equal_loss(seed: int) -> dict[str, dict[str, float]] | None:
    """{arm: its numbers} at the lowest loss that all arms reach. None if a run is missing.

    This is the best loss of the arm whose best loss is the highest.
    """
    runs = {arm: measured(arm, seed) for arm in ARMS}
    if any(missing_tasks(run, [TEST, MECHANISM]) for by_rate in runs.values() for run in by_rate):
        return None
    points = {arm: falling(by_rate) for arm, by_rate in runs.items()}
    loss = max(best_first[0][0] for best_first in points.values())
    return {arm: at_loss(line, loss) | {"loss": loss} for arm, line in points.items()}


def results() -> list[dict]:
    """A row for each number and arm: the mean over finished seeds, and the difference from hot."""
    seeds = [by_arm for seed in SEEDS if (by_arm := at_equal_loss(seed))]
    if not seeds:
        return []
    return [
        {
            "number": name,
            "arm": arm,
            "mean": mean(by_arm[arm][name] for by_arm in seeds),
            "seeds": len(seeds),
            "minus": spread(
                [by_arm[arm][name] - by_arm["hot"][name] for by_arm in seeds]
            )._asdict(),
        }
        for name in seeds[0]["hot"]
        if name != "loss"
        for arm in ARMS
    ]


def show(rows: list[dict]) -> None:
    """Print a block for each number."""
    print("at equal loss on word problems, with differences from hot paired by seed")
    for r in rows:
        if r["arm"] == ARMS[0]:
            print(f"\n{r['number']}")
        minus = "" if r["arm"] == ARMS[0] else signed(r["minus"], 3)
        print(f"  {r['arm']:6s}{r['mean']:+8.3f}   {minus}".rstrip())


if __name__ == "__main__":
    command(main)
