"""Extraction against a hand-made table and against the rules of lm-evaluation-harness."""

import json
from dataclasses import replace

import pytest
from conftest import write_rows

from eval_gsm8k import extract, few_shot, gold, solved_problems
from plumbing.data import TASKS, Example
from plumbing.downloads import Source
from plumbing.run_folder import read_results


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 1+1=2\n#### 2", "2", "2"),
        ("#### 1,234", "1234", "1234"),
        ("#### -7", "-7", "-7"),
        ("#### 3.50", "3.50", "3.50"),
        ("#### 12.", "12", "12"),
        ("#### 1,000.,", "1000", "1000"),  # first the commas go, then the dot
        ("#### $12", None, "12"),  # strict wants a digit after the mark, as the harness does
        ("####12", None, "12"),
        ("#### 4\n#### 5", "4", "5"),  # strict: the first; flexible: the last
        ("so it is $1,000.", None, "1000"),
        ("the answer is 7", None, "7"),
        ("no number", None, None),
        ("", None, None),
        # what follows the end of an answer is not part of it
        ("#### 5\nQuestion: 9 apples\nAnswer: #### 8", "5", "5"),
        ("so 7</s> #### 8", None, "7"),
        ("#### 5<|im_end|>\n<|im_start|>user\n9", "5", "5"),
        ("6<|im_end|> 7 Question: </s> #### 8", None, "6"),
        ("</s>#### 8", None, None),
        ("#### 5</s", "5", "5"),  # no end, but no number either
        ("9-4=5", None, "5"),
        ("3 - -2", None, "-2"),
    ],
)
def test_extraction_table(text, strict, flexible):
    assert extract(text) == (strict, flexible)


def test_lori_answers_are_found_by_their_own_words():
    assert extract("so. The final answer is:  1,234", "lori") == ("1234", "1234")
    assert extract("#### 5", "lori") == (None, "5")


def test_gold_answers_are_normalised_the_same_way():
    assert gold({"answer": "x <<1>> 1\n#### 1,080"}) == "1080"
    for unlike in ("12", "####", "#### 12 apples"):  # no answer could ever equal it
        with pytest.raises(ValueError, match="has no '#### N'"):
            gold({"answer": unlike})


def test_few_shot_prompts_are_those_of_the_harness():
    """Drawn by the harness' own ContextSampler (lm-eval 0.4.13, seed 1234) from rows 0 to 9."""
    asked = [Example(f"Question: {n}\nAnswer:", " 2", {}) for n in range(3)]
    shown = [e.prompt for e in few_shot(asked, [str(n) for n in range(10)], 3)]
    assert shown == [
        "7\n\n1\n\n0\n\nQuestion: 0\nAnswer:",
        "1\n\n0\n\n9\n\nQuestion: 1\nAnswer:",
        "1\n\n5\n\n3\n\nQuestion: 2\nAnswer:",
    ]
    assert few_shot(asked, ["1"], 0) == asked


def test_solved_problems_keep_their_notes_as_in_the_harness_and_in_loris_template(
    tmp_path, monkeypatch
):
    row = {"question": "a?", "answer": "1+1=<<1+1=2>>2\n#### 2"}
    rows = write_rows(tmp_path / "t.jsonl", [row])
    monkeypatch.setitem(TASKS, "gsm8k", replace(TASKS["gsm8k"], train=Source(str(rows))))
    assert solved_problems("gsm8k", "plain") == ["Question: a?\nAnswer: 1+1=<<1+1=2>>2\n#### 2"]
    (lori,) = solved_problems("gsm8k", "lori")
    assert lori.endswith("number.\n1+1=<<1+1=2>>2\nThe final answer is:  2")


def test_a_model_without_adapters_can_be_scored(cli, toy, tmp_path):
    rows = write_rows(
        tmp_path / "t.jsonl", [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(5)]
    )
    code, out, err = cli(
        "eval_gsm8k.py", "--model", toy, "--task", "tiny-math", "--data", rows, "--max-new", 4
    )
    assert code == 0, err
    assert "accuracy" in out
    assert "5 problems" in out


def test_an_untrained_models_results_are_kept_where_asked(cli, toy, tmp_path, monkeypatch):
    rows = write_rows(
        tmp_path / "t.jsonl", [{"question": f"{n}+1?", "answer": "#### 2"} for n in range(3)]
    )
    small = replace(TASKS["tiny-math"], test=Source(str(rows)), max_new=4)
    monkeypatch.setitem(TASKS, "tiny-math", small)
    what = ("--model", toy, "--task", "tiny-math", "--out", tmp_path / "base")
    code, _, err = cli("eval_gsm8k.py", *what)
    assert code == 0, err
    assert read_results(tmp_path / "base")["tiny-math"]["total"] == 3
    assert len((tmp_path / "base" / "answers-tiny-math.jsonl").read_text().splitlines()) == 3
    assert cli("eval_gsm8k.py", *what, "--limit", 2)[0] == 0
    kept = read_results(tmp_path / "base")
    assert (kept["tiny-math"]["total"], kept["tiny-math-part"]["total"]) == (3, 2)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--run"),
        (["--run", "nowhere", "--out", "here"], "--out"),
        (["--run", "nowhere"], "run.json"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", ""], "model"),
        (["--model", "tiny", "--task", "tiny-code"], "tiny-code"),
        (["--model", "tiny", "--limit", "0"], "--limit"),
        (["--model", "tiny", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "tiny", "--shots", "3001"], "--shots"),
    ],
)
def test_mistakes_end_in_one_line(cli, args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("eval_gsm8k.py", *args)
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_file_that_is_damaged_is_refused(cli, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"task": 1})[:-3])
    assert cli("eval_gsm8k.py", "--run", tmp_path)[0] == 2


def test_a_model_has_no_adapters_to_keep_apart(cli):
    code, _, err = cli("eval_gsm8k.py", "--model", "tiny", "--factored")
    assert code == 2
    assert "--factored" in err
