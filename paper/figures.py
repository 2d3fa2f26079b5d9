"""Figures of the embedded model from the committed results: docs/figures/NAME.png and NAME.svg.

    python -m paper.figures                        all of them
    python -m paper.figures --only losses jaccard     these two
    python -m paper.figures --out drafts           in another folder

It measures nothing. The same results give the same bytes of SVG. What made them:
    docs/results/visits/TASK-SHARE.json   python catcher.py --task TASK --share SHARE
                                          --batch-size 50 --out that file
    docs/results/cells/                   python -m paper.reproduce methods
    docs/results/bench-*.json             python -m paper.bench --json that file
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.figures, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
from collections.abc import Callable
from itertools import combinations
from math import sqrt
from pathlib import Path
from statistics import mean
from types import ModuleType

import torch

from catcher import overlap, visited_share
from paper.bench.report import REGIMES
from paper.runs.grid import LAST_STEPS, missing_tasks, saved
from paper.runs.parallel import ROOT
from paper.runs.rates import CONTROLS, DEV, MAIN, RATES, TASK, cell, tried
from paper.studies import comparison, placement
from plumbing.cli import Parser, command
from plumbing.files import read_json

RESULTS, OUT = ROOT / "docs" / "results", ROOT / "docs" / "figures"
HOT = ("hellora", "hellori-d", "hellori-s")
MOST_SEEDS = 5
TASKS = tuple(comparison.OURS.values())
Figure = object  # matplotlib's, which is an optional package

# Okabe and Ito: told apart by all eyes.
BLUE, ORANGE, GREEN, GREY = ("#0072B2", "#E69F00", "#009E73", "#999999")
MARKERS = {BLUE: "o", ORANGE: "s", GREEN: "^"}  # and without any colour
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "legend.frameon": False, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.markersize": 5,
    "figure.dpi": 150, "figure.constrained_layout.use": True, "image.cmap": "cividis",
    "svg.hashsalt": "hellora", "svg.fonttype": "path",
}  # fmt: skip


def pyplot() -> ModuleType:
    """matplotlib's, in our style. Raises ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install -r requirements-dev.txt") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    return pyplot


# ---- results -------------------------------------------------------------------------------------


def visits(task: str, share: str = "1") -> tuple[dict[int, torch.Tensor], dict[int, list[int]]]:
    """Of a task, or of a share of it: {layer: visits [E]} and {layer: hot experts}."""
    kept = read_json(RESULTS / "visits" / f"{task}-{share}.json", "what catcher.py --out writes")
    counts = {int(layer): torch.tensor(of) for layer, of in kept["counts"].items()}
    return counts, {int(layer): ids for layer, ids in kept["experts"].items()}


def cells() -> dict[str, list[dict]]:
    """{method: its finished runs at its chosen rate}, of methods whose rates were all tried."""
    found = {}
    for method in RATES:
        if not any(missing_tasks(run, [DEV]) for run in tried(method)):
            runs = [cell(method, seed) for seed in range(MOST_SEEDS)]
            found[method] = [saved(run) for run in runs if not missing_tasks(run, [TASK])]
    if not any(found.values()):
        raise FileNotFoundError(
            "no method's runs are finished: python -m paper.reproduce methods makes them"
        )
    return {method: runs for method, runs in found.items() if runs}


def benches() -> dict[str, dict]:
    """{shape: the rows of a benchmark}."""
    paths = sorted(RESULTS.glob("bench-*.json"))
    if not paths:
        raise FileNotFoundError(
            "docs/results/bench-*.json is missing: python -m paper.bench --json makes it"
        )
    return {
        path.stem.removeprefix("bench-"): read_json(path, "a benchmark")["rows"] for path in paths
    }


# ---- figures -------------------------------------------------------------------------------------


def activation(plt: ModuleType) -> Figure:
    """Share of visits of each layer's experts, the most visited first."""
    counts, hot = visits(TASK)
    fig, axes = plt.subplots(1, len(counts), figsize=(7.2, 1.9), sharey=True)
    for ax, (layer, share) in zip(axes, visited_share(counts, hot).items(), strict=True):
        percent = (100 * counts[layer] / counts[layer].sum()).sort(descending=True).values.tolist()
        k = len(hot[layer])
        ax.bar(range(k), percent[:k], width=1, color=BLUE)
        ax.bar(range(k, len(percent)), percent[k:], width=1, color=GREY)
        ax.axhline(100 / len(percent), color="black", linewidth=0.8, linestyle="--")
        ax.set(title=f"layer {layer}: hot {k} get {share:.0%}", xlabel="expert, by rank")
    axes[0].set_ylabel("visits, %")
    axes[-1].annotate(
        "uniform", (len(percent), 100 / len(percent)), ha="right", va="bottom", fontsize=8
    )
    return fig


def hot_experts(plt: ModuleType) -> Figure:
    """Layer x expert: the share of visits, and the hot experts of each task."""
    fig, axes = plt.subplots(len(TASKS), 1, figsize=(7.2, 3.6), sharex=True)
    for ax, task in zip(axes, TASKS, strict=True):
        counts, hot = visits(task)
        percent = [(100 * c / c.sum()).tolist() for c in counts.values()]
        image = ax.imshow(percent, aspect="auto", vmin=0, vmax=8, interpolation="nearest")
        layers, experts = zip(*((layer, e) for layer, ids in hot.items() for e in ids), strict=True)
        ax.plot(
            experts,
            layers,
            "o",
            markersize=3,
            color="white",
            markeredgecolor="black",
            markeredgewidth=0.6,
        )
        ax.set(title=task, ylabel="layer", yticks=list(counts))
        ax.grid(False)
    axes[-1].set_xlabel("expert; a dot marks the hot 8 of its layer")
    fig.colorbar(image, ax=axes, label="visits, %", extend="max", pad=0.01)
    return fig


def jaccard(plt: ModuleType) -> Figure:
    """What hot lists have in common, by layer: of two tasks; of a tenth of a task and all of it."""
    hot = {(task, share): visits(task, share)[1] for task in TASKS for share in ("0.1", "1")}
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.4), sharey=True)
    short = {task: task.removeprefix("tiny-") for task in TASKS}
    pairs = (
        {
            f"{short[a]} and {short[b]}": overlap(hot[a, "1"], hot[b, "1"])
            for a, b in combinations(TASKS, 2)
        },
        {short[task]: overlap(hot[task, "0.1"], hot[task, "1"]) for task in TASKS},
    )
    for ax, title, lines in zip(
        axes, ("two tasks", "10 % of a task's data, and all"), pairs, strict=True
    ):
        for i, ((name, of), (color, marker)) in enumerate(
            zip(lines.items(), MARKERS.items(), strict=True)
        ):
            at = [layer + 0.08 * (i - 1) for layer in of]  # side by side where they are equal
            ax.plot(at, list(of.values()), marker=marker, color=color, label=name, linewidth=1)
        ax.set(title=title, xlabel="layer", xticks=list(of), ylim=(-0.03, 1.05))
        ax.legend(loc="best")
    axes[0].set_ylabel("Jaccard of the hot 8")
    return fig


def accuracy(plt: ModuleType) -> Figure:
    """Test accuracy against trained parameters, and of HELLoRA's controls.

    Each seed is a dot, with their mean.

    The bars are the standard error of a mean over that many problems, the same for each seed.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.0), width_ratios=(1.3, 1))
    found = cells()
    score = {method: [r["accuracy"][TASK] for r in runs] for method, runs in found.items()}
    at = {method: 100 * mean(values) for method, values in score.items()}
    error = {
        m: sqrt(at[m] * (100 - at[m]) / runs[0]["problems"][TASK]) for m, runs in found.items()
    }
    for i, method in enumerate(
        sorted(found.keys() & set(MAIN), key=lambda m: (found[m][0]["trained"], m))
    ):
        trained, color = found[method][0]["trained"], BLUE if method in HOT else ORANGE
        left.errorbar(
            trained, at[method], error[method], marker=MARKERS[color], color=color, linewidth=1
        )
        left.plot(
            [trained] * len(score[method]),
            [100 * v for v in score[method]],
            ".",
            color="black",
            markersize=2,
        )
        up = (1, -1)[i % 2]  # names over and under the bars in turns, as neighbours are near
        place = {"xytext": (0, 3 * up), "ha": "center", "va": ("bottom", "top")[i % 2]}
        end = (trained, at[method] + up * error[method])
        left.annotate(method, end, textcoords="offset points", fontsize=8, **place)
    left.set(xscale="log", xlabel="trained parameters", ylabel="test accuracy, %", title="methods")
    left.margins(0.2, 0.1)
    controls = [m for m in ("hellora", *CONTROLS) if m in found][::-1]
    for y, method in enumerate(controls):
        right.errorbar(at[method], y, xerr=error[method], marker="o", color=BLUE, linewidth=1)
        right.plot(
            [100 * v for v in score[method]],
            [y] * len(score[method]),
            ".",
            color="black",
            markersize=2,
        )
    right.set(yticks=range(len(controls)), yticklabels=controls, xlim=(-4, 104),
              xlabel="test accuracy, %",
              title="HELLoRA and its controls")  # fmt: skip
    right.grid(axis="x")
    return fig


def throughput(plt: ModuleType) -> Figure:
    """LoRA on all and on hot experts, multiplied in each way: samples a second, operations."""
    found = benches()
    fig, axes = plt.subplots(len(found), 2, figsize=(7.2, 2.4 * len(found)), squeeze=False)
    for pair, (shape, rows) in zip(axes, found.items(), strict=True):
        for ax, field in zip(pair, ("samples_per_s", "operations_a_layer"), strict=True):
            for x, names in enumerate(REGIMES.values()):
                for name, color, side in zip(names, (ORANGE, BLUE), (-0.2, 0.2), strict=True):
                    ax.bar(x + side, rows.get(name, {}).get(field) or 0, width=0.36, color=color)
            ax.set(
                xticks=range(len(REGIMES)),
                xticklabels=[name.replace(" + ", "\n+ ") for name in REGIMES],
                title=f"{shape.replace('-', ' ')}: {field.replace('_', ' ')}",
            )
    bars = axes[0][0].containers[:2]
    fig.legend(bars, ("LoRA on all experts", "on hot experts"), loc="outside lower center", ncols=2)
    return fig


def losses(plt: ModuleType) -> Figure:
    """Training loss, a mean for ten steps, of each seed."""
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)
    sides = {
        "all experts, or the hot 8": ("fft", "lora", "hellora"),
        "experts alone": ("hellora_pure", "hellora_pure_r", "hellora_pure_c"),
    }
    found = cells()
    for ax, (title, methods) in zip(axes, sides.items(), strict=True):
        for method, color in zip(methods, MARKERS, strict=True):
            for i, run in enumerate(found.get(method, [])):
                steps = [LAST_STEPS * (n + 1) for n in range(len(run["losses"]))]
                ax.plot(
                    steps, run["losses"], color=color, linewidth=0.8, label=None if i else method
                )
        ax.set(title=title, xlabel="step", yscale="log")
        ax.legend()
    axes[0].set_ylabel("training loss")
    return fig


def forest(plt: ModuleType) -> Figure:
    """Hot experts against each other choice: log ratios of held-out loss, by regime."""
    found = placement.results()
    if not found["rows"]:
        raise FileNotFoundError("no run of the placement study is finished")
    titles = {
        "A": "with attention and router",
        "P": "experts alone",
        "O": "few rows, many epochs",
    }
    arms = [arm for arm in placement.ORDER if any(r["arm"] == arm for r in found["rows"])]
    fig, axes = plt.subplots(1, len(titles), figsize=(7.2, 2.8), sharey=True)
    for ax, (regime, title) in zip(axes, titles.items(), strict=True):
        ax.axvspan(-found["margin"], found["margin"], color=GREY, alpha=0.2, linewidth=0)
        ax.axvline(0, color="black", linewidth=0.8)
        if effect := found["effect"][regime]:
            ax.axvline(effect["log_ratio"], color=GREEN, linewidth=1, linestyle="--")
        for bases, color, shift in ((placement.ONE, BLUE, 0.12), (placement.MANY, ORANGE, -0.12)):
            rows = [
                r
                for r in found["rows"]
                if (r["regime"], r["bases"], r["problems"]) == (regime, bases, "plain")
            ]
            for i, r in enumerate(rows):
                at = len(arms) - 1 - arms.index(r["arm"]) + shift
                ax.plot([r["low"], r["high"]], [at, at], color=color, linewidth=1.2)
                ax.plot(r["mean"], at, MARKERS[color], color=color, label=None if i else bases)
        ax.set(title=f"{regime}: {title}", xlabel="log(loss / loss of hot)")
        ax.set_yticks(range(len(arms)), arms[::-1])
        ax.set_xscale("symlog", linthresh=0.2)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2)
    return fig


FIGURES: dict[str, Callable[[ModuleType], Figure]] = {
    "activation": activation,  # Figure 1 of the paper
    "jaccard": jaccard,  # 3
    "hot-experts": hot_experts,  # 4 and 6
    "throughput": throughput,  # 5
    "accuracy": accuracy,
    "losses": losses,
    "placement": forest,
}


def draw(name: str, folder: Path) -> None:
    """Write NAME.svg and NAME.png, without anything of the day or the machine."""
    plt = pyplot()
    fig = FIGURES[name](plt)
    for kind, metadata in (("svg", {"Date": None}), ("png", {})):
        fig.savefig(folder / f"{name}.{kind}", metadata=metadata)
    plt.close(fig)


def main() -> None:
    """Draw what there are results for."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--only",
        nargs="+",
        choices=FIGURES,
        default=list(FIGURES),
        metavar="NAME",
        help=f"of {', '.join(FIGURES)}",
    )
    p.add_argument("--out", type=Path, default=OUT, help="folder (default docs/figures)")
    args = p.parse_args()
    pyplot()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        try:
            draw(name, args.out)
        except FileNotFoundError as error:
            print(f"{name} is not drawn: {error}")
        else:
            print(args.out / f"{name}.svg")


if __name__ == "__main__":
    command(main)
