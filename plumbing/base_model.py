"""The base model of a run: its name, its commit, and whether it has changed since.

A run may name its model by a backbone's name, by a Hub id with or without a revision, or by a
folder. The folder may be a snapshot in the Hub's cache. checkpoint.py finds and reads the model.
"""

from pathlib import Path

from plumbing.checkpoint import full_name, locate, shard_paths
from plumbing.files import sha256
from plumbing.hub import COMMIT, snapshot_commit, snapshot_repo


def hub_repo(model: str) -> str:
    """The ORG/NAME of a model of the Hub. It may be given with a revision, or as a snapshot."""
    return snapshot_repo(Path(model)) or full_name(model).partition("@")[0]


def name_at_commit(model: str, commit: str | None) -> str:
    """The name by which `locate` finds a model of the Hub at a commit. Other names do not change.

    Raises ValueError for a commit that is not valid.
    """
    if not commit or (Path(model).is_dir() and snapshot_commit(Path(model)) == commit):
        return model
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"{commit!r:.60} is not a commit of {model}: want 40 hexadecimal digits")
    return f"{hub_repo(model)}@{commit}"


def is_same_model(saved: dict, new: dict) -> bool:
    """Whether two runs use the same base model.

    True if the names are equal, as the saved run keeps its commit. True also for two names of one
    commit: ORG/NAME, ORG/NAME@COMMIT, or the snapshot's folder.
    """
    if full_name(saved["model"]) == full_name(new["model"]):
        return True
    if saved.get("commit") is None or saved["commit"] != new.get("commit"):
        return False
    return hub_repo(saved["model"]) == hub_repo(new["model"])


def base_folder(run: dict, weights: bool = True) -> Path:
    """The folder of a run's base model, at the commit of the training. run: its run.json."""
    return locate(name_at_commit(run["model"], run.get("commit")), weights)


def unchanged_base_folder(run: dict, folder: Path) -> Path:
    """`base_folder` of the run in `folder`. `run` is its run.json, with "hashes".

    Raises OSError if the model cannot be read. Raises ValueError if the model or its tokenizer has
    changed since the run began.
    """
    try:
        source = base_folder(run)
    except OSError as error:
        raise OSError(
            f"{folder} was trained on {run['model']}, which could not be read: {error}"
        ) from error
    before, now = run["hashes"], base_hashes(source)
    for part in now:
        if before.get(part) not in (None, now[part]):  # older runs did not keep a tokenizer's hash
            raise ValueError(
                f"{run['model']} has changed (its {part}) since {folder} was trained on it: "
                "restore it"
            )
    return source


def fingerprint(folder: Path) -> str:
    """The sha256 of a model: config.json and all weights."""
    return sha256(folder / "config.json", *shard_paths(folder))


def base_hashes(folder: Path) -> dict[str, str]:
    """The checksums of a model that a run keeps: its `fingerprint`, and its tokenizer's files."""
    names = ("tokenizer.model", "tokenizer.json", "generation_config.json")  # the last has end ids
    tokenizer = sha256(*(folder / name for name in names if (folder / name).is_file()))
    return {"model": fingerprint(folder), "tokenizer": tokenizer}
