"""What a run costs, counted before it is trained: multiply-adds and parameters of teacher, paraphraser, terms, student.

torch's counter counts convolutions, products of matrices and attention. Norms, activations, the optimizer and the
reading of images take time as well, so these figures are no seconds. A training step is taken as three forward passes
of what is trained, and one of what is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import Straight
from factor_transfer.method.slim import AnyParaphraser, SlimParaphraser
from factor_transfer.method.term import numbered
from factor_transfer.networks.load import count_parameters
from factor_transfer.networks.pair import Pair
from factor_transfer.tasks.base import task_of
from factor_transfer.training.form import DEAREST_STEP, is_wide, metered
from factor_transfer.training.objective import Objective, fresh_paraphrasers
from factor_transfer.training.paraphraser import BATCH, MOST_MAPS, MOST_STEPS
from factor_transfer.training.step import DistillationTask, TeacherSide


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a run."""

    multiply_adds: float
    """Of its forward pass for one image."""
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Price:
    """What the parts of a run cost. Ratios are to the student alone.

    >>> part = Part(multiply_adds=0.0, parameters=0)
    >>> student, teacher = Part(multiply_adds=10.0, parameters=5), Part(multiply_adds=30.0, parameters=9)
    >>> parts = {"teacher": teacher, "readers": part, "paraphraser": part, "terms": part, "student": student}
    >>> price = Price(**parts, layers=1, taught=True, cached=True)
    >>> price.live_step, price.cached_step, price.paraphraser_pass
    (2.0, 1.0, 1.0)
    """

    teacher: Part
    readers: Part
    """What makes the outputs that the terms read out of the teacher's maps: the paraphraser's encoder, above all."""
    paraphraser: Part
    """Encoder and decoder; of all pairs of layers together."""
    terms: Part
    """What is trained beside the student: translators and regressors."""
    student: Part
    layers: int
    """Pairs of layers; each trains a paraphraser of its own."""
    taught: bool
    """Whether a term reads anything of the teacher."""
    cached: bool
    """Whether all that the terms read of the teacher can be kept on disk (--views)."""
    wide: bool = False
    """Whether the slim form would reduce a map."""
    hint: Part | None = None
    """Of the first stage with a hint: the student up to its guided layer, and the regressor."""

    @property
    def cached_step(self) -> float:
        """A training step whose teacher's outputs are read from disk."""
        return (self.student.multiply_adds + self.terms.multiply_adds) / self.student.multiply_adds

    @property
    def live_step(self) -> float:
        """A training step that runs the teacher."""
        frozen = self.teacher.multiply_adds + self.readers.multiply_adds
        return self.cached_step + frozen / (3 * self.student.multiply_adds)

    @property
    def paraphraser_pass(self) -> float:
        """A pass of the paraphrasers' training, in passes of the student alone."""
        trained = self.layers * self.teacher.multiply_adds + 3 * self.paraphraser.multiply_adds
        return trained / (3 * self.student.multiply_adds)

    def of_stage(self, stage: str) -> tuple[float, float]:
        """Multiply-adds of one image in a stage: of what is trained, forward and backward; and of the frozen side.

        Pairs of layers train paraphrasers of their own, which are given an equal share each.

        >>> part, student = Part(multiply_adds=2.0, parameters=0), Part(multiply_adds=10.0, parameters=5)
        >>> parts = dict(teacher=student, readers=part, paraphraser=part, terms=part, student=student, layers=1)
        >>> price = Price(**parts, taught=True, cached=True)
        >>> price.of_stage("paraphraser"), price.of_stage("student"), price.of_stage("baseline")
        ((6.0, 10.0), (36.0, 12.0), (30.0, 0.0))
        """
        teacher, student = self.teacher.multiply_adds, self.student.multiply_adds
        if stage.startswith("paraphraser"):
            return 3 * self.paraphraser.multiply_adds / max(self.layers, 1), teacher
        return {
            "teacher": (3 * teacher, 0.0),
            "hint": (3 * (self.hint.multiply_adds if self.hint else student), teacher),
            "student": (3 * (student + self.terms.multiply_adds), teacher + self.readers.multiply_adds),
            "baseline": (3 * student, 0.0),
        }[stage]

    def paraphraser_stage(self, config: Config, images: int, pool: int | None = None) -> float:
        """The whole training of the paraphrasers, in passes of the student alone over so many images; at most.

        `pool` is how many images they are trained on, where that is another number.
        """
        pool = images if pool is None else pool
        if config.paraphraser is not None or not self.paraphraser.parameters:
            return 0.0
        if config.paraphraser_epochs != "auto":
            return config.paraphraser_epochs * self.paraphraser_pass * pool / images
        shown = self.layers * min(pool, MOST_MAPS) * self.teacher.multiply_adds
        trained = MOST_STEPS * BATCH * 3 * self.paraphraser.multiply_adds
        return (shown + trained) / (3 * self.student.multiply_adds * images)

    def stages(
        self, config: Config, images: int, pool: int, views: int, hint_epochs: int, shown: int | None = None
    ) -> dict[str, float]:
        """Multiply-adds of each stage that is trained; of the paraphrasers at most.

        Args:
            config: all settings.
            images: that have labels.
            pool: all images.
            views: kept of each image; 0 with a live teacher.
            hint_epochs: passes of the first stage with a hint.
            shown: images of a pass of the student, where it shows a part of those without labels.
        """
        shown = pool if shown is None else shown
        student = 3 * self.student.multiply_adds
        paraphrasers = self.paraphraser_stage(config, images, pool) * student * images
        trained, frozen = self.of_stage("student")
        whole = config.epochs * shown
        asked = (min(views * pool, whole) if views else whole) if self.taught else 0
        found = {
            "teacher": config.teacher_epochs * images * self.of_stage("teacher")[0],
            **dict.fromkeys(numbered("paraphraser", self.layers), paraphrasers / max(self.layers, 1)),
            "hint": hint_epochs * shown * sum(self.of_stage("hint")),
            "student": whole * trained + asked * frozen,
            "baseline": config.epochs * images * student if config.baseline else 0.0,
        }
        return {stage: cost for stage, cost in found.items() if cost}

    def lines(self, config: Config, images: int, pool: int | None = None) -> Iterator[str]:
        """What a user is told before training on so many images; `pool` as for `paraphraser_stage`."""
        if not self.taught:
            return
        step = f"{self.live_step:.2f} times the student's alone with a live teacher"
        if self.cached:
            step += f", {self.cached_step:.2f} with its outputs on disk (--views)"
        yield f"price, in multiply-adds: a step costs {step}{self._advice(config)}"
        if whole := self.paraphraser_stage(config, images, pool):
            most = "at most " if config.paraphraser_epochs == "auto" else ""
            yield f"price: to train the paraphraser costs {most}{whole:.1f} passes of the student alone"

    def _advice(self, config: Config) -> str:
        """The flag that lowers the price of a step, where there is one."""
        flags = []
        able = self.wide and config.k <= 1 and config.paraphraser is None and config.translator == "conv"
        if config.factor_form == "paper" and config.beta and able and self.cached_step > DEAREST_STEP:
            flags.append("--factor-form slim")
        able = self.cached and not config.views and config.sampler == "all"  # the balanced sampler refuses --views
        if able and self.live_step > DEAREST_STEP:
            flags.append("--views auto")
        return f"; {' and '.join(flags)} would lower it" if flags else ""

    def to_json(self) -> dict[str, Any]:
        """For summary.json: the parts, and the ratios."""
        ratios = {name: getattr(self, name) for name in ("live_step", "cached_step", "paraphraser_pass")}
        return {**asdict(self), **ratios}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Price:
        """From summary.json."""
        parts = {name: Part(**value) if isinstance(value, Mapping) else value for name, value in values.items()}
        own: dict[str, Any] = {each.name: parts[each.name] for each in fields(cls) if each.name in parts}
        return cls(**own)


def price_of(config: Config, pair: Pair, objective: Objective, images: Tensor) -> Price:
    """Count the parts of a run, on copies of its networks in eval mode.

    Args:
        config: all settings.
        pair: teacher and student.
        objective: the student's loss.
        images: two uint8 images (2, 3, H, W) or more.
    """
    paraphrasers = fresh_paraphrasers(config, pair)
    tapped = pair.teacher.tapped(objective.teacher_layers)
    teacher = TeacherSide(tapped, pair.teacher.network.norm, pair.size, readers=objective.readers(paraphrasers))
    taps = [layer for term in objective.terms for layer in term.taps]
    task = DistillationTask(pair.student.tapped(taps), pair.student.network.norm, objective.terms, teacher)
    side, trainee = deepcopy(teacher).cpu().eval(), deepcopy(task.trainable_module).cpu().eval()
    labels = task_of(config.task).example(images)
    _, alone = metered(lambda: side.network.maps(side.norm(images)), images)
    outputs, frozen = metered(lambda: side(images), images)
    _, student = metered(lambda: trainee.student.maps(trainee.norm(images)), images)
    _, trained = metered(lambda: trainee(images, labels, outputs), images)
    whole = 0.0
    for paraphraser, each in zip(paraphrasers, pair.each(), strict=False):
        feature = torch.zeros(1, each.teacher.shape[0], *each.size)
        if not isinstance(paraphraser, Straight):
            whole += _trained(paraphraser, feature, kept=config.paraphraser_epochs == "auto")
    return Price(
        teacher=Part(multiply_adds=alone, parameters=count_parameters(side.network)),
        readers=Part(multiply_adds=frozen - alone, parameters=count_parameters(side.readers)),
        paraphraser=Part(multiply_adds=whole, parameters=sum(map(count_parameters, paraphrasers))),
        terms=Part(multiply_adds=trained - student, parameters=count_parameters(trainee.terms)),
        student=Part(multiply_adds=student, parameters=count_parameters(trainee.student)),
        layers=len(objective.factors),
        taught=bool(objective.outputs),
        cached=bool(objective.outputs) and None not in objective.outputs.values(),
        wide=any(is_wide(side.shape[0]) for each in pair.each() for side in (each.teacher, each.student)),
        hint=_hint(pair, objective, images) if objective.hint_epochs else None,
    )


def _hint(pair: Pair, objective: Objective, images: Tensor) -> Part:
    """What the first stage trains, on images (B, 3, H, W)."""
    term = objective.hint()
    guided = replace(pair.student, layer=term.group.student).tapped(term.taps, ends=True)
    side = TeacherSide(pair.teacher.tapped(objective.teacher_layers), pair.teacher.network.norm, pair.size,
                       readers=term.readers())  # fmt: skip
    task = DistillationTask(guided, pair.student.network.norm, [term], side)
    trainee, side = deepcopy(task.trainable_module).cpu().eval(), deepcopy(side).cpu().eval()
    with torch.no_grad():
        outputs = side(images)
    labels = torch.zeros(len(images), dtype=torch.long)
    _, counted = metered(lambda: trainee(images, labels, outputs), images)
    return Part(multiply_adds=counted, parameters=count_parameters(trainee))


def _trained(paraphraser: AnyParaphraser, feature: Tensor, *, kept: bool) -> float:
    """Multiply-adds of what a paraphraser's training computes of one map; of a reduced one where maps are kept."""
    if kept and isinstance(paraphraser, SlimParaphraser):
        feature = torch.zeros(1, paraphraser.width, *feature.shape[-2:])
        return metered(lambda: paraphraser.inner(feature), feature)[1]
    return metered(lambda: paraphraser(feature), feature)[1]
