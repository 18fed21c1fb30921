"""The report: one HTML file for a person who must decide whether the small network is good enough.

Everything on the page comes from the run folder; `findings` adds what needs a forward pass. jinja2 escapes every name.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from factor_transfer.config import Config, described
from factor_transfer.networks.pair import Modules
from factor_transfer.report.figures import Point, bars, dumbbell, heat, lines, scatter
from factor_transfer.report.findings import findings
from factor_transfer.report.terminal import LABELS, STAGES, label, verdict
from factor_transfer.training.engine import Engine
from factor_transfer.training.finished import ROLES
from factor_transfer.training.run_folder import Run, saved_summary
from factor_transfer.util.arguments import written
from factor_transfer.util.checks import flag
from factor_transfer.util.files import read_json, write_atomic

KINDS = {"teacher": "teacher", "baseline": "alone", "student": "student"}
"""What a role is called in plots, and in the style sheet."""

OTHERS = ("factor_transfer", "attention_transfer", "soft_targets", "hint")
"""Terms of which the first that there is is shown beside the labels' own."""


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
    run, summary = Run(folder), saved_summary(folder)
    exports = saved_exports(folder, summary)
    roles = [role for role in ROLES if role in summary]
    networks = [
        {
            "top1": None,
            "loss": None,
            **summary[role],
            "label": label(summary, role),
            "kind": KINDS[role],
        }
        for role in roles
    ]
    classes, method = summary["data"]["classes"], summary.get("method", "Factor Transfer")
    intervals = _intervals(summary, found)
    answering = [role for role in roles if role in found.get("right", {})]
    per_class = _per_class(classes, answering, found)
    return {
        "title": f"{summary['teacher']['name']} to {summary['student']['name']}: {method}",
        "method": method,
        "summary": summary,
        "verdict": " ".join(verdict(summary)),
        "tiles": _tiles(summary, intervals),
        "trade": _trade_offs(summary, roles, exports),
        "missing": {part: " ".join(reason.split()) for part, reason in found["missing"].items()},
        "networks": networks,
        "intervals": intervals,
        "exports": exports,
        "latency": _latency_rows(exports),
        "curves": _curves(run, summary),
        "trained": [(stage, summary["seconds"][stage]) for stage in STAGES if summary["seconds"].get(stage, 0) >= 0.5],
        "reconstruction": _reconstruction(found.get("reconstruction")),
        "examples": found.get("examples", []),
        "cosine": found.get("cosine"),
        "similarity": found.get("similarity"),
        "classes": classes,
        "size": written(summary["data"]["img_size"]),
        "per_class": per_class,
        "answering": [network for role, network in zip(roles, networks, strict=True) if role in answering],
        "class_low": _lowest(per_class),
        "disagreements": found.get("disagreements"),
        "only": found.get("only", {}),
        "images": found.get("images"),
        "command": repeat_command(summary["settings"]),
        "proof": _proof(summary),
        "fingerprints": [(name, value) for name, value in summary["fingerprints"].items()],
        "settings": _settings(summary["settings"]),
    }


def saved_exports(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `factor-transfer export` found for this very student; None where there is nothing."""
    path = folder / "export" / "exports.json"
    found: dict[str, Any] | None = read_json(path) if path.exists() else None
    if found is None or found.get("student") != summary["student"].get("fingerprint", found.get("student")):
        return None
    return scored(found)


def scored(exports: Mapping[str, Any]) -> dict[str, Any]:
    """`exports.json`, each row with its `score` in percent (None: the same weights) and the `measure` named.

    It is top-1; without labels it is how far the file agrees with the trained student. Early versions had top-1 alone.
    """
    rows = [
        {**row, "score": row["top1"] if row["top1"] is not None else row.get("agreement")} for row in exports["formats"]
    ]
    return {"measure": "top-1", **exports, "formats": rows}


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


def _tiles(summary: Mapping[str, Any], intervals: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    teacher, student = summary["teacher"], summary["student"]
    tiles = []
    if _measured(summary, "teacher", "student"):
        kept = f"of the teacher's accuracy kept: {student['top1']:.2f} of {teacher['top1']:.2f} % top-1"
        tiles.append({"value": f"{100 * student['top1'] / teacher['top1']:.1f} %", "text": kept})
    size = f"{student['size_bytes'] / 1e6:.2f} MB of weights, {teacher['size_bytes'] / 1e6:.2f} MB before"
    speed = f"{student['latency_ms']:.2f} ms for one image on this CPU, {teacher['latency_ms']:.2f} ms before"
    tiles += [
        {"value": _times(teacher["size_bytes"] / student["size_bytes"], "smaller", "larger"), "text": size},
        {"value": _times(teacher["latency_ms"] / student["latency_ms"], "faster", "slower"), "text": speed},
    ]
    if _measured(summary, "baseline", "student"):
        gain = student["top1"] - summary["baseline"]["top1"]
        sure = next((f" ({row['low']:+.2f} to {row['high']:+.2f})" for row in intervals if "alone" in row["label"]), "")
        tiles.append({"value": f"{gain:+.2f} points", "text": f"against the same student trained alone{sure}"})
    return tiles


def _measured(summary: Mapping[str, Any], *roles: str) -> bool:
    """Whether top-1 of these networks is known: not without labels, nor of a network without a head."""
    return all("top1" in summary.get(role, {}) for role in roles)


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f}x {more}" if ratio >= 1 else f"{1 / ratio:.1f}x {less}"


def _trade_offs(summary: Mapping[str, Any], roles: Sequence[str], exports: Mapping[str, Any] | None) -> list[Markup]:
    """Accuracy against latency, and against size; int8 beside the others where it was measured in one runtime."""
    by_time, by_size = [], []
    roles = [role for role in roles if _measured(summary, role)]
    if not roles:
        return []
    for role in roles:
        there, kind = summary[role], KINDS[role]
        tip = f"{label(summary, role)}: {there['top1']:.2f} %"
        latency, size = there["latency_ms"], there["size_bytes"] / 1e6
        by_time.append(Point(kind, kind, latency, there["top1"], f"{tip}, {latency:.2f} ms"))
        by_size.append(Point(kind, kind, size, there["top1"], f"{tip}, {size:.2f} MB"))
    int8 = next((row for row in (exports or {}).get("formats", []) if row["format"] == "onnx-int8"), None)
    unit = "one image, ms (torch)"
    if int8 is not None and exports is not None and int8["top1"] is not None:
        size, tip = int8["bytes"] / 1e6, f"student in int8: {int8['top1']:.2f} %"
        by_size.append(Point("int8", "int8", size, int8["top1"], f"{tip}, {size:.2f} MB"))
        timed = {
            (row["network"], row["format"]): row["p50_ms"]
            for row in exports["latency"]
            if row["batch"] == 1 and row["threads"] == 1
        }
        if timed.keys() >= {("teacher", "onnx"), ("student", "onnx"), ("student", "onnx-int8")}:
            unit = "one image, ms (onnxruntime, 1 thread, p50)"
            at = {role: timed["teacher" if role == "teacher" else "student", "onnx"] for role in roles}
            by_time = [
                Point(
                    KINDS[role], KINDS[role], at[role], top1, f"{label(summary, role)}: {top1:.2f} %, {at[role]:.2f} ms"
                )
                for role, top1 in ((role, summary[role]["top1"]) for role in roles)
            ]
            latency = timed["student", "onnx-int8"]
            by_time.append(Point("int8", "int8", latency, int8["top1"], f"{tip}, {latency:.2f} ms"))
    return [
        scatter("Accuracy against latency", by_time, unit, "top-1, %"),
        scatter("Accuracy against size", by_size, "weights or file, MB", "top-1, %"),
    ]


def _latency_rows(exports: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if exports is None:
        return []
    return [
        {**row, "kind": "teacher" if row["network"] == "teacher" else "int8" if "int8" in row["format"] else "student"}
        for row in exports["latency"]
    ]


def _curves(run: Run, summary: Mapping[str, Any]) -> list[Markup]:
    """Every stage's curves."""
    rows = {stage: run.metrics(stage) for stage in ("teacher", "paraphraser", "hint", "student", "baseline")}
    found = []

    def column(stage: str, name: str) -> list[float | None]:
        return [row.get(name) for row in rows[stage]]

    shown = {
        KINDS[role]: (KINDS[role], column(role, "validation_top1"))
        for role in ("student", "baseline")
        if any("validation_top1" in row for row in rows[role])
    }
    if shown:
        level = ("teacher", "teacher", summary["teacher"]["top1"]) if _measured(summary, "teacher") else None
        found.append(lines("Validation top-1", shown, "top-1, %", level=level, digits=4, from_zero=False))
    for stage, kind in (("student", "student"), ("baseline", "alone"), ("teacher", "teacher")):
        if rows[stage]:
            others = [name for name in OTHERS if name in rows[stage][-1]]
            named = {"cross_entropy": kind} | dict.fromkeys(others[:1], f"{kind} second")
            if not named.keys() & rows[stage][-1].keys():  # a term of the user's own alone
                named = {"loss": kind}
            terms = {
                name.replace("_", " "): (style, column(stage, name))
                for name, style in named.items()
                if name in rows[stage][-1]
            }
            found.append(lines(f"Training loss: {label(summary, stage)}", terms, "loss"))
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
            KINDS[role]: (KINDS[role], column(role, name))
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
    """Accuracy of each class and role, sorted by what the student lost, or by what it knows where that is not known."""
    if not roles:
        return []
    rows: list[dict[str, Any]] = []
    for place, (name, images) in enumerate(zip(classes, found["count"], strict=True)):
        if not images:
            continue
        at = {role: 100 * found["right"][role][place] / images for role in roles}
        similarity = found.get("similarity")
        row = {"name": name, "images": images, "accuracy": list(at.values()), "at": at}
        for gap, other in (("lost", "teacher"), ("gained", "baseline")):
            row[gap] = at["student"] - at[other] if {"student", other} <= at.keys() else None
        rows.append({**row, "similarity": similarity[place] if similarity else None})
    rows.sort(key=lambda row: (row["accuracy"][-1] if row["lost"] is None else row["lost"], row["name"]))
    low = _lowest(rows)
    for row in rows:
        row["plot"] = dumbbell([(KINDS[role], value) for role, value in row["at"].items()], low)
    return rows


def _lowest(rows: Sequence[Mapping[str, Any]]) -> float:
    """Where the table's small plots begin: the lowest accuracy, rounded down to tens."""
    return min(90.0, 10 * math.floor(min((min(row["accuracy"]) for row in rows), default=0) / 10))


def _intervals(summary: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Paired 95 % intervals of differences in top-1, over the validation images."""
    rows = []
    for other in ("teacher", "baseline"):
        better, worse = (found.get("only", {}).get(name) for name in (f"student not {other}", f"{other} not student"))
        if better is None or worse is None or other not in summary:
            continue
        n, difference = found["images"], better - worse
        half = 1.96 * math.sqrt(max(better + worse - difference**2 / n, 0)) / n
        points = difference / n
        limits = {"points": 100 * points, "low": 100 * (points - half), "high": 100 * (points + half)}
        rows.append({"label": f"student, against {LABELS[other].replace('student', 'the student')}", **limits})
    return rows


def _proof(summary: Mapping[str, Any]) -> dict[str, Any]:
    before, after = summary["fingerprints"].get("teacher"), summary["teacher"].get("fingerprint")
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
    made = Environment(
        loader=PackageLoader("factor_transfer.report"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return made.get_template(template).render({"version": version("factor-transfer"), **values})
