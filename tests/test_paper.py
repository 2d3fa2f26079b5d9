"""The paper's Params cells and FLOPs, from the command that prints them."""

import json
import sys

import pytest

import job
from paper import grid, methods, reproduce

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


# ---- grids of runs -------------------------------------------------------------------------------------


def result(method, lr, seed, dev, test, loss=0.1):
    accuracy = {"tiny-math-dev": dev, "tiny-math": test}
    return {"method": method, "lr": lr, "seed": seed, "accuracy": accuracy, "final_loss": loss, "trained": 7}


def test_a_rate_is_chosen_on_dev_and_never_on_test():
    tried = [result("lora", 1, 0, 0.5, 0.9), result("lora", 2, 0, 0.7, 0.1), result("lora", 3, 0, 0.6, 0.99)]
    assert methods.chosen_rate(tried) == 2
    tie = [result("lora", 1, 0, 0.7, 0.9, loss=0.2), result("lora", 2, 0, 0.7, 0.1, loss=0.1)]
    assert methods.chosen_rate(tie) == 2


def test_a_grid_runs_what_is_missing_at_the_best_rate_and_takes_masks_from_d_runs(monkeypatch):
    """Which cells are asked for; what a cell shows is made up here, the runs themselves are train.py's."""
    asked = []

    def made_up(cells, jobs):
        cells = list(cells)
        asked.extend(cells)
        return [
            result(c.method, c.lr, c.seed, 0.9 if c.lr == 0.02 else 0.5, 0.8 + c.seed / 10) for c in cells
        ]

    monkeypatch.setattr(methods, "run_cells", made_up)
    rows = methods.compare(("lori-d", "lori-s", "hellora"), jobs=1)
    assert [r["method"] for r in rows] == ["lori-d", "lori-s", "hellora"]
    assert {r["lr"] for r in rows} == {0.02}
    assert rows[0]["accuracy"]["seeds"] == pytest.approx([0.8, 0.9, 1.0])
    assert (rows[0]["accuracy"]["mean"], rows[0]["accuracy"]["std"]) == pytest.approx((0.9, 0.1))
    for cell in asked:
        assert (cell.mask is not None) == (cell.method == "lori-s")
        if cell.mask:
            assert (cell.mask.method, cell.mask.lr, cell.mask.seed) == ("lori-d", 0.02, cell.seed)


@pytest.mark.parametrize("method", [*methods.MAIN, *methods.PLACEMENTS])
def test_a_cells_command_is_one_that_train_py_takes(method, monkeypatch):
    mask = grid.Cell(method.replace("-s", "-d"), 0.01, 0) if "-s" in method else None
    cell = grid.Cell(method, 0.005, 2, mask=mask)
    monkeypatch.setattr(sys, "argv", cell.command())
    args = job.parse_args("")
    assert (args.method, args.lr, args.seed, args.no_eval) == (method, 0.005, 2, True)
    assert args.out.name == cell.name == cell.result.stem
    assert (args.mask_from is not None) == ("-s" in method)


def test_committed_cells_say_what_they_are():
    for path in grid.RESULTS.glob("*.json"):
        shown = json.loads(path.read_text())
        cell = grid.Cell(*(shown[name] for name in ("method", "lr", "seed", "k", "task")))
        assert path.stem == cell.name
        assert shown["problems"] == {"tiny-math": 500, "tiny-math-dev": 300}
