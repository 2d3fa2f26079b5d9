"""Models and data of the Hub, through its real client and a small Hub on this machine."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT, small_run, toy_in, write_checkpoint, write_rows
from local_hub import Hub

from plumbing import downloads
from plumbing.data import CODE_ALPACA
from plumbing.downloads import Source
from plumbing.hub import explained, snapshot

ROWS = [
    {"question": f"{'Tom ' * (n % 5)}has {n} pens. How many?", "answer": f"#### {n}"}
    for n in range(13)
]
MODEL = "org/moe"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    place = tmp_path_factory.mktemp("hub")
    hub = Hub(place)
    shutil.copytree(toy_in(place), hub.commit(MODEL, 1)[0], dirs_exist_ok=True)
    hub.commit("org/empty", 2)
    yield hub
    hub.stop()


@contextmanager
def driver(place, hub):
    """run(script, *words, env={...}, fault=...) -> what came of a command; see faults_driver.py."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(place / "cache"), "HF_HOME": str(place)}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HELLORA_CACHE": str(place / "data")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, ROOT / "tests" / "faults_driver.py"]
    with subprocess.Popen(command, cwd=place, env=env, **pipes) as process:

        def run(script, *words, env=None, fault=None, where=None, at=None):
            asked = {"script": script, "words": [*map(str, words)], "env": env or {}}
            asked |= {"fault": fault, "where": where, "at": at}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    with driver(tmp_path_factory.mktemp("driver"), hub) as run:
        yield run


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def at(hub, tmp_path):
    """A cache of its own, and a server without faults before and after."""
    yield {"HF_HUB_CACHE": str(tmp_path / "cache")}
    hub.faults = {}


# ---- a run and its commit ------------------------------------------------------------------------


def right(ended):
    assert ended["code"] == 0, ended["err"]
    return ended["out"]


def numbers(folder):
    """What must be the same to the last bit: the adapter's file, and each step's loss and norm."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [(m["step"], m["loss"], m["grad_norm"]) for m in lines]
    return (folder / "adapter.safetensors").read_bytes(), steps


WAYS = [  # (run, the model's name as it began, and as it goes on)
    ("a", "{name}", "{name}"),
    ("b", "{name}@{commit}", "{snapshot}"),
    ("c", "{name}", "{snapshot}"),
    ("d", "{name}", "{name}@{commit}"),
]


@pytest.mark.slow
@pytest.mark.parametrize("many", [False, True])
def test_a_run_keeps_the_commit_that_it_began_with(hub, run, rows, at, tmp_path, many):
    """main moves while runs stand still: they go on, are scored and exported all the same."""
    name, number = f"org/moving-{many}", 17
    first, commit = hub.commit(name, number)
    toy = toy_in(tmp_path)
    shutil.copytree(toy, first, dirs_exist_ok=True)
    snapshot = tmp_path / "cache" / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    ways = WAYS if many else WAYS[:2]

    def words(model, out):
        model = model.format(name=name, commit=commit, snapshot=snapshot)
        few = ["--batch-size", 5, "--steps", 4, "--save-every", 1, "--eval-data", rows]
        return [*small_run(model, rows, *few, "--eval-limit", 2), "--out", tmp_path / out]

    whole = run("train", *words(name, "whole"), env=at)
    right(whole)
    for out, began, _ in ways:
        middle = whole["lines"]["step"] * 5 // 8
        killed = run("train", *words(began, out), env=at, fault="kill", where="step", at=middle)
        assert killed["code"] == -9

    second, newest = hub.commit(name, number + 1)  # main moves: another model altogether
    shutil.copytree(toy, second, dirs_exist_ok=True)
    write_checkpoint(second, json.loads((second / "config.json").read_text()), seed=1)
    for out, began, goes_on in ways:
        said = right(run("train", *words(goes_on, out), env=at))
        assert "going on after step" in said
        assert numbers(tmp_path / out) == numbers(tmp_path / "whole"), out
        record = json.loads((tmp_path / out / "run.json").read_text())
        assert record["commit"] == commit
        assert record["model"] == began.format(name=name, commit=commit)
    assert not (snapshot.parent / newest / "model.safetensors").exists()  # nobody asked for it

    offline = at | {"HF_HUB_OFFLINE": "1"}
    for out in [way[0] for way in ways]:
        env, other = (at, offline) if out == "a" else (offline, at)
        assert "on 2 problems" in right(run("eval_gsm8k", "--run", tmp_path / out, env=env))
        right(run("catcher", "--run", tmp_path / out, env=other))
        for form in ("peft", "hub") if many else ("peft",):
            exported = tmp_path / f"{out}-{form}"
            flags = ["--format", form, "--out", exported]
            right(run("export", "--run", tmp_path / out, *flags, env=env))
        adapter = json.loads((tmp_path / f"{out}-peft" / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (name, commit)

    other = run("train", *words(f"{name}@{newest}", "a"), env=at)
    assert other["code"] == 2
    assert "finished" in other["err"].splitlines()[-1]
    assert "model: " in other["err"].splitlines()[-1]
    if many:
        right(run("train", *words(name, "new"), env=at))  # a new run is on the newest
        record = json.loads((tmp_path / "new" / "run.json").read_text())
        assert record["commit"] == newest
        assert numbers(tmp_path / "new") != numbers(tmp_path / "whole")


# ---- what a download may meet --------------------------------------------------------------------

BIG, SMALL = "model.safetensors", "/config.json"
FAULTS = [  # (what the Hub does, what else is otherwise, what the message must say)
    ({"kind": "gated"}, {}, "ask for access on http.*/org/moe, then log in .*HF_TOKEN"),
    ({"kind": "no access"}, {"HF_TOKEN": "hf_x"}, "ask for access on http.*account of the token"),
    ({"kind": "gated", "on": BIG}, {}, "ask for access"),
    ({"kind": "private"}, {}, "no model of that name.*if it is private, log in"),
    ({"kind": "private"}, {"HF_TOKEN": "hf_x"}, "no model of that name.*if it is private.*token"),
    ({"kind": "bad token"}, {"HF_TOKEN": "hf_x"}, "does not know this token.*log in"),
    ({"kind": "403"}, {"HF_TOKEN": "hf_x"}, "refuses it .403.*token that may read"),
    ({"kind": "403", "on": BIG}, {}, "403"),
    ({"kind": "429"}, {}, "429.*in some minutes"),
    ({"kind": "429", "on": BIG}, {}, "429.*in some minutes"),
    *(({"kind": str(status)}, {}, f"fault .{status}.*later") for status in (500, 502, 503, 504)),
    *(({"kind": str(s), "on": BIG}, {}, f"fault .{s}.*later") for s in (500, 501, 503, 507, 520)),
    *(({"kind": s}, {}, f"{s}.*HF_ENDPOINT") for s in ("400", "404", "405", "410", "451")),
    ({"kind": "404", "on": BIG}, {}, "404"),
    ({"kind": "500", "on": "/api/models"}, {}, "fault .500"),
    ({"kind": "portal"}, {}, "cannot read.*HF_ENDPOINT.*log-in"),
    ({"kind": "portal", "on": "/api/models"}, {}, "cannot read.*HF_ENDPOINT.*log-in"),
    ({"kind": "portal", "on": BIG}, {}, "cannot read.*HF_ENDPOINT.*log-in"),
    ({"kind": "no JSON", "on": "/api/models"}, {}, "cannot read.*HF_ENDPOINT"),
    ({"kind": "silent"}, {}, "no connection.*network"),
    ({"kind": "cut", "on": SMALL}, {}, "no connection.*broke off"),
    ({"kind": "cut", "on": BIG}, {}, "no connection.*broke off"),
    ({"kind": "stall", "on": BIG}, {}, "no connection.*broke off"),
    ({"kind": "short", "on": SMALL}, {}, "should be of size.*run the command again"),
    ({"kind": "short", "on": BIG}, {}, "should be of size.*run the command again"),
    ({"kind": "wrong bytes", "on": SMALL}, {}, "config.json.* came twice"),
    ({"kind": "wrong bytes", "on": BIG}, {}, "model.safetensors.* came twice"),
    ({}, {"model": "org/none"}, "no model of that name.*correct the name"),
    ({}, {"model": f"{MODEL}@nope"}, "want a branch, a tag or a commit"),
    ({}, {"model": f"{MODEL}@{'9' * 40}"}, "want a branch, a tag or a commit"),
    ({}, {"model": "org/empty"}, "no config.json"),
    ({}, {"model": "org/empty@../../x"}, "org/empty"),
    ({}, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "no connection.*network"),
    ({}, {"HF_ENDPOINT": "http://nowhere.invalid"}, "no connection.*network"),
    ({}, {"HF_HUB_CACHE": "/dev/null/cache"}, "/dev/null/cache cannot be written.*HF_HOME"),
    ({}, {"fault": "full disk"}, "disk of .*cache is full.*HF_HOME"),
    ({}, {"model": "org/a--b"}, "org/a--b.*correct the name"),
    ({}, {"HF_TOKEN": "ключ"}, "HF_TOKEN contains characters"),
    ({"kind": "other JSON", "on": "/api/models"}, {}, "cannot read.*HF_ENDPOINT.*log-in"),
]
QUICK = {1, 27, 43}


def wrong_files(cache):
    """Of what lies under a checksum in the cache, the files that have another; and half ones."""
    wrong = [path.name for path in cache.rglob("*.incomplete")]
    for path in cache.glob("*/blobs/*"):
        body = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        if path.name not in (git, hashlib.sha256(body).hexdigest(), *wrong):
            wrong.append(path.name)
    return wrong


@pytest.mark.parametrize(
    "number",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in range(len(FAULTS))],
)
def test_a_download_that_fails_says_why_and_what_to_do(hub, run, rows, at, tmp_path, number):
    hub.faults, change, says = dict(FAULTS[number][0]), dict(FAULTS[number][1]), FAULTS[number][2]
    model, fault = change.pop("model", MODEL), change.pop("fault", None)
    count = ["--task", "tiny-math", "--data", rows, "--share", 1, "--model"]
    where = {"fault": fault, "where": "start", "at": 1} if fault else {}
    ended = run("catcher", *count, model, env=at | change, **where)
    *others, last = ended["err"].splitlines()
    assert (ended["code"], last[:7]) == (2, "error: "), ended["err"]
    assert re.search(says, last), last
    assert "hf_x" not in ended["out"] + ended["err"]
    assert not any(line.startswith(("error", "Traceback")) for line in others)
    cache = tmp_path / "cache"
    assert not wrong_files(cache)
    hub.faults = {}
    right(run("catcher", *count, MODEL, env=at))  # a good server mends it
    assert not wrong_files(cache)


@pytest.mark.parametrize(
    ("fault", "name", "kind"),
    [
        ({}, "org/none", FileNotFoundError),
        ({}, f"{MODEL}@nope", FileNotFoundError),
        ({}, "org/empty", FileNotFoundError),
        ({"kind": "gated"}, MODEL, OSError),
        ({"kind": "500"}, MODEL, OSError),
        ({"kind": "portal"}, MODEL, OSError),
    ],
)
def test_only_what_the_hub_does_not_have_is_a_missing_file(hub, at, monkeypatch, fault, name, kind):
    files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for setting, value in {  # it reads the environment once, and other tests have it offline
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_OFFLINE": False, **at
    }.items():  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.constants.{setting}", value)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.faults = fault
    repo, _, revision = name.partition("@")
    with pytest.raises(OSError, match=re.escape(name)) as caught:
        snapshot(repo, revision or None, "config.json")
    assert type(caught.value) is kind


@pytest.mark.parametrize("fault", [KeyError("x"), TypeError("x"), AssertionError("x")])
def test_a_fault_of_ours_is_not_taken_for_the_networks(fault):
    with pytest.raises(type(fault)), explained(MODEL, None, "model", "or not"):
        raise fault


def test_these_are_so_many_faults():
    assert len(FAULTS) >= 40


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(hub, run, rows, at, tmp_path):
    count = ["catcher", "--task", "tiny-math", "--data", rows, "--share", 1, "--model", MODEL]
    shown = right(run(*count, env=at))
    blobs = [path for path in (tmp_path / "cache").glob("*/blobs/*") if path.is_file()]
    assert len(blobs) == 3
    for blob in sorted(blobs, key=lambda path: len(path.name))[1:]:  # under git's id, under sha256
        body = blob.read_bytes()
        blob.chmod(0o644)
        blob.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
        said = right(run(*count, env=at))
        assert "is damaged: fetching it again" in said
        assert blob.read_bytes() == body
        assert said.endswith(shown)
        blob.write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
        offline = run(*count, env=at | {"HF_HUB_OFFLINE": "1"})
        assert offline["code"] == 2
        assert "HF_HUB_OFFLINE" in offline["err"].splitlines()[-1]
        blob.write_bytes(body)


def test_without_the_hub_the_cache_serves(hub, run, rows, at):
    count = ["catcher", "--task", "tiny-math", "--data", rows, "--share", 1, "--model", MODEL]
    shown = right(run(*count, env=at))
    for kind in ("500", "portal"):
        hub.faults = {"kind": kind}
        assert right(run(*count, env=at)) == shown
    assert right(run(*count, env=at | {"HF_HUB_OFFLINE": "1"})) == shown


def test_one_ctrl_c_ends_a_download(hub, at, tmp_path):
    hub.faults = {"kind": "stall", "on": BIG}
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= at | {"HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "100"}
    hub.asked.clear()
    command = [sys.executable, ROOT / "catcher.py", "--model", MODEL]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while f"GET /{MODEL}/resolve/{1:040x}/{BIG}" not in hub.asked:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 10  # it was 60 s and three presses; a busy machine needs some
    assert "Traceback" not in err.decode()
    assert not wrong_files(tmp_path / "cache")


# ---- data sets -----------------------------------------------------------------------------------


def test_code_alpaca_comes_from_its_commit_and_nothing_else_is_taken_for_it(hub, run, at, tmp_path):
    repo, commit, name = CODE_ALPACA.repo, CODE_ALPACA.commit, CODE_ALPACA.place
    hub.commit(repo, 5)  # main is another
    folder, _ = hub.commit(repo, int(commit, 16), "old")
    instructions = [{"instruction": "Say 1.", "input": "", "output": "1"}] * 3
    (folder / name).write_text(json.dumps(instructions))
    count = ["catcher", "--model", toy_in(tmp_path), "--task", "code", "--share", 1]
    for kind in ("portal", "wrong bytes"):
        hub.faults = {"kind": kind, "on": name}
        refused = run(*count, env=at)
        assert refused["code"] == 2
        assert "--data FILE" in refused["err"].splitlines()[-1]
    hub.faults = {}
    assert "of code (forward)" in right(run(*count, env=at))
    right(run(*count, env=at | {"HF_HUB_OFFLINE": "1"}))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"kind": "404"}, "404"),
        ({"kind": "500"}, "500"),
        ({"kind": "portal"}, "checksum"),
        ({"kind": "wrong bytes"}, "checksum"),
        ({"kind": "short"}, "checksum"),
        ({"kind": "cut"}, "broke off after 33 of 100 bytes"),
        ({"kind": "stall"}, "timed out"),
        ({"kind": "large"}, "more than 50 bytes"),
        ({"kind": "late"}, "0 s"),
    ],
)
def test_a_data_set_is_right_or_not_there(hub, at, tmp_path, monkeypatch, fault, says):
    monkeypatch.setenv("HELLORA_CACHE", str(tmp_path / "data"))
    monkeypatch.setattr(downloads, "SILENCE", 1)
    body = b"x" * 100
    if not (hub.root / "org/data").exists():
        (hub.commit("org/data", 3)[0] / "x.jsonl").write_bytes(body)
    place = f"{hub.url}/datasets/org/data/resolve/main/x.jsonl"
    source = Source(place, hashlib.sha256(body).hexdigest(), "ours")
    hub.faults = fault
    with monkeypatch.context() as patch:
        if fault["kind"] == "large":
            patch.setattr(downloads, "LARGEST_DOWNLOAD", 50)
        if fault["kind"] == "late":
            patch.setattr(downloads, "LONGEST_DOWNLOAD", 0)
        with pytest.raises((OSError, ValueError), match=f"x.jsonl.*{says}.*--data FILE"):
            source.fetch()
    assert not [*(tmp_path / "data").glob("*")]
    hub.faults = {}
    assert source.fetch().read_bytes() == body


@pytest.mark.parametrize("what", ["", "a file"])
def test_a_cache_that_can_be_no_folder_is_refused_by_its_name(tmp_path, monkeypatch, what):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("HELLORA_CACHE", what and str(tmp_path / what))
    with pytest.raises(ValueError, match=r"HELLORA_CACHE.*want a folder"):
        Source("https://nowhere.invalid/x.jsonl", "0" * 64, "ours").fetch()
