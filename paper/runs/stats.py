"""The mean, spread and interval over seeds, the tests of two methods, and numbers as text.

Student's t is written out here, because the allowed packages have no distribution functions.
"""

from functools import cache
from math import atan, cos, exp, lgamma, log, pi, sqrt
from statistics import NormalDist, mean, stdev
from typing import NamedTuple

STEPS = 200  # of an integral
ROUNDING = 1e-12  # equal numbers differ by less, after rounding


class Spread(NamedTuple):
    """The mean of some numbers, and how certain it is.

    None: there are too few numbers to say.
    """

    mean: float
    std: float | None
    low: float | None  # the 95 % interval
    high: float | None
    p: float | None  # two-sided, for a mean of 0


def inside(t: float, df: float) -> float:
    """The chance that |T| < t. T is Student's, with `df` degrees of freedom, whole or not.

    With T = sqrt(df) tan(angle) the density of the angle is cos(angle) ** (df - 1), but for a
    factor. Simpson's rule integrates it, with an error below 1e-9 for t up to 30 and df from 2.
    """
    width = atan(t / sqrt(df)) / STEPS
    heights = [cos(i * width) ** (df - 1) for i in range(STEPS + 1)]
    area = heights[0] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]) + heights[-1]
    factor = 2 / sqrt(pi) * exp(lgamma((df + 1) / 2) - lgamma(df / 2))
    return factor * area * width / 3


def t_95(df: float) -> float:
    """The bound that |T| stays below in 95 % of cases."""
    return t_quantile(0.95, df)


@cache
def t_quantile(share: float, df: float) -> float:
    """The bound that |T| stays below in this share of cases, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, df) < share else (low, middle)
    return high


def above(t: float, df: float) -> float:
    """The chance that T > t."""
    tail = (1 - inside(abs(t), df)) / 2
    return tail if t > 0 else 1 - tail


@cache
def found_at(df: float, power: float = 0.8) -> float:
    """The distance of a true mean from 0, in standard errors, so that |T| > t_95 in this share.

    T is then noncentral: (Z + shift) / S, with Z normal and df * S^2 a chi-square. The chance is a
    mean over S, computed in small steps. The simpler t_95 + t_quantile(0.6) is too small with few
    degrees of freedom: by 5 % with two.
    """
    steps = [(i + 0.5) / 200 for i in range(1200)]  # values of S, up to 6
    density = [exp((df - 1) * log(s) + df * (1 - s * s) / 2) for s in steps]  # without a factor
    chance, low, high = NormalDist().cdf, 0.0, 100.0
    for _ in range(40):
        shift = (low + high) / 2
        found = [chance(shift - t_95(df) * s) for s in steps]  # T < -t_95 hardly happens
        share = sum(d * f for d, f in zip(density, found, strict=True)) / sum(density)
        low, high = (shift, high) if share < power else (low, shift)
    return high


class Comparison(NamedTuple):
    """The test of a difference: whether it is 0, and whether it is small."""

    mean: float
    error: float  # standard error of the mean
    df: float  # degrees of freedom
    low: float  # the 95 % interval
    high: float
    p: float  # two-sided, for a mean of 0
    p_not_worse: float  # one-sided, for a mean of -margin or less
    p_equivalent: float  # for a mean outside +-margin: the larger p of two one-sided tests (TOST)
    mde: float  # the smallest true mean that is found (p < .05, uncorrected) with a power of 80 %


def compare(differences: list[float], margin: float) -> Comparison:
    """The paired t-test. There are two or more differences, independent and roughly normal."""
    n = len(differences)
    error = max(stdev(differences), ROUNDING) / sqrt(n)
    return tested(mean(differences), error, n - 1, margin)


def compare_groups(ours: list[float], theirs: list[float], margin: float) -> Comparison:
    """Welch's t-test of the difference of two groups. Numbers are independent, of any two spreads.

    It is for runs whose pairing has no meaning. Pairs would only cost degrees of freedom.
    """
    n, m = len(ours), len(theirs)
    a, b = max(stdev(ours), ROUNDING) ** 2 / n, max(stdev(theirs), ROUNDING) ** 2 / m
    df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))  # Welch and Satterthwaite
    return tested(mean(ours) - mean(theirs), sqrt(a + b), df, margin)


def tested(center: float, error: float, df: float, margin: float) -> Comparison:
    """The tests of a difference with its standard error, against 0 and against the margin."""
    reach = t_95(df) * error
    not_worse, not_better = (
        above((center + margin) / error, df),
        above((margin - center) / error, df),
    )
    return Comparison(
        mean=center,
        error=error,
        df=df,
        low=center - reach,
        high=center + reach,
        p=max(0.0, 1 - inside(abs(center) / error, df)),  # rounding may give a number below 0
        p_not_worse=not_worse,
        p_equivalent=max(not_worse, not_better),
        mde=found_at(round(df, 1)) * error,  # rounded, as it takes a while
    )


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979). Reject those below the level."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def verdict(test: Comparison, corrected: float, level: float = 0.05) -> str:
    """The verdict on a claim that the mean is positive. corrected: its p after `holm`."""
    word = "holds" if test.mean > 0 else "fails"
    if corrected < level:
        return word
    if test.p_equivalent < level:
        return "equivalent"
    if test.p < level:
        return f"{word} unadjusted"
    return "undecided"


def at_least(test: Comparison, level: float = 0.05) -> tuple[str, float]:
    """The word on a claim that the mean is not below 0 by more than the margin, and p of its test.

    "holds": the one-sided test of a mean of -margin or less. "fails": that is not significant, and
    the mean is significantly below 0. So a loss that is shown to be smaller than the margin, before
    any correction, never refutes the claim. At most one of the two can be a mistake, so a claim
    counts once in a correction.
    """
    if test.p_not_worse >= level and test.p < level and test.mean < 0:
        return "fails", test.p
    return "holds", test.p_not_worse


def verdict_at_least(test: Comparison, corrected: float, level: float = 0.05) -> str:
    """The verdict on a claim of `at_least`. corrected: its p after `holm`."""
    word, p = at_least(test, level)
    if corrected < level:
        return word
    return f"{word} unadjusted" if p < level else "undecided"


def spread(values: list[float]) -> Spread:
    """The Spread of numbers that are independent and roughly normal.

    Equal numbers have no interval. Scores are counts out of some hundred problems. Near 100 % three
    runs may agree by chance, so their agreement proves nothing.
    """
    center, df = mean(values), len(values) - 1
    std = stdev(values) if df else None
    if df == 0 or std < ROUNDING:
        return Spread(center, std, None, None, None)
    error = std / sqrt(len(values))
    p = 1 - inside(abs(center) / error, df)
    return Spread(center, std, center - t_95(df) * error, center + t_95(df) * error, p)


def signed(result: dict | None, digits: int, unit: float = 1) -> str:
    """A Spread (as a dict) as text, in this unit: "+1.2 (-0.3 to +2.7, p 0.080)". "" for None."""
    if result is None:
        return ""
    center, *ends = (
        f"{result[x] / unit:+.{digits}f}" for x in ("mean", "low", "high") if result[x] is not None
    )
    if not ends:
        return center
    p = "< 0.001" if result["p"] < 0.0005 else f"{result['p']:.3f}"
    return f"{center} ({' to '.join(ends)}, p {p})"


def short_p(p: float) -> str:
    """A p-value with three digits."""
    return "<.001" if p < 0.0005 else f"{p:.3f}".removeprefix("0")


def aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    """The lines of a table. rows: the first one is the head.

    A column is as wide as its longest text. A column whose rows are all empty is left out. Texts
    stand on the right of a column, or on the left of the columns `left`.
    """
    lines = ["" for _ in rows]
    for i, (head, *column) in enumerate(zip(*rows, strict=True)):
        if any(column) or not column:
            texts = [head, *column]
            width = max(map(len, texts))
            padded = [t.ljust(width) if i in left else t.rjust(width) for t in texts]
            lines = [f"{line}  {text}" for line, text in zip(lines, padded, strict=True)]
    return [line.removeprefix("  ").rstrip() for line in lines]
