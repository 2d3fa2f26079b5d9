"""What CUDA is told before it starts, which warnings come when, how much is decoded at a time."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, slow

import generate
from moe_model import KVCache, MoEModel
from plumbing import device


@pytest.fixture
def settings_of_torch(monkeypatch):
    """What `prepare_cuda` sets, as it was before; put back afterwards."""
    matmul = torch.backends.cuda.matmul
    was = torch.backends.cuda.cudnn_sdp_enabled(), matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.enable_cudnn_sdp(True)
    matmul.allow_bf16_reduced_precision_reduction = True
    for name in device.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(was[0])
    matmul.allow_bf16_reduced_precision_reduction = was[1]


def test_every_command_tells_cuda_how_before_it_looks_for_one(settings_of_torch, monkeypatch):
    seen = []

    def looked():
        seen.append(os.environ.get("PYTORCH_ALLOC_CONF"))  # read when CUDA starts, and never again
        return False

    monkeypatch.setattr(torch.cuda, "is_available", looked)
    device.compute(None, None)
    assert set(seen) == {"expandable_segments:True"}
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_what_the_user_has_said_of_the_allocator_stays(settings_of_torch, monkeypatch):
    for name in device.ALLOCATOR:
        monkeypatch.setenv(name, "max_split_size_mb:128")
        device.prepare_cuda()
        assert os.environ[name] == "max_split_size_mb:128"
        assert [n for n in device.ALLOCATOR if n in os.environ] == [name]
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("asked", "driver", "hidden", "warned"),
    [
        (None, True, False, True),  # an old driver, or a torch without CUDA
        (None, True, True, False),  # GPUs are hidden on purpose
        (None, False, False, False),  # a machine without a GPU
        ("cpu", True, False, False),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_named(
    monkeypatch, capsys, tmp_path, asked, driver, hidden, warned
):
    monkeypatch.setenv("PATH", str(tmp_path))
    if driver:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    if not hidden:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.compute(asked, None)
    err = capsys.readouterr().err
    assert ("nvidia-smi" in err and "--device cpu" in err) == warned
    assert err.count("\n") == warned


@pytest.mark.parametrize(
    ("n", "kind", "asked", "warned"),
    [
        (7_000_000_000, "cpu", None, True),
        (7_000_000_000, "cpu", "cpu", False),
        (7_000_000_000, "cuda", None, False),
        (3_700_000, "cpu", None, False),
    ],
)
def test_billions_of_parameters_on_a_cpu_are_named(capsys, n, kind, asked, warned):
    device.warn_of_slow_cpu(n, torch.device(kind), asked)
    err = capsys.readouterr().err
    assert ("7.0 billion" in err) == warned
    assert err.count("\n") == warned


def test_a_run_says_where_it_computes(cli, toy, tmp_path, monkeypatch):
    from conftest import small_run, write_rows

    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": "#### 1"}] * 2)
    words = small_run(toy, rows, "--steps", 1, "--no-eval", "--catcher", "forward", "--out", "r")
    code, out, err = cli("train.py", *words)
    assert code == 0, err
    assert any(line.split()[:2] == ["device", "cpu"] for line in out.splitlines())


# ---- how much is decoded at a time ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")],
)
def test_a_card_that_only_emulates_bf16_computes_in_fp32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.default_dtype(torch.device("cuda")) == dtype
    assert device.default_dtype(torch.device("cpu")) == "fp32"


def test_two_models_that_do_not_fit_on_a_card_are_refused_before_they_are_loaded():
    generate.check_two_fit(27_000_000_000, 27_000_000_000)
    with pytest.raises(OSError, match=r"27.7 GB of weights, but the GPU has 23.5 GB free"):
        generate.check_two_fit(27_700_000_000, 23_500_000_000)


def on_a_card(monkeypatch, folder, free):
    """A model that says it is on a GPU with so many bytes free. Nothing is computed on it."""
    model = MoEModel.from_pretrained(folder)
    monkeypatch.setattr(MoEModel, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 10 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 0)
    return model


def test_scoring_takes_as_many_as_fit_on_a_card_and_says_so(monkeypatch, checkpoint, capsys):
    of = {free: 0 for free in (10**5, 10**6, 10**7, 10**9)}
    for free in of:
        model = on_a_card(monkeypatch, checkpoint, free)
        of[free] = generate.fitting_batch(model, 20, 30)
    sizes = list(of.values())
    assert sizes == sorted(sizes)
    assert sizes[0] < generate.BATCH == sizes[-1]
    assert f"{sizes[0]} prompts" in capsys.readouterr().out
    # what the cache alone takes of it, by the tensors themselves
    cache = KVCache(model.cfg, torch.zeros(1, dtype=torch.long), 50, torch.float32)
    each = sum(t.numel() * t.element_size() for t in (cache.k, cache.v))
    assert all(n == 1 or n * each <= 0.85 * free for free, n in of.items())
    assert generate.fitting_batch(on_a_card(monkeypatch, checkpoint, 0), 20, 30) == 1


def test_on_the_cpu_it_is_a_hundred_as_ever(checkpoint, monkeypatch):
    monkeypatch.setattr("generate.free_bytes", lambda _device: 0)
    assert generate.fitting_batch(MoEModel.from_pretrained(checkpoint), 20, 30) == 100


def test_ended_rows_leave_the_cache_without_a_second_one(olmoe):
    """What is left is what indexing gives, and no new tensor is as large as a half of the cache."""
    cfg = MoEModel.from_pretrained(olmoe).cfg
    cache = KVCache(cfg, torch.arange(6), 9, torch.float32)
    cache.length = 7  # columns 7 and 8 are still to come
    draw = torch.Generator().manual_seed(0)
    for half in (cache.k, cache.v):
        half.copy_(torch.randn(half.shape, generator=draw))
    rows, memory = torch.tensor([1, 4, 5]), [half.data_ptr() for half in (cache.k, cache.v)]
    want = [half[:, rows, :, :7].clone() for half in (cache.k, cache.v)]
    cache.keep(rows)
    assert [half.data_ptr() for half in (cache.k, cache.v)] == memory
    for half, kept in zip((cache.k, cache.v), want, strict=True):
        assert torch.equal(half[:, :, :, :7], kept)
    assert cache.pad.tolist() == [1, 4, 5]
    k = torch.randn(3, cfg.n_kv_heads, 1, cfg.head_dim, generator=draw)
    grown, _ = cache.extend(1, k, k)
    assert torch.equal(grown[:, :, :7], want[0][1])
    assert torch.equal(grown[:, :, 7:], k)


# ---- how a rank ends -----------------------------------------------------------------------------

ENDS = """
import atexit, sys, time
sys.path.insert(0, {root!r})
from plumbing import cli
atexit.register(time.sleep, 600)  # as a library that waits for other ranks

def main():
    print("so far", flush=False)
    {what}

cli.command(main)
"""


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("raise ValueError('a wrong flag')", 2, "error: rank 1: a wrong flag"),
        slow(("raise ZeroDivisionError('ours')", 1, "ZeroDivisionError: ours")),
        ("raise KeyboardInterrupt('saved')", 130, "stopped: saved"),
        slow(("sys.exit(0)", 0, "")),  # --help
        ("pass", 0, ""),
    ],
)
def test_a_rank_among_several_ends_at_once_with_all_that_it_said(what, code, said):
    """Whatever waits at Python's exit. Alone it ends as any Python does."""
    env = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", ENDS.format(root=str(ROOT), what=what)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "so far" in done.stdout
    assert said in done.stderr
