"""The result for a person: what was gained, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factor_transfer.method.presets import LABELS_ALONE
from factor_transfer.training.run_folder import saved_summary
from factor_transfer.util.arguments import Size, written
from factor_transfer.util.console import say, table, warn

STAGES = ("teacher", "paraphraser", "hint", "student", "baseline")
LABELS = {"teacher": "teacher", "baseline": "student alone", "student": "student"}


def label(summary: Mapping[str, Any], role: str) -> str:
    """What a network of a run is called; the student by its method.

    >>> label({"method": "attention transfer"}, "student"), label({}, "baseline")
    ('student by attention transfer', 'student alone')
    """
    return f"student by {summary.get('method', 'Factor Transfer')}" if role == "student" else LABELS[role]


def show(folder: Path, summary: Mapping[str, Any]) -> None:
    """Print a run's table and where its student lies."""
    there = {role: summary[role] for role in LABELS if role in summary}
    rows = [
        (
            label(summary, role),
            f"{found['top1']:.2f}" if "top1" in found else "-",
            f"{found['parameters']:,}",
            f"{found['size_bytes'] / 1e6:.2f}",
            f"{found['latency_ms']:.2f}",
        )
        for role, found in there.items()
    ]
    header = ("", "top-1 %", "parameters", "MB", "ms / image")
    networks = f"{summary['teacher']['name']} to {summary['student']['name']}"
    images = f"{summary['data']['validation']:,} validation images"
    table(f"{networks}, {summary['data']['name']}: {images}", header, rows)
    for line in verdict(summary):
        say(line)
    taken = summary["seconds"]
    stages = [*(stage for stage in STAGES if stage in taken), *sorted(taken.keys() - set(STAGES))]
    seconds = "  ".join(f"{stage} {taken[stage]:.0f} s" for stage in stages)
    say(f"trained in: {seconds}")
    program = f"{folder / 'student.pt2'} (needs only torch), " if "pt2_difference" in summary["student"] else ""
    say(f"student: {program}{folder / 'student.safetensors'}")
    if (folder / "report.html").exists():
        say(f"report: {folder / 'report.html'}")
    say(f"all of it: {folder / 'summary.json'}")


def show_evaluation(folder: Path, found: Mapping[str, Mapping[str, float]]) -> None:
    """Print what `evaluate` measured."""
    summary = saved_summary(folder)
    rows = [(label(summary, role), f"{values['top1']:.2f}", f"{values['loss']:.4f}") for role, values in found.items()]
    table(str(folder), ("", "top-1 %", "loss"), rows)


def show_diagnosis(tables: Sequence[Any], findings: Sequence[Any]) -> None:
    """Print what `doctor` looked at, and what it found wrong."""
    for title, header, rows in tables:
        table(title, header, rows)
    for finding in findings:
        warn(finding.what) if finding.level == "warning" else say(f"error: {finding.what}")
        if finding.hint:
            say(f"  next:  {finding.hint}")
    errors = sum(finding.level == "error" for finding in findings)
    warnings = f"{len(findings) - errors} warnings"
    say(
        f"not fit to run: {errors} errors, {warnings}"
        if errors
        else f"fit to run, with {warnings}"
        if findings
        else "fit to run"
    )


def show_suggestions(found: Sequence[Any], size: Size) -> None:
    """Print the students that fit, and the commands that distil into them."""
    rows = [
        (each.name, f"{each.parameters:,}", f"{each.size_mb:.2f}", f"{each.latency_ms:.2f}",
         "  ".join(f"{name}={value}" for name, value in each.args.items()))
        for each in found
    ]  # fmt: skip
    table(f"students for {written(size)} pixels", ("", "parameters", "MB", "ms / image", "arguments"), rows)
    for each in found:
        say(each.command)


def show_exports(folder: Path, found: Mapping[str, Any]) -> None:
    """Print what `export` wrote and measured, as `page.scored` gives it."""
    rows = [
        (
            row["file"],
            row["needs"],
            f"{row['bytes'] / 1e6:.2f}",
            "the weights" if row["score"] is None else f"{row['score']:.2f}",
            "0" if row["max_difference"] is None else f"{row['max_difference']:.1e}",
        )
        for row in found["formats"]
    ]
    right = "" if found["reference_top1"] is None else f", {found['reference_top1']:.2f} %"
    student = f"the trained student{right} on {found['images']:,} images"
    title = f"{folder}: against {student}; the largest difference of a logit"
    measure = "top-1 %" if right else "the same, %"
    table(title, ("file", "needs", "MB", measure, "difference"), rows)
    timed = [
        (f"{row['network']}, {row['format']}", str(row["threads"]), str(row["batch"]), *_milliseconds(row))
        for row in found["latency"]
    ]
    if timed:
        table("latency on this machine", ("", "threads", "batch", "p50 ms", "p95 ms"), timed)


def _milliseconds(row: Mapping[str, float]) -> tuple[str, str]:
    return f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}"


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What one run says, and no more.

    >>> verdict({"teacher": {"top1": 90.0, "parameters": 30}, "student": {"top1": 89.0, "parameters": 10}})
    ["The student has 1/3.0 of the teacher's parameters and 1.00 points less top-1."]
    """
    teacher, student = summary["teacher"], summary["student"]
    ratio = teacher["parameters"] / student["parameters"]
    size = f"1/{ratio:.1f} of" if ratio > 1 else f"{1 / ratio:.2f} times"
    gained = f" and {_than(student, teacher)} top-1" if "top1" in teacher and "top1" in student else ""
    lines = [f"The student has {size} the teacher's parameters{gained}."]
    what = summary.get("method", "Factor Transfer")
    if "baseline" in summary and what != LABELS_ALONE:
        against = _than(student, summary["baseline"])
        gave = f"{what[:1].upper()}{what[1:]} gave it {against} than training alone did."
        lines.append(f"{gave} One seed is no proof: try several.")
    return lines


def _than(one: Mapping[str, float], other: Mapping[str, float]) -> str:
    difference = one["top1"] - other["top1"]
    return f"{abs(difference):.2f} points {'more' if difference >= 0 else 'less'}"
