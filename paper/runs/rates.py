"""The learning rate of each method on the embedded model: the best on dev problems, seed 0.

**Word problems.** Three rates are tried. More are added, a factor of two apart, until the best rate
is not at an end. At equal dev accuracy the lower final training loss decides. Test scores decide
nothing. What is not in the list (another k, another catcher, another base) takes the rate of its
method.

**Code and safety: the plan**, written on 2026-11-26, before its first run. Until then both had the
rates of word problems, and how these do on the test problems was known (Table 2).

- What is tuned: the rate of each of the eight methods of Table 2 (MAIN), for each of the two tasks.
- On what: the dev problems of the task, with seed 0 alone. For code the measure is pass@1 on the
  200 problems of tiny-code-dev. For safety it is balanced accuracy on the 200 requests of
  tiny-safety-dev, the mean of harmful ones refused and harmless ones answered.
- Which rates: that of word problems, half of it and double of it. While the best is the lowest or
  the highest of those tried, the next one is tried too, a factor of two further.
- When a rate is taken: when the best lies inside. At equal scores the lower final training loss
  decides. The rate then stands in TASK_RATES, and a test holds that it is the best. Until then the
  task keeps the rate of word problems.
- LoRI-S and HELLoRI-S take their mask from the D run of the same task, at D's best rate for that
  task. So they are tried after D.
- What else is trained on such a task (Tables 2 and 8, merging) takes the same rate.
- Test scores decide nothing, neither a rate nor whether one is taken.

The runs that try rates are runs of their own (docs/results/rates/), all made on one machine. A kept
result of Table 2 can take no further score on another machine, which rounds otherwise.

There are 48 runs at first: 36, and 12 after D. With HELLoRA a run and its score took 65 seconds of
a server's core, so these take about 1 hour. Rates beyond them may take another one, and new runs of
Tables 2 and 8 and of merging, where a rate has changed, 3 hours.

**What came of it**, the same day: 68 runs, all made and kept. The chosen rate and its neighbours
mostly have 100 % on the dev problems, so the final training loss decides. HELLoRA keeps its rate on
both tasks, LoRA and HELLoRI-S on code. The runs of the tables were made again where the rate or the
mask has changed. LoRA's runs on word problems and code were made once more too, only to be merged.
"""

from dataclasses import dataclass
from pathlib import Path

from paper.runs.grid import ROOT, Run, Wanted, missing_tasks, saved, score_of
from paper.runs.stats import aligned, spread

TASK = "tiny-math"
SEEDS = (0, 1, 2)
MEASURES = {  # task -> the score on its dev problems by which its rates are chosen
    TASK: "accuracy",
    "tiny-code": "pass@1",
    "tiny-safety": "balanced",
}
DEV = {task: f"{task}-dev" for task in MEASURES}
RATES = {  # method -> the chosen rate, and the rates tried (a sparse B needs larger ones than D)
    "fft": (1e-3, (5e-4, 1e-3, 3e-3, 1e-2)),
    "lora": (5e-3, (2.5e-3, 5e-3, 1e-2, 2e-2)),
    "dora": (5e-3, (2.5e-3, 5e-3, 1e-2, 2e-2)),
    "lori-d": (1e-2, (5e-3, 1e-2, 2e-2, 4e-2)),
    "lori-s": (2e-2, (1e-2, 2e-2, 4e-2)),
    "hellora": (1e-2, (5e-3, 1e-2, 2e-2)),
    "hellori-d": (1e-2, (5e-3, 1e-2, 2e-2, 4e-2)),
    "hellori-s": (0.16, (1e-2, 2e-2, 4e-2, 8e-2, 0.16, 0.32)),
    "hellora_m": (1e-2, (5e-3, 1e-2, 2e-2)),
    "hellora_c": (5e-3, (2.5e-3, 5e-3, 1e-2, 2e-2)),
    "hellora_r": (1e-2, (5e-3, 1e-2, 2e-2)),
    "hellora_gate": (1e-2, (5e-3, 1e-2, 2e-2)),
    "hellora_none": (2e-2, (5e-3, 1e-2, 2e-2, 4e-2)),
    "hellora_pure": (1e-2, (5e-3, 1e-2, 2e-2, 4e-2)),
    "hellora_pure_c": (1e-2, (5e-3, 1e-2, 2e-2)),
    "hellora_pure_r": (1e-2, (5e-3, 1e-2, 2e-2)),
    "hellora_pure_m": (1e-2, (5e-3, 1e-2, 2e-2)),
    "hellori-d_m": (2e-2, (5e-3, 1e-2, 2e-2, 4e-2)),
    "hellori-s_m": (8e-2, (4e-2, 8e-2, 0.16, 0.32)),
    "hellori-d_c": (2e-2, (5e-3, 1e-2, 2e-2, 4e-2)),
    "hellori-s_c": (8e-2, (4e-2, 8e-2, 0.16, 0.32)),
    "hellori-d_pure": (4e-2, (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)),
    "hellori-s_pure": (0.16, (8e-2, 0.16, 0.32)),
    "hellori-d_gate": (2e-2, (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)),
    "hellori-s_gate": (0.16, (8e-2, 0.16, 0.32)),
}
MAIN = tuple(method for method in RATES if "_" not in method)
CONTROLS = tuple(method for method in RATES if method.startswith("hellora_"))
OTHERS = tuple(task for task in MEASURES if task != TASK)
RESULTS = ROOT / "docs" / "results" / "rates"  # of the runs that try rates of OTHERS
# (task of OTHERS, method of MAIN) -> the chosen rate. What is not here has the rate of RATES.
TASK_RATES: dict[tuple[str, str], float] = {
    ("tiny-code", "fft"): 4e-3,
    ("tiny-code", "lora"): 5e-3,
    ("tiny-code", "dora"): 1e-2,
    ("tiny-code", "lori-d"): 2e-2,
    ("tiny-code", "lori-s"): 8e-2,
    ("tiny-code", "hellora"): 1e-2,
    ("tiny-code", "hellori-d"): 4e-2,
    ("tiny-code", "hellori-s"): 0.16,
    ("tiny-safety", "fft"): 4e-3,
    ("tiny-safety", "lora"): 1e-2,
    ("tiny-safety", "dora"): 2e-2,
    ("tiny-safety", "lori-d"): 2e-2,
    ("tiny-safety", "lori-s"): 0.16,
    ("tiny-safety", "hellora"): 1e-2,
    ("tiny-safety", "hellori-d"): 4e-2,
    ("tiny-safety", "hellori-s"): 0.32,
}


def rate(method: str, task: str = TASK) -> float | None:
    """The rate of a method, or else of the method it varies. None for a task that is not tiny."""
    if not task.startswith("tiny"):
        return None
    if (task, method) in TASK_RATES:
        return TASK_RATES[task, method]
    if method in RATES or "_" not in method:
        return RATES[method][0]
    return rate(method.rpartition("_")[0], task)


def cell(
    method: str, seed: int, lr: float | None = None, task: str = TASK, **settings: object
) -> Run:
    """A run at the method's rate, unless another is given. The paper's tasks have their recipe's.

    A sparse method takes its mask from the D run of the same seed and settings. For a control, that
    D run has the rate of the method it controls: a better rate for D can be worse for its mask
    (LOG.md).
    """
    d_rate = rate(d_of(method).partition("_")[0], task)
    mask = cell(d_of(method), seed, d_rate, task, **settings) if is_sparse(method) else None
    return Run(method, lr or rate(method, task), seed, task=task, mask=mask, **settings)


def is_sparse(method: str) -> bool:
    """Whether it trains a part of B, by the mask of a D run: LoRI-S and HELLoRI-S."""
    return d_of(method) != method


def d_of(method: str) -> str:
    """The method that gives a sparse method its mask, or else the method itself."""
    return method.replace("-s", "-d", 1)


# ---- the runs that choose ------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial(Run):
    """A run that tries a rate on a task of OTHERS. It is scored on the dev problems alone."""

    @property
    def folder(self) -> Path:
        """See Cell."""
        return ROOT / "runs" / "rates" / self.name

    @property
    def result(self) -> Path:
        """See Cell."""
        return RESULTS / f"{self.name}.json"


def trial(method: str, lr: float, task: str) -> Trial:
    """The run that tries a rate. A sparse method has its mask from the D run at D's best rate."""
    mask = trial(d_of(method), best_so_far(d_of(method), task), task) if is_sparse(method) else None
    return Trial(method, lr, SEEDS[0], task=task, mask=mask)


def tried(method: str, task: str = TASK) -> list[Run]:
    """The runs among which the rate is chosen. For a sparse method there are none before D's rate.

    For a task of OTHERS they follow from the finished ones. The last of them may be missing.
    """
    if task == TASK:
        return [cell(method, SEEDS[0], lr) for lr in RATES[method][1]]
    if is_sparse(method) and best_so_far(d_of(method), task) is None:
        return []
    first = RATES[method][0]
    chosen = TASK_RATES.get((task, method), first)
    lr, highest = min(first, chosen) / 2, max(first, chosen) * 2
    runs = [trial(method, lr, task)]
    while (lr := 2 * lr) <= highest:
        runs.append(trial(method, lr, task))
    while all(on_dev(run) is not None for run in runs):
        lr = best_rate([saved(run) for run in runs], task)
        if lr == runs[0].lr:
            runs.insert(0, trial(method, lr / 2, task))
        elif lr == runs[-1].lr:
            runs.append(trial(method, lr * 2, task))
        else:
            break
    return runs


def best_so_far(method: str, task: str) -> float | None:
    """The chosen rate on a task of OTHERS, or else the best of the finished runs if it lies inside.

    None while neither is known.
    """
    if (task, method) in TASK_RATES:
        return TASK_RATES[task, method]
    runs = tried(method, task)
    if not runs or any(on_dev(run) is None for run in runs):
        return None
    return best_rate([saved(run) for run in runs], task)


def on_dev(run: Run) -> float | None:
    """The score by which rates are chosen, or None while it is missing."""
    return score_of(saved(run), MEASURES[run.task], DEV[run.task])


def best_rate(results: list[dict], task: str = TASK) -> float:
    """The learning rate of the best of these runs."""
    measure, dev = MEASURES[task], DEV[task]
    return max(results, key=lambda r: (score_of(r, measure, dev), -r["final_loss"]))["lr"]


def tuning_wanted() -> Wanted:
    """The runs that try rates of OTHERS, as far as they are known: finished ones add further.

    while todo := missing(tuning_wanted()):
        run_cells(todo, jobs)
    """
    return {run: {DEV[task]} for task in OTHERS for method in MAIN for run in tried(method, task)}


def wanted() -> Wanted:
    """The runs and scores behind the tables."""
    cells = {run: {DEV[TASK]} for name in RATES for run in tried(name)}
    for run in (cell(name, seed) for name in RATES for seed in SEEDS):
        cells[run] = cells.get(run, set()) | {TASK}
    return cells | tuning_wanted()


# ---- what they say -------------------------------------------------------------------------------


def results() -> list[dict]:
    """The rows of the methods whose runs are all finished, then those of OTHERS so far."""
    cells = {name: (tried(name), [cell(name, seed) for seed in SEEDS]) for name in RATES}
    rows = [
        row([saved(run) for run in rates], [saved(run) for run in seeds])
        for rates, seeds in cells.values()
        if not any(missing_tasks(run, [DEV[TASK]]) for run in rates)
        and not any(missing_tasks(run, [TASK]) for run in seeds)
    ]
    return rows + [found for task in OTHERS for name in MAIN if (found := choice(name, task))]


def row(tried: list[dict], seeds: list[dict]) -> dict:
    """The row of one method. tried: runs at several rates. seeds: runs with several seeds."""
    method, lr = seeds[0]["method"], seeds[0]["lr"]
    check_best(method, best_rate(tried), lr, "RATES")
    accuracy, loss = [r["accuracy"][TASK] for r in seeds], [r["final_loss"] for r in seeds]
    return {
        "task": TASK,
        "method": method,
        "trained": seeds[0]["trained"],
        "lr": lr,
        "dev": {f"{r['lr']:g}": r["accuracy"][DEV[TASK]] for r in tried},
        "accuracy": {"seeds": accuracy, **spread(accuracy)._asdict()},
        "final_loss": {"seeds": loss, **spread(loss)._asdict()},
    }


def choice(method: str, task: str) -> dict | None:
    """How far the choice of a rate on a task of OTHERS is. None before its first run.

    "dev": the scores so far by rate. "best": the rate to take, or None while "next" has rates.
    """
    runs = tried(method, task)
    dev = {f"{run.lr:g}": score for run in runs if (score := on_dev(run)) is not None}
    if not dev:
        return None
    further = [run.lr for run in runs if on_dev(run) is None]
    best = None if further else best_rate([saved(run) for run in runs], task)
    if best and (task, method) in TASK_RATES:
        check_best(f"{method} on {task}", best, rate(method, task), "TASK_RATES")
    return {
        "task": task,
        "method": method,
        "lr": rate(method, task),
        "taken": (task, method) in TASK_RATES,
        "dev": dev,
        "best": best,
        "next": further,
    }


def check_best(what: str, best: float, lr: float, table: str) -> None:
    """Raise ValueError if a table has another rate than the best on dev."""
    if best != lr:
        raise ValueError(
            f"{what} is best at {best:g} on dev, but {table} in paper/runs/rates.py says {lr:g}"
        )


def show(rows: list[dict]) -> None:
    """Print the runs at the chosen rates, and the dev score at each rate, task by task."""
    print("mean and standard deviation over seeds, at the chosen lr")
    math = [r for r in rows if r["task"] == TASK]
    table = [["", "trained", "lr", "test accuracy, %", "final training loss"]]
    for r in math:
        accuracy, loss = r["accuracy"], r["final_loss"]
        tested = f"{100 * accuracy['mean']:.1f} +- {100 * accuracy['std']:.1f}"
        trained_to = f"{loss['mean']:.4f} +- {loss['std']:.4f}"
        table.append([r["method"], f"{r['trained']:,}", f"{r['lr']:g}", tested, trained_to])
    print(*aligned(table), sep="\n")

    for task in MEASURES:
        if of := [r for r in rows if r["task"] == task]:
            print(f"\n{MEASURES[task]} on {DEV[task]} at each lr, seed 0, % (* the chosen one)")
            table = by_rate(of)
            if task != TASK:  # it has more rates than methods, so a row for each rate is narrower
                table = [list(line) for line in zip(*table, strict=True)]
            lines = aligned(table)
            lines += [f"{r['method']}: {says(r)}" for r in of if not r.get("taken", True)]
            print(*lines, sep="\n")


def by_rate(rows: list[dict]) -> list[list[str]]:
    """A table of the dev scores at each rate."""
    rates = sorted({lr for r in rows for lr in r["dev"]}, key=float)
    table = [["", *rates]]
    for r in rows:
        table.append([r["method"]])
        for lr in rates:
            chosen = "*" * (float(lr) == r["lr"])
            table[-1].append(f"{chosen}{100 * r['dev'][lr]:.1f}" if lr in r["dev"] else "")
    return table


def says(row: dict) -> str:
    """What follows from the dev scores of a row of `choice`."""
    if row["next"]:
        return f"to be tried: {', '.join(f'{lr:g}' for lr in row['next'])}"
    return f"the best is {row['best']:g}: to be taken into TASK_RATES"
