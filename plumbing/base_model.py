"""The base model of a run: its name, the commit that the run keeps, and whether it has changed.

A run may name its model by a backbone's name, a Hub id with or without a revision, or a folder,
which may be a snapshot in the Hub's cache. checkpoint.py finds and reads what is named here.
"""

from pathlib import Path

from plumbing.checkpoint import full_name, locate, shard_paths
from plumbing.files import sha256
from plumbing.hub import COMMIT, snapshot_commit, snapshot_repo


def hub_repo(model: str) -> str:
    """ORG/NAME of a model of the Hub, however it is named: with a revision, or by its snapshot."""
    return snapshot_repo(Path(model)) or full_name(model).partition("@")[0]


def name_at_commit(model: str, commit: str | None) -> str:
    """The name by which `locate` finds a model of the Hub at a commit. Any other model's stays.

    Raises ValueError for a commit that is none.
    """
    if not commit or (Path(model).is_dir() and snapshot_commit(Path(model)) == commit):
        return model
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"{commit!r:.60} is no commit of {model}: want 40 hexadecimal digits")
    return f"{hub_repo(model)}@{commit}"


def is_same_model(saved: dict, new: dict) -> bool:
    """Whether two runs use the same base model.

    True if the names are equal: the saved run keeps its commit. True also for two names of one
    commit: ORG/NAME, ORG/NAME@COMMIT, the snapshot's folder.
    """
    if full_name(saved["model"]) == full_name(new["model"]):
        return True
    if saved.get("commit") is None or saved["commit"] != new.get("commit"):
        return False
    return hub_repo(saved["model"]) == hub_repo(new["model"])


def base_folder(run: dict, weights: bool = True) -> Path:
    """The folder of a run's base model, at the commit that it was trained on. run: its run.json."""
    return locate(name_at_commit(run["model"], run.get("commit")), weights)


def unchanged_base_folder(run: dict, folder: Path) -> Path:
    """`base_folder` of the run in `folder`, whose run.json, with "hashes", is `run`.

    Raises OSError if that model cannot be read, ValueError unless it, its tokenizer included, is as
    it was when the run began.
    """
    try:
        source = base_folder(run)
    except OSError as error:
        raise OSError(
            f"{folder} was trained on {run['model']}, which could not be read: {error}"
        ) from error
    was, now = run["hashes"], base_hashes(source)
    for what in now:
        if was.get(what) not in (None, now[what]):  # older runs do not know their tokenizer's
            raise ValueError(
                f"{run['model']} has changed (its {what}) since {folder} was trained on it: "
                "put it back"
            )
    return source


def fingerprint(folder: Path) -> str:
    """sha256 of a model: config.json and all weights."""
    return sha256(folder / "config.json", *shard_paths(folder))


def base_hashes(folder: Path) -> dict[str, str]:
    """The checksums of a model that a run keeps: `fingerprint`, and of its tokenizer's files."""
    names = ("tokenizer.model", "tokenizer.json", "generation_config.json")  # the last ends texts
    tokenizer = sha256(*(folder / name for name in names if (folder / name).is_file()))
    return {"model": fingerprint(folder), "tokenizer": tokenizer}
