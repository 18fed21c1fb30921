"""Teacher and student: where the feature map of each is read, and the size at which the two are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.data.content import STRETCHED
from factor_transfer.data.frames import SMALL, Frame
from factor_transfer.networks.features import Tapped, feature_map, feature_shape
from factor_transfer.networks.layers import find_layer
from factor_transfer.networks.load import Network, Role, load_network, own_size
from factor_transfer.util.arguments import AnySize, Size, as_size, names_in, written
from factor_transfer.util.checks import flag
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import ConfigError, ModelError, TrainingError

DEAD = 1e-6
"""A channel whose spread over images is less than this share of the map's largest value says nothing of them."""

Modules = Mapping[Role, nn.Module]
"""Networks that are given as modules, by role."""


@dataclass(frozen=True)
class Side:
    """A network, and where its feature map is read."""

    role: Role
    network: Network
    layer: str
    shape: tuple[int, int, int]  # (C, H, W)
    more: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    """Further layers, and their shapes."""

    def each(self) -> list[Side]:
        """A side of its own for each layer."""
        layers = ((self.layer, self.shape), *self.more)
        return [replace(self, layer=layer, shape=shape, more=()) for layer, shape in layers]

    def tapped(self, also: Sequence[str] = (), *, ends: bool = False) -> Tapped:
        """The network with its feature map, and those of other layers; with `ends` it runs no further than its own."""
        return Tapped(self.network.module, self.layer, flag=f"--{self.role}-layer", also=also, ends=ends)


@dataclass(frozen=True)
class Pair:
    """Teacher and student, and the size at which their maps are compared."""

    teacher: Side
    student: Side

    def each(self) -> list[Pair]:
        """A pair of its own for each two layers."""
        return [Pair(*sides) for sides in zip(self.teacher.each(), self.student.each(), strict=True)]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the factor: the smaller of the two maps'."""
        (_, *teacher), (_, *student) = self.teacher.shape, self.student.shape
        return min(teacher[0], student[0]), min(teacher[1], student[1])


@dataclass(frozen=True)
class Health:
    """What a feature map says of a few images."""

    finite: bool
    dead: float
    """Share of its channels that are the same for every image."""


def feature_health(side: Side, images: Tensor) -> Health:
    """Whether a network's features are alive, for two uint8 images (B, 3, H, W) or more."""
    place = next((parameter.device for parameter in side.network.module.parameters()), images.device)
    feature = feature_map(side.tapped(), side.network.norm.to(place)(images.to(place))).float()
    spread = feature.std(0).amax((1, 2))  # (C,)
    return Health(bool(feature.isfinite().all()), float((spread <= DEAD * feature.abs().max()).float().mean()))


def check_alive(side: Side, images: Tensor) -> Health:
    """Look at the teacher's feature map of a few images, uint8 (B, 3, H, W).

    Raises:
        TrainingError: it is not finite, or the same for all of them.
    """
    health = feature_health(side, images)
    if not health.finite or health.dead == 1:
        raise TrainingError(
            f"--teacher-layer {side.layer}",
            found="a feature map that is the same for every image" if health.finite else "features that are not finite",
            valid="features that tell images apart",
            hint="check the teacher's weights and normalisation, or name another --teacher-layer",
        )
    return health


def check_can_teach(teacher: Network, config: Config, labelled: bool) -> None:
    """That a teacher can do what the settings ask of it, on images that are `labelled` or not.

    Raises:
        ModelError: it has no trained weights, or cannot be trained on these images.
        ConfigError: it has no head that --kd-weight could ask.
    """
    if config.teacher_epochs and (teacher.headless or not labelled):
        raise ModelError(
            f"--teacher-epochs {config.teacher_epochs}",
            found="a teacher that gives no logits for these classes" if labelled else "no labels",
            valid="0 passes: its features are used as they are",
        )
    if not (config.teacher_epochs or teacher.pretrained):
        raise ModelError(
            f"--teacher {config.teacher}",
            found="no trained weights",
            valid="a trained network; its head does not matter",
            hint="give --teacher-weights FILE (or `pretrained`), or train it here with --teacher-epochs 20",
        )
    if config.kd_weight and not (config.teacher_epochs or teacher.knows_classes):
        raise ConfigError(f"--kd-weight {config.kd_weight:g}", found="a teacher without a head for these classes")


def teacher_size(config: Config, img_size: AnySize, module: nn.Module | None = None) -> Size:
    """Height and width of the images that the teacher sees where the student's are `img_size`, in pixels."""
    if config.teacher_size is not None or config.img_size is not None or max(as_size(img_size)) <= SMALL:
        return as_size(config.teacher_size or img_size)
    return as_size(own_size(config.teacher if module is None else module, "teacher"))


def load_side(
    role: Role,
    config: Config,
    num_classes: int,
    img_size: AnySize,
    module: nn.Module | None = None,
    *,
    dense: bool = False,
) -> Side:
    """A network as the settings name it, tapped. --data-seed owns the teacher's fresh weights, --seed the student's.

    Args:
        role: teacher or student.
        config: all settings.
        num_classes: classes of the data.
        img_size: height and width of the images, in pixels.
        module: the network itself, where it is given as a module.
        dense: its logits are a map; a teacher then sees the images at the student's size, if no other is given.

    Raises:
        ModelError: an unknown network or layer, or weights that do not fit it.
    """
    own, teacher = vars(config), role == "teacher"
    size = as_size(img_size)
    if teacher:
        size = as_size(config.teacher_size or img_size) if dense else teacher_size(config, img_size, module)
    network = load_network(
        own[role] if module is None else module,
        role=role,
        num_classes=num_classes,
        img_size=size,
        args=own[f"{role}_args"],
        weights=own[f"{role}_weights"],
        output=own[f"{role}_output"],
        seed=config.data_seed if teacher else config.seed,
        mean=config.teacher_mean if teacher else None,
        std=config.teacher_std if teacher else None,
        dense=dense,
    )
    for note in network.notes:
        say(f"{role}: {note}")
    if size != as_size(img_size):
        say(f"{role}: sees the images at {written(size)}")
    if Frame.of(size).stretch(as_size(img_size)) > STRETCHED:
        squashed = f"{written(img_size)} images are squashed to {written(size)}"
        warn(f"{role}: {squashed}, another aspect (--{role}-size takes height and width)")
    example = torch.zeros(2, 3, *size)
    shapes = [
        (layer, feature_shape(Tapped(network.module, layer, flag=flag(f"{role}_layer")), example))
        for layer in names_in(own[f"{role}_layer"]) or [find_layer(network.module, example, dense=dense)]
    ]
    return Side(role, network, *shapes[0], more=tuple(shapes[1:]))
