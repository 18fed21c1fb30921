"""One indexed source of images: our own splits and class numbers, decoded once where they are small.

Shapes: N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from factor_transfer.config import DataConfig
from factor_transfer.data.content import HINTS, Content, Lost, aspects, look
from factor_transfer.data.frames import SMALL, Frame
from factor_transfer.data.images import UNLABELLED, Images, Source, Unreadable, natural
from factor_transfer.data.masks import holds_masks, masked_source, named_masks, read_names
from factor_transfer.data.parts import Part, are_kept, load
from factor_transfer.data.sources import WRITTEN, open_source
from factor_transfer.data.splits import NO_LABEL, FileSplit, Shown, Split
from factor_transfer.data.unlabelled import Mixed, beside, open_unlabelled
from factor_transfer.data.views import VERSION, Transform, evenly, held_out
from factor_transfer.util.arguments import AnySize, Size, as_size, brief, imported, is_callable_name, written
from factor_transfer.util.errors import ConfigError, DataError, listed
from factor_transfer.util.files import cache_folder, fingerprint
from factor_transfer.util.identity import code_fingerprint
from factor_transfer.util.seeds import part_seed

TRANSFORM = "a function from an RGB image to an image, or uint8 pixels (3, H, W), of the size that the networks see"
TRACES = 8
"""Images on which an augmentation of the user's is tried, and known again."""


@dataclass(frozen=True)
class Dataset:
    """Training and validation images with one numbering of classes."""

    name: str
    train: Split
    validation: Split
    classes: tuple[str, ...]
    """Class names in index order."""
    frame: Frame
    """The size at which the student sees them, and how they are brought to it."""
    notes: tuple[str, ...]
    """What the user should know about how the data was understood."""
    held_out: bool
    """The validation images are a share of the training set."""
    described: Callable[[], dict[str, Any]] = field(repr=False)
    """What `fingerprint` is of; to make it, the bytes of all images are hashed where they are not remembered."""
    labelled: bool = True
    """False: a flat folder, whose images have no classes."""
    lost: tuple[Lost, ...] = ()
    """What of the files the networks do not see."""
    bit_depth: int | None = None
    """Bits in use in grey images of more than 8 that do not say; None: nothing was said of them."""
    transform: Transform | None = None
    """The user's own augmentation."""
    pixels: tuple[int, ...] | None = None
    """Training pixels of each class, of all masks; None where the images have no masks."""
    mixed: Mixed | None = None
    """Training images and unlabelled ones beside them, as passes show both."""
    described_unlabelled: Callable[[], str] | None = field(default=None, repr=False)
    """A hash of the unlabelled images, which may take long."""

    @property
    def pool(self) -> Split:
        """All images that are shown where labels are not read: the training images, then the unlabelled ones."""
        return self.train if self.mixed is None else self.mixed.bare

    @property
    def unlabelled(self) -> int:
        """Images without labels beside the training images."""
        return 0 if self.mixed is None else self.mixed.others

    @property
    def img_size(self) -> int | Size:
        """One number for a square, else height and width, in pixels."""
        return brief(self.frame.size)

    def transform_code(self) -> str | None:
        """A hash of the user's own augmentation, with the versions of the libraries that it uses."""
        return code_fingerprint(self.transform) if self.transform is not None else None

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any byte of an image, label, class order, split or augmentation."""
        return fingerprint(self.described())

    @cached_property
    def unlabelled_fingerprint(self) -> str | None:
        """Changes with any byte of an unlabelled image; None where there are none."""
        return self.described_unlabelled() if self.described_unlabelled is not None else None


def open_data(
    config: DataConfig,
    default_size: Callable[[], AnySize],
    transform: Transform | None = None,
    known: Sequence[str] | None = None,
    unlabelled: tuple[str, float | None] | None = None,
    masked: bool = False,
) -> Dataset:
    """Find, check, number and split the images that `config` names; small ones are decoded here.

    Args:
        config: `--data` and its companions.
        default_size: the size to use for images above 96 pixels without `--img-size`; called only for those.
        transform: the user's own augmentation, where it is given as an object.
        known: class names of a finished run, in index order. All images are then there to be measured: those of the
            validation set, or of the whole where there is none; some classes may be absent.
        unlabelled: where images without labels lie (--unlabelled), and their share (--unlabelled-share).
        masked: each image has a mask, whose pixels have the classes.

    Raises:
        ConfigError: the user's augmentation cannot be loaded, or does not give images of the right size; or there are
            classes that are not among the `known`.
        DataError: images or classes are missing, unreadable or contradictory.

    >>> found = open_data(DataConfig(data="digits"), default_size=lambda: 224)
    >>> len(found.train), len(found.validation), found.classes[:3], found.img_size
    (1258, 539, ('0', '1', '2'), 8)
    """
    _check_masked(config, transform, unlabelled, masked=masked)
    source = masked_source(config) if masked else open_source(config)
    notes = list(source.notes)
    if known is not None:
        source = replace(source, train=source.validation or source.train, validation=None)
    pixels = None
    if masked:
        source, classes, pixels = named_masks(source, config, notes, known)
    else:
        classes = number_classes(source, config, notes, known)
    sizes, met = look(source.train, config.bit_depth)
    frame = _frame(config, sizes, default_size, masked=masked)
    shown = _shown(frame, config)
    # Validation images are either a part of the training images, or a part of their own.
    apart = source.validation is None or config.validate_on == "train-holdout"
    parts = [source.train] if apart or source.validation is None else [source.train, source.validation]
    bare = [open_unlabelled(unlabelled[0], config.data, notes)] if unlabelled else []
    if bare and source.validation is not None and len(parts) == 1:
        bare.append(source.validation)  # which is not measured on now, but is later
    loaded, others = _loaded(parts, bare, classes, shown, config, notes)
    lost = _lost([part.content for part in (*loaded, *others) if part.content] or [met], config, notes)
    transform = transform or _imported(config)
    # With the classes of a finished run `known`, all images are there to be measured: every one is a validation image.
    holds_out = apart and known is None
    aside = _held_out(loaded[0], config, notes) if holds_out else np.full(len(loaded[0].labels), known is not None)
    chosen = _share(loaded[0], ~aside, config, notes)
    train = loaded[0].split(shown, config, chosen, transform)
    validation = loaded[0].split(shown, config, aside) if apart else loaded[1].split(shown, config)
    acts = _shown_by(train, config) if isinstance(train, FileSplit) and transform else None
    share = config.validation_share if apart else None
    labelled = (loaded[0], chosen), (loaded[-1], aside if apart else np.full(len(loaded[-1].rows), True))
    mixed = beside(labelled, others, shown, config, transform, unlabelled, notes) if unlabelled else None
    return Dataset(
        name=config.data,
        train=train,
        validation=validation,
        classes=classes,
        frame=frame,
        notes=tuple(notes),
        held_out=holds_out,
        described=lambda: _described(loaded, classes, shown, config, share, (acts, transform) if transform else None),
        labelled=UNLABELLED not in source.train.labels,
        bit_depth=config.bit_depth,
        lost=(*lost, *aspects(sizes, frame)),
        transform=transform,
        pixels=pixels,
        mixed=mixed,
        described_unlabelled=(lambda: others[0].digest(cache_folder(config.cache_dir))) if others else None,
    )


def _check_masked(
    config: DataConfig, transform: Transform | None, unlabelled: tuple[str, float | None] | None, *, masked: bool
) -> None:
    """What images with masks cannot have, and what others cannot.

    Raises:
        ConfigError: one of it is given.
        DataError: there are masks, and none are asked for.
    """
    if not masked and config.ignore_index is not None:
        found = "images of one class each, which have no masks"
        raise ConfigError(f"--ignore-index {config.ignore_index}", found=found, hint="leave it out")
    if not masked and holds_masks(Path(config.data).expanduser()):
        hint = "--task segmentation, of distill, compare and doctor"
        raise DataError(f"--data {config.data}", found="images with masks", valid="images of one class each", hint=hint)
    if masked and (transform is not None or config.transform is not None):
        found = "an augmentation of images alone, which would leave their masks behind"
        raise ConfigError(f"--transform {config.transform or transform}", found=found, hint="leave it out")
    if masked and not config.label_weight:
        found = "images with masks, which are the labels"
        raise ConfigError("--label-weight 0", found=found, valid="a weight above 0: masks are read in any case")
    if masked and unlabelled:
        found = "images beside others that have masks: both kinds in one batch are not built yet"
        raise ConfigError(f"--unlabelled {unlabelled[0]}", found=found, hint="leave it out")


def _frame(config: DataConfig, sizes: Sequence[Size], default_size: Callable[[], AnySize], *, masked: bool) -> Frame:
    """The size of the images; with masks that of the files where they have one, and the whole image."""
    if not masked:
        return Frame.of(config.img_size or _own_size(sizes) or default_size(), config.crop_mode, config.crop_pct)
    own = sizes[0] if len(set(sizes)) == 1 else _own_size(sizes)
    size, pct = config.img_size or own or default_size(), config.crop_pct
    return Frame.of(as_size(size), config.crop_mode or "squash", 1.0 if pct is None else pct)


def _loaded(
    parts: Sequence[Images],
    bare: Sequence[Images],
    classes: Sequence[str],
    shown: Shown,
    config: DataConfig,
    notes: list[str],
) -> tuple[list[Part], list[Part]]:
    """Images with labels, and others beside them; small ones are decoded once, if there is room for all of them."""
    number = {UNLABELLED: 0} | {name: index for index, name in enumerate(classes)}
    kept = are_kept([*parts, *bare], shown.frame, config)
    loaded = load(parts, number, shown, config, notes, kept=kept)
    return loaded, load(bare, {**number, UNLABELLED: NO_LABEL}, shown, config, notes, kept=kept)


def _shown(frame: Frame, config: DataConfig) -> Shown:
    """How training images are shown.

    Raises:
        DataError: a padding as large as the images.
    """
    side = min(frame.size)
    padding = side // 8 if config.crop_padding is None else config.crop_padding
    if padding >= side:
        raise DataError(f"--crop-padding {padding}", found=f"images of {written(frame.size)}", valid=f"below {side}")
    return Shown(
        frame=frame,
        padding=padding,
        hflip=(0.0 if config.data.lower() in WRITTEN else 0.5) if config.hflip is None else config.hflip,
        scale=(config.scale[0], config.scale[1]),
        color_jitter=config.color_jitter,
        seed=config.data_seed,
        bits=config.bit_depth,
    )


def _described(
    parts: Sequence[Part],
    classes: tuple[str, ...],
    shown: Shown,
    config: DataConfig,
    share: float | None,
    transform: tuple[str | None, Transform] | None,
) -> dict[str, Any]:
    """What a dataset's fingerprint is of; the user's `transform` by its results and its code."""
    return {
        "views": VERSION,
        "shown": asdict(shown) | {"frame": shown.frame.identity()},
        "classes": classes,
        "share": share,
        "train": config.train_images,
        "images": [part.digest(cache_folder(config.cache_dir)) for part in parts],
        "transform": [transform[0], code_fingerprint(transform[1], versions=False)] if transform else None,
    }


def _lost(contents: Sequence[Content], config: DataConfig, notes: list[str]) -> list[Lost]:
    """What the files hold that the networks do not see; notes say what is shown otherwise."""
    content = Content()
    for each in contents:
        content.add_all(each)
    dark = content.dark(config.bit_depth)
    if dark is not None:
        valid = "--bit-depth N: how many bits are in use; 0 becomes black and the largest of N bits white"
        raise DataError(f"--data {config.data}", found=dark.what, valid=valid, hint=dark.hint)
    notes += [what for kind, what in content.told() if kind not in HINTS]
    return content.lost()


def _share(train: Part, there: np.ndarray, config: DataConfig, notes: list[str]) -> np.ndarray:
    """Which of the training images that are `there`, (n,) bool, are trained on: `--train-images`, or all."""
    count, rows = config.train_images, np.flatnonzero(there)
    if count is None:
        return there
    fewest = len(np.unique(train.labels))
    if not fewest <= count <= len(rows):
        raise DataError(
            f"--train-images {count}",
            found=f"{len(rows):,} training images in {fewest:,} classes",
            valid=f"{fewest} to {len(rows)}: one of each class or more",
        )
    chosen = np.zeros_like(there)
    chosen[rows[evenly(train.labels[rows], count, part_seed(config.data_seed, "train images"))]] = True
    notes.append(
        f"{count:,} of {len(rows):,} training images, as many of each class (--train-images {count}, by --data-seed "
        f"{config.data_seed})"
    )
    return chosen


def _held_out(train: Part, config: DataConfig, notes: list[str]) -> np.ndarray:
    """Which training images are set aside for validation, (n,) bool."""
    chosen = held_out(train.labels, config.validation_share, part_seed(config.data_seed, "split"))
    why = "--validate-on train-holdout" if config.validate_on == "train-holdout" else "no validation set"
    notes.append(
        f"{why}: {chosen.sum():,} of {len(chosen):,} training images are held out "
        f"({config.validation_share:.0%} of each class, by --data-seed {config.data_seed})"
    )
    if not chosen.any():
        raise DataError(
            f"--data {config.data}",
            found=f"one training image in each class, and {why}",
            valid="two images or more in a class",
        )
    return chosen


# -- classes: one numbering for all splits (timm numbers each split by itself)


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
        notes.append("no labels: nothing can be measured here")
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
    return read_names(Path(name).expanduser(), f"--class-map {name}")


# -- the user's own augmentation


def _imported(config: DataConfig) -> Transform | None:
    if config.transform is None:
        return None
    try:
        if not is_callable_name(config.transform):
            raise ValueError("no package.module:callable; one that is given in Python is given there again")
        found = imported(config.transform)
        if not callable(found):
            raise ValueError(f"a {type(found).__name__}, which cannot be called")
    except Exception as error:  # whatever importing code of the user's raises
        raise ConfigError(f"--transform {config.transform}", found=str(error), valid=TRANSFORM) from error
    return cast(Transform, found)


def _shown_by(train: FileSplit, config: DataConfig) -> str:
    """A hash of what the augmentation makes of a few images: code has no fingerprint, but its results have."""
    found = hashlib.sha256()
    for view in range(2):
        try:
            found.update(train.show(np.arange(min(len(train), TRACES)), view).image.numpy().tobytes())
        except Unreadable as error:
            raise ConfigError(f"--transform {config.transform}", found=error.reason, valid=TRANSFORM) from error
    return found.hexdigest()


def _own_size(sizes: Sequence[Size]) -> int | None:
    """The median longer side of a sample of the images; None where that is above 96 pixels."""
    sides = sorted(max(size) for size in sizes)
    side = sides[len(sides) // 2] if sides else SMALL
    return side if side <= SMALL else None
