"""Files of the Hugging Face Hub: fetched once, and checked against the names they are cached under.

huggingface_hub speaks with the server, tries again, locks and caches. Added here: the commit that a
revision stands for, so that a run can go on with it; one file after the other in the main thread,
so that Ctrl-C stops at once (its own loop over files waits for eight threads); a look at the bytes;
and errors that say what happened and what to do.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from plumbing.files import has_checksum

PATIENCE = 30  # seconds until the Hub's list of files must be there
COMMIT = re.compile("[0-9a-f]{40}")


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache (models--A--B/snapshots/COMMIT); else None."""
    return folder.name if repo_of(folder) else None


def repo_of(folder: Path) -> str | None:
    """ORG/NAME of a snapshot in the Hub's cache; None for any other folder."""
    folder = folder.absolute()
    kind, _, repo = folder.parent.parent.name.partition("--")
    is_one = kind == "models" and folder.parent.name == "snapshots"
    return repo.replace("--", "/") if is_one and COMMIT.fullmatch(folder.name) else None


def snapshot(
    repo: str,
    revision: str | None,
    first: str,
    patterns: tuple[str, ...] = (),
    kind: str = "model",
) -> Path:
    """The folder of a snapshot, with the file `first` and all that match `patterns` in it.

    revision: a branch, a tag or a commit; None: the main branch as it is now, or without a network
    as it was when it was asked for last. kind: "model" or "dataset". Files of the last pattern are
    fetched last. Raises OSError that says what to do.
    """
    from huggingface_hub import hf_hub_download  # here, as it takes long to import

    def fetch(name: str, revision: str | None = revision, again: bool = False) -> Path:
        found = hf_hub_download(repo, name, revision=revision, repo_type=kind, force_download=again)
        return Path(found)

    with explained(repo, revision, kind):
        folder = fetch(first).parent
        commit = folder.name  # for all others too, as a branch may move meanwhile
        for name in [first, *(names(repo, commit, folder, patterns, kind) if patterns else ())]:
            path = fetch(name, commit)
            if not is_whole(path):
                print(f"{path} is damaged: fetching it again")
                path = fetch(name, commit, again=True)
            if not is_whole(path):
                path.resolve().unlink()
                path.unlink()
                raise OSError(f"{name} of {repo} came twice with other bytes than the Hub says")
    return folder


def names(repo: str, commit: str, folder: Path, patterns: tuple[str, ...], kind: str) -> list[str]:
    """The files of a commit that match `patterns`, those of the last pattern at the end.

    If the Hub cannot be asked, those in the cache, if there is one of the last pattern.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    def ordered(found: list[str]) -> list[str]:
        last = {*filter_repo_objects(found, allow_patterns=patterns[-1])}
        rest = {*filter_repo_objects(found, allow_patterns=[*patterns])} - last
        return [*sorted(rest), *sorted(last)]

    cached = [path.name for path in folder.iterdir()]
    try:
        about = HfApi().repo_info(repo, revision=commit, repo_type=kind, timeout=PATIENCE)
        return ordered([f.rfilename for f in about.siblings if "/" not in f.rfilename])
    except Exception:  # whatever it is: what was fetched before is good enough
        if not [*filter_repo_objects(cached, allow_patterns=patterns[-1])]:
            raise
        return ordered(cached)


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


@contextmanager
def explained(repo: str, revision: str | None, kind: str) -> Iterator[None]:
    """Have an error of the Hub's client end in one line that says what to do."""
    try:
        yield
    except Exception as error:  # it passes on errors of several HTTP libraries
        at = f"{repo}@{revision}" if revision else repo
        raise FileNotFoundError(f"{kind} {at}: {explanation(error, repo, kind)}") from error


def explanation(error: Exception, repo: str, kind: str) -> str:
    """What happened, and what to do."""
    from huggingface_hub import constants, errors, get_token

    chain = [error]  # the client often wraps the error that tells
    while before := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(before)
    answer = next((one.response for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
    status, file = (answer.status_code, answer.url.path.rpartition("/")[2]) if answer else (0, "")
    hub, place, token = constants.ENDPOINT, constants.HF_HUB_CACHE, get_token()
    page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    for_all = "with the account of the token that is set" if token else f"then {log_in}"
    private = "see whether the token that is set may read it" if token else log_in
    copy = "or give a copy that is here"
    first_line = (str(error).splitlines() or [""])[0]
    known = [
        (errors.HFValidationError, f"{first_line}: correct the name"),
        (UnicodeError, "HF_TOKEN has letters that no token has: set it again"),
        (errors.GatedRepoError, f"it is gated: ask for access on {page}, {for_all}, {copy}"),
        (
            errors.RepositoryNotFoundError,
            f"the Hub shows none of that name: correct it; if it is private, {private}",
        ),
        (errors.RevisionNotFoundError, f"want a branch, a tag or a commit that {page} has"),
        (errors.RemoteEntryNotFoundError, f"it has no {file}: want a {kind} with it, see {page}"),
        (errors.HfHubHTTPError, refusal(status, hub, log_in)),
        (
            errors.OfflineModeIsEnabled,
            f"HF_HUB_OFFLINE is set, and {place} has not all of it: unset that once, {copy}",
        ),
        (
            (errors.HTTPError, ConnectionError, TimeoutError),
            f"no connection to {hub}, or it broke off ({type(chain[-1]).__name__}): look at the "
            f"network and run the command again, {copy}",
        ),
    ]
    for one in chain:
        for of, text in known:
            if isinstance(one, of):
                return text
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"the disk of {place} is full: make room, or set HF_HOME to another disk"
        if isinstance(one, OSError) and one.errno:
            return f"{place} cannot be written ({one.strerror}): set HF_HOME to another folder"
    if type(error) is OSError:  # ours, or the client's check of a size
        return f"{first_line}: run the command again, in another network if that stays, {copy}"
    return (
        f"what answers at {hub} does not speak as the Hub ({type(chain[-1]).__name__}): see "
        f"whether the network wants a log-in, and whether HF_ENDPOINT is right, {copy}"
    )


def refusal(status: int, hub: str, log_in: str) -> str:
    """What an HTTP status of the Hub means, and what to do."""
    if status == 401:
        return f"the Hub does not know this token (401): {log_in}"
    if status == 403:
        return f"the Hub refuses it (403): want a token that may read it; {log_in}"
    if status == 429:
        return (
            "the Hub had too many requests from here (429): run the command again in some minutes"
        )
    if status >= 500:
        return f"the Hub has a fault ({status}): run the command again later"
    return f"{hub} refuses it ({status}): see whether HF_ENDPOINT is right"
