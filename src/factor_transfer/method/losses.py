"""The terms of the student's loss, and what they read of the teacher.

A term is a class of about 20 lines: it says which teacher outputs it `needs` and which student layers it `taps`, owns
what it trains (a translator, a regressor), and returns its weighted loss. A new method is a new term; `objective` makes
them from the settings.

Shapes: B samples, C channels, K factor channels, H x W the feature map, N classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factor_transfer.method.factor_transfer import Paraphraser, Straight, factor_transfer_loss
from factor_transfer.method.health import relative_variety


def numbered(name: str, place: int) -> str:
    """What belongs to the pair of layers at `place`; the first has the plain name.

    >>> numbered("factor", 0), numbered("factor", 1)
    ('factor', 'factor_1')
    """
    return f"{name}_{place}" if place else name


def align(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool a map (B, C, H, W) to `size` (height, width), which is no larger; (B, C, *size).

    Deviation: the paper's pairs have maps of one size. Where they differ, the larger is pooled to the smaller.

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


SAMPLE = 32
"""Samples of a batch that tell whether a factor varies."""


class Term(nn.Module):
    """One summand of the student's loss. Parameters that it owns are trained with the student."""

    name: str
    needs: frozenset[str] = frozenset()
    """Teacher outputs that the term reads: `logits`, `factor`, and those of its `readers`. A task whose terms need none
    runs no teacher."""
    taps: tuple[str, ...] = ()
    """Layers of the student whose maps the term reads, besides the student's own layer."""

    def readers(self) -> dict[str, Reader]:
        """How the teacher's outputs that the term adds are made, by name."""
        return {}

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The weighted loss, a scalar averaged over the batch."""
        raise NotImplementedError

    def seen(self) -> dict[str, Tensor]:
        """What the last forward showed besides its loss, for the curves: scalars by name."""
        return {}


class Labels(Term):
    """The loss with the images' own labels (equation 3): cross-entropy, or that of another task.

    Args:
        weight: its weight.
        loss: of outputs (B, N) and labels; a scalar, averaged over the batch.
        name: what the loss is called in metrics.
    """

    def __init__(
        self,
        weight: float = 1.0,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        name: str = "cross_entropy",
    ) -> None:
        super().__init__()
        self.weight, self.loss, self.name = weight, loss, name

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """labels: (B,) class indices, or what the task makes of them."""
        logits = student.logits if student.logits.dtype == torch.float64 else student.logits.float()
        return self.weight * self.loss(logits, labels)


class SoftTargets(Term):
    """Knowledge distillation (Hinton, Vinyals, Dean, arXiv 1503.02531): T^2 x KL(teacher || student) at temperature T.

    Args:
        weight: its weight.
        temperature: T.
    """

    name = "soft_targets"
    needs = frozenset({"logits"})

    def __init__(self, weight: float, temperature: float = 4.0) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compares logits (B, N); `labels` are not read."""
        ours, theirs = (F.log_softmax(x.float() / self.temperature, 1) for x in (student.logits, teacher["logits"]))
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return self.weight * self.temperature**2 * divergence


class FactorTransfer(Term):
    """beta x factor transfer loss (equations 2 and 4), through a translator that is trained with the student.

    Args:
        translator: from the student's channels to the factor's.
        beta: weight.
        p: norm of the difference.
        layer: of the student, where it is not the student's own.
        place: of its pair of layers, where there are several.
    """

    def __init__(
        self, translator: nn.Module, beta: float, p: float = 1, layer: str | None = None, place: int = 0
    ) -> None:
        super().__init__()
        self.translator, self.beta, self.p, self.place = translator, beta, p, place
        self.name, self.factor = numbered("factor_transfer", place), numbered("factor", place)
        self.needs = frozenset({self.factor})
        self.taps = (layer,) if layer is not None else ()

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Pools the student's map to the factor's height and width where it is the larger one."""
        factor = teacher[self.factor]
        feature = student.maps[self.taps[0]] if self.taps else student.feature
        translated = self.translator(align(feature, (factor.shape[-2], factor.shape[-1])))
        self._variety = relative_variety(translated[:SAMPLE].detach(), factor[:SAMPLE])
        return self.beta * factor_transfer_loss(translated, factor, self.p)

    def seen(self) -> dict[str, Tensor]:
        """How much the translator's output varies over a batch, as a share of how much the factors do."""
        return {numbered("factor_variety", self.place): self._variety}


class Encoded(Reader):
    """The teacher's factor of a further pair of layers, (B, K, H, W).

    Args:
        layer: the teacher's.
        size: height and width (H, W) of the factor.
        paraphraser: trained.
    """

    def __init__(self, layer: str, size: tuple[int, int], paraphraser: Paraphraser | Straight) -> None:
        super().__init__(layer, size)
        self.paraphraser = paraphraser
        self.shape = (paraphraser.factor_channels, *size)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, *size)."""
        return self.paraphraser.encode(align(feature, self.size))


class Group(NamedTuple):
    """The end of a teacher's group (stage) beside that of a student's."""

    teacher: str
    student: str
    channels: tuple[int, int]
    """Of the teacher's map, and of the student's."""
    size: tuple[int, int]
    """Height and width at which the two meet: the smaller of the maps'."""


def attention(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """The normalised spatial attention of a map (B, C, H, W): (B, 1, *size).

    The sum of squares over channels, divided by its L2 norm over places (Zagoruyko & Komodakis, section 3.1).
    Deviation: where `size` is smaller than the map, the squares are pooled first.

    >>> attention(torch.tensor([[[[1.0, 2.0]], [[1.0, 2.0]]]]), (1, 2))  # squares summed: 2 and 8
    tensor([[[[0.2425, 0.9701]]]])
    """
    precise = feature if feature.dtype == torch.float64 else feature.float()
    energy = align(precise.square().mean(1, keepdim=True), size)  # (B, 1, *size)
    return F.normalize(energy.flatten(1)).view_as(energy)


class Attention(Reader):
    """The teacher's attention map, (B, 1, H, W)."""

    def __init__(self, layer: str, size: tuple[int, int]) -> None:
        super().__init__(layer, size)
        self.shape = (1, *size)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, *size)."""
        return attention(feature, self.size)


class AttentionTransfer(Term):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017, equation 2), summed over groups.

    As in the authors' program: weight x the mean over places of the squared difference of the normalised attention
    maps. (Equation 2 has weight / 2 x their L2 distance; a mean shrinks with the map, so that the term is at most
    2 x weight / places for each group.)

    Args:
        groups: where the maps are compared.
        weight: their beta, 1000 in the program.
    """

    name = "attention_transfer"

    def __init__(self, groups: Sequence[Group], weight: float = 1000) -> None:
        super().__init__()
        self.groups, self.weight = tuple(groups), weight
        self.taps = tuple(group.student for group in groups)
        self.needs = frozenset(self.readers())

    def readers(self) -> dict[str, Reader]:
        """`attention_0`, ...: one for each group."""
        return {f"attention_{place}": Attention(group.teacher, group.size) for place, group in enumerate(self.groups)}

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compares the maps of every group; `labels` are not read."""
        losses = [
            F.mse_loss(attention(student.maps[group.student], group.size), teacher[f"attention_{place}"].float())
            for place, group in enumerate(self.groups)
        ]
        return self.weight * torch.stack(losses).sum()


class Hint(Term):
    """Hint regression (Romero et al., FitNets, ICLR 2015, equation 3): the teacher's map out of the student's.

    Deviations: the mean of the squared error over elements, not half its sum, so that a learning rate does not depend
    on size. Maps of other sizes are pooled to the smaller: the paper's kernel, which makes up for them, is then 1x1.
    The regressor is linear, whatever ends the teacher's group.

    Args:
        group: the teacher's hint layer and the student's guided layer.
        weight: its weight.
    """

    name = "hint"
    needs = frozenset({"hint"})

    def __init__(self, group: Group, weight: float = 1.0) -> None:
        super().__init__()
        self.group, self.weight, self.taps = group, weight, (group.student,)
        theirs, ours = group.channels
        self.regressor = nn.Conv2d(ours, theirs, 1)

    def readers(self) -> dict[str, Reader]:
        """`hint`: the whole map."""
        return {"hint": Reader(self.group.teacher, self.group.size)}

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compares the regressed map with the hint; `labels` are not read."""
        ours = self.regressor(align(student.maps[self.group.student], self.group.size))
        theirs = teacher["hint"]
        if ours.dtype != torch.float64:
            ours, theirs = ours.float(), theirs.float()
        return self.weight * F.mse_loss(ours, theirs)
