"""The files from which a stopped run continues: step, weights and optimizer, with a checksum.

The last two saves are kept. A save has each tensor in one piece, for any number of ranks. So any
other number of ranks can continue from it.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from plumbing import ranks
from plumbing.cli import say
from plumbing.files import COUNTS, sha256, sync_names, write_atomically, write_json
from plumbing.run_folder import Metrics, lines_up_to, read_run

LAST, BEFORE = "state.safetensors", "state-before.safetensors"
NEW = f"new-{LAST}"  # a name for a moment. If it is there after a stop, it is the newest save
ADAPTER = "adapter.safetensors"  # the weights alone, at the end of a run
WEIGHTS = "weights"  # tensors of a save are weights/NAME, and KEY/NAME for each value of AdamW


class Save(NamedTuple):
    """The state of a run after `step` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]

    def checksum(self) -> str:
        """The sha256 of the step and of all tensors."""
        digest = hashlib.sha256(str(self.step).encode())
        for name, t in sorted(self.tensors.items()):
            digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
            digest.update(t.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def save(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a new last save. The one before it stays.

    weights: the values that the run must keep, by name, as hellora.adapter_state gives them. Every
    rank must call this. Rank 0 writes, the other ranks wait.
    """
    tensors = {f"{WEIGHTS}/{name}": t for name, t in weights.items()}
    for name, param in model.named_parameters():
        tensors |= {f"{key}/{name}": t for key, t in optimizer.state.get(param, {}).items()}
    tensors = ranks.on_rank_0(tensors)
    if not ranks.rank():
        header = {"step": str(step), "sha256": Save(step, tensors).checksum()}
        write_atomically(folder / NEW, lambda draft: save_file(tensors, draft, header))
        rename(folder)
    ranks.wait()  # if a rank ended now, torchrun would stop rank 0 while it writes


def rename(folder: Path) -> None:
    """Let the new save be the last one, and the last one be the save before it."""
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / BEFORE)
    (folder / NEW).replace(folder / LAST)
    sync_names(folder)


def finish(folder: Path) -> None:
    """Finish a save that was stopped before its renames. Delete it if it is damaged."""
    try:
        read(folder / NEW)
    except ValueError:
        (folder / NEW).unlink()
    else:
        rename(folder)


def load(folder: Path) -> Save | None:
    """The last save that is not damaged, or None if there is no save.

    Each damaged save is reported. Raises ValueError if all are damaged.
    """
    damaged = []
    for path in (folder / NEW, folder / LAST, folder / BEFORE):
        if path.exists() or path.is_symlink():
            try:
                return read(path)
            except ValueError as error:
                damaged.append(str(error))
                say(f"{error}: looking for the save before it")
    if damaged:
        raise ValueError(f"{' and '.join(damaged)}: delete what is damaged to start over")
    return None


def read(path: Path) -> Save:
    """One save. Raises ValueError if it is damaged."""
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        with safe_open(path, framework="pt") as file:
            header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = Save(int(header["step"]), tensors)
        if state.checksum() != header["sha256"] or state.step < 1:
            raise ValueError("its checksum or its step is wrong")
        check_numbers(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return state


def check_numbers(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless all values are finite, and in fp32 or boolean (masks)."""
    for name, t in tensors.items():
        if t.dtype not in (torch.float32, torch.bool):
            raise ValueError(f"{name} is {t.dtype}, want torch.float32")
        if not t.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")


@torch.no_grad()
def resume(
    folder: Path, weights: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Restore the last good save of `folder`. Returns the number of steps done, 0 without a save.

    weights: as for `save`. These tensors are filled in place. Raises ValueError if all saves are
    damaged, or if the last good one is of another model.
    """
    if not ranks.rank() and (folder / NEW).exists():
        finish(folder)
    ranks.wait()
    saved = load(folder)
    if saved is None:
        return 0
    parts = {WEIGHTS: {}}
    for path, t in saved.tensors.items():
        key, _, name = path.partition("/")
        parts.setdefault(key, {})[name] = t
    fill(weights, parts.pop(WEIGHTS), folder)
    check_moments(parts, model, folder)
    for key, values in parts.items():
        for name, value in values.items():
            param = model.get_parameter(name)
            t = torch.empty_like(param if value.ndim else value, device=param.device)
            ranks.put(t, value)
            optimizer.state[param][key] = t
    print(f"going on after step {saved.step}, the last save in {folder}")
    return saved.step


@torch.no_grad()
def fill(live: dict[str, Tensor], saved: dict[str, Tensor], folder: Path) -> None:
    """Copy the values `saved` in `folder` into the `live` tensors, in place.

    Raises ValueError unless names, shapes and masks are the same in both.
    """

    def form(t: Tensor) -> tuple[torch.Size, bool]:
        return t.shape, t.dtype == torch.bool

    wrong = saved.keys() ^ live.keys() or {n for n in live if form(live[n]) != form(saved[n])}
    if wrong:
        raise ValueError(
            f"the adapter saved in {folder} does not fit this model (see {min(wrong)}): train again"
        )
    for name, value in saved.items():
        ranks.put(live[name], value)


def check_moments(moments: dict[str, dict[str, Tensor]], model: nn.Module, folder: Path) -> None:
    """Raise ValueError unless a parameter has all values that AdamW keeps, in its shape, or none.

    It has none if it is not trained, or has had no gradient yet. moments: {AdamW's key: {parameter:
    value}}.
    """
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    for name in set().union(*moments.values()):
        found = {key: values[name].shape for key, values in moments.items() if name in values}
        shape = shapes.get(name)
        if shape is None or found != {
            "step": torch.Size([]),
            "exp_avg": shape,
            "exp_avg_sq": shape,
        }:
            raise ValueError(
                f"the last save in {folder} lacks what AdamW keeps for {name}: "
                "delete it to start over"
            )


# ---- the end of a run ----------------------------------------------------------------------------


def save_adapter(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write adapter.safetensors, with each of the `weights` in one piece.

    Every rank must call this.
    """
    tensors = ranks.on_rank_0(weights)
    write_atomically(folder / ADAPTER, lambda draft: save_file(tensors, draft))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The weights at the end of a run: adapter.safetensors, or the last save if that is damaged.

    Raises FileNotFoundError. Raises ValueError if neither has the checksum in run.json, or if there
    are values that no run writes.
    """
    path, last = folder / ADAPTER, folder / LAST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: want a finished run. If this one was stopped, the command that "
            "began it goes on with it"
        )
    checksum = (read_run(folder).get("hashes") or {}).get("adapter")
    for file, prefix in ((path, ""), (last, f"{WEIGHTS}/")):
        try:
            found = load_file(file).items()
        except (SafetensorError, OSError) as error:
            say(f"{file} cannot be read ({error})")
            continue
        saved = {name.removeprefix(prefix): t for name, t in found if name.startswith(prefix)}
        if checksum in (None, hashlib.sha256(save_bytes(saved)).hexdigest()):
            break
        print(f"the weights in {file} have not the checksum in {folder / 'run.json'}")
    else:
        raise ValueError(
            f"the weights in {path} and in {last} have not the checksum in run.json: train again"
        )
    try:
        check_numbers(saved)
    except ValueError as error:
        raise ValueError(f"{file}: {error}: train again") from error
    return saved


# ---- the best adapter by --dev-data --------------------------------------------------------------

BEST, DEV = "best", "dev-metrics.jsonl"


@dataclass
class DevLine:
    """One line of dev-metrics.jsonl."""

    step: int
    loss: float  # nats per answer token
    best: bool  # whether the loss was the lowest so far


def last_best(folder: Path) -> DevLine | None:
    """The line of the step whose adapter is in best/, or None."""
    lines = [json.loads(line) for line in lines_up_to(folder / DEV, COUNTS[-1], DevLine)]
    return next((DevLine(**line) for line in reversed(lines) if line["best"]), None)


class DevLosses:
    """The losses on --dev-data, in dev-metrics.jsonl. The adapter with the lowest is in best/.

    At the end of the run, best/ is the folder of a run, for every command that takes one.
    """

    def __init__(self, folder: Path, step: int, log: str | None):
        """Continue after `step` steps."""
        best = last_best(folder)
        # A stopped run may repeat steps. An adapter of such a step does not count.
        self.lowest = best.loss if best and best.step <= step else math.inf
        self.folder, self.metrics = folder / BEST, Metrics(folder, step, DEV, log)

    def add(self, step: int, loss: float, weights: dict[str, Tensor]) -> None:
        """Keep the loss after a step, and `weights` if it is the lowest. Every rank calls this."""
        best = ranks.once(lambda: loss < self.lowest)  # rank 0 decides for all
        self.metrics.add(step=step, loss=loss, best=best)
        if best:
            self.lowest = loss
            self.folder.mkdir(exist_ok=True)
            save_adapter(self.folder, weights)


def finish_best(folder: Path, record: dict) -> None:
    """Make best/ the folder of a run, with this run.json, and say where it is."""
    best, line = folder / BEST, last_best(folder)
    if line is None:
        return
    hot = folder / "hot_experts.json"
    if hot.is_file():
        write_atomically(best / hot.name, lambda draft: draft.write_bytes(hot.read_bytes()))
    hashes = record["hashes"] | {"adapter": sha256(best / ADAPTER)}
    write_json(best / "run.json", record | {"hashes": hashes, "best_step": line.step})
    print(
        f"the lowest loss on --dev-data was {line.loss:.4f}, after step {line.step}. Its adapter "
        f"is in {best}: use --run {best}"
    )
