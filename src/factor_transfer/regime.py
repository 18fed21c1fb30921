"""Settings of training that timm's users know: how labels are learned. A part of `config.Config`. No torch.

Names are timm's, and so is what they do, unless the help says otherwise.
"""

from dataclasses import dataclass
from typing import Annotated

from cyclopts.validators import Number

from factor_transfer.util.checks import ActsOn
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.limits import within

_STUDENT = ActsOn("student")
_LEARNERS = ActsOn("teacher", "student")


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How labels are learned."""

    # Mueller, Kornblith, Hinton, "When Does Label Smoothing Help?", NeurIPS 2019, section 4: a teacher that was trained
    # with smoothed labels teaches worse.
    smoothing: Annotated[float, within("Training recipe"), Number(gte=0, lt=1), _STUDENT] = 0.0
    """Label smoothing, as timm's LabelSmoothingCrossEntropy: this share of the label goes evenly to all classes. For
    student and baseline; a teacher that is trained here sees plain labels, since smoothed ones make it teach worse
    (Mueller et al. 2019)."""
    bce_loss: Annotated[bool, within("Training recipe"), _LEARNERS] = False
    """Binary cross-entropy of every class instead of cross-entropy, averaged over classes, as timm's
    BinaryCrossEntropy: for student, baseline and a teacher that is trained here."""
    class_weights: Annotated[str | None, within("Training recipe"), _LEARNERS] = None
    """Weight of each class in the loss with labels: `balanced`, scikit-learn's (classes with few images count more, and
    the mean over images is 1), or a YAML or JSON file, `cat: 2.5`. The mean is over images, where torch's `weight`
    divides by the weights of the batch. For student, baseline and a teacher that is trained here."""
    grad_accum_steps: Annotated[int, within("Training recipe"), Number(gte=1, lte=1000)] = 1
    """Batches of --batch-size whose gradients are added up to one update, as timm's: the update, the schedule and
    --model-ema are those of a batch so many times as large, in the memory of one. (Batch norm still sees each by
    itself.)"""


def check_regime(config: Regime, label_weight: float) -> None:
    """No setting of the labels without labels, which --label-weight 0 leaves unread.

    Raises:
        ConfigError: there is one.
    """
    given = [f"--smoothing {config.smoothing:g}"] * bool(config.smoothing) + ["--bce-loss"] * config.bce_loss
    given += [f"--class-weights {config.class_weights}"] * (config.class_weights is not None)
    if given and not label_weight:
        raise ConfigError(
            f"{given[0]} with --label-weight 0", found="a setting of the loss with labels, and none are read",
            hint="leave one of them out",
        )  # fmt: skip
