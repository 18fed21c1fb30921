"""Live curves: TensorBoard in the run folder, or any of Accelerate's trackers.

After every pass they get the values of its line in `metrics.jsonl`, so that a resumed run leaves no gap. They change no
weights, statistics or random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import normalize_factor
from factor_transfer.method.losses import FactorTransfer
from factor_transfer.method.term import align
from factor_transfer.report.figures import strongest, tiles
from factor_transfer.training.run_folder import Run
from factor_transfer.training.step import DistillationTask
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.errors import ConfigError

PICTURED = 4
"""Number of training images whose factors are shown, with twice as many channels each."""

ENLARGED = 6
"""Pixels a side for each place of a factor."""


@contextmanager
def watched(run: Run, config: Config) -> Iterator[None]:
    """Tell the trackers of --log-with of every pass that is trained inside.

    Raises:
        ConfigError: a tracker that Accelerate does not know, or that is not installed.
    """
    names = wanted(config.log_with) if run.writes else []
    trackers: list[Any] = []

    def passed(trainer: Trainer, row: Mapping[str, float]) -> None:
        stage, epoch = trainer.plan.stage, trainer.progress.epoch + 1
        values = {f"{stage}/{name}": value for name, value in {**row, **_speed(trainer)}.items()}
        pictures = factor_pictures(trainer) if epoch & (epoch - 1) == 0 or epoch == trainer.plan.epochs else None
        if not trackers:  # not before: a mistake that is found earlier leaves nothing behind
            trackers.extend(_start(name, run, config) for name in names)
        for tracker in trackers:
            tracker.log(values, step=epoch)
            if pictures is not None and hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"{stage}/factors, teacher above student": pictures}, step=epoch, **layout)

    if names:
        run.watchers.append(passed)
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.finish()
        run.watchers.clear()


def wanted(log_with: str) -> list[str]:
    """The trackers that --log-with names.

    >>> wanted("none")
    []
    """
    if log_with == "none":
        return []
    if log_with == "auto":
        return ["tensorboard"] if find_spec("tensorboard") else []
    there = [str(name) for name in get_available_trackers()]
    names = [name.strip() for name in log_with.split(",")]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"--log-with {name}", found="no such tracker", valid=["none", *LOGGER_TYPE_TO_CLASS])
        if name not in there:
            raise ConfigError(f"--log-with {name}", found="not installed", valid=there, hint=f"pip install {name}")
    return names


def _start(name: str, run: Run, config: Config) -> Any:
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": str(run.folder)} if kind.requires_logging_directory else {}
    tracker = kind("tensorboard" if name == "tensorboard" else run.folder.resolve().name, **place)
    tracker.start()
    if name != "tensorboard":  # config.json lies beside it, and its "hparams" would be a second run there
        tracker.store_init_configuration({key: str(value) for key, value in config.to_dict().items()})
    return tracker


def _speed(trainer: Trainer) -> dict[str, float]:
    """Images a second in the pass that has just been written down."""
    before = [0.0, *(row["seconds"] for row in trainer.run.metrics(trainer.plan.stage)[:-1])]
    seconds = trainer.progress.seconds - before[-1]
    return {"images_per_second": len(trainer.train) / seconds} if seconds > 0 else {}


@torch.no_grad()
def factor_pictures(trainer: Trainer) -> np.ndarray | None:
    """The normalised factors of the first training images: teacher above student; None where there are none.

    Returns:
        One uint8 picture (1, height, width, 3), the images below each other.
    """
    task = trainer.objective
    if not isinstance(task, DistillationTask) or task.teacher is None:
        return None
    trainee = task.trained()
    terms = [term for term in trainee.terms.values() if isinstance(term, FactorTransfer)]
    if not terms:
        return None
    chunk = np.arange(min(PICTURED, len(trainer.train)))
    (batch,) = trainer.train.batches([chunk], view=0)
    modes = {module: module.training for module in trainee.modules()}
    trainee.eval()
    with trainer.engine.autocast():
        images = batch.image.to(trainer.engine.device)
        teacher = task.teacher(images, batch.index, 0)["factor"]
        _, feature = trainee.student(trainee.norm(images))
        student = terms[0].translator(align(feature, (teacher.shape[-2], teacher.shape[-1])))
    for module, mode in modes.items():
        module.training = mode
    teacher, student = (normalize_factor(factor).view(factor.shape) for factor in (teacher, student))
    found = []
    for theirs, ours in zip(teacher, student, strict=True):
        channels, largest = strongest(theirs, 2 * PICTURED), float(theirs.abs().max())
        above, below = tiles(theirs, channels, largest), tiles(ours, channels, largest)
        found.append(np.concatenate([above, np.full((1, above.shape[1], 3), 128, np.uint8), below]))
    rows = [np.pad(picture, ((0, 1), (0, 0), (0, 0)), constant_values=255) for picture in found]
    return np.concatenate(rows)[None].repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)
