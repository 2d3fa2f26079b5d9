"""Ask a tuned model, or any other, and read its answer as it is made.

    python generate.py --run runs/DIR "Ravi had 48 toys and bought 17 more. How many has he now?"
    python generate.py --run runs/DIR --compare --show-experts "Ravi had 48 toys ..."
    python generate.py --run runs/DIR --file questions.txt        one prompt on each line
    python generate.py --model tiny "Once there was a" --temperature 0.8

Without a prompt, the lines of standard input are asked. In a terminal you are asked for them, until
Ctrl-D. Each prompt is asked by itself: the model is told nothing of those before it.

What is sent. A run knows the form of its training: a run on math gets your text as "Question: TEXT"
and a line "Answer:". A run on chats gets it as the user's turn. A run with --template FILE gets it
in that file's prompt. If the prompt has several fields, the text is a JSON object with them. Text
that has the form already does not get it twice. A model gets the text as it is. --task tiny-math
gives it that task's form, as a Hub export of such a run wants it. --raw sends the text as it is in
any case. The command says on standard error what it sends. A token that the model puts before each
text (bos) stands first, as in training.

One prompt is answered token by token, unless --show-experts is given. Several are decoded
--batch-size at a time, and each answer stands below its prompt. The likeliest token is taken,
unless --temperature has tokens drawn.

--show-experts lists before each answer all of its tokens, the prompt's too, with the experts that
each visited in each layer. "*" marks those that the run adapts: of HELLoRA the hot ones.

Read it from top to bottom: how a token is drawn, many prompts at once, one prompt token by token,
the command. Letters: B sequences    T tokens per sequence    V vocabulary
"""

if __name__ == "__main__":
    import plumbing.quiet  # noqa: F401  a signal ends it in one line, from here on
    from plumbing import cli, flags

    cli.read_early(flags.generate, __doc__)  # before torch is imported, which takes seconds

import argparse
import codecs
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hellora import load_run, parse_method
from moe_model import KVCache, MoEModel
from plumbing import flags, ranks
from plumbing.base_model import base_folder
from plumbing.checkpoint import count_base, locate, read_config
from plumbing.cli import command, plain, progress, say
from plumbing.data import (
    TASKS,
    Example,
    encode_prompt,
    fields_of_own_rows,
    is_file_template,
    question,
    question_form,
)
from plumbing.device import compute, free_bytes, warn_of_slow_cpu
from plumbing.memory import problem
from plumbing.rows import rows_of
from plumbing.run_folder import read_run
from plumbing.tokenizer import Tokenizer, load_tokenizer

BATCH = 100  # prompts decoded together, if they fit
# Finished rows leave the batch when fewer than this share go on: each time costs a cache copy.
SHRINK = 0.75
TAIL = 16  # tokens in which `ended` looks for the end of a text
MAX_NEW = 256  # tokens of an answer, where no task says how many
HOT, PLAIN = "\x1b[1;33m", "\x1b[0m"  # how a terminal shows a marked expert

# ---- how a token is drawn ------------------------------------------------------------------------


class Sampling(NamedTuple):
    """How to draw tokens. A prompt's tokens depend on its own seed, not on its batch."""

    temperature: float
    top_p: float
    seeds: list[int]  # one a prompt


def sample(logits: Tensor, temperature: float, top_p: float, at: Tensor) -> Tensor:
    """Tokens [B] from logits [B, V].

    at [B], in [0, 1): where in the nucleus, the likeliest token first. The nucleus is the smallest
    set of likeliest tokens with a share of at least `top_p` (Holtzman et al. 2020).
    """
    share, ids = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    share *= (
        share.cumsum(-1) - share < top_p
    )  # a token stays if those before it do not have top_p yet
    reach = share.cumsum(-1)
    return ids.gather(-1, torch.searchsorted(reach, at[:, None] * reach[:, -1:], right=True))[:, 0]


def next_tokens(logits: Tensor, sampling: Sampling | None, at: Tensor | None) -> Tensor:
    """Tokens [B] from logits [B, V]: drawn at `at` [B] (see `sample`), or the likeliest."""
    if sampling is None:
        return logits.argmax(-1)
    return sample(logits, sampling.temperature, sampling.top_p, at)


def draws(sampling: Sampling | None, max_new: int, device: torch.device) -> Tensor | None:
    """[B, max_new], in [0, 1): the random numbers of each prompt, from its own seed."""
    if sampling is None:
        return None
    seeds = sampling.seeds or [0]
    rows = [torch.rand(max_new, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(rows).double().to(device)


# ---- many prompts at once ------------------------------------------------------------------------


def generate(
    model: MoEModel,
    prompts: list[list[int]],
    max_new: int,
    stops: tuple[int, ...],
    batch_size: int | None,
    label: str = "",
    sampling: Sampling | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """For each prompt, in order, the tokens that follow it.

    They end before the first of `stops`, after `max_new` tokens, at the model's context, or where
    `ended` is true of the last TAIL tokens, which are kept. Without `sampling`, each token is the
    likeliest. Prompts of like length share a batch, and several ranks share the prompts. Without a
    batch_size it is BATCH, or on a GPU as many as fit. With a `label` the progress is shown. Raises
    ValueError for a prompt beyond the context, or without any token.
    """
    check_prompts(prompts, model.cfg.max_len)
    if batch_size is None:
        batch_size = fitting_batch(model, max(map(len, prompts), default=0), max_new)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine, most = order[ranks.rank() :: ranks.world()], -(-len(order) // ranks.world())
    done: dict[int, list[int]] = {}
    with progress(label=label, unit="problem", total=len(mine), hidden=not label) as bar:
        for start in range(0, most, batch_size):
            chosen = mine[start : start + batch_size]
            own = sampling and sampling._replace(seeds=[sampling.seeds[i] for i in chosen])
            answers = decode_batch(model, [prompts[i] for i in chosen], max_new, stops, own, ended)
            done |= zip(chosen, answers, strict=True)
            bar.update(len(chosen))
    for part in ranks.gathered(done):
        done |= part
    return [done[i] for i in range(len(prompts))]


def fitting_batch(model: MoEModel, longest: int, max_new: int) -> int:
    """How many of the longest prompts to decode together: BATCH, or what a GPU has memory for."""
    if model.device.type != "cuda":
        return BATCH
    free = free_bytes(model.device)
    each = problem(model.cfg, model.dtype.itemsize, longest, max_new)
    n = max(1, min(BATCH, int(0.85 * free / each)))
    n = -ranks.largest(-n, model.device)  # the smallest of all ranks': they take equal steps
    if n < BATCH:
        print(f"{n} prompts are decoded together: {free / 1e9:.1f} GB are free")
    return n


def check_prompts(prompts: list[list[int]], max_len: int) -> None:
    """Raise ValueError for a prompt that leaves no room in the context, or has no token."""
    for n, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {n} of {len(prompts)} has no tokens: want one at least")
    longest = max(map(len, prompts), default=0)
    if longest >= max_len:
        raise ValueError(f"a prompt has {longest} tokens, but the model's context is {max_len}")


@torch.no_grad()
def decode_batch(
    model: MoEModel,
    prompts: list[list[int]],
    max_new: int,
    stops: tuple[int, ...],
    sampling: Sampling | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """`generate` for prompts that go through the model together, padded on the left to one length.

    A model that is cut up needs all ranks for each layer. So all take as many steps as the one with
    the longest answer, and a rank without prompts takes them with a prompt of padding.
    """
    n, prompts = len(prompts), prompts or [[0]]
    at = draws(sampling, max_new, model.device)  # [B, max_new]
    width = max(map(len, prompts))
    room = [min(max_new, model.cfg.max_len - len(p)) if n else 0 for p in prompts]
    length = torch.tensor(room, device=model.device)
    max_new = ranks.largest(max(room), model.device)
    pad = torch.tensor([width - len(p) for p in prompts], device=model.device)
    tokens = torch.tensor(
        [[0] * (width - len(p)) + p for p in prompts], device=model.device
    )  # [B, T]
    cache = KVCache(model.cfg, pad, width + max_new, model.dtype)
    stop_ids = torch.tensor(stops, device=model.device)
    outputs = torch.zeros(len(prompts), max_new, dtype=torch.long, device=model.device)
    rows = torch.arange(len(prompts), device=model.device)  # the rows that are still in the batch
    for step in range(max_new):
        logits, _ = model(tokens, cache)  # [B, 1, V]
        drawn_at = at[rows, step] if sampling else None
        tokens = next_tokens(logits[:, 0], sampling, drawn_at)[:, None]  # [B, 1]
        outputs[rows, step] = tokens[:, 0]
        stopped = torch.isin(tokens[:, 0], stop_ids)
        length[rows] = torch.where(stopped, length[rows].clamp(max=step), length[rows])
        if ended:
            tails = outputs[rows, max(0, step + 1 - TAIL) : step + 1].tolist()
            stopped = torch.tensor([ended(tail) for tail in tails], device=model.device)
            length[rows] = torch.where(stopped, length[rows].clamp(max=step + 1), length[rows])
        going_on = length[rows] > step + 1
        n_going_on = int(going_on.sum())  # here a GPU's host waits, once a token
        if ranks.largest(n_going_on, model.device) == 0:
            break
        if 0 < n_going_on < SHRINK * len(rows):
            keep = going_on.nonzero().squeeze(1)
            rows, tokens = rows[keep], tokens[keep]
            cache.keep(keep)
    return [row[:end].tolist() for row, end in zip(outputs[:n], length[:n].tolist(), strict=True)]


# ---- one prompt, token by token ------------------------------------------------------------------


@torch.no_grad()
def stream(
    model: MoEModel,
    prompt: list[int],
    max_new: int,
    stops: tuple[int, ...],
    sampling: Sampling | None = None,
) -> Iterator[int]:
    """The tokens that `generate` has for this prompt, each as soon as it is known.

    Raises ValueError, with the first token, for a prompt beyond the context, or without any token.
    """
    check_prompts([prompt], model.cfg.max_len)
    at = draws(sampling, max_new, model.device)  # [1, max_new]
    max_new = min(max_new, model.cfg.max_len - len(prompt))
    tokens = torch.tensor([prompt], device=model.device)  # [1, T]
    no_padding = torch.zeros(1, dtype=torch.long, device=model.device)
    cache = KVCache(model.cfg, no_padding, len(prompt) + max_new, model.dtype)
    for step in range(max_new):
        logits, _ = model(tokens, cache)  # [1, 1, V]
        tokens = next_tokens(logits[:, 0], sampling, at[:, step] if sampling else None)[:, None]
        token = int(tokens)
        if token in stops:
            return
        yield token


def pieces(tokens: Iterable[int], tokenizer: Tokenizer, lead: str = "") -> Iterator[str]:
    """The text of `tokens` as they come: in all what `tokenizer.decode` makes of them, less `lead`.

    They stand "inside" a text, behind a prompt. A character may be of several tokens: it comes with
    the last of them. lead: what the form of the prompt puts before an answer, such as a blank.
    """
    whole = codecs.getincrementaldecoder("utf-8")("replace")
    text, shown = "", 0
    for token in chain(tokens, [None]):
        text += whole.decode(tokenizer.token_bytes.get(token, b""), final=token is None)
        if token is not None and len(text) < len(lead) and lead.startswith(text):
            continue  # so far this is a part of the lead, which is not shown
        answer = text.removeprefix(lead)
        yield answer[shown:]
        shown = len(answer)


# ---- the experts of each token -------------------------------------------------------------------


class Marked(NamedTuple):
    """The experts that `show_experts` marks: those that a run adapts."""

    word: str  # what they are: "hot", "cold", "random". "adapted", where all are
    experts: dict[int, list[int]]  # layer -> ids

    @classmethod
    def of(cls, run: dict) -> "Marked":
        """The marked experts of a run.json. None of {}, which stands for a model."""
        rule = parse_method(run["method"]).rule if run else None
        word = {"all": "adapted", "global-hot": "hot"}.get(rule, rule)
        return cls(word, {int(layer): ids for layer, ids in run.get("adapted", {}).items()})


@torch.no_grad()
def show_experts(
    model: MoEModel, tokenizer: Tokenizer, ids: list[int], marked: Marked, color: bool
) -> Iterator[str]:
    """Lines: each of the tokens `ids`, and the experts that it visits in each layer.

    color: show the marked ones by color, too.
    """
    some = any(marked.experts.values())
    yield f"token            layer  experts, the likeliest first{f', * is {marked.word}' * some}"
    _, routing = model.trunk(torch.tensor([ids], device=model.device))
    visited = {layer: r.expert_ids[0].tolist() for layer, r in routing.items()}  # each [T][K]
    n_marked = total = 0
    for at, token in enumerate(ids):
        name = repr(tokenizer.token_bytes.get(token, b"").decode("utf-8", "replace"))
        for layer, of_tokens in visited.items():
            cells = []
            for expert in of_tokens[at]:
                is_marked = expert in marked.experts.get(layer, ())
                cell = f"{'*' if is_marked else ''}{expert}".rjust(4)
                cells.append(f"{HOT}{cell}{PLAIN}" if is_marked and color else cell)
                n_marked += is_marked
                total += 1
            yield f"{name:<16} {layer:5d}  {' '.join(cells)}"
            name = ""
    if some:
        yield f"{n_marked / total:.1%} of these {total:,} visits went to {marked.word} experts"


def has_colors() -> bool:
    """Whether standard output is a terminal that may be written to in color (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


# ---- the command ---------------------------------------------------------------------------------


Form = Callable[[str], Example]  # what puts a text into the form of a task or of a run's rows


class Question(NamedTuple):
    """One prompt, ready to be asked."""

    number: int  # from 1
    text: str  # as it was given
    ids: list[int]
    lead: str  # what its form puts before an answer


def given_prompts(args: argparse.Namespace) -> list[tuple[str, str]] | None:
    """(place, text) of each prompt. None if they will be typed in a terminal.

    Raises FileNotFoundError or ValueError for a file that is not there, or has no text.
    """
    if args.prompt is not None:
        return [("the prompt", args.prompt)]
    if args.file is None and sys.stdin.isatty():
        return None
    if args.file and not args.file.is_file():
        raise FileNotFoundError(f"there is no file {args.file}: want a prompt on each line")
    place = args.file or "standard input"
    body = args.file.read_bytes() if args.file else sys.stdin.buffer.read()
    try:
        lines = body.decode("utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"{place} is not UTF-8 ({error}): want text") from error
    found = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            found.append((f"{place}, line {n}", line.removesuffix("\r")))
    if not found:
        raise ValueError(f"{place} has no text: want a prompt on each line, or one as an argument")
    return found


def typed_prompts() -> Iterator[str]:
    """The lines that are typed in a terminal, until Ctrl-D. Ctrl-C ends the command."""
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys then work in input()
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if text.strip():
            yield text


def prepare(
    n: int, place: str, text: str, form: Form | None, tokenizer: Tokenizer, max_len: int
) -> Question:
    """Prompt n, in its form, as ids. Raises ValueError if it has no text, or too much."""
    if not text.strip():
        raise ValueError(f"{place} has no text: want some")
    asked = form(text) if form else None
    ids = encode_prompt(asked.prompt if asked else text, tokenizer, place)
    if len(ids) >= max_len:
        raise ValueError(
            f"{place} has {len(ids)} tokens as it is sent, and prompt and answer share the "
            f"model's context of {max_len}: want a shorter one"
        )
    return Question(n, text, ids, asked.answer if asked else "")


def resolve(args: argparse.Namespace, run: dict, source: Path) -> Form | None:
    """Fill in task, template and max_new, and say what is sent. Returns the form, or None: no form.

    run: run.json, or {} of a model. source: the model's folder. Raises ValueError for a task or a
    template that is not known.
    """
    trained_on, own = run.get("task"), ()
    if not args.raw and trained_on is not None and args.task in (None, trained_on):
        args.task = trained_on
        if args.template is None:
            args.template, own = run.get("template"), own_fields_of(run, args.run)
    if args.task not in (None, *TASKS):
        raise ValueError(f"{args.run} was trained on {args.task}, which has no form: want --raw")
    if not args.task:
        args.max_new = args.max_new or MAX_NEW
        how = "" if args.raw else " (--task NAME puts it into a form)"
        print(f"the text is sent unchanged{how}", file=sys.stderr)
        return None
    of_task = not own and not is_file_template(args.task, args.template)
    args.max_new = args.max_new or (TASKS[args.task].max_new if of_task else MAX_NEW)
    fields, show = question_form(args.task, args.template, own, source)
    several = len(fields) > 1
    shown = show({field: f"{{{field}}}" if several else "TEXT" for field in fields})[0]
    if shown == "TEXT":
        alike = args.run and own != ("text",)  # texts alone are trained on without a prompt
        how = "unchanged" + ", as the prompts in training were" * bool(alike)
    elif several:
        how = f"as {shown!r}, from a JSON object with {', '.join(fields)} (--raw: unchanged)"
    else:
        how = f"as {shown!r}, where TEXT is your text (--raw: unchanged)"
    print(f"the text is sent {how}", file=sys.stderr)
    return partial(question, task=args.task, template=args.template, own=own, model=source)


def own_fields_of(run: dict, folder: Path) -> tuple[str, ...]:
    """The fields of the rows that a run was trained on, if these have a form of their own.

    An older run.json does not say it, but it names the file of the rows. A line says from where the
    form is taken then.
    """
    if not run.get("data") or run.get("fields") is not None:
        return tuple(run.get("fields") or ())
    lacks = f"{folder / 'run.json'} is an older one, without the fields of its rows"
    task, template = run["task"], run.get("template")
    try:
        _, row = next(rows_of(Path(run["data"])))
        found = fields_of_own_rows(task, template, row)
    except (OSError, ValueError):
        form = f"the form of {run['task']} is taken: want --raw if the rows had another"
        print(f"{lacks}, and {run['data']} cannot be read: {form}", file=sys.stderr)
        return ()
    print(f"{lacks}: they are taken from the first row of {run['data']}", file=sys.stderr)
    return found


def load_models(args: argparse.Namespace, run: dict, source: Path) -> dict[str, MoEModel]:
    """{"base": the model as it is, "tuned": that of the run}: those that are asked."""
    device, dtype = compute(args.device, args.dtype or run.get("dtype"))
    warn_of_slow_cpu(count_base(read_config(source)), device, args.device)
    if args.compare and device.type == "cuda":
        check_two_fit(2 * count_base(read_config(source)) * dtype.itemsize, free_bytes(device))
    tuned = {"tuned": load_run(args.run, True, dtype, device)[0]} if run else {}
    base = {}
    if args.compare or not run:
        base["base"] = MoEModel.from_pretrained(source, dtype, device).requires_grad_(False)
    return base | tuned


def check_two_fit(needed: int, free: int) -> None:
    """Raise OSError if the weights of two models, `needed` bytes, are more than a GPU has free."""
    if needed > free:
        raise OSError(
            f"--compare holds two models: {needed / 1e9:.1f} GB of weights, but the GPU has "
            f"{free / 1e9:.1f} GB free. Ask the run without --compare, and its base with --model"
        )


def answers_of(
    model: MoEModel, some: list[Question], tokenizer: Tokenizer, args: argparse.Namespace
) -> Sequence[Iterable[int]]:
    """For each question the tokens of its answer. Those of a single one come as they are made."""
    sampling = None
    if args.temperature:
        seeds = [(args.seed or 0) + q.number - 1 for q in some]
        sampling = Sampling(args.temperature, args.top_p or 1.0, seeds)
    prompts, stops = [q.ids for q in some], tokenizer.stops
    if len(some) == 1:
        return [stream(model, prompts[0], args.max_new, stops, sampling)]
    return generate(model, prompts, args.max_new, stops, args.batch_size, "answer", sampling)


def answer(
    some: list[Question],
    models: dict[str, MoEModel],
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    marked: Marked,
    titles: bool,
) -> None:
    """Ask each of the models, and print the answers. titles: print the prompts above them.

    The tables of experts are long. They come first, so that the answers stay in sight.
    """
    answers = {label: answers_of(m, some, tokenizer, args) for label, m in models.items()}
    for at, asked in enumerate(some):
        if titles:
            say(f"> {asked.text.strip()}")
        of_models = {label: answers[label][at] for label in models}  # tokens, some still to come
        for label, model in models.items() if args.show_experts else ():
            if len(models) > 1:
                print(f"the experts of {label}:")
            of_models[label] = list(of_models[label])
            ids = asked.ids + of_models[label]
            print(*show_experts(model, tokenizer, ids, marked, has_colors()), sep="\n")
        for label, tokens in of_models.items():
            if len(models) > 1:
                print(f"{label}:")
            print_answer(tokens, tokenizer, asked.lead)
        if titles:
            print(flush=True)


def print_answer(tokens: Iterable[int], tokenizer: Tokenizer, lead: str) -> None:
    """Print the text of `tokens` as they come."""
    for piece in pieces(tokens, tokenizer, lead):
        print(plain(piece), end="", flush=True)
    print(flush=True)


def main() -> None:
    """Check the prompts, load the models, answer."""
    args = flags.generate(__doc__)
    prompts = given_prompts(args)
    run = read_run(args.run, "adapted") if args.run else {}
    source = base_folder(run) if run else locate(args.model)
    tokenizer = load_tokenizer(source, {"template": args.template} | run)
    max_len = read_config(source).max_len
    form = resolve(args, run, source)
    questions = []  # read before the model, which may take minutes
    for n, (place, text) in enumerate(prompts or [], 1):
        questions.append(prepare(n, place, text, form, tokenizer, max_len))

    models = load_models(args, run, source)
    marked = Marked.of(run)
    size = args.batch_size or BATCH
    for start in range(0, len(questions), size):
        some = questions[start : start + size]
        answer(some, models, tokenizer, args, marked, titles=len(questions) > 1)
    if prompts is None:
        for n, text in enumerate(typed_prompts(), 1):
            try:
                asked = prepare(n, "your text", text, form, tokenizer, max_len)
            except ValueError as error:  # the next one may be right
                print(f"error: {error}", file=sys.stderr)
            else:
                answer([asked], models, tokenizer, args, marked, titles=False)


if __name__ == "__main__":
    command(main)
