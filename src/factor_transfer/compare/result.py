"""What a comparison found: compare.json, the same in words (compare.md), and the table on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factor_transfer.compare.plan import REFERENCES, CompareConfig, Plan, PlannedRun
from factor_transfer.compare.statistics import Difference, Gap, Scores, against, gap_closed, spread, verdict
from factor_transfer.config import FIELDS, plain
from factor_transfer.report.html import repeat_command
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

HEADER = ("", "n", "top-1 %", "to alone", "p", "to kd", "p", "gap closed", "s / run", "x alone")
FIGURES, DIFFERENCES = (0, 1, 2, 7, 8, 9), (0, 3, 4, 5, 6)
"""The columns of each of the two tables on a terminal."""


def outcome(plan: Plan) -> dict[str, Any]:
    """Everything that is known of a comparison so far, as JSON holds it.

    Raises:
        RunError: runs that are compared did not see the same images, teacher or first weights.
    """
    found = {run: summary for run in plan.runs if (summary := _summary(run)) is not None}
    _check_alike(plan, found)
    first: Mapping[str, Any] = next(iter(found.values()), {})
    return {
        "complete": len(found) == len(plan.runs),
        "runs_finished": len(found),
        "runs_planned": len(plan.runs),
        "command": _command(plan),
        "scored_on": _scored_on(plan, first),
        "teacher": {key: first["teacher"].get(key) for key in ("name", "top1", "parameters")} if first else None,
        "student": {key: first["student"].get(key) for key in ("name", "parameters")} if first else None,
        "data": {key: value for key, value in first.get("data", {}).items() if key != "classes"},
        "methods": _methods(plan, found),
        "shared_seconds": _shared_seconds(found.values()),
        "jobs": plan.config.jobs,
        "environments": _different([summary["environment"] for summary in found.values()]),
        "settings": plain({name: getattr(plan.config, name) for name in FIELDS}),
        "runs": [
            {
                "name": run.name,
                "method": run.variant,
                "seed": run.seed,
                "top1": summary["student"].get("top1"),
                "loss": summary["student"].get("loss"),
                "teacher_top1": summary["teacher"].get("top1"),
                "seconds": summary["seconds"],
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
    compared = [each for each in there if each["to_alone"] or each["to_kd"]]
    _table(_title(found), FIGURES, there)
    if compared:
        _table("differences, with their 95 % intervals", DIFFERENCES, compared)
    for line in _verdicts(found):
        say(line)
    say(f"scored on {found['scored_on']}")
    say(f"all of it: {folder / 'compare.md'}, {folder / 'compare.json'}")


def _table(title: str, columns: Sequence[int], methods: Sequence[Mapping[str, Any]]) -> None:
    rows = [_row(each) for each in methods]
    table(title, [HEADER[place] for place in columns], [[row[place] for place in columns] for row in rows])


def in_words(found: Mapping[str, Any]) -> str:
    """compare.md."""
    methods = [each for each in found["methods"] if each["n"]]
    seeds = sorted({seed for each in methods for seed in each["top1"]}, key=int)
    teacher = found["teacher"] or {}
    top1 = f", {teacher['top1']:.2f} % top-1" if teacher.get("top1") is not None else ""
    done = f"{found['runs_finished']} of {found['runs_planned']} runs"
    raw = [(each["name"], *(_two(each["top1"].get(seed)) for seed in seeds)) for each in methods]
    machines = "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in found["environments"])
    parts = [
        f"# {_title(found)}",
        f"Teacher: {teacher.get('name')}, {teacher.get('parameters'):,} parameters{top1}. "
        f"{'All ' if found['complete'] else ''}{done} are finished."
        if methods
        else f"No run is finished yet ({done}).",
        _markdown(HEADER, [_row(each) for each in methods]),
        "\n".join(f"- {line}" for line in _verdicts(found)),
        _note(found),
        "## Every run, top-1 %",
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
    rows = [_row(each) for each in found["methods"] if each["n"]]
    return {"header": HEADER, "rows": rows, "verdicts": _verdicts(found), "note": _note(found)}


# -- the figures


def _methods(plan: Plan, found: Mapping[PlannedRun, Mapping[str, Any]]) -> list[dict[str, Any]]:
    tops: dict[str, dict[int, float]] = {each.name: {} for each in plan.variants}
    seconds: dict[str, dict[int, float]] = {each.name: {} for each in plan.variants}
    teachers: dict[str, float | None] = {}
    for run, summary in found.items():
        if "top1" in summary["student"]:
            tops[run.variant][run.seed] = summary["student"]["top1"]
        own = [value for stage, value in summary["seconds"].items() if not stage.startswith(SHARED)]
        seconds[run.variant][run.seed] = sum(own)
        teachers[run.variant] = summary["teacher"].get("top1")
    to = {
        other: {
            each.name: (reference, tops[reference])
            for each in plan.variants
            if (reference := plan.reference(each, method)) is not None
            and not (other == "kd" and each.method == REFERENCES["alone"])
        }
        for other, method in REFERENCES.items()
    }
    differences = {
        other: against(tops, {name: scores for name, (_, scores) in named.items()}) for other, named in to.items()
    }
    rows = []
    for each in plan.variants:
        alone, teacher = to["alone"].get(each.name), teachers.get(each.name)
        gap = None
        if alone is not None and teacher is not None and not _seen_by_teacher(plan):
            gap = gap_closed(tops[each.name], alone[1], teacher)
        rows.append(
            {
                "name": each.name,
                "method": each.method,
                "swept": plain(each.swept),
                **_figures(tops[each.name], seconds[each.name], seconds[alone[0]] if alone else None),
                "gap_closed": asdict(gap) if gap else None,
                **{f"to_{other}": _to(to[other], differences[other], each.name) for other in REFERENCES},
            }
        )
    return rows


def _figures(tops: Scores, seconds: Scores, alone: Scores | None) -> dict[str, Any]:
    both = sorted(seconds.keys() & (alone or {}).keys())
    mean, sd = spread(list(tops.values())) if tops else (None, None)
    relative = sum(seconds[seed] for seed in both) / sum((alone or {})[seed] for seed in both) if both else None
    return {
        "n": len(tops),
        "mean": mean,
        "sd": sd,
        "top1": {str(seed): value for seed, value in tops.items()},
        "seconds": spread(list(seconds.values()))[0] if seconds else None,
        "seconds_to_alone": relative,
    }


def _to(named: Mapping[str, tuple[str, Scores]], differences: Mapping[str, Difference], name: str) -> Any:
    if name not in differences:
        return None
    found, tested = differences[name], sum(each.p is not None for each in differences.values())
    return {"what": named[name][0], **found.to_dict(), "verdict": verdict(found, named[name][0], tested)}


def _seen_by_teacher(plan: Plan) -> bool:
    """Whether a teacher that came with its weights may have been trained on the images that are scored on."""
    return plan.runs[0].config.validate_on == "train-holdout" and not plan.config.teacher_epochs


def _check_alike(plan: Plan, found: Mapping[PlannedRun, Mapping[str, Any]]) -> None:
    variants = {each.name: each for each in plan.variants}
    there = {(run.variant, run.seed): (run, summary["fingerprints"]) for run, summary in found.items()}
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


def _scored_on(plan: Plan, summary: Mapping[str, Any]) -> str:
    count = f"{summary['data']['validation']:,} " if summary else ""
    if plan.runs[0].config.validate_on != "train-holdout":
        return f"{count}validation images"
    seen = "; the teacher may have been trained on them, so no gap is given" if _seen_by_teacher(plan) else ""
    return f"{count}training images that were held out (train-holdout: to choose by, not to report){seen}"


def _shared_seconds(summaries: Any) -> dict[str, float]:
    """Seconds of what was made for all."""
    found: dict[str, float] = {}
    for stage, seconds in (pair for each in summaries for pair in each["seconds"].items()):
        if stage.startswith(SHARED) and seconds:
            found[stage] = found.get(stage, 0.0) + seconds
    return found


def _summary(run: PlannedRun) -> dict[str, Any] | None:
    path = Path(run.config.out or "") / "summary.json"
    found: dict[str, Any] | None = read_json(path) if path.exists() else None
    return found


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
        "differences with their 95 % t interval; p of the paired t-test, corrected for all methods (Holm); the share "
        "of the teacher's lead over the student alone that is closed, with Fieller's 95 % interval, where that lead is "
        f"itself beyond its interval; seconds of the student's own training, {found['jobs']} at once. Made once for "
        f"all: {aside or 'nothing'}."
    )


def _row(each: Mapping[str, Any]) -> tuple[str, ...]:
    gap = each["gap_closed"]
    return (
        each["name"],
        str(each["n"]),
        _two(each["mean"]) + (f" ± {each['sd']:.2f}" if each["sd"] is not None else ""),
        *_shown(each["to_alone"]),
        *_shown(each["to_kd"]),
        _gap(Gap(**gap)) if gap else "-",
        f"{each['seconds']:.1f}" if each["seconds"] is not None else "-",
        f"{each['seconds_to_alone']:.2f}" if each["seconds_to_alone"] is not None else "-",
    )


def _shown(found: Mapping[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    span = f" ({found['low']:+.2f} to {found['high']:+.2f})" if found["low"] is not None else ""
    return f"{found['mean']:+.2f}{span}", "-" if found["p_holm"] is None else _p(found["p_holm"])


def _gap(gap: Gap) -> str:
    return f"{100 * gap.closed:.0f} % ({100 * gap.low:.0f} to {100 * gap.high:.0f})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _verdicts(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{each['name']}: " + "; ".join(to["verdict"] for to in (each["to_alone"], each["to_kd"]) if to)
        for each in found["methods"]
        if each["to_alone"] or each["to_kd"]
    ]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
