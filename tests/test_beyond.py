"""What the paper leaves out: forgetting, merged runs, how stable a hot list is."""

import json
import re
import sys

import pytest
import torch
from conftest import small_run, write_rows

import export
from hellora import attach, init_adapters, parse_method
from moe_model import IGNORE, MoEModel
from paper import eval_humaneval, eval_safety
from paper.runs import grid, rates
from paper.runs.stats import signed, spread
from paper.studies import forgetting, merging, stability
from plumbing import flags
from plumbing.cli import Parser
from plumbing.data import TASKS, collate, encode, examples_of_step, load_examples, steps_per_epoch
from plumbing.tokenizer import load_tokenizer
from settings import RECIPES
from tiny.corpus import MIX

# ---- forgetting ----------------------------------------------------------------------------------


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
    # Random weights know nothing that could be forgotten.
    assert min(before["cross_entropy"].values()) > 1


def test_a_model_of_another_vocabulary_is_refused(cli, olmoe):
    code, _, err = cli("paper.studies.forgetting", "--model", olmoe)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "olmoe" in err


def test_rises_are_means_over_domains_and_methods_are_paired_by_seed(cli, monkeypatch):
    def kept(cell):
        after = (
            0 if type(cell) is grid.Base else 0.1 * (1 + cell.seed) + 0.05 * (cell.method == "lora")
        )
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
    # 0.1, 0.2, of which half doubled.
    assert rows["hellora"]["rise"]["runs"] == pytest.approx([0.15, 0.3])
    assert rows["lora"]["minus"]["mean"] == pytest.approx(0.075)
    assert rows["lora"]["minus"]["std"] == pytest.approx(0, abs=1e-9)
    assert rows["hellora"]["minus"] is None
    assert rows["hellora"]["domains"]["maths"] == pytest.approx(0.15)
    code, out, _ = cli("paper.reproduce", "forgetting", "--finished")
    assert code == 0
    assert re.search(r"^hellora +7 +2 +\+0\.225 \(", out, re.M)
    assert (
        json.loads(cli("paper.reproduce", "forgetting", "--finished", "--json")[1])["rows"].keys()
        == rows.keys()
    )


def test_the_grid_scores_what_is_left_of_pretraining_by_its_own_command(monkeypatch):
    assert len(forgetting.wanted()) == 1 + 8 * 3
    for cell in (grid.Base(), grid.Run("lora", 0.005, 1)):
        monkeypatch.setattr(sys, "argv", cell.evaluation(grid.PRETRAINING)[1:])
        args = forgetting.parse_args()
        assert [grid.ROOT / folder for folder in args.run or [args.out]] == [cell.folder]


def test_a_difference_in_words():
    assert signed(spread([0.01, 0.03])._asdict(), 1, unit=0.01).startswith(
        "+2.0 (-10.7 to +14.7, p 0.29"
    )
    assert signed(spread([0.5])._asdict(), 1) == "+0.5"
    assert signed(None, 1) == ""


# ---- merging -------------------------------------------------------------------------------------


def parsed(monkeypatch, words, parse):
    """What a script's own parser makes of its arguments."""
    seen, original = [], Parser.parse_args

    def stop(self, *args):
        seen.append(original(self, *args))
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", words)
        patched.setattr(Parser, "parse_args", stop)
        with pytest.raises(SystemExit):
            parse()
    return seen[0]


def test_every_pair_is_merged_by_a_command_that_export_py_takes_and_scored_on_both_its_tasks(
    monkeypatch,
):
    wanted = merging.wanted()
    merged = {cell: tasks for cell, tasks in wanted.items() if isinstance(cell, grid.Merged)}
    assert len({cell.result for cell in wanted}) == len(wanted) == 18 + 18
    readers = {
        "tiny-math": lambda: flags.eval_gsm8k(""),
        "tiny-code": eval_humaneval.parse_args,
        "tiny-safety": eval_safety.parse_args,
    }
    for cell, tasks in merged.items():
        assert tasks == {run.task for run in cell.runs}
        assert set(cell.needs()) == set(cell.runs) <= wanted.keys()
        args = parsed(monkeypatch, cell.command(), export.main)
        assert args.run == [run.folder.relative_to(grid.ROOT) for run in cell.runs]
        assert grid.ROOT / args.out == cell.folder / "hub"
        for task in tasks:
            words = [word for word in cell.evaluation(task) if word != "-m"]
            model = words.index("--model") + 1
            assert grid.ROOT / words[model] == cell.folder / "hub"
            words[model] = "tiny"  # as the checkpoint is not there yet
            args = parsed(monkeypatch, words, readers[task])
            assert (grid.ROOT / args.out, args.task) == (cell.folder, task)


def test_a_merged_cell_rests_on_its_runs():
    one, other, longer = (
        grid.Run("hellora", lr, 0, flags=flags) for lr, flags in ((1, ()), (2, ()), (1, ("--x",)))
    )
    assert grid.Merged((one, other)).rests_on() != grid.Merged((longer, other)).rests_on()
    kept = grid.Merged((one, other)).rests_on()
    # Or no result that was read again would be taken for its own.
    assert json.loads(json.dumps(kept)) == kept


def test_what_is_needed_is_trained_before_what_needs_it():
    masked = [rates.cell("hellori-s", seed, model=f"{grid.BASES}1") for seed in (0, 1)]
    cells = {grid.Merged(tuple(masked)), *masked}
    while more := {other for cell in cells for other in cell.needs()} - cells:
        cells |= more
    assert len(cells) == 1 + 2 + 2 + 1  # the sum, S runs, D runs, a base
    for cell in cells:
        assert all(grid.depth(other) < grid.depth(cell) for other in cell.needs())
    assert grid.depth(grid.Merged(tuple(masked))) == 3


def test_a_task_is_compared_with_its_own_run_of_the_same_seed(cli, monkeypatch):
    def kept(cell):
        if isinstance(cell, grid.Merged):
            if {run.task for run in cell.runs} != {"tiny-math", "tiny-safety"} or cell.runs[
                0
            ].seed == 2:
                return {}
            seed, lost, tasks = cell.runs[0].seed, 0.1, ("tiny-math", "tiny-safety")
        else:
            seed, lost, tasks = cell.seed, 0, (cell.task,)
        shown = {
            "accuracy": 0.5 + seed / 10 - lost,
            "refusal_rate": 0.9,
            "harmless_refused": 3 + 100 * lost,
        }
        shown |= {"harmless_total": 100, "problems": 9, "pass@1": 1.0}
        return {name: dict.fromkeys(tasks, value) for name, value in shown.items()}

    monkeypatch.setattr(merging, "saved", kept)
    rows = {(*r["pair"], r["method"], r["measure"]): r for r in merging.results()}
    assert len(rows) == len(merging.results()) == 2 * (2 + 3 + 3)
    r = rows["tiny-math", "tiny-safety", "lora", "accuracy"]
    assert (r["alone"], r["merged"]) == (pytest.approx([0.5, 0.6]), pytest.approx([0.4, 0.5]))
    assert r["minus"]["mean"] == pytest.approx(-0.1)
    assert rows["tiny-math", "tiny-safety", "lora", "harmless refused"]["merged"] == pytest.approx(
        [0.13, 0.13]
    )
    assert rows["tiny-math", "tiny-code", "lora", "accuracy"]["minus"] is None
    code, out, _ = cli("paper.reproduce", "merge", "--finished")
    assert code == 0
    assert re.search(r"lora +accuracy on tiny-math +2 +55\.0 +45\.0 +-10\.0", out)


# ---- stability -----------------------------------------------------------------------------------


def test_a_list_overlaps_itself_in_full_and_each_question_compares_what_it_says():
    def of(*ids):
        return {"0": list(ids), "1": [7, 8]}

    lists = {f"{share:g}": [of(1, 2)] * 5 for share in stability.SHARES} | {"1": [of(1, 2)]}
    lists |= {"middle": [of(1, 2), of(1, 3), of(3, 4)], "end": [of(1, 2), of(1, 3), of(1, 2)]}
    asked = stability.questions(lists, {0: of(1, 2), 2: of(3, 4)})
    rows = {what: stability.compared(pairs) for of in asked.values() for what, pairs in of.items()}
    sizes = {"two warm-ups": 1, "two samples, counted on the base": 10, "warm-up, and end": 2}
    assert {name: len(rows[name]["overlaps"]) for name in sizes} == sizes
    assert rows["1% of the data"]["overlaps"] == [1.0] * 5
    assert rows["two warm-ups"]["layers"] == {"0": 0.0, "1": 1.0}
    # With layer 1, which is equal.
    assert rows["base and middle"]["overlaps"] == pytest.approx([1, 2 / 3, 1 / 2])
    assert rows["middle and end"]["overlaps"] == [1, 1, 0.5]
    assert rows["warm-up, and end"]["overlaps"] == [1, 0.5]  # seeds 0 and 2


def test_the_middle_is_the_middle():
    rows = load_examples("tiny-math", TASKS["tiny-math"].train.fetch())
    recipe = RECIPES["tiny", False]
    assert recipe.epochs * steps_per_epoch(len(rows), recipe.batch_size) == 2 * stability.MIDDLE
    for cell in stability.runs():
        assert cell.flags == ("--save-every", f"{stability.MIDDLE}")
        assert cell in stability.wanted()


def test_the_model_in_the_middle_is_the_one_whose_loss_the_next_step_logged(cli, toy, tmp_path):
    lines = [{"question": f"{n} + 2?", "answer": f"#### {n + 2}"} for n in range(8)]
    rows, out = write_rows(tmp_path / "rows.jsonl", lines), tmp_path / "run"
    flags = ("--steps", 4, "--save-every", 2, "--batch-size", 4, "--no-eval", "--out", out)
    code, _, err = cli("train.py", *small_run(toy, rows, *flags))
    assert code == 0, err
    model = stability.at_save_before_last(out, 2)
    data = encode(load_examples("tiny-math", rows), load_tokenizer(toy), model.cfg.max_len)
    batch = collate(examples_of_step(data, 2, 4, seed=0), model.device)
    with torch.no_grad():
        loss = model(batch.tokens, targets=batch.targets)[0] / (batch.targets != IGNORE).sum()
    third = json.loads((out / "metrics.jsonl").read_text().splitlines()[2])
    # Fp32: merged here, factored there.
    assert loss.item() == pytest.approx(third["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="saved after step 2, not 3"):
        stability.at_save_before_last(out, 3)


def test_lists_of_other_runs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(stability, "RESULT", tmp_path / "stability.json")
    assert stability.kept() == {}
    for rests_on in (stability.rests_on(), []):
        grid.write_json(stability.RESULT, {"rests_on": rests_on, "lists": {"1": []}})
        if rests_on:
            assert stability.kept() == {"1": []}
    with pytest.raises(ValueError, match="counted on another model, data or runs"):
        stability.kept()
