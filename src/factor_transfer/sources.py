"""Where images come from: built-in digits, folders, tars, torchvision and Hugging Face datasets, WebDataset shards.

Splits are resolved here: timm's own search gives all images where it does not find a split.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factor_transfer.config import DataConfig
from factor_transfer.console import say, warn
from factor_transfer.errors import DataError, listed, near
from factor_transfer.images import EXTENSIONS, Files, Images, Range, Tree, folder_tree, natural, tar_tree
from factor_transfer.seeds import part_seed
from factor_transfer.views import held_out

VALIDATION = ("validation", "val", "test")
"""Names of a validation set, the preferred first."""

TORCH = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "places365")
TORCH_FILES = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "mnist": "MNIST/raw",
               "kmnist": "KMNIST/raw", "fashion_mnist": "FashionMNIST/raw", "qmnist": "QMNIST/raw"}  # fmt: skip
WRITTEN = ("digits", "torch/mnist", "torch/kmnist", "torch/qmnist")
"""Images of writing: a mirrored one is another sign or none, so they are not flipped by default."""

NAMED = ("torch", "hfds", "wds")
"""timm's kinds of datasets, which `--data-dir` belongs to."""

UNLABELLED = ""
"""The class name of an image that has none."""

DIGITS_SHARE = 0.3
FORMS = "digits, a folder or tar of images, torch/NAME, hfds/NAME or wds/NAME"


@dataclass(frozen=True)
class Source:
    """The images of a dataset, its classes not yet numbered."""

    train: Images
    validation: Images | None
    order: tuple[str, ...] | None = None
    """Class names in index order, where the dataset itself numbers them."""
    notes: tuple[str, ...] = ()


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
        opener: Callable[[str, str | None, str], Source] = {"torch": _torch, "hfds": _hfds, "wds": _wds}[kind]
        shown = f"--data {config.data}" + (f" --data-dir {config.data_dir}" if config.data_dir else "")
        return opener(name, config.data_dir, shown)
    if kind in ("hfids", "tfds"):
        raise DataError(f"--data {config.data}", found="a stream, which cannot be replayed by index", valid=FORMS)
    return _folder(Path(config.data).expanduser(), f"--data {config.data}", not config.label_weight)


def missing(given: str, path: Path, valid: str = FORMS) -> DataError:
    """The error for a path that does not exist, with the near names of entries beside it."""
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
    beside = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = near(path.name, [*beside, "digits"])
    hint = f"did you mean {listed(close)}?" if close else None
    return DataError(given, found=f"no {path.name} in {parent.resolve()}", valid=valid, hint=hint)


# -- built in


@dataclass(frozen=True)
class _Arrays(Images):
    pixels: np.ndarray  # (N, H, W) uint8

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def _digits() -> Source:
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = (found.images * (255 / 16)).round().astype(np.uint8)
    chosen = held_out(found.target, DIGITS_SHARE, part_seed("digits"))

    def part(rows: np.ndarray) -> Images:
        names = [str(row) for row in rows]
        return _Arrays("digits", names, [str(found.target[row]) for row in rows], [64] * len(rows), grey[rows])

    return Source(part(np.flatnonzero(~chosen)), part(np.flatnonzero(chosen)))


def _folder(root: Path, given: str, flat: bool) -> Source:
    """A folder or tar with train/ and a validation set, the same with a tar for each, or class folders alone.

    Where it may be `flat`, images in no class folders are images without labels.
    """
    if not root.exists():
        raise missing(given, root)
    if root.is_file() and root.suffix.lower() != ".tar":
        raise DataError(given, found="a file", valid="a folder, or a .tar file")
    whole = tar_tree(root, given) if root.is_file() else None

    def has(name: str) -> bool:
        if whole is not None:
            return any(path.startswith(f"{name}/") for path in whole.files)
        return (root / name).is_dir() or (root / f"{name}.tar").is_file()

    def part(name: str) -> Images:
        if whole is not None:
            return _class_folders(whole.below(name), f"{root}/{name}", given, flat)
        path = root / name
        tree = folder_tree(path) if path.is_dir() else tar_tree(path.with_name(f"{name}.tar"), given)
        if not path.is_dir() and all(file.startswith(f"{name}/") for file in tree.files):
            tree = tree.below(name)  # train.tar made of train/ itself
        return _class_folders(tree, str(path if path.is_dir() else f"{path}.tar"), given, flat)

    present = [name for name in VALIDATION if has(name)]
    if not has("train"):
        if present:
            raise DataError(
                given,
                found=f"{present[0]} but no train",
                valid="train/ with class folders, or train.tar",
                hint=f"to measure on {present[0]} alone, give {root / present[0]} to `evaluate`",
            )
        return Source(_class_folders(whole or folder_tree(root), str(root), given, flat), None)
    notes = [f"validation images are {present[0]}; {listed(present[1:])} is not used"] if present[1:] else []
    return Source(part("train"), part(present[0]) if present else None, notes=tuple(notes))


def _class_folders(tree: Tree, where: str, given: str, flat: bool) -> Images:
    """The images of a tree, each in the class that its topmost folder names; UNLABELLED where it may be `flat`."""
    images = {name: place for name, place in tree.files.items() if name.lower().endswith(EXTENSIONS)}
    if not images:
        raise DataError(given, found=f"no images in {where}", valid=f"class folders of {' '.join(EXTENSIONS)}")
    names = sorted((name for name in images if "/" in name), key=natural)
    if not names and flat:
        names = sorted(images, key=natural)
        ranges = [images[name] for name in names]
        return Files(where, names, [UNLABELLED] * len(names), [place.size for place in ranges], ranges)
    if not names:
        found, hint = f"{len(images)} images in {where}, but no class folders", "without labels, give --label-weight 0"
        raise DataError(given, found=found, valid="class/image.jpg", hint=hint)
    loose = sorted((name for name in images if "/" not in name), key=natural)
    if loose:
        warn(f"data: {len(loose)} images in {where} lie in no class folder and are left out: {listed(loose)}")
    filled = {name.partition("/")[0] for name in names}
    empty = sorted({folder.partition("/")[0] for folder in tree.folders} - filled, key=natural)
    if empty:
        raise DataError(
            given,
            found=f"{len(empty)} class folders without an image in {where}: {listed(empty)}",
            valid="at least one image in every class folder",
            hint="fill or remove them",
        )
    ranges = [images[name] for name in names]
    labels = [name.partition("/")[0] for name in names]
    return Files(where, names, labels, [place.size for place in ranges], ranges)


# -- timm's dataset names


@dataclass(frozen=True)
class _Indexed(Images):
    dataset: Any

    def open(self, index: int) -> Image.Image:
        """(PIL image or open file, label) from torchvision's datasets and timm's readers."""
        found = self.dataset[index][0]
        if isinstance(found, Image.Image):
            return found
        with found:  # whole, since PIL would read it after it is closed
            return Image.open(io.BytesIO(found.read()))


def _torch(name: str, folder: str | None, given: str) -> Source:
    from timm.data import create_dataset

    name = name.rpartition("/")[2].lower()
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
            reason = str(error).splitlines()[0].partition(" You can use download")[0]
            raise DataError(given, found=reason, hint=hint) from error
        classes = tuple(map(str, found.wnids if name == "imagenet" else found.classes))
        targets = np.asarray(found.targets).reshape(len(found), -1)[:, 0]
        names = [str(index) for index in range(len(found))]
        return _Indexed(
            f"torch/{name} {split}", names, [classes[target] for target in targets], [0] * len(names), found
        ), classes

    train, classes = part("train")
    note = "validation images are the dataset's test set" if name not in ("imagenet", "places365") else ""
    return Source(train, part("validation")[0], classes, (note,) if note else ())


def _hfds(name: str, folder: str | None, given: str) -> Source:
    try:
        import datasets
        from timm.data.readers import create_reader
    except ImportError as error:
        raise DataError(given, found=str(error), hint='pip install "factor-transfer[hf]"') from error
    if not Path(name).exists():
        say(f"data: {name} is no local folder; it comes from the Hugging Face cache, or is downloaded")
    try:
        splits = datasets.load_dataset(name, cache_dir=folder)
    except Exception as error:  # its builders, readers and network raise what they like
        raise DataError(given, found=str(error).splitlines()[0], valid="a dataset's folder, or its name") from error
    if "train" not in splits:
        raise DataError(given, found=f"splits {listed(list(splits))}", valid="a split named train")
    features = splits["train"].features
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    marks = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    label = "label" if "label" in features else next(iter(marks), None)
    if not pictures or label is None:
        raise DataError(given, found=f"columns {listed(list(features))}", valid="a column of images and one of classes")
    own = tuple(features[label].names) if label in marks else None

    def part(split: str) -> Images:
        reader = create_reader(
            f"hfds/{name}", root=folder, split=split, input_key=pictures[0], target_key=label, download=False
        )
        values = list(reader.dataset[label])
        if own and any(value is None or value < 0 for value in values):
            raise DataError(given, found=f"images without a class in {split}", valid="a class for every image")
        names = [str(index) for index in range(len(reader))]
        labels = [own[value] if own else str(value) for value in values]
        return _Indexed(f"hfds/{name} {split}", names, labels, _hfds_sizes(reader.dataset, pictures[0]), reader)

    present = [split for split in VALIDATION if split in splits]
    notes = [f"validation images are {present[0]}; {listed(present[1:])} is not used"] if present[1:] else []
    return Source(part("train"), part(present[0]) if present else None, own, tuple(notes))


def _hfds_sizes(dataset: Any, column: str) -> list[int]:
    """Bytes of each image, without reading them."""
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    pictures = dataset.data.column(column)
    lengths = pc.binary_length(pc.struct_field(pictures, "bytes")).to_pylist()
    paths = pc.struct_field(pictures, "path").to_pylist()
    return [
        length if length is not None else os.path.getsize(path)  # noqa: PTH202 (a million names)
        for length, path in zip(lengths, paths, strict=True)
    ]


def _wds(name: str, folder: str | None, given: str) -> Source:
    """WebDataset shards, indexed by sample key; splits as timm names them, from _info.json or the shards' names."""
    root = Path(folder or name)
    if not root.is_dir():
        raise missing(given, root, "a folder of .tar shards, given as --data-dir")
    info = next((root / file for file in ("_info.json", "info.json") if (root / file).is_file()), None)
    alt = ""
    shards: dict[str, list[Path]] = {}
    if info is not None:
        try:
            for split, found in json.loads(info.read_text(encoding="utf-8"))["splits"].items():
                shards[split] = [root / file for file in found["filenames"]]
                alt = found.get("alt_label") or alt
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(given, found=f"{info}: {error!r}", valid="timm's info: splits with filenames") from error
    else:
        for path in sorted(root.rglob("*.tar"), key=lambda shard: natural(str(shard))):
            words = re.split(r"[-_./]", path.relative_to(root).as_posix())
            for split in ("train", *VALIDATION):
                if split in words:
                    shards.setdefault(split, []).append(path)
    if not shards.get("train"):
        raise DataError(given, found=f"no shards named train in {root}", valid="NAME-train-0000.tar, or _info.json")
    present = [split for split in VALIDATION if shards.get(split)]
    train = _wds_samples(root, shards["train"], alt, given)
    last = max(map(int, train.labels))
    notes = [f"validation images are {present[0]}; {listed(present[1:])} is not used"] if present[1:] else []
    validation = _wds_samples(root, shards[present[0]], alt, given) if present else None
    return Source(train, validation, tuple(map(str, range(last + 1))), tuple(notes))


def _wds_samples(root: Path, shards: Sequence[Path], alt: str, given: str) -> Images:
    names, labels, ranges = [], [], []
    for shard in shards:
        samples: dict[str, dict[str, Range]] = {}
        for path, place in tar_tree(shard, given).files.items():
            folder, _, file = path.rpartition("/")
            key, _, extension = file.partition(".")
            samples.setdefault(f"{folder}/{key}", {})[extension.lower()] = place
        for key, parts in samples.items():
            image = next((parts[ext] for ext in parts if f".{ext}" in EXTENSIONS), None)
            if image is None:
                continue
            name = f"{shard.relative_to(root)}/{key.lstrip('/')}"
            try:
                label = int(json.loads(parts["json"].read())[alt] if alt else parts["cls"].read())
                if label < 0:
                    raise ValueError(label)
            except (KeyError, ValueError, TypeError) as error:
                wanted = f"a .json with a number as {alt}" if alt else "a .cls with a number"
                raise DataError(given, found=f"{root}/{name}: no class ({error!r})", valid=wanted) from error
            names.append(name)
            labels.append(str(label))
            ranges.append(image)
    if not names:
        raise DataError(given, found=f"no images in {listed([str(shard) for shard in shards])}", valid="jpg, png, webp")
    return Files(str(root), names, labels, [place.size for place in ranges], ranges)
