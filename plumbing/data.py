"""The tasks as (prompt, answer) pairs. The batch of step n is a function of n alone.

Letters: B sequences    T tokens per sequence
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_model import IGNORE
from plumbing import ranks
from plumbing.cli import did_you_mean, plain, say
from plumbing.downloads import Source
from plumbing.rows import (
    CHATS,
    FIELD,
    OPTIONAL,
    ChatTemplate,
    ChatText,
    check_unicode,
    fields_of,
    fill,
    is_csv,
    misspelt,
    names,
    read_rows,
    read_template,
    rows_of,
    with_fields,
)
from plumbing.tokenizer import Tokenizer

# ---- tasks ---------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A row of a task as the model sees it."""

    prompt: str
    answer: str
    row: dict  # the row as it was read, for scoring


@dataclass(frozen=True)
class Task:
    """A data set, the template that shows it, and the length of an answer."""

    kind: str  # math, code or safety: the fields of its rows (FIELDS), and how answers are scored
    train: Source
    test: Source | None  # None: it is gated, and paper/eval_safety.py asks for a file
    template: str  # the entry of TEMPLATES that is used without --template
    max_new: int = 512  # the largest number of tokens that scoring generates


GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
GSM8K_TRAIN = Source(
    GSM8K + "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465", "MIT"
)
GSM8K_TEST = Source(
    GSM8K + "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14", "MIT"
)
CODE_ALPACA = Source(  # 20,022 rows, at a fixed commit
    "code_alpaca_20k.json",
    repo="sahil2801/CodeAlpaca-20k",
    commit="469fd122c8e99d31d9fcd75b2fd01f6bd7eb6846",
    licence="CC BY-NC 4.0, non-commercial (its repository), or CC BY 4.0 (its page on the Hub)",
)
# 20,000 rows of cleaned Alpaca and 2,000 of safety. LoRI's train.json has the same id in git.
SAFERPACA = Source(
    "https://raw.githubusercontent.com/vinid/safety-tuned-llamas/refs/heads/main/data/training/"
    "saferpaca_Instructions_2000.json",
    "4f16a9be684ca7acf1715a763f9570a857008822",
    "CC BY-NC 4.0, non-commercial",
)
HUMANEVAL = Source(
    "https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
    "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    "MIT",
)
TASKS = {
    "gsm8k": Task("math", GSM8K_TRAIN, GSM8K_TEST, "plain"),
    "code": Task("code", CODE_ALPACA, HUMANEVAL, "alpaca"),
    "safety": Task("safety", SAFERPACA, None, "alpaca"),
    "tiny-math": Task(
        "math", Source("tiny/math-train.jsonl"), Source("tiny/math-test.jsonl"), "plain", 64
    ),
    "tiny-math-dev": Task(
        "math", Source("tiny/math-train.jsonl"), Source("tiny/math-dev.jsonl"), "plain", 64
    ),
    "tiny-math-reworded": Task(
        "math",
        Source("tiny/math-train.jsonl"),
        Source("tiny/math-reworded-test.jsonl"),
        "plain",
        64,
    ),
    "tiny-code": Task(
        "code", Source("tiny/code-train.jsonl"), Source("tiny/code-test.jsonl"), "bare", 96
    ),
    "tiny-code-dev": Task(
        "code", Source("tiny/code-train.jsonl"), Source("tiny/code-dev.jsonl"), "bare", 96
    ),
    "tiny-safety": Task(
        "safety", Source("tiny/safety-train.jsonl"), Source("tiny/safety-test.jsonl"), "bare", 64
    ),
    "tiny-safety-dev": Task(
        "safety", Source("tiny/safety-train.jsonl"), Source("tiny/safety-dev.jsonl"), "bare", 64
    ),
}  # fmt: skip
FIELDS = {
    "math": ("question", "answer"),
    "code": ("instruction", "input", "output"),
    "safety": ("instruction", "input", "output"),
}


def default_task(model: str) -> str:
    """The task of a command without --task."""
    return "tiny-math" if model == "tiny" else "gsm8k"


def rows_name(path: str | Path | None) -> str:
    """What rows of one's own are called where a user sees them: their file's name. None: ""."""
    return plain(Path(path).name) if path else ""


def task_in_words(run: dict) -> str:
    """What a run was trained on, from its settings. Own rows have their task's recipe only."""
    rows, task = rows_name(run.get("data")), run["task"]
    return f"{rows}, with the recipe of {task}" if rows else task


# ---- templates -----------------------------------------------------------------------------------


def plain_math(row: dict) -> tuple[str, str]:
    """The GSM8K prompt of lm-evaluation-harness. The calculator notes <<...>> are removed."""
    answer = re.sub("<<[^<>]*>>", "", row["answer"])
    return f"Question: {row['question']}\nAnswer:", f" {answer}"


def lori_math(row: dict) -> tuple[str, str]:
    """LoRI's training prompt, most likely the paper's too. Source: get_datasets.py, get_gsm8k."""
    ask = "Answer the above question. First think step by step and then answer the final number."
    return f"{row['question']}\n{ask}\n", row["answer"].replace("####", "The final answer is: ")


def alpaca(row: dict, margin: str = "", tail: str = "") -> tuple[str, str]:
    """The Alpaca template, with or without an input. Source: CodeAlpaca's README.

    margin: text before each further line. tail: text after "request." if there is no input.
    """
    parts = {"Instruction": row["instruction"]} | ({"Input": row["input"]} if row["input"] else {})
    context = ", paired with an input that provides further context" if row["input"] else ""
    shown = "".join(f"{margin}### {name}:\n{margin}{text}\n\n" for name, text in parts.items())
    return (
        f"Below is an instruction that describes a task{context}. "
        f"Write a response that appropriately completes the request.{'' if row['input'] else tail}"
        f"\n\n{shown}{margin}### Response:\n{margin}",
        row["output"],
    )


def lori_alpaca(row: dict) -> tuple[str, str]:
    """`alpaca` byte for byte as LoRI trains on it. There it stands in an indented string.

    So each line that is not empty begins with 20 spaces, and 20 spaces stand at the end. Without an
    input, a space follows "request.". Source: LoRI's get_datasets.py, get_codealpaca and
    get_saferpaca.
    """
    return alpaca(row, margin=" " * 20, tail=" ")


def bare_instruction(row: dict) -> tuple[str, str]:
    """An instruction in few words, for the tiny model."""
    given = f"Input: {row['input']}\n" if row["input"] else ""
    return f"Instruction: {row['instruction']}\n{given}Response:\n", row["output"]


def lori_chat(row: dict) -> tuple[str, str]:
    """LoRI's prompt for HEx-PHI. It does not train on it. Source: get_datasets.py, get_hexphi."""
    ask = "You are a helpful assistant.Always answer as helpfully as possible, while being safe."
    return f"{ask}\n\nHuman: {row['instruction']}\n\nAssistant:", ""


# (kind, --template) -> the function that makes a prompt and an answer of a row. "refusal" has the
# prompts of paper/eval_safety.py, under the name of the template that the run was trained with.
TEMPLATES: dict[tuple[str, str], Callable[[dict], tuple[str, str]]] = {
    ("math", "plain"): plain_math,
    ("math", "lori"): lori_math,
    ("code", "alpaca"): alpaca,
    ("code", "lori"): lori_alpaca,
    ("code", "bare"): bare_instruction,
    ("safety", "alpaca"): alpaca,
    ("safety", "lori"): lori_alpaca,
    ("safety", "bare"): bare_instruction,
    ("refusal", "alpaca"): alpaca,
    ("refusal", "lori"): lori_chat,
    ("refusal", "bare"): bare_instruction,
}


# ---- rows as prompts and answers ----------------------------------------------------------------


def form_of(task: str, template: str | None = None) -> Callable[[dict], tuple[str, str]]:
    """The function that makes a prompt and an answer of a row. None: the task's own template.

    Raises ValueError for an unknown template.
    """
    kind, template = TASKS[task].kind, template or TASKS[task].template
    if (kind, template) not in TEMPLATES:
        known = [name for its_kind, name in TEMPLATES if its_kind == kind]
        raise ValueError(
            f"{template!r} is no template of task {task} and no file: want one of "
            f"{', '.join(known)}, or the path of a file{did_you_mean(template, known)}"
        )
    return TEMPLATES[kind, template]


def load_examples(
    task: str, path: Path, template: str | None = None, model: Path | None = None
) -> list[Example]:
    """The rows of a file as prompts and answers.

    Rows with the task's fields are shown in its template. Rows with the fields of an entry of FORMS
    are shown in that form, unless another template is given. template: a name of TEMPLATES, or a
    file (see rows.py). model: the folder of the model, for its chat template. Raises ValueError for
    an unknown template, or for a row that does not fit.
    """
    kind, template = TASKS[task].kind, template or TASKS[task].template
    if is_file_template(task, template):
        return own_form(path, Path(template), model)
    show = form_of(task, template)
    forms = [FIELDS[kind], *(fields for fields in FORMS if fields != FIELDS[kind])]
    if template != TASKS[task].template:
        forms = forms[:1]  # only these fit a template that was asked for
    listed = " or ".join("({})".format(", ".join(fields)) for fields in forms)
    wanted = f"the fields {listed} in each row"
    n, row = next(rows_of(path, f", with {wanted} (docs/rows.md has all forms)"))
    if template == TASKS[task].template and not has_fields(row, FIELDS[kind]):
        if own_fields(row):
            return own_form(path, None, model)
        place = f"the header of {path}" if is_csv(path) else f"{path}, row {n}"
        raise ValueError(
            f"{place} has the fields {names(row)}: want {wanted}, or --template FILE, a "
            "text with the {fields} of these rows (docs/rows.md)"
            f"{misspelt(row, chain(*FORMS))}"
        )
    return [Example(*show(row), row) for row in read_rows(path, FIELDS[kind])]


# ---- rows without the fields of the task ---------------------------------------------------------

# The fields of a row -> its prompt and answer. The first entry that fits counts.
FORMS: dict[tuple[str, ...], Callable[[dict], tuple[str, str]] | None] = {
    ("question", "answer"): plain_math,
    ("instruction", "input", "output"): alpaca,
    ("prompt", "completion"): lambda row: (row["prompt"], row["completion"]),
    ("messages",): None,  # a chat: rows.ChatTemplate shows it
    ("conversations",): None,
    ("text",): lambda row: ("", row["text"]),  # all of the text is learned
}


def is_file_template(task: str, template: str | None) -> bool:
    """Whether `template` is a file, and not the name of a template of the task."""
    named = template is None or (TASKS[task].kind, template) in TEMPLATES
    return not named and Path(template).is_file()


def has_fields(row: object, fields: tuple[str, ...]) -> bool:
    """Whether a row has all these fields. Those of OPTIONAL may be absent."""
    return isinstance(row, dict) and OPTIONAL.union(row).issuperset(fields)


def own_fields(row: object) -> tuple[str, ...] | None:
    """The entry of FORMS that a row fits, or None."""
    return next((fields for fields in FORMS if has_fields(row, fields)), None)


def fields_of_own_rows(task: str, template: str | None, row: object) -> tuple[str, ...]:
    """The fields of rows such as `row`, if these are shown in another form than the task's.

    Else there are none. A template file gives any rows a form of their own. Raises ValueError for a
    row that has no known form.
    """
    by_file = is_file_template(task, template)
    if has_fields(row, FIELDS[TASKS[task].kind]) and not by_file:
        return ()
    if not isinstance(row, dict) or not (by_file or own_fields(row)):
        raise ValueError(f"a row has the fields {names(row)}, which are no known form")
    return own_fields(row) or tuple(row)


def own_form(path: Path, given: Path | None, model: Path | None) -> list[Example]:
    """The rows of a file, all in the form of the first row. given: a template file.

    A chat gives an example for each answer in it. The prompt is all text before that answer.
    """
    rows = rows_of(path)
    first = next(rows)
    form = own_fields(first[1])
    show, how = shown_by(form, given, model)
    texts = form if form and FORMS[form] and not given else ()  # the fields that must hold text
    examples, n_rows = [], 0
    for n, row in with_fields(path, chain([first], rows), texts):
        place, n_rows = f"{path}, row {n}", n_rows + 1
        for prompt, answer in show(row, place):
            check_unicode(prompt + answer, place, "the text")
            has_answer = isinstance(row.get("answer"), str)  # for scoring
            examples.append(
                Example(prompt, answer, row if has_answer else row | {"answer": answer})
            )
    say(f"{path}: {n_rows} rows {how}, {len(examples)} answers")
    return examples


def shown_by(
    form: tuple[str, ...] | None, given: Path | None, model: Path | None
) -> tuple[Callable[[dict, str], list[tuple[str, str]]], str]:
    """The function from (row, place) to (prompt, answer) pairs, and words that describe it."""
    if given and given.suffix != ".jinja":
        for_prompt, for_answer = read_template(given)
        return lambda row, place: [
            (fill(for_prompt, row, place, empty=True), fill(for_answer, row, place, empty=False))
        ], f"in the form of {given.name}"
    if form and FORMS[form]:
        if given:
            raise ValueError(
                f"--template {given} is for chats, but the rows have {', '.join(form)}: omit it"
            )
        return lambda row, _: [FORMS[form](row)], f"with {', '.join(form)}"
    if not form or not model:
        raise ValueError("want rows with messages or conversations, and a model for its template")
    chat = ChatTemplate(model, given, check_ends)
    return lambda row, place: chat.pairs(row, form[0], place), "with a chat in each"


# ---- a question of a user ------------------------------------------------------------------------

Show = Callable[[dict], tuple[str, str]]


def question(
    text: str,
    task: str,
    template: str | None = None,
    own: tuple[str, ...] = (),
    model: Path | None = None,
) -> Example:
    """A text as a question, in the form that rows have in training: see `question_form`.

    Its answer is what the form puts before an answer: a blank, or nothing. If the text has the form
    already, or its beginning or end, it does not get it twice. Of a form with several fields, the
    text is a JSON object with them. Raises ValueError for an unknown template, or if a field is
    missing.
    """
    fields, show = question_form(task, template, own, model)
    text = text.strip()
    if len(fields) > 1:
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= set(fields):
            wanted = json.dumps(dict.fromkeys(fields, "..."), ensure_ascii=False)
            raise ValueError(f"the prompt lacks fields of {template}: want {wanted}, or --raw")
        return Example(*show(row), row)
    (field,) = fields
    before, _, after = show({field: "\0"})[0].partition("\0")
    if before.strip():
        text = text.removeprefix(before.strip()).lstrip()
    if after.strip():
        text = text.removesuffix(after.strip()).rstrip()
    return Example(*show({field: text}), {field: text})


def question_form(
    task: str, template: str | None, own: tuple[str, ...], model: Path | None
) -> tuple[tuple[str, ...], Show]:
    """The fields of a question, and what makes of them a prompt and what stands before an answer.

    own: the fields of a run's rows, where they have another form than the task's. model: the folder
    of the model, which may have a chat template.
    """
    given = Path(template) if is_file_template(task, template) else None
    of_task = None if given else form_of(task, template)  # raises for a file that is gone
    if given and given.suffix != ".jinja":
        for_prompt, for_answer = read_template(given)
        if not (fields := fields_of(for_prompt)):
            raise ValueError(f"{given} has no {{field}} above its line: want one, or --raw")
        first = next(found.start() for found in FIELD.finditer(for_answer) if found[2])
        lead = fill(for_answer[:first], {}, "the answer", empty=False)
        return fields, lambda row: (fill(for_prompt, row, "the prompt", empty=True), lead)
    if given or (own and own[0] in CHATS):
        chat = ChatTemplate(model, given, check_ends)
        return ("content",), lambda row: (chat.ask(row["content"], "the prompt"), "")
    if own == ("text",):
        return own, lambda row: (row["text"], "")
    show = FORMS[own] if own else of_task
    field, *others = own or FIELDS[TASKS[task].kind]
    return (field,), lambda row: show(dict.fromkeys(others, "") | row)


# ---- token ids -----------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """An example as token ids: the prompt (after the model's bos, if it has one), answer, eos."""

    ids: list[int]
    n_prompt: int


def encode_prompt(prompt: str, tokenizer: Tokenizer, place: str) -> list[int]:
    """The ids of a prompt, after `tokenizer.bos`. Training and scoring both use this function.

    place: the name of the prompt in an error. Raises ValueError if the prompt has a token that ends
    a text. A token that only ends a turn, such as <|im_end|>, may stand in a prompt: a chat has
    such tokens. A prompt by a chat template is kept as it is: it has its own first token and ends.
    """
    ids = tokenizer.encode(prompt)
    if isinstance(prompt, ChatText):
        return ids
    check_ends(ids, tokenizer.text_ends, tokenizer, place)
    return ids if tokenizer.bos is None else [tokenizer.bos, *ids]


def check_ends(ids: list[int], ends: frozenset[int], tokenizer: Tokenizer, place: str) -> None:
    """Raise ValueError if a text has one of the tokens `ends`. They would end it too early."""
    if found := ends.intersection(ids):
        raise ValueError(
            f"{place} spells out {tokenizer.decode(found)!r}, which ends a text of this model: "
            "take it out, or write it in another way"
        )


def encode(
    examples: list[Example], tokenizer: Tokenizer, max_len: int, drop_long: bool = False
) -> list[Encoded]:
    """Token ids of all examples.

    Raises ValueError for an example with an end token in its text. Raises it also if some examples
    are longer than the model's context, unless `drop_long`: then they are left out.
    """
    encoded = []
    for n, example in enumerate(examples, 1):
        prompt = encode_prompt(example.prompt, tokenizer, f"row {n} of the data")
        answer = tokenizer.encode_answer(example.prompt, example.answer)
        check_ends(answer, tokenizer.turn_ends, tokenizer, f"row {n} of the data")
        ids = [*prompt, *answer, tokenizer.eos]
        if len(ids) < 2:  # no prompt, and an empty answer
            raise ValueError(f"row {n} of the data has no text at all: take it out")
        # The model cannot predict the first token. Without a prompt, that token is only an input.
        encoded.append(Encoded(ids, max(1, len(prompt))))
    return without_long_rows(encoded, max_len, drop_long)


def without_long_rows(encoded: list[Encoded], max_len: int, drop_long: bool) -> list[Encoded]:
    """The rows that fit into a context of `max_len` tokens. See `encode`."""
    fit = [e for e in encoded if len(e.ids) <= max_len]
    if len(fit) < len(encoded):
        sizes = [len(e.ids) for e in encoded]
        first = next(n for n, size in enumerate(sizes, 1) if size > max_len)
        found = (
            f"{len(encoded) - len(fit)} of {len(encoded)} rows of the data are longer than the "
            f"model's context of {max_len} tokens: row {first} is the first, row "
            f"{sizes.index(max(sizes)) + 1} the longest, with {max(sizes)}"
        )
        if not (drop_long and fit):
            raise ValueError(
                f"{found}. Want shorter rows, or --drop-long with train.py and catcher.py, which "
                "leaves them out"
            )
        print(f"{found}. --drop-long leaves them out")
    return fit


# ---- batches -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Sequences padded on the right to one length T."""

    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T] the next token if it belongs to the answer, else IGNORE
    real: Tensor  # [B, T] False on padding

    def counted(self, count: str) -> Tensor:
        """[B, T] the positions whose visits count: "all" tokens, or those that predict "answers".

        With "answers" the next token of each such position is a target.
        """
        return self.real if count == "all" else self.targets != IGNORE


def collate(examples: list[Encoded], device: torch.device | str = "cpu") -> Batch:
    """Pad a few examples to one length. The last token of each is only a target, never an input.

    Without examples (a rank without work) the batch is one sequence of padding.
    """
    width = max((len(e.ids) for e in examples), default=2) - 1
    tokens = torch.zeros(max(1, len(examples)), width, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORE)
    real = torch.zeros_like(tokens, dtype=torch.bool)
    for i, e in enumerate(examples):
        n = len(e.ids) - 1
        tokens[i, :n] = torch.tensor(e.ids[:-1])
        targets[i, e.n_prompt - 1 : n] = torch.tensor(e.ids[e.n_prompt :])
        real[i, :n] = True
    return Batch(*(t.to(device) for t in (tokens, targets, real)))


def steps_per_epoch(n_examples: int, batch_size: int) -> int:
    """The number of steps. The last takes the rest, so every example is used once."""
    return -(-n_examples // batch_size)


def examples_of_step(data: list[Encoded], step: int, batch_size: int, seed: int) -> list[Encoded]:
    """The examples of optimizer step `step` (from 0). They depend on the arguments alone.

    So a resumed run needs only the number of the step. Each epoch has its own seeded order.
    """
    epoch, at = divmod(step, steps_per_epoch(len(data), batch_size))
    draw = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(data), generator=draw)
    return [data[i] for i in order[at * batch_size : (at + 1) * batch_size].tolist()]


def micro_batches(examples: list[Encoded], size: int) -> list[list[Encoded]]:
    """Cut a step's examples into groups of `size`. Similar lengths go together: little padding.

    The groups do not depend on the number of ranks. The ranks take turns, and each gets the same
    number of groups. So some groups at the end may be empty.
    """
    ordered = sorted(examples, key=lambda e: len(e.ids))
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    groups += [[]] * (-len(groups) % ranks.world())
    return groups[ranks.rank() :: ranks.world()]


def idle_ranks(n_examples: int, size: int) -> str:
    """A warning if a smaller `size` in `micro_batches` would give more ranks work, else ""."""
    n_groups, even = -(-n_examples // size), -(-n_examples // ranks.world())
    if n_groups >= ranks.world() or size <= even:
        return ""
    return (
        f"--micro-batch {size} cuts a step's {n_examples} examples into parts for {n_groups} of "
        f"{ranks.world()} ranks, so the other ranks compute only padding: --micro-batch {even} "
        "gives more ranks a part"
    )
