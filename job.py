"""The command line of train.py, made into a job in which everything a user can get wrong has been checked."""

import argparse
import gc
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import hellora
import ranks
import state
from catcher import HotList, check_k, default_k
from checkpoint import BACKBONES, Checkpoint, MoEConfig, fingerprint, locate, read_config
from data import TASKS, Encoded, Example, default_task, encode, load_examples, steps_per_epoch
from eval_gsm8k import check_scorable
from hellora import METHODS, SUFFIXES, Method, parse_method
from lori import lori_start
from moe_model import MATMULS, MoEModel, check_weights, empty_model, load_weights
from run import (
    DTYPES,
    Parser,
    above_0,
    add_compute_flags,
    at_least_0,
    compute,
    differences,
    read_run,
    seed_number,
    sha256,
    share_of_1,
    versions,
)
from tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Recipe:
    """How a task is trained unless flags say otherwise."""

    lr: float
    epochs: int
    batch_size: int = 128
    rank: int = 32
    alpha: float = 64
    decay: bool = False  # the lr falls linearly to 0; else it is constant, as in LoRI's scripts


# (task, full fine-tuning?) -> Table 1 of the paper; the tiny tasks' were chosen on their dev splits
RECIPES = {
    ("gsm8k", False): Recipe(lr=4e-4, epochs=3),
    ("gsm8k", True): Recipe(lr=4e-5, epochs=3, batch_size=256),
    ("code", False): Recipe(lr=2e-3, epochs=2),
    ("code", True): Recipe(lr=2e-4, epochs=2, batch_size=256),
    ("safety", False): Recipe(lr=4e-4, epochs=1),
    ("safety", True): Recipe(lr=2e-5, epochs=1, batch_size=256),
    ("tiny", False): Recipe(lr=1e-2, epochs=3, batch_size=32, rank=8, alpha=16, decay=True),
    ("tiny", True): Recipe(lr=3e-3, epochs=3, batch_size=32, decay=True),
}


def recipe(task: str, train_base: bool = False) -> Recipe:
    """The recipe of a task, for adapters or for full fine-tuning."""
    return RECIPES["tiny" if task.startswith("tiny") else task, train_base]


SCORED_BY = {  # kind of task -> the command that scores a run
    "math": "python eval_gsm8k.py --run {}",
    "code": "python -m paper.eval_humaneval --run {} --allow-code-execution",
    "safety": "python -m paper.eval_safety --run {}",
}
SCORES = {  # kind of task -> what of results.json tells how it went, the first in one number
    "math": ("accuracy",),
    "code": ("pass@1", "pass@5", "pass@10"),
    "safety": ("refusal_rate", "harmless_refused", "harmless_total"),
}
SETTINGS = (  # the flags that decide a run's numbers: kept in run.json, compared before a run is gone on with
    "model", "task", "data", "eval_data", "eval_limit", "template", "method", "k", "coverage", "rank",
    "alpha", "catcher", "score", "hot_experts", "mask_from", "mask_scope", "redraw_a", "epochs", "steps",
    "batch_size", "lr", "balance", "seed", "dtype",
)  # fmt: skip
CHOICE = {"coverage": None, "catcher": "warmup", "score": "count"}  # flags of how experts are chosen


def parse_args(description: str) -> argparse.Namespace:
    """The command line. Every flag is listed once, here. description: the text above the flags."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what, method = p.add_argument_group("what").add_argument, p.add_argument_group("method").add_argument
    training = p.add_argument_group("training")
    train, run = training.add_argument, p.add_argument_group("run").add_argument
    # fmt: off
    what("--model", default="tiny", help=f"tiny, {', '.join(BACKBONES)}, a folder, or a Hub id[@REVISION]")
    what("--task", choices=TASKS, metavar="T", help=f"one of {', '.join(TASKS)}")
    what("--data", type=Path, metavar="FILE", help="rows to train on in place of the task's training split")
    what("--eval-data", type=Path, metavar="FILE", help="rows to score in place of the task's test split")
    what("--eval-limit", type=above_0(int), default=500, metavar="N", help="rows to score (default 500)")
    what("--no-eval", action="store_true", help="score nothing")
    what("--template", metavar="NAME", help="form of prompts: math: plain, lori; else alpaca, lori, bare")
    method("--method", default="hellora", help=f"{', '.join(METHODS)}, with suffixes _{', _'.join(SUFFIXES)}")
    method("--k", type=int, help="adapted experts per layer (default: as many as a token visits)")
    method("--rank", type=above_0(int), help="rank of the updates (default: the recipe's)")
    method("--alpha", type=above_0(float), help="updates are scaled by alpha / rank (default: the recipe's)")
    method("--coverage", type=share_of_1, help="not k, but the fewest with this share")
    method("--catcher", choices=["warmup", "forward"], default=CHOICE["catcher"], help="count in a warm-up?")
    method("--score", choices=["count", "gate"], default=CHOICE["score"], help="hot by visits or mean weight")
    method("--hot-experts", type=Path, metavar="FILE", help="a hot_experts.json to use; nothing is counted")
    method("--mask-from", type=Path, metavar="RUN", help="D run that gives lori-s and hellori-s the mask")
    method("--mask-scope", choices=["model", "layer", "matrix"], default="model", help="of its entries")
    method("--redraw-a", action="store_true", help="lori-s, hellori-s: a new A, as LoRI's code has it")
    either = training.add_mutually_exclusive_group().add_argument
    either("--epochs", type=above_0(int), help="passes over the data (default: the recipe's)")
    either("--steps", type=above_0(int), help="optimizer steps, in place of --epochs")
    train("--batch-size", type=above_0(int), help="examples in an optimizer step (default: the recipe's)")
    train("--micro-batch", type=above_0(int), default=16, help="examples in one forward pass (default 16)")
    train("--lr", type=above_0(float), help="learning rate (default: the recipe's; the warm-up has that)")
    train("--balance", type=at_least_0(float), default=0.0, metavar="C", help="factor of Eq. 1 (default 0)")
    train("--seed", type=seed_number, default=0, help="of data order, A, catcher (default 0)")
    run("--out", type=Path, metavar="DIR", help="run folder (default runs/MODEL-TASK-METHOD-kK-sSEED)")
    run("--resume", action="store_true", help="go on with an unfinished run, or fail if there is none")
    run("--override", action="store_true", help="go on with the unfinished run in --out under other settings")
    run("--save-every", type=above_0(int), default=50, metavar="N", help="steps between saves (default 50)")
    run("--experts", choices=MATMULS, default="grouped", help="in one call, or one by one")
    run("--shard", choices=["full", "none"], default="full", help="with torchrun: cut up the model, or not")
    run("--recompute", action="store_true", help="run layers again in the backward pass: less memory, slower")
    # fmt: on
    add_compute_flags(run)
    return p.parse_args()


def resolve(args: argparse.Namespace, cfg: MoEConfig, dtype: torch.dtype) -> dict:
    """Everything that decides a run's numbers, with the recipe's values where a flag was not given."""
    task = args.task or default_task(args.model)
    own = {  # without a flag: from the recipe, or from the model
        **vars(recipe(task, parse_method(args.method).train_base)),
        "task": task, "template": TASKS[task].template, "k": default_k(cfg),
        "dtype": next(name for name, kind in DTYPES.items() if kind == dtype),
    }  # fmt: skip
    flags = {name: getattr(args, name) for name in SETTINGS}
    if args.steps:
        own["epochs"] = flags["epochs"] = None
    if args.redraw_a and not args.mask_from:
        raise ValueError("--redraw-a is for lori-s and hellori-s, with --mask-from RUN: omit it")
    if not args.mask_from:
        flags["mask_scope"] = flags["redraw_a"] = None
    if args.model != "tiny" and Path(args.model).is_dir():
        flags["model"] = Path(args.model)
    flags |= {name: os.path.realpath(path) for name, path in flags.items() if isinstance(path, Path)}
    settings = flags | {name: value for name, value in own.items() if flags.get(name) is None}
    check_k(settings["k"], cfg.n_experts)
    return settings


def scored_examples(settings: dict) -> list[Example]:
    """What is scored before and after training: --eval-data, or else the task's test split.

    Nothing, and a line that says so, if that would have to be downloaded although --data was given.
    """
    task = TASKS[settings["task"]]
    if task.kind != "math":
        if settings["eval_data"] and not Path(settings["eval_data"]).is_file():
            raise FileNotFoundError(f"--eval-data {settings['eval_data']}: there is no such file")
        print(f"nothing is scored in training; afterwards: {SCORED_BY[task.kind].format('DIR')}")
        return []
    if settings["data"] and not settings["eval_data"] and not task.test.cached().exists():
        print("nothing is scored: give --eval-data FILE to score before and after")
        return []
    path = Path(settings["eval_data"]) if settings["eval_data"] else task.test.fetch()
    return load_examples(settings["task"], path, settings["template"])[: settings["eval_limit"]]


@dataclass(frozen=True)
class Job:
    """One run, checked and ready: nothing has been written for it yet."""

    settings: dict  # what decides its numbers (resolve)
    method: Method
    cfg: MoEConfig
    source: Path  # the model's folder
    device: torch.device
    tokenizer: Tokenizer
    data: list[Encoded]
    tests: list[Example]  # empty: nothing is scored
    start: dict[str, Tensor]  # values that adapters take over from another run (LoRI's mask and A)
    micro_batch: int
    matmul: str  # "grouped" or "loop" (MATMULS)
    shard: str  # "full" or "none": what several ranks do, see ranks.py
    recompute: bool
    save_every: int

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        per_epoch = steps_per_epoch(len(self.data), self.settings["batch_size"])
        return self.settings["steps"] or self.settings["epochs"] * per_epoch

    def build(self, method: Method | None = None, experts: dict[int, list[int]] | None = None) -> MoEModel:
        """The model with `method`'s adapters (None: the base): shapes, then adapters, only then values."""
        gc.collect()  # models hold themselves in cycles: the last one goes before this one comes
        dtype = DTYPES[self.settings["dtype"]]
        stored = torch.float32 if method and method.train_base else dtype  # full fine-tuning: fp32 masters
        model = empty_model(self.cfg, dtype, self.matmul).to(stored).requires_grad_(False)
        model.recompute = self.recompute
        if method:
            hellora.attach(model, method, experts, self.settings["rank"], self.settings["alpha"])
        if ranks.world() > 1 and self.shard == "full":
            ranks.shard(model, model.layers, dtype if method and method.train_base else None, self.device)
        load_weights(model, Checkpoint(self.source), self.device)
        a_seed = f"{self.settings['seed']}{' redrawn' if self.settings['redraw_a'] else ''}"
        hellora.init_adapters(model, a_seed, self.start if method is self.method else None)
        return model


def prepare(args: argparse.Namespace) -> Job:
    """Check everything that a user can get wrong, before anything is written, and read the data."""
    device, dtype = compute(args.device, args.dtype)
    method, source = parse_method(args.method), locate(args.model)
    cfg, tokenizer = read_config(source), load_tokenizer(source)
    check_weights(cfg, Checkpoint(source))
    settings = resolve(args, cfg, dtype)
    start = take_over(args.mask_from, method, settings)
    check_choice(args, method)
    if args.hot_experts:
        check_hot_list(HotList.read(args.hot_experts, cfg), method, settings)
    path = args.data or TASKS[settings["task"]].train.fetch()
    data = encode(load_examples(settings["task"], path, settings["template"]), tokenizer, cfg.max_len)
    tests = [] if args.no_eval else scored_examples(settings)
    check_scorable(tests, tokenizer, cfg.max_len)
    return Job(
        settings, method, cfg, source, device, tokenizer, data, tests, start,
        args.micro_batch, args.experts, args.shard, args.recompute, args.save_every,
    )  # fmt: skip


def take_over(mask_from: Path | None, method: Method, settings: dict) -> dict[str, Tensor]:
    """What a method with a mask starts from besides the base: a D run's mask, A and hot experts."""
    name = settings["method"]
    if mask_from is None and method.keep < 1:
        d_name = name.replace("-s", "-d", 1)
        raise ValueError(
            f"{name} needs --mask-from RUN, a finished run of the same settings with B trained in full: "
            f"make one with train.py --method {d_name}"
        )
    if mask_from is not None and method.keep == 1:
        raise ValueError(f"--mask-from is for lori-s and hellori-s, not for {name}: omit it")
    if mask_from is None:
        return {}
    if settings["hot_experts"]:
        raise ValueError("--hot-experts and --mask-from both name experts: omit --hot-experts")
    if method.rule not in (None, "all"):
        settings["hot_experts"] = os.path.realpath(mask_from / "hot_experts.json")
    return lori_start(mask_from, settings, method, settings["mask_scope"], settings["redraw_a"])


def check_choice(args: argparse.Namespace, method: Method) -> None:
    """Raise ValueError for a flag of how experts are chosen where that is settled: all, none, or a list's.

    With a list --coverage says that its layers may differ in length.
    """
    given = [flag for flag, default in CHOICE.items() if getattr(args, flag) != default]
    if given and method.rule in (None, "all"):
        raise ValueError(
            f"--{given[0]} is for choosing experts, but {args.method} adapts all or none: omit it"
        )
    listed = args.hot_experts or args.mask_from
    if listed and given not in ([], ["coverage"]):
        raise ValueError(f"--{given[-1]} is for choosing experts, but {listed} names them: omit it")


def check_hot_list(hot: HotList, method: Method, settings: dict) -> None:
    """Raise ValueError if a given list says other things than the flags."""
    sizes = {len(ids) for ids in hot.experts.values()}
    if method.rule != hot.rule:
        raise ValueError(
            f"--hot-experts lists {hot.rule} experts, but method {settings['method']} wants {method.rule}"
        )
    if sizes != {settings["k"]} and not (settings["mask_from"] or settings["coverage"]):
        raise ValueError(f"--hot-experts lists {sorted(sizes)} experts a layer, but --k is {settings['k']}")


def hashes(source: Path, data: list[Encoded]) -> dict[str, str]:
    """sha256 of what the numbers rest on: model, code, and training data as token ids."""
    return {
        "model": fingerprint(source),
        "code": sha256(*sorted(Path(__file__).parent.glob("*.py"))),
        "data": hashlib.sha256(repr(data).encode()).hexdigest(),
    }


def open_record(job: Job, folder: Path) -> dict:
    """The content of run.json, new or as it was saved. Raises ValueError if the model or the data changed."""
    now = hashes(job.source, job.data)
    new = job.settings | {"finished": False, "versions": versions(job.device), "hashes": now}
    new |= {"compute": {"micro_batch": job.micro_batch, "experts": job.matmul, "recompute": job.recompute}}
    if not (folder / "run.json").exists():
        return new
    saved = read_run(folder)
    if saved["finished"]:
        raise ValueError(f"the run in {folder} has just been finished by another process: want another --out")
    changed = [what for what in ("model", "data") if (saved.get("hashes") or {}).get(what) != now[what]]
    if changed:
        raise ValueError(
            f"the {' and the '.join(changed)} changed since {folder} was begun: want another --out"
        )
    if (saved_state := state.load(folder)) and saved_state.step > job.n_steps:
        raise ValueError(
            f"{folder} is already at step {saved_state.step}: want more --steps or --epochs than that"
        )
    if differ := differences(saved, job.settings):
        new["overrides"] = [*(saved.get("overrides") or []), differ]
    return saved | new
