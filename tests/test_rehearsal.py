"""What fails only at a run's end, or with its last batch, is told before anything is trained."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from factor_transfer import distill
from factor_transfer.training.trainer import training_chunks
from factor_transfer.util.errors import ConfigError, FactorTransferError, ModelError, RunError

JOB: dict[str, Any] = {"teacher_epochs": 8, "teacher_lr": 0.1, "epochs": 1, "paraphraser_epochs": 1, "lr": 0.05,
                       "batch_size": 12, "device": "cpu", "threads": 1, "log_with": "none"}  # fmt: skip


class Net(nn.Module):
    """A user's network; `how` says what is wrong with it."""

    def __init__(self, how: str = "", stride: int = 2) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.how == "fails in training" and self.training:
            images = nn.functional.avg_pool2d(images, 99)
        pooled = self.body(images).mean((2, 3))
        if self.how == "squeezes":
            pooled = pooled.squeeze()
        if self.how == "keeps elsewhere":
            self.steps += self.training
            pooled = pooled * (1 + self.steps)
        found: Tensor = self.head(pooled)
        return found


class Colours(nn.Module):
    """A teacher that knows the images of these tests: whose class shows in the colour that is strongest."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 2, 2, bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images).mean((2, 3))
        return found


def make(how: str = "") -> nn.Module:
    """From its name; each time another one, where `how` says so."""
    module = Net()
    if how == "grows":
        made.append(module)
        module.body.append(nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in made)))
    return module


made: list[nn.Module] = []


def refused(run: Path, error: type[FactorTransferError], words: str, **settings: Any) -> None:
    """The run ends with these words, and nothing of it was trained."""
    with pytest.raises(error, match=f"(?s){words}"):
        distill(out=run, **{**JOB, **settings})
    assert not (run / "stages").exists()
    assert not (run / "checkpoints").exists()
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("fails in training", "it fails in training, on 8 images: "),
        ("squeezes", "it fails on 1 image in evaluation|an output of .* for one image"),
        ("keeps elsewhere", "built again from its settings.*buffers that are not persistent"),
    ],
)
def test_distill__tells_what_would_fail_later(role: str, how: str, words: str, images: Path, tmp_path: Path) -> None:
    networks = {"teacher": Net(), "student": Net()} | {role: Net(how)}
    refused(tmp_path / "run", ModelError, f"--{role} Net\n.*{words}", data=images, **networks)


def test_distill__tells_that_a_network_is_another_each_time_it_is_built(images: Path, tmp_path: Path) -> None:
    made.clear()
    name = f"{__name__}:make"
    settings = {"teacher": Net(), "student": name, "student_args": {"how": "grows"}}
    refused(tmp_path / "run", ModelError, "--student .*built again.*missing", data=images, **settings)


def test_distill__batches_of_one_image_train_what_can_and_are_told_else(images: Path, tmp_path: Path) -> None:
    settings = {**JOB, "data": images, "teacher": Colours(), "teacher_epochs": 0, "batch_size": 1}
    result = distill(out=tmp_path / "run", student=Net(), **settings)
    assert result.summary["student"]["top1"] >= 0
    words = r"--batch-size 1\n.*--student Net cannot train on a batch of 1 image: .*more than 1 value"
    refused(tmp_path / "other", ConfigError, words, student=Net(stride=14), **settings)


def test_training_chunks__leave_no_image_alone() -> None:
    """Whatever the number of images and the size of a batch: batch norm cannot train on one."""
    for count in range(2, 50):
        for size in range(2, 20):
            chunks = training_chunks(np.arange(count), size)
            assert min(map(len, chunks)) >= 2, (count, size)
            assert np.concatenate(chunks).tolist() == list(range(count))


def test_distill__tells_that_the_disk_is_too_full(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 1000, 1000))
    refused(tmp_path / "run", RunError, "--out .*0 MB free", data=images, teacher=Net(), student=Net())
