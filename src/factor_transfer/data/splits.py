"""Images in a fixed order, any of which can be shown at any time.

Any chunk of sample indices becomes a batch, augmented as `views` says. So order, batch size, workers and processes are
the caller's choice and change no pixel.

Shapes: B images of H x W pixels, N images in all.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from factor_transfer.config import DataConfig
from factor_transfer.data.frames import Frame
from factor_transfer.data.images import Images, Unreadable, corrupted
from factor_transfer.data.masks import IGNORED, Masked
from factor_transfer.data.views import (
    Transform,
    crop_and_flip,
    masked_crop,
    own_view,
    permutation,
    random_resized_crop,
    spaced,
)
from factor_transfer.util.errors import DataError
from factor_transfer.util.machine import cores

NO_LABEL = -1
"""The label of an image that has none, beside others that have one."""

View = int | tuple[int, int]
"""Which augmented view: of all images; or of those that have a label, and of those that have none."""


class Batch(NamedTuple):
    """Images with their labels."""

    image: Tensor  # (B, 3, H, W) uint8, channels-last
    label: Tensor  # (B,) int64; `NO_LABEL` of an image without one
    index: Tensor  # type: ignore[assignment]  # (B,) int64, sample index within its split; hides tuple.index
    mask: Tensor | None = None  # (B, H, W) uint8, the class of each pixel, or `masks.IGNORED`; None without masks


@dataclass(frozen=True)
class Shown:
    """How a dataset's images are shown: whatever decides a pixel besides the file."""

    frame: Frame
    padding: int
    hflip: float
    scale: tuple[float, float]
    color_jitter: float
    seed: int
    bits: int | None = None
    """How many bits of grey samples of more than 8 are in use; see `images.decoded`."""


class Split(ABC):
    """Images in a fixed order, any of which can be shown at any time.

    >>> from factor_transfer.data.dataset import open_data
    >>> split = open_data(DataConfig(data="digits"), default_size=lambda: 224).train
    >>> [batch.image.shape for batch in split.batches([np.array([5, 0]), np.array([7])], view=0)]
    [torch.Size([2, 3, 8, 8]), torch.Size([1, 3, 8, 8])]
    """

    def __init__(self, rows: np.ndarray, labels: np.ndarray, shown: Shown) -> None:
        self.labels = labels  # (n,) int64
        self._rows = rows  # where sample i lies in what was read: (n,) int64
        self._shown = shown

    def __len__(self) -> int:
        return len(self.labels)

    known = 1.0
    """Share of labelled images in a pass."""

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The sample indices of pass `epoch`, in order: int64 (n,)."""
        return permutation(seed, epoch, len(self))

    def view(self, epoch: int, kept: int) -> View:
        """What pass `epoch` shows of its images: always a new view, or `kept` of them in turn."""
        return epoch % kept if kept else epoch

    def fresh(self, index: np.ndarray, epoch: int, kept: int) -> int:
        """How many of the samples `index` (B,) of pass `epoch` show a view that no pass before it has shown."""
        return 0 if 0 < kept <= epoch else len(index)

    @abstractmethod
    def batches(self, chunks: Iterable[np.ndarray], view: View | None) -> Iterator[Batch]:
        """One batch for each chunk of sample indices, in order.

        Args:
            chunks: arrays of indices into this split.
            view: which augmented view; None shows the images as evaluation does.

        Raises:
            DataError: an image cannot be read; the message names it.
        """

    def _batch(
        self, images: np.ndarray, chunk: np.ndarray, view: View | None, masks: np.ndarray | None = None
    ) -> Batch:
        """A batch of `images`, uint8 (B, H, W, 3), and `masks` (B, H, W), as small ones are cropped in `view`."""
        image, shown = torch.from_numpy(images).permute(0, 3, 1, 2), self._shown  # (B, 3, H, W)
        mask = None if masks is None else torch.from_numpy(masks)
        if isinstance(view, tuple):
            labelled = self.labels[chunk] != NO_LABEL
            for rows, each in zip((labelled, ~labelled), view, strict=True):
                image[rows] = crop_and_flip(image[rows], chunk[rows], each, shown.seed, shown.padding, shown.hflip)
        elif view is not None:
            how = chunk, view, shown.seed, shown.padding, shown.hflip
            image = crop_and_flip(image, *how)
            mask = None if mask is None else crop_and_flip(mask[:, None], *how, fill=IGNORED)[:, 0]
        return Batch(image, torch.from_numpy(self.labels[chunk]), torch.from_numpy(chunk), mask)

    def _view_of(self, index: int, view: View | None) -> int | None:
        """Which view of one sample."""
        return view[int(self.labels[index] == NO_LABEL)] if isinstance(view, tuple) else view


class Rows(Protocol):
    """What gives a new array of the rows that it is asked for, as an array does."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


class PixelSplit(Split):
    """Small images, decoded once into `pixels`, uint8 (N, H, W, 3)."""

    def __init__(self, pixels: Rows, rows: np.ndarray, labels: np.ndarray, shown: Shown) -> None:
        super().__init__(rows, labels, shown)
        self._pixels = pixels

    def batches(self, chunks: Iterable[np.ndarray], view: View | None) -> Iterator[Batch]:
        """See `Split`."""
        for each in chunks:
            chunk = np.array(each, dtype=np.int64)
            yield self._batch(self._pixels[self._rows[chunk]], chunk, view)


class FileSplit(Split):
    """Images that are decoded whenever they are shown, by worker processes."""

    def __init__(
        self,
        images: Images,
        rows: np.ndarray,
        labels: np.ndarray,
        shown: Shown,
        config: DataConfig,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(rows, labels, shown)
        self._images, self._data, self._transform = images, config.data, transform
        self._workers = cores() if config.workers is None else config.workers

    def batches(self, chunks: Iterable[np.ndarray], view: View | None) -> Iterator[Batch]:
        """See `Split`."""
        wanted = [np.array(chunk, dtype=np.int64) for chunk in chunks]
        loader = DataLoader(
            _Chunks(self, view),
            batch_size=None,
            sampler=wanted,
            num_workers=min(self._workers, len(wanted)),
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
        try:
            for found in loader:
                # The exception comes as a value: raised in a worker it would reach the user as a traceback.
                if isinstance(found, Unreadable):
                    raise corrupted(self._data, [found])
                yield found
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"--workers {self._workers}",
                found="a process that reads images was killed, most often because memory ran out",
                hint="give fewer --workers, or a smaller --batch-size; the same command continues",
            ) from error

    def show(self, chunk: np.ndarray, view: View | None) -> Batch:
        """The batch of one chunk, in this process.

        Raises:
            Unreadable: an image cannot be decoded.
        """
        pixels = np.empty((len(chunk), *self._shown.frame.size, 3), np.uint8)
        masks = np.empty(pixels.shape[:3], np.uint8) if isinstance(self._images, Masked) else None
        for place, index in enumerate(chunk.tolist()):
            row, own = self._rows[index], self._view_of(index, view)
            if masks is None:
                image = self._pixel(row, index, own)
            else:
                image, masks[place] = self._with_mask(row, index, own)
            pixels[place] = image.permute(1, 2, 0).numpy()
        whole = self._transform is None and self._shown.frame.small
        return self._batch(pixels, chunk, view if whole else None, masks)

    def _with_mask(self, row: int, index: int, view: int | None) -> tuple[Tensor, Tensor]:
        """Image `index` as `_pixel` gives it, and its mask (H, W), which moves with it."""
        images, shown, frame = self._images, self._shown, self._shown.frame
        assert isinstance(images, Masked)
        image, mask = images.decoded(row, shown.bits).image, images.mask(row)
        if view is None or frame.small:
            return images.shown(row, image, frame), frame.for_masks(IGNORED).show(mask.convert("RGB"))[0]
        how = shown.scale, shown.hflip, shown.color_jitter, shown.seed
        return masked_crop(image, mask, frame, *how, index, view, IGNORED)

    def _pixel(self, row: int, index: int, view: int | None) -> Tensor:
        """Image `index`, uint8 (3, H, W); small ones are cropped later, as a batch."""
        shown, frame, image = self._shown, self._shown.frame, self._images.decoded(row, self._shown.bits).image
        if view is not None and self._transform is not None:
            try:
                return own_view(self._transform, image, frame.size, shown.seed, index, view)
            except Exception as error:  # code of the user's
                raise self._images.unreadable(row, f"--transform: {error or type(error).__name__}") from error
        if view is None or frame.small:
            return self._images.shown(row, image, frame)
        return random_resized_crop(image, frame, shown.scale, shown.hflip, shown.color_jitter, shown.seed, index, view)


class Sample(Split):
    """At most `count` images of a split, evenly spread over it."""

    def __init__(self, split: Split, count: int) -> None:
        self._split = split
        self._places = spaced(len(split), count)
        self.labels = split.labels[self._places]

    def batches(self, chunks: Iterable[np.ndarray], view: View | None) -> Iterator[Batch]:
        """See `Split`."""
        return self._split.batches([self._places[chunk] for chunk in chunks], view)

    def whole(self) -> Batch:
        """All of it, as evaluation shows it."""
        (batch,) = self.batches([np.arange(len(self))], view=None)
        return batch


@dataclass(frozen=True)
class _Chunks(torch.utils.data.Dataset["Batch | Unreadable"]):
    """What the loader's processes hold: a chunk of indices is one item."""

    split: FileSplit
    view: View | None

    def __getitem__(self, chunk: np.ndarray) -> Batch | Unreadable:
        try:
            return self.split.show(chunk, self.view)
        except Unreadable as error:
            return error


def _begin_worker(_: int) -> None:
    """The main process decides what a signal means; its handlers must not run in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
