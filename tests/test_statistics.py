"""Intervals, corrections and verdicts, against scipy, by hand, and on tables of pure noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from factor_transfer.compare.statistics import Difference, against, gap_closed, holm, paired, spread, verdict

Figures = list[float]
tops = st.floats(1, 99).map(lambda value: round(value, 2))
tables = st.integers(2, 12).flatmap(lambda n: st.tuples(*(st.lists(tops, min_size=n, max_size=n) for _ in range(2))))


def by_seed(values: Figures) -> dict[int, float]:
    return dict(enumerate(values))


@given(tables)
def test_paired__is_scipys_paired_t_test(table: tuple[Figures, Figures]) -> None:
    ones, others = table
    assume(np.std(np.subtract(ones, others)) > 1e-3)
    found = paired(by_seed(ones), by_seed(others))
    theirs = stats.ttest_rel(ones, others)
    interval = theirs.confidence_interval(0.95)
    assert found is not None
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
    assert (found.mean, found.sd) == pytest.approx(spread([a - b for a, b in zip(ones, others, strict=True)]))


@given(tables)
def test_paired__turns_its_sign_with_the_order(table: tuple[Figures, Figures]) -> None:
    one, other = (paired(by_seed(a), by_seed(b)) for a, b in (table, table[::-1]))
    assert one is not None
    assert other is not None
    assert one.mean == pytest.approx(-other.mean, abs=1e-12)
    assert one.p == other.p
    if one.low is not None:
        assert other.high is not None
        assert one.low == pytest.approx(-other.high)


def test_paired__takes_the_seeds_that_both_have() -> None:
    found = paired({0: 1.0, 1: 2.0, 2: 4.0, 9: 99.0}, {2: 1.0, 1: 1.0, 0: 1.0, 7: -99.0})
    assert found is not None
    assert (found.n, found.mean) == (3, pytest.approx(4 / 3))
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(("ones", "n"), [([2.0], 1), ([2.0, 3.0, 4.0], 3)])
def test_paired__claims_nothing_where_there_is_no_spread(ones: Figures, n: int) -> None:
    found = paired(by_seed(ones), by_seed([value - 0.1 for value in ones]))
    assert found is not None
    assert (found.n, found.low, found.high, found.p) == (n, None, None, None)
    assert "gains" not in verdict(found, "alone", 1)
    assert ("one seed" if n == 1 else "no spread") in verdict(found, "alone", 1)


def test_holm__by_hand() -> None:
    # In order 0.005, 0.01, 0.03, 0.04: times 4, 3, 2, 1, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm__keeps_the_order_and_stays_between_one_test_and_bonferroni(values: Figures) -> None:
    corrected = holm(values)
    assert all(p <= c <= min(1.0, len(values) * p) for p, c in zip(values, corrected, strict=True))
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)
    assert min(corrected) == min(1.0, len(values) * min(values))


@given(tables, st.floats(0.1, 30))
def test_gap_closed__is_fiellers_interval(table: tuple[Figures, Figures], lead: float) -> None:
    """At both of its ends the paired t-test is at exactly 5 %; between them it is above."""
    method, alone = table
    teacher = float(np.mean(alone)) + lead
    found = gap_closed(by_seed(method), by_seed(alone), teacher)
    if np.std(alone) < 1e-3:
        return
    test = stats.ttest_1samp(teacher - np.array(alone), 0)
    assert (found is not None) == (test.pvalue < 0.05)
    if found is None:
        return
    x, y = np.subtract(method, alone), teacher - np.array(alone)
    assume(np.linalg.matrix_rank(np.cov(x, y), tol=1e-6) == 2 and test.pvalue < 0.049)
    assert found.closed == pytest.approx(x.mean() / y.mean())
    for end in (found.low, found.high):
        assert stats.ttest_1samp(x - end * y, 0).pvalue == pytest.approx(0.05, rel=1e-3)
    assert found.low <= found.closed <= found.high


def test_gap_closed__of_the_ends() -> None:
    alone = by_seed([80.0, 81.0, 82.0])
    none = gap_closed(alone, alone, 90.0)
    whole = gap_closed(dict.fromkeys(alone, 90.0), alone, 90.0)
    assert none is not None
    assert whole is not None
    assert (none.closed, none.low, none.high) == pytest.approx((0, 0, 0), abs=1e-6)
    assert (whole.closed, whole.low, whole.high) == pytest.approx((1, 1, 1), abs=1e-6)
    assert gap_closed(alone, alone, 81.5) is None, "the lead is within its interval"
    assert gap_closed({0: 85.0}, {0: 80.0}, 90.0) is None, "one seed"
    assert gap_closed(alone, alone, 70.0) is None, "the teacher is worse"


def noise(random: np.random.Generator, methods: int, n: int) -> dict[str, dict[int, float]]:
    """Top-1 where no method does anything: a seed's own luck, and each run's."""
    luck = random.normal(80, 0.5, n)
    names = ["alone", *(f"method {place}" for place in range(methods))]
    return {name: by_seed((luck + random.normal(0, 0.4, n)).round(2).tolist()) for name in names}


@pytest.mark.parametrize(("methods", "n"), [(1, 3), (1, 10), (5, 3), (5, 5), (11, 10)])
def test_verdict__of_pure_noise_claims_a_gain_in_no_more_than_five_of_a_hundred_tables(methods: int, n: int) -> None:
    random = np.random.default_rng(6)
    claimed = single = 0
    for _ in range(100):
        scores = noise(random, methods, n)
        found = against(scores, {name: scores["alone"] for name in scores if name != "alone"})
        said = [verdict(each, "alone", methods) for each in found.values()]
        claimed += any("gains" in text for text in said)
        single += any(each.low is not None and each.low > 0 for each in found.values())
    assert claimed <= 5
    if methods > 5:
        assert single > 5, "uncorrected intervals would have claimed more"


def test_verdict__of_a_true_gain_is_a_gain() -> None:
    random = np.random.default_rng(7)
    found = 0
    for _ in range(100):
        scores = noise(random, 5, 5)
        scores["method 0"] = {seed: value + 3 for seed, value in scores["method 0"].items()}
        differences = against(scores, {name: scores["alone"] for name in scores if name != "alone"})
        found += verdict(differences["method 0"], "alone", 5).startswith("gains")
    assert found >= 95


@given(st.floats(-5, 5), st.floats(0.01, 5), st.floats(0, 1), st.integers(1, 9))
def test_verdict__never_claims_more_than_the_interval(mean: float, half: float, p: float, tests: int) -> None:
    found = Difference(5, mean, 1.0, mean - half, mean + half, p, min(1.0, tests * p))
    assert found.low is not None
    assert found.high is not None
    assume((found.low > 0 or found.high < 0) == (found.p is not None and found.p < 0.05))
    said = verdict(found, "kd", 3)
    if "gains" in said:
        assert found.low > 0
    if "loses" in said:
        assert found.high < 0
    if found.low <= 0 <= found.high:
        assert said.startswith("no difference")
    assert not math.isnan(found.mean)
