"""What a run is reckoned to take, against what PyTorch allocates; and what train.py says of it."""

import re
import shlex
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, small_run, some_slow, write_rows
from torch.profiler import ProfilerActivity, profile

import settings
from hellora import parse_method
from paper.bench import measure
from paper.bench.__main__ import Configuration, Session
from paper.bench.worlds import ALPHA, RANK, SHAPES, Shape, ours, random_world
from plumbing import flags, memory
from plumbing.checkpoint import BACKBONES
from plumbing.data import Encoded
from train import train_step

CPU = torch.device("cpu")
METHODS = ["hellora", "lora", "dora", "lori-d", "hellori-s"]
SHARE = 0.5159  # of visits that the hot experts get here, as in paper.bench
# Few words and few weights, so that what a step keeps is nearly all there is.
HUB = SHAPES["tiny"].hub | {"num_hidden_layers": 3, "vocab_size": 64}
WIDE = Shape(HUB | {"intermediate_size": 192, "num_experts": 8, "num_experts_per_tok": 2}, 512, 64)
GSM8K = [Encoded(list(range(414)), 1)] * 16  # the longest row, in OLMoE's tokenizer
ROWS = [{"question": "2+3?", "answer": "5\n#### 5"}] * 4


def allocated(work):
    """The most bytes by which `work` has grown what PyTorch's CPU allocator has given out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def reckoned_and_measured(shape, method, recompute, dtype):
    """Bytes of what stays, twice; and of all the rest, by arithmetic and as allocated."""
    world = random_world(shape, SHARE, shape.tokens, shape.length, dtype, CPU)
    config = Configuration(partial(ours, method=method, recompute=recompute), method)
    session = Session(world, config)

    def step():  # two micro-batches: in the second the gradients of the first are there
        batch = world.batch
        n = len(batch)
        train_step(session.model, session.optimizer, batch * 2, n, 0.0, session.visits)

    step()  # so that AdamW has its values
    row, k = parse_method(method), len(world.hot[0])
    model = memory.shapes(world.cfg, row, k, RANK, ALPHA, dtype)
    share = SHARE if row.chooses else 1.0
    parts = memory.training(model, shape.tokens, share, recompute, on_cpu=True)
    stays = parts["weights"] + parts["AdamW"]
    held = measure.held_bytes(session.model, session.optimizer)
    return stays, held, sum(parts.values()) - stays, allocated(step)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("method", some_slow(METHODS, ["hellora", "lora"]))
def test_a_step_allocates_what_is_reckoned(method, recompute):
    """Within 10 %, the bar of docs/scaling.md, though no weight is counted; 6 % was seen."""
    stays, held, rest, got = reckoned_and_measured(WIDE, method, recompute, torch.float32)
    assert stays == pytest.approx(held, rel=0.01)  # AdamW also counts its steps
    assert rest == pytest.approx(got, rel=0.1)


@pytest.mark.parametrize("method", ["hellora", "dora"])
def test_the_factors_and_norms_of_bf16_are_counted(method):
    _, _, rest, got = reckoned_and_measured(WIDE, method, False, torch.bfloat16)
    assert rest == pytest.approx(got, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["small", "medium"])
def test_a_step_of_the_benchmark_s_shapes_peaks_where_it_is_reckoned(shape, method, recompute):
    stays, held, rest, got = reckoned_and_measured(SHAPES[shape], method, recompute, torch.float32)
    print(f"{shape}, {method}, {recompute}: {(stays + rest) / (held + got):.3f} of what was seen")
    assert stays + rest == pytest.approx(held + got, rel=0.1)


# ---- train.py ------------------------------------------------------------------------------------


def job_of(monkeypatch, tmp_path, *words, model="tiny"):
    """The job of a command line, with a few rows of one's own."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr("sys.argv", ["train.py", "--no-eval", *small_run(model, rows, *words)])
    return settings.prepare(flags.train(""))


def olmoe_on_gsm8k(monkeypatch, tmp_path, *flags):
    """That job with OLMoE's shapes and GSM8K's lengths, on a GPU."""
    job = job_of(monkeypatch, tmp_path, "--k", 8, "--rank", 32, "--dtype", "bf16", *flags)
    cfg, device = BACKBONES["olmoe-1b-7b"].cfg, torch.device("cuda")
    return replace(job, cfg=cfg, data=GSM8K, device=device)


def most(job):
    return max(sum(parts.values()) for parts in settings.needs(job).values())


def test_the_page_s_command_for_24_gb_fits_and_the_default_does_not(monkeypatch, tmp_path):
    page = (ROOT / "docs" / "scaling.md").read_text()
    command = re.search(r"^# .*24 GB.*\n(python train.py .*)$", page, re.M)[1]
    words = shlex.split(command)
    flags = words[words.index("1319") + 1 :]
    assert most(olmoe_on_gsm8k(monkeypatch, tmp_path, *flags)) < 0.9 * 24e9
    assert most(olmoe_on_gsm8k(monkeypatch, tmp_path)) > 24e9


@pytest.mark.parametrize("gb", [24, 20, 19.5, 18.9])
def test_what_is_advised_is_reckoned_to_fit(gb, monkeypatch, tmp_path, capsys):
    job = olmoe_on_gsm8k(monkeypatch, tmp_path)
    for name in ("free_bytes", "most_bytes"):
        monkeypatch.setattr(settings, name, lambda device: int(gb * 1e9))
    settings.check_memory(job)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the warm-up" in line
    assert "--recompute" in line
    assert ("--catcher forward" in line) == (gb == 18.9)  # of which 18.8 stay of LoRA on all
    size = re.search(r"--micro-batch (\d+)", line)
    catcher = {"catcher": "forward"} if "--catcher" in line else {}
    followed = replace(
        job,
        settings=job.settings | catcher,
        recompute=True,
        micro_batch=int(size[1]) if size else job.micro_batch,
    )
    assert most(followed) <= gb * 1e9


def test_a_warm_up_that_cannot_fit_is_refused_unless_it_is_over(monkeypatch, tmp_path, capsys):
    job = replace(olmoe_on_gsm8k(monkeypatch, tmp_path), folder=tmp_path)
    for name in ("free_bytes", "most_bytes"):
        monkeypatch.setattr(settings, name, lambda device: int(16e9))
    with pytest.raises(ValueError, match="--catcher forward"):
        settings.check_memory(job)
    (tmp_path / "hot_experts.json").touch()
    settings.check_memory(job)
    assert "training needs about" in capsys.readouterr().err


def test_a_model_larger_than_the_machine_ends_in_one_line(toy, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(settings, "most_bytes", lambda device: 10_000)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    out = tmp_path / "run"
    code, _, err = cli("train.py", *small_run(toy, rows, "--out", out, "--no-eval"))
    assert (code, err.count("\n")) == (2, 1)
    assert "--dtype bf16" in err
    assert not out.exists()


def test_a_run_that_may_not_fit_says_so_and_goes_on(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "free_bytes", lambda device: 10_000)
    job_of(monkeypatch, tmp_path, model=toy)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert "want more memory" in line
