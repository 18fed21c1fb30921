"""The result for a person: what was gained, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factor_transfer.method.presets import BASELINE
from factor_transfer.training.summary import STAGES, NetworkSummary, Summary, read_summary
from factor_transfer.util.arguments import Size, written
from factor_transfer.util.console import say, table, warn


def show(folder: Path) -> None:
    """Print what a finished run shows, its table, and where its student lies."""
    summary = read_summary(folder)
    for line in verdict(summary):
        say(line)
    metric = summary.metric
    rows = [
        (
            summary.label(role),
            metric.number(summary.value(role)),
            f"{network.parameters:,}",
            f"{network.size_bytes / 1e6:.2f}",
            f"{network.latency_ms:.2f}",
        )
        for role, network in summary.networks.items()
    ]
    header = ("", metric.heading, "parameters", "MB", "ms / image")
    title = f"{summary.teacher.name} to {summary.student.name}, {summary.data.name}"
    table(f"{title}: {summary.data.validation:,} validation images", header, rows)
    taken = summary.seconds
    stages = [*(stage for stage in STAGES if stage in taken), *sorted(taken.keys() - set(STAGES))]
    seconds = "  ".join(f"{stage} {taken[stage]:.0f} s" for stage in stages)
    say(f"trained in: {seconds}")
    if summary.compute is not None:
        say(f"compute of the student, in multiply-adds: {summary.compute.line()}")
    program = f"{folder / 'student.pt2'} (needs only torch), " if "pt2_difference" in summary.student.more else ""
    say(f"student: {program}{folder / 'student.safetensors'}")
    if (folder / "report.html").exists():
        say(f"report: {folder / 'report.html'}")
    say(f"all of it: {folder / 'summary.json'}")


def show_evaluation(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what `evaluate` measured."""
    summary = read_summary(folder)
    rows = [
        (summary.label(role), *(metric.number(values.get(metric.key)) for metric in summary.metrics))
        for role, values in found.items()
    ]
    table(str(folder), ("", *(metric.heading for metric in summary.metrics)), rows)
    parts = {summary.label(role): values["classes"] for role, values in found.items() if "classes" in values}
    if parts:
        names = next(iter(parts.values()))
        by_class = [(name, *(summary.metric.number(each[name]) for each in parts.values())) for name in names]
        table(f"{summary.metric.heading}, by class", ("", *parts), by_class)


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
    """Print what `export` wrote and measured, as `scored` gives it."""
    rows = [
        (
            row["file"],
            row["needs"],
            f"{row['bytes'] / 1e6:.2f}",
            "the weights" if row["score"] is None else found["metric"].number(row["score"]),
            "0" if row["max_difference"] is None else f"{row['max_difference']:.1e}",
        )
        for row in found["formats"]
    ]
    reference = "" if found["reference"] is None else f", {found['metric'].shown(found['reference'])}"
    student = f"the trained student{reference} on {found['images']:,} images"
    title = f"{folder}: against {student}; the largest difference of a logit"
    table(title, ("file", "needs", "MB", "the same, %" if not reference else found["heading"], "difference"), rows)
    timed = [
        (f"{row['network']}, {row['format']}", str(row["threads"]), str(row["batch"]), *_milliseconds(row))
        for row in found["latency"]
    ]
    if timed:
        table("latency on this machine", ("", "threads", "batch", "p50 ms", "p95 ms"), timed)


def _milliseconds(row: Mapping[str, float]) -> tuple[str, str]:
    return f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}"


def verdict(summary: Summary) -> list[str]:
    """What one run says, and no more."""
    teacher, student, what = summary.teacher, summary.student, summary.method
    ratio = teacher.parameters / student.parameters
    size = f"1/{ratio:.1f} of" if ratio > 1 else f"{1 / ratio:.2f} times"
    gained = _against(summary, teacher, " and {}")
    lines = [f"The student has {size} the teacher's parameters{gained}."]
    if summary.baseline is not None and what != BASELINE:
        gave = f"{what[:1].upper()}{what[1:]} gave it {{}} than the baseline has. One seed is no proof: try several."
        lines.append(_against(summary, summary.baseline, gave))
    return [line for line in lines if line]


def _against(summary: Summary, other: NetworkSummary, sentence: str) -> str:
    """The sentence with the student's difference to another network; empty where one of them was not measured."""
    metric, own = summary.metric, summary.student.measured
    if not (metric.key in own and metric.key in other.measured):
        return ""
    return sentence.format(metric.against(own[metric.key], other.measured[metric.key]))
