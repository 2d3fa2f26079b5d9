"""Files of the Hugging Face Hub: fetched once, and checked against the names they are cached under.

huggingface_hub speaks with the server, tries again, locks and caches. Added here: the commit that a
revision stands for, so that a run can go on with it; one file after the other in the main thread,
so that Ctrl-C stops at once (its own loop over files waits for eight threads); a look at the bytes;
and errors that say what happened and what to do.
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
    """The commit of a snapshot in the Hub's cache (models--A--B/snapshots/COMMIT); else None."""
    return folder.name if snapshot_repo(folder) else None


def snapshot_repo(folder: Path) -> str | None:
    """ORG/NAME of a snapshot in the Hub's cache; None for any other folder."""
    folder = folder.absolute()
    kind, _, repo = folder.parent.parent.name.partition("--")
    is_one = kind == "models" and folder.parent.name == "snapshots"
    return repo.replace("--", "/") if is_one and COMMIT.fullmatch(folder.name) else None


def snapshot(
    repo: str,
    revision: str | None,
    first: str,
    others: tuple[str, ...] = (),
    last: str | None = None,
    kind: str = "model",
    instead: str = "or give a copy that is here",
) -> Path:
    """The folder of a snapshot, with the file `first` and all that match `others` or `last` in it.

    revision: a branch, a tag or a commit; None: the main branch as it is now, or without a network
    as it was when it was asked for last. others: patterns; last: one more, whose files are fetched
    after all others. So where the cache has one of these, it has the others too. kind: "model" or
    "dataset". instead: how an error ends. Raises OSError that says what to do; FileNotFoundError if
    the Hub has no such repository, revision or file.
    """
    from huggingface_hub import hf_hub_download  # here, as it takes long to import

    def fetch(name: str, revision: str | None = revision, again: bool = False) -> Path:
        found = hf_hub_download(repo, name, revision=revision, repo_type=kind, force_download=again)
        return Path(found)

    with explained(repo, revision, kind, instead):
        folder = fetch(first).parent
        commit = folder.name  # for all others too, as a branch may move meanwhile
        more = matching_files(repo, commit, folder, others, last, kind) if last else []
        for name in [first, *more]:
            path = fetch(name, commit)
            if not is_whole(path):
                print(f"{path} is damaged: fetching it again")
                path = fetch(name, commit, again=True)
            if not is_whole(path):
                path.resolve().unlink()
                path.unlink()
                raise OSError(f"{name} of {repo} came twice with other bytes than the Hub says")
    return folder


def matching_files(
    repo: str, commit: str, folder: Path, others: tuple[str, ...], last: str, kind: str
) -> list[str]:
    """The names of a commit's files that match `others`, and then those that match `last`.

    If the Hub cannot be asked, those in the cache, if it has one that matches `last`.
    """
    from huggingface_hub.utils import filter_repo_objects

    def ordered(found: list[str]) -> list[str]:
        at_the_end = {*filter_repo_objects(found, allow_patterns=last)}
        before = {*filter_repo_objects(found, allow_patterns=[*others])} - at_the_end
        return [*sorted(before), *sorted(at_the_end)]

    try:
        return ordered(files_of_commit(repo, commit, kind))
    except client_errors():  # whichever it is: what was fetched before is good enough
        cached = [path.name for path in folder.iterdir()]
        if not [*filter_repo_objects(cached, allow_patterns=last)]:
            raise
        return ordered(cached)


def files_of_commit(repo: str, commit: str, kind: str) -> list[str]:
    """The names of the files at the top of a repository, from the Hub."""
    from huggingface_hub import HfApi, errors

    try:
        about = HfApi().repo_info(repo, revision=commit, repo_type=kind, timeout=PATIENCE)
        return [file.rfilename for file in about.siblings if "/" not in file.rfilename]
    except (KeyError, TypeError) as error:  # the client takes any JSON for an answer of the Hub's
        raise errors.FileMetadataError(f"the list of files of {repo} has no names") from error


def is_whole(path: Path) -> bool:
    """Whether a cached file has the checksum that it is kept under; True if it is under none."""
    if not path.is_symlink():  # a system without links has the file itself here
        return True
    about = path.stat()
    return _is_whole(path, path.readlink().name, about.st_size, about.st_mtime_ns)


@cache  # a command asks for its model several times
def _is_whole(path: Path, checksum: str, _size: int, _changed: int) -> bool:
    return not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", checksum) or has_checksum(path, checksum)


# ---- what went wrong -----------------------------------------------------------------------------


def client_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: errors of its own, of its HTTP library, and of files.

    A ValueError is of a name, a token or JSON. A RuntimeError is of hf_xet, which fetches large
    files for it.
    """
    from huggingface_hub import errors

    return (OSError, ValueError, RuntimeError, errors.HTTPError)


@contextmanager
def explained(repo: str, revision: str | None, kind: str, instead: str) -> Iterator[None]:
    """Have an error of the Hub's client end in one line that says what to do.

    It becomes a FileNotFoundError if the Hub has no such thing, else an OSError.
    """
    try:
        yield
    except client_errors() as error:
        at = f"{repo}@{revision}" if revision else repo
        line = f"{kind} {at}: {explanation(error, repo, kind)}, {instead}"
        raise (FileNotFoundError if is_absent(error) else OSError)(line) from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those behind it: the client often wraps the one that tells."""
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
        isinstance(one, absent) and not isinstance(one, errors.GatedRepoError)
        for one in causes(error)
    )


def explanation(error: Exception, repo: str, kind: str) -> str:
    """What happened, and what to do: of the first error in the chain that is known."""
    from huggingface_hub import errors

    for one in causes(error):
        refused = isinstance(one, errors.HfHubHTTPError)
        if text := refusal(one, repo, kind) if refused else failure(one):
            return text
    return f"{first_line(error)}: run the command again, in another network if that stays"


def refusal(error: Exception, repo: str, kind: str) -> str:
    """Of an HTTP answer that refuses what was asked for."""
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
    """Of what failed before or after an answer; "" for an error that is not known here."""
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
        place = constants.HF_HUB_CACHE
        return f"HF_HUB_OFFLINE is set, and {place} has not all of it: unset that once"
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        return (
            f"no connection to {constants.ENDPOINT}, or it broke off ({type(error).__name__}): "
            "look at the network and run the command again"
        )
    return unwritable(error) if isinstance(error, OSError) and error.errno else ""


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def gated(page: str) -> str:
    """Of a repository that wants its terms accepted."""
    from huggingface_hub import get_token

    who = "with the account of the token that is set" if get_token() else f"then {LOG_IN}"
    return f"it is gated: ask for access on {page}, {who}"


def unknown_name(kind: str) -> str:
    """Of a repository that is not there, or private: the Hub does not say which."""
    from huggingface_hub import get_token

    private = "see whether the token that is set may read it" if get_token() else LOG_IN
    return (
        f"the Hub has no {kind} of that name, or you may not see it: correct the name; if it is "
        f"private, {private}"
    )


def refused_with(status: int) -> str:
    """Of an HTTP status that says no more than itself."""
    from huggingface_hub import constants

    if status == 401:
        return f"the Hub does not know this token (401): {LOG_IN}"
    if status == 403:
        return f"the Hub refuses it (403): want a token that may read it; {LOG_IN}"
    if status == 429:
        return (
            "the Hub had too many requests from here (429): run the command again in some minutes"
        )
    if status >= 500:
        return f"the Hub has a fault ({status}): run the command again later"
    return f"{constants.ENDPOINT} refuses it ({status}): see whether HF_ENDPOINT is right"


def unwritable(error: OSError) -> str:
    """Of a cache into which a file cannot be written."""
    from huggingface_hub import constants

    place = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk of {place} is full: make room, or set HF_HOME to another disk"
    return f"{place} cannot be written ({error.strerror}): set HF_HOME to another folder"


def first_line(error: BaseException) -> str:
    """Of a message that may have many."""
    return (str(error).splitlines() or [""])[0]
