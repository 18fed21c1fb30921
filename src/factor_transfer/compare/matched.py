"""The baseline at equal compute: as many passes of the student alone as cost what a method costs.

A method's cost is its whole training in multiply-adds, as if its run had been alone: the student with its terms, the
teacher where it ran or an empty factor cache would have had it run, and the paraphraser, which another run may have
made. The teacher's own training is no method's. It is known when the method's run of the same seed is finished, so a
matched run waits for that one; its number of passes is in the settings that it is started with, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from factor_transfer.compare.plan import Plan, PlannedRun, Variant
from factor_transfer.compare.shared import Shared, takes
from factor_transfer.config import Config
from factor_transfer.training.compute import COUNTED
from factor_transfer.training.run_folder import DEFAULTS, Run
from factor_transfer.training.summary import Summary, read_summary

STRETCHED = ("epochs", "warmup_epochs", "decay_epochs", "decay_milestones")
"""Settings of the baseline that a matched one has otherwise: its passes, and where its schedule goes by them."""

ROUNDING = 1e-6
"""Passes that are none, but the error of a quotient."""

Costs = Mapping[PlannedRun, float | None]
"""Multiply-adds of finished runs, as if each had been alone; None where they are not known."""


def costs(plan: Plan, shared: Mapping[str, Sequence[Shared]], found: Mapping[PlannedRun, Summary]) -> Costs:
    """What each finished run has cost.

    Args:
        plan: the comparison.
        shared: what each run needs, by its name, as `shared_in` gives it.
        found: summaries of finished runs.
    """
    return {run: _cost(summary, shared[run.name], found) for run, summary in found.items()}


def finished(plan: Plan) -> dict[PlannedRun, Summary]:
    """The summaries of the runs that are finished."""
    return {run: read_summary(run.folder) for run in plan.runs if run.finished}


def _cost(summary: Summary, shared: Sequence[Shared], found: Mapping[PlannedRun, Summary]) -> float | None:
    if summary.compute is None:
        return None
    total = summary.compute.student
    for each in shared:
        if each.what == "paraphraser" and takes(each.what, DEFAULTS | summary.settings):
            made = _made(each, found)
            if made is None:
                return None
            total += made
    return total


def _made(shared: Shared, found: Mapping[PlannedRun, Summary]) -> float | None:
    """What it cost the run that made it, finished or not."""
    for run in shared.runs:
        if run in found:
            compute = found[run].compute
            stages = {name: each.alone for name, each in (compute.stages if compute else {}).items()}
        else:
            records = Run(run.folder).all_recorded().items()
            stages = {name: each[COUNTED[1]] for name, each in records if COUNTED[1] in each}
        own = [alone for name, alone in stages.items() if name.startswith(shared.what)]
        if own:
            return sum(own)
    return None


def methods_matched(plan: Plan, costs: Costs) -> dict[str, str]:
    """The method that each matched variant is matched to, by its name; those are left out that are not known yet."""
    found = {}
    for variant in plan.variants:
        if variant.matched:
            found[variant.name] = variant.matched
        elif variant.matched is not None:
            first = {run: costs.get(run) for run in _rivals(plan)}
            known = {run.variant: cost for run, cost in first.items() if cost is not None}
            if len(known) == len(first):
                found[variant.name] = max(known, key=lambda name: known[name])
    return found


def awaited(plan: Plan, run: PlannedRun, costs: Costs) -> list[PlannedRun]:
    """The runs whose costs decide the passes of a matched one, and are not known yet."""
    method = methods_matched(plan, costs).get(run.variant)
    wanted = _rivals(plan) if method is None else [_of(plan, method, run.seed)]
    return [each for each in wanted if costs.get(each) is None]


def matched_settings(plan: Plan, run: PlannedRun, costs: Costs) -> dict[str, Any] | None:
    """The passes that cost what the method of a matched run cost, and the schedule stretched to them.

    None while that is not known.
    """
    method = methods_matched(plan, costs).get(run.variant)
    target = None if method is None else _of(plan, method, run.seed)
    cost = None if target is None else costs.get(target)
    if target is None or cost is None:
        return None
    compute = read_summary(target.folder).compute
    assert compute is not None, "its cost is known"
    return stretched(run.config, passes(cost, compute.baseline / target.config.epochs))


def passes(cost: float, one: float) -> int:
    """Whole passes that cost no less, if one costs `one`.

    >>> passes(30.0, 10.0), passes(30.1, 10.0)
    (3, 4)
    """
    return math.ceil(cost / one - ROUNDING)


def stretched(config: Config, epochs: int) -> dict[str, Any]:
    """The settings that take the schedule to another number of passes: all that it counts in passes grows alike.

    Milestones are in timm's count: 83 drops after 82 passes.
    """
    by = epochs / config.epochs
    found: dict[str, Any] = {"epochs": epochs, "warmup_epochs": round(config.warmup_epochs * by)}
    if config.decay_epochs is not None:
        found["decay_epochs"] = config.decay_epochs * by
    if config.sched == "multistep":
        found["decay_milestones"] = [1 + round((each - 1) * by) for each in config.decay_milestones]
    return found


def matched_variants(plan: Plan) -> dict[str, Variant]:
    """The baselines at equal compute, by name."""
    return {each.name: each for each in plan.variants if each.matched is not None}


def _rivals(plan: Plan) -> list[PlannedRun]:
    """Of the first seed, the runs of methods with a teacher: the dearest of them is what is matched by default."""
    alone = {each.name for each in plan.variants if each.alone}
    return [run for run in plan.runs if run.seed == plan.config.seed and run.variant not in alone]


def _of(plan: Plan, variant: str, seed: int) -> PlannedRun:
    return next(run for run in plan.runs if (run.variant, run.seed) == (variant, seed))
