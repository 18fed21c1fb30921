"""Forward pass and losses of one batch: the student's, which are a sum of terms (see `method/term.py`), and the
paraphraser's. The update itself is `Trainer.step`.

Shapes: B samples, C channels, K factor channels, H x W the feature map, N classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from factor_transfer.data.splits import NO_LABEL, Batch, View
from factor_transfer.method.factor_transfer import Straight, reconstruction_loss
from factor_transfer.method.health import DEAD
from factor_transfer.method.slim import AnyParaphraser
from factor_transfer.method.term import Reader, StudentOutputs, Term, align
from factor_transfer.networks.features import Tapped
from factor_transfer.tasks.base import Task


class Known(NamedTuple):
    """The labelled images of a batch that has others beside them."""

    rows: Tensor  # (B,) bool
    weight: float
    """Of a mean over them: their number, over what their share of a pass would give of the batch. So each labelled
    image of a pass counts alike, whichever batch, and part of a batch, it is in."""


Result = dict[str, Any]
"""What a task's forward returns: `loss`, `output` (logits or None), and its parts by name."""


class TeacherSide(nn.Module):
    """From pixels to what the terms need of the teacher; frozen by its owner.

    Args:
        network: the teacher, tapped at its layer.
        norm: its own input normalisation.
        size: height and width (H, W) that its feature map is pooled to where it is the larger one.
        paraphraser: makes `factor` of the map of its own layer. (Runs give `readers`, one for each pair of layers.)
        readers: make further outputs, by name, of the maps of other layers, which `network` taps too.
    """

    def __init__(
        self,
        network: Tapped,
        norm: nn.Module,
        size: tuple[int, int],
        paraphraser: AnyParaphraser | Straight | None = None,
        readers: Mapping[str, Reader] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.norm, self.size, self.paraphraser = network, norm, size, paraphraser
        self.readers = nn.ModuleDict(readers)

    def forward(self, images: Tensor, index: Tensor | None = None, view: View = 0) -> dict[str, Tensor]:
        """uint8 images (B, 3, H, W) -> `logits` (B, N), `feature` (B, C, H, W), `factor` (B, K, H, W), the readers'.

        `index` and `view` say which images they are; only a cached teacher needs to know.
        """
        output, maps = self.network.maps(self.norm(images))
        feature = align(maps[self.network.layer], self.size)
        outputs = {"logits": output, "feature": feature}
        if self.paraphraser is not None:
            outputs["factor"] = self.paraphraser.encode(feature)
        for name, reader in self.readers.items():
            outputs[name] = reader(maps[str(reader.layer)])
        return outputs


class Trainee(nn.Module):
    """Student and terms behind one forward: all that is trained, as distributed wrappers want it."""

    def __init__(self, student: Tapped, norm: nn.Module, terms: Sequence[Term]) -> None:
        super().__init__()
        self.student, self.norm = student, norm
        self.terms = nn.ModuleDict({term.name: term for term in terms})

    def forward(
        self, images: Tensor, labels: Tensor, teacher: dict[str, Tensor], known: Known | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """uint8 images (B, 3, H, W) -> logits (B, N) and the weighted loss of every term.

        Where only the `known` images have labels, `labels` and the logits are theirs.
        """
        output, maps = self.student.maps(self.norm(images))
        student = StudentOutputs(output, maps[self.student.layer], maps)
        if known is None:
            return student.logits, {name: term(student, teacher, labels) for name, term in self.terms.items()}
        own, theirs = student.of(known.rows), {name: each[known.rows] for name, each in teacher.items()}
        losses = {
            name: known.weight * term(own, theirs, labels) if term.supervised else term(student, teacher, labels)
            for name, term in self.terms.items()
        }
        return own.logits, losses

    def classifier(self) -> nn.Module:
        """uint8 images (B, 3, H, W) -> logits (B, N)."""
        return nn.Sequential(self.norm, self.student.module)


class DistillationTask(TrainingTask):  # type: ignore[misc] # timm ships no types
    """The student's objective: the sum of its terms. With `Labels` as the only term it is plain training.

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
        self.terms = tuple(terms)  # no submodules: the trainee has them
        self.trainable_module = Trainee(student, norm, terms)
        self.teacher = teacher if needs else None

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        index: Tensor | None = None,
        view: View = 0,
        known: Known | None = None,
    ) -> Result:
        """One step's losses for uint8 images (B, 3, H, W) and labels (B,); `index` (B,) and `view` say which images.

        Where only the `known` images have labels, `target` and the `output` are theirs.
        """
        teacher = self.teacher(input, index, view) if self.teacher is not None else {}
        logits, losses = self.trainable_module(input, target, teacher, *([] if known is None else [known]))
        measured = any(term.supervised for term in self.terms)  # without labels there is no metric to show
        seen = {name: value for term in unwrap_model(self.trainable_module).terms.values()
                for name, value in term.seen().items()}  # fmt: skip
        output = logits if measured else None
        return {"loss": torch.stack(list(losses.values())).sum(), "output": output, **losses, **seen}

    def troubles(self, means: dict[str, float]) -> list[str]:
        """What a user should know of a pass with these mean values."""
        dead = [value for name, value in means.items() if name.startswith("factor_variety") and value < DEAD]
        return [
            f"the translator is dead: its output is nearly the same for every image ({value:.1e} of the variety of the "
            "factors it should follow); lower --lr or --beta"
            for value in dead
        ]

    def trained(self) -> Trainee:
        """What is evaluated and shipped: the trained module, or the average of its weights where one is kept."""
        average = self.get_trainable_module(ema=True)
        trained: Trainee = unwrap_model(self.trainable_module if average is None else average.module)
        return trained


class ParaphraserTask(TrainingTask):  # type: ignore[misc] # timm ships no types
    """The paraphraser's objective: reconstruct the frozen teacher's feature map, without labels (equation 1).

    Args:
        paraphraser: what is trained: it gives the reconstruction of a feature map.
        teacher: a frozen `TeacherSide` without paraphraser.
        norm: the reconstruction loss, `l1` or `l2`.
    """

    trainable_module: nn.Module

    def __init__(self, paraphraser: nn.Module, teacher: nn.Module, norm: Literal["l1", "l2"] = "l1") -> None:
        super().__init__(verbose=False)
        self.trainable_module, self.teacher, self.norm = paraphraser, teacher, norm

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        index: Tensor | None = None,
        view: View = 0,
        known: Known | None = None,
    ) -> Result:
        """One step's loss for uint8 images (B, 3, H, W); `target` and `known` are not read."""
        feature = self.teacher(input, index, view)["feature"]
        return {"loss": reconstruction_loss(self.trainable_module(feature), feature, self.norm), "output": None}

    def troubles(self, means: dict[str, float]) -> list[str]:
        """Nothing yet: a paraphraser begins with the mean map, and is judged when it is trained."""
        return []


def placed(batch: Batch, task: Task, share: float, device: torch.device) -> tuple[Tensor, Tensor, Known | None]:
    """Images and targets of a batch, on the device; and where not all are labelled, those that are.

    Args:
        batch: images and labels.
        task: makes targets of labels.
        share: of labelled images in a pass.
        device: where to.
    """
    if share == 1:
        return batch.image.to(device), task.targets(batch).to(device), None
    rows = batch.label != NO_LABEL
    own = Batch(batch.image[rows], batch.label[rows], batch.index[rows])  # (no images with masks have others beside)
    known = Known(rows.to(device), len(own.label) / (share * len(rows)))
    return batch.image.to(device), task.targets(own).to(device), known
