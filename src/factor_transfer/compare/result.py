"""What a comparison found: compare.json, the same in words (compare.md), and the table on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factor_transfer.compare.plan import REFERENCES, CompareConfig, Plan, PlannedRun
from factor_transfer.compare.statistics import Difference, Gap, Scores, against, gap_closed, spread, verdict
from factor_transfer.config import FIELDS, plain
from factor_transfer.method.presets import ALIASES
from factor_transfer.report.html import repeat_command
from factor_transfer.tasks.classification import Classification
from factor_transfer.tasks.metric import Metric
from factor_transfer.training.summary import Summary, read_summary
from factor_transfer.util.console import say, table
from factor_transfer.util.errors import RunError
from factor_transfer.util.files import read_json, write_atomic, write_json

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

FIGURES, DIFFERENCES = (0, 1, 2, 7, 8, 9), (0, 3, 4, 5, 6)
"""The columns of each of the two tables on a terminal."""


def outcome(plan: Plan) -> dict[str, Any]:
    """Everything that is known of a comparison so far, as JSON holds it.

    Raises:
        RunError: runs that are compared did not see the same images, teacher or first weights.
    """
    found = {run: summary for run in plan.runs if (summary := _summary(run)) is not None}
    _check_alike(plan, found)
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
        "data": {key: value for key, value in asdict(first.data).items() if key != "classes"} if first else {},
        "methods": _methods(plan, found, metric),
        "shared_seconds": _shared_seconds(found.values()),
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
            }
            for run, summary in found.items()
        ],
    }


def write_outcome(folder: Path, found: Mapping[str, Any]) -> None:
    """Write compare.json and compare.md."""
    write_json(folder / "compare.json", found)
    write_atomic(folder / "compare.md", in_words(found))


def show_outcome(folder: Path, found: Mapping[str, Any]) -> None:
    """Print the figures, the differences and the verdicts: two tables, since a terminal is narrow."""
    there = [each for each in found["methods"] if each["n"]]
    compared = [each for each in there if _compared(each)]
    metric = _metric(found)
    _table(_title(found), FIGURES, there, metric)
    if compared:
        _table(f"gains ({metric.points or metric.label}), with their 95 % intervals", DIFFERENCES, compared, metric)
    for line in _verdicts(found):
        say(line)
    say(f"scored on {found['scored_on']}")
    say(f"all of it: {folder / 'compare.md'}, {folder / 'compare.json'}")


def _table(title: str, columns: Sequence[int], methods: Sequence[Mapping[str, Any]], metric: Metric) -> None:
    header, rows = _header(metric), [_row(each, metric) for each in methods]
    table(title, [header[place] for place in columns], [[row[place] for place in columns] for row in rows])


def _metric(found: Mapping[str, Any]) -> Metric:
    """What the methods are compared by; a file that names none is of classification."""
    return Metric(**found["metric"]) if found.get("metric") else Classification.metrics[0]


def _header(metric: Metric) -> tuple[str, ...]:
    return ("", "n", metric.heading, "to baseline", "p", "to kd", "p", "gap closed", "s / run", "x baseline")


def _compared(each: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The differences of a method that there are."""
    return [each[key] for key in KEYS if each[key]]


def _name(name: str) -> str:
    """A variant of an earlier comparison, by its method's name of today."""
    method, *rest = name.split(" ", 1)
    return " ".join([ALIASES.get(method, method), *rest])


def in_words(found: Mapping[str, Any]) -> str:
    """compare.md."""
    methods = [each for each in found["methods"] if each["n"]]
    metric, teacher = _metric(found), found["teacher"] or {}
    seeds = sorted({seed for each in methods for seed in each[metric.key]}, key=int)
    value = teacher.get(metric.key)
    measured = "" if value is None else f", {metric.label} {metric.shown(value)}"
    done = f"{found['runs_finished']} of {found['runs_planned']} runs"
    raw = [(_name(each["name"]), *(metric.number(each[metric.key].get(seed)) for seed in seeds)) for each in methods]
    machines = "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in found["environments"])
    parts = [
        f"# {_title(found)}",
        f"Teacher: {teacher.get('name')}, {teacher.get('parameters'):,} parameters{measured}. "
        f"{'All ' if found['complete'] else ''}{done} are finished."
        if methods
        else f"No run is finished yet ({done}).",
        _markdown(_header(metric), [_row(each, metric) for each in methods]),
        "\n".join(f"- {line}" for line in _verdicts(found)),
        _note(found),
        f"## Every run, {metric.heading}",
        _markdown(("", *(f"seed {seed}" for seed in seeds)), raw),
        "## Again",
        f"```\n{found['command']}\n```",
        f"Made on: {machines or 'nothing yet'}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def tabulated(folder: Path) -> dict[str, Any] | None:
    """Table, verdicts and note of the comparison in a folder, for a page; None where there is none."""
    if not (folder / "compare.json").exists():
        return None
    found = read_json(folder / "compare.json")
    metric = _metric(found)
    rows = [_row(each, metric) for each in found["methods"] if each["n"]]
    return {"header": _header(metric), "rows": rows, "verdicts": _verdicts(found), "note": _note(found)}


# -- the figures


def _methods(plan: Plan, found: Mapping[PlannedRun, Summary], metric: Metric) -> list[dict[str, Any]]:
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
    to = {
        other: {
            each.name: (reference, scores[reference])
            for each in plan.variants
            if (reference := plan.reference(each, method)) is not None
            and not (other == "kd" and each.method == REFERENCES["alone"])
        }
        for other, method in REFERENCES.items()
    }
    differences = {
        other: against(scores, {name: each for name, (_, each) in named.items()}) for other, named in to.items()
    }
    rows = []
    for each in plan.variants:
        baseline, teacher = to["alone"].get(each.name), teachers.get(each.name)
        gap = None
        if baseline is not None and teacher is not None and not _seen_by_teacher(plan):
            gap = gap_closed(scores[each.name], baseline[1], metric.gain(teacher, 0.0))
        rows.append(
            {
                "name": each.name,
                "method": each.method,
                "swept": plain(each.swept),
                "terms": terms.get(each.name, []),
                metric.key: {str(seed): value for seed, value in values[each.name].items()},
                **_figures(values[each.name], seconds[each.name], seconds[baseline[0]] if baseline else None),
                "gap_closed": asdict(gap) if gap else None,
                **{f"to_{other}": _to(to[other], differences[other], each.name, metric) for other in REFERENCES},
            }
        )
    return rows


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


def _to(
    named: Mapping[str, tuple[str, Scores]], differences: Mapping[str, Difference], name: str, metric: Metric
) -> Any:
    if name not in differences:
        return None
    found, tested = differences[name], sum(each.p is not None for each in differences.values())
    other = named[name][0]
    said = verdict(found, other, tested, metric.points or metric.label, metric.digits)
    return {"what": other, **found.to_dict(), "verdict": said}


def _seen_by_teacher(plan: Plan) -> bool:
    """Whether a teacher that came with its weights may have been trained on the images that are scored on."""
    return plan.runs[0].config.validate_on == "train-holdout" and not plan.config.teacher_epochs


def _check_alike(plan: Plan, found: Mapping[PlannedRun, Summary]) -> None:
    variants = {each.name: each for each in plan.variants}
    there = {(run.variant, run.seed): (run, summary.fingerprints) for run, summary in found.items()}
    for (name, seed), (run, pins) in there.items():
        for method in REFERENCES.values():
            other = there.get((plan.reference(variants[name], method) or "", seed))
            wrong = [what for pin, what in ALIKE.items() if other and pins.get(pin) != other[1].get(pin)]
            if other and pins.get("version") != other[1].get("version"):
                wrong = wrong[:1]
            if other and wrong:
                raise RunError(
                    f"--out {plan.folder}",
                    found=f"{run.name} and {other[0].name} had not the same {' and '.join(wrong)}",
                    valid="runs under one protocol",
                    hint="give another --out, or --overwrite",
                )


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


def _summary(run: PlannedRun) -> Summary | None:
    folder = Path(run.config.out or "")
    return read_summary(folder) if (folder / "summary.json").exists() else None


def _command(plan: Plan) -> str:
    settings = plain(asdict(plan.config))
    sweeps = "".join(f" --sweep {text}" for text in settings.pop("sweep"))
    return f"{repeat_command(settings, 'compare', CompareConfig)}{sweeps} --out {plan.folder}"


def _different(values: Sequence[Any]) -> list[Any]:
    return [value for place, value in enumerate(values) if value not in values[:place]]


# -- words


def _title(found: Mapping[str, Any]) -> str:
    if not found["teacher"]:
        return "Comparison"
    data = found["data"]
    return (
        f"{found['teacher']['name']} to {found['student']['name']}, {data['name']}: {data['train']:,} training images"
    )


def _note(found: Mapping[str, Any]) -> str:
    """What the table shows."""
    aside = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in found["shared_seconds"].items())
    return (
        f"Scored on {found['scored_on']}, after the last pass. Mean and standard deviation over seeds; paired "
        "gains (above 0 the method is the better one) with their 95 % t interval; "
        "p of the paired t-test, corrected for all methods (Holm); the share "
        "of the teacher's lead over the baseline that is closed, with Fieller's 95 % interval, where that lead is "
        f"itself beyond its interval; seconds of the student's own training, {found['jobs']} at once. Made once for "
        f"all: {aside or 'nothing'}."
    )


def _row(each: Mapping[str, Any], metric: Metric) -> tuple[str, ...]:
    gap = each["gap_closed"]
    return (
        _name(each["name"]),
        str(each["n"]),
        metric.number(each["mean"]) + (f" ± {metric.number(each['sd'])}" if each["sd"] is not None else ""),
        *(cell for key in KEYS for cell in _shown(each[key], metric)),
        _gap(Gap(**gap)) if gap else "-",
        f"{each['seconds']:.1f}" if each["seconds"] is not None else "-",
        f"{each['seconds_to_alone']:.2f}" if each["seconds_to_alone"] is not None else "-",
    )


def _shown(found: Mapping[str, Any] | None, metric: Metric) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    mean, low, high = (f"{found[name] or 0:+.{metric.digits}f}" for name in ("mean", "low", "high"))
    span = f" ({low} to {high})" if found["low"] is not None else ""
    return f"{mean}{span}", "-" if found["p_holm"] is None else _p(found["p_holm"])


def _gap(gap: Gap) -> str:
    return f"{100 * gap.closed:.0f} % ({100 * gap.low:.0f} to {100 * gap.high:.0f})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _verdicts(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{_name(each['name'])}: " + "; ".join(to["verdict"] for to in _compared(each))
        for each in found["methods"]
        if _compared(each)
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
