"""The readable images of one part of a dataset: training, validation, or those without labels.

Shapes: N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from factor_transfer.config import DataConfig
from factor_transfer.data.content import Content
from factor_transfer.data.frames import Frame
from factor_transfer.data.images import Images, Unreadable, corrupted, named, natural
from factor_transfer.data.masks import Masked
from factor_transfer.data.pixels import Pixels, decode_once, digests, read_all
from factor_transfer.data.splits import FileSplit, PixelSplit, Shown, Split
from factor_transfer.data.views import Transform
from factor_transfer.util.errors import DataError, listed
from factor_transfer.util.files import cache_folder


@dataclass(frozen=True)
class Part:
    """The readable images of one part of a source."""

    images: Images
    rows: np.ndarray  # indices of the readable ones
    labels: np.ndarray  # their classes
    pixels: Pixels | None  # of all; None: decoded when shown
    content: Content | None  # of all; None: not all were read

    def digest(self, cache: Path) -> str:
        """Covers the bytes of every image, which are readable, and the labels; `cache` remembers the bytes' hashes."""
        known = self.pixels.digests if self.pixels else None
        found = hashlib.sha256(self.labels.tobytes() + self.rows.tobytes())
        found.update(b"".join(digests(self.images, cache) if known is None else known))
        if isinstance(self.images, Masked):
            found.update(b"".join(digests(self.images.masks, cache)) + str(self.images.ignore).encode())
        return found.hexdigest()

    def contents(self, cache: Path) -> list[bytes]:
        """A hash of each readable image: of its pixels where all are decoded, else of its bytes."""
        if self.pixels is not None:
            array = self.pixels.array
            return [hashlib.sha256(array[row].tobytes()).digest() for row in self.rows]
        found = digests(self.images, cache)
        return [found[row] for row in self.rows]

    def split(
        self,
        shown: Shown,
        config: DataConfig,
        chosen: np.ndarray | slice = slice(None),
        transform: Transform | None = None,
    ) -> Split:
        """The chosen of the readable images; an augmentation of the user's works on images one by one, in workers."""
        rows, labels = self.rows[chosen], self.labels[chosen]
        if self.pixels is not None and transform is None:
            return PixelSplit(self.pixels.array, rows, labels, shown)
        return FileSplit(self.images, rows, labels, shown, config, transform)


def are_kept(parts: Sequence[Images], frame: Frame, config: DataConfig) -> bool:
    """Whether all images are decoded once: they are small, and not too many."""
    if any(isinstance(part, Masked) for part in parts):  # these are decoded when they are shown, as their masks are
        return False
    return frame.small and sum(map(len, parts)) * math.prod(frame.size) * 3 <= config.pixel_cache_gb * 1e9


def load(
    parts: Sequence[Images],
    number: Mapping[str, int],
    shown: Shown,
    config: DataConfig,
    notes: list[str],
    *,
    kept: bool,
) -> list[Part]:
    """Decode small images; of large ones only make sure that they are readable, and only for `--skip-corrupt`.

    Args:
        parts: the first has an image of each class.
        number: of each class name.
        shown: how images are shown.
        config: `--data` and its companions.
        notes: what was left out is added here.
        kept: whether they are decoded once: see `are_kept`.

    Raises:
        DataError: an image cannot be read; or, where such images are left out, nothing is left.
    """
    loaded: list[Part] = []
    corrupt: list[Unreadable] = []
    for images in parts:
        pixels = decode_once(images, shown.frame, cache_folder(config.cache_dir), shown.bits) if kept else None
        bad, content = (pixels.unreadable, pixels.content) if pixels else ({}, None)
        if config.skip_corrupt and pixels is None:
            bad, content = read_all(images, shown.bits)
        rows = np.array([row for row in range(len(images)) if row not in bad], dtype=np.int64)
        labels = np.array([number[images.labels[row]] for row in rows], dtype=np.int64)
        loaded.append(Part(images, rows, labels, pixels, content))
        corrupt += bad.values()
    if corrupt and not config.skip_corrupt:
        raise corrupted(config.data, corrupt)
    if corrupt:
        notes.append(f"{named(corrupt)} left out (--skip-corrupt)")
        first = loaded[0]
        gone = sorted({*parts[0].labels} - {parts[0].labels[row] for row in first.rows}, key=natural)
        if gone or not all(len(part.rows) for part in loaded):
            raise DataError(
                f"--data {config.data}",
                found=f"after leaving out {named(corrupt)} nothing is left of {listed(gone) or 'the validation set'}",
                valid="at least one readable image in each class",
            )
    return loaded
