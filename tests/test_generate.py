"""Decoding against the slowest way to decode; the command against what training and scoring do."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import HUB, ROOT, slow, small_run, toy_in, write_checkpoint, write_rows

import export
import train
from generate import Marked, Sampling, generate, has_colors, pieces, show_experts, stream
from hellora import load_run
from moe_model import MoEModel
from plumbing.cli import plain
from plumbing.data import FIELDS, TASKS, TEMPLATES, load_examples, own_fields, question
from plumbing.tokenizer import load_tokenizer


def slow_greedy(model, prompt, max_new, stops):
    """One prompt, one full forward per token."""
    ids = list(prompt)
    for _ in range(max_new):
        with torch.no_grad():
            token = model(torch.tensor([ids]))[0][0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_batched_cached_decoding_equals_one_by_one_without_cache(checkpoint, batch_size):
    model = MoEModel.from_pretrained(checkpoint)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 96, (n,), generator=draw).tolist() for n in (4, 9, 1, 6, 2, 9, 5)]
    # many, so that rows end at different times and the batch shrinks
    stops = tuple(range(0, 96, 7))
    want = [slow_greedy(model, p, 12, stops) for p in prompts]
    assert len({len(w) for w in want}) > 2
    assert generate(model, prompts, 12, stops, batch_size) == want


def test_generation_ends_at_the_context_and_refuses_a_prompt_beyond_it(olmoe):
    model = MoEModel.from_pretrained(olmoe)  # context 64
    for prompts in ([[1] * 4], [[1] * 60], [[1] * 4, [1] * 60]):  # whoever shares the batch
        want = [min(50, 64 - len(p)) for p in prompts]
        assert [len(a) for a in generate(model, prompts, 50, (), 2)] == want
    with pytest.raises(ValueError, match="context is 64"):
        generate(model, [[1] * 64], 1, (), 1)
    assert generate(model, [], 5, (), 1) == []


@pytest.mark.parametrize("prompts", [[[]], [[], [5, 6, 7]], [[5], [6], []]])
def test_a_prompt_without_tokens_is_refused_whoever_shares_the_batch(olmoe, prompts):
    at = prompts.index([]) + 1
    with pytest.raises(ValueError, match=f"prompt {at} of {len(prompts)}"):
        generate(MoEModel.from_pretrained(olmoe), prompts, 3, (), 2)


# ---- one prompt, token by token ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_a_stream_has_the_tokens_of_a_batch(checkpoint, temperature):
    model = MoEModel.from_pretrained(checkpoint)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 96, (n,), generator=draw).tolist() for n in (4, 9, 1, 60)]
    stops = tuple(range(0, 96, 11))
    each = [Sampling(temperature, 0.9, [seed]) if temperature else None for seed in range(4)]
    both = Sampling(temperature, 0.9, [0, 1, 2, 3]) if temperature else None
    want = generate(model, prompts, 12, stops, 4, sampling=both)
    got = [[*stream(model, p, 12, stops, one)] for p, one in zip(prompts, each, strict=True)]
    assert got == want and any(want)


def test_a_stream_refuses_what_a_batch_refuses(olmoe):
    model = MoEModel.from_pretrained(olmoe)
    for prompt, said in (([1] * 64, "context is 64"), ([], "no tokens")):
        with pytest.raises(ValueError, match=said):
            next(stream(model, prompt, 1, ()))


@pytest.mark.parametrize("lead", ["", " ", "Solution: ", "### "])
@pytest.mark.parametrize(
    "text",
    [
        " a word",
        "Solution: 48+17=65",
        "### forty",
        "Sol",
        "é, 🙂🙂 and 中文\n",
        "",
        "  two blanks",
        "e\u0301",
    ],
)
def test_pieces_are_the_text_in_whole_characters(text, lead):
    tokenizer = load_tokenizer(ROOT / "tiny")
    ids = tokenizer.encode(text)
    got = [*pieces(iter(ids), tokenizer, lead)]
    assert "".join(got) == tokenizer.decode(ids, "inside").removeprefix(lead)
    assert "\ufffd" not in "".join(got)


def test_pieces_of_what_is_no_text_are_as_decoding_has_them():
    tokenizer = load_tokenizer(ROOT / "tiny")
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):  # random tokens: half characters, special tokens, ids without a token
        ids = torch.randint(0, 1100, (8,), generator=draw).tolist()
        assert "".join(pieces(ids, tokenizer)) == tokenizer.decode(ids, "inside")


# ---- the form of a question ----------------------------------------------------------------------

FORMS = [
    (task, template)
    for task, of in TASKS.items()
    for kind, template in TEMPLATES
    if kind == of.kind and not task.startswith("tiny-math-")
]
PLAIN = {("gsm8k", "plain"), ("tiny-math", "plain")}  # a blank before an answer is of their form


@pytest.mark.parametrize(("task", "template"), FORMS)
def test_a_question_has_the_form_of_training_and_has_it_once(task, template, tmp_path):
    field, *others = FIELDS[TASKS[task].kind]
    row = {field: "Add 3 to 4.", **dict.fromkeys(others, "")}
    (trained,) = load_examples(task, write_rows(tmp_path / "rows.jsonl", [row]), template)
    for text in ("Add 3 to 4.", " Add 3 to 4.\n", trained.prompt, trained.prompt.strip()):
        asked = question(text, task, template)
        assert asked.prompt == trained.prompt
        assert asked.answer == (" " if (task, template) in PLAIN else "")


def test_half_of_a_form_is_made_whole():
    want = "Question: 3+4?\nAnswer:"
    for text in ("3+4?", "Question: 3+4?", "3+4?\nAnswer:", "Question:3+4?\n Answer: "):
        assert question(text, "tiny-math").prompt == want


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}]
PAIR = {"q": "3+4?", "a": "7"}
SUM = {"left one": "3", "right": "4", "sum": "7"}
# name -> (a row of one's own, a template file for it, what is typed, what stands before an answer)
OWN = {
    "one field": (PAIR, ("t.txt", "Sum {{x}}: {q}\nIs\n---\n {a}!"), "3+4?", " "),
    "a literal before the answer": (PAIR, ("t.txt", "{q}\n---\n{{a}} {a}"), "3+4?", "{a} "),
    "two fields": (SUM, ("t.txt", "{left one}+{right}\n---\n{sum}"), json.dumps(SUM), ""),
    "a chat": ({"messages": TURNS}, ("c.jinja", CHATML), "3+4?", ""),
    "prompt and completion": ({"prompt": "3+4?", "completion": " 7"}, None, "3+4?", ""),
    "Alpaca": ({"instruction": "3+4?", "output": "7"}, None, "3+4?", ""),
}  # fmt: skip


@pytest.mark.parametrize(("row", "file", "typed", "lead"), OWN.values(), ids=OWN)
def test_a_question_has_the_form_of_ones_own_rows(row, file, typed, lead, toy, tmp_path):
    rows, template = write_rows(tmp_path / "rows.jsonl", [row]), None
    if file:
        (tmp_path / file[0]).write_text(file[1])
        template = str(tmp_path / file[0])
    (trained,) = load_examples("tiny-math", rows, template, toy)
    own = own_fields(row) or tuple(row)
    asked = question(typed, "tiny-math", template, own, toy)
    assert asked.prompt == trained.prompt
    assert type(asked.prompt) is type(trained.prompt)  # a chat's text gets no bos
    assert asked.answer == lead
    assert trained.answer.startswith(lead)
    if len(row) < 3:  # what has the form already does not get it twice
        assert question(trained.prompt, "tiny-math", template, own, toy)[:2] == asked[:2]


def test_rows_of_text_are_gone_on_from(toy):
    asked = question("Once there", "tiny-math", "plain", ("text",), toy)
    assert (asked.prompt, asked.answer) == ("Once there", "")


def test_what_is_typed_has_all_fields_of_the_form(toy, tmp_path):
    (tmp_path / "t.txt").write_text("{left one}+{right}\n---\n{sum}")
    for typed in ("3+4?", "[3, 4]", '{"left one": "3"}', '"left one"'):
        with pytest.raises(ValueError, match=r"left one.*right.*--raw"):
            question(typed, "tiny-math", str(tmp_path / "t.txt"))
    (tmp_path / "t.txt").write_text("Say a number:\n---\n{sum}")
    with pytest.raises(ValueError, match=r"no {field}.*--raw"):
        question("3", "tiny-math", str(tmp_path / "t.txt"))


# ---- the command ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


ROWS = [{"question": f"{a}+3?", "answer": f"{a}+3={a + 3}\n#### {a + 3}"} for a in range(20)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run "r" of a few steps, its Hub export "hub", and its questions."""
    folder = tmp_path_factory.mktemp("made")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    flags = ["--eval-data", rows, "--eval-limit", 5, "--steps", 4, "--lr", 0.03, "--out", "r"]
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(sys, "argv", ["train.py", *small_run(toy_in(folder), rows, *flags)])
        train.main()
        m.setattr(sys, "argv", ["export.py", "--run", "r", "--format", "hub", "--out", "hub"])
        export.main()
    return folder


@pytest.fixture
def ask(cli, made, monkeypatch):
    """ask("--run", "r", ..., typed="...") -> (exit code, stdout, stderr), in the folder `made`.

    typed: what stands on standard input, or that input itself.
    """
    monkeypatch.chdir(made)

    def call(*flags, typed=""):
        if isinstance(typed, str):
            typed = typed.encode()
        if isinstance(typed, bytes):
            typed = io.TextIOWrapper(io.BytesIO(typed))
        monkeypatch.setattr(sys, "stdin", typed)
        return cli("generate.py", *flags)

    return call


def scored(folder):
    """(question, answer) of each problem that train.py scored."""
    lines = (folder / "r" / "answers-tiny-math.jsonl").read_text().splitlines()
    answers = [json.loads(line)["output"] for line in lines]
    # train.py was told to score the first few rows only
    return [(row["question"], a) for row, a in zip(ROWS, answers, strict=False)]


def test_a_run_answers_as_it_was_scored(ask, made):
    (text, answer), *_ = scored(made)
    code, out, err = ask("--run", "r", text)
    assert code == 0, err
    assert out == plain(answer.removeprefix(" ")) + "\n"
    assert "Question: TEXT" in err  # what is sent is said


def test_an_export_answers_as_its_run(ask):
    _, want, _ = ask("--run", "r", "2+3?")
    code, out, _ = ask("--model", "hub", "--task", "tiny-math", "2+3?")
    assert (code, out) == (0, want)
    code, plain, _ = ask("--model", "hub", "2+3?", "--max-new", 64)
    _, raw, _ = ask("--run", "r", "--raw", "2+3?", "--max-new", 64)
    assert code == 0 and plain == raw != want


def test_a_run_on_rows_of_ones_own_is_asked_in_their_form(ask, made, cli):
    rows = write_rows(made / "chats.jsonl", [{"messages": TURNS}] * 4)
    (made / "c.jinja").write_text(CHATML)
    flags = ["--template", "c.jinja", "--steps", 1, "--method", "lora", "--out", "chats"]
    assert cli("train.py", *small_run(made / "toy", rows, *flags))[0] == 0
    code, out, err = ask("--run", "chats", "3+4?")
    assert code == 0
    assert "sent as '<|user|>TEXT<|endoftext|>" in err
    (made / "c.jinja").rename(made / "moved.jinja")
    code, _, err = ask("--run", "chats", "3+4?")
    assert (code, err.count("\n")) == (2, 1)
    assert "c.jinja" in err and "path of a file" in err
    assert ask("--run", "chats", "--template", "moved.jinja", "3+4?")[:2] == (0, out)


@pytest.fixture(scope="module")
def pairs(made):
    """A run "pairs" in the folder `made`, on rows with prompt and completion."""
    rows = write_rows(made / "pairs.jsonl", [{"prompt": "3+4?", "completion": " 7"}] * 4)
    flags = ["--steps", 1, "--method", "lora", "--out", made / "pairs"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["train.py", *small_run(made / "toy", rows, *flags)])
        train.main()
    return made / "pairs"


def test_prompts_that_have_no_form_are_sent_as_they_are(ask, pairs):
    code, out, err = ask("--run", "pairs", "3+4?")
    assert (code, err.count("\n")) == (0, 1)
    assert "TEXT" not in err
    assert ask("--run", "pairs", "--raw", "3+4?")[:2] == (0, out)


@pytest.mark.parametrize("there", [True, False])
def test_an_older_run_on_own_rows_is_asked_and_says_what_it_lacks(there, ask, pairs, made):
    record = json.loads((pairs / "run.json").read_text())
    assert record.pop("fields") == ["prompt", "completion"]
    old = shutil.copytree(pairs, made / f"old-{there}")
    rows = record["data"] if there else str(made / "gone.jsonl")
    (old / "run.json").write_text(json.dumps(record | {"data": rows}))
    code, out, err = ask("--run", old, "3+4?")
    lacks, sent = err.splitlines()
    assert code == 0 and f"{old / 'run.json'}" in lacks and rows in lacks
    assert ("TEXT" in sent) == (not there)  # the task's form, if none is known
    if there:
        assert out == ask("--run", "pairs", "3+4?")[1]


@pytest.mark.parametrize("row", [[1, 2], {"foo": "a"}, {"prompt": "3+4?"}, "text"])
def test_an_older_run_whose_rows_are_others_now_takes_the_form_of_its_task(row, ask, pairs, made):
    record = json.loads((pairs / "run.json").read_text())
    old, rows = made / f"other-{type(row).__name__}-{len(row)}", made / "other.jsonl"
    shutil.copytree(pairs, old, dirs_exist_ok=True)
    rows.write_text(json.dumps(row) + "\n")
    del record["fields"]
    (old / "run.json").write_text(json.dumps(record | {"data": str(rows)}))
    code, _, err = ask("--run", old, "3+4?")
    lacks, sent = err.splitlines()
    assert code == 0 and str(rows) in lacks and "TEXT" in sent


def test_only_what_was_trained_on_unchanged_prompts_says_so(ask, made):
    (made / "bare.txt").write_text("{question}\n---\n{answer}\n")
    model = ["--model", "tiny", "--task", "tiny-math", "--template", "bare.txt"]
    code, _, err = ask(*model, "3+4?", "--max-new", 1)
    assert code == 0 and "training" not in err


def test_a_run_where_a_model_is_wanted_and_the_reverse_name_the_right_flag(ask, cli, made):
    assert cli("export.py", "--run", "r", "--format", "peft", "--out", "peft")[0] == 0
    for flag, path, want in (
        ("--model", "r", "--run r"),
        ("--model", "peft", "--run"),
        ("--model", "r/run.json", "folder"),
        ("--run", "toy", "--model"),
        ("--run", "hub", "--model"),
        ("--run", "peft", "peft is a PEFT adapter"),
        ("--run", "r/run.json", "folder"),
    ):
        code, out, err = ask(flag, path, "x")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert want in err and path in err


@pytest.mark.parametrize("family", HUB)
def test_a_checkpoint_of_each_family_answers(family, ask, tmp_path):
    hub = HUB[family] | {"vocab_size": 1024, "eos_token_id": 1023}
    folder = write_checkpoint(tmp_path / family, hub)
    code, out, err = ask("--model", folder, "abc")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "tokenizer" in err
    shutil.copy(ROOT / "tiny" / "tokenizer.json", folder)
    tokenizer, model = load_tokenizer(folder), MoEModel.from_pretrained(folder)
    want = tokenizer.decode(generate(model, [tokenizer.encode("abc")], 9, tokenizer.stops, 1)[0])
    code, out, err = ask("--model", folder, "abc", "--max-new", 9)
    assert (code, out) == (0, plain(want) + "\n"), err


def test_a_hundred_lines_are_answered_in_their_order_however_many_at_a_time(ask, made):
    lines = [ROWS[n % 20]["question"] for n in range(100)]
    typed = (
        "\ufeff" + "\r\n".join(lines) + "\n\n"
    )  # as Windows has them; an empty line is no prompt
    code, out, err = ask("--run", "r", "--max-new", 6, typed=typed)
    assert code == 0, err
    assert re.findall("(?m)^> (.*)$", out) == lines
    (made / "lines.txt").write_text(typed)
    for size in (1, 7):
        again = ask("--run", "r", "--max-new", 6, "--file", "lines.txt", "--batch-size", size)
        assert again[:2] == (0, out)
    first = ask("--run", "r", "--max-new", 6, lines[0])[1]
    assert out.startswith(f"> {lines[0]}\n{first}\n")


def test_the_line_ends_of_windows_are_no_part_of_a_prompt(ask):
    flags = ["--model", "toy", "--max-new", 4]
    assert ask(*flags, typed="ab\r\ncd\r\n") == ask(*flags, typed="ab\ncd")


def test_draws_depend_on_the_seed_and_on_the_place_of_a_prompt_alone(ask):
    flags = ["--run", "r", "--temperature", 2, "--max-new", 6]
    three, one = ask(*flags, typed="1+3?\n1+3?\n1+3?")[1], ask(*flags, "--seed", 2, "1+3?")[1]
    blocks = three.split("> 1+3?\n")[1:]
    assert len({*blocks}) == 3 and blocks[2] == one + "\n"
    assert ask(*flags, "--top-p", 1e-9, "1+3?")[1] == ask("--run", "r", "--max-new", 6, "1+3?")[1]


def test_the_base_stands_beside_the_tuned_model(ask):
    tuned = ask("--run", "r", "1+3?")[1]
    base = ask("--model", "toy", "--task", "tiny-math", "1+3?")[1]
    code, out, _ = ask("--run", "r", "--compare", "1+3?")
    assert (code, out) == (0, f"base:\n{base}tuned:\n{tuned}") and base != tuned


def test_the_experts_shown_are_those_that_the_tokens_visit(ask, made):
    code, out, _ = ask("--run", "r", "--show-experts", "--max-new", 3, "1+3?")
    assert code == 0 and "\x1b" not in out  # no terminal: no color
    _, table = out.split("token  ", 1)
    model, tokenizer, run = load_run(made / "r")
    prompt = tokenizer.encode("Question: 1+3?\nAnswer:")
    ids = prompt + generate(model, [prompt], 3, tokenizer.stops, 1)[0]
    _, routing = model(torch.tensor([ids]))
    hot = {int(layer): experts for layer, experts in run["adapted"].items()}
    want, marked = [], 0
    for at in range(len(ids)):
        for layer, r in routing.items():
            visited = r.expert_ids[0, at].tolist()
            want.append([layer, *(("*" if e in hot[layer] else "") + str(e) for e in visited)])
            marked += len({*visited} & {*hot[layer]})
    said = ask("--run", "r", "--max-new", 3, "1+3?")[1]
    assert table.endswith(f"\n{said}")  # at the end, where it is in sight
    *lines, total = table.removesuffix(said).splitlines()[1:]
    assert [line[17:].split() for line in lines] == [[*map(str, row)] for row in want]
    names = [line[:17].strip() for line in lines if line[:17].strip()]
    assert "".join(eval(name) for name in names) == tokenizer.decode(ids)
    assert 0 < marked < len(want) * 2
    assert total.startswith(f"{marked / len(want) / 2:.1%}") and "hot experts" in total

    plain = [*show_experts(model, tokenizer, ids, Marked("hot", hot), color=False)]
    colored = "\n".join(show_experts(model, tokenizer, ids, Marked.of(run), color=True))
    assert colored.count("\x1b[0m") == marked
    assert re.sub("\x1b\\[[0-9;]*m", "", colored) == "\n".join(plain)


def test_color_is_for_terminals_that_want_it(monkeypatch):
    for stdout, env, want in (
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ):
        with monkeypatch.context() as m:
            for name in ("NO_COLOR", "TERM"):
                m.delenv(name, raising=False)
            for name, value in env.items():
                m.setenv(name, value)
            m.setattr(sys, "stdout", stdout)
            assert has_colors() == want


def test_a_model_has_no_expert_to_mark(ask):
    code, out, _ = ask("--model", "toy", "--show-experts", "--max-new", 2, "abc")
    assert code == 0 and "layer" in out and "*" not in out


def test_in_a_terminal_prompts_are_asked_for(ask):
    too_long = "word " * 600
    want = ask("--run", "r", "1+3?")[1]
    code, out, err = ask("--run", "r", typed=Terminal(f"1+3?\n\n{too_long}\n1+3?\n"))
    assert code == 0
    assert out.count(want) == 2  # an empty line is passed over, a mistake is said, and it goes on
    assert err.count("error: your text has") == 1


@pytest.mark.parametrize(
    ("flags", "typed", "named"),
    [
        (["--run", "r", "word " * 600], "", "512"),
        (["--run", "r"], "1+3?\n" + "word " * 600, "line 2"),
        (["--run", "r", " \n"], "", "the prompt"),
        (["--run", "r"], "\n\n", "standard input"),
        (["--run", "r"], b"\xff\xfe1\x00", "UTF-8"),
        (["--run", "r", "--file", "none.txt"], "", "none.txt"),
        (["--run", "r", "a <|endoftext|> b"], "", "<|endoftext|>"),
        (["--run", "r", "--template", "alpaca", "x"], "", "alpaca"),
        (["--run", "r", "--seed", 3, "x"], "", "--temperature"),
        (["--run", "r", "--top-p", 0.5, "x"], "", "--temperature"),
        (["--run", "r", "--raw", "--task", "gsm8k", "x"], "", "--raw"),
        (["--model", "toy", "--template", "lori", "x"], "", "--task"),
        (["--model", "toy", "--compare", "x"], "", "--run"),
        (["--run", "r", "--file", "rows.jsonl", "x"], "", "--file"),
        (["--run", "toy", "x"], "", "run.json"),
        (["x"], "", "--run"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(flags, typed, named, ask):
    code, out, err = ask(*flags, typed=typed)
    err = "".join(line for line in err.splitlines(True) if not line.startswith("the text is sent"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert named in err


@pytest.mark.parametrize("how", ["Ctrl-C", slow("a closed pipe")])
def test_a_stop_in_the_middle_of_an_answer_is_quiet(how, made):
    (made / "many.txt").write_text("1+3?\n" * 2000)
    flags = ["--run", "r", "--max-new", "300", "--file", "many.txt", "--batch-size", "1"]
    asking = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *flags],
        cwd=made, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    try:
        assert asking.stdout.read(1) == b">"  # the first answer is under way
        if how == "Ctrl-C":
            asking.send_signal(signal.SIGINT)
        else:
            asking.stdout.close()
        err = asking.stderr.read().decode()
        assert asking.wait(60) == (130 if how == "Ctrl-C" else 141)
    finally:
        asking.kill()
    assert "Traceback" not in err and "error" not in err
    assert ("stopped" in err) == (how == "Ctrl-C")
