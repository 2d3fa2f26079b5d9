"""Byte-pair encoding (BPE) on tiktoken, from the vocabulary and merges of a model's own file.

BPE cuts a text into pieces, and each piece into characters. Then it joins two neighbours, again and
again: the pair that stands first in the file's list of merges.

Hugging Face (HF) joins only listed pairs. tiktoken joins any two neighbours whose joint bytes are a
token, the lowest rank first, and it takes a piece that is a token whole. Both give the same ids if
two things hold:
1. The ranks follow the list.
2. For each token, BPE on its own characters ends at that token.
The proof: let two neighbours in a text be able to become the token t. No merge has crossed the
borders of t, so they were made as BPE makes them of t's characters alone. By 2 they are the pair
that is listed for t.
Each file is checked for both, or refused.

Read it from top to bottom: what is made, BPE over bytes (OLMoE, DeepSeekMoE, Qwen3-MoE), how a text
is cut into pieces there, SentencePiece (Mixtral) from a tokenizer.json and from a tokenizer.model.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import tiktoken

Vocab = dict[str, int]
Merges = list[tuple[str, str]]


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


def require(fact: object, complaint: str) -> None:
    """Raise ValueError unless `fact` holds."""
    if not fact:
        raise ValueError(complaint)


def check_is_bpe(model: dict[str, Any]) -> None:
    """Raise ValueError for a tokenizer.json whose `model` is of another kind."""
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    unsupported = [key for key in options if model.get(key)]
    require(
        model["type"] == "BPE" and not unsupported,
        f"model {model['type']} {unsupported}: want BPE without these",
    )


def bpe_of_json(file: dict[str, Any], added: set[str]) -> Bpe:
    """The BPE of a tokenizer.json: over bytes, or SentencePiece's as transformers writes it.

    added: the added tokens' texts, which no merge makes. Raises ValueError for a file with which
    tiktoken would give other ids.
    """
    model = file["model"]
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    merges = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]
    if model.get("byte_fallback"):
        byte_ids = [vocab.pop(f"<0x{byte:02X}>") for byte in range(256)]
        return sentencepiece(vocab, merge_order(vocab, merges), byte_ids)
    return byte_level(vocab, merges, piece_regex(file["pre_tokenizer"] or {"type": None}))


# ---- BPE over bytes ------------------------------------------------------------------------------

NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def byte_level(vocab: Vocab, merges: Merges, regex: str) -> Bpe:
    """BPE over bytes, which the file writes as printable characters. The ids serve as ranks.

    regex: its matches are the pieces.
    """
    check_merges(vocab, merges)
    # Printable bytes are written as themselves. The others are written as the characters from 256.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + n): byte for n, byte in enumerate(others)}
    token_bytes = {i: bytes(map(byte_of.__getitem__, token)) for token, i in vocab.items()}
    ranks = {token: i for i, token in token_bytes.items()}
    in_utf8 = [byte for byte in range(256) if byte not in NEVER_IN_UTF8]
    absent = [byte for byte in in_utf8 if bytes([byte]) not in ranks]
    require(not absent, f"no token for the bytes {absent}: want one for each byte of UTF-8")
    encoding = tiktoken.Encoding("bytes", pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    return Bpe(encoding, None, token_bytes)


def check_merges(vocab: Vocab, merges: Merges) -> None:
    """Raise ValueError unless the ids follow the merges, and each token's characters make it.

    These are the two conditions at the top of this file. The second is checked backwards in time.
    A token's last merge joins left and right, so no merge may cross their border before it. Undo
    the later made of the two. Now two other tokens meet at the border. BPE must not join them
    before the merge that was undone. Repeat this until both are characters.
    """
    characters = [i for token, i in vocab.items() if len(token) == 1]
    triples = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
    one_each = len(vocab) == len(characters) + len(merges)
    require(one_each, "merges that are not one for each longer token: want a file as trained")
    last = max(characters)
    joined_ids = [joined for _, _, joined in triples]
    rising = all(a < b for a, b in pairwise([last, *joined_ids]))
    rising = rising and all(max(triple) == triple[2] for triple in triples)
    require(
        rising,
        "ids that do not rise from the characters on down the merges: want a file as trained",
    )
    id_of_pair = {(left, right): joined for left, right, joined in triples}
    left_of = {joined: left for left, _, joined in triples}
    right_of = {joined: right for _, right, joined in triples}
    for left, right, joined in triples:
        while left > last or right > last:
            if left > right:
                due, left = left, right_of[left]
            else:  # + 1: of two equal pairs, BPE joins the left one first
                due, right = right + 1, left_of[right]
            if id_of_pair.get((left, right), due) < due:
                raise ValueError(
                    f"token {joined}, which its characters do not make: want a file as trained"
                )


# ---- how a text is cut into pieces ---------------------------------------------------------------

# HF's ByteLevel
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def piece_regex(pre_tokenizer: dict[str, Any]) -> str:
    """The regex whose matches are the pieces that an HF pre_tokenizer makes."""
    is_sequence = pre_tokenizer["type"] == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    kinds = [step["type"] for step in steps]
    splits = [step for step in steps if step.get("behavior") == "Isolated" and not step["invert"]]
    regexes = [split["pattern"]["Regex"] for split in splits]
    options = (steps[-1].get("use_regex", True), steps[-1].get("add_prefix_space"))
    layout = (kinds, len(splits), *options)
    if layout == (["ByteLevel"], 0, True, False):
        return GPT2_PIECES
    if layout == (["Split", "ByteLevel"], 1, False, False):
        return covering_regex(*regexes)
    require(
        layout == (["Split"] * 5 + ["Digits", "ByteLevel"], 5, False, False),
        f"pre_tokenizer {kinds}: want GPT-2's, one Split before ByteLevel, or DeepSeek's six",
    )
    require(steps[5]["individual_digits"], "Digits in groups: want DeepSeek's, one by one")
    return deepseek_regex(regexes)


def covering_regex(regex: str) -> str:
    """The regex of a Split, and an alternative for the text that it leaves over.

    HF makes a piece of that text. tiktoken would drop it.
    """
    # The regex without the parts that mean the same in HF and in tiktoken.
    bare = re.sub(r"\\(?:[pP]\{\w+\}|[sSdDrnt]|\W)", "x", regex)
    bare = re.sub(r"\[[^\[\]]+\]", "x", bare)
    alike = not re.search(r"[\\^$.\[]|\}\+|\(\?(?![:=!]|i:)", bare)
    require(
        alike,
        f"regex {regex[:80]}: want none of \\w \\b ^ $ . {{}}+, where HF and tiktoken may differ",
    )
    require(
        not re.match(bare, ""), f"regex {regex[:80]} matches empty text: want a character at least"
    )
    return f"{regex}|(?:(?!{regex})(?s:.))+"


def deepseek_regex(regexes: list[str]) -> str:
    r"""DeepSeek's successive splits as one regex.

    The splits are `[\r\n]`, `\s?[L]+`, `\s?[P]+`, `\s+$`, `[K]+`, and each digit. L has letters, P
    has marks, K has wide characters. Each split also cuts the pieces of the splits before it.

    The classes overlap. P has a-z in it. K has letters, marks and blanks. The ideographic blank T
    is in P and in K. So no piece crosses the border of K, and a blank stays with the letters or
    marks behind it only if both are in K or neither is.
    """
    group = r"(\[(?:(?!&&|--|~~)[^\[\]\\^])+\])"  # with nothing that Rust reads as an operator
    shape = rf"\[\r\n\] \\s\?{group}\+ \\s\?{group}\+ \\s\+\$ {group}\+"
    match = re.fullmatch(shape, " ".join(regexes))
    require(match, "other Splits than DeepSeek's: want those of its own file")
    L, P, K = match.groups()
    blanks = "".join(filter(str.isspace, map(chr, range(0x3001))))
    same_blanks = (re.findall(L, blanks), re.findall(P, blanks)) == ([], ["\u3000"])
    same_blanks = same_blanks and re.match(K, "\u3000")
    require(same_blanks, "Splits with other blanks than DeepSeek's: want those of its own file")
    T = r"\x{3000}"
    S = rf"[\s--[\r\n{T}]]"  # the other blanks (in Rust `--` takes away, `&&` intersects)
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


# ---- SentencePiece -------------------------------------------------------------------------------

# SentencePiece does not cut, but no token reaches from one of these pieces into the next.
WORD_PIECES = "▁*[^▁]+|▁+"


def sentencepiece(vocab: Vocab, order: list[str], byte_ids: list[int]) -> Bpe:
    """BPE over characters, joined into the longer tokens. Another character becomes its bytes.

    order: the longer tokens, the one that is joined first at the head. byte_ids [256]: the ids of
    the bytes.

    tiktoken starts from bytes, so the lowest ranks put the bytes of a character together. A text
    may have the first bytes of a known character, and go on to an unknown one. So those first bytes
    have a rank too, which stands for the ids of its bytes. Hence every rank stands for a list of
    ids.
    """
    table = {
        bytes([b]): [vocab.get(chr(b), byte_ids[b]) if b < 128 else byte_ids[b]] for b in range(256)
    }
    characters = {token.encode(): i for token, i in vocab.items() if len(token) == 1}
    for size in (2, 3, 4):
        for start in [character[:size] for character in characters if len(character) >= size]:
            is_whole = start in characters
            table[start] = [characters[start]] if is_whole else [byte_ids[b] for b in start]
    table |= {token.encode(): [vocab[token]] for token in order}
    ranks = {token: rank for rank, token in enumerate(table)}
    apart = all(re.fullmatch("▁*[^▁\0]*", token) for token in vocab)
    require(
        apart, "a token with ▁ or \\0 behind another character: want words in tokens of their own"
    )
    encoding = tiktoken.Encoding(
        "pieces", pat_str=WORD_PIECES, mergeable_ranks=ranks, special_tokens={}
    )
    # Condition 2 at the top of this file. With \0 behind it, tiktoken does not take a token whole,
    # so that merges have to make it.
    merged = encoding.encode_ordinary("".join(token + "\0" for token in order))
    reached = merged == [rank for token in order for rank in (ranks[token.encode()], 0)]
    require(reached, "a token to which its own characters do not merge: want a file as trained")
    token_bytes = {i: token.replace("▁", " ").encode() for token, i in vocab.items()}
    token_bytes |= {i: bytes([byte]) for byte, i in enumerate(byte_ids)}
    return Bpe(encoding, [*table.values()], token_bytes)


def merge_order(vocab: Vocab, merges: Merges) -> list[str]:
    """The longer tokens in the order of HF's list of merges.

    Raises ValueError unless the list joins just what SentencePiece would join.
    """
    splits = {
        (t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab
    }
    lost, idle = splits.difference(merges), {*merges} - splits
    require(
        not lost,
        f"{len(lost)} pairs of tokens make a token but are no merges, such as {[*lost][:1]}: "
        "want all, as SentencePiece joins them",
    )
    require(
        not idle, f"{len(idle)} merges make no token, such as {[*idle][:1]}: want none of these"
    )
    words = [pair for pair in merges if "".join(pair).strip("▁")]
    runs = sorted(
        splits.difference(words), key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True
    )
    # transformers since 4.38 lists runs of ▁ so. They are joined by length, as in bpe_of_model.
    if merges == words + runs:
        merges = words + sorted(runs, key=lambda pair: -len("".join(pair)))
    order = [token for token, _ in groupby(left + right for left, right in merges)]
    twice = [token for token, n in Counter(order).items() if n > 1]
    require(
        not twice,
        f"merges into {twice[:1]} stand apart from each other: want those of a token in a row",
    )
    return order


# (message, field) of sentencepiece_model.proto -> default, supported value, that value in words
MODEL_SETTINGS = {
    (2, 3): (1, 2, "model_type BPE"),
    (2, 24): (0, 0, "no treat_whitespace_as_suffix"),
    (2, 35): (0, 1, "byte_fallback"),
    (3, 2): (b"", b"", "an identity normalizer"),
    (3, 3): (1, 1, "add_dummy_prefix"),
    (3, 4): (1, 0, "no remove_extra_whitespaces"),
    (3, 5): (1, 1, "escape_whitespaces"),
}


def bpe_of_model(data: bytes) -> tuple[Bpe, Vocab, Vocab]:
    """The BPE of a SentencePiece tokenizer.model, its pieces, and its special tokens.

    Raises ValueError for a file with which tiktoken would give other ids.
    """
    fields = list(protobuf(data))
    settings = {number: dict(protobuf(value)) for number, value in fields if number in (2, 3)}
    for (message, field), (default, value, words) in MODEL_SETTINGS.items():
        require(
            settings.get(message, {}).get(field, default) == value,
            f"want a SentencePiece with {words}",
        )
    # A piece is {1: text, 2: score, 3: type}.
    pieces = [dict(protobuf(value)) for number, value in fields if number == 1]
    kinds: dict[int, Vocab] = {1: {}, 2: {}, 3: {}, 6: {}}  # normal, unknown, control, byte
    for i, piece in enumerate(pieces):
        kind = piece.get(3, 1)
        require(
            kind in kinds, f"piece {i} of type {kind}: want none that is user-defined or unused"
        )
        kinds[kind][piece[1].decode()] = i
    normal, unknown, control, by_byte = kinds.values()
    require(len(normal | unknown | control | by_byte) == len(pieces), "pieces of the same text")

    # The piece with the highest score is joined first. Runs of ▁ share one score. Among them
    # SentencePiece joins the leftmost pair. That one makes the longest run, because everything to
    # the right of it is still single.
    score = {token: struct.unpack("<f", pieces[i][2])[0] for token, i in normal.items()}
    order = sorted((t for t in score if len(t) > 1), key=lambda token: (-score[token], -len(token)))
    equal = [a for a, b in pairwise(order) if not score[a] > score[b] and (a + b).strip("▁")]
    require(
        not equal,
        f"pieces {equal[:3]} that score as others do: want scores that say which is joined first",
    )
    bpe = sentencepiece(normal, order, [by_byte[f"<0x{byte:02X}>"] for byte in range(256)])
    return bpe, normal | by_byte, unknown | control


def protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number, and an integer or the bytes of anything else."""
    at = 0

    def varint() -> int:  # seven bits a byte, the lowest first. The eighth bit: more bytes follow
        nonlocal at
        start = at
        while data[at] > 127:
            at += 1
        at += 1
        require(at - start <= 10, "an integer of more than 10 bytes: want a SentencePiece model")
        return sum((byte & 127) << 7 * n for n, byte in enumerate(data[start:at]))

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            require(at + size <= len(data), "a field beyond the end of the file: want all of it")
            yield number, data[at : at + size]
            at += size
