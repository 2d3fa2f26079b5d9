"""Text <-> token ids for the three backbones and the tiny model, from their own files, on tiktoken.

All are byte-pair encodings (BPE): text is cut into pieces, a piece into characters, and of
neighbours the pair that stands first in the file's list of merges is joined, again and again.
Hugging Face (HF) joins listed pairs. tiktoken joins any two neighbours whose joint bytes are a
token, lowest rank first, and takes a piece that is a token whole. Both come to the same ids if
ranks follow the list and BPE, given a token's own characters, ends at that token: two neighbours
that could become t have felt nothing of what is around t, so they are the very pair listed for t.
Each file is checked for this, or refused. Families differ in data alone: how text is normalised,
how it is cut into pieces, and which bytes have which rank.
"""

import json
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken

Vocab = dict[str, int]
Normaliser = Callable[[str], str]
Merges = list[tuple[str, str]]

EOS = ("<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>")  # the families' names for what ends a text
# HF's ByteLevel
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SentencePiece does not cut, but no token reaches from one of these pieces into the next.
WORD_PIECES = "▁*[^▁]+|▁+"
LARGEST_FILE = 1 << 24  # bytes; the families' have 5 million at most
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

    eos: int  # ends a training example
    stops: tuple[int, ...]  # each ends generation

    def __init__(
        self, bpe: Bpe, normalise: Normaliser, specials: Vocab, typed: Vocab, normal: Vocab
    ):
        """No merge makes the `specials`.

        Those in `typed` count in the text as it is, those in `normal` in the normalised text.
        """
        self.bpe, self.normalise, self.specials = bpe, normalise, specials
        self.split_typed, self.split_normal = splitter(typed), splitter(normal)
        self.token_bytes = bpe.token_bytes | {i: name.encode() for name, i in specials.items()}
        self.vocab_size = max(self.token_bytes) + 1  # the rows that an embedding needs

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos or eos. A special token spelt out becomes its id."""
        ids: list[int] = []
        for i, part in enumerate(self.split_typed(text)):  # special tokens are at the odd places
            pieces = ["", part] if i % 2 else self.split_normal(self.normalise(part))
            for j, piece in enumerate(pieces):
                ids += [self.specials[piece]] if j % 2 else self.bpe.encode(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special tokens by name, broken UTF-8 as U+FFFD, unknown ids left out.

        A model may sample such an id: OLMoE's embedding has 50,304 rows for 50,280 tokens.
        """
        text = b"".join(self.token_bytes.get(i, b"") for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.normalise is show_spaces else text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a model's folder: tokenizer.model, or else tokenizer.json.

    Raises FileNotFoundError if it has neither, ValueError for a damaged file or one that we would
    get wrong.
    """
    readers = {"tokenizer.model": from_model, "tokenizer.json": from_json}
    path = next((Path(folder, name) for name in readers if Path(folder, name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: want its tokenizer.json or tokenizer.model there"
        )
    try:
        want(
            path.stat().st_size <= LARGEST_FILE,
            f"more than {LARGEST_FILE:,} bytes: want a tokenizer",
        )
        tokenizer = readers[path.name](path.read_bytes())
        path = Path(folder, "config.json")
        set_special_ids(tokenizer, json.loads(path.read_bytes()) if path.is_file() else {})
    except (ValueError, *DAMAGE) as fault:
        reason = " ".join(str(fault).split())[:300]
        if type(fault) is not ValueError:
            kind = type(fault).__name__
            reason = f"damaged, or not what its name says ({kind}: {reason}): get it again"
        raise ValueError(f"{path}: {reason}") from fault
    return tokenizer


def set_special_ids(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Fill in eos and stops: from config.json, else by the names that the families use."""
    ids = config.get("eos_token_id")
    if ids is None:
        ids = [tokenizer.specials[name] for name in EOS if name in tokenizer.specials][:1]
    stops = ids if isinstance(ids, list) else [ids]
    known = all(type(i) is int and i in tokenizer.token_bytes for i in stops)
    want(
        known,
        f"eos_token_id is {ids}: want ids that the tokenizer has, below {tokenizer.vocab_size}",
    )
    rows, last = config.get("vocab_size") or tokenizer.vocab_size, tokenizer.vocab_size - 1
    want(
        last < rows,
        f"vocab_size is {rows}, but the tokenizer has ids up to {last}: want files of one model",
    )
    want(stops, f"nothing ends a text: want eos_token_id here or a token of {EOS}")
    tokenizer.eos, tokenizer.stops = stops[0], tuple(stops)


def want(fact: object, complaint: str) -> None:
    """Refuse the file unless `fact` holds."""
    if not fact:
        raise ValueError(complaint)


def splitter(tokens: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that cuts text at `tokens`, leftmost first, then longest, as HF does.

    In what it returns the tokens are at the odd places.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})").split


def show_spaces(text: str) -> str:
    """SentencePiece's form of a text: ▁ for a space, and one before the first word."""
    return "▁" + text.replace(" ", "▁") if text else ""


PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
NORMALISERS: list[tuple[Any, Normaliser]] = [
    (None, str),
    ({"type": "Sequence", "normalizers": []}, str),  # DeepSeek
    # OLMo. HF has Unicode 9 here: marks that are younger (98 in Python 3.11) may be put in another
    # order.
    ({"type": "NFC"}, partial(unicodedata.normalize, "NFC")),
    ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, show_spaces),  # Mixtral
]


def from_json(data: bytes) -> Tokenizer:
    """The tokenizer in a tokenizer.json: over bytes, or SentencePiece as transformers has it."""
    file = json.loads(data)
    model, added, pre_tokenizer = file["model"], file["added_tokens"], file["pre_tokenizer"]
    unlike = [
        key
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    want(
        model["type"] == "BPE" and not unlike,
        f"model {model['type']} {unlike}: want BPE without these",
    )
    normalise = next(
        (function for spec, function in NORMALISERS if spec == file["normalizer"]), None
    )
    want(normalise, f"normalizer {file['normalizer']}: want none, NFC, or Prepend and Replace of ▁")

    typed = {token["content"]: token["id"] for token in added if not token["normalized"]}
    normal = {normalise(token["content"]): token["id"] for token in added if token["normalized"]}
    for token in added:
        exact = token["content"] and not (
            token["lstrip"] or token["rstrip"] or token["single_word"]
        )
        exact = exact and model["vocab"].get(token["content"], token["id"]) == token["id"]
        want(
            exact,
            f"added token {token}: want one that matches just its text, with the vocabulary's id",
        )
    vocab = {
        token: i
        for token, i in model["vocab"].items()
        if token not in typed and token not in normal
    }
    ids = [*vocab.values(), *typed.values(), *normal.values()]
    unique = all(type(i) is int for i in ids) and len({*ids}) == len(ids)
    want(unique, "ids that are no integers, or those of two tokens: want an integer for each")

    merges = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]
    if model.get("byte_fallback"):
        plain = normalise is show_spaces and not pre_tokenizer
        want(
            plain,
            "SentencePiece in another form than Prepend and Replace of ▁: use its tokenizer.model",
        )
        byte_ids = [vocab.pop(f"<0x{byte:02X}>") for byte in range(256)]
        bpe = sentencepiece(vocab, merge_order(vocab, merges), byte_ids)
    else:
        bpe = byte_level(vocab, merges, piece_regex(pre_tokenizer or {"type": None}))
    return Tokenizer(bpe, normalise, typed | normal, typed, normal)


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
    want(
        {*merges} == splits,
        "merges are not all pairs of tokens that make a token: use its tokenizer.model",
    )
    words = [pair for pair in merges if "".join(pair).strip("▁")]
    runs = sorted(
        splits.difference(words), key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True
    )
    if merges == words + runs:  # transformers since 4.38: the leftmost first, see from_model
        merges = words + sorted(runs, key=lambda pair: -len("".join(pair)))
    order = [token for token, _ in groupby(left + right for left, right in merges)]
    want(
        len(order) == len({*order}),
        "merges into one token in several places: use its tokenizer.model",
    )
    return order


def from_model(data: bytes) -> Tokenizer:
    """The tokenizer in a SentencePiece tokenizer.model, which has no special tokens in text."""
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
    return Tokenizer(bpe, show_spaces, unknown | control, {}, {})


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
