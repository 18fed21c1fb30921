"""Several runs on one page: what differs, what each gained, and mean and spread where only seeds differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factor_transfer.config import Config
from factor_transfer.report.figures import Point, lines, scatter
from factor_transfer.report.html import limit_of, name_of, rendered
from factor_transfer.tasks.metric import Metric
from factor_transfer.training.run_folder import DEFAULTS, FREE, Run, saved_config
from factor_transfer.training.summary import ROLES, Summary, read_summary
from factor_transfer.util.checks import flag, named
from factor_transfer.util.console import say
from factor_transfer.util.errors import RunError, listed
from factor_transfer.util.files import write_atomic

SEEDS = frozenset({"seed", "data_seed"})
NOT_COMPARED = FREE - named(Config)
"""Settings that change no result."""

MARKS = 6
"""Colours there are; more runs begin again with the first."""


def runs_in(given: Sequence[Path]) -> list[Path]:
    """The run folders that are given; of a folder that holds runs, the finished ones in it.

    Raises:
        RunError: a folder that is no run and holds none.
    """
    found: list[Path] = []
    for folder in given:
        inside = sorted(path.parent for path in folder.glob("*/summary.json"))
        if (folder / "config.json").exists() or not inside:
            saved_config(folder), read_summary(folder)  # or they say what is wrong
            found.append(folder)
        else:
            found += inside
            unfinished = sorted(path.parent.name for path in folder.glob("*/config.json") if path.parent not in inside)
            if unfinished:
                say(f"in {folder}, not finished and left out: {listed(unfinished)}")
    if not found:
        raise RunError("no runs", valid="run folders, or a folder of them")
    return found


def write_comparison(folders: Sequence[Path], out: Path, compared: Mapping[str, Any] | None = None) -> Path:
    """Write the page that compares finished runs.

    Args:
        folders: the runs, two or more.
        out: the file.
        compared: the table and the verdicts of `factor-transfer compare`, which made them.

    Returns:
        The file.
    """
    write_atomic(out, rendered("comparison.html.jinja", {**comparison_values(folders), "compared": compared}))
    return out


def comparison_values(folders: Sequence[Path]) -> dict[str, Any]:
    """What the template shows."""
    names = _short_names(folders)
    summaries = [read_summary(folder) for folder in folders]
    metric = summaries[0].metric  # of runs with another one, none is shown
    settings = [DEFAULTS | summary.settings for summary in summaries]  # a run can have been made with fewer
    keys = [key for key in settings[0] if key not in NOT_COMPARED]
    differing = [key for key in keys if len({json.dumps(each.get(key)) for each in settings}) > 1]
    rows, points = [], []
    for place, (name, summary) in enumerate(zip(names, summaries, strict=True)):
        values, student, kind = _values(summary, metric), summary.student, f"c{place % MARKS}"
        rows.append(
            {
                "name": name,
                "kind": kind,
                "values": [_shown(settings[place].get(key)) for key in differing],
                "metrics": ["" if values[role] is None else metric.number(values[role]) for role in ROLES],
                "gain": values["gain"],
                "parameters": student.parameters,
                "megabytes": student.size_bytes / 1e6,
                "latency": student.latency_ms,
                "compute": None if summary.compute is None else summary.compute.to_baseline,
                "given": bool(summary.compute and summary.compute.given),
                "minutes": sum(summary.seconds.values()) / 60,
            }
        )
        if (value := values["student"]) is not None:
            points.append((name, f"student {kind}", student, value, f"{name}: {metric.shown(value)}"))
    times = [Point(n, k, s.latency_ms, v, f"{tip}, {s.latency_ms:.2f} ms") for n, k, s, v, tip in points]
    sizes = [Point(n, k, s.size_bytes / 1e6, v, f"{tip}, {s.size_bytes / 1e6:.2f} MB") for n, k, s, v, tip in points]
    curves = {}
    for place, (name, folder) in enumerate(zip(names, folders, strict=True)):
        curve = [row.get(f"validation_{metric.key}") for row in Run(folder).metrics("student")]
        if any(value is not None for value in curve):
            curves[name] = (f"c{place % MARKS}", curve)
    plots = [
        scatter(f"{name_of(metric)} against {what}", found, unit, metric.axis, limit_of(metric))
        for what, found, unit in (("latency", times, "one image, ms (torch)"), ("size", sizes, "weights, MB"))
        if found
    ]
    if curves:
        plots.append(
            lines(f"Validation {metric.label} of the students", curves, metric.axis, digits=4, from_zero=False)
        )
    return {
        "title": f"{len(folders)} runs",
        "rows": rows,
        "differing": [flag(key) for key in differing],
        "groups": _groups(summaries, metric),
        "metric": metric,
        "heads": [f"{role}, {metric.unit}".rstrip(", ") for role in ROLES],
        "plots": plots,
        "data_differs": _data_differs([summary.fingerprints for summary in summaries]),
        "networks": sorted({f"{each.teacher.name} to {each.student.name}" for each in summaries}),
    }


def _data_differs(pins: Sequence[Mapping[str, str]]) -> bool:
    """Whether runs saw other images, as far as fingerprints of one version tell."""
    versions = {each.get("version") for each in pins}
    return any(len({each.get("data") for each in pins if each.get("version") == kind}) > 1 for kind in versions)


def _values(summary: Summary, metric: Metric) -> dict[str, float | None]:
    """The networks' values of a metric by role, and the student's `gain` over the baseline; None: not measured."""
    if summary.metric.key != metric.key:
        return dict.fromkeys((*ROLES, "gain"))
    return {**{role: summary.value(role) for role in ROLES}, "gain": summary.gain("baseline")}


def _groups(summaries: Sequence[Summary], metric: Metric) -> list[dict[str, Any]]:
    """Runs whose settings differ in nothing but seeds, two or more: mean and standard deviation."""
    found: dict[str, list[Summary]] = {}
    for summary in summaries:
        same = {key: value for key, value in (DEFAULTS | summary.settings).items() if key not in NOT_COMPARED | SEEDS}
        found.setdefault(json.dumps(same, sort_keys=True), []).append(summary)
    groups = []
    for members in found.values():
        if len(members) < 2:
            continue
        values, first = [_values(each, metric) for each in members], members[0]
        baselines = [each["baseline"] for each in values if each["gain"] is not None]
        columns = ([each["student"] for each in values], baselines, [each["gain"] for each in values])
        networks = f"{first.teacher.name} to {first.student.name}"
        groups.append(
            {
                "name": f"{networks}, {first.method}, {first.settings['epochs']} passes",
                "n": len(members),
                "columns": [_spread([value for value in each if value is not None], metric) for each in columns],
            }
        )
    return groups


def _spread(values: Sequence[float], metric: Metric) -> str:
    if len(values) < 2:
        return ""
    return f"{metric.number(statistics.mean(values))} ± {metric.number(statistics.stdev(values))}"


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; the whole path where two would be the same."""
    last = [folder.resolve().name for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]


def _shown(value: Any) -> str:
    return "default" if value is None else value if isinstance(value, str) else json.dumps(value)
