"""python -m torch.distributed.run --nproc-per-node N tests/ranks_driver.py FILE

Runs train.py several times in one group of processes, as starting a group takes longer than a short
run. FILE is a JSON list of command lines. Each run's folder gets counted.json: the bytes that rank
0 got from the others in the training loop's collectives, if they go round in a ring, what
ranks.traffic had said, the bytes that each rank read to load the model; and scored.json: the bytes
got in scoring before and after training, and those of the whole model. Before training no memory is
free for a cut model in one piece, after it there is what the machine has.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from plumbing import ranks

# Times size * (N - 1) / N.
IN_A_RING = {"_allgather_base_": 1, "_reduce_scatter_base_": 1, "allreduce_": 2}


class Wire(TorchDispatchMode):
    """Counts the bytes of collectives as PyTorch is asked for them."""

    bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        namespace, _, name = op.name().partition("::")
        if namespace == "c10d" and name in IN_A_RING:
            flat = (t for a in args[:2] for t in (a if isinstance(a, list) else [a]))
            tensors = [t for t in flat if torch.is_tensor(t)]
            size = max(t.numel() * t.element_size() for t in tensors)
            self.bytes += IN_A_RING[name] * size * (ranks.world() - 1) / ranks.world()
        return op(*args, **(kwargs or {}))


def loading(model, source, device):
    """train.load_weights, watched the second time: the first also reads what it imports."""
    load_weights(model, source, device)
    before = bytes_read()
    load_weights(model, source, device)
    read.append(bytes_read() - before)


def bytes_read():
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def fitting(model, job, folder):
    """train.fit, watched."""
    with Wire() as wire:
        visits = fit(model, job, folder)
    said = ranks.traffic(model, ranks.world(), ranks.is_cut(model))
    counted = {"sent": wire.bytes, "said": said, "read": ranks.gathered(read[-1])}
    if not ranks.rank():
        (folder / "counted.json").write_text(json.dumps(counted))
    return visits


def scoring(job, model, folder, when):
    """train.score_model, watched."""
    train.free_bytes = free_bytes if when == "after" else lambda _device: 0
    with Wire() as wire:
        score_model(job, model, folder, when)
    scored[when] = wire.bytes
    scored["model"] = sum(p.numel() * p.element_size() for p in model.parameters())
    if not ranks.rank():
        (folder / "scored.json").write_text(json.dumps(scored))


read, scored = [], {}
free_bytes = train.free_bytes
score_model, train.score_model = train.score_model, scoring
fit, train.fit = train.fit, fitting
load_weights, train.load_weights = train.load_weights, loading

if __name__ == "__main__":
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = ["train.py", *words]
        train.main()
    ranks.stop()
    # At exit gloo's threads sometimes abort a rank whose work is done ("terminate called").
    sys.stdout.flush()
    os._exit(0)
