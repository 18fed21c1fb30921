"""A task from outside the package, whose headline metric is the lower the better, through every command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from factor_transfer import distill
from factor_transfer.cli import app
from factor_transfer.compare.plan import CompareConfig, planned
from factor_transfer.compare.result import outcome
from factor_transfer.compare.words import in_words
from factor_transfer.config import Config
from factor_transfer.distillation import evaluate_run
from factor_transfer.doctor import diagnose
from factor_transfer.report.findings import findings
from factor_transfer.report.html import report_values
from factor_transfer.report.several import comparison_values
from factor_transfer.report.terminal import verdict
from factor_transfer.tasks.base import check_knows, task_of
from factor_transfer.training.run_folder import Run
from factor_transfer.training.summary import VERSION, Summary, read_summary
from factor_transfer.util.errors import ConfigError, RunError, TrainingError
from factor_transfer.util.files import read_json, write_json

CODE = """
import numpy as np
import torch
import torch.nn.functional as F
from factor_transfer.tasks.base import Guess, Task
from factor_transfer.tasks.metric import Metric


def expected(outputs):
    return outputs.float().softmax(1) @ torch.arange(outputs.shape[1], device=outputs.device).float()


class Grades(Task):
    metrics = (
        Metric("mae", "mean absolute error", "grades", digits=3, higher_is_better=False, hub="mae"),
        Metric("exact", "exact answers", "%"),
    )
    loss_name = "grade_loss"
    hub = "image-to-grade"

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.1 * F.smooth_l1_loss(expected(outputs), targets.float())

    def sums(self, outputs, targets):
        return {
            "mae": (expected(outputs) - targets).abs().sum(),
            "exact": 100 * (expected(outputs).round() == targets).sum().float(),
        }

    def per_image(self, outputs, targets):
        return (expected(outputs) - targets).abs()

    def guess(self, labels, classes):
        errors = [np.abs(labels - place).mean() for place in range(len(classes))]
        best = int(np.argmin(errors))
        return Guess(float(np.mean(errors)), float(errors[best]), f"grade {best}", perfect=0)

    def answer(self, outputs, classes, top):
        return {"grade": round(float(expected(torch.tensor([list(outputs)]))), 2)}

    def in_words(self, answer):
        return f"grade {answer['grade']:.2f}"
"""
SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 8, 16)}
TWICE = ("cifar_resnet20", "cifar_resnet20")
SETTINGS: dict[str, Any] = {
    "teacher_args": SMALL, "student_args": SMALL, "device": "cpu", "threads": 1, "lr": 0.05, "batch_size": 128,
    "task": "outside_grades:Grades", "train_images": 300, "paraphraser_epochs": 1, "log_with": "none",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _importable(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("code")
    (folder / "outside_grades.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "grades"
    distill(
        "cifar_resnet20", "cifar_resnet20", "digits", out=out, teacher_epochs=6, epochs=2, baseline=True, **SETTINGS
    )
    return out


def test_task__is_learned_and_measured_by_its_own_loss_and_metrics(run: Path) -> None:
    summary = read_summary(run)
    assert [metric.key for metric in summary.metrics] == ["mae", "exact"]
    assert set(summary.teacher.measured) == set(summary.student.measured) == {"mae", "exact"}
    rows = Run(run).metrics("student")
    assert {"grade_loss", "train_mae", "validation_mae", "validation_exact"} <= rows[-1].keys()
    assert "top1" not in json.dumps([read_json(run / "summary.json"), *rows])
    again = evaluate_run(run)
    assert again["student"] == pytest.approx(dict(summary.student.measured), rel=1e-4)


def test_task__gains_are_the_right_way_round_everywhere(run: Path, tmp_path: Path) -> None:
    values, summary = read_json(run / "summary.json"), read_summary(run)
    for role, mae in (("teacher", 0.5), ("baseline", 1.0), ("student", 0.75)):
        values[role]["mae"] = mae
    summary = Summary.from_json(values)
    assert summary.gain("baseline") == 0.25
    assert summary.gain("teacher") == -0.25
    said = " ".join(verdict(summary))
    assert "0.250 grades more mean absolute error (worse)" in said
    assert "0.250 grades less mean absolute error (better) than the baseline has" in said
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "metrics.jsonl", "findings.json", "fingerprints.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    write_json(copy / "summary.json", values)
    shown = report_values(
        copy, {**findings(run), "differences": {"baseline": {"mean": -0.25, "low": -0.5, "high": 0.1}}}
    )
    assert shown["intervals"] == [{"other": "baseline", "gain": "+0.250", "span": "-0.100 to +0.500"}]
    assert shown["tiles"][-1] == {"value": "+0.250 grades",
        "text": "better than the baseline in mean absolute error (-0.100 to +0.500)"}  # fmt: skip
    assert "mean absolute error, grades (lower is better)" in shown["trade"][0]
    assert "Mean absolute error against latency" in shown["trade"][0]
    assert shown["curves"][0].count("mean absolute error, grades (lower is better)")
    page = comparison_values([copy, copy])
    assert page["rows"][0]["metrics"] == ["0.500", "1.000", "0.750"]
    assert page["rows"][0]["gain"] == 0.25
    html = (run / "report.html").read_text()
    assert "mean absolute error, grades" in html
    assert "top-1" not in html.split('id="record"')[0]


def test_task__is_compared_by_gains(tmp_path: Path) -> None:
    settings = {**SETTINGS, "teacher": "cifar_resnet20", "student": "cifar_resnet20", "data": "digits"}
    plan = planned(
        CompareConfig(**settings, teacher_epochs=1, epochs=2, methods="alone,ft", seeds=3, out=str(tmp_path))
    )
    assert [each.name for each in plan.variants] == ["baseline", "ft"]
    network = {"parameters": 10, "size_bytes": 40, "latency_ms": 1.0, "layer": "x", "img_size": 8, "mean": [0] * 3,
               "std": [1] * 3, "name": "n"}  # fmt: skip
    metrics = [vars(metric) for metric in task_of(str(SETTINGS["task"])).metrics]
    for each in plan.runs:
        mae = 1.0 + 0.01 * each.seed if each.variant == "baseline" else 0.75 + 0.02 * each.seed
        found = {"teacher": {**network, "mae": 0.5}, "student": {**network, "mae": mae}, "metrics": metrics,
                 "data": {"name": "digits", "train": 3, "validation": 3, "img_size": 8, "classes": ["a"]},
                 "settings": each.config.to_dict(), "seconds": {"student": 1.0}, "fingerprints": {},
                 "environment": {}}  # fmt: skip
        folder = Path(str(each.config.out))
        folder.mkdir(parents=True)
        write_json(folder / "summary.json", found)
    found = json.loads(json.dumps(outcome(plan)))
    (ft,) = [each for each in found["methods"] if each["name"] == "ft"]
    assert ft["to_alone"]["mean"] == pytest.approx(0.24)
    assert ft["to_alone"]["verdict"].startswith("gains 0.2")
    assert ft["to_alone"]["verdict"].endswith("grades over baseline")
    assert ft["gap_closed"]["closed"] == pytest.approx(0.24 / 0.51)
    assert ft["mae"] == {"0": 0.75, "1": 0.77, "2": 0.79}
    text = in_words(found)
    assert "mean absolute error, grades" in text
    assert "top-1" not in text


def test_task__is_looked_at_by_doctor() -> None:
    config = Config(
        teacher="cifar_resnet20", student="cifar_resnet20", data="digits", teacher_epochs=1, epochs=2, **SETTINGS
    )
    assert "grade loss" in [row[0] for _, _, rows in diagnose(config).tables for row in rows]


def test_check_knows__heeds_the_direction() -> None:
    task, labels = task_of(str(SETTINGS["task"])), torch.arange(10).numpy()
    names = [str(place) for place in range(10)]
    assert check_knows(task, 0.4, labels, names, "t") is None
    assert "grade" in str(check_knows(task, 2.6, labels, names, "t"))
    with pytest.raises(TrainingError, match="chance is 3.300 grades"):
        check_knows(task, 3.2, labels, names, "t")


@pytest.mark.slow
def test_task__is_exported_and_predicts(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from factor_transfer.export.predict import predict_images
    from factor_transfer.export.shipping import Choices, export_run

    found = export_run(run, Choices(formats=("pt2",), latency=False))
    assert found["reference_mae"] == pytest.approx(found["formats"][0]["mae"], abs=1e-3)
    assert "mean absolute error, grades" in (run / "export" / "README.md").read_text()
    with pytest.raises(ConfigError, match="trust-config"):
        predict_images(run, [str(images)], top=1, threads=1, as_json=False)
    capsys.readouterr()
    predict_images(run, [str(images)], top=1, threads=1, as_json=False, trust_config=True)
    assert ": grade " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing", "outside_grades:absent", "math:pi"])
def test_task_of__says_what_it_cannot_use(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--task {name}"):
        task_of(name)


def test_read_summary__refuses_a_newer_version_and_reads_a_file_without_one(run: Path, tmp_path: Path) -> None:
    values = read_json(run / "summary.json")
    assert values["version"] == VERSION
    write_json(tmp_path / "summary.json", {**values, "version": VERSION + 1})
    write_json(tmp_path / "config.json", {})
    with pytest.raises(RunError, match=f"version {VERSION + 1}"):
        read_summary(tmp_path)
    for name in ("version", "metrics", "loss_name"):
        del values[name]
    values["student"]["top1"] = 93.0
    values["method"] = "labels alone"
    write_json(tmp_path / "summary.json", values)
    early = read_summary(tmp_path)
    assert early.value("student") == 93.0
    assert early.method == "baseline"


def test_cli__runs_code_of_a_task_only_when_trusted(run: Path) -> None:
    with pytest.raises(ConfigError, match="trust-config"):
        app(["evaluate", str(run)], exit_on_error=False)
