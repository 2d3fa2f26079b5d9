"""A model whose own files put a token first gets it wherever it reads a prompt. Old runs do not."""

import json

import pytest
import torch
from conftest import small_run, toy_in, write_rows

import eval_gsm8k
from hellora import load_run
from paper import eval_humaneval, eval_safety

BOS = 1023  # <|endoftext|> of the embedded tokenizer: GPT-NeoX too has one token for both ends
ROWS = [{"question": f"{a}+3?", "answer": f"{a}+3={a + 3}\n#### {a + 3}"} for a in range(20)]
OWN = {"add_bos_token": True, "bos_token": "<|endoftext|>"}


@pytest.fixture
def with_bos(tmp_path):
    """A checkpoint whose tokenizer_config.json asks for a bos."""
    toy = toy_in(tmp_path / "bos")
    (toy / "tokenizer_config.json").write_text(json.dumps(OWN))
    return toy


@pytest.fixture
def train(cli, tmp_path, monkeypatch):
    """train(model, "r", ...) -> run.json of a run of two steps in folder r."""
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)

    def call(model, out, *flags):
        few = ["--eval-data", rows, "--eval-limit", 2, "--steps", 2, "--out", out]
        code, _, err = cli("train.py", *small_run(model, rows, *few, *flags))
        assert code == 0, err
        return json.loads((tmp_path / out / "run.json").read_text())

    return call


@pytest.fixture
def asked(monkeypatch):
    """The prompts, as ids, that models are asked to go on from by two tokens at most."""
    seen = []
    for module in (eval_gsm8k, eval_humaneval, eval_safety):

        def generate(model, prompts, max_new, *rest, real=module.generate):
            seen.extend(prompts)
            return real(model, prompts, min(max_new, 2), *rest)

        monkeypatch.setattr(module, "generate", generate)
    return seen


def first_ids(prompts):
    """Their first ids, once each. The list is emptied."""
    found = {prompt[0] for prompt in prompts}
    prompts.clear()
    return found


def test_training_counting_scoring_and_loading_have_the_bos(
    train, with_bos, toy, asked, cli, tmp_path
):
    counted = ["--catcher", "forward", "--batch-size", 4]
    run, plain = train(with_bos, "r", *counted), train(toy, "plain", *counted)
    assert (run["bos"], plain["bos"]) == (BOS, None)
    assert run["hashes"]["data"] != plain["hashes"]["data"]
    # two rows are counted, a tenth of twenty, and each has one token more
    n_tokens = [
        json.loads((tmp_path / out / "hot_experts.json").read_text())["n_tokens"]
        for out in ("r", "plain")
    ]
    assert n_tokens[0] - n_tokens[1] == 2
    prompts = list(asked)  # of the base and of the result, each of both runs
    assert len(prompts) == 8
    assert [p[1:] for p in prompts[:4]] == prompts[4:]
    assert {p[0] for p in prompts[:4]} == {BOS}
    asked.clear()
    for name, folder in (("r", with_bos), ("plain", toy)):
        tokenizer = load_run(tmp_path / name)[1]
        assert tokenizer.bos == json.loads((tmp_path / name / "run.json").read_text())["bos"]
        assert BOS not in tokenizer.encode("1+1")
        for model in (["--run", name], ["--model", folder]):
            flags = ["--data", "rows.jsonl", "--task", "tiny-math", "--limit", 2]
            assert cli("eval_gsm8k.py", *model, *flags)[0] == 0
            assert (first_ids(asked) == {BOS}) == (name == "r")


def test_the_page_has_the_routing_of_the_ids_that_the_model_saw(train, with_bos, tmp_path):
    train(with_bos, "r")
    model, tokenizer, _ = load_run(tmp_path / "r")
    answers, texts = (
        [json.loads(line) for line in (tmp_path / "r" / name).read_text().splitlines()]
        for name in ("answers-tiny-math.jsonl", "routing.jsonl")
    )
    for answer, text in zip(answers, texts, strict=False):  # wrong ones may come again at the end
        prompt = [BOS, *tokenizer.encode(answer["prompt"])]
        ids = [*prompt, *answer["ids"]][:256]
        assert tokenizer.decode(answer["ids"], "inside") == answer["output"]
        assert (text["n_prompt"], len(text["tokens"])) == (len(prompt), len(ids))
        _, routing = model(torch.tensor([ids]))
        for layer, r in routing.items():
            assert text["experts"][str(layer)] == r.expert_ids[0].tolist()


def test_code_and_safety_are_scored_with_the_bos_too(train, with_bos, toy, asked, cli):
    for name, folder in (("r", with_bos), ("plain", toy)):
        train(folder, name, "--no-eval")
        for model in (["--run", name], ["--model", folder]):
            few = ["--limit", 2]
            task = ["--task", "tiny-code", "--n", 1]
            code, _, err = cli("paper.eval_humaneval", *model, *task, *few)
            assert code == 0, err
            assert (first_ids(asked) == {BOS}) == (name == "r")
            code, _, err = cli("paper.eval_safety", *model, "--task", "tiny-safety", *few)
            assert code == 0, err
            assert (first_ids(asked) == {BOS}) == (name == "r")


def test_loris_template_has_none(train, with_bos, toy, asked, cli):
    run = train(with_bos, "r", "--template", "lori")
    assert run["bos"] is None
    assert run["hashes"]["data"] == train(toy, "plain", "--template", "lori")["hashes"]["data"]
    assert BOS not in first_ids(asked)
    flags = ["--task", "tiny-math", "--data", "rows.jsonl", "--limit", 2]
    for model in (["--run", "r"], ["--model", with_bos, "--template", "lori"]):
        assert cli("eval_gsm8k.py", *model, *flags)[0] == 0
        assert BOS not in first_ids(asked)


def test_a_run_from_before_there_was_a_bos_keeps_its_meaning(train, with_bos, asked, cli, tmp_path):
    run = train(with_bos, "r", "--no-eval")
    del run["bos"]
    (tmp_path / "r" / "run.json").write_text(json.dumps(run))
    assert load_run(tmp_path / "r")[1].bos is None
    assert cli("eval_gsm8k.py", "--run", "r")[0] == 0
    assert BOS not in first_ids(asked)
    # and it is not gone on with in the new way
    (tmp_path / "r" / "run.json").write_text(json.dumps(run | {"finished": False}))
    flags = ["--eval-data", "rows.jsonl", "--eval-limit", 2, "--steps", 2, "--no-eval"]
    code, _, err = cli("train.py", *small_run(with_bos, "rows.jsonl", *flags, "--out", "r"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"bos: None -> {BOS}" in err


def test_an_export_has_the_models_own_tokenizer_files(train, with_bos, cli, tmp_path):
    train(with_bos, "r", "--no-eval")
    assert cli("export.py", "--run", "r", "--format", "hub", "--out", "hub")[0] == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hub" / name).read_bytes() == (with_bos / name).read_bytes()
