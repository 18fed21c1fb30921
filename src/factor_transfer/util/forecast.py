"""How long a job will still take, from what its stages cost and how far they have come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Forecast:
    """Time left of a job of several stages, at the mean speed so far.

    Args:
        costs: of each stage that is left, in any unit.
        clock: gives seconds.

    >>> ticks = iter([0.0, 30.0, 30.0, 60.0])
    >>> forecast = Forecast({"teacher": 10.0, "student": 30.0}, ticks.__next__)
    >>> forecast.at("teacher", 0.0), forecast.at("teacher", 1.0)
    (None, 90.0)
    >>> forecast.at("student", 0.0), round(forecast.at("student", 1 / 3))
    (90.0, 60)
    """

    def __init__(self, costs: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._costs, self._clock, self._begun = dict(costs), clock, clock()
        self._first: dict[str, float] = {}
        self._now: dict[str, float] = {}

    def at(self, stage: str, share: float) -> float | None:
        """Seconds that the job will still take, where `share` of a stage is done; None where nothing tells."""
        if stage not in self._costs:
            return None
        self._now[stage] = share
        self._first.setdefault(stage, share)  # what an earlier process has done took none of this one's time
        done = self._done()
        left = sum(cost * (1 - self._now.get(name, 0.0)) for name, cost in self._costs.items())
        return (self._clock() - self._begun) * left / done if done > 0 else None

    def _done(self) -> float:
        return sum(self._costs[name] * (now - self._first.get(name, now)) for name, now in self._now.items())

    def end(self, stage: str) -> None:
        """A stage is over, perhaps before its last pass: the rest of it will not be done."""
        share = self._now.get(stage, 0.0)
        if 0 < share < 1:
            self._costs[stage] *= share
            self._first[stage] /= share
            self._now[stage] = 1.0
