"""The frozen teacher never changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from factor_transfer.networks.features import FrozenTeacher


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
    still(torch.randn(2, 3, 8, 8))
    assert still.unchanged()
    moving = FrozenTeacher(Counts())
    moving(torch.randn(2, 3, 8, 8))
    assert not moving.unchanged()
