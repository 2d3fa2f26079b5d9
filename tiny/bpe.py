"""Trains a byte-level BPE vocabulary, and writes a tokenizer.json for Hugging Face tokenizers.

Byte-pair encoding cuts a text into words, and words into bytes. Then it repeats one step: the most
frequent pair of neighbours becomes a new token.
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"

# Words are: letters with the space before them, single digits (so that numbers are read digit by
# digit), newlines in a row, spaces in a row (indentation), and any other single character. Each
# character belongs to exactly one of these. The classes are written out, because \d, \s and \w
# differ between regex engines.
PATTERN = r" ?[A-Za-z]+|[0-9]|\n+| +|[^A-Za-z0-9\n ]"


def train(text: str, vocab_size: int) -> list[tuple[bytes, bytes]]:
    """The merges in order. The vocabulary has 256 bytes, the merges, and one special token."""
    counts = Counter(re.findall(PATTERN, text))
    words = [[bytes([byte]) for byte in word.encode()] for word in counts]
    merges: list[tuple[bytes, bytes]] = []
    while 256 + len(merges) + 1 < vocab_size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in zip(words, counts.values(), strict=True):
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            raise ValueError(
                f"the text has no more pairs after {len(merges)} merges: want more text"
            )
        best = max(pairs, key=lambda pair: (pairs[pair], pair))  # of equal counts, the larger pair
        merges.append(best)
        for word in words:
            merge_in_place(word, best)
    return merges


def merge_in_place(word: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Join each occurrence of the pair in the word, from the left."""
    i = 0
    while i + 1 < len(word):
        if (word[i], word[i + 1]) == pair:
            word[i : i + 2] = [word[i] + word[i + 1]]
        i += 1


def printable_bytes() -> list[str]:
    """The character that stands for each byte in tokenizer.json.

    Source: GPT-2's bytes_to_unicode.
    """
    plain = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    moved = iter(range(256, 512))  # for control characters and blanks: letters beyond Latin-1
    return [chr(byte if byte in plain else next(moved)) for byte in range(256)]


def tokenizer_json(merges: list[tuple[bytes, bytes]]) -> dict:
    """The tokenizer in Hugging Face's format.

    The ids are: the bytes, the merges in order, the end of text.
    """
    letters = printable_bytes()

    def shown(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    if len(set(tokens)) < len(tokens):
        raise ValueError("two merges make the same token: want another text")
    special = {"id": len(tokens), "content": END_OF_TEXT, "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special | flags],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {shown(token): i for i, token in enumerate(tokens)},
            "merges": [f"{shown(left)} {shown(right)}" for left, right in merges],
        },
    }


class Encoder:
    """Turns text into ids with the merges alone, for pretraining and as a test's oracle."""

    def __init__(self, merges: list[tuple[bytes, bytes]]):
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.ids = {bytes([byte]): byte for byte in range(256)}
        self.ids |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
        self.end_of_text = 256 + len(merges)
        self.cache: dict[str, list[int]] = {}  # words repeat

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = []
        for word in re.findall(PATTERN, text):
            if word not in self.cache:
                self.cache[word] = self.encode_word(word)
            ids += self.cache[word]
        return ids

    def encode_word(self, word: str) -> list[int]:
        """The ids of a word. The merge that was learned first is applied first."""
        parts = [bytes([byte]) for byte in word.encode()]
        while pair := min(pairwise(parts), key=lambda p: self.rank.get(p, 1 << 30), default=None):
            if pair not in self.rank:
                break
            merge_in_place(parts, pair)
        return [self.ids[part] for part in parts]


def save(merges: list[tuple[bytes, bytes]], path: Path) -> None:
    """Write tokenizer.json."""
    path.write_text(
        json.dumps(tokenizer_json(merges), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
