"""How much of its pretraining a model forgets when it is tuned on one task.

    python -m paper.studies.forgetting --run DIR              scores a run, into its results.json
    python -m paper.studies.forgetting --run runs/a runs/b    two runs
    python -m paper.studies.forgetting --model tiny           the embedded model itself
    python -m paper.reproduce forgetting                      all methods, over seeds

Before and after tuning, the embedded model scores nothing on the other tasks, because it has not
seen their form. So this study tests what the model learned in pretraining: fresh text of each
domain (tiny/corpus.py), and arithmetic.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print(
        "error: want python -m paper.studies.forgetting, in the project's folder", file=sys.stderr
    )
    raise SystemExit(2)

import argparse
from pathlib import Path
from statistics import mean

from hellora import load_run
from moe_model import MoEModel
from paper.runs.grid import PRETRAINING, Base, Cell, Wanted, saved
from paper.runs.rates import MAIN, SEEDS, TASK, cell
from paper.runs.stats import aligned, signed, spread
from plumbing.base_model import base_folder
from plumbing.checkpoint import locate, read_config
from plumbing.cli import Parser, command
from plumbing.flags import model_name
from plumbing.run_folder import read_run, results_folder, update_results
from plumbing.tokenizer import Tokenizer, load_tokenizer
from tiny.corpus import MIX
from tiny.pretrain import LENGTH, VOCAB_SIZE, arithmetic_probe, domain_loss

SEQUENCES, EQUATIONS = 64, 200  # for each domain, for each operator
OPERATORS = "+-*/"
AGAINST = "hellora"  # the method that each other method is compared with

# ---- one model -----------------------------------------------------------------------------------


def score(model: MoEModel, tokenizer: Tokenizer) -> dict:
    """The entry of results.json: nats per token of each domain, and shares of right equations."""
    losses = {domain: domain_loss(model, tokenizer, domain, SEQUENCES) for domain in MIX}
    return {
        "cross_entropy": {domain: round(loss, 4) for domain, loss in losses.items()},
        "arithmetic": {op: arithmetic_probe(model, tokenizer, op, EQUATIONS) for op in OPERATORS},
        "total": SEQUENCES * len(MIX),
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True).add_argument
    what(
        "--run",
        type=Path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="run folders of train.py",
    )
    what(
        "--model",
        type=model_name,
        help="a model without adapters: tiny, or a folder that tiny.pretrain made",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="with --model: keep results here")
    return p.parse_args()


def main() -> None:
    """Score each run, or the model, and print a line for each."""
    args = parse_args()
    for folder in args.run or [None]:
        out = results_folder(folder, args.out)
        source = base_folder(read_run(folder)) if folder else locate(args.model)
        if (size := read_config(source).vocab_size) != VOCAB_SIZE:
            raise ValueError(
                f"{source} has a vocabulary of {size:,} tokens, but this study needs a model of "
                f"tiny.pretrain: want one with {VOCAB_SIZE:,} tokens, or a run on one"
            )
        model = load_run(folder)[0] if folder else MoEModel.from_pretrained(source)
        result = score(model, load_tokenizer(source))
        print(
            f"{folder or args.model}  cross-entropy {mean(result['cross_entropy'].values()):.4f} "
            f"(mean of {len(MIX)} domains, {SEQUENCES * LENGTH:,} tokens each), "
            f"{mean(result['arithmetic'].values()):.1%} of equations right"
        )
        if out:
            update_results(out, PRETRAINING, result)


# ---- all methods ---------------------------------------------------------------------------------


def wanted() -> Wanted:
    """The cells and scores behind the table."""
    return {
        c: {PRETRAINING} for c in (Base(), *(cell(name, seed) for name in MAIN for seed in SEEDS))
    }


def kept(model: Cell) -> dict:
    """{"cross_entropy": {domain: nats}, "arithmetic": {operator: share}}, or {} if not scored."""
    shown = saved(model)
    if PRETRAINING not in shown.get("problems", {}):
        return {}
    return {name: shown[name][PRETRAINING] for name in ("cross_entropy", "arithmetic")}


def results() -> dict:
    """The scores of the base, and a row for each method that has scored runs."""
    base = kept(Base())
    scored = {
        name: {seed: scores for seed in SEEDS if (scores := kept(cell(name, seed)))}
        for name in MAIN
    }
    rises = {
        name: {seed: rise(scores, base) for seed, scores in by_seed.items()}
        for name, by_seed in scored.items()
        if base
    }
    return {
        "base": base,
        "rows": {
            name: row(name, scored[name], by_seed, rises[AGAINST])
            for name, by_seed in rises.items()
            if by_seed
        },
    }


def rise(after: dict, before: dict) -> dict[str, float]:
    """How much the cross-entropy of each domain has risen."""
    return {
        domain: loss - before["cross_entropy"][domain]
        for domain, loss in after["cross_entropy"].items()
    }


def row(name: str, scored: dict[int, dict], rises: dict[int, dict], other: dict[int, dict]) -> dict:
    """The row of a method. By seed: its scores, their rises, and the rises of AGAINST."""
    means = {seed: mean(by_domain.values()) for seed, by_domain in rises.items()}
    both = [means[seed] - mean(other[seed].values()) for seed in means if seed in other]
    return {
        "trained": saved(cell(name, min(means)))["trained"],
        "rise": {"runs": list(means.values()), **spread(list(means.values()))._asdict()},
        "minus": spread(both)._asdict() if both and name != AGAINST else None,
        "domains": {d: mean(by_domain[d] for by_domain in rises.values()) for d in MIX},
        "arithmetic": {
            op: mean(scores["arithmetic"][op] for scores in scored.values()) for op in OPERATORS
        },
    }


def show(found: dict) -> None:
    """Print rises with 95 % intervals, rises by domain, and shares of right equations."""
    base, rows = found["base"], found["rows"]
    if not base:
        print("the base is not scored yet")
        return
    before = base["cross_entropy"]
    print(
        f"cross-entropy on fresh text of the {len(MIX)} domains of pretraining, nats a token:\n"
        f"{mean(before.values()):.3f} before tuning on {TASK} (n: runs, brackets: 95 % interval)\n"
    )
    table = [["", "trained", "n", "rise", f"difference from {AGAINST}"]]
    for name, r in rows.items():
        up, minus = signed(r["rise"], 3), signed(r["minus"], 3)
        table.append([name, f"{r['trained']:,}", str(len(r["rise"]["runs"])), up, minus])
    print(*aligned(table, left=(0, 3, 4)), sep="\n")

    print("\nrise by domain")
    table = [["", *MIX], ["before", *(f"{before[domain]:.3f}" for domain in MIX)]]
    for name, r in rows.items():
        table.append([name, *(f"{value:+.3f}" for value in r["domains"].values())])
    print(*aligned(table), sep="\n")

    print("\nequations that are right, %")
    table = [["", *OPERATORS]]
    arithmetic = {name: r["arithmetic"] for name, r in rows.items()}
    for name, shares in {"before": base["arithmetic"], **arithmetic}.items():
        table.append([name, *(f"{100 * share:.1f}" for share in shares.values())])
    print(*aligned(table), sep="\n")


if __name__ == "__main__":
    command(main)
