"""Exact-match accuracy on grade-school-math problems, of a run of train.py or of a model as it is.

    python eval_gsm8k.py --run runs/tiny-tiny-math-hellora-k8-s0
    python eval_gsm8k.py --run runs/tiny-tiny-math-hellora-k8-s0 --loss
    python eval_gsm8k.py --model allenai/OLMoE-1B-7B-0924 --task gsm8k --shots 5

Decoding is greedy, and only generated text is scored. "accuracy" takes the number after the first
"####", "flexible" the last number of any kind. Results for fewer or other problems, or with other
settings than the run's, are kept in results.json as TASK-part.

Prompts, --shots, where an answer ends, and what counts as its number are lm-evaluation-harness'
(tasks/gsm8k/gsm8k.yaml at 4e7e0d4). tests/peers/compare_gsm8k.py compares them. What differs: it
shows 5 solved problems and generates 256 tokens by default (--shots 5 --max-new 256). Here no
problem is shown, and the number of tokens is the task's, 512 for gsm8k. A prompt too long for the
context loses its beginning there, and is refused here.

--loss decodes nothing. It measures the cross-entropy of the given answers, of any task that has
some, and keeps it as TASK-loss. It shows a difference between models with far fewer problems than
accuracy does, because each token of an answer contributes how likely it was.
"""

if __name__ == "__main__":
    import plumbing.quiet  # noqa: F401  a signal ends it in one line, from here on
    from plumbing import cli, flags

    cli.read_early(flags.eval_gsm8k, __doc__)  # before torch is imported, which takes seconds

import argparse
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from generate import BATCH, generate
from hellora import load_run
from moe_model import MoEConfig, MoEModel
from plumbing import flags
from plumbing.answer_loss import measure_loss
from plumbing.base_model import base_folder
from plumbing.checkpoint import count_base, locate, read_config
from plumbing.cli import command, did_you_mean
from plumbing.data import (
    HUMANEVAL,
    TASKS,
    Example,
    default_task,
    encode,
    encode_prompt,
    load_examples,
    rows_name,
)
from plumbing.device import compute, warn_of_slow_cpu
from plumbing.run_folder import is_other_dtype, keep_results, read_run, results_folder
from plumbing.tokenizer import Tokenizer, load_tokenizer

STRICT = {  # template -> where its answers put the number. The first match counts
    "plain": re.compile(r"#### (\-?[0-9\.\,]+)"),
    "lori": re.compile(r"The final answer is: +(\-?[0-9\.\,]+)"),
}
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")  # the last match counts
# Where an answer has ended, whatever follows: a new question, or the end of a text spelt out.
UNTIL = ("Question:", "</s>", "<|im_end|>")
SHOTS_SEED = 1234  # of the solved problems: lm-evaluation-harness' fewshot_random_seed
Scored = tuple[str, dict, list[dict]]  # a line to show, results.json's entry, a record of each


def normalise(number: str) -> str:
    """ "$1,000." -> "1000": what lm-evaluation-harness ignores when it compares."""
    return re.sub("[,$]", "", number).removesuffix(".")


def extract(text: str, template: str = "plain") -> tuple[str | None, str | None]:
    """The strict and the flexible answer of a generated text. None where there is none."""
    for mark in UNTIL:
        text = text.split(mark)[0]
    strict = STRICT.get(template, STRICT["plain"]).search(text)  # a file's is in the plain form
    numbers = FLEXIBLE.findall(text)
    return (normalise(strict[1]) if strict else None), (normalise(numbers[-1]) if numbers else None)


def gold(row: dict) -> str:
    """The right number of a row. Raises ValueError if its answer does not end in "#### N"."""
    _, mark, number = row["answer"].rpartition("####")
    if not mark or not re.fullmatch("-?[$0-9.,]+", number.strip()):
        raise ValueError(f"the answer of a problem has no '#### N': {row['answer'][-40:]!r}")
    return normalise(number.strip())


def has_gold(row: dict) -> bool:
    """Whether a row has an answer that ends in "#### N"."""
    try:
        gold(row)
    except (ValueError, KeyError):
        return False
    return True


def check_scorable(examples: list[Example], tokenizer: Tokenizer, max_len: int) -> None:
    """Raise ValueError for a problem without a right answer, or too long for the context."""
    sizes = []
    for n, example in enumerate(examples, 1):
        try:
            gold(example.row)
        except ValueError as error:
            raise ValueError(
                f"row {n} to score: {error}. The loss can be measured of any answers: "
                "eval_gsm8k.py --loss --data FILE, or train.py --dev-data FILE"
            ) from error
        sizes.append(len(encode_prompt(example.prompt, tokenizer, f"row {n} to score")))
    if long := [n for n, size in enumerate(sizes, 1) if size >= max_len]:
        raise ValueError(
            f"{len(long)} of {len(sizes)} rows to score leave no room for an answer in the context "
            f"of {max_len} tokens: row {long[0]} is the first, row {sizes.index(max(sizes)) + 1} "
            f"the longest, with {max(sizes)}. Want shorter ones"
        )


def evaluate(
    model: MoEModel,
    tokenizer: Tokenizer,
    examples: list[Example],
    template: str,
    max_new: int,
    batch_size: int | None,
    label: str = "score",
) -> tuple[dict, list[dict]]:
    """results.json's entry for `examples`, and a record of each problem."""
    began = time.perf_counter()
    prompts = [
        encode_prompt(e.prompt, tokenizer, f"row {n} to score") for n, e in enumerate(examples, 1)
    ]
    answers = generate(model, prompts, max_new, tokenizer.stops, batch_size, label)
    records = []
    for example, ids in zip(examples, answers, strict=True):
        output, right = tokenizer.decode(ids, "inside"), gold(example.row)
        strict, flexible = extract(output, template)
        records.append(
            {
                "prompt": example.prompt,
                "gold": right,
                "output": output,
                "ids": ids,
                "strict": strict,
                "flexible": flexible,
            }
            | {"correct": strict == right}
        )
    correct = sum(r["correct"] for r in records)
    flexible = sum(r["flexible"] == r["gold"] for r in records)
    return {
        "accuracy": correct / len(records),
        "accuracy_flexible": flexible / len(records),
        "correct": correct,
        "total": len(records),
        "seconds": round(time.perf_counter() - began, 2),
    }, records


def solved_problems(task: str, template: str) -> list[str]:
    """Each training problem with its answer, as they stand in a prompt.

    In the plain template they have calculator notes <<...>>, because lm-evaluation-harness keeps
    them there. Our training leaves them out.
    """
    examples = load_examples(task, TASKS[task].train.fetch(), template)
    if template == "plain":
        return [f"{e.prompt} {e.row['answer']}" for e in examples]
    return [e.prompt + e.answer for e in examples]


def few_shot(examples: list[Example], solved: list[str], shots: int) -> list[Example]:
    """Put `shots` of the solved problems before each prompt, drawn anew for each.

    One generator serves all prompts in their order. Source: lm-evaluation-harness'
    ContextSampler.sample. Raises ValueError if there are fewer solved problems.
    """
    if shots > len(solved):
        raise ValueError(
            f"--shots is {shots}, but there are {len(solved)} solved problems: want fewer"
        )
    draw, shown = random.Random(SHOTS_SEED), []
    for e in examples:
        before = "".join(f"{problem}\n\n" for problem in draw.sample(solved, shots))
        shown.append(e._replace(prompt=before + e.prompt))
    return shown


def problems(
    task: str,
    template: str,
    path: Path,
    limit: int | None,
    shots: int,
    source: Path | None = None,
) -> list[Example]:
    """The examples to score, each after `shots` solved ones of the training split.

    source: the model's folder.
    """
    examples = load_examples(task, path, template, source)[:limit]
    return few_shot(examples, solved_problems(task, template), shots) if shots else examples


def check_task(task: str, loss: bool, data: Path | None) -> None:
    """Raise ValueError for a task without answers that can be scored here."""
    known = [name for name, t in TASKS.items() if t.kind == "math"]
    if loss:  # of a task whose test split has no answers in the form of its training, --data may
        known = [name for name, t in TASKS.items() if data or t.test not in (None, HUMANEVAL)]
    if task not in known:
        raise ValueError(
            f"task {task!r} has no {'answers' if loss else '#### N'!r} to score here: "
            f"want one of {', '.join(known)}{', or --data FILE' if loss and not data else ''}"
            f"{did_you_mean(task, known)}"
        )


def load_model(
    folder: Path | None, run: dict, args: argparse.Namespace, merged: bool = True
) -> tuple[MoEModel, Tokenizer]:
    """The model of a run, and its tokenizer. Without a `folder`, those of run["model"].

    args: with device and dtype. merged: fold the run's adapters into the weights.
    """
    device, dtype = compute(args.device, args.dtype or run.get("dtype"))
    if folder:
        return load_run(folder, merged, dtype, device)[:2]
    source = locate(run["model"])
    warn_of_slow_cpu(count_base(read_config(source)), device, args.device)
    return MoEModel.from_pretrained(source, dtype, device), load_tokenizer(source, run)


class Asked(NamedTuple):
    """What is to be scored, once flags, the run and the task's defaults have been put together."""

    task: str
    template: str
    tokenizer: Tokenizer
    examples: list[Example]
    rows: str  # what they are called: by their file, or by the task
    cfg: MoEConfig


def what_is_asked(args: argparse.Namespace, run: dict, folder: Path | None) -> Asked:
    """A flag comes first, then what was asked for at training, which holds for that task only."""
    task = args.task or run["task"]
    check_task(task, args.loss, args.data)
    own = run if task == run["task"] else {}
    template = args.template or own.get("template") or TASKS[task].template
    source = base_folder(run)
    given = args.data or own.get("eval_data")
    path = given or TASKS[task].test.fetch()
    tokenizer = load_tokenizer(source, {"template": template} | run)
    limit = args.limit or own.get("eval_limit")
    examples = problems(task, template, Path(path), limit, args.shots, source)
    rows = rows_name(given) or task
    return Asked(task, template, tokenizer, examples, rows, read_config(source))


def score_answers(asked: Asked, load: Callable[[], MoEModel], args: argparse.Namespace) -> Scored:
    """Decode an answer to each problem, and compare its number. A line, the result, the records."""
    check_scorable(asked.examples, asked.tokenizer, asked.cfg.max_len)
    max_new = args.max_new or TASKS[asked.task].max_new
    result, records = evaluate(
        load(), asked.tokenizer, asked.examples, asked.template, max_new, args.batch_size
    )
    accuracy, flexible = result["accuracy"], result["accuracy_flexible"]
    return f"accuracy {accuracy:.1%} (flexible {flexible:.1%})", result, records


def score_loss(asked: Asked, load: Callable[[], MoEModel], args: argparse.Namespace) -> Scored:
    """Measure how likely each given answer is. A line, the result, the records."""
    data = encode(asked.examples, asked.tokenizer, asked.cfg.max_len)
    result, records = measure_loss(load(), data, args.batch_size or BATCH)
    loss, exact = result["loss"], result["exact"]
    return f"loss {loss:.4f} nats per answer token, {exact:.1%} exact", result, records


def score(args: argparse.Namespace, run: dict, folder: Path | None, kept: Path | None) -> None:
    """Score one run, or the base model that `run` names, and print one line.

    run: run.json, or the same keys for a model without adapters, which has no folder. kept: where
    the results are kept. None: nowhere.
    """
    asked = what_is_asked(args, run, folder)

    def load() -> MoEModel:  # after all checks, as it may take minutes
        return load_model(folder, run, args, not args.factored)[0]

    shown, result, records = (score_loss if args.loss else score_answers)(asked, load, args)
    print(
        f"{folder or args.model}  {asked.rows}: {shown} on {result['total']} problems "
        f"in {result['seconds']} s"
    )
    if kept:
        changed = (args.data, args.limit, args.shots, args.max_new, args.template, args.factored)
        part = any(changed) or is_other_dtype(args.dtype, run)
        name = asked.task + ("-loss" if args.loss else "") + ("-part" if part else "")
        keep_results(kept, name, result, records)


def main() -> None:
    """Score each run, or the model."""
    args = flags.eval_gsm8k(__doc__)
    if args.model is not None:
        base = {"model": args.model, "task": default_task(args.model), "dtype": None}
        score(args, base, folder=None, kept=results_folder(None, args.out))
    for folder in args.run or []:
        kept = results_folder(folder, args.out)  # before the run is read: it may refuse --out
        score(args, read_run(folder), folder, kept)


if __name__ == "__main__":
    command(main)
