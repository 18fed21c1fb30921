"""The frozen teacher never changes, and folding its batch norms changes nothing that it says."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer.networks.features import Tapped, find_layer
from factor_transfer.networks.frozen import FrozenTeacher, folded


def with_statistics(module: nn.Module) -> nn.Module:
    """As after training: fresh batch norms are nearly the identity, and hide a wrong folding."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            for tensor, low, high in ((part.running_mean, -1, 1), (part.running_var, 0.5, 2),
                                      (part.weight.data, 0.5, 1.5), (part.bias.data, -1, 1)):  # fmt: skip
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    return module.eval()


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("cifar_resnet20", 32, 19), ("cifar_resnet20_b", 32, 21), ("cifar_wrn_16_1", 32, 6), ("cifar_vgg13", 32, 10),
        ("resnet18", 64, 20), ("test_efficientnet", 64, 13), ("mobilenetv3_small_050", 64, 34), ("vgg11_bn", 64, 8),
        ("regnetx_002", 64, 44), ("densenet121", 64, 59), ("test_vit", 160, 0), ("test_convnext", 64, 0),
    ],
)  # fmt: skip
def test_folded__says_what_the_plain_network_says(name: str, size: int, count: int) -> None:
    plain = with_statistics(timm.create_model(name, num_classes=7))
    tapped = Tapped(plain, find_layer(plain, images(size)))
    before = deepcopy(plain.state_dict())
    folding = folded(tapped, images(size))
    assert folding.count == count
    assert folding.difference < 1e-5
    other = torch.randn(3, 3, size, size)
    with torch.no_grad():
        for found, expected in zip(folding.network(other), tapped(other), strict=True):
            assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items()), "the given one is left"


def test_folded__keeps_the_tapped_convolution_as_it_is() -> None:
    plain = with_statistics(timm.create_model("resnet18", num_classes=7))
    tapped = Tapped(plain, "layer4.1.conv2")
    folding = folded(tapped, images(64))
    assert folding.count == 19
    with torch.no_grad():
        assert torch.allclose(folding.network(images(64))[1], tapped(images(64))[1], rtol=1e-3, atol=1e-4)


class ReadTwice(nn.Module):
    """Its convolution feeds a batch norm, and something that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        return self.pool(self.norm(made) + F.relu(made)).flatten(1)


class TwoNorms(ReadTwice):
    """One convolution, two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        return self.pool(self.norm(made) * self.other(made)).flatten(1)


class SharedConv(ReadTwice):
    """One convolution that runs twice, once without its batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.norm(self.conv(x)) + self.conv(-x)).flatten(1)


@pytest.mark.parametrize("kind", [ReadTwice, TwoNorms, SharedConv])
def test_folded__leaves_a_network_plain_where_folding_would_change_it(kind: type[ReadTwice]) -> None:
    tapped = Tapped(with_statistics(kind()), "norm")
    folding = folded(tapped, images(8))
    assert folding.count == 0
    with torch.no_grad():
        for found, expected in zip(folding.network(images(8)), tapped(images(8)), strict=True):
            assert torch.equal(found, expected)


class Counts(nn.Module):
    """Writes to a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


def test_frozen_teacher__knows_whether_it_changed() -> None:
    still = FrozenTeacher(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    still.train()
    still(images(8))
    assert still.unchanged()
    moving = FrozenTeacher(Counts())
    moving(images(8))
    assert not moving.unchanged()
