"""Figures of the embedded model from the committed results: docs/figures/NAME.png and NAME.svg.

    python -m paper.figures                        all of them
    python -m paper.figures --only losses jaccard     these two
    python -m paper.figures --out drafts           in another folder

It measures nothing. The same results give the same bytes of SVG. What made them:
    docs/results/visits/TASK-SHARE.json   python catcher.py --task TASK --share SHARE
                                          --batch-size 50 --out that file
    docs/results/cells/                   python -m paper.reproduce methods
    docs/results/bench-*.json             python -m paper.bench --json that file
    docs/results/placement/               python -m paper.reproduce placement

Each is dark text on a white card, in one file, and so reads alike on a light and on a dark page. A
transparent one would need greys that are weak on both pages, and two versions two files of each.
It is 6.5 inches wide, with letters that can still be read at the width of a phone. A colour means
the same choice of experts in every figure, and a marker or a word says it again.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.figures, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
from collections.abc import Callable
from itertools import combinations
from math import comb, exp, log
from pathlib import Path
from statistics import geometric_mean, median
from types import ModuleType

import torch

from catcher import overlap, visited_share
from paper.bench.report import REGIMES, SAMPLE
from paper.runs.grid import LAST_STEPS, missing_tasks, saved
from paper.runs.parallel import ROOT
from paper.runs.rates import DEV, RATES, TASK, cell, tried
from paper.runs.stats import spread
from paper.studies import comparison, placement
from plumbing.cli import Parser, command
from plumbing.files import read_json

RESULTS, OUT = ROOT / "docs" / "results", ROOT / "docs" / "figures"
MOST_SEEDS = 5
TASKS = tuple(comparison.OURS.values())
Figure = object  # matplotlib's, which is an optional package

# By Okabe and Ito, told apart by all eyes. What is trained -> its colour, the same in all figures.
COLORS = {
    "hot": "#0072B2", "cold": "#56B4E9", "random": "#E69F00", "model-level": "#009E73",
    "none": "#7F7F7F", "all": "#D55E00", "answers": "#B65C93", "fft": "#000000",
}  # fmt: skip
WIDTH = 6.5  # inches
INK, PALE, BAND = "#1F2328", "#C4C8CC", "#E6E8EB"  # of text; of what is beside the point; of ranges
SMALL = 9.5  # points
STYLE = {
    "font.size": 11, "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 10,
    "xtick.labelsize": 10, "ytick.labelsize": 10, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.markersize": 6,
    "figure.dpi": 200, "figure.constrained_layout.use": True, "image.cmap": "cividis",
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08,
    "figure.facecolor": "white", "savefig.facecolor": "white", "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
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
        if not any(missing_tasks(run, [DEV[TASK]]) for run in tried(method)):
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

ALONE = "experts alone"
TASK_WORDS = {"tiny-math": "word problems", "tiny-code": "code", "tiny-safety": "safety"}
METHODS = {  # method -> its name, what is trained, its marker
    "fft": ("full fine-tuning", "fft", "D"),
    "lora": ("LoRA", "all", "o"),
    "dora": ("DoRA", "all", "s"),
    "lori-d": ("LoRI-D", "all", "^"),
    "lori-s": ("LoRI-S", "all", "v"),
    "hellora": ("HELLoRA", "hot", "o"),
    "hellori-d": ("HELLoRI-D", "hot", "^"),
    "hellori-s": ("HELLoRI-S", "hot", "v"),
}
CHOICES = {  # of experts: in words, by the suffix of a method
    "hot": ("the 8 hot experts", ""),
    "cold": ("the 8 cold ones", "_c"),
    "random": ("8 random ones", "_r"),
    "model-level": ("the model's 8 hot ones", "_m"),
    "none": ("no expert", "_none"),
}


def activation(plt: ModuleType) -> Figure:
    """Share of visits of each layer's experts, the most visited first."""
    counts, hot = visits(TASK)
    fig, axes = plt.subplots(
        -(-len(counts) // 2), 2, figsize=(WIDTH, 3.9), sharex=True, sharey=True
    )
    for ax, (layer, share) in zip(axes.flat, visited_share(counts, hot).items(), strict=True):
        percent = (100 * counts[layer] / counts[layer].sum()).sort(descending=True).values.tolist()
        k, n = len(hot[layer]), len(percent)
        ranks = range(1, n + 1)
        ax.bar(ranks[:k], percent[:k], width=1, color=COLORS["hot"], label=f"the {k} hot experts")
        ax.bar(ranks[k:], percent[k:], width=1, color=PALE, label=f"the other {n - k}")
        ax.axhline(100 / n, color=INK, linewidth=1, linestyle="--", label="if all were equal")
        ax.set(
            title=f"layer {layer}: hot ones get {100 * share:.0f} %",
            xticks=[1, *range(16, n + 1, 16)],
        )
    for ax in axes[-1]:
        ax.set_xlabel("expert, by rank")
    for ax in axes[:, 0]:
        ax.set_ylabel("visits, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: "if" in labels[i])  # bars first
    fig.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=3,
        columnspacing=1.2,
    )
    return fig


def hot_experts(plt: ModuleType) -> Figure:
    """Layer x expert: the share of visits, and the hot experts of each task."""
    fig, axes = plt.subplots(len(TASKS), 1, figsize=(WIDTH, 5.0), sharex=True)
    for ax, task in zip(axes, TASKS, strict=True):
        counts, hot = visits(task)
        percent = [(100 * c / c.sum()).tolist() for c in counts.values()]
        image = ax.imshow(percent, aspect="auto", vmin=0, vmax=8, interpolation="nearest")
        layers, experts = zip(*((layer, e) for layer, ids in hot.items() for e in ids), strict=True)
        marks = {"color": "white", "markeredgecolor": "black", "markeredgewidth": 0.8}
        dots = ax.plot(experts, layers, "o", markersize=4.5, **marks)
        ax.set(title=TASK_WORDS[task], ylabel="layer", yticks=list(counts))
        ax.grid(False)
    axes[-1].set_xlabel("expert")
    fig.colorbar(image, ax=axes, label="visits, % of a layer's", extend="max", pad=0.01, aspect=35)
    k = len(next(iter(hot.values())))
    fig.legend(dots, [f"one of the {k} hot experts of its layer"], loc="outside lower center")
    return fig


def jaccard(plt: ModuleType) -> Figure:
    """What hot lists have in common, by layer: of two tasks; of a tenth of a task and all of it.

    Colours mean choices of experts, so that these lines are told apart by marker and dash.
    """
    hot = {(task, share): visits(task, share)[1] for task in TASKS for share in ("0.1", "1")}
    counts, lists = visits(TASK)
    fig, ax = plt.subplots(figsize=(WIDTH, 3.6))
    tenths = [overlap(hot[task, "0.1"], hot[task, "1"]) for task in TASKS]
    layers = list(tenths[0])
    least, most = ([end(of[layer] for of in tenths) for layer in layers] for end in (min, max))
    name = "a tenth of a task's data and all (3 tasks)"
    ax.fill_between(layers, least, most, color=PALE, linewidth=4, label=name)
    marks = (("o", "-", "#000000"), ("s", "--", "#555555"), ("^", ":", "#888888"))
    for (a, b), (marker, line, color) in zip(combinations(TASKS, 2), marks, strict=True):
        of = list(overlap(hot[a, "1"], hot[b, "1"]).values())
        name = f"{TASK_WORDS[a]} and {TASK_WORDS[b]}"
        ax.plot(layers, of, line, marker=marker, color=color, label=name, linewidth=1.6)
    k, n = len(lists[layers[0]]), len(counts[layers[0]])
    chance = sum(
        comb(k, both) * comb(n - k, k - both) / comb(n, k) * both / (2 * k - both)
        for both in range(k + 1)
    )
    name = f"two random lists, {k} of {n}: {chance:.2f}"
    ax.axhline(chance, color=COLORS["random"], linewidth=1.2, label=name)
    ax.set(
        xlabel="layer", xticks=layers, ylim=(-0.03, 1.05), ylabel="overlap of hot lists\n(Jaccard)"
    )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def dots(ax: object, rows: list[tuple[str, list[float], str, str]]) -> None:
    """A line for each (name, accuracies, colour, marker): mean and its interval; all as dots."""
    for y, (_, values, color, marker) in enumerate(reversed(rows)):
        percent = [100 * v for v in values]
        of = spread(percent)
        if of.low is not None:
            ax.plot([max(0, of.low), min(100, of.high)], [y, y], color=color, linewidth=2)
        ax.plot(percent, [y] * len(percent), "|", color=INK, markersize=7, markeredgewidth=0.9)
        ax.plot(of.mean, y, marker, color=color, markersize=7, markeredgecolor="white")
    ax.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.grid(axis="x")


def accuracy(plt: ModuleType) -> Figure:
    """Test accuracy of the methods, and of HELLoRA with other choices of experts."""
    found = cells()
    score = {method: [r["accuracy"][TASK] for r in runs] for method, runs in found.items()}
    main = sorted(found.keys() & METHODS.keys(), key=lambda m: (-found[m][0]["trained"], m))
    methods = [
        (
            f"{METHODS[m][0]}: {found[m][0]['trained']:,}",
            score[m],
            COLORS[METHODS[m][1]],
            METHODS[m][2],
        )
        for m in main
    ]
    panels = {"methods, and how many numbers each trains": methods}
    for title, stem, everything in (
        ("HELLoRA: attention, router, and ...", "hellora", "all 64 experts (LoRA)"),
        (f"{ALONE}: neither attention nor router", "hellora_pure", None),
    ):
        panels[title] = [
            (words, score[stem + suffix], COLORS[choice], "o")
            for choice, (words, suffix) in CHOICES.items()
            if stem + suffix in score
        ]
        if everything and "lora" in score:
            panels[title].append((everything, score["lora"], COLORS["all"], "o"))
    panels = {title: rows for title, rows in panels.items() if rows}
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(WIDTH, 0.3 * sum(map(len, panels.values())) + 2.2),
        height_ratios=[len(rows) for rows in panels.values()], squeeze=False,
    )  # fmt: skip
    for ax, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        dots(ax, rows)
        ax.set_title(title)
    alone = axes[-1, 0]
    alone.set_xlabel("accuracy on test problems, %")
    ends = [ax.get_xlim() for ax in axes.flat[:-1]]
    for ax in axes.flat[:-1]:
        ax.set_xlim(min(low for low, _ in ends), max(high for _, high in ends))
    handles = [
        alone.plot([], [], "o", color=INK, markersize=7)[0],
        alone.plot([], [], color=INK, linewidth=2)[0],
        alone.plot([], [], "|", color=INK, markersize=7)[0],
    ]
    names = ["mean", "its 95 % interval", "one seed"]
    fig.legend(handles, names, loc="outside lower center", ncols=3)
    return fig


def throughput(plt: ModuleType) -> Figure:
    """LoRA on all and on hot experts, multiplied in each way: samples a second, operations."""
    found = benches()
    ways = {
        "grouped": "one grouped product\n(the default here)",
        "loop": "a loop over experts",
        "transformers 4 + PEFT": "transformers 4\nand PEFT",
    }
    samples = f"samples of {SAMPLE} tokens, a second"
    panels = [
        (f"{shape.replace('-', ', ', 1).replace('-', ' ')}: {samples}", "samples_per_s", rows)
        for shape, rows in found.items()
    ]
    # how many operations there are hardly depends on the number of tokens
    panels.append(("operations a layer, forward and backward", "operations_a_layer", panels[0][2]))
    fig, axes = plt.subplots(len(panels), 1, figsize=(WIDTH, 1.7 * len(panels) + 0.4))
    for ax, (title, field, rows) in zip(axes, panels, strict=True):
        for y, names in enumerate(reversed(REGIMES.values())):
            for name, choice, side in zip(names, ("all", "hot"), (0.19, -0.19), strict=True):
                row = rows.get(name, {})
                bar = ax.barh(y + side, row.get(field) or 0, height=0.36, color=COLORS[choice])
                bar.set_label({"all": "LoRA on all experts", "hot": "HELLoRA: on hot ones"}[choice])
                if field == "samples_per_s" and row.get("seconds"):
                    rates = [row[field] * median(row["seconds"]) / s for s in row["seconds"]]
                    ends = [min(rates), max(rates)]
                    line = ax.plot(ends, [y + side] * 2, color=INK, linewidth=1.2)
        ax.set_yticks(range(len(REGIMES)), [ways.get(name, name) for name in reversed(REGIMES)])
        ax.set_title(title)
        ax.grid(axis="x")
        ax.grid(axis="y", visible=False)
    bars = axes[0].containers[:2]
    handles, labels = [*bars, *line], [*(b.get_label() for b in bars), "slowest to fastest round"]
    fig.legend(
        handles, labels, loc="outside lower center", ncols=3, columnspacing=1.0, handlelength=1.4
    )
    return fig


def losses(plt: ModuleType) -> Figure:
    """Training loss, a mean for ten steps: the mean over seeds, and their range."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True)
    sides = {
        "with attention and router": {
            "fft": ("full fine-tuning", "fft", ":"),
            "lora": ("all experts (LoRA)", "all", "--"),
            "hellora": ("hot experts (HELLoRA)", "hot", "-"),
        },
        ALONE: {
            "hellora_pure_c": ("cold", "cold", ":"),
            "hellora_pure_r": ("random", "random", "--"),
            "hellora_pure": ("hot", "hot", "-"),
        },
    }
    found = cells()
    for ax, (title, methods) in zip(axes, sides.items(), strict=True):
        for method, (words, choice, line) in methods.items():
            runs = [run["losses"] for run in found.get(method, [])]
            if not runs:
                continue
            by_step = list(zip(*runs, strict=True))
            steps = [LAST_STEPS * (n + 1) for n in range(len(by_step))]
            color = COLORS[choice]
            low, high = ([end(of) for of in by_step] for end in (min, max))
            ax.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            middle = [geometric_mean(of) for of in by_step]
            ax.plot(
                steps, middle, line, color=color, linewidth=1.8, label=f"{words}, {len(runs)} seeds"
            )
        ax.set(title=title, xlabel="step", yscale="log")
        if ax.lines:
            ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2))
    axes[0].set_ylabel("training loss, nats a token\n(line: mean of seeds; band: all)")
    return fig


FOREST = {  # an arm of the placement study, in words; * a secondary one
    "cold": "cold", "random": "random", "none": "none", "all": "all (LoRA)",
    "model-level": "model-level *", "answers": "answer tokens *",
}  # fmt: skip
SAID = {  # a verdict, in words
    "holds": "hot is better", "fails": "hot is worse", "equivalent": "equal within 10 %",
    "holds unadjusted": "better, unadjusted", "fails unadjusted": "worse, unadjusted",
    "undecided": "undecided",
}  # fmt: skip
MINUS = "\N{MINUS SIGN}"
DAGGER = " \N{DAGGER}"  # the bootstrap disagrees with a verdict
FAR = log(2)  # an interval that reaches further is given in words
MARKS = {placement.ONE: ("o", 0.2), placement.MANY: ("D", -0.2)}  # marker, height in its row


def forest(plt: ModuleType) -> Figure:
    """Hot experts against each other choice: held-out loss, by regime.

    A comparison without runs is said to have none.
    """
    found = placement.results()
    if not found["rows"]:
        raise FileNotFoundError("no run of the placement study is finished")
    rows = {
        (r["regime"], r["arm"], r["bases"]): r for r in found["rows"] if r["problems"] == "plain"
    }
    arms = {
        name: [arm for arm in FOREST if arm in of.arms]
        for name, of in placement.REGIMES.items()
        if any(regime == name for regime, _, _ in rows)
    }
    lines = [len(of) for of in arms.values()]
    fig, axes = plt.subplots(
        len(arms), 1, figsize=(WIDTH, 0.32 * sum(lines) + 0.4 * len(arms) + 1.9),
        sharex=True, squeeze=False, height_ratios=[n + 0.2 for n in lines],
    )  # fmt: skip
    effects = [of["log_ratio"] for of in found["effect"].values() if of]
    near = [x for r in rows.values() if not is_far(r) for x in (r["low"], r["high"])]
    ends = [-2 * found["margin"], 2 * found["margin"], *near, *effects]
    low, high = min(ends) - 0.02, max(ends) + 0.02
    for ax, (regime, of) in zip(axes.flat, arms.items(), strict=True):
        ax.axvspan(-found["margin"], found["margin"], color=BAND, linewidth=0)
        ax.axvline(0, color=INK, linewidth=1)
        if effect := found["effect"][regime]:
            ax.axvline(effect["log_ratio"], color=INK, linewidth=1.2, linestyle=":")
        for y, arm in enumerate(reversed(of)):
            done = [rows[regime, arm, bases] for bases in MARKS if (regime, arm, bases) in rows]
            for r in done:
                at = y + (MARKS[r["bases"]][1] if len(done) > 1 else 0)
                interval(ax, r, at, low, high)
            if not done:
                words = {"ha": "left", "va": "center", "style": "italic", "fontsize": SMALL}
                ax.text(high + 0.02 * (high - low), y, "no runs yet", **words)
        ax.set_yticks(range(len(of)), [FOREST[arm] for arm in reversed(of)])
        ax.set_ylim(-0.6, len(of) - 0.4)
        ax.grid(visible=False)
        ax.set_title(title(regime), fontweight="bold")
    ax.set_xlim(low, high)
    inside = percents(low, high)
    marked = any(r["bootstrap_disagrees"] for r in rows.values())
    ax.set_xticks(
        [log(1 + p / 100) for p in inside],
        [f"{p:+d} %".replace("-", MINUS) if p else "0" for p in inside],
    )
    ax.set_xlabel(
        "held-out loss with another choice, compared with hot experts\n"
        "left: the other choice is better; right: hot is better\n"
        "* secondary: not corrected for the number of tests"
        + (f"\n{DAGGER.strip()} the bootstrap disagrees" if marked else ""),
    )
    shapes = {placement.ONE: INK, placement.MANY: "white"}
    names = {
        placement.ONE: "one base, 95 % interval over seeds",
        placement.MANY: "several bases, over their means",
    }
    shown = [bases for bases in MARKS if any(r["bases"] == bases for r in rows.values())]
    handles = [
        ax.plot([], [], MARKS[bases][0], color=INK, markerfacecolor=shapes[bases])[0]
        for bases in shown
    ]
    labels = [*(names[bases] for bases in shown), "a difference of less than 10 %"]
    handles.append(ax.axvspan(0, 0, color=BAND))
    if effects:
        handles.append(ax.plot([], [], ":", color=INK)[0])
        labels.append(f"the paper's hot {MINUS} cold, on this scale")
    fig.legend(handles, labels, loc="outside lower center", ncols=2, columnspacing=1.2)
    return fig


def percents(low: float, high: float) -> list[int]:
    """Those differences of losses that have room beside each other as ticks, 10 % before others."""
    kept = [0]
    for percent in (10, -10, 25, -25, 50, -50, 100):
        at = log(1 + percent / 100)
        room = [0.19 if other else 0.12 for other in kept]  # of the width: "0" is a short label
        gaps = [abs(at - log(1 + other / 100)) / (high - low) for other in kept]
        if low <= at <= high and all(gap > need for gap, need in zip(gaps, room, strict=True)):
            kept.append(percent)
    return kept


def title(regime: str) -> str:
    """What is trained in a regime of the placement study, and on how many rows."""
    of = placement.REGIMES[regime]
    what = "attention, router, experts" if "none" in of.arms else ALONE
    return f"{regime}: {what} ({of.n_rows} rows, {of.epochs} epochs)"


def is_far(row: dict) -> bool:
    """Whether an interval reaches so far that the others would be too small to see beside it."""
    return row["high"] > FAR or row["low"] < -FAR


def interval(ax: object, row: dict, at: float, low: float, high: float) -> None:
    """A comparison at height `at`, and what is said of it."""
    many, color = row["bases"] == placement.MANY, COLORS[row["arm"]]
    marker, _ = MARKS[row["bases"]]
    if is_far(row):
        ratio, least, most = (times(row[x]) for x in ("mean", "low", "high"))
        words = f"{ratio} times the loss ({least} to {most})"
        right = row["mean"] > 0
        ax.text(
            high if right else low,
            at,
            f"{words} \N{RIGHTWARDS ARROW}" if right else f"\N{LEFTWARDS ARROW} {words}",
            ha="right" if right else "left", va="center", fontsize=SMALL,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    else:
        ax.plot([row["low"], row["high"]], [at, at], color=color, linewidth=2)
        fill = {"markerfacecolor": "white"} if many else {}
        ax.plot(row["mean"], at, marker, color=color, **fill)
    said = SAID[row["verdict"]]
    if row["verdict"] != "equivalent" and row["p_equivalent"] < 0.05:
        said += ", < 10 %"
    n = f"{row['df'] + 1}" if many or row["runs"] == row["planned"] else "{runs} of {planned}"
    said += f" ({n.format(**row)} {'bases' if many else 'seeds'})"
    said += DAGGER if row["bootstrap_disagrees"] else ""
    ax.text(high + 0.02 * (high - low), at, said, ha="left", va="center", fontsize=SMALL)


def times(log_ratio: float) -> str:
    """A ratio of losses, with two digits that count."""
    ratio = exp(min(log_ratio, 20))
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}" if ratio >= 0.01 else "0"


FIGURES: dict[str, Callable[[ModuleType], Figure]] = {
    "activation": activation,  # Figure 1 of the paper
    "jaccard": jaccard,  # 3
    "hot-experts": hot_experts,  # 4 and 6
    "throughput": throughput,  # 5
    "accuracy": accuracy,
    "losses": losses,
    "placement": forest,
}
ALT = {  # what a page says of each to those who do not see it
    "activation": "Share of the visits of each of 64 experts, one panel for each of four layers, "
    "the most visited first. The 8 hot experts get about four visits in ten.",
    "jaccard": "Overlap of the hot lists of two tasks, by layer: mostly above that of two random "
    "lists, and 0.6 at most. The lists of a tenth of a task's data and of all of it are the same.",
    "hot-experts": "Heat map of visits by layer and expert, for word problems, code and safety, "
    "with the 8 hot experts of each layer marked. Each task has others.",
    "throughput": "Samples a second of LoRA on all experts and of HELLoRA, at 1,024 and at 48 "
    "tokens a step, and the operations that each layer runs, for three ways to multiply.",
    "accuracy": "Accuracy on test problems, with 95 % intervals over seeds: of the methods, of "
    "HELLoRA with other choices of experts, and of the same with experts alone.",
    "losses": "Training loss by step. With attention and router, full fine-tuning, LoRA and "
    "HELLoRA fall alike. With experts alone, hot fall fastest, random later, cold hardly.",
    "placement": "The loss on held-out problems with each choice of experts, relative to that with "
    "hot ones, with 95 % intervals. A band marks 10 % more or less. A dotted line marks how "
    "much worse cold experts are in the paper. The page of claims says how points of accuracy "
    "became a ratio of losses.",
}


def draw(name: str, folder: Path) -> None:
    """Write NAME.svg and NAME.png, without anything of the day or the machine."""
    plt = pyplot()
    fig = FIGURES[name](plt)
    fig.canvas.draw()  # axes find their places; from now on these are the same to the last digit
    fig.set_layout_engine("none")
    for ax in fig.axes:
        ax.set_position([round(x, 6) for x in ax.get_position(original=True).bounds])
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
