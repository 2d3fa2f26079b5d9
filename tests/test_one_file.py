"""examples/one_file.py shares no code with the full project, and gives the same numbers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from catcher import Catcher, choose
from eval_gsm8k import extract
from hellora import attach, init_adapters, merge, parse_method
from moe_model import MoEModel
from plumbing.checkpoint import locate
from plumbing.data import TASKS, encode, examples_of_step, load_examples
from plumbing.tokenizer import load_tokenizer
from train import lr_at, make_optimizer, train_step

BATCH = 8  # problems of a step in the quick test
LOSS = re.compile(r"step +\d+ of \d+ +loss (\S+)")
LAYER = re.compile(r"layer +\d.*?(\d+\.\d% of visits go to \[.*\])")
ACCURACY = re.compile(r"accuracy (\S+)%")


@pytest.fixture
def one_file(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import one_file

    return one_file


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(locate("tiny"))


def in_full(tokenizer, split):
    """tiny-math's problems as train.py has them."""
    path = getattr(TASKS["tiny-math"], split).fetch()
    return encode(load_examples("tiny-math", path), tokenizer, max_len=512)


def numbers(pattern, text):
    return [float(found) for found in pattern.findall(text)]


def test_all_problems_are_the_same_tokens(one_file, tokenizer):
    for split in ("train", "test"):
        got = one_file.read_problems(f"math-{split}.jsonl")
        want = [(e.ids[: e.n_prompt], e.ids[e.n_prompt :]) for e in in_full(tokenizer, split)]
        assert got == want
    ids = got[0][0] + got[0][1][:-1]
    assert one_file.TOKENIZER.decode(ids) == tokenizer.decode(ids)


def trained_in_full(data, method, experts, n_steps, decay):
    """The full project's model after n steps of BATCH, its losses, and its counts."""
    model, catcher = MoEModel.from_pretrained("tiny"), Catcher(64)
    attach(model, parse_method(method), experts, rank=8, alpha=16)
    init_adapters(model, seed=0)
    optimizer, losses = make_optimizer(model, 0.01), []
    for n in range(n_steps):
        optimizer.param_groups[0]["lr"] = lr_at(n, n_steps, {"lr": 0.01, "decay": decay})
        step = examples_of_step(data, n, BATCH, seed=0)
        losses.append(train_step(model, optimizer, step, BATCH, 0.0, catcher)[0])
    return model, losses, catcher.scores("count")


def test_three_steps_count_choose_learn_and_merge_as_in_full(
    one_file, tokenizer, capsys, monkeypatch
):
    """Two steps of an epoch, the second of which is not full, and one of the next epoch."""
    monkeypatch.setattr(one_file, "BATCH", BATCH)
    few = 3 * BATCH // 2
    problems = one_file.read_problems("math-train.jsonl")[:few]
    data = in_full(tokenizer, "train")[:few]
    everywhere = {i: list(range(64)) for i in range(4)}

    ours = one_file.OLMoE()
    ours.adapt(list(everywhere.values()))
    visits = one_file.train(ours, problems, 3, decay=False)
    _, losses, counts = trained_in_full(data, "lora", everywhere, 3, decay=False)
    # 1e-4: what is printed is rounded to 5e-5; float32 sums in another order move less
    assert numbers(LOSS, capsys.readouterr().out) == pytest.approx(losses, abs=1e-4)
    # A router's 8th and 9th choice may change places by rounding, in few tokens of a thousand.
    assert (visits - torch.stack(list(counts.values()))).abs().sum() <= 1e-3 * visits.sum()

    hot = choose(counts, 8, "hot")
    ours = one_file.OLMoE()
    ours.adapt(list(hot.values()))
    one_file.train(ours, problems, 3, decay=True)
    full, losses, _ = trained_in_full(data, "hellora", hot, 3, decay=True)
    assert numbers(LOSS, capsys.readouterr().out) == pytest.approx(losses, abs=1e-4)

    merge(full)
    tokens = torch.tensor([data[0].ids])
    with torch.no_grad():
        want = full(tokens)[0]
        live = ours.logits(tokens, {})
        for linear in ours.linear.values():
            linear.merge()
        merged, past = ours.logits(tokens, {}), {}
        by_token = [ours.logits(tokens[:, i : i + 1], past) for i in range(tokens.shape[1])]
    # 3e-4: AdamW enlarges rounding, to 5e-5 here; a weight decay of 0.01 moves 1.4e-3
    torch.testing.assert_close(live, want, rtol=0, atol=3e-4)
    # 1e-4: fp32
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat(by_token, 1), merged, rtol=0, atol=1e-4)


def test_an_expert_without_visits_has_a_gradient_of_zero_and_not_none(one_file):
    model = one_file.OLMoE()
    model.adapt([list(range(64))] * 4)
    model.logits(torch.tensor([[5, 6, 7]]), {}).sum().backward()  # 24 visits a layer at most
    trained = [p for linear in model.linear.values() for p in linear.parameters()]
    assert len(trained) == 4 * 2 * (4 + 1 + 3 * 64)
    assert all(p.grad is not None for p in trained)
    assert sum(not p.grad.any() for p in trained) > 4 * 2 * 3 * (64 - 24)


class Says:
    """A model that says these token ids, whatever it is asked: a list for each problem."""

    def __init__(self, texts):
        self.texts = texts  # [B, length]

    def logits(self, tokens, past):
        at = past["length"] = past.get("length", -1) + 1
        ids = torch.tensor([text[at] for text in self.texts])
        return torch.nn.functional.one_hot(ids, 1024)[:, None].float()


def test_a_problem_counts_as_right_where_eval_gsm8k_says_so(one_file, capsys):
    said = [" 5", " #### 5", " 2+3=5\n#### 5", " #### 7, no, #### 5", " 5 ####", " #### -5", ""]
    end, encode_text = one_file.END, one_file.TOKENIZER.encode
    ids = [[*encode_text(text), end] for text in said]
    longest = max(map(len, ids))
    padded = [i + encode_text("#### 5")[:1] * (longest - len(i)) for i in ids]  # goes on after END
    problems = [([1, 2], [*encode_text(" 2+3=5\n#### 5"), end])] * len(said)
    one_file.score(Says(padded), problems, "after")
    want = sum(extract(text)[0] == "5" for text in said)
    assert want == 2
    assert numbers(ACCURACY, capsys.readouterr().out) == [round(100 * want / len(said), 1)]


@pytest.mark.slow
def test_ten_steps_print_what_train_py_gives(one_file, cli, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(
        "train.py", "--k", 8, "--method", "hellora", "--steps", 10, "--eval-limit", 500,
        "--out", "run",
    )  # fmt: skip
    assert code == 0, err
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    one_file.main(["--steps", "10"])
    ours = capfd.readouterr().out
    assert LAYER.findall(ours) == LAYER.findall(out)
    assert len(LAYER.findall(ours)) == 4
    # 1e-4: printed with four digits; float32 sums in another order
    losses = [json.loads(line)["loss"] for line in lines]
    assert numbers(LOSS, ours)[-10:] == pytest.approx(losses, abs=1e-4)
    # Greedy answers of a model that is not sure of them: rounding changes some.
    assert numbers(ACCURACY, ours) == pytest.approx(numbers(ACCURACY, out), abs=1)


@pytest.mark.slow
def test_the_whole_run_learns_as_much_as_the_stored_one():
    stored = json.loads((ROOT / "docs/results/tiny-math-hellora.json").read_text())["seeds"]["0"]
    command = [sys.executable, "examples/one_file.py"]  # as README has it, on one thread
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    base, after = numbers(ACCURACY, run.stdout)
    assert base == 100 * stored["tiny-math"]["base_accuracy"]
    # 3 points: another order of sums moves it by up to two (README); a fifth of 500 is .4
    assert after == pytest.approx(100 * stored["tiny-math"]["accuracy"], abs=3)
    assert after >= 88
