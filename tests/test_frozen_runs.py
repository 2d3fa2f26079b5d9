"""What runs leave and refuse, by files and exit codes: scores, exports, catcher, masks, ranks."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, slow, small_run, toy_in, write_checkpoint, write_rows
from safetensors.torch import load_file

from catcher import Catcher, count_visits, sample
from eval_gsm8k import evaluate
from hellora import attach, init_adapters, parse_method
from moe_model import MoEModel
from plumbing.data import Encoded, Example, encode, examples_of_step, load_examples
from plumbing.tokenizer import load_tokenizer
from train import make_optimizer, train_step

ROWS = [
    {"question": f"{'Tom ' * (n % 7)}has {n} pens. How many?", "answer": f"#### {n * n}"}
    for n in range(40)
]


@pytest.fixture
def quick(toy, tmp_path, monkeypatch):
    """Arguments of a run of a few seconds, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    return small_run(toy, rows, "--batch-size", 4, "--steps", 3, "--no-eval")


def done(cli, *words):
    code, _, err = cli(*words)
    assert code == 0, err


def refused(cli, *words):
    """The one line on stderr of a command that ends with 2."""
    code, _, err = cli(*words)
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    return err


def numbers(folder):
    """Loss and gradient norm of each step of a run."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def caught(folder):
    return json.loads((Path(folder) / "hot_experts.json").read_text())


def tensors(folder):
    return load_file(Path(folder) / "adapter.safetensors")


# ---- scores --------------------------------------------------------------------------------------


class Canned:
    """A tokenizer that makes these texts of whatever is generated, one after the other."""

    stops = (1023,)
    bos = None
    text_ends = turn_ends = frozenset()

    def __init__(self, texts):
        self.texts = iter(texts)

    def encode(self, text):
        return [5, 6, len(text)]

    def decode(self, ids, place="start"):
        return next(self.texts)


def test_accuracy_is_of_strict_matches_and_accuracy_flexible_of_flexible_ones(toy):
    texts = [" #### 5", " #### 5, or 7", " so it is 5", " #### 7, no, 5", " 4 or 5"]
    row = {"question": "2+3?", "answer": "#### 5"}
    asked = [Example("Question: 2+3?\nAnswer:", " #### 5", row)] * len(texts)
    result, records = evaluate(MoEModel.from_pretrained(toy), Canned(texts), asked, "plain", 2, 10)
    assert (result["correct"], result["total"]) == (2, 5)
    assert (result["accuracy"], result["accuracy_flexible"]) == (0.4, 0.8)
    assert [r["strict"] for r in records] == ["5", "5", None, "7", None]
    assert [r["flexible"] for r in records] == ["5", "7", "5", "5", "5"]
    assert [r["correct"] for r in records] == [True, True, False, False, False]
    assert {r["gold"] for r in records} == {"5"}


def test_shots_are_drawn_from_the_training_split_not_from_what_is_scored(cli, toy, tmp_path):
    """Anew for each problem, by one generator of seed 1234, as in lm-evaluation-harness."""
    rows = write_rows(tmp_path / "few.jsonl", ROWS[:3])
    what = (
        "--model",
        toy,
        "--task",
        "tiny-math",
        "--data",
        rows,
        "--max-new",
        2,
        "--out",
        tmp_path / "o",
    )
    done(cli, "eval_gsm8k.py", *what, "--shots", 2)
    lines = (ROOT / "tiny" / "math-train.jsonl").read_text(encoding="utf-8").splitlines()
    draw, want = random.Random(1234), []
    for asked in ROWS[:3]:
        two = map(json.loads, draw.sample(lines, 2))
        shown = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in two)
        want.append(f"{shown}Question: {asked['question']}\nAnswer:")
    (kept,) = (tmp_path / "o").glob("answers-*.jsonl")
    prompts = [json.loads(line)["prompt"] for line in kept.read_text().splitlines()]
    assert prompts == want


# ---- exports -------------------------------------------------------------------------------------


def test_two_runs_merged_in_bf16_are_one_fp32_sum_rounded_once(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy, rows = toy_in(tmp_path), write_rows(tmp_path / "rows.jsonl", ROWS)
    hub = json.loads((toy / "config.json").read_text())
    write_checkpoint(toy, hub, dtype=torch.bfloat16)
    more = ("--batch-size", 4, "--steps", 3, "--lr", 0.02, "--no-eval", "--catcher", "forward")
    methods = {"a": "hellora", "b": "hellora_c"}
    for seed, (out, method) in enumerate(methods.items()):
        run = small_run(toy, rows, *more, "--method", method, "--seed", seed, "--out", out)
        done(cli, "train.py", *run, "--k", 6, "--dtype", "fp32")
    done(cli, "export.py", "--run", "a", "--run", "b", "--format", "hub", "--out", "ab")
    base, both = (load_file(folder / "model.safetensors") for folder in (toy, tmp_path / "ab"))
    adapters, hot = [tensors(out) for out in methods], [caught(out)["experts"] for out in methods]
    scale = json.loads(Path("a/run.json").read_text())["alpha"] / 4
    differ = rounded_twice = total = 0
    for layer in range(2):
        sites = {f"self_attn.{leaf}_proj": (f"attn.{leaf}", None) for leaf in "qkvo"}
        for e in {*hot[0][str(layer)]} & {*hot[1][str(layer)]}:  # k = 6 of 8: at least 4 in both
            mlp = ("gate", "up", "down")
            sites |= {f"mlp.experts.{e}.{leaf}_proj": (f"moe.experts.{leaf}", e) for leaf in mlp}
        for name, (site, e) in sites.items():
            weight = base[f"model.layers.{layer}.{name}.weight"]
            exact, twice = weight.float(), weight
            for of, experts in zip(adapters, hot, strict=True):
                at = ... if e is None else experts[str(layer)].index(e)
                a, b = (of[f"layers.{layer}.{site}.lora.{part}"][at] for part in "AB")
                exact = exact + scale * b @ a
                twice = (twice.float() + scale * b @ a).bfloat16()
            got = both[f"model.layers.{layer}.{name}.weight"]
            assert got.dtype == torch.bfloat16
            # 2^-8: one rounding to 8 bits; 1.01: fp32's own
            assert ((got.float() - exact).abs() <= 1.01 * 2**-8 * exact.abs() + 1e-6).all(), name
            differ += (got != exact.bfloat16()).sum().item()
            rounded_twice += (twice != exact.bfloat16()).sum().item()
            total += got.numel()
    # where the exact sum is halfway between two bf16 numbers, fp32's order of sums decides: some in
    # 100,000
    assert differ <= 1e-3 * total
    assert rounded_twice > 0.05 * total  # else this could not be told from rounding after each run


def test_runs_on_different_bases_are_not_merged(cli, quick, tmp_path):
    other = write_checkpoint(
        tmp_path / "other", json.loads((tmp_path / "toy/config.json").read_text()), 1
    )
    (other / "tokenizer.json").write_bytes((tmp_path / "toy/tokenizer.json").read_bytes())
    forward = ("--catcher", "forward")
    done(cli, "train.py", *quick, *forward, "--out", "a")
    done(cli, "train.py", *quick, *forward, "--model", other, "--out", "b")
    err = refused(cli, "export.py", "--run", "a", "--run", "b", "--format", "hub", "--out", "ab")
    assert "base" in err
    assert not (tmp_path / "ab").exists()


# ---- catcher -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hellora", slow("hellori-d")])
def test_the_warm_up_leaves_no_trace_in_the_run_it_chose_experts_for(cli, quick, method):
    """The same list from a file gives the same run to the last bit, whose frozen A is the start's.

    In steps of one row, so that the warm-up has four: in its first A does not move, as B is 0.
    """
    quick = [*quick, "--batch-size", 1]
    done(cli, "train.py", *quick, "--method", method, "--out", "a")
    done(
        cli,
        "train.py",
        *quick,
        "--method",
        method,
        "--hot-experts",
        "a/hot_experts.json",
        "--out",
        "b",
    )
    assert numbers("a") == numbers("b")
    a, b = tensors("a"), tensors("b")
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    done(cli, "train.py", *quick, "--method", method, "--catcher", "forward", "--out", "c")
    # B = 0: the base's; fp32
    assert numbers("a")[0][0] == pytest.approx(numbers("c")[0][0], rel=1e-6)
    if method == "hellori-d":
        start = {n: t for n, t in a.items() if n.endswith(".A")}
        assert all(torch.equal(t, tensors("c")[n]) for n, t in start.items())


def counted_by_hand(toy, seed):
    """Visits of LoRA on all experts: a pass over the seed's tenth of ROWS, at the recipe's rate."""
    model, method = MoEModel.from_pretrained(toy), parse_method("lora")
    attach(model, method, {i: list(range(8)) for i in model.cfg.moe_layers}, 4, 16)
    init_adapters(model, seed)
    data = encode(
        load_examples("tiny-math", Path("rows.jsonl")), load_tokenizer(toy), model.cfg.max_len
    )
    data, catcher = sample(data, 0.1, seed), Catcher(8)
    assert len(data) == 4
    optimizer = make_optimizer(model, 0.01)
    for step in range(4):
        train_step(model, optimizer, examples_of_step(data, step, 1, seed), 16, 0.0, catcher)
    visits = {str(layer): counts.tolist() for layer, counts in catcher.scores("count").items()}
    return visits, sum(len(e.ids) - 1 for e in data)


def test_the_warm_up_is_a_seeded_pass_of_lora_on_all_experts_over_a_tenth(cli, quick, toy):
    found = []
    for seed in (0, 1):
        done(cli, "train.py", *quick, "--batch-size", 1, "--seed", seed, "--out", f"s{seed}")
        hot = caught(f"s{seed}")
        found.append((hot["counts"], hot["n_tokens"]))
        assert found[-1] == counted_by_hand(toy, seed)
    assert found[0] != found[1]


def test_summed_gates_and_visits_ignore_padding(olmoe):
    model, draw = MoEModel.from_pretrained(olmoe), torch.Generator().manual_seed(0)
    data = [
        Encoded(torch.randint(0, 96, (n,), generator=draw).tolist(), 1) for n in (3, 19, 5, 12, 7)
    ]
    want, n_inputs = {}, sum(len(e.ids) - 1 for e in data)
    for e in data:  # one by one there is no padding
        with torch.no_grad():
            _, routing = model(torch.tensor([e.ids[:-1]]))
        for layer, of in routing.items():
            for score, weight in (
                ("count", torch.ones_like(of.probability)),
                ("gate", of.probability / n_inputs),
            ):
                into = want.setdefault((layer, score), torch.zeros(8, dtype=torch.float64))
                into.index_add_(0, of.expert_ids.flatten(), weight.flatten().double())
    together = count_visits(model, data, 5, "")
    for (layer, score), sums in want.items():
        got = together.scores(score)[layer].double()
        torch.testing.assert_close(got, sums, rtol=0, atol=1e-6)  # fp32 gates of other batch sizes


# ---- masks ---------------------------------------------------------------------------------------


def test_a_mask_from_a_run_that_is_not_finished_is_refused(cli, quick, tmp_path):
    done(cli, "train.py", *quick, "--method", "hellori-d", "--catcher", "forward", "--out", "dense")
    path = tmp_path / "dense" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"finished": False}))
    masked = (*quick, "--method", "hellori-s", "--mask-from", "dense", "--out", "sparse")
    err = refused(cli, "train.py", *masked)
    assert "dense" in err
    assert "finished" in err
    assert not (tmp_path / "sparse").exists()
    path.write_text(json.dumps(record))
    done(cli, "train.py", *masked)


# ---- ranks ---------------------------------------------------------------------------------------


def test_two_ranks_with_three_hot_experts_count_and_train_as_one(cli, quick, tmp_path):
    """Three adapters on two ranks, two and one; experts are counted on the base."""
    words = [*quick, "--k", 3, "--catcher", "forward", "--micro-batch", 2, "--out"]
    done(cli, "train.py", *words, "one")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*launch, ROOT / "train.py", *words, "two"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    ended = subprocess.run(
        [str(w) for w in command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert caught("two") == caught("one")
    for got, want in zip(numbers("two"), numbers("one"), strict=True):
        assert got == pytest.approx(want, rel=1e-5)  # fp32: other order of sums
    one, two = tensors("one"), tensors("two")
    assert one["layers.0.moe.experts.gate.lora.A"].shape[0] == 3
    for name, t in one.items():
        # AdamW enlarges rounding
        torch.testing.assert_close(two[name], t, rtol=0, atol=2e-4, msg=name)
