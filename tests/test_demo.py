"""The demo, and what the package carries for it: images of Fashion-MNIST, and a teacher of them."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import factor_transfer.zoo  # noqa: F401 (it registers the networks)
from factor_transfer.config import DataConfig
from factor_transfer.data.images import Source
from factor_transfer.data.sources import open_source


@pytest.fixture(scope="module")
def fashion() -> Source:
    return open_source(DataConfig(data="fashion"))


def test_fashion__has_other_images_to_measure_on_than_to_train_on(fashion: Source) -> None:
    assert fashion.validation is not None
    train, validation = ([part.raw(at) for at in range(len(part))] for part in (fashion.train, fashion.validation))
    assert (len(train), len(validation)) == (2000, 2000)
    assert not set(train) & set(validation)


def test_fashion__its_teacher_knows_the_images_and_the_order_of_their_classes(fashion: Source) -> None:
    assert fashion.validation is not None and fashion.order is not None
    teacher = timm.create_model("cifar_resnet20.fashion", pretrained=True).eval()
    mean, std = (torch.tensor(teacher.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    grey = np.stack([np.asarray(fashion.validation.open(at)) for at in range(500)])
    images = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        said = teacher((images - mean) / std).argmax(1)
    right = [fashion.order[index] == label for index, label in zip(said, fashion.validation.labels, strict=False)]
    assert sum(right) / len(right) > 0.8


def test_fashion__the_plain_name_stays_an_untrained_network() -> None:
    assert "file" not in timm.create_model("cifar_resnet20").pretrained_cfg
    assert timm.create_model("cifar_resnet20").pretrained_cfg["input_size"] == (3, 32, 32)
