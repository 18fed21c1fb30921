"""An image file's pixels as RGB, and what of the file they leave out.

One function for every path: training, evaluation, the store of decoded images, `predict`. `examples/predict_onnx.py`
repeats it without this package, and a test compares the two.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

Kind = Literal["turned", "transparent", "bands", "frames", "cmyk"]
"""What makes a file's pixels differ from its RGB values as they lie in it."""

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


class Decoded(NamedTuple):
    """An image, and what was met on the way."""

    image: Image.Image
    """RGB, upright."""
    kinds: tuple[Kind, ...]
    largest: int | None
    """The largest sample, where samples have 16 bits and the file does not say how many of them are in use."""


def to_rgb(image: Image.Image, bits: int | None = None) -> Image.Image:
    """The image of `decoded`.

    >>> to_rgb(Image.fromarray(np.full((1, 1), 0x8000, np.uint16))).getpixel((0, 0))
    (128, 128, 128)
    >>> to_rgb(Image.fromarray(np.full((1, 1), 0x0800, np.uint16)), bits=12).getpixel((0, 0))
    (128, 128, 128)
    """
    return decoded(image, bits).image


def decoded(image: Image.Image, bits: int | None = None) -> Decoded:
    """Decode, turn upright and convert to RGB; an animation gives its first frame.

    Transparency is dropped, as timm and torchvision drop it, and colour profiles are not applied. Grey samples of more
    than 8 bits are shifted to 8: from the bits that a TIFF file declares (BitsPerSample), else from `bits`, else from
    16. The largest value of an image is not used: it would make images of one brightness differ. Neither are PNG's
    sBIT, whose samples are already scaled to 16 bits, and TIFF's MaxSampleValue, which is a statistic.

    Args:
        image: as its file was opened, perhaps not yet loaded.
        bits: how many bits of grey samples of more than 8 are in use.

    Raises:
        ValueError: pixels of a kind that has no sensible RGB value, or values above `bits`.
    """
    raw, most = _raw(image)  # before anything is decoded: PIL then forgets how the file has it
    declared = _declared_bits(image, most)
    if image.format == "PNG":
        image.load()  # its EXIF may stand behind the pixels
    kinds = list(of_header(image))
    upright(image)
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


def upright(image: Image.Image) -> None:
    """Load an image, and turn it in its place as its EXIF orientation says; damaged EXIF data says nothing."""
    image.load()  # TIFF is turned by this
    with suppress(Exception):  # whatever parsing raises on damaged metadata
        ImageOps.exif_transpose(image, in_place=True)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image when upright; only its header is read."""
    width, height = image.size
    return (width, height) if image.format != "TIFF" and _orientation(image) in {5, 6, 7, 8} else (height, width)


def _orientation(image: Image.Image) -> int:
    """What EXIF says, without decoding pixels; of a PNG not yet loaded, what stands before them."""
    if image.format == "PNG" and getattr(image, "tile", None) and "exif" not in image.info:
        return 1  # PIL would decode all of it, to look behind the pixels
    with suppress(Exception):  # as in `upright`
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def of_header(image: Image.Image) -> tuple[Kind, ...]:
    """What the header of an opened image says."""
    kinds: list[Kind] = []
    if _orientation(image) in range(2, 9):
        kinds.append("turned")
    if image.format in MOVING and getattr(image, "is_animated", False):
        kinds.append("frames")
    if getattr(image, "tag_v2", {}).get(277, 0) > len(image.getbands()):  # SamplesPerPixel
        kinds.append("bands")
    if image.mode == "CMYK":
        kinds.append("cmyk")
    return tuple(kinds)


def needs_decoding(image: Image.Image) -> bool:
    """Whether only its pixels tell what an opened image is: transparent or opaque, of 16 bits or of fewer."""
    raw, most = _raw(image)
    alpha = image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info
    return alpha or image.mode.startswith("I") or ";16" in raw or most == DEEPEST


def _raw(image: Image.Image) -> tuple[str, int | None]:
    """How samples lie in the file, in PIL's words, or an empty one; and the maximum that a PGM or PPM file declares."""
    for codec, _, _, given in getattr(image, "tile", ()):
        args = given if isinstance(given, (tuple, list)) else (given,)
        most = args[1] if str(codec).startswith("ppm") and len(args) > 1 else None
        return next((str(arg) for arg in args if isinstance(arg, str)), ""), most
    return "", None


def _declared_bits(image: Image.Image, most: int | None) -> int | None:
    """Bits of a sample in use as PIL gives it, where the file says so."""
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
    grey = Image.fromarray((values >> (bits or DEEP) - 8).astype(np.uint8))
    return grey, high


def _without_alpha(image: Image.Image, kinds: list[Kind]) -> Image.Image:
    """In RGB; adds to `kinds` where a part was transparent."""
    if "transparency" in image.info and image.mode != "RGBA":
        image = image.convert("RGBA")
    if image.mode in {"RGBa", "La"}:  # multiplied by alpha
        image = image.convert(image.mode.upper())
    if image.mode in {"RGBA", "LA", "PA"} and image.getchannel("A").getextrema()[0] != 255:
        kinds.append("transparent")
    return image.convert("RGB")
