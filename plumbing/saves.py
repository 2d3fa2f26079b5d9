"""What a stopped run goes on from: step, weights and optimizer, in files with a checksum.

The last two saves are kept. A save has each tensor in one piece, whatever number of ranks wrote it,
so any other number can go on from it.
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
NEW = f"new-{LAST}"  # has this name for a moment; found there after a stop, it is the newest
ADAPTER = "adapter.safetensors"  # the weights alone, at the end of a run
WEIGHTS = "weights"  # a save's tensors are weights/NAME, and for each of AdamW's values KEY/NAME


class Save(NamedTuple):
    """The state of a run after `step` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]

    def checksum(self) -> str:
        """sha256 of all of it."""
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

    weights: what the run must keep of the model's values, by name, as hellora.adapter_state gives
    it. Every rank must take part: rank 0 writes, the others wait.
    """
    tensors = {f"{WEIGHTS}/{name}": t for name, t in weights.items()}
    for name, param in model.named_parameters():
        tensors |= {f"{key}/{name}": t for key, t in optimizer.state.get(param, {}).items()}
    tensors = ranks.on_rank_0(tensors)
    if not ranks.rank():
        about = {"step": str(step), "sha256": Save(step, tensors).checksum()}
        write_atomically(folder / NEW, lambda draft: save_file(tensors, draft, about))
        rename(folder)
    ranks.wait()  # a rank that ended now would have torchrun stop rank 0 while it writes


def rename(folder: Path) -> None:
    """Give the new save the name of the last one, and the last the name of the one before."""
    if (folder / LAST).exists():
        (folder / LAST).replace(folder / BEFORE)
    (folder / NEW).replace(folder / LAST)
    sync_names(folder)


def finish(folder: Path) -> None:
    """End a save that was stopped before its renames; what is damaged goes."""
    try:
        read(folder / NEW)
    except ValueError:
        (folder / NEW).unlink()
    else:
        rename(folder)


def load(folder: Path) -> Save | None:
    """The last save that is sound, or None if there is none at all.

    Says which are damaged. Raises ValueError if all are.
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
        raise ValueError(f"{'; '.join(damaged)}: delete what is damaged to start over")
    return None


def read(path: Path) -> Save:
    """One save. Raises ValueError if it is damaged."""
    try:
        if not path.is_file():
            raise ValueError("it is no file")
        with safe_open(path, framework="pt") as file:
            about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = Save(int(about["step"]), tensors)
        if state.checksum() != about["sha256"] or state.step < 1:
            raise ValueError("its checksum or its step is wrong")
        check_numbers(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return state


def check_numbers(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError for what no run writes: all is finite and fp32, or boolean (masks)."""
    for name, t in tensors.items():
        if t.dtype not in (torch.float32, torch.bool):
            raise ValueError(f"{name} is {t.dtype}, want torch.float32")
        if not t.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")


@torch.no_grad()
def resume(
    folder: Path, weights: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Put the last sound save of `folder` back; the number of steps done, 0 if there is no save.

    weights: as for `save`; these tensors are filled in place. Raises ValueError if all saves are
    damaged, or if the last sound one is not of this model.
    """
    if not ranks.rank() and (folder / NEW).exists():
        finish(folder)
    ranks.wait()
    saved = load(folder)
    if saved is None:
        return 0
    of = {WEIGHTS: {}}
    for place, t in saved.tensors.items():
        key, _, name = place.partition("/")
        of.setdefault(key, {})[name] = t
    fill(weights, of.pop(WEIGHTS), folder)
    check_moments(of, model, folder)
    for key, values in of.items():
        for name, value in values.items():
            param = model.get_parameter(name)
            t = torch.empty_like(param if value.ndim else value, device=param.device)
            ranks.put(t, value)
            optimizer.state[param][key] = t
    print(f"going on after step {saved.step}, the last save in {folder}")
    return saved.step


@torch.no_grad()
def fill(live: dict[str, Tensor], saved: dict[str, Tensor], folder: Path) -> None:
    """Give the `live` tensors the values `saved` in `folder`, in place.

    Raises ValueError unless both have the same names and shapes, and the same of them are masks.
    """

    def form(t: Tensor) -> tuple:
        return t.shape, t.dtype == torch.bool

    wrong = saved.keys() ^ live.keys() or {n for n in live if form(live[n]) != form(saved[n])}
    if wrong:
        raise ValueError(
            f"the adapter saved in {folder} does not fit, as {min(wrong)} shows: train again"
        )
    for name, value in saved.items():
        ranks.put(live[name], value)


def check_moments(of: dict[str, dict[str, Tensor]], model: nn.Module, folder: Path) -> None:
    """Raise ValueError unless each parameter has all that AdamW keeps, in its shape, or nothing.

    It has nothing if it is not trained, or has had no gradient yet. of: {AdamW's key: {parameter:
    value}}.
    """
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    for name in set().union(*of.values()):
        found = {key: values[name].shape for key, values in of.items() if name in values}
        shape = shapes.get(name)
        if shape is None or found != {
            "step": torch.Size([]),
            "exp_avg": shape,
            "exp_avg_sq": shape,
        }:
            raise ValueError(
                f"the last save in {folder} has not what AdamW keeps for {name}: "
                "delete it to start over"
            )


# ---- what a run ends with ------------------------------------------------------------------------


def save_adapter(folder: Path, weights: dict[str, Tensor]) -> None:
    """Write adapter.safetensors, in which each of the `weights` is in one piece.

    Every rank must take part.
    """
    tensors = ranks.on_rank_0(weights)
    write_atomically(folder / ADAPTER, lambda draft: save_file(tensors, draft))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """What a run ended with: adapter.safetensors, or, if damaged, the weights of the last save.

    Raises FileNotFoundError, or ValueError if neither is what run.json has the checksum of, or if
    its numbers are none that a run writes.
    """
    path, last = folder / ADAPTER, folder / LAST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: want the folder of a run that was trained to its end"
        )
    right = (read_run(folder).get("hashes") or {}).get("adapter")
    for file, place in ((path, ""), (last, f"{WEIGHTS}/")):
        try:
            found = load_file(file).items()
        except (SafetensorError, OSError) as error:
            say(f"{file} cannot be read ({error})")
            continue
        saved = {name.removeprefix(place): t for name, t in found if name.startswith(place)}
        if right in (None, hashlib.sha256(save_bytes(saved)).hexdigest()):
            break
        print(f"{file} has not the weights that {folder / 'run.json'} has the checksum of")
    else:
        raise ValueError(
            f"neither {path} nor {last} has the weights that run.json has the checksum of: "
            "train again"
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
    best: bool  # whether it was the lowest so far


def last_best(folder: Path) -> DevLine | None:
    """The line of the step whose adapter is in best/."""
    lines = [json.loads(line) for line in lines_up_to(folder / DEV, COUNTS[-1], DevLine)]
    return next((DevLine(**line) for line in reversed(lines) if line["best"]), None)


class DevLosses:
    """dev-metrics.jsonl has the losses on --dev-data, and best/ the adapter with the lowest.

    When the run is finished, best/ is a run's folder like its own, for every command that takes
    one.
    """

    def __init__(self, folder: Path, step: int, log: str | None):
        """Go on after `step` steps."""
        best = last_best(folder)
        # An adapter of a step that is lost counts as none.
        self.lowest = best.loss if best and best.step <= step else math.inf
        self.folder, self.metrics = folder / BEST, Metrics(folder, step, DEV, log)

    def add(self, step: int, loss: float, weights: dict[str, Tensor]) -> None:
        """Keep the loss after a step, and `weights` if it is the lowest. Every rank takes part."""
        best = ranks.once(lambda: loss < self.lowest)  # rank 0 decides for all
        self.metrics.add(step=step, loss=loss, best=best)
        if best:
            self.lowest = loss
            self.folder.mkdir(exist_ok=True)
            save_adapter(self.folder, weights)


def finish_best(folder: Path, record: dict) -> None:
    """Make best/, if there is one, a run's folder with this run.json, and say where it is."""
    best, line = folder / BEST, last_best(folder)
    if line is None:
        return
    hot = folder / "hot_experts.json"
    if hot.is_file():
        write_atomically(best / hot.name, lambda draft: draft.write_bytes(hot.read_bytes()))
    hashes = record["hashes"] | {"adapter": sha256(best / ADAPTER)}
    write_json(best / "run.json", record | {"hashes": hashes, "best_step": line.step})
    print(
        f"the lowest loss on --dev-data was {line.loss:.4f}, after step {line.step}: its adapter "
        f"is in {best}, for --run {best}"
    )
