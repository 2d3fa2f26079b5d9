"""Rows to train on or to score, read from the kinds of files that people have.

1. The rows of a file: JSON lines, a JSON list, or CSV. Each may be compressed as .gz.
2. --template FILE: a text with {fields}, for rows whose fields have other names.
3. Chats: `messages`, or ShareGPT's `conversations`. The model's chat template writes them as text.

data.py has the tasks, and the forms of rows that need none of these.
"""

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plumbing.cli import did_you_mean
from plumbing.downloads import unpacked
from plumbing.tokenizer import Tokenizer, load_tokenizer

# ---- a file's rows -------------------------------------------------------------------------------

FORMATS = "JSON lines (an object on each line), a JSON list, or CSV"
# An unpaired surrogate. JSON can escape it, but no UTF-8 file can hold it.
SURROGATE = re.compile("[\ud800-\udfff]")
OPTIONAL = {"input"}  # many files have null here, or lack the field: both count as an empty text


def read_rows(path: Path, fields: tuple[str, ...]) -> Iterator[dict]:
    """The rows of a file. Each has text in all `fields`.

    Raises FileNotFoundError, or ValueError with the position of the wrong row: the line in JSON
    lines, the element in a list, the row in CSV (the header is row 1).
    """
    for n, row in numbered_rows(path, fields):
        for field in fields:
            check_unicode(row[field], f"{path}, row {n}", field)
        yield row


def numbered_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
    """The rows as in `read_rows`, each with its number. Unpaired surrogates are not refused."""
    return with_fields(path, rows_of(path, f" with {', '.join(fields)}"), fields)


def with_fields(
    path: Path, rows: Iterable[tuple[int, object]], fields: tuple[str, ...]
) -> Iterator[tuple[int, dict]]:
    """The same rows. Raises ValueError for a row that lacks text in one of `fields`."""
    for n, row in rows:
        if isinstance(row, dict):
            row = row | {f: "" for f in OPTIONAL.intersection(fields) if row.get(f) is None}
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ValueError(
                    f"{path}, row {n} has no text in {field!r} (its fields: {names(row)}): want "
                    f"{', '.join(fields)} in each row, empty where there is nothing to say"
                    f"{misspelt(row, (field,))}"
                )
        yield n, row


def rows_of(path: Path, what: str = "") -> Iterator[tuple[int, object]]:
    """The value in each row of a file, with the row's number.

    what: what else is wanted, for an error. Raises ValueError if there is no row.
    """
    text = text_of(path, what)
    if is_csv(path):
        rows = csv_rows(text, path)
    elif text.lstrip().startswith("["):
        rows = enumerate(_parse(text, f"{path}"), 1)
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = ((n, _parse(line, f"{path}, line {n}")) for n, line in lines if line.strip())
    n = 0
    for n, row in rows:
        yield n, row
    if n == 0:
        raise ValueError(f"{path} holds no rows: want {FORMATS}{what}")


def is_csv(path: Path) -> bool:
    """Whether a file's name is that of a CSV file, packed or not. Its header names the fields."""
    return not {".csv", ".tsv"}.isdisjoint(path.suffixes[-2:])


def text_of(path: Path, what: str) -> str:
    """A file's text, without a byte order mark."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: want {FORMATS}{what}")
    try:
        body = unpacked(path) if path.suffix == ".gz" else path.read_bytes()
        if not (kind := kind_of(body)):
            return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 ({error}): save it as {FORMATS}, in UTF-8"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error}): want {FORMATS}") from error
    raise ValueError(f"{path} is {kind}: save it as {FORMATS}, in UTF-8")


def kind_of(body: bytes) -> str:
    """What kind of file, by its first and last bytes, is taken for rows by mistake. "": none."""
    if body.startswith(b"PK\3\4"):
        return "a spreadsheet (.xlsx) or another zip file"
    return "a parquet file" if body[:4] == body[-4:] == b"PAR1" else ""


def csv_rows(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """The rows below the header of a CSV file. Empty rows are left out.

    Cells are separated by a comma, a semicolon or a tab: spreadsheets differ by country. The
    character that the header has most often is taken.
    """
    header = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=header.count)
    lines = csv.reader(
        io.StringIO(text.replace("\r\n", "\n"), newline=""), delimiter=separator, strict=True
    )
    cells: list[list[str]] = []
    try:
        for line in lines:
            cells.append(line)
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num} is not valid CSV ({error})") from error
    columns = [name.strip() for name in cells[0]] if cells else []
    named = [name for name in columns if name]
    if len(set(named)) < len(named):
        raise ValueError(f"{path} has two columns of one name ({', '.join(named)}): rename one")
    for n, line in enumerate(cells[1:], 2):
        if any(line[len(columns) :]):
            raise ValueError(
                f"{path}, row {n} has {len(line)} cells, but the header {len(columns)}: "
                f'want double quotes around a text with "{separator}" in it'
            )
        if any(line):  # it may be shorter than the header, or end in empty cells
            yield n, {name: cell for name, cell in zip_longest(columns, line) if name}


def _parse(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON ({error}): want {FORMATS}") from error


def names(row: object) -> str:
    """The names of a row's fields, for an error.

    Names of several words are only counted. In a CSV without a header they are texts of a row, and
    no message shows the text of a row.
    """
    fields = list(row) if isinstance(row, dict) else []
    words = [f"{field:.50}" for field in fields if is_name(field)]
    more = len(fields) - len(words)
    return ", ".join(words + ([f"{more} of several words"] if more else [])) or "none"


def is_name(field: str) -> bool:
    """Whether a field's name may be shown: it is one word."""
    return field.isprintable() and " " not in field


def misspelt(row: object, wanted: Iterable[str]) -> str:
    """Questions whether fields of a row stand for some that are `wanted`, for an error, or ""."""
    given = row if isinstance(row, dict) else {}
    missing = [field for field in wanted if field not in given]
    return "".join(did_you_mean(field, missing) for field in given if is_name(field))


def check_unicode(text: str, place: str, field: str) -> None:
    """Raise ValueError if a text has an unpaired surrogate."""
    if SURROGATE.search(text):
        raise ValueError(
            f"{place} has an unpaired surrogate (\\ud800 to \\udfff) in {field!r}: "
            "want Unicode text"
        )


# ---- --template FILE -----------------------------------------------------------------------------

BORDER = "---"  # the line between prompt and answer
# {field}, or {{field}} for the text "{field}". Any other brace stands for itself.
FIELD = re.compile(r"\{(\{\w+(?:[ -]\w+)*\})\}|\{(\w+(?:[ -]\w+)*)\}")


def read_template(path: Path) -> tuple[str, str]:
    """The prompt and the answer of a template file, with their {fields}.

    The prompt stands above a line `---`, and the answer stands below it. The line breaks around
    that line belong to neither, nor does the one at the end of the file. Raises ValueError unless
    there is exactly one such line, and a field in the answer.
    """
    lines = text_of(path, "").replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines.count(BORDER) != 1:
        raise ValueError(
            f"{path} has {lines.count(BORDER)} lines {BORDER!r}: want the prompt, one such line, "
            "and the answer, with {field} where a row's text belongs"
        )
    at = lines.index(BORDER)
    prompt, answer = "\n".join(lines[:at]), "\n".join(lines[at + 1 :])
    if not fields_of(answer):
        raise ValueError(
            f"{path} has no {{field}} below its line {BORDER!r}: want one for the answer"
        )
    return prompt, answer


def fields_of(template: str) -> tuple[str, ...]:
    """The fields that a text names, each once, in their order."""
    return tuple(dict.fromkeys(field for _, field in FIELD.findall(template) if field))


def fill(template: str, row: object, place: str, empty: bool) -> str:
    """The template with a row's texts in place of its fields. Braces in these texts stay.

    empty: whether null counts as an empty text. Raises ValueError for a field without text.
    """

    def value(match: re.Match) -> str:
        literal, field = match.groups()
        if literal:
            return literal
        text = row.get(field, 0) if isinstance(row, dict) else 0
        text = "" if text is None and empty else text
        if not isinstance(text, str):
            raise ValueError(
                f"{place} has no text in {field!r}, which the template names (its fields: "
                f"{names(row)}): want it in each row, or {{{{{field}}}}} for the text {{{field}}}"
                f"{did_you_mean(field, row if isinstance(row, dict) else ())}"
            )
        return text

    return FIELD.sub(value, template)


# ---- chats ---------------------------------------------------------------------------------------

CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # field -> its keys
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


class ChatText(str):
    """A prompt that a chat template wrote. It has its own first token and ends of turns."""


class ChatTemplate:
    """The template that writes a chat as one text: the model's own, or a .jinja file instead.

    It runs in jinja's sandbox. It gets the filters and functions that transformers gives templates.
    """

    def __init__(self, model: Path, given: Path | None, check: Callable):
        """check: raises ValueError if a text has an end token of the model (data.check_ends)."""
        self.tokenizer, self.check = load_tokenizer(model), check
        source, settings = template_of(model, given)
        world = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        world.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        world.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
            **tokens_of(settings, self.tokenizer),
        }
        try:
            self.template = world.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {given or model} is wrong ({error})") from error

    def write(self, turns: list[dict], ask: bool, place: str) -> str:
        """The text of these turns. ask: whether the beginning of the next answer follows."""
        try:
            return self.template.render(messages=turns, add_generation_prompt=ask)
        except Exception as error:  # the template is a program, and may fail in any way
            raise ValueError(
                f"{place} does not fit the chat template ({error}): want the roles and the order "
                "of turns that the template takes"
            ) from error

    def ask(self, text: str, place: str) -> "ChatText":
        """What stands before the answer to a user's first turn."""
        self.check(self.tokenizer.encode(text), self.tokenizer.turn_ends, self.tokenizer, place)
        return ChatText(self.write([{"role": "user", "content": text}], True, place))

    def pairs(self, row: dict, field: str, place: str) -> list[tuple[ChatText, str]]:
        """A pair for each answer of the assistant: the text before the answer, and the answer."""
        turns, pairs = turns_of(row, field, place), []
        for turn in turns:
            check_unicode(turn["content"], place, field)
            self.check(
                self.tokenizer.encode(turn["content"]),
                self.tokenizer.turn_ends,
                self.tokenizer,
                place,
            )
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt = self.write(turns[:i], True, place)
                whole = self.write(turns[: i + 1], False, place)
                if not whole.startswith(prompt):
                    raise ValueError(
                        f"{place}: the chat template changes the text before an answer when the "
                        "answer follows: want another template, with --template FILE.jinja"
                    )
                answer = whole[len(prompt) :]
                for end in self.tokenizer.turn_ends:  # data.encode adds the model's own end
                    answer = answer.split(self.tokenizer.decode([end]))[0]
                pairs.append((ChatText(prompt), answer))
        if not pairs:
            raise ValueError(f"{place} has no turn of the assistant in {field!r}: want one or more")
        return pairs


def turns_of(row: dict, field: str, place: str) -> list[dict]:
    """The turns of a chat as {"role", "content"}. A row's own `system` text comes first."""
    role, content = CHATS[field]
    turns = row.get(field) if isinstance(row, dict) else None
    if not isinstance(turns, list):
        raise ValueError(
            f"{place} has no list in {field!r} (its fields: {names(row)}): want a chat"
        )
    chat = []
    if isinstance(row.get("system"), str):
        chat.append({"role": "system", "content": row["system"]})
    for m, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in (role, content)
        ):
            raise ValueError(
                f"{place}, turn {m} of {field!r} has no text in {role!r} and {content!r} (its "
                f"fields: {names(turn)}): want both in each turn, without tool calls or pictures"
            )
        chat.append({"role": ROLES.get(turn[role], turn[role]), "content": turn[content]})
    return chat


def template_of(model: Path, given: Path | None) -> tuple[str, dict]:
    """The text of the chat template, and the content of the model's tokenizer_config.json.

    The model's own template is in chat_template.jinja, or else in tokenizer_config.json, as in
    transformers. Raises ValueError if there is none.
    """
    config = model / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8-sig")) if config.is_file() else {}
    path = given or model / "chat_template.jinja"
    if path.is_file():
        return text_of(path, ""), settings
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates, each with a name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        raise ValueError(
            f"the rows are chats, but {model.name} has no chat template: want a model that has one "
            "(often called Instruct or Chat), --template FILE.jinja, or rows with prompt and "
            "completion"
        )
    return template, settings


def tokens_of(settings: dict, tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that a chat template may name, such as eos_token."""
    tokens = {"eos_token": tokenizer.decode([tokenizer.eos]), "bos_token": ""}
    if tokenizer.bos is not None:
        tokens["bos_token"] = tokenizer.decode([tokenizer.bos])
    for name, token in settings.items():
        text: Any = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def refuse(message: str) -> NoReturn:
    """Raise an error. A chat template calls this for a chat that it does not take."""
    raise jinja2.TemplateError(message)
