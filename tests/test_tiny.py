"""The embedded model's tasks and files: splits without overlap, rows as their script makes them."""

import json
import re
from itertools import combinations
from random import Random

import pytest
import torch
from conftest import ROOT

from eval_gsm8k import gold
from moe_model import MoEModel
from plumbing.data import read_rows
from tiny import bpe
from tiny.corpus import MIX, worked_story
from tiny.pretrain import VOCAB_SIZE, tokenizer_text
from tiny.tasks import FILES, draw, split_of


def rows(name):
    return list(read_rows(ROOT / "tiny" / f"{name}.jsonl", ()))


@pytest.mark.parametrize("name", FILES)
def test_committed_rows_are_what_the_script_makes(name):
    assert rows(name) == [json.loads(json.dumps(row)) for row in draw(*FILES[name], seed=0)]


def steps(row):
    """What a word problem is, apart from its words."""
    return row["answer"].partition("\n####")[0]


def test_no_word_problem_stands_on_two_sides():
    of = {
        split: {steps(r) for r in rows(f"math-{split}")}
        for split in ("train", "dev", "test", "reworded-test")
    }
    for a, b in combinations(of, 2):
        assert {a, b} == {"test", "reworded-test"} or not of[a] & of[b], (a, b)
    draws = Random("any seed")
    pretraining = {"\n".join(worked_story(draws)[1]) for _ in range(20_000)}
    assert not pretraining & set.union(*of.values())


@pytest.mark.parametrize("kind", ["code", "safety"])
def test_no_request_stands_on_two_sides(kind):
    of = [{r["instruction"] for r in rows(f"{kind}-{split}")} for split in ("train", "dev", "test")]
    assert not any(a & b for a, b in combinations(of, 2))


def test_two_wordings_are_kept_out_of_training():
    seen = {r["family"] for r in rows("math-reworded-test")}
    assert len(seen) == 2

    def frame(row):  # the wording without names, things and numbers: its short words
        return " ".join(re.findall(r"\b[a-z]{2,4}\b", row["question"]))

    assert not {frame(r) for r in rows("math-train")} & {
        frame(r) for r in rows("math-reworded-test")
    }


def test_word_problems_have_twelve_families_and_right_worked_steps():
    problems = rows("math-train") + rows("math-test") + rows("math-reworded-test")
    assert len({r["family"] for r in problems}) >= 12
    for row in problems:
        lines = steps(row).splitlines()
        assert 1 <= len(lines) <= 3
        for line in lines:
            left, right = line.split("=")
            # Our own file: digits and one operator.
            assert eval(left.replace("/", "//")) == int(right)
        assert gold(row) == lines[-1].split("=")[1]


def test_a_problem_belongs_to_one_slice_whatever_the_seed():
    assert split_of("19+62=81") == split_of("19+62=81")
    assert {split_of(str(n)) for n in range(200)} == {"pretrain", "train", "dev", "test"}


def test_pretraining_never_shows_the_form_of_a_task():
    draws = Random(0)
    text = "\n".join(
        document(draws) for domain in MIX.values() for document in domain for _ in range(200)
    )
    assert "####" not in text
    assert "Question:" not in text
    assert "Write a function" not in text


def test_the_embedded_model_is_small_and_shaped_like_olmoe():
    assert (ROOT / "tiny" / "model.safetensors").stat().st_size <= 10e6
    cfg = MoEModel.from_pretrained("tiny").cfg
    assert (cfg.family, cfg.n_experts, cfg.top_k, cfg.norm_topk, cfg.qk_norm) == (
        "olmoe",
        64,
        8,
        False,
        True,
    )
    assert cfg.n_layers >= 4


def test_the_embedded_model_can_add():
    """It was pretrained, and its tokenizer is the one it was pretrained with."""
    from plumbing.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(ROOT / "tiny"), MoEModel.from_pretrained("tiny")
    right = 0
    for a, b in [
        (12, 7),
        (30, 45),
        (8, 9),
        (21, 60),
        (17, 17),
        (50, 22),
        (33, 8),
        (64, 12),
        (5, 71),
        (40, 40),
    ]:
        ids = [tokenizer.eos, *tokenizer.encode(f"{a}+{b}=")]
        want = tokenizer.encode(f"{a + b}\n")
        with torch.no_grad():
            for token in want:
                ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
                if ids[-1] != token:
                    break
            else:
                right += 1
    assert right >= 9


def test_the_committed_tokenizer_is_what_the_script_makes(tmp_path):
    """So the corpus and the script in the repository are those that made the model."""
    merges = bpe.train(tokenizer_text(Random("tokenizer")), VOCAB_SIZE)
    bpe.save(merges, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_text() == (
        ROOT / "tiny" / "tokenizer.json"
    ).read_text()
