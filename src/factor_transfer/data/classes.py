"""One numbering of the classes, for all splits: timm numbers each split by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from factor_transfer.config import DataConfig
from factor_transfer.data.images import Images, natural
from factor_transfer.data.layouts import UNLABELLED, Source, missing
from factor_transfer.util.errors import ConfigError, DataError, listed


def number_classes(
    source: Source, config: DataConfig, notes: list[str], known: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Class names in index order, the same for all splits: from `--class-map`, the dataset, or the training names.

    Args:
        source: the images.
        config: `--data` and its companions.
        notes: what is merely odd is added here.
        known: class names of a finished run, in index order, where the images are to be measured by it.

    Raises:
        DataError: one class only, a class map that lacks a class or has doubles, validation classes without training
            images, labels in one split alone.
        ConfigError: classes that are not among the `known`.
    """
    parts = [source.train] if source.validation is None else [source.train, source.validation]
    if len({UNLABELLED in part.labels for part in parts}) > 1:
        bare = "training" if UNLABELLED in source.train.labels else "validation"
        raise DataError(
            f"--data {config.data}",
            found=f"class folders, but none in {bare}",
            valid="class folders in training and validation, or in neither",
        )
    if UNLABELLED in source.train.labels:
        notes.append("no labels: top-1 cannot be measured here")
        return _read_class_map(config.class_map) if config.class_map is not None else ()
    if known is not None:
        return _known(source.train, config, notes, known)
    given, trained = f"--data {config.data}", sorted(set(source.train.labels), key=natural)
    classes = source.order or tuple(trained)
    if config.class_map is not None:
        classes = _read_class_map(config.class_map)
        lacking = [name for name in trained if name not in set(classes)]
        if lacking:
            raise DataError(
                f"--class-map {config.class_map}",
                found=f"{len(lacking)} classes of the training images are not in it: {listed(lacking)}",
                valid="a line for every class",
            )
    if len(classes) > len(trained):
        notes.append(f"{len(classes) - len(trained)} of {len(classes)} classes have no training images")
    if len(classes) < 2 or len(trained) < 2:
        raise DataError(given, found=f"one class only: {listed(trained)}", valid="two classes or more")
    if source.validation is not None:
        foreign = sorted(set(source.validation.labels) - set(trained), key=natural)
        if foreign:
            raise DataError(
                given,
                found=f"{len(foreign)} classes in validation that training lacks: {listed(foreign)}",
                valid=trained,
                hint="remove them from validation, or add training images",
            )
    return classes


def _known(images: Images, config: DataConfig, notes: list[str], known: Sequence[str]) -> tuple[str, ...]:
    """The run's classes; images of a few of them are enough."""
    there = set(images.labels)
    foreign = sorted(there - set(known), key=natural)
    if foreign:
        raise ConfigError(
            f"--data {config.data}",
            found=f"{len(foreign)} classes that the run does not know: {listed(foreign)}",
            valid=f"those of the run: {listed(list(known))}",
        )
    absent = [name for name in known if name not in there]
    if absent:
        notes.append(
            f"{len(absent)} of {len(known)} classes have no images here, and are not measured: {listed(absent)}"
        )
    return tuple(known)


def _read_class_map(name: str) -> tuple[str, ...]:
    given, path = f"--class-map {name}", Path(name).expanduser()
    valid = "a text file with one class name a line, in index order"
    if not path.exists():
        raise missing(given, path, valid)
    try:
        classes = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(given, found=str(error), valid=valid) from error
    if not classes or "" in classes:
        raise DataError(given, found=f"line {classes.index('') + 1} is empty" if classes else "no lines", valid=valid)
    doubles = [name for name, count in Counter(classes).items() if count > 1]
    if doubles:
        raise DataError(given, found=f"named twice: {listed(doubles)}", valid=valid)
    return classes
