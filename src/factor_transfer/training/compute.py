"""What a run's training has computed, in multiply-adds: of every stage, and of the student beside the plain student.

A stage's record holds the images that it trained on and those that its teacher ran on; the price of an image makes
multiply-adds of them. Evaluation is not training, and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from factor_transfer.training.price import Price

UNIT = "multiply-adds"

COUNTED = ("multiply_adds", "multiply_adds_alone")
"""In a stage's record: what it cost; and what it would have cost if no other run had filled the factor cache."""

NOT_THE_STUDENTS = ("teacher", "baseline")
"""Stages that are no part of what the student cost: the teacher is there before the question is asked."""


@dataclass(frozen=True, kw_only=True)
class StageCompute:
    """What a stage of training computed."""

    multiply_adds: float
    alone: float
    """If no other run had filled the factor cache."""
    images: dict[str, int]
    """trained: forward and backward. teacher: those that the teacher ran on. teacher_alone: with an empty cache."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a run's training computed, in multiply-adds.

    >>> stage = StageCompute(multiply_adds=30.0, alone=45.0, images={"trained": 10, "teacher": 0, "teacher_alone": 5})
    >>> found = Compute(stages={"student": stage}, baseline=30.0)
    >>> found.whole, found.student, found.to_baseline
    (30.0, 45.0, 1.5)
    """

    stages: dict[str, StageCompute]
    baseline: float
    """Of the student alone, in as many passes (--epochs)."""
    given: list[str] = field(default_factory=list)
    """Stages whose result came from a file, and cost nothing here."""

    @property
    def whole(self) -> float:
        """Of all that this run trained."""
        return sum(each.multiply_adds for each in self.stages.values())

    @property
    def student(self) -> float:
        """Of the student with all that it needed but the teacher's own training, if the cache had been empty."""
        return sum(each.alone for stage, each in self.stages.items() if stage not in NOT_THE_STUDENTS)

    @property
    def to_baseline(self) -> float:
        """The student's, as a multiple of the baseline's."""
        return self.student / self.baseline

    def line(self) -> str:
        """What a user is told."""
        own = {stage: each for stage, each in self.stages.items() if stage not in NOT_THE_STUDENTS and each.alone}
        parts = ", ".join(f"{stage} {each.alone / self.baseline:.2f}" for stage, each in own.items())
        files = f"; {' and '.join(self.given)} from a file, not counted" if self.given else ""
        return f"{self.to_baseline:.2f} times the baseline's ({parts}{files})"

    def to_json(self) -> dict[str, Any]:
        """For summary.json, with the unit and the sums."""
        sums = {name: getattr(self, name) for name in ("whole", "student", "to_baseline")}
        return {"unit": UNIT, **asdict(self), **sums}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Compute:
        """From summary.json."""
        stages = {name: StageCompute(**each) for name, each in values["stages"].items()}
        return cls(stages=stages, baseline=values["baseline"], given=list(values["given"]))


def counted(price: Price, stage: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's record with its multiply-adds, where it tells the images that it trained on.

    Args:
        price: of the run.
        stage: its name.
        found: its record. `images` has `trained`, `teacher` and, where that is another number, `teacher_alone`.
    """
    if "images" not in found:
        return dict(found)
    images = found["images"]
    images = {**images, "teacher_alone": images.get("teacher_alone", images["teacher"])}
    trained, frozen = price.of_stage(stage)
    costs = [images["trained"] * trained + images[name] * frozen for name in ("teacher", "teacher_alone")]
    return {**found, "images": images, **dict(zip(COUNTED, costs, strict=True))}


def compute_of(
    records: Mapping[str, Mapping[str, Any]], price: Price, settings: Mapping[str, Any], train: int
) -> Compute | None:
    """The compute of a run from the records of its stages.

    Args:
        records: of every finished stage. One of an earlier version tells no images: they follow from the settings.
        price: of the run.
        settings: of the run.
        train: training images.

    Returns:
        None where a stage's images are not known.
    """
    stages: dict[str, StageCompute] = {}
    for stage, record in records.items():
        found = dict(record)
        if "images" not in found and found.get("seconds"):  # trained by a version that counted no images
            if stage == "hint" or (stage.startswith("paraphraser") and settings["paraphraser_epochs"] == "auto"):
                return None
            found["images"] = _images(stage, price, settings, train, records)
        if "images" in found:
            found = counted(price, stage, found)
            made, alone = (found[name] for name in COUNTED)
            stages[stage] = StageCompute(multiply_adds=made, alone=alone, images=found["images"])
    named = settings.get("paraphraser") not in {None, "none"}
    given = [stage for stage in records if stage.startswith("paraphraser") and named]
    baseline = settings["epochs"] * train * price.of_stage("baseline")[0]
    return Compute(stages=stages, baseline=baseline, given=given)


def _images(
    stage: str, price: Price, settings: Mapping[str, Any], train: int, records: Mapping[str, Mapping[str, Any]]
) -> dict[str, int]:
    """The images of a stage as its settings give them."""
    if stage.startswith("paraphraser"):
        passes = shown = settings["paraphraser_epochs"]
    elif stage == "teacher":
        passes, shown = settings["teacher_epochs"], 0
    else:
        passes = settings["epochs"]
        views = int(records["student"].get("views", 0)) if price.cached else 0
        shown = min(views or passes, passes) if stage == "student" and price.taught else 0
    return {"trained": passes * train, "teacher": shown * train}
