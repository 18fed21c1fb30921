"""One image at a time: where its bytes lie, how they become RGB, and what is said when they cannot.

File order and class order are timm's.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from factor_transfer.data.frames import Frame
from factor_transfer.data.rgb import Decoded, decoded
from factor_transfer.data.trees import Range, image_formats
from factor_transfer.util.errors import DataError, listed


class Unreadable(Exception):  # noqa: N818 (a finding, which also travels as a value)
    """An image that cannot be decoded: its name, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class Images(ABC):
    """Images in a fixed order. Holds no open handle, so that it can be given to worker processes."""

    where: str
    """The folder, tar or dataset that `names` belong to."""
    names: Sequence[str]
    labels: Sequence[str]
    """The class name of each image."""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Image `index` as its file holds it, perhaps not yet decoded."""

    @abstractmethod
    def raw(self, index: int) -> bytes:
        """What the data's fingerprint is of: the bytes of image `index`'s file, or where it has none its pixels."""

    def rgb(self, index: int, bits: int | None = None) -> Image.Image:
        """Image `index`, decoded, in RGB; `bits` as in `rgb.decoded`.

        Raises:
            Unreadable: it cannot be decoded. (It is never replaced by another one.)
        """
        return self.decoded(index, bits).image

    def decoded(self, index: int, bits: int | None = None) -> Decoded:
        """Image `index`, decoded, in RGB, and what was met on the way.

        Raises:
            Unreadable: it cannot be decoded.
        """
        try:
            return decoded(self.open(index), bits)
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
            reason = re.sub(r" <_io\S+ object at \w+>", "", str(error)) or type(error).__name__
            raise self.unreadable(index, reason) from error

    def framed(self, index: int, image: Image.Image, frame: Frame) -> Tensor:
        """Image `index`, decoded, as evaluation shows it: uint8 (3, H, W).

        Raises:
            Unreadable: nothing is left of it at that size.
        """
        try:
            return frame.show(image)
        except ValueError as error:
            raise self.unreadable(index, str(error)) from error

    def unreadable(self, index: int, reason: str) -> Unreadable:
        """The finding that image `index` cannot be decoded."""
        return Unreadable(f"{self.where}/{self.names[index]}", reason)


def named(corrupt: Sequence[Unreadable]) -> str:
    """How many images are unreadable, which, and why."""
    shown = listed([f"{found.name} ({found.reason})" for found in corrupt])
    return f"{len(corrupt)} unreadable image{'s' if len(corrupt) > 1 else ''}: {shown}"


def corrupted(data: str, corrupt: Sequence[Unreadable]) -> DataError:
    """What is said of unreadable images in `--data`."""
    return DataError(
        f"--data {data}",
        found=named(corrupt),
        valid="images that PIL can decode",
        hint="repair or remove them, or give --skip-corrupt",
    )


def natural(name: str, *, case: bool = False) -> tuple[list[Any], str]:
    """timm's sorting key (`a2` before `a10`, case ignored unless `case`), made total by the name itself.

    >>> sorted(["B", "a10", "a2"], key=natural)
    ['a2', 'a10', 'B']
    >>> sorted(["B", "a10", "a2"], key=lambda name: natural(name, case=True))
    ['B', 'a2', 'a10']
    """
    parts = re.split(r"(\d+)", name if case else name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


@dataclass(frozen=True)
class Files(Images):
    """Images in files and tars."""

    ranges: Sequence[Range]

    def open(self, index: int) -> Image.Image:
        """See `Images`."""
        data = self.ranges[index].read()
        if not data:
            raise ValueError("no bytes")
        return Image.open(io.BytesIO(data), formats=image_formats())

    def raw(self, index: int) -> bytes:
        """See `Images`; of a file that cannot be read, why."""
        try:
            return self.ranges[index].read()
        except OSError as error:
            return f"errno {error.errno}".encode()


@dataclass(frozen=True)
class Indexed(Images):
    """Images of a dataset of another library's, by index."""

    dataset: Any

    def open(self, index: int) -> Image.Image:
        """(PIL image or open file, label) from torchvision's datasets and timm's readers."""
        found = self.dataset[index][0]
        if isinstance(found, Image.Image):
            return found
        with found:  # whole, since PIL would read it after it is closed
            return Image.open(io.BytesIO(found.read()), formats=image_formats())

    def raw(self, index: int) -> bytes:
        """The file's bytes, or mode, size and pixels."""
        found = self.dataset[index][0]
        if isinstance(found, Image.Image):
            return f"{found.mode} {found.size}".encode() + found.tobytes()
        with found:
            data: bytes = found.read()
        return data
