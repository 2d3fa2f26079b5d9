"""Mean, spread and interval over seeds, and the paired test of two methods.

Student's t is written out, as the packages we allow ourselves have no distribution functions: in
closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
"""

from math import atan, cos, pi, sin, sqrt
from statistics import mean, stdev
from typing import NamedTuple

ROUNDING = 1e-12  # of differences of equal numbers


class Spread(NamedTuple):
    """What some numbers say of the mean they are drawn around.

    None: one number says nothing of it.
    """

    mean: float
    std: float | None
    low: float | None  # of the 95 % interval
    high: float | None
    p: float | None  # two-sided, of a mean of 0


def inside(t: float, df: int) -> float:
    """The chance that |T| < t, of Student's T with `df` degrees of freedom."""
    angle = atan(t / sqrt(df))
    term = total = cos(angle) if df % 2 else 1.0
    for i in range(3 if df % 2 else 2, df, 2):
        term *= cos(angle) ** 2 * (i - 1) / i
        total += term
    if df % 2 == 0:
        return sin(angle) * total
    return 2 / pi * (angle + (sin(angle) * total if df > 1 else 0))


def t_95(df: int) -> float:
    """What |T| stays below 95 times in 100, by bisection."""
    low, high = 0.0, 16.0  # 12.7 with one degree of freedom, less with more
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, df) < 0.95 else (low, middle)
    return high


def spread(values: list[float]) -> Spread:
    """Of numbers drawn independently, from about a normal distribution.

    Equal numbers have no interval: scores are counts out of some hundred problems, and at their
    ceiling three runs may well agree without being certain.
    """
    center, df = mean(values), len(values) - 1
    std = stdev(values) if df else None
    if df == 0 or std < ROUNDING:
        return Spread(center, std, None, None, None)
    error = std / sqrt(len(values))
    p = 1 - inside(abs(center) / error, df)
    return Spread(center, std, center - t_95(df) * error, center + t_95(df) * error, p)


def signed(of: dict | None, digits: int, unit: float = 1) -> str:
    """A Spread (as a dict) in words, in this unit: "+1.2 (-0.3 to +2.7, p 0.080)"; "" for None."""
    if of is None:
        return ""
    center, *ends = (
        f"{of[x] / unit:+.{digits}f}" for x in ("mean", "low", "high") if of[x] is not None
    )
    if not ends:
        return center
    p = "< 0.001" if of["p"] < 0.0005 else f"{of['p']:.3f}"
    return f"{center} ({' to '.join(ends)}, p {p})"
