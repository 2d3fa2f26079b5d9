"""What the paper leaves out: what tuning costs elsewhere, what merged runs keep, how stable a hot list is."""

import json
import sys

import pytest

from hellora import attach, init_adapters, parse_method
from moe_model import MoEModel
from paper import forgetting, grid
from paper.stats import signed, spread
from tiny.corpus import MIX
from tokenizer import load_tokenizer

# ---- forgetting ----------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_trained_forgets_exactly_nothing(toy, monkeypatch):
    monkeypatch.setattr(forgetting, "SEQUENCES", 2)
    monkeypatch.setattr(forgetting, "EQUATIONS", 5)
    model, tokenizer = MoEModel.from_pretrained(toy), load_tokenizer(toy)
    before = forgetting.score(model, tokenizer)
    everywhere = {layer: list(range(model.cfg.n_experts)) for layer in model.cfg.moe_layers}
    attach(model, parse_method("lora"), everywhere, 4, 8)
    init_adapters(model, 0)  # B = 0
    after = forgetting.score(model, tokenizer)
    assert set(forgetting.rise(after, before).values()) == {0.0}
    assert after == before
    assert before["cross_entropy"].keys() == MIX.keys()
    assert min(before["cross_entropy"].values()) > 1  # random weights know nothing that could be forgotten


def test_a_model_of_another_vocabulary_is_refused(cli, olmoe):
    code, _, err = cli("paper.forgetting", "--model", olmoe)
    assert code == 2
    assert "has 96 tokens" in err


def test_rises_are_means_over_domains_and_methods_are_paired_by_seed(cli, monkeypatch):
    def kept(cell):
        after = 0 if type(cell) is grid.Base else 0.1 * (1 + cell.seed) + 0.05 * (cell.method == "lora")
        if after and (cell.method not in ("hellora", "lora") or cell.seed == 2):
            return {}
        losses = {domain: 1 + after * (1 + (i % 2)) for i, domain in enumerate(MIX)}
        of = {"cross_entropy": losses, "arithmetic": dict.fromkeys("+-*/", 0.5)}
        return {"problems": {grid.PRETRAINING: 9}, "trained": 7} | {
            n: {grid.PRETRAINING: v} for n, v in of.items()
        }

    monkeypatch.setattr(forgetting, "saved", kept)
    rows = forgetting.results()["rows"]
    assert list(rows) == ["lora", "hellora"]
    assert rows["hellora"]["rise"]["runs"] == pytest.approx([0.15, 0.3])  # 0.1, 0.2, of which half doubled
    assert rows["lora"]["minus"]["mean"] == pytest.approx(0.075)
    assert rows["lora"]["minus"]["high"] - rows["lora"]["minus"]["low"] == pytest.approx(0, abs=1e-9)
    assert rows["hellora"]["minus"] is None
    assert rows["hellora"]["domains"]["maths"] == pytest.approx(0.15)
    code, out, _ = cli("paper.reproduce", "forgetting", "--finished")
    assert code == 0
    assert "hellora             7     2   +0.225 (" in out
    assert (
        json.loads(cli("paper.reproduce", "forgetting", "--finished", "--json")[1])["rows"].keys()
        == rows.keys()
    )


def test_the_grid_scores_what_is_left_of_pretraining_by_its_own_command(monkeypatch):
    assert len(forgetting.wanted()) == 1 + 8 * 3
    for cell in (grid.Base(), grid.Cell("lora", 0.005, 1)):
        command, _ = grid.scoring(grid.PRETRAINING)
        monkeypatch.setattr(sys, "argv", command.replace("--run {}", cell.scored_as).split()[2:])
        args = forgetting.parse_args()
        assert (args.run or [args.out]) == [cell.folder]


def test_a_difference_in_words():
    assert signed(spread([0.01, 0.03])._asdict(), 1, unit=0.01).startswith("+2.0 (-10.7 to +14.7, p 0.29")
    assert signed(spread([0.5])._asdict(), 1) == "+0.5"
    assert signed(None, 1) == ""
