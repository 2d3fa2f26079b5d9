"""Files that are either whole or absent, and JSON that is checked before use."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from safetensors import SafetensorError

from plumbing import ranks

# ---- writing -------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], Any], every_rank: bool = False) -> None:
    """Let `write` fill a temporary file, bring it to disk, and then give it the name `path`.

    Only rank 0 writes, unless `every_rank` (each rank wants the file for itself). Raises
    PermissionError if nothing can be written there, or OSError for any other error, also for an
    error that belongs to the writing library. A link with one of the two names is replaced. The
    file behind the link does not change.
    """
    if ranks.rank() and not every_rank:
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with writing(path):
            draft.unlink(missing_ok=True)  # if it were a link, the file behind it would be written
            write(draft)
            with draft.open("rb+") as file:  # Windows syncs only files that are open for writing
                os.fsync(file.fileno())
            draft.chmod(0o644)  # safetensors makes its files private
            draft.replace(path)
        sync_names(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of a write into one line that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)  # safetensors' own error has none
        kind = PermissionError if number in (errno.EACCES, errno.EPERM, errno.EROFS) else OSError
        space = ""
        with suppress(OSError):  # an error may come from a full disk without saying so
            space = f", with {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB free on its disk"
        raise kind(f"{path} could not be written ({error}){space}") from error


def sync_names(folder: Path) -> None:
    """Bring the names of the files in `folder` to disk. A power cut could otherwise undo a rename.

    Nothing happens where this is impossible: Windows cannot open a folder, and some network file
    systems cannot sync one.
    """
    with suppress(OSError):
        names = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(names)
        finally:
            os.close(names)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, completely or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json_lines(path: Path, rows: Iterable[object]) -> None:
    """Write each row as a line of JSON, all rows or none.

    An unpaired surrogate is written as its JSON escape: no UTF-8 file can hold it.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    body = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda draft: draft.write_bytes(body))


def sha256(*paths: Path) -> str:
    """One checksum over the contents of all files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has this sha256, or this id in git (40 digits)."""
    if len(checksum) == 64:
        return sha256(path) == checksum
    body = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest() == checksum


# ---- reading -------------------------------------------------------------------------------------

LARGEST_JSON = 1 << 24  # bytes. As Python objects they may take a hundred times as much
COUNTS = range(2**53)  # the values of `int` in a schema: every program reads these exactly
Positive = Annotated[int, range(1, 2**31)]  # an int of a schema that cannot be 0


def read_json(path: Path, want: str, schema: object = dict) -> Any:  # noqa: ANN401
    """The value in a JSON file, after `check` against `schema`. Other keys are kept.

    Raises FileNotFoundError or ValueError. Both name the path and say what is wanted.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or not a file: want {want}")
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{size:,} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): want {want}") from error
    try:
        check(value, schema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: want {want}") from error
    return value


def check(value: object, hint: Any, at: str = "") -> None:  # noqa: ANN401
    """Raise ValueError unless a value from JSON has the type `hint`.

    hint: str (printable text of one line), float (finite), int (in COUNTS), bool, dict, list[T],
    dict[str, T], T | None, Literal[...], Annotated[int, a range], or a dataclass of such fields. A
    dataclass stands for an object with these keys, and perhaps others. A key that is absent has the
    value None. A key whose field has a default may be absent. at: the path to the value, such as
    .lists[3].
    """
    if get_origin(hint) in (UnionType, Union):  # T | None
        if value is None:
            return
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if words := unmet(value, hint):
        raise ValueError(f"{at.lstrip('.') or 'it'} is {short(value)}, want {words}")
    for step, part, its_hint in parts(value, hint):
        check(part, its_hint, at + step)


def parts(value: Any, hint: Any) -> Iterator[tuple[str, object, Any]]:  # noqa: ANN401
    """The parts of an object or list: the step to a part, the part, and the type it must have."""
    if is_dataclass(hint):
        for field in fields(hint):
            if field.name in value or (field.default is field.default_factory is MISSING):
                yield f".{field.name}", value.get(field.name), field.type
    elif get_origin(hint) is dict:
        for key, part in value.items():
            yield f".{key:.50}", part, get_args(hint)[1]
    elif get_origin(hint) is list:
        for i, part in enumerate(value):
            yield f"[{i}]", part, get_args(hint)[0]


def unmet(value: object, hint: Any) -> str:  # noqa: ANN401
    """The words for the type that a value lacks, or "". The parts of the value are not checked."""
    origin = get_origin(hint)
    if origin is Literal:
        good, words = value in get_args(hint), " or ".join(map(repr, get_args(hint)))
    elif origin is Annotated or hint is int:  # type() below does not count a bool as an int
        span = COUNTS if hint is int else hint.__metadata__[0]
        good = type(value) is int and value in span
        words = f"an integer from {span[0]} to {span[-1]}"
    elif hint is float:  # NaN is refused too: it is not below anything
        good, words = type(value) in (int, float) and abs(value) < 1e300, "a finite number"
    elif hint is str:
        good, words = isinstance(value, str) and value.isprintable(), "text of one line"
    elif hint is bool:
        good, words = isinstance(value, bool), "true or false"
    elif (origin or hint) is list:
        good, words = isinstance(value, list), "a list"
    else:  # dict, dict[str, T], or a dataclass
        good, words = isinstance(value, dict), "an object"
    return "" if good else words
