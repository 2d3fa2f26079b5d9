"""The paper's Params cells and FLOPs, from the command that prints them."""

import json
import os
import random
import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from itertools import combinations, pairwise
from threading import Timer, main_thread

import pytest
import torch
from test_tables import PARSERS

import settings
from paper import reproduce
from paper.runs import grid, parallel, rates, stats
from paper.studies import claims, comparison, forgetting, mechanism, merging, routing, stability
from plumbing import flags
from plumbing.run_folder import update_results

# trainable integers, worked out by hand. LoRI-S trains round(B / 10)
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
    # MACs a token: K = k, so it equals the parameters of HELLoRA.
    assert row["olmoe_lora"] == 2 * 47_218_688
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


# ---- grids of runs -------------------------------------------------------------------------------


def result(method, lr, seed, dev, test, loss=0.1):
    accuracy = {"tiny-math-dev": dev, "tiny-math": test}
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "accuracy": accuracy,
        "final_loss": loss,
        "trained": 7,
    }


def test_a_rate_is_chosen_on_dev_and_never_on_test():
    tried = [
        result("lora", 1, 0, 0.5, 0.9),
        result("lora", 2, 0, 0.7, 0.1),
        result("lora", 3, 0, 0.6, 0.99),
    ]
    assert rates.best_rate(tried) == 2
    tie = [result("lora", 1, 0, 0.7, 0.9, loss=0.2), result("lora", 2, 0, 0.7, 0.1, loss=0.1)]
    assert rates.best_rate(tie) == 2
    seeds = [result("lora", 2, seed, 0.7, 0.8 + seed / 10) for seed in range(3)]
    assert rates.row(tried, seeds)["accuracy"]["mean"] == pytest.approx(0.9)
    with pytest.raises(ValueError, match=r"lora is best at 2 on dev, but RATES .* says 3"):
        rates.row(tried, [result("lora", 3, 0, 0.6, 0.99)])


def test_no_rate_lies_at_the_edge_of_those_tried():
    for method, (rate, tried) in rates.RATES.items():
        assert tried[0] < rate < tried[-1], method
        assert all(1.9 < b / a < 3.4 for a, b in pairwise(tried)), method


def test_a_variant_takes_the_rate_of_its_method_and_a_mask_from_the_same_variant_at_the_main_rate():
    assert rates.rate("hellori-d_r") == rates.rate("hellori-d")
    one = rates.cell("hellori-s_c", 3, k=4, task="tiny-code")
    assert (one.mask.method, one.mask.seed, one.mask.k, one.mask.task) == (
        "hellori-d_c",
        3,
        4,
        "tiny-code",
    )
    assert one.lr == rates.rate("hellori-s_c", "tiny-code")
    assert one.mask.lr == rates.rate("hellori-d", "tiny-code")
    assert one.needs() == [one.mask]


def test_each_rate_of_code_and_safety_is_the_best_on_dev_and_lies_inside_those_tried():
    if not rates.TASK_RATES:
        pytest.skip("no rate is taken yet")
    for (task, method), lr in rates.TASK_RATES.items():
        found = rates.choice(method, task)
        assert found, (task, method)
        assert (found["next"], found["best"]) == ([], lr)
        _, *inside, _ = [run.lr for run in rates.tried(method, task)]
        assert lr in inside


def test_each_run_that_tried_a_rate_is_what_its_command_would_measure_now():
    planned = {run.result: run for run in rates.tuning_wanted()}
    kept = sorted(rates.RESULTS.glob("*.json"))
    if not kept:
        pytest.skip("no rate was tried yet")
    assert {*kept} <= planned.keys()
    for path in kept:
        problems = {"tiny-code": 200, "tiny-safety": 81}[planned[path].task]  # harmful ones
        assert grid.saved(planned[path])["problems"] == {rates.DEV[planned[path].task]: problems}


@pytest.fixture
def finished(monkeypatch):
    """finished(runs, score): these runs are scored on the dev problems of code, by their rate."""

    def stand_in(runs, score):
        def shown(run):
            if run not in runs:
                return {}
            passed = {"tiny-code-dev": score(run.lr)}
            return {"lr": run.lr, "final_loss": run.lr, "pass@1": passed}

        monkeypatch.setattr(rates, "saved", shown)

    return stand_in


@pytest.mark.parametrize("doublings", [-3, -1, 0, 1, 4])
def test_rates_are_added_until_the_best_lies_inside(finished, monkeypatch, doublings):
    first = rates.RATES["lora"][0]
    best, runs = first * 2**doublings, set()
    monkeypatch.setattr(rates, "TASK_RATES", {})
    for _ in range(9):
        finished(runs, lambda lr: 1 - abs(lr - best))
        runs |= {run for run in rates.tuning_wanted() if run.method == "lora"}
    found = rates.choice("lora", "tiny-code")
    assert (found["best"], found["next"]) == (best, [])
    tried = [run.lr for run in rates.tried("lora", "tiny-code")]
    low, high = min(doublings, 0) - 1, max(doublings, 0) + 1
    assert tried == [first * 2**n for n in range(low, high + 1)]
    finished(set(), None)  # whoever has only the chosen rate plans the same runs
    monkeypatch.setattr(rates, "TASK_RATES", {("tiny-code", "lora"): best})
    assert [run.lr for run in rates.tried("lora", "tiny-code")] == tried


def test_a_rate_that_is_not_the_best_on_dev_is_refused_and_a_tie_goes_to_the_lower_loss(
    finished, monkeypatch
):
    monkeypatch.setattr(rates, "TASK_RATES", {("tiny-code", "fft"): 2e-3})
    finished(set(), None)
    runs = rates.tried("fft", "tiny-code")
    assert [run.lr for run in runs] == [5e-4, 1e-3, 2e-3, 4e-3]
    finished(runs, lambda lr: 0.9 if lr in (1e-3, 2e-3) else 0.1)  # the loss is the rate
    with pytest.raises(ValueError, match=r"fft on tiny-code is best at 0.001 .* says 0.002"):
        rates.choice("fft", "tiny-code")


def test_a_sparse_method_is_tried_after_d_with_the_mask_of_its_best_rate(finished, monkeypatch):
    def sparse():
        runs = [run for run in rates.tuning_wanted() if "-s" in run.method]
        return [(run.method, run.task, run.lr, run.mask.method, run.mask.lr) for run in runs]

    monkeypatch.setattr(rates, "TASK_RATES", {})
    finished([], None)
    runs = rates.tried("hellori-d", "tiny-code")
    finished(runs[:2], lambda lr: lr)
    assert sparse() == []
    finished(runs, lambda lr: 1 - abs(lr - runs[1].lr))
    of = [("hellori-s", "tiny-code", lr, "hellori-d", 1e-2) for lr in (8e-2, 0.16, 0.32)]
    assert sparse() == of
    finished([], None)  # whoever has only the chosen rate plans the same runs
    monkeypatch.setattr(rates, "TASK_RATES", {("tiny-code", "hellori-d"): 1e-2})
    assert sparse() == of


def test_a_chosen_rate_of_a_task_is_that_of_all_its_runs(monkeypatch):
    monkeypatch.setattr(rates, "TASK_RATES", {("tiny-code", "hellora"): 4e-2})
    cells = comparison.study("2").wanted() | comparison.study("8").wanted() | merging.wanted()
    runs = [run for run in cells if isinstance(run, grid.Run) and run.method == "hellora"]
    rates_of = {task: {run.lr for run in runs if run.task == task} for task in rates.MEASURES}
    assert rates_of == {"tiny-math": {1e-2}, "tiny-code": {4e-2}, "tiny-safety": {1e-2}}


@pytest.mark.parametrize("method", rates.RATES)
def test_a_cells_command_is_one_that_train_py_takes(method, monkeypatch):
    mask = grid.Run(method.replace("-s", "-d"), 0.01, 0) if "-s" in method else None
    cell = grid.Run(method, 0.005, 2, mask=mask)
    monkeypatch.setattr(sys, "argv", cell.command())
    args = flags.train("")
    assert (args.method, args.lr, args.seed, args.no_eval) == (method, 0.005, 2, True)
    assert args.out.name == cell.name == cell.result.stem
    assert (args.mask_from is not None) == ("-s" in method)


def cell_of(path):
    """The cell whose result this file is."""
    shown = json.loads(path.read_text())
    if shown["method"] == "base":
        return grid.Base(model=shown["model"])
    if shown["method"] == "merged":
        return grid.Merged(tuple(cell_of(grid.RESULTS / f"{name}.json") for name in shown["runs"]))
    mask = shown["mask"] and cell_of(grid.RESULTS / f"{shown['mask']}.json")
    settings = (shown[name] for name in ("method", "lr", "seed", "k", "task"))
    return grid.Run(*settings, mask, tuple(shown["flags"]), model=shown["model"])


def test_committed_cells_are_what_their_command_would_measure_now():
    sizes = {"tiny-math": 500, "tiny-math-dev": 300, "tiny-code": 300, "tiny-safety": 151}
    sizes[grid.PRETRAINING] = forgetting.SEQUENCES * len(forgetting.MIX)
    for path in grid.RESULTS.glob("*.json"):
        cell = cell_of(path)
        assert cell.result == path
        problems = grid.saved(cell)["problems"]
        assert problems.items() <= sizes.items()


def test_each_kept_result_is_used():
    unused = grid.unused(all_wanted())
    assert not unused, "\n".join(["to be deleted:", *map(str, unused)])


def all_wanted():
    """The runs of all parts of the command."""
    return reproduce.wanted_by(reproduce.parts(reproduce.parse_args(["all"])).values())


def test_a_result_is_unused_if_no_cell_has_it_or_its_mask_is_another_now(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    before, now = (
        grid.Run("lori-s", 0.01, 0, mask=grid.Run("lori-d", lr, 0)) for lr in (0.01, 0.02)
    )
    for run in (before, before.mask, now.mask):
        about = run.rests_on()
        hashes = {name: about[name] for name in about.keys() & {"model", "data"}}
        grid.write_json(run.result, about | {"hashes": hashes})
    assert grid.unused({before: set(), now.mask: set()}) == []
    assert grid.unused({now: set()}) == [before.mask.result, now.result]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A cell with a finished run, scored on tiny-math, and its file; measured(scores): its text.

    The evaluations are stood in for by one that writes their kind of results.json; each says it was
    called.
    """
    for name in ("ROOT", "RUNS", "RESULTS"):
        monkeypatch.setattr(grid, name, tmp_path)
    cell, called = grid.Run("hellora", 0.01, 0, task="tiny-code"), []
    cell.folder.mkdir()
    run = {
        "model": "tiny",
        "task": "tiny-code",
        "method": "hellora",
        "dtype": "fp32",
        "finished": True,
    }
    run |= {"trained": 1, "stored": 2, "versions": {}, "hashes": grid.now_hashes("tiny-code")}
    grid.write_json(cell.folder / "run.json", run)
    (cell.folder / "metrics.jsonl").write_text('{"loss": 2.0}\n{"loss": 1.0}\n')

    def evaluate(*arguments, on_cpu):
        assert on_cpu  # as what is committed was measured
        called.append(arguments)
        task, folder = arguments[-1], tmp_path / arguments[arguments.index("--run") + 1]
        values = {name: len(called) for kind in settings.SCORES.values() for name in kind}
        update_results(folder, task, values | {"total": 9})

    monkeypatch.setattr(grid, "python", evaluate)
    return cell, called


def test_a_cell_is_scored_by_each_tasks_own_command_and_only_where_it_lacks_a_score(measured):
    cell, called = measured
    grid.run_cells({cell: {"tiny-math"}}, 1)
    before = json.loads(cell.result.read_text())
    assert (before["accuracy"], before["problems"]) == ({"tiny-math": 1}, {"tiny-math": 9})
    grid.run_cells({cell: {"tiny-math", "tiny-code", "tiny-safety"}}, 1)
    shown = grid.saved(cell)
    assert [words[0:2] for words in called] == [
        ("eval_gsm8k.py", "--run"),
        ("-m", "paper.eval_humaneval"),
        ("-m", "paper.eval_safety"),
    ]
    assert shown["accuracy"] == {"tiny-math": 1}
    assert shown["pass@10"] == {"tiny-code": 2}
    assert shown["refusal_rate"] == {"tiny-safety": 3}
    assert {name: value for name, value in shown.items() if name in before} == before | {
        "problems": dict.fromkeys(("tiny-math", "tiny-code", "tiny-safety"), 9)
    }
    grid.run_cells({cell: {"tiny-safety"}}, 1)
    assert len(called) == 3


@pytest.mark.parametrize("what", ["command", "model", "data"])
def test_a_result_of_other_settings_model_or_data_is_refused(measured, what):
    cell, _ = measured
    grid.run_cells({cell: {"tiny-math"}}, 1)
    shown = grid.saved(cell)
    shown["hashes"]["code"] = "other code may well measure the same"
    grid.write_json(cell.result, shown)
    grid.run_cells({cell: {"tiny-math"}}, 1)
    (shown if what == "command" else shown["hashes"])[what] = "other"
    grid.write_json(cell.result, shown)
    with pytest.raises(ValueError, match=f"measured with another {what} than now"):
        grid.run_cells({cell: {"tiny-math"}}, 1)


def test_scores_of_two_runs_are_never_mixed_in_one_file(measured):
    cell, _ = measured
    grid.run_cells({cell: {"tiny-math"}}, 1)
    (cell.folder / "metrics.jsonl").write_text('{"loss": 2.0}\n{"loss": 1.5}\n')
    with pytest.raises(ValueError, match="ends with another loss"):
        grid.run_cells({cell: {"tiny-code"}}, 1)


def test_a_mask_run_at_another_rate_makes_another_cell_of_the_same_name():
    one, other = (
        grid.Run("lori-s", 0.01, 0, mask=grid.Run("lori-d", lr, 0)) for lr in (0.01, 0.02)
    )
    assert one.name == other.name
    assert one.rests_on() != other.rests_on()


def test_a_failing_cell_ends_with_its_command_and_its_last_line():
    fails = "import sys; print('a line', file=sys.stderr); sys.exit('error: k is 0')"
    with pytest.raises(
        OSError, match=r"exit code 1: python -c import .*\(error: k is 0\)$"
    ) as raised:
        grid.python("-c", fails)
    assert "\n" not in str(raised.value)


@dataclass(frozen=True)
class Program(grid.Base):
    """A cell that is made by a program of its own."""

    code: str
    finished = False

    @property
    def name(self):
        return str(hash(self.code))

    def command(self):
        return ["-c", self.code]


@pytest.mark.parametrize("end", ["a failure", "Ctrl-C"])
def test_a_failure_or_a_signal_ends_the_commands_that_are_under_way(end, tmp_path, monkeypatch):
    for name in ("ROOT", "RUNS", "RESULTS"):
        monkeypatch.setattr(grid, name, tmp_path)
    error, says = (OSError, "error: no") if end == "a failure" else (KeyboardInterrupt, None)
    codes = [
        "import time; time.sleep(300)",
        "import sys; sys.exit('error: no')",
        "import time; time.sleep(299)",
    ]
    if end == "Ctrl-C":
        codes.pop(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        Timer(1, signal.pthread_kill, (main_thread().ident, signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(error, match=says):
        grid.run_cells({Program(code=code): {"tiny-math"} for code in codes}, 2)
    assert time.monotonic() - start < 60
    assert not parallel.RUNNING


def test_there_is_no_training_for_a_result_that_cannot_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "RESULTS", tmp_path)
    monkeypatch.setattr(os, "access", lambda place, how: False)  # a root user may write anywhere
    with pytest.raises(PermissionError, match="results are kept there"):
        grid.run_cells({Program(code="0 / 0"): {"tiny-math"}}, 1)


# ---- studies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*comparison.N_SEEDS, *comparison.OTHERS])
@pytest.mark.parametrize("quick", [False, True])
def test_a_studys_rows_can_be_compared_run_by_run_and_its_cells_share_no_file(name, quick):
    study = comparison.study(name, quick)
    rows = {row.name: row for row in study.rows}
    assert len(rows) == len(study.rows)
    for row in study.rows:
        for column, runs in row.runs.items():
            other = rows[row.against].runs[column] if row.against else runs
            assert [(c.model, c.seed) for c in other if isinstance(c, grid.Run)] == [
                (c.model, c.seed) for c in runs if isinstance(c, grid.Run)
            ]
    assert len({cell.result for cell in study.wanted()}) == len(study.wanted())


def test_table_2_and_4_have_five_seeds_and_the_papers_numbers():
    for number, rows in (("2", 8), ("4", 9)):
        study = comparison.study(number)
        assert len(study.rows) == rows
        assert all(len(row.runs["gsm8k"]) == 5 for row in study.rows)
    printed = {row.name: row.printed["gsm8k"] for row in comparison.study("2").rows}
    assert (printed["hellora"], printed["lora"]) == (29.49, 26.37)


@pytest.fixture
def scored(monkeypatch):
    """scored(f): every run of a study has the accuracy f(cell) on tiny-math; None: no run."""

    def stand_in(accuracy):
        def shown(cell):
            value = accuracy(cell)
            kept = {"accuracy": {"tiny-math": value}, "trained": 7, "method": cell.method}
            kept |= {"hashes": {"model": cell.model}}
            return {} if value is None else kept

        monkeypatch.setattr(comparison, "saved", shown)

    return stand_in


def test_harmless_refusals_are_kept_as_counts_and_shown_as_shares(monkeypatch):
    kept = {"harmless_refused": {"tiny-safety": 30}, "harmless_total": {"tiny-safety": 120}}
    monkeypatch.setattr(comparison, "saved", lambda cell: kept)
    of = comparison.COLUMNS["harmless"]
    assert comparison.score(grid.Base(), of) == 0.25
    monkeypatch.setattr(comparison, "saved", lambda cell: {})
    assert comparison.score(grid.Base(), of) is None


def test_runs_are_paired_by_seed_and_an_interval_needs_two(scored):
    scored(lambda c: 0.1 * c.seed + (0.5 if c.method == "hellora" else 0.3) if c.seed < 2 else None)
    rows = comparison.results(comparison.study("7"))["rows"]
    assert rows["hellora, k = 8"]["gsm8k"]["runs"] == pytest.approx([0.5, 0.6])
    minus = comparison.results(comparison.study("2"))["rows"]["lora"]["gsm8k"]["minus"]
    assert (minus["row"], minus["mean"]) == ("hellora", pytest.approx(-0.2))
    assert minus["std"] == pytest.approx(0, abs=1e-12)  # the seeds move both alike
    scored(lambda c: 0.5 if c.seed == 0 else None)
    one = comparison.results(comparison.study("2"))["rows"]["lora"]["gsm8k"]
    assert (one["mean"], one["low"]) == (0.5, None)


def test_with_several_bases_the_interval_is_over_their_means(scored):
    height = {"tiny": 0.3, f"{grid.BASES}1": 0.5, f"{grid.BASES}2": 0.7}
    scored(lambda c: height[c.model] + 0.01 * c.seed)
    of = comparison.results(comparison.study("bases"))["rows"]["hellora"]["gsm8k"]
    assert len(of["runs"]) == 6
    assert of["mean"] == pytest.approx(0.505)
    assert of["std"] == pytest.approx(0.2)  # of .305, .505, .705


def test_a_base_counts_once_all_its_seeds_are_finished_and_one_base_gives_no_interval(scored):
    scored(lambda c: 0.5 if c.model == "tiny" else None)
    of = comparison.results(comparison.study("bases"))["rows"]["hellora_c"]["gsm8k"]
    assert (len(of["runs"]), of["mean"], of["low"]) == (2, 0.5, None)
    assert (of["minus"]["mean"], of["minus"]["p"]) == (0, None)
    scored(lambda c: {"tiny": 0.5, f"{grid.BASES}1": 0.9}.get(c.model) if c.seed == 0 else None)
    of = comparison.results(comparison.study("bases"))["rows"]["hellora_c"]["gsm8k"]
    assert (len(of["runs"]), "mean" in of, of["minus"]) == (2, False, None)


@pytest.mark.parametrize("differs", [lambda c: c.method == "hellora_c", lambda c: c.seed == 1])
def test_runs_on_one_base_that_started_from_different_weights_are_not_compared(
    monkeypatch, scored, differs
):
    """Not in a pair, nor from one pair to the next."""
    scored(lambda c: 0.5)
    shown = comparison.saved
    other = {"hashes": {"model": "pretrained on another machine"}}
    monkeypatch.setattr(comparison, "saved", lambda c: shown(c) | (other if differs(c) else {}))
    with pytest.raises(ValueError, match="started from different weights"):
        comparison.results(comparison.study("bases"))


def test_a_quick_look_needs_no_other_base_and_says_so():
    study = comparison.study("bases", quick=True)
    assert {cell.model for cell in study.wanted()} == {"tiny"}
    assert "quick: the first run of each" in study.title


def test_a_claim_holds_if_it_is_told_after_correction_and_all_its_runs_are_finished(scored):
    def accuracy(cell):
        noise = 0.01 * (cell.seed % 2)
        known = {"lora": 0.5, "fft": 0.9, "dora": 0.69, "hellori-d": 0.6999, "hellora": 0.7}
        wide = {"dora": 4, "hellora": 0.2, "hellori-d": 0.2}.get(cell.method, 1)
        return known.get(cell.method, 0.7) + wide * noise

    scored(accuracy)
    said = {c["says"]: c for c in claims.results()}
    assert said["HELLoRA beats LoRA on word problems"]["verdict"] == "holds"
    assert said["HELLoRA beats LoRA on word problems"]["paper"] == pytest.approx(3.12)
    assert said["HELLoRA beats full fine-tuning on word problems"]["verdict"] == "fails"
    assert said["HELLoRA beats DoRA on word problems"]["verdict"] == "undecided"
    assert said["HELLoRA beats HELLoRI-D on word problems"]["verdict"] == "equivalent"
    scored(lambda cell: None if cell.seed == 4 else accuracy(cell))
    said = {c["says"]: c["verdict"] for c in claims.results()}
    assert said["HELLoRA beats LoRA on word problems"] == "not finished"
    assert said["8 experts beat 2"] == "equivalent"  # three seeds are all it wants


def test_every_comparison_of_the_papers_tables_has_the_papers_difference():
    for claim in claims.results():
        assert (claim["paper"] is None) == ("Table" not in claim["where"]), claim


# Hours of sleep gained with two drugs (Student, 1908): the data set "sleep" of R.
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)
UNLIKE = [92.0, 93.0, 92.5, 92.2, 93.4], [70.0, 85.0, 90.0, 60.0, 95.0, 88.0]
# R's page of t.test prints t = -1.8608, df = 17.776, p = 0.07939 for SLEEP. All digits: mpmath
# 1.3.0, with the incomplete beta function. one_sided: of (mean(a) - mean(b) + 1) / error.
WELCH = [
    (SLEEP, -1.860813467486853, 17.776473516178488, 0.07939414018735817, 0.7483198114409818),
    (UNLIKE, 2.054584416625629, 5.022045448067882, 0.09483913362294093, 0.03764977681672555),
]


@pytest.mark.parametrize(("groups", "t", "df", "p", "one_sided"), WELCH)
def test_two_groups_are_compared_by_welchs_t(groups, t, df, p, one_sided):
    found = stats.compare_groups(*groups, margin=1.0)
    assert found.df == pytest.approx(df, rel=1e-9)
    assert found.mean / found.error == pytest.approx(t, rel=1e-9)
    assert found.p == pytest.approx(p, abs=1e-9)  # the error of the integral, as `inside` says
    assert found.p_not_worse == pytest.approx(one_sided, abs=1e-9)
    swapped = stats.compare_groups(*reversed(groups), margin=1.0)
    assert (swapped.mean, swapped.p) == pytest.approx((-found.mean, found.p))


def test_groups_without_any_spread_have_all_their_degrees_of_freedom():
    assert stats.compare_groups([1.0] * 5, [1.0] * 5, margin=1.0).df == pytest.approx(8)
    assert stats.compare_groups([1.0] * 5, [1.0, 2.0, 3.0], margin=1.0).df == pytest.approx(2)


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([0.0, 0.1, -0.1, 0.05], "holds"),  # a loss of 1 is excluded
        ([-0.3, -0.3, -0.31, -0.29], "holds"),  # worse, but by less than 1
        ([2.0, 2.1, 1.9, 2.0], "holds"),
        ([-3.0, -3.1, -2.9, -3.0], "fails"),
        ([-0.9, -1.4, -0.6, -1.1], "fails"),  # worse, and a loss of 1 is not excluded
        ([-3.0, 3.0, -2.0, 1.0], "undecided"),  # not significantly worse, but that proves nothing
    ],
)
def test_a_claim_of_not_being_worse_has_a_verdict_of_its_own(ours, said):
    test = stats.compare_groups(ours, [0.0, 0.01, -0.01, 0.0], margin=1.0)
    _, p = stats.at_least(test)
    assert stats.verdict_at_least(test, p) == said
    if said != "undecided":
        assert stats.verdict_at_least(test, 0.2) == f"{said} unadjusted"  # after a correction


def test_not_being_worse_is_seldom_said_of_a_loss_of_the_margin():
    draw = random.Random(0)
    found = []
    for _ in range(500):
        ours, theirs = ([draw.gauss(x, 1) for _ in range(5)] for x in (-1, 0))
        found.append(stats.at_least(stats.compare_groups(ours, theirs, margin=1.0)))
    wrong = sum(word == "holds" and p < 0.05 for word, p in found) / len(found)
    assert wrong <= 0.08  # 5 %, and three standard errors of .01 in 500 draws


def test_our_own_claims_do_not_change_the_correction_of_the_papers(scored, monkeypatch):
    noise = {"lora": 0.5, "fft": 0.9}
    scored(lambda cell: noise.get(cell.method, 0.7) + 0.01 * (cell.seed % 2))
    before = {c["says"]: c for c in claims.results()}
    own = next(c for c in claims.CLAIMS if c.study == "bases")
    more = [own._replace(says=f"one more {n}") for n in range(50)]
    monkeypatch.setattr(claims, "CLAIMS", (*claims.CLAIMS, *more))
    after = {c["says"]: c for c in claims.results()}
    of_paper = [c.says for c in claims.CLAIMS if c.where]
    assert all(after[says] == before[says] for says in of_paper)
    # Holm by hand: the smallest p is multiplied by the number of the paper's claims
    least = min(before[says]["p"] for says in of_paper if before[says]["ours"])
    (smallest, *_) = [before[says] for says in of_paper if before[says]["p"] == least]
    assert smallest["p_corrected"] == pytest.approx(min(1, len(of_paper) * least))


def test_a_model_that_refuses_everything_is_half_right_if_balanced(monkeypatch):
    kept = {"harmless_refused": {"tiny-safety": 120}, "harmless_total": {"tiny-safety": 120}}
    monkeypatch.setattr(
        comparison, "saved", lambda cell: kept | {"refusal_rate": {"tiny-safety": 1.0}}
    )
    assert comparison.score(grid.Base(), ("balanced", "tiny-safety")) == 0.5


@pytest.mark.parametrize("what", [("--table", "4"), ("bases",), ("all",), ("all", "--quick")])
def test_a_dry_run_lists_what_the_scripts_take_and_how_long_it_is(cli, what, monkeypatch):
    code, out, _ = cli("paper.reproduce", *what, "--dry-run")
    *commands, total = out.splitlines()
    assert code == 0
    assert re.match(r"\d+ of \d+ runs are missing: ", total)
    assert ("nothing is left to run" in total) == (not commands)
    assert bool(re.search(r"about [\d.]+ (hours|minutes), \d at a time$", total)) == bool(commands)
    pretrained = set(re.findall(r"tiny\.pretrain .*--out (\S+)", out))
    for line in commands:
        script, *flags = [word for word in shlex.split(line)[1:] if word != "-m"]
        if script == "train.py":  # a base that an earlier command makes is not there yet
            flags = ["tiny" if word in pretrained else word for word in flags]
        if script not in (
            "export.py",
            "paper.studies.forgetting",
        ):  # tests/test_beyond.py has these
            monkeypatch.setattr(sys, "argv", [script, *flags])
            (PARSERS | {"paper.studies.mechanism": mechanism.parse_args})[script]()


def test_what_is_finished_can_be_seen_without_running_anything(cli):
    code, out, _ = cli("paper.reproduce", "all", "--finished")
    assert code == 0
    assert all(f"== Table {n}" in out for n in range(1, 9))


# ---- table 8 -------------------------------------------------------------------------------------


def test_the_overlap_by_chance_is_the_mean_over_all_pairs_of_choices():
    choices = [set(c) for c in combinations(range(6), 2)]
    pairs = [len(a & b) / len(a | b) for a in choices for b in choices]
    assert stability.chance(2, 6) == pytest.approx(sum(pairs) / len(pairs))


def test_overlaps_compare_tasks_within_a_seed_and_a_task_with_its_own_other_seeds():
    hot = {
        "a": dict(enumerate([{"0": [1, 2]}, {"0": [1, 2]}, {"0": [3, 4]}])),
        "b": {seed: {"0": [1, 3]} for seed in (0, 1)},
    }
    # Of seeds 0 and 1.
    assert stability.overlap_row("a", "b", hot)["overlaps"] == pytest.approx([1 / 3, 1 / 3])
    assert sorted(stability.overlap_row("a", "a", hot)["overlaps"]) == [0, 0, 1]
    assert stability.overlap_row("a", "c", hot | {"c": {}})["overlaps"] == []


# ---- real routing --------------------------------------------------------------------------------


def test_what_is_read_off_counts_is_what_they_say(tmp_path):
    counts = torch.tensor([10.0] * 8 + [1.0] * 48 + [0.0] * 8)  # 80 + 48 visits
    assert routing.shares(counts) == {"hot": 0.625, "cold": 0.0}
    even = torch.ones(64)
    assert routing.shares(even) == {"hot": 0.125, "cold": 0.125}
    assert routing.stability({0: counts}, 2000) == 1.0  # the gap is many standard errors wide
    assert 0.05 < routing.stability({0: even}, 50) < 0.2  # by chance .07


def test_the_share_behind_the_papers_flops_saves_what_the_paper_says():
    assert routing.saved_flops(routing.NEEDED) == pytest.approx(0.387, abs=5e-4)
