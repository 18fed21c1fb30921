"""Which runs a comparison is made of: methods, swept settings and seeds under one protocol. No torch.

A *variant* is a method, or a method with one swept setting; each is run with the same seeds, and run i of every variant
comes before run i + 1 of any, so that a comparison that ends early is balanced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Group, Parameter
from cyclopts.validators import Number

from factor_transfer.config import FIELDS, Config, plain
from factor_transfer.method.presets import METHODS, UNGUIDED, settings_of
from factor_transfer.util.checks import flag, free
from factor_transfer.util.errors import ConfigError, near

_COMPARISON = Parameter(group=Group("Comparison", sort_key=-1), negative_iterable=())

TERM_OF = {
    **dict.fromkeys(("k", "p", "reconstruction", "factor_batch_norm", "translator"), "beta"),
    **dict.fromkeys(("paraphraser", "paraphraser_epochs", "paraphraser_lr", "teacher_layer", "student_layer"), "beta"),
    "kd_temperature": "kd_weight",
}
"""The weight without which a setting does nothing; a weight is its own."""

REFERENCES = ("alone", "kd")
"""Methods that the others are compared with."""

NOT_SWEPT = free(Config) | {"seed", "baseline", "validate_on", "device"}
"""Settings of the protocol, or that change no result."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """All of `factor-transfer compare`."""

    methods: Annotated[str, _COMPARISON] = "alone,kd,at,fitnet,ft,ft+kd"
    """What is compared, with commas: alone, kd, at, fitnet, ft, ft+kd, at+kd."""
    seeds: Annotated[int, _COMPARISON, Number(gte=1)] = 5
    """Runs of each: --seed, --seed + 1, ..."""
    jobs: Annotated[int, _COMPARISON, Number(gte=1)] = 1
    """Runs at once, each with --threads."""
    sweep: Annotated[tuple[str, ...], _COMPARISON] = ()
    """A setting and its values, k=0.5,0.75,1,2: every method on which it acts is run with each. Several sweeps vary one
    setting each, the others as given."""
    sweep_on: Annotated[Literal["train-holdout", "validation"], _COMPARISON] = "train-holdout"
    """Images that a sweep is scored on. train-holdout: a share of the training images (--validation-share), for what
    will choose a setting."""

    def __post_init__(self) -> None:
        """Check what is a comparison's own; the rest is `Config`'s."""
        super().__post_init__()
        if self.jobs > 1 and self.threads is None:
            raise ConfigError(
                f"--jobs {self.jobs}",
                found="no --threads: each run would take every core",
                hint="give --threads 1, or as many as a run shall have",
            )
        if self.baseline:
            raise ConfigError("--baseline", found="a second run of the student alone", hint="name alone in --methods")

    def _check_groups(self) -> None:
        """Each method has terms of its own: `planned` knows them."""


@dataclass(frozen=True)
class Variant:
    """A method, or a method with one setting changed."""

    name: str
    method: str
    swept: dict[str, Any]
    """The changed setting, or nothing."""


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run: a variant with one seed."""

    name: str
    variant: str
    seed: int
    config: Config
    """As if it stood alone: with the teacher and the paraphraser yet to be trained, where they are."""


@dataclass(frozen=True)
class Plan:
    """The whole comparison."""

    config: CompareConfig
    variants: tuple[Variant, ...]
    runs: tuple[PlannedRun, ...]
    folder: Path

    def reference(self, variant: Variant, method: str) -> str | None:
        """The variant of `method` that `variant` is compared with: the one with the same swept setting, or without."""
        if variant.method == method:
            return None
        named = {(each.method, str(each.swept)): each.name for each in self.variants}
        return named.get((method, str(variant.swept))) or named.get((method, "{}"))


def planned(config: CompareConfig) -> Plan:
    """Every run of a comparison, in order.

    Raises:
        ConfigError: an unknown method, a setting that cannot be swept, or values that do not fit each other.
    """
    base: dict[str, Any] = {name: getattr(config, name) for name in FIELDS}
    if config.sweep:
        base["validate_on"] = config.sweep_on
    folder = Path(config.out or default_folder(config))
    variants = _variants(_methods(config.methods), _sweeps(config.sweep))
    settings = {each.name: base | settings_of(each.method, base) | each.swept for each in variants}
    _check_given(config, settings)
    variants = tuple(each for each in variants if _first(each.name, settings))
    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        for each in variants:
            name = re.sub(r"[^\w.+=-]+", "-", each.name) + f"-s{seed}"
            own = settings[each.name] | {"seed": seed, "out": str(folder / name), "overwrite": False}
            runs.append(PlannedRun(name, each.name, seed, Config(**own)))
    return Plan(config, variants, tuple(runs), folder)


def _check_given(config: CompareConfig, settings: dict[str, dict[str, Any]]) -> None:
    """A setting that was given, and that every method sets otherwise, would do nothing.

    Raises:
        ConfigError: there is one.
    """
    usual = {each.name: each.default for each in fields(Config)}
    for name in sorted({name for method in METHODS.values() for name in method}):
        if any(method.get(name) == "auto" for method in METHODS.values()):
            continue
        value = getattr(config, name)
        if value != usual[name] and all(each[name] != value for each in settings.values()):
            if name in UNGUIDED:
                found, hint = f"no term that reads groups: {', '.join(settings)}", "leave it out, or add at or fitnet"
            else:
                own = ", ".join(f"{variant} {each[name]}" for variant, each in settings.items())
                found, hint = f"methods that set it themselves: {own}", f"leave it out, or give --sweep {name}={value}"
            raise ConfigError(f"{flag(name)} {value}", found=found, hint=hint)


def default_folder(config: Config) -> str:
    """`runs/compare-DATA-TEACHER-STUDENT`, of characters that are safe in a path."""
    parts = (Path(config.data).name or config.data, config.teacher, config.student)
    return "runs/compare-" + "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)


def acts_on(setting: str, method: str) -> bool:
    """Whether a setting changes anything in a method.

    >>> acts_on("k", "ft"), acts_on("k", "kd"), acts_on("lr", "alone"), acts_on("kd_weight", "ft+kd")
    (True, False, True, True)
    >>> acts_on("teacher_groups", "at"), acts_on("teacher_groups", "ft")
    (True, False)
    """
    if setting in UNGUIDED:
        return setting not in METHODS[method]
    term = TERM_OF.get(setting, setting)
    return METHODS[method].get(term, 1) != 0


def _methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            valid = near(name, METHODS) or list(METHODS)
            raise ConfigError(f"--methods {text}", found=f"no method {name}", valid=valid)
    if not names:
        raise ConfigError("--methods", found="no method", valid=list(METHODS))
    return list(dict.fromkeys(names))


def _sweeps(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`["k=0.5,1"]` -> `{"k": [0.5, 1]}`."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if name not in FIELDS or name in NOT_SWEPT:
            there = [each for each in FIELDS if each not in NOT_SWEPT]
            what = "a setting that all runs share" if name in FIELDS else "no such setting"
            raise ConfigError(f"--sweep {text}", found=f"{name}: {what}", valid=near(name, there) or there)
        parts = _parts(values)
        if not (equals and parts):
            raise ConfigError(f"--sweep {text}", found="no values", valid=f"--sweep {name}=VALUE,VALUE")
        found[name] = found.get(name, []) + [_value(part, f"--sweep {text}") for part in parts]
    return found


def _parts(values: str) -> list[str]:
    """Split at commas, but for those in brackets.

    >>> _parts("0.5,{layers: [1, 1]},2")
    ['0.5', '{layers: [1, 1]}', '2']
    """
    found, depth = [""], 0
    for char in values:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            found.append("")
        else:
            found[-1] += char
    return [part.strip() for part in found if part.strip()]


def _value(text: str, given: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(given, found=f"{text}: {error}") from error
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)  # 1e-3 is no number to YAML
    return tuple(value) if isinstance(value, list) else value


def _variants(methods: Sequence[str], sweeps: dict[str, list[Any]]) -> tuple[Variant, ...]:
    """Each method with each value of each sweep that acts on it; or as it is, where none does or others refer to it."""
    for name in sweeps:
        if not any(acts_on(name, method) for method in methods):
            able = [method for method in METHODS if acts_on(name, method)]
            raise ConfigError(
                f"--sweep {name}",
                found=f"it acts on none of {', '.join(methods)}",
                valid=able,
                hint="name one of these",
            )
    found = []
    for method in methods:
        swept = [
            Variant(f"{method} {name}={value}", method, {name: value})
            for name, values in sweeps.items()
            if acts_on(name, method)
            for value in values
        ]
        refers = method in REFERENCES and not all(acts_on(name, method) for name in sweeps)
        found += [*([Variant(method, method, {})] if refers or not swept else []), *swept]
    return tuple(found)


def _first(name: str, settings: dict[str, dict[str, Any]]) -> bool:
    """Whether no variant before has the same settings: one value can be given by two sweeps."""
    own = plain(settings[name])
    return next(other for other, values in settings.items() if plain(values) == own) == name
