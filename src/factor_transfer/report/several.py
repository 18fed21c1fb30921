"""Several runs on one page: what differs, what each gained, and mean and spread where only seeds differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factor_transfer.config import Config
from factor_transfer.report.figures import Point, lines, scatter
from factor_transfer.report.html import rendered
from factor_transfer.training.run_folder import DEFAULTS, FREE, Run, saved_config, saved_summary
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
            saved_config(folder), saved_summary(folder)  # or they say what is wrong
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
    summaries = [saved_summary(folder) for folder in folders]
    settings = [DEFAULTS | summary["settings"] for summary in summaries]  # early versions had fewer
    keys = [key for key in settings[0] if key not in NOT_COMPARED]
    differing = [key for key in keys if len({json.dumps(each.get(key)) for each in settings}) > 1]
    rows, points = [], []
    for place, (name, summary) in enumerate(zip(names, summaries, strict=True)):
        student, alone = summary["student"], summary.get("baseline", {}).get("top1")
        top1 = student.get("top1")  # None: without labels, or without a head, nothing is measured
        rows.append(
            {
                "name": name,
                "kind": f"c{place % MARKS}",
                "values": [_shown(settings[place].get(key)) for key in differing],
                "teacher": summary["teacher"].get("top1"),
                "alone": alone,
                "student": top1,
                "gain": None if alone is None or top1 is None else top1 - alone,
                "parameters": student["parameters"],
                "megabytes": student["size_bytes"] / 1e6,
                "latency": student["latency_ms"],
                "minutes": sum(summary["seconds"].values()) / 60,
            }
        )
        if top1 is not None:
            points.append((name, f"student c{place % MARKS}", student, f"{name}: {top1:.2f} %"))
    time_points = [Point(n, k, s["latency_ms"], s["top1"], f"{t}, {s['latency_ms']:.2f} ms") for n, k, s, t in points]
    size_points = [
        Point(n, k, s["size_bytes"] / 1e6, s["top1"], f"{t}, {s['size_bytes'] / 1e6:.2f} MB") for n, k, s, t in points
    ]
    curves = {}
    for place, (name, folder) in enumerate(zip(names, folders, strict=True)):
        values = [row.get("validation_top1") for row in Run(folder).metrics("student")]
        if any(value is not None for value in values):
            curves[name] = (f"c{place % MARKS}", values)
    plots = [
        scatter(f"Accuracy against {what}", found, unit, "top-1, %")
        for what, found, unit in (
            ("latency", time_points, "one image, ms (torch)"),
            ("size", size_points, "weights, MB"),
        )
        if found
    ]
    if curves:
        plots.append(lines("Validation top-1 of the students", curves, "top-1, %", digits=4, from_zero=False))
    return {
        "title": f"{len(folders)} runs",
        "rows": rows,
        "differing": [flag(key) for key in differing],
        "groups": _groups(summaries),
        "plots": plots,
        "data_differs": _data_differs([summary["fingerprints"] for summary in summaries]),
        "networks": sorted({f"{each['teacher']['name']} to {each['student']['name']}" for each in summaries}),
    }


def _data_differs(pins: Sequence[Mapping[str, str]]) -> bool:
    """Whether runs saw other images, as far as fingerprints of one version tell."""
    versions = {each.get("version") for each in pins}
    return any(len({each.get("data") for each in pins if each.get("version") == kind}) > 1 for kind in versions)


def _groups(summaries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose settings differ in nothing but seeds, two or more: mean and standard deviation."""
    found: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        same = {
            key: value for key, value in (DEFAULTS | summary["settings"]).items() if key not in NOT_COMPARED | SEEDS
        }
        found.setdefault(json.dumps(same, sort_keys=True), []).append(summary)
    groups = []
    for members in found.values():
        if len(members) < 2:
            continue
        student = [each["student"]["top1"] for each in members if "top1" in each["student"]]
        both = [each for each in members if "top1" in each["student"] and "top1" in each.get("baseline", {})]
        alone = [each["baseline"]["top1"] for each in both]
        gains = [each["student"]["top1"] - each["baseline"]["top1"] for each in both]
        groups.append(
            {
                "name": f"{members[0]['teacher']['name']} to {members[0]['student']['name']}, "
                f"{members[0].get('method', 'Factor Transfer')}, {members[0]['settings']['epochs']} passes",
                "n": len(members),
                "columns": [_spread(values) for values in (student, alone, gains)],
            }
        )
    return groups


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; the whole path where two would be the same."""
    last = [folder.resolve().name for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]


def _shown(value: Any) -> str:
    return "default" if value is None else value if isinstance(value, str) else json.dumps(value)
