"""Rows, prompts, targets, and the batch of a step."""

import gzip
import json
import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import ROOT, write_rows

from moe_model import IGNORE
from plumbing.data import (
    FIELDS,
    TASKS,
    TEMPLATES,
    Encoded,
    Example,
    collate,
    encode,
    examples_of_step,
    idle_ranks,
    load_examples,
    micro_batches,
    steps_per_epoch,
)
from plumbing.downloads import Source
from plumbing.rows import read_rows
from plumbing.tokenizer import load_tokenizer

ROWS = [
    {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    {"question": "2+2?", "answer": "#### 4"},
]


def test_the_prompts_are_those_of_the_papers_and_harnesses(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    plain, lori = (load_examples("gsm8k", path, name)[0] for name in ("plain", "lori"))
    assert plain[:2] == ("Question: 1+1?\nAnswer:", " 1+1=2\n#### 2")
    ask = "Answer the above question. First think step by step and then answer the final number."
    # LoRI: two spaces
    assert lori[:2] == (f"1+1?\n{ask}\n", "1+1=<<1+1=2>>2\nThe final answer is:  2")
    with pytest.raises(ValueError, match="want one of plain, lori"):
        load_examples("gsm8k", path, "alpaca")


PROSE = "Below is an instruction that describes a task"
CONTEXT = ", paired with an input that provides further context"
END = ". Write a response that appropriately completes the request."
PAD = " " * 20


def test_only_calculator_notes_are_taken_out():
    answer = "8 >> 1 = <<8/2=4>>4, 1 << 3 = <<2*4=8>>8\n#### 8"
    want = " 8 >> 1 = 4, 1 << 3 = 8\n#### 8"
    assert TEMPLATES["math", "plain"]({"question": "", "answer": answer})[1] == want


@pytest.mark.parametrize("task", ["code", "safety"])
@pytest.mark.parametrize(
    ("template", "given", "prompt"),
    [
        ("alpaca", "", f"{PROSE}{END}\n\n### Instruction:\nDo\nit.\n\n### Response:\n"),
        (
            "alpaca",
            "x = 1\ny = 2",
            f"{PROSE}{CONTEXT}{END}\n\n### Instruction:\nDo\nit.\n\n"
            "### Input:\nx = 1\ny = 2\n\n### Response:\n",
        ),
        (
            "lori",
            "",
            f"{PROSE}{END} \n\n{PAD}### Instruction:\n{PAD}Do\nit.\n\n{PAD}### Response:\n{PAD}",
        ),
        (
            "lori",
            "x = 1\ny = 2",
            f"{PROSE}{CONTEXT}{END}\n\n{PAD}### Instruction:\n{PAD}Do\nit.\n\n"
            f"{PAD}### Input:\n{PAD}x = 1\ny = 2\n\n{PAD}### Response:\n{PAD}",
        ),
        ("bare", "", "Instruction: Do\nit.\nResponse:\n"),
        ("bare", "x = 1", "Instruction: Do\nit.\nInput: x = 1\nResponse:\n"),
    ],
)
def test_instruction_prompts_are_exact_to_the_byte(tmp_path, task, template, given, prompt):
    row = {"instruction": "Do\nit.", "input": given, "output": " done\n"}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    assert load_examples(task, path, template) == [(prompt, " done\n", row)]


@pytest.mark.parametrize("template", ["alpaca", "lori", "bare"])
@pytest.mark.parametrize("task", ["code", "safety"])
def test_an_input_that_is_null_or_absent_is_empty(tmp_path, task, template):
    row = {"instruction": "Do it.", "output": "done"}
    path = write_rows(tmp_path / "rows.jsonl", [row | {"input": ""}, row | {"input": None}, row])
    one, *others = load_examples(task, path, template)
    assert others == [one, one]


@pytest.mark.parametrize("row", [{"input": 5}, {"input": []}, {"input": False}, {"output": None}])
def test_what_is_neither_text_nor_absent_is_refused(tmp_path, row):
    rows = [{"instruction": "Do it.", "input": "", "output": "done"} | row]
    (name,) = row
    with pytest.raises(ValueError, match=f"row 1.*{name}"):
        load_examples("code", write_rows(tmp_path / "rows.jsonl", rows))


def test_rows_are_read_from_lines_lists_and_gz_alike(tmp_path):
    lines = write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    assert all(list(read_rows(p, FIELDS["math"])) == ROWS for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "rows.jsonl"),
        ("\n\n", "rows.jsonl"),
        ("[]", "rows.jsonl"),
        ('{"question": "a", "answer": "b"}\n{"question": "a"\n', "line 2"),
        ('{"question": "a", "answer": "b"}\n\n{"question": "a"}\n', "row 3.*'answer'"),
        ('{"question": "a", "answer": 3}', "row 1.*'answer'"),
        ('{"prompt": "a", "text of a row": "b"}', "prompt.*question, answer"),
        ('[{"question": "a", "answer": "b"}, 7]', "row 2.*'question'"),
        ("[1, 2", "rows.jsonl"),
        ("question,answer\n1,2\n", "line 1"),
        ("[" * 100_000, "rows.jsonl"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, text, says):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says):
        list(read_rows(tmp_path / "rows.jsonl", FIELDS["math"]))


def test_bytes_that_are_no_text_and_files_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "rows.gz").write_bytes(b"no gzip")
    for name in ("rows.jsonl", "rows.gz"):
        with pytest.raises(ValueError, match=name):
            list(read_rows(tmp_path / name, FIELDS["math"]))
    with pytest.raises(FileNotFoundError, match="absent"):
        list(read_rows(tmp_path / "absent", FIELDS["math"]))


def test_targets_are_the_answer_and_its_end_and_nothing_else():
    tokenizer = load_tokenizer(ROOT / "tiny")
    examples = [
        Example("Question: a\nAnswer:", " 12", {}),
        Example("Question: abc\nAnswer:", " 3", {}),
    ]
    batch = collate(encode(examples, tokenizer, 512))
    for row, example in enumerate(examples):
        prompt, answer = (
            tokenizer.encode(example.prompt),
            [*tokenizer.encode(example.answer), tokenizer.eos],
        )
        n = len(prompt) + len(answer) - 1
        assert batch.tokens[row, :n].tolist() == [*prompt, *answer][:-1]
        assert batch.real[row].sum() == n
        assert [t for t in batch.targets[row].tolist() if t != IGNORE] == answer
        # the last prompt token predicts the answer
        assert batch.targets[row, : len(prompt) - 1].eq(IGNORE).all()


def test_rows_beyond_the_context_are_counted_and_left_out_if_asked(capsys):
    tokenizer = load_tokenizer(ROOT / "tiny")
    rows = [Example(x, "d", {}) for x in ("a", "c" * 40, "b", "c" * 90, "c" * 60)]
    whole = encode(rows, tokenizer, 512)
    sizes = [len(e.ids) for e in whole]
    fits = max(sizes[0], sizes[2])
    with pytest.raises(ValueError) as refused:
        encode(rows, tokenizer, fits, drop_long=False)
    for said in (
        "3 of 5 rows",
        f"{fits} tokens",
        "row 2 ",
        "row 4 ",
        f"with {sizes[3]}",
        "--drop-long",
    ):
        assert said in str(refused.value)
    assert encode(rows, tokenizer, fits, drop_long=True) == [whole[0], whole[2]]
    assert "3 of 5 rows" in capsys.readouterr().out
    assert encode(rows, tokenizer, max(sizes)) == whole  # the longest just fits
    with pytest.raises(ValueError, match="5 of 5 rows"):
        encode(rows, tokenizer, 2, drop_long=True)
    assert encode(rows[:1], tokenizer, fits, drop_long=True) == whole[:1]
    assert capsys.readouterr().out == ""


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own():
    data = [Encoded([i], 0) for i in range(10)]
    per_epoch = steps_per_epoch(len(data), 4)
    assert per_epoch == 3
    epochs = [
        [
            e.ids[0]
            for step in range(3 * n, 3 * n + 3)
            for e in examples_of_step(data, step, 4, seed=0)
        ]
        for n in range(2)
    ]
    assert all(Counter(seen) == Counter(range(10)) for seen in epochs)
    assert epochs[0] != epochs[1]
    assert len(examples_of_step(data, 2, 4, seed=0)) == 2  # the last step takes what is left
    assert examples_of_step(data, 4, 4, seed=0) == examples_of_step(data, 4, 4, seed=0)
    assert examples_of_step(data, 4, 4, seed=0) != examples_of_step(data, 4, 4, seed=1)


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_ranks_with_padding_alone_are_told_of_if_a_smaller_size_helps(n_ranks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", f"{n_ranks}")

    def n_idle(data, size):
        idle = 0
        for rank in range(n_ranks):
            monkeypatch.setenv("RANK", f"{rank}")
            idle += not any(micro_batches(data, size))
        return idle

    for n in (1, 3, 5, 8, 32):
        data = [Encoded([1, 2, 3], 1)] * n
        idle = {size: n_idle(data, size) for size in range(1, n + 3)}
        for size, found in idle.items():
            said = idle_ranks(n, size)
            even = -(-n // n_ranks)  # of the sizes that take one round, the smallest
            assert bool(said) == (found > 0 and size > even)
            if said:
                assert f"{n_ranks - found} of {n_ranks} ranks" in said
                assert f"--micro-batch {even} " in said
                assert idle[even] <= found


def test_micro_batches_keep_every_example_and_group_like_lengths():
    lengths = torch.randint(5, 60, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    data = [Encoded(list(range(n)), 1) for n in lengths]
    groups = micro_batches(data, 8)
    assert sorted(len(e.ids) for g in groups for e in g) == sorted(lengths)
    assert all(len(g) == 8 for g in groups)
    unsorted = [data[i : i + 8] for i in range(0, 40, 8)]
    waste, before = (
        sum(8 * max(len(e.ids) for e in g) for g in gs) - sum(lengths) for gs in (groups, unsorted)
    )
    assert waste < before / 3


# ---- the built-in tasks --------------------------------------------------------------------------


def test_downloads_name_their_licence_and_a_checksum_or_a_commit_of_the_hub():
    sources = [source for task in TASKS.values() for source in (task.train, task.test) if source]
    downloads = [source for source in sources if source.is_download]
    assert len(downloads) >= 5
    for source in downloads:
        assert source.licence
        assert len(source.commit if source.repo else source.checksum) in (40, 64)


def test_a_download_is_checked_by_sha256_or_by_gits_id_of_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HELLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.jsonl").write_bytes(b"hello\n")
    git = "ce013625030ba8dba906f756967f9e9ca394464a"  # what `git hash-object` says of "hello\n"
    sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    for checksum in (git, sha):
        source = Source(f"file://{tmp_path}/x.jsonl", checksum, "ours, free")
        assert source.fetch().read_bytes() == b"hello\n"
        assert "licence: ours, free" in capsys.readouterr().out
        assert source.fetch() == source.cached()
        assert capsys.readouterr().out == ""  # the second time from the cache
    source = Source(f"file://{tmp_path}/x.jsonl", git)
    source.cached().write_bytes(b"hell")
    assert source.fetch().read_bytes() == b"hello\n"  # a damaged cache is fetched anew
    with pytest.raises(ValueError, match="checksum"):
        Source(f"file://{tmp_path}/x.jsonl", git[::-1]).fetch()


def test_a_download_that_cannot_be_had_says_what_to_do_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("HELLORA_CACHE", str(tmp_path))
    gone = Source("file:///nowhere/x.jsonl", "0" * 64, "MIT")
    with pytest.raises(OSError, match="--data FILE"):
        gone.fetch()
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="checksum"):
        Source(f"file://{tmp_path}/x.jsonl", "0" * 64, "MIT").fetch()
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]  # nothing half-written


# Ends that are spelt out.

EOT = "<|endoftext|>"


def chat_tokenizer(tmp_path, ends=(702, 700)):
    """One of Qwen's kind, whose texts end with <|im_end|> (702); generation stops at both."""
    fixture = ROOT / "tests" / "fixtures" / "tokenizers" / "qwen_like.json"
    shutil.copy(fixture, tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ends]}))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "answer", "end"),
    [
        ("1+1?", f" 2{EOT} and more", EOT),  # it would be learned in the middle of an answer
        ("1+1?", f" 2{EOT}", EOT),
        ("1+1?", f"{EOT}{EOT}", EOT),
        (f"What is {EOT}?", " an end", EOT),
        ("1+1?", " 2<|im_end|>3", "<|im_end|>"),
    ],
)
def test_a_row_that_spells_out_its_end_is_refused_by_its_number(prompt, answer, end, tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    sound = Example("Hi", " there", {})
    with pytest.raises(ValueError, match="row 2 of the data spells out") as caught:
        encode([sound, Example(prompt, answer, {})], tokenizer, 100)
    assert end in str(caught.value)


def test_the_embedded_models_end_is_refused_too():
    tokenizer = load_tokenizer(ROOT / "tiny")
    with pytest.raises(ValueError, match=f"row 1 of the data spells out '{re.escape(EOT)}'"):
        encode([Example("a", f"b{EOT}c", {})], tokenizer, 100)


def test_a_turns_end_may_stand_in_a_prompt(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    [encoded] = encode([Example(prompt, "2", {})], tokenizer, 100)
    assert encoded.ids[: encoded.n_prompt].count(702) == 1
    assert encoded.ids[encoded.n_prompt :].count(702) == 1 == encoded.ids[-1:].count(702)


def test_what_a_tokenizer_model_reads_as_text_is_learned_as_text(tmp_path):
    shutil.copy(
        ROOT / "tests" / "fixtures" / "tokenizers" / "mixtral_like.model",
        tmp_path / "tokenizer.model",
    )
    tokenizer = load_tokenizer(tmp_path)
    [encoded] = encode([Example("a</s>", " b</s> c", {})], tokenizer, 100)
    assert encoded.ids.count(tokenizer.eos) == 1 == encoded.ids[-1:].count(tokenizer.eos)
    assert tokenizer.decode(encoded.ids[:-1]) == "a</s> b</s> c"


def test_an_end_that_is_an_ordinary_piece_may_stand_in_a_text(tmp_path):
    # what a configuration's default makes of a tokenizer that it was not made for
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 35}))
    shutil.copy(ROOT / "tiny" / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("#") == [35]
    assert encode([Example("a", "# b", {})], tokenizer, 100)[0].ids.count(35) == 2
