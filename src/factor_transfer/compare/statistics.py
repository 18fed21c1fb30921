"""Scores in, the higher the better; verdicts out: paired differences, Holm's correction, the share of a gap closed.

Runs are paired by seed: both of a pair have the same first weights, order and views. Differences are taken to be
normal, as Student's t wants; intervals are of 95 % and say how far a mean over seeds may be off, no more: teacher,
images and split are one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Of every interval; a difference is claimed where its corrected p is below 1 - LEVEL."""

SAME = 1e-9
"""A smaller spread than this is rounding: differences that are all alike."""

Scores = Mapping[int, float]
"""A figure for each seed."""


@dataclass(frozen=True)
class Difference:
    """A paired difference; `low`, `high` and `p` are None where it has no spread to judge by (see `n` and `sd`)."""

    n: int
    mean: float
    sd: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    """Of the two-sided paired t-test."""
    p_holm: float | None = None
    """Corrected for all methods that were tested against the same one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Gap:
    """The share of the teacher's lead over the baseline that a method closes."""

    closed: float
    low: float
    high: float


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1); None for one value.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0])
    ((2.0, 1.0), (1.0, None))
    """
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(ones: Scores, others: Scores) -> Difference | None:
    """`ones` less `others`, over the seeds that both have; None where there are none.

    >>> found = paired({0: 3.0, 1: 5.0, 2: 7.0}, {0: 2.0, 1: 3.0, 2: 4.0})
    >>> found.mean, round(found.low, 3), round(found.high, 3), round(found.p, 4)
    (2.0, -0.484, 4.484, 0.0742)
    """
    seeds = sorted(ones.keys() & others.keys())
    if not seeds:
        return None
    x, y = [ones[seed] for seed in seeds], [others[seed] for seed in seeds]
    mean, sd = spread(np.subtract(x, y).tolist())
    found = Difference(len(seeds), mean, sd)
    if sd is None or sd < SAME:
        return found
    test = stats.ttest_rel(x, y)
    interval = test.confidence_interval(LEVEL)
    return replace(found, low=float(interval.low), high=float(interval.high), p=float(test.pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that the chance of any false claim stays 5 % (Holm 1979).

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, place in enumerate(np.argsort(values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


def against(scores: Mapping[str, Scores], reference: Mapping[str, Scores]) -> dict[str, Difference]:
    """Every method's paired difference to its reference, p-values corrected over all of them.

    Args:
        scores: of each method, by name.
        reference: what each is compared with; methods that it does not name are left out.
    """
    found = {name: paired(scores[name], other) for name, other in reference.items()}
    there = {name: difference for name, difference in found.items() if difference is not None}
    tested = [name for name, difference in there.items() if difference.p is not None]
    corrected = dict(zip(tested, holm([there[name].p or 0.0 for name in tested]), strict=True))
    return {name: replace(difference, p_holm=corrected.get(name)) for name, difference in there.items()}


def gap_closed(method: Scores, baseline: Scores, teacher: float) -> Gap | None:
    """(method - baseline) / (teacher - baseline), of means over the seeds that both have.

    The interval is Fieller's for a ratio of paired means: all shares s for which
    method - baseline - s (teacher - baseline) does not differ from 0 by the paired t-test. It is finite exactly where
    the lead differs from 0, and the share is given nowhere else.

    Returns:
        None where the interval of the teacher's lead is not above 0, or there is none (one seed, no spread).

    >>> found = gap_closed({0: 85.0, 1: 86.0, 2: 85.0}, {0: 81.0, 1: 81.5, 2: 81.4}, 90.0)
    >>> round(found.closed, 3), round(found.low, 3), round(found.high, 3)
    (0.464, 0.327, 0.611)
    """
    seeds = sorted(method.keys() & baseline.keys())
    lead = paired(dict.fromkeys(seeds, teacher), baseline)
    if lead is None or lead.low is None or lead.low <= 0:
        return None
    x = np.array([method[seed] - baseline[seed] for seed in seeds])
    y = np.array([teacher - baseline[seed] for seed in seeds])
    errors = stats.t.ppf((1 + LEVEL) / 2, len(seeds) - 1)  # how many standard errors an interval reaches
    (xx, xy), (_, yy) = np.cov(x, y) * errors**2 / len(seeds)
    a, b, c = y.mean() ** 2 - yy, x.mean() * y.mean() - xy, x.mean() ** 2 - xx  # a > 0, since the lead's interval is
    half = math.sqrt(max(b * b - a * c, 0.0))
    return Gap(float(x.mean() / y.mean()), float((b - half) / a), float((b + half) / a))


def verdict(found: Difference, other: str, tested: int, unit: str = "points", digits: int = 2) -> str:
    """What a difference says in words, and no more than its interval does.

    Args:
        found: the difference, corrected.
        other: what it is to, as a name.
        tested: how many methods were tested against it.
        unit: of the difference.
        digits: after the decimal point.

    >>> verdict(Difference(5, 1.0, 0.3, 0.6, 1.4, 0.002, 0.004), "baseline", 2)
    'gains 0.60 to 1.40 points over baseline'
    >>> verdict(Difference(5, 0.1, 0.3, -0.3, 0.5, 0.5, 1.0), "baseline", 2)
    'no difference to baseline is shown: it may be -0.30 to +0.50 points'
    """
    if found.n == 1:
        return f"one seed ({found.mean:+.{digits}f} {unit} to {other}): no interval, and nothing is shown"
    if found.low is None or found.high is None:
        return f"{found.mean:+.{digits}f} {unit} to {other} in each of {found.n} seeds: no spread to judge by"
    if found.p_holm is not None and found.p_holm < 1 - LEVEL:
        if found.mean > 0:
            return f"gains {found.low:.{digits}f} to {found.high:.{digits}f} {unit} over {other}"
        return f"loses {-found.high:.{digits}f} to {-found.low:.{digits}f} {unit} to {other}"
    span = f"{found.low:+.{digits}f} to {found.high:+.{digits}f} {unit}"
    if found.low > 0 or found.high < 0:
        return f"no difference to {other} is shown: by itself it is {span}, but one of {tested} may be so by chance"
    return f"no difference to {other} is shown: it may be {span}"
