"""Which folder or tar is the training set and which is measured on, and the classes of a folder's images.

Splits are known by their names, in any case and with the usual additions (`training_set`, `Test-Images`, `val2017`).
What could be read in two ways is refused: a guess would train on test images, or make classes of splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from factor_transfer.data.images import UNLABELLED, Files, Images, Source, natural
from factor_transfer.data.trees import Tree, counted, folder_tree, kind_of_file, left_by_system, tar_tree
from factor_transfer.util.errors import DataError, listed, near

TRAIN, VALIDATION, TEST = "train", "validation", "test"

NAMES = {
    TRAIN: ("train", "training", "trainval"),
    VALIDATION: ("val", "valid", "validation", "dev", "development"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
"""What splits are called, in lower case."""

ADDED = ("set", "data", "dataset", "dir", "folder", "split", "images", "image", "imgs", "img", "pictures", "samples")
"""Words that change nothing: training_set, test-images."""

_KIND = {name: kind for kind, names in NAMES.items() for name in names}
_ADDED = "|".join(sorted(ADDED, key=len, reverse=True))
_WORD = re.compile(rf"({'|'.join(sorted(_KIND, key=len, reverse=True))})({_ADDED})?((19|20)\d\d)?")
_YEAR = re.compile(r"(19|20)\d\d")

FORMS = "digits, a folder or tar of images, torch/NAME, hfds/NAME, wds/NAME or package.module:callable"
"""What `--data` can be."""

WRAPPERS = 3
"""Folders around the splits, each alone in the one above, that are looked through."""


class Roles(NamedTuple):
    """Names by what they serve as."""

    train: str
    validation: str | None
    unused: tuple[str, ...]

    def told(self, shown: Callable[[str], str] = str) -> str:
        """In words, each name as it is `shown`."""
        validation = "none" if self.validation is None else shown(self.validation)
        unused = f"; not used: {listed([shown(name) for name in self.unused])}" if self.unused else ""
        return f"training: {shown(self.train)}; validation: {validation}{unused}"


def split_of(name: str) -> str | None:
    """The split that a name stands for: train, validation, test, or none.

    >>> [split_of(name) for name in ("Training", "val_set", "TestImages", "val2017", "cat", "train_station")]
    ['train', 'validation', 'test', 'validation', None, None]
    """
    kind, rest = _parsed(name)
    return None if rest else kind


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """The names that stand for splits, and for which; where none does, those that share what stands beside the split.

    >>> splits_among(["train", "Testing", "extra"])
    {'train': 'train', 'Testing': 'test'}
    >>> splits_among(["seg_train", "seg_test", "seg_pred"])
    {'seg_train': 'train', 'seg_test': 'test'}
    >>> splits_among(["train_station", "test_tube"])
    {}
    """
    parsed = {name: _parsed(name) for name in names}
    exact = {name: kind for name, (kind, rest) in parsed.items() if kind and not rest}
    if exact:
        return exact
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name, (kind, rest) in parsed.items():
        if kind:
            groups.setdefault(rest, {})[name] = kind
    whole = [group for group in groups.values() if TRAIN in group.values() and len(set(group.values())) > 1]
    return {name: kind for group in whole for name, kind in group.items()}


def _parsed(name: str) -> tuple[str | None, tuple[str, ...]]:
    """The split that a name has in it, where it has one, and its other words."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().removesuffix(".tar")
    words = [word for word in re.split(r"[\W_]+", name) if word]
    kinds, rest = [], []
    for word in words:
        match = _WORD.fullmatch(word)
        if match:
            kinds.append(_KIND[match[1]])
        elif word not in ADDED and not _YEAR.fullmatch(word):
            rest.append(word)
    if kinds == [TRAIN, VALIDATION]:  # train_val
        kinds = [TRAIN]
    return (kinds[0], tuple(rest)) if len(kinds) == 1 else (None, tuple(words))


def chosen(found: Mapping[str, str], others: Iterable[str], given: str, what: str = "folder") -> Roles:
    """Which of the splits that were found is trained on, and which is measured on: validation before test.

    Args:
        found: names, and the split that each stands for.
        others: names that stand for none.
        given: what the user gave.
        what: what the names are names of.

    Raises:
        DataError: there is none to train on, or there are two for one purpose.
    """
    by_kind = {kind: [name for name, its in found.items() if its == kind] for kind in NAMES}
    measured = by_kind[VALIDATION] or by_kind[TEST]
    for purpose, names in (("training", by_kind[TRAIN]), ("validation", measured)):
        if len(names) > 1:
            raise DataError(
                given,
                found=f"{len(names)} {what}s of {purpose} images: {listed(names)}",
                valid=f"one {what} of {purpose} images",
                hint="rename or move the one that is not meant, or put both into one",
            )
    if not by_kind[TRAIN]:
        there = listed([*found, *others]) or "nothing"
        raise DataError(given, found=f"{there} but no train", valid=f"a {what} named {' or '.join(NAMES[TRAIN])}")
    train, validation = by_kind[TRAIN][0], next(iter(measured), None)
    unused = [name for name in (*found, *others) if name not in (train, validation)]
    return Roles(train, validation, tuple(unused))


def missing(given: str, path: Path, valid: str = FORMS) -> DataError:
    """The error for a path that does not exist, with the near names of entries beside it."""
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
    beside = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = near(path.name, [*beside, "digits", "fashion"])
    hint = f"did you mean {listed(close)}?" if close else None
    return DataError(given, found=f"no {path.name} in {parent.resolve()}", valid=valid, hint=hint)


# -- folders and tars


@dataclass(frozen=True)
class _Place:
    """A folder, a tar, or a folder in a tar; read when something of it is asked for."""

    path: Path
    given: str
    part: Tree | None = None
    """What a tar holds here, where it is a folder in a tar."""

    @cached_property
    def packed(self) -> Tree | None:
        """All files of a tar, or of a folder in a tar."""
        return tar_tree(self.path, self.given) if self.part is None and self.path.is_file() else self.part

    @cached_property
    def tree(self) -> Tree:
        """The images in it."""
        return folder_tree(self.path) if self.packed is None else self.packed.images()

    @cached_property
    def inside(self) -> dict[str, _Place]:
        """Folders and tars at its top, by name; without a tar that lies beside the folder that it was made of."""
        if self.packed is not None:
            return {name: _Place(self.path / name, self.given, self.packed.below(name)) for name in self.packed.tops()}
        entries = sorted((e for e in os.scandir(self.path) if not left_by_system(e.name)), key=lambda e: e.name)
        folders = [entry.name for entry in entries if entry.is_dir()]
        files = [entry.name for entry in entries if entry.is_file()]
        tars = [name for name in files if name.lower().endswith(".tar") and name[:-4] not in folders]
        return {name: _Place(self.path / name, self.given) for name in (*folders, *tars)}

    def beside(self) -> dict[str, str]:
        """What else lies at its top, and of what kind it is."""
        if self.packed is not None:
            files = {name: kind_of_file(name) for name in self.packed.files if "/" not in name}
            return files | {name: kind for name, kind in self.packed.left_out.items() if "/" not in name}
        names = [entry.name for entry in os.scandir(self.path) if entry.name not in self.inside]
        return {name: left_by_system(name) or kind_of_file(name) for name in names}

    def is_folder(self) -> bool:
        return self.part is not None or self.path.is_dir()


def read_folder(root: Path, given: str, flat: bool) -> Source:
    """A folder or tar with train/ and a validation set, the same with a tar for each, or class folders alone.

    Where it may be `flat`, images in no class folders are images without labels.

    Raises:
        DataError: no images, or a layout that could be read in two ways.
    """
    if root.is_file() and root.suffix.lower() != ".tar":
        raise DataError(given, found="a file", valid="a folder, or a .tar file")
    place, found = _divided(_Place(root, given))
    where = str(place.path)
    if not found:
        images, notes = _class_folders(place.tree, where, given, flat)
        whole = f"images: {where}, in which no folder is a split"
        return Source(images, None, None, (whole, *notes, *_alike(place.tree)))
    try:
        roles = chosen(found, [name for name in place.inside if name not in found], given)
    except DataError as error:
        if TRAIN in found.values():
            raise
        hint = f"to measure on {next(iter(found))} alone, give {place.path / next(iter(found))} to `evaluate`"
        raise DataError(given, found=error.found, valid="train/ with class folders, or train.tar", hint=hint) from None
    train, notes = _split(place, roles.train, found, given, flat)
    validation, measured = None, roles.validation
    if measured is not None and found[measured] == TEST and not flat and _is_flat(place.inside[measured].tree):
        notes.append(f"{place.path / measured} has no class folders, and cannot be measured on")
        roles = roles._replace(validation=None, unused=(measured, *roles.unused))
    elif measured is not None:
        validation, more = _split(place, measured, found, given, flat)
        notes += more
    beside = place.beside()
    if beside:
        notes.append(f"beside them in {where}, not read: {counted(beside)}")
    return Source(train, validation, None, (roles.told(lambda name: str(place.path / name)), *notes))


def splits_in(folder: Path, given: str) -> dict[str, str]:
    """The folders that are splits, at the top of a folder or of one that it alone wraps, and which.

    Raises:
        DataError: several folders have splits in them.
    """
    return _divided(_Place(folder, given))[1]


def _divided(place: _Place, depth: int = 0) -> tuple[_Place, dict[str, str]]:
    """The folder whose folders are splits, with what each stands for: `place`, or one that it alone wraps.

    Raises:
        DataError: several folders in it have splits in them.
    """
    found = splits_among(place.inside)
    if found or depth == WRAPPERS or not place.inside:
        return place, found
    if len(place.inside) == 1:
        inner, found = _divided(next(iter(place.inside.values())), depth + 1)
        return (inner, found) if found else (place, {})
    nested = {name: splits_among(child.inside) for name, child in place.inside.items() if child.is_folder()}
    nested = {name: found for name, found in nested.items() if found}
    if not nested:
        return place, {}
    others = [name for name, child in place.inside.items() if name not in nested and child.tree.files]
    if len(nested) == 1 and not others:
        ((name, found),) = nested.items()
        return place.inside[name], found
    _check_turned(nested, str(place.path), place.given)
    return place, {}


def _check_turned(nested: Mapping[str, Mapping[str, str]], where: str, given: str) -> None:
    """Splits within class folders would mix what is tested on into what is trained on.

    Raises:
        DataError: a folder has folders of two splits or more.
    """
    inner = [f"{name}/{split}" for name, found in nested.items() if len(set(found.values())) > 1 for split in found]
    if inner:
        raise DataError(
            given,
            found=f"splits inside of other folders in {where}: {listed(inner)}",
            valid="train/CLASS/image.jpg and validation/CLASS/image.jpg",
            hint="put the class folders into the splits; or give the path of the one folder that holds the data",
        )


def _split(place: _Place, name: str, found: Mapping[str, str], given: str, flat: bool) -> tuple[Images, list[str]]:
    """The images of one split. A folder that alone is in it and is called likewise (train/train/) is looked into."""
    tree, where = place.inside[name].tree, place.path / name
    while len(tops := tree.tops()) == 1 and _parsed(tops[0])[0] == found[name]:
        inner = tree.below(tops[0])
        if any("/" not in file for file in tree.files) or (_is_flat(inner) and not flat):
            break
        tree, where = inner, where / tops[0]
    return _class_folders(tree, str(where), given, flat)


def _is_flat(tree: Tree) -> bool:
    return bool(tree.files) and not any("/" in name for name in tree.files)


def _class_folders(tree: Tree, where: str, given: str, flat: bool) -> tuple[Images, list[str]]:
    """The images of a tree, each in the class that its topmost folder names; UNLABELLED where it may be `flat`."""
    images, left_out = tree.files, counted(tree.left_out)
    notes = [f"in {where}, not read: {left_out}"] if left_out else []
    if not images:
        found = f"no images in {where}" + (f", but {left_out}" if left_out else "")
        raise DataError(given, found=found, valid="class folders of images: .jpg, .png, .webp and what else PIL reads")
    bare = flat and _is_flat(tree)
    names = sorted((name for name in images if bare or "/" in name), key=natural)
    if not names:
        found = f"{len(images)} images in {where}, but no class folders"
        hint = "without labels, give --label-weight 0"
        if split_of(Path(where).name):
            hint += f"; where {Path(where).name} is a class, put all class folders into a folder train/"
        raise DataError(given, found=found, valid="class/image.jpg", hint=hint)
    loose = sorted(images.keys() - set(names), key=natural)
    if loose:
        notes.append(f"{len(loose)} images in {where} lie in no class folder and are left out: {listed(loose)}")
    filled = {name.partition("/")[0] for name in names}
    empty = sorted({folder.partition("/")[0] for folder in tree.folders} - filled, key=natural)
    if empty and not bare:
        raise DataError(
            given,
            found=f"{len(empty)} class folders without an image in {where}: {listed(empty)}",
            valid="at least one image in every class folder",
            hint="fill or remove them",
        )
    _check_turned({name: splits_among(inner) for name, inner in _seconds(tree).items()}, where, given)
    labels = [UNLABELLED if bare else name.partition("/")[0] for name in names]
    return Files(where, names, labels, [images[name] for name in names]), notes


def _seconds(tree: Tree) -> dict[str, set[str]]:
    """The folders inside of each class folder that hold images."""
    found: dict[str, set[str]] = {}
    for name in tree.files:
        first, *inner = name.split("/")[:-1] or [""]
        found.setdefault(first, set()).update(inner[:1] or [""])
    return found


def _alike(tree: Tree) -> list[str]:
    """What is said where class folders look like splits of other names."""
    seconds = _seconds(tree)
    same = next(iter(seconds.values()))
    if len(seconds) > 1 and len(same) > 1 and "" not in same and all(each == same for each in seconds.values()):
        return [
            f"the folders {listed(sorted(seconds, key=natural))} all hold {listed(sorted(same, key=natural))}, and are "
            "read as classes: splits would have to be called train and validation"
        ]
    return []
