"""The methods that are compared: each is a set of settings of `config.Config`, and nothing more. No torch.

A term declares the methods that it makes where its weight is declared, in `config.py`, with their sources. One protocol
for all: what a method does not name (passes, schedule, batch, views, first weights) stays as it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from factor_transfer.config import Config
from factor_transfer.util.checks import read_by, refused, weights

WEIGHTS = weights(Config)
"""The settings that switch terms on, with what they declare."""

BASELINE = "baseline"
"""The student by itself: cross-entropy with the labels."""

ALIASES = {"alone": BASELINE}
"""Other names of methods."""

MATCHED = "baseline-matched"
"""The baseline with as many passes as give it the compute of a method: of ft, of the dearest, or of the one that
follows after a colon. Its settings are the baseline's."""

METHODS: Mapping[str, Mapping[str, Any]] = {
    BASELINE: {},
    **{name: preset for weight in WEIGHTS.values() for name, preset in weight.presets.items()},
}
"""The settings that make a method, by name. Names are added up with `+`: ft+kd has the terms of both.

Deviation of at+kd: the text of Zagoruyko & Komodakis lets beta fall while training, without saying how; their program
does not.
"""


def settings_of(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings; where it says `auto` and a value was given, the given one.

    A setting that only terms of other methods read, and that is refused without them, is as if it had not been given.

    >>> settings_of("ft", {"beta": 300.0})["beta"], settings_of("at", {"beta": 300.0, "at_weight": 0.0})["at_weight"]
    (300.0, 'auto')
    >>> settings_of("ft+kd", {})["beta"], settings_of("ft+kd", {})["kd_weight"]
    ('auto', 0.9)
    """
    found = _switched(method)
    found = {name: given[name] if value == "auto" and given.get(name) else value for name, value in found.items()}
    return found | {name: None for name in refused(Config) if not acts_on(name, method)}


def acts_on(setting: str, method: str) -> bool:
    """Whether a setting changes anything in a method: no term reads it, or one that the method has.

    >>> acts_on("k", "ft"), acts_on("k", "kd"), acts_on("lr", "baseline"), acts_on("kd_weight", "ft+kd")
    (True, False, True, True)
    >>> acts_on("teacher_groups", "at"), acts_on("teacher_groups", "ft"), acts_on("term", "ft")
    (True, False, True)
    """
    settings, readers = _switched(method), read_by(Config, setting)
    # A term of the user's own (None in every method) can be added to any method, and nothing else acts through it.
    return not readers or any(name == setting if settings[name] is None else settings[name] for name in readers)


def _switched(method: str) -> dict[str, Any]:
    """The weights that make a method, and what its terms set besides."""
    found = {name: weight.off for name, weight in WEIGHTS.items()}
    for part in () if method.partition(":")[0] == MATCHED else method.split("+"):
        found |= METHODS[part]
    return found
