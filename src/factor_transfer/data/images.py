"""One image: where its bytes lie, how they become upright RGB pixels, and what is said when they cannot.

Training, evaluation, the store of decoded images and `predict` all use `decoded`. `examples/predict_onnx.py` repeats it
without this package, and a test compares the two.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, features
from torch import Tensor

from factor_transfer.data.frames import Frame
from factor_transfer.util.errors import DataError, listed

NO_IMAGES = frozenset({"PDF", "EPS", "PSD", "WMF", "BUFR", "GRIB", "HDF5", "IPTC", "MPEG"})
"""Formats that Pillow knows and that are not read: documents and drawings, which often lie beside the image that was
made of them, and files without an image."""

CODECS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "MPO": "jpg", "PNG": "zlib", "WEBP": "webp"}
"""Formats that Pillow decodes only where it was built with this library."""

Kind = Literal["turned", "transparent", "bands", "frames", "cmyk"]
"""Why the RGB pixels of an image are not simply the values in its file."""

KINDS: dict[Kind, str] = {
    "turned": "turned as their EXIF orientation says",
    "transparent": "partly transparent: transparency is ignored, as in timm and torchvision",
    "bands": "of more than three colour bands: the first three are shown",
    "frames": "of several frames or pages: the first is shown",
    "cmyk": "in CMYK: converted without a colour profile",
}

DEEP = 16
"""Bits of a sample that needs more than 8, where neither file nor user says how many are used."""

DEEPEST = (1 << DEEP) - 1
"""The largest value of such a sample."""

MOVING = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
"""Formats of several frames. (The further frames of a camera's MPO are previews of the first.)"""


UNLABELLED = ""
"""The class name of an image that has none."""


# -- which files are images


def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read: what it can decode on this machine, without documents."""
    Image.init()
    return _decodable(tuple(Image.ID))


@cache
def _decodable(known: tuple[str, ...]) -> tuple[str, ...]:
    there = [name for name in known if name not in NO_IMAGES]
    return tuple(name for name in there if name not in CODECS or features.check(CODECS[name]))


def image_extensions() -> frozenset[str]:
    """Endings, in lower case, of the files that every command reads as images.

    >>> sorted({".jpg", ".jfif", ".png", ".tif", ".pdf", ".txt"} & image_extensions())
    ['.jfif', '.jpg', '.png', '.tif']
    """
    formats = {*image_formats()}
    if "JPEG" in formats:
        formats.add("MPO")  # the JPEG reader opens it
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


class Range(NamedTuple):
    """Bytes of a file: all of an image file, or one member of a tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. The file is opened for each read: a handle shared by forked workers would give wrong bytes."""
        with open(self.path, "rb") as file:  # noqa: PTH123 (an open for every image: Path costs more than the read)
            file.seek(self.offset)
            return file.read(self.size)


# -- images by index


class Unreadable(Exception):  # noqa: N818 (also passed on as a value)
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
        """What the data's fingerprint covers: the bytes of image `index`'s file, or its pixels if it has no file."""

    def decoded(self, index: int, bits: int | None = None) -> Decoded:
        """Image `index` in RGB, with what was met on the way; `bits` as in the function `decoded`.

        Raises:
            Unreadable: it cannot be decoded. (It is never replaced by another image.)
        """
        try:
            return decoded(self.open(index), bits)
        except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
            reason = re.sub(r" <_io\S+ object at \w+>", "", str(error)) or type(error).__name__
            raise self.unreadable(index, reason) from error

    def shown(self, index: int, image: Image.Image, frame: Frame) -> Tensor:
        """Image `index`, decoded, as evaluation shows it: uint8 (3, H, W).

        Raises:
            Unreadable: nothing is left of it at that size.
        """
        try:
            return frame.show(image)
        except ValueError as error:
            raise self.unreadable(index, str(error)) from error

    def unreadable(self, index: int, reason: str) -> Unreadable:
        """The exception that says that image `index` cannot be decoded."""
        return Unreadable(f"{self.where}/{self.names[index]}", reason)


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
    """Images of a dataset of another library or of the user's: `dataset[index][key]` is one.

    It is a PIL image, the path or the bytes of an image file, or Hugging Face's mapping of both.
    """

    dataset: Any
    key: Any = 0

    @classmethod
    def of(cls, where: str, dataset: Any, labels: Sequence[str], key: Any = 0) -> Indexed:
        """The images of `dataset`, named by their index."""
        return cls(where, [str(index) for index in range(len(labels))], labels, dataset, key)

    def open(self, index: int) -> Image.Image:
        """See `Images`."""
        found = self._found(index)
        if not isinstance(found, Image.Image):
            return Image.open(io.BytesIO(found), formats=image_formats())
        return found if getattr(found, "tile", None) else found.copy()  # `decoded` turns an image in its place

    def raw(self, index: int) -> bytes:
        """The file's bytes, or mode, size and pixels."""
        found = self._found(index)
        return found if isinstance(found, bytes) else f"{found.mode} {found.size}".encode() + found.tobytes()

    def _found(self, index: int) -> Image.Image | bytes:
        found = self.dataset[index][self.key]
        if isinstance(found, Mapping):
            found = found["bytes"] or found["path"]
        if isinstance(found, (str, Path)):
            return Path(found).read_bytes()
        if not isinstance(found, (Image.Image, bytes)):
            raise TypeError(f"a {type(found).__name__}, which is no image, path or bytes")
        return found


@dataclass(frozen=True)
class Source:
    """The images of a dataset, its classes not yet numbered."""

    train: Images
    validation: Images | None
    order: tuple[str, ...] | None = None
    """Class names in index order, where the dataset itself numbers them."""
    notes: tuple[str, ...] = ()


def named(corrupt: Sequence[Unreadable]) -> str:
    """How many images are unreadable, which, and why."""
    shown = listed([f"{found.name} ({found.reason})" for found in corrupt])
    return f"{len(corrupt)} unreadable image{'s' if len(corrupt) > 1 else ''}: {shown}"


def corrupted(data: str, corrupt: Sequence[Unreadable]) -> DataError:
    """The error for unreadable images in `--data`."""
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


# -- RGB, upright


class Decoded(NamedTuple):
    """An image, and what was met on the way."""

    image: Image.Image
    """RGB, upright."""
    kinds: tuple[Kind, ...]
    largest: int | None
    """The largest sample, where samples have 16 bits and the file does not say how many of them are in use."""


def decoded(image: Image.Image, bits: int | None = None) -> Decoded:
    """Decode, turn upright and convert to RGB; an animation gives its first frame.

    Transparency is dropped, as timm and torchvision drop it, and colour profiles are not applied. Grey samples of more
    than 8 bits are shifted to 8: from the bits that a TIFF file declares (BitsPerSample), else from `bits`, else from
    16. The largest value of an image is not used: it would make images of one brightness differ. PNG's sBIT is not
    used, since its samples are already scaled to 16 bits; nor TIFF's MaxSampleValue, which is a statistic.

    Args:
        image: as its file was opened, perhaps not yet loaded.
        bits: how many bits of grey samples of more than 8 are in use.

    Raises:
        ValueError: pixels of a kind that has no sensible RGB value, or values above `bits`.

    >>> decoded(Image.fromarray(np.full((1, 1), 0x8000, np.uint16))).image.getpixel((0, 0))
    (128, 128, 128)
    >>> decoded(Image.fromarray(np.full((1, 1), 0x0800, np.uint16)), bits=12).image.getpixel((0, 0))
    (128, 128, 128)
    """
    raw, most = _raw(image)  # before anything is decoded: PIL then forgets how the file has it
    declared = _declared_bits(image, most)
    if image.format == "PNG":
        image.load()  # its EXIF may stand behind the pixels
    kinds = list(of_header(image))
    image.load()  # this also turns a TIFF upright
    with suppress(Exception):  # damaged EXIF data can raise anything, and is ignored
        ImageOps.exif_transpose(image, in_place=True)
    largest = None
    if image.mode.startswith("I"):
        image, found = _grey(image, declared or bits, signed="S" in raw, tiff=image.format == "TIFF")
        largest = found if declared is None else None
    elif declared is None and (";16" in raw or most == DEEPEST):  # PIL has kept the upper 8 bits
        if (bits or DEEP) != DEEP:
            raise ValueError(
                f"16-bit colour, of which PIL reads the upper 8 bits: --bit-depth {bits} is for grey images"
            )
        largest = (int(np.asarray(image.convert("RGB")).max()) + 1 << 8) - 1
    if image.mode == "F":
        raise ValueError("floating-point pixels, of which none is known to be white: convert them to 8 or 16 bits")
    return Decoded(_without_alpha(image, kinds), tuple(kinds), largest)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image when upright; only its header is read."""
    width, height = image.size
    return (width, height) if image.format != "TIFF" and _orientation(image) in {5, 6, 7, 8} else (height, width)


def _orientation(image: Image.Image) -> int:
    """What EXIF says, without decoding pixels; of a PNG not yet loaded, what stands before them."""
    if image.format == "PNG" and getattr(image, "tile", None) and "exif" not in image.info:
        return 1  # PIL would decode all of it, to look behind the pixels
    with suppress(Exception):  # as in `decoded`
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def of_header(image: Image.Image) -> tuple[Kind, ...]:
    """The kinds that the header of an opened image tells."""
    kinds: dict[Kind, bool] = {
        "turned": _orientation(image) in range(2, 9),
        "frames": image.format in MOVING and getattr(image, "is_animated", False),
        "bands": getattr(image, "tag_v2", {}).get(277, 0) > len(image.getbands()),  # SamplesPerPixel
        "cmyk": image.mode == "CMYK",
    }
    return tuple(kind for kind, there in kinds.items() if there)


def needs_decoding(image: Image.Image) -> bool:
    """Whether only its pixels tell what an opened image is: transparent or opaque, of 16 bits or of fewer."""
    raw, most = _raw(image)
    alpha = image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info
    return alpha or image.mode.startswith("I") or ";16" in raw or most == DEEPEST


def _raw(image: Image.Image) -> tuple[str, int | None]:
    """PIL's name of how samples lie in the file, or an empty one; and the maximum that a PGM or PPM file declares."""
    for codec, _, _, given in getattr(image, "tile", ()):
        args = given if isinstance(given, (tuple, list)) else (given,)
        most = args[1] if str(codec).startswith("ppm") and len(args) > 1 else None
        return next((str(arg) for arg in args if isinstance(arg, str)), ""), most
    return "", None


def _declared_bits(image: Image.Image, most: int | None) -> int | None:
    """Bits in use of a sample as PIL gives it, where the file says so."""
    if most not in {None, DEEPEST}:
        return DEEP  # PIL has scaled PGM and PPM by their maximum
    found = getattr(image, "tag_v2", {}).get(258)  # BitsPerSample
    bits = max(found) if isinstance(found, tuple) and found else found
    return bits if isinstance(bits, int) and 8 < bits < DEEP else None


def _grey(image: Image.Image, bits: int | None, *, signed: bool, tiff: bool) -> tuple[Image.Image, int]:
    """Integer samples of more than 8 bits -> 8; and the largest of them."""
    values = np.asarray(image).astype(np.int64)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if bits is None and image.mode == "I" and (signed or tiff or high > DEEPEST):
        width = "signed" if signed else "32-bit"
        raise ValueError(f"{width} integer pixels, of which none is known to be white: --bit-depth says it")
    if low < 0:
        raise ValueError(f"integer pixels below 0 ({low}): convert them to 8 or 16 bits without a sign")
    if high >= 1 << (bits or DEEP):
        raise ValueError(f"a value of {high}, above the {bits or DEEP} bits that are in use (--bit-depth)")
    return Image.fromarray((values >> (bits or DEEP) - 8).astype(np.uint8)), high


def _without_alpha(image: Image.Image, kinds: list[Kind]) -> Image.Image:
    """In RGB; adds to `kinds` where a part was transparent."""
    if "transparency" in image.info and image.mode != "RGBA":
        image = image.convert("RGBA")
    if image.mode in {"RGBa", "La"}:  # multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.mode in {"RGBA", "LA", "PA"} and image.getchannel("A").getextrema()[0] != 255:
        kinds.append("transparent")
    return image.convert("RGB")
