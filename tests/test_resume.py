"""Every setting that may differ when a run is continued changes no bit of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bits import bits
from factor_transfer import distill
from factor_transfer.config import Config
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.checks import free
from factor_transfer.util.errors import Interrupted

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {
    "teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 8, "teacher_lr": 0.1, "paraphraser_epochs": 1,
    "epochs": 3, "views": 2, "batch_size": 12, "lr": 0.05, "threads": 1, "device": "cpu", "workers": 0,
    "log_with": "auto", "hflip": 0.5,
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "data": "moved", "out": "elsewhere", "overwrite": True, "workers": 1, "threads": 2,
    "checkpoint_minutes": 1e-4, "timeout_minutes": 1.0, "max_skipped": 0, "cache_dir": "other-cache",
    "pixel_cache_gb": 0.0, "log_with": "none", "val_interval": 2, "verbose": True,
}  # fmt: skip
"""Another value of each."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """A run that nothing disturbed, and the same one stopped after the student's first pass."""
    folder = tmp_path_factory.mktemp("runs")
    image_folder(folder / "images", train=8, validation=2)
    shutil.copytree(folder / "images", folder / "moved")
    job = {**JOB, "cache_dir": folder / "cache"}
    leave = Trainer._leave

    def stop(self: Trainer, signum: int) -> None:
        leave(self, 15 if (self.plan.stage, self.progress.epoch) == ("student", 1) else signum)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factor_transfer.distillation.export_pt2", lambda *_: 0.0)
        distill("cifar_resnet20", "cifar_resnet20", folder / "images", **job, out=folder / "straight")
        patch.setattr(Trainer, "_leave", stop)
        with pytest.raises(Interrupted):
            distill("cifar_resnet20", "cifar_resnet20", folder / "images", **job, out=folder / "stopped")
    return folder


def test_free__names_every_setting_that_is_tried_here() -> None:
    of_other_data = {"data_dir", "label_column", "image_column", "unlabelled"}  # a folder has none
    assert free(Config) - of_other_data == OTHERS.keys()


@pytest.mark.usefixtures("unexported")
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_distill__is_continued_to_the_same_bits_with_another(
    name: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(runs / "stopped", tmp_path / "run"))
    settings = {**JOB, "data": runs / "images", "cache_dir": runs / "cache", "out": out}
    value = OTHERS[name]
    if name != "out":  # which is another for all of them
        settings[name] = {"data": runs / "moved", "cache_dir": tmp_path / "cache"}.get(name, value)
    distill(teacher="cifar_resnet20", student="cifar_resnet20", **settings)
    said = capsys.readouterr().err
    assert ("student: continued after 1 passes" in said) is (name != "overwrite")
    assert ("not to the same bits: threads 1 -> 2" in said) is (name == "threads")
    if name != "threads":
        assert bits(out) == bits(runs / "straight")
