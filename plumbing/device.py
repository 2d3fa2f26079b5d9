"""The device: the choice of it, CUDA's settings, free memory, warnings about a slow device.

Nothing here has run on CUDA yet. PyTorch's source was read for it.
"""

import os
import shutil
import sys
from pathlib import Path

import torch

from plumbing import ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the choices of --dtype
LARGE = 1_000_000_000  # parameters: from this size on, a model is slow on a CPU
# The variables with which a user may have chosen how PyTorch keeps a GPU's memory.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def compute(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where and in what numbers to compute: as asked, or cuda if there is one (see default_dtype).

    Of several ranks each joins the others here, and gets a device of its own. Raises ValueError for
    cuda on a machine without it.
    """
    prepare_cuda()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch finds no GPU here: want --device cpu, or a torch with CUDA"
        )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    if device is None and default == "cpu":
        warn_of_unseen_gpu()
    mine = ranks.start(torch.device(device or default))
    return mine, DTYPES[dtype or default_dtype(mine)]


def default_dtype(device: torch.device) -> str:
    """ "bf16" on a GPU that computes in it, from compute capability 8 on. Else "fp32".

    Older GPUs only emulate bf16, slowly.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp32"


def prepare_cuda() -> None:
    """Tell PyTorch how to use CUDA. Call this before anything is on a GPU.

    Memory comes in segments that can grow. Each micro-batch has another length, so freed memory
    would otherwise have the wrong size for the next one. Attention does not use cuDNN, which plans
    for about half a second at each new length (transformers #48163). Products in bf16 add up in
    float32.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def warn_of_unseen_gpu() -> None:
    """Warn on stderr if this machine has NVIDIA's driver, but PyTorch finds no GPU.

    An Apple GPU gives another warning, as nothing has been tried there. The first warning is left
    out if CUDA_VISIBLE_DEVICES is set: that variable may hide GPUs on purpose.
    """
    if torch.backends.mps.is_available():
        _warn("the CPU is used: this project has not been tested on Apple GPUs (mps)")
    if shutil.which("nvidia-smi") and "CUDA_VISIBLE_DEVICES" not in os.environ:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        _warn(
            f"nvidia-smi is installed, but torch {torch.__version__} (built {built}) finds no GPU, "
            "so the CPU is used: want a torch that fits the driver, or --device cpu"
        )


def warn_of_slow_cpu(n_params: int, device: torch.device, asked: str | None) -> None:
    """Warn on stderr if a large model starts on a CPU without --device cpu."""
    if device.type == "cpu" and asked is None and n_params >= LARGE:
        _warn(
            f"the model has {n_params / 1e9:.1f} billion parameters, and the CPU is used: "
            "want a GPU, or --device cpu"
        )


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def free_bytes(device: torch.device) -> int:
    """The memory that this process may still take, in bytes. 0 if it is unknown.

    On a GPU: the free memory, and what PyTorch keeps there for its next tensors. On the CPU: the
    available memory, divided among the ranks on this machine.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):  # in kB
            return 1024 * int(line.split()[1]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0


def most_bytes(device: torch.device) -> int:
    """The memory that this process can never exceed, in bytes. 0 if it is unknown.

    On a GPU: the free memory. On the CPU: all memory of the machine with its swap, or the limit of
    the control group if that is lower.
    """
    if device.type == "cuda":
        return free_bytes(device)
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    total = sum(
        1024 * int(line.split()[1])
        for line in lines
        if line.startswith(("MemTotal:", "SwapTotal:"))
    )
    limits = [Path("/sys/fs/cgroup") / f"memory{kind}.max" for kind in ("", ".swap")]
    texts = [path.read_text().strip() if path.exists() else "max" for path in limits]
    return min(total, sum(map(int, texts))) if all(map(str.isdigit, texts)) else total
