"""What a folder's files mean together: pieces, added tokens, what begins and what ends a text.

The oracles are transformers' and tokenizers' reading of the same folder, where they are installed,
and the ids that the files themselves name.
"""

import json
import os
from pathlib import Path

import pytest
from test_tokenizer import FIXTURES, put, read_fixture

from plumbing.data import TASKS, encode, encode_prompt, load_examples
from plumbing.tokenizer import load_tokenizer
from tests.peers.compare_tokenizers import fuzz_texts

MODEL = (FIXTURES / "mixtral_like.model").read_bytes()
N = len(read_fixture("mixtral_like.model")[1])  # its pieces
MARKERS = {"<|im_end|>": N, "<|im_start|>": N + 1}
CHAT = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n12<|im_end|>"
OWN, CONFIG, GENERATION = "tokenizer_config.json", "config.json", "generation_config.json"


def added(text, i, **flags):
    """An added token as tokenizer.json lists it."""
    false = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, "special": True} | false | flags


def chat_json(**changes):
    """mixtral_like's tokenizer.json with the two markers of a chat."""
    file = read_fixture("mixtral_like.json")
    file["added_tokens"] += [added(text, i) for text, i in MARKERS.items()]
    return file | changes


def beside(folder, files):
    """Write {name: object} as JSON files. Returns the folder."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def library(folder):
    """`tokenizers` reading the folder's tokenizer.json."""
    peer = pytest.importorskip("tokenizers", reason="the ids that the file names are checked")
    found = peer.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: found.encode(text, add_special_tokens=False).ids


# Added tokens.

LISTS = {  # where a folder may list them
    "tokenizer.json": {"tokenizer.json": chat_json()},
    "tokenizer_config.json": {
        OWN: {"added_tokens_decoder": {str(i): added(text, i) for text, i in MARKERS.items()}}
    },
    "added_tokens.json": {"added_tokens.json": MARKERS},
    "all": {
        "tokenizer.json": chat_json(),
        OWN: {"added_tokens_decoder": {str(i): added(text, i) for text, i in MARKERS.items()}},
        "added_tokens.json": MARKERS,
    },
}


@pytest.mark.parametrize("listed", LISTS)
def test_added_tokens_count_beside_a_tokenizer_model(listed, tmp_path):
    folder = beside(put(tmp_path, MODEL, {"vocab_size": N + 2, "eos_token_id": N}), LISTS[listed])
    tokenizer, plain = load_tokenizer(folder), load_tokenizer(put(tmp_path / "plain", MODEL))
    ids = tokenizer.encode(CHAT)
    assert [i for i in ids if i >= N] == [N + 1, N, N + 1, N]
    assert len(ids) < len(plain.encode(CHAT))
    assert ids == load_tokenizer(put(tmp_path / "json", chat_json())).encode(CHAT)
    assert tokenizer.decode(ids).replace("> ", ">") == CHAT
    assert (tokenizer.eos, tokenizer.stops) == (N, (N,))
    # the tokens that the .model has itself are plain text, as in SentencePiece
    assert tokenizer.encode("a</s>") == plain.encode("a</s>")


def test_a_folder_with_both_files_has_transformers_ids(tmp_path):
    folder = put(put(tmp_path, MODEL), chat_json())
    theirs, ours = library(folder), load_tokenizer(folder)
    texts = [CHAT, *fuzz_texts(500, 21, [*MARKERS, " ", "\n"])]
    texts = [text for text in texts if not any(own in text for own in ("<s>", "</s>", "<unk>"))]
    assert [ours.encode(text) for text in texts] == [theirs(text) for text in texts]


def test_further_added_tokens_count_beside_a_tokenizer_json(tmp_path):
    more = {"added_tokens_decoder": {"800": added("<think>", 800), "700": added("<a>", 700)}}
    file = read_fixture("qwen_like.json")
    file["added_tokens"][0]["content"] = "<a>"  # listed twice, with one id
    folder = beside(put(tmp_path, file, {"eos_token_id": 702}), {OWN: more | {"eos_token": None}})
    file["added_tokens"].pop(3)  # its own <think>, 703
    put(tmp_path, file)
    assert load_tokenizer(folder).encode("<a>x<think>")[::2] == [700, 800]


def piece(i):
    return read_fixture("mixtral_like.model")[1][i][1].decode()


def other_piece(file):
    vocab = file["model"]["vocab"]
    vocab[piece(400)], vocab[piece(401)] = 401, 400


def one_piece_more(file):
    file["model"]["vocab"]["▁zzz"] = N + 2


def decoder(text, i):
    return {OWN: {"added_tokens_decoder": {str(i): added(text, i)}}}


@pytest.mark.parametrize(
    ("change", "files", "named"),
    [
        (lambda file: file["added_tokens"][3].update(id=5), {}, ["<|im_end|>", "tokenizer.json"]),
        (lambda file: file["added_tokens"][3].update(id=N + 1), {}, ["two tokens"]),
        (str, decoder("<|im_end|>", N + 7), ["<|im_end|>", "tokenizer.json", OWN]),
        (str, decoder("<other>", N), ["two tokens"]),
        (str, decoder("</s>", N + 2), ["</s>", "tokenizer.json", OWN]),
        (str, {"added_tokens.json": {"<|im_end|>": 4}}, ["<|im_end|>", "added_tokens.json"]),
        (str, {OWN: []}, [OWN]),
        (str, {OWN: {"added_tokens_decoder": {"x": {}}}}, ["tokenizer"]),
        (lambda file: file.update(normalizer={"type": "NFKC"}), {}, ["tokenizer.json", "NFKC"]),
        (
            str,
            {OWN: {"added_tokens_decoder": {"700": added("<m>", 700, lstrip=True)}}},
            [OWN, "<m>"],
        ),
        (lambda file: file["added_tokens"][3].update(rstrip=True), {}, ["tokenizer.json: added"]),
    ],
)
def test_files_of_two_tokenizers_are_refused_and_both_are_named(change, files, named, tmp_path):
    file = chat_json()
    change(file)
    folder = beside(put(put(tmp_path, MODEL), file), files)
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        load_tokenizer(folder)
    assert all(name in str(caught.value) for name in named), caught.value
    assert "\n" not in str(caught.value)


def unigram(file):
    file["model"] = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}


@pytest.mark.parametrize("change", [other_piece, one_piece_more, unigram])
def test_of_a_json_with_other_pieces_nothing_is_read_and_a_line_says_so(change, tmp_path, capsys):
    file = chat_json(post_processor=template("<s>", 1), normalizer={"type": "NFKC"})
    change(file)
    both = load_tokenizer(put(put(tmp_path, MODEL), file))
    load_tokenizer(tmp_path)  # as train.py, which reads it twice
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "tokenizer.json") in line
    assert "tokenizer.model" in line
    alone = load_tokenizer(put(tmp_path / "alone", MODEL))
    assert both.encode(CHAT) == alone.encode(CHAT)
    assert (both.bos, both.specials) == (alone.bos, alone.specials)
    assert capsys.readouterr().err == ""  # alone, and with the same pieces, nothing is said
    load_tokenizer(put(put(tmp_path / "same", MODEL), chat_json()))
    assert capsys.readouterr().err == ""


NAMED = [
    {"pad_token": "[PAD]"},
    {"unk_token": {"content": "[PAD]"}},
    {"additional_special_tokens": ["<|im_end|>", "[PAD]"]},
    {"extra_special_tokens": {"image_token": "[PAD]"}},
    {"extra_special_tokens": [{"content": "[PAD]"}], "added_tokens_decoder": {}},
]


@pytest.mark.parametrize("own", NAMED)
@pytest.mark.parametrize("content", [chat_json(), MODEL, read_fixture("qwen_like.json")])
def test_a_special_token_that_is_only_named_is_refused(own, content, tmp_path):
    """transformers would give it an id of its own, and have it count in a text."""
    if content is MODEL:
        own = {role: "[PAD]" for role in own if role != "added_tokens_decoder"}
    folder = beside(put(tmp_path, content), {OWN: own})
    with pytest.raises(ValueError, match=r"\[PAD\]") as caught:
        load_tokenizer(folder)
    assert str(folder / OWN) in str(caught.value)
    known = json.loads(json.dumps(own).replace("[PAD]", "<unk>" if content is MODEL else "<known>"))
    if content is not MODEL:
        content = json.loads(json.dumps(content))
        content["added_tokens"].append(added("<known>", 5000))
    load_tokenizer(beside(put(tmp_path, content), {OWN: known}))


# What ends a text.


def ends(own=None, config=None, generation=None):
    said = {OWN: ("eos_token", own), CONFIG: ("eos_token_id", config)}
    said[GENERATION] = ("eos_token_id", generation)
    return {name: {key: value} for name, (key, value) in said.items() if value is not None}


@pytest.mark.parametrize(
    ("files", "eos", "stops"),
    [
        (ends(), 700, (700,)),
        (ends(config=702), 702, (702,)),
        (ends(generation=[702, 700]), 702, (702, 700)),
        (ends(config=702, generation=[700, 702]), 702, (700, 702)),
        (ends(config=[700, 702], generation=702), 702, (702,)),
        (ends("<|im_end|>", [700, 702], [700, 702]), 702, (700, 702)),
        (ends({"content": "<|im_end|>"}, 702, [702, 700]), 702, (702, 700)),
        (ends("<|im_end|>"), 702, (702,)),
    ],
)
def test_what_ends_a_text_is_what_all_files_name_and_generation_stops_at_each(
    files, eos, stops, tmp_path
):
    folder = beside(put(tmp_path, read_fixture("qwen_like.json")), files)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos, tokenizer.stops) == (eos, stops)
    if GENERATION in files:
        transformers = pytest.importorskip("transformers", reason="the ids are checked above")
        asked = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        assert (tuple(asked) if isinstance(asked, list) else (asked,)) == stops


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (ends(config=700, generation=702), [CONFIG, GENERATION, "700", "702"]),
        (ends("<|im_end|>", config=700), [CONFIG, OWN, "700", "702"]),
        (ends("<|im_end|>", 700, [700, 702]), [CONFIG, OWN, GENERATION]),
        (ends(generation=[702, 5000]), [GENERATION, "5000"]),
        (ends(generation="702"), [GENERATION, "702"]),
        (ends("<no such token>"), [OWN, "<no such token>"]),
        (ends(["<|im_end|>"]), [OWN]),
    ],
)
def test_files_that_end_a_text_otherwise_are_refused_and_named(files, named, tmp_path):
    folder = beside(put(tmp_path, read_fixture("qwen_like.json")), files)
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        load_tokenizer(folder)
    assert all(name in str(caught.value) for name in named), caught.value


# What begins a text.


def template(name, i):
    """The post_processor that puts a token first. Without a name, one that puts none."""
    first = [{"SpecialToken": {"id": name, "type_id": 0}}] if name else []
    text, pair = ({"Sequence": {"id": part, "type_id": n}} for n, part in enumerate("AB"))
    ids = {name: {"id": name, "ids": [i], "tokens": [name]}} if name else {}
    single = [*first, text]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *first, pair],
        "special_tokens": ids,
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
DEEPSEEK = "<｜begin▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("family", "name", "processor", "own", "first"),
    [
        ("mixtral", "mixtral_like.json", template("<s>", 1), {}, 1),
        ("mixtral", "mixtral_like.json", template("<s>", 1), {"add_bos_token": True}, 1),
        (
            "deepseek",
            "deepseek_like.json",
            {"type": "Sequence", "processors": [BYTES, template(DEEPSEEK, 700)]},
            {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True},
            700,
        ),
        ("olmoe", "olmo_like.json", BYTES, {"add_bos_token": False}, None),
        ("olmoe", "olmo_like.json", template("", 0), {}, None),
        ("qwen3_moe", "qwen_like.json", BYTES, {"add_bos_token": False, "bos_token": None}, None),
    ],
)
def test_the_first_id_with_and_without_a_bos_is_that_of_transformers(
    family, name, processor, own, first, tmp_path
):
    file = read_fixture(name) | {"post_processor": processor}
    classes = {"olmoe": "GPTNeoXTokenizer", "qwen3_moe": "Qwen2Tokenizer"}
    own = {"tokenizer_class": classes.get(family, "LlamaTokenizer")} | own
    folder = beside(put(tmp_path, file, {"model_type": family}), {OWN: own})
    tokenizer = load_tokenizer(folder)
    text = "Question: 1+1?"
    with_bos, without = encode_prompt(text, tokenizer, "row 1"), tokenizer.encode(text)
    assert tokenizer.bos == first
    assert with_bos == ([] if first is None else [first]) + without
    transformers = pytest.importorskip("transformers", reason="the ids are checked above")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(text)["input_ids"] == with_bos
    assert theirs(text, add_special_tokens=False)["input_ids"] == without


@pytest.mark.parametrize(
    ("content", "own", "first"),
    [
        (MODEL, None, None),  # lone: so AutoTokenizer and LlamaTokenizer of transformers 5.23
        (MODEL, {}, None),
        (MODEL, {"add_bos_token": False, "bos_token": "<s>"}, None),
        (MODEL, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, 1),
        (MODEL, {"add_bos_token": True}, 1),
        (read_fixture("deepseek_like.json"), {"add_bos_token": True, "bos_token": DEEPSEEK}, 700),
        (read_fixture("qwen_like.json"), {"bos_token": "<|im_start|>"}, None),
    ],
)
def test_without_a_template_the_flag_says_whether_there_is_a_bos(content, own, first, tmp_path):
    # as transformers 4. transformers 5 looks at the flag only where there is no tokenizer.json
    folder = put(tmp_path, content)
    assert load_tokenizer(folder if own is None else beside(folder, {OWN: own})).bos == first


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"template": "bare"}, 1),
        ({"template": None}, 1),
        ({"template": "lori"}, None),
        ({"bos": None, "template": "bare"}, None),  # of a run from before there was a bos
        ({"bos": 5, "template": "lori"}, 5),
    ],
)
def test_a_runs_own_bos_comes_first_then_the_templates(settings, first, tmp_path):
    folder = beside(put(tmp_path, MODEL), {OWN: {"add_bos_token": True}})
    assert load_tokenizer(folder).bos == 1
    assert load_tokenizer(folder, settings).bos == first


@pytest.mark.parametrize(
    ("processor", "own", "named"),
    [
        (template("<s>", 1), {"add_bos_token": False}, ["add_bos_token", OWN, "tokenizer.json"]),
        (template("", 0), {"add_bos_token": True}, ["add_bos_token", OWN, "tokenizer.json"]),
        (template("<none>", 5000), {}, ["5000", "tokenizer.json"]),
        (BYTES, {"add_bos_token": "yes"}, ["add_bos_token", OWN]),
        (BYTES, {"add_bos_token": True, "bos_token": "<none>"}, ["bos_token", "<none>"]),
        ({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}, {}, ["BertProcessing"]),
    ],
)
def test_what_begins_a_text_is_refused_where_files_disagree(processor, own, named, tmp_path):
    file = read_fixture("mixtral_like.json") | {"post_processor": processor}
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        load_tokenizer(beside(put(tmp_path, file), {OWN: own}))
    assert all(name in str(caught.value) for name in named), caught.value


# The forms in which transformers 5 writes SentencePiece.


def metaspace(scheme):
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": step}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
FORMS = {
    "first": metaspace("first"),  # LlamaTokenizer
    "always": metaspace("always"),  # the same, legacy
    "never": metaspace("never"),  # the same, without add_prefix_space
    "replace": {"normalizer": {"type": "Sequence", "normalizers": [REPLACE]}},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_llama_class_saves_has_its_ids(form, tmp_path):
    file = chat_json(**FORMS[form])
    file["added_tokens"].append(added("<tool>", N + 2, normalized=True))
    folder = put(tmp_path, file)
    tokenizer, plain = load_tokenizer(folder), load_tokenizer(put(tmp_path / "plain", MODEL))
    prefix = form in ("first", "always")
    assert (tokenizer.encode("The cat") == plain.encode("The cat")) == prefix
    assert tokenizer.encode(" The cat") == plain.encode("The cat")  # one ▁, and no second
    behind = tokenizer.encode("<|im_end|>The cat")[1:]
    assert (behind == plain.encode("The cat")) == (form == "always")
    theirs = library(folder)
    texts = [*fuzz_texts(500, 22, [*MARKERS, "<tool>", "</s>", " ", "▁"]), "", " ", "▁", "  a"]
    assert [tokenizer.encode(text) for text in texts] == [theirs(text) for text in texts]


# An answer goes on from its prompt.

FAMILIES = ["olmo_like.json", "deepseek_like.json", "mixtral_like.model", "qwen_like.json"]


def family_folder(name, folder):
    return put(folder, MODEL if name.endswith(".model") else read_fixture(name))


def assert_rows_are_whole_texts(tokenizer, examples):
    """Prompt ids and answer ids are the ids of both as one text."""
    tokenizer.bos = None
    for example, encoded in zip(examples, encode(examples, tokenizer, 10**6), strict=True):
        assert encoded.ids[:-1] == tokenizer.encode(example.prompt + example.answer)
        assert encoded.ids[: encoded.n_prompt] == tokenizer.encode(example.prompt)


@pytest.mark.parametrize("template", ["plain", "lori"])
@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
def test_prompt_and_answer_have_the_ids_of_the_whole_text(name, template, tmp_path):
    if name in FORMS:
        folder = put(tmp_path, chat_json(**FORMS[name]))
    else:
        folder = family_folder(name, tmp_path)
    examples = load_examples("tiny-math", TASKS["tiny-math"].train.fetch(), template)[:200]
    assert_rows_are_whole_texts(load_tokenizer(folder), examples)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", ["The c", "a\n\n", "x  ", "1 +", "Hi<|im_"])
@pytest.mark.parametrize("answer", ["at sat", "\n  b", " 12", "end|>", "e"])
def test_prompt_and_answer_read_as_the_whole_text_wherever_they_meet(
    name, prompt, answer, tmp_path
):
    tokenizer = load_tokenizer(family_folder(name, tmp_path))
    ids = tokenizer.encode(prompt) + tokenizer.encode_answer(prompt, answer)
    assert tokenizer.decode(ids) == prompt + answer


@pytest.mark.parametrize("name", [*FAMILIES, *FORMS])
@pytest.mark.parametrize("answer", ["    return 1\n", " 12", "12", "", " ", "\treturn"])
def test_an_answer_comes_back_with_the_blanks_that_it_begins_with(name, answer, tmp_path):
    if name in FORMS:
        tokenizer = load_tokenizer(put(tmp_path, chat_json(**FORMS[name])))
    else:
        tokenizer = load_tokenizer(family_folder(name, tmp_path))
    prompt = "def one():\n"
    ids = tokenizer.encode_answer(prompt, answer)
    assert tokenizer.decode(ids, "inside") == answer
    assert tokenizer.decode(tokenizer.encode(prompt) + ids) == prompt + answer


def test_an_answer_behind_a_special_token_is_as_in_the_whole_text(tmp_path):
    tokenizer = load_tokenizer(put(tmp_path, chat_json()))
    prompt = CHAT.removesuffix("12<|im_end|>").removesuffix("\n").removesuffix("assistant")
    whole = tokenizer.encode(prompt + "yes")
    assert tokenizer.encode(prompt) + tokenizer.encode_answer(prompt, "yes") == whole


def all_of_gsm8k(template):
    """Its 8,792 rows, if they are on this machine."""
    sources = (TASKS["gsm8k"].train.cached(), TASKS["gsm8k"].test.cached())
    if not all(path.exists() for path in sources):
        pytest.skip("GSM8K is not in the cache: python train.py --task gsm8k puts it there")
    examples = [e for path in sources for e in load_examples("gsm8k", path, template)]
    assert len(examples) == 8792
    return examples


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "lori"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_of_gsm8k_has_the_ids_of_the_whole_text(name, template, tmp_path):
    assert_rows_are_whole_texts(
        load_tokenizer(family_folder(name, tmp_path)), all_of_gsm8k(template)
    )


@pytest.mark.slow
@pytest.mark.parametrize("template", ["plain", "lori"])
def test_all_of_gsm8k_has_them_with_the_real_tokenizers(template):
    place = os.environ.get("HELLORA_TOKENIZERS")
    if not place:
        pytest.skip("HELLORA_TOKENIZERS names no folder with a folder for each real tokenizer")
    examples = all_of_gsm8k(template)
    for folder in sorted({path.parent for path in Path(place).glob("*/tokenizer.*")}):
        assert_rows_are_whole_texts(load_tokenizer(folder), examples)
