"""Do hot experts matter? These runs differ only in the experts that get adapters.

The plan is paper/studies/placement.md. It was written before the runs. It says what is compared,
how, and what each outcome means. This file has the runs.

The measure is the cross-entropy of the right answers of held-out problems, in nats per answer
token. It says more about a run than accuracy, because each token counts with its probability.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hellora import parse_method
from paper.runs.grid import BASES, MODEL, ROOT, Run, Wanted, missing_tasks, saved
from plumbing.data import TASKS
from plumbing.files import write_atomically
from plumbing.run_folder import read_results, read_run
from tiny import tasks
from tiny.tasks import draw

RUNS = Path("runs/placement")  # a path in the repository
RESULTS = ROOT / "docs" / "results" / "placement"
ROWS_SEED = 1  # the seed of the scored problems (seed 0 gave the files of tiny/)
TASK = "tiny-math"
GENERATOR = {"tiny-math": "math_problem", "tiny-code": "code_problem"}  # functions of tiny.tasks
DEV, TEST = "placement-dev", "placement-test"
N_REWORDED = 500  # the last problems of TEST: their wordings are never in training
N_SCORED = {DEV: 500, TEST: 2000 + N_REWORDED}


class Regime(NamedTuple):
    """How much is trained, and on how many rows."""

    n_rows: int  # each seed draws its own rows
    epochs: int
    arms: dict[str, str]  # an arm -> its method; hot is first, and the others are compared with it
    seeds: int  # for the embedded base


WITH_ATTENTION = {
    "hot": "hellora",
    "cold": "hellora_c",
    "random": "hellora_r",
    "model-level": "hellora_m",
    "none": "hellora_none",
    "all": "lora",
}
EXPERTS_ALONE = {
    "hot": "hellora_pure",
    "cold": "hellora_pure_c",
    "random": "hellora_pure_r",
    "model-level": "hellora_pure_m",
    "all": "lora_pure",
}
ANSWERS = "answers"  # hot by the visits of tokens that predict an answer (--count answers)
REGIMES = {
    "A": Regime(200, 6, WITH_ATTENTION | {ANSWERS: "hellora"}, 20),
    "P": Regime(200, 6, EXPERTS_ALONE | {ANSWERS: "hellora_pure"}, 12),
    "O": Regime(60, 20, WITH_ATTENTION, 28),
}
BATCH_SIZE = 16
TUNING_SEEDS = (100, 101, 102)  # for learning rates only
OTHER_BASES = tuple(f"{BASES}{seed}" for seed in range(11, 18))  # pretrained for this study
BASE_ARMS = ("hot", "cold", "random", "none", "all", ANSWERS)  # in regimes A and P
BASE_SEEDS = 4  # of each other base, and of no second one: see `seeds_of`

# (regime, arm) -> the learning rates that are tried, and the rate with the lowest mean loss on DEV.
# If the best of the four was the lowest or the highest, more rates were tried, a factor of two
# apart.
FIRST_RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
TRIED = {(name, arm): FIRST_RATES for name, regime in REGIMES.items() for arm in regime.arms}
TRIED |= {("P", arm): (*FIRST_RATES, 4e-2) for arm in ("hot", "cold", "model-level", ANSWERS)}
TRIED["O", "all"] = (1.25e-3, *FIRST_RATES)
RATES: dict[tuple[str, str], float] = {
    ("A", "hot"): 1e-2,
    ("A", "cold"): 1e-2,
    ("A", "random"): 1e-2,
    ("A", "model-level"): 1e-2,
    ("A", "none"): 1e-2,
    ("A", "all"): 5e-3,
    ("A", ANSWERS): 1e-2,
    ("P", "hot"): 2e-2,
    ("P", "cold"): 2e-2,
    ("P", "random"): 1e-2,
    ("P", "model-level"): 2e-2,
    ("P", "all"): 1e-2,
    ("P", ANSWERS): 2e-2,
    ("O", "hot"): 5e-3,
    ("O", "cold"): 1e-2,
    ("O", "random"): 5e-3,
    ("O", "model-level"): 5e-3,
    ("O", "none"): 5e-3,
    ("O", "all"): 2.5e-3,
}


# ---- the runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed(Run):
    """A run of one arm. Its rows are drawn with its seed, so each seed is another sample."""

    regime: str = ""
    arm: str = ""

    seconds = 15
    SCORE_SECONDS = 12

    @property
    def name(self) -> str:
        """See Cell."""
        base = () if self.model == MODEL else (Path(self.model).name,)
        task = () if self.task == TASK else (self.task,)
        return "-".join((*base, *task, self.regime, self.arm, f"lr{self.lr:g}", f"s{self.seed}"))

    @property
    def folder(self) -> Path:
        """See Cell."""
        return ROOT / RUNS / self.name

    @property
    def result(self) -> Path:
        """See Cell."""
        return RESULTS / f"{self.name}.json"

    @property
    def rows(self) -> Path:
        """See Run."""
        task = "" if self.task == TASK else f"{self.task}-"
        name = f"{task}{REGIMES[self.regime].n_rows}-rows-s{self.seed}.jsonl"
        return RUNS / "problems" / name

    def drawn(self) -> str:
        """The rows to train on, as JSON lines."""
        return as_lines(GENERATOR[self.task], "train", REGIMES[self.regime].n_rows, self.seed)

    def prepare(self) -> None:
        """Write the rows to train on, and the problems to score."""
        write_problems(self.rows, self.drawn())
        for task in N_SCORED:
            write_problems(problems_file(task), problems(task))

    def rests_on(self) -> dict[str, str]:
        """See Cell."""
        inputs = super().rests_on() | {"drawn": digest(self.drawn(), *map(problems, N_SCORED))}
        return {name: value for name, value in inputs.items() if name != "data"}

    def record(self) -> dict:
        """See Cell."""
        self.check_folder()
        return super().record() | {"drawn": self.rests_on()["drawn"]}

    def check_folder(self) -> None:
        """Raise ValueError if its folder has another run. The name does not hold all settings."""
        regime, run = REGIMES[self.regime], read_run(self.folder)
        wanted = {"method": self.method, "k": self.k, "lr": self.lr, "seed": self.seed,
                  "epochs": regime.epochs, "batch_size": BATCH_SIZE,
                  "count": "answers" if self.arm == ANSWERS else "all"}  # fmt: skip
        if differ := [name for name, value in wanted.items() if run.get(name) != value]:
            raise ValueError(f"{self.folder} has another {', '.join(differ)}: delete it")

    def scoring(self, task: str) -> tuple[str, tuple[str, ...]]:
        """See Cell."""
        command = f"python eval_gsm8k.py --run {{}} --loss --data {problems_file(task)}"
        return f"{command} --limit {N_SCORED[task]}", ("loss", "exact", "items")

    def scores(self, task: str) -> dict:
        """See Cell. With the scores of each problem, packed: see `pack`."""
        return self.packed(N_SCORED[task])

    def packed(self, n_problems: int) -> dict:
        """The last scores in its folder, or {} if they are of another number of problems."""
        entry = read_results(self.folder).get(f"{self.task}-loss-part", {})
        if entry.get("total") != n_problems:
            return {}
        path = self.folder / f"answers-{self.task}-loss-part.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return entry | {"items": pack(records)}


def settings(regime: str, arm: str) -> dict:
    """The settings of a run of this arm."""
    plan = REGIMES[regime]
    method = plan.arms[arm]
    flags = ("--epochs", str(plan.epochs), "--batch-size", str(BATCH_SIZE))
    flags += ("--catcher", "forward") if parse_method(method).chooses else ()
    flags += ("--count", "answers") if arm == ANSWERS else ()
    return {"method": method, "flags": flags, "regime": regime, "arm": arm}


def placed(regime: str, arm: str, seed: int, lr: float, model: str = MODEL) -> Placed:
    """The run of an arm."""
    return Placed(**settings(regime, arm), lr=lr, seed=seed, model=model)


@cache
def as_lines(make: str, split: str, n: int, seed: int) -> str:
    """Rows by a generator of tiny.tasks. A problem of one split is never in another split."""
    rows = draw(getattr(tasks, make), split, n, seed)
    return "".join(json.dumps(row) + "\n" for row in rows)


def problems(task: str) -> str:
    """The problems of DEV or TEST, as JSON lines."""
    if task == DEV:
        return as_lines("math_problem", "dev", N_SCORED[DEV], ROWS_SEED)
    plain = as_lines("math_problem", "test", N_SCORED[TEST] - N_REWORDED, ROWS_SEED)
    return plain + as_lines("reworded_problem", "test", N_REWORDED, ROWS_SEED)


def digest(*texts: str) -> str:
    """The sha256 of some texts, one after another."""
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def problems_file(task: str) -> Path:
    """The file of the problems for eval_gsm8k.py, as a path in the repository."""
    return RUNS / "problems" / f"{task}.jsonl"


def write_problems(path: Path, text: str) -> None:
    """Write a file in the repository. Raises ValueError if it exists with other problems."""
    path = ROOT / path
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} has other problems than the study: delete it")


def pack(records: list[dict]) -> dict[str, str]:
    """The results of --loss for each problem, small: base64 of losses as float16, and of bits."""
    losses = np.array([r["loss"] for r in records], "<f2")
    exact = np.packbits([r["exact"] for r in records])
    return {
        "loss": base64.b64encode(losses.tobytes()).decode(),
        "exact": base64.b64encode(exact.tobytes()).decode(),
    }


def unpack(items: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """For each problem: the summed loss of its answer in nats, and whether all of it is exact."""
    losses = np.frombuffer(base64.b64decode(items["loss"]), "<f2").astype(float)
    exact = np.unpackbits(np.frombuffer(base64.b64decode(items["exact"]), np.uint8))
    return losses, exact[: len(losses)].astype(bool)


# ---- the list of runs ----------------------------------------------------------------------------


def tuning(regime: str, arm: str) -> dict[float, list[Placed]]:
    """{learning rate: the runs that test it}."""
    return {
        lr: [placed(regime, arm, seed, lr) for seed in TUNING_SEEDS] for lr in TRIED[regime, arm]
    }


def best_rate(regime: str, arm: str) -> float | None:
    """The learning rate with the lowest mean loss on DEV, or None while a run is missing.

    Raises ValueError if it is the lowest or the highest of those tried.
    """
    runs = tuning(regime, arm)
    if any(missing_tasks(run, [DEV]) for by_seed in runs.values() for run in by_seed):
        return None
    means = {lr: np.mean([saved(r)["loss"][DEV] for r in by_seed]) for lr, by_seed in runs.items()}
    best = min(means, key=means.get)
    if best in (min(means), max(means)):
        raise ValueError(
            f"regime {regime}, {arm}: {best:g} is the best rate, but no rate beyond it was tried: "
            "add the next one to TRIED in paper/studies/placement_runs.py"
        )
    return best


def seeds_of(model: str) -> range:
    """The seeds of another base. Each base has its own, so that the bases share no training rows.

    Else a sample of rows that suits an arm would count once for each base.
    """
    first = 300 + BASE_SEEDS * OTHER_BASES.index(model)
    return range(first, first + BASE_SEEDS)


def test_runs() -> Iterator[Placed]:
    """The runs that are compared and whose rates are known. All arms of a seed come together."""
    for seed in range(max(regime.seeds for regime in REGIMES.values())):
        for name, regime in REGIMES.items():
            for arm in regime.arms if seed < regime.seeds else ():
                if lr := RATES.get((name, arm)):
                    yield placed(name, arm, seed, lr)
    for model in OTHER_BASES:
        for seed in seeds_of(model):
            for name, regime in REGIMES.items():
                for arm in BASE_ARMS:
                    if name != "O" and arm in regime.arms and (lr := RATES.get((name, arm))):
                        yield placed(name, arm, seed, lr, model)


def tuning_runs() -> list[Placed]:
    """The runs that test learning rates."""
    return [run for name, arm in TRIED for runs in tuning(name, arm).values() for run in runs]


def wanted() -> Wanted:
    """All runs. Those for the learning rates come first."""
    return {run: {DEV} for run in tuning_runs()} | {run: {TEST} for run in test_runs()}


# ---- the same study on the paper's model ---------------------------------------------------------

REAL = "olmoe-1b-7b"
REAL_RATES, REAL_SEEDS = (1e-4, 2e-4, 4e-4, 8e-4), range(5)
RECIPE_RATE = 4e-4  # Table 1
REAL_CHOSEN: dict[tuple[str, str], float] = {}  # (regime, arm) -> the best rate; not known yet
REAL_ARMS = [(name, arm) for name in ("A", "P") for arm in REGIMES[name].arms]
N_HELD_OUT = 500  # DEV is the last 500 rows of GSM8K's training split, and TEST is its test split


@dataclass(frozen=True)
class RealPlaced(Placed):
    """A run of an arm of regime A or P on OLMoE-1B-7B and GSM8K, with the recipe of Table 1.

    It trains on all training rows except the held-out ones. The times are estimates for an H100,
    from its memory and arithmetic (docs/scaling.md). No such run has been made.
    """

    seconds = 300
    SCORE_SECONDS = 60

    @property
    def rows(self) -> Path:
        """See Run."""
        return RUNS / "problems" / "gsm8k-train.jsonl"

    def prepare(self) -> None:
        """Cut the held-out rows off the training split. Downloads it if it is not there."""
        split = TASKS[self.task].train.fetch().read_text(encoding="utf-8").splitlines(True)
        write_problems(self.rows, "".join(split[:-N_HELD_OUT]))
        write_problems(problems_file(f"gsm8k-{DEV}"), "".join(split[-N_HELD_OUT:]))

    def rests_on(self) -> dict[str, str]:
        """See Cell."""
        return {"command": "python " + " ".join(self.command())}

    def record(self) -> dict:
        """See Cell."""
        return Run.record(self)

    def scoring(self, task: str) -> tuple[str, tuple[str, ...]]:
        """See Cell."""
        data = f" --data {problems_file(f'gsm8k-{DEV}')}" if task == DEV else ""
        kept = ("loss", "exact", "items")
        return f"python eval_gsm8k.py --run {{}} --loss{data} --limit 2000", kept

    def scores(self, task: str) -> dict:
        """See Cell."""
        return self.packed(N_HELD_OUT if task == DEV else 1319)


def real_placed(regime: str, arm: str, seed: int, lr: float) -> RealPlaced:
    """The run of an arm."""
    arm_settings = settings(regime, arm)
    flags = tuple(arm_settings["flags"][4:])  # epochs and batch size are the recipe's
    return RealPlaced(**arm_settings | {"flags": flags}, lr=lr, seed=seed, model=REAL, task="gsm8k")


def real_wanted() -> Wanted:
    """All runs. Those for the rates come first. Until rates are chosen, all have the recipe's."""
    return {run: {DEV} for run in real_tuning_runs()} | {run: {TEST} for run in real_test_runs()}


def real_tuning_runs() -> list[RealPlaced]:
    """The runs that test learning rates."""
    return [real_placed(*arm, TUNING_SEEDS[0], lr) for arm in REAL_ARMS for lr in REAL_RATES]


def real_test_runs() -> Iterator[RealPlaced]:
    """The runs that are compared."""
    for seed in REAL_SEEDS:
        for arm in REAL_ARMS:
            yield real_placed(*arm, seed, REAL_CHOSEN.get(arm, RECIPE_RATE))
