"""The groups of settings in `--help`, and the limits of numbers that several settings have. No torch."""

from typing import Any

from cyclopts import Group, Parameter
from cyclopts.validators import Number

_ORDER = (
    "Data", "Teacher", "Student", "Factor transfer", "Other terms", "Training", "Training recipe", "Machine", "Run",
)  # fmt: skip
GROUPS = {name: Group(name, sort_key=place) for place, name in enumerate(_ORDER)}

POSITIVE, NOT_NEGATIVE = Number(gt=0), Number(gte=0)
BELOW_1, PROBABILITY = Number(gt=0, lt=1), Number(gte=0, lte=1)
MOST_THREADS = 1024


def within(group: str, **how: Any) -> Parameter:
    """Metadata of a setting: the group of `--help` that it is listed in."""
    return Parameter(group=GROUPS[group], negative_iterable=(), negative_none=(), **how)
