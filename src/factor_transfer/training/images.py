"""Which images a stage trains on, in which batches, and what a user is told of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from factor_transfer.config import Config
from factor_transfer.data.balance import Balanced
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.data.splits import Split
from factor_transfer.data.unlabelled import least_labelled
from factor_transfer.data.views import Transform
from factor_transfer.method.term import Term
from factor_transfer.tasks.base import task_of
from factor_transfer.training.chunks import images_of_update, parts_in, training_chunks
from factor_transfer.util.arguments import AnySize, written
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import ConfigError

UNLABELLED, NONE = "unlabelled", "none"
"""The pin of the images without labels, and its value where a run that has begun has none. Others have no such pin."""


def images_of(config: Config, default_size: Callable[[], AnySize], transform: Transform | None) -> Dataset:
    """All images that a run's settings name; arguments as for `open_data`."""
    beside = None if config.unlabelled is None else (config.unlabelled, config.unlabelled_share)
    return open_data(config, default_size, transform, unlabelled=beside, masked=task_of(config.task).dense)


def shown_for(data: Dataset, terms: Sequence[Term], config: Config) -> Split:
    """The images that a network learns from by these terms: the labelled alone, where each term reads labels."""
    if config.sampler == "balanced":
        return Balanced(data.train)
    return data.train if data.mixed is None or all(term.supervised for term in terms) else data.mixed


def batches_of(data: Dataset, config: Config, processes: int) -> list[np.ndarray]:
    """The batches of one pass of the student, whose sizes are those of every pass.

    Raises:
        ConfigError: a process would have too few images of a batch, or none with a label.
    """
    chunks = _parts(np.arange(len(data.train)), config)
    check_shares(chunks, processes, config.batch_size)
    if data.mixed is None:
        return chunks
    chunks = _parts(data.mixed.order(config.data_seed, 0), config)
    check_shares(chunks, processes, config.batch_size)
    if not least_labelled(chunks, data.mixed.labelled, processes):
        raise ConfigError(
            f"--batch-size {config.batch_size} with --unlabelled {config.unlabelled}",
            found=f"a batch{', or a part of one,' * (processes > 1)} without a labelled image: {data.mixed.known:.1%} "
            "of a pass are labelled",
            hint="give a larger --batch-size, or a smaller --unlabelled-share",
        )
    return chunks


def _parts(indices: np.ndarray, config: Config) -> list[np.ndarray]:
    """The parts in which a pass is computed: with --grad-accum-steps several are one update."""
    chunks = training_chunks(indices, images_of_update(config))
    return [part for chunk in chunks for part in np.array_split(chunk, parts_in(len(chunk), config))]


def say_images(data: Dataset, config: Config) -> None:
    """Say which images there are, and what is lost of them."""
    for note in data.notes:
        say(f"data: {note}")
    for lost in data.lost:
        warn(f"data: {lost.what} ({lost.hint})")
    counts = f"{len(data.train):,} training and {len(data.validation):,} validation images"
    say(f"data: {data.name}, {counts} of {written(data.img_size)}, {len(data.classes)} classes")
    if config.sampler == "balanced":
        say(f"data: {Balanced(data.train).told(config.epochs)}")
    if data.mixed is not None:
        say(f"data: {data.mixed.told()}")
        if never := data.mixed.never_shown(config.epochs):
            warn(f"{never} (next: more --epochs, or a larger --unlabelled-share)")


def check_shares(chunks: Sequence[np.ndarray], processes: int, batch_size: int) -> None:
    """That every process has images of every batch.

    Raises:
        ConfigError: it has fewer than two of one.
    """
    least = min(map(len, chunks))
    if processes > 1 and least < 2 * processes:
        raise ConfigError(
            f"--batch-size {batch_size}",
            found=f"a batch of {least} images for {processes} processes",
            valid="two images for each process in every batch: batch norm cannot train on one",
            hint=f"give --batch-size {4 * processes} or more, or start fewer processes",
        )
