"""The objectives. One distillation task adds up small terms over one shared forward of teacher and student.

A term is a class of about 20 lines: it says which teacher outputs it `needs`, owns what it trains (a translator), and
returns its weighted loss. A new method is a new term; see `FactorTransfer`.

Shapes: B samples, C channels, K factor channels, H x W the feature map, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from factor_transfer.features import Logits, Tapped, align
from factor_transfer.health import DEAD, relative_variety
from factor_transfer.method import (
    Paraphraser,
    Translator,
    factor_transfer_loss,
    reconstruction_loss,
)

Result = dict[str, Any]
"""What a task's forward returns: `loss`, `output` (logits or None), and its parts by name."""


class StudentOutputs(NamedTuple):
    """What the student gave for one batch."""

    logits: Tensor  # (B, N)
    feature: Tensor  # (B, C, H, W)


class TeacherSide(nn.Module):
    """From pixels to what the terms need of the teacher; frozen by its owner.

    Args:
        network: the teacher, tapped at its layer.
        norm: its own input normalisation.
        size: height and width (H, W) that its feature map is pooled to where it is the larger one.
        paraphraser: makes the factors; None while it is itself being trained.
    """

    def __init__(
        self, network: Tapped, norm: nn.Module, size: tuple[int, int], paraphraser: Paraphraser | None = None
    ) -> None:
        super().__init__()
        self.network, self.norm, self.size, self.paraphraser = network, norm, size, paraphraser

    def forward(self, images: Tensor, index: Tensor | None = None, view: int = 0) -> dict[str, Tensor]:
        """uint8 images (B, 3, H, W) -> `logits` (B, N), `feature` (B, C, H, W), and `factor` (B, K, H, W).

        `index` and `view` say which images they are; only a cached teacher needs to know.
        """
        output, feature = self.network(self.norm(images))
        feature = align(feature, self.size)
        outputs = {"logits": Logits()(output), "feature": feature}
        if self.paraphraser is not None:
            outputs["factor"] = self.paraphraser.encode(feature)
        return outputs


class Term(nn.Module):
    """One summand of the student's loss."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Outputs of `TeacherSide` that the term reads; a task without such a term runs no teacher."""

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The weighted loss, a scalar averaged over the batch."""
        raise NotImplementedError

    def seen(self) -> dict[str, Tensor]:
        """What the last forward showed besides its loss, for the curves: scalars by name."""
        return {}


class Labels(Term):
    """Cross-entropy with the images' own labels (equation 3).

    Args:
        weight: its weight.
    """

    name = "cross_entropy"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """labels: (B,) class indices."""
        logits = student.logits if student.logits.dtype == torch.float64 else student.logits.float()
        return self.weight * F.cross_entropy(logits, labels)


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
    """

    name = "factor_transfer"
    needs = frozenset({"factor"})

    def __init__(self, translator: Translator, beta: float, p: float = 1) -> None:
        super().__init__()
        self.translator, self.beta, self.p = translator, beta, p

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Pools the student's map to the factor's height and width where it is the larger one."""
        factor = teacher["factor"]
        translated = self.translator(align(student.feature, (factor.shape[-2], factor.shape[-1])))
        self._variety = relative_variety(translated.detach(), factor)
        return self.beta * factor_transfer_loss(translated, factor, self.p)

    def seen(self) -> dict[str, Tensor]:
        """How much the translator's output varies over a batch, as a share of how much the factors do."""
        return {"factor_variety": self._variety}


class Trainee(nn.Module):
    """Student and terms behind one forward: all that is trained, as distributed wrappers want it."""

    def __init__(self, student: Tapped, norm: nn.Module, terms: Sequence[Term]) -> None:
        super().__init__()
        self.student, self.norm = student, norm
        self.terms = nn.ModuleDict({term.name: term for term in terms})

    def forward(self, images: Tensor, labels: Tensor, teacher: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 images (B, 3, H, W) -> logits (B, N) and the weighted loss of every term."""
        output, feature = self.student(self.norm(images))
        student = StudentOutputs(Logits()(output), feature)
        return student.logits, {name: term(student, teacher, labels) for name, term in self.terms.items()}

    def classifier(self) -> nn.Module:
        """uint8 images (B, 3, H, W) -> logits (B, N)."""
        return nn.Sequential(self.norm, self.student.module, Logits())


class DistillationTask(TrainingTask):  # type: ignore[misc] # timm ships no types
    """The student's objective: the sum of its terms. With `Labels` alone it is plain training.

    Args:
        student: the network to train, tapped at its layer.
        norm: its input normalisation.
        terms: the summands.
        teacher: a frozen `TeacherSide`; needed by terms that read teacher outputs.
    """

    trainable_module: Trainee

    def __init__(
        self, student: Tapped, norm: nn.Module, terms: Sequence[Term], teacher: nn.Module | None = None
    ) -> None:
        super().__init__(verbose=False)
        needs = frozenset[str]().union(*(term.needs for term in terms))
        assert teacher is not None or not needs, f"terms need {sorted(needs)} of a teacher"
        self.trainable_module = Trainee(student, norm, terms)
        self.teacher = teacher if needs else None

    def forward(self, input: Tensor, target: Tensor, index: Tensor | None = None, view: int = 0) -> Result:
        """One step's losses for uint8 images (B, 3, H, W) and labels (B,); `index` (B,) and `view` say which images."""
        teacher = self.teacher(input, index, view) if self.teacher is not None else {}
        logits, losses = self.trainable_module(input, target, teacher)
        output = logits if Labels.name in losses else None  # without labels there is no top-1 to show
        seen = {name: value for term in unwrap_model(self.trainable_module).terms.values()
                for name, value in term.seen().items()}  # fmt: skip
        return {"loss": torch.stack(list(losses.values())).sum(), "output": output, **losses, **seen}

    def troubles(self, means: dict[str, float]) -> list[str]:
        """What a user should know of a pass with these mean values."""
        if means.get("factor_variety", 1.0) >= DEAD:
            return []
        share = f"{means['factor_variety']:.1e} of the variety of the factors it should follow"
        return [
            f"the translator is dead: its output is nearly the same for every image ({share}); lower --lr or --beta"
        ]

    def trained(self) -> Trainee:
        """What is evaluated and shipped: the trained module, or the average of its weights where one is kept."""
        average = self.get_trainable_module(ema=True)
        trained: Trainee = unwrap_model(self.trainable_module if average is None else average.module)
        return trained


class ParaphraserTask(TrainingTask):  # type: ignore[misc] # timm ships no types
    """The paraphraser's objective: reconstruct the frozen teacher's feature map, without labels (equation 1).

    Args:
        paraphraser: what is trained.
        teacher: a frozen `TeacherSide` without paraphraser.
        norm: the reconstruction loss, `l1` or `l2`.
    """

    trainable_module: nn.Module

    def __init__(self, paraphraser: Paraphraser, teacher: nn.Module, norm: Literal["l1", "l2"] = "l1") -> None:
        super().__init__(verbose=False)
        self.trainable_module, self.teacher, self.norm = paraphraser, teacher, norm

    def forward(self, input: Tensor, target: Tensor, index: Tensor | None = None, view: int = 0) -> Result:
        """One step's loss for uint8 images (B, 3, H, W); `target` is not read."""
        feature = self.teacher(input, index, view)["feature"]
        return {"loss": reconstruction_loss(self.trainable_module(feature), feature, self.norm), "output": None}

    def troubles(self, means: dict[str, float]) -> list[str]:
        """Nothing yet: a paraphraser begins with the mean map, and is judged when it is trained."""
        return []
