"""Training flags of timm's: each against timm's own code, and through whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

import factor_transfer.zoo  # noqa: F401
from factor_transfer import distill
from factor_transfer.config import Config
from factor_transfer.method.term import Term
from factor_transfer.networks.pair import Side
from factor_transfer.tasks.base import LabelLoss, Task, task_of
from factor_transfer.training.schedule import Plan
from factor_transfer.training.stages import Job
from factor_transfer.util.errors import ConfigError

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {
    "teacher": "cifar_resnet20", "student": "cifar_resnet20", "teacher_args": SMALL, "student_args": SMALL,
    "teacher_epochs": 8, "teacher_lr": 0.1, "epochs": 1, "beta": 0, "kd_weight": 0.5, "batch_size": 12, "lr": 0.05,
    "threads": 1, "device": "cpu", "precision": "fp32", "log_with": "none",
}  # fmt: skip


def config(**changed: Any) -> Config:
    return Config(**{"teacher": "t", "student": "s", "data": "digits", **changed})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path_factory.mktemp("regime") / "images", train=12, validation=4)


@pytest.mark.parametrize(
    ("given", "timms"),
    [
        ({"smoothing": 0.1}, LabelSmoothingCrossEntropy(0.1)),
        ({"bce_loss": True}, BinaryCrossEntropy(0.0)),
        ({"bce_loss": True, "smoothing": 0.2}, BinaryCrossEntropy(0.2)),
    ],
)
def test_labels__are_learned_by_timms_loss(given: dict[str, Any], timms: torch.nn.Module) -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), torch.arange(8) % 5
    task = task_of("classification")
    ours = task.labels(how=LabelLoss.of(config(**given))).loss
    wanted, found = timms(outputs, labels), ours(outputs, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, outputs)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    teacher = task.labels(how=LabelLoss.of(config(**given), teacher=True)).loss(outputs, labels)  # plain labels
    plain = BinaryCrossEntropy(0.0) if "bce_loss" in given else F.cross_entropy
    torch.testing.assert_close(teacher, plain(outputs, labels))


@pytest.mark.usefixtures("unexported")
def test_distill__trains_student_baseline_and_teacher_by_the_loss_that_is_asked_for(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoothing: dict[str, float] = {}
    trained = Job._train

    def train(self: Job, side: Side, terms: Sequence[Term], teacher: Any, plan: Plan, **how: Any) -> dict[str, Any]:
        smoothing[plan.stage] = next(term.loss.smoothing for term in terms if term.supervised)
        return trained(self, side, terms, teacher, plan, **how)

    monkeypatch.setattr(Job, "_train", train)
    run = distill(data=pictures, out=tmp_path / "run", baseline=True, **{**JOB, "smoothing": 0.3, "bce_loss": True})
    assert smoothing == {"teacher": 0.0, "student": 0.3, "baseline": 0.3}
    assert run.summary["loss_name"] == "binary_cross_entropy"
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows if "binary_cross_entropy" in row} == {"teacher", "student", "baseline"}


def test_settings__of_labels_contradict_what_reads_none() -> None:
    for given, said in (({"smoothing": 0.1}, "--smoothing 0.1"), ({"bce_loss": True}, "--bce-loss")):
        with pytest.raises(ConfigError, match=f"{said} with --label-weight 0"):
            config(label_weight=0, **given)
    with pytest.raises(ConfigError, match="--smoothing 1\n"):
        config(smoothing=1)


def test_task__with_a_loss_of_its_own_refuses_another() -> None:
    class Own(Task):
        loss = sums = None  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="(?s)--smoothing with --task.*Own"):
        Own().labels(how=LabelLoss(smoothing=0.1))
