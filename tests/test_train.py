"""train.py from its command line: what it writes, what it repeats, what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, small_run, some_slow, write_rows
from safetensors.torch import load_file, save_file

from hellora import load_run
from plumbing import saves
from plumbing.run_folder import read_results

ROWS = [
    {"question": f"{a}+{b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
    for a in range(8)
    for b in range(5)
]


@pytest.fixture
def quick(toy, tmp_path, monkeypatch):
    """Arguments of a run of a few seconds, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    few = write_rows(tmp_path / "few.jsonl", ROWS[:4])
    return small_run(toy, rows, "--eval-data", few)


def one_line(err):
    """What stands on stderr, if it is a line. Raises AssertionError if it is more."""
    assert len(err.strip().splitlines()) == 1, err
    return err


def losses(folder):
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    "method",
    some_slow(["hellora", "hellora_pure_c", "hellora_m", "lora", "fft"], ["hellora", "fft"]),
)
def test_a_run_leaves_the_folder_that_other_tools_rely_on(cli, quick, tmp_path, method):
    code, out, err = cli("train.py", *quick, "--method", method, "--steps", 3, "--out", "r")
    assert code == 0, err
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["finished"] is True
    assert {
        "method",
        "k",
        "rank",
        "alpha",
        "lr",
        "seed",
        "versions",
        "hashes",
        "adapted",
    } <= record.keys()
    assert [json.loads(line)["step"] for line in (tmp_path / "r" / "metrics.jsonl").open()] == [
        1,
        2,
        3,
    ]
    results = json.loads((tmp_path / "r" / "results.json").read_text())["tiny-math"]
    assert results["total"] == 4
    assert {
        "accuracy",
        "accuracy_flexible",
        "base_accuracy",
        "correct",
        "seconds",
    } <= results.keys()
    assert len((tmp_path / "r" / "answers-tiny-math.jsonl").read_text().splitlines()) == 4
    chosen = tmp_path / "r" / "hot_experts.json"
    assert chosen.exists() == (method not in ("lora", "fft"))
    if chosen.exists():
        hot = json.loads(chosen.read_text())
        assert hot["experts"] == record["adapted"]
        n_inputs = hot["n_tokens"]
        assert all(sum(c) == 2 * n_inputs for c in hot["counts"].values())  # 2 experts per token
        assert f"{n_inputs:,} tokens" in out
    assert "parameters are trained" in out


def test_the_same_seed_gives_the_same_losses_to_the_last_bit(cli, quick, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert (
            cli("train.py", *quick, "--steps", 4, "--no-eval", "--out", out, "--seed", seed)[0] == 0
        )
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_the_loss_depends_neither_on_micro_batches_nor_on_recomputation_nor_on_the_loop(
    cli, quick, tmp_path
):
    for out, flags in {
        "a": ["--micro-batch", 32],
        "b": ["--micro-batch", 5],
        "c": ["--recompute"],
        "d": ["--experts", "loop"],
    }.items():
        assert cli("train.py", *quick, "--steps", 4, "--no-eval", "--out", out, *flags)[0] == 0
    for other in "bcd":
        # fp32: other orders of sums, carried through 4 updates
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "a"), abs=1e-4)


def test_a_base_that_changed_is_not_scored_as_the_runs(cli, quick, toy, tmp_path):
    assert cli("train.py", *quick, "--steps", 1, "--no-eval", "--out", "r")[0] == 0
    weights = load_file(toy / "model.safetensors")
    save_file(
        {name: w * 1.5 for name, w in weights.items()}, toy / "model.safetensors", {"format": "pt"}
    )
    code, _, err = cli("eval_gsm8k.py", "--run", "r")
    assert code == 2
    assert str(toy) in one_line(err)


def test_too_little_memory_to_score_ends_in_one_line(cli, quick, monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")  # as a GPU would

    monkeypatch.setattr("train.evaluate", fail)
    code, _, err = cli("train.py", *quick, "--steps", 1, "--out", "r")
    assert code == 2
    assert "out of memory" in one_line(err)


def test_a_finished_default_run_is_no_obstacle(cli, quick, tmp_path):
    for n in ("", "-2"):
        assert cli("train.py", *quick, "--steps", 2, "--no-eval")[0] == 0
        assert (
            tmp_path / "runs" / f"toy-tiny-math-hellora-k2-s0{n}" / "adapter.safetensors"
        ).exists()


def test_a_loaded_run_is_the_trained_model_merged_or_live(cli, quick, tmp_path):
    assert cli("train.py", *quick, "--steps", 3, "--no-eval", "--out", "r")[0] == 0
    tokens = torch.randint(0, 1024, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged, live = (load_run(tmp_path / "r", merged=m)[0](tokens)[0] for m in (True, False))
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-5)  # fp32
    saved = load_file(tmp_path / "r" / "adapter.safetensors")
    weights = {n.removeprefix("weights/"): t for n, t in saves.load(tmp_path / "r").tensors.items()}
    weights = {n: t for n, t in weights.items() if not n.startswith(("exp_avg", "step"))}
    assert weights.keys() == saved.keys()
    assert all(torch.equal(saved[n], v) for n, v in weights.items())
    for flags in (["--factored"], ["--dtype", "bf16"]):  # a trial, not the run's result
        assert cli("eval_gsm8k.py", "--run", "r", *flags)[0] == 0
    assert read_results(tmp_path / "r").keys() == {"tiny-math-part"}
    assert cli("catcher.py", "--run", "r")[0] == 0


def test_the_learning_rate_has_no_say_in_which_experts_are_hot(cli, quick, tmp_path):
    for out, flags in {"a": [], "b": ["--lr", 1], "c": ["--catcher", "forward"]}.items():
        code, _, err = cli(
            "train.py", *quick, "--batch-size", 1, "--steps", 1, "--no-eval", "--out", out, *flags
        )
        assert code == 0, err
    counts = [
        json.loads((tmp_path / out / "hot_experts.json").read_text())["counts"] for out in "abc"
    ]
    assert counts[0] == counts[1]
    assert counts[0] != counts[2]  # the warm-up's training does move them


def test_a_given_list_of_experts_is_used_as_it_is(cli, quick, tmp_path):
    (tmp_path / "hot.json").write_text(json.dumps({"experts": {"0": [7, 1], "1": [3, 4]}}))
    code, _, err = cli(
        "train.py", *quick, "--steps", 1, "--no-eval", "--hot-experts", "hot.json", "--out", "r"
    )
    assert code == 0, err
    saved = load_file(tmp_path / "r" / "adapter.safetensors")
    assert saved["layers.0.moe.experts.gate.lora.A"].shape[0] == 2
    assert json.loads((tmp_path / "r" / "run.json").read_text())["adapted"] == {
        "0": [1, 7],
        "1": [3, 4],
    }
    for flags, says in ((["--k", 3], "--k"), (["--method", "hellora_c"], "hellora_c")):
        code, _, err = cli("train.py", *quick, *flags, "--hot-experts", "hot.json")
        assert code == 2
        assert says in one_line(err)


@pytest.mark.parametrize("sizes", [(1, 3), (4, 0), (8, 2)])
def test_a_given_list_may_have_layers_of_unequal_length(cli, quick, tmp_path, sizes):
    """As ESFT's files have them, with keys of its own beside."""
    experts = {str(layer): list(range(n)) for layer, n in enumerate(sizes)}
    (tmp_path / "hot.json").write_text(json.dumps({"experts": experts, "shared_experts": False}))
    flags = [*quick[: quick.index("--k")], *quick[quick.index("--k") + 2 :], "--steps", 1]
    flags += ["--no-eval", "--hot-experts", "hot.json", "--out", "r"]
    code, _, err = cli("train.py", *flags)
    assert code == 0, err
    saved = load_file(tmp_path / "r" / "adapter.safetensors")
    for layer, n in enumerate(sizes):
        b = saved.get(f"layers.{layer}.moe.experts.down.lora.B", torch.zeros(0))
        assert len(b) == n
    run = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (run["adapted"], run["k"]) == (experts, max(sizes))
    code, _, err = cli("train.py", *flags[:-1], "other", "--k", max(sizes))
    assert code == 2
    assert f"{min(sizes)} to {max(sizes)}" in one_line(err)
    assert "omit --k" in err


def test_stopping_and_going_on_gives_the_uninterrupted_run_bit_for_bit(cli, quick, tmp_path):
    assert cli("train.py", *quick, "--steps", 60, "--no-eval", "--out", "whole")[0] == 0
    command = [
        sys.executable,
        ROOT / "train.py",
        *quick,
        "--steps",
        "60",
        "--no-eval",
        "--out",
        "parts",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [str(c) for c in command], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        metrics = tmp_path / "parts" / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
            assert child.poll() is None, child.stderr.read().decode()
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"saved after step" in err
    assert not (tmp_path / "parts" / "adapter.safetensors").exists()
    code, out, _ = cli("train.py", *quick, "--steps", 60, "--no-eval", "--out", "parts")
    assert code == 0
    assert "going on after step" in out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (
        load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(parts[n], v) for n, v in whole.items())


def test_a_loss_that_is_not_finite_is_skipped_and_then_ends_the_run(cli, quick, tmp_path):
    code, _, err = cli("train.py", *quick, "--steps", 60, "--no-eval", "--lr", "1e30", "--out", "r")
    assert code == 2
    last = err.strip().splitlines()[-1]  # before it the bar that was not finished
    assert "--lr 1e+30" in last
    assert "finite weights" in last


@pytest.mark.parametrize("catcher", ["warmup", "forward"])
def test_a_weight_that_is_not_finite_is_named(cli, quick, toy, catcher):
    """The learning rate is not at fault, and is not blamed."""
    weights = load_file(toy / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][3, 4] = torch.nan
    save_file(weights, toy / "model.safetensors", {"format": "pt"})
    words = ("--steps", 60, "--no-eval", "--catcher", catcher, "--out", "r")
    code, _, err = cli("train.py", *quick, *words)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "layers.1.attn.k.weight" in last
    assert "another --lr" not in last


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--k", 0], "k is 0"),
        (["--k", 9], "k is 9"),
        (["--k", "x"], "--k"),
        (["--method", "helora"], "helora"),
        (["--task", "chess"], "--task"),
        (["--model", "olmoe-9b"], "olmoe-9b"),
        (["--model", "no/such"], "no/such"),
        (["--model", "."], "config.json"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--template", "alpaca"], "alpaca"),
        (["--hot-experts", "absent.json"], "absent.json"),
        (["--hot-experts", "."], "hot_experts"),
        (["--override"], "--override"),
        (["--seed", 10**14], "--seed"),
        (["--balance", "nan"], "--balance"),
        (["--epochs", 1], "--epochs"),
        (["--redraw-a"], "--redraw-a"),
        (["--method", "lora", "--coverage", 0.5], "--coverage"),
        (["--mask-scope", "layer"], "--mask-scope"),
        (["--rank", 17], "--rank is 17, but layers.0.attn.k has a side of 16"),
        (["--rank", 20, "--method", "lora_pure"], "experts.gate has a side of 16"),
        (["--rank", 2**20, "--method", "dora_attn"], "want 16 at most"),
        (["--hot-experts", "some.json", "--score", "gate"], "--score"),
        (["--method", "hellora_none", "--score", "gate"], "--score"),
        (["--lr", -1], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--epochs", 0], "--epochs"),
        (["--batch-size", 0], "--batch-size"),
        (["--rank", 0], "--rank"),
        (["--resume"], "--resume"),
        (["--speed", "fast"], "--speed"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(cli, quick, tmp_path, args, says):
    before = sorted(tmp_path.rglob("*"))
    code, _, err = cli("train.py", *quick, "--steps", 1, "--no-eval", *args)
    assert code == 2
    assert says in one_line(err)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_routers_few_rows_bound_no_rank(cli, quick):
    """The toy's has 8, Mixtral's too, and the paper's rank is 32."""
    code, _, err = cli("train.py", *quick, "--rank", 16, "--steps", 1, "--no-eval", "--out", "r")
    assert code == 0, err


def half_done(cli, quick, folder):
    """A run that was stopped after a step, made of one that was finished there."""
    words = [*quick, "--save-every", 1, "--no-eval", "--out", folder]
    assert cli("train.py", *words, "--steps", 1)[0] == 0
    record = json.loads((folder / "run.json").read_text()) | {"finished": False, "steps": 2}
    return [*words, "--steps", 2], record


def test_a_run_that_goes_on_otherwise_says_so_and_keeps_both(cli, quick, tmp_path):
    words, record = half_done(cli, quick, tmp_path / "r")
    assert record["compute"].keys() >= {"threads", "micro_batch", "ranks"}
    record["compute"] |= {"threads": 77}
    record["hashes"]["code"] = "0" * 64
    for extra, changed in (([], {"threads", "code"}), (["--micro-batch", 3], {"micro_batch"})):
        (tmp_path / "r" / "run.json").write_text(json.dumps(record | {"finished": False}))
        code, out, err = cli("train.py", *words, *extra)
        assert code == 0, err
        (said,) = [line for line in out.splitlines() if "continues with other" in line]
        assert all(name in said for name in changed)
        record = json.loads((tmp_path / "r" / "run.json").read_text())
        assert record["hashes"]["code"] == "0" * 64
        assert record["compute"]["threads"] == 77
        differ = {one.partition(":")[0]: one for one in record["conditions"][-1]}
        assert changed <= differ.keys()
        assert re.fullmatch(f"code: {'0' * 64} -> [1-9a-f][0-9a-f]+|code: 0+ -> .*", differ["code"])


def test_a_run_with_a_mask_goes_on_as_well(cli, quick, tmp_path):
    """Its experts come from the D run: that is known before its folder is looked for."""
    short = [*quick, "--no-eval", "--save-every", 1]
    assert cli("train.py", *short, "--steps", 1, "--method", "hellori-d", "--out", "d")[0] == 0
    words = [*short, "--method", "hellori-s", "--mask-from", "d", "--out", "s"]
    assert cli("train.py", *words, "--steps", 1)[0] == 0
    path = tmp_path / "s" / "run.json"
    record = json.loads(path.read_text()) | {"finished": False, "steps": 2}
    path.write_text(json.dumps(record))
    code, out, err = cli("train.py", *words, "--steps", 2)
    assert code == 0, err
    assert "going on after step 1" in out


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json"])
def test_a_tokenizer_or_config_that_changed_is_noticed_everywhere(cli, quick, toy, tmp_path, file):
    words, record = half_done(cli, quick, tmp_path / "r")
    shutil.copytree(tmp_path / "r", tmp_path / "half")
    (tmp_path / "half" / "run.json").write_text(json.dumps(record))
    text = (toy / file).read_text()
    (toy / file).write_text(text + "\n")  # the same to a reader, but who knows?
    words[words.index(tmp_path / "r")] = tmp_path / "half"
    for command in (
        ["eval_gsm8k.py", "--run", "r", "--data", "few.jsonl"],
        ["export.py", "--run", "r", "--format", "peft"],
        ["train.py", *words],
    ):
        code, _, err = cli(*command)
        assert code == 2
        assert "changed" in one_line(err)
        assert ("tokenizer" if file == "tokenizer.json" else "model") in err
    (toy / file).write_text(text)
    assert cli("eval_gsm8k.py", "--run", "r", "--data", "few.jsonl")[0] == 0


def test_eval_data_that_is_not_there_is_refused_before_any_training(cli, quick, tmp_path):
    code, _, err = cli("train.py", *quick, "--eval-data", "absent.jsonl", "--out", "r")
    assert code == 2
    assert "absent.jsonl" in one_line(err)
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the refusal shows only where there is no GPU"
)
def test_cuda_without_a_gpu_is_refused(cli, quick):
    code, _, err = cli("train.py", *quick, "--device", "cuda")
    assert code == 2
    assert "cuda" in one_line(err).lower() or "GPU" in err


def test_an_out_folder_with_another_run_is_refused_with_the_difference(cli, quick, tmp_path):
    assert cli("train.py", *quick, "--steps", 1, "--no-eval", "--out", "r")[0] == 0
    code, _, err = cli("train.py", *quick, "--steps", 2, "--no-eval", "--out", "r")
    assert code == 2
    assert "steps" in one_line(err)


def test_a_bad_checkpoint_leaves_no_run_folder(cli, quick, toy, tmp_path):
    path = toy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = cli("train.py", *quick, "--out", "r")
    assert code == 2
    assert "model.safetensors" in one_line(err)
    assert not (tmp_path / "r").exists()


def test_bf16_trains_and_its_loss_is_near_that_of_fp32(cli, quick, tmp_path):
    for dtype in ("fp32", "bf16"):
        assert (
            cli(
                "train.py",
                *quick,
                "--rank",
                8,
                "--steps",
                3,
                "--no-eval",
                "--dtype",
                dtype,
                "--out",
                dtype,
            )[0]
            == 0
        )
    # 8 bits of mantissa
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


def test_a_run_is_not_gone_on_with_on_other_data_or_settings(cli, quick, toy, tmp_path):
    assert cli("train.py", *quick, "--steps", 2, "--no-eval", "--out", "r")[0] == 0
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    (tmp_path / "r" / "run.json").write_text(json.dumps(record | {"finished": False}))
    write_rows(tmp_path / "rows.jsonl", ROWS[1:])
    code, _, err = cli("train.py", *quick, "--steps", 2, "--no-eval", "--out", "r")
    assert code == 2
    assert "data" in one_line(err)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    assert (
        cli("train.py", *quick, "--steps", 2, "--k", 1, "--no-eval", "--out", "r", "--override")[0]
        == 2
    )
    code, out, _ = cli("train.py", *quick, "--steps", 4, "--no-eval", "--out", "r", "--override")
    assert code == 0
    assert "going on after step 2" in out
    assert len(losses(tmp_path / "r")) == 4
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["overrides"] == [["steps: 2 -> 4"]]
    (tmp_path / "r" / "run.json").write_text(json.dumps(record | {"finished": False}))
    code, _, err = cli("train.py", *quick, "--steps", 3, "--no-eval", "--out", "r", "--override")
    assert code == 2
    assert "steps" in one_line(err)


def test_the_time_that_finding_took_is_told_by_the_start_that_found(cli, quick, tmp_path):
    words, record = half_done(cli, quick, tmp_path / "r")
    fresh = cli("train.py", *words[:-3], tmp_path / "new", *words[-2:])
    (tmp_path / "r" / "run.json").write_text(json.dumps(record))
    resumed = cli("train.py", *words)
    listed = ["--hot-experts", tmp_path / "new" / "hot_experts.json"]
    given = cli("train.py", *words[:-3], tmp_path / "given", *words[-2:], *listed)
    for told, (code, out, err) in ((True, fresh), (False, resumed), (False, given)):
        assert code == 0, err
        assert ("finding the experts took" in out) == told


def test_the_balancing_loss_changes_training_when_asked_for(cli, quick, tmp_path):
    for out, flags in (("a", []), ("b", ["--balance", 0.5])):
        assert cli("train.py", *quick, "--steps", 3, "--no-eval", "--out", out, *flags)[0] == 0
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_problems_that_cannot_be_scored_are_refused_before_training(cli, quick, tmp_path):
    write_rows(tmp_path / "few.jsonl", [{"question": "1?", "answer": "one"}])
    code, _, err = cli("train.py", *quick, "--steps", 1, "--out", "r")
    assert code == 2
    assert "row 1" in one_line(err)
    assert not (tmp_path / "r").exists()


def test_rows_too_long_are_refused_or_dropped_and_counted(cli, quick, toy, tmp_path):
    long = [{"question": "1 " * n, "answer": "#### 1"} for n in (600, 700)]
    write_rows(tmp_path / "rows.jsonl", [long[0], *ROWS[:6], long[1]])
    code, _, err = cli("train.py", *quick, "--steps", 1, "--out", "r")
    assert code == 2
    assert "2 of 8 rows" in one_line(err)
    assert "--drop-long" in err
    assert not (tmp_path / "r").exists()
    words = (*quick, "--drop-long", "--no-eval", "--steps", 1)
    code, out, err = cli("train.py", *words, "--out", "r")
    assert code == 0, err
    assert "2 of 8 rows" in out
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (record["drop_long"], record["rows_dropped"]) == (True, 2)
    write_rows(tmp_path / "rows.jsonl", ROWS[:6])
    assert cli("train.py", *words, "--out", "s")[0] == 0
    same = json.loads((tmp_path / "s" / "run.json").read_text())
    assert same["hashes"]["data"] == record["hashes"]["data"]
    assert same["rows_dropped"] == 0
    write_rows(tmp_path / "rows.jsonl", [*ROWS[:6], *long])
    look = ("--model", toy, "--task", "tiny-math", "--data", "rows.jsonl", "--share", 1)
    code, _, err = cli("catcher.py", *look)
    assert code == 2
    assert "2 of 8 rows" in one_line(err)
    assert cli("catcher.py", *look, "--drop-long")[0] == 0


def test_problems_too_long_to_score_are_counted(cli, quick, tmp_path):
    long = [{"question": "1 " * n, "answer": "#### 1"} for n in (700, 600)]
    write_rows(tmp_path / "few.jsonl", [*ROWS[:2], *long])
    code, _, err = cli("train.py", *quick, "--steps", 1, "--out", "r")
    assert code == 2
    assert "2 of 4 rows" in one_line(err)
    assert not (tmp_path / "r").exists()


def test_how_gradients_are_clipped_is_recorded_and_kept(cli, quick, tmp_path):
    """A run that was begun before there was --clip goes on, and under the same rule."""
    words = (*quick, "--steps", 3, "--no-eval", "--catcher", "forward", "--out")
    assert cli("train.py", *words, "all")[0] == 0
    assert cli("train.py", *words, "each", "--clip", "each")[0] == 0
    records = {of: json.loads((tmp_path / of / "run.json").read_text()) for of in ("all", "each")}
    assert {of: record["clip"] for of, record in records.items()} == {"all": "all", "each": "each"}
    assert losses(tmp_path / "all") != losses(tmp_path / "each")
    before = records["all"] | {"finished": False}
    del before["clip"], before["drop_long"]
    (tmp_path / "all" / "run.json").write_text(json.dumps(before))
    assert cli("train.py", *words, "all", "--clip", "each")[0] == 2
    code, _, err = cli("train.py", *words, "all")
    assert code == 0, err


def test_a_full_disk_is_a_mistake_that_is_named(cli, quick, tmp_path, monkeypatch):
    """A file-size limit stands in for the full disk: writes beyond it fail as they would there."""
    command = [sys.executable, ROOT / "train.py", *quick, "--steps", "3", "--no-eval", "--out", "r"]
    limited = f"ulimit -f 8; exec {' '.join(map(str, command))}"  # 8 blocks of 1,024 bytes
    ended = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert not re.search("Traceback", ended.stderr)
    assert re.search(r"disk|written|space", ended.stderr.strip().splitlines()[-1])
    assert not list((tmp_path / "r").glob("*.draft"))
    assert not (tmp_path / "r" / "adapter.safetensors").exists()
