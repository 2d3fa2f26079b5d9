"""Small random checkpoints in the Hub's layout, one per family, and the embedded tiny model."""

import json
import os
import re
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: the numbers here are a CPU's, in fp32

import pytest
import torch
from safetensors.torch import load_file, save_file

from paper.scoring.sandbox import bubblewrap
from plumbing.checkpoint import base_parameters, parse_config
from plumbing.cli import command

ROOT = Path(__file__).parent.parent
# A shell has what it starts in the background ignore SIGINT, and so do the children of that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
torch.set_num_threads(1)  # small matrices: threads only get in each other's way

HUB = {
    "olmoe": {
        "model_type": "olmoe", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    },
    "mixtral": {
        "model_type": "mixtral", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    },
    "deepseek": {
        "model_type": "deepseek", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40,
        "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 64,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "vocab_size": 96, "hidden_size": 32, "head_dim": 12,
        "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3,
        "norm_topk_prob": True, "rope_theta": 1e6, "max_position_embeddings": 64,
    },
}  # fmt: skip


def some_slow(cases, quick):
    """Parameters of a test. Those that are not in `quick` are for the slow tier."""
    return [case if case in quick else slow(case) for case in cases]


def slow(case):
    """A parameter for the slow tier."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)


def write_checkpoint(folder, hub, seed=0, dtype=torch.float32):
    """A random checkpoint of config `hub`, its weights so large that every part matters."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for shape, names in base_parameters(parse_config(hub)).values():
        for name in names:
            value = torch.randn(shape[-2:], generator=draw)
            tensors[name] = (
                1 + 0.2 * value if len(shape) == 1 else value * 1.5 / shape[-1] ** 0.5
            ).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hub))
    return folder


def stacked(folder):
    """The checkpoint as transformers 5 writes it with save_original_format=False, in place."""
    tensors, stacks = load_file(folder / "model.safetensors"), {}
    for name in sorted(tensors):
        block, is_expert, rest = name.partition(".experts.")
        if is_expert and ".shared_" not in name:
            expert, leaf = rest.split(".")[:2]
            stacks.setdefault(block, {}).setdefault(int(expert), {})[leaf] = tensors.pop(name)
    for block, of in stacks.items():
        experts, new = [of[e] for e in range(len(of))], block.replace("block_sparse_moe", "mlp")
        gate, up, down = (
            ("w1", "w3", "w2") if "w1" in experts[0] else ("gate_proj", "up_proj", "down_proj")
        )
        halves = [torch.cat([one[gate], one[up]]) for one in experts]
        tensors[f"{new}.experts.gate_up_proj"] = torch.stack(halves)  # [E, 2 F, D]
        tensors[f"{new}.experts.down_proj"] = torch.stack([one[down] for one in experts])
    tensors = {name.replace("block_sparse_moe", "mlp"): t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.fixture(params=list(HUB))
def checkpoint(request, tmp_path):
    """A checkpoint of each family in turn."""
    return write_checkpoint(tmp_path / request.param, HUB[request.param])


@pytest.fixture
def olmoe(tmp_path):
    return write_checkpoint(tmp_path / "olmoe", HUB["olmoe"])


def toy_in(folder):
    """A random checkpoint with the tiny model's tokenizer: everything train.py needs, and quick."""
    hub = HUB["olmoe"] | {"vocab_size": 1024, "max_position_embeddings": 512, "eos_token_id": 1023}
    toy = write_checkpoint(folder / "toy", hub)
    shutil.copy(ROOT / "tiny" / "tokenizer.json", toy)
    return toy


@pytest.fixture
def toy(tmp_path):
    return toy_in(tmp_path)


@pytest.fixture
def cli(monkeypatch, capfd):
    """cli("train.py", "--k", 8) -> (exit code, stdout, stderr without bars), in this process."""

    def call(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        main = import_module(script.removesuffix(".py")).main
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            command(main)
        out, err = capfd.readouterr()
        return ended.value.code, out, re.sub(r"[^\n]*\r", "", err)  # a slow machine shows more bars

    return call


def pytest_collection_modifyitems(items):
    for item in items:
        if "wall" in item.fixturenames or "either" in item.fixturenames:
            item.add_marker("bubblewrap")


@pytest.fixture(scope="session")
def wall():
    """bubblewrap. Where it is missing, tests of what a model's programs can do fail: no skip."""
    try:
        return bubblewrap()
    except OSError as error:
        pytest.fail(str(error), pytrace=False)  # it says what to install


@pytest.fixture(params=["bubblewrap", "no isolation"])
def either(request):
    """The wall, or none: what decides about a program is the same."""
    return request.getfixturevalue("wall") if request.param == "bubblewrap" else ()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_run(model, rows, *more):
    """Flags of a run of train.py that takes seconds."""
    flags = ["--model", model, "--task", "tiny-math", "--data", rows, "--rank", 4, "--k", 2, *more]
    return [str(flag) for flag in flags]
