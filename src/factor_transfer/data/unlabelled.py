"""Images without labels beside the labelled ones (--unlabelled): which they are, and how many a pass shows.

A pass is a pass over the labelled images, in the order that they have without the others. The unlabelled ones are shown
in rounds. A round is a whole number of passes, each of which shows another part of them, and its order is a function of
(data seed, round). So no unlabelled image is shown twice before all have been shown once, but for those that fill up
the last part of a round: fewer than the round has passes. In round r an unlabelled image shows view r, as a labelled
one shows view e in pass e.

Within a pass both kinds are mixed evenly, so every batch, and every process's part of it, has their share of both.

Shapes: L labelled images, which come first, and U unlabelled ones; B samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path

import numpy as np
from PIL import Image

from factor_transfer.config import DataConfig
from factor_transfer.data.images import UNLABELLED, Files, Images, Unreadable, natural
from factor_transfer.data.layouts import missing
from factor_transfer.data.parts import Part
from factor_transfer.data.splits import NO_LABEL, Batch, FileSplit, PixelSplit, Shown, Split, View
from factor_transfer.data.trees import counted, folder_tree, tar_tree
from factor_transfer.data.views import Transform, permutation
from factor_transfer.util.errors import ConfigError, DataError
from factor_transfer.util.files import cache_folder
from factor_transfer.util.seeds import part_seed

USUAL = 0.5
"""Default of --unlabelled-share, where there are as many unlabelled images as labelled ones, or more."""

FORMS = "a folder or .tar of images, beside any --data"


# -- which they are


def open_unlabelled(name: str, data: str, notes: list[str]) -> Images:
    """All images below a folder, or in a tar; the folders that they lie in say nothing.

    Args:
        name: of the folder or tar.
        data: the value of --data, for the message.
        notes: what is left out is added here.

    Raises:
        DataError: it is neither, or there are no images.
    """
    given, root = f"--unlabelled {name} beside --data {data}", Path(name).expanduser()
    try:
        if not root.exists():
            raise missing(given, root, FORMS)
        if root.is_file() and root.suffix.lower() != ".tar":
            raise DataError(given, found="a file", valid=FORMS)
        tree = tar_tree(root, given).images() if root.is_file() else folder_tree(root)
    except OSError as error:  # no permission, a name too long, a disk that fails
        raise DataError(given, found=str(error), valid=FORMS) from error
    left_out = counted(tree.left_out)
    if not tree.files:
        found = f"no images in {root}" + (f", but {left_out}" if left_out else "")
        raise DataError(given, found=found, valid=FORMS)
    if left_out:
        notes.append(f"in {root}, not read: {left_out}")
    names = sorted(tree.files, key=natural)
    return Files(str(root), names, [UNLABELLED] * len(names), [tree.files[name] for name in names])


def elsewhere(
    others: Part, trained: Iterable[bytes], measured: Iterable[bytes], cache: Path, notes: list[str]
) -> np.ndarray:
    """Which unlabelled images are neither among the training nor among the validation images, (U,) bool.

    What is measured on must not be trained on, and a training image is shown already. They are found by content (see
    `Part.contents`), left out, and counted in `notes`.
    """
    training, validation = frozenset(trained), frozenset(measured)
    mine = others.contents(cache)
    in_validation = np.array([each in validation for each in mine])
    in_training = np.array([each in training for each in mine]) & ~in_validation
    for found, where in ((in_validation, "validation"), (in_training, "training")):
        if found.any():
            notes.append(f"{found.sum():,} of {len(mine):,} unlabelled images are {where} images too, and are left out")
    kept: np.ndarray = ~(in_validation | in_training)
    return kept


# -- both kinds as one split


@dataclass(frozen=True)
class Joined(Images):
    """The images of two parts, one after the other."""

    parts: tuple[Images, Images]

    @classmethod
    def of(cls, first: Images, second: Images) -> Joined:
        """Named as they are in their own parts."""
        return cls(first.where, [*first.names, *second.names], [*first.labels, *second.labels], (first, second))

    def open(self, index: int) -> Image.Image:
        """See `Images`."""
        part, place = self._of(index)
        return part.open(place)

    def raw(self, index: int) -> bytes:
        """See `Images`."""
        part, place = self._of(index)
        return part.raw(place)

    def unreadable(self, index: int, reason: str) -> Unreadable:
        """See `Images`."""
        part, place = self._of(index)
        return part.unreadable(place, reason)

    def _of(self, index: int) -> tuple[Images, int]:
        first = len(self.parts[0])
        return (self.parts[0], index) if index < first else (self.parts[1], index - first)


class Stacked:
    """The pixels of two parts, uint8 (N, H, W, 3) each, indexed as if they were one array."""

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        self._parts = first, second

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        first, second = self._parts
        later = rows >= len(first)
        found = np.empty((len(rows), *first.shape[1:]), first.dtype)
        found[~later], found[later] = first[rows[~later]], second[rows[later] - len(first)]
        return found


def joined(
    labelled: Part, chosen: np.ndarray, others: Part, kept: np.ndarray, shown: Shown, config: DataConfig,
    transform: Transform | None,
) -> Split:  # fmt: skip
    """The chosen labelled images, and after them the kept unlabelled ones, whose label is `NO_LABEL`."""
    rows = np.concatenate([labelled.rows[chosen], len(labelled.images) + others.rows[kept]])
    labels = np.concatenate([labelled.labels[chosen], np.full(int(kept.sum()), NO_LABEL, np.int64)])
    if labelled.pixels is not None and others.pixels is not None and transform is None:
        return PixelSplit(Stacked(labelled.pixels.array, others.pixels.array), rows, labels, shown)
    return FileSplit(Joined.of(labelled.images, others.images), rows, labels, shown, config, transform)


# -- what a pass shows


def round_of(labelled: int, others: int, share: float | None) -> int:
    """Passes of a round: the number with which the share of unlabelled images in a pass is nearest to the given one.

    Args:
        labelled: L, images of a pass that have a label.
        others: U.
        share: --unlabelled-share; None: half, or as large as it can be.

    Raises:
        ConfigError: a pass would show unlabelled images twice.

    >>> round_of(500, 2000, None), round_of(500, 2000, 0.8), round_of(500, 100, None)
    (4, 1, 1)
    """
    most = others / (labelled + others)
    if share is not None and share > most:
        raise ConfigError(
            f"--unlabelled-share {share:g}",
            found=f"{others:,} unlabelled images beside {labelled:,} labelled ones, each shown once a pass at most",
            valid=f"above 0, at most {most - 5e-4:.3f}",
        )
    share = min(USUAL, most) if share is None else share
    return min(others, max(1, round(others * (1 - share) / (labelled * share))))


class Mixed(Split):
    """Labelled images and others, as passes show them; see the top of this file.

    Args:
        images: all of them, the labelled ones first.
        passes: of a round.

    >>> from factor_transfer.data.dataset import open_data
    >>> images = open_data(DataConfig(data="digits"), default_size=lambda: 224).train
    >>> images.labels = np.where(np.arange(1258) < 258, images.labels, NO_LABEL)
    >>> mixed = Mixed(images, passes=4)
    >>> len(mixed), mixed.share, mixed.view(epoch=5, kept=0), mixed.view(epoch=5, kept=1)
    (508, 0.4921259842519685, (5, 1), (0, 0))
    """

    def __init__(self, images: Split, passes: int) -> None:
        self.images, self.labels, self.passes = images, images.labels, passes
        self.labelled = int((images.labels != NO_LABEL).sum())
        self.others = len(images) - self.labelled
        self.part = -(-self.others // passes)
        """Unlabelled images of a pass."""

        self.known = self.labelled / len(self)
        self.bare = copy(images)
        """All of them for what reads no label: no image is marked as unlabelled."""
        self.bare.labels = np.maximum(self.labels, 0)

    def __len__(self) -> int:
        """Images of a pass."""
        return self.labelled + self.part

    @property
    def share(self) -> float:
        """Of unlabelled images in a pass."""
        return self.part / len(self)

    def batches(self, chunks: Iterable[np.ndarray], view: View | None) -> Iterator[Batch]:
        """See `Split`; a view for each kind."""
        return self.images.batches(chunks, view)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """See `Split`: (L + part,)."""
        which, part = divmod(epoch, self.passes)
        ring = self.labelled + permutation(part_seed(seed, "unlabelled"), which, self.others)
        shown = ring[np.arange(part * self.part, (part + 1) * self.part) % self.others]
        return spread(permutation(seed, epoch, self.labelled), shown)

    def view(self, epoch: int, kept: int) -> View:
        """See `Split`: the pass's for the labelled images, the round's for the others."""
        views = epoch, epoch // self.passes
        return (views[0] % kept, views[1] % kept) if kept else views

    def fresh(self, index: np.ndarray, epoch: int, kept: int) -> int:
        """See `Split`."""
        beyond = index >= self.labelled
        views = np.where(beyond, epoch // self.passes, epoch)
        return len(index) if not kept else int((views < kept).sum())

    def told(self) -> str:
        """What a user is told of it."""
        return (
            f"{self.others:,} unlabelled images: a pass shows {self.labelled:,} labelled and {self.part:,} unlabelled "
            f"ones (share {self.share:.2f}), all of them in {self.passes:,} pass{'es' * (self.passes > 1)}"
        )

    def never_shown(self, epochs: int) -> str:
        """What so many passes leave out; nothing, where they leave nothing out."""
        never = self.others - epochs * self.part
        return f"in {epochs:,} passes {never:,} unlabelled images are never shown to the student" if never > 0 else ""


def spread(labelled: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Both in one order, each in its own, the others evenly among the labelled.

    >>> spread(np.array([0, 1]), np.array([10, 11, 12]))
    array([ 0, 10,  1, 11, 12])
    """
    count = len(labelled) + len(others)
    beyond = np.diff(np.arange(count + 1) * len(others) // count) > 0
    found = np.empty(count, np.int64)
    found[~beyond], found[beyond] = labelled, others
    return found


def least_labelled(chunks: Sequence[np.ndarray], labelled: int, processes: int) -> int:
    """The fewest labelled images, those below `labelled`, that a process has of a batch."""
    parts = [part for chunk in chunks for part in np.array_split(chunk, processes)]
    return min(int((part < labelled).sum()) for part in parts)


def beside(
    labelled: Sequence[tuple[Part, np.ndarray]],
    others: Sequence[Part],
    shown: Shown,
    config: DataConfig,
    transform: Transform | None,
    unlabelled: tuple[str, float | None],
    notes: list[str],
) -> Mixed:
    """Training images, and those without labels that are neither among them nor among the validation images.

    Args:
        labelled: training and validation images: a part of each, and which of its readable images.
        others: those without labels, and perhaps validation images that are not measured on now.
        shown: how all are shown.
        config: `--data` and its companions.
        transform: the user's own augmentation.
        unlabelled: as `open_data` has it.
        notes: what is left out is added here.

    Raises:
        DataError: nothing is left.
        ConfigError: there are not enough for the share that is asked for.
    """
    cache = cache_folder(config.cache_dir)
    bare, *hidden = others
    trained, measured = (compress(part.contents(cache), chosen) for part, chosen in labelled)
    kept = elsewhere(bare, trained, chain(measured, *(part.contents(cache) for part in hidden)), cache, notes)
    if not kept.any():
        found = f"{len(kept):,} images, all of them among the training or validation images"
        raise DataError(f"--unlabelled {unlabelled[0]}", found=found, valid="images besides those of --data")
    (part, chosen), _ = labelled
    images = joined(part, chosen, bare, kept, shown, config, transform)
    return Mixed(images, round_of(int(chosen.sum()), int(kept.sum()), unlabelled[1]))
