"""Replayable augmentation: a view is a pure function of (data seed, sample index, view index).

Every random number is a hash of what it is used for; no generator is shared. So a view has the same bits in any order,
for any batch size and any number of workers or processes, and after an interruption. The order of a pass and the choice
of samples are such functions, too. Images are uint8 throughout; each network normalises them for itself.

Shapes: B images, C = 3 channels, H x W pixels; n samples. `seed` is the data seed, `index` the place of a sample in its
split, and `view` which view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from factor_transfer.data.frames import Frame, as_pixels
from factor_transfer.util.arguments import AnySize, as_size
from factor_transfer.util.seeds import part_seed, seeded

VERSION = 2
"""Raise it when a pixel changes: fingerprints hold it, so that no cache outlives the function that made it.

2: images are turned as their EXIF orientation says, and values above the bits in use are refused.
"""

Transform = Callable[[Image.Image], Any]
"""A user's own augmentation: from an RGB image to an image or to uint8 pixels (3, H, W)."""


def hashed(seed: int, index: np.ndarray) -> np.ndarray:
    """64 random bits for each index: place `index` of the splitmix64 sequence that begins at `seed` (below 2**64).

    The result is uint64, of the shape of `index`.

    >>> hex(int(hashed(0, np.array([0]))[0]))  # the first number of the published sequence
    '0xe220a8397b1dcdaf'
    """
    z: np.ndarray = np.uint64(seed) + (np.atleast_1d(index).astype(np.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.reshape(np.shape(index))


def permutation(data_seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which pass `epoch` shows `n` samples: int64 (n,), each of 0..n-1 once.

    >>> sorted(permutation(0, epoch=3, n=4).tolist())
    [0, 1, 2, 3]
    """
    return np.argsort(hashed(part_seed(data_seed, "order", epoch), np.arange(n)), kind="stable")


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which samples form a stratified validation set, bool (n,): `share` of each class, rounded, and never all of it.

    `labels` (n,) are the classes of the samples.

    >>> int(held_out(np.array([0] * 10 + [1] * 20), 0.1, seed=0).sum())
    3
    """
    _, ranks, sizes = _ranked(labels, seed)
    chosen: np.ndarray = ranks < np.minimum(np.maximum(np.rint(share * sizes), 1), sizes - 1)
    return chosen


def spaced(length: int, count: int) -> np.ndarray:
    """At most `count` of the places 0 to `length` - 1, evenly spaced, the first and the last among them.

    >>> spaced(10, 4), spaced(2, 4)
    (array([0, 3, 6, 9]), array([0, 1]))
    """
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(np.int64))


def evenly(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which `count` samples are chosen, bool (n,): as many of each class, up to rounding; a class too small gives all.

    `labels` (n,) are the classes of the samples. The samples of a smaller share are among those of a larger one.

    >>> labels = np.array([0] * 10 + [1] * 20 + [2])
    >>> np.bincount(labels[evenly(labels, 9, seed=0)])
    array([4, 4, 1])
    """
    bits, ranks, _ = _ranked(labels, seed)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[np.lexsort((bits, ranks))[:count]] = True  # the first of each class, then the second of each, ...
    return chosen


def _ranked(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hash of each sample, its rank by hash within its class, and how many its class has: (n,) each."""
    bits = hashed(seed, np.arange(len(labels)))
    order = np.lexsort((bits, labels))
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks, sizes = np.empty((2, len(labels)), dtype=np.int64)
    ranks[order], sizes[order] = np.arange(len(labels)) - np.repeat(first, counts), np.repeat(counts, counts)
    return bits, ranks, sizes


def crop_and_flip(
    pixels: Tensor, index: np.ndarray, view: int, seed: int, padding: int, hflip: float, fill: int = 0
) -> Tensor:
    """Pad, crop at random to the old size, flip at random: small images or masks, a whole batch at once.

    Args:
        pixels: uint8 (B, C, H, W), on the CPU; channels-last is fastest. The result is such pixels, channels-last.
        index: of the samples, (B,).
        view: see the top of this file, as for `seed`.
        seed: owns the choice.
        padding: pixels on each side.
        hflip: probability of a horizontal flip.
        fill: value of the padding.

    >>> batch = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    >>> crop_and_flip(batch, np.array([7]), view=0, seed=0, padding=0, hflip=1.0)[0, 0].tolist()
    [[1, 0], [3, 2]]
    """
    images = pixels.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
    batch, height, width, channels = images.shape
    shifts, flips = 2 * padding + 1, _uniform(seed, view, "flip", index) < hflip
    top = (_uniform(seed, view, "top", index) * shifts).astype(np.int64)
    left = (_uniform(seed, view, "left", index) * shifts).astype(np.int64)
    padded = np.full((batch, height + 2 * padding, width + 2 * padding, channels), fill, np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = images
    # Rows are flattened to W*C bytes, so that each crop is H copies of one contiguous run.
    rows = padded.reshape(batch, height + 2 * padding, (width + 2 * padding) * channels)
    windows = sliding_window_view(rows, (height, width * channels), axis=(1, 2))
    crops = windows[np.arange(batch), top, left * channels].reshape(images.shape)
    crops[flips] = crops[flips, :, ::-1]
    return torch.from_numpy(crops).permute(0, 3, 1, 2)  # (B, C, H, W)


def random_resized_crop(
    image: Image.Image,
    frame: Frame,
    scale: Sequence[float],
    hflip: float,
    color_jitter: float,
    seed: int,
    index: int,
    view: int,
) -> Tensor:
    """torchvision's RandomResizedCrop, flip and ColorJitter of a large RGB image: uint8 (3, H, W).

    The aspect of the crop varies as torchvision's does, from 3/4 to 4/3 of the one that is shown undistorted: the
    frame's own; or where evaluation squashes images, the image's. Where it adds borders, they are added here too.

    Args:
        image: RGB.
        frame: size of the result, H x W, and how evaluation fits an image into it.
        scale: smallest and largest share of the area that is kept.
        hflip: probability of a horizontal flip.
        color_jitter: strength, of brightness, contrast and saturation; 0 leaves the colours alone.
        seed: see the top of this file, as for `index` and `view`.
        index: of the sample.
        view: of it.

    >>> photo, frame = Image.new("RGB", (300, 200)), Frame.of((224, 112))
    >>> random_resized_crop(photo, frame, (0.35, 1.0), 0.5, 0.4, seed=0, index=0, view=0).shape
    torch.Size([3, 224, 112])
    """
    return _cropped(image, None, frame, scale, hflip, color_jitter, seed, index, view)[0]


def masked_crop(
    image: Image.Image,
    mask: Image.Image,
    frame: Frame,
    scale: Sequence[float],
    hflip: float,
    color_jitter: float,
    seed: int,
    index: int,
    view: int,
    fill: int,
) -> tuple[Tensor, Tensor]:
    """`random_resized_crop` of an image, and the same crop and flip of its mask: uint8 (3, H, W) and (H, W).

    The mask has the nearest pixel, so that no index is made of two, and `fill` where the image has borders.

    >>> halves = Image.fromarray(np.repeat(np.array([[0, 9]], np.uint8), 40, 0).repeat(40, 1))
    >>> frame, place = Frame.of((100, 100)), {"seed": 0, "index": 0, "view": 3}
    >>> image, mask = masked_crop(halves.convert("RGB"), halves, frame, (0.5, 0.5), 0.5, 0.0, **place, fill=255)
    >>> image.shape, mask.unique().tolist(), bool(((image[0] > 4) == (mask == 9)).float().mean() > 0.97)
    (torch.Size([3, 100, 100]), [0, 9], True)
    """
    shown, flat = _cropped(image, mask, frame, scale, hflip, color_jitter, seed, index, view, fill)
    return shown, flat[0]


def _cropped(
    image: Image.Image,
    mask: Image.Image | None,
    frame: Frame,
    scale: Sequence[float],
    hflip: float,
    color_jitter: float,
    seed: int,
    index: int,
    view: int,
    fill: int = 0,
) -> tuple[Tensor, Tensor]:
    """The crop of an image, and of its mask, or of none: the image's own."""
    flat = image if mask is None else mask.convert("RGB")
    if frame.mode == "border":
        image, flat = frame.bordered(image), frame.for_masks(fill).bordered(flat)
    aspect = image.width / image.height if frame.mode == "squash" else frame.size[1] / frame.size[0]
    with seeded(part_seed(seed, "view", view, "large", index)):
        box = RandomResizedCrop.get_params(image, list(scale), [aspect * 3 / 4, aspect * 4 / 3])
        shown = F.resized_crop(image, *box, size=list(frame.size), interpolation=InterpolationMode.BICUBIC)
        flips = float(torch.rand(())) < hflip
        if flips:
            shown = F.hflip(shown)
        if color_jitter:
            shown = ColorJitter(color_jitter, color_jitter, color_jitter)(shown)
    pixels = as_pixels(shown)
    if mask is None:
        return pixels, pixels
    flat = F.resized_crop(flat, *box, size=list(frame.size), interpolation=InterpolationMode.NEAREST)
    return pixels, as_pixels(F.hflip(flat) if flips else flat)


def own_view(transform: Transform, image: Image.Image, size: AnySize, seed: int, index: int, view: int) -> Tensor:
    """The user's own augmentation of an RGB image, replayed by seeding torch, numpy and `random`: uint8 (3, H, W).

    `size` is H x W, the size that the networks see.

    Raises:
        ValueError: `transform` gives something else.

    >>> noise = lambda image: torch.randint(0, 256, (3, 2, 2), dtype=torch.uint8)
    >>> first, again = (own_view(noise, Image.new("RGB", (2, 2)), 2, seed=0, index=5, view=1) for _ in range(2))
    >>> torch.equal(first, again)
    True
    """
    with seeded(part_seed(seed, "view", view, "own", index)):
        made = transform(image)
    if isinstance(made, Image.Image):
        made = as_pixels(made.convert("RGB"))
    wanted = (3, *as_size(size))
    if not isinstance(made, Tensor) or made.dtype != torch.uint8 or tuple(made.shape) != wanted:
        found = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"it gave {found}, not an image or uint8 pixels of {wanted}")
    return made


def _uniform(seed: int, view: int, which: str, index: np.ndarray) -> np.ndarray:
    """A float64 in [0, 1) for each sample, for the purpose `which`."""
    return (hashed(part_seed(seed, "view", view, which), index) >> 11) * 2.0**-53
