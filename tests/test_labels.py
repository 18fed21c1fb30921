"""Without labels: a flat folder, a teacher's features and, where the head fits, its predictions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import factor_transfer.zoo  # noqa: F401
from factor_transfer import distill
from factor_transfer.config import Config, DataConfig
from factor_transfer.distillation import evaluate_run
from factor_transfer.doctor import diagnose
from factor_transfer.util.errors import ConfigError, DataError, ModelError, RunError

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {"student_args": SMALL, "epochs": 2, "paraphraser_epochs": 1, "batch_size": 8, "threads": 1,
                       "device": "cpu", "lr": 0.05}  # fmt: skip


@pytest.fixture
def flat(images: Path, tmp_path: Path) -> Path:
    """The images of all classes in one folder, and no word of their classes."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in sorted((images / "train").rglob("*.png")):
        shutil.copy(path, folder / f"{path.parent.name[-1]}{path.name}")
    return folder


def teacher(classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("cifar_resnet20", **SMALL, num_classes=classes)


def test_distill__from_images_without_labels_gives_features(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = distill(teacher(0), "cifar_resnet20", flat, **JOB, label_weight=0.0, out=tmp_path / "run")
    said = capsys.readouterr().err
    assert "no labels: nothing can be measured here" in said
    assert "nothing trains a head" in said
    assert "top1" not in result.summary["student"]
    assert result.student(torch.zeros(2, 3, 16, 16)).shape == (2, 8)  # pooled features
    assert torch.export.load(tmp_path / "run" / "student.pt2").module()(torch.zeros(2, 3, 16, 16)).shape == (2, 8)
    with pytest.raises(RunError, match="no network with a trained head"):
        evaluate_run(tmp_path / "run")


@pytest.mark.usefixtures("unexported")
@pytest.mark.parametrize("views", [0, 2])
def test_distill__the_teachers_predictions_train_a_head_where_it_has_one(
    flat: Path, images: Path, tmp_path: Path, views: int
) -> None:
    """The student is measured afterwards, on images that have labels."""
    (tmp_path / "classes.txt").write_text("class0\nclass1\nclass2\n")
    settings = {**JOB, "label_weight": 0.0, "kd_weight": 1.0, "class_map": tmp_path / "classes.txt", "views": views}
    knowing = distill("cifar_resnet20", "cifar_resnet20", images, **{**JOB, "epochs": 1}, teacher_args=SMALL,
                      teacher_epochs=10, out=tmp_path / "first")  # fmt: skip
    given = {"teacher_args": SMALL, "teacher_weights": knowing.folder / "teacher.safetensors"}
    settings |= {"epochs": 16, "cache_dir": tmp_path / "cache"}
    result = distill("cifar_resnet20", "cifar_resnet20", flat, **settings, **given, out=tmp_path / "run")
    assert "top1" not in result.summary["student"]
    found = evaluate_run(tmp_path / "run", DataConfig(data=str(images)))
    assert found["student"]["top1"] > 60


def test_distill__says_what_needs_labels(flat: Path) -> None:
    with pytest.raises(DataError, match="(?s)no class folders.*--label-weight 0"):
        distill(teacher(0), "cifar_resnet20", flat, **JOB)
    with pytest.raises(ConfigError, match="--baseline with --label-weight 0"):
        distill(teacher(0), "cifar_resnet20", flat, **JOB, label_weight=0.0, baseline=True)


def test_distill__predictions_need_a_head_that_fits(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="(?s)--kd-weight 1.*without a head"):
        distill(teacher(7), "cifar_resnet20", images, **JOB, kd_weight=1.0, out=tmp_path / "run")
    with pytest.raises(ModelError, match="(?s)--teacher-epochs 1.*no logits"):
        distill(teacher(7), "cifar_resnet20", images, **JOB, teacher_epochs=1, out=tmp_path / "other")


def test_doctor__takes_images_without_labels(flat: Path) -> None:
    config = Config(data=str(flat), teacher="x", student="cifar_resnet20", **JOB, label_weight=0.0)
    found = diagnose(config, {"teacher": teacher(0)})
    assert found.code < 2, found.findings
