"""Settings of training that timm's users know: how labels are learned. A part of `config.Config`. No torch.

Names are timm's, and so is what they do, unless the help says otherwise.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

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
    sampler: Annotated[Literal["all", "balanced"], within("Training recipe"), _LEARNERS] = "all"
    """Images of a pass. all: each once. balanced: as many, every class equally often, so that images of small classes
    come several times, in one view, and some of large ones not; those come in the next passes. For student, baseline
    and a teacher that is trained here."""
    grad_accum_steps: Annotated[int, within("Training recipe"), Number(gte=1, lte=1000)] = 1
    """Batches of --batch-size whose gradients are added up to one update, as timm's: the update, the schedule and
    --model-ema are those of a batch so many times as large, in the memory of one. (Batch norm still sees each by
    itself.)"""


def check_regime(config: Regime, label_weight: float, views: int | str, unlabelled: str | None) -> None:
    """No setting of the labels without labels, which --label-weight 0 leaves unread; and what --sampler goes with.

    Raises:
        ConfigError: there is one.
    """
    given = [f"--smoothing {config.smoothing:g}"] * bool(config.smoothing) + ["--bce-loss"] * config.bce_loss
    given += [f"--class-weights {config.class_weights}"] * (config.class_weights is not None)
    given += ["--sampler balanced"] * (config.sampler == "balanced")
    if given and not label_weight:
        raise ConfigError(
            f"{given[0]} with --label-weight 0", found="a setting of labels, and none are read",
            hint="leave one of them out",
        )  # fmt: skip
    if config.sampler == "balanced" and views:
        found = "images that come several times in a pass, or in few passes: kept views of them would not be filled"
        raise ConfigError(f"--sampler balanced with --views {views}", found=found, valid="--views 0: a live teacher")
    if config.sampler == "balanced" and unlabelled is not None:
        found = "two ways to choose the images of a pass"
        raise ConfigError(f"--sampler balanced with --unlabelled {unlabelled}", found=found, hint="give one of them")
