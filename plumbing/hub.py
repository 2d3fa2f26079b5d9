"""Files of the Hugging Face Hub: fetched once, and checked against their names in the cache.

The library huggingface_hub speaks with the server, retries, locks and caches. This file adds:
- the commit of a revision, so that a stopped run continues with the same files,
- one file at a time in the main thread, so that Ctrl-C stops at once (the library's own loop waits
  for eight threads),
- a check of the bytes,
- errors that say what happened and what to do.
"""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from plumbing.files import has_checksum

PATIENCE = 30  # seconds until the Hub's list of files must be there
COMMIT = re.compile("[0-9a-f]{40}")


def snapshot_commit(folder: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache (models--A--B/snapshots/COMMIT), else None."""
    return folder.name if snapshot_repo(folder) else None


def snapshot_repo(folder: Path) -> str | None:
    """The ORG/NAME of a snapshot in the Hub's cache, else None."""
    folder = folder.absolute()
    kind, _, repo = folder.parent.parent.name.partition("--")
    is_snapshot = kind == "models" and folder.parent.name == "snapshots"
    return repo.replace("--", "/") if is_snapshot and COMMIT.fullmatch(folder.name) else None


def snapshot(
    repo: str,
    revision: str | None,
    first: str,
    others: tuple[str, ...] = (),
    last: str | None = None,
    kind: str = "model",
    instead: str = "or give a copy that is here",
) -> Path:
    """The folder of a snapshot, with the file `first` and all files that match `others` or `last`.

    revision: a branch, a tag or a commit. None means the main branch as it is now. Without a
    network, it means the commit that was fetched last. others: patterns. last: a pattern whose
    files are fetched after all others. So if the cache has one of these, it has the others too.
    kind: "model" or "dataset". instead: the end of each error. Raises OSError with what to do. It
    is a FileNotFoundError if the Hub has no such repository, revision or file.
    """
    from huggingface_hub import hf_hub_download  # here, as it takes long to import

    def fetch(name: str, revision: str | None = revision, again: bool = False) -> Path:
        found = hf_hub_download(repo, name, revision=revision, repo_type=kind, force_download=again)
        return Path(found)

    with explained(repo, revision, kind, instead):
        folder = fetch(first).parent
        commit = folder.name  # for all other files too: a branch may move meanwhile
        more = matching_files(repo, commit, folder, others, last, kind) if last else []
        for name in [first, *more]:
            path = fetch(name, commit)
            if not is_whole(path):
                print(f"{path} is damaged: fetching it again")
                path = fetch(name, commit, again=True)
            if not is_whole(path):
                path.resolve().unlink()
                path.unlink()
                raise OSError(f"{name} of {repo} came twice with a wrong checksum")
    return folder


def matching_files(
    repo: str, commit: str, folder: Path, others: tuple[str, ...], last: str, kind: str
) -> list[str]:
    """The names of a commit's files that match `others`, and then those that match `last`.

    If the Hub cannot be asked, and the cache has a file that matches `last`, the cache's names.
    """
    from huggingface_hub.utils import filter_repo_objects

    def ordered(found: list[str]) -> list[str]:
        at_the_end = {*filter_repo_objects(found, allow_patterns=last)}
        before = {*filter_repo_objects(found, allow_patterns=[*others])} - at_the_end
        return [*sorted(before), *sorted(at_the_end)]

    try:
        return ordered(files_of_commit(repo, commit, kind))
    except client_errors():  # for any of these errors, a complete cache is good enough
        cached = [path.name for path in folder.iterdir()]
        if not [*filter_repo_objects(cached, allow_patterns=last)]:
            raise
        return ordered(cached)


def files_of_commit(repo: str, commit: str, kind: str) -> list[str]:
    """The names of the files in the top folder of a repository, from the Hub."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().repo_info(repo, revision=commit, repo_type=kind, timeout=PATIENCE)
        return [file.rfilename for file in info.siblings if "/" not in file.rfilename]
    except (KeyError, TypeError) as error:  # the client takes any JSON for an answer of the Hub
        raise errors.FileMetadataError(f"the list of files of {repo} has no names") from error


def is_whole(path: Path) -> bool:
    """Whether a cached file has the checksum in its name. True if the name has no checksum."""
    if not path.is_symlink():  # without links in the file system, the file itself is here
        return True
    status = path.stat()
    return _is_whole(path, path.readlink().name, status.st_size, status.st_mtime_ns)


@cache  # a command asks several times for its model
def _is_whole(path: Path, checksum: str, _size: int, _changed: int) -> bool:
    return not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", checksum) or has_checksum(path, checksum)


# ---- errors --------------------------------------------------------------------------------------


def client_errors() -> tuple[type[Exception], ...]:
    """The errors that huggingface_hub raises: its own, those of its HTTP library, and of files.

    A ValueError comes from a name, a token or JSON. A RuntimeError comes from hf_xet, which fetches
    large files.
    """
    from huggingface_hub import errors

    return (OSError, ValueError, RuntimeError, errors.HTTPError)


@contextmanager
def explained(repo: str, revision: str | None, kind: str, instead: str) -> Iterator[None]:
    """Turn an error of the Hub's client into one line that says what to do.

    The line is a FileNotFoundError if the Hub has no such thing, else an OSError.
    """
    try:
        yield
    except client_errors() as error:
        name = f"{repo}@{revision}" if revision else repo
        line = f"{kind} {name}: {explanation(error, repo, kind)}, {instead}"
        raise (FileNotFoundError if is_absent(error) else OSError)(line) from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes. The client often wraps the error that says most."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def is_absent(error: Exception) -> bool:
    """Whether the Hub said that it has no such repository, revision or file."""
    from huggingface_hub import errors

    absent = (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
    )
    return any(
        isinstance(cause, absent) and not isinstance(cause, errors.GatedRepoError)
        for cause in causes(error)
    )


def explanation(error: Exception, repo: str, kind: str) -> str:
    """What happened and what to do, for the first known error among the causes."""
    from huggingface_hub import errors

    for cause in causes(error):
        refused = isinstance(cause, errors.HfHubHTTPError)
        if text := refusal(cause, repo, kind) if refused else failure(cause):
            return text
    return f"{first_line(error)}: run the command again, or try another network"


def refusal(error: Exception, repo: str, kind: str) -> str:
    """The message for an HTTP answer that refuses the request."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, errors.GatedRepoError):
        return gated(page)
    if isinstance(error, errors.RepositoryNotFoundError):
        return unknown_name(kind)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"want a branch, a tag or a commit that {page} has"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        file = error.response.url.path.rpartition("/")[2]
        return f"it has no {file}: want a {kind} with it, see {page}"
    return refused_with(error.response.status_code)


def failure(error: BaseException) -> str:
    """The message for an error before or after an HTTP answer, or "" if the error is unknown."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return f"{first_line(error)}: correct the name"
    if isinstance(error, UnicodeEncodeError):
        return "HF_TOKEN contains characters that are not allowed: set it again"
    if isinstance(error, (errors.FileMetadataError, json.JSONDecodeError, UnicodeDecodeError)):
        return (
            f"{constants.ENDPOINT} gave an answer that the client cannot read "
            f"({type(error).__name__}): check HF_ENDPOINT and any log-in page of the network"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        cache = constants.HF_HUB_CACHE
        return f"HF_HUB_OFFLINE is set, and {cache} lacks some files: unset it once"
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        return (
            f"no connection to {constants.ENDPOINT}, or it broke off ({type(error).__name__}): "
            "check the network and run the command again"
        )
    return unwritable(error) if isinstance(error, OSError) and error.errno else ""


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def gated(page: str) -> str:
    """The message for a repository whose terms must be accepted."""
    from huggingface_hub import get_token

    who = "with the account of the token that is set" if get_token() else f"then {LOG_IN}"
    return f"it is gated: ask for access on {page}, {who}"


def unknown_name(kind: str) -> str:
    """The message for a repository that is absent or private. The Hub does not say which."""
    from huggingface_hub import get_token

    private = "check that the token that is set may read it" if get_token() else LOG_IN
    return (
        f"the Hub has no {kind} of that name, or you may not see it: correct the name, or, if it "
        f"is private, {private}"
    )


def refused_with(status: int) -> str:
    """The message for an HTTP status without more details."""
    from huggingface_hub import constants

    if status == 401:
        return f"the Hub does not know this token (401): {LOG_IN}"
    if status == 403:
        return f"the Hub refuses it (403): want a token that may read it, so {LOG_IN}"
    if status == 429:
        return (
            "the Hub had too many requests from here (429): run the command again in some minutes"
        )
    if status >= 500:
        return f"the Hub has a fault ({status}): run the command again later"
    return f"{constants.ENDPOINT} refuses it ({status}): check HF_ENDPOINT"


def unwritable(error: OSError) -> str:
    """The message for a cache that cannot be written."""
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk of {cache} is full: make room, or set HF_HOME to another disk"
    return f"{cache} cannot be written ({error.strerror}): set HF_HOME to another folder"


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0]
