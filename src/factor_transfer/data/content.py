"""What a file holds that the networks do not see, or see changed: counted, with names of images and a remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image

from factor_transfer.data.frames import Frame
from factor_transfer.data.images import (
    DEEP,
    KINDS,
    Decoded,
    Images,
    Kind,
    Unreadable,
    needs_decoding,
    of_header,
    upright_size,
)
from factor_transfer.data.views import spaced
from factor_transfer.util.arguments import Size, as_flag, written
from factor_transfer.util.errors import SHOWN_CHOICES, listed

SAMPLE, DECODED = 256, 32
"""Images whose headers are read, and how many of them are decoded where only that tells."""

STRETCHED, SHARE = 1.6, 0.1
"""An aspect so many times off the networks' is worth a warning in this share of the images. (3:2 photographs are 1.5
off a square, and are usually cropped.)"""

DARK = 14
"""16-bit images that use no more bits than this are most likely of fewer bits: at 16 they would be nearly black."""

HINTS: dict[Kind, str] = {
    "transparent": "where transparency matters, put them on a background first",
    "bands": "where the others matter, make RGB images of three bands",
    "frames": "where the others matter, make an image of each",
    "cmyk": "where their colours matter, convert them to RGB with their profile",
}


class Lost(NamedTuple):
    """Something that the networks do not see, and what mends it."""

    what: str
    hint: str


@dataclass
class Content:
    """What was met in so many images."""

    looked: int = 0
    counts: dict[Kind, int] = field(default_factory=dict)
    names: dict[Kind, list[str]] = field(default_factory=dict)
    """The first of each kind."""
    largest: int | None = None
    """The largest sample of 16-bit images that do not say how many bits they use."""

    def add(self, name: str, found: Decoded) -> None:
        """One more image."""
        self.add_all(Content(1, dict.fromkeys(found.kinds, 1), {kind: [name] for kind in found.kinds}, found.largest))

    def add_all(self, other: Content) -> None:
        """What was met in others."""
        self.looked += other.looked
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.names[kind] = (self.names.get(kind, []) + other.names[kind])[:SHOWN_CHOICES]
        if other.largest is not None:
            self.largest = max(other.largest, self.largest or 0)

    def told(self) -> Iterator[tuple[Kind, str]]:
        """A sentence for each kind."""
        for kind, what in KINDS.items():
            count = self.counts.get(kind, 0)
            if count:
                more = f" and {count - len(self.names[kind])} more" if count > len(self.names[kind]) else ""
                yield kind, f"{count:,} of {self.looked:,} images are {what} ({listed(self.names[kind])}{more})"

    def lost(self) -> list[Lost]:
        """Of these, what loses something."""
        return [Lost(what, HINTS[kind]) for kind, what in self.told() if kind in HINTS]

    def dark(self, bits: int | None) -> Lost | None:
        """What is said of 16-bit images that would be nearly black because they use fewer bits, if they would.

        `bits` is `--bit-depth`: where it is given, it is believed.

        >>> Content(largest=3000).dark(None).hint
        '--bit-depth 12; or --bit-depth 16 where they are as dark as that'
        """
        if bits is not None or self.largest is None or self.largest.bit_length() > DARK:
            return None
        likely = next(usual for usual in (10, 12, DARK) if self.largest < 1 << usual)
        return Lost(
            f"16-bit images without a value above {self.largest:,}, as images of {likely} bits have: read as {DEEP} "
            "bits they would be nearly black",
            f"--bit-depth {likely}; or --bit-depth {DEEP} where they are as dark as that",
        )


def look(images: Images, bits: int | None) -> tuple[list[Size], Content]:
    """Read the headers of a sample of images; decode a few of those whose header does not tell.

    Gives the heights and widths of the images when upright, and what was met in them.
    """
    sizes: list[Size] = []
    content, decoded = Content(), 0
    for row in spaced(len(images), SAMPLE).tolist():
        with suppress(Exception):  # whoever decodes it names it
            image: Image.Image = images.open(row)
            sizes.append(upright_size(image))
            found = Decoded(image, of_header(image), None)
            if needs_decoding(image) and decoded < DECODED:
                decoded += 1
                with suppress(Unreadable):
                    found = images.decoded(row, bits)
            content.add(images.names[row], found)
    return sizes, content


def aspects(sizes: Sequence[Size], frame: Frame) -> list[Lost]:
    """What a crop mode does to images of these heights and widths, where that is much."""
    off = [size for size in sizes if frame.stretch(size) > STRETCHED]
    if not off or len(off) < SHARE * len(sizes):
        return []
    middle = sorted(off, key=lambda size: size[1] / size[0])[len(off) // 2]
    stretch, mode = frame.stretch(middle), frame.mode
    does = {
        "squash": f"squashes them by {stretch:.1f}",
        "center": f"cuts {1 - 1 / stretch:.0%} of them off",
        "border": f"makes {1 - 1 / stretch:.0%} of what is seen border",
    }[mode]
    others = " or ".join(other for other in ("squash", "border") if other != mode)
    return [
        Lost(
            f"{len(off) / len(sizes):.0%} of the images have another aspect ({written(middle)}) than the "
            f"{written(frame.size)} that the networks see: --crop-mode {mode} {does}",
            f"--img-size {as_flag(fitting(frame.size, middle))} (height, width)"
            + (f", or --crop-mode {others}" if mode == "center" else ""),
        )
    ]


def fitting(size: Size, image: Size) -> Size:
    """The size with about the area of `size` and the aspect of an image, in steps that networks can halve.

    >>> fitting((128, 128), (32, 128))
    (64, 256)
    """
    area, aspect = size[0] * size[1], image[1] / image[0]
    step = 4 if max(size) <= 32 else 8 if max(size) <= 96 else 32
    height, width = (
        max(step, round(side / step) * step) for side in (math.sqrt(area / aspect), math.sqrt(area * aspect))
    )
    return height, width
