"""Hugging Face datasets and WebDataset shards: which split, column or shard serves as what."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from factor_transfer.config import DataConfig
from factor_transfer.data.images import (
    UNLABELLED,
    Files,
    Images,
    Indexed,
    Range,
    Source,
    image_extensions,
    natural,
)
from factor_transfer.data.layouts import chosen, missing, split_of, splits_in
from factor_transfer.data.trees import left_by_system, tar_tree
from factor_transfer.util.console import say
from factor_transfer.util.errors import DataError, first_line, listed, near

LABELS = ("label", "labels", "class", "classes", "target", "targets", "category", "categories")
"""What a column of labels is called, where its type does not tell."""

FIRST = (".jpg", ".jpeg", ".png", ".webp")
"""Which image of a sample of WebDataset's is read where it has several, as timm chooses."""


# -- Hugging Face datasets


def hub_dataset(name: str, config: DataConfig, given: str) -> Source:
    """The dataset of a local folder, or of the Hugging Face cache.

    Raises:
        DataError: it cannot be loaded, or has no splits, images or classes that can be told apart.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(given, found=str(error), hint='pip install "factor-transfer[hf]"') from error
    if not Path(name).exists():
        say(f"data: {name} is no local folder; it comes from the Hugging Face cache, or is downloaded")
    try:
        splits = datasets.load_dataset(name, cache_dir=config.data_dir)
    except Exception as error:  # its builders, readers and network raise what they like
        raise DataError(given, found=first_line(error), valid="a dataset's folder, or its name") from error
    found = {split: kind for split in splits if (kind := split_of(split)) is not None}
    _check_local(Path(name), found, given)
    roles = chosen(found, [split for split in splits if split not in found], given, "split")
    features = splits[roles.train].features
    picture = _image_column(features, config.image_column, given)
    label = _label_column(features, config, given)
    own: tuple[str, ...] | None = None
    if label is not None and isinstance(features[label], datasets.ClassLabel):
        own = tuple(features[label].names)

    def part(split: str) -> Images:
        rows = splits[split]
        values: list[Any] = list(rows[label]) if label else [UNLABELLED] * len(rows)
        if any(value is None or (own and value < 0) for value in values):
            raise DataError(given, found=f"images without a class in {split}", valid="a class for every image")
        pictures = rows.select_columns(picture).cast_column(picture, datasets.Image(decode=False))
        _check_images(pictures, picture, split, given)
        return Indexed.of(
            f"hfds/{name} {split}", pictures, [own[value] if own else str(value) for value in values], picture
        )

    validation = part(roles.validation) if roles.validation is not None else None
    columns = f"images are column {picture}, {f'classes column {label}' if label else 'no labels are read'}"
    return Source(part(roles.train), validation, own, (f"splits: {roles.told()}; {columns}",))


def _check_local(folder: Path, found: Mapping[str, str], given: str) -> None:
    """The splits of a local folder are those that its folders are named for.

    The library knows names of splits in lower case alone, and gives everything as train where it knows none.

    Raises:
        DataError: a folder's split was not found, or splits lie within classes.
    """
    card = folder / "README.md"
    if not folder.is_dir() or (card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace")):
        return  # its card says which files are which split
    folders = splits_in(folder, given)
    lost = sorted(set(folders.values()) - set(found.values()))
    if lost:
        raise DataError(
            given,
            found=f"folders {listed(list(folders))}, which the library reads as {listed(list(found)) or 'no split'}",
            valid="train, validation and test, in lower case",
            hint=f"rename the folders, or give --data {folder}",
        )


def _image_column(features: Mapping[str, Any], wanted: str | None, given: str) -> str:
    import datasets

    there = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if wanted in there or (wanted is None and len(there) == 1):
        return wanted or there[0]
    found, valid = f"columns {_shown(features)}", there or "a column of images"
    if wanted is not None:
        raise DataError(f"--image-column {wanted}", found=found, valid=valid, hint=_meant(near(wanted, there)))
    if there:
        found, hint = f"{len(there)} columns of images: {listed(there)}", f"give --image-column {there[0]}"
        raise DataError(given, found=found, valid="one that is named", hint=hint)
    raise DataError(given, found=found, valid=valid)


def _label_column(features: Mapping[str, Any], config: DataConfig, given: str) -> str | None:
    """The column of classes: the one that is named, or the only one there could be; None where no labels are read."""
    import datasets

    wanted = config.label_column
    if wanted is not None and wanted not in features:
        valid = [name for name, feature in features.items() if _unfit(feature) is None]
        hint = _meant(near(wanted, list(features)))
        raise DataError(f"--label-column {wanted}", found=f"columns {_shown(features)}", valid=valid, hint=hint)
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = [name for name in features if name.lower() in LABELS and not isinstance(features[name], datasets.Image)]
    there = [wanted] if wanted is not None else list(dict.fromkeys(classes + named))
    if len(there) != 1:
        if not config.label_weight:
            return None
        what = f"{len(there)} columns that could be the labels: {listed(there)}" if there else "no column of labels"
        raise DataError(
            given,
            found=f"{what}; columns {_shown(features)}",
            valid="one column with one class for each image",
            hint=f"give --label-column {there[0] if there else 'NAME'}",
        )
    why = _unfit(features[there[0]])
    if why is not None:
        if wanted is None and not config.label_weight:
            return None
        fit = [name for name in classes if name != there[0]]
        raise DataError(
            given if wanted is None else f"--label-column {wanted}",
            found=f"column {there[0]}: {why}",
            valid="one class for each image: a ClassLabel, a whole number or a word",
            hint=f"give --label-column {(fit or ['NAME'])[0]}, if another column has it",
        )
    return there[0]


def _unfit(feature: Any) -> str | None:
    """Why a column cannot be read as one class for each image, if so."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return None
    kind = getattr(feature, "dtype", "") if isinstance(feature, datasets.Value) else ""
    if kind.startswith(("int", "uint", "bool", "string", "large_string")):
        return None
    if kind.startswith(("float", "decimal")):
        return f"{kind} numbers, for regression, which is not built yet"
    if isinstance(feature, (list, datasets.List, datasets.LargeList)):
        return "several labels for each image, which is not built yet"
    return f"{kind or type(feature).__name__}, which is no class"


def _shown(features: Mapping[str, Any]) -> str:
    import datasets

    def kind(feature: Any) -> str:
        return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__

    return listed([f"{name} ({kind(feature)})" for name, feature in features.items()])


def _meant(close: Sequence[str]) -> str | None:
    return f"did you mean {listed(close)}?" if close else None


def _check_images(dataset: Any, column: str, split: str, given: str) -> None:
    """That every row has an image, without reading one.

    Raises:
        DataError: a row has no image.
    """
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    pictures = dataset.data.column(column)
    without_path = pc.equal(pc.fill_null(pc.struct_field(pictures, "path"), ""), "")
    empty = pc.indices_nonzero(pc.and_(pc.is_null(pc.struct_field(pictures, "bytes")), without_path)).to_pylist()
    if empty:
        found = f"{len(empty)} rows without an image in {split}: {listed(list(map(str, empty)))}"
        raise DataError(given, found=found, valid="an image in every row")


# -- WebDataset


def shards_dataset(name: str, config: DataConfig, given: str) -> Source:
    """WebDataset shards, indexed by sample key; splits as timm names them, from _info.json or the shards' names.

    Raises:
        DataError: there are none, or their splits, images or classes cannot be told apart.
    """
    root = Path(config.data_dir or name)
    if not root.is_dir():
        raise missing(given, root, "a folder of .tar shards, given as --data-dir")
    info = next((root / file for file in ("_info.json", "info.json") if (root / file).is_file()), None)
    shards, fields, others = _named_shards(root, given) if info is None else (*_listed_shards(info, given), [])
    found = {split: kind for split in shards if (kind := split_of(split)) is not None}
    if not found:
        raise DataError(given, found=f"no shards named train in {root}", valid="NAME-train-0000.tar, or _info.json")
    roles = chosen(found, [*(split for split in shards if split not in found), *others], given, "name")
    notes: list[str] = [f"shards: {roles.told()}"]
    needed = config.label_weight > 0
    parts = [
        _samples(root, shards[split], fields.get(split), given, notes, needed)
        for split in (roles.train, roles.validation)
        if split is not None
    ]
    without = sum(label == UNLABELLED for part in parts for label in part.labels)
    if without:  # not needed: as if none had one
        notes.append(f"{without} samples have no class: no labels are read")
        parts = [replace(part, labels=[UNLABELLED] * len(part)) for part in parts]
    order = None if without else tuple(map(str, range(max(map(int, parts[0].labels)) + 1)))
    return Source(parts[0], parts[1] if len(parts) > 1 else None, order, tuple(notes))


def _listed_shards(info: Path, given: str) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Shards by split, and the field of each split's .json that holds the class, as timm's info file has them."""
    try:
        splits = json.loads(info.read_text(encoding="utf-8"))["splits"]
        shards = {split: [info.parent / file for file in found["filenames"]] for split, found in splits.items()}
        return shards, {split: found["alt_label"] for split, found in splits.items() if found.get("alt_label")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(given, found=f"{info}: {error!r}", valid="timm's info: splits with filenames") from error


def _named_shards(root: Path, given: str) -> tuple[dict[str, list[Path]], dict[str, str], list[str]]:
    """Shards by the word in their names, or in a folder's, that stands for a split; and those that have none."""
    shards: dict[str, list[Path]] = {}
    others = []
    for path in sorted(root.rglob("*.tar"), key=lambda shard: natural(str(shard))):
        inner = path.relative_to(root)
        if any(map(left_by_system, inner.parts)):
            continue
        words = [re.sub(r"\d+$", "", word) for word in re.split(r"[\W_]+", str(inner.with_suffix("")))]
        splits = {kind: word for word in words if (kind := split_of(word)) is not None}
        if len(splits) > 1:
            raise DataError(given, found=f"{inner}: {listed(list(splits.values()))}", valid="one split in a name")
        if splits:
            shards.setdefault(next(iter(splits.values())), []).append(path)
        else:
            others.append(str(inner))
    return shards, {}, others


def _samples(
    root: Path, shards: Sequence[Path], field: str | None, given: str, notes: list[str], needed: bool
) -> Images:
    """The samples that have an image, each with the class of its .cls, or of a `field` of its .json.

    Where classes are not `needed`, a sample without one is UNLABELLED.
    """
    names, labels, ranges = [], [], []
    wanted = image_extensions()
    without: list[str] = []
    several: Counter[str] = Counter()
    for shard in shards:
        samples: dict[str, dict[str, Range]] = {}
        for path, place in tar_tree(shard, given).files.items():
            folder, _, file = path.rpartition("/")
            key, _, extension = file.partition(".")
            samples.setdefault(f"{folder}/{key}", {})[extension.lower()] = place
        for key, parts in samples.items():
            name = f"{shard.relative_to(root)}/{key.lstrip('/')}"
            images = [ext for ext in (*FIRST, *(f".{part}" for part in parts)) if ext in wanted and ext[1:] in parts]
            if not images:
                without.append(name)
                continue
            if len(set(images)) > 1:
                several[", ".join(dict.fromkeys(images))] += 1
            names.append(name)
            labels.append(_class_of(parts, field, f"{root}/{name}", given, needed))
            ranges.append(parts[images[0][1:]])
    if not names:
        raise DataError(given, found=f"no images in {listed([str(shard) for shard in shards])}", valid="jpg, png, webp")
    if without:
        notes.append(f"{len(without)} samples have no image and are left out: {listed(without)}")
    notes += [f"{count} samples have several images ({kinds}): the first kind is read" for kinds, count in
              several.items()]  # fmt: skip
    return Files(str(root), names, labels, ranges)


def _class_of(parts: Mapping[str, Range], field: str | None, name: str, given: str, needed: bool) -> str:
    """The class of a sample; UNLABELLED where it has none, and none is `needed`."""
    try:
        label = json.loads(parts["json"].read())[field] if field else int(parts["cls"].read())
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise ValueError(label)
    except (KeyError, ValueError, TypeError) as error:
        if not needed:
            return UNLABELLED
        wanted = f"a .json with a whole number as {field}" if field else "a .cls with a whole number"
        raise DataError(given, found=f"{name}: no class ({error!r})", valid=wanted) from error
    return str(label)
