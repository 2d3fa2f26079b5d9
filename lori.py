"""LoRI's mask: which entries of B a sparse run trains, from a run that trained all of them.

LoRI freezes A at random. Its D run trains all of B; its S run starts again from B = 0 and trains only the
tenth of B that was largest at the end of the D run. HELLoRI is the same on hot experts.
"""

from pathlib import Path

import torch
from torch import Tensor

from hellora import Method, read_adapter
from run import read_run


def lori_masks(trained_b: dict[str, Tensor], keep: float, scope: str) -> dict[str, Tensor]:
    """LoRI's mask: marks the `keep` share of largest |B| entries of a trained D run, {name: bool}.

    trained_b: {module name: B [*stack, out, r]}. scope: within what the entries compete: the whole "model", a
    "layer", or a "matrix" (each expert's is its own). Exactly round(keep * entries) of each competition are
    kept; of equal ones the first, modules in order of their names.
    Source: LoRI's extract_mask.py, get_model_mask (which keeps all of equal entries, and rounds down).
    """

    rivals = {
        "model": lambda name, i: "",
        "layer": lambda name, i: name.split(".")[1],
        "matrix": lambda *of: of,
    }
    masks = {name: torch.zeros(b.shape, dtype=torch.bool) for name, b in trained_b.items()}
    groups: dict[object, list[tuple[Tensor, Tensor]]] = {}
    for name in sorted(trained_b):
        matrices = (t.reshape(-1, t.shape[-2] * t.shape[-1]) for t in (trained_b[name], masks[name]))
        for i, (b, mask) in enumerate(zip(*matrices, strict=True)):
            groups.setdefault(rivals[scope](name, i), []).append((b, mask))
    for group in groups.values():
        size = torch.cat([b for b, _ in group]).abs().float()
        kept = torch.zeros(len(size), dtype=torch.bool)
        kept[size.argsort(descending=True, stable=True)[: round(keep * len(size))]] = True
        for (_, mask), part in zip(group, kept.split([len(b) for b, _ in group]), strict=True):
            mask.copy_(part)
    return masks


def lori_start(folder: Path, run: dict, method: Method, scope: str, redraw_a: bool) -> dict[str, Tensor]:
    """What an S run (keep < 1) takes over from its D run in `folder`: the mask of B, and A unless redrawn.

    run: the S run's settings. The same A by default: an entry of B earned its place against D's row of A
    (LoRI's code draws a new one). Raises ValueError if the D run is not finished, or is of another placement.
    """
    d_name = run["method"].replace("-s", "-d", 1)
    wanted = {n: run[n] for n in ("model", "task", "k", "rank", "alpha")} | {
        "method": d_name,
        "finished": True,
    }
    saved = read_run(folder)
    if differ := [f"{n} {saved.get(n)}, want {v}" for n, v in wanted.items() if saved.get(n) != v]:
        raise ValueError(f"--mask-from {folder} does not fit: {'; '.join(differ)}")
    trained = read_adapter(folder)
    masks = lori_masks({n: b for n, b in trained.items() if n.endswith(".lora.B")}, method.keep, scope)
    start = {name.removesuffix("B") + "mask": mask for name, mask in masks.items()}
    return start | ({} if redraw_a else {n: a for n, a in trained.items() if n.endswith(".lora.A")})
