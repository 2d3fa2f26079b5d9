"""Every method and control on the tiny model: accuracy and training loss over seeds, each at its best rate.

The learning rate of a method is the one of three that is best on the dev problems with seed 0; the test
problems are looked at afterwards, with three seeds at that rate. At equal dev accuracy the lower final
training loss decides.
"""

from statistics import mean, stdev

from paper.grid import Cell, run_cells

TASK, DEV = "tiny-math", "tiny-math-dev"
SEEDS = (0, 1, 2)
RATES = {"fft": (1e-3, 3e-3, 1e-2), "lori": (1e-2, 2e-2, 4e-2)}  # "lori": the methods whose A is frozen
OTHER_RATES = (5e-3, 1e-2, 2e-2)
MAIN = ("fft", "lora", "dora", "lori-d", "lori-s", "hellora", "hellori-d", "hellori-s")
PLACEMENTS = tuple(
    f"hellora_{s}" for s in ("m", "c", "r", "gate", "none", "pure", "pure_c", "pure_r", "pure_m")
)


def rates(method: str) -> tuple[float, ...]:
    """The learning rates that are tried."""
    return RATES["lori"] if "lori-" in method else RATES.get(method, OTHER_RATES)


def chosen_rate(results: list[dict]) -> float:
    """The learning rate of the best of these runs, by accuracy on dev, then by training loss."""
    best = max(results, key=lambda r: (r["accuracy"][DEV], -r["final_loss"]))
    return best["lr"]


def cell(method: str, lr: float, seed: int, rate_of: dict[str, float]) -> Cell:
    """A run. A LoRI-S method takes its mask from the D run of the same seed, at the rate chosen for that."""
    d_method = method.replace("-s", "-d", 1)
    mask = Cell(d_method, rate_of[d_method], seed) if d_method != method else None
    return Cell(method, lr, seed, mask=mask)


def compare(names: tuple[str, ...], jobs: int) -> list[dict]:
    """Run what is missing of the table of these methods; its rows."""
    rows, rate_of, tasks = {}, {}, (TASK, DEV)
    for masked in (False, True):  # the methods with a mask come last: they need the others' rates
        some = [name for name in names if ("-s" in name) == masked]
        first = [cell(name, lr, SEEDS[0], rate_of) for name in some for lr in rates(name)]
        tried = run_cells(first, tasks, jobs)
        of = {name: [r for r in tried if r["method"] == name] for name in some}
        rate_of |= {name: chosen_rate(of[name]) for name in some}
        chosen = [cell(name, rate_of[name], seed, rate_of) for name in some for seed in SEEDS]
        seeds = run_cells(chosen, tasks, jobs)
        rows |= {name: row(of[name], [r for r in seeds if r["method"] == name]) for name in some}
    return [rows[name] for name in names]


def row(tried: list[dict], seeds: list[dict]) -> dict:
    """One method: runs at several rates, runs with several seeds -> what the table shows."""
    accuracy, loss = [r["accuracy"][TASK] for r in seeds], [r["final_loss"] for r in seeds]
    return {
        "method": seeds[0]["method"],
        "trained": seeds[0]["trained"],
        "lr": seeds[0]["lr"],
        "dev": {f"{r['lr']:g}": r["accuracy"][DEV] for r in tried},
        "accuracy": {"seeds": accuracy, "mean": mean(accuracy), "std": stdev(accuracy)},
        "final_loss": {"seeds": loss, "mean": mean(loss), "std": stdev(loss)},
    }


def show(rows: list[dict]) -> None:
    """The table."""
    print("method            trained     lr    test accuracy   final training loss   dev accuracy at each lr")
    for r in rows:
        dev = "  ".join(f"{lr}: {value:.1%}" for lr, value in r["dev"].items())
        print(
            f"{r['method']:15s} {r['trained']:9,d}  {r['lr']:5g}   {r['accuracy']['mean']:5.1%} +- "
            f"{r['accuracy']['std']:4.1%}     {r['final_loss']['mean']:.4f} +- {r['final_loss']['std']:.4f}"
            f"     {dev}"
        )
