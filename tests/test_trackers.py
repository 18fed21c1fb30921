"""TensorBoard in the run folder, read back with its own reader; and nothing that training would notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from factor_transfer import distill
from factor_transfer.report.trackers import wanted
from factor_transfer.training.run_folder import Run
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.files import sha256_file

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {"teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 2, "paraphraser_epochs": 1,
                       "epochs": 3, "batch_size": 8, "device": "cpu", "threads": 1, "lr": 0.05}  # fmt: skip


@pytest.mark.usefixtures("unexported")
def test_watched__tells_tensorboard_what_metrics_jsonl_holds(images: Path, tmp_path: Path) -> None:
    for name, log_with in (("watched", "auto"), ("alone", "none")):
        distill("cifar_resnet20", "cifar_resnet20", images, out=tmp_path / name, log_with=log_with, **JOB)
    events = EventAccumulator(str(tmp_path / "watched" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for name in ("loss", "cross_entropy", "factor_transfer", "lr", "gradient_norm", "images_per_second",
                 "validation_top1"):  # fmt: skip
        assert f"student/{name}" in scalars
    rows = Run(tmp_path / "watched").metrics("student")
    told = events.Scalars("student/factor_transfer")
    assert [event.step for event in told] == [1, 2, 3]
    assert [event.value for event in told] == pytest.approx([row["factor_transfer"] for row in rows])
    (tag,) = events.Tags()["images"]
    assert [event.step for event in events.Images(tag)] == [1, 2, 3]
    student = [sha256_file(tmp_path / name / "student.safetensors") for name in ("watched", "alone")]
    assert student[0] == student[1]
    assert not (tmp_path / "alone" / "tensorboard").exists()


def test_wanted__refuses_trackers_that_are_not_there() -> None:
    assert wanted("none") == []
    assert wanted("tensorboard") == ["tensorboard"]
    with pytest.raises(ConfigError, match=r"--log-with tensorbord\n.*no such tracker\n.*tensorboard"):
        wanted("tensorbord")
    with pytest.raises(ConfigError, match=r"--log-with wandb\n.*not installed"):
        wanted("tensorboard, wandb")
