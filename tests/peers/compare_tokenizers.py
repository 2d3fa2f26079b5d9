"""Our ids against those of HF tokenizers and of sentencepiece, on any tokenizer files and texts.

    python -m tests.peers.compare_tokenizers FOLDER [FOLDER ...] [--data FILE ...] [--fuzz 20000]
                                             [--seed 0]

A folder's tokenizer.json is compared with `tokenizers`, its tokenizer.model with `sentencepiece`,
each loaded alone. Texts are all strings in the rows of .json, .jsonl and .jsonl.gz files, each
alone and those of a row together, and seeded fuzz. Prints a line per file and set of texts, and
texts that differ for no known cause; then it exits with 1. Speed is per second of CPU time, so that
neighbours do not disturb it.
"""

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from plumbing.tokenizer import Tokenizer, load_tokenizer

UNICODE_17_DIGITS = {*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)}


@cache
def characters_by_kind() -> dict[str, list[str]]:
    """All of Unicode by the first letter of its general category; all together in ""."""
    kinds: dict[str, list[str]] = {
        "": [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    }
    for character in kinds[""]:
        kinds.setdefault(unicodedata.category(character)[0], []).append(character)
    return kinds


def fuzz_texts(count: int, seed: int, added: list[str]) -> Iterator[str]:
    """Short texts that mix what tokenizers stumble over, with `added` tokens inside."""
    draw, by_kind = random.Random(seed), characters_by_kind()
    blanks = [
        *"\u200b\u2060\ufeff",
        *map(chr, range(33)),
        *filter(str.isspace, map(chr, range(0x3001))),
    ]
    east = "，。、！？「」『』：；（）～　一二三〇々ーアァかがハングル한국어中文字ＡＢｃｄ１２Ⅳⅷ㈠①"
    joined = [
        "👩‍👩‍👧",
        "👍🏽",
        "🇩🇪",
        "❤️",
        "e\u0301",
        "o\u0302\u0323",
        "\u1100\u1161\u11a8",
        "Å",
        "ﬁ",
        "ß",
        "ı",
    ]
    words = [
        "don't",
        "I'LL",
        "we've",
        "'s",
        "def f(x):",
        "return",
        "<<3*4=12>>",
        "#### 42",
        "1,000.50",
        "▁",
        "<0x0A>",
    ]
    kinds: list[Callable[[], str]] = [
        lambda: draw.choice(blanks) * draw.choice((1, 1, 2, 3)),
        lambda: " " * draw.randint(1, 60),
        lambda: draw.choice("\n\r\t") + " " * draw.choice((0, 2, 4, 8, 23, 24, 25, 26, 48, 49)),
        lambda: draw.choice(("ab", "Zq", "the", "hello", "tion")) * draw.choice((1, 1, 2, 9)),
        lambda: chr(draw.randrange(33, 127)) * draw.choice((1, 1, 1, 4)),
        lambda: str(draw.randrange(10**6)),
        lambda: draw.choice(east),
        lambda: draw.choice(joined),
        lambda: draw.choice(words),
        lambda: draw.choice(by_kind["N"]),  # digits of all scripts
        lambda: draw.choice(by_kind["M"]),  # combining marks
        lambda: draw.choice(by_kind["L"]),
        lambda: draw.choice(by_kind["P"] + by_kind["S"]),
        lambda: draw.choice(by_kind["C"]),  # controls, formats, private use, unassigned
        lambda: chr(draw.randrange(0x80, 0x800)),
        lambda: draw.choice(by_kind[""]),
        lambda: draw.choice(added or ["<|none|>"]),
    ]
    for _ in range(count):
        few = draw.sample(kinds, draw.randint(1, 5))  # neighbours of few kinds meet in more ways
        yield "".join(draw.choice(few)() for _ in range(draw.randint(1, 16)))


def texts_of(path: Path) -> list[str]:
    """All strings in the rows of a data file, and each row's strings together."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file]
    texts = [[value for value in row.values() if isinstance(value, str)] for row in rows]
    return [text for row in texts for text in (*row, "".join(row))]


def peer_of(path: Path) -> tuple[Callable[[str], list[int]], list[str]]:
    """The encoding function of a tokenizer file's own library, and the file's added tokens."""
    if path.suffix == ".model":
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(path)).encode, ["<unk>", "<s>", "</s>"]
    from tokenizers import Tokenizer as Peer

    peer = Peer.from_file(str(path))
    added = [token.content for token in peer.get_added_tokens_decoder().values()]
    return lambda text: peer.encode(text, add_special_tokens=False).ids, added


def load_alone(path: Path) -> Tokenizer:
    """The tokenizer of this one file, whatever lies beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"tokenizer{path.suffix}").write_bytes(path.read_bytes())
        return load_tokenizer(folder)


def cause(text: str) -> str:
    """Why our ids of this text may rightly differ, or "no known cause"."""
    from tokenizers.normalizers import NFC

    if NFC().normalize_str(text) != unicodedata.normalize("NFC", text):
        return "HF's NFC tables are older than Python's"
    if any(ord(character) in UNICODE_17_DIGITS for character in text):
        return "HF's digits (DeepSeek) are newer than tiktoken's"
    return "no known cause"


def compare(
    ours: Tokenizer, peer: Callable[[str], list[int]], texts: list[str]
) -> tuple[Counter[str], str]:
    """How many texts differ, by cause, and a line of numbers."""
    start = time.process_time()
    mine = [ours.encode(text) for text in texts]
    middle = time.process_time()
    theirs = [peer(text) for text in texts]
    end = time.process_time()
    differing = [text for text, a, b in zip(texts, mine, theirs, strict=True) if a != b]
    broken = sum(ours.decode(ids) != text for text, ids in zip(texts, mine, strict=True))
    causes = Counter(map(cause, differing))
    for text in [text for text in differing if cause(text) == "no known cause"][:5]:
        print(f"  {text!r}\n    ours  {ours.encode(text)}\n    peer's {peer(text)}")
    size = sum(len(text.encode()) for text in texts) / 1e6
    speed = (
        f"{size:.2f} MB, {size / (middle - start):.1f} MB/s, peer {size / (end - middle):.1f} MB/s"
    )
    counts = f"{len(texts):6} texts, {len(differing)} differ {dict(causes) or ''}"
    counts += f", {broken} decode otherwise"
    return causes, f"{counts}; {speed}"


def main() -> int:
    """Compare every file with its peer on every set of texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, help="folders with tokenizer.json and/or tokenizer.model"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        help=".json, .jsonl or .jsonl.gz files of rows",
    )
    parser.add_argument("--fuzz", default=20_000, type=int, help="number of fuzz texts")
    parser.add_argument("--seed", default=0, type=int, help="seed of the fuzz texts")
    args = parser.parse_args()

    data = {path.name: texts_of(path) for path in args.data}
    failed = False
    for path in [path for folder in args.folders for path in sorted(folder.glob("tokenizer.*"))]:
        start = time.process_time()
        ours = load_alone(path)
        seconds = time.process_time() - start
        peer, added = peer_of(path)
        print(f"{path}: loaded in {seconds:.2f} s; {ours.vocab_size} tokens, eos {ours.eos}")
        for name, texts in {**data, "fuzz": list(fuzz_texts(args.fuzz, args.seed, added))}.items():
            causes, line = compare(ours, peer, texts)
            print(f"  {name:22} {line}", flush=True)
            failed |= "no known cause" in causes
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
