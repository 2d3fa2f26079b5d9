"""What a stopped run goes on from: step, weights and optimizer, in files that are whole and checked.

The last two saves are kept. A save has each tensor in one piece, whatever number of ranks wrote it, so any
other number can go on from it.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import hellora
import ranks
from moe_model import MoEModel
from run import sync_names, write_atomically

LAST, BEFORE = "state.safetensors", "state-before.safetensors"
NEW = f"new-{LAST}"  # has this name for a moment; found there after a stop, it is the newest
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


def save(folder: Path, step: int, model: MoEModel, optimizer: torch.optim.Optimizer) -> None:
    """Write it; the save before this one stays. Every rank must take part; rank 0 writes, the others wait."""
    tensors = {f"{WEIGHTS}/{name}": t for name, t in hellora.adapter_state(model).items()}
    for name, param in model.named_parameters():
        tensors |= {f"{key}/{name}": t for key, t in optimizer.state.get(param, {}).items()}
    tensors = ranks.on_rank_0(tensors)
    if not ranks.rank():
        about = {"step": str(step), "sha256": Save(step, tensors).checksum()}
        write_atomically(folder / NEW, lambda draft: save_file(tensors, draft, about))
        rename(folder)
    ranks.wait()  # a rank that ended now would have torchrun stop rank 0 while it writes


def rename(folder: Path) -> None:
    """Make the new save the last one, and the last the one before."""
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
    """The last save that is sound; None if there is none at all. Raises ValueError if all are damaged."""
    damaged = []
    for path in (folder / NEW, folder / LAST, folder / BEFORE):
        if path.exists() or path.is_symlink():
            try:
                return read(path)
            except ValueError as error:
                damaged.append(str(error))
                print(f"{error}: looking for the save before it")
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
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return state


def check_moments(of: dict[str, dict[str, Tensor]], model: MoEModel, folder: Path) -> None:
    """Raise ValueError unless every parameter has all that AdamW keeps for it, in its shape, or nothing.

    Nothing: it is not trained, or has had no gradient yet. of: {AdamW's key: {parameter: value}}.
    """
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    for name in set().union(*of.values()):
        found = {key: values[name].shape for key, values in of.items() if name in values}
        shape = shapes.get(name)
        if shape is None or found != {"step": torch.Size([]), "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError(
                f"the last save in {folder} has not what AdamW keeps for {name}: delete it to start over"
            )


@torch.no_grad()
def resume(folder: Path, model: MoEModel, optimizer: torch.optim.Optimizer) -> int:
    """Put the last sound save of `folder` back; the number of steps done, 0 if there is none."""
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
    hellora.fill(model, of.pop(WEIGHTS), folder)
    check_moments(of, model, folder)
    for key, values in of.items():
        for name, value in values.items():
            param = model.get_parameter(name)
            t = torch.empty_like(param if value.ndim else value, device=param.device)
            ranks.put(t, value)
            optimizer.state[param][key] = t
    print(f"going on after step {saved.step}, the last save in {folder}")
    return saved.step
