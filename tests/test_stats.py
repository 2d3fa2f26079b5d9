"""Student's t and intervals, against printed tables and by simulation."""

import pytest
import torch

from paper.runs.stats import aligned, inside, spread, t_95


@pytest.mark.parametrize(
    ("df", "t"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)],
)
def test_quantiles_are_those_of_printed_tables(df, t):
    assert t_95(df) == pytest.approx(t, abs=5e-4)  # the tables' last digit


@pytest.mark.parametrize(("df", "t", "p"), [(2, 2.920, 0.90), (4, 4.604, 0.99), (7, 1.415, 0.80)])
def test_chances_are_those_of_printed_tables(df, t, p):
    assert inside(t, df) == pytest.approx(p, abs=2e-4)  # t is rounded to three places


def test_nineteen_intervals_of_twenty_hold_the_mean():
    draw, n = torch.Generator().manual_seed(0), 2000
    drawn = (torch.randn(n, 3, generator=draw, dtype=torch.float64) * 2 + 5).tolist()
    found = [spread(values) for values in drawn]
    held = sum(s.low < 5 < s.high for s in found) / n
    assert abs(held - 0.95) < 4 * (0.95 * 0.05 / n) ** 0.5  # four standard deviations
    assert sum(spread([v - 5 for v in values]).p < 0.05 for values in drawn) / n == pytest.approx(
        1 - held
    )


def test_one_number_and_equal_ones_have_no_interval():
    assert spread([0.5]) == (0.5, None, None, None, None)
    assert spread([0.5, 0.5, 0.5])[1:] == (0, None, None, None)
    apart = spread([0.938 - 0.936, 0.926 - 0.924, 0.92 - 0.918])  # equal but for rounding
    assert apart.low is None
    assert apart.mean == pytest.approx(0.002)


def test_the_columns_of_a_table_begin_or_end_at_one_place_and_empty_ones_are_left_out():
    rows = [["a", "7", "", "yes"], ["bcd", "12", "", ""]]
    assert aligned([["", "n", "none", "says"], *rows]) == [
        "      n  says",
        "a     7   yes",
        "bcd  12",
    ]
    found = aligned([["x", "by"], ["1", "a"], ["22", "bc"]], left=(1,))
    assert found == [" x  by", " 1  a", "22  bc"]
    assert aligned([["a", "b"]]) == ["a  b"]  # no rows yet: the head is all there is
