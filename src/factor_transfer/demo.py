"""`factor-transfer demo`: what Factor Transfer brings where images are few, beside its rivals."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from factor_transfer.compare.plan import CompareConfig
from factor_transfer.compare.run import compare
from factor_transfer.compare.words import tabulated
from factor_transfer.report.several import runs_in, write_comparison
from factor_transfer.settings import RECIPE, read_settings
from factor_transfer.tasks.metric import Metric
from factor_transfer.util.console import say, table

METHODS = {
    "baseline": "baseline: the student without a teacher",
    "baseline-matched": "baseline with the compute of Factor Transfer",
    "kd": "knowledge distillation (kd)",
    "ft": "Factor Transfer",
    "ft+kd": "Factor Transfer and kd",
}
"""The methods that it runs, and what its table calls them."""

BEST = "ft+kd"
"""The method whose student the closing lines name."""

RECORD = """\
On 10 other seeds, in points of top-1 beyond the baseline, with the 95 % interval of the mean:
  Factor Transfer +3.46 (+2.35 to +4.57); kd +5.10 (+4.16 to +6.05); both +6.06 (+5.25 to +6.88);
  Factor Transfer beyond the baseline with as much compute +2.23 (+0.97 to +3.49)."""
"""What `make compare-demo` gave on other seeds; tests/test_demo.py checks it against results/demo-fashion."""


def demo(out: str, seed: int, *, overwrite: bool) -> Path:
    """Train the student of recipe:demo in each way, and print what came out.

    Returns:
        The folder: a run folder for each student, compare.json and report.html.
    """
    config = CompareConfig(
        **read_settings(f"{RECIPE}demo"),
        methods=",".join(METHODS),
        seeds=1,
        seed=seed,
        jobs=min(2, os.cpu_count() or 1),
        threads=1,
        log_with="none",
        out=out,
        overwrite=overwrite,
    )
    folder, found = compare(config)
    page = write_comparison(runs_in([folder]), folder / "report.html", tabulated(folder))
    _show(found)
    run = folder / f"{BEST}-s{seed}"
    say(RECORD)
    say("This was one seed: another one can come out otherwise.")
    say(f"look:     {page} (all of them), {run / 'report.html'} (the last one)")
    say(f"student:  {run / 'student.pt2'} (needs only torch)")
    say(f"ship it:  factor-transfer export {run}")
    say("yours:    factor-transfer doctor --data FOLDER --teacher NAME --teacher-weights FILE --student NAME")
    return folder


def _show(found: Mapping[str, Any]) -> None:
    """The table: the teacher, then every student, with what its training cost."""
    metric, teacher, student = Metric(**found["metric"]), found["teacher"], found["student"]
    rows = [
        ["teacher, trained on 20,000 images", metric.number(teacher[metric.key]), f"{teacher['parameters']:,}", "", ""]
    ]
    for each in found["methods"]:
        passes, compute = f"{each['epochs'][0]}", f"{each['compute_to_alone']:.2f}"
        values = [metric.number(each["mean"]), f"{student['parameters']:,}", passes, compute]
        rows.append([METHODS[each["name"]], *values])
    header = ["", metric.heading, "parameters", "passes", "compute"]
    table(f"Fashion-MNIST, {found['data']['train']:,} training images, {found['scored_on']}", header, rows)
