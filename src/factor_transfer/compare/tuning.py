"""Tuning on equal terms: as many trials for every method, scored on training images that are held out.

COMPARE/tuning/METHOD-tN/    the run folder of each trial, with its .yaml and .log as in a comparison
               compare.json  the trials as a comparison of one seed; compare.md says it in words
               tuning.json   what was tried, and what was chosen

Trial 0 is the method as it is given. The others multiply its learning rate, and the weights of its terms besides the
labels', by factors that are the same for all methods; of the baseline, which has no such weight, the weight decay.
Factors are the points of a Halton sequence, so more trials begin with the same ones. What is chosen is then compared on
other seeds and other images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from scipy.stats import qmc

from factor_transfer.compare.plan import Plan, PlannedRun, Variant
from factor_transfer.compare.result import outcome
from factor_transfer.compare.words import write_outcome
from factor_transfer.config import FIELDS, Config
from factor_transfer.method.presets import BASELINE, WEIGHTS, settings_of
from factor_transfer.training.summary import read_summary
from factor_transfer.util.console import say
from factor_transfer.util.errors import ConfigError, RunError
from factor_transfer.util.files import write_json

REACH = 4.0
"""A trial's factors lie between 1 / REACH and REACH, evenly in their logarithm."""

OTHER_SEED = 1_000_000
"""Added to --seed, so that no seed of the comparison was seen in a trial."""

Work = Callable[[Plan], dict[str, str]]
"""Runs what is not finished of a plan; gives what failed, and what it said."""


def tune(plan: Plan, work: Work) -> dict[str, Any]:
    """Run the trials of every method that a comparison needs, and choose.

    Args:
        plan: the comparison, with the settings as they are given.
        work: runs a plan.

    Returns:
        What tuning.json holds: `trials`, and under `chosen` the settings of each method that differ from those given.

    Raises:
        RunError: a method failed as it is given.
    """
    every = trials(plan, {})
    say(f"tuning: {len(every.runs)} trials, {plan.config.tune} of each method, in {every.folder}")
    every.folder.mkdir(exist_ok=True)
    given = tuple(run for run in every.runs if run.name.endswith("-t0"))
    failures = work(replace(every, runs=given))
    if failures:
        raise RunError(
            f"{len(failures)} of {len(given)} methods failed as they are given: {', '.join(failures)}",
            found="\n".join(["", *(f"{name}: {said}" for name, said in failures.items())]),
            hint="mend what they say; the same command continues",
        )
    every = trials(plan, {run.variant: read_summary(run.folder).student.more for run in given})
    failures = work(every)
    compared = outcome(every)
    write_outcome(every.folder, compared)
    found = {**_chosen(every, failures), "seed": every.runs[0].seed, "scored_on": compared["scored_on"]}
    write_json(every.folder / "tuning.json", found)
    return found


def trials(plan: Plan, recorded: Mapping[str, Mapping[str, Any]]) -> Plan:
    """The trials as a plan: trial 0 of every method, then trial 1, and so on.

    Args:
        plan: the comparison.
        recorded: what the students of trial 0 recorded, by method: the weights that `auto` found. Where nothing is
            recorded such a weight stays as it is.

    Raises:
        ConfigError: `auto` found another weight for each of several layers.
    """
    config, folder = plan.config, plan.folder / "tuning"
    base = {name: getattr(config, name) for name in FIELDS} | {"validate_on": "train-holdout", "overwrite": False}
    methods = dict.fromkeys(BASELINE if each.alone else each.method for each in plan.variants)
    variants, runs = {}, []
    for number in range(config.tune):
        for method in methods:
            settings = base | settings_of(method, base)
            changed = _changed(method, settings, number, recorded.get(method, {}))
            name = " ".join([method, *(f"{key}={value:g}" for key, value in changed.items())])
            variants[name] = Variant(name, method, changed)
            own = {"seed": config.seed + OTHER_SEED, "out": str(folder / f"{method}-t{number}")}
            given = Config(**(settings | changed | own))
            runs.append(PlannedRun(f"{method}-t{number}", name, given.seed, given))
    return Plan(config, tuple(variants.values()), tuple(runs), folder)


def tuned(method: str) -> list[str]:
    """The settings that are tuned.

    >>> tuned("ft+kd"), tuned("at"), tuned("baseline")
    (['lr', 'kd_weight', 'beta'], ['lr', 'at_weight'], ['lr', 'weight_decay'])
    """
    settings = settings_of(method, {})
    own = [name for name, weight in WEIGHTS.items() if weight.term and weight.off == 0 and settings[name]]
    return ["lr", *(own or ["weight_decay"])]


def factors(number: int, count: int) -> list[float]:
    """What a trial multiplies `count` settings by.

    >>> factors(0, 2), [round(factor, 3) for factor in factors(2, 2)]
    ([1.0, 1.0], [0.5, 1.587])
    """
    if not number:
        return [1.0] * count
    point = qmc.Halton(d=count, scramble=False).random(number + 1)[number]
    return [REACH ** (2 * float(place) - 1) for place in point]


def _changed(method: str, settings: Mapping[str, Any], number: int, recorded: Mapping[str, Any]) -> dict[str, float]:
    """The settings of a trial that differ from those given, to three digits."""
    names, found = tuned(method), {}
    for name, factor in zip(names, factors(number, len(names)), strict=True):
        value = recorded.get(name) if settings[name] == "auto" else settings[name]
        if settings[name] == "auto" and name == "beta" and "," in (settings["teacher_layer"] or ""):
            raise ConfigError(
                "--tune with --beta auto",
                found=f"several layers, {settings['teacher_layer']}, each with a beta of its own",
                hint="give --beta a number",
            )
        if number and value is not None:
            found[name] = float(f"{value * factor:.3g}")
    return found


def _chosen(every: Plan, failures: Mapping[str, str]) -> dict[str, Any]:
    """Every trial with its score, and the best of each method; of equal ones the first."""
    rows: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, Any]] = {}
    best: dict[str, float] = {}
    for run in every.runs:
        variant = every.variant(run)
        method, settings = variant.method, variant.swept
        row: dict[str, Any] = {"trial": run.name, "method": method, "settings": settings, "score": None}
        if run.finished:
            summary = read_summary(run.folder)
            row["score"] = value = summary.value("student")
            score = -math.inf if value is None else summary.metric.gain(value, 0.0)
            if method not in best or score > best[method]:
                best[method], chosen[method] = score, {"trial": run.name, "settings": settings}
        elif run.name in failures:
            row["failed"] = failures[run.name]
        rows.append(row)
    return {"trials": rows, "chosen": chosen}
