"""Mean, spread and interval over seeds, and the paired test of two methods.

Student's t is written out, as the packages we allow ourselves have no distribution functions: in
closed form for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
"""

from functools import cache
from math import atan, cos, exp, log, pi, sin, sqrt
from statistics import NormalDist, mean, stdev
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
    """What |T| stays below 95 times in 100."""
    return t_quantile(0.95, df)


@cache
def t_quantile(share: float, df: int) -> float:
    """What |T| stays below in this share of cases, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, df) < share else (low, middle)
    return high


def above(t: float, df: int) -> float:
    """The chance that T > t."""
    tail = (1 - inside(abs(t), df)) / 2
    return tail if t > 0 else 1 - tail


@cache
def found_at(df: int, power: float = 0.8) -> float:
    """How many standard errors a true mean is off 0 if |T| > t_95 in this share of cases.

    T is then noncentral: (Z + shift) / S, with Z normal and df * S^2 a chi-square. The chance is a
    mean over S, here over small steps of it. t_95 + t_quantile(0.6) would be too small with few
    degrees of freedom: by 5 % with two.
    """
    steps = [(i + 0.5) / 200 for i in range(1200)]  # S, up to 6
    density = [exp((df - 1) * log(s) + df * (1 - s * s) / 2) for s in steps]  # but for a factor
    chance, low, high = NormalDist().cdf, 0.0, 100.0
    for _ in range(40):
        shift = (low + high) / 2
        found = [chance(shift - t_95(df) * s) for s in steps]  # below -t_95: hardly ever
        share = sum(d * f for d, f in zip(density, found, strict=True)) / sum(density)
        low, high = (shift, high) if share < power else (low, shift)
    return high


class Comparison(NamedTuple):
    """What a difference's sample says of it: whether it is 0, and whether it is small."""

    mean: float
    error: float  # standard error of the mean
    df: int  # degrees of freedom
    low: float  # of the 95 % interval
    high: float
    p: float  # two-sided, of a mean of 0
    p_equivalent: float  # of a mean outside +-margin: the larger p of two one-sided tests (TOST)
    mde: float  # the smallest true mean that is found (p < .05, uncorrected) with a power of 80 %


def compare(differences: list[float], margin: float) -> Comparison:
    """The paired t-tests of at least two differences, drawn independently, about normal."""
    n = len(differences)
    error = max(stdev(differences), ROUNDING) / sqrt(n)
    return tested(mean(differences), error, n - 1, margin)


def compare_groups(ours: list[float], theirs: list[float], margin: float) -> Comparison:
    """The t-tests of two groups' difference, drawn independently, of about the same spread.

    For runs whose pairing says nothing: it would only cost degrees of freedom.
    """
    n, m = len(ours), len(theirs)
    df = n + m - 2
    pooled = ((n - 1) * stdev(ours) ** 2 + (m - 1) * stdev(theirs) ** 2) / df
    error = max(sqrt(pooled), ROUNDING) * sqrt(1 / n + 1 / m)
    return tested(mean(ours) - mean(theirs), error, df, margin)


def tested(center: float, error: float, df: int, margin: float) -> Comparison:
    """A difference with its standard error, held against 0 and against the margin."""
    reach = t_95(df) * error
    return Comparison(
        mean=center,
        error=error,
        df=df,
        low=center - reach,
        high=center + reach,
        p=max(0.0, 1 - inside(abs(center) / error, df)),  # rounding could make it negative
        p_equivalent=max(
            above((center + margin) / error, df), above((margin - center) / error, df)
        ),
        mde=found_at(df) * error,
    )


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979): reject those below the level."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def verdict(of: Comparison, corrected: float, level: float = 0.05) -> str:
    """What is said of a claim that the mean is positive. corrected: its p after `holm`."""
    word = "holds" if of.mean > 0 else "fails"
    if corrected < level:
        return word
    if of.p_equivalent < level:
        return "equivalent"
    if of.p < level:
        return f"{word} unadjusted"
    return "undecided"


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
