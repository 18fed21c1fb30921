"""The report: one HTML file for a person who must decide whether the small network is good enough.

Everything on the page comes from the run folder; `findings` adds what needs a forward pass. jinja2 escapes every name.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from factor_transfer.config import Config, DataConfig
from factor_transfer.networks.pair import Modules
from factor_transfer.regime import Regime
from factor_transfer.report.figures import Point, bars, dumbbell, heat, lines, scatter
from factor_transfer.report.findings import findings
from factor_transfer.report.masks import hexadecimal
from factor_transfer.report.terminal import verdict
from factor_transfer.tasks.classification import Classification
from factor_transfer.tasks.metric import Metric
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import Run
from factor_transfer.training.summary import STAGES, Summary, read_summary
from factor_transfer.util.arguments import written
from factor_transfer.util.checks import flag
from factor_transfer.util.files import read_json, write_atomic

TERMS = ("factor_transfer", "attention_transfer", "soft_targets", "hint")
"""Names of terms in runs whose summary does not list them."""


def write_report(folder: Path, modules: Modules | None = None, engine: Engine | None = None) -> Path:
    """Make `report.html` of a finished run.

    Args:
        folder: the run.
        modules: networks that were given as modules, by role.
        engine: where to compute what `findings.json` does not hold yet.

    Returns:
        The file.

    Raises:
        RunError: the run is not finished.
    """
    path = folder / "report.html"
    write_atomic(path, rendered("report.html.jinja", report_values(folder, findings(folder, modules, engine))))
    return path


def report_values(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows, from the run folder and its findings."""
    run, summary = Run(folder), read_summary(folder)
    exports = saved_exports(folder, summary)
    roles, classes = list(summary.networks), summary.data.classes
    networks = [
        {
            "label": summary.label(role),
            "kind": role,
            "metrics": [metric.number(network.measured.get(metric.key)) for metric in summary.metrics],
            "parameters": network.parameters,
            "size_bytes": network.size_bytes,
            "latency_ms": network.latency_ms,
        }
        for role, network in summary.networks.items()
    ]
    intervals = _intervals(summary, found)
    answering = [role for role in roles if role in found.get("overlap", found.get("right", {}))]
    per_class = _per_class(classes, answering, found)
    return {
        "title": f"{summary.teacher.name} to {summary.student.name}: {summary.method}",
        "method": summary.method,
        "summary": summary,
        "measured": all(summary.value(role) is not None for role in roles),
        "verdict": " ".join(verdict(summary)),
        "tiles": _tiles(summary, intervals),
        "trade": _trade_offs(summary, exports),
        "missing": {part: " ".join(reason.split()) for part, reason in found["missing"].items()},
        "networks": networks,
        "intervals": intervals,
        "exports": exports,
        "latency": _latency_rows(exports),
        "curves": _curves(run, summary),
        "trained": [(stage, summary.seconds[stage]) for stage in STAGES if summary.seconds.get(stage, 0) >= 0.5],
        "reconstruction": _reconstruction(found.get("reconstruction")),
        "examples": found.get("examples", []),
        "cosine": found.get("cosine"),
        "similarity": found.get("similarity"),
        "classes": classes,
        "size": written(summary.data.img_size),
        "per_class": per_class,
        "answering": [network for role, network in zip(roles, networks, strict=True) if role in answering],
        "class_low": _lowest(per_class),
        "disagreements": found.get("disagreements"),
        "only": found.get("only", {}),
        "masks": found.get("masks", []),
        "differing": found.get("differing"),
        "colours": hexadecimal(len(classes)) if found.get("masks") else [],
        "images": found.get("images"),
        "command": repeat_command(summary.settings),
        "proof": _proof(summary),
        "fingerprints": list(summary.fingerprints.items()),
        "settings": _settings(summary.settings),
    }


def saved_exports(folder: Path, summary: Summary) -> dict[str, Any] | None:
    """What `factor-transfer export` found for this very student; None where there is nothing."""
    path = folder / "export" / "exports.json"
    found: dict[str, Any] | None = read_json(path) if path.exists() else None
    if found is None or found.get("student") != (summary.student.fingerprint or found.get("student")):
        return None
    return scored(found)


def scored(exports: Mapping[str, Any]) -> dict[str, Any]:
    """`exports.json` with its `metric`, the `reference` (the trained student's value), and a `score` for each row.

    The score is the headline metric; without labels it is how far the file agrees with the trained student, in percent.
    It is None where the file has the same weights. A file that names no metric is of a run of classification.
    """
    metric = Metric(**exports["metric"]) if exports.get("metric") else Classification.metrics[0]
    reference = exports.get(f"reference_{metric.key}")
    shown = metric if reference is not None else replace(metric, label=exports.get("measure", metric.label), unit="%")
    rows = [
        {**row, "score": row.get("agreement") if row.get(metric.key) is None else row[metric.key]}
        for row in exports["formats"]
    ]
    own = {"metric": shown, "key": metric.key, "reference": reference, "heading": shown.heading}
    return {"measure": metric.label, **exports, **own, "formats": rows}


def repeat_command(settings: Mapping[str, Any], command: str = "distill", kind: type[Config] = Config) -> str:
    """The command that makes the run again: what differs from the defaults of `kind`.

    >>> repeat_command({"data": "my photos", "teacher": "a", "student": "b", "epochs": 20, "baseline": True})
    "factor-transfer distill --data 'my photos' --teacher a --student b --epochs 20 --baseline"
    """
    import json

    parts = ["factor-transfer", command]
    for each in fields(kind):
        if each.name not in settings or each.name in {"out", "overwrite"}:
            continue
        value = settings[each.name]
        default = list(each.default) if isinstance(each.default, tuple) else each.default
        if value == default:
            continue
        if isinstance(value, bool):
            parts.append(flag(each.name) if value else flag(f"no_{each.name}"))
        elif isinstance(value, dict):
            parts += [flag(each.name), json.dumps(value)]
        else:
            first, *others = map(str, value if isinstance(value, list) else [value])
            # What begins with a hyphen would be taken for a flag.
            parts += [f"{flag(each.name)}={first}"] if first.startswith("-") else [flag(each.name), first]
            parts += others
    return shlex.join(parts)


def _tiles(summary: Summary, intervals: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    teacher, student, metric = summary.teacher, summary.student, summary.metric
    own, theirs, gain = summary.value("student"), summary.value("teacher"), summary.gain("baseline")
    tiles = []
    if own is not None and theirs is not None:
        both = f"of the teacher's {metric.label} kept: {metric.number(own)} of {metric.shown(theirs)}"
        kept = {"value": f"{100 * own / theirs:.1f} %" if theirs else "-", "text": both}
        plain = {"value": metric.shown(own), "text": f"{metric.label}; the teacher has {metric.shown(theirs)}"}
        tiles.append(kept if metric.higher_is_better else plain)
    size = f"{student.size_bytes / 1e6:.2f} MB of weights, {teacher.size_bytes / 1e6:.2f} MB before"
    speed = f"{student.latency_ms:.2f} ms for one image on this CPU, {teacher.latency_ms:.2f} ms before"
    tiles += [
        {"value": _times(teacher.size_bytes / student.size_bytes, "smaller", "larger"), "text": size},
        {"value": _times(teacher.latency_ms / student.latency_ms, "faster", "slower"), "text": speed},
    ]
    if gain is not None:
        sure = next((f" ({row['span']})" for row in intervals if row["other"] == "baseline"), "")
        text = f"{'better' if gain >= 0 else 'worse'} than the baseline in {metric.label}{sure}"
        tiles.append({"value": metric.signed(gain), "text": text})
    return tiles


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f}x {more}" if ratio >= 1 else f"{1 / ratio:.1f}x {less}"


def _trade_offs(summary: Summary, exports: Mapping[str, Any] | None) -> list[Markup]:
    """The headline metric against latency, and against size; int8 beside the others where one runtime measured all."""
    metric = summary.metric
    values = {role: value for role in summary.networks if (value := summary.value(role)) is not None}
    if not values:
        return []
    tips = {role: f"{summary.label(role)}: {metric.shown(value)}" for role, value in values.items()}
    sizes = {role: summary.networks[role].size_bytes / 1e6 for role in values}
    times, unit = {role: summary.networks[role].latency_ms for role in values}, "one image, ms (torch)"
    int8 = next((row for row in (exports or {}).get("formats", []) if row["format"] == "onnx-int8"), None)
    if int8 is not None and exports is not None and int8.get(metric.key) is not None:
        values["int8"], sizes["int8"] = int8[metric.key], int8["bytes"] / 1e6
        tips["int8"] = f"student in int8: {metric.shown(values['int8'])}"
        timed = {
            (row["network"], row["format"]): row["p50_ms"]
            for row in exports["latency"]
            if row["batch"] == 1 and row["threads"] == 1
        }
        if timed.keys() >= {("teacher", "onnx"), ("student", "onnx"), ("student", "onnx-int8")}:
            unit = "one image, ms (onnxruntime, 1 thread, p50)"
            times = {role: timed["teacher" if role == "teacher" else "student", "onnx"] for role in times}
            times["int8"] = timed["student", "onnx-int8"]

    def plot(what: str, x: Mapping[str, float], x_unit: str, x_label: str) -> Markup:
        points = [Point(kind, kind, x[kind], values[kind], f"{tips[kind]}, {x[kind]:.2f} {x_unit}") for kind in x]
        return scatter(f"{name_of(metric)} against {what}", points, x_label, metric.axis, limit_of(metric))

    return [plot("latency", times, "ms", unit), plot("size", sizes, "MB", "weights or file, MB")]


def name_of(metric: Metric) -> str:
    """A metric at the head of a title."""
    return metric.label[:1].upper() + metric.label[1:]


def limit_of(metric: Metric) -> float:
    """Where the axis of a metric ends: percent end at 100."""
    return 100.5 if metric.unit == "%" else math.inf


def _latency_rows(exports: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if exports is None:
        return []
    return [
        {**row, "kind": "teacher" if row["network"] == "teacher" else "int8" if "int8" in row["format"] else "student"}
        for row in exports["latency"]
    ]


def _curves(run: Run, summary: Summary) -> list[Markup]:
    """Every stage's curves."""
    rows, metric = {stage: run.metrics(stage) for stage in STAGES}, summary.metric
    found, key, value = [], f"validation_{metric.key}", summary.value("teacher")

    def column(stage: str, name: str) -> list[float | None]:
        return [row.get(name) for row in rows[stage]]

    shown = {
        role: (role, column(role, key)) for role in ("student", "baseline") if any(key in row for row in rows[role])
    }
    if shown:
        level = ("teacher", "teacher", value) if value is not None else None
        title = f"Validation {metric.label}"
        found.append(lines(title, shown, metric.axis, level=level, digits=4, from_zero=False))
    supervised = summary.loss_name
    others = [term["name"] for term in reversed(summary.terms) if term["name"] != supervised] or TERMS
    for stage in ("student", "baseline", "teacher"):
        if rows[stage]:
            there = rows[stage][-1]
            named = dict.fromkeys([supervised] if supervised in there else [], stage)
            named |= dict.fromkeys([name for name in others if name in there][:1], f"{stage} second")
            named = named or {"loss": stage}  # a term of the user's own is the only one
            terms = {name.replace("_", " "): (style, column(stage, name)) for name, style in named.items()}
            found.append(lines(f"Training loss: {summary.label(stage)}", terms, "loss"))
    if rows["hint"]:
        found.append(lines("Training loss: hint", {"regression": ("student", column("hint", "loss"))}, "loss"))
    if rows["paraphraser"]:
        loss = {"reconstruction": ("teacher", column("paraphraser", "loss"))}
        found.append(lines("Training loss: paraphraser", loss, "reconstruction loss"))
    for name, title, unit in (
        ("lr", "Learning rate at the end of each pass", "learning rate"),
        ("gradient_norm", "Norm of the gradient, mean of a pass", "L2 norm"),
    ):
        there = {
            role: (role, column(role, name))
            for role in ("student", "baseline")
            if rows[role] and name in rows[role][-1] and not (name == "lr" and role == "baseline")  # it is the same
        }
        if there:
            found.append(lines(title, there, unit))
    return found


def _reconstruction(found: Mapping[str, Any] | None) -> list[Markup]:
    if found is None:
        return []
    ordered = sorted(found["per_channel"], reverse=True)
    unit = "error / mean magnitude"
    return [
        bars("Reconstruction error by channel, largest first", ordered, "channel, sorted", unit, "teacher"),
        heat("Reconstruction error by place", found["per_place"], unit),
    ]


def _per_class(classes: Sequence[str], roles: Sequence[str], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy of each class and role, sorted by what the student lost, or by what it knows where that is not known.

    Of segmentation it is the intersection over the union, and what is counted are pixels.
    """
    if not roles:
        return []
    rows: list[dict[str, Any]] = []
    for place, (name, images) in enumerate(zip(classes, found["count"], strict=True)):
        if not images:
            continue
        if "overlap" in found:
            at = {role: found["overlap"][role][place] for role in roles}
        else:
            at = {role: 100 * found["right"][role][place] / images for role in roles}
        similarity = found.get("similarity")
        row = {"name": name, "images": images, "accuracy": list(at.values()), "at": at}
        for gap, other in (("lost", "teacher"), ("gained", "baseline")):
            row[gap] = at["student"] - at[other] if {"student", other} <= at.keys() else None
        rows.append({**row, "similarity": similarity[place] if similarity else None})
    rows.sort(key=lambda row: (row["accuracy"][-1] if row["lost"] is None else row["lost"], row["name"]))
    low = _lowest(rows)
    for row in rows:
        row["plot"] = dumbbell(list(row["at"].items()), low)
    return rows


def _lowest(rows: Sequence[Mapping[str, Any]]) -> float:
    """Where the table's small plots begin: the lowest accuracy, rounded down to tens."""
    return min(90.0, 10 * math.floor(min((min(row["accuracy"]) for row in rows), default=0) / 10))


def _intervals(summary: Summary, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired 95 % intervals, over the validation images, of how much better the student is than the others."""
    metric, rows = summary.metric, []
    for other, each in found.get("differences", {}).items():
        gain, *ends = (metric.gain(each[name], 0.0) for name in ("mean", "low", "high"))
        low, high = sorted(ends)
        span = f"{low:+.{metric.digits}f} to {high:+.{metric.digits}f}"
        rows.append({"other": other, "gain": f"{gain:+.{metric.digits}f}", "span": span})
    return rows


def _proof(summary: Summary) -> dict[str, Any]:
    before, after = summary.fingerprints.get("teacher"), summary.teacher.fingerprint
    rows = [("before the first step", before), ("when the run ended", after or "not written down by that version")]
    same = before == after
    text = (
        "SHA-256 over names, types, shapes and values of its weights and buffers. It was compared after every stage "
        "too, " + ("and is the same." if same else "where a difference ends the run.")
    )
    return {"rows": rows, "text": text}


def _settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    defaults = {each.name: None if each.default is MISSING else each.default for each in fields(Config)}
    helps = described()
    rows = []
    for name, value in settings.items():
        default = defaults.get(name)
        default = list(default) if isinstance(default, tuple) else default
        shown = "default" if value is None else value
        rows.append({"flag": flag(name), "value": shown, "changed": value != default, "help": helps.get(name, "")})
    return rows


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """A file from a template; in HTML every value is escaped but the plots, which escape their own."""
    return _templates().get_template(template).render({"version": version("factor-transfer"), **values})


@cache
def _templates() -> Environment:
    """Where templates come from: each is compiled once."""
    return Environment(
        loader=PackageLoader("factor_transfer.report"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def described() -> dict[str, str]:
    """The help of every setting: the docstring under its field.

    >>> described()["lr"]
    'Learning rate.'
    """
    from docstring_parser import parse_from_object  # which cyclopts reads the same docstrings with

    docs = [each for kind in (DataConfig, Regime, Config) for each in parse_from_object(kind).params]
    return {each.arg_name: " ".join((each.description or "").split()) for each in docs}
