"""The decoder against oracles: a three-line MoE, its uncached self, transformers' numbers."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import HUB, ROOT, stacked, write_checkpoint
from oracle import deepseek_logits
from safetensors.torch import load_file, save_file

from generate import generate
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
    ("mixtral", {"head_dim": 12, "sliding_window": 11}),  # as long as the rows: it hides nothing
    ("qwen3_moe", {}),  # head_dim 12 in place of 8, GQA, norm_topk_prob
    ("qwen3_moe", {"head_dim": 4, "norm_topk_prob": False, "num_key_value_heads": 1}),
    ("qwen3_moe", {"tie_word_embeddings": True, "sliding_window": 2, "use_sliding_window": False}),
    ("qwen3_moe", {"tie_word_embeddings": True, "norm_topk_prob": False, "head_dim": 32}),
    (
        "qwen3_moe",
        {"num_experts": 32, "num_experts_per_tok": 8, "hidden_size": 48, "num_hidden_layers": 3},
    ),
    (
        "qwen3_moe",
        {"num_attention_heads": 5, "num_key_value_heads": 5, "num_experts_per_tok": 1,
         "rope_theta": 100.0, "rms_norm_eps": 1e-3},
    ),
]  # fmt: skip


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
        if family == "qwen3_moe":
            written["num_experts"] = written.pop("num_local_experts")
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
    """transformers has no DeepSeekMoE-16B. tests/oracle.py is dense, in loops, in float64."""
    folder = write_checkpoint(tmp_path, HUB["deepseek"] | change)
    batch = tokens(3, 11)
    with torch.no_grad():
        got, _ = MoEModel.from_pretrained(folder)(batch)
    # fp32
    torch.testing.assert_close(got.double(), deepseek_logits(folder, batch), rtol=0, atol=2e-5)


def test_tied_embeddings_get_the_gradient_of_both_uses_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="dev requirement; a peer")
    folder = write_checkpoint(tmp_path, HUB["qwen3_moe"] | {"tie_word_embeddings": True})
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours, batch, targets = MoEModel.from_pretrained(folder), tokens(2, 9), tokens(2, 9, seed=2)
    ours(batch, targets=targets)[0].backward()
    logits = peer(input_ids=batch).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    want = peer.model.embed_tokens.weight.grad
    # fp32 sums, gradients up to 8
    torch.testing.assert_close(ours.embed.weight.grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_prompts_of_uneven_length_are_continued_as_transformers_does(family, tmp_path):
    transformers = pytest.importorskip("transformers", reason="dev requirement; a peer")
    folder = write_checkpoint(tmp_path, HUB[family])
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokens(n, seed=n).tolist() for n in (1, 2, 5, 9, 20, 31)]
    ids = torch.tensor([[0] * (31 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (31 - len(p)) + [1] * len(p) for p in prompts])
    want = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = peer.generate(ids, attention_mask=mask, **want)[:, 31:].tolist()
    assert generate(MoEModel.from_pretrained(folder), prompts, 20, (), 6) == theirs


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
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_backbones_have_their_known_sizes(name, total):
    model = empty_model(BACKBONES[name].cfg, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == total


def test_stacked_experts_are_the_checkpoint_s_in_order(olmoe):
    raw, model = load_file(olmoe / "model.safetensors"), MoEModel.from_pretrained(olmoe)
    for e in range(8):
        name = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
        assert torch.equal(model.layers[1].moe.experts.down.weight[e], raw[name])


def corrupt(folder, how):
    """Break a good checkpoint. Returns what the error must name."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek"])
def test_experts_stacked_by_transformers_5_are_the_same_model(family, dtype, tmp_path):
    folder = write_checkpoint(tmp_path, HUB[family], dtype=dtype)
    want = MoEModel.from_pretrained(folder).state_dict()
    assert any(t.dim() == 3 for t in stacked(folder).values())
    got = MoEModel.from_pretrained(folder).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("more experts", "layers.0.mlp.experts.gate_up_proj"),
        ("fewer experts", "layers.0.mlp.experts.7."),
        ("a matrix beside", "layers.0.mlp.experts.gate_up_proj"),
        ("an odd row", "layers.0.mlp.experts"),
        ("two dimensions", "layers.0.mlp.experts"),
    ],
)
def test_a_stack_that_is_not_the_configs_is_refused_by_name(how, wanted, olmoe):
    tensors = stacked(olmoe)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    whole = tensors[stack]
    if how == "a matrix beside":
        for leaf in ("gate", "up"):
            name = f"model.layers.0.mlp.experts.{{}}.{leaf}_proj.weight"
            tensors |= {name.format(e): torch.zeros(16, 32) for e in range(8)}
    else:
        tensors[stack] = {
            "more experts": torch.cat([whole, whole[:1]]),
            "fewer experts": whole[:7].clone(),
            "an odd row": torch.cat([whole, whole[:, :1]], dim=1),
            "two dimensions": whole.flatten(1),
        }[how]
    save_file(tensors, olmoe / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(wanted)):
        MoEModel.from_pretrained(olmoe)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.int32])
def test_what_is_no_weight_is_passed_over_unless_a_weight_is_wanted_there(dtype, olmoe):
    path = olmoe / "model.safetensors"
    want, tensors = MoEModel.from_pretrained(olmoe).state_dict(), load_file(path)
    save_file(tensors | {"model.position_ids": torch.ones(4, dtype=dtype)}, path)
    got = MoEModel.from_pretrained(olmoe).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)
    kind = {"int64": "I64", "bool": "BOOL", "uint8": "U8", "int32": "I32"}[str(dtype)[6:]]
    save_file(tensors | {"model.norm.weight": torch.ones(32, dtype=dtype)}, path)
    with pytest.raises(ValueError, match=rf"model\.norm\.weight is {kind}"):
        MoEModel.from_pretrained(olmoe)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_refused_by_name_with_what_to_do(dtype, name, olmoe):
    path = olmoe / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors.get(name, torch.ones(4)).to(dtype)}, path)
    with pytest.raises(ValueError, match=rf"{name}.* is F8_E.*quantised.*want.*bf16"):
        MoEModel.from_pretrained(olmoe)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"quant_method": "fp8"}, "fp8"), ({"quant_method": "gptq", "bits": 4}, "gptq"), (["x"], "x")],
)
def test_a_quantised_model_is_refused_by_its_config_with_what_to_do(settings, named):
    with pytest.raises(ValueError, match=rf"quantization_config.*{named}.*want.*bf16"):
        parse_config(HUB["qwen3_moe"] | {"quantization_config": settings})


# ---- where two files, or two places in one, say the same thing -----------------------------------


def in_shards(folder, n=3):
    """Cut model.safetensors into n files with an index, beside it."""
    tensors = load_file(folder / "model.safetensors")
    of = {name: f"model-{i % n + 1:05d}-of-{n:05d}.safetensors" for i, name in enumerate(tensors)}
    for path in set(of.values()):
        save_file({name: t for name, t in tensors.items() if of[name] == path}, folder / path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))


@pytest.mark.parametrize("left", [0, 1, 2])
def test_an_index_left_over_from_an_older_save_is_passed_over(left, olmoe, tmp_path):
    """As transformers does, which deletes the shards and leaves their index."""
    want = MoEModel.from_pretrained(olmoe).state_dict()
    older = write_checkpoint(tmp_path / "older", HUB["olmoe"], seed=1)
    in_shards(older)
    for file in [*older.glob("*.index.json"), *sorted(older.glob("model-*"))[:left]]:
        shutil.copy(file, olmoe)
    got = MoEModel.from_pretrained(olmoe).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_models_in_one_folder_are_refused_and_both_named(seed, olmoe, tmp_path):
    """transformers would read the single file, also where it is the older one."""
    other = write_checkpoint(tmp_path / "other", HUB["olmoe"], seed=seed)
    in_shards(other)
    shutil.copy(other / "model.safetensors", olmoe)
    for file in other.glob("model*"):
        shutil.copy(file, olmoe)
    with pytest.raises(ValueError, match=r"model\.safetensors,.*model\.safetensors\.index\.json"):
        MoEModel.from_pretrained(olmoe)
    (olmoe / "model.safetensors").unlink()
    MoEModel.from_pretrained(olmoe)


def test_an_index_of_the_single_file_is_no_contradiction(olmoe):
    of = dict.fromkeys(load_file(olmoe / "model.safetensors"), "model.safetensors")
    (olmoe / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))
    MoEModel.from_pretrained(olmoe)


def test_a_single_file_that_lacks_tensors_names_the_index_beside_it(olmoe):
    path = olmoe / "model.safetensors"
    in_shards(olmoe)
    (olmoe / "model-00002-of-00003.safetensors").unlink()
    corrupt(olmoe, "missing tensor")
    assert path.is_file()
    with pytest.raises(ValueError, match=r"lacks.*mlp\.gate.*index\.json"):
        MoEModel.from_pretrained(olmoe)


AGREE = [  # what config.json says, and the angles' base of it
    ({"rope_theta": 7.0}, 7.0),
    ({"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}}, 9.0),
    ({"rope_theta": 9, "rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}}, 9.0),
    ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, 7.0),
    ({"rope_theta": 7.0, "rope_parameters": None, "rope_scaling": None}, 7.0),
    ({"rope_scaling": {"rope_theta": 5.0, "type": "default"}}, 5.0),
]


@pytest.mark.parametrize(("says", "theta"), AGREE)
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_the_angles_base_is_read_where_transformers_reads_it(family, says, theta):
    hub = {key: value for key, value in HUB[family].items() if key != "rope_theta"} | says
    assert parse_config(hub).rope_theta == theta
    if transformers := pytest.importorskip("transformers", reason="the values say it as well"):
        config = transformers.AutoConfig.for_model(**json.loads(json.dumps(hub)))
        assert config.rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize(
    ("says", "both"),
    [
        (
            {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 9.0}},
            ("rope_theta is 7.0", "rope_parameters.rope_theta is 9.0"),
        ),
        (
            {"rope_theta": 7.0, "rope_scaling": {"rope_theta": 9.0, "type": "default"}},
            ("rope_theta is 7.0", "rope_scaling.rope_theta is 9.0"),
        ),
        (
            {"rope_scaling": {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 1e6}},
            ("rope_scaling.rope_theta is 10000.0", "rope_parameters.rope_theta is 1000000.0"),
        ),
        (
            {"num_experts": 8, "num_local_experts": 4},
            ("num_experts is 8", "num_local_experts is 4"),
        ),
        (
            {"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}},
            ("rope", "linear"),
        ),
    ],
)
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_two_places_that_differ_are_refused_and_both_named(family, says, both):
    hub = {key: value for key, value in HUB[family].items() if key != "rope_theta"} | says
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        parse_config(hub)
    assert all(part in str(caught.value) for part in both)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_the_number_of_experts_has_two_names(family):
    """transformers 5 writes num_local_experts for Qwen3-MoE, and 4 num_experts."""
    n = parse_config(HUB[family]).n_experts
    for key in ("num_experts", "num_local_experts"):
        hub = {k: v for k, v in HUB[family].items() if not k.endswith("experts")} | {key: n}
        assert parse_config(hub) == parse_config(HUB[family])


@pytest.mark.parametrize("differ", [False, True])
def test_an_output_layer_beside_tied_embeddings_must_be_equal_to_them(differ, tmp_path):
    folder = write_checkpoint(tmp_path, HUB["qwen3_moe"] | {"tie_word_embeddings": True})
    path = folder / "model.safetensors"
    tensors, want = load_file(path), MoEModel.from_pretrained(folder)(tokens(1, 5))[0]
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + differ}, path)
    if not differ:
        assert torch.equal(MoEModel.from_pretrained(folder)(tokens(1, 5))[0], want)
        return
    with pytest.raises(ValueError, match=r"tie_word_embeddings.*lm_head.*embed_tokens"):
        MoEModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "says", "context"),
    [
        ("mixtral", {"sliding_window": 40}, 40),
        ("mixtral", {"sliding_window": 4096}, 64),
        ("mixtral", {"sliding_window": None}, 64),
        ("qwen3_moe", {"sliding_window": 40, "use_sliding_window": False}, 64),
        ("qwen3_moe", {"sliding_window": 40}, 64),
    ],
)
def test_a_window_only_bounds_the_length_of_rows(family, says, context, tmp_path):
    """Up to its length it hides nothing, so longer rows alone are refused."""
    model = MoEModel.from_pretrained(write_checkpoint(tmp_path, HUB[family] | says))
    assert model.cfg.max_len == context
    generate(model, [[1] * (context - 1)], 1, (), 1)
    with pytest.raises(ValueError, match=str(context)):
        generate(model, [[1] * context], 1, (), 1)


# ---- hostile files -------------------------------------------------------------------------------


def test_our_reader_gives_what_the_safetensors_package_gives(tmp_path):
    """Every dtype of weights, an empty and a scalar tensor. Any cut file is refused."""
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
        ("rope_parameters", {"rope_type": ["default"]}), ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("model_type", []), ("head_dim", 5), ("hidden_size", 33), ("hidden_size", 36),
        ("hidden_size", "32"), ("hidden_size", -32), ("num_experts", 10**12),
        ("num_experts_per_tok", 9),
        ("norm_topk_prob", "yes"), ("rms_norm_eps", True), ("num_hidden_layers", 1.5),
    ],
)  # fmt: skip
def test_a_setting_we_would_get_wrong_is_refused(key, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        parse_config(HUB["olmoe"] | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_only_layers", [0]), ("mlp_only_layers", [1]), ("decoder_sparse_step", 2),
        ("use_sliding_window", True), ("head_dim", 7), ("attention_bias", True),
        ("tie_word_embeddings", "yes"), ("num_key_value_heads", 3),
        ("transformers_weights", "adapter.safetensors"),
    ],
)  # fmt: skip
def test_a_qwen3_we_would_get_wrong_is_refused(key, value):
    with pytest.raises(ValueError, match=r"config\.json"):
        parse_config(HUB["qwen3_moe"] | {key: value})
    harmless = {"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False}
    assert parse_config(HUB["qwen3_moe"] | harmless) == parse_config(HUB["qwen3_moe"])


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
        for name in ("config.json", "model.safetensors"):
            (repo / "snapshots" / commit / name).write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commits[1])
    assert locate("some/moe").name == commits[1]
    assert locate(f"some/moe@{commits[0]}").name == commits[0]
