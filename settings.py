"""What the flags of train.py mean: the recipes behind them, every check before a run starts.

`prepare` returns a Job: one run in which all that a user can get wrong has been checked. Nothing
has been written by then.
"""

import argparse
import hashlib
import os
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from catcher import HotList, check_k, default_k
from eval_gsm8k import check_scorable, has_gold
from hellora import Method, adapters, attach, lori_masks, parse_method
from moe_model import MoEConfig
from plumbing import ranks, saves
from plumbing.base_model import base_hashes, is_same_model, name_at_commit
from plumbing.checkpoint import (
    Checkpoint,
    check_weights,
    count_base,
    empty_model,
    locate,
    read_config,
)
from plumbing.data import (
    TASKS,
    Encoded,
    Example,
    default_task,
    encode,
    fields_of_own_rows,
    is_file_template,
    load_examples,
    rows_name,
    steps_per_epoch,
)
from plumbing.device import DTYPES, compute, free_bytes, most_bytes, warn_of_slow_cpu
from plumbing.files import sha256
from plumbing.flags import CHOICE
from plumbing.hub import snapshot_commit
from plumbing.memory import STAY, shapes, training, visits_of
from plumbing.run_folder import (
    choose_folder,
    differences,
    read_run,
    saved_commit,
    versions,
)
from plumbing.tokenizer import Tokenizer, load_tokenizer

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """How a task is trained unless flags say otherwise."""

    lr: float
    epochs: int
    batch_size: int = 128
    rank: int = 32
    alpha: float = 64
    decay: bool = False  # the lr falls linearly to 0. Else it is constant, as in LoRI's scripts


# (task, full fine-tuning?) -> Table 1 of the paper. The tiny tasks' were chosen on their dev splits
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
# The flags that decide a run's numbers. They are kept in run.json, and compared before it resumes.
SETTINGS = (
    "model", "task", "data", "drop_long", "eval_data", "eval_limit", "template", "dev_data",
    "dev_every", "method", "k",
    "coverage", "rank", "alpha", "catcher", "score", "count", "hot_experts", "mask_from",
    "mask_scope", "redraw_a", "epochs", "steps", "batch_size", "lr", "clip", "balance", "seed",
    "dtype",
)  # fmt: skip
MICRO_BATCH = 16  # examples in one forward pass
FEW_STEPS = 30  # a run on rows of one's own with fewer steps has a warning


def resolve(args: argparse.Namespace, cfg: MoEConfig, dtype: torch.dtype) -> dict:
    """Everything that decides a run's numbers, with a default where a flag was not given."""
    of_masks = {"redraw-a": args.redraw_a, "mask-scope": args.mask_scope}
    if (given := [flag for flag, value in of_masks.items() if value]) and not args.mask_from:
        raise ValueError(f"--{given[0]} is for lori-s and hellori-s, with --mask-from RUN: omit it")
    task = args.task or default_task(args.model)
    defaults = {  # the recipe's, the task's or the model's
        **vars(recipe(task, parse_method(args.method).train_base)),
        "task": task,
        "template": TASKS[task].template,
        "k": default_k(cfg),
        "dev_every": 50 if args.dev_data else None,
        "dtype": next(name for name, kind in DTYPES.items() if kind == dtype),
    }
    if args.steps:
        defaults["epochs"] = None  # --steps replaces it
    if args.mask_from:
        defaults["mask_scope"] = "model"
    settings = {}
    for name in SETTINGS:
        value = getattr(args, name)
        if name == "redraw_a" and not args.mask_from:
            value = None  # without a mask it says nothing
        is_folder = name == "model" and value != "tiny" and Path(value).is_dir()
        if is_folder or (name == "template" and is_file_template(task, value)):
            value = Path(value)
        if isinstance(value, Path):
            value = os.path.realpath(value)  # a run goes on from any working directory
        settings[name] = defaults.get(name) if value is None else value
    settings["decay"] = defaults["decay"]
    if args.mask_from and parse_method(args.method).chooses:  # the mask is for these experts
        settings["hot_experts"] = os.path.realpath(args.mask_from / "hot_experts.json")
    if parse_method(args.method).chooses:
        check_k(settings["k"], cfg.n_experts)
    return settings


def scored_examples(settings: dict, other_form: bool, source: Path) -> list[Example]:
    """What is scored before and after training: --eval-data, or else the task's test split.

    Nothing, and a line that says so, if that would have to be downloaded although --data was given,
    or if these rows have another form than the task's.
    """
    name, given = settings["task"], settings["eval_data"]
    task = TASKS[name]
    if task.kind != "math":
        if given and not Path(given).is_file():
            raise FileNotFoundError(f"--eval-data {given}: there is no such file")
        command = SCORED_BY[task.kind].format("DIR")
        print(f"train.py does not score this task. Afterwards: {command}")
        return []
    own_alone = settings["data"] and not given
    if own_alone and (other_form or not task.test.cached().exists()):
        why = f"with --data the test problems of {name} are not downloaded"
        if other_form:
            rows = rows_name(settings["data"])
            why = f"most rows of {rows} are no question and answer with '#### N' at its end"
        print(
            f"nothing is scored, as {why}: --eval-data FILE scores rows with '#### N' before and "
            "after training, and --dev-data FILE measures the loss of any rows"
        )
        return []
    path = Path(given) if given else task.test.fetch()
    examples = load_examples(name, path, settings["template"], source)[: settings["eval_limit"]]
    if own_alone:
        print(
            f"these rows have the form of {name}, so {len(examples)} test problems of {name} are "
            "scored before and after training: --eval-data FILE scores other rows, --no-eval none"
        )
    return examples


def is_other_form(examples: list[Example], own_rows: tuple[str, ...], kind: str) -> bool:
    """Whether rows of one's own have another form than the task's.

    own_rows: their fields, if these are others. Rows for word problems have the task's form if at
    least half of them have a number that can be scored.
    """
    marked = sum(has_gold(example.row) for example in examples)
    return bool(own_rows) or (kind == "math" and 2 * marked < len(examples))


def warn_of_rows(data: list[Example], tests: list[Example], scored: str) -> None:
    """Say what is odd in rows of one's own. Nothing is changed. scored: the kind of task."""
    prompts = {example.prompt for example in tests}
    marked = bool(tests) and scored == "math"
    seen: set[tuple[str, str]] = set()
    odd: dict[str, list[int]] = defaultdict(list)  # what is odd -> the examples that are
    for n, example in enumerate(data, 1):
        pair = (example.prompt, example.answer)
        if not example.answer.strip():
            odd["have an empty answer"].append(n)
        if pair in seen:
            odd["are duplicates of another row"].append(n)
        if example.prompt in prompts:
            odd["are also among the rows to score"].append(n)
        if marked and not has_gold(example.row):
            odd["have an answer without '#### N', which scoring needs"].append(n)
        seen.add(pair)
    for what, found in odd.items():
        print(
            f"warning: {len(found)} of {len(data)} rows of the data {what} (the first is example "
            f"{found[0]})"
        )


def warn_of_few_steps(job: "Job") -> None:
    """Say it if rows of one's own make few optimizer steps, as the recipes are for many rows."""
    n, size = len(job.data), job.settings["batch_size"]
    if job.n_steps < FEW_STEPS:
        print(
            f"warning: {n} examples in batches of {size}, --epochs {job.settings['epochs']}, are "
            f"only {job.n_steps} optimizer steps: --steps 200, for example, makes more of them"
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, checked and ready. Nothing has been written for it yet."""

    folder: Path  # where it will be: new, or with what it goes on from
    settings: dict  # what decides its numbers (resolve)
    method: Method
    cfg: MoEConfig
    source: Path  # the model's folder
    device: torch.device
    tokenizer: Tokenizer
    data: list[Encoded]
    own_rows: tuple[str, ...]  # the fields of --data's rows, if these have another form
    loss_only: bool  # see run_folder.has_loss_only
    n_dropped: int  # rows that --drop-long left out
    tests: list[Example]  # empty: nothing is scored
    eval_batch: int | None  # of these, decoded together. None: as many as fit
    dev: list[Encoded]  # whose loss is taken every settings["dev_every"] steps. Empty: none is
    log: str | None  # "tensorboard"
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

    def is_dev_step(self, step: int) -> bool:
        """Whether the loss on --dev-data is taken after `step` steps: also after the last."""
        every = self.settings["dev_every"]
        return bool(self.dev) and (step % every == 0 or step == self.n_steps)

    @property
    def all_experts(self) -> dict[int, list[int]]:
        """{MoE layer: every expert's id}: what plain LoRA adapts."""
        return {layer: list(range(self.cfg.n_experts)) for layer in self.cfg.moe_layers}


def prepare(args: argparse.Namespace) -> Job:
    """Check everything that a user can get wrong, before anything is written, and read the data."""
    device, dtype = compute(args.device, args.dtype)
    method = parse_method(args.method)
    # Of a model of the Hub, all but the weights at first: the settings choose the run's folder, and
    # an unfinished run there goes on with the commit that it began with.
    commit = ranks.once(lambda: snapshot_commit(locate(args.model, weights=False)))
    newest = locate(name_at_commit(args.model, commit), weights=False)
    cfg = read_config(newest)
    settings = resolve(args, cfg, dtype) | {"commit": commit}
    settings["bos"] = load_tokenizer(newest, settings).bos
    warn_of_slow_cpu(count_base(cfg), device, args.device)
    check_mask_from(args, method)
    start = lori_start(args.mask_from, method, settings) if args.mask_from else {}
    check_choice(args, method)
    check_rank(args.rank, method, cfg)
    if args.hot_experts:
        hot = HotList.read(args.hot_experts, cfg)
        if args.k is None and not args.coverage:  # the list says how many. Its layers may differ
            settings["k"] = check_k(max(map(len, hot.experts.values())), cfg.n_experts)
        check_hot_list(hot, args, settings)
        settings["count"] = hot.count  # of the list, not of this run
    folder = ranks.once(lambda: choose_folder(settings, args.out, args.resume, args.override))

    settings["commit"] = saved_commit(folder) or commit
    check_commit(args.mask_from, settings)
    source = locate(name_at_commit(args.model, settings["commit"]))
    cfg, tokenizer = read_config(source), load_tokenizer(source, settings)
    check_weights(cfg, Checkpoint(source))

    task, template = settings["task"], settings["template"]
    examples = load_examples(task, args.data or TASKS[task].train.fetch(), template, source)
    data = encode(examples, tokenizer, cfg.max_len, bool(args.drop_long))
    own_rows = fields_of_own_rows(task, template, examples[0].row) if args.data else ()
    other_form = bool(args.data) and is_other_form(examples, own_rows, TASKS[task].kind)
    tests = [] if args.no_eval else scored_examples(settings, other_form, source)
    check_scorable(tests, tokenizer, cfg.max_len)
    if args.data:
        warn_of_rows(examples, tests, TASKS[task].kind)
    dev = load_examples(task, args.dev_data, template, source) if args.dev_data else []
    job = Job(
        folder=folder,
        settings=settings,
        method=method,
        cfg=cfg,
        source=source,
        device=device,
        tokenizer=tokenizer,
        data=data,
        n_dropped=len(examples) - len(data),
        own_rows=own_rows,
        loss_only=other_form and not args.eval_data,
        tests=tests,
        eval_batch=args.eval_batch,
        dev=encode(dev, tokenizer, cfg.max_len, bool(args.drop_long)),
        log=args.log,
        start=start,
        micro_batch=args.micro_batch or default_micro_batch(settings),
        matmul=args.experts,
        shard=args.shard,
        recompute=args.recompute,
        save_every=args.save_every,
    )
    if args.data and not args.steps:
        warn_of_few_steps(job)
    check_memory(job)
    return job


# ---- does it fit? --------------------------------------------------------------------------------


def needs(job: Job) -> dict[str, dict[str, int]]:
    """{"the warm-up", "training": plumbing.memory's bytes of each part} of this device.

    The micro-batch is the largest there is, with the longest row.
    """
    settings, kinds = job.settings, {"training": job.method}
    counted = settings["hot_experts"] or (job.folder / "hot_experts.json").exists()
    if job.method.chooses and settings["catcher"] == "warmup" and not counted:
        kinds = {"the warm-up": parse_method("lora")} | kinds
    k = settings["k"]  # with --coverage it is not known yet
    tokens = job.micro_batch * max((len(e.ids) - 1 for e in job.data), default=0)
    return {
        phase: training(
            shapes(
                job.cfg, method, k, settings["rank"], settings["alpha"], DTYPES[settings["dtype"]]
            ),
            tokens,
            visits_of(method, k, job.cfg.n_experts),
            job.recompute,
            ranks.world(),
            job.shard == "full" and ranks.world() > 1,
            job.device.type == "cpu",
        )
        for phase, method in kinds.items()
    }


def check_memory(job: Job) -> None:
    """Say on stderr if the run is reckoned to take more memory than is free, and what to set.

    What stays from the first step to the last is certain. Raises ValueError if the device has not
    even that.
    """
    free, most = free_bytes(job.device), most_bytes(job.device)
    found = needs(job)
    phase, parts = max(found.items(), key=lambda item: sum(item[1].values()))
    stays = {phase: sum(of[part] for part in STAY) for phase, of in found.items()}
    kind, in_fp32 = job.device.type, job.settings["dtype"] == "fp32" and not job.method.train_base
    if most and max(stays.values()) > most:
        ways = ["--catcher forward"] * (stays["training"] <= most) + ["--dtype bf16"] * in_fp32
        ways += ["more memory"] if kind == "cpu" else ["a larger GPU", "--shard full on more"]
        raise ValueError(
            f"weights, gradients and AdamW's values take {max(stays.values()) / 1e9:.1f} GB, but "
            f"the {kind} has {most / 1e9:.1f}: want {', or '.join(ways)}"
        )
    total = sum(parts.values())
    if free and total > free and ranks.rank() == 0:
        print(
            f"warning: {phase} needs about {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            f"free on the {kind}: {way_out(job, free)}",
            file=sys.stderr,
        )


def way_out(job: Job, free: int) -> str:
    """The least change of flags with which the run is reckoned to fit, in words."""
    sizes = [job.micro_batch]
    while sizes[-1] > 1 and not job.settings["balance"]:  # whose loss depends on it
        sizes.append(sizes[-1] // 2)
    for catcher in dict.fromkeys((job.settings["catcher"], "forward")):
        for size in sizes:
            changed = {"catcher": catcher}
            other = replace(job, settings=job.settings | changed, recompute=True, micro_batch=size)
            if max(sum(of.values()) for of in needs(other).values()) <= free:
                flags = ["--recompute"] * (not job.recompute)
                flags += [f"--micro-batch {size}"] * (size != job.micro_batch)
                flags += [f"--catcher {catcher}"] * (catcher != job.settings["catcher"])
                return f"add {' '.join(flags)}"
    return "want more memory"


# ---- the rest of the checks ----------------------------------------------------------------------


def default_micro_batch(settings: dict) -> int:
    """16 examples, or fewer so that each rank has some of a step's.

    With a balancing loss it is 16, as that loss depends on the size (train_step): so the numbers do
    not depend on the ranks.
    """
    if settings["balance"]:
        return MICRO_BATCH
    return min(MICRO_BATCH, -(-settings["batch_size"] // ranks.world()))


def check_mask_from(args: argparse.Namespace, method: Method) -> None:
    """Raise ValueError for a --mask-from that is missing, or beside what it does not fit."""
    name, mask_from = args.method, args.mask_from
    if mask_from is None and method.keep < 1:
        raise ValueError(
            f"{name} needs --mask-from RUN, a finished run of the same settings with B trained in "
            f"full: make one with train.py --method {d_method(name)}"
        )
    if mask_from is not None and method.keep == 1:
        raise ValueError(f"--mask-from is for lori-s and hellori-s, not for {name}: omit it")
    if mask_from and args.hot_experts:
        raise ValueError("--hot-experts and --mask-from both name experts: omit --hot-experts")


def d_method(name: str) -> str:
    """The method whose runs give "lori-s", or a method of its kind, the mask: "lori-d"."""
    return name.replace("-s", "-d", 1)


def lori_start(folder: Path, method: Method, settings: dict) -> dict[str, Tensor]:
    """What an S run (keep < 1) takes over from its D run in `folder`: B's mask, and A.

    The same A by default, because an entry of B earned its place against D's row of A. With
    --redraw-a the S run draws a new one, as LoRI's code does. `settings` get the D run's `count`,
    by which its experts were chosen. Raises ValueError if the D run is not finished, or is of
    another placement or of other prompts.
    """
    saved = read_run(folder)
    same = ("task", "template", "bos", "k", "rank", "alpha")
    wanted = {name: settings[name] for name in same}
    wanted |= {"method": d_method(settings["method"]), "finished": True}
    if not is_same_model(saved, settings):
        wanted["model"] = settings["model"]
    differ = [f"{n} is {saved.get(n)}, want {v}" for n, v in wanted.items() if saved.get(n) != v]
    if differ:
        raise ValueError(f"--mask-from {folder} does not fit: {', and '.join(differ)}")
    settings["count"] = saved["count"]
    trained = saves.read_adapter(folder)
    trained_b = {name: t for name, t in trained.items() if name.endswith(".lora.B")}
    masks = lori_masks(trained_b, method.keep, settings["mask_scope"])
    start = {name.removesuffix("B") + "mask": mask for name, mask in masks.items()}
    if not settings["redraw_a"]:
        start |= {name: t for name, t in trained.items() if name.endswith(".lora.A")}
    return start


def check_commit(mask_from: Path | None, settings: dict) -> None:
    """Raise ValueError unless the D run, if there is one, was on the same commit of the model."""
    theirs = read_run(mask_from).get("commit") if mask_from else settings["commit"]
    if theirs != settings["commit"]:
        raise ValueError(
            f"--mask-from {mask_from} does not fit: commit is {theirs}, want {settings['commit']}. "
            "Ask for that one with --model ORG/NAME@COMMIT"
        )


def check_choice(args: argparse.Namespace, method: Method) -> None:
    """Raise ValueError for a flag about choosing experts where nothing is left to choose.

    That is where all or none are adapted, or a list is given. --coverage is let through beside a
    list, as old commands have it. So is --k with any method: the commands of all tables give it.
    """
    given = [flag for flag, default in CHOICE.items() if getattr(args, flag) != default]
    if given and not method.chooses:
        raise ValueError(
            f"--{given[0]} is for choosing experts, but {args.method} adapts all or none: omit it"
        )
    listed = args.hot_experts or args.mask_from
    if listed and given not in ([], ["coverage"]):
        raise ValueError(f"--{given[-1]} is for choosing experts, but {listed} names them: omit it")


def check_rank(rank: int | None, method: Method, cfg: MoEConfig) -> None:
    """Raise ValueError for a --rank above the smaller side of a matrix that the method updates.

    A larger one could say no more. The router is let be: it has a row an expert, of which Mixtral
    has 8, and the paper's rank is 32.
    """
    model = empty_model(cfg, torch.float32)
    attach(model, method, {layer: [0] for layer in cfg.moe_layers}, 1, 1)
    sides = {n: min(m.weight.shape[-2:]) for n, m in adapters(model).items() if n[-6:] != "router"}
    name = min(sides, key=sides.get, default=None)
    if name and rank and rank > sides[name]:
        raise ValueError(
            f"--rank is {rank}, but {name} has a side of {sides[name]}: want {sides[name]} at most"
        )


def check_hot_list(hot: HotList, args: argparse.Namespace, settings: dict) -> None:
    """Raise ValueError if a given list says other things than the flags."""
    wanted = parse_method(args.method).rule
    if wanted != hot.rule:
        raise ValueError(
            f"--hot-experts lists {hot.rule} experts, but method {args.method} wants {wanted}"
        )
    listed = {len(ids) for ids in hot.experts.values()}
    if args.k is not None and listed != {settings["k"]} and not settings["coverage"]:
        raise ValueError(
            f"--hot-experts lists {hot.sizes()} experts a layer, but --k is {args.k}: omit --k"
        )


def hashes(source: Path, data: list[Encoded]) -> dict[str, str]:
    """sha256 of what the numbers rest on: model, code, and training data as token ids."""
    return base_hashes(source) | {
        "code": sha256(*sorted([*HERE.glob("*.py"), *HERE.glob("plumbing/*.py")])),
        "data": hashlib.sha256(repr(data).encode()).hexdigest(),
    }


def open_record(job: Job, folder: Path) -> dict:
    """The content of run.json: of a new run, or of the one in `folder`, which goes on.

    Raises ValueError if the model or the data changed since, or if no step is left.
    """
    new = new_record(job)
    if not (folder / "run.json").exists():
        return new
    saved = read_run(folder)
    check_unchanged(saved, new, folder)
    last = saves.load(folder)
    if last and last.step > job.n_steps:
        raise ValueError(
            f"{folder} is already at step {last.step}: want more --steps or --epochs than that"
        )
    return continued(saved, new, job.settings)


def new_record(job: Job) -> dict:
    """What run.json says of a run that begins now."""
    record = job.settings | {
        "finished": False,
        "versions": versions(job.device),
        "hashes": hashes(job.source, job.data),
        "config": asdict(job.cfg),  # so that report.py needs no model
        "compute": {
            "micro_batch": job.micro_batch,
            "experts": job.matmul,
            "recompute": job.recompute,
            "ranks": ranks.world(),
            "threads": torch.get_num_threads(),
        },
    }
    if job.settings["drop_long"]:
        record["rows_dropped"] = job.n_dropped
    if job.settings["data"]:
        record["fields"] = list(job.own_rows)  # generate.py asks in their form
        record["loss_only"] = job.loss_only
    if job.log:
        record["log"] = job.log
    return record


def check_unchanged(saved: dict, new: dict, folder: Path) -> None:
    """Raise ValueError if the saved run is finished, or if its model or data are others now."""
    if saved["finished"]:
        raise ValueError(
            f"the run in {folder} has just been finished by another process: want another --out"
        )
    before, now = saved.get("hashes") or {}, new["hashes"]
    changed = [what for what in ("model", "data") if before.get(what) != now[what]]
    if before.get("tokenizer") not in (None, now["tokenizer"]):  # older runs do not know theirs
        changed.append("tokenizer")
    if changed:
        raise ValueError(
            f"the {' and the '.join(changed)} changed since {folder} was begun: want another --out"
        )


def continued(saved: dict, new: dict, settings: dict) -> dict:
    """run.json of a saved run that goes on, with a note of what differs from its beginning.

    It keeps what it began with, and the name that its model had then. The settings are the new
    ones: they may be other ones where --override was given.
    """
    record = new | saved | settings | {"model": saved["model"]}
    if differ := differences(saved, settings):
        record["overrides"] = [*(saved.get("overrides") or []), differ]
    if differ := other_conditions(saved, new):
        names = ", ".join(one.partition(":")[0] for one in differ)
        print(f"the run continues with other {names} than at its start: the last bits may differ")
        record["conditions"] = [*(saved.get("conditions") or []), differ]
    return record


def other_conditions(saved: dict, new: dict) -> list[str]:
    """What may move a resumed run's last bits: another machine, split, or state of the code.

    One "name: saved -> now" each. Nothing for what an older run does not say.
    """
    differ = []
    for part in ("hashes", "compute", "versions"):
        was = saved.get(part) or {}
        now = {name: value for name, value in new[part].items() if name in was}
        differ += [f"{name}: {was[name]} -> {now[name]}" for name in now if was[name] != now[name]]
    return differ


if __name__ == "__main__":
    print("no command by itself: train.py has these settings, see python train.py --help")
