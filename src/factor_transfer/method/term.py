"""What a term of the student's loss is: the base class of those in `losses.py`, and of a user's own.

A term is a class of about 30 lines. It says which teacher outputs it `needs` and which student layers it `taps`, owns
what it trains (a translator, a regressor), returns its weighted loss, and is `made` from the settings. Its weight is a
field of `config.py`, whose metadata (`checks.Weight`) names the class. `objective` makes all terms whose weight is set.

Shapes: B samples, C channels, H x W the feature map, N classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from factor_transfer.config import Config


def numbered(name: str, count: int) -> list[str]:
    """Names of what belongs to each of so many pairs of layers; the first has the plain name.

    >>> numbered("factor", 3)
    ['factor', 'factor_1', 'factor_2']
    """
    return [f"{name}_{place}" if place else name for place in range(count)]


def align(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool a map (B, C, H, W) to `size` (height, width), which is no larger; (B, C, *size).

    Deviation: the paper's pairs have maps of one size. Where they differ, the larger is pooled to the smaller.

    >>> import torch
    >>> align(torch.zeros(2, 64, 8, 8), (4, 4)).shape
    torch.Size([2, 64, 4, 4])
    """
    return feature if tuple(feature.shape[-2:]) == tuple(size) else F.adaptive_avg_pool2d(feature, size)


class StudentOutputs(NamedTuple):
    """What the student gave for one batch."""

    logits: Tensor  # (B, N)
    feature: Tensor  # (B, C, H, W), of its own layer
    maps: Mapping[str, Tensor] = {}
    """Those of every layer that is tapped, by name."""

    def of(self, rows: Tensor) -> StudentOutputs:
        """What it gave for some of the images: `rows` (B,) bool."""
        maps = {layer: each[rows] for layer, each in self.maps.items()}
        return StudentOutputs(self.logits[rows], self.feature[rows], maps)


class Reader(nn.Module):
    """Makes one output of the teacher out of the map of one of its layers.

    Args:
        layer: the teacher's.
        size: height and width (H, W) that the map is pooled to.
    """

    shape: tuple[int, ...] | None = None
    """Of the output for one sample, where it is small enough to be cached; with None the teacher stays live."""

    def __init__(self, layer: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, feature: Tensor) -> Tensor:
        """The map (B, C, H, W) as it is, pooled."""
        return align(feature, self.size)


class Group(NamedTuple):
    """A layer of the teacher beside one of the student: the ends of their groups (stages), or a pair for factors."""

    teacher: str
    student: str
    channels: tuple[int, int]
    """Of the teacher's map, and of the student's."""
    size: tuple[int, int]
    """Height and width at which the two meet: the smaller of the maps'."""


class Given(NamedTuple):
    """What terms are made from."""

    config: Config
    pair: Any
    """Teacher and student: a `factor_transfer.pairs.Pair`."""
    labels: Callable[[float], Term]
    """The task's loss with the images' own labels, of a weight."""
    layers: Sequence[Group]
    """The pairs of layers whose factors are compared."""
    factor_channels: Sequence[int]
    """K of the teacher's factor, for each pair of layers."""
    groups: Sequence[Group]
    """The groups that attention and hints are compared at."""


class Term(nn.Module):
    """One summand of the student's loss. Parameters that it owns are trained with the student."""

    name: str
    label: str = ""
    """What people call a method that has the term."""
    weight: float | None = None
    """For people; the loss has been multiplied by it."""
    needs: frozenset[str] = frozenset()
    """Teacher outputs that the term reads: `logits`, `factor`, and those of its `readers`. A task whose terms need none
    runs no teacher."""
    taps: tuple[str, ...] = ()
    """Layers of the student whose maps the term reads, besides the student's own layer."""
    trains_head: bool = False
    """Whether the student's outputs learn from the term; where none of the terms does that, they are not measured."""
    supervised: bool = False
    """Whether the term is the task's own loss with the images' labels, or another that reads them. Where a batch has
    images without labels beside the others, such a term is given the labelled ones alone."""

    @classmethod
    def made(cls, given: Given) -> Sequence[Term]:
        """The term, or several, as the settings say; not called where its weight is 0."""
        raise NotImplementedError

    def readers(self) -> dict[str, Reader]:
        """How the teacher's outputs that the term adds are made, by name."""
        return {}

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The weighted loss, a scalar averaged over the batch; `labels` are those of its labelled images."""
        raise NotImplementedError

    def seen(self) -> dict[str, Tensor]:
        """What the last forward showed besides its loss, for the curves: scalars by name."""
        return {}

    def lines(self) -> Iterator[str]:
        """What a user is told before training."""
        if self.label and self.weight is not None:
            yield f"{self.label}: weight {self.weight:g}"

    def record(self) -> dict[str, Any]:
        """Weights that the settings leave to be found, and what they follow from; kept with the student's stage."""
        return {}
