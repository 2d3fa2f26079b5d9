"""Files that are either whole or absent, and JSON that is checked before it is used."""

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
    """Let `write` fill a temporary file, bring it to disk, and only then give it the name `path`.

    Only rank 0 writes, unless `every_rank` wants the file for itself. Raises PermissionError where
    nothing can be written, or OSError, whatever error of its own the writing library has for a full
    disk. A link that has one of the two names is replaced: what it leads to is left alone.
    """
    if ranks.rank() and not every_rank:
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with writing(path):
            draft.unlink(missing_ok=True)  # a link of that name would be written through
            write(draft)
            with draft.open("rb+") as file:  # Windows brings only what may be written to disk
                os.fsync(file.fileno())
            draft.chmod(0o644)  # safetensors makes its files private
            draft.replace(path)
        sync_names(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have a write that fails end in one line that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        kind = PermissionError if number in (errno.EACCES, errno.EPERM, errno.EROFS) else OSError
        room = ""
        with suppress(OSError):  # safetensors has an error of its own, so a full disk has many
            room = f"; its disk has {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB left"
        raise kind(f"{path} could not be written ({error}){room}") from error


def sync_names(folder: Path) -> None:
    """Bring the names of the files in `folder` to disk: a power cut may otherwise undo a rename.

    Windows cannot open a folder, and some network file systems cannot do this. Nothing happens
    there.
    """
    with suppress(OSError):
        names = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(names)
        finally:
            os.close(names)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json_lines(path: Path, rows: Iterable[object]) -> None:
    """Write each row as a line of JSON, all of them or none.

    An unpaired surrogate, which no UTF-8 file can hold, becomes its escape in JSON.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    body = text.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda draft: draft.write_bytes(body))


def sha256(*paths: Path) -> str:
    """One checksum over the contents of files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file has this sha256, or this id in git, which has 40 digits."""
    if len(checksum) == 64:
        return sha256(path) == checksum
    body = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest() == checksum


# ---- reading -------------------------------------------------------------------------------------

LARGEST_JSON = 1 << 24  # bytes: as Python objects they may take a hundred times as many
COUNTS = range(2**53)  # what `int` means in a schema: every program reads these integers exactly
Positive = Annotated[int, range(1, 2**31)]  # an int of a schema that may not be 0


def read_json(path: Path, want: str, schema: object = dict) -> Any:  # noqa: ANN401
    """The value in a JSON file, after `check` against `schema`. Other keys are kept.

    Raises FileNotFoundError or ValueError. Both name the path and say what is wanted.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or no file: want {want}")
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
    """Raise ValueError unless a value from JSON is what the type `hint` says.

    hint: str (printable text of one line), float (finite), int (in COUNTS), bool, dict, list[T],
    dict[str, T], T | None, Literal[...], Annotated[int, a range], or a dataclass of such fields. A
    dataclass is an object with these keys and any others. A key that is absent has the value None.
    If its field has a default, it need not be there. at: the way to the value, such as .lists[3].
    """
    if get_origin(hint) in (UnionType, Union):  # T | None
        if value is None:
            return
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if words := unmet(value, hint):
        raise ValueError(f"{at.lstrip('.') or 'it'} is {short(value)}, want {words}")
    for way, part, its_hint in parts(value, hint):
        check(part, its_hint, at + way)


def parts(value: Any, hint: Any) -> Iterator[tuple[str, object, Any]]:  # noqa: ANN401
    """The parts of an object or list: the way to each, the part, and the type that it must have."""
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
    """What a value should have been, in words; "" if it is of that type, whatever its parts are."""
    origin = get_origin(hint)
    if origin is Literal:
        good, words = value in get_args(hint), " or ".join(map(repr, get_args(hint)))
    elif origin is Annotated or hint is int:  # a bool is of another type
        span = COUNTS if hint is int else hint.__metadata__[0]
        good = type(value) is int and value in span
        words = f"an integer from {span[0]} to {span[-1]}"
    elif hint is float:  # NaN is not below anything
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
