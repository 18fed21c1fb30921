"""What the report shows of segmentation: classes by their overlap, and pictures of what each network makes of an image.

Shapes: B images of H x W pixels, N classes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from factor_transfer.data.dataset import Dataset
from factor_transfer.data.masks import IGNORED
from factor_transfer.data.views import spaced
from factor_transfer.report.figures import png
from factor_transfer.tasks.base import Task
from factor_transfer.tasks.segmentation import fitted

SHOWN, SIDE = 6, 200
"""Images that are shown, and the longer side of each picture, in pixels."""

GOLDEN = (5**0.5 - 1) / 2
"""Steps of this share of the colour circle stay far from each other."""

DARK = 40
"""Grey of pixels that count nowhere."""


def colours(classes: int) -> np.ndarray:
    """A colour for each class, and last the one of pixels that count nowhere: uint8 (N + 1, 3).

    >>> colours(3).shape
    (4, 3)
    """
    drawn = [colorsys.hsv_to_rgb(at * GOLDEN % 1, (0.85, 0.55)[at % 2], (0.95, 0.7)[at // 2 % 2])
             for at in range(classes)]  # fmt: skip
    return np.array([[round(255 * part) for part in each] for each in drawn] + [[DARK] * 3], np.uint8)


def coloured(mask: np.ndarray, classes: int) -> np.ndarray:
    """A mask (H, W) as a picture, uint8 (H, W, 3)."""
    picture: np.ndarray = colours(classes)[np.where(mask == IGNORED, classes, mask)]
    return picture


def hexadecimal(classes: int) -> list[str]:
    """The colours of the classes as style sheets have them.

    >>> hexadecimal(1)
    ['#f22424']
    """
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours(classes)[:-1].tolist()]


class Overlaps:
    """Collects, over the validation images, what the report shows.

    Args:
        task: a dense one.
        images: the run's.
        roles: networks that answer.
    """

    def __init__(self, task: Task, images: Dataset, roles: Sequence[str]) -> None:
        self.task, self.images, self.roles = task, images, tuple(roles)
        self.sums: dict[str, dict[str, Tensor]] = {role: {} for role in roles}
        self.pixels = np.zeros(len(images.classes), np.int64)
        self.differing: list[float] = []
        """The share of pixels of which teacher and student say another thing, for each image."""

    def add(self, logits: Mapping[str, Tensor], masks: Tensor) -> None:
        """The logits (B, N, h, w) of each network for images with masks (B, H, W)."""
        kept = masks[masks != IGNORED]
        self.pixels += torch.bincount(kept, minlength=len(self.pixels)).numpy()
        for role, totals in self.sums.items():
            for name, value in self.task.sums(logits[role], masks).items():
                totals[name] = totals[name] + value if name in totals else value
        if {"teacher", "student"} <= {*self.roles}:
            one, other = (fitted(logits[role], masks).argmax(1) for role in ("teacher", "student"))
            self.differing += (one != other).flatten(1).float().mean(1).tolist()

    def found(self) -> dict[str, Any]:
        """For `findings.json`."""
        made: dict[str, Any] = {
            "count": self.pixels.tolist(),
            "overlap": {role: self.task.by_class(totals) for role, totals in self.sums.items()},
        }
        if self.differing:
            made["differing"] = 100 * float(np.mean(self.differing))
        return made

    def chosen(self) -> np.ndarray:
        """Images from the one on which teacher and student differ least to the one on which they differ most."""
        differing = self.differing or [0.0] * len(self.images.validation)
        chosen: np.ndarray = np.argsort(differing, kind="stable")[spaced(len(differing), SHOWN)]
        return chosen

    def pictures(self, logits: Mapping[str, Tensor], chosen: np.ndarray) -> list[dict[str, Any]]:
        """For each chosen image the photograph, its mask and what each network says, as data URIs."""
        (batch,) = self.images.validation.batches([chosen], view=None)
        masks = self.task.targets(batch)
        said = {role: fitted(logits[role], masks).argmax(1).numpy() for role in self.roles}
        rows = []
        for place, index in enumerate(chosen.tolist()):
            shown = {"image": batch.image[place].permute(1, 2, 0).numpy()}
            shown |= {"mask": coloured(masks[place].numpy(), len(self.pixels))}
            shown |= {role: coloured(each[place], len(self.pixels)) for role, each in said.items()}
            row: dict[str, Any] = {"index": index, "pictures": {name: _small(each) for name, each in shown.items()}}
            rows.append(row | ({"differing": 100 * self.differing[index]} if self.differing else {}))
        return rows


def _small(pixels: np.ndarray) -> str:
    """A picture (H, W, 3) of at most `SIDE` pixels, as a data URI; the nearest pixel keeps a mask's colours."""
    height, width = pixels.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return png(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)))
