"""The shared teachers on all 10,000 real validation images, in float32: data, normalisation, weights, evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from factor_transfer.config import DataConfig
from factor_transfer.data import Dataset, open_data
from factor_transfer.engine import Engine
from factor_transfer.models import load_network
from factor_transfer.train import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cifar10(shared: Path) -> Dataset:
    return open_data(DataConfig(data=str(shared / "cifar10-jpeg")), default_size=lambda: 32)


def test_data__is_all_of_cifar10_with_its_classes_in_order(cifar10: Dataset) -> None:
    assert (len(cifar10.train), len(cifar10.validation), cifar10.img_size) == (50_000, 10_000, 32)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert cifar10.classes == tuple(names.split())


@pytest.mark.parametrize(
    ("file", "top1"),
    [("resnet56-cifar10-jpeg.safetensors", 89.96), ("third-party-resnet56-cifar10.th", 83.2)],
)
def test_evaluate__gives_the_shared_teachers_accuracy(cifar10: Dataset, shared: Path, file: str, top1: float) -> None:
    weights = str(shared / "checkpoints" / file)
    teacher = load_network("cifar_resnet56", role="teacher", num_classes=10, img_size=32, weights=weights)
    classifier = nn.Sequential(teacher.norm, teacher.module)
    found = evaluate(classifier, cifar10.validation, Engine("cpu"), batch_size=250, precise=True)
    print(file, found)
    assert found["top1"] == pytest.approx(top1, abs=0.05)
