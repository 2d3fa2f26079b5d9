"""Files of rows in the forms that people have: what is learned of them, or the line that says why.

Each form is also trained on, with train.py.
"""

import json
import re

import pytest
from conftest import ROOT, small_run, toy_in, write_rows

from plumbing.cli import did_you_mean
from plumbing.data import FORMS, ChatText, encode, encode_prompt, load_examples
from plumbing.rows import read_template
from plumbing.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = [{"role": "user", "content": "Hi {x}"}, {"role": "assistant", "content": "Ho"}]
HUMAN = [{"from": "human", "value": "Hi {x}"}, {"from": "gpt", "value": "Ho"}]
HI = ("<|user|>Hi {x}<|endoftext|>\n<|assistant|>", "Ho")
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)
PAIR = {"prompt": "Ask {0}:", "completion": " {yes}"}
SHEET = 'Question,Answer,\r\n"1, or 2?",one\r\n"say ""hi""","two\r\nlines",\r\n,,\r\n'


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# name -> (file, its text, the template file, [(prompt, answer)])
GOOD = {
    "prompt and completion": ("a.jsonl", lines(PAIR, PAIR), "", [("Ask {0}:", " {yes}")] * 2),
    "no prompt": ("a.jsonl", lines({"prompt": "", "completion": "all"}), "", [("", "all")]),
    "a JSON list": ("a.json", json.dumps([PAIR], indent=2), "", [("Ask {0}:", " {yes}")]),
    "Alpaca, null input": (
        "alpaca.json",
        json.dumps([{"instruction": "Do.", "input": None, "output": "Done."}]),
        "",
        [(ALPACA.format("Do."), "Done.")],
    ),
    "GSM8K": (
        "a.jsonl",
        lines({"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}),
        "",
        [("Question: 1+1?\nAnswer:", " 2\n#### 2")],
    ),
    "text": ("a.jsonl", lines({"text": "Once.", "id": 3}), "", [("", "Once.")]),
    "messages": ("a.jsonl", lines({"messages": ASKED}), "t.jinja", [HI]),
    "messages of two answers and a system": (
        "a.jsonl",
        lines({"messages": [{"role": "system", "content": "S"}, *ASKED, *ASKED], "text": "no"}),
        "t.jinja",
        [
            ("<|system|>S<|endoftext|>\n" + HI[0], "Ho"),
            ("<|system|>S<|endoftext|>\n" + HI[0] + "Ho<|endoftext|>\n" + HI[0], "Ho"),
        ],
    ),
    "ShareGPT": ("a.json", json.dumps([{"id": "x", "conversations": HUMAN}]), "t.jinja", [HI]),
    "ShareGPT with a system": (
        "a.jsonl",
        lines({"system": "S", "conversations": HUMAN}),
        "t.jinja",
        [("<|system|>S<|endoftext|>\n" + HI[0], "Ho")],
    ),
    "CSV of a spreadsheet": (
        "a.csv",
        "\ufeff" + SHEET,
        "{Question}\n---\n {Answer}\n",
        [("1, or 2?", " one"), ('say "hi"', " two\nlines")],
    ),
    "CSV with semicolons": (
        "a.csv",
        "prompt;completion\na, b;c\n",
        "",
        [("a, b", "c")],
    ),
    "tabs": ("a.tsv", "prompt\tcompletion\r\na, b\tc;d\r\n", "", [("a, b", "c;d")]),
    "BOM and CRLF": ("a.jsonl", "\ufeff" + lines(PAIR).replace("\n", "\r\n"), "", [
        ("Ask {0}:", " {yes}")
    ]),
    "a template with braces, and nulls": (
        "a.jsonl",
        lines({"q x": "{a}", "a": "{q}", "note": None}),
        '{"q": "{q x}"}{note}{{a}} {\r\n---\r\n{a}}',
        [('{"q": "{a}"}{a} {', "{q}}")],
    ),
}  # fmt: skip


def place(folder, name, text, template):
    """The file, and the template's path or None."""
    (folder / name).write_text(text, newline="")
    if not template:
        return folder / name, None
    path = folder / ("t.jinja" if template == "t.jinja" else "form.txt")
    path.write_text(CHATML if template == "t.jinja" else template, newline="")
    return folder / name, str(path)


@pytest.mark.parametrize("form", GOOD)
def test_each_form_gives_these_prompts_and_answers(tmp_path, form):
    name, text, template, pairs = GOOD[form]
    path, template = place(tmp_path, name, text, template)
    examples = load_examples("tiny-math", path, template, ROOT / "tiny")
    assert [example[:2] for example in examples] == pairs
    tokenizer = load_tokenizer(ROOT / "tiny")
    for example, row in zip(examples, encode(examples, tokenizer, 512), strict=True):
        assert tokenizer.decode(row.ids[:-1]) == example.prompt + example.answer
        assert row.ids[-1] == tokenizer.eos
        assert 0 < row.n_prompt < len(row.ids)
        if example.prompt:
            assert tokenizer.decode(row.ids[: row.n_prompt]) == example.prompt


QUICK = ["--catcher", "forward", "--steps", 1, "--batch-size", 2, "--k", 2, "--rank", 4]


def check_trained_on(tmp_path, cli, form):
    path, template = place(tmp_path, *GOOD[form][:3])
    more = ["--template", template] if template else []
    flags = ["--model", toy_in(tmp_path), "--task", "tiny-math", "--data", path, *QUICK, *more]
    code, _, _ = cli("train.py", *flags, "--no-eval", "--out", tmp_path / "run")
    assert code == 0
    assert (tmp_path / "run" / "adapter.safetensors").is_file()


@pytest.mark.parametrize("form", ["text", "ShareGPT with a system", "CSV of a spreadsheet"])
def test_these_forms_are_trained_on(tmp_path, cli, form):
    check_trained_on(tmp_path, cli, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", GOOD)
def test_each_form_is_trained_on(tmp_path, cli, form):
    check_trained_on(tmp_path, cli, form)


BAD = {  # name -> (file, its bytes, the template file, words of the line)
    "other fields": (
        "a.jsonl", lines({"ask": "a", "say": "b"}), "",
        ["ask, say", "--template", "completion", "messages", "output"],
    ),
    "other columns": ("a.csv", b"ask,say\na,b\n", "", ["header", "ask, say", "--template"]),
    "other capitals": (
        "a.csv", b"Question;Answer\na;b\n", "",
        ["header", *(did_you_mean(w, [w.lower()]) for w in ("Question", "Answer"))],
    ),
    "a spreadsheet that happens to be text": ("a.csv", b"PK\3\4 abc", "", ["spreadsheet"]),
    "no header": (
        "a.csv", b"answer the phone,ok fine\na,b\n", "", ["header", "2 of several words"],
    ),
    "a row shorter than the header": (
        "a.csv", b"prompt,completion\na,b\nc\n", "", ["row 3", "'completion'"],
    ),
    "a first row shorter than the header": (
        "a.csv", b"prompt,completion\nc\n", "", ["row 2", "'completion'"],
    ),
    "other columns, of tabs": ("a.tsv", b"ask\tsay\na\tb\n", "", ["header", "ask, say"]),
    "a misspelt field": (
        "a.jsonl", lines({"promt": "a", "completion": "b"}), "",
        [did_you_mean("promt", ["prompt"])],
    ),
    "a capital": (
        "a.jsonl", lines({"Question": "a", "answer": "b"}), "",
        [did_you_mean("Question", ["question"])],
    ),
    "a misspelt field of a later row": (
        "a.jsonl", lines(PAIR, {"prompt": "a", "completon": "b"}), "",
        ["row 2", did_you_mean("completon", ["completion"])],
    ),
    "a misspelt field of a template": (
        "a.jsonl", lines(PAIR), "{promt}\n---\n{completion}",
        ["row 1", did_you_mean("promt", ["prompt"])],
    ),
    "chats, but no chat template": ("a.jsonl", lines({"messages": ASKED}), "", ["template"]),
    "a chat without an answer": (
        "a.jsonl", lines({"messages": ASKED[:1]}), "t.jinja", ["row 1", "assistant"],
    ),
    "a call of a tool": (
        "a.jsonl",
        lines({"messages": [*ASKED, {"role": "assistant", "content": None}]}),
        "t.jinja",
        ["row 1", "turn 3", "'content'"],
    ),
    "an end in a chat's text": (
        "a.jsonl",
        lines({"messages": [ASKED[0] | {"content": "x<|endoftext|>"}, ASKED[1]]}),
        "t.jinja",
        ["row 1", "<|endoftext|>"],
    ),
    "a null answer": (
        "a.jsonl", lines(PAIR, PAIR | {"completion": None}), "", ["row 2", "'completion'"],
    ),
    "a number": ("a.jsonl", lines({"text": 3}), "", ["row 1", "'text'"]),
    "an empty text": ("a.jsonl", lines({"text": ""}), "", ["row 1"]),
    "a field that is not there": (
        "a.jsonl", lines(PAIR), "{prompt}\n---\n{label}", ["row 1", "'label'", "completion"],
    ),
    "a template without a border": ("a.jsonl", lines(PAIR), "{prompt}{label}", ["'---'"]),
    "a template without an answer": ("a.jsonl", lines(PAIR), "{prompt}\n---\nx", ["'---'"]),
    "parquet": ("a.parquet", b"PAR1\xff\xfe", "", ["parquet", "JSON lines", "CSV"]),
    "a spreadsheet": ("a.xlsx", b"PK\3\4\xff\xfe", "", ["spreadsheet", "CSV"]),
    "Windows' code page": ("a.csv", "prompt,completion\ncafé,x".encode("cp1252"), "", ["UTF-8"]),
    "plain text": ("a.txt", "Once upon\n", "", ["line 1", "JSON lines"]),
    "a comma in no quotes": ("a.csv", "prompt,completion\na,b,c\n", "", ["row 2", "quotes"]),
    "two columns of a name": ("a.csv", "text,text\na,b\n", "", ["text, text"]),
    "an open quote": ("a.csv", 'text\n"a\n', "", ["a.csv", "CSV"]),
    "a header alone": ("a.csv", "prompt,completion\n", "", ["no rows"]),
}  # fmt: skip


@pytest.mark.parametrize("form", BAD)
def test_what_does_not_fit_is_one_line_that_says_what_to_change(tmp_path, cli, form):
    name, content, template, words = BAD[form]
    content = content if isinstance(content, bytes) else content.encode()
    path, template = place(tmp_path, name, "", template)
    path.write_bytes(content)
    more = ["--template", template] if template else []
    flags = ["--model", toy_in(tmp_path), "--task", "tiny-math", "--data", path, *QUICK, *more]
    code, _, err = cli("train.py", *flags, "--out", tmp_path / "run")
    assert code == 2
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert "the phone" not in err  # no message shows the text of a row
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_there_is_answered_with_all_forms(tmp_path, cli):
    flags = ["--model", toy_in(tmp_path), "--task", "tiny-math", *QUICK, "--out", tmp_path / "run"]
    code, _, err = cli("train.py", *flags, "--data", tmp_path / "nope.jsonl")
    assert (code, err.count("\n")) == (2, 1)
    assert all(field in err for fields in FORMS for field in fields) and "nope.jsonl" in err


# ---- chat templates ------------------------------------------------------------------------------


def with_config(folder, **values):
    toy = toy_in(folder)
    (toy / "tokenizer_config.json").write_text(json.dumps(values))
    return toy


def test_the_models_own_chat_template_is_found_where_transformers_has_it(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": ASKED}])
    toy = with_config(tmp_path, chat_template=CHATML.replace("<|endoftext|>", "{{ eos_token }}"))
    assert load_examples("gsm8k", path, model=toy)[0][:2] == HI
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    with_config(tmp_path, chat_template=named)
    assert load_examples("gsm8k", path, model=toy)[0][:2] == HI
    (toy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    assert load_examples("gsm8k", path, model=toy)[0][:2] == ("Hi {x}!", "Ho!")


def test_a_chat_prompt_gets_no_first_token_beside_the_templates_own():
    tokenizer = load_tokenizer(ROOT / "tiny")
    tokenizer.bos = 5
    assert encode_prompt("<|endoftext|>ab"[13:], tokenizer, "")[0] == 5
    ids = encode_prompt(ChatText("<|endoftext|>ab"), tokenizer, "")
    assert ids == tokenizer.encode("<|endoftext|>ab")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{% for m in messages %}",
        "{{ raise_exception('no such role') }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x.y }}",
        "{% if add_generation_prompt %}other{% endif %}",
    ],
)
def test_a_chat_template_that_fails_is_named_in_one_line(tmp_path, template):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": ASKED}])
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(ValueError, match="template"):
        load_examples("gsm8k", path, str(tmp_path / "t.jinja"), ROOT / "tiny")


def test_chats_are_written_as_transformers_writes_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    toy = with_config(tmp_path, chat_template=CHATML, eos_token="<|endoftext|>")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(toy / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    theirs.chat_template = CHATML
    chat = [{"role": "system", "content": " Be\nbrief. "}, *ASKED, *ASKED]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": chat}])
    rows = encode(load_examples("gsm8k", path, model=toy), load_tokenizer(toy), 512)
    for n, row in zip((3, 5), rows, strict=True):
        text = theirs.apply_chat_template(chat[:n], tokenize=False).removesuffix("\n")
        assert row.ids == theirs(text, add_special_tokens=False)["input_ids"]


def test_a_template_file_is_cut_at_its_border(tmp_path):
    (tmp_path / "t.txt").write_text("{a}\n\n---\n\n {b}\n\n")
    assert read_template(tmp_path / "t.txt") == ("{a}\n", "\n {b}\n")


# ---- what is said of the rows, and --dev-data ----------------------------------------------------


def test_odd_rows_are_counted(tmp_path, cli):
    rows = [{"question": "1?", "answer": "#### 1"}] * 3 + [{"question": "2?", "answer": " "}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    tests = write_rows(tmp_path / "tests.jsonl", rows[:1])
    flags = ["--model", toy_in(tmp_path), "--task", "tiny-math", "--data", path, *QUICK]
    code, out, _ = cli("train.py", *flags, "--eval-data", tests, "--out", tmp_path / "run")
    assert code == 0
    *of_rows, _of_few_visits = [line for line in out.splitlines() if line.startswith("warning")]
    numbers = sorted(tuple(map(int, re.findall(r"\b\d+\b", line))) for line in of_rows)
    # (how many are odd, of how many, the first): empty, without a number, twice, among the scored
    assert numbers == [(1, 4, 4), (1, 4, 4), (2, 4, 2), (3, 4, 1)]


def run_with_dev(tmp_path, cli, out, *more):
    rows = write_rows(tmp_path / "rows.jsonl", [PAIR | {"prompt": f"{i}:"} for i in range(4)])
    flags = [*QUICK, "--steps", 5, "--lr", 0.05, "--save-every", 1]
    dev = ["--dev-data", rows, "--dev-every", 2, "--out", tmp_path / out]
    toy = tmp_path / "toy" if (tmp_path / "toy").exists() else toy_in(tmp_path)
    flags = ["--model", toy, "--task", "tiny-math", "--data", rows, *flags, *dev, *more]
    return cli("train.py", *flags)


def dev_lines(folder):
    return [json.loads(line) for line in (folder / "dev-metrics.jsonl").read_text().splitlines()]


def test_the_loss_on_dev_data_is_that_of_the_evaluation_and_the_best_adapter_is_a_run(
    tmp_path, cli
):
    assert run_with_dev(tmp_path, cli, "run")[0] == 0
    lines_ = dev_lines(tmp_path / "run")
    assert [line["step"] for line in lines_] == [2, 4, 5]
    lowest = min(lines_, key=lambda line: line["loss"])
    assert [line for line in lines_ if line["best"]][-1] == lowest
    best = tmp_path / "run" / "best"
    assert json.loads((best / "run.json").read_text())["best_step"] == lowest["step"]
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 5  # of the training steps alone
    score = ["--run", best, "--loss", "--factored", "--data", tmp_path / "rows.jsonl"]
    assert cli("eval_gsm8k.py", *score)[0] == 0
    scored = json.loads((best / "results.json").read_text())["tiny-math-loss-part"]
    # the same sums in fp32, over other batches
    assert scored["loss"] == pytest.approx(lowest["loss"], rel=1e-5)


def test_dev_data_changes_no_number_of_the_training(tmp_path, cli):
    assert run_with_dev(tmp_path, cli, "run")[0] == 0
    assert run_with_dev(tmp_path, cli, "every", "--dev-every", 1)[0] == 0
    one, other = (
        (tmp_path / name / "adapter.safetensors").read_bytes() for name in ("run", "every")
    )
    assert one == other
    # the best of all steps is no worse than the best of some
    assert min(line["loss"] for line in dev_lines(tmp_path / "every")) <= min(
        line["loss"] for line in dev_lines(tmp_path / "run")
    )


def test_tensorboard_that_is_not_there_is_said(tmp_path, cli, monkeypatch):
    monkeypatch.setattr("plumbing.flags.find_spec", lambda name: None)
    code, _, err = run_with_dev(tmp_path, cli, "run", "--log", "tensorboard")
    assert code == 2
    assert "pip install tensorboard" in err


def test_own_rows_of_any_task_have_a_loss_by_the_command_that_is_named(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "own.jsonl", [{"prompt": "3+4?", "completion": " 7"}] * 4)
    flags = ["--task", "tiny-code", "--steps", 1, "--method", "lora", "--out", "r"]
    toy = small_run(toy_in(tmp_path), rows)
    code, out, err = cli("train.py", *toy, *flags)
    assert code == 0, err
    assert cli("export.py", "--run", "r", "--format", "hub")[0] == 0
    (named,) = re.findall(r"python (\S+\.py --run \S+ --loss --data) FILE", out)
    script, *words = named.split()
    code, out, err = cli(script, *words, "own.jsonl")
    assert (code, err.count("Error")) == (0, 0) and "loss" in out, err
    page = (tmp_path / "r" / "report.html").read_text()
    assert "--loss --data FILE" in page and "eval_humaneval" not in page
