"""Classification: one class for each image, learned by cross-entropy, measured by the share of right answers.

Shapes: B images, N classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from factor_transfer.method.losses import Labels
from factor_transfer.tasks.base import PLAIN, Guess, LabelLoss, Task
from factor_transfer.tasks.metric import Metric


class Classification(Task):
    """The default of --task."""

    metrics = (
        Metric("top1", "top-1", "%", hub="accuracy"),
        Metric("loss", "cross-entropy", digits=4, higher_is_better=False),
    )
    loss_name = "cross_entropy"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits (B, N) with class indices (B,)."""
        return F.cross_entropy(outputs, targets)

    def labels(self, weight: float = 1.0, how: LabelLoss = PLAIN) -> Labels:
        """Cross-entropy, with timm's label smoothing; or timm's binary cross-entropy of every class."""
        if how.bce:
            return Labels(weight, BinaryCrossEntropy(how.smoothing), "binary_cross_entropy")
        if how.smoothing:
            return Labels(weight, partial(F.cross_entropy, label_smoothing=how.smoothing), self.loss_name)
        return super().labels(weight)

    def step(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Top-1 of the batch."""
        return {"top1": 100 * (outputs.argmax(1) == targets).float().mean()}

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The number of right answers, and the sum of the cross-entropy."""
        right = (outputs.argmax(1) == targets).sum().float()
        return {"right": right, "loss": F.cross_entropy(outputs, targets, reduction="sum")}

    def values(self, sums: Mapping[str, Any], images: int) -> dict[str, Any]:
        """Top-1 in percent, and the mean cross-entropy."""
        return {"top1": 100 * sums["right"] / images, "loss": sums["loss"] / images}

    def per_image(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """100 for a right answer, 0 for a wrong one: (B,)."""
        return 100 * (outputs.argmax(1) == targets).float()

    def guess(self, labels: np.ndarray, classes: Sequence[str]) -> Guess:
        """Even chance, and the commonest class."""
        counts = np.bincount(labels, minlength=len(classes))
        constant = 100 * float(counts.max()) / len(labels)
        return Guess(100 / len(classes), constant, f"`{classes[int(counts.argmax())]}`", perfect=100)
