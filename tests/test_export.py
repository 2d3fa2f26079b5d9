"""Exports: what other tools load does what our live adapters do."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import HUB, ROOT, slow, some_slow, write_checkpoint, write_rows
from oracle import deepseek_greedy, deepseek_logits
from safetensors.torch import load_file, save_file

import export
from generate import generate
from hellora import adapters, load_run, parse_method
from moe_model import MoEModel

ROWS = [
    {"question": f"Tom has {n} pens and buys 2. How many?", "answer": f"#### {n + 2}"}
    for n in range(32)
]
NEEDS = "dev requirement; our own loader and the oracle cover the file's contents"


def toy(folder, family="olmoe", dtype=torch.float32):
    """A random checkpoint with the tiny model's tokenizer."""
    ids = {
        "vocab_size": 1024,
        "max_position_embeddings": 512,
        "eos_token_id": 1023,
        "pad_token_id": 1023,
    }
    write_checkpoint(folder, HUB[family] | ids, dtype=dtype)
    (folder / "tokenizer.json").write_bytes((ROOT / "tiny" / "tokenizer.json").read_bytes())
    return folder


def shard(folder):
    """Cut model.safetensors into three files with an index, as large checkpoints are."""
    tensors, whole = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    of = {
        name: f"model-{i % 3 + 1:05d}-of-00003.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for path in set(of.values()):
        save_file(
            {n: t for n, t in tensors.items() if of[n] == path}, folder / path, {"format": "pt"}
        )
    whole.unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": of})
    )


@pytest.fixture
def trained(cli, tmp_path, monkeypatch):
    """trained(method, family=...) -> the folder of a run of a few steps."""
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)

    def run(method, *flags, family="olmoe", dtype=torch.float32, cut=False, out=None):
        base = tmp_path / family
        if not base.exists():
            toy(base, family, dtype)
            if cut:
                shard(base)
        if method.startswith(("lori-s", "hellori-s")):
            flags = (*flags, "--mask-from", run(method.replace("-s", "-d", 1), family=family))
        out = out or method
        size = ("--rank", 8, "--alpha", 16, "--steps", 3, "--lr", 0.02, "--no-eval")
        size += ("--k", 2) if parse_method(method).chooses else ()
        what = ("--model", base, "--task", "tiny-math", "--data", rows, "--method", method)
        code, _, err = cli("train.py", *what, *size, *flags, "--out", out)
        assert code == 0, err
        return tmp_path / out

    return run


def tokens(*shape):
    return torch.randint(0, 1024, shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model, batch):
    return model(batch)[0]


def in_transformers(folder):
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def peer_logits(family, folder, batch):
    if family == "deepseek":
        return deepseek_logits(folder, batch).float()
    return in_transformers(folder)(input_ids=batch).logits


QUICK = [
    ("olmoe", "hellora"),
    ("mixtral", "hellori-s"),
    ("deepseek", "lora"),
    ("olmoe", "dora"),
    ("qwen3_moe", "hellora"),
]
REST = [
    (family, method)
    for family in HUB
    for method in ("lora", "hellora", "hellori-s", "dora", "fft")
    if (family, method) not in QUICK
]
# every placement once, on the family whose heads are widest apart from hidden size / heads
PLACEMENTS = ["m", "c", "r", "none", "pure", "gate", "attn", "pure_c", "gate_m", "attn_r"]
REST += [("qwen3_moe", f"hellora_{suffix}") for suffix in PLACEMENTS]
REST += [("qwen3_moe", method) for method in ("lori-d", "lori-s", "hellori-d", "hellori-s_pure")]


@pytest.mark.parametrize(
    ("family", "method"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in REST]
)
def test_a_merged_checkpoint_is_the_live_model(cli, trained, family, method):
    """1e-4 on logits of size 10: fp32, merged or factored, and another library's order of sums."""
    folder = trained(method, family=family)
    code, _, err = cli("export.py", "--run", folder, "--format", "hub")
    assert code == 0, err
    batch = tokens(3, 17)
    live = logits_of(load_run(folder, merged=False)[0], batch)
    base = logits_of(MoEModel.from_pretrained(folder.parent / family), batch)
    assert (live - base).abs().max() > 0.1
    ours = logits_of(MoEModel.from_pretrained(folder / "hub"), batch)
    torch.testing.assert_close(ours, live, rtol=0, atol=1e-4)
    torch.testing.assert_close(peer_logits(family, folder / "hub", batch), live, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "n", "new"),
    [  # the oracle is a plain loop in float64 without a cache: fewer tokens of it
        ("olmoe", 50, 12),
        slow(("mixtral", 50, 12)),
        slow(("qwen3_moe", 50, 12)),
        ("deepseek", 5, 12),
        slow(("deepseek", 50, 3)),
    ],
)
def test_prompts_are_continued_alike(cli, trained, family, n, new):
    folder = trained("hellora", family=family)
    assert cli("export.py", "--run", folder, "--format", "hub")[0] == 0
    prompts = [row.tolist() for row in tokens(n, 8)]
    ours = generate(load_run(folder, merged=False)[0], prompts, new, (), 50)
    if family == "deepseek":
        theirs = [deepseek_greedy(folder / "hub", prompt, new) for prompt in prompts]
    else:
        model = in_transformers(folder / "hub")
        ids = torch.tensor(prompts)
        want = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
        out = model.generate(ids, **want, eos_token_id=None)
        theirs = out[:, 8:].tolist()
    assert ours == theirs


SAVES = {  # how transformers 5 may write a model: the settings of each save_pretrained in turn
    "original": [{}],
    "original, in shards": [{"max_shard_size": "300KB"}],
    "stacked": [{"save_original_format": False}],
    "stacked, in shards": [{"save_original_format": False, "max_shard_size": "300KB"}],
    "in one over shards": [{"max_shard_size": "200KB"}, {}],
    "stacked in one over shards": [{"max_shard_size": "200KB"}, {"save_original_format": False}],
    "in shards over more shards": [{"max_shard_size": "150KB"}, {"max_shard_size": "300KB"}],
}
QUICK_SAVES = [("olmoe", "in one over shards"), ("mixtral", "stacked, in shards")]
QUICK_SAVES += [("qwen3_moe", "stacked")]


def saved_by_transformers(family, saves, folder):
    """A random model, saved as `saves` say, each time with other weights: the last is returned."""
    transformers = pytest.importorskip("transformers", reason=NEEDS)
    size = {"vocab_size": 1024, "max_position_embeddings": 512, "eos_token_id": 1023}
    config = transformers.AutoConfig.for_model(**HUB[family] | size)
    for seed, how in enumerate(saves):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_bytes((ROOT / "tiny" / "tokenizer.json").read_bytes())
    return model


@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(f, w, marks=[] if (f, w) in QUICK_SAVES else pytest.mark.slow)
        for f in ("olmoe", "mixtral", "qwen3_moe")
        for w in SAVES
    ],
)
def test_what_transformers_saved_is_trained_and_goes_back(cli, trained, tmp_path, family, way):
    """2e-5: fp32, and another library's order of sums. Logits are of size 1 at random weights."""
    peer = saved_by_transformers(family, SAVES[way], tmp_path / family)
    batch = tokens(3, 17)
    with torch.no_grad():
        theirs = peer(input_ids=batch).logits
    base = logits_of(MoEModel.from_pretrained(tmp_path / family), batch)
    torch.testing.assert_close(base, theirs, rtol=0, atol=2e-5)

    folder = trained("hellora", family=family)
    code, _, err = cli("export.py", "--run", folder, "--format", "hub")
    assert code == 0, err
    live = logits_of(load_run(folder, merged=False)[0], batch)
    assert (live - base).abs().max() > 0.05
    out = folder / "hub"
    torch.testing.assert_close(peer_logits(family, out, batch), live, rtol=0, atol=2e-5)
    # the family's own layout, in files that say one thing
    names = [name for path in out.glob("*.safetensors") for name in load_file(path)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "gate_up_proj" in name]
    single = (out / "model.safetensors").exists()
    assert single != (out / "model.safetensors.index.json").exists() == ("in shards" in way)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    experts = {config[key] for key in ("num_experts", "num_local_experts") if key in config}
    assert len(experts) == 1


@pytest.mark.parametrize("alone", ["lm_head.weight", "model.layers.0.rotary_emb.inv_freq"])
def test_a_shard_without_any_weight_of_the_model_is_not_written(cli, trained, tmp_path, alone):
    """It would be an empty file, which no index names: a tied output layer, or no weight."""
    base = toy(tmp_path / "qwen3_moe", "qwen3_moe")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[alone] = tensors.get(alone, torch.ones(4))
    (base / "model.safetensors").unlink()
    first, last = (f"model-{n:05d}-of-00002.safetensors" for n in (1, 2))
    of = {name: last if name == alone else first for name in tensors}
    for path in (first, last):
        save_file({n: t for n, t in tensors.items() if of[n] == path}, base / path)
    index = json.dumps({"metadata": {}, "weight_map": of})
    (base / "model.safetensors.index.json").write_text(index)

    folder = trained("hellora_pure", "--catcher", "forward", family="qwen3_moe")
    code, _, err = cli("export.py", "--run", folder, "--format", "hub")
    assert code == 0, err
    named = json.loads((folder / "hub" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in (folder / "hub").glob("*.safetensors")} == set(named.values())
    batch = tokens(3, 17)
    live = logits_of(load_run(folder, merged=False)[0], batch)
    got = logits_of(MoEModel.from_pretrained(folder / "hub"), batch)
    torch.testing.assert_close(got, live, rtol=0, atol=2e-5)  # fp32


def test_shards_saved_over_a_single_file_are_refused_until_one_is_removed(cli, tmp_path):
    """transformers leaves the older single file there, and then reads that one."""
    folder = tmp_path / "base"
    peer = saved_by_transformers("olmoe", [{}, {"max_shard_size": "300KB"}], folder)
    code, _, err = cli("train.py", "--model", folder, "--steps", 1, "--out", tmp_path / "r")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "model.safetensors," in err
    assert "model.safetensors.index.json" in err
    (folder / "model.safetensors").unlink()
    batch = tokens(3, 17)
    with torch.no_grad():
        want = peer(input_ids=batch).logits
    got = logits_of(MoEModel.from_pretrained(folder), batch)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)  # fp32


@pytest.mark.parametrize("family", some_slow(["olmoe", "mixtral", "qwen3_moe"], ["qwen3_moe"]))
@pytest.mark.parametrize("method", ["hellora", "hellora_pure", "hellora_none", "lora", "hellori-s"])
def test_peft_loads_the_adapter_and_it_does_something(cli, trained, family, method):
    peft = pytest.importorskip("peft", reason=NEEDS)
    folder = trained(method, family=family)
    code, _, err = cli("export.py", "--run", folder, "--format", "peft")
    assert code == 0, err
    base, batch = in_transformers(folder.parent / family), tokens(3, 17)
    with torch.no_grad():
        before = base(input_ids=batch).logits
        after = peft.PeftModel.from_pretrained(base, folder / "peft")(input_ids=batch).logits
    live = logits_of(load_run(folder, merged=False)[0], batch)
    torch.testing.assert_close(after, live, rtol=0, atol=1e-4)  # fp32, logits of size 10
    assert (after - before).abs().max() > 0.1


def test_a_partial_peft_adapter_names_its_experts_and_nothing_else(cli, trained):
    folder = trained("hellora")
    assert cli("export.py", "--run", folder, "--format", "peft", "--partial")[0] == 0
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    hot = json.loads((folder / "run.json").read_text())["adapted"]
    experts = {m for m in config["target_modules"] if ".experts." in m}
    assert experts == {
        f"model.layers.{layer}.mlp.experts.{e}.{leaf}_proj"
        for layer, ids in hot.items()
        for e in ids
        for leaf in ("gate", "up", "down")
    }
    named = {k.split(".lora_")[0] for k in load_file(folder / "peft" / "adapter_model.safetensors")}
    assert named == {f"base_model.model.{m}" for m in config["target_modules"]}
    assert (config["r"], config["lora_alpha"]) == (8, 16)


def test_a_sharded_checkpoint_keeps_its_files_and_what_no_adapter_touches(cli, trained):
    folder = trained("hellora_pure", cut=True)
    base, out = folder.parent / "olmoe", folder / "hub"
    assert cli("export.py", "--run", folder, "--format", "hub")[0] == 0
    assert {p.name for p in out.iterdir()} == {p.name for p in base.iterdir()}
    hot = json.loads((folder / "run.json").read_text())["adapted"]
    touched = 0
    for path in base.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        assert list(before) == list(after)
        for name, value in before.items():
            parts = name.split(".")
            is_hot = ".experts." in name and int(parts[5]) in hot[parts[2]]
            touched += is_hot
            assert torch.equal(value, after[name]) != is_hot, name
    assert touched == 2 * 2 * 3


def test_a_bf16_checkpoint_stays_bf16_and_the_rounding_is_told(cli, trained):
    folder = trained("hellora", dtype=torch.bfloat16)
    code, out, err = cli("export.py", "--run", folder, "--format", "hub")
    assert code == 0, err
    after = load_file(folder / "hub" / "model.safetensors")
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert "rounding" in out.lower()
    # merged in fp32 and rounded once
    merged = load_run(folder, merged=True, dtype=torch.bfloat16)[0]
    again = MoEModel.from_pretrained(folder / "hub", torch.bfloat16)
    for (name, got), want in zip(again.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_a_float16_checkpoint_is_exported(cli, trained):
    folder = trained("hellora", dtype=torch.float16)
    for form in ("hub", "peft"):
        code, _, err = cli("export.py", "--run", folder, "--format", form)
        assert code == 0, err
    after = load_file(folder / "hub" / "model.safetensors")
    assert {t.dtype for t in after.values()} == {torch.float16}


def test_a_peft_config_names_a_pinned_model_as_the_hub_does(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "base_name", lambda model: "org/name@main")
    (tmp_path / "out").mkdir()
    export.write_peft(trained("hellora"), tmp_path / "out", partial=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "main")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "LICENSE", "chat_template.jinja"])
def test_a_hub_export_copies_no_file_from_outside_the_model(cli, trained, tmp_path, name):
    run, folder = trained("hellora"), tmp_path / "olmoe"
    secret = tmp_path / "secret"
    secret.write_text('{"password": 1}')
    (folder / name).symlink_to(secret)
    code, _, err = cli("export.py", "--run", run, "--format", "hub", "--out", tmp_path / "new")
    assert code == 2
    assert name in err
    assert not (tmp_path / "new").exists()
    (folder / name).unlink()
    (folder / "other.json").write_text("{}")
    (folder / name).symlink_to(folder / "other.json")
    code, _, err = cli("export.py", "--run", run, "--format", "hub", "--out", tmp_path / "new")
    assert code == 0, err


def test_two_tasks_add_up(cli, trained):
    a = trained("hellora", out="a")
    b = trained("hellora_c", "--seed", 5, out="b")
    code, _, err = cli("export.py", "--run", a, "--run", b, "--format", "hub", "--out", "ab")
    assert code == 0, err
    base = MoEModel.from_pretrained(a.parent / "olmoe")
    both = MoEModel.from_pretrained(a.parent / "ab")
    one, other = (load_run(folder, merged=True)[0] for folder in (a, b))
    for (name, w), w1, w2, w12 in zip(
        base.named_parameters(),
        one.parameters(),
        other.parameters(),
        both.parameters(),
        strict=True,
    ):
        # fp32, weights of size 1
        torch.testing.assert_close(w1 + w2 - w, w12, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("form", ["hub", "peft"])
def test_an_export_that_does_nothing_is_refused(trained, tmp_path, form):
    """The complaint of most users: a file that loads, and changes nothing."""
    folder = trained("hellora")
    written = tmp_path / "olmoe"
    if form == "peft":
        written = tmp_path / "peft"
        written.mkdir()
        export.write_peft(folder, written, partial=False)
        path = written / "adapter_model.safetensors"
        save_file({n: torch.zeros_like(t) for n, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="off by"):
        export.check([folder], written, form, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
@pytest.mark.parametrize(
    "lost", ["experts.1.down", "mlp.gate.weight", "layers.1.mlp.experts", "self_attn.v"]
)
def test_an_export_that_left_something_out_is_refused(trained, tmp_path, dtype, lost):
    """Even where rounding to bf16 costs more than what is missing: the bar is the merged model."""
    folder = trained("hellora_m", "--hot-experts", hot_list(tmp_path), dtype=dtype)
    written = tmp_path / "out"
    written.mkdir()
    export.write_hub([folder], written)
    export.check([folder], written, "hub", torch.device("cpu"))
    path, whole = written / "model.safetensors", load_file(written / "model.safetensors")
    base = load_file(tmp_path / "olmoe" / "model.safetensors")
    save_file({n: base[n] if lost in n else t for n, t in whole.items()}, path)
    with pytest.raises(ValueError, match="off by"):
        export.check([folder], written, "hub", torch.device("cpu"))


def hot_list(folder):
    path = folder / "hot.json"
    path.write_text(json.dumps({"rule": "global-hot", "experts": {"0": [0, 1], "1": [0, 1]}}))
    return path


def test_a_hardly_trained_adapter_is_exported(cli, trained):
    folder = trained("hellora", "--lr", 1e-6, dtype=torch.bfloat16)
    for form in ("peft", "hub"):
        code, out, err = cli("export.py", "--run", folder, "--format", form)
        assert code == 0, err
    assert "--format peft keeps it" in out  # bf16 swallows it all: said, and not hidden


def test_no_folder_of_the_users_is_touched_and_no_draft_stays(cli, trained, tmp_path):
    folder = trained("hellora")
    for name in ("keep.part", "keep.draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("x")
    assert cli("export.py", "--run", folder, "--format", "peft", "--out", tmp_path / "keep")[0] == 0
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "keep").iterdir()} == {"0o644"}
    before = sorted(tmp_path.rglob("*"))
    weights = tmp_path / "olmoe" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8] + b"\0" * 8)
    code, _, err = cli("export.py", "--run", folder, "--format", "hub")
    assert code == 2
    assert "olmoe" in err
    weights.write_bytes(whole)
    (tmp_path / "olmoe").rename(tmp_path / "gone")
    code, _, err = cli("export.py", "--run", folder, "--format", "hub")
    assert code == 2
    assert "olmoe" in err
    (tmp_path / "gone").rename(tmp_path / "olmoe")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_a_mistake_that_is_named(trained, tmp_path):
    """A limit on the size of files stands in for the disk: the write fails in the same place."""
    folder = trained("lora")
    command = (
        f"ulimit -f 40; exec {sys.executable} {ROOT / 'export.py'} --run {folder} --format peft"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "peft" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not [p for p in folder.iterdir() if "peft" in p.name]


@pytest.mark.parametrize(
    ("method", "flags", "want"),
    [
        ("dora", ["--format", "peft"], "dora"),
        slow(("fft", ["--format", "peft"], "fft")),
        slow(("hellora", ["--format", "hub", "--partial"], "--partial")),
        ("hellora", ["--format", "hub", "--out", "."], "--out"),
        ("hellora", ["--format", "hub", "--run", "nowhere"], "nowhere"),
        ("hellora", ["--format", "hub", "--run", "hellora"], "run"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(cli, trained, method, flags, want):
    folder = trained(method)
    before = sorted(folder.parent.rglob("*"))
    code, _, err = cli("export.py", "--run", folder, *flags)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert want in err
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("method", ["hellora", slow("lora"), "hellori-s", slow("hellora_gate")])
def test_the_example_for_transformers_computes_and_trains_the_same(trained, method, monkeypatch):
    pytest.importorskip("transformers", reason=NEEDS)
    monkeypatch.syspath_prepend(ROOT / "examples")
    from transformers_hellora import apply_run

    folder = trained(method)
    ours, _, run = load_run(folder, merged=False)
    theirs = apply_run(in_transformers(folder.parent / "olmoe"), folder)
    batch = tokens(3, 17)
    with torch.no_grad():
        got = theirs(input_ids=batch).logits
    # fp32, logits of size 10
    torch.testing.assert_close(got, logits_of(ours, batch), rtol=0, atol=1e-4)

    trained_now = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    masked = sum(int((~b).sum()) for n, b in theirs.named_buffers() if n.endswith("mask"))
    assert sum(p.numel() for p in trained_now.values()) - masked == run["trained"]
    for m in adapters(ours).values():
        m.lora.A.requires_grad_(parse_method(method).train_a)
        m.lora.B.requires_grad_(True)
    targets = batch.roll(-1, 1)
    ours(batch, targets=targets)[0].backward()
    F.cross_entropy(
        theirs(input_ids=batch).logits.flatten(0, 1), targets.flatten(), reduction="sum"
    ).backward()
    want = sorted(float(p.grad.norm()) for p in ours.parameters() if p.grad is not None)
    have = sorted(float(p.grad.norm()) for p in trained_now.values() if p.grad is not None)
    # fp32 sums
    torch.testing.assert_close(torch.tensor(have), torch.tensor(want), rtol=1e-4, atol=1e-4)


def exact(name):
    """Whether a number of golden.json is no float."""
    return name.startswith(("about", "text", "examples", "1 experts", "2", "3 trained"))


def test_the_golden_numbers_for_ports_are_what_the_code_gives(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from golden import golden

    want = json.loads((ROOT / "examples" / "golden.json").read_text())
    got = json.loads(json.dumps(golden()))
    assert got.keys() == want.keys()
    for name, value in want.items():
        if exact(name):
            assert got[name] == value, name
        elif isinstance(value, dict):
            # fp32 gradients, other thread counts
            assert got[name] == pytest.approx(value, rel=1e-3), name
        else:
            # fp32; what golden.json says of it
            assert got[name] == pytest.approx(value, abs=1e-5), name


def test_golden_json_says_what_its_first_numbers_are_of():
    """As a port has it: from the file alone, an example at a time, without our data and catcher."""
    golden = json.loads((ROOT / "examples" / "golden.json").read_text())
    model, examples = MoEModel.from_pretrained("tiny"), golden["examples"]
    visits = {i: torch.zeros(64, dtype=torch.long) for i in range(4)}
    summed, n_targets = 0.0, 0
    for n, example in enumerate(examples):
        ids = torch.tensor(example["ids"])
        logits, routing = model(ids[None, :-1])
        for i, r in routing.items():
            visits[i] += r.expert_ids.flatten().bincount(minlength=64)
        if n == 0:
            first = golden["1 logits after the first example's inputs, of ids 0 to 4"]
            assert logits[0, -1, :5].tolist() == pytest.approx(first, abs=1e-5)  # fp32
            last = {str(i): r.expert_ids[0, -1].sort()[0].tolist() for i, r in routing.items()}
            assert last == golden["1 experts of its last input"]
        if n < 8:
            targets = ids[example["answer"] :]
            summed += F.cross_entropy(
                logits[0, example["answer"] - 1 :], targets, reduction="sum"
            ).item()
            n_targets += len(targets)
    assert summed / n_targets == pytest.approx(golden["1 loss of the base"], abs=1e-5)  # fp32
    assert {str(i): v.tolist() for i, v in visits.items()} == golden[
        "2 visits of each layer's experts"
    ]
    for i, v in visits.items():  # a stable sort: of equal experts the lower id first
        hot = sorted(sorted(range(64), key=lambda e: (-v[e].item(), e))[:8])
        assert hot == golden["2 hot experts"][str(i)]
    most = visits[2].sort(descending=True)[0]
    assert most[7] - most[8] == 1  # as "about" warns


def test_a_port_in_numpy_with_gradients_by_hand_gives_the_golden_numbers(monkeypatch):
    """So they are not only what our code gives: only golden.json and the checkpoint are shared."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import numpy_port

    found, want = numpy_port.numbers(), numpy_port.GOLDEN
    assert want.keys() - found.keys() == {
        "about", "text of the first example", "examples", "1 experts of its last input",
    }  # fmt: skip
    for name, ours in found.items():
        if exact(name):
            assert ours == want[name], name
        elif isinstance(ours, dict):
            assert ours == pytest.approx(want[name], rel=1e-3), name  # our fp32 against its fp64
        else:
            assert ours == pytest.approx(want[name], abs=1e-5), name  # fp32
