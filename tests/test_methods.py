"""DoRA and LoRI: against PEFT, against their definitions, and through whole runs."""

import copy
import json

import pytest
import torch
from conftest import HUB, small_run, some_slow, write_checkpoint, write_rows
from safetensors.torch import load_file
from test_hellora import adapted, equal_in_fp32, logits, tokens
from test_train import ROWS, one_line
from torch.utils._python_dispatch import TorchDispatchMode

from hellora import (
    AdaptedRows,
    LoRALinear,
    LowRank,
    Method,
    adapters,
    attach,
    dora_scale,
    init_adapters,
    lori_masks,
    merge,
    parse_method,
)
from moe_model import MATMULS, Ends, Linear, MoEModel
from train import make_optimizer

WHOLE = [
    "lora",
    "dora",
    "lori-d",
    "hellora",
    "hellori-d",
    "hellora_r",
    "hellora_none",
    "hellora_attn",
]


def dora_linear(out_dim=24, in_dim=16, rank=4):
    """One adapted Linear with B away from zero, and plain copies of what is in it."""
    draw = torch.Generator().manual_seed(0)
    base = Linear(in_dim, out_dim).requires_grad_(False)
    base.weight.copy_(torch.randn(out_dim, in_dim, generator=draw) / in_dim**0.5)
    ours = LoRALinear(base, Method(dora=True), rank, 2 * rank)
    with torch.no_grad():
        ours.lora.A.copy_(torch.randn(rank, in_dim, generator=draw) / in_dim**0.5)
        ours.lora.B.copy_(torch.randn(out_dim, rank, generator=draw) * 0.3)
        ours.lora.magnitude.copy_(base.weight.norm(dim=1) * 1.1)
    return ours, torch.randn(5, in_dim, generator=draw)


def test_dora_equals_peft_in_output_gradients_and_merge():
    peft = pytest.importorskip(
        "peft", reason="dev requirement; the definition test below covers it"
    )
    ours, x = dora_linear()
    peer = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False))
    peer[0].weight.data = ours.weight.data.clone()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, target_modules=["0"], lora_dropout=0.0
    )
    theirs = peft.get_peft_model(peer, config)
    layer = theirs.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"].weight
    pairs = [
        (layer.lora_A["default"].weight, ours.lora.A),
        (layer.lora_B["default"].weight, ours.lora.B),
        (magnitude, ours.lora.magnitude),
    ]
    for their, our in pairs:
        their.data = our.detach().clone().view_as(their)
    got, want = ours(x), theirs(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # fp32, outputs near 1
    got.square().mean().backward()
    want.square().mean().backward()
    for their, our in pairs:
        torch.testing.assert_close(our.grad, their.grad.view_as(our), rtol=0, atol=1e-6)  # fp32
    merged = theirs.merge_and_unload()[0].weight
    with torch.no_grad():
        whole = ours(torch.eye(16)).T  # the matrix that it is
    torch.testing.assert_close(whole, merged, rtol=0, atol=1e-6)  # fp32


def test_dora_gives_each_row_its_magnitude_as_length():
    ours, x = dora_linear()
    direction = ours.weight + 2 * ours.lora.B @ ours.lora.A
    unit = direction / direction.norm(dim=1, keepdim=True)
    want = x @ (ours.lora.magnitude[:, None] * unit).T
    torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-5)  # fp32


def test_doras_row_lengths_are_those_of_the_sum_whatever_b_has_grown_to():
    """Of stacked matrices, as PEFT computes them: W + scale B A is made, and its rows measured."""
    draw = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(3, *of, generator=draw) for of in ((40, 24), (4, 24), (40, 4)))
    for growth in (0.0, 1e-3, 1.0, 1e3):
        update = LowRank(a, growth * b, 2.0, magnitude=torch.ones(3, 40))
        want = (weight.double() + 2.0 * growth * (b.double() @ a.double())).norm(dim=-1)
        # fp32: a row has 24 weights, and no sum here cancels
        torch.testing.assert_close(1 / dora_scale(update, weight).double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rest", [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_dora_live_and_merged_agree_where_an_update_nearly_cancels_its_row(rest):
    """Row 0 of W + BA is `rest` of W's. Below sqrt(eps) = 3.5e-4 both take it for that long."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=draw)
    a, b = torch.randn(2, 24, generator=draw), torch.randn(40, 2, generator=draw)
    a[0], b[0] = weight[0], torch.tensor([rest - 1, 0.0])
    update = LowRank(a, b, 1.0, magnitude=weight.norm(dim=-1))
    live = dora_scale(update, weight)[0].item()
    after = weight[0] + update.delta()[0]
    merged = (update.merged(weight)[0].norm() / after.norm()).item() if after.any() else live
    assert 1 / max(rest, 4e-4) / 4 < live <= 2900
    assert 1 / 3 < live / merged < 3  # fp32: at 3.5e-4 the square is all noise, ...
    if rest >= 1e-2:
        assert live == pytest.approx(merged, rel=0.01)  # ... at 1e-2 eps / 1e-4 of it


def test_dora_keeps_a_row_of_zeros_and_gives_it_its_length_once_there_is_an_update():
    weight, a = torch.zeros(2, 24), torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    b = torch.tensor([[0.0, 0.0], [1e-3, 0.0]])
    update = LowRank(a, b, 1.0, magnitude=torch.tensor([3.0, 5.0]))
    assert dora_scale(update, weight)[0] == 1
    merged = update.merged(weight)
    assert merged[0].eq(0).all()
    torch.testing.assert_close(merged[1].norm(), torch.tensor(5.0))
    live = dora_scale(update, weight)[1] * update.delta()[1]
    torch.testing.assert_close(live, merged[1])


class Sizes(TorchDispatchMode):
    """The largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if torch.is_tensor(made) and not op.is_view:
            self.largest = max(self.largest, made.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_makes_no_tensor_of_the_weights_size(olmoe, dtype):
    """Of a plain matrix and of a stack. Rows, outputs and factors are all smaller here."""
    model = MoEModel.from_pretrained(olmoe, dtype)
    attach(model, parse_method("dora"), {0: list(range(8))}, 1, 1)
    init_adapters(model, 0)
    one, stack = model.layers[0].attn.q, model.layers[0].moe.experts.up
    x = torch.ones(2, 32, dtype=dtype)
    ends = Ends(torch.tensor([1, 1, 1, 1, 1, 1, 1, 2], dtype=torch.int32))
    rows = AdaptedRows(torch.tensor([0, 1]), ends, MATMULS["loop"])
    for module, more in ((one, ()), (stack, (rows,))):
        with Sizes() as sizes:
            module(x, *more).sum().backward()
        assert sizes.largest < module.weight.numel(), module


@pytest.mark.parametrize(
    "place",
    [
        ("attn.o", 5),  # one row of a plain matrix
        ("moe.experts.down", (2, 7)),  # one row of one expert
        ("moe.experts.gate", 1),  # all of an expert's matrix
        ("moe.router", slice(None)),  # all of a matrix
        ("moe.experts.up", (0, slice(3, 9))),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_on_rows_of_zeros_starts_as_the_base_and_learns(olmoe, place, dtype):
    """PEFT divides 0 by 0 there (peft 2049). Such rows are in public checkpoints."""
    (site, rows), base = place, MoEModel.from_pretrained(olmoe, dtype).requires_grad_(False)
    base.layers[1].get_submodule(site).weight[rows] = 0
    model = copy.deepcopy(base)
    attach(model, parse_method("dora"), {i: list(range(8)) for i in range(2)}, 4, 8)
    init_adapters(model, 0)
    batch, bar = tokens(2, 9), 2e-6 if dtype == torch.float32 else 0
    torch.testing.assert_close(model(batch)[0], base(batch)[0], rtol=0, atol=bar)  # fp32
    optimizer = make_optimizer(model, 0.01)
    for _ in range(3):
        model(batch[:, :-1], targets=batch[:, 1:])[0].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        live = model(batch)[0]
        assert model.layers[1].get_submodule(site).lora.B.abs().max() > 0
        merge(model)
        merged = model(batch)[0]
    assert merged.isfinite().all()
    if dtype == torch.float32:  # bf16 may round a router's logits to another expert
        equal_in_fp32(merged, live)


@pytest.mark.parametrize(
    "name", ["dora", "lori-d", "hellori-d", "hellora_r", "hellora_none", "hellora_attn"]
)
def test_every_method_starts_as_the_base_and_merges_as_live(checkpoint, name):
    base = logits(MoEModel.from_pretrained(checkpoint))
    # Fp32.
    torch.testing.assert_close(logits(adapted(checkpoint, name, noise=0)), base, rtol=0, atol=2e-6)
    model = adapted(checkpoint, name)
    live = logits(model)
    merge(model)
    equal_in_fp32(logits(model), live)
    assert (live - base).abs().max() > 0.01


def test_the_papers_literal_start_cannot_learn(olmoe):
    """A = 0, B random and A frozen (section 3 of the paper, taken literally): B has no gradient."""
    model = adapted(olmoe, "hellori-d")
    for m in adapters(model).values():
        m.lora.A.data.zero_()
    loss, _ = model(torch.arange(20).view(2, 10), targets=torch.arange(20).view(2, 10))
    loss.backward()
    grads = [m.lora.B.grad for m in adapters(model).values()]
    assert all(g.abs().max() == 0 for g in grads)


# ---- LoRI's mask ---------------------------------------------------------------------------------


def some_b(seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "layers.0.attn.q": (12, 4),
        "layers.0.moe.experts.up": (3, 10, 4),
        "layers.1.attn.q": (12, 4),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.mark.parametrize("scope", ["model", "layer", "matrix"])
def test_a_mask_keeps_exactly_the_largest_entries_of_its_scope(scope):
    b = some_b()
    masks = lori_masks(b, 0.1, scope)

    def each(tensors):  # {(name, index in the stack): one matrix}
        parts = {n: t.reshape(-1, *t.shape[-2:]) for n, t in tensors.items()}
        return {(n, i): m for n, stack in parts.items() for i, m in enumerate(stack)}

    sizes, marks = each(b), each(masks)
    key = {"model": lambda n, i: 0, "layer": lambda n, i: n[:8], "matrix": lambda n, i: (n, i)}[
        scope
    ]
    for group in {key(*at) for at in sizes}:
        values = torch.cat([m.abs().flatten() for at, m in sizes.items() if key(*at) == group])
        kept = torch.cat([m.flatten() for at, m in marks.items() if key(*at) == group])
        assert kept.sum() == round(0.1 * len(values))
        assert values[kept].min() > values[~kept].max()


def test_a_mask_does_not_depend_on_the_order_of_modules_and_breaks_ties_exactly():
    b = some_b()
    again = lori_masks(dict(reversed(b.items())), 0.1, "model")
    assert all(torch.equal(again[n], m) for n, m in lori_masks(b, 0.1, "model").items())
    equal = {n: torch.ones_like(t) for n, t in b.items()}
    assert sum(m.sum() for m in lori_masks(equal, 0.1, "model").values()) == round(
        0.1 * sum(t.numel() for t in b.values())
    )


@pytest.fixture
def quick(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    return small_run(toy, rows, "--no-eval", "--steps", 4)


@pytest.mark.parametrize(
    ("d", "s"),
    some_slow(
        [
            ("lori-d", "lori-s"),
            ("hellori-d", "hellori-s"),
            ("hellori-d_pure_c", "hellori-s_pure_c"),
        ],
        [("hellori-d", "hellori-s")],
    ),
)
def test_a_masked_run_trains_its_mask_and_nothing_else(cli, quick, tmp_path, d, s):
    assert cli("train.py", *quick, "--method", d, "--out", "d")[0] == 0
    code, out, err = cli("train.py", *quick, "--method", s, "--mask-from", "d", "--out", "s")
    assert code == 0, err
    dense, sparse = (load_file(tmp_path / name / "adapter.safetensors") for name in "ds")
    b = {n: t for n, t in sparse.items() if n.endswith(".B")}
    total = sum(t.numel() for t in b.values())
    masks = {n: sparse[n.removesuffix("B") + "mask"] for n in b}
    assert sum(m.sum() for m in masks.values()) == round(0.1 * total)
    assert all((t[~masks[n]] == 0).all() for n, t in b.items())
    # Visited entries have moved.
    assert sum((t != 0).sum() for t in b.values()) > 0.5 * round(0.1 * total)
    # The same frozen A.
    assert all(torch.equal(sparse[n], dense[n]) for n in sparse if n.endswith(".A"))
    record = json.loads((tmp_path / "s" / "run.json").read_text())
    assert record["adapted"] == json.loads((tmp_path / "d" / "run.json").read_text())["adapted"]
    assert record["trained"] == round(0.1 * total)
    assert f"{round(0.1 * total):,} of" in out


def test_off_mask_entries_stay_zero_under_weight_decay_and_clipping(olmoe):
    model = adapted(olmoe, "hellori-s", noise=0)
    draw = torch.Generator().manual_seed(0)
    for m in adapters(model).values():
        m.lora.mask.copy_(torch.rand(m.lora.B.shape, generator=draw) < 0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.5)
    for _ in range(5):
        model(torch.arange(40).view(2, 20), targets=torch.arange(40).view(2, 20))[0].backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.01)
        optimizer.step()
        optimizer.zero_grad()
    assert len(trained) == len(adapters(model))  # the frozen A has no place in the optimizer
    for m in adapters(model).values():
        assert (m.lora.B[~m.lora.mask] == 0).all()
    assert any((m.lora.B != 0).any() for m in adapters(model).values())


def test_a_masked_run_says_how_its_experts_were_counted(cli, quick, tmp_path):
    counted = ["--count", "answers", "--catcher", "forward"]
    assert cli("train.py", *quick, "--method", "hellori-d", *counted, "--out", "d")[0] == 0
    masked = [*quick, "--method", "hellori-s", "--mask-from", "d", "--out", "s"]
    code, _, err = cli("train.py", *masked)
    assert code == 0, err
    listed = ["--hot-experts", "d/hot_experts.json", "--out", "listed"]
    assert cli("train.py", *quick, "--method", "hellora", *listed)[0] == 0
    for name in ("s", "listed"):
        assert json.loads((tmp_path / name / "run.json").read_text())["count"] == "answers"


def test_a_mask_is_that_of_a_run_with_the_same_prompts(cli, quick, tmp_path):
    d = [*quick, "--method", "hellori-d", "--catcher", "forward", "--out", "d"]
    assert cli("train.py", *d)[0] == 0
    masked = [*quick, "--method", "hellori-s", "--mask-from", "d", "--out", "s"]
    code, _, err = cli("train.py", *masked, "--template", "lori")
    assert code == 2
    assert "template is plain, want lori" in one_line(err)
    path = tmp_path / "d" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"bos": 5}))
    code, _, err = cli("train.py", *masked)
    assert code == 2
    assert "bos is 5, want None" in one_line(err)
    del record["bos"]  # a run from before there was one
    path.write_text(json.dumps(record))
    code, _, err = cli("train.py", *masked)
    assert code == 0, err


def test_a_masked_run_says_what_it_needs(cli, quick, tmp_path):
    code, _, err = cli("train.py", *quick, "--method", "hellori-s")
    assert code == 2
    assert "--mask-from" in one_line(err)
    assert "hellori-d" in err  # what makes one
    assert cli("train.py", *quick, "--method", "hellori-d", "--out", "d")[0] == 0
    for flags, says in ((["--k", 3], "k"), (["--method", "lori-s"], "hellori-d")):
        code, _, err = cli("train.py", *quick, "--method", "hellori-s", *flags, "--mask-from", "d")
        assert code == 2
        assert says in one_line(err)
    code, _, err = cli("train.py", *quick, "--method", "lora", "--mask-from", "d")
    assert code == 2
    code, _, err = cli(
        "train.py", *quick, "--method", "hellori-s", "--mask-from", "d", "--redraw-a", "--out", "s"
    )
    assert code == 0, err
    d, s = (load_file(tmp_path / name / "adapter.safetensors") for name in "ds")
    assert not any(torch.equal(d[n], s[n]) for n in d if n.endswith(".A"))


@pytest.mark.parametrize("name", some_slow(WHOLE, ["dora", "hellora"]))
def test_every_method_trains_saves_and_evaluates(cli, quick, tmp_path, name):
    few = write_rows(tmp_path / "few.jsonl", ROWS[:4])
    args = [a for a in quick if a != "--no-eval"]
    code, _, err = cli("train.py", *args, "--eval-data", few, "--method", name, "--out", "r")
    assert code == 0, err
    scored = (tmp_path / "r" / "answers-tiny-math.jsonl").read_text()
    for how in ([], ["--factored"]):
        assert cli("eval_gsm8k.py", "--run", "r", *how)[0] == 0
        assert (tmp_path / "r" / "answers-tiny-math.jsonl").read_text() == scored


def test_shared_experts_and_dense_layers_are_adapted_in_full(tmp_path):
    model = adapted(write_checkpoint(tmp_path / "d", HUB["deepseek"]), "hellora_pure")
    names = {n.split(".", 2)[2] for n in adapters(model)}
    assert names == {
        f"{of}.{leaf}"
        for of in ("moe.shared", "dense", "moe.experts")
        for leaf in ("gate", "up", "down")
    }


def test_lora_on_a_whole_model_equals_transformers_with_peft(olmoe):
    """Loss and every gradient, from the same A and B.

    transformers 5 fuses gate and up of all experts into one parameter, on which PEFT's LoRA has one
    A. Rank 2r with A = [A_gate; A_up] and a block-diagonal B computes our two updates. PEFT stores
    a stack's A as [E * r, in] expert by expert, and its B as [out, r * E] rank by rank.
    """
    transformers = pytest.importorskip(
        "transformers", reason="dev requirement; the definition tests cover it"
    )
    peft = pytest.importorskip("peft", reason="dev requirement; the definition tests cover it")
    r, ours = 4, adapted(olmoe, "lora", rank=4)
    base = transformers.AutoModelForCausalLM.from_pretrained(olmoe, dtype=torch.float32)
    config = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"gate_up_proj": 2 * r},
        alpha_pattern={"gate_up_proj": 4 * r},
    )
    theirs = peft.get_peft_model(base, config)
    named, of = dict(theirs.named_parameters()), adapters(ours)
    # (our parameter, their parameter, where in it ours stands, viewed as a stack of matrices)
    pairs = []

    def put(our, name, view, at):
        with torch.no_grad():
            view(named[name])[at] = our
        pairs.append((our, named[name], view, at))

    for i in range(2):
        layer = f"base_model.model.model.layers.{i}."
        sites = {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"} | {"moe.router": "mlp.gate"}
        for site, name in sites.items():
            for part in "AB":
                our = getattr(of[f"layers.{i}.{site}"].lora, part)
                put(our, f"{layer}{name}.lora_{part}.default.weight", lambda t: t, ...)
        for fused, leaves in (("base_layer.", ("gate", "up")), ("", ("down",))):
            for n, leaf in enumerate(leaves):
                lora = of[f"layers.{i}.moe.experts.{leaf}"].lora
                rows, out = slice(n * r, (n + 1) * r), lora.B.shape[1]
                name = f"{layer}mlp.experts.{fused}lora_{{}}.default.weight"
                put(
                    lora.A, name.format("A"), lambda t: t.unflatten(0, (8, -1)), (slice(None), rows)
                )
                where = (slice(None), slice(n * out, (n + 1) * out), rows)
                put(
                    lora.B,
                    name.format("B"),
                    lambda t: t.unflatten(1, (-1, 8)).permute(2, 0, 1),
                    where,
                )

    batch = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(4))
    want = theirs(input_ids=batch, labels=batch).loss  # shifted by one inside
    got = ours(batch[:, :-1], targets=batch[:, 1:])[0] / batch[:, 1:].numel()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # fp32
    got.backward()
    want.backward()
    assert len(pairs) == 2 * 2 * (5 + 3)
    for our, their, view, at in pairs:
        torch.testing.assert_close(our.grad, view(their.grad)[at], rtol=0, atol=1e-5)  # fp32


@pytest.mark.slow
@pytest.mark.parametrize(
    "suffix", ["", "_m", "_c", "_r", "_none", "_attn", "_pure", "_gate", "_pure_c"]
)
@pytest.mark.parametrize("base", ["lora", "dora", "lori-d", "hellora", "hellori-d"])
def test_every_method_with_every_suffix_scores_the_same_merged_as_live(
    cli, quick, tmp_path, base, suffix
):
    """And the -s run that follows a -d run."""
    few = write_rows(tmp_path / "few.jsonl", ROWS[:4])
    args = [*(a for a in quick if a != "--no-eval"), "--eval-data", few]
    runs = [("d", [])] + ([("s", ["--mask-from", "d"])] if base.endswith("-d") else [])
    for out, flags in runs:
        name = base.replace("-d", f"-{out}") + suffix
        code, _, err = cli("train.py", *args, "--method", name, "--out", out, *flags)
        assert code == 0, err
        scored = (tmp_path / out / "answers-tiny-math.jsonl").read_text()
        for how in ([], ["--factored"]):
            assert cli("eval_gsm8k.py", "--run", out, *how)[0] == 0
            assert (tmp_path / out / "answers-tiny-math.jsonl").read_text() == scored
