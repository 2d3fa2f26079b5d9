"""The decoder against oracles: a three-line MoE, its uncached self, transformers' numbers."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import HUB, ROOT, write_checkpoint
from oracle import deepseek_logits
from safetensors.torch import load_file, save_file

from moe_model import IGNORE, KVCache, MoEModel, Routing, load_balancing_loss
from plumbing.checkpoint import (
    BACKBONES,
    Checkpoint,
    base_parameters,
    empty_model,
    locate,
    parse_config,
)


def tokens(*shape, vocab=96, seed=1):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def test_moe_layer_is_the_sum_over_chosen_experts(checkpoint):
    """Oracle: mistral-inference's loop, one expert after the other, with no sorting."""
    model = MoEModel.from_pretrained(checkpoint)
    moe, cfg = model.layers[-1].moe, model.cfg
    x = torch.randn(2, 7, cfg.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, routing = moe(x)
        flat = x.flatten(0, 1)
        weights, chosen = torch.topk(F.softmax(flat @ moe.router.weight.T, dim=-1), cfg.top_k)
        if cfg.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        want = torch.zeros_like(flat) if moe.shared is None else moe.shared(flat)
        for e in range(cfg.n_experts):
            at, nth = torch.where(chosen == e)
            gate, up, down = (
                getattr(moe.experts, leaf).weight[e] for leaf in ("gate", "up", "down")
            )
            want[at] += weights[at, nth, None] * (
                (F.silu(flat[at] @ gate.T) * (flat[at] @ up.T)) @ down.T
            )
    assert torch.equal(routing.expert_ids.flatten(0, 1), chosen)
    # fp32: other order of sums
    torch.testing.assert_close(got.flatten(0, 1), want, rtol=0, atol=2e-6)


def test_grouped_and_looped_experts_agree_with_gradients(checkpoint):
    grads = {}
    for experts in ("grouped", "loop"):
        model = MoEModel.from_pretrained(checkpoint, matmul=experts)
        loss, _ = model(tokens(2, 9), targets=tokens(2, 9, seed=2))
        loss.backward()
        grads[experts] = [loss.detach(), *(p.grad for p in model.parameters())]
    for a, b in zip(*grads.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # fp32: other order of sums


@pytest.mark.parametrize("rank_like_width", [2, 6])
def test_a_width_the_grouped_kernel_cannot_take_is_computed_all_the_same(rank_like_width, tmp_path):
    """Rows of 8 or 24 bytes are no multiple of 16: the grouped form must fall back, not fail."""
    hub = HUB["olmoe"] | {"intermediate_size": rank_like_width}
    folder = write_checkpoint(tmp_path / "narrow", hub)
    with torch.no_grad():
        grouped = MoEModel.from_pretrained(folder)(tokens(1, 5))[0]
        looped = MoEModel.from_pretrained(folder, matmul="loop")(tokens(1, 5))[0]
    assert torch.equal(grouped, looped)


def test_recomputation_changes_neither_loss_nor_gradients_nor_routing(checkpoint):
    results = []
    for recompute in (False, True):
        model = MoEModel.from_pretrained(checkpoint)
        model.recompute = recompute
        loss, routing = model(tokens(2, 9), targets=tokens(2, 9, seed=2))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        # each layer once
        assert list(routing) == list(range(model.cfg.n_dense, model.cfg.n_layers))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_right_padding_does_not_change_real_positions(checkpoint):
    model = MoEModel.from_pretrained(checkpoint)
    short, padded = tokens(1, 6), torch.cat([tokens(1, 6), tokens(1, 5, seed=9)], 1)
    with torch.no_grad():
        # fp32
        torch.testing.assert_close(model(padded)[0][:, :6], model(short)[0], rtol=0, atol=5e-6)


def test_cached_decoding_of_left_padded_prompts_equals_the_full_forward(checkpoint):
    model = MoEModel.from_pretrained(checkpoint)
    pads, batch = torch.tensor([0, 3, 5]), tokens(3, 12)
    cache = KVCache(model.cfg, pads, 12, torch.float32)
    with torch.no_grad():
        got = [model(batch[:, :7], cache)[0]]
        got += [model(batch[:, t : t + 1], cache)[0] for t in range(7, 12)]
        got = torch.cat(got, 1)  # [3, 6, V]
        for row, pad in enumerate(pads):
            want = model(batch[row : row + 1, pad:])[0][0, -6:]
            torch.testing.assert_close(got[row], want, rtol=0, atol=1e-5)  # fp32 through 2 layers


def test_a_cache_goes_on_with_the_rows_that_are_kept(olmoe):
    model, batch = MoEModel.from_pretrained(olmoe), tokens(3, 8)
    cache = KVCache(model.cfg, torch.tensor([0, 2, 1]), 8, torch.float32)
    with torch.no_grad():
        model(batch[:, :7], cache)
        cache.keep(torch.tensor([1]))
        got = model(batch[1:2, 7:], cache)[0][0, 0]
        want = model(batch[1:2, 2:])[0][0, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # fp32


def test_summed_loss_is_the_cross_entropy_over_targets_alone(olmoe, monkeypatch):
    monkeypatch.setattr("moe_model.LOSS_CHUNK", 4)  # several chunks, the last one short
    model, batch, targets = MoEModel.from_pretrained(olmoe), tokens(2, 9), tokens(2, 9, seed=3)
    targets[0, :4] = IGNORE
    loss, _ = model(batch, targets=targets)
    want = F.cross_entropy(model(batch)[0].flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)  # fp32 sums
    a, b = (torch.autograd.grad(value, model.head.weight)[0] for value in (loss, want))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # fp32 sums


def routed(logits, top_k):
    gate, ids = logits.softmax(-1).topk(top_k)
    return Routing(ids, gate, logits)


def test_a_uniform_router_has_the_least_balancing_loss_which_is_top_k():
    """64 tokens that each prefer another run of 8 experts: f and P are both uniform."""
    logits = torch.full((1, 64, 64), -1.0)
    for t in range(64):
        logits[0, t, torch.arange(t, t + 8) % 64] = 1.0
    real = torch.ones(1, 64, dtype=torch.bool)
    assert load_balancing_loss({0: routed(logits, 8)}, real).item() == pytest.approx(8.0, rel=1e-6)


def test_balancing_loss_is_blind_to_layers_that_collapse_apart():
    """The paper's premise: 8 layers, each on its own 8 of 64 experts, look balanced when pooled."""
    layers = {}
    for i in range(8):
        logits = torch.full((1, 16, 64), -30.0)
        logits[..., 8 * i : 8 * i + 8] = 0.0
        layers[i] = routed(logits, 8)
    real = torch.ones(1, 16, dtype=torch.bool)
    assert load_balancing_loss(layers, real).item() == pytest.approx(8.0, rel=1e-6)
    assert load_balancing_loss({0: layers[0]}, real).item() == pytest.approx(64.0, rel=1e-6)


def test_balancing_loss_ignores_padding():
    logits = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 3:] = False
    changed = logits.clone()
    changed[1, 3:] = 50.0
    assert torch.equal(*(load_balancing_loss({0: routed(x, 2)}, real) for x in (logits, changed)))


# ---- against transformers ------------------------------------------------------------------------


def test_logits_and_balancing_loss_equal_transformers_golden_values():
    """tests/peers/make_golden.py wrote these with transformers, so it need not be installed."""
    golden = load_file(ROOT / "tests/fixtures/golden/transformers.safetensors")
    for family in ("olmoe", "mixtral"):
        folder = ROOT / "tests/fixtures/golden" / family
        model = MoEModel.from_pretrained(folder)
        real = golden[f"{family}.real"].bool()
        with torch.no_grad():
            logits, routing = model(golden[f"{family}.tokens"])
        want = golden[f"{family}.logits"]
        # fp32, logits up to 8
        torch.testing.assert_close(logits[real], want[real], rtol=0, atol=2e-5)
        aux = load_balancing_loss(routing, real)
        torch.testing.assert_close(aux, golden[f"{family}.aux"], rtol=0, atol=1e-6)  # fp32, one sum


SHAPES = [
    ("olmoe", {}),
    ("olmoe", {"num_key_value_heads": 1, "norm_topk_prob": True}),
    (
        "olmoe",
        {"num_experts": 64, "num_experts_per_tok": 8, "hidden_size": 64, "num_hidden_layers": 3},
    ),
    (
        "olmoe",
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "rms_norm_eps": 1e-3},
    ),
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 3, "num_attention_heads": 8}),
]


@pytest.mark.parametrize(("family", "change"), SHAPES)
@pytest.mark.parametrize("as_on_the_hub", [True, False])
def test_logits_equal_transformers(family, change, as_on_the_hub, tmp_path):
    """config.json as on the Hub (rope_theta), and as transformers 5 writes it (rope_parameters)."""
    transformers = pytest.importorskip(
        "transformers", reason="dev requirement; golden values cover it"
    )
    hub = HUB[family] | change
    config = transformers.AutoConfig.for_model(**hub)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(0)
    for p in peer.parameters():
        noise = torch.randn(p.shape, generator=draw)
        p.data = 1 + 0.2 * noise if p.dim() == 1 else 1.5 * noise / p.shape[-1] ** 0.5
    peer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    if as_on_the_hub:
        written = json.loads((tmp_path / "config.json").read_text())
        written |= {
            "rope_theta": written.pop("rope_parameters")["rope_theta"],
            "rope_scaling": None,
        }
        (tmp_path / "config.json").write_text(json.dumps(written))
    batch, real = tokens(3, 11), torch.ones(3, 11, dtype=torch.bool)
    real[1, 8:] = real[2, 3:] = False
    with torch.no_grad():
        want = peer(input_ids=batch, attention_mask=real.long()).logits
        got, _ = MoEModel.from_pretrained(tmp_path)(batch)
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=2e-5)  # fp32, logits up to 8


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_topk_prob": True, "num_key_value_heads": 2, "rope_theta": 500.0},
        {
            "first_k_dense_replace": 2,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "rms_norm_eps": 1e-2,
        },
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 6,
            "hidden_size": 64,
            "num_attention_heads": 2,
        },
    ],
)
def test_deepseek_logits_equal_an_oracle_that_shares_no_code(change, tmp_path):
    """transformers has no DeepSeekMoE-16B; tests/oracle.py is dense, in loops, in float64."""
    folder = write_checkpoint(tmp_path, HUB["deepseek"] | change)
    batch = tokens(3, 11)
    with torch.no_grad():
        got, _ = MoEModel.from_pretrained(folder)(batch)
    # fp32
    torch.testing.assert_close(got.double(), deepseek_logits(folder, batch), rtol=0, atol=2e-5)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_olmoe_asks_for_exactly_its_hub_tensors_on_meta():
    """3,219 tensors and 6,919,161,856 parameters: allenai/OLMoE-1B-7B-0924."""
    base = base_parameters(BACKBONES["olmoe-1b-7b"].cfg)
    names = [name for _, tensors in base.values() for name in tensors]
    want = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(16):
        layer = f"model.layers.{i}."
        want |= {f"{layer}{n}_layernorm.weight" for n in ("input", "post_attention")}
        want |= {f"{layer}self_attn.{n}_proj.weight" for n in "qkvo"}
        want |= {f"{layer}self_attn.{n}_norm.weight" for n in "qk"}
        want |= {f"{layer}mlp.gate.weight"}
        want |= {
            f"{layer}mlp.experts.{e}.{n}_proj.weight"
            for e in range(64)
            for n in ("gate", "up", "down")
        }
    assert len(names) == 3219
    assert set(names) == want


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("olmoe-1b-7b", 6_919_161_856),
        ("mixtral-8x7b", 46_702_792_704),
        ("deepseekmoe-16b", 16_375_728_128),
    ],
)
def test_backbones_have_the_paper_s_sizes(name, total):
    model = empty_model(BACKBONES[name].cfg, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == total


def test_stacked_experts_are_the_checkpoint_s_in_order(olmoe):
    raw, model = load_file(olmoe / "model.safetensors"), MoEModel.from_pretrained(olmoe)
    for e in range(8):
        name = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
        assert torch.equal(model.layers[1].moe.experts.down.weight[e], raw[name])


def corrupt(folder, how):
    """Break a good checkpoint; what the error must name."""
    path = folder / "model.safetensors"
    raw = load_file(path)
    name = "model.layers.0.mlp.gate.weight"
    if how == "no config":
        (folder / "config.json").unlink()
        return "config.json"
    if how == "config not JSON":
        (folder / "config.json").write_text("{")
        return "config.json"
    if how == "no weights":
        path.unlink()
        return "model.safetensors"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return "model.safetensors"
    if how == "garbage":
        path.write_bytes(b"\xff" * 64)
        return "model.safetensors"
    if how == "missing tensor":
        del raw[name]
    if how == "extra tensor":
        raw["model.layers.7.mlp.gate.weight"] = torch.zeros(1)
        name = "model.layers.7.mlp.gate.weight"
    if how == "misshapen tensor":
        raw[name] = torch.zeros(3, 3)
    save_file(raw, path)
    return name


HOW = (
    "no config,config not JSON,no weights,truncated,garbage,"
    "missing tensor,extra tensor,misshapen tensor"
)


@pytest.mark.parametrize("how", HOW.split(","))
def test_a_broken_checkpoint_is_refused_by_name(olmoe, how):
    wanted = corrupt(olmoe, how)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        MoEModel.from_pretrained(olmoe)
    assert wanted in str(caught.value)


def test_our_reader_gives_what_the_safetensors_package_gives(tmp_path):
    """Every dtype that weights come in, an empty and a scalar tensor; any cut file is refused."""
    draw = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tensors = {
        f"t{i}": torch.randn(3, 5, generator=draw).to(dtype) for i, dtype in enumerate(dtypes)
    }
    tensors |= {"none": torch.empty(0, 4), "one": torch.tensor(2.5)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    source = Checkpoint(tmp_path)
    assert source.tensors.keys() == tensors.keys()
    for name, want in load_file(path).items():
        assert torch.equal(source.read(name), want)
    assert torch.equal(source.read_rows("t1", 1, 2), load_file(path)["t1"][1:])
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            Checkpoint(tmp_path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


HOSTILE = {
    "huge header": (3 * 10**9).to_bytes(8, "little") + b"{}",
    "header beyond all": b"\xff" * 8 + b"{}",
    "deep": b"[" * 100_000,
    "not UTF-8": '{"a": 1}'.encode("utf-16"),
    "list": b"[]",
    "number": b"7",
    "no entry": b'{"a": 1}',
    "twice": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}',
    "unknown dtype": b'{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}',
    "negative": b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    "float shape": b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    "bool shape": b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    "float place": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}',
    "reversed": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    "gap": b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]}}',
    "overlap": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "giant": b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}',
    "big integers": b'{"a": {"dtype": "F32", "shape": ['
    + b"9" * 4000
    + b'], "data_offsets": [0, 4]}}',
    "many dimensions": b'{"a": {"dtype": "F32", "shape": ['
    + b"1," * 300_000
    + b'1], "data_offsets": [0, 4]}}',
    "escape codes": b'{"\\u001b[2J": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_header_is_one_short_line(how, tmp_path):
    raw = HOSTILE[how]
    header = (
        raw
        if how.startswith(("huge", "header"))
        else len(raw).to_bytes(8, "little") + raw + b"\0" * 4
    )
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        Checkpoint(tmp_path)
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("file", [5, None, ["x"]])
def test_an_index_of_other_types_is_refused(file, tmp_path):
    index = {"weight_map": {"a": file, "b": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_refused_by_name(olmoe):
    raw = load_file(olmoe / "model.safetensors")
    (olmoe / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(raw, "model-00001-of-00002.safetensors")}
    (olmoe / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors"):
        MoEModel.from_pretrained(olmoe)


def test_an_index_cannot_point_out_of_its_folder(olmoe):
    index = {"weight_map": {"model.norm.weight": "../../etc/passwd"}}
    (olmoe / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        Checkpoint(olmoe)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"), ("model_type", None), ("hidden_act", "gelu"), ("clip_qkv", 8.0),
        ("attention_bias", True), ("sliding_window", 4096), ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("rope_parameters", {"rope_type": "yarn"}), ("rope_parameters", 7),
        ("model_type", []), ("head_dim", 5), ("hidden_size", 33), ("hidden_size", 36),
        ("hidden_size", "32"), ("hidden_size", -32), ("num_experts", 10**12),
        ("num_experts_per_tok", 9),
        ("norm_topk_prob", "yes"), ("rms_norm_eps", True), ("num_hidden_layers", 1.5),
    ],
)  # fmt: skip
def test_a_setting_we_would_get_wrong_is_refused(key, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        parse_config(HUB["olmoe"] | {key: value})


def test_harmless_settings_are_never_refused():
    harmless = {
        "clip_qkv": None,
        "attention_bias": False,
        "sliding_window": 0,
        "hidden_act": "silu",
    }
    harmless |= {"rope_parameters": {"rope_theta": None, "rope_type": None}}
    harmless |= {
        "rope_scaling": {"rope_type": "default"},
        "tie_word_embeddings": False,
        "something": "else",
    }
    assert parse_config(HUB["olmoe"] | harmless) == parse_config(HUB["olmoe"])


def test_an_unknown_model_name_is_refused_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match="olmoe-1b-7b"):
        MoEModel.from_pretrained("olmoe-9b")


def test_a_revision_pins_what_is_taken_from_the_hub(tmp_path, monkeypatch):
    """The Hub client itself, on a cache as it keeps one: two commits, and main is the second."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo, commits = tmp_path / "models--some--moe", ("1" * 40, "2" * 40)
    for commit in commits:
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commits[1])
    assert locate("some/moe").name == commits[1]
    assert locate(f"some/moe@{commits[0]}").name == commits[0]
