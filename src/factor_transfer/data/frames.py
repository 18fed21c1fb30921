"""How a whole image becomes pixels of the size that the networks see: timm's crop modes, and what each of them loses.

Shapes: H x W, height and width of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import center_crop_or_pad
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor

from factor_transfer.util.arguments import Size, as_size, brief, written

SMALL = 96
"""Up to this side images are resized whole, padded and cropped; above it, cropped at random and resized."""

CROP_PCT = 0.875
"""timm's convention for evaluating large images: the centre's share of the resized side."""

FILL = (0.485, 0.456, 0.406)
"""Colour of the borders of `border`, as shares of white: timm's default, the mean of ImageNet."""

CropMode = Literal["squash", "border", "center"]


@dataclass(frozen=True)
class Frame:
    """A size, and how images of other sizes and aspects are brought to it.

    >>> Frame.of(32), Frame.of((256, 128), "border")
    (Frame(size=(32, 32), mode='squash', pct=1.0), Frame(size=(256, 128), mode='border', pct=1.0))
    """

    size: Size
    mode: CropMode
    """squash: both sides are resized. border: the longer one fits, the rest is filled. center: the shorter one fits,
    and the centre is cut out."""
    pct: float
    """Share of the resized side that is kept: the rest is cut off around it."""
    interpolation: str = field(repr=False)
    """PIL's, by timm's word."""
    fill: tuple[int, ...] = field(repr=False)
    """RGB of borders."""

    @classmethod
    def of(cls, size: int | Sequence[int], mode: CropMode | None = None, pct: float | None = None) -> Frame:
        """With what is usual for its size: squash up to 96 pixels, timm's center above."""
        sides = as_size(size)
        mode = mode or ("squash" if max(sides) <= SMALL else "center")
        usual = CROP_PCT if mode == "center" and max(sides) > SMALL else 1.0
        return cls(
            sides,
            mode,
            usual if pct is None else pct,
            interpolation="bilinear" if max(sides) <= SMALL else "bicubic",
            fill=tuple(round(255 * share) for share in FILL),
        )

    @property
    def small(self) -> bool:
        """Whether images are decoded once, padded and cropped."""
        return max(self.size) <= SMALL

    def identity(self) -> dict[str, Any]:
        """What fingerprints hold of a frame of `of`: the rest follows from it, and from `views.VERSION`."""
        return {"size": self.size, "mode": self.mode, "pct": self.pct}

    def described(self) -> dict[str, Any]:
        """As an export's metadata holds it: timm's words, and the borders' colour."""
        return {
            "interpolation": self.interpolation,
            "crop_pct": self.pct,
            "crop_mode": self.mode,
            "fill": list(self.fill),
        }

    def in_words(self) -> str:
        """What is done to an image, for a model card.

        >>> Frame.of(32).in_words(), Frame.of(224).in_words()
        ('resized whole (bilinear)', 'the shorter side resized to 256 (bicubic) and the centre cut out')
        """
        height, width = (math.floor(side / self.pct) for side in self.size)
        sides = str(height) if height == width else f"fit {written((height, width))}"
        how = f"({self.interpolation})"
        if self.mode == "center":
            return f"the shorter side resized to {sides} {how} and the centre cut out"
        cut = "" if self.pct == 1 else f" to {written((height, width))} and the centre cut out"
        if self.mode == "squash":
            return f"resized whole {how}{cut}"
        return f"the longer side resized to {sides} {how}, with borders of the colour {list(self.fill)}{cut}"

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> Frame:
        """From the metadata of an export. What it does not say is as usual for its size: timm folders have no `fill`.

        >>> Frame.read({"img_size": 32, "resize": {"interpolation": "bicubic"}}).interpolation
        'bicubic'
        """
        resize = metadata.get("resize", {})
        usual = cls.of(brief(metadata["img_size"]), resize.get("crop_mode"), resize.get("crop_pct"))
        fill = tuple(resize.get("fill", usual.fill))
        return replace(usual, interpolation=resize.get("interpolation", usual.interpolation), fill=fill)

    def show(self, image: Image.Image) -> Tensor:
        """An RGB image as evaluation shows it: uint8 (3, H, W), channels-last. It is timm's own evaluation transform.

        Raises:
            ValueError: it is so long that its shorter side would have no pixel.

        >>> Frame.of(224).show(Image.new("RGB", (300, 200))).shape
        torch.Size([3, 224, 224])
        """
        if self.pct == 1 and image.size == self.size[::-1]:
            return as_pixels(image)
        try:
            return as_pixels(_transform(self)(image))
        except ValueError as error:
            given = f"{image.height}x{image.width} pixels"
            raise ValueError(f"{given}, of which nothing would be left at {written(self.size)}: {error}") from error

    def for_masks(self, fill: int) -> Frame:
        """The same geometry for class indices: the nearest pixel, and borders of the value `fill`."""
        return replace(self, interpolation="nearest", fill=(fill,) * 3)

    def bordered(self, image: Image.Image) -> Image.Image:
        """An image with borders that give it the frame's aspect.

        >>> Frame.of((10, 20), "border").bordered(Image.new("RGB", (30, 30))).size
        (60, 30)
        """
        (height, width), (rows, columns) = self.size, (image.height, image.width)
        sides = max(rows, round(columns * height / width)), max(columns, round(rows * width / height))
        return cast(Image.Image, center_crop_or_pad(image, sides, fill=self.fill))

    def stretch(self, size: Size) -> float:
        """How far the aspect of an image, (height, width), is from the frame's: 1 or more.

        >>> Frame.of((32, 64)).stretch((128, 128))
        2.0
        """
        ratio = (size[1] / size[0]) / (self.size[1] / self.size[0])
        return max(ratio, 1 / ratio)


def as_pixels(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W), channels-last."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)


@lru_cache(maxsize=64)
def _transform(frame: Frame) -> Callable[[Image.Image], Image.Image]:
    steps = transforms_imagenet_eval(
        frame.size,
        crop_pct=frame.pct,
        crop_mode=frame.mode,
        interpolation=frame.interpolation,
        mean=tuple(value / 255 for value in frame.fill),  # timm fills borders with it
        use_prefetcher=True,
    ).transforms[:-1]  # but for the last, which makes a tensor

    def shown(image: Image.Image) -> Image.Image:
        for step in steps:
            image = step(image)
        return image

    return cast(Callable[[Image.Image], Image.Image], shown)
