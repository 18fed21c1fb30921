"""One image at a time: where its bytes lie, how they become RGB, and what is said when they cannot.

Folders and tars are indexed here and not by timm's readers, whose tar handles are shared by forked workers and whose
class numbers differ between splits; file order and class order are timm's.
A tar member is a byte range of its tar, which every read opens for itself.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from factor_transfer.errors import DataError, listed

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


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
    sizes: Sequence[int]
    """Bytes, for the fingerprint; 0 where they are not known without reading."""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def open(self, index: int) -> Image.Image:
        """Image `index` as its file holds it, perhaps not yet decoded."""

    def rgb(self, index: int) -> Image.Image:
        """Image `index`, decoded, in RGB.

        Raises:
            Unreadable: it cannot be decoded. (It is never replaced by another one.)
        """
        try:
            return to_rgb(self.open(index))
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
            reason = re.sub(r" <_io\S+ object at \w+>", "", str(error)) or type(error).__name__
            raise self.unreadable(index, reason) from error

    def unreadable(self, index: int, reason: str) -> Unreadable:
        """The finding that image `index` cannot be decoded."""
        return Unreadable(f"{self.where}/{self.names[index]}", reason)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode and convert: 16 bits are scaled to 8, transparency is dropped, an animation gives its first frame.

    Raises:
        ValueError: pixels of a kind that has no sensible RGB value.

    >>> to_rgb(Image.fromarray(np.full((1, 1), 0x8000, np.uint16))).getpixel((0, 0))
    (128, 128, 128)
    """
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit integer pixels")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


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


def natural(name: str) -> tuple[list[Any], str]:
    """timm's sorting key (`a2` before `a10`, case ignored), made total by the name itself."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


class Range(NamedTuple):
    """Bytes of a file: all of an image file, or one member of a tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes; no handle stays open, so none is shared between processes."""
        with open(self.path, "rb") as file:  # noqa: PTH123 (an open for every image: Path costs more than the read)
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Files(Images):
    """Images in files and tars."""

    ranges: Sequence[Range]

    def open(self, index: int) -> Image.Image:
        """See `Images`."""
        data = self.ranges[index].read()
        if not data:
            raise ValueError("no bytes")
        return Image.open(io.BytesIO(data))


@dataclass(frozen=True)
class Tree:
    """Files and folders below a root, by relative name; hidden ones are left out."""

    files: dict[str, Range]
    folders: frozenset[str]

    def below(self, name: str) -> Tree:
        """What lies in folder `name`."""
        start = name + "/"
        files = {path.removeprefix(start): place for path, place in self.files.items() if path.startswith(start)}
        return Tree(files, frozenset(path.removeprefix(start) for path in self.folders if path.startswith(start)))


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def folder_tree(root: Path) -> Tree:
    """The images below a folder."""
    files, folders = {}, set()
    for folder, _, entries in os.walk(root, followlinks=True):
        inside = posixpath.normpath(Path(folder).relative_to(root).as_posix())
        folders.add(inside)
        for entry in entries:
            path = os.path.join(folder, entry)  # noqa: PTH118 (a million names)
            if entry.lower().endswith(EXTENSIONS):
                files[posixpath.normpath(f"{inside}/{entry}")] = Range(path, 0, _size(path))
    return Tree({n: r for n, r in files.items() if _visible(n)}, frozenset(f for f in folders if _visible(f)))


def _size(path: str) -> int:
    return os.stat(path).st_size if os.path.exists(path) else 0  # noqa: PTH110, PTH116 (0: a dangling link)


def tar_tree(path: Path, given: str) -> Tree:
    """All files of a tar.

    Raises:
        DataError: it is not a whole, uncompressed tar; `given` is what the user gave.
    """
    files: dict[str, Range] = {}
    folders = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name).lstrip("/")
                if member.isdir():
                    folders.add(name)
                elif member.islnk() and posixpath.normpath(member.linkname) in files:
                    files[name] = files[posixpath.normpath(member.linkname)]
                elif member.isfile():
                    files[name] = Range(str(path), member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(given, found=f"{path}: {error}", valid="whole, uncompressed tar files") from error
    return Tree({n: r for n, r in files.items() if _visible(n)}, frozenset(f for f in folders if _visible(f)))
