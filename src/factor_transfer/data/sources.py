"""What `--data` names: built-in digits, folders, tars, datasets of other libraries, or a source of your own.

A source of your own is a function without arguments, given as `--data package.module:callable`:

    def flowers():
        return train, validation, ["daisy", "rose"]

* `train` and `validation` are addressed by index: `len(train)` is the number of images, and `train[i]` is a pair of
  image and label, the same one each time. Lists and the datasets of torch and torchvision are such. `validation` may be
  None: then a share of the training images is set aside (`--validation-share`).
* The image is a PIL image, or the path or the bytes of an image file.
* The label is a place in the class names, or one of them; or None for every image, with `--label-weight 0`.
* The class names are in index order. None: they are the labels themselves, sorted.

All images are read once for their labels, unless `train.targets` (torchvision's word) has them. Large images are read
in worker processes, so a part must keep no file open, and should be something that can be pickled. The data's
fingerprint is over the images and labels that the function gives, and not over its code.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factor_transfer.config import DataConfig
from factor_transfer.data.hub import hub_dataset, shards_dataset
from factor_transfer.data.images import UNLABELLED, Images, Indexed, Source
from factor_transfer.data.layouts import FORMS, missing, read_folder
from factor_transfer.data.views import held_out
from factor_transfer.util.arguments import imported, is_callable_name
from factor_transfer.util.checks import flag
from factor_transfer.util.errors import DataError, first_line, listed, near
from factor_transfer.util.seeds import part_seed

TORCH = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "places365")
TORCH_FILES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "mnist": "MNIST/raw",
               "kmnist": "KMNIST/raw", "fashion_mnist": "FashionMNIST/raw", "qmnist": "QMNIST/raw"}  # fmt: skip
WRITTEN = ("digits", "torch/mnist", "torch/kmnist", "torch/qmnist")
"""Images of writing: a mirrored one is another sign or none, so they are not flipped by default."""

BUILTIN = resources.files("factor_transfer") / "builtin"

OWN = "a function without arguments that gives (train, validation or None, class names or None)"

DIGITS_SHARE = 0.3

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
"""Fashion-MNIST's, in the order of its labels."""


def open_source(config: DataConfig) -> Source:
    """The source that `--data` (and `--data-dir`) names.

    Raises:
        DataError: there is none, or it holds no images.
    """
    kind, slash, name = config.data.partition("/")
    kind = kind.lower() if slash else ""
    if config.data_dir is not None and kind not in KINDS:
        raise DataError(
            f"--data-dir {config.data_dir}",
            found=f"--data {config.data}, which says by itself where the images are",
            valid=f"--data-dir beside --data {listed([f'{name}/NAME' for name in KINDS])}",
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
    given = f"--data {config.data}" + (f" --data-dir {config.data_dir}" if config.data_dir else "")
    try:
        if config.data in BUILT_IN:
            return BUILT_IN[config.data]()
        if is_callable_name(config.data):
            return _own(config.data, config, given)
        if kind in ("hfids", "tfds"):
            raise DataError(given, found="a stream, which cannot be replayed by index", valid=FORMS)
        return KINDS[kind](name, config, given) if kind in KINDS else _folder(config.data, config, given)
    except OSError as error:  # no permission, a name too long, a disk that fails
        raise DataError(f"--data {config.data}", found=str(error), valid=FORMS) from error


def _folder(name: str, config: DataConfig, given: str) -> Source:
    root = Path(name).expanduser()
    if not root.exists():
        raise missing(given, root)
    return read_folder(root, given, flat=not config.label_weight)


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


def _fashion() -> Source:
    with np.load(io.BytesIO((BUILTIN / "fashion.npz").read_bytes()), allow_pickle=False) as arrays:
        found = dict(arrays)

    def part(name: str) -> Images:
        labels = found[f"{name}_labels"]
        names = [f"{name} {row}" for row in range(len(labels))]
        return _Arrays(f"fashion {name}", names, [FASHION_CLASSES[label] for label in labels], found[name])

    note = "a part of Fashion-MNIST; training: 2,000 of its training images; validation: 2,000 of its test images"
    return Source(part("train"), part("validation"), FASHION_CLASSES, (note,))


BUILT_IN: dict[str, Callable[[], Source]] = {"digits": _digits, "fashion": _fashion}
"""Names of the images that come with the package."""


# -- datasets addressed by index: torchvision's, and the user's own


def _torch(name: str, config: DataConfig, given: str) -> Source:
    from timm.data import create_dataset

    folder = config.data_dir
    name = name.rpartition("/")[2].lower()
    if name in ("folder", "image_folder"):
        return _folder(folder or ".", config, f"--data-dir {folder or '.'}")
    if name not in TORCH:
        raise DataError(given, found=f"no dataset {name}", valid=near(name, TORCH) or TORCH)
    if folder is None:
        raise DataError(given, found="no --data-dir", hint="give the folder that holds the files as --data-dir")

    def part(split: str) -> tuple[Images, tuple[str, ...]]:
        try:
            found = create_dataset(f"torch/{name}", root=folder, split=split, download=False)
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            place = Path(folder) / TORCH_FILES.get(name, "")
            hint = f"nothing is downloaded: put torchvision's files for {name} into {place}"
            reason = first_line(error).partition(" You can use download")[0]
            raise DataError(given, found=reason, hint=hint) from error
        classes = tuple(map(str, found.wnids if name == "imagenet" else found.classes))
        targets = np.asarray(found.targets).reshape(len(found), -1)[:, 0]
        return Indexed.of(f"torch/{name} {split}", found, [classes[target] for target in targets]), classes

    train, classes = part("train")
    measured = "validation set" if name in ("imagenet", "places365") else "test set"
    note = f"training: the dataset's training set; validation: its {measured}"
    return Source(train, part("validation")[0], classes, (note,))


def _own(name: str, config: DataConfig, given: str) -> Source:
    """What a function of the user's gives: see the module's docstring.

    Raises:
        DataError: it cannot be found or fails, or it gives something else.
    """
    try:
        train, validation, classes = imported(name)()
        order = None if classes is None else tuple(map(str, classes))
        parts = {"training": train} if validation is None else {"training": train, "validation": validation}
        labels = {part: _labels(dataset, order) for part, dataset in parts.items()}
    except Exception as error:  # code of the user's raises anything
        raise DataError(given, found=f"{type(error).__name__}: {first_line(error)}", valid=OWN) from error
    empty = [part for part, found in labels.items() if not found]
    if empty:
        raise DataError(given, found=f"no {empty[0]} images", valid=OWN)
    doubles = sorted({each for each in order or () if order and order.count(each) > 1})
    if doubles:
        raise DataError(given, found=f"classes that are named twice: {listed(doubles)}", valid="each class once")
    bare = [part for part, found in labels.items() if UNLABELLED in found]
    if bare and (config.label_weight or any(set(found) != {UNLABELLED} for found in labels.values())):
        hint = "where no image has one, give --label-weight 0"
        raise DataError(given, found=f"{bare[0]} images without a label", valid="a label for every image", hint=hint)
    images = [Indexed.of(f"{name} {part}", parts[part], found) for part, found in labels.items()]
    held = "" if len(images) > 1 else "; it gives no validation images"
    note = f"images: those that {name} gives{held}"
    return Source(images[0], images[1] if len(images) > 1 else None, None if bare else order, (note,))


def _labels(part: Any, classes: Sequence[str] | None) -> list[str]:
    """The class name of each image of a user's own.

    Raises:
        ValueError: a label that is no class.
    """
    names, targets = frozenset(classes or ()), getattr(part, "targets", None)

    def named(index: int) -> str:
        label = part[index][1] if targets is None else targets[index]
        if label is None:
            return UNLABELLED
        if classes is None or label in names:
            return str(label)
        if not isinstance(label, str) and 0 <= operator.index(label) < len(classes):
            return classes[operator.index(label)]
        raise ValueError(f"the label {label!r} of item {index} is none of the {len(classes)} classes")

    return [named(index) for index in range(len(part))]


KINDS: dict[str, Callable[[str, DataConfig, str], Source]] = {
    "torch": _torch,
    "hfds": hub_dataset,
    "wds": shards_dataset,
}
"""What stands before the / of `--data KIND/NAME`; --data-dir belongs to these."""
