"""Segmentation: a class for every pixel, learned by cross-entropy, measured by the intersection over the union.

The truth is a mask beside each image (`data/masks.py`). A network gives a map of logits; one that is smaller than the
mask is brought to its size (bilinear). Pixels that the mask ignores are neither trained nor measured.

Shapes: B images of H x W pixels, N classes; the network's map h x w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from factor_transfer.data.masks import IGNORED
from factor_transfer.data.splits import Batch
from factor_transfer.tasks.base import Guess, Task
from factor_transfer.tasks.metric import Metric
from factor_transfer.util.arguments import Size


class Segmentation(Task):
    """`--task segmentation`."""

    metrics = (
        Metric("miou", "mIoU", "%", hub="mean_iou"),
        Metric("pixel_accuracy", "pixel accuracy", "%"),
        Metric("loss", "cross-entropy", digits=4, higher_is_better=False),
    )
    loss_name = "cross_entropy"
    hub = "image-segmentation"
    gives = "a map of logits"
    dense = True
    other_answers = 1e-3

    def targets(self, batch: Batch) -> Tensor:
        """The masks, int64 (B, H, W); of kept maps, which have none and are trained without labels, the labels."""
        return batch.label if batch.mask is None else batch.mask.long()

    def example(self, images: Tensor) -> Tensor:
        """All pixels of the first class, int64 (B, H, W)."""
        return torch.zeros(len(images), *images.shape[-2:], dtype=torch.long, device=images.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of an image's pixels, averaged over images: (B, N, h, w) with (B, H, W).

        Deviation: the usual mean is over all pixels of the batch. Both are the same where no pixel is ignored; this one
        is also the same for any share of a batch that a process has, and finite where a mask ignores all of an image.

        >>> outputs, targets = torch.zeros(2, 4, 1, 1), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> targets[1] = IGNORED
        >>> Segmentation().loss(outputs, targets)  # log(4) for the first image, nothing for the second
        tensor(0.6931)
        """
        each = F.cross_entropy(fitted(outputs, targets), targets, ignore_index=IGNORED, reduction="none")
        kept = (targets != IGNORED).flatten(1).sum(1).clamp_min(1)
        return (each.flatten(1).sum(1) / kept).mean()

    def step(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The share of pixels that are right, in percent: of one batch it says more than mIoU, and is no sum."""
        kept = targets != IGNORED
        right = (fitted(outputs, targets).argmax(1) == targets)[kept]
        return {"pixel_accuracy": 100 * right.float().sum() / kept.sum().clamp_min(1)}

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Pixels by class and answer (N, N), and the sum of their cross-entropy."""
        outputs, classes = fitted(outputs, targets), outputs.shape[1]
        loss = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="sum")
        kept = targets != IGNORED
        places = classes * targets[kept] + outputs.argmax(1)[kept]
        confusion = torch.bincount(places, minlength=classes**2).view(classes, classes)
        return {"confusion": confusion, "loss": loss}

    def values(self, sums: Mapping[str, Any], images: int) -> dict[str, Any]:
        """mIoU over the classes that are there or were answered, and right pixels, in percent; mean cross-entropy."""
        confusion = sums["confusion"].double()
        pixels = confusion.sum().clamp_min(1)
        iou = overlaps(confusion)
        there = iou[~iou.isnan()]
        return {
            "miou": 100 * there.mean() if len(there) else 0.0,
            "pixel_accuracy": 100 * confusion.diagonal().sum() / pixels,
            "loss": float(sums["loss"]) / pixels,
        }

    def by_class(self, sums: Mapping[str, Any]) -> list[float | None]:
        """The intersection over union of each class in percent; None where it is neither there nor answered."""
        return [None if np.isnan(each) else 100 * each for each in overlaps(sums["confusion"].double()).tolist()]

    def guess(self, labels: np.ndarray, classes: Sequence[str]) -> Guess:
        """Even chance where classes are evenly there; and the most that one class everywhere could have."""
        one = "one class everywhere, at the very most,"
        return Guess(100 / (2 * len(classes) - 1), 100 / len(classes), one, perfect=100)

    def answers(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """How sure the network is of each pixel, and the class that it names: (B, h, w) each."""
        sure, said = outputs.softmax(1).max(1)
        return sure, said

    def answer(self, outputs: Sequence[float], classes: Sequence[str], top: int) -> dict[str, Any]:
        """The `top` classes that have most pixels, with their share of them.

        >>> outputs = [0.9, 0.9, 0.1, 0.1, 0.2, 0.2, 0.8, 0.3]  # two classes, four pixels
        >>> Segmentation().answer(outputs, ["sky", "road"], top=1)
        {'pixels': [{'class': 'sky', 'index': 0, 'share': 0.5}]}
        """
        said = np.asarray(outputs, np.float32).reshape(len(classes), -1).argmax(0)
        shares = np.bincount(said, minlength=len(classes)) / len(said)
        order = [at for at in np.argsort(-shares, kind="stable")[:top].tolist() if shares[at] > 0]
        return {"pixels": [{"class": classes[at], "index": at, "share": float(shares[at])} for at in order]}

    def picture(self, outputs: Sequence[float], classes: Sequence[str], size: Size) -> np.ndarray:
        """The class of each pixel, uint8 (h, w): of a map that is smaller than the image, at the map's own size."""
        said = np.asarray(outputs, np.float32).reshape(len(classes), -1).argmax(0).astype(np.uint8)
        near = round((len(said) * size[0] / size[1]) ** 0.5)
        fitting = [rows for rows in range(1, len(said) + 1) if len(said) % rows == 0]
        shown: np.ndarray = said.reshape(min(fitting, key=lambda rows: abs(rows - near)), -1)
        return shown

    def in_words(self, answer: Mapping[str, Any]) -> str:
        """That answer on one line of a terminal."""
        return "  ".join(f"{each['class']} {100 * each['share']:.1f} %" for each in answer["pixels"])


def fitted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A map (B, N, h, w) at the size of masks (B, H, W): (B, N, H, W)."""
    size = targets.shape[-2:]
    same = outputs.shape[-2:] == size
    return outputs if same else F.interpolate(outputs, size=size, mode="bilinear", align_corners=False)


def overlaps(confusion: Tensor) -> Tensor:
    """Intersection over union of each class (N,), from pixels by class and answer (N, N); NaN where both are empty.

    >>> overlaps(torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))
    tensor([0.6667, 0.7500,    nan])
    """
    both = confusion.diagonal()
    return both / (confusion.sum(0) + confusion.sum(1) - both)
