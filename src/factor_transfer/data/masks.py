"""Masks: the class of every pixel of an image, as segmentation learns it. Where they lie, and what is wrong with them.

A mask is an image of one channel, or with a palette, whose values are class indices. It is named as its image is, and
has the image's size. One value may stand for pixels that count nowhere (`--ignore-index`). These layouts are read:

    DATA/train/images/a.jpg, DATA/train/masks/a.png          and validation/, test/ likewise
    DATA/images/train/a.jpg, DATA/masks/train/a.png          and validation/, test/ likewise
    DATA/images/a.jpg, DATA/masks/a.png, DATA/train.txt      a name a line; val.txt and test.txt likewise
    DATA/JPEGImages, DATA/SegmentationClass, DATA/ImageSets/Segmentation/train.txt      Pascal VOC's
    DATA/images/a.jpg, DATA/masks/a.png                      one set

DATA may be a list, such as images/../test.txt: one set, of the images that it names.

Shapes: n images, N classes, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from factor_transfer.config import DataConfig
from factor_transfer.data.images import Files, Range, Source, Unreadable, natural, upright_size
from factor_transfer.data.layouts import chosen, missing, splits_among
from factor_transfer.data.pixels import digests
from factor_transfer.data.trees import folder_tree, left_by_system
from factor_transfer.util.arguments import written
from factor_transfer.util.errors import ConfigError, DataError, listed
from factor_transfer.util.files import cache_folder, fingerprint, read_json, write_json
from factor_transfer.util.machine import blocks

IGNORED = 255
"""What pixels that count nowhere have in a batch, whatever they have in the files; the default of --ignore-index."""

MOST_CLASSES = IGNORED

MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")
"""PIL's names of pixels that can be class indices."""

IMAGES = ("images", "jpegimages", "imgs", "img", "image")
MASKS = ("masks", "segmentationclass", "annotations", "labels", "mask", "segmentation")
"""What the two folders are called, in lower case."""

NAMES = ("classes.txt", "class_names.txt", "labels.txt")
"""Files of class names, one a line, in index order."""

LAYOUT = "train/images and train/masks; or images, masks and train.txt; or Pascal VOC's folders"

VERSION = 1
"""Raise it when what is remembered of masks changes."""

WRAPPERS = 3
"""Folders around the data, each alone in the one above, that are looked through."""


@dataclass(frozen=True)
class Masked(Files):
    """Images with a mask for each."""

    masks: Files
    ignore: int
    """The value of pixels that count nowhere, in the files."""
    count: int
    """N."""

    def mask(self, index: int) -> Image.Image:
        """The mask of image `index`, of one channel: class indices, and `IGNORED`.

        Raises:
            Unreadable: it is not what was found when the data was opened.
        """
        try:
            values = indices(self.masks.open(index))
            known = values < self.count
            if not (known | (values == self.ignore)).all():
                raise ValueError(f"the value {values[~known & (values != self.ignore)][0]}, which is no class")
        except Exception as error:  # decoders raise anything
            raise self.masks.unreadable(index, str(error) or type(error).__name__) from error
        kept = np.where(known & (values != self.ignore), values, IGNORED)
        return Image.fromarray(kept.astype(np.uint8))


def indices(image: Image.Image) -> np.ndarray:
    """The values of an opened mask, (H, W), as integers: those of a palette are its places, not its colours.

    Raises:
        ValueError: it has colours, or values that are no index of a class.

    >>> indices(Image.new("L", (2, 1), 7)).tolist()
    [[7, 7]]
    """
    if image.mode not in MODES:
        raise ValueError(f"{image.mode} pixels: a mask has one channel of class indices, or a palette")
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= MOST_CLASSES:
        raise ValueError(f"values from {values.min()} to {values.max()}: class indices are 0 to {MOST_CLASSES}")
    return values


# -- which files


class _Part(NamedTuple):
    """One set: two folders, and the names of its images; None: all."""

    images: Path
    masks: Path
    names: Sequence[str] | None = None
    listed_in: str = ""


def masked_source(config: DataConfig) -> Source:
    """The images and masks that `--data` names. Their classes are numbered by `named_masks`.

    Raises:
        DataError: no such layout, or images without a mask.
    """
    given, root = f"--data {config.data}", Path(config.data).expanduser()
    for name in ("data_dir", "label_column", "image_column"):
        if getattr(config, name) is not None:
            found = f"images with masks, which --data alone names, and --{name.replace('_', '-')}"
            raise DataError(given, found=found, hint="leave it out")
    if not root.exists():
        raise missing(given, root, LAYOUT)
    try:
        return _source(root, config, given)
    except OSError as error:  # no permission, a disk that fails
        raise DataError(given, found=str(error), valid=LAYOUT) from error


def holds_masks(root: Path) -> bool:
    """Whether a folder looks like one of these layouts: what is called masks has the names of what is called images."""
    if not root.is_dir():
        return False
    splits = splits_among([entry.name for entry in _folders(root)])
    for folder in (root, *(root / name for name in splits)):
        pair = _pair(folder)
        if pair is not None:
            images, masks = ({str(Path(name).with_suffix("")) for name in folder_tree(part).files} for part in pair)
            return bool(masks) and masks <= images
    return False


def _source(root: Path, config: DataConfig, given: str) -> Source:
    base = root
    if root.is_file():
        above = [parent for parent in root.resolve().parents[:3] if _pair(parent)]
        if root.suffix != ".txt" or not above:
            raise DataError(given, found="a file that is no list beside images and masks", valid=LAYOUT)
        base, (images, masks) = above[0], _pair(above[0]) or (root, root)
        parts, told = {"train": _Part(images, masks, _lines(root), root.name)}, f"images: those that {root} lists"
    else:
        for _ in range(WRAPPERS):
            inside = [entry for entry in _folders(base) if entry.is_dir()]
            if len(inside) != 1 or _pair(base) or splits_among([inside[0].name]):
                break
            base = inside[0]
        parts, told = _parts(base, given)
    ignore = IGNORED if config.ignore_index is None else config.ignore_index
    found = {role: _read(part, ignore, given) for role, part in parts.items()}
    names = next((path for name in NAMES for path in (base / name, base.parent / name) if path.is_file()), None)
    order = None
    if config.class_map is None and names is not None:
        order, told = read_names(names, f"--data {config.data}: {names}"), f"{told}; class names: {names}"
    return Source(found["train"], found.get("validation"), order, (told,))


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and left_by_system(entry.name) is None]


def _pair(folder: Path) -> tuple[Path, Path] | None:
    """Its folders of images and of masks, where it has both."""
    there = {entry.name.lower(): entry for entry in _folders(folder)} if folder.is_dir() else {}
    both = [next((there[name] for name in names if name in there), None) for names in (IMAGES, MASKS)]
    return (both[0], both[1]) if both[0] is not None and both[1] is not None else None


def _parts(base: Path, given: str) -> tuple[dict[str, _Part], str]:
    """Training and validation set of a folder, and what is said of how they were found."""
    pair = _pair(base)
    if pair is None:
        pairs = {entry.name: _pair(entry) for entry in _folders(base)}
        there = {name: _Part(*found) for name, found in pairs.items() if found}
        if not there:
            found = f"no folders of images and masks in {base}"
            hint = f"images are called {listed(IMAGES[:2])}, masks {listed(MASKS[:3])}"
            raise DataError(given, found=found, valid=LAYOUT, hint=hint)
        others = [entry.name for entry in _folders(base) if entry.name not in there]
        return _roles(there, others, given, "folder")
    images, masks = pair
    inside = [entry.name for entry in _folders(images) if (masks / entry.name).is_dir()]
    if splits_among(inside):
        there = {name: _Part(images / name, masks / name) for name in inside}
        return _roles(there, [], given, "folder")
    lists = base / "ImageSets" / "Segmentation"
    files = {path.stem: path for path in sorted((lists if lists.is_dir() else base).glob("*.txt"))}
    kinds = splits_among(files)
    if "train" in kinds and "trainval" in kinds:  # Pascal VOC's: both sets together
        del kinds["trainval"]
    if kinds:
        there = {name: _Part(images, masks, _lines(files[name]), files[name].name) for name in kinds}
        return _roles(there, [], given, "list")
    return {"train": _Part(images, masks)}, f"images: {images}, masks: {masks}, without splits"


def _roles(there: Mapping[str, _Part], others: Sequence[str], given: str, what: str) -> tuple[dict[str, _Part], str]:
    kinds = splits_among(there)
    roles = chosen(kinds, [name for name in (*there, *others) if name not in kinds], given, what)
    found = {"train": there[roles.train]}
    if roles.validation is not None:
        found["validation"] = there[roles.validation]
    return found, roles.told()


def _lines(path: Path) -> list[str]:
    """The first word of each line: the image's name."""
    try:
        return [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(str(path), found=str(error), valid="a text file with the name of an image a line") from error


def _read(part: _Part, ignore: int, given: str) -> Masked:
    """The files of one set, in order."""
    images, masks = (_by_stem(folder, given) for folder in (part.images, part.masks))
    names = sorted(images, key=natural)
    if part.names is not None:
        names = [_named(name, images) for name in part.names]
        lacking = [name for name in names if name not in images]
        if lacking:
            found = f"{len(lacking)} names in {part.listed_in} without an image in {part.images}: {listed(lacking)}"
            raise DataError(given, found=found, valid="the names of images, without their ending, a line each")
        doubles = [name for name, count in Counter(names).items() if count > 1]
        if doubles:
            raise DataError(given, found=f"named twice in {part.listed_in}: {listed(doubles)}")
    bare = [images[name][0] for name in names if name not in masks]
    if bare:
        found = f"{len(bare)} images without a mask of their name in {part.masks}: {listed(bare)}"
        raise DataError(given, found=found, valid="a mask for every image, such as a.png for a.jpg")
    if not names:
        raise DataError(given, found=f"no images in {part.listed_in or part.images}", valid=LAYOUT)
    own, labels = [masks[name] for name in names], [""] * len(names)
    files = Files(str(part.masks), [name for name, _ in own], labels, [place for _, place in own])
    shown = [images[name] for name in names]
    ranges = [place for _, place in shown]
    return Masked(str(part.images), [name for name, _ in shown], labels, ranges, files, ignore, MOST_CLASSES)


def _named(name: str, images: Mapping[str, object]) -> str:
    """What an entry of a list stands for: a name with or without an ending and folders."""
    path = Path(name)
    return next((each for each in (name, str(path.with_suffix("")), path.stem) if each in images), name)


def _by_stem(folder: Path, given: str) -> dict[str, tuple[str, Range]]:
    """The images of a folder, each by its name without the ending.

    Raises:
        DataError: two have one name.
    """
    found: dict[str, tuple[str, Range]] = {}
    for name, place in folder_tree(folder).files.items():
        stem = str(Path(name).with_suffix(""))
        if stem in found:
            raise DataError(given, found=f"two files of one name in {folder}: {found[stem][0]}, {name}")
        found[stem] = name, place
    return found


# -- what is in them


@dataclass(frozen=True)
class Scan:
    """What all masks of one set hold."""

    counts: np.ndarray
    """Pixels of every value: (256,)."""
    first: Mapping[int, str]
    """A mask that has the value, for each value that there is."""
    commonest: np.ndarray
    """The commonest value of each mask, without the ignored one: (n,)."""


def named_masks(
    source: Source, config: DataConfig, notes: list[str], known: Sequence[str] | None = None
) -> tuple[Source, tuple[str, ...], tuple[int, ...]]:
    """The source with its classes, their names in index order, and the training pixels of each.

    All masks are read, the first time: later runs know those whose bytes are the same. The label of an image is its
    commonest class: shares of the images are drawn by it.

    Args:
        source: as `masked_source` gives it.
        config: --class-map names the classes, else a file beside the images, else they are 0 to N - 1.
        notes: what is merely odd is added here.
        known: class names of a finished run.

    Raises:
        DataError: a mask of another size than its image, or that cannot be read, or with a value that is no class.
        ConfigError: other classes than the `known`.
    """
    parts = [part for part in (source.train, source.validation) if isinstance(part, Masked)]
    scans, ignore = [scan(part, config) for part in parts], parts[0].ignore
    order = source.order
    if config.class_map is not None:
        order = read_names(Path(config.class_map).expanduser(), f"--class-map {config.class_map}")
    if known is not None:
        if order is not None and tuple(known) != order:
            found, valid = f"classes {listed(order)}", f"those of the run: {listed(list(known))}"
            raise ConfigError(f"--data {config.data}", found=found, valid=valid)
        order = tuple(known)
    values = sorted({value for each in scans for value in each.first if value != ignore})
    classes = order if order is not None else tuple(map(str, range(max(values, default=0) + 1)))
    unknown = [value for value in values if value >= len(classes)]
    if unknown:
        where = next(each.first[unknown[0]] for each in scans if unknown[0] in each.first)
        raise DataError(
            f"--data {config.data}",
            found=f"the value {unknown[0]} in {where}, which is none of the {len(classes)} classes",
            valid=f"0 to {len(classes) - 1}, or {ignore} for pixels that count nowhere",
            hint=f"--ignore-index {unknown[0]}, if such pixels are to be ignored; else name all classes",
        )
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise DataError(f"--data {config.data}", found=f"{len(classes)} classes", valid=f"2 to {MOST_CLASSES}")
    if ignore < len(classes):
        notes.append(f"pixels of {classes[ignore]} count nowhere (--ignore-index {ignore})")
    pixels = tuple(0 if place == ignore else int(scans[0].counts[place]) for place in range(len(classes)))
    absent = [name for place, name in enumerate(classes) if not pixels[place] and place != ignore]
    if absent:
        notes.append(f"{len(absent)} of {len(classes)} classes have no training pixels: {listed(absent)}")
    made = [
        replace(part, count=len(classes), labels=[classes[at] for at in each.commonest])
        for part, each in zip(parts, scans, strict=True)
    ]
    return replace(source, train=made[0], validation=made[1] if len(made) > 1 else None), classes, pixels


def scan(images: Masked, config: DataConfig) -> Scan:
    """Read all masks of a set, or what is remembered of them.

    Raises:
        DataError: masks that cannot be read, or of another size than their image; the message names them.
    """
    cache = cache_folder(config.cache_dir)
    content = [[each.hex() for each in digests(files, cache)] for files in (images, images.masks)]
    path = cache / "masks" / f"{fingerprint([VERSION, images.ignore, content])[:32]}.json"
    with suppress(Exception):  # nothing there, or damaged: they are read again
        kept = read_json(path)
        first = {int(value): str(name) for value, name in kept["first"].items()}
        return Scan(np.array(kept["counts"]), first, np.array(kept["commonest"]))
    found, wrong = Scan(np.zeros(MOST_CLASSES + 1, np.int64), {}, np.zeros(len(images), np.int64)), list[str]()
    first = {}
    for rows, counts, bad in _scanned(images):
        wrong += bad
        for row, own in zip(rows, counts, strict=True):
            found.counts[:] += own
            first |= {int(value): f"{images.masks.where}/{images.masks.names[row]}"
                      for value in np.flatnonzero(own) if int(value) not in first}  # fmt: skip
            own[images.ignore] = 0
            found.commonest[row] = own.argmax()
    if wrong:
        raise DataError(
            f"--data {config.data}",
            found=f"{len(wrong)} mask{'s' if len(wrong) > 1 else ''} that cannot be used: {listed(wrong)}",
            valid="for each image a mask of its height and width, of class indices",
        )
    with suppress(OSError):  # a folder that cannot be written to: they are read each time
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"counts": found.counts.tolist(), "first": first, "commonest": found.commonest.tolist()}
        write_json(path, kept)
    return replace(found, first=first)


def _scanned(images: Masked) -> Iterator[tuple[range, np.ndarray, list[str]]]:
    """Blocks of rows, the pixels of every value in each (rows, 256), and what is wrong with them."""

    def work(rows: range) -> tuple[range, np.ndarray, list[str]]:
        counts, wrong = np.zeros((len(rows), MOST_CLASSES + 1), np.int64), []
        for place, row in enumerate(rows):
            name = f"{images.masks.where}/{images.masks.names[row]}"
            try:
                values = indices(images.masks.open(row))
                counts[place] = np.bincount(values.ravel(), minlength=MOST_CLASSES + 1)
                size = _size(images, row)
                if size is not None and values.shape != size:
                    wrong.append(f"{name} ({written(values.shape)}, its image {written(size)})")
            except Exception as error:  # decoders raise anything
                wrong.append(f"{name} ({error or type(error).__name__})")
        return rows, counts, wrong

    yield from blocks("reading masks", len(images), work)


def _size(images: Masked, row: int) -> tuple[int, int] | None:
    """Height and width of an image when upright; None where it cannot be read, which its own reader says."""
    try:
        opened = images.open(row)
        return upright_size(opened)
    except (Unreadable, OSError, ValueError, SyntaxError):
        return None


def read_names(path: Path, given: str) -> tuple[str, ...]:
    """Class names from a text file, one a line, in index order.

    Raises:
        DataError: it cannot be read, or has an empty line or a name twice.
    """
    valid = "a text file with one class name a line, in index order"
    if not path.exists():
        raise missing(given, path, valid)
    try:
        classes = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(given, found=str(error), valid=valid) from error
    if not classes or "" in classes:
        raise DataError(given, found=f"line {classes.index('') + 1} is empty" if classes else "no lines", valid=valid)
    doubles = [name for name, count in Counter(classes).items() if count > 1]
    if doubles:
        raise DataError(given, found=f"named twice: {listed(doubles)}", valid=valid)
    return classes
