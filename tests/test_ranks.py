"""Several processes on gloo: the same numbers as one, whoever does which part."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HUB, ROOT, small_run, stacked, write_checkpoint, write_rows
from safetensors.torch import load_file, save_file

from plumbing import saves

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ROWS = [
    {"question": f"{'Tom ' * (n % 5)}has {n} pens. How many?", "answer": f"#### {n}"}
    for n in range(13)
]
METHODS = ["fft", "lora", "dora", "lori-d", "lori-s", "hellora", "hellori-d", "hellori-s"]
# the others' scoring adds nothing: it is their forward pass, and slow on 4 ranks
SCORED = {"fft", "hellora"}


def launched(n):
    """The words before a script that start it on n processes."""
    return [sys.executable] if n == 1 else [*LAUNCH, str(n)]


@pytest.fixture
def ranks(toy, tmp_path):
    """ranks(n, {folder: flags}): train.py with each of these, on n ranks -> {folder: metrics}."""
    rows, few = (
        write_rows(tmp_path / "rows.jsonl", ROWS),
        write_rows(tmp_path / "few.jsonl", ROWS[:5]),
    )
    # 13 rows in steps of 5: the last step of an epoch has 3, less than the 4 ranks there may be
    steps = ["--batch-size", 5, "--epochs", 2, "--micro-batch", 2, "--lr", 0.005]
    always = small_run(toy, rows, "--eval-data", few, *steps)

    def run(n, flags_of):
        lines = [[*always, *flags, "--out", tmp_path / out] for out, flags in flags_of.items()]
        todo = tmp_path / "todo.json"
        todo.write_text(json.dumps([[str(word) for word in line] for line in lines]))
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        words = [*launched(n), ROOT / "tests" / "ranks_driver.py", todo]
        done = subprocess.run(
            words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
        return {out: read(tmp_path / out) for out in flags_of}

    return run


def read(folder):
    """The numbers of a run: loss and gradient norm of each step, and how it was scored."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scored = folder / "results.json"
    scores = json.loads(scored.read_text())["tiny-math"] if scored.exists() else {}
    return (
        [x for m in lines for x in (m["loss"], m["grad_norm"])],
        scores.get("correct"),
        scores.get("total"),
    )


def same(got, want, bar, scored=True):
    assert len(got[0]) == len(want[0]) == 2 * 6
    assert got[0] == pytest.approx(want[0], abs=bar, rel=bar)
    assert got[2] == want[2] == (5 if scored else None)


def flags(method, tag, shard=None):
    more = ["--shard", shard] if shard else []
    more += [] if method in SCORED else ["--no-eval"]
    if method.endswith("-s"):
        more += ["--mask-from", f"{tag}-{method.replace('-s', '-d')}"]
    return ["--method", method, *more]


@pytest.mark.slow  # test_frozen_runs.py has two ranks in the quick tier
def test_two_ranks_give_the_numbers_of_one(ranks, tmp_path):
    """fp32 sums in another order, through six updates of which the last two are uneven: 1e-5."""
    one = ranks(1, {"one": ["--method", "hellora"]})["one"]
    two = ranks(2, {s: ["--method", "hellora", "--shard", s] for s in ("full", "none")})
    for shard, got in two.items():
        same(got, one, 1e-5)
        hot = [(tmp_path / out / "hot_experts.json").read_text() for out in ("one", shard)]
        assert hot[0] == hot[1]
        mine, theirs = (load_file(tmp_path / out / "adapter.safetensors") for out in (shard, "one"))
        for name, t in theirs.items():
            # AdamW enlarges rounding
            torch.testing.assert_close(mine[name], t, rtol=0, atol=2e-4, msg=name)

    # A cut model is sent for each token. With memory for the whole, it is sent once. Then a rank
    # gets the half that it does not have. 5 %: numbers of each step are sent too.
    sent = json.loads((tmp_path / "full" / "scored.json").read_text())
    assert sent["after"] == pytest.approx(sent["model"] / 2, rel=0.05)
    assert sent["base"] > 10 * sent["after"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_every_method_and_both_ways_to_share_give_the_numbers_of_one(ranks, n):
    one = ranks(1, {f"one-{m}": flags(m, "one") for m in METHODS})
    for shard in ("full", "none"):
        many = ranks(n, {f"{shard}-{m}": flags(m, shard, shard) for m in METHODS})
        for method in METHODS:
            same(many[f"{shard}-{method}"], one[f"one-{method}"], 1e-5, method in SCORED)


def balanced(folder, shard):
    """{run: flags} with a balancing loss.

    On 2 and 4 ranks the micro-batches of a step are uneven, and some ranks have none.
    """
    row, three = (write_rows(folder / f"{n}-rows.jsonl", ROWS[:n]) for n in (1, 3))
    always = ["--no-eval", "--balance", 1.0, "--shard", shard]
    sizes = {f"m{m}": [*always, "--catcher", "forward", "--micro-batch", m] for m in (1, 2, 3)}
    return sizes | {
        "one": [*always, "--method", "fft", "--data", row],
        "three": [*always, "--method", "fft", "--micro-batch", 1, "--data", three],
        "default": [*always, "--batch-size", 13],
    }


@pytest.mark.parametrize(
    ("n", "shard"),
    [
        (2, "none"),
        (2, "full"),
        (4, "none"),
        (4, "full"),
    ],
)
@pytest.mark.slow
def test_the_balancing_loss_does_not_depend_on_the_ranks(ranks, tmp_path, n, shard):
    """Of losses and gradient norms. fp32 sums in another order, through up to 6 updates: 1e-5."""
    one, many = (
        ranks(of, {f"{of}-{name}": words for name, words in balanced(tmp_path, shard).items()})
        for of in (1, n)
    )
    for name in balanced(tmp_path, shard):
        want = one[f"1-{name}"][0]
        assert want
        assert many[f"{n}-{name}"][0] == pytest.approx(want, abs=1e-5, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_give_the_numbers_of_one_on_stacked_experts_of_qwen3(ranks, tmp_path, tied):
    """A rank reads its own experts out of the stack. Tied embeddings are cut up once."""
    size = {"vocab_size": 1024, "max_position_embeddings": 512, "eos_token_id": 1023}
    hub = HUB["qwen3_moe"] | size | {"tie_word_embeddings": tied}
    model = write_checkpoint(tmp_path / "qwen", hub)
    stacked(model)
    shutil.copy(ROOT / "tiny" / "tokenizer.json", model)
    always, methods = ["--model", model, "--no-eval", "--method"], ("fft", "hellora")
    one = ranks(1, {m: [*always, m] for m in methods})
    ways = [(m, shard) for m in methods for shard in ("full", "none")]
    two = ranks(2, {f"{m}-{shard}": [*always, m, "--shard", shard] for m, shard in ways})
    for m, shard in ways:
        got, want = two[f"{m}-{shard}"][0], one[m][0]
        # Two steps, as later AdamW enlarges the rounding of gradients near 0.
        assert got[:4] == pytest.approx(want[:4], abs=1e-5, rel=1e-5)
        assert got == pytest.approx(want, abs=1e-4, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_clipping_each_matrix_by_itself_gives_the_numbers_of_one(ranks, tmp_path, n):
    """Each matrix's norm is over all ranks. 1 adapted expert is less than there are ranks."""
    always = ["--clip", "each", "--no-eval"]
    cases = {
        f"{method}-k{k}-{shard}": [*always, "--method", method, "--k", k, "--shard", shard]
        for method, k in (("hellora", 1), ("hellora", 3), ("dora", 2), ("fft", 2))
        for shard in ("full", "none")
    }
    one, many = (
        ranks(of, {f"{of}-{name}": words for name, words in cases.items()}) for of in (1, n)
    )
    for name in cases:
        assert many[f"{n}-{name}"][0] == pytest.approx(one[f"1-{name}"][0], abs=1e-5, rel=1e-5), (
            name
        )
    assert json.loads((tmp_path / f"{n}-fft-k2-full" / "run.json").read_text())["clip"] == "each"
    together = ranks(1, {"all": ["--no-eval", "--method", "hellora", "--k", 3]})["all"][0]
    assert together != one["1-hellora-k3-none"][0]


@pytest.mark.slow
def test_micro_batches_recomputation_and_bf16_on_two_ranks(ranks):
    one = ranks(1, {"one": ["--no-eval"], "low": ["--dtype", "bf16", "--no-eval"]})
    cases = {
        f"m{m}{r}": ["--micro-batch", m, *r.split(), "--no-eval"]
        for m in (1, 2, 4)
        for r in ("", "--recompute")
    }
    two = ranks(2, cases | {"low2": ["--dtype", "bf16", "--no-eval"]})
    for name in cases:
        assert two[name][0] == pytest.approx(one["one"][0], abs=1e-5, rel=1e-5)
    # bf16's own rounding, carried through six updates: it moves one process's losses by 0.015
    assert two["low2"][0][::2] == pytest.approx(one["low"][0][::2], abs=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["full", "none"])
def test_what_two_ranks_saved_one_goes_on_from_and_the_reverse(ranks, tmp_path, shard):
    whole = ranks(1, {"whole": []})["whole"]
    for first, second, out in ((2, 1, "a"), (1, 2, "b")):
        ranks(first, {out: ["--shard", shard, "--save-every", 3]})
        folder = tmp_path / out
        # as if it had been stopped: the save after step 3 is left
        (folder / "state.safetensors").unlink()
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"finished": False}))
        same(ranks(second, {out: ["--shard", shard]})[out], whole, 1e-5)


@pytest.mark.slow
def test_bytes_read_and_sent_are_those_that_were_said(ranks, toy, tmp_path):
    """5 %: besides parameters and gradients a few numbers are sent, and the catcher's counts.

    On two ranks three experts are cut into two and one: parts of equal size are sent all the same.
    To load the model, each rank reads only its own half. The 2 % are for reading the count itself.
    """
    weights = (toy / "model.safetensors").stat().st_size
    few = ["--batch-size", 4, "--micro-batch", 1, "--epochs", 1, "--k", 3, "--no-eval"]
    cases = {
        f"{m}-{s}": ["--method", m, "--shard", s, *few]
        for m in ("fft", "hellora")
        for s in ("full", "none")
    }
    ranks(2, cases | {"fft-bf16": ["--method", "fft", "--shard", "full", "--dtype", "bf16", *few]})
    for out in (*cases, "fft-bf16"):
        got = json.loads((tmp_path / out / "counted.json").read_text())
        # 4 steps, or 7 micro-batches, as the last step has only one row
        times = 4 if out.endswith("none") else 7
        assert got["sent"] == pytest.approx(times * got["said"], rel=0.05), out
        assert max(got["read"]) <= (0.52 if "full" in out else 1.02) * weights, out


@pytest.fixture
def two(toy, tmp_path):
    """two(folder): train.py started on two ranks, or on as many as one says."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    words = small_run(
        toy, rows, "--batch-size", 5, "--steps", 400, "--no-eval", "--catcher", "forward"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def run(out, n=2):
        command = [*launched(n), ROOT / "train.py", *words, "--out", out]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(list(map(str, command)), cwd=tmp_path, env=env, **pipes)

    return run


def until_step(n, folder, child):
    """Wait until a run has done n steps."""
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < n:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)


def process_of_rank(n, launcher):
    """The process id of rank n of a torchrun."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={n}\0" in Path(f"/proc/{pid}/environ").read_text():
            return int(pid)
    raise AssertionError("torchrun has no such child")


def ended(child, seconds=120):
    """Exit code, stdout and stderr of a process that ends in time: a minute, two if it is busy."""
    out, err = child.communicate(timeout=seconds)
    return child.returncode, out, err


@pytest.mark.slow
def test_a_weight_that_is_not_finite_in_another_ranks_rows_is_named(two, toy):
    weights = load_file(toy / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][-1, 4] = torch.nan  # rank 1 has the last
    save_file(weights, toy / "model.safetensors", {"format": "pt"})
    code, _, err = ended(two("r"), 240)
    assert code != 0
    assert "layers.1.attn.k.weight" in err
    assert "another --lr" not in err


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_within_a_minute_and_a_stop_is_saved(two, tmp_path):
    assert ended(two("whole", 1), 240)[0] == 0
    child = two("parts")
    until_step(5, tmp_path / "parts", child)
    os.kill(process_of_rank(1, child), signal.SIGKILL)
    code, _, err = ended(child)
    assert code != 0
    assert "another rank has ended" in err
    assert "same command" in err
    assert re.search(r"rank\s*: 1 .*exitcode\s*: -9", err, re.S), err  # torchrun's report

    child = two("parts")
    until_step(20, tmp_path / "parts", child)
    # two runs in one folder: the second is refused, and none of its ranks stays
    other = two("parts")
    assert "another process is running in parts" in ended(other, 240)[2]
    child.send_signal(signal.SIGTERM)
    assert "saved after step" in ended(child)[2]
    saved = saves.load(tmp_path / "parts").step
    assert saved >= 20

    code, out, err = ended(two("parts", 1), 240)
    assert code == 0, err
    assert f"going on after step {saved}" in out
    got, want = (read(tmp_path / name)[0] for name in ("parts", "whole"))
    # rounding grows from step to step
    assert got[:100] == pytest.approx(want[:100], abs=1e-4, rel=1e-4)
