"""The learning rate of each method on the embedded model: the best on the dev problems, seed 0.

Three rates are tried. More are added, a factor of two apart, until the best rate is not at an end.
At equal dev accuracy the lower final training loss decides. Test scores decide nothing. What is not
in the list (another k, another catcher, another base or task) takes the rate of its method.
"""

from paper.runs.grid import Run, Wanted, missing_tasks, saved
from paper.runs.stats import spread

TASK, DEV = "tiny-math", "tiny-math-dev"
SEEDS = (0, 1, 2)
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


def rate(method: str, task: str = TASK) -> float | None:
    """The rate of a method, or else of the method it varies. None for a task that is not tiny."""
    if not task.startswith("tiny"):
        return None
    if method in RATES or "_" not in method:
        return RATES[method][0]
    return rate(method.rpartition("_")[0])


def cell(
    method: str, seed: int, lr: float | None = None, task: str = TASK, **settings: object
) -> Run:
    """A run at the method's rate, unless another is given. The paper's tasks have their recipe's.

    A sparse method takes its mask from the D run of the same seed and settings. For a control, that
    D run has the rate of the method it controls: a better rate for D can be worse for its mask
    (LOG.md).
    """
    d_method = method.replace("-s", "-d", 1)
    d_rate = rate(d_method.partition("_")[0], task)
    mask = cell(d_method, seed, d_rate, task=task, **settings) if d_method != method else None
    return Run(method, lr or rate(method, task), seed, task=task, mask=mask, **settings)


def tried(method: str) -> list[Run]:
    """The runs among which the rate is chosen."""
    return [cell(method, SEEDS[0], lr) for lr in RATES[method][1]]


def best_rate(results: list[dict]) -> float:
    """The learning rate of the best of these runs."""
    return max(results, key=lambda r: (r["accuracy"][DEV], -r["final_loss"]))["lr"]


def wanted() -> Wanted:
    """The runs and scores behind the table."""
    cells = {run: {DEV} for name in RATES for run in tried(name)}
    for run in (cell(name, seed) for name in RATES for seed in SEEDS):
        cells[run] = cells.get(run, set()) | {TASK}
    return cells


def results() -> list[dict]:
    """The rows of the methods whose runs are all finished."""
    finished = {c for c, tasks in wanted().items() if not missing_tasks(c, tasks)}
    runs = {name: (tried(name), [cell(name, seed) for seed in SEEDS]) for name in RATES}
    return [
        row([saved(c) for c in rates], [saved(c) for c in seeds])
        for rates, seeds in runs.values()
        if finished.issuperset((*rates, *seeds))
    ]


def row(tried: list[dict], seeds: list[dict]) -> dict:
    """The row of one method. tried: runs at several rates. seeds: runs with several seeds."""
    method, lr, best = seeds[0]["method"], seeds[0]["lr"], best_rate(tried)
    if best != lr:
        raise ValueError(
            f"{method} is best at {best:g} on dev, but RATES in paper/runs/rates.py says {lr:g}"
        )
    accuracy, loss = [r["accuracy"][TASK] for r in seeds], [r["final_loss"] for r in seeds]
    return {
        "method": method,
        "trained": seeds[0]["trained"],
        "lr": lr,
        "dev": {f"{r['lr']:g}": r["accuracy"][DEV] for r in tried},
        "accuracy": {"seeds": accuracy, **spread(accuracy)._asdict()},
        "final_loss": {"seeds": loss, **spread(loss)._asdict()},
    }


def show(rows: list[dict]) -> None:
    """Print the table."""
    print(
        "method            trained     lr    test accuracy "
        "  final training loss   dev accuracy at each lr"
    )
    for r in rows:
        dev = "  ".join(f"{lr}: {value:.1%}" for lr, value in r["dev"].items())
        print(
            f"{r['method']:15s} {r['trained']:9,d}  {r['lr']:5g}   "
            f"{r['accuracy']['mean']:5.1%} +- {r['accuracy']['std']:4.1%}     "
            f"{r['final_loss']['mean']:.4f} +- {r['final_loss']['std']:.4f}     {dev}"
        )
