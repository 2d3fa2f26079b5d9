"""Text <-> token ids, from a model's own files, on tiktoken.

All are byte-pair encodings (BPE): text is cut into pieces, a piece into characters, and of
neighbours the pair that stands first in the file's list of merges is joined, again and again.
Hugging Face (HF) joins listed pairs. tiktoken joins any two neighbours whose joint bytes are a
token, lowest rank first, and takes a piece that is a token whole. Both come to the same ids if
ranks follow the list and BPE, given a token's own characters, ends at that token: two neighbours
that could become t have felt nothing of what is around t, so they are the very pair listed for t.
Each file is checked for this, or refused. Families differ in data alone: how text is normalised,
how it is cut into pieces, and which bytes have which rank.

Several files of a folder may say the same thing. This is the one rule. transformers is 5.23.

1. Pieces and their ids: tokenizer.model if it is there, else tokenizer.json. Beside a .model, a
   tokenizer.json with other pieces is that of another tokenizer: it is not read for anything, and
   a line on stderr says so. (transformers would read that .json.)
2. How a blank becomes ▁: tokenizer.json if it is there, as in transformers.
3. Added tokens: all of tokenizer.json, and all of tokenizer_config.json's added_tokens_decoder. A
   folder without that decoder may have them in added_tokens.json. This is as in transformers. A
   token that is listed twice must have one id; the first list says how it is matched in a text.
   The tokens that a tokenizer.model has itself, such as </s>, are plain text in a text, as in
   SentencePiece. A token that tokenizer_config.json names elsewhere, such as its pad_token, must be
   one of all these: transformers would add another one.
4. What ends a text: eos_token of tokenizer_config.json, eos_token_id of config.json and of
   generation_config.json. Some may be absent. The others must have a token in common: it ends a
   training example. Generation stops at each id of generation_config.json, as transformers'
   generate does; if that file names none, at each id of config.json. If no file names a token, the
   first of EOS that is there is taken.
5. What begins a text: the template in tokenizer.json's post_processor, as in transformers. If there
   is none: add_bos_token of tokenizer_config.json, as in transformers 4 (5.23 ignores it where
   tokenizer.json is there). If both are there, they must agree. If neither is: nothing. So a lone
   tokenizer.model puts nothing first. Nor does transformers there, although it documents
   add_bos_token = True for Llama's class.

A folder whose files contradict each other otherwise is refused, with a line that names both files.
"""

import json
import re
import struct
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import groupby, pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, NamedTuple

import tiktoken

from plumbing import ranks

Vocab = dict[str, int]
Merges = list[tuple[str, str]]
# Where a part of a text stands: at its start, behind a special token, or where it goes on from
# another text.
Place = Literal["start", "behind", "inside"]
Shaper = Callable[[str, Place], str]  # a part, and where it stands -> its form

EOS = ("<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>")  # the families' names for what ends a text
BOS = ("<s>", "<｜begin▁of▁sentence｜>")  # and for what begins one
# What of tokenizer_config.json names special tokens, besides what begins and ends a text.
NAMING = (
    *("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)
# HF's ByteLevel
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SentencePiece does not cut, but no token reaches from one of these pieces into the next.
WORD_PIECES = "▁*[^▁]+|▁+"
LARGEST_FILE = 1 << 24  # bytes; the families' have 12 million at most
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
# (message, field) of sentencepiece_model.proto: its default, what we can follow, in words
MODEL_SETTINGS = {
    (2, 3): (1, 2, "model_type BPE"),
    (2, 24): (0, 0, "no treat_whitespace_as_suffix"),
    (2, 35): (0, 1, "byte_fallback"),
    (3, 2): (b"", b"", "an identity normalizer"),
    (3, 3): (1, 1, "add_dummy_prefix"),
    (3, 4): (1, 0, "no remove_extra_whitespaces"),
    (3, 5): (1, 1, "escape_whitespaces"),
}

# What reading trips over in a damaged file or none of this kind. What `want` refuses is a plain
# ValueError.
DAMAGE = (
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    struct.error,
    re.error,
)


class Bpe(NamedTuple):
    """Byte-pair encoding of text that is normalised and has no special token in it."""

    encoding: tiktoken.Encoding  # text -> ranks
    ids_of_rank: list[list[int]] | None  # None: a rank is the id
    token_bytes: dict[int, bytes]  # id -> what it decodes to

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        ranks = self.encoding.encode_ordinary(text)
        if self.ids_of_rank is None:
            return ranks
        return [i for rank in ranks for i in self.ids_of_rank[rank]]


class Tokenizer:
    """The ids that a model's own tokenizer gives, and back. Made by `load_tokenizer`."""

    bos: int | None  # stands before a prompt, see data.encode_prompt; None: nothing does
    eos: int  # ends a training example
    stops: tuple[int, ...]  # each ends generation
    text_ends: frozenset[int]  # special tokens that end a whole text
    turn_ends: frozenset[int]  # these, and those that end a turn of a chat

    def __init__(
        self, bpe: Bpe, normalise: Shaper, mark: Shaper, typed: Vocab, normal: Vocab, plain: Vocab
    ):
        """Special tokens, which no merge makes, are of three kinds.

        Those in `typed` count in the text as it is, those in `normal` in the normalised text, and
        those in `plain` not at all. mark: gives a part of normalised text the form that BPE wants.
        """
        self.bpe, self.normalise, self.mark = bpe, normalise, mark
        self.specials = plain | typed | normal
        self.split_typed, self.split_normal = splitter(typed), splitter(normal)
        self.token_bytes = bpe.token_bytes | {i: t.encode() for t, i in self.specials.items()}
        self.vocab_size = max(self.token_bytes) + 1  # the rows that an embedding needs
        self.has_prefix = mark(normalise("x", "start"), "start") == "▁x"

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos or eos. A special token spelt out becomes its id."""
        return self.encode_at("start", text)

    def encode_answer(self, prompt: str, answer: str) -> list[int]:
        """The ids of `answer` behind `prompt`: those of both as one text, cut at the border.

        SentencePiece would begin a text of its own with one more ▁. If a token of the whole text
        reaches over the border, they are those of the answer alone, without that ▁.
        """
        before, whole = self.encode(prompt), self.encode(prompt + answer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.encode_at("inside", answer)

    def encode_at(self, place: Place, text: str) -> list[int]:
        """The ids of a text that stands at `place`."""
        ids: list[int] = []
        for i, part in enumerate(self.split_typed(text)):  # special tokens are at the odd places
            at = "behind" if i else place
            pieces = ["", part] if i % 2 else self.split_normal(self.normalise(part, at))
            for j, piece in enumerate(pieces):
                if j % 2:
                    ids.append(self.specials[piece])
                else:
                    ids += self.bpe.encode(self.mark(piece, "behind" if j else at))
        return ids

    def decode(self, ids: Iterable[int], place: Place = "start") -> str:
        """The text of `ids`: special tokens by name, broken UTF-8 as U+FFFD, unknown ids left out.

        A model may sample such an id: OLMoE's embedding has 50,304 rows for 50,280 tokens. At the
        "start" of a text SentencePiece's first blank is no part of it. In what a model generates
        behind a prompt, "inside" a text, it is.
        """
        text = b"".join(self.token_bytes.get(i, b"") for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.has_prefix and place == "start" else text


# ---- a folder's files ----------------------------------------------------------------------------

FILE, MODEL = "tokenizer.json", "tokenizer.model"
OWN, CONFIG, GENERATION = "tokenizer_config.json", "config.json", "generation_config.json"
Files = dict[str, dict[str, Any]]  # name -> the object in it; {} if it is absent


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a model's folder. What its files mean together is said at the head.

    Raises FileNotFoundError if it has neither tokenizer.json nor tokenizer.model, ValueError for a
    damaged file, one that we would get wrong, or files that contradict each other.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (FILE, MODEL)):
        raise FileNotFoundError(
            f"no tokenizer in {folder}: want its tokenizer.json or tokenizer.model there"
        )
    names = (FILE, OWN, CONFIG, GENERATION, "added_tokens.json")
    files = {name: object_in(folder / name) for name in names}
    if (folder / MODEL).is_file():
        with blaming(folder / MODEL):
            bpe, pieces, plain = from_model(contents(folder / MODEL))
        if files[FILE]:
            leave_out_other_pieces(pieces | plain, files, folder)
        added = added_tokens(files, folder)
        with blaming(folder / FILE if files[FILE] else folder):
            tokenizer = beside_model(bpe, pieces, plain, files[FILE], added)
    else:
        added = added_tokens(files, folder)
        with blaming(folder / FILE):
            tokenizer = from_json(files[FILE], added)
    with blaming(folder / OWN):
        check_named(files[OWN], {token["content"] for token in added} | tokenizer.specials.keys())
    set_ends(tokenizer, files, folder)
    with blaming(folder / (OWN if files[OWN] else FILE)):
        tokenizer.bos = first_token(tokenizer, files)
    return tokenizer


def beside_model(
    bpe: Bpe, pieces: Vocab, plain: Vocab, file: dict[str, Any], added: list[dict[str, Any]]
) -> Tokenizer:
    """The tokenizer of a tokenizer.model, with what a tokenizer.json beside it says besides pieces.

    plain: the special tokens that the .model has itself. file: {} if there is no tokenizer.json.
    """
    check_ids(pieces | plain, added)
    normalise, mark = shapers_of(file) if file else (show_spaces, unchanged)
    more = [token for token in added if token["content"] not in plain]
    return Tokenizer(bpe, normalise, mark, *by_form(more, normalise), plain)


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Have what goes wrong end in a ValueError of one line that names `path`."""
    try:
        yield
    except (ValueError, *DAMAGE) as fault:
        reason = " ".join(str(fault).split())[:300]
        if type(fault) is not ValueError:
            kind = type(fault).__name__
            reason = f"damaged, or of a form that is not read here ({kind}: {reason})"
        raise ValueError(f"{path}: {reason}") from fault


def contents(path: Path) -> bytes:
    """The bytes of a file that is not too large for a tokenizer."""
    size = path.stat().st_size
    want(size <= LARGEST_FILE, f"{size:,} bytes: want a tokenizer of at most {LARGEST_FILE:,}")
    return path.read_bytes()


def object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    with blaming(path):
        found = json.loads(contents(path))
        if not isinstance(found, dict) or not (found or path.name != FILE):
            raise TypeError(f"{short(found)} is no object with a tokenizer or settings")
    return found


def want(fact: object, complaint: str) -> None:
    """Refuse the file unless `fact` holds."""
    if not fact:
        raise ValueError(complaint)


def lists_of_added(files: Files, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{file: the added tokens that it lists}."""
    decoder = files[OWN].get("added_tokens_decoder")
    with blaming(folder / OWN):
        own = [token | {"id": int(i)} for i, token in (decoder or {}).items()]
    more = files["added_tokens.json"].items() if decoder is None else ()
    return {
        FILE: files[FILE].get("added_tokens", []),
        OWN: own,
        "added_tokens.json": [{"content": text, "id": i} for text, i in more],
    }


def added_tokens(files: Files, folder: Path) -> list[dict[str, Any]]:
    """The added tokens of all files, each once: what the first file says of one, and its name."""
    found: dict[str, dict] = {}
    for name, tokens in lists_of_added(files, folder).items():
        with blaming(folder / name):
            for token in tokens:
                add_token(found, token, name)
    return [*found.values()]


def add_token(found: dict[str, dict], token: dict[str, Any], name: str) -> None:
    """Put an added token of the file `name` into `found`, unless an earlier file lists it."""
    first = found.setdefault(token["content"], token | {"file": name})
    want(
        first["id"] == token["id"],
        f"{token['content']!r} has id {first['id']} in {first['file']}, {token['id']} in "
        f"{name}: want the files of one model",
    )
    exact = token["content"] and not any(map(token.get, ("lstrip", "rstrip", "single_word")))
    want(
        exact or first["file"] != name,
        f"added token {token}: want one that matches just its text",
    )


def check_named(own: dict[str, Any], known: set[str]) -> None:
    """Refuse a tokenizer_config.json that names a special token which is none of the `known`."""
    for role in NAMING:
        names = own.get(role) or []
        if isinstance(names, dict) and "content" not in names:  # {role of the model's own: token}
            names = [*names.values()]
        for name in names if isinstance(names, list) else [names]:
            text = name["content"] if isinstance(name, dict) else name
            want(
                text in known,
                f"{role} names {text!r}, which is no special token of the tokenizer: want one that "
                f"{FILE} or added_tokens_decoder lists",
            )


def by_form(added: list[dict[str, Any]], normalise: Shaper) -> tuple[Vocab, Vocab]:
    """Added tokens that count in a text as it is, and those that count in the normalised text."""
    typed = {token["content"]: token["id"] for token in added if not token.get("normalized")}
    normal = {
        normalise(token["content"], "behind"): token["id"]
        for token in added
        if token.get("normalized")
    }
    return typed, normal


def check_ids(vocab: Vocab, added: list[dict[str, Any]]) -> None:
    """Refuse added tokens that have an id of another token, or another one than in `vocab`."""
    for token in added:
        text, i, name = token["content"], token["id"], token["file"]
        want(
            vocab.get(text, i) == i,
            f"added token {text!r} has id {i} in {name}, {vocab.get(text)} in the vocabulary: "
            "want the vocabulary's id",
        )
    ids = vocab | {token["content"]: token["id"] for token in added}
    want(
        all(type(i) is int for i in ids.values()),
        "ids that are no integers: want an integer for each",
    )
    n_with = Counter(ids.values())
    shared = [text for text, i in ids.items() if n_with[i] > 1]
    want(not shared, f"an id of two tokens, {shared[:2]}: want one for each")


def leave_out_other_pieces(pieces: Vocab, files: Files, folder: Path) -> None:
    """Empty what was read of tokenizer.json if it has other `pieces` than tokenizer.model.

    An added token may stand among the pieces of the .json.
    """
    lists = lists_of_added(files, folder).values()
    with blaming(folder):
        added = {token["content"]: token["id"] for tokens in lists for token in tokens}
    with blaming(folder / FILE):
        vocab = dict(files[FILE]["model"]["vocab"])  # one that is not BPE may list pairs
        text_of = {i: text for text, i in [*added.items(), *vocab.items()]}
    other = [text for text, i in pieces.items() if text_of.get(i) != text]
    other += sorted(vocab.keys() - pieces.keys() - added.keys())
    if other:
        files[FILE] = {}
        say_once(
            f"{folder / FILE} is not read: {len(other)} pieces, such as {other[0]!r}, are not the "
            f"same in {MODEL}, which is read"
        )


@cache
def say_once(line: str) -> None:
    """A line on stderr, from rank 0; nothing if it was said before: a command may read twice."""
    if not ranks.rank():
        print(line, file=sys.stderr)


def set_ends(tokenizer: Tokenizer, files: Files, folder: Path) -> None:
    """Fill in eos, stops, text_ends and turn_ends."""
    said = {}  # file -> the ids that end a text by what it says
    for file in (OWN, CONFIG, GENERATION):
        with blaming(folder / file):
            if ids := ends_by(file, tokenizer, files):
                said[file] = ids
    family = [tokenizer.specials[name] for name in EOS if name in tokenizer.specials]
    with blaming(folder / CONFIG):
        rows, last = files[CONFIG].get("vocab_size"), tokenizer.vocab_size - 1
        want(
            not rows or last < rows,
            f"vocab_size is {rows}, but the tokenizer has ids up to {last}: "
            "want files of one model",
        )
        want(said or family, f"nothing ends a text: want eos_token_id here or a token of {EOS}")
    lists = [*said.values()] or [family[:1]]
    common = [i for ids in lists for i in ids if all(i in other for other in lists)]
    with blaming(folder):
        ends = ", ".join(f"{ids} in {file}" for file, ids in said.items())
        want(common, f"what ends a text is {ends}: want a token that all of them name")
    tokenizer.eos = common[0]
    tokenizer.stops = tuple(said.get(GENERATION) or said.get(CONFIG) or common[:1])
    special = frozenset(tokenizer.specials.values())
    tokenizer.text_ends = special.intersection(family or common[:1])
    tokenizer.turn_ends = special.intersection([*family, *tokenizer.stops])


def ends_by(file: str, tokenizer: Tokenizer, files: Files) -> list[int] | None:
    """The ids that end a text by what one file says; None if it says nothing."""
    if file == OWN:
        name = files[OWN].get("eos_token")
        return None if name is None else [id_of(tokenizer, name, "eos_token")]
    said = files[file].get("eos_token_id")
    if said is None:
        return None
    ids = said if isinstance(said, list) else [said]
    want(ids, "eos_token_id is [], so nothing ends a text: want one or more, or null")
    known = all(type(i) is int and i in tokenizer.token_bytes for i in ids)
    want(
        known,
        f"eos_token_id is {said}: want ids that the tokenizer has, below {tokenizer.vocab_size}",
    )
    return ids


def id_of(tokenizer: Tokenizer, name: str | dict[str, Any], role: str) -> int:
    """The id of a token that tokenizer_config.json names as its `role`."""
    text = name["content"] if isinstance(name, dict) else name
    if text in tokenizer.specials:
        return tokenizer.specials[text]
    ids = tokenizer.encode(text)
    want(len(ids) == 1, f"{role} is {text!r}, which is no token of the tokenizer: want one")
    return ids[0]


def first_token(tokenizer: Tokenizer, files: Files) -> int | None:
    """The id that these files put before a text; None if they put none."""
    template = first_of_template(files[FILE].get("post_processor"))
    asked = files[OWN].get("add_bos_token")
    want(asked in (None, True, False), f"add_bos_token is {asked!r}: want true or false")
    if template is not None:
        known = all(i in tokenizer.token_bytes for i in template)
        want(known, f"the post_processor of {FILE} puts {template} first: want a token's id")
        want(
            asked in (None, bool(template)),
            f"add_bos_token is {asked} in {OWN}, but the post_processor of {FILE} puts "
            f"{template or 'nothing'} first: want the same in both",
        )
        return template[0] if template else None
    if not asked:
        return None
    if (name := files[OWN].get("bos_token")) is not None:
        return id_of(tokenizer, name, "bos_token")
    named = [tokenizer.specials[name] for name in BOS if name in tokenizer.specials]
    want(named, f"add_bos_token is true, but there is no bos_token: want one, such as {BOS[0]}")
    return named[0]


def first_of_template(processor: dict[str, Any] | None) -> list[int] | None:
    """The id that an HF post_processor puts before a text, or [] if it puts none there.

    None if it has no template, and so says nothing.
    """
    if processor is None or processor["type"] == "ByteLevel":
        return None
    if processor["type"] == "Sequence":
        found = [first_of_template(part) for part in processor["processors"]]
        return next((first for first in found if first is not None), None)
    want(
        processor["type"] == "TemplateProcessing",
        f"post_processor {processor['type']}: want ByteLevel, TemplateProcessing or none",
    )
    ids: list[int] = []
    for part in processor["single"]:
        if "Sequence" in part:
            break
        ids += processor["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    want(len(ids) < 2, f"the post_processor puts {ids} first: want at most one token there")
    return ids


def splitter(tokens: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that cuts text at `tokens`, leftmost first, then longest, as HF does.

    In what it returns the tokens are at the odd places.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})").split


# ---- the form of a text --------------------------------------------------------------------------


def unchanged(text: str, _place: Place) -> str:
    """The text itself."""
    return text


def nfc(text: str, _place: Place) -> str:
    """Composed characters. HF has Unicode 9 here: it may order marks that are younger otherwise.

    In Python 3.11 these are 98.
    """
    return unicodedata.normalize("NFC", text)


def show_spaces(text: str, place: Place) -> str:
    """SentencePiece's form of a text: ▁ for a space, and one before the first word.

    Source: HF's Prepend and Replace. They put one behind each special token as well.
    """
    prefix = "▁" if text and place != "inside" else ""
    return prefix + text.replace(" ", "▁")


def metaspace(scheme: str, text: str, place: Place) -> str:
    """▁ for a space, and one before a text that has none. Source: HF's Metaspace without split.

    scheme: "first" is for a text's start, "always" also behind special tokens, "never" not at all.
    """
    text = text.replace(" ", "▁")
    wanted = {"first": place == "start", "always": place != "inside", "never": False}[scheme]
    return "▁" + text if wanted and text and not text.startswith("▁") else text


PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
NORMALISERS: list[tuple[Any, Shaper]] = [
    (None, unchanged),
    ({"type": "Sequence", "normalizers": []}, unchanged),  # DeepSeek
    ({"type": "NFC"}, nfc),  # OLMo, Qwen
    ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, show_spaces),  # Mixtral
    ({"type": "Sequence", "normalizers": [REPLACE]}, partial(metaspace, "never")),
    (REPLACE, partial(metaspace, "never")),
]


def shapers_of(file: dict[str, Any]) -> tuple[Shaper, Shaper]:
    """The normaliser of a tokenizer.json, and what marks spaces behind it."""
    spec, step = file["normalizer"], file["pre_tokenizer"]
    normalise = next((function for known, function in NORMALISERS if known == spec), None)
    want(
        normalise,
        f"normalizer {short(spec)}: want none, NFC, Prepend and Replace of ▁, or Replace alone",
    )
    if not file["model"].get("byte_fallback"):
        return normalise, unchanged
    if step is None and normalise not in (unchanged, nfc):
        return normalise, unchanged
    step = step or {}
    scheme = step.get("prepend_scheme")
    plain = (step.get("type"), step.get("replacement"), step.get("split")) == (
        "Metaspace",
        "▁",
        False,
    )
    want(
        plain and scheme in ("first", "always", "never") and normalise is unchanged,
        f"byte_fallback with normalizer {short(spec)} and pre_tokenizer {short(step)}: want ▁ by "
        "Prepend and Replace, by Replace, or by a Metaspace that does not split",
    )
    return normalise, partial(metaspace, scheme)


# ---- tokenizer.json ------------------------------------------------------------------------------


def from_json(file: dict[str, Any], added: list[dict[str, Any]]) -> Tokenizer:
    """The tokenizer in a tokenizer.json: over bytes, or SentencePiece as transformers has it."""
    model = file["model"]
    unlike = [
        key
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    want(
        model["type"] == "BPE" and not unlike,
        f"model {model['type']} {unlike}: want BPE without these",
    )
    normalise, mark = shapers_of(file)
    check_ids(model["vocab"], added)
    texts = {token["content"] for token in added}
    vocab = {token: i for token, i in model["vocab"].items() if token not in texts}
    merges = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]
    if model.get("byte_fallback"):
        byte_ids = [vocab.pop(f"<0x{byte:02X}>") for byte in range(256)]
        bpe = sentencepiece(vocab, merge_order(vocab, merges), byte_ids)
    else:
        bpe = byte_level(vocab, merges, piece_regex(file["pre_tokenizer"] or {"type": None}))
    return Tokenizer(bpe, normalise, mark, *by_form(added, normalise), {})


def byte_level(vocab: Vocab, merges: Merges, regex: str) -> Bpe:
    """BPE over bytes, which the file writes as printable characters; its ids serve as ranks."""
    check_merges(vocab, merges)
    printable = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # these bytes are written as they are,
    others = [
        byte for byte in range(256) if byte not in printable
    ]  # and these as the characters from 256 on
    byte_of = {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }
    token_bytes = {i: bytes(map(byte_of.__getitem__, token)) for token, i in vocab.items()}
    ranks = {token: i for i, token in token_bytes.items()}
    absent = [
        byte for byte in range(256) if byte not in NEVER_IN_UTF8 and bytes([byte]) not in ranks
    ]
    want(not absent, f"no token for the bytes {absent}: want one for each byte of UTF-8")
    encoding = tiktoken.Encoding("bytes", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    return Bpe(encoding, None, token_bytes)


def check_merges(vocab: Vocab, merges: Merges) -> None:
    """Refuse merges that tiktoken would not follow to the letter. The head of this file says why.

    BPE on the characters of left + right ends with this merge if it joined nothing across their
    border before. So time runs backwards there: of the two neighbours the younger is undone, and
    the pair that then meets must not have been due before it.
    """
    characters = [i for token, i in vocab.items() if len(token) == 1]
    triples = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
    one_each = len(vocab) == len(characters) + len(merges)
    want(one_each, "merges that are not one for each longer token: want a file as trained")
    last = max(characters)
    news = [new for _, _, new in triples]
    rising = all(a < b for a, b in pairwise([last, *news])) and all(
        max(triple) == triple[2] for triple in triples
    )
    want(
        rising,
        "ids that do not rise from the characters on down the merges: want a file as trained",
    )
    made = {(left, right): new for left, right, new in triples}
    left_of, right_of = (
        {new: left for left, _, new in triples},
        {new: right for _, right, new in triples},
    )
    for left, right, new in triples:
        while left > last or right > last:
            if left > right:
                due, left = left, right_of[left]
            else:
                due, right = (
                    right + 1,
                    left_of[right],
                )  # + 1: of equal pairs the leftmost is due first
            if made.get((left, right), due) < due:
                raise ValueError(
                    f"token {new}, which its characters do not make: want a file as trained"
                )


def piece_regex(pre_tokenizer: dict[str, Any]) -> str:
    """The regex whose matches are the pieces that an HF pre_tokenizer makes."""
    steps = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    kinds = [step["type"] for step in steps]
    splits = [step for step in steps if step.get("behavior") == "Isolated" and not step["invert"]]
    regexes = [split["pattern"]["Regex"] for split in splits]
    layout = (
        kinds,
        len(splits),
        steps[-1].get("use_regex", True),
        steps[-1].get("add_prefix_space"),
    )
    if layout == (["ByteLevel"], 0, True, False):
        return GPT2_PIECES
    if layout == (["Split", "ByteLevel"], 1, False, False):
        return covering_regex(*regexes)
    six = (["Split"] * 5 + ["Digits", "ByteLevel"], 5, False, False)
    want(
        layout == six,
        f"pre_tokenizer {kinds}: want GPT-2's, one Split before ByteLevel, or DeepSeek's six",
    )
    want(steps[5]["individual_digits"], "Digits in groups: want DeepSeek's, one by one")
    return deepseek_regex(regexes)


def covering_regex(regex: str) -> str:
    """The regex of a Split, and one more for what it leaves over.

    That is a piece in HF, but tiktoken would drop it.
    """
    # Without what means the same in HF and in tiktoken:
    bare = re.sub(r"\\(?:[pP]\{\w+\}|[sSdDrnt]|\W)", "x", regex)
    bare = re.sub(r"\[[^\[\]]+\]", "x", bare)
    alike = not re.search(r"[\\^$.\[]|\}\+|\(\?(?![:=!]|i:)", bare)
    want(
        alike,
        f"regex {regex[:80]}: want none of \\w \\b ^ $ . {{}}+, where HF and tiktoken may differ",
    )
    want(
        not re.match(bare, ""), f"regex {regex[:80]} matches empty text: want a character at least"
    )
    return f"{regex}|(?:(?!{regex})(?s:.))+"


def deepseek_regex(regexes: list[str]) -> str:
    r"""DeepSeek's successive splits as one regex.

    They are `[\r\n]`, `\s?[L]+`, `\s?[P]+`, `\s+$`, `[K]+`, and each digit.

    Each also cuts the pieces of those before it, and the classes overlap: P (marks) has a-z in it,
    K (wide characters) letters, marks and blanks, and the ideographic blank T is in P and in K. So
    no piece crosses the border of K, and a blank stays with the letters or marks behind it only if
    both are in K or neither.
    """
    group = r"(\[(?:(?!&&|--|~~)[^\[\]\\^])+\])"  # with nothing that Rust reads as an operator
    shape = rf"\[\r\n\] \\s\?{group}\+ \\s\?{group}\+ \\s\+\$ {group}\+"
    found = re.fullmatch(shape, " ".join(regexes))
    want(found, "other Splits than DeepSeek's: want those of its own file")
    L, P, K = found.groups()
    blanks = "".join(filter(str.isspace, map(chr, range(0x3001))))
    held = (re.findall(L, blanks), re.findall(P, blanks)) == ([], ["\u3000"]) and re.match(
        K, "\u3000"
    )
    want(held, "Splits with other blanks than DeepSeek's: want those of its own file")
    T = r"\x{3000}"
    S = rf"[\s--[\r\n{T}]]"  # the other blanks; in Rust `--` takes away, `&&` intersects
    narrow, broad = f"[{S}--{K}]", f"[{S}&&{K}]"  # blanks outside K and in it
    inside = rf"(?={S}*[^{S}\r\n{L}{P}])"  # behind it comes neither letter nor mark
    # the end, or one more blank and a word
    ending = rf"(?={S}*(?:\z|[\r\n]|{T}{L})|{S}+(?!{T}{L})[{L}{P}])"
    alternatives = (
        r"[\r\n]",
        r"\p{N}",  # tiktoken has Unicode 16 here, HF's Digits 17, which is 13 digits more
        rf"{narrow}?[{L}&&{P}]+",  # letters that are marks, such as a-z
        rf"{narrow}?[{L}--[{P}{K}]]+",  # letters
        rf"{broad}?[[{L}--{P}]&&{K}]+",  # wide letters
        rf"{narrow}?[{P}--[{L}{K}]]+",  # marks
        rf"{broad}?(?:[[{P}&&{K}]--[{L}{T}]]|{T}+(?=[{P}--[{L}{T}]]))+",  # wide marks, T between
        rf"{broad}?{T}+(?!{L})",  # other T, except the one that goes with a letter
        rf"(?:[{K}--[{L}{P}{S}\p{{N}}]]|{broad}++{inside})+",  # the rest of K
        rf"(?:[^{S}\r\n{L}{P}{K}\p{{N}}]|{narrow}++{inside})+",  # all the rest
        rf"{narrow}+{ending}",
        rf"{broad}+{ending}",
        rf"[{S}{T}]",  # a blank that K parts from its word
    )
    return "|".join(alternatives)


def merge_order(vocab: Vocab, merges: Merges) -> list[str]:
    """The longer tokens in the order of HF's list, if it joins what SentencePiece would join."""
    splits = {
        (t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab
    }
    lost, idle = splits.difference(merges), {*merges} - splits
    want(
        not lost,
        f"{len(lost)} pairs of tokens make a token but are no merges, such as {[*lost][:1]}: "
        "want all, as SentencePiece joins them",
    )
    want(not idle, f"{len(idle)} merges make no token, such as {[*idle][:1]}: want none of these")
    words = [pair for pair in merges if "".join(pair).strip("▁")]
    runs = sorted(
        splits.difference(words), key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True
    )
    if merges == words + runs:  # transformers since 4.38: the leftmost first, see from_model
        merges = words + sorted(runs, key=lambda pair: -len("".join(pair)))
    order = [token for token, _ in groupby(left + right for left, right in merges)]
    twice = [token for token, n in Counter(order).items() if n > 1]
    want(
        not twice,
        f"merges into {twice[:1]} stand apart from each other: want those of a token in a row",
    )
    return order


# ---- tokenizer.model -----------------------------------------------------------------------------


def from_model(data: bytes) -> tuple[Bpe, Vocab, Vocab]:
    """A SentencePiece tokenizer.model: its BPE, its pieces, and its special tokens."""
    fields = list(protobuf(data))
    settings = {number: dict(protobuf(value)) for number, value in fields if number in (2, 3)}
    for (message, field), (default, value, words) in MODEL_SETTINGS.items():
        want(
            settings.get(message, {}).get(field, default) == value,
            f"want a SentencePiece with {words}",
        )
    pieces = [
        dict(protobuf(value)) for number, value in fields if number == 1
    ]  # of text 1, score 2, type 3
    kinds: dict[int, Vocab] = {1: {}, 2: {}, 3: {}, 6: {}}  # normal, unknown, control, byte
    for i, piece in enumerate(pieces):
        kind = piece.get(3, 1)
        want(kind in kinds, f"piece {i} of type {kind}: want none that is user-defined or unused")
        kinds[kind][piece[1].decode()] = i
    normal, unknown, control, by_byte = kinds.values()
    want(len(normal | unknown | control | by_byte) == len(pieces), "pieces of the same text")

    # The highest score is joined first. Runs of ▁ share one; there SentencePiece takes the
    # leftmost, which is the run that it has made longest so far, as all to the right of it are
    # single.
    score = {token: struct.unpack("<f", pieces[i][2])[0] for token, i in normal.items()}
    order = sorted((t for t in score if len(t) > 1), key=lambda token: (-score[token], -len(token)))
    equal = [a for a, b in pairwise(order) if not score[a] > score[b] and (a + b).strip("▁")]
    want(
        not equal,
        f"pieces {equal[:3]} that score as others do: want scores that say which is joined first",
    )
    bpe = sentencepiece(normal, order, [by_byte[f"<0x{byte:02X}>"] for byte in range(256)])
    return bpe, normal | by_byte, unknown | control


def protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an integer or the bytes of anything else."""
    at = 0

    def varint() -> int:  # seven bits a byte, the lowest first; the eighth says that there are more
        nonlocal at
        start = at
        while data[at] > 127:
            at += 1
        at += 1
        want(at - start <= 10, "an integer of more than 10 bytes: want a SentencePiece model")
        return sum((byte & 127) << 7 * n for n, byte in enumerate(data[start:at]))

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            want(at + size <= len(data), "a field beyond the end of the file: want all of it")
            yield number, data[at : at + size]
            at += size


def sentencepiece(vocab: Vocab, order: list[str], byte_ids: list[int]) -> Bpe:
    """BPE over characters, joined into the tokens of `order`.

    A character that is no token falls back to its bytes.

    tiktoken starts from bytes, so the lowest ranks put characters together. The first bytes of one
    may go on to an unknown one, so they stand for the ids of these bytes, and every rank for a list
    of ids.
    """
    table = {
        bytes([b]): [vocab.get(chr(b), byte_ids[b]) if b < 128 else byte_ids[b]] for b in range(256)
    }
    characters = {token.encode(): i for token, i in vocab.items() if len(token) == 1}
    for size in (2, 3, 4):
        for start in [character[:size] for character in characters if len(character) >= size]:
            table[start] = (
                [characters[start]] if start in characters else [byte_ids[b] for b in start]
            )
    table |= {token.encode(): [vocab[token]] for token in order}
    ranks = {token: rank for rank, token in enumerate(table)}
    apart = all(re.fullmatch("▁*[^▁\0]*", token) for token in vocab)
    want(apart, "a token with ▁ or \\0 behind another character: want words in tokens of their own")
    encoding = tiktoken.Encoding(
        "pieces", pat_str=WORD_PIECES, mergeable_ranks=ranks, special_tokens={}
    )
    # With \0 behind it a token is not taken whole, merging has to make it.
    merged = encoding.encode_ordinary("".join(token + "\0" for token in order))
    reached = merged == [rank for token in order for rank in (ranks[token.encode()], 0)]
    want(reached, "a token to which its own characters do not merge: want a file as trained")
    token_bytes = {i: token.replace("▁", " ").encode() for token, i in vocab.items()}
    token_bytes |= {i: bytes([byte]) for byte, i in enumerate(byte_ids)}
    return Bpe(encoding, [*table.values()], token_bytes)
