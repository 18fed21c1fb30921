"""Classification: one class for each image, learned by cross-entropy, measured by the share of right answers.

Shapes: B images, N classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from factor_transfer.method.losses import Labels
from factor_transfer.tasks.base import PLAIN, Guess, LabelLoss, Task
from factor_transfer.tasks.metric import Metric


class ClassLoss(nn.Module):
    """Cross-entropy with smoothed labels (timm's LabelSmoothingCrossEntropy and SoftTargetCrossEntropy), or binary
    cross-entropy of every class (timm's BinaryCrossEntropy); each image counts by the weight of its class.

    The mean is over images. (torch's `weight` divides by the weights of the batch instead, so that there an image's
    part in the loss depends on the others, and on how a batch is divided.)

    >>> import torch
    >>> loss = ClassLoss(LabelLoss(weights=(1.0, 3.0)))
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1])) / torch.tensor(2.0).log()
    tensor(2.)
    """

    def __init__(self, how: LabelLoss) -> None:
        super().__init__()
        self.smoothing, self.bce, self.weights = how.smoothing, how.bce, how.weights

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, N), and class indices (B,) or the share of each class (B, N) -> a scalar."""
        classes = outputs.shape[1]
        soft = targets if targets.ndim == 2 else F.one_hot(targets, classes).to(outputs.dtype)
        if self.weights:
            soft = soft * outputs.new_tensor(self.weights)
        total = soft.sum(1, keepdim=True)  # (B, 1), the image's weight
        smooth = (1 - self.smoothing) * soft + self.smoothing / classes * total
        if self.bce:
            each = F.binary_cross_entropy_with_logits(outputs, smooth / total, reduction="none")
            return (total * each).mean()
        return F.cross_entropy(outputs, smooth)


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
        """Cross-entropy, or `ClassLoss` where the settings change it."""
        if how.given:
            return Labels(weight, ClassLoss(how), "binary_cross_entropy" if how.bce else self.loss_name)
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
