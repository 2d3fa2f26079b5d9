"""The paper's numbers as data: what follows from them, and that their commands are real."""

import shlex
import sys
from collections import Counter
from math import floor

import pytest

from hellora import count_params, parse_method
from paper import eval_humaneval, eval_safety, reproduce
from paper.plan import shapes
from paper.studies import tables
from paper.studies.tables import NUMBERS, TEXT, printed
from plumbing import flags
from plumbing.checkpoint import BACKBONES
from settings import RECIPES
from tiny import pretrain

WORDS = ("reproduced", "contradicted", "out of reach")


def of(metric, *numbers):
    return [c.printed for c in NUMBERS if c.metric == metric and c.table in numbers]


def is_share_of(n, percent):
    """Whether a percent with two digits, rounded or cut off, is a whole number of n things."""
    exact = 10_000 * round(percent / 100 * n) / n
    return round(100 * percent) in (floor(exact), floor(exact + 0.5))


def digits(value):
    return len(f"{value:g}".partition(".")[2])


# ---- the tables among themselves -----------------------------------------------------------------


def test_every_table_is_here_and_no_number_twice():
    assert {c.table for c in NUMBERS} == set("12345678")
    cells = Counter((c.table, c.backbone, c.method, c.k, c.task, c.metric) for c in NUMBERS)
    assert set(cells.values()) == {1}
    assert all(x.status.word in WORDS for x in (*NUMBERS, *TEXT, tables.METRICS["gsm8k"]))


def test_table_1_is_what_train_py_does_when_nothing_is_said():
    cells = [c for c in NUMBERS if c.table == "1"]
    assert {c.task for c in cells} == {"gsm8k", "code", "safety"}
    for c in cells:
        recipe = RECIPES[c.task, parse_method(c.method).train_base]
        assert getattr(recipe, c.metric) == c.printed, c


def test_tables_that_share_a_row_agree_but_where_we_say_so():
    assert (
        printed("5", "hellora", "params")
        == printed("4", "hellora", "params")
        == printed("2", "hellora", "params")
    )
    by_k = {c.metric: c for c in NUMBERS if c.table == "7" and c.k == 8}
    # So Table 7's labels are swapped.
    assert by_k["gsm8k"].printed == printed("2", "hellora", "gsm8k")
    assert by_k["samples/s"].printed != printed("6", "hellora", "samples/s")
    assert by_k["samples/s"].status.word == "contradicted"


def test_scores_lie_on_the_grids_of_an_evaluator_that_drops_the_last_partial_batch():
    """LoRI's, in batches of 64: 320 of 330 prompts, 1280 of 1319 problems; 164 programs x 20."""
    refusals, first = of("refusals", "2", "5"), of("pass@1", "2", "5", "8")
    assert (sum(is_share_of(320, x) for x in refusals), len(refusals)) == (11, 14)
    assert not any(is_share_of(n, x) for n in (300, 330) for x in refusals)
    assert all(is_share_of(1280, x) for x in of("gsm8k", "3"))
    assert (sum(is_share_of(164 * 20, x) for x in first), len(first)) == (15, 17)


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quote", [c for c in TEXT if c.from_tables], ids=lambda c: c.says)
def test_a_number_of_the_text_follows_from_the_papers_own_tables_if_and_only_if_we_say_so(quote):
    follows = round(quote.from_tables(), digits(quote.value)) == quote.value
    assert follows == (quote.status.word == "reproduced")


def test_the_parameter_claims_from_exact_integers():
    rows = {(r["backbone"], r["method"], r["k"]): r for r in reproduce.params()}

    def ratio(backbone, method, k, of, field):
        every = 8 if backbone == tables.MIXTRAL else 64
        return 100 * rows[backbone, method, k][field] / rows[backbone, of, every][field]

    olmoe, deepseek = (tables.OLMOE, "hellora", 8, "lora"), (tables.DEEPSEEK, "hellora", 12, "lora")
    assert round(ratio(*olmoe, "percent"), 2) == 15.74
    assert round(ratio(*olmoe, "trained"), 2) == 15.16
    assert round(100 - ratio(*olmoe, "trained")) == 85
    assert round(ratio(*deepseek, "percent"), 1) == 23.2
    assert round(ratio(*deepseek, "trained"), 1) == 22.6
    assert round(ratio(tables.OLMOE, "hellori-s", 8, "lora", "percent"), 1) == 0.7


def test_dora_s_percent_is_that_of_dora_without_the_router():
    model = shapes(BACKBONES[tables.OLMOE].cfg, "dora_attn", 64)
    trained, stored = count_params(model, parse_method("dora_attn"))
    assert round(100 * trained / stored, 4) == 4.3504


def test_1_62_is_the_claimed_speed_up_with_the_catcher_paid_and_table_6_gives_1_83():
    assert abs(1.888 / 1.16 - 1.62) < 0.01  # the 16 % are rounded
    assert round(tables.ratio("6", "hellora", "lora", "samples/s"), 2) == 1.83


# ---- commands ------------------------------------------------------------------------------------

PARSERS = {
    "train.py": lambda: flags.train(""),
    "eval_gsm8k.py": lambda: flags.eval_gsm8k(""),
    "paper.eval_humaneval": eval_humaneval.parse_args,
    "paper.eval_safety": eval_safety.parse_args,
    "tiny.pretrain": pretrain.parse_args,
}


def test_every_cells_commands_are_such_as_the_scripts_take(monkeypatch):
    commands = {part for c in NUMBERS for part in c.command().split(" && ")}
    parsed = Counter()
    for text in sorted(commands):
        words = [word for word in shlex.split(text) if word not in ("python", "-m")]
        if words[0] in PARSERS:
            monkeypatch.setattr(sys, "argv", words)
            args = PARSERS[words[0]]()
            parsed[words[0]] += 1
            if words[0] == "train.py":
                assert (args.mask_from is not None) == (parse_method(args.method).keep < 1), text
                # Its whole test split.
                assert (args.eval_limit == 1319) == (args.task == "gsm8k"), text
    assert set(parsed) == set(PARSERS) - {"tiny.pretrain"}


def test_what_a_cell_scores_was_trained_into_the_folder_that_is_scored():
    for c in NUMBERS:
        train, _, score = c.command().partition(" && ")
        if score:
            assert train.split("--out ")[1] == score.split("--run ")[1], c
