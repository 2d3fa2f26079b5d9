"""Text <-> token ids, from a model's own files.

All supported tokenizers are byte-pair encodings: plumbing/bpe.py has them. This file says which
file of a folder says what.

Several files of a folder may say the same thing. These are the rules. transformers is 5.23.

1. Pieces and their ids: tokenizer.model if it is there, else tokenizer.json. A tokenizer.json
   beside a .model may have other pieces. Then it is the file of another tokenizer. It is not read
   for anything, and a line on stderr says so. (transformers would read that .json.)
2. How a blank becomes ▁: tokenizer.json if it is there, as in transformers.
3. Added tokens: all of tokenizer.json, and all of tokenizer_config.json's added_tokens_decoder. A
   folder without that decoder may have them in added_tokens.json. This is as in transformers. A
   token that is listed twice must have one id. The first list says how it is matched in a text.
   The tokens that a tokenizer.model has itself, such as </s>, are plain text in a text, as in
   SentencePiece. A token that tokenizer_config.json names elsewhere, such as its pad_token, must be
   one of all these: transformers would add another one.
4. What ends a text: eos_token of tokenizer_config.json, eos_token_id of config.json and of
   generation_config.json. Some may be absent. The others must have a token in common: it ends a
   training example. Generation stops at each id of generation_config.json, as transformers'
   generate does. If that file names none, it stops at each id of config.json. If no file names a
   token, the first of EOS that is there is taken.
5. What begins a text: the template in tokenizer.json's post_processor, as in transformers. If there
   is none: add_bos_token of tokenizer_config.json, as in transformers 4 (5.23 ignores it where
   tokenizer.json is there). If both are there, they must agree. If neither is: nothing. So a lone
   tokenizer.model puts nothing first. transformers does not either, although its documentation
   says add_bos_token = True for Llama's class.
6. What begins a prompt: what begins a text. LoRI's template has nothing there. A run of train.py
   keeps what it was trained with.

A folder whose files contradict each other in another way is refused. The message names both files.
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
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from plumbing import ranks
from plumbing.bpe import Bpe, Vocab, bpe_of_json, bpe_of_model, check_is_bpe, require

# Where a part of a text stands: at the start of a text, behind a special token, or inside a text,
# where it goes on from another part.
Position = Literal["start", "behind", "inside"]
TextForm = Callable[[str, Position], str]  # a part, and where it stands -> its new form


class Tokenizer:
    """The ids that a model's own tokenizer gives, and back. `load_tokenizer` makes it."""

    bos: int | None  # stands before a prompt, see data.encode_prompt. None: nothing does
    eos: int  # ends a training example
    stops: tuple[int, ...]  # each ends generation
    text_ends: frozenset[int]  # special tokens that end a whole text
    turn_ends: frozenset[int]  # these, and those that end a turn of a chat

    def __init__(
        self,
        bpe: Bpe,
        normalise: TextForm,
        mark_spaces: TextForm,
        raw_specials: Vocab,
        normalised_specials: Vocab,
        unmatched_specials: Vocab,
    ):
        """Special tokens, which no merge makes, are of three kinds.

        raw_specials are matched in the text as it is, normalised_specials in the normalised text.
        unmatched_specials are matched nowhere: in a text they are plain text. mark_spaces gives
        normalised text between special tokens the form that `bpe` wants.
        """
        self.bpe, self.normalise, self.mark_spaces = bpe, normalise, mark_spaces
        self.specials = unmatched_specials | raw_specials | normalised_specials
        self.split_raw = splitter(raw_specials)
        self.split_normalised = splitter(normalised_specials)
        self.token_bytes = bpe.token_bytes | {i: t.encode() for t, i in self.specials.items()}
        self.vocab_size = max(self.token_bytes) + 1  # the rows that an embedding needs
        self.has_prefix = mark_spaces(normalise("x", "start"), "start") == "▁x"

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without bos or eos. A special token spelt out becomes its id."""
        return self.encode_at("start", text)

    def encode_answer(self, prompt: str, answer: str) -> list[int]:
        """The ids of `answer` behind `prompt`: those of both as one text, cut at the border.

        SentencePiece would begin a text of its own with one more ▁. If a token of the whole text
        reaches over the border, they are the ids of the answer alone, without that ▁.
        """
        before, whole = self.encode(prompt), self.encode(prompt + answer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        return self.encode_at("inside", answer)

    def encode_at(self, position: Position, text: str) -> list[int]:
        """The ids of a text that stands at `position`."""
        ids: list[int] = []
        for i, part in enumerate(self.split_raw(text)):
            if i % 2:  # special tokens have the odd indices
                ids.append(self.specials[part])
                continue
            part_position = "behind" if i else position
            normalised = self.normalise(part, part_position)
            for j, piece in enumerate(self.split_normalised(normalised)):
                if j % 2:
                    ids.append(self.specials[piece])
                else:
                    piece_position = "behind" if j else part_position
                    ids += self.bpe.encode(self.mark_spaces(piece, piece_position))
        return ids

    def decode(self, ids: Iterable[int], position: Position = "start") -> str:
        """The text of `ids`: special tokens by name, broken UTF-8 as U+FFFD, unknown ids left out.

        A model may sample an unknown id: OLMoE's embedding has 50,304 rows for 50,280 tokens. At
        the "start" of a text, SentencePiece's first blank is no part of the text. "inside" a text,
        as in what a model generates behind a prompt, it is.
        """
        text = b"".join(self.token_bytes.get(i, b"") for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.has_prefix and position == "start" else text


def splitter(tokens: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that cuts text at `tokens`, leftmost first, then longest, as HF does.

    In the list that it returns, the tokens have the odd indices.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})").split


# ---- a folder ------------------------------------------------------------------------------------

FILE, MODEL = "tokenizer.json", "tokenizer.model"
OWN, CONFIG, GENERATION = "tokenizer_config.json", "config.json", "generation_config.json"
ADDED = "added_tokens.json"
Files = dict[str, dict[str, Any]]  # name -> the object in it, {} if the file is absent
Added = list[dict[str, Any]]  # tokens as tokenizer.json lists them, and the "file" of each


def load_tokenizer(folder: str | Path, settings: dict | None = None) -> Tokenizer:
    """The tokenizer in a model's folder, by the rules at the top of this file.

    settings: a run.json, or {"template": name} for prompts of a template. Its "bos" comes before
    the folder's.
    Raises FileNotFoundError if the folder has neither tokenizer.json nor tokenizer.model. Raises
    ValueError for a damaged file, a file that we would get wrong, or files that contradict each
    other.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (FILE, MODEL)):
        raise FileNotFoundError(
            f"no tokenizer in {folder}: want its tokenizer.json or tokenizer.model there"
        )
    files = {name: object_in(folder / name) for name in (FILE, OWN, CONFIG, GENERATION, ADDED)}
    if (folder / MODEL).is_file():
        with blaming(folder / MODEL):
            bpe, pieces, specials = bpe_of_model(contents(folder / MODEL))
        if files[FILE]:
            leave_out_other_pieces(pieces | specials, files, folder)
        added = added_tokens(files, folder)
        with blaming(folder / FILE if files[FILE] else folder):
            tokenizer = from_model(bpe, pieces, specials, files[FILE], added)
    else:
        added = added_tokens(files, folder)
        with blaming(folder / FILE):
            tokenizer = from_json(files[FILE], added)
    with blaming(folder / OWN):
        check_named(files[OWN], {token["content"] for token in added} | tokenizer.specials.keys())
    set_ends(tokenizer, files, folder)
    with blaming(folder / (OWN if files[OWN] else FILE)):
        tokenizer.bos = first_token(tokenizer, files)
    settings = settings or {}
    if "bos" in settings:
        tokenizer.bos = settings["bos"]
    elif settings.get("template") == "lori":
        tokenizer.bos = None
    return tokenizer


LARGEST_FILE = 1 << 24  # bytes. The files of the supported families have 12 million at most


def contents(path: Path) -> bytes:
    """The bytes of a file that is not too large for a tokenizer."""
    size = path.stat().st_size
    require(size <= LARGEST_FILE, f"{size:,} bytes: want a tokenizer of at most {LARGEST_FILE:,}")
    return path.read_bytes()


def object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    with blaming(path):
        value = json.loads(contents(path))
        if not isinstance(value, dict) or not (value or path.name != FILE):
            raise TypeError(f"{short(value)} is no object with a tokenizer or settings")
    return value


# The errors of reading a file that is damaged or of another kind. `require` raises ValueError.
DAMAGE = (
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    struct.error,
    re.error,
)


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn any error into a ValueError of one line that names `path`."""
    try:
        yield
    except (ValueError, *DAMAGE) as error:
        reason = " ".join(str(error).split())[:300]
        if type(error) is not ValueError:
            kind = type(error).__name__
            reason = f"damaged, or of a form that is not read here ({kind}: {reason})"
        raise ValueError(f"{path}: {reason}") from error


@cache
def say_once(line: str) -> None:
    """Print a line on stderr, from rank 0. A command may load twice: the second time is silent."""
    if not ranks.rank():
        print(line, file=sys.stderr)


# ---- rule 1: pieces and their ids ----------------------------------------------------------------


def from_json(file: dict[str, Any], added: Added) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    check_is_bpe(file["model"])
    normalise, mark_spaces = text_forms(file)
    check_ids(file["model"]["vocab"], added)
    bpe = bpe_of_json(file, {token["content"] for token in added})
    return Tokenizer(bpe, normalise, mark_spaces, *by_match(added, normalise), {})


def from_model(
    bpe: Bpe, pieces: Vocab, specials: Vocab, file: dict[str, Any], added: Added
) -> Tokenizer:
    """The tokenizer of a tokenizer.model, with what a tokenizer.json beside it says besides pieces.

    specials: the special tokens that the .model has itself. file: the .json, {} if there is none.
    """
    check_ids(pieces | specials, added)
    normalise, mark_spaces = text_forms(file) if file else (show_spaces, unchanged)
    others = [token for token in added if token["content"] not in specials]
    return Tokenizer(bpe, normalise, mark_spaces, *by_match(others, normalise), specials)


def leave_out_other_pieces(pieces: Vocab, files: Files, folder: Path) -> None:
    """Empty files[FILE] if its pieces are not those of tokenizer.model.

    An added token may stand among the pieces of the .json.
    """
    lists = lists_of_added(files, folder).values()
    with blaming(folder):
        added = {token["content"]: token["id"] for tokens in lists for token in tokens}
    with blaming(folder / FILE):
        vocab = dict(files[FILE]["model"]["vocab"])  # a model that is not BPE may list pairs
        text_of = {i: text for text, i in [*added.items(), *vocab.items()]}
    other = [text for text, i in pieces.items() if text_of.get(i) != text]
    other += sorted(vocab.keys() - pieces.keys() - added.keys())
    if other:
        files[FILE] = {}
        say_once(
            f"{folder / FILE} is not read: {len(other)} pieces, such as {other[0]!r}, are not the "
            f"same in {MODEL}, which is read"
        )


# ---- rule 2: the form of a text ------------------------------------------------------------------


def unchanged(text: str, _position: Position) -> str:
    """The text itself."""
    return text


def nfc(text: str, _position: Position) -> str:
    """Composed characters.

    HF has Unicode 9 here: it may order younger marks differently. In Python 3.11 these are 98.
    """
    return unicodedata.normalize("NFC", text)


def show_spaces(text: str, position: Position) -> str:
    """SentencePiece's form of a text: ▁ for a space, and one before the first word.

    Source: HF's Prepend and Replace. They put one behind each special token as well.
    """
    prefix = "▁" if text and position != "inside" else ""
    return prefix + text.replace(" ", "▁")


def metaspace(scheme: str, text: str, position: Position) -> str:
    """▁ for a space, and one before a text that has none. Source: HF's Metaspace without split.

    scheme: "first" puts it at a text's start, "always" also behind special tokens, "never" nowhere.
    """
    text = text.replace(" ", "▁")
    wanted = {"first": position == "start", "always": position != "inside", "never": False}[scheme]
    return "▁" + text if wanted and text and not text.startswith("▁") else text


PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
NORMALISERS: list[tuple[Any, TextForm]] = [  # the normalizer in tokenizer.json, and what it does
    (None, unchanged),
    ({"type": "Sequence", "normalizers": []}, unchanged),  # DeepSeek
    ({"type": "NFC"}, nfc),  # OLMo, Qwen
    ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, show_spaces),  # Mixtral
    ({"type": "Sequence", "normalizers": [REPLACE]}, partial(metaspace, "never")),
    (REPLACE, partial(metaspace, "never")),
]


def text_forms(file: dict[str, Any]) -> tuple[TextForm, TextForm]:
    """What normalises a text by a tokenizer.json, and what marks its spaces after that."""
    normalizer, pre_tokenizer = file["normalizer"], file["pre_tokenizer"]
    normalise = next((form for known, form in NORMALISERS if known == normalizer), None)
    require(
        normalise,
        f"normalizer {short(normalizer)}: want none, NFC, Prepend and Replace of ▁, or Replace "
        "alone",
    )
    if not file["model"].get("byte_fallback"):
        return normalise, unchanged
    if pre_tokenizer is None and normalise not in (unchanged, nfc):
        return normalise, unchanged
    step = pre_tokenizer or {}
    scheme = step.get("prepend_scheme")
    settings = (step.get("type"), step.get("replacement"), step.get("split"))
    require(
        settings == ("Metaspace", "▁", False)
        and scheme in ("first", "always", "never")
        and normalise is unchanged,
        f"byte_fallback with normalizer {short(normalizer)} and pre_tokenizer {short(step)}: want "
        "▁ by Prepend and Replace, by Replace, or by a Metaspace that does not split",
    )
    return normalise, partial(metaspace, scheme)


# ---- rule 3: added tokens ------------------------------------------------------------------------

# The keys of tokenizer_config.json that name special tokens, besides what begins and ends a text.
NAMING = (
    *("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens"),
)


def added_tokens(files: Files, folder: Path) -> Added:
    """The added tokens of all files, each once, as the first file has it."""
    first_of: dict[str, dict] = {}  # text -> the token
    for name, tokens in lists_of_added(files, folder).items():
        with blaming(folder / name):
            for token in tokens:
                first = first_of.setdefault(token["content"], token | {"file": name})
                check_added(token, name, first)
    return [*first_of.values()]


def lists_of_added(files: Files, folder: Path) -> dict[str, Added]:
    """{file: the added tokens that it lists}."""
    decoder = files[OWN].get("added_tokens_decoder")
    with blaming(folder / OWN):
        own = [token | {"id": int(i)} for i, token in (decoder or {}).items()]
    more = files[ADDED].items() if decoder is None else ()
    return {
        FILE: files[FILE].get("added_tokens", []),
        OWN: own,
        ADDED: [{"content": text, "id": i} for text, i in more],
    }


def check_added(token: dict[str, Any], name: str, first: dict[str, Any]) -> None:
    """Raise ValueError for an added token of the file `name` that we would get wrong.

    first: the token as the first file that lists it has it.
    """
    require(
        first["id"] == token["id"],
        f"{token['content']!r} has id {first['id']} in {first['file']}, {token['id']} in "
        f"{name}: want the files of one model",
    )
    exact = token["content"] and not any(map(token.get, ("lstrip", "rstrip", "single_word")))
    require(
        exact or first["file"] != name,
        f"added token {token}: want one that matches just its text",
    )


def by_match(added: Added, normalise: TextForm) -> tuple[Vocab, Vocab]:
    """The added tokens that are matched in raw text, and those matched in normalised text."""
    raw, normalised = {}, {}
    for token in added:
        if token.get("normalized"):
            normalised[normalise(token["content"], "behind")] = token["id"]
        else:
            raw[token["content"]] = token["id"]
    return raw, normalised


def check_ids(vocab: Vocab, added: Added) -> None:
    """Raise ValueError for an added token with another id than in `vocab`, or with another's id."""
    for token in added:
        text, i, name = token["content"], token["id"], token["file"]
        require(
            vocab.get(text, i) == i,
            f"added token {text!r} has id {i} in {name}, {vocab.get(text)} in the vocabulary: "
            "want the vocabulary's id",
        )
    ids = vocab | {token["content"]: token["id"] for token in added}
    require(
        all(type(i) is int for i in ids.values()),
        "ids that are no integers: want an integer for each",
    )
    n_with = Counter(ids.values())
    shared = [text for text, i in ids.items() if n_with[i] > 1]
    require(not shared, f"an id of two tokens, {shared[:2]}: want one for each")


def check_named(own: dict[str, Any], known: set[str]) -> None:
    """Raise ValueError if tokenizer_config.json names a special token that is not `known`."""
    for role in NAMING:
        names = own.get(role) or []
        if isinstance(names, dict) and "content" not in names:  # {role of the model's own: token}
            names = [*names.values()]
        for name in names if isinstance(names, list) else [names]:
            text = name["content"] if isinstance(name, dict) else name
            require(
                text in known,
                f"{role} names {text!r}, which is no special token of the tokenizer: want one that "
                f"{FILE} or added_tokens_decoder lists",
            )


# ---- rule 4: what ends a text --------------------------------------------------------------------

EOS = ("<|endoftext|>", "</s>", "<｜end▁of▁sentence｜>")  # the families' names for it


def set_ends(tokenizer: Tokenizer, files: Files, folder: Path) -> None:
    """Set eos, stops, text_ends and turn_ends."""
    named = {}  # file -> the ids that end a text, as the file names them
    for file in (OWN, CONFIG, GENERATION):
        with blaming(folder / file):
            if ids := ends_in(file, tokenizer, files):
                named[file] = ids
    of_family = [tokenizer.specials[name] for name in EOS if name in tokenizer.specials]
    with blaming(folder / CONFIG):
        rows, last = files[CONFIG].get("vocab_size"), tokenizer.vocab_size - 1
        require(
            not rows or last < rows,
            f"vocab_size is {rows}, but the tokenizer has ids up to {last}: "
            "want files of one model",
        )
        require(
            named or of_family, f"nothing ends a text: want eos_token_id here or a token of {EOS}"
        )
    lists = [*named.values()] or [of_family[:1]]
    common = [i for ids in lists for i in ids if all(i in other for other in lists)]
    with blaming(folder):
        ends = ", ".join(f"{ids} in {file}" for file, ids in named.items())
        require(common, f"what ends a text is {ends}: want a token that all of them name")
    tokenizer.eos = common[0]
    tokenizer.stops = tuple(named.get(GENERATION) or named.get(CONFIG) or common[:1])
    specials = frozenset(tokenizer.specials.values())
    tokenizer.text_ends = specials.intersection(of_family or common[:1])
    tokenizer.turn_ends = specials.intersection([*of_family, *tokenizer.stops])


def ends_in(file: str, tokenizer: Tokenizer, files: Files) -> list[int] | None:
    """The ids that end a text as one file names them. None if it names none."""
    if file == OWN:
        name = files[OWN].get("eos_token")
        return None if name is None else [id_of(tokenizer, name, "eos_token")]
    value = files[file].get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    require(ids, "eos_token_id is [], so nothing ends a text: want one or more, or null")
    known = all(type(i) is int and i in tokenizer.token_bytes for i in ids)
    require(
        known,
        f"eos_token_id is {value}: want ids that the tokenizer has, below {tokenizer.vocab_size}",
    )
    return ids


def id_of(tokenizer: Tokenizer, name: str | dict[str, Any], role: str) -> int:
    """The id of a token that tokenizer_config.json names as its `role`."""
    text = name["content"] if isinstance(name, dict) else name
    if text in tokenizer.specials:
        return tokenizer.specials[text]
    ids = tokenizer.encode(text)
    require(len(ids) == 1, f"{role} is {text!r}, which is no token of the tokenizer: want one")
    return ids[0]


# ---- rule 5: what begins a text ------------------------------------------------------------------

BOS = ("<s>", "<｜begin▁of▁sentence｜>")  # the families' names for it


def first_token(tokenizer: Tokenizer, files: Files) -> int | None:
    """The id that these files put before a text. None if they put none."""
    template = first_in_template(files[FILE].get("post_processor"))
    flag = files[OWN].get("add_bos_token")
    require(flag in (None, True, False), f"add_bos_token is {flag!r}: want true or false")
    if template is not None:
        known = all(i in tokenizer.token_bytes for i in template)
        require(known, f"the post_processor of {FILE} puts {template} first: want a token's id")
        require(
            flag in (None, bool(template)),
            f"add_bos_token is {flag} in {OWN}, but the post_processor of {FILE} puts "
            f"{template or 'nothing'} first: want the same in both",
        )
        return template[0] if template else None
    if not flag:
        return None
    if (name := files[OWN].get("bos_token")) is not None:
        return id_of(tokenizer, name, "bos_token")
    of_family = [tokenizer.specials[name] for name in BOS if name in tokenizer.specials]
    require(
        of_family, f"add_bos_token is true, but there is no bos_token: want one, such as {BOS[0]}"
    )
    return of_family[0]


def first_in_template(processor: dict[str, Any] | None) -> list[int] | None:
    """The id that an HF post_processor puts before a text, as [id], or [] if it puts none there.

    None if it has no template, and so says nothing.
    """
    if processor is None or processor["type"] == "ByteLevel":
        return None
    if processor["type"] == "Sequence":
        firsts = [first_in_template(part) for part in processor["processors"]]
        return next((first for first in firsts if first is not None), None)
    require(
        processor["type"] == "TemplateProcessing",
        f"post_processor {processor['type']}: want ByteLevel, TemplateProcessing or none",
    )
    ids: list[int] = []
    for part in processor["single"]:
        if "Sequence" in part:
            break
        ids += processor["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    require(len(ids) < 2, f"the post_processor puts {ids} first: want at most one token there")
    return ids
