"""What tuning changes besides the task: hot experts, cold ones, none and all, at equal task loss.

    python -m paper.studies.mechanism --run DIR                  measures a run, into its results
    python -m paper.studies.mechanism --run runs/a --with runs/b    and what it keeps beside runs/b
    python -m paper.studies.mechanism --run DIR --data own.jsonl    on other word problems
    python -m paper.reproduce mechanism                          all arms, over rates and seeds

The plan is the last part of placement.md. A method that learns less also forgets less, so each arm
is run at several learning rates, and what it costs elsewhere is read off where all arms have the
same task loss. --with names a run on another task, whose update is added to the first one's: it
shows what each of the two keeps in one model.
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
from paper.runs.grid import Cell, Wanted, missing_tasks, saved
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

SEQUENCES = 32  # of each domain of pretraining
N_PROBLEMS = 400  # of each task, for the routing and for what a merged model keeps
K_HOT = 8  # of a layer
MECHANISM = "mechanism"
ARMS, SEEDS = ("hot", "cold", "none", "all"), range(200, 205)
CODE_RATE = 1e-2  # of the runs that are merged in, in all arms
OTHER = "tiny-code"

# ---- one run -------------------------------------------------------------------------------------


def texts(tokenizer: Tokenizer, task: str, path: Path, max_len: int) -> dict[str, tuple]:
    """{domain or the task: (tokens [B, T], real [B, T])}: what routing and losses are read on."""
    found = {}
    for domain, documents in MIX.items():
        stream = Stream(Random(f"mechanism {domain}"), tokenizer, documents)
        tokens = torch.tensor([stream.cut(LENGTH + 1) for _ in range(SEQUENCES)])
        found[domain] = (tokens, torch.ones_like(tokens, dtype=torch.bool))
    data = encode(load_examples(task, path)[:N_PROBLEMS], tokenizer, max_len)
    batch = collate(data)
    found[task] = (batch.tokens, batch.real)
    return found


def mean_loss(model: MoEModel, tokens: Tensor) -> float:
    """Cross-entropy of each next token [B, T], nats a token."""
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def kept_choices(before: Routing, after: Routing, real: Tensor) -> float:
    """The share of a token's experts that it still visits, over the real tokens of a layer."""
    same = before.expert_ids[..., :, None] == after.expert_ids[..., None, :]  # [B, T, K, K]
    return same.any(-1)[real].float().mean().item()


def counted(routing: dict[int, Routing], real: Tensor) -> dict[int, Tensor]:
    """{layer: the visits of each expert [E]}."""
    n_experts = next(iter(routing.values())).logits.shape[-1]
    catcher = Catcher(n_experts)
    catcher.add(routing, real)
    return catcher.scores("count")


@torch.no_grad()
def measure(base: MoEModel, tuned: MoEModel, of: dict[str, tuple], task: str) -> dict:
    """results.json's entry. All shares are means over layers.

    rise: of the loss on each domain, nats a token. kept: the share of a token's experts that it
    still visits, on each domain and on the task. hot_before, hot_after: the share of the task's
    visits that goes to the base's hot experts, in the base and in the tuned model.
    """
    rise, kept, hot = {}, {}, {}
    for name, (tokens, real) in of.items():
        before, after = base.trunk(tokens)[1], tuned.trunk(tokens)[1]
        kept[name] = mean(kept_choices(before[i], after[i], real) for i in before)
        if name == task:
            visits = {"hot_before": counted(before, real), "hot_after": counted(after, real)}
            experts = choose(visits["hot_before"], K_HOT, "hot")
            hot = {when: mean(visited_share(v, experts).values()) for when, v in visits.items()}
        else:
            rise[name] = mean_loss(tuned, tokens) - mean_loss(base, tokens)
    return {"rise": rise, "kept": kept, **hot, "total": len(of)}


@torch.no_grad()
def add_update(model: MoEModel, other: MoEModel, base: MoEModel) -> None:
    """Add to `model` by how much `other` differs from the base that both come from."""
    parts = zip(model.parameters(), other.parameters(), base.parameters(), strict=True)
    for weight, tuned, start in parts:
        weight += tuned - start


def task_losses(model: MoEModel, tokenizer: Tokenizer, files: dict[str, Path]) -> dict[str, float]:
    """{task: nats per answer token on its problems}."""
    found = {}
    for task, path in files.items():
        examples = load_examples(task, path)[:N_PROBLEMS]
        data = encode(examples, tokenizer, model.cfg.max_len)
        found[task] = measure_loss(model, data, 100)[0]["loss"]
    return found


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="a run on word problems")
    add("--with", dest="other", type=Path, metavar="DIR", help="a run on tiny-code to add to it")
    add("--data", type=Path, metavar="FILE", help="word problems (default: the task's test split)")
    return p.parse_args()


def main() -> None:
    """Measure a run, print a line, keep it in results.json."""
    args = parse_args()
    run = read_run(args.run, "hashes")
    source = unchanged_base_folder(run, args.run)
    tokenizer, base = load_tokenizer(source), MoEModel.from_pretrained(source)
    tuned, _, _ = load_run(args.run)
    path = args.data or TASKS[run["task"]].test.fetch()
    of = texts(tokenizer, run["task"], path, base.cfg.max_len)
    result = measure(base, tuned, of, run["task"])
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
    """A run of regime A that is scored, and measured beside a code run of the same arm and seed."""

    @property
    def code(self) -> Placed:
        """The run on code whose update is added to it."""
        about = settings(self.regime, self.arm)
        return Placed(**about, lr=CODE_RATE, seed=self.seed, task=OTHER)

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
    """The runs of an arm and seed, at rising learning rates."""
    return [Measured(**settings("A", arm), lr=lr, seed=seed) for lr in FIRST_RATES]


def wanted() -> Wanted:
    """What the table rests on. All arms of a seed together."""
    runs = [run for seed in SEEDS for arm in ARMS for run in measured(arm, seed)]
    return {run: {TEST, MECHANISM} for run in runs}


def numbers(run: Measured) -> dict[str, float]:
    """What is compared of a run: {name: number}."""
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
    """(log task loss, numbers) of the rates up to the best one, the best first."""
    points = [(log(per_token(run, PLAIN)), numbers(run)) for run in runs]
    best = min(range(len(points)), key=lambda i: points[i][0])
    return points[best::-1]


def at_loss(points: list[tuple[float, dict[str, float]]], loss: float) -> dict[str, float]:
    """The numbers at a log task loss, on the line between the two points around it."""
    for (low, better), (high, worse) in pairwise(points):
        if low <= loss <= high:
            part = (loss - low) / (high - low)
            return {name: (1 - part) * better[name] + part * worse[name] for name in better}
    return points[0][1] if loss < points[0][0] else points[-1][1]


def at_equal_loss(seed: int) -> dict[str, dict[str, float]] | None:
    """{arm: its numbers} at the best loss of the arm whose best is worst; None if a run is missing.

    That is the lowest loss that all arms reach.
    """
    runs = {arm: measured(arm, seed) for arm in ARMS}
    if any(missing_tasks(run, [TEST, MECHANISM]) for of in runs.values() for run in of):
        return None
    points = {arm: falling(of) for arm, of in runs.items()}
    loss = max(of[0][0] for of in points.values())
    return {arm: at_loss(of, loss) | {"loss": loss} for arm, of in points.items()}


def results() -> list[dict]:
    """A row for each number and arm: its mean over the finished seeds, and how far from hot."""
    found = [by_arm for seed in SEEDS if (by_arm := at_equal_loss(seed))]
    if not found:
        return []
    return [
        {
            "number": name,
            "arm": arm,
            "mean": mean(of[arm][name] for of in found),
            "seeds": len(found),
            "minus": spread([of[arm][name] - of["hot"][name] for of in found])._asdict(),
        }
        for name in found[0]["hot"]
        if name != "loss"
        for arm in ARMS
    ]


def show(rows: list[dict]) -> None:
    """A block for each number."""
    print("at equal loss on word problems; differences from hot are paired by seed")
    for r in rows:
        if r["arm"] == ARMS[0]:
            print(f"\n{r['number']}")
        minus = "" if r["arm"] == ARMS[0] else signed(r["minus"], 3)
        print(f"  {r['arm']:6s}{r['mean']:+8.3f}   {minus}".rstrip())


if __name__ == "__main__":
    command(main)
