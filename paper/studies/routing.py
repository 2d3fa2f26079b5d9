"""How skewed real routing is: OLMoE-1B-7B's visits on plain text, beside the embedded model's.

    python -m paper.reproduce routing                      shows docs/results/olmoe-routing.json
    python -m paper.studies.routing --counts FILE          makes that file anew

FILE: AllenAI's counts as JSON, {"olmoe.DOMAIN": {"0": {expert: visits}, "1": ..., "2": ...}}, the
keys standing for layers 0, 7 and 15. They are in their repository (allenai/OLMoE at 357454f,
scripts/routing_output/*/expert_counts, Apache 2.0), pickled, some 205,000 tokens of a domain. Kept
here is what is read off them: shares, and which experts are hot.
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
LAYERS = {"0": 0, "1": 7, "2": 15}  # their keys -> layers of OLMoE-1B-7B
DOMAINS = ("github", "arxiv", "wikipedia", "book", "tulu", "c4")
TINY = ("tiny-math", "tiny-code", "tiny-safety")
K, TOP_K = 8, 8  # hot experts of a layer; experts that a token visits
SAMPLES = (1_000, 3_000, 10_000, 30_000, 100_000)  # tokens
DRAWS = 20
NEEDED = 0.5159  # the mean hot share behind the paper's 38.7 % fewer adapter FLOPs: see flops

# ---- reading off ---------------------------------------------------------------------------------


def shares(counts: torch.Tensor) -> dict:
    """Of one layer's visits [E]: the share of the 8 most and the 8 least visited experts."""
    ordered = counts.double().sort(descending=True).values / counts.sum()
    return {"hot": round(float(ordered[:K].sum()), 4), "cold": round(float(ordered[-K:].sum()), 4)}


def stability(counts: dict[int, torch.Tensor], n_tokens: int) -> float:
    """The mean overlap of the hot experts of so many tokens with those of all of them.

    Visits are drawn independently. Those of one text are correlated, so a real sample tells less.
    """
    draw = torch.Generator().manual_seed(0)
    full, found = choose(counts, K, "hot"), []
    for _ in range(DRAWS):
        drawn = {}
        for layer, of in counts.items():
            ids = torch.multinomial(of.double(), n_tokens * TOP_K, True, generator=draw)
            drawn[layer] = torch.bincount(ids, minlength=len(of))
        found += overlap(choose(drawn, K, "hot"), full).values()
    return round(mean(found), 4)


def read_off(given: dict[str, dict[str, dict[str, int]]]) -> dict:
    """What is kept of AllenAI's counts."""
    kept, hot = {}, {}
    for domain in DOMAINS:
        of = given[f"olmoe.{domain}"]
        counts = {
            layer: torch.tensor([of[key].get(str(e), 0) for e in range(64)])
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


# ---- what it says --------------------------------------------------------------------------------


def saved_flops(share: float) -> float:
    """The part of LoRA's adapter FLOPs that HELLoRA saves on OLMoE-1B-7B, at a mean hot share."""
    cfg = BACKBONES[OLMOE].cfg
    model = shapes(cfg, "hellora", K)
    of, everywhere = (adapter_flops(model, dict.fromkeys(cfg.moe_layers, s)) for s in (share, 1.0))
    return 1 - of / everywhere


def embedded() -> dict[str, dict[str, dict]]:
    """The same shares of the embedded model, by task and layer."""
    found = {}
    for task in TINY:
        counts = json.loads((VISITS / f"{task}-1.json").read_text())["counts"]
        found[task] = {layer: shares(torch.tensor(of)) for layer, of in counts.items()}
    return found


def results() -> dict:
    """Shares of both models, what they save, overlaps of domains, and samples."""
    kept = read_json(RESULT, "what paper.studies.routing wrote")
    rows = {domain: of["layers"] for domain, of in kept["domains"].items()}
    return kept | {
        "embedded": embedded(),
        "saved": {
            domain: saved_flops(mean(layer["hot"] for layer in of.values()))
            for domain, of in rows.items()
        },
        "needed": {"share": NEEDED, "saved": saved_flops(NEEDED)},
    }


def show(found: dict) -> None:
    """Three small tables."""
    print("share of a layer's visits: the 8 most visited experts of 64, and the 8 least visited")
    print(f"\n{'OLMoE-1B-7B':13s}{'layer 0':>15s}{'layer 7':>15s}{'layer 15':>15s}"
          f"{'mean hot':>10s}{'saved':>8s}")  # fmt: skip
    for domain, of in found["domains"].items():
        parts = "".join(f"{x['hot']:9.3f} {x['cold']:5.3f}" for x in of["layers"].values())
        hot = mean(x["hot"] for x in of["layers"].values())
        print(f"{domain:13s}{parts}{hot:10.3f}{found['saved'][domain]:8.1%}")
    needed = found["needed"]
    print(f"{'the paper':58s}{needed['share']:10.3f}{needed['saved']:8.1%}")
    print(f"\n{'embedded':13s}" + "".join(f"{f'layer {i}':>15s}" for i in range(4)))
    for task, of in found["embedded"].items():
        print(f"{task:13s}" + "".join(f"{x['hot']:9.3f} {x['cold']:5.3f}" for x in of.values()))
    print("\noverlap (Jaccard) of the hot 8 of so many tokens with those of all")
    print(f"{'tokens':13s}" + "".join(f"{n:>9,}" for n in SAMPLES))
    for domain, of in found["domains"].items():
        print(f"{domain:13s}" + "".join(f"{x:9.3f}" for x in of["stability"].values()))
    print("\noverlap of the hot 8 of two domains, lowest and highest")
    for layer in LAYERS.values():
        of = [pair[str(layer)] for pair in found["overlaps"].values()]
        print(f"{f'layer {layer}':13s}{min(of):9.3f}{max(of):9.3f}")


if __name__ == "__main__":
    command(main)
