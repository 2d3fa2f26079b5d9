"""The paper's Params cells and FLOPs, from the command that prints them."""

import json

import pytest

from paper import reproduce

# trainable integers of method.md, section 4: [A, B] pairs; LoRI-S trains round(B / 10)
OLMOE = {
    ("lora", 64): 311_459_840, ("dora", 64): 315_786_240, ("lori-d", 64): 138_444_800,
    ("lori-s", 64): 13_844_480, ("hellora", 2): 18_907_136, ("hellora", 4): 28_344_320,
    ("hellora", 8): 47_218_688, ("hellora", 16): 84_967_424, ("hellori-d", 8): 21_004_288,
    ("hellori-s", 8): 2_100_429, ("hellora_pure", 8): 37_748_736, ("hellora_gate", 8): 38_830_080,
    ("hellori-d_pure", 8): 16_777_216, ("hellori-s_pure", 8): 1_677_722,
    ("hellori-d_gate", 8): 16_809_984, ("hellori-s_gate", 8): 1_680_998, ("fft", 64): 6_919_161_856,
}  # fmt: skip
MIXTRAL = {
    ("lora", 8): 484_450_304, ("lori-d", 8): 278_929_408, ("lori-s", 8): 27_892_941,
    ("hellora", 2): 144_711_680, ("hellori-d", 2): 77_602_816, ("hellori-s", 2): 7_760_282,
}  # fmt: skip
DEEPSEEK = {("lora", 64): 601_843_712, ("hellora", 12): 136_030_208}


@pytest.fixture(scope="module")
def cells():
    return reproduce.params()


def test_every_params_cell_has_its_integer(cells):
    got = {(r["backbone"], r["method"], r["k"]): r["trained"] for r in cells}
    of = {"olmoe-1b-7b": OLMOE, "mixtral-8x7b": MIXTRAL, "deepseekmoe-16b": DEEPSEEK}
    assert got == {(name, *at): n for name, table in of.items() for at, n in table.items()}


def test_every_printed_percent_is_ours_rounded_or_has_a_note(cells):
    for r in cells:
        if r["printed"] is not None and not r["note"]:
            # the coarsest cells of the paper have one digit: 0.7 for 0.6778, 4.3 for 4.3075
            assert any(round(r["percent"], digits) == r["printed"] for digits in (1, 2, 3)), r


def test_the_paper_s_flops_are_a_hot_share_of_0_5159_and_torch_counts_what_the_formula_says():
    row = reproduce.flops(0.5159)
    assert row["olmoe_lora"] == 2 * 47_218_688  # MACs a token: K = k, so it equals the parameters of HELLoRA
    assert round(row["saved"], 3) == 0.387
    assert row["small_counted"] == pytest.approx(row["small_formula"], rel=0.01)


@pytest.mark.parametrize("what", ["params", "flops"])
def test_the_command_prints_a_table_or_json(cli, what):
    code, out, _ = cli("paper.reproduce", what)
    assert code == 0
    assert "%" in out
    code, out, _ = cli("paper.reproduce", what, "--json")
    assert code == 0
    assert json.loads(out)


def test_an_unknown_table_is_refused(cli):
    assert cli("paper.reproduce", "table9")[0] == 2
