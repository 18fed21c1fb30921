"""One indexed source of images: our own splits and class numbers, decoded once where they are small.

A split is random access: any chunk of sample indices becomes a batch, augmented as `views` says. So order, batch size,
workers and processes are the caller's choice and change no pixel.

Shapes: B images, H = W = S pixels, N images in all.
"""

from __future__ import annotations

import hashlib
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from factor_transfer.config import DataConfig
from factor_transfer.errors import DataError, listed
from factor_transfer.files import cache_folder, fingerprint
from factor_transfer.images import Images, Unreadable, natural
from factor_transfer.pixels import Pixels, cores, decode_once, unreadable
from factor_transfer.seeds import part_seed
from factor_transfer.sources import WRITTEN, number_classes, open_source
from factor_transfer.views import SMALL, VERSION, center, crop_and_flip, held_out, random_resized_crop

SIZE_SAMPLE = 256
"""Images whose headers are read to find their size."""


class Batch(NamedTuple):
    """Images with their labels."""

    image: Tensor  # (B, 3, S, S) uint8, channels-last
    label: Tensor  # (B,) int64
    index: Tensor  # type: ignore[assignment]  # (B,) int64, sample index within its split; hides tuple.index


@dataclass(frozen=True)
class Shown:
    """How a dataset's images are shown: whatever decides a pixel besides the file."""

    size: int
    padding: int
    hflip: float
    scale: tuple[float, float]
    color_jitter: float
    seed: int


class Split(ABC):
    """Images in a fixed order, any of which can be shown at any time.

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

    @abstractmethod
    def batches(self, chunks: Iterable[np.ndarray], view: int | None) -> Iterator[Batch]:
        """One batch for each chunk of sample indices, in order.

        Args:
            chunks: arrays of indices into this split.
            view: which augmented view; None shows the images as evaluation does.

        Raises:
            DataError: an image cannot be read; the message names it.
        """

    def _batch(self, images: np.ndarray, chunk: np.ndarray) -> Batch:
        """A batch of `images`, uint8 (B, S, S, 3)."""
        image = torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, 3, S, S)
        return Batch(image, torch.from_numpy(self.labels[chunk]), torch.from_numpy(chunk))

    def _crop(self, batch: Batch, chunk: np.ndarray, view: int) -> Batch:
        shown = self._shown
        image = crop_and_flip(batch.image, chunk, view, shown.seed, shown.padding, shown.hflip)
        return batch._replace(image=image)


class PixelSplit(Split):
    """Small images, decoded once into `pixels`, uint8 (N, S, S, 3)."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, labels: np.ndarray, shown: Shown) -> None:
        super().__init__(rows, labels, shown)
        self._pixels = pixels

    def batches(self, chunks: Iterable[np.ndarray], view: int | None) -> Iterator[Batch]:
        """See `Split`."""
        for each in chunks:
            chunk = np.array(each, dtype=np.int64)
            batch = self._batch(self._pixels[self._rows[chunk]], chunk)
            yield batch if view is None else self._crop(batch, chunk, view)


class FileSplit(Split):
    """Images that are decoded whenever they are shown, by worker processes."""

    def __init__(self, images: Images, rows: np.ndarray, labels: np.ndarray, shown: Shown, config: DataConfig) -> None:
        super().__init__(rows, labels, shown)
        self._images, self._data = images, config.data
        self._workers = cores() if config.workers is None else config.workers

    def batches(self, chunks: Iterable[np.ndarray], view: int | None) -> Iterator[Batch]:
        """See `Split`."""
        wanted = [np.array(chunk, dtype=np.int64) for chunk in chunks]
        loader = DataLoader(
            _Chunks(self, view),
            batch_size=None,
            sampler=wanted,
            num_workers=min(self._workers, len(wanted)),
            collate_fn=_unchanged,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
        try:
            for found in loader:
                # A finding comes as a value: raised in a worker it would reach the user as a traceback.
                if isinstance(found, Unreadable):
                    raise _corrupt(self._data, [found])
                yield found
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"--workers {self._workers}",
                found="a process that reads images was killed, most often because memory ran out",
                hint="give fewer --workers, or a smaller --batch-size; the same command continues",
            ) from error

    def show(self, chunk: np.ndarray, view: int | None) -> Batch:
        """The batch of one chunk, in this process.

        Raises:
            Unreadable: an image cannot be decoded.
        """
        shown = self._shown
        pixels = np.empty((len(chunk), shown.size, shown.size, 3), np.uint8)
        for place, index in enumerate(chunk.tolist()):
            image = self._images.rgb(self._rows[index])
            if view is None or shown.size <= SMALL:
                pixel = center(image, shown.size)
            else:
                pixel = random_resized_crop(
                    image, shown.size, shown.scale, shown.hflip, shown.color_jitter, shown.seed, index, view
                )
            pixels[place] = pixel.permute(1, 2, 0).numpy()
        batch = self._batch(pixels, chunk)
        return self._crop(batch, chunk, view) if view is not None and shown.size <= SMALL else batch


@dataclass(frozen=True)
class _Chunks(torch.utils.data.Dataset["Batch | Unreadable"]):
    """What the loader's processes hold: a chunk of indices is one item."""

    split: FileSplit
    view: int | None

    def __getitem__(self, chunk: np.ndarray) -> Batch | Unreadable:
        try:
            return self.split.show(chunk, self.view)
        except Unreadable as error:
            return error


@dataclass(frozen=True)
class Dataset:
    """Training and validation images with one numbering of classes."""

    name: str
    train: Split
    validation: Split
    classes: tuple[str, ...]
    """Class names in index order."""
    img_size: int
    notes: tuple[str, ...]
    """What the user should know about how the data was understood."""
    held_out: bool
    """The validation images are a share of the training set."""
    fingerprint: str
    """Changes with any image, label, class order, split or augmentation."""


def open_data(config: DataConfig, default_size: Callable[[], int]) -> Dataset:
    """Find, check, number and split the images that `config` names; small ones are decoded here.

    Args:
        config: `--data` and its companions.
        default_size: the side to use for images above 96 pixels without `--img-size`; called only for those.

    Raises:
        DataError: images or classes are missing, unreadable or contradictory.

    >>> found = open_data(DataConfig(data="digits"), default_size=lambda: 224)
    >>> len(found.train), len(found.validation), found.classes[:3], found.img_size
    (1258, 539, ('0', '1', '2'), 8)
    """
    source = open_source(config)
    notes = list(source.notes)
    classes = number_classes(source, config, notes)
    size = config.img_size or _own_size(source.train) or default_size()
    shown = Shown(
        size=size,
        padding=size // 8 if config.crop_padding is None else config.crop_padding,
        hflip=(0.0 if config.data.lower() in WRITTEN else 0.5) if config.hflip is None else config.hflip,
        scale=(config.scale[0], config.scale[1]),
        color_jitter=config.color_jitter,
        seed=config.data_seed,
    )
    if shown.padding >= size:
        raise DataError(f"--crop-padding {shown.padding}", found=f"images of {size}x{size}", valid=f"below {size}")
    parts = [source.train] if source.validation is None else [source.train, source.validation]
    loaded = _load(parts, classes, shown, config, notes)
    digest = fingerprint(
        {
            "views": VERSION,
            "shown": asdict(shown),
            "classes": classes,
            "share": config.validation_share if source.validation is None else None,
            "images": [part.digest() for part in loaded],
        }
    )
    train = loaded[0]
    if source.validation is None:
        chosen = held_out(train.labels, config.validation_share, part_seed(config.data_seed, "split"))
        notes.append(
            f"no validation set: {chosen.sum():,} of {len(chosen):,} training images are held out "
            f"({config.validation_share:.0%} of each class, by --data-seed {config.data_seed})"
        )
        if not chosen.any():
            raise DataError(
                f"--data {config.data}",
                found="one training image in each class, and no validation set",
                valid="two images or more in a class",
            )
        splits = train.split(shown, config, ~chosen), train.split(shown, config, chosen)
    else:
        splits = train.split(shown, config), loaded[1].split(shown, config)
    return Dataset(config.data, *splits, classes, size, tuple(notes), source.validation is None, digest)


# -- pixels


@dataclass(frozen=True)
class _Loaded:
    """The readable images of one part of a source."""

    images: Images
    rows: np.ndarray  # indices of the readable ones
    labels: np.ndarray  # their classes
    pixels: Pixels | None  # of all; None: decoded when shown

    def digest(self) -> str:
        """Covers pixels where they are known, else names and sizes of files; and labels."""
        found = hashlib.sha256(self.labels.tobytes() + self.rows.tobytes())
        if self.pixels is not None:
            found.update(self.pixels.digest.encode())
        else:
            for row in self.rows:
                found.update(f"{self.images.names[row]}\0{self.images.sizes[row]}\n".encode())
        return found.hexdigest()

    def split(self, shown: Shown, config: DataConfig, chosen: np.ndarray | slice = slice(None)) -> Split:
        """The chosen of the readable images."""
        rows, labels = self.rows[chosen], self.labels[chosen]
        if self.pixels is not None:
            return PixelSplit(self.pixels.array, rows, labels, shown)
        return FileSplit(self.images, rows, labels, shown, config)


def _load(
    parts: Sequence[Images], classes: tuple[str, ...], shown: Shown, config: DataConfig, notes: list[str]
) -> list[_Loaded]:
    """Decode small images; of large ones only make sure that they are readable, and only for `--skip-corrupt`."""
    bytes_needed = sum(map(len, parts)) * shown.size**2 * 3
    store = shown.size <= SMALL and bytes_needed <= config.pixel_cache_gb * 1e9
    number = {name: index for index, name in enumerate(classes)}
    loaded: list[_Loaded] = []
    corrupt: list[Unreadable] = []
    for images in parts:
        pixels = decode_once(images, shown.size, cache_folder(config.cache_dir) / "pixels") if store else None
        bad = pixels.unreadable if pixels else unreadable(images) if config.skip_corrupt else {}
        rows = np.array([row for row in range(len(images)) if row not in bad], dtype=np.int64)
        labels = np.array([number[images.labels[row]] for row in rows], dtype=np.int64)
        loaded.append(_Loaded(images, rows, labels, pixels))
        corrupt += bad.values()
    if corrupt and not config.skip_corrupt:
        raise _corrupt(config.data, corrupt)
    if corrupt:
        notes.append(f"{_named(corrupt)} left out (--skip-corrupt)")
        gone = sorted(set(parts[0].labels) - {classes[label] for label in set(loaded[0].labels)}, key=natural)
        if gone or not all(len(part.rows) for part in loaded):
            raise DataError(
                f"--data {config.data}",
                found=f"after leaving out {_named(corrupt)} nothing is left of {listed(gone) or 'the validation set'}",
                valid="at least one readable image in each class",
            )
    return loaded


def _own_size(images: Images) -> int | None:
    """The median longer side of a sample of the images; None where that is above 96 pixels."""
    sides: list[int] = []
    for row in np.unique(np.linspace(0, len(images) - 1, SIZE_SAMPLE).astype(int)).tolist():
        try:
            sides.append(max(images.open(row).size))
        except Exception:  # whoever decodes it names it
            continue
    side = sorted(sides)[len(sides) // 2] if sides else SMALL
    return side if side <= SMALL else None


def _named(corrupt: Sequence[Unreadable]) -> str:
    shown = listed([f"{found.name} ({found.reason})" for found in corrupt])
    return f"{len(corrupt)} unreadable image{'s' if len(corrupt) > 1 else ''}: {shown}"


def _corrupt(data: str, corrupt: Sequence[Unreadable]) -> DataError:
    return DataError(
        f"--data {data}",
        found=_named(corrupt),
        valid="images that PIL can decode",
        hint="repair or remove them, or give --skip-corrupt",
    )


# -- worker processes


def _unchanged(found: Any) -> Any:
    return found


def _begin_worker(_: int) -> None:
    """The main process decides what a signal means; its handlers must not run in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
