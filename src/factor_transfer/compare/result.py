"""What a comparison found, as compare.json holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from factor_transfer.compare.matched import Costs, costs, finished, methods_matched
from factor_transfer.compare.plan import REFERENCES, CompareConfig, Plan, PlannedRun, Variant, default_folder
from factor_transfer.compare.shared import shared_in
from factor_transfer.compare.statistics import Difference, Scores, against, gap_closed, spread, verdict
from factor_transfer.config import FIELDS, plain
from factor_transfer.method.presets import BASELINE
from factor_transfer.report.html import repeat_command
from factor_transfer.tasks.classification import Classification
from factor_transfer.tasks.metric import Metric
from factor_transfer.training.summary import Summary
from factor_transfer.util.errors import RunError

ALIKE = {
    "version": "kind of fingerprints (one is of an earlier version, so that what they saw cannot be compared)",
    "data": "images",
    "teacher": "teacher",
    "teacher code": "code of the teacher",
    "student": "first weights of the student",
    "student code": "code of the student",
}
"""Fingerprints that a run and the run it is compared with must share."""

SHARED = ("teacher", "paraphraser")
"""Stages that one run does for many; their seconds are no method's."""

KEYS = [f"to_{name}" for name in REFERENCES]
"""In compare.json: the differences to each of the references. They are gains: above 0 a method is the better one."""

AT_EQUAL_COMPUTE = "to_matched"
"""In compare.json: the difference to the baseline that was given a method's compute."""


def outcome(plan: Plan) -> dict[str, Any]:
    """Everything that is known of a comparison so far, as JSON holds it.

    Raises:
        RunError: runs that are compared did not see the same images, teacher or first weights.
    """
    found = finished(plan)
    spent = costs(plan, shared_in(plan.runs), found)
    to = _references(plan, spent)
    _check_alike(plan, found, to)
    first = next(iter(found.values()), None)
    metric = first.metric if first else Classification.metrics[0]
    return {
        "complete": len(found) == len(plan.runs),
        "runs_finished": len(found),
        "runs_planned": len(plan.runs),
        "command": _command(plan),
        "scored_on": _scored_on(plan, first),
        "metric": asdict(metric),
        "teacher": {
            "name": first.teacher.name,
            metric.key: first.value("teacher"),
            "parameters": first.teacher.parameters,
        }
        if first
        else None,
        "student": {"name": first.student.name, "parameters": first.student.parameters} if first else None,
        "data": _images(list(found.values())),
        "methods": _methods(plan, found, metric, spent, to),
        "shared_seconds": _shared_seconds(found.values()),
        "tuning": plan.tuning,
        "jobs": plan.config.jobs,
        "environments": _different([summary.environment for summary in found.values()]),
        "settings": plain({name: getattr(plan.config, name) for name in FIELDS}),
        "runs": [
            {
                "name": run.name,
                "method": run.variant,
                "seed": run.seed,
                **{each.key: summary.student.measured.get(each.key) for each in summary.metrics},
                f"teacher_{metric.key}": summary.value("teacher"),
                "seconds": summary.seconds,
                "epochs": summary.settings.get("epochs"),
                "compute": spent[run],
            }
            for run, summary in found.items()
        ],
    }


def _references(plan: Plan, spent: Costs) -> dict[str, dict[str, str]]:
    """What each variant is compared with, for every key of compare.json."""
    found: dict[str, dict[str, str]] = {}
    for key, method in zip(KEYS, REFERENCES.values(), strict=True):
        named = {each.name: plan.reference(each, method) for each in plan.variants}
        baseline = {each.name for each in plan.variants if each.method == BASELINE and method != BASELINE}
        found[key] = {name: other for name, other in named.items() if other is not None and name not in baseline}
    found[AT_EQUAL_COMPUTE] = {method: name for name, method in reversed(methods_matched(plan, spent).items())}
    return found


def _methods(
    plan: Plan,
    found: Mapping[PlannedRun, Summary],
    metric: Metric,
    spent: Costs,
    to: Mapping[str, Mapping[str, str]],
) -> list[dict[str, Any]]:
    values: dict[str, dict[int, float]] = {each.name: {} for each in plan.variants}
    seconds: dict[str, dict[int, float]] = {each.name: {} for each in plan.variants}
    teachers: dict[str, float | None] = {}
    terms: dict[str, list[dict[str, Any]]] = {}
    for run, summary in found.items():
        terms[run.variant] = summary.terms
        if (value := summary.value("student")) is not None:
            values[run.variant][run.seed] = value
        own = [value for stage, value in summary.seconds.items() if not stage.startswith(SHARED)]
        seconds[run.variant][run.seed] = sum(own)
        teachers[run.variant] = summary.value("teacher")
    # Statistics are of scores: the higher, the better.
    scores = {name: {seed: metric.gain(value, 0.0) for seed, value in each.items()} for name, each in values.items()}
    differences = {
        key: against(scores, {name: scores[other] for name, other in named.items()}) for key, named in to.items()
    }
    matched, rows = methods_matched(plan, spent), []
    for each in plan.variants:
        teacher, gaps = teachers.get(each.name), {}
        for key, name in ((KEYS[0], "gap_closed"), (AT_EQUAL_COMPUTE, "gap_closed_matched")):
            other, gap = to[key].get(each.name), None
            if other is not None and teacher is not None and not _seen_by_teacher(plan):
                gap = gap_closed(scores[each.name], scores[other], metric.gain(teacher, 0.0))
            gaps[name] = asdict(gap) if gap else None
        baseline = to[KEYS[0]].get(each.name)
        rows.append(
            {
                "name": each.name,
                "method": each.method,
                "swept": plain(each.swept),
                "terms": terms.get(each.name, []),
                metric.key: {str(seed): value for seed, value in values[each.name].items()},
                **_figures(values[each.name], seconds[each.name], seconds[baseline] if baseline else None),
                **_computed(each, found, spent),
                "matched_to": matched.get(each.name),
                **gaps,
                **{key: _to(to[key], differences[key], each.name, metric) for key in to},
            }
        )
    return rows


def _computed(variant: Variant, found: Mapping[PlannedRun, Summary], spent: Costs) -> dict[str, Any]:
    """Passes and multiply-adds of a method's runs, and those as a multiple of the baseline's in the passes given."""
    passes, compute, relative = set(), [], []
    for run, summary in found.items():
        if run.variant == variant.name:
            passes.add(summary.settings["epochs"])
            cost = spent[run]
            if cost is not None and summary.compute is not None:
                compute.append(cost)
                relative.append(cost / (summary.compute.baseline * run.config.epochs / summary.settings["epochs"]))
    return {
        "epochs": sorted(passes),
        "compute": spread(compute)[0] if compute else None,
        "compute_to_alone": spread(relative)[0] if relative else None,
    }


def _figures(values: Scores, seconds: Scores, baseline: Scores | None) -> dict[str, Any]:
    both = sorted(seconds.keys() & (baseline or {}).keys())
    mean, sd = spread(list(values.values())) if values else (None, None)
    relative = sum(seconds[seed] for seed in both) / sum((baseline or {})[seed] for seed in both) if both else None
    return {
        "n": len(values),
        "mean": mean,
        "sd": sd,
        "seconds": spread(list(seconds.values()))[0] if seconds else None,
        "seconds_to_alone": relative,
    }


def _to(named: Mapping[str, str], differences: Mapping[str, Difference], name: str, metric: Metric) -> Any:
    if name not in differences:
        return None
    found, tested = differences[name], sum(each.p is not None for each in differences.values())
    other = named[name]
    said = verdict(found, other, tested, metric.points or metric.label, metric.digits)
    return {"what": other, **found.to_dict(), "verdict": said}


def _seen_by_teacher(plan: Plan) -> bool:
    """Whether a teacher that came with its weights may have been trained on the images that are scored on."""
    return plan.runs[0].config.validate_on == "train-holdout" and not plan.config.teacher_epochs


def _check_alike(plan: Plan, found: Mapping[PlannedRun, Summary], to: Mapping[str, Mapping[str, str]]) -> None:
    there = {(run.variant, run.seed): (run, summary.fingerprints) for run, summary in found.items()}
    for (name, seed), (run, pins) in there.items():
        for named in to.values():
            other = there.get((named.get(name, ""), seed))
            wrong = [what for pin, what in ALIKE.items() if other and pins.get(pin) != other[1].get(pin)]
            if other and len({each["unlabelled"] for each in (pins, other[1]) if "unlabelled" in each}) > 1:
                wrong.append("unlabelled images")
            if other and pins.get("version") != other[1].get("version"):
                wrong = wrong[:1]
            if other and wrong:
                raise RunError(
                    f"--out {plan.folder}",
                    found=f"{run.name} and {other[0].name} had not the same {' and '.join(wrong)}",
                    valid="runs under one protocol",
                    hint="give another --out, or --overwrite",
                )


def _images(found: Sequence[Summary]) -> dict[str, Any]:
    """What is known of the images; the student without a teacher has no unlabelled ones."""
    if not found:
        return {}
    known = {key: value for key, value in asdict(found[0].data).items() if key != "classes"}
    return {**known, "unlabelled": max(each.data.unlabelled for each in found)}


def _scored_on(plan: Plan, summary: Summary | None) -> str:
    count = f"{summary.data.validation:,} " if summary else ""
    if plan.runs[0].config.validate_on != "train-holdout":
        return f"{count}validation images"
    seen = "; the teacher may have been trained on them, so no gap is given" if _seen_by_teacher(plan) else ""
    return f"{count}training images that were held out (train-holdout: to choose by, not to report){seen}"


def _shared_seconds(summaries: Any) -> dict[str, float]:
    """Seconds of what was made for all."""
    found: dict[str, float] = {}
    for stage, seconds in (pair for each in summaries for pair in each.seconds.items()):
        if stage.startswith(SHARED) and seconds:
            found[stage] = found.get(stage, 0.0) + seconds
    return found


def _command(plan: Plan) -> str:
    settings = plain(asdict(plan.config))
    sweeps = "".join(f" --sweep {text}" for text in settings.pop("sweep"))
    folder = plan.config.out or default_folder(plan.config)
    return f"{repeat_command(settings, 'compare', CompareConfig)}{sweeps} --out {folder}"


def _different(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]
