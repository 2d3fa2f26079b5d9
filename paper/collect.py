"""Put finished runs together into one small file that can be committed: what was run, and what came out.

python -m paper.collect runs/a runs/b runs/c --out docs/results/NAME.json
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

from job import SCORES
from run import Parser, command, read_json, read_results, read_run, write_json

# what differs from run to run, or would name a folder of the machine it ran on
LEFT_OUT = {
    "adapted",
    "hashes",
    "data",
    "eval_data",
    "hot_experts",
    "mask_from",
    "seed",
    "finished",
    "compute",
}


def whole(results: dict) -> dict:
    """The results of all of a task's problems: what evaluations keep as TASK-part is a trial."""
    return {task: entry for task, entry in results.items() if not task.endswith("-part")}


def summary(folders: list[Path]) -> dict:
    """Settings in common, the results of each seed, and mean and standard deviation of each task's score."""
    runs = [read_run(folder, "seed", "hashes") for folder in folders]
    if unfinished := [str(f) for f, run in zip(folders, runs, strict=True) if not run["finished"]]:
        raise ValueError(f"{', '.join(unfinished)}: not finished, want runs that are done")
    if len({run["seed"] for run in runs}) < len(runs):
        raise ValueError("two of the runs have the same seed: want runs that differ in their seed")
    common = {name: v for name, v in runs[0].items() if name not in LEFT_OUT}
    for folder, run in zip(folders, runs, strict=True):
        differ = [name for name, value in common.items() if run.get(name) != value]
        differ += [what for what in ("model", "data") if run["hashes"][what] != runs[0]["hashes"][what]]
        if differ:
            raise ValueError(
                f"{folder} has another {', '.join(differ)} than {folders[0]}: want seeds of one run"
            )
    results = {
        str(run["seed"]): whole(read_results(folder)) for folder, run in zip(folders, runs, strict=True)
    }
    hot = {
        str(run["seed"]): read_json(folder / "hot_experts.json", "a run with hot experts")["experts"]
        for folder, run in zip(folders, runs, strict=True)
        if (folder / "hot_experts.json").exists()
    }
    spread: dict[str, dict] = {}  # score -> task -> mean, std
    for task, entry in next(iter(results.values())).items():
        score = next((first for first, *_ in SCORES.values() if first in entry), None)
        if score is None:  # of no task: what paper.forgetting measures
            continue
        if not all(score in of.get(task, {}) for of in results.values()):
            raise ValueError(
                f"not all of the runs have been scored on {task}: score them, or leave that one out"
            )
        values = [of[task][score] for of in results.values()]
        spread.setdefault(score, {})[task] = {
            "mean": mean(values),
            "std": stdev(values) if len(values) > 1 else None,
        }
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "run": common,
        **spread,
        "seeds": results,
        "hot_experts": hot,
    }


def main() -> None:
    """One file."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "runs", type=Path, nargs="+", metavar="DIR", help="run folders that differ in their seed only"
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = p.parse_args()
    value = summary(args.runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, value)
    for score in value.keys() & {first for first, *_ in SCORES.values()}:
        for task, of in value[score].items():
            spread = "" if of["std"] is None else f" +- {of['std']:.1%}"
            print(f"{task}: {score} {of['mean']:.1%}{spread} over {len(args.runs)} runs -> {args.out}")


if __name__ == "__main__":
    command(main)
