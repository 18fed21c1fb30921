"""Feature maps as small pictures: one tile a channel, zero white, positive orange, negative blue.

Shapes: C channels, H x W the map.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

POSITIVE, NEGATIVE = (194, 65, 12), (29, 78, 216)
"""Colours of the largest and the smallest value."""

SIDE = 96
"""Photographs are shown at most this large, in pixels."""


def coloured(values: np.ndarray, largest: float) -> np.ndarray:
    """Numbers as colours: (H, W) -> uint8 (H, W, 3); `largest` is the magnitude of full colour.

    >>> coloured(np.array([[0.0, 2.0]]), largest=2.0).tolist()
    [[[255, 255, 255], [194, 65, 12]]]
    """
    strength = np.clip(np.abs(values) / max(largest, 1e-12), 0, 1)[..., None]
    ends = np.where(values[..., None] >= 0, POSITIVE, NEGATIVE)
    colours: np.ndarray = np.rint(255 + strength * (ends - 255.0)).astype(np.uint8)
    return colours


def tiles(maps: Tensor, channels: Sequence[int], largest: float) -> np.ndarray:
    """The chosen channels of (C, H, W) side by side, a grey line between them: uint8 (H, n x (W + 1) - 1, 3)."""
    shown = [coloured(maps[channel].float().cpu().numpy(), largest) for channel in channels]
    line = np.full((maps.shape[1], 1, 3), 128, np.uint8)
    parts = [part for tile in shown for part in (tile, line)]
    return np.concatenate(parts[:-1], axis=1)


def strongest(maps: Tensor, count: int) -> list[int]:
    """The channels of (C, H, W) with the largest mean magnitude, strongest first."""
    order = maps.abs().mean(dim=(1, 2)).argsort(descending=True)
    return [int(channel) for channel in order[:count]]


def png(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a data URI, losslessly: for maps, which the page enlarges."""
    return _uri(Image.fromarray(pixels), "PNG")


def photograph(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a data URI: lossless where it is small, else a JPEG of at most `SIDE` pixels."""
    image = Image.fromarray(pixels)
    if max(image.size) <= SIDE:
        return _uri(image, "PNG")
    image.thumbnail((SIDE, SIDE))
    return _uri(image, "JPEG")


def _uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
