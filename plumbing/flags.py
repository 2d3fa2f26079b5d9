"""The flags of the six commands, each listed once, and the checks that need nothing but the flags.

This file does not import torch, so --help and a wrong flag take no seconds. That is why it spells
out names that are keys of tables in other files.
"""

import argparse
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from plumbing.cli import (
    COUNT,
    SEED,
    SHARE,
    Parser,
    add_compute_flags,
    device_name,
    did_you_mean,
    number,
)

BACKBONES = ("olmoe-1b-7b", "mixtral-8x7b", "deepseekmoe-16b", "qwen3-30b-a3b")  # checkpoint.py
TASKS = (  # plumbing/data.py
    "gsm8k", "code", "safety", "tiny-math", "tiny-math-dev", "tiny-math-reworded", "tiny-code",
    "tiny-code-dev", "tiny-safety", "tiny-safety-dev",
)  # fmt: skip
METHODS = ("fft", "lora", "dora", "lori-d", "lori-s", "hellora", "hellori-d", "hellori-s")
SUFFIXES = ("m", "c", "pure", "gate", "r", "none", "attn")  # hellora.py has these two
RULES = ("hot", "cold", "global-hot", "random", "all")  # catcher.py
COUNTS = ("all", "answers")  # catcher.py
MATMULS = ("grouped", "loop")  # moe_model.py
# How train.py chooses experts, unless flags say otherwise.
CHOICE = {"coverage": None, "catcher": "warmup", "score": "count", "count": "all"}
# With --override, a run may go on with other values of these settings.
OVERRIDABLE = (
    "lr", "epochs", "steps", "batch_size", "clip", "balance", "dev_data", "dev_every",
)  # fmt: skip
OVERRIDABLE_FLAGS = ", ".join(f"--{name.replace('_', '-')}" for name in OVERRIDABLE)


def train(description: str) -> argparse.Namespace:
    """What was typed after train.py. description: the text above the flags."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    what, method = (p.add_argument_group(name).add_argument for name in ("what", "method"))
    training, run, rare = map(p.add_argument_group, ("training", "run", "rarely needed"))
    add_training_flags(training, rare.add_argument)
    run, rare = run.add_argument, rare.add_argument
    suffixes = ", ".join(f"_{s}" for s in SUFFIXES)
    # fmt: off
    what("--model", default="tiny", type=model_name,
         help=f"tiny, {', '.join(BACKBONES)}, a folder, or a Hub id[@REVISION]")
    what("--task", choices=TASKS, metavar="T", help=f"one of {', '.join(TASKS)}")
    what("--data", type=Path, metavar="FILE",
         help="rows to train on, in place of the task's training split: JSON lines, a JSON list or "
         "CSV, of the task's form or another (docs/rows.md)")
    rare("--drop-long", action="store_true", default=None,
         help="leave out rows that are longer than the model's context")
    what("--eval-data", type=Path, metavar="FILE",
         help="rows to score, in place of the task's test split")
    what("--eval-limit", type=COUNT, default=500, metavar="N", help="rows to score (default 500)")
    what("--eval-batch", type=COUNT, metavar="N",
         help="problems decoded together (default 100, on a GPU as many of them as fit)")
    what("--no-eval", action="store_true", help="score nothing")
    what("--template", metavar="NAME",
         help="form of prompts: plain or lori (math), alpaca, lori or bare (others), or a file "
         "with {fields} of the rows, or with a chat template (docs/rows.md)")
    method("--method", default="hellora", type=method_name, metavar="M",
           help=f"{', '.join(METHODS)}, with suffixes {suffixes}")
    method("--k", type=int,
           help="adapted experts per layer (default: as many as a token visits)")
    method("--rank", type=COUNT, help="rank of the updates (default: the recipe's)")
    method("--alpha", type=number(float, above=0),
           help="updates are scaled by alpha / rank (default: the recipe's)")
    rare("--coverage", type=SHARE,
         help="in place of --k: the fewest experts with this share of visits")
    rare("--catcher", choices=["warmup", "forward"], default=CHOICE["catcher"],
         help="count in a LoRA warm-up, or on the base model (default warmup)")
    rare("--score", choices=["count", "gate"], default=CHOICE["score"],
         help="rank experts by visits, or by mean routing weight (default count)")
    rare("--count", choices=COUNTS, default=CHOICE["count"],
         help="count the visits of all tokens, or of those that predict an answer (default all)")
    rare("--hot-experts", type=Path, metavar="FILE",
         help="a hot_experts.json to use, also ESFT's. Nothing is counted")
    method("--mask-from", type=Path, metavar="RUN",
           help="the D run that gives lori-s or hellori-s its mask")
    rare("--mask-scope", choices=["model", "layer", "matrix"],
         help="set within which the mask's entries compete (default model)")
    rare("--redraw-a", action="store_true",
         help="lori-s, hellori-s: draw a new A, as LoRI's code does")
    run("--out", type=Path, metavar="DIR",
        help="run folder (default runs/MODEL-TASK-METHOD-kK-sSEED)")
    run("--resume", action="store_true",
        help="go on with an unfinished run, or fail if there is none")
    rare("--override", action="store_true",
         help="go on with the unfinished run in --out with other values of "
         f"{OVERRIDABLE_FLAGS}")
    rare("--save-every", type=COUNT, default=50, metavar="N",
         help="steps between saves (default 50)")
    rare("--experts", choices=MATMULS, default="grouped",
         help="multiply experts in one call, or in a loop (default grouped)")
    rare("--shard", choices=["full", "none"], default="full",
         help="with torchrun: shard the model over the ranks, or not (default full)")
    rare("--recompute", action="store_true",
         help="recompute layers in the backward pass: less memory, slower")
    # fmt: on
    add_watch_flags(run)
    add_compute_flags(rare)
    args = p.parse_args()
    check_watch_flags(args)
    return args


def add_training_flags(group: argparse._ArgumentGroup, rare: Callable) -> None:
    """The flags of the steps. rare: the add_argument of the group that comes last."""
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    # fmt: off
    either("--epochs", type=COUNT, help="passes over the data (default: the recipe's)")
    either("--steps", type=COUNT, help="optimizer steps, in place of --epochs")
    add("--batch-size", type=COUNT,
        help="examples in an optimizer step (default: the recipe's)")
    rare("--micro-batch", type=COUNT,
         help="examples in one forward pass (default 16, or fewer so that all ranks have some)")
    add("--lr", type=number(float, above=0),
        help="learning rate (default: the recipe's, which the warm-up always has)")
    rare("--clip", choices=["all", "each"], default="all",
         help="clip the gradients all together, or each matrix by itself as LoRI (default all)")
    rare("--balance", type=number(float, low=0), default=0.0, metavar="C",
         help="factor of the balancing loss, Eq. 1 (default 0)")
    add("--seed", type=SEED, default=0,
        help="seed of the data order, of A and of the catcher (default 0)")
    # fmt: on


def add_watch_flags(add: Callable) -> None:
    """The flags of what is kept and measured in training. add: an add_argument."""
    # fmt: off
    add("--dev-data", type=Path, metavar="FILE",
        help="rows whose loss is measured during training. DIR/best keeps the best adapter")
    add("--dev-every", type=COUNT, metavar="N", help="steps between these losses (default 50)")
    add("--log", choices=["tensorboard"], help="also write the metrics for TensorBoard")
    # fmt: on


def check_watch_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag of these that says nothing, or that cannot be followed here."""
    if args.dev_every and not args.dev_data:
        raise ValueError("--dev-every is for --dev-data FILE: omit it")
    if args.log and find_spec(args.log) is None:
        raise ValueError(
            f"--log {args.log} needs a package that is not installed: pip install {args.log}, or "
            "omit it"
        )


def method_name(text: str) -> str:
    """An argparse type: a method with suffixes. hellora.parse_method knows which go together."""
    base, *suffixes = text.split("_")
    if base not in METHODS or not {*suffixes} <= {*SUFFIXES}:
        known = f"{', '.join(METHODS)}, with suffixes _{', _'.join(SUFFIXES)}"
        near = did_you_mean(base, METHODS) if base not in METHODS else ""
        raise argparse.ArgumentTypeError(f"unknown method {text!r}: want one of {known}{near}")
    return text


def model_name(text: str) -> str:
    """An argparse type: what checkpoint.locate takes. Whether the Hub has an id is asked there."""
    path, repo = Path(text), text.partition("@")[0]
    if text in ("tiny", *BACKBONES):
        return text
    if text and path.is_dir():
        if (path / "config.json").is_file():
            return text
        if (path / "run.json").is_file():
            raise argparse.ArgumentTypeError(
                f"{text} is the folder of a run, and not of a model: want --run {text} with "
                "generate.py, eval_gsm8k.py and the like. To train on top of it, first make a "
                "model of it with export.py --format hub"
            )
        if (path / "adapter_config.json").is_file():
            raise argparse.ArgumentTypeError(
                f"{text} is a PEFT adapter, and not a model: want --run with the run that it was "
                "exported from, or a model of export.py --format hub"
            )
        return text  # the error of a file that is missing says what a model has
    if path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file: want the folder of a model")
    if repo != "tiny" and re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo):
        return text
    known = ("tiny", *BACKBONES)
    raise argparse.ArgumentTypeError(
        f"there is no model {text!r}: want {', '.join(known)}, a folder, or a Hub id such as "
        f"allenai/OLMoE-1B-7B-0924{did_you_mean(text, known)}"
    )


def catcher(description: str) -> argparse.Namespace:
    """What was typed after catcher.py."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, either = p.add_argument, p.add_mutually_exclusive_group().add_argument
    rare = p.add_argument_group("rarely needed").add_argument
    # fmt: off
    add("--model", default="tiny", type=model_name,
        help="tiny, a backbone's name, a folder, or a Hub id (default tiny)")
    add("--task", choices=TASKS,
        help="the task whose training split is counted (default tiny-math for tiny, else gsm8k)")
    add("--data", type=Path, help="rows in place of the task's training split")
    rare("--drop-long", action="store_true", help="leave out rows longer than the model's context")
    add("--k", type=int, help="experts to choose per layer (default: as many as a token visits)")
    rare("--coverage", type=SHARE,
         help="in place of --k: the fewest experts with this share of visits")
    rare("--rule", choices=RULES, default="hot", help="which experts to choose (default hot)")
    rare("--score", choices=["count", "gate"], default="count",
         help="rank experts by visits, or by mean routing weight (default count)")
    rare("--count", choices=COUNTS, default="all",
         help="count the visits of all tokens, or of those that predict an answer (default all)")
    rare("--share", type=SHARE, default=0.1, help="share of the split to look at (default 0.1)")
    rare("--seed", type=SEED, default=0, help="seed of that share (default 0)")
    rare("--batch-size", type=COUNT, default=16, help="examples in one pass (default 16)")
    either("--out", type=Path, help="write hot_experts.json here")
    either("--run", type=Path, metavar="DIR", help="show the list of this run in place of counting")
    # fmt: on
    add_compute_flags(rare)
    args = p.parse_args()
    others = [flag for flag, value in vars(args).items() if value != p.get_default(flag)]
    if args.run and others != ["run"]:
        others.remove("run")
        raise ValueError(f"--{others[0].replace('_', '-')} is for counting, not for --run: omit it")
    return args


def eval_gsm8k(description: str) -> argparse.Namespace:
    """What was typed after eval_gsm8k.py."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    either, add = p.add_mutually_exclusive_group(required=True).add_argument, p.add_argument
    rare = p.add_argument_group("rarely needed").add_argument
    # fmt: off
    either("--run", type=Path, nargs="+", action="extend", metavar="DIR",
           help="run folders of train.py")
    either("--model", type=model_name,
           help="a model without adapters: tiny, a backbone's name, a folder, a Hub id")
    add("--task", help="a math task (default: the run's, or tiny-math for tiny, else gsm8k)")
    add("--data", type=Path, help="problems to score, in place of the task's test split")
    add("--limit", type=COUNT,
        help="score the first N problems (default: as many as the run scored, else all)")
    add("--shots", type=number(int, low=0), default=0,
        help="put N solved training problems before each, as the harness does (default 0)")
    rare("--template", help="prompt and answer form (default: the run's, or the task's)")
    rare("--batch-size", type=COUNT,
         help="problems decoded together (default 100, on a GPU as many of them as fit)")
    rare("--max-new", type=COUNT,
         help="tokens generated at most (default: the task's, 512 for gsm8k)")
    add("--out", type=Path, metavar="DIR", help="with --model: keep results and answers here")
    add("--loss", action="store_true",
        help="measure the cross-entropy of the given answers, of any task, and decode nothing")
    rare("--factored", action="store_true", help="keep the adapters apart in place of merging them")
    # fmt: on
    add_compute_flags(rare)
    args = p.parse_args()
    if args.loss and args.max_new:
        raise ValueError("--max-new is for decoding, and --loss decodes nothing: omit it")
    if args.factored and not args.run:
        raise ValueError("--factored is for --run: a model has no adapters, omit it")
    return args


def generate(description: str) -> argparse.Namespace:
    """What was typed after generate.py."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask = p.add_argument_group("ask")
    of = ask.add_mutually_exclusive_group(required=True).add_argument
    what = ask.add_mutually_exclusive_group().add_argument
    draw = p.add_argument_group("sampling").add_argument
    show = p.add_argument_group("show").add_argument
    rare = p.add_argument_group("rarely needed").add_argument
    # fmt: off
    of("--run", type=Path, metavar="DIR", help="the tuned model of a finished run of train.py")
    of("--model", type=model_name,
       help="tiny, a backbone's name, a Hub id[@REVISION], a folder such as an export")
    what("prompt", nargs="?", help="the text (default: the lines of standard input)")
    what("--file", type=Path, metavar="FILE", help="a text file with a prompt on each line")
    draw("--max-new", type=COUNT, metavar="N",
         help="tokens of an answer at most (default: the task's, or 256)")
    draw("--temperature", type=number(float, low=0), default=0.0, metavar="X",
         help="0 (default) takes the likeliest token, 1 samples from the model's distribution")
    draw("--top-p", type=SHARE, metavar="P",
         help="sample from the likeliest tokens with this total probability (default 1)")
    draw("--seed", type=SEED, metavar="N",
         help="seed of the sampling (default 0). Prompt n uses N + n - 1")
    show("--compare", action="store_true",
         help="with --run: show the base model's answer too. Memory must hold both models")
    show("--show-experts", action="store_true", help="list each token with its experts")
    rare("--raw", action="store_true", help="send the text unchanged, in no task's form")
    rare("--task", choices=TASKS, metavar="T",
         help=f"send it in this task's form (default: the run's): {', '.join(TASKS)}")
    rare("--template", metavar="NAME", help="another form of the task (default: the run's)")
    rare("--batch-size", type=COUNT, metavar="N",
         help="prompts decoded together (default 100, on a GPU as many of them as fit)")
    # fmt: on
    add_compute_flags(rare)
    args = p.parse_args()
    check_question_flags(args)
    return args


def check_question_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag that would do nothing."""
    if args.compare and not args.run:
        raise ValueError("--compare shows the base of a run: want --run with it")
    if args.raw and (args.task or args.template):
        raise ValueError("--raw sends the text in no form: omit --task and --template")
    if args.template and not (args.run or args.task):
        raise ValueError(f"--template {args.template} is a form of a task: want --task with it")
    if not args.temperature and (args.top_p or args.seed is not None):
        raise ValueError("--top-p and --seed are for sampling: want --temperature above 0")


def export(description: str) -> argparse.Namespace:
    """What was typed after export.py."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, rare = p.add_argument, p.add_argument_group("rarely needed").add_argument
    # fmt: off
    add("--run", type=Path, nargs="+", action="extend", required=True, metavar="DIR",
        help="run folder of train.py. --format hub takes several, and adds up their updates")
    add("--format", choices=["hub", "peft"], required=True,
        help="a checkpoint as the Hub has it, or a PEFT adapter")
    add("--out", type=Path, metavar="DIR", help="new folder (default: the run's folder + FORMAT)")
    rare("--partial", action="store_true", help="peft: adapted experts only, for transformers 4")
    rare("--device", type=device_name, metavar="{cpu,cuda}",
         help="where the export is read back (default: cuda if there is one)")
    # fmt: on
    return p.parse_args()


def report(description: str) -> argparse.Namespace:
    """What was typed after report.py."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, nargs="+", action="extend", required=True, metavar="DIR",
                   help="run folders of train.py, finished or not")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="FILE",
                   help="the page (default: report.html in the run's folder, or of several runs "
                        "in the working directory)")  # fmt: skip
    return p.parse_args()
