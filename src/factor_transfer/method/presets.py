"""The methods that are compared: each is a set of settings of `config.Config`, and nothing more.

One protocol for all: what is not named here (passes, schedule, batch, views, first weights) stays as it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALONE: dict[str, object] = {
    "label_weight": 1.0, "beta": 0.0, "kd_weight": 0.0, "at_weight": 0.0, "hint_epochs": 0, "hint_weight": 0.0,
    "term": None,
}  # fmt: skip
"""Cross-entropy with the labels: the student by itself."""

_SOFT: dict[str, object] = {"label_weight": 0.1, "kd_weight": 0.9, "kd_temperature": 4.0}
"""Knowledge distillation: Hinton, Vinyals, Dean, arXiv 1503.02531, section 2: (1 - a) x cross-entropy + a x T^2 x KL at
temperature T. T = 4 and a = 0.9 are the field's usual values: those of the attention transfer program (`--alpha 0.9
--temperature 4`) and of RepDistiller (`-r 0.1 -a 0.9`, Tian, Krishnan, Isola, ICLR 2020)."""

UNGUIDED: dict[str, object] = {"teacher_groups": None, "student_groups": None}
"""For a method without a term that reads groups."""

METHODS: Mapping[str, Mapping[str, object]] = {
    "alone": {**_ALONE, **UNGUIDED},
    "kd": {**_ALONE, **UNGUIDED, **_SOFT},
    # Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2; beta 1000 as in their program.
    "at": {**_ALONE, "at_weight": "auto"},
    # Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, algorithm 1: stage 1 by the hint (equation 3),
    # stage 2 by KD (equation 2). Deviation: the KD of this table, so that `fitnet` less `kd` is what the hint brings
    # (theirs has temperature 3 and a weight that falls from 4 to 1). An eighth of the passes: RepDistiller's 30 of 240.
    "fitnet": {**_ALONE, **_SOFT, "hint_epochs": "auto"},
    # Kim, Park, Kwak, NeurIPS 2018, equations 2 to 4.
    "ft": {**_ALONE, **UNGUIDED, "beta": "auto"},
    "ft+kd": {**_ALONE, **UNGUIDED, **_SOFT, "beta": "auto"},
    # Both of Zagoruyko & Komodakis' terms with their weights. Deviation: their text lets beta fall while training,
    # without saying how; their program does not.
    "at+kd": {**_ALONE, **_SOFT, "at_weight": "auto"},
}
"""Settings by method, with their sources."""


def settings_of(method: str, given: Mapping[str, Any]) -> dict[str, object]:
    """A method's settings; where it says `auto` and a value was given, the given one.

    >>> settings_of("ft", {"beta": 300.0})["beta"], settings_of("at", {"beta": 300.0, "at_weight": 0.0})["at_weight"]
    (300.0, 'auto')
    """
    return {
        name: given[name] if value == "auto" and given.get(name) else value for name, value in METHODS[method].items()
    }


ALONE = "labels alone"
"""What `method_of` calls no method at all."""


def method_of(settings: Mapping[str, Any]) -> str:
    """What a run's settings are called, for people; runs of early versions have fewer settings.

    >>> method_of({"beta": "auto", "kd_weight": 0.9})
    'Factor Transfer + knowledge distillation'
    >>> method_of({"beta": 0.0})
    'labels alone'
    """
    parts = {
        "Factor Transfer": settings.get("beta", "auto") != 0,
        "attention transfer": settings.get("at_weight", 0) != 0,
        "hints": bool(settings.get("hint_epochs") or settings.get("hint_weight")),
        "knowledge distillation": settings.get("kd_weight", 0) != 0,
    }
    if settings.get("term"):
        parts[str(settings["term"])] = True
    return " + ".join(name for name, there in parts.items() if there) or ALONE
