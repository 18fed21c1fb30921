"""Where images come from: built-in digits, folders, tars, torchvision and Hugging Face datasets, WebDataset shards.

Splits are resolved by us: timm's own search gives all images where it does not find a split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from factor_transfer.config import DataConfig
from factor_transfer.data.hub import hub_dataset, shards_dataset
from factor_transfer.data.images import Images, Indexed, Source
from factor_transfer.data.layouts import FORMS, missing, read_folder
from factor_transfer.data.views import held_out
from factor_transfer.util.checks import flag
from factor_transfer.util.errors import DataError, first_line, listed, near
from factor_transfer.util.seeds import part_seed

TORCH = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "places365")
TORCH_FILES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "mnist": "MNIST/raw",
               "kmnist": "KMNIST/raw", "fashion_mnist": "FashionMNIST/raw", "qmnist": "QMNIST/raw"}  # fmt: skip
WRITTEN = ("digits", "torch/mnist", "torch/kmnist", "torch/qmnist")
"""Images of writing: a mirrored one is another sign or none, so they are not flipped by default."""

NAMED = ("torch", "hfds", "wds")
"""timm's kinds of datasets, which `--data-dir` belongs to."""

DIGITS_SHARE = 0.3


def open_source(config: DataConfig) -> Source:
    """The source that `--data` (and `--data-dir`) names.

    Raises:
        DataError: there is none, or it holds no images.
    """
    kind, slash, name = config.data.partition("/")
    kind = kind.lower() if slash else ""
    if config.data_dir is not None and kind not in NAMED:
        raise DataError(
            f"--data-dir {config.data_dir}",
            found=f"--data {config.data}, which says by itself where the images are",
            valid=f"--data-dir beside --data {listed([f'{name}/NAME' for name in NAMED])}",
            hint="leave --data-dir out",
        )
    for column in ("label_column", "image_column"):
        if getattr(config, column) is not None and kind != "hfds":
            raise DataError(
                f"{flag(column)} {getattr(config, column)}",
                found=f"--data {config.data}, which has no columns",
                valid=f"{flag(column)} beside --data hfds/NAME",
                hint="leave it out",
            )
    if config.data == "digits":
        return _digits()
    try:
        return _open(config, kind, name)
    except OSError as error:  # no permission, a name too long, a disk that fails
        raise DataError(f"--data {config.data}", found=str(error), valid=FORMS) from error


def _open(config: DataConfig, kind: str, name: str) -> Source:
    if kind == "torch" and name.lower() in ("folder", "image_folder"):
        return _folder(Path(config.data_dir or "."), f"--data-dir {config.data_dir or '.'}", not config.label_weight)
    if kind in NAMED:
        opener: Callable[[str, DataConfig, str], Source] = {
            "torch": _torch,
            "hfds": hub_dataset,
            "wds": shards_dataset,
        }[kind]
        shown = f"--data {config.data}" + (f" --data-dir {config.data_dir}" if config.data_dir else "")
        return opener(name, config, shown)
    if kind in ("hfids", "tfds"):
        raise DataError(f"--data {config.data}", found="a stream, which cannot be replayed by index", valid=FORMS)
    return _folder(Path(config.data).expanduser(), f"--data {config.data}", not config.label_weight)


# -- built in


@dataclass(frozen=True)
class _Arrays(Images):
    pixels: np.ndarray  # (N, H, W) uint8

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def raw(self, index: int) -> bytes:
        data: bytes = self.pixels[index].tobytes()
        return data


def _digits() -> Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = (found.images * (255 / 16)).round().astype(np.uint8)
    chosen = held_out(found.target, DIGITS_SHARE, part_seed("digits"))

    def part(rows: np.ndarray) -> Images:
        names = [str(row) for row in rows]
        return _Arrays("digits", names, [str(found.target[row]) for row in rows], grey[rows])

    return Source(part(np.flatnonzero(~chosen)), part(np.flatnonzero(chosen)))


def _folder(root: Path, given: str, flat: bool) -> Source:
    if not root.exists():
        raise missing(given, root)
    return read_folder(root, given, flat)


# -- timm's dataset names


def _torch(name: str, config: DataConfig, given: str) -> Source:
    from timm.data import create_dataset

    folder = config.data_dir
    name = name.rpartition("/")[2].lower()
    if name not in TORCH:
        raise DataError(given, found=f"no dataset {name}", valid=near(name, TORCH) or TORCH)
    if folder is None:
        raise DataError(given, found="no --data-dir", hint="give the folder that holds the files as --data-dir")
    place = Path(folder) / TORCH_FILES.get(name, "")

    def part(split: str) -> tuple[Images, tuple[str, ...]]:
        try:
            found = create_dataset(f"torch/{name}", root=folder, split=split, download=False)
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            hint = f"nothing is downloaded: put torchvision's files for {name} into {place}"
            reason = first_line(error).partition(" You can use download")[0]
            raise DataError(given, found=reason, hint=hint) from error
        classes = tuple(map(str, found.wnids if name == "imagenet" else found.classes))
        targets = np.asarray(found.targets).reshape(len(found), -1)[:, 0]
        names = [str(index) for index in range(len(found))]
        return Indexed(f"torch/{name} {split}", names, [classes[target] for target in targets], found), classes

    train, classes = part("train")
    measured = "validation set" if name in ("imagenet", "places365") else "test set"
    note = f"training: the dataset's training set; validation: its {measured}"
    return Source(train, part("validation")[0], classes, (note,))
