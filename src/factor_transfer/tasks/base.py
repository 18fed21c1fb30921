"""What a student is for. Everything that is particular to a kind of task is behind the class `Task`.

The other wings ask the task for targets, loss, metrics and answers, and name none of them. Data and heads are those of
classes. Each image has one class index, and a network is called with images and gives N outputs, one for each class; or
each pixel has one (`Task.dense`), and a network gives a map of N outputs. Which of several outputs of a network these
are is found by `networks/outputs.py` (or --student-output says so).

Shapes: B images, N classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factor_transfer.config import Config
from factor_transfer.data.splits import Batch
from factor_transfer.method.losses import Labels
from factor_transfer.tasks.metric import Metric
from factor_transfer.util.arguments import Size, imported, is_callable_name
from factor_transfer.util.errors import ConfigError, TrainingError

NEAR_CHANCE = 0.1
"""A teacher that covers less than this share of the way from chance to perfection teaches nothing."""

TASKS = tuple(sorted({path.stem for path in Path(__file__).parent.glob("[!_]*.py")} - {"base", "metric"}))
"""The tasks of this package. `NAME.py` beside this file has the class `Name`."""


@dataclass(frozen=True)
class Guess:
    """What the headline metric is without looking at an image."""

    chance: float
    """Of answers that are drawn evenly."""
    constant: float
    """Of the best answer that is the same for every image."""
    answer: str
    """That answer, in words."""
    perfect: float
    """Of answers that are all right."""


@dataclass(frozen=True)
class LabelLoss:
    """How the settings change the supervised loss.

    >>> LabelLoss.of(Config(data="digits", teacher="a", student="b", smoothing=0.1))
    LabelLoss(smoothing=0.1, bce=False, weights=())
    """

    smoothing: float = 0.0
    bce: bool = False
    weights: tuple[float, ...] = ()
    """Of each class; none: all count alike."""

    @classmethod
    def of(cls, config: Config, weights: tuple[float, ...] = (), *, teacher: bool = False) -> LabelLoss:
        """That of the student and the baseline, or of a teacher that is trained here, whose labels are not softened."""
        return cls(smoothing=0.0 if teacher else config.smoothing, bce=config.bce_loss, weights=weights)

    @property
    def given(self) -> str | None:
        """The flag of a setting that changes the loss; None where none does."""
        flags = {"--smoothing": self.smoothing, "--bce-loss": self.bce, "--class-weights": self.weights}
        return next((flag for flag, value in flags.items() if value), None)


PLAIN = LabelLoss()


class Task(ABC):
    """A kind of task: a subclass says what is learned, and how it is measured. It holds no state.

    `metrics`, `loss` and `sums` must be given. This is a whole task: `--task my_task:Grades`, in a file `my_task.py`:

        class Grades(Task):
            '''Classes that are grades: the answer is the expected grade.'''

            metrics = (Metric("mae", "mean absolute error", "grades", digits=3, higher_is_better=False),)

            def loss(self, outputs, targets):
                return F.cross_entropy(outputs, targets)

            def sums(self, outputs, targets):
                expected = outputs.softmax(1) @ torch.arange(outputs.shape[1], device=outputs.device).float()
                return {"mae": (expected - targets).abs().sum()}
    """

    metrics: tuple[Metric, ...]
    """The first one is the headline: tables, verdicts and checks are about it."""
    loss_name = "loss_with_labels"
    """Of the supervised loss among the terms, in metrics.jsonl and plots."""
    hub = "image-classification"
    """What the Hugging Face hub calls the task, for the model card."""
    gives = "logits"
    """What an exported student gives for an image, in a word."""
    dense = False
    """Whether each pixel has a class: images come with masks, and networks give a map (B, N, h, w)."""
    other_answers = 0.0
    """Largest share of answers in which a floating-point export may differ: of many pixels some are undecided."""

    @property
    def headline(self) -> Metric:
        """The metric that tables, verdicts and checks are about."""
        return self.metrics[0]

    # -- training

    def targets(self, batch: Batch) -> Tensor:
        """What the images of a batch should be answered with, (B,) or (B, ...)."""
        return batch.label

    def example(self, images: Tensor) -> Tensor:
        """Targets of the right shape and type for images (B, 3, H, W), to count with. Here: the first class, (B,)."""
        return torch.zeros(len(images), dtype=torch.long, device=images.device)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The supervised loss of a batch: a scalar, averaged over its images. `outputs` are float32 or float64."""

    def labels(self, weight: float = 1.0, how: LabelLoss = PLAIN) -> Labels:
        """The supervised loss as a term of the student's loss (equation 3), changed as the settings say.

        Raises:
            ConfigError: the task's loss cannot be changed so. Here that is any change.
        """
        if how.given:
            found = f"a task with a loss of its own ({type(self).__name__})"
            raise ConfigError(
                f"{how.given} with --task", found=found, valid="--task classification", hint="leave it out"
            )
        return Labels(weight, self.loss, self.loss_name)

    def step(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What the curves show of a training step, by name: means over the batch. Here: the headline metric."""
        found = self.values(self.sums(outputs.float(), targets), len(targets))
        return {self.headline.key: found[self.headline.key]}

    # -- evaluation

    @abstractmethod
    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums over the images of a batch, by name, of any fixed shape.

        They are added over batches and processes; `values` makes the metrics from the totals.
        """

    def values(self, sums: Mapping[str, Any], images: int) -> dict[str, Any]:
        """The metrics by key, from sums over so many images. Here: each sum's mean over images."""
        return {name: total / images for name, total in sums.items()}

    def by_class(self, sums: Mapping[str, Any]) -> list[float | None] | None:
        """The headline metric of each class, from sums; None where it has no parts for classes."""
        return None

    def per_image(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        """The headline metric of each image, (B,), for paired intervals; None where it is no mean over images."""
        return None

    def guess(self, labels: np.ndarray, classes: Sequence[str]) -> Guess | None:
        """What a guess scores on images with these labels, (n,); None: a teacher is not compared with a guess."""
        return None

    # -- answers

    def answers(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """For each image how sure the network is, from 0 to 1, and the index of the class that it names: (B,) each."""
        sure, said = outputs.softmax(1).max(1)
        return sure, said

    def answer(self, outputs: Sequence[float], classes: Sequence[str], top: int) -> dict[str, Any]:
        """The answer of `predict` for one image, as JSON holds it. Here: the `top` likeliest classes.

        Args:
            outputs: what the exported student gave, N numbers.
            classes: names of the classes.
            top: as --top says.
        """
        return {"top": likeliest(outputs, classes, top)}

    def picture(self, outputs: Sequence[float], classes: Sequence[str], size: Size) -> np.ndarray | None:
        """The class of each pixel, (h, w), for images of `size`; None where an answer is no picture."""
        return None

    def in_words(self, answer: Mapping[str, Any]) -> str:
        """That answer on one line of a terminal."""
        return "  ".join(f"{each['class']} {100 * each['probability']:.1f} %" for each in answer["top"])


def likeliest(outputs: Sequence[float], classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The `top` classes with their probabilities, likeliest first.

    >>> likeliest([0.0, 0.0], ["cat", "dog"], top=1)
    [{'class': 'cat', 'index': 0, 'probability': 0.5}]
    """
    values = np.asarray(outputs, np.float64)
    weights = np.exp(values - values.max())
    order = np.argsort(-weights, kind="stable")[:top].tolist()
    return [{"class": classes[at], "index": at, "probability": float(weights[at] / weights.sum())} for at in order]


@cache
def task_of(name: str) -> Task:
    """The task that --task names.

    Raises:
        ConfigError: it cannot be imported or called, or gives no task.
    """
    try:
        if not is_callable_name(name):
            if name not in TASKS:
                raise ValueError("no such task")
            name = f"factor_transfer.tasks.{name}:{name.title()}"
        task = imported(name)()
        if not isinstance(task, Task):
            raise TypeError(f"gives a {type(task).__name__}, no factor_transfer.tasks.base.Task")
    except Exception as error:  # whatever code of the user's raises
        valid = f"{', '.join(TASKS)}, or package.module:callable that gives a factor_transfer.tasks.base.Task"
        raise ConfigError(f"--task {name}", found=str(error), valid=valid) from error
    return task


def check_knows(
    task: Task, found: float, labels: np.ndarray, classes: Sequence[str], teacher: str, trained: Path | None = None
) -> str | None:
    """Check that a teacher is better on the validation images than a guess would be.

    Args:
        task: whose headline metric it is.
        found: the teacher's value of it.
        labels: of the images, (n,).
        classes: names of the data's classes.
        teacher: its name.
        trained: its file of weights, where it was trained in this run.

    Returns:
        A warning, where it is no better than the best constant answer. (That is no error: a weak teacher may be wanted,
        and where most images are of one class, this says little about the others.)

    Raises:
        TrainingError: it is near chance.

    >>> dogs = np.array([0, 0, 1]), ("cat", "dog"), "resnet18"
    >>> check_knows(task_of("classification"), 60.0, *dogs)
    '--teacher resnet18: top-1 60.00 % on the validation images; always answering `cat` would have 66.67 %'
    >>> check_knows(task_of("classification"), 70.0, *dogs)
    """
    metric, guess = task.headline, task.guess(labels, classes)
    if guess is None:
        return None
    if metric.gain(found, guess.chance) > NEAR_CHANCE * metric.gain(guess.perfect, guess.chance):
        what = f"{metric.label} {metric.shown(found)} on the validation images"
        constant = f"always answering {guess.answer} would have {metric.shown(guess.constant)}"
        return f"--teacher {teacher}: {what}; {constant}" if metric.gain(found, guess.constant) <= 0 else None
    hint = (
        "check its normalisation (--teacher-mean, --teacher-std), the order of the classes (--class-map) and its "
        "weights (--teacher-weights); train it here (--teacher-epochs); or, where it was made for other classes, drop "
        "its head (--teacher-args num_classes=0)"
    )
    if trained is not None:
        hint = f"train on from --teacher-weights {trained}, or longer (--teacher-epochs), with another --out"
    raise TrainingError(
        f"--teacher {teacher}",
        found=f"{metric.label} {metric.shown(found)} on the validation images, where chance is "
        f"{metric.shown(guess.chance)}",
        valid="a teacher that knows these images",
        hint=hint,
    )
