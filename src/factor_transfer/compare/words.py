"""What a comparison found, for a person: compare.md, the tables on a terminal, and those of the report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factor_transfer.compare.result import AT_EQUAL_COMPUTE, KEYS
from factor_transfer.compare.statistics import Gap
from factor_transfer.method.presets import ALIASES
from factor_transfer.tasks.classification import Classification
from factor_transfer.tasks.metric import Metric
from factor_transfer.util.checks import flag
from factor_transfer.util.console import say, table
from factor_transfer.util.files import read_json, write_atomic, write_json

FIGURES, DIFFERENCES = (0, 1, 2, 7, 8, 9, 10), (0, 3, 4, 5, 6, 11, 12)
"""The columns of each of the two tables on a terminal."""


def write_outcome(folder: Path, found: Mapping[str, Any]) -> None:
    """Write compare.json and compare.md."""
    write_json(folder / "compare.json", found)
    write_atomic(folder / "compare.md", in_words(found))


def show_outcome(folder: Path, found: Mapping[str, Any]) -> None:
    """Print the figures, the differences and the verdicts: two tables, since a terminal is narrow."""
    there = [each for each in found["methods"] if each["n"]]
    compared = [each for each in there if _compared(each) or each[AT_EQUAL_COMPUTE]]
    metric = _metric(found)
    _table(_title(found), FIGURES, there, metric)
    if compared:
        _table(f"gains ({metric.points or metric.label}), with their 95 % intervals", DIFFERENCES, compared, metric)
    if tuning := found.get("tuning"):
        table(f"trials, on {tuning['scored_on']}", *_trials(tuning, metric))
    for line in _verdicts(found):
        say(line)
    say(f"scored on {found['scored_on']}")
    say(f"all of it: {folder / 'compare.md'}, {folder / 'compare.json'}")


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
        _markdown(*_tabulated(methods, metric)),
        "\n".join(f"- {line}" for line in _verdicts(found)),
        _note(found),
        f"## Every run, {metric.heading}",
        _markdown(("", *(f"seed {seed}" for seed in seeds)), raw),
        *_tuning(found.get("tuning"), metric),
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
    methods = [each for each in found["methods"] if each["n"]]
    header, rows = _tabulated(methods, metric)
    return {"header": header, "rows": rows, "verdicts": _verdicts(found), "note": _note(found)}


def _table(title: str, columns: Sequence[int], methods: Sequence[Mapping[str, Any]], metric: Metric) -> None:
    header, rows = _tabulated(methods, metric)
    places = [place for place in columns if place < len(header)]
    table(title, [header[place] for place in places], [[row[place] for place in places] for row in rows])


def _tabulated(methods: Sequence[Mapping[str, Any]], metric: Metric) -> tuple[list[str], list[list[str]]]:
    """The header, and a row for each method; without the last columns where no baseline was given equal compute."""
    found = [metric.heading, "to baseline", "p", "to kd", "p", "gap closed", "s / run", "x baseline", "compute"]
    matched = ["at equal compute", "p"] if any(each.get(AT_EQUAL_COMPUTE) for each in methods) else []
    header = ["", "n", *found, *matched]
    return header, [[*_row(each, metric)[: len(header)]] for each in methods]


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
        f"{each['compute_to_alone']:.2f}" if each.get("compute_to_alone") is not None else "-",
        *_shown(each.get(AT_EQUAL_COMPUTE), metric),
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


def _tuning(tuning: Mapping[str, Any] | None, metric: Metric) -> list[str]:
    """What was tried before the comparison."""
    if tuning is None:
        return []
    said = (
        f"Every method was tried as it is given, and with other learning rates and weights, multiplied by the same "
        f"factors for all; seed {tuning['seed']}, scored on {tuning['scored_on']}. What was chosen is compared above. "
        "The compute of the trials is not counted."
    )
    return ["## Tuning", said, _markdown(*_trials(tuning, metric))]


def _trials(tuning: Mapping[str, Any], metric: Metric) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every trial with its settings and score."""
    chosen = {each["trial"] for each in tuning["chosen"].values()}
    rows = [
        [
            each["trial"],
            ", ".join(f"{flag(name)} {value:g}" for name, value in each["settings"].items()) or "as given",
            "failed" if "failed" in each else metric.number(each["score"]),
            "chosen" if each["trial"] in chosen else "",
        ]
        for each in tuning["trials"]
    ]
    return ["trial", "settings", metric.heading, ""], rows


def _metric(found: Mapping[str, Any]) -> Metric:
    """What the methods are compared by; a file that names none is of classification."""
    return Metric(**found["metric"]) if found.get("metric") else Classification.metrics[0]


def _compared(each: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The differences of a method that there are."""
    return [each[key] for key in KEYS if each[key]]


def _name(name: str) -> str:
    """A variant of an earlier comparison, by its method's name of today."""
    method, *rest = name.split(" ", 1)
    return " ".join([ALIASES.get(method, method), *rest])


def _title(found: Mapping[str, Any]) -> str:
    if not found["teacher"]:
        return "Comparison"
    data = found["data"]
    title = (
        f"{found['teacher']['name']} to {found['student']['name']}, {data['name']}: {data['train']:,} training images"
    )
    others = data.get("unlabelled")  # an earlier comparison has none
    return title + (f" (and {others:,} unlabelled ones, for methods with a teacher)" if others else "")


def _passes(each: Mapping[str, Any]) -> str:
    """As many as each run had, or from how many to how many."""
    return " to ".join(map(str, dict.fromkeys([each["epochs"][0], each["epochs"][-1]])))


def _verdicts(found: Mapping[str, Any]) -> list[str]:
    """At equal compute first, where a baseline was given it; then at equal passes."""
    named = {each["name"]: each for each in found["methods"]}
    equal = []
    for each in found["methods"]:
        if to := each.get(AT_EQUAL_COMPUTE):
            other, gap = named[to["what"]], each["gap_closed_matched"]
            closed = f"; it closes {_gap(Gap(**gap))} of that one's gap to the teacher" if gap else ""
            times = f"{_passes(other)} passes, {other['compute_to_alone']:.2f} times the baseline's compute"
            equal.append(f"{each['name']}, at equal compute: {to['verdict']} ({times}){closed}")
    lines = []
    for each in found["methods"]:
        if _compared(each):
            stretched = f", {_passes(each)} passes" if each.get("matched_to") else ", at equal passes"
            lines.append(
                f"{_name(each['name'])}{stretched if equal else ''}: "
                + "; ".join(to["verdict"] for to in _compared(each))
            )
    return [*equal, *lines]


def _note(found: Mapping[str, Any]) -> str:
    """What the table shows."""
    aside = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in found["shared_seconds"].items())
    return (
        f"Scored on {found['scored_on']}, after the last pass. Mean and standard deviation over seeds; paired "
        "gains (above 0 the method is the better one) with their 95 % t interval; "
        "p of the paired t-test, corrected for all methods (Holm); the share "
        "of the teacher's lead over the baseline that is closed, with Fieller's 95 % interval, where that lead is "
        f"itself beyond its interval; seconds of the student's own training, {found['jobs']} at once. Made once for "
        f"all: {aside or 'nothing'}. Compute: multiply-adds of the whole training, paraphraser and teacher's passes "
        "included, as if each run had been alone, as a multiple of the baseline's; the teacher's own training, and "
        f"what was given in files, are not counted.{_matched_note(found)}"
    )


def _matched_note(found: Mapping[str, Any]) -> str:
    """What the baselines at equal compute were given."""
    parts = [
        f"{each['name']}: {_passes(each)} passes, which cost what {each['matched_to']} costs, each with new views, the "
        "schedule stretched."
        for each in found["methods"]
        if each.get("matched_to") and each["n"]
    ]
    return " ".join(["", *parts])


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
