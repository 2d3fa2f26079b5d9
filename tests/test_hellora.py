"""Adapters: what they compute, what they leave alone, where they sit, what a merge leaves."""

import pytest
import torch
from conftest import HUB, write_checkpoint

from hellora import (
    METHODS,
    adapter_state,
    adapters,
    attach,
    count_params,
    detach,
    init_adapters,
    merge,
    parse_method,
)
from moe_model import MoEModel
from plumbing import files, saves
from plumbing.checkpoint import BACKBONES, empty_model
from plumbing.saves import fill, read_adapter, save_adapter

NAMES = [
    "lora",
    "hellora",
    "hellora_m",
    "hellora_c",
    "hellora_pure",
    "hellora_gate",
    "hellora_pure_c",
]


def saved_run(folder, model):
    """What a run leaves: its adapter, and a run.json that knows the checksum."""
    save_adapter(folder, adapter_state(model))
    record = {
        "model": "x",
        "task": "tiny-math",
        "method": "hellora",
        "dtype": "fp32",
        "finished": True,
    }
    sums = {"model": "x", "data": "x", "adapter": files.sha256(folder / "adapter.safetensors")}
    files.write_json(folder / "run.json", record | {"hashes": sums})


def tokens(*shape, seed=1):
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def experts_for(model, method, k=3):
    cfg = model.cfg
    n = cfg.n_experts if method.rule == "all" else k
    return {i: sorted((e * 5 + i) % cfg.n_experts for e in range(n)) for i in cfg.moe_layers}


def adapted(folder, name, rank=4, seed=0, noise=0.05, experts="grouped"):
    """A model with adapters whose B has left zero, so that they do something."""
    model, method = MoEModel.from_pretrained(folder, matmul=experts), parse_method(name)
    attach(model, method, experts_for(model, method), rank, 2 * rank)
    for m in adapters(model).values():
        m.lora.A.data.fill_(float("nan"))  # so that a start which leaves something out is seen
        m.lora.B.data.fill_(float("nan"))
    init_adapters(model, seed)
    if not noise:
        return model
    draw = torch.Generator().manual_seed(seed)
    for m in adapters(model).values():
        m.lora.B.data = noise * torch.randn(m.lora.B.shape, generator=draw)
    return model


def logits(model, seed=1):
    with torch.no_grad():
        return model(tokens(3, 10, seed=seed))[0]


def equal_in_fp32(got, want):
    """Merged or live: other orders of products, 2 or 3 layers deep. AssertionError if it is more.

    The bar is on the norm, which hardly depends on a draw: of 3 families, 4 methods and 12 seeds
    the most was 1.2e-6 of it, while the largest single difference was anything from 3e-6 to 2e-5.
    """
    assert (got - want).norm() <= 5e-6 * want.norm()


@pytest.mark.parametrize("name", NAMES)
def test_an_attached_model_starts_as_the_base(checkpoint, name):
    base = logits(MoEModel.from_pretrained(checkpoint))
    # fp32, logits of size 10: a token's rows may be added up in two parts
    torch.testing.assert_close(logits(adapted(checkpoint, name, noise=0)), base, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("experts", ["grouped", "loop"])
def test_an_update_is_scale_b_a_and_merging_keeps_the_function(checkpoint, name, experts):
    model = adapted(checkpoint, name, experts=experts)
    before, live = logits(MoEModel.from_pretrained(checkpoint)), logits(model)
    raw = {n: p.clone() for n, p in model.named_parameters()}
    hot = experts_for(model, parse_method(name))
    sites = {n: hot[int(n.split(".")[1])] if ".experts." in n else None for n in adapters(model)}
    merge(model)
    assert not adapters(model)
    equal_in_fp32(logits(model), live)
    assert (live - before).abs().max() > 0.05  # a no-op adapter would pass everything above
    for (
        n,
        p,
    ) in model.named_parameters():  # the merged weight by the definition, computed here on its own
        want = raw[n]
        site = n.removesuffix(".weight")
        if site in sites:
            a, b = raw[f"{site}.lora.A"], raw[f"{site}.lora.B"]
            at = slice(None) if sites[site] is None else sites[site]
            want[at] += 2.0 * torch.einsum("...or,...ri->...oi", b, a)
        torch.testing.assert_close(p, want, rtol=0, atol=1e-6)  # fp32


def test_only_tokens_that_visit_a_hot_expert_are_changed(olmoe):
    """One layer deep, hellora_pure moves exactly the tokens that choose an adapted expert."""
    base, model = MoEModel.from_pretrained(olmoe), adapted(olmoe, "hellora_pure")
    x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want, routing = base.layers[0].moe(x)
        got, _ = model.layers[0].moe(x)
    hot = torch.tensor(experts_for(model, parse_method("hellora_pure"))[0])
    visits_hot = torch.isin(routing.expert_ids, hot).any(-1)
    assert 0 < visits_hot.sum() < visits_hot.numel()
    # The others keep their value up to the last bits of fp32, which hang on a row's place.
    changed = ((got - want).abs() > 1e-6 * want.abs().max()).any(-1)
    assert torch.equal(changed, visits_hot)


@pytest.mark.parametrize("name", [*NAMES, "fft"])
def test_training_changes_exactly_what_the_method_names(checkpoint, name):
    model, method = MoEModel.from_pretrained(checkpoint), parse_method(name)
    attach(model, method, experts_for(model, method), 4, 8)
    init_adapters(model, 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1
    )
    for step in range(3):
        loss, _ = model(tokens(4, 16, seed=step), targets=tokens(4, 16, seed=9 + step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if name == "fft" or ".lora." in n}
    frozen = {n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad}
    assert not frozen


def test_detaching_gives_the_base_back_bit_for_bit(checkpoint):
    model = adapted(checkpoint, "hellora")
    detach(model)
    assert torch.equal(logits(model), logits(MoEModel.from_pretrained(checkpoint)))


def test_the_start_of_a_depends_on_seed_and_place_only(olmoe):
    def start(name, seed):
        return {n: m.lora.A for n, m in adapters(adapted(olmoe, name, seed=seed, noise=0)).items()}

    full, bare, other = start("hellora", 0), start("hellora_gate", 0), start("hellora", 1)
    assert all(torch.equal(a, full[n]) for n, a in bare.items())
    assert not any(torch.equal(a, full[n]) for n, a in other.items())
    bound = 32**-0.5  # kaiming_uniform(a=sqrt 5): U(-1/sqrt(in), 1/sqrt(in))
    a = full["layers.0.attn.q"]
    assert 0.9 * bound < a.abs().max() <= bound


@pytest.mark.parametrize("name", ["hellora", "lora", "hellora_pure_c"])
def test_an_adapter_file_gives_the_same_model_back(olmoe, tmp_path, name):
    model = adapted(olmoe, name)
    saved_run(tmp_path, model)
    fresh = adapted(olmoe, name, seed=5)
    fill(adapter_state(fresh), read_adapter(tmp_path), tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ValueError, match="does not fit"):
        fill(adapter_state(adapted(olmoe, "hellora_gate")), read_adapter(tmp_path), tmp_path)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_adapter_is_taken_from_the_last_save_if_that_is_sound(
    olmoe, tmp_path, how, capsys
):
    model = adapted(olmoe, "hellora")
    saved_run(tmp_path, model)
    saves.save(tmp_path, 1, adapter_state(model), model, torch.optim.AdamW(model.parameters()))
    path = tmp_path / "adapter.safetensors"
    want = {name: t.clone() for name, t in read_adapter(tmp_path).items()}  # not a map of the file
    raw = path.read_bytes()
    path.write_bytes(raw[:-7] if how == "cut" else raw[:-7] + bytes([raw[-7] ^ 1]) + raw[-6:])
    got = read_adapter(tmp_path)
    assert "adapter.safetensors" in capsys.readouterr().out
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], t) for name, t in want.items())
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter\.safetensors"):
        read_adapter(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing"):
        read_adapter(tmp_path)


def test_deepseek_s_router_is_left_alone_and_what_every_token_visits_is_adapted(tmp_path):
    model = adapted(write_checkpoint(tmp_path / "d", HUB["deepseek"]), "hellora")
    sites = {name.split(".", 2)[2] for name in adapters(model)}
    mlp = {
        f"{of}.{leaf}"
        for of in ("moe.shared", "dense", "moe.experts")
        for leaf in ("gate", "up", "down")
    }
    assert sites == {f"attn.{leaf}" for leaf in "qkvo"} | mlp


# ---- names and numbers of the paper --------------------------------------------------------------


def counted(backbone, name, k):
    cfg, method = BACKBONES[backbone].cfg, parse_method(name)
    model = empty_model(cfg, torch.float32)
    n = cfg.n_experts if method.rule == "all" else k
    attach(model, method, {i: list(range(n)) for i in cfg.moe_layers}, 32, 64)
    return count_params(model, method)


@pytest.mark.parametrize(
    ("backbone", "name", "k", "trained", "percent"),
    [  # Tables 2, 3, 5 and 7 of the paper, and integers that were worked out by hand
        ("olmoe-1b-7b", "lora", 0, 173_015_040 + 138_444_800, 4.3075),
        ("olmoe-1b-7b", "hellora", 2, 10_485_760 + 8_421_376, 0.2725),
        ("olmoe-1b-7b", "hellora", 4, 15_728_640 + 12_615_680, 0.4080),
        ("olmoe-1b-7b", "hellora", 8, 26_214_400 + 21_004_288, 0.6778),
        ("olmoe-1b-7b", "hellora_c", 8, 26_214_400 + 21_004_288, 0.6778),
        ("olmoe-1b-7b", "hellora", 16, 47_185_920 + 37_781_504, 1.2131),
        ("olmoe-1b-7b", "hellora_pure", 8, 20_971_520 + 16_777_216, 0.5426),
        ("olmoe-1b-7b", "hellora_gate", 8, 22_020_096 + 16_809_984, 0.5581),
        ("mixtral-8x7b", "lora", 0, 205_520_896 + 278_929_408, 1.0267),
        ("mixtral-8x7b", "hellora", 2, 67_108_864 + 77_602_816, 0.3089),
        ("deepseekmoe-16b", "lora", 0, 318_142_464 + 283_701_248, 3.5449),
        ("deepseekmoe-16b", "hellora", 12, 70_858_752 + 65_171_456, 0.8238),
    ],
)
def test_trained_parameters_are_the_paper_s(backbone, name, k, trained, percent):
    got, stored = counted(backbone, name, k)
    assert got == trained
    assert round(100 * got / stored, 4) == percent


def test_the_paper_s_15_74_percent_is_a_ratio_of_percents():
    (lora, of), (hellora, of_hot) = (
        counted("olmoe-1b-7b", "lora", 0),
        counted("olmoe-1b-7b", "hellora", 8),
    )
    assert round(100 * (hellora / of_hot) / (lora / of), 2) == 15.74
    assert round(100 * hellora / lora, 2) == 15.16


def test_suffixes_stack_and_each_says_one_thing():
    assert parse_method("hellora_pure_c") == parse_method("hellora_c_pure")
    assert parse_method("hellora_c").rule == "cold"
    assert parse_method("hellora_m").rule == "global-hot"
    assert parse_method("hellora_gate").sites == ("moe.router",)


def test_a_method_that_adapts_nothing_is_refused():
    with pytest.raises(ValueError, match="adapts nothing"):
        parse_method("hellora_none_pure")


@pytest.mark.parametrize(
    "name", ["helora", "", "hellora_x", "hellora_m_c", "hellora_c_c", "fft_c", "_c", "hellora_"]
)
def test_an_unknown_method_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=", ".join(METHODS)):
        parse_method(name)
