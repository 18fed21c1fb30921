"""Teacher and student side by side: where each feature map is read, and the size at which the two meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from factor_transfer.config import Config, flag
from factor_transfer.console import say
from factor_transfer.features import Tapped, feature_shape, find_layer
from factor_transfer.models import Network, Role, load_network

Modules = Mapping[Role, nn.Module]
"""Networks that are given as modules, by role."""


@dataclass(frozen=True)
class Side:
    """A network, and where its feature map is read."""

    role: Role
    network: Network
    layer: str
    shape: tuple[int, int, int]  # (C, H, W)

    def tapped(self) -> Tapped:
        """The network with its feature map."""
        return Tapped(self.network.module, self.layer, flag=f"--{self.role}-layer")


@dataclass(frozen=True)
class Pair:
    """Teacher and student, and the size at which their maps meet."""

    teacher: Side
    student: Side

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the factor: the smaller of the two maps'."""
        (_, *teacher), (_, *student) = self.teacher.shape, self.student.shape
        return min(teacher[0], student[0]), min(teacher[1], student[1])


def load_side(role: Role, config: Config, num_classes: int, img_size: int, module: nn.Module | None = None) -> Side:
    """A network as the settings name it, tapped. --data-seed owns the teacher's fresh weights, --seed the student's.

    Args:
        role: teacher or student.
        config: all settings.
        num_classes: classes of the data.
        img_size: side of the images, in pixels.
        module: the network itself, where it is given as a module.

    Raises:
        ModelError: an unknown network or layer, or weights that do not fit it.
    """
    own, teacher = vars(config), role == "teacher"
    network = load_network(
        own[role] if module is None else module,
        role=role,
        num_classes=num_classes,
        img_size=img_size,
        args=own[f"{role}_args"],
        weights=own[f"{role}_weights"],
        seed=config.data_seed if teacher else config.seed,
        mean=config.teacher_mean if teacher else None,
        std=config.teacher_std if teacher else None,
    )
    for note in network.notes:
        say(f"{role}: {note}")
    example = torch.zeros(2, 3, img_size, img_size)
    layer = own[f"{role}_layer"] or find_layer(network.module, example)
    return Side(role, network, layer, feature_shape(Tapped(network.module, layer, flag=flag(f"{role}_layer")), example))
