"""Which runs a comparison is made of: methods, swept settings and seeds under one protocol. No torch.

A *variant* is a method, or a method with one swept setting; each is run with the same seeds, and run i of every variant
comes before run i + 1 of any, so that a comparison that ends early is balanced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import Group, Parameter
from cyclopts.validators import Number

from factor_transfer.config import FIELDS, Config, plain
from factor_transfer.method.presets import ALIASES, BASELINE, MATCHED, METHODS, acts_on, settings_of
from factor_transfer.util.arguments import names_in
from factor_transfer.util.checks import flag, swept
from factor_transfer.util.errors import ConfigError, near

_COMPARISON = Parameter(group=Group("Comparison", sort_key=-1), negative_iterable=())

REFERENCES = {"alone": BASELINE, "kd": "kd"}
"""Methods that the others are compared with, by their names in the keys of compare.json."""

USUAL = "ft"
"""The method that a baseline is matched to where it is among the methods, and no other is named."""

SWEPT = swept(Config)
"""Settings that a comparison may vary: those that change a result, and are not the protocol's own."""


FORM_DEPENDS = frozenset({"k", "paraphraser", "translator"})
"""Settings that --factor-form auto heeds: a sweep of one takes the paper's form, if none is given."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """All of `factor-transfer compare`."""

    methods: Annotated[str, _COMPARISON] = "baseline,kd,at,fitnet,ft,ft+kd"
    """What is compared, with commas: baseline (the student without a teacher), kd, at, fitnet, ft, and their sums, such
    as ft+kd and at+kd. baseline-matched is the student alone with as many passes as cost what ft costs, or the dearest
    method; baseline-matched:kd, what kd costs."""
    seeds: Annotated[int, _COMPARISON, Number(gte=1)] = 5
    """Runs of each: --seed, --seed + 1, ..."""
    jobs: Annotated[int, _COMPARISON, Number(gte=1)] = 1
    """Runs at once, each with --threads."""
    sweep: Annotated[tuple[str, ...], _COMPARISON] = ()
    """A setting and its values, k=0.5,0.75,1,2: every method on which it acts is run with each. Several sweeps vary one
    setting each, the others as given."""
    tune: Annotated[int, _COMPARISON, Number(gte=0)] = 0
    """Trials of each method, on a share of the training images: other learning rates and weights of its own term (of
    the baseline: weight decay). The best of each is compared, on other seeds. 0: every method as it is given."""
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
            raise ConfigError("--baseline", found="a second run of the baseline", hint="name baseline in --methods")
        if self.tune:
            self._check_tuning()

    def _check_tuning(self) -> None:
        """Trials choose something, by images that are not reported on, and with one teacher."""
        if self.tune == 1:
            raise ConfigError("--tune 1", found="one trial, among which nothing can be chosen", valid="2 or more")
        if self.sweep:
            raise ConfigError(
                f"--tune {self.tune} with --sweep {self.sweep[0]}",
                found="two ways to vary settings",
                valid="one of them: --tune compares what it chooses, --sweep shows every value",
            )
        if self.validate_on != "validation":
            found = "the images that the trials are scored on, so that they would be reported on as well"
            raise ConfigError(f"--tune {self.tune} with --validate-on {self.validate_on}", found=found)
        if self.teacher_epochs:
            raise ConfigError(
                f"--tune {self.tune} with --teacher-epochs {self.teacher_epochs}",
                found="a teacher that every learning rate would train anew",
                hint="train it before, and give --teacher-weights RUN/teacher.safetensors",
            )
        if not self.label_weight:
            found = "students without a trained head, which cannot be scored"
            raise ConfigError(f"--tune {self.tune} with --label-weight 0", found=found)

    def _check_read(self) -> None:
        """Each method has terms of its own: `planned` knows them."""


@dataclass(frozen=True)
class Variant:
    """A method, or a method with one setting changed."""

    name: str
    method: str
    swept: dict[str, Any]
    """The changed setting, or nothing."""
    matched: str | None = None
    """Of a baseline at equal compute, the method whose compute it is given; empty: the dearest."""

    @property
    def alone(self) -> bool:
        """Whether it is the student without a teacher."""
        return self.method == BASELINE or self.matched is not None


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run: a variant with one seed."""

    name: str
    variant: str
    seed: int
    config: Config
    """As if there were no other run: with the teacher and the paraphraser yet to be trained, where they are."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.out or "")

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / "summary.json").exists()


@dataclass(frozen=True)
class Plan:
    """The whole comparison."""

    config: CompareConfig
    variants: tuple[Variant, ...]
    runs: tuple[PlannedRun, ...]
    folder: Path
    tuning: Mapping[str, Any] | None = None
    """The trials of its methods, and what was chosen; see `tuning.py`."""

    def variant(self, run: PlannedRun) -> Variant:
        """What a run is a run of."""
        return next(each for each in self.variants if each.name == run.variant)

    def reference(self, variant: Variant, method: str) -> str | None:
        """The variant of `method` that `variant` is compared with: the one with the same swept setting, or without."""
        if variant.method == method or (variant.matched is not None and method != BASELINE):
            return None
        named = {(each.method, str(each.swept)): each.name for each in self.variants}
        return named.get((method, str(variant.swept))) or named.get((method, "{}"))


def planned(config: CompareConfig, tuning: Mapping[str, Any] | None = None) -> Plan:
    """Every run of a comparison, in order.

    Args:
        config: what is compared.
        tuning: trials of its methods, and under `chosen` what each method has otherwise than given.

    Raises:
        ConfigError: an unknown method, a setting that cannot be swept, or values that do not fit each other.
    """
    base: dict[str, Any] = {name: getattr(config, name) for name in FIELDS}
    if config.sweep:
        base["validate_on"] = config.sweep_on
    if config.factor_form == "auto" and FORM_DEPENDS.intersection(_sweeps(config.sweep)):
        base["factor_form"] = "paper"  # or the values would be compared in different forms
    folder = Path(config.out or default_folder(config))
    methods = _methods(config.methods)
    variants = _variants(methods, _sweeps(config.sweep))
    settings = {each.name: base | settings_of(each.method, base) | each.swept for each in variants}
    _check_given(config, methods, settings)
    plain = {each.name: settings[each.name] for each in variants if each.matched is None}
    variants = tuple(each for each in variants if each.matched is not None or _first(each.name, plain))
    for each in variants:
        if tuning is not None:
            settings[each.name] |= tuning["chosen"][BASELINE if each.alone else each.method]["settings"]
    for each in variants:
        if each.matched is not None:
            settings[each.name]["views"] = 0  # it needs no cache, so every pass may show it new views
    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        for each in variants:
            name = _run_name(folder, each, seed)
            own = settings[each.name] | {"seed": seed, "out": str(folder / name), "overwrite": False}
            runs.append(PlannedRun(name, each.name, seed, Config(**own)))
    return Plan(config, variants, tuple(runs), folder, tuning)


def _check_given(config: CompareConfig, methods: Sequence[str], settings: dict[str, dict[str, Any]]) -> None:
    """A setting that was given, and that every method sets otherwise, would do nothing.

    Raises:
        ConfigError: there is one.
    """
    usual = {each.name: each.default for each in fields(Config)}
    fitting = {name for preset in METHODS.values() for name, value in preset.items() if value == "auto"}
    for name in sorted({name for method in methods for name in settings_of(method, {})} - fitting):
        value = getattr(config, name)
        if value != usual[name] and all(each[name] != value for each in settings.values()):
            if any(acts_on(name, method) for method in methods):
                own = ", ".join(f"{variant} {each[name]}" for variant, each in settings.items())
                found, hint = f"methods that set it themselves: {own}", f"leave it out, or give --sweep {name}={value}"
            else:
                able = " or ".join(method for method in METHODS if acts_on(name, method))
                found = f"no method with a term that reads it: {', '.join(methods)}"
                hint = f"leave it out, or add {able}" if able else f"leave it out, or give --sweep {name}={value}"
            raise ConfigError(f"{flag(name)} {value}", found=found, hint=hint)


def _run_name(folder: Path, variant: Variant, seed: int) -> str:
    """METHOD-sSEED, or METHOD-SETTING=VALUE-sSEED; the method by another of its names where such a run is there."""
    method, swept = variant.method, variant.name.removeprefix(variant.method)
    names = [method, *(alias for alias, name in ALIASES.items() if name == method)]
    folders = [re.sub(r"[^\w.+=-]+", "-", name + swept) + f"-s{seed}" for name in names]
    return next((name for name in folders if (folder / name).exists()), folders[0])


def default_folder(config: Config) -> str:
    """`runs/compare-DATA-TEACHER-STUDENT`, of characters that are safe in a path."""
    parts = (Path(config.data).name or config.data, config.teacher, config.student)
    return "runs/compare-" + "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)


def _methods(text: str) -> list[str]:
    """The methods that are named, each once.

    >>> _methods("alone, kd,ft+kd")
    ['baseline', 'kd', 'ft+kd']
    """
    names = ["+".join(ALIASES.get(part, part) for part in name.split("+")) for name in names_in(text)]
    matched = [name for name in names if name.partition(":")[0] == MATCHED]
    for part in (part for name in names if name not in matched for part in name.split("+")):
        if part not in METHODS:
            valid = near(part, [*METHODS, MATCHED]) or [*METHODS, MATCHED, "their sums, such as ft+kd"]
            raise ConfigError(f"--methods {text}", found=f"no method {part}", valid=valid)
    if not names:
        raise ConfigError("--methods", found="no method", valid=list(METHODS))
    rivals = [name for name in names if name not in [BASELINE, *matched]]
    for name in matched:
        _, colon, other = name.partition(":")
        if not rivals or (colon and other not in rivals):
            raise ConfigError(
                f"--methods {text}",
                found=f"{name}, and no {other or 'method with a teacher'} among the methods",
                valid=[MATCHED, *(f"{MATCHED}:{rival}" for rival in rivals)] if rivals else None,
                hint="name the method as well whose compute it shall have",
            )
    return list(dict.fromkeys(MATCHED if name == f"{MATCHED}:{USUAL}" else name for name in names))


def _matched(method: str, methods: Sequence[str]) -> str | None:
    """The method whose compute a baseline is given; empty for the dearest, None for what is no matched baseline.

    >>> _matched("baseline-matched", ["baseline-matched", "kd", "ft"]), _matched("baseline-matched:kd", [])
    ('ft', 'kd')
    """
    own, _, other = method.partition(":")
    return None if own != MATCHED else other or (USUAL if USUAL in methods else "")


def _sweeps(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`["k=0.5,1"]` -> `{"k": [0.5, 1]}`."""
    found: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if name not in SWEPT:
            what = "a setting that all runs share" if name in FIELDS else "no such setting"
            raise ConfigError(f"--sweep {text}", found=f"{name}: {what}", valid=near(name, SWEPT) or SWEPT)
        listed = _values(values, f"--sweep {text}")
        if not (equals and listed):
            raise ConfigError(f"--sweep {text}", found="no values", valid=f"--sweep {name}=VALUE,VALUE")
        found[name] = found.get(name, []) + listed
    return found


def _values(text: str, given: str) -> list[Any]:
    """What is between commas, each as YAML reads it.

    >>> _values("0.5,auto,{layers: [1, 1]},1e-3", "--sweep")
    [0.5, 'auto', {'layers': [1, 1]}, 0.001]
    """
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(given, found=f"{text}: {error}") from error
    return [_number(value) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
            for value in values]  # fmt: skip


def _number(text: str) -> float | str:
    """1e-3 is no number to YAML."""
    try:
        return float(text)
    except ValueError:
        return text


def _variants(methods: Sequence[str], sweeps: dict[str, list[Any]]) -> tuple[Variant, ...]:
    """Each method with each value of each sweep that acts on it; or as it is, where none does or others refer to it."""
    matched = [method for method in methods if _matched(method, methods) is not None]
    if sweeps and matched:
        raise ConfigError(
            f"--sweep with {matched[0]}",
            found="methods of several settings, which cost differently",
            hint="choose a setting by --sweep, and compare it at equal compute without",
        )
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
        refers = method in REFERENCES.values() and not all(acts_on(name, method) for name in sweeps)
        found += [*([Variant(method, method, {}, _matched(method, methods))] if refers or not swept else []), *swept]
    return tuple(found)


def _first(name: str, settings: dict[str, dict[str, Any]]) -> bool:
    """Whether no variant before has the same settings: one value can be given by two sweeps."""
    own = plain(settings[name])
    return next(other for other, values in settings.items() if plain(values) == own) == name
