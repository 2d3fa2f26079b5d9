"""The share of harmful requests that runs of train.py, or a model without adapters, refuse.

    python -m paper.eval_safety --run runs/a runs/b   on HEx-PHI, which is gated, or --data FILE
    python -m paper.eval_safety --model tiny          on the built-in tiny-safety: no real harm
    python -m paper.eval_safety --run runs/a --show 3        with some prompts and answers to read

The rate counts keywords, and guarantees nothing. Decoding is greedy. Only generated text is
searched. (LoRI's evaluator also searches the prompts, and 17 of 330 have a keyword.) Prompts and
answers are not printed and not kept, unless --show or --keep-texts is given.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.eval_safety, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

import argparse
import csv
import time
from functools import cache
from pathlib import Path

from eval_gsm8k import load_model
from generate import generate
from paper.scoring.refusals import RULE, RULES
from plumbing import flags
from plumbing.cli import COUNT, Parser, add_compute_flags, command, say
from plumbing.data import TASKS, TEMPLATES, encode_prompt
from plumbing.hub import snapshot
from plumbing.rows import read_rows
from plumbing.run_folder import is_other_dtype, keep_results, read_run, results_folder

HEX_PHI = "LLM-Tuning-Safety/HEx-PHI"
WANTED = "JSON lines or a JSON list with 'instruction', or a .csv of one column and no header"


@cache
def hex_phi() -> list[dict]:
    """HEx-PHI's rows, 10 files of 30. Raises OSError, which says how to get access."""
    page = f"https://huggingface.co/datasets/{HEX_PHI}"
    print(f"HEx-PHI: {page} (gated, with its own licence: do not pass it on)")
    instead = f"or give a copy of it with --data FILE: {WANTED}"
    folder = snapshot(
        HEX_PHI, None, "category_1.csv", last="category_*.csv", kind="dataset", instead=instead
    )
    return [row for path in sorted(folder.glob("category_*.csv")) for row in read_prompts(path)]


def read_prompts(path: Path) -> list[dict]:
    """The rows of a file, with an instruction.

    Raises FileNotFoundError or ValueError. No message quotes a prompt.
    """
    if path.suffix != ".csv" or not path.is_file():
        return [{"input": "", "output": "", **row} for row in read_rows(path, ("instruction",))]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} cannot be read as CSV ({type(error).__name__}): want {WANTED}"
        ) from error
    if {len(row) for row in rows} != {1}:
        raise ValueError(
            f"{path} has no rows, or rows of several columns (quote commas): want {WANTED}"
        )
    return [{"instruction": prompt, "input": "", "output": ""} for (prompt,) in rows]


def summary(harmful: list[bool], signs: list[str | None]) -> dict:
    """The refusal rate of harmful prompts, and the number of harmless prompts that are refused."""
    refused = [h for h, sign in zip(harmful, signs, strict=True) if sign is not None]
    return {
        "refusal_rate": sum(refused) / sum(harmful),
        "refused": sum(refused),
        "total": sum(harmful),
        "harmless_refused": refused.count(False),
        "harmless_total": harmful.count(False),
    }


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    rules = "; ".join(f"{name}: {rule.about}" for name, rule in RULES.items())
    tasks = [name for name, task in TASKS.items() if task.kind == "safety"]
    rare = p.add_argument_group("rarely needed").add_argument
    # fmt: off
    what.add_argument("--run", type=Path, nargs="+", action="extend", metavar="DIR",
                      help="run folders of train.py")
    what.add_argument("--model", type=flags.model_name,
                      help="without adapters: tiny, a backbone's name, a folder, a Hub id")
    p.add_argument("--task", choices=tasks,
                   help="default: the run's, if it is one; else by the model")
    p.add_argument("--data", type=Path, metavar="FILE",
                   help=f"prompts in place of the task's: {WANTED}")
    p.add_argument("--out", type=Path, metavar="DIR",
                   help="with --model: keep results and answers here")
    rare("--rule", choices=RULES, default=RULE, help=rules)
    rare("--template",
         help="alpaca, lori (another than in training), bare (default: the run's)")
    p.add_argument("--limit", type=COUNT, metavar="N", help="the first N; kept as TASK-part")
    rare("--max-new", type=COUNT, help="tokens of an answer at most; kept as TASK-part")
    rare(
        "--batch-size", type=COUNT,
         help="decoded together (default 100, on a GPU as many of them as fit)",
    )  # fmt: skip
    p.add_argument("--show", type=COUNT, default=0, metavar="N", help="print N prompts and answers")
    rare("--keep-texts", action="store_true",
         help="prompts and answers into answers-TASK.jsonl")
    # fmt: on
    add_compute_flags(rare)
    return p.parse_args()


def safety_task(run: dict) -> str:
    """The task of a run if it is one of safety, else the one that fits the model."""
    if run["task"] in TASKS and TASKS[run["task"]].kind == "safety":
        return run["task"]
    return "tiny-safety" if run["model"] == "tiny" else "safety"


def score(args: argparse.Namespace, run: dict, folder: Path | None) -> tuple[str, dict, list[dict]]:
    """The task, the entry of results.json, and a record of each prompt.

    Without a `folder`, the base is scored.
    """
    began = time.perf_counter()
    task = args.task or safety_task(run)
    # The flags of the training hold only for the task of the training.
    own = run if task == run["task"] else {}
    template = args.template or own.get("template") or TASKS[task].template
    if ("refusal", template) not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: want alpaca, lori or bare")
    path = args.data or own.get("eval_data") or (TASKS[task].test and TASKS[task].test.fetch())
    rows = (read_prompts(Path(path)) if path else hex_phi())[: args.limit]
    harmful = [row.get("harmful") is not False for row in rows]
    if not any(harmful):
        raise ValueError(
            f'all {len(rows)} prompts of {path} have "harmful": false: want harmful ones too'
        )
    model, tokenizer = load_model(folder, {"template": template} | run, args)
    prompts = [TEMPLATES["refusal", template](row)[0] for row in rows]
    ids = [encode_prompt(prompt, tokenizer, f"row {n}") for n, prompt in enumerate(prompts, 1)]
    max_new = args.max_new or TASKS[task].max_new
    answers = generate(model, ids, max_new, tokenizer.stops, args.batch_size, f"{folder or task}")
    outputs = [tokenizer.decode(answer, "inside") for answer in answers]
    signs = [RULES[args.rule].sign(output) for output in outputs]
    result = summary(harmful, signs) | {"rule": args.rule, "template": template}
    result["data"] = Path(path).name if path else HEX_PHI
    result["seconds"] = round(time.perf_counter() - began, 2)
    columns = zip(signs, prompts, outputs, strict=True)
    return task, result, [{"sign": sign, "prompt": p, "output": o} for sign, p, o in columns]


def main() -> None:
    """Score each run, or the model. Each is a row of the table."""
    args = parse_args()
    runs = [(folder, read_run(folder)) for folder in args.run or []]
    runs = runs or [(None, {"model": args.model, "task": None})]
    names = [str(folder or args.model) for folder, _ in runs]
    width = max(map(len, names))
    print(
        f"rule {args.rule} ({RULES[args.rule].about}): "
        "a rate of keywords, not a guarantee of safety"
    )
    for name, (folder, run) in zip(names, runs, strict=True):
        out = results_folder(folder, args.out)
        task, result, records = score(args, run, folder)
        if name == names[0]:
            print(
                f"{'':{width}}  {'task':11}  {'harmful refused':16}  {'harmless refused':16}  "
                "seconds"
            )
        harmful = f"{result['refusal_rate']:6.1%} of {result['total']}"
        harmless = f"{result['harmless_refused']:6} of {result['harmless_total']}"
        print(f"{name:{width}}  {task:11}  {harmful:16}  {harmless:16}  {result['seconds']:7}")
        for r in records[: args.show]:
            say(f"  {r['prompt'].strip()}\n    -> {r['output'].strip()!r} (refusal: {r['sign']})")
        if out:
            asked = (args.data, args.limit, args.max_new, args.template, args.rule != RULE)
            kept_as = f"{task}-part" if any(asked) or is_other_dtype(args.dtype, run) else task
            kept = records if args.keep_texts else [{"sign": r["sign"]} for r in records]
            keep_results(out, kept_as, result, kept)


if __name__ == "__main__":
    command(main)
