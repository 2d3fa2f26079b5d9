"""The placement study computed again from its cells, with other code.

Nothing of the study is used to compute: the cells are read as JSON, Student's t and its power are
integrals here, and answers are counted by the tokenizers package.
"""

import base64
import json
import re
from itertools import pairwise
from math import lgamma, log, pi, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from conftest import ROOT, slow
from placement_cells import simulate
from test_figures import comparison

from paper.studies import placement, placement_runs

COLD, NONE, RANDOM, ALL, ANSWERS = "cold", "none", "random", "all", "answers"
ROWS = [  # regime, one base or many, problems, arm
    ("A", "one base", "plain", COLD),
    ("A", "one base", "plain", NONE),
    ("A", "one base", "reworded", RANDOM),
    ("A", "bases", "plain", COLD),
    ("A", "bases", "plain", ANSWERS),
    ("P", "one base", "plain", COLD),
    ("P", "one base", "plain", RANDOM),
    ("P", "bases", "plain", ALL),
    ("P", "bases", "reworded", RANDOM),
    ("O", "one base", "plain", ALL),
]
CORRECTED = {
    "A": (COLD, RANDOM, NONE, ALL),
    "P": (COLD, RANDOM, ALL),
    "O": (COLD, RANDOM, NONE, ALL),
}
PROBLEMS = {"plain": slice(0, 2000), "reworded": slice(2000, 2500)}
MARGIN = log(1.1)
PAPER = 0.2949, 0.2588  # Table 2's HELLoRA and Table 4's HELLoRA_C on GSM8K


# ---- Student's t as integrals --------------------------------------------------------------------

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


def tail(t, df):
    """P(T > t): with T = sqrt(df) tan(x), the integral of cos(x)^(df - 1) up to pi / 2."""
    low, high = np.arctan(t / sqrt(df)), pi / 2
    x = (high - low) / 2 * NODES + (high + low) / 2
    area = (high - low) / 2 * (WEIGHTS * np.cos(x) ** (df - 1)).sum()
    return area * np.exp(lgamma((df + 1) / 2) - lgamma(df / 2)) / sqrt(pi)


def quantile(above, df):
    """The t that T exceeds in this share of cases."""
    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, df) > above else (low, middle)
    return low


def power(shift, df):
    """The chance that |T| is beyond its 95 % quantile, if the mean is `shift` standard errors."""
    t, normal = quantile(0.025, df), NormalDist()
    s = 3 * (NODES + 1)  # sqrt(chi^2 / df), up to 6
    log_density = log(2) + df / 2 * log(df / 2) - lgamma(df / 2) + (df - 1) * np.log(s)
    beyond = [normal.cdf(shift - t * x) + normal.cdf(-shift - t * x) for x in s]
    return 3 * (WEIGHTS * np.exp(log_density - df * s**2 / 2) * beyond).sum()


# ---- what the cells say --------------------------------------------------------------------------


def read_cells(folder):
    """{(regime, model, arm, seed): (losses [2500], exact [2500])}, and all dev scores by regime."""
    tests, dev = {}, {}
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text())
        if "placement-test" in cell["problems"]:
            items = cell["items"]["placement-test"]
            losses = np.frombuffer(base64.b64decode(items["loss"]), "<f2").astype(float)
            bits = np.frombuffer(base64.b64decode(items["exact"]), np.uint8)
            key = cell["regime"], cell["model"], cell["arm"], cell["seed"]
            tests[key] = losses, np.unpackbits(bits)[:2500]
        if "placement-dev" in cell["problems"]:
            scores = cell["exact"]["placement-dev"], cell["loss"]["placement-dev"]
            dev.setdefault(cell["regime"], []).append(scores)
    return tests, dev


def pairs(tests, regime, bases, arm):
    """[(model, losses of the other arm, losses of hot)] of runs that share base and seed."""
    return [
        (model, losses, tests[regime, model, "hot", seed][0])
        for (of, model, name, seed), (losses, _) in tests.items()
        if (of, name) == (regime, arm)
        and (regime, model, "hot", seed) in tests
        and (bases == "bases" or model == "tiny")
    ]


def samples(found, bases, part):
    """The numbers that the t-test is over."""
    ratios = [(model, log(other[part].sum()) - log(hot[part].sum())) for model, other, hot in found]
    if bases == "one base":
        return np.array([ratio for _, ratio in ratios])
    models = {model for model, _ in ratios}
    return np.array([np.mean([r for of, r in ratios if of == model]) for model in models])


def p_of(values):
    """Two-sided, of a mean of 0."""
    if len(values) < 2:
        return 1.0
    error = values.std(ddof=1) / sqrt(len(values))
    return 2 * tail(abs(values.mean()) / error, len(values) - 1)


def corrected(tests, regime, bases, problems, arm):
    """p of an arm, by Holm's rule where it is a primary one on plain problems."""
    ps = {
        name: p_of(samples(pairs(tests, regime, bases, name), bases, PROBLEMS[problems]))
        for name in {*CORRECTED[regime], arm}
    }
    if problems != "plain" or arm not in CORRECTED[regime]:
        return ps[arm]
    first = [ps[name] for name in CORRECTED[regime]]
    # each step down multiplies by the number of hypotheses that are not yet rejected
    steps = [p * sum(other >= p for other in first) for p in first if p <= ps[arm]]
    return min(1.0, max(steps))


def drawn_again(found, bases, part, draws=1000):
    """Means of the log ratio with runs (or bases) and problems drawn with replacement."""
    draw, means = np.random.default_rng(7), []
    groups = [[i] for i in range(len(found))]
    if bases == "bases":
        names = sorted({model for model, *_ in found})
        groups = [[i for i, (model, *_) in enumerate(found) if model == name] for name in names]
    other, hot = (np.array([of[i][part] for of in found]) for i in (1, 2))
    n = other.shape[1]
    for _ in range(draws):
        times = np.bincount(draw.integers(n, size=n), minlength=n).astype(float)
        ratios = np.log(other @ times) - np.log(hot @ times)
        taken = draw.integers(len(groups), size=len(groups))
        means.append(np.mean([ratios[groups[i]].mean() for i in taken]))
    return np.array(means)


def answer_tokens():
    """Tokens of the answer of each plain problem, and one for the end."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(ROOT / "tiny" / "tokenizer.json"))
    rows = placement_runs.problems("placement-test").splitlines()[:2000]
    answers = [re.sub("<<.*?>>", "", json.loads(row)["answer"]) for row in rows]
    return sum(len(tokenizer.encode(f" {answer}").ids) + 1 for answer in answers)


def papers_effect(tests, dev, regime):
    """The paper's hot - cold, in logits and as a log ratio of losses; None with too few runs."""
    size, points = answer_tokens(), list(dev.get(regime, []))
    for (of, model, _, _), (losses, exact) in tests.items():
        if (of, model) == (regime, "tiny"):
            points.append((exact[:2000].mean(), losses[:2000].sum() / size))
    points = np.array([(share, loss) for share, loss in points if 0 < share < 1])
    if len(points) < 3:
        return None
    hot, cold = (log(share) - log(1 - share) for share in PAPER)
    x = np.log(points[:, 0]) - np.log(1 - points[:, 0])
    slope, _ = np.polyfit(x, np.log(points[:, 1]), 1)
    return hot - cold, -slope * (hot - cold)


# ---- the comparison ------------------------------------------------------------------------------


def check_row(row, tests):
    """Everything that placement.py says of a comparison, computed again."""
    regime, bases, problems, arm = (row[x] for x in ("regime", "bases", "problems", "arm"))
    found, part = pairs(tests, regime, bases, arm), PROBLEMS[problems]
    values = samples(found, bases, part)
    n, mean = len(values), values.mean()
    error, df = values.std(ddof=1) / sqrt(n), n - 1
    reach = quantile(0.025, df) * error
    equal = {"rel": 1e-6, "abs": 1e-9}  # what sums in another order and bisections leave
    assert (row["runs"], row["df"]) == (len(found), df)
    assert row["mean"] == pytest.approx(mean, **equal)
    assert row["error"] == pytest.approx(error, **equal)
    assert (row["low"], row["high"]) == pytest.approx((mean - reach, mean + reach), **equal)
    assert row["p"] == pytest.approx(p_of(values), **equal)
    two_sides = tail((mean + MARGIN) / error, df), tail((MARGIN - mean) / error, df)
    assert row["p_equivalent"] == pytest.approx(max(two_sides), **equal)
    p = corrected(tests, regime, bases, problems, arm)
    assert row["p_corrected"] == pytest.approx(p, **equal)
    assert power(row["mde"] / error, df) == pytest.approx(0.8, abs=1e-3)  # two integrals
    better = "holds" if mean > 0 else "fails"
    if p < 0.05:
        primary = problems == "plain" and arm in CORRECTED[regime]
        said = better if primary else f"{better} unadjusted"
    elif max(two_sides) < 0.05:
        said = "equivalent"
    else:
        said = f"{better} unadjusted" if p_of(values) < 0.05 else "undecided"
    assert row["verdict"] == said
    means = drawn_again(found, bases, part)
    # a 2.5 % quantile of n draws has an error of .025 ** .5 / .058 / n ** .5 deviations: .085 with
    # 1,000 draws, .027 with the study's 10,000; four of both together
    close = 4 * (0.085**2 + 0.027**2) ** 0.5 * means.std()
    assert row["bootstrap"] == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=close)
    check_mark(row, means, close)


def check_mark(row, means, close):
    """Whether the bootstrap says otherwise than the verdict, unless that is a matter of chance."""
    if row["verdict"] == "equivalent":
        edges = [MARGIN - abs(x) for x in np.quantile(means, (0.05, 0.95))]
        otherwise = min(edges) < 0
    else:
        edges = [*np.quantile(means, (0.025, 0.975))]
        otherwise = (edges[0] <= 0 <= edges[1]) != (row["verdict"] == "undecided")
    if min(map(abs, edges)) > close:
        assert row["bootstrap_disagrees"] == otherwise


def check_effect(found, tests, dev):
    """The paper's effect on this scale."""
    for regime in "APO":
        again, effect = papers_effect(tests, dev, regime), found["effect"][regime]
        assert (effect is None) == (again is None)
        if effect:
            values = effect["logits"], effect["log_ratio"]
            assert values == pytest.approx(again, rel=1e-6)


def rows_of(found):
    """{(regime, bases, problems, arm): a row}."""
    return {tuple(r[x] for x in ("regime", "bases", "problems", "arm")): r for r in found["rows"]}


@pytest.fixture
def forget():
    """The study keeps what it has read: other cells must be read anew."""
    yield
    placement.finished.cache_clear()
    placement.losses.cache_clear()


@pytest.fixture(scope="module")
def real():
    """What the study says of the cells that are committed, and these cells."""
    placement.finished.cache_clear()
    placement.losses.cache_clear()
    return placement.results(), read_cells(placement_runs.RESULTS)


def test_the_integrals_are_those_of_printed_tables():
    assert [quantile(0.025, df) for df in (2, 9, 30)] == pytest.approx(
        [4.303, 2.262, 2.042], abs=5e-4
    )
    assert power(0.0, 9) == pytest.approx(0.05)
    # Cohen's table 2.3: d = .50, two samples of 64 each, 5 % two-sided: 80 %
    assert power(0.5 * sqrt(64 / 2), 126) == pytest.approx(0.80, abs=0.005)


@pytest.mark.parametrize("key", ROWS, ids="-".join)
def test_a_committed_comparison_is_what_its_cells_give(key, real):
    found, (tests, _) = real
    rows = rows_of(found)
    if key not in rows:
        assert len(samples(pairs(tests, key[0], key[1], key[3]), key[1], slice(0, 2500))) < 2
        pytest.skip("fewer than two seeds, or bases, of it are finished")
    check_row(rows[key], tests)


def test_the_papers_effect_is_what_the_committed_cells_give(real):
    found, (tests, dev) = real
    check_effect(found, tests, dev)


def few_seeds_of_three_bases(run):
    embedded = run.model == placement_runs.MODEL and run.seed < 4
    return embedded or run.model in placement_runs.OTHER_BASES[:2]


def some_are_missing(run):
    """As while runs are under way: seeds that only some arms have, an arm without any."""
    few = run.seed < (6 if run.arm in ("hot", COLD) else 3)
    return run.model == "tiny" and few and not (run.regime == "A" and run.arm == RANDOM)


@pytest.mark.parametrize(
    ("keep", "n_rows"), [slow((few_seeds_of_three_bases, 10)), (some_are_missing, 5)]
)
def test_simulated_cells_give_the_same_with_both(keep, n_rows, tmp_path, monkeypatch, forget):
    runs = simulate(tmp_path, monkeypatch, keep)
    found, (tests, dev) = placement.results(), read_cells(tmp_path)
    rows = rows_of(found)
    tuned = placement_runs.TUNING_SEEDS
    assert len(tests) == len([run for run in runs if run.seed not in tuned])
    keys = [key for key in ROWS if key in rows]
    assert len(keys) == n_rows
    for key in keys:
        check_row(rows[key], tests)
    check_effect(found, tests, dev)
    assert all(found["effect"].values())
    drawn = comparison("A", COLD, 0.0, 0.1)  # what the figure's tests take for a row
    assert all(drawn.keys() <= row.keys() for row in found["rows"])


def test_the_sides_of_the_papers_effect_are_told_apart():
    row = {"arm": "cold", "problems": "plain", "low": -0.1, "high": 0.1}
    effect = {"log_ratio": 0.05}
    assert placement.beside(row, effect) == "around"
    assert placement.beside(row, {"log_ratio": 0.2}) == "below"
    assert placement.beside(row, {"log_ratio": -0.2}) == "above"
    assert placement.beside(row, None) is None
    assert placement.beside(row | {"problems": "reworded"}, effect) is None
    assert placement.beside(row | {"arm": "random"}, effect) is None  # it is hot - cold
    words = [
        placement.says(
            {"verdict": v, "p_equivalent": p, "mde": 0.1, "papers_effect": e}
            | {"bootstrap_disagrees": e == "around"}
        )
        for v, p, e in (("holds", 0.01, "below"), ("undecided", 0.9, "around"))
    ]
    assert words[0] == "holds, less than 10 %, below the paper's effect"
    assert "paper" not in words[1]
    assert "0.100" in words[1]
    assert [word.endswith("(bootstrap disagrees)") for word in words] == [False, True]


def test_more_degrees_of_freedom_find_smaller_effects():
    found = [placement.compare([0.0, *[0.1] * n], MARGIN) for n in (1, 2, 4, 9)]
    shifts = [of.mde / of.error for of in found]
    assert all(a > b for a, b in pairwise(shifts))
    assert [power(s, of.df) for s, of in zip(shifts, found, strict=True)] == pytest.approx(
        [0.8] * 4, abs=1e-3
    )
