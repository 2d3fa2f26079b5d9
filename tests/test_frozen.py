"""What a step computes, frozen by its results: losses, gradients, updates, precision, first losses.

Everything goes through public entry points, and is compared with a computation written out here.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, small_run, write_rows
from torch.func import functional_call

from catcher import Catcher
from hellora import adapters, attach, init_adapters, parse_method
from moe_model import MoEModel
from plumbing.data import Encoded
from train import make_optimizer, train_step

ROWS = [
    {"question": f"{'Tom ' * (b % 3)}has {a} + {b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
    for a in range(8)
    for b in range(5)
]
N_PROMPT = 3  # of the examples below


def examples(n, length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Encoded(torch.randint(1, 96, (length,), generator=draw).tolist(), N_PROMPT)
        for _ in range(n)
    ]


def batch_of(rows):
    """Inputs and targets of rows of one length."""
    ids = torch.tensor([row.ids for row in rows])
    targets = ids[:, 1:].clone()
    targets[:, : N_PROMPT - 1] = -100
    return ids[:, :-1], targets


def adapted(folder, name, dtype=torch.float32, noise=0.05, k=3, seed=0):
    """A model with adapters, whose B has left zero unless noise = 0."""
    model, method = MoEModel.from_pretrained(folder, dtype), parse_method(name)
    n = model.cfg.n_experts if method.rule == "all" else k
    attach(model, method, {i: list(range(n)) for i in model.cfg.moe_layers}, 4, 8)
    init_adapters(model, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if noise and name.endswith(".lora.B"):
                p.copy_(noise * torch.randn(p.shape, generator=draw))
            if noise and name.endswith(".lora.magnitude"):
                p.mul_(1 + noise * torch.randn(p.shape, generator=draw))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- a step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fft", "lora", "hellora"])
def test_a_step_is_adamw_without_decay_on_gradients_clipped_to_norm_1(olmoe, name):
    """Three steps, as AdamW's first update forgets the gradient's length."""
    model, lr, eps, beta1, beta2 = adapted(olmoe, name, noise=0.5), 0.02, 1e-8, 0.9, 0.999
    optimizer, norms = make_optimizer(model, lr), []
    want = {n: p.detach().double() for n, p in trained(model).items()}
    m, v = ({n: torch.zeros_like(p) for n, p in want.items()} for _ in range(2))
    for step, (n_rows, length) in enumerate([(1, 6), (8, 30), (2, 9)], 1):
        rows = examples(n_rows, length, seed=step)
        tokens, targets = batch_of(rows)
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
        mean = model(tokens, targets=targets)[0] / (targets >= 0).sum()
        grads = dict(zip(want, torch.autograd.grad(mean, trained(model).values()), strict=True))
        norm = torch.stack([g.double().norm() for g in grads.values()]).norm().item()
        got_loss, got_norm = train_step(model, optimizer, rows, 8, 0.0, Catcher(8))
        assert got_loss == pytest.approx(loss.item(), rel=1e-5)  # fp32: other order of sums
        # fp32 sums; of the gradient before it is clipped
        assert got_norm == pytest.approx(norm, rel=1e-5)
        assert norm > 1
        norms.append(norm)
        for n, g in grads.items():
            g = g.double() / norm
            m[n] = beta1 * m[n] + (1 - beta1) * g
            v[n] = beta2 * v[n] + (1 - beta2) * g**2
            want[n] -= lr * (m[n] / (1 - beta1**step)) / ((v[n] / (1 - beta2**step)).sqrt() + eps)
        for n, p in trained(model).items():
            # fp32 beside fp64: weights up to 4 have 2.4e-7; an update of lr has 1e-5 of its size,
            # as clipping divides by norm + 1e-6 and tiny gradients meet AdamW's eps
            torch.testing.assert_close(p.detach().double(), want[n], rtol=3e-7, atol=2e-6, msg=n)
            want[n] = p.detach().double()  # so that rounding is not carried on
    assert max(norms) > 1.5 * min(norms)  # else clipping could not be told from a constant factor


def test_gradients_are_clipped_only_if_they_are_longer_than_1(olmoe):
    """AdamW's first moment tells, which is a tenth of the gradient that it was given."""
    model = adapted(olmoe, "lora", noise=1e-4)
    for name, p in model.named_parameters():
        if name.endswith(".lora.A"):
            p.data *= 0.05  # so that B's gradient is short
    optimizer, rows = make_optimizer(model, 1e-3), examples(8, 30)
    _, norm = train_step(model, optimizer, rows, 8, 0.0, Catcher(8))
    moments = [optimizer.state[p]["exp_avg"] for p in trained(model).values()]
    assert norm < 1
    # 0.1: what AdamW's first moment takes of a gradient; rel: fp32 sums
    assert torch.stack([x.norm() for x in moments]).norm().item() == pytest.approx(
        0.1 * norm, rel=1e-5
    )


@pytest.mark.parametrize("name", ["hellora", "lora", "dora", "fft"])
def test_clip_each_bounds_every_matrix_by_itself_and_each_expert_s_too(checkpoint, name):
    """As torch clips a list of one, in a model that has a parameter for each expert."""
    model, rows = adapted(checkpoint, name, noise=0.5), examples(8, 30)
    tokens, targets = batch_of(rows)
    mean = model(tokens, targets=targets)[0] / (targets >= 0).sum()
    grads = dict(
        zip(trained(model), torch.autograd.grad(mean, trained(model).values()), strict=True)
    )
    want, norms = {}, []
    for n, g in grads.items():
        one_each = [torch.zeros_like(x) for x in (g if ".experts." in n else [g])]
        for x, part in zip(one_each, g if ".experts." in n else [g], strict=True):
            x.grad = part.clone()
            norms.append(torch.nn.utils.clip_grad_norm_([x], 1.0).item())
        want[n] = torch.stack([x.grad for x in one_each]).view_as(g)
    assert min(norms) < 1 < max(norms)
    optimizer = make_optimizer(model, 1e-3)
    _, norm = train_step(model, optimizer, rows, 8, 0.0, Catcher(model.cfg.n_experts), "each")
    # fp32 sums; the norm of all, before any clipping
    assert norm == pytest.approx(torch.tensor(norms).norm().item(), rel=1e-5)
    for n, p in trained(model).items():
        got = 10 * optimizer.state[p]["exp_avg"]  # AdamW's first moment takes a tenth
        bar = 1e-5 * want[n].norm() + 1e-8  # fp32: other order of sums
        assert (got - want[n]).norm() <= bar, n


@pytest.mark.parametrize(("task", "falls"), [("tiny-math", True), ("gsm8k", False)])
def test_the_lr_column_is_the_recipes_table(cli, toy, tmp_path, monkeypatch, task, falls):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    more = ["--task", task, "--steps", 4, "--lr", 0.01, "--catcher", "forward", "--no-eval"]
    more += ["--out", "r"]
    code, _, err = cli("train.py", *small_run(toy, rows, *more))
    assert code == 0, err
    lines = [
        json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    ]
    table = [0.01, 0.0075, 0.005, 0.0025] if falls else [0.01] * 4
    assert [line["lr"] for line in lines] == pytest.approx(table, rel=1e-12)  # fp64 arithmetic


def balancing(routing, n_experts):
    """Eq. 1 of the paper for a batch without padding: E * sum_i f_i P_i over all routers."""
    logits = torch.cat([of.logits.flatten(0, 1) for of in routing.values()])
    visits = torch.cat([of.expert_ids.flatten() for of in routing.values()])
    share = visits.bincount(minlength=n_experts) / len(logits)
    return n_experts * (share * logits.softmax(-1).mean(0)).sum()


def test_with_balance_the_norm_is_the_same_for_1_and_for_4_micro_batches(olmoe):
    """Four equal rows route alike, so the balancing term may not depend on the cut."""
    rows, norms = examples(1, 12) * 4, {}
    for balance in (0.0, 20.0):
        for size in (1, 2, 4):
            model = adapted(olmoe, "fft")
            step = train_step(model, make_optimizer(model, 1e-3), rows, size, balance, Catcher(8))
            norms[balance, size] = step[1]
    assert norms[20.0, 1] == pytest.approx(norms[20.0, 4], rel=1e-5)  # fp32: other order of sums
    assert norms[20.0, 2] == pytest.approx(norms[20.0, 4], rel=1e-5)
    assert abs(norms[20.0, 4] / norms[0.0, 4] - 1) > 0.05  # the term is there


def test_the_balancing_term_is_the_mean_over_micro_batches(olmoe):
    rows, balance = examples(4, 12), 20.0
    model = adapted(olmoe, "fft")
    tokens, targets = batch_of(rows)
    want = model(tokens, targets=targets)[0] / (targets >= 0).sum()
    for row in tokens:
        want = want + balance * balancing(model(row[None])[1], 8) / 4
    grads = torch.autograd.grad(want, trained(model).values())
    _, got = train_step(model, make_optimizer(model, 1e-3), rows, 1, balance, Catcher(8))
    norm = torch.stack([g.norm() for g in grads]).norm().item()
    assert got == pytest.approx(norm, rel=1e-5)  # fp32: other order of sums


# ---- precision -----------------------------------------------------------------------------------


def test_in_bf16_an_rms_norm_is_computed_in_fp32_and_rounded_once(olmoe):
    norm = MoEModel.from_pretrained(olmoe, torch.bfloat16).norm
    x = 3 * torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    x = x.bfloat16()
    with torch.no_grad():
        got, wide = norm(x).float(), x.float()
        want = wide / (wide.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.float()
    # bf16 has 8 bits: one rounding moves a number by 2^-8 of it at most; 1.01: fp32's own. Means in
    # bf16 give 2.6
    assert ((got - want).abs() <= 1.01 * 2**-8 * want.abs()).all()


def test_in_bf16_routing_weights_are_an_fp32_softmax_of_the_logits(olmoe):
    model = MoEModel.from_pretrained(olmoe, torch.bfloat16)
    with torch.no_grad():
        _, routing = model(batch_of(examples(4, 20))[0])
    for of in routing.values():
        assert of.logits.dtype == torch.bfloat16
        want, ids = of.logits.float().softmax(-1).topk(2)
        assert torch.equal(of.expert_ids, ids)
        # fp32; bf16 would be off by 2e-3
        torch.testing.assert_close(of.probability, want, rtol=1e-6, atol=0)


def test_in_bf16_the_loss_is_an_fp32_cross_entropy_of_the_logits(olmoe):
    model = MoEModel.from_pretrained(olmoe, torch.bfloat16)
    for seed in range(4):
        tokens, targets = batch_of(examples(4, 20, seed))
        with torch.no_grad():
            got = model(tokens, targets=targets)[0]
            want = F.cross_entropy(
                model(tokens)[0].float().flatten(0, 1), targets.flatten(), reduction="sum"
            )
        assert got.dtype == torch.float32
        # fp32 sums; bf16 would be off by 2e-3
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_starts_as_the_base(checkpoint, dtype):
    """To the bit: wanted and present length are one fp32 number, or bf16 rounds their ratio to 1.

    In fp32 a length by another order of sums may be off by some 1e-7: 1e-5 on logits of size 10.
    """
    tokens = batch_of(examples(4, 20))[0]
    with torch.no_grad():
        base = MoEModel.from_pretrained(checkpoint, dtype)(tokens)[0]
        got = adapted(checkpoint, "dora", dtype, noise=0)(tokens)[0]
    torch.testing.assert_close(got, base, rtol=0, atol=1e-5 if dtype == torch.float32 else 0)


# ---- gradients of adapters -----------------------------------------------------------------------


def dense_weights(model, experts, scale):
    """{a weight's name: W + scale B A, of DoRA with rows of their magnitude}, written out."""
    of, weights = dict(model.named_parameters()), {}
    for site in adapters(model):
        w, a, b = (of[f"{site}{end}"] for end in (".weight", ".lora.A", ".lora.B"))
        at = experts if ".experts." in site else slice(None)
        one = w[at] + scale * b @ a
        if f"{site}.lora.magnitude" in of:  # the length counts as a constant
            one = one * (of[f"{site}.lora.magnitude"] / one.norm(dim=-1).detach())[..., None]
        weights[f"{site}.weight"] = w.clone()
        weights[f"{site}.weight"][at] = one
    return weights


@pytest.mark.parametrize("name", ["dora", "lora", "hellora", "hellora_pure"])
def test_loss_and_gradients_of_adapters_are_those_of_dense_weights(checkpoint, name):
    """Autograd through the plain model with dense weights made of A, B and magnitude."""
    model, plain = adapted(checkpoint, name), MoEModel.from_pretrained(checkpoint)
    experts = list(range(model.cfg.n_experts if name in ("dora", "lora") else 3))
    tokens, targets = batch_of(examples(4, 20))
    weights = dense_weights(model, experts, scale=2.0)
    logits = functional_call(plain, weights, (tokens,))[0]
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    got = model(tokens, targets=targets)[0] / (targets >= 0).sum()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)  # fp32: other order of products
    params = trained(model)
    assert {n.rpartition(".")[2] for n in params} == {"A", "B"} | (
        {"magnitude"} if name == "dora" else set()
    )
    pairs = [torch.autograd.grad(loss, params.values()) for loss in (got, want)]
    for n, ours, theirs in zip(params, *pairs, strict=True):
        bar = 1e-4 * theirs.norm() + 1e-7  # fp32: other order of products, through the whole model
        assert (ours - theirs).norm() <= bar, n


# ---- the first losses ----------------------------------------------------------------------------

GOLDEN = ROOT / "tests" / "golden_losses.json"
FIRST = ("hellora", "lora", "dora", "hellori-d", "hellori-s", "fft")  # -s has the mask of -d


def first_losses(cli, toy, folder):
    """{method: the losses of its first 5 steps} of train.py."""
    found, rows = {}, write_rows(folder / "rows.jsonl", ROWS)
    for method in FIRST:
        more = ["--mask-from", folder / "hellori-d"] if method == "hellori-s" else []
        more += ["--batch-size", 16, "--lr", 0.005, "--steps", 5, "--no-eval"]
        words = small_run(toy, rows, *more, "--method", method, "--out", folder / method)
        code, _, err = cli("train.py", *words)
        assert code == 0, err
        lines = (folder / method / "metrics.jsonl").read_text().splitlines()
        found[method] = [json.loads(line)["loss"] for line in lines]
    return found


def test_the_first_five_losses_of_each_kind_of_method_are_the_stored_ones(cli, toy, tmp_path):
    """To store them again, which only a change of the method's definition calls for: write what
    `first_losses(cli, toy, tmp_path)` finds to GOLDEN, by json.dumps(found, indent=1).
    """
    want, got = json.loads(GOLDEN.read_text()), first_losses(cli, toy, tmp_path)
    assert got.keys() == want.keys()
    for method, losses in want.items():
        # 1e-6, absolute and relative: other orders of sums (micro-batches of 1 or 5, experts one
        # by one, other vector widths of the processor) moved these losses by 2.3e-7 of their size
        # at most
        assert got[method] == pytest.approx(losses, rel=1e-6, abs=1e-6), method
