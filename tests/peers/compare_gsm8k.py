"""Our GSM8K prompts and verdicts against those of lm-evaluation-harness, made by itself.

    python -m tests.peers.compare_gsm8k TRAIN.jsonl TEST.jsonl [--answers 20000] [--seed 0]

Needs `pip install lm-eval` (0.4.13 was tried). Its own task file, sampler, filters and metric are
used; only the rows come from these files, GSM8K's. Few-shot prompts of all test rows are compared,
and both verdicts on seeded answers that mix numbers, marks and the ends of a text. Prints what
differs, and then exits with 1.
"""

import argparse
import os
import random
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import postprocess_generated_text

import eval_gsm8k
from plumbing.data import TASKS
from plumbing.downloads import Source

FILTERS = ("strict-match", "flexible-extract")
MARKS = ("#### ", "#### ", "####", "\n", " ", ".", ",", "$", "-", "=", "٣", "The answer is ")
ENDS = ("</s>", "<|im_end|>", "Question:", "Question", "<|im_", "</s")


def their_task(train: Path, test: Path) -> ConfigurableTask:
    """The harness' gsm8k, on the rows of these files."""
    text = (files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml").read_text()
    rows = {"data_files": {"train": str(train), "test": str(test)}}
    changes = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": rows}
    return ConfigurableTask(config=yaml.safe_load(text) | changes)


def answers(rows: list[dict], count: int, seed: int) -> list[tuple[dict, str]]:
    """Rows, each with a text that a model might have generated for it."""
    draw, pairs = random.Random(seed), []
    for _ in range(count):
        row = draw.choice(rows)
        right = row["answer"].rpartition("#### ")[2]
        sign, tail = draw.choice(("", "-", "$")), draw.choice(("", ".", ".50"))
        other = f"{sign}{draw.randrange(10**6):,}{tail}"
        pieces = [*MARKS, *ENDS, right, right, other, row["answer"]]
        text = "".join(draw.choice(pieces) for _ in range(draw.randint(1, 14)))
        pairs.append((row, text))
    return pairs


def their_verdicts(task: ConfigurableTask, pairs: list[tuple[dict, str]]) -> list[tuple[bool, ...]]:
    """(strict, flexible) of each text, cut as the harness' models cut it."""
    until, instances = task.config.generation_kwargs["until"], []
    for n, (row, text) in enumerate(pairs):
        kept = postprocess_generated_text(text, until, None)
        instances.append(Instance("generate_until", row, ("", {}), n, resps=[kept]))
    task._instances = instances
    task.apply_filters()

    def verdict(one: Instance, name: str) -> bool:
        return task.process_results(one.doc, [one.filtered_resps[name]])["exact_match"] == 1

    return [tuple(verdict(one, name) for name in FILTERS) for one in instances]


def main() -> int:
    """Compare, and print a line of counts for each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--answers", default=20_000, type=int, help="number of texts")
    parser.add_argument("--seed", default=0, type=int, help="seed of the texts")
    args = parser.parse_args()
    task = their_task(args.train, args.test)
    TASKS["gsm8k"] = replace(TASKS["gsm8k"], train=Source(str(args.train.resolve())))
    rows, wrong = list(task.test_docs()), 0

    for shots in (0, 1, 5, 8):
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        theirs = [task.fewshot_context(row, num_fewshot=shots) for row in rows]
        ours = [e.prompt for e in eval_gsm8k.problems("gsm8k", "plain", args.test, None, shots)]
        differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
        print(f"{len(ours):6} prompts with {shots} solved problems, {differ} differ")
        wrong += differ

    pairs, right, differ = answers(rows, args.answers, args.seed), 0, 0
    for (row, text), want in zip(pairs, their_verdicts(task, pairs), strict=True):
        gold = eval_gsm8k.gold(row)
        got = tuple(found == gold for found in eval_gsm8k.extract(text))
        right += got[0]
        if got != want:
            differ += 1
            print(f"  {text!r}, right: {gold}\n    ours {got}, theirs {want}")
    print(f"{len(pairs):6} answers, {right} right by the strict rule, {differ} differ")
    return int(wrong + differ > 0)


if __name__ == "__main__":
    sys.exit(main())
