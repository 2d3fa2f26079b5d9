"""Corrupted and hostile files: a program that reads one ends well, or in one line on stderr.

READERS are commands, as a user types them, each with a file that it reads. Every input is a folder
of sound files in which that one was changed; the command runs there in a process forked from this
one, so that nothing is imported twice. Which changes are tried is drawn with a fixed seed; those of
CRAFTED are made by hand.
"""

import copy
import gzip
import json
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from random import Random
from typing import NamedTuple

import pytest
import torch
from conftest import HUB, ROOT, slow, small_run, some_slow, write_checkpoint, write_rows
from safetensors.torch import load_file, save_file

from plumbing import cli, files, saves

# what a run may take of CPU time; of memory, besides what this process has
SECONDS, MORE_BYTES = (10, 2 << 30)
QUICK, SLOW = 1, 10  # changes of each kind (PLACES, BYTES, VALUES) that each reader meets

ROWS = [{"question": f"{a}+2?", "answer": f"{a}+2={a + 2}\n#### {a + 2}"} for a in range(4)]
PROBLEM = {
    "task_id": "x/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "test": "def check(f): assert f()",
}


def train(rows="rows.jsonl", out="new", *more):
    return ["train.py", *small_run("model", rows, "--no-eval", "--steps", 1, "--out", out, *more)]


COUNT = ["catcher.py", "--task", "tiny-math", "--data", "rows.jsonl", "--share", "1", "--model"]
SCORE = ["eval_gsm8k.py", "--run", "run"]
RESUME = train("rows.jsonl", "part", "--resume")
FORWARD = ["--catcher", "forward"]
SAMPLES = [
    "paper.eval_humaneval",
    "--allow-code-execution",
    "--task",
    "humaneval",
    "--data",
    "programs.jsonl",
]
PROMPTS = [
    "paper.eval_safety",
    "--model",
    "model",
    "--task",
    "tiny-safety",
    "--data",
    "prompts.csv",
]
READERS = [  # (file, a command that reads it)
    ("model/config.json", [*COUNT, "model"]),
    ("model/model.safetensors", [*COUNT, "model"]),
    ("model/tokenizer.json", [*COUNT, "model"]),
    ("shards/b.safetensors", [*COUNT, "shards"]),
    ("shards/model.safetensors.index.json", [*COUNT, "shards"]),
    ("shards/tokenizer.model", [*COUNT, "shards"]),
    ("rows.jsonl", train("rows.jsonl", "new", *FORWARD)),
    ("rows.json", train("rows.json", "new", *FORWARD)),
    ("rows.jsonl.gz", train("rows.jsonl.gz", "new", *FORWARD)),
    ("rows.jsonl", [*SCORE, "--data", "rows.jsonl"]),
    ("hot.json", train("rows.jsonl", "new", "--hot-experts", "hot.json")),
    ("run/hot_experts.json", ["catcher.py", "--run", "run"]),
    ("run/run.json", SCORE),
    ("run/run.json", ["export.py", "--run", "run", "--format", "peft"]),
    ("run/results.json", SCORE),
    ("run/adapter.safetensors", SCORE),
    ("run/adapter.safetensors", ["export.py", "--run", "run", "--format", "hub"]),
    ("part/run.json", RESUME),
    ("part/hot_experts.json", RESUME),
    ("part/metrics.jsonl", RESUME),
    ("part/state.safetensors", RESUME),
    ("programs.jsonl", [*SAMPLES, "--score", "samples.jsonl"]),
    ("samples.jsonl", [*SAMPLES, "--score", "samples.jsonl"]),
    ("prompts.csv", PROMPTS),
]

# ------------------------------------------------------------------------------ what is changed

PLACES = {  # what may have the name of a file
    "a folder": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: None,
}


def span(data, rng):
    return sorted(rng.randrange(len(data)) for _ in range(2))


def flip(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def lose(data, rng):
    a, b = span(data, rng)
    return data[:a] + data[b:]


def repeat(data, rng):
    a, b = span(data, rng)
    return data[:b] + data[a:]


def scatter(data, rng):
    for _ in range(20):
        data = flip(data, rng)
    return data


BYTES = {  # (content of any file, a source of randomness) -> other content
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "cut by a byte": lambda data, rng: data[:-1],
    "a bit flipped": flip,
    "20 bits flipped": scatter,
    "a part lost": lose,
    "a part twice": repeat,
    "all twice": lambda data, rng: data + data,
    "empty": lambda data, rng: b"",
    "blank": lambda data, rng: b" \n\t\r\n",
    "zeros": lambda data, rng: bytes(len(data)),
    "noise": lambda data, rng: rng.randbytes(300),
    "a NUL before": lambda data, rng: b"\0" + data,
    "a NUL behind": lambda data, rng: data + b"\0",
    "no UTF-8": lambda data, rng: b"\xff\xfe" + data,
    "a BOM": lambda data, rng: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data, rng: data.decode("latin-1").encode("utf-16"),
    "CRLF": lambda data, rng: data.replace(b"\n", b"\r\n"),
    "packed": lambda data, rng: gzip.compress(data),
    "null": lambda data, rng: b"null",
    "1e400": lambda data, rng: b"1e400",
    "[]": lambda data, rng: b"[]",
    "{}": lambda data, rng: b"{}",
    "a text": lambda data, rng: b'"x"',
    "lists in a list": lambda data, rng: b"[[], []]",
    "deep lists": lambda data, rng: b"[" * 100_000,
    "deep objects": lambda data, rng: b'{"a":' * 100_000,
    "9999 digits": lambda data, rng: b'{"a": ' + b"9" * 9999 + b"}",
    "a long line": lambda data, rng: data + b" " * 500_000 + b"x",
}
ABSENT = object()
VALUES = [  # what is put in the place of a value in JSON; ABSENT: its key goes, too
    ABSENT, None, True, [], {}, 0, -1, 2, 7, 10**9, 10**18, 10**30, 10**3000, 1.5, 1e308, 1e-320,
    -0.0, float("nan"), float("inf"), float("-inf"), "", "x", "7", "1e400", "\ud800", "\x1b[31m",
    "\0", "a\nb",
    "x" * 300_000, "x/" * 300_000, "../..", "nobody/nothing", [[]], [None], ["x", 1], [-1, 10**18],
    [0] * 100_000, {"": None}, {"x": {}},
]  # fmt: skip


def paths_in(tree, at=()):
    """The keys that lead to each value of a tree of JSON."""
    yield at
    for key, value in (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    ):
        yield from paths_in(value, (*at, key))


def with_value(tree, at, value):
    """The tree with another value at a place."""
    root = {"": copy.deepcopy(tree)}
    *way, last = ("", *at)
    parent = root
    for key in way:
        parent = parent[key]
    parent[last] = value
    if value is ABSENT:
        del parent[last]
    return root.get("", {})


def as_json(name, data):
    """The JSON in a file, or in its first line, and a function that gives the file other JSON."""
    if name.endswith(".gz"):
        tree, write = as_json(name.removesuffix(".gz"), gzip.decompress(data))
        return tree, lambda tree: gzip.compress(write(tree))
    if name.endswith(".safetensors"):
        n = int.from_bytes(data[:8], "little")
        return json.loads(data[8 : 8 + n]), lambda tree: with_header(
            json.dumps(tree).encode(), data[8 + n :]
        )
    first, end, rest = data.partition(b"\n") if name.endswith(".jsonl") else (data, b"", b"")
    return json.loads(first), lambda tree: json.dumps(tree).encode() + end + rest


def with_header(header, tensors):
    """A safetensors file."""
    return len(header).to_bytes(8, "little") + header + tensors


def with_other_value(name, data, value, rng):
    """The file with another value at one place of its JSON. All depths are equally likely."""
    tree, write = as_json(name, data)
    depth = rng.choice(sorted({len(at) for at in paths_in(tree)}))
    at = rng.choice([at for at in paths_in(tree) if len(at) == depth])
    return ".".join(map(str, at)), write(with_value(tree, at, value))


def changes(name, data, n, rng):
    """[(what it is, how `path` is made)] of n changes of each kind, drawn at random."""
    found = [(what, PLACES[what]) for what in rng.sample([*PLACES], min(n, len(PLACES)))]
    contents = [(what, BYTES[what](data, rng)) for what in rng.sample([*BYTES], n)]
    if re.search(r"\.(json|jsonl|gz|safetensors)$", name):
        for value in rng.sample(VALUES, n):
            at, content = with_other_value(name, data, value, rng)
            contents.append((f"{at} = {str(value)[:20]!r}", content))
    return found + [
        (what, lambda path, content=content: path.write_bytes(content))
        for what, content in contents
    ]


# ------------------------------------------------------------------------------ how it is run


class Outcome(NamedTuple):
    """How a run ended."""

    code: int  # as a shell shows it, or minus the signal that killed it
    out: str
    err: list[str]  # lines, without those of progress bars
    seconds: float  # of CPU time
    more_bytes: int  # its largest memory, besides what this process has


def attempt(folder, words):
    """Run a command in `folder`, in a process forked from this one."""
    streams, had = (
        [folder / ".out", folder / ".err"],
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    pid = os.fork()
    if not pid:
        be_the_command(folder, [str(word) for word in words], streams)
    _, status, used = os.wait4(pid, 0)
    out, err = (stream.read_text(errors="backslashreplace") for stream in streams)
    lines = [
        line
        for line in re.split(r"[\r\n]+", err)
        if line.strip() and not re.search(r"\d+%\|", line)
    ]
    cpu = used.ru_utime + used.ru_stime
    return Outcome(
        os.waitstatus_to_exitcode(status), out, lines, cpu, (used.ru_maxrss - had) * 1024
    )


def be_the_command(folder, words, streams):
    """In the forked process: never returns."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # of wall-clock time, on a busy machine: ends it, wherever it hangs
        signal.alarm(6 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        for number, stream in enumerate(streams, 1):
            os.dup2(os.open(stream, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
        os.chdir(folder)
        sys.argv = words
        cli.command(import_module(words[0].removesuffix(".py")).main)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def complaints(outcome, path):
    """What is wrong with how a run ended, given the file that was changed."""
    code, _, err, seconds, more = outcome
    # or a row, if too long
    named = {path.name, path.parent.name, "of the data", "to score", "a prompt"}
    return [
        *([f"it ended with {code}: {err[-1:]}"] if code not in (0, 2) else []),
        *([f"{len(err)} lines: {err[:3]}"] if (code == 2) != (len(err) == 1) else []),
        *(
            [f"no file is named: {err[0][:300]}"]
            if err and not any(n in err[0] for n in named)
            else []
        ),
        *([f"{len(err[0])} characters"] if err and len(err[0]) > 2100 else []),
        *([f"{seconds:.0f} s"] if seconds > SECONDS else []),
        *([f"{more >> 20} MB"] if more > MORE_BYTES else []),
    ]


def make_world(folder):
    """One of each kind of file that the programs read, all of them sound."""
    hub = HUB["olmoe"] | {"vocab_size": 1024, "max_position_embeddings": 64}
    write_checkpoint(folder / "model", hub | {"eos_token_id": 1023})
    shutil.copy(ROOT / "tiny" / "tokenizer.json", folder / "model")
    write_checkpoint(folder / "shards", hub | {"eos_token_id": 2})
    shutil.copy(
        ROOT / "tests/fixtures/tokenizers/mixtral_like.model", folder / "shards" / "tokenizer.model"
    )
    split(folder / "shards")
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes()))
    hot = {
        "experts": {"0": [1, 2], "1": [3, 4]},
        "counts": {"0": [9] * 8, "1": [9] * 8},
        "n_tokens": 36,
    }
    files.write_json(folder / "hot.json", hot)
    write_rows(folder / "programs.jsonl", [PROBLEM])
    write_rows(folder / "samples.jsonl", [{"task_id": "x/0", "completion": "    return 1"}])
    (folder / "prompts.csv").write_text('"Hi, you"\n"Tell me more"\n')
    in_this_process(folder, train("rows.jsonl", "run"))
    edit_json(folder / "run" / "run.json", eval_data=str(folder / "rows.jsonl"))
    in_this_process(folder, SCORE)
    shutil.copytree(folder / "run", folder / "part")
    edit_json(folder / "part" / "run.json", eval_data=None, finished=False)


def in_this_process(folder, words):
    """What torch imports late, it imports here, and not in each forked process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        import_module(words[0].removesuffix(".py")).main()


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split(folder):
    """Cut a checkpoint into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    place = {name: "a.safetensors" if i < 20 else "b.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(place.values())):
        save_file({name: tensors[name] for name in names if place[name] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(a folder of sound files, the same under the name that their absolute paths give it)."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "world").mkdir()
    make_world(place / "world")
    shutil.copytree(place / "world", place / "sound")
    return place / "sound", place / "world"


def fresh(sound):
    """A folder of sound files that may be spoilt."""
    source, world = sound
    shutil.rmtree(world)
    return shutil.copytree(source, world)


# ------------------------------------------------------------------------------ the tests


def check_reader(sound, number, n):
    name, words = READERS[number]
    data = (sound[0] / name).read_bytes()
    for what, place in changes(name, data, n, Random(f"{n} {number}")):
        path = fresh(sound) / name
        path.unlink()
        place(path)
        outcome = attempt(sound[1], words)
        assert not complaints(outcome, path), (what, words)


NAMES = [f"{words[0].partition('.py')[0]}-{name}" for name, words in READERS]


@pytest.mark.parametrize(
    "number", some_slow(range(len(READERS)), range(0, len(READERS), 3)), ids=NAMES
)
def test_a_changed_file_gives_a_right_run_or_one_line_that_names_it(sound, number):
    check_reader(sound, number, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(READERS)), ids=NAMES)
def test_more_changed_files_do_too(sound, number):
    check_reader(sound, number, SLOW)


@pytest.mark.parametrize(
    ("name", "what"),
    [slow(("rows.jsonl", "CRLF")), slow(("rows.jsonl", "a BOM"))]
    + [slow(("rows.json", "CRLF")), ("rows.json", "a BOM")]
    + [slow((name, "CRLF")) for name in ("model/config.json", "hot.json", "part/metrics.jsonl")]
    + [pytest.param("samples.jsonl", "CRLF", marks=pytest.mark.bubblewrap)],
)
def test_what_changes_nothing_gives_the_same_run(sound, name, what):
    words = next(words for file, words in READERS if file == name)
    path = fresh(sound) / name
    right = attempt(sound[1], words)
    data = (fresh(sound) / name).read_bytes()
    path.write_bytes(BYTES[what](data, None))
    other = attempt(sound[1], words)
    assert (right.code, right.err) == (other.code, other.err) == (0, [])
    timing = r"took \d+ of the .*%|[\d.,]+ ?s\b|\(\d+ s\)"
    assert re.sub(timing, "", right.out) == re.sub(timing, "", other.out)


def in_header(change):
    """A change of a safetensors file by a change of its header, a list of (name, entry)."""

    def changed(data):
        n = int.from_bytes(data[:8], "little")
        pairs = change([*json.loads(data[8 : 8 + n]).items()])
        header = (
            "{"
            + ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in pairs)
            + "}"
        )
        return with_header(header.encode(), data[8 + n :])

    return changed


def last(**values):
    return lambda pairs: [*pairs[:-1], (pairs[-1][0], pairs[-1][1] | values)]


def in_json(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


def in_state(change):
    """A change of a save's step and tensors that its checksum agrees with."""

    def changed(path):
        saved = saves.load(path.parent)
        step, tensors = change(saved.step, saved.tensors)
        about = {"step": str(step), "sha256": saves.Save(step, tensors).checksum()}
        save_file(tensors, path, about)

    return changed


def without(tensors, part):
    return {name: t for name, t in tensors.items() if part not in name}


def typed(tensors, part, dtype):
    return {name: t.to(dtype) if part in name else t for name, t in tensors.items()}


def scaled(tensors, part, by):
    return {name: (t + 1) * by if part in name else t for name, t in tensors.items()}


def renamed(tensors, old, new):
    return {name.replace(old, new): t for name, t in tensors.items()}


def with_token_of_id(number):
    def changed(tree):
        tree["added_tokens"].append(tree["added_tokens"][0] | {"id": number, "content": "<x>"})

    return changed


def in_tokenizer(change):
    def changed(data):
        change(tree := json.loads(data))
        return json.dumps(tree).encode()

    return changed


BOMB = gzip.compress(bytes(1 << 24)) * 200  # 3 MB, of which 3 GB come
HUGE = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**63]}
CONFIG, WEIGHTS, TOKENIZER = "model/config.json", "model/model.safetensors", "model/tokenizer.json"
SAVE, METRICS, ADAPTER = "part/state.safetensors", "part/metrics.jsonl", "run/adapter.safetensors"
CRAFTED = [  # (file, change of its content, name of what is at fault; "": a right run)
    (WEIGHTS, lambda data: (2**63).to_bytes(8, "little") + data[8:], "model.safetensors"),
    (WEIGHTS, lambda data: (10**8).to_bytes(8, "little") + data[8:], "model.safetensors"),
    (WEIGHTS, in_header(lambda pairs: pairs + pairs[-1:]), ""),  # the same entry twice does no harm
    (WEIGHTS, in_header(lambda pairs: [*pairs, ("x", HUGE)]), "model.safetensors"),
    (WEIGHTS, in_header(lambda pairs: [*pairs, ("x", pairs[-1][1])]), "model.safetensors"),
    (WEIGHTS, in_header(lambda pairs: pairs[:-1]), "model.safetensors"),
    (WEIGHTS, in_header(last(data_offsets=[-8, 0])), "model.safetensors"),
    (WEIGHTS, in_header(last(data_offsets=[0, 0])), "model.safetensors"),
    (WEIGHTS, in_header(last(shape=[2**32, 2**32])), "model.safetensors"),
    (WEIGHTS, in_header(last(shape=[1] * 10_000)), "model.safetensors"),
    (WEIGHTS, in_header(last(dtype="I32")), "model.safetensors"),
    (WEIGHTS, lambda data: with_header(b'{"x":' * 50_000, b""), "model.safetensors"),
    ("shards/b.safetensors", lambda data: with_header(b"{}", b""), "tensor"),
    (CONFIG, in_json(num_hidden_layers=10**8), "100000000"),
    (CONFIG, in_json(num_experts=10**8), "100000000"),
    (CONFIG, in_json(vocab_size=10**8), "vocab_size"),
    (CONFIG, in_json(rms_norm_eps=float("nan")), "norm_eps"),
    (CONFIG, in_json(rope_scaling={"rope_type": "yarn"}), "config.json"),
    (CONFIG, in_json(eos_token_id=[1023, 10**9]), "eos_token_id"),
    (TOKENIZER, in_tokenizer(with_token_of_id(10**9)), "vocab_size"),
    (TOKENIZER, in_tokenizer(lambda t: t["model"].update(byte_fallback=True)), "tokenizer.json"),
    (
        TOKENIZER,
        in_tokenizer(lambda t: t["model"]["vocab"].update({"a" * 10**6: 1024})),
        "tokenizer.json",
    ),
    (TOKENIZER, lambda data: data + b" " * (1 << 24), "tokenizer.json"),
    ("rows.jsonl.gz", lambda data: BOMB, "rows.jsonl.gz"),
    ("rows.jsonl.gz", lambda data: data[:-9] + b"\0" * 9, "rows.jsonl.gz"),
    ("rows.jsonl", lambda data: b'{"question": "\\ud800", "answer": "#### 1"}\n', "question"),
    *(
        (
            "rows.jsonl",
            lambda data, c=c: json.dumps(ROWS[0] | {"question": c * 10**6}).encode(),
            "row 1",
        )
        for c in (" ", "a", "!", "\0", "é", "\n")
    ),
    ("hot.json", in_json(experts={"0": [1, 2], "1": [3, 10**6]}), "hot.json"),
    ("hot.json", in_json(experts={"0": [1, 2]}), "hot.json"),
    ("hot.json", in_json(counts={"0": [9], "1": [9]}), "hot.json"),
    ("hot.json", lambda data: data + b" " * (1 << 24), "hot.json"),
    ("run/run.json", in_json(rank=2**30), "rank"),
    ("run/run.json", in_json(rank=0), "rank"),
    ("run/run.json", in_json(alpha=float("inf")), "alpha"),
    ("run/run.json", in_json(adapted={"0": [0, 99], "1": [1, 2]}), "run.json"),
    ("run/run.json", in_json(adapted={"7": [0, 1]}), "run.json"),
    ("run/run.json", in_json(eval_limit=-1), "eval_limit"),
    ("run/run.json", in_json(dtype="int4"), "dtype"),
    ("run/results.json", lambda data: b'{"tiny-math": {"accuracy": NaN}}', "accuracy"),
    (ADAPTER, in_header(lambda pairs: pairs[:-1]), ""),  # the last save has the same weights
    (ADAPTER, lambda data: with_header(b"{}", b""), ""),
    (SAVE, in_state(lambda step, of: (-5, of)), "state.safetensors"),
    (SAVE, in_state(lambda step, of: (10**9, of)), "part"),
    (SAVE, in_state(lambda step, of: (step, without(of, "exp_avg_sq/"))), "part"),
    (SAVE, in_state(lambda step, of: (step, without(of, "step/layers.0.attn.q"))), "part"),
    (SAVE, in_state(lambda step, of: (step, without(of, "weights/layers.1"))), "part"),
    (SAVE, in_state(lambda step, of: (step, renamed(of, "exp_avg/layers", "exp_avg/x"))), "part"),
    (SAVE, in_state(lambda step, of: (step, renamed(of, "exp_avg/", "extra/"))), "part"),
    (SAVE, in_state(lambda step, of: (step, typed(of, "step/", torch.int64))), "state.safetensors"),
    (SAVE, in_state(lambda step, of: (step, typed(of, "lora.A", torch.bfloat16))), "lora.A"),
    (SAVE, in_state(lambda step, of: (step, scaled(of, "exp_avg/", torch.inf))), "exp_avg/"),
    (
        METRICS,
        lambda data: b'[]\n3\n"x"\nnull\n{"step": "1"}\n{"step": NaN}\n\xff\n{"lo' + data,
        "",
    ),
    (METRICS, lambda data: b"[" * 10**6, ""),
    ("samples.jsonl", lambda data: b'{"task_id": "y", "completion": ""}\n', "samples.jsonl"),
    ("samples.jsonl", lambda data: b'{"task_id": 0, "completion": ""}\n', "task_id"),
]  # fmt: skip


@pytest.mark.parametrize("number", some_slow(range(len(CRAFTED)), range(0, len(CRAFTED), 3)))
def test_a_file_made_to_do_harm_is_refused_in_one_line_that_names_it(sound, number):
    name, change, at_fault = CRAFTED[number]
    path = fresh(sound) / name
    if name == SAVE:
        change(path)
    else:
        path.write_bytes(change(path.read_bytes()))
    outcome = attempt(sound[1], next(words for file, words in READERS if file == name))
    assert not complaints(outcome, path)
    assert outcome.code == (2 if at_fault else 0)
    assert at_fault in " ".join(outcome.err)


def with_number(name_ends, value):
    """A change of tensors: the first entry of the one whose name ends so."""

    def changed(tensors):
        name = next(name for name in sorted(tensors) if name.endswith(name_ends))
        other = tensors[name].clone()
        other.view(-1)[0] = value
        return tensors | {name: other}

    return changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_number(".lora.A", float("nan")), "lora.A has numbers that are not finite"),
        (with_number(".lora.B", float("-inf")), "lora.B has numbers that are not finite"),
        (lambda of: {n: t.double() for n, t in of.items()}, "is torch.float64"),
        (lambda of: {n: t.to(torch.float8_e4m3fn) for n, t in of.items()}, "is torch.float8"),
        (lambda of: {n: t != 0 for n, t in of.items()}, "does not fit"),
    ],
)
@pytest.mark.parametrize("words", [SCORE, ["export.py", "--run", "run", "--format", "peft"]])
def test_an_adapter_of_other_numbers_than_a_run_writes_is_refused(sound, change, says, words):
    """Its checksum is the one that run.json has: whoever changed it may have changed that, too."""
    path = fresh(sound) / ADAPTER
    save_file(change(load_file(path)), path)
    run = json.loads((path.parent / "run.json").read_text())
    edit_json(path.parent / "run.json", hashes=run["hashes"] | {"adapter": files.sha256(path)})
    outcome = attempt(sound[1], words)
    assert not complaints(outcome, path)
    assert outcome.code == 2
    assert says in outcome.err[0]


# ------------------------------------------------------------------------------ links

LINKS = [".lock", ".results.lock", "run.json", "results.json", "metrics.jsonl", "hot_experts.json"]
LINKS += ["adapter.safetensors", "answers-tiny-math.jsonl"]
LINKS += ["state.safetensors", "state-before.safetensors", "new-state.safetensors"]
DRAFTS = ["run.json", "results.json", "metrics.jsonl", "new-state.safetensors"]
LINKS += [f".{name}.{os.getpid()}.draft" for name in DRAFTS]
HARMFUL = [(name, dangling) for name in LINKS for dangling in (False, True)]


def everything(folder):
    """{path: (content, time of its last change)} of all files in a folder."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize(
    "number",
    [
        n if n in (0, 1, 7, 25) else pytest.param(n, marks=pytest.mark.slow)
        for n in range(len(HARMFUL))
    ],
)
def test_what_a_link_in_a_run_folder_leads_to_is_never_written(sound, tmp_path, number):
    """The run goes on and is scored, or is refused; the file outside stays what it was."""
    name, dangling = HARMFUL[number]
    link, outside = fresh(sound) / "part" / name, tmp_path / "outside"
    outside.mkdir()
    if not dangling:
        if link.exists():
            shutil.copy(link, outside / "precious")
        else:
            (outside / "precious").write_text("do not touch")
    link.unlink(missing_ok=True)
    link.symlink_to(outside / "precious")
    before = everything(outside)
    for words in (RESUME, ["eval_gsm8k.py", "--run", "part", "--data", "rows.jsonl"]):
        with suppress(ValueError, OSError):
            in_this_process(sound[1], words)
    assert everything(outside) == before
    assert not [path for path in (sound[1] / "part").glob(".*.draft") if path.is_symlink()]


def test_these_are_so_many_links():
    assert len(HARMFUL) >= 30


@pytest.mark.parametrize(("n", "least"), [(QUICK, 100), (SLOW, 600)])
def test_these_are_so_many_inputs(sound, n, least):
    drawn = (changes(name, (sound[0] / name).read_bytes(), n, Random(0)) for name, _ in READERS)
    assert sum(map(len, drawn)) + len(CRAFTED) >= least
