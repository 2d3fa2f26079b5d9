"""How uneven real routing is: OLMoE-1B-7B's visits on plain text, beside the embedded model's.

    python -m paper.reproduce routing                      shows docs/results/olmoe-routing.json
    python -m paper.studies.routing --counts FILE          makes that file again

FILE has AllenAI's counts as JSON: {"olmoe.DOMAIN": {"0": {expert: visits}, "1": ..., "2": ...}}.
The keys "0", "1" and "2" are layers 0, 7 and 15. AllenAI's repository has the counts as pickles,
for some 205,000 tokens of a domain. (It is allenai/OLMoE at 357454f, under Apache 2.0. The files
are scripts/routing_output/*/expert_counts.) This repository keeps only the shares and the hot
experts.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.studies.routing, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import json
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch

from catcher import choose, overlap
from hellora import adapter_flops
from paper.plan import shapes
from paper.runs.grid import ROOT
from paper.studies.tables import OLMOE
from plumbing.checkpoint import BACKBONES
from plumbing.cli import Parser, command
from plumbing.files import read_json, write_json

RESULT = ROOT / "docs" / "results" / "olmoe-routing.json"
VISITS = ROOT / "docs" / "results" / "visits"
SOURCE = "allenai/OLMoE at 357454f, scripts/routing_output/*/expert_counts (Apache 2.0)"
LAYERS = {"0": 0, "1": 7, "2": 15}  # key in the counts -> layer of OLMoE-1B-7B
DOMAINS = ("github", "arxiv", "wikipedia", "book", "tulu", "c4")
TINY = ("tiny-math", "tiny-code", "tiny-safety")
K, TOP_K = 8, 8  # hot experts of a layer, experts that a token visits
SAMPLES = (1_000, 3_000, 10_000, 30_000, 100_000)  # tokens
DRAWS = 20
NEEDED = 0.5159  # the mean hot share that gives the paper's 38.7 % fewer adapter FLOPs

# ---- from counts to shares -----------------------------------------------------------------------


def shares(counts: torch.Tensor) -> dict:
    """The shares of one layer's visits [E] that the 8 most and the 8 least visited experts get."""
    ordered = counts.double().sort(descending=True).values / counts.sum()
    return {"hot": round(float(ordered[:K].sum()), 4), "cold": round(float(ordered[-K:].sum()), 4)}


def stability(counts: dict[int, torch.Tensor], n_tokens: int) -> float:
    """The mean overlap between the hot experts of `n_tokens` tokens and those of all tokens.

    Visits are drawn independently here. Visits of a real text are correlated, so a real sample of
    this size has a lower overlap.
    """
    draw = torch.Generator().manual_seed(0)
    full, overlaps = choose(counts, K, "hot"), []
    for _ in range(DRAWS):
        drawn = {}
        for layer, visits in counts.items():
            ids = torch.multinomial(visits.double(), n_tokens * TOP_K, True, generator=draw)
            drawn[layer] = torch.bincount(ids, minlength=len(visits))
        overlaps += overlap(choose(drawn, K, "hot"), full).values()
    return round(mean(overlaps), 4)


def read_off(given: dict[str, dict[str, dict[str, int]]]) -> dict:
    """The part of AllenAI's counts that is kept."""
    kept, hot = {}, {}
    for domain in DOMAINS:
        by_key = given[f"olmoe.{domain}"]
        counts = {
            layer: torch.tensor([by_key[key].get(str(e), 0) for e in range(64)])
            for key, layer in LAYERS.items()
        }
        hot[domain] = choose(counts, K, "hot")
        kept[domain] = {
            "n_tokens": int(counts[0].sum()) // TOP_K,
            "layers": {str(layer): shares(c) for layer, c in counts.items()},
            "stability": {str(n): stability(counts, n) for n in SAMPLES},
        }
    pairs = {
        f"{a}, {b}": {str(layer): round(x, 3) for layer, x in overlap(hot[a], hot[b]).items()}
        for a, b in combinations(DOMAINS, 2)
    }
    return {"source": SOURCE, "domains": kept, "overlaps": pairs}


def main() -> None:
    """Make the file."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--counts", type=Path, required=True, metavar="FILE", help="as described above")
    args = p.parse_args()
    write_json(RESULT, read_off(read_json(args.counts, "AllenAI's counts as JSON")))
    print(RESULT.relative_to(ROOT))


# ---- the results ---------------------------------------------------------------------------------


def saved_flops(share: float) -> float:
    """The share of LoRA's adapter FLOPs that HELLoRA saves on OLMoE-1B-7B, at a mean hot share."""
    cfg = BACKBONES[OLMOE].cfg
    model = shapes(cfg, "hellora", K)
    ours, full = (adapter_flops(model, dict.fromkeys(cfg.moe_layers, s)) for s in (share, 1.0))
    return 1 - ours / full


def embedded() -> dict[str, dict[str, dict]]:
    """The same shares for the embedded model, by task and layer."""
    tasks = {}
    for task in TINY:
        counts = json.loads((VISITS / f"{task}-1.json").read_text())["counts"]
        tasks[task] = {layer: shares(torch.tensor(visits)) for layer, visits in counts.items()}
    return tasks


def results() -> dict:
    """Shares of both models, the FLOPs that they save, overlaps of domains, and samples."""
    kept = read_json(RESULT, "the output of paper.studies.routing")
    rows = {domain: entry["layers"] for domain, entry in kept["domains"].items()}
    return kept | {
        "embedded": embedded(),
        "saved": {
            domain: saved_flops(mean(layer["hot"] for layer in layers.values()))
            for domain, layers in rows.items()
        },
        "needed": {"share": NEEDED, "saved": saved_flops(NEEDED)},
    }


def show(found: dict) -> None:
    """Print four small tables."""
    print("share of a layer's visits: the 8 most visited experts of 64, and the 8 least visited")
    print(f"\n{'OLMoE-1B-7B':13s}{'layer 0':>15s}{'layer 7':>15s}{'layer 15':>15s}"
          f"{'mean hot':>10s}{'saved':>8s}")  # fmt: skip
    for domain, entry in found["domains"].items():
        parts = "".join(f"{x['hot']:9.3f} {x['cold']:5.3f}" for x in entry["layers"].values())
        hot = mean(x["hot"] for x in entry["layers"].values())
        print(f"{domain:13s}{parts}{hot:10.3f}{found['saved'][domain]:8.1%}")
    needed = found["needed"]
    print(f"{'the paper':58s}{needed['share']:10.3f}{needed['saved']:8.1%}")
    print(f"\n{'embedded':13s}" + "".join(f"{f'layer {i}':>15s}" for i in range(4)))
    for task, layers in found["embedded"].items():
        print(f"{task:13s}" + "".join(f"{x['hot']:9.3f} {x['cold']:5.3f}" for x in layers.values()))
    print("\noverlap (Jaccard) of the hot 8 of so many tokens with the hot 8 of all tokens")
    print(f"{'tokens':13s}" + "".join(f"{n:>9,}" for n in SAMPLES))
    for domain, entry in found["domains"].items():
        print(f"{domain:13s}" + "".join(f"{x:9.3f}" for x in entry["stability"].values()))
    print("\noverlap of the hot 8 of two domains, lowest and highest")
    for layer in LAYERS.values():
        overlaps = [pair[str(layer)] for pair in found["overlaps"].values()]
        print(f"{f'layer {layer}':13s}{min(overlaps):9.3f}{max(overlaps):9.3f}")


if __name__ == "__main__":
    command(main)
