"""The ids are those of HF tokenizers and sentencepiece, or the file is refused.

Golden ids prove the first everywhere. Where the two libraries are installed, they are asked
themselves. Longer comparisons, also on the real files, are run by hand:
`python -m tests.peers.compare_tokenizers`.
"""

import json
import random
import struct
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest

from plumbing.bpe import protobuf
from plumbing.tokenizer import load_tokenizer
from tests.peers.compare_tokenizers import fuzz_texts

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
TINY = Path(__file__).parent.parent / "tiny"
NAMES = [
    "olmo_like.json",
    "deepseek_like.json",
    "mixtral_like.model",
    "mixtral_like.json",
    "qwen_like.json",
]
ADDED = {
    "olmo_like.json": ["<|endoftext|>", "<|padding|>", "|||IP_ADDRESS|||", "|||PHONE_NUMBER|||"],
    "deepseek_like.json": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "÷", "ö", "ÿ"],
    "mixtral_like.model": ["<s>", "</s>", "<unk>"],
    "mixtral_like.json": ["<s>", "</s>", "<unk>"],
    "qwen_like.json": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"],
}


# Files: read, changed, written.


def read_fixture(name):
    """A fixture as data: tokenizer.json's content, or (fields, pieces) of a tokenizer.model."""
    if name == "mixtral_like.json":
        return sentencepiece_json()
    data = (FIXTURES / name).read_bytes()
    if name.endswith(".json"):
        return json.loads(data)
    fields = list(protobuf(data))
    settings = {number: dict(protobuf(value)) for number, value in fields if number in (2, 3)}
    return settings, [dict(protobuf(value)) for number, value in fields if number == 1]


def sentencepiece_json():
    """mixtral_like.model as transformers converts it: all splits of all pieces, best first."""
    _, pieces = read_fixture("mixtral_like.model")
    vocab = {piece[1].decode(): i for i, piece in enumerate(pieces)}
    score = {
        piece[1].decode(): struct.unpack("<f", piece[2])[0]
        for piece in pieces
        if piece.get(3, 1) == 1
    }
    longer = sorted((p for p in score if len(p) > 1), key=lambda p: (-score[p], -len(p)))
    merges = [
        [p[:i], p[i:]]
        for p in longer
        for i in range(1, len(p))
        if p[:i] in score and p[i:] in score
    ]
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name} | flags for i, name in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def message(fields):
    """A protobuf message of (number, value): int as varint, float as 4 bytes, bytes with length."""

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def field(number, value):
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    return b"".join(field(number, value) for number, value in fields)


def model_bytes(settings, pieces):
    """A tokenizer.model of these settings and pieces. A score may be a float."""
    rows = [
        (1, message((n, as_score(v) if n == 2 else v) for n, v in piece.items()))
        for piece in pieces
    ]
    return message(
        rows + [(number, message(fields.items())) for number, fields in settings.items()]
    )


def as_score(value):
    return value if isinstance(value, float) else struct.unpack("<f", value)[0]


def put(folder, content, config=None):
    """Write a dict as tokenizer.json, bytes as tokenizer.model, config.json. Returns `folder`."""
    folder.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        (folder / "tokenizer.model").write_bytes(content)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def fixture_folder(name, folder):
    content = (FIXTURES / name).read_bytes() if name.endswith(".model") else read_fixture(name)
    return put(folder, content)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def tokenizer(name, tmp_path):
    return load_tokenizer(fixture_folder(name, tmp_path))


def load(name, folder, config=None):
    put(
        folder,
        (FIXTURES / name).read_bytes() if name.endswith(".model") else read_fixture(name),
        config,
    )
    return load_tokenizer(folder)


def golden(name):
    rows = json.loads((FIXTURES / f"{name.split('.')[0]}.golden.json").read_text(encoding="utf-8"))
    # whose special tokens count in a text, unlike the model's golden ones
    in_json = name == "mixtral_like.json"
    return [
        (text, ids)
        for text, ids in rows
        if not (in_json and any(added in text for added in ADDED[name]))
    ]


# Ids and text.


def test_ids_are_the_golden_ones(name, tokenizer):
    rows = golden(name)
    assert len(rows) >= 180
    assert [tokenizer.encode(text) for text, _ in rows] == [ids for _, ids in rows]


def test_text_comes_back(name, tokenizer):
    as_read = {  # what a tokenizer cannot tell apart
        "olmo_like.json": lambda text: unicodedata.normalize("NFC", text),
        "deepseek_like.json": str,
        "mixtral_like.model": lambda text: text.replace("▁", " "),
        "mixtral_like.json": lambda text: text.replace("▁", " "),
        "qwen_like.json": lambda text: unicodedata.normalize("NFC", text),
    }[name]
    for text in [text for text, _ in golden(name)] + list(fuzz_texts(400, 1, ["é÷"])):
        assert tokenizer.decode(tokenizer.encode(text)) == as_read(text)


def test_ids_beyond_the_tokenizer_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("one two")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**9, -1]) == "one two"


def test_broken_utf8_decodes_to_the_replacement_character(tmp_path):
    tokenizer = load("deepseek_like.json", tmp_path)
    assert tokenizer.decode(tokenizer.encode("😀")[:-1]) == "\ufffd"


def test_lone_surrogates_are_replaced_not_fatal(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_long_runs_take_linear_time(tokenizer):
    for run in (" ", "\t", "\n", "a", "中", "\u3000"):
        # a quadratic regex would need hours
        assert len(tokenizer.encode(run * 100_000 + "x")) > 1000


def test_special_tokens_in_a_text_become_their_ids(name, tokenizer):
    added, before, after = ADDED[name][0], tokenizer.encode("ab"), tokenizer.encode("cd")
    ids = tokenizer.encode(f"ab{added}cd")
    if name == "mixtral_like.model":  # to sentencepiece they are text
        assert tokenizer.specials[added] not in ids
        assert tokenizer.decode(ids) == f"ab{added}cd"
    else:
        assert ids == [*before, tokenizer.specials[added], *after]


def test_normalising_does_not_reach_into_a_special_token(tmp_path):
    tokenizer = load("olmo_like.json", tmp_path)
    assert tokenizer.encode("<|endoftext|>\u0338")[0] == tokenizer.eos  # ">" + U+0338 would compose
    assert tokenizer.encode("a<|padding|>")[-1] == tokenizer.specials["<|padding|>"]


def test_olmo_cuts_runs_of_2_to_24_spaces_first(tmp_path):
    tokenizer = load("olmo_like.json", tmp_path)
    run = {n: tokenizer.encode(" " * n) for n in range(1, 60)}
    assert all(len(run[n]) == 1 for n in range(1, 25))
    assert run[49] == [*run[24], *run[24], *run[1]]
    assert tokenizer.encode(" " * 25 + "the") == [*run[24], *tokenizer.encode(" the")]
    assert tokenizer.encode("\t  \n") == [*tokenizer.encode("\t"), *run[2], *tokenizer.encode("\n")]


def test_the_longest_added_token_wins(tmp_path):
    file = read_fixture("olmo_like.json")
    flags = file["added_tokens"][0]
    file["added_tokens"] += [
        flags | {"id": 900, "content": "<a>"},
        flags | {"id": 901, "content": "<a>b"},
    ]
    tokenizer = load_tokenizer(put(tmp_path, file))
    assert tokenizer.encode("<a>b<a>") == [901, 900]
    assert tokenizer.vocab_size == 902


def test_pairs_in_the_merge_list_equal_strings(tmp_path):
    for name in ("olmo_like.json", "deepseek_like.json", "mixtral_like.json"):
        strings, pairs = read_fixture(name), read_fixture(name)
        as_pairs = [m.split(" ") if isinstance(m, str) else m for m in pairs["model"]["merges"]]
        strings["model"]["merges"], pairs["model"]["merges"] = (
            [" ".join(m) for m in as_pairs],
            as_pairs,
        )
        one, other = (
            load_tokenizer(put(tmp_path / "a", strings)),
            load_tokenizer(put(tmp_path / "b", pairs)),
        )
        assert all(one.encode(text) == other.encode(text) == ids for text, ids in golden(name))


def test_mixtral_has_the_same_ids_from_either_file(tmp_path):
    model = load("mixtral_like.model", tmp_path / "model")
    converted = load("mixtral_like.json", tmp_path / "json")
    texts = list(fuzz_texts(800, 2, ["  ", "\n\n"])) + [" " * n + "x" for n in range(1, 200)]
    assert all(model.encode(text) == converted.encode(text) for text in texts)
    assert model.stops == converted.stops


def test_runs_of_spaces_may_be_listed_in_either_order(tmp_path):
    # as transformers before 4.38 does. Since then it sorts equal scores by length
    file = sentencepiece_json()
    runs = [pair for pair in file["model"]["merges"] if not "".join(pair).strip("▁")]
    words = [pair for pair in file["model"]["merges"] if pair not in runs]
    assert len(runs) > len({"".join(pair) for pair in runs}) > 1
    file["model"]["merges"] = words + sorted(
        runs, key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True
    )
    newer, model = (
        load_tokenizer(put(tmp_path / "a", file)),
        load("mixtral_like.model", tmp_path / "b"),
    )
    texts = [
        before + " " * n + after
        for n in range(200)
        for before in ("", "x")
        for after in ("", "x", "\n", "def")
    ]
    assert all(newer.encode(text) == model.encode(text) for text in texts)


@pytest.mark.parametrize("name", ["olmo_like.json", "qwen_like.json", "deepseek_like.json"])
def test_the_model_file_wins_over_the_json(name, tmp_path, capsys):
    alone = load("mixtral_like.model", tmp_path / "alone")
    load("mixtral_like.model", tmp_path)
    capsys.readouterr()
    both = load(name, tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "tokenizer.json") in line
    assert "tokenizer.model" in line
    for text in ["<s>", "The cat  sat", *ADDED[name]]:
        assert both.encode(text) == alone.encode(text)
    assert (both.bos, both.eos, both.stops) == (alone.bos, alone.eos, alone.stops)


def test_the_pieces_are_those_of_the_model_file_if_both_are_there(tmp_path):
    file = sentencepiece_json()
    random.Random(0).shuffle(file["model"]["merges"])  # alone it is refused
    with pytest.raises(ValueError, match="apart from each other"):
        load_tokenizer(put(tmp_path, file))
    both = load("mixtral_like.model", tmp_path)
    alone = load("mixtral_like.model", tmp_path / "alone")
    texts = ["a <s> b</s>", *(text for text, _ in golden("mixtral_like.model"))]
    assert [both.encode(text) for text in texts] == [alone.encode(text) for text in texts]


def test_merges_are_those_of_plain_bpe(tmp_path):
    tokenizer, file = load("olmo_like.json", tmp_path), read_fixture("olmo_like.json")
    rank = {tuple(merge.split(" ")): n for n, merge in enumerate(file["model"]["merges"])}
    draw = random.Random(0)
    for _ in range(500):
        parts = draw.choices("aeinorstlh", k=draw.randint(1, 30))
        text = "".join(parts)
        while pairs := [(rank[p], i) for i, p in enumerate(pairwise(parts)) if p in rank]:
            at = min(pairs)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        assert tokenizer.encode(text) == [file["model"]["vocab"][part] for part in parts]


def test_what_a_split_leaves_over_is_a_piece(tmp_path):
    file = read_fixture("olmo_like.json")
    file["normalizer"], file["added_tokens"] = None, file["added_tokens"][-1:]
    file["model"]["vocab"] = {
        token: i for token, i in file["model"]["vocab"].items() if not 702 <= i <= 726
    }
    file["model"]["vocab"] = {token: i for token, i in file["model"]["vocab"].items() if i > 1}
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\p{L}+"},
        "behavior": "Isolated",
        "invert": False,
    }
    end = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, end]}
    tokenizer = load_tokenizer(put(tmp_path, file))
    texts = ["ab 12  cd!", "  12\n", "", "a", *fuzz_texts(300, 3, [])]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    peer = pytest.importorskip(
        "tokenizers", reason="the round trip above is checked, HF's ids are not"
    )
    encode = peer.Tokenizer.from_str(json.dumps(file)).encode
    assert all(
        tokenizer.encode(text) == encode(text, add_special_tokens=False).ids for text in texts
    )


# Special ids.


@pytest.mark.parametrize(
    ("name", "eos"),
    [
        ("olmo_like.json", 727),
        ("deepseek_like.json", 701),
        ("mixtral_like.model", 2),
        ("mixtral_like.json", 2),
        ("qwen_like.json", 700),
    ],
)
def test_what_ends_a_text_comes_from_the_names_of_the_family(name, eos, tmp_path):
    for config in (None, {}, {"eos_token_id": None, "pad_token_id": -1, "hidden_size": 8}):
        tokenizer = load(name, tmp_path, config)
        assert (tokenizer.eos, tokenizer.stops) == (eos, (eos,))


def test_what_config_json_says_goes_first(name, tmp_path):
    tokenizer = load(name, tmp_path, {"eos_token_id": [7, 2, 9]})
    assert (tokenizer.eos, tokenizer.stops) == (7, (7, 2, 9))
    assert load(name, tmp_path, {"eos_token_id": 8}).stops == (8,)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"eos_token_id": 100_000}, "eos_token_id is 100000: want"),
        ({"eos_token_id": [727, -1]}, "eos_token_id is .*: want"),
        ({"eos_token_id": "2"}, "eos_token_id is 2: want"),
        ({"eos_token_id": []}, "nothing ends a text: want"),
        ({"eos_token_id": True}, "eos_token_id is True: want"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5: want"),
        ([], "config.json: damaged"),
        (7, "config.json: damaged"),
    ],
)
def test_special_ids_that_cannot_be_are_refused(config, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        load("olmo_like.json", tmp_path, config)


def test_a_tokenizer_that_ends_no_text_is_refused(tmp_path):
    file = read_fixture("olmo_like.json")
    file["added_tokens"].pop()
    file["model"]["vocab"].pop("<|endoftext|>")
    with pytest.raises(ValueError, match="nothing ends a text: want eos_token_id"):
        load_tokenizer(put(tmp_path, file))
    assert load_tokenizer(put(tmp_path, file, {"eos_token_id": 1})).eos == 1


# Refusals.


def set_at(*path):
    """A change of a file: put the last item at the place that the ones before name."""
    *keys, last, value = path

    def change(file):
        for key in keys:
            file = file[key]
        file[last] = value

    return change


def swap_merges(file):
    merges = file["model"]["merges"]
    merges[3], merges[40] = merges[40], merges[3]


def lose_token_but_not_its_merge(file):
    file["model"]["vocab"].pop("Ġthe")


def add_token_without_merge(file):
    file["model"]["vocab"]["Ġwithoutanymerge"] = 5000


def add_token_that_merging_never_makes(file):
    # "e" + "s" joins first, so "re" + "s" is never seen. tiktoken would take "res" all the same.
    merges = [merge.replace(" ", "") for merge in file["model"]["merges"]]
    assert merges.index("es") < merges.index("re")
    assert "res" not in merges
    file["model"]["vocab"]["res"] = 5000
    file["model"]["merges"].append("re s")


def make_token_before_its_parts(file):
    file["model"]["vocab"] |= {"resin": 5000, "res": 5001}
    file["model"]["merges"] += ["res in", "r es"]


def lose_byte(file):
    file["model"]["vocab"].pop("Ď")  # a byte that begins no token


def give_two_tokens_one_id(file):
    file["model"]["vocab"]["a"] = file["model"]["vocab"]["b"]


def change_letters(file):
    split = file["pre_tokenizer"]["pretokenizers"][1]["pattern"]
    split["Regex"] = split["Regex"].replace("[A-Z", "[ A-Z")


def lose_a_split_of_a_piece(file):
    merges = file["model"]["merges"]
    twice = next(b for a, b in pairwise(merges) if "".join(a) == "".join(b))
    merges.remove(twice)


def part_the_merges_of_a_piece(file):
    merges = file["model"]["merges"]
    twice = next(b for a, b in pairwise(merges) if "".join(a) == "".join(b))
    merges.remove(twice)
    merges.append(twice)


split = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}
end = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def cut_by(*steps):
    return set_at("pre_tokenizer", {"type": "Sequence", "pretokenizers": list(steps)})


def cut_by_regex(regex):
    return cut_by(split | {"pattern": {"Regex": regex}}, end)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("olmo", set_at("model", "type", "WordPiece"), "WordPiece.*want BPE"),
        ("olmo", set_at("model", "dropout", 0.1), "dropout.*want BPE"),
        ("olmo", set_at("model", "end_of_word_suffix", "</w>"), "end_of_word_suffix.*want BPE"),
        ("olmo", set_at("normalizer", {"type": "Lowercase"}), "Lowercase.*want none, NFC"),
        ("olmo", set_at("normalizer", {"type": "NFKC"}), "NFKC.*want none, NFC"),
        ("olmo", swap_merges, "want a file as trained"),
        ("olmo", set_at("model", "merges", []), "want a file as trained"),
        ("olmo", lambda file: file["model"]["merges"].pop(100), "want a file as trained"),
        ("olmo", lambda file: file["model"]["merges"].append("t h"), "want a file as trained"),
        ("olmo", lose_token_but_not_its_merge, "damaged"),
        ("olmo", add_token_without_merge, "want a file as trained"),
        (
            "olmo",
            add_token_that_merging_never_makes,
            "token 5000, which its characters do not make",
        ),
        ("olmo", make_token_before_its_parts, "want a file as trained"),
        ("olmo", lambda file: file["model"].pop("merges"), "damaged.*merges"),
        ("olmo", set_at("model", "merges", 5, "a b c"), "damaged|too many"),
        ("olmo", set_at("model", "merges", 5, 17), "damaged"),
        ("olmo", lose_byte, "no token for the bytes"),
        ("olmo", give_two_tokens_one_id, "two tokens"),
        ("olmo", set_at("model", "vocab", "a", "1"), "want an integer for each"),
        ("olmo", set_at("model", "vocab", "a", -3), "damaged|want"),
        ("olmo", set_at("model", "vocab", "a", 2**40), "damaged|want"),
        ("olmo", set_at("model", "vocab", [1, 2]), "damaged"),
        (
            "olmo",
            set_at("added_tokens", 0, "lstrip", True),
            "added token .*want one that matches just its text",
        ),
        ("olmo", set_at("added_tokens", 0, "content", ""), "added token .*want"),
        ("olmo", set_at("added_tokens", 0, "id", 4), "added token .*want"),
        ("olmo", set_at("pre_tokenizer", None), "pre_tokenizer .*want GPT-2's"),
        ("olmo", set_at("pre_tokenizer", {"type": "Whitespace"}), "Whitespace.*want GPT-2's"),
        ("olmo", set_at("pre_tokenizer", "add_prefix_space", True), "pre_tokenizer .*want GPT-2's"),
        ("olmo", set_at("pre_tokenizer", "use_regex", False), "pre_tokenizer .*want GPT-2's"),
        ("olmo", cut_by(), "damaged"),
        ("olmo", cut_by(split), "pre_tokenizer .*want GPT-2's"),
        ("olmo", cut_by(split, split, end), "pre_tokenizer .*want GPT-2's"),
        ("olmo", cut_by(split | {"behavior": "Removed"}, end), "pre_tokenizer .*want GPT-2's"),
        ("olmo", cut_by(split | {"invert": True}, end), "pre_tokenizer .*want GPT-2's"),
        ("olmo", cut_by(split | {"pattern": {"String": " "}}, end), "damaged|want"),
        ("olmo", cut_by(split, end | {"use_regex": True}), "pre_tokenizer .*want GPT-2's"),
        ("olmo", cut_by_regex(r"\s+$|\S+"), "want none of"),
        ("olmo", cut_by_regex(r"\w+|\W"), "want none of"),
        ("olmo", cut_by_regex(r"\p{N}{1,3}+|."), "want none of"),
        ("olmo", cut_by_regex(r"a*"), "matches empty text"),
        ("olmo", cut_by_regex(r"(a"), "tokenizer.json: "),
        ("olmo", cut_by_regex(r"\p{Nonsense}"), "tokenizer.json: "),
        ("deepseek", change_letters, "other blanks than DeepSeek's"),
        (
            "deepseek",
            set_at("pre_tokenizer", "pretokenizers", 3, split),
            "other Splits than DeepSeek's",
        ),
        (
            "deepseek",
            set_at("pre_tokenizer", "pretokenizers", 5, "individual_digits", False),
            "want",
        ),
        ("mixtral", set_at("model", "byte_fallback", False), "pre_tokenizer .*want"),
        ("mixtral", set_at("pre_tokenizer", {"type": "Metaspace"}), "'Metaspace'.* want ▁ by"),
        ("mixtral", lambda file: file["model"]["vocab"].pop("<0x41>"), "damaged.*<0x41>"),
        ("mixtral", lose_a_split_of_a_piece, "1 pairs of tokens make a token but are no merges"),
        ("mixtral", part_the_merges_of_a_piece, "apart from each other"),
        (
            "mixtral",
            set_at("model", "vocab", "the▁", 9000),
            "want words in tokens of their own|are no merges",
        ),
    ],
)
def test_a_json_that_we_would_get_wrong_is_refused(name, change, complaint, tmp_path):
    file = read_fixture(f"{name}_like.json")
    change(file)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_tokenizer(put(tmp_path, file))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))


def piece(text, score, kind=1):
    return {1: text.encode(), 2: float(score), 3: kind}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda settings, pieces: settings[2].update({3: 1}), "model_type BPE"),
        (lambda settings, pieces: settings.pop(2), "model_type BPE"),
        (lambda settings, pieces: settings[2].update({24: 1}), "treat_whitespace_as_suffix"),
        (lambda settings, pieces: settings[2].update({35: 0}), "byte_fallback"),
        (lambda settings, pieces: settings[3].update({2: b"nfkc"}), "identity normalizer"),
        (lambda settings, pieces: settings[3].update({3: 0}), "add_dummy_prefix"),
        (lambda settings, pieces: settings[3].pop(4), "remove_extra_whitespaces"),
        (lambda settings, pieces: settings[3].update({5: 0}), "escape_whitespaces"),
        (lambda settings, pieces: pieces.append(piece("<tool>", 0, 4)), "user-defined or unused"),
        (lambda settings, pieces: pieces.append(piece("zq", float("nan"))), "score"),
        (lambda settings, pieces: pieces.append(piece("zq", as_score(pieces[300][2]))), "score"),
        (
            lambda settings, pieces: pieces.append(piece("a▁b", -5e4)),
            "want words in tokens of their own",
        ),
        (lambda settings, pieces: pieces.append(piece("zqzq", -5e4)), "do not merge|never"),
        (lambda settings, pieces: pieces.append(dict(pieces[300])), "pieces of the same text"),
        (lambda settings, pieces: pieces.append({2: 1.0}), "damaged"),
        (lambda settings, pieces: pieces.append({1: b"\xff\xfe", 2: 1.0}), "damaged"),
        (lambda settings, pieces: pieces.append({1: 5, 2: 1.0}), "damaged"),
        (lambda settings, pieces: pieces.clear(), "damaged"),
    ],
)
def test_a_model_that_we_would_get_wrong_is_refused(change, complaint, tmp_path):
    settings, pieces = read_fixture("mixtral_like.model")
    assert load_tokenizer(put(tmp_path, model_bytes(settings, pieces))).encode("The cat")
    change(settings, pieces)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_tokenizer(put(tmp_path, model_bytes(settings, pieces)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["olmo_like.json", "mixtral_like.model"])
def test_damaged_files_are_refused(name, tmp_path):
    data = (FIXTURES / name).read_bytes()
    draw = random.Random(0)
    cuts = [data[: draw.randrange(len(data))] for _ in range(40)]
    noise = [draw.randbytes(draw.randrange(1, 300)) for _ in range(60)]
    hostile = [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"7",
        b'"x"',
        b"\xef\xbb\xbf{}",
        b"[" * 10**5,
        b'{"a":' * 10**5,
    ]
    hostile += [b"\x80" * 10**6, b"\xff" * 10**6, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x00" * 10**4]
    hostile += [b'{"model": null, "added_tokens": null, "normalizer": null, "pre_tokenizer": null}']
    file = tmp_path / f"tokenizer{Path(name).suffix}"
    for content in [*cuts, *noise, *hostile]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer") as caught:
            load_tokenizer(tmp_path)
        assert type(caught.value) is ValueError
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_a_damaged_config_is_refused(tmp_path):
    load("olmo_like.json", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": ')
    with pytest.raises(ValueError, match=r"config\.json: damaged"):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    for folder in (tmp_path, tmp_path / "absent", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=f"no tokenizer in {folder}: want"):
            load_tokenizer(folder)


# The libraries themselves.


def assert_equal_to_peer(name, folder, count, seed):
    """The ids of `count` fuzz texts, but for those that HF's older Unicode reads otherwise."""
    tokenizer = load_tokenizer(folder)
    texts = list(fuzz_texts(count, seed, ADDED.get(name, ["<|endoftext|>"])))
    if name.endswith(".model"):
        peer = pytest.importorskip("sentencepiece", reason="golden ids cover this elsewhere")
        processor = peer.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        encode, decode = processor.encode, processor.decode
        assert all(decode(ids) == tokenizer.decode(ids) for ids in map(encode, texts[:2000]))
    else:
        peer = pytest.importorskip("tokenizers", reason="golden ids cover this elsewhere")
        library = peer.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if name in ("olmo_like.json", "qwen_like.json"):
            nfc = peer.normalizers.NFC().normalize_str
            texts = [text for text in texts if nfc(text) == unicodedata.normalize("NFC", text)]
            assert len(texts) > 0.99 * count

        def encode(text):
            return library.encode(text, add_special_tokens=False).ids

    different = [text for text in texts if tokenizer.encode(text) != encode(text)]
    assert not different


def test_fuzz_equals_the_libraries(name, tmp_path):
    assert_equal_to_peer(name, fixture_folder(name, tmp_path), 500, 10)


@pytest.mark.slow
def test_long_fuzz_equals_the_libraries(name, tmp_path):
    assert_equal_to_peer(name, fixture_folder(name, tmp_path), 20_000, 11)


def test_the_embedded_tokenizer_equals_the_library(tmp_path):
    tokenizer = load_tokenizer(TINY)
    texts = list(fuzz_texts(500, 12, ["<|endoftext|>"]))
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    assert_equal_to_peer("tiny", TINY, 1000, 13)
