"""The bytes of images: hashed once, and never taken for others."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from factor_transfer.config import DataConfig
from factor_transfer.data import pixels as module
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.data.images import Files, Images, Range
from factor_transfer.data.pixels import digests
from factor_transfer.data.sources import open_source


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Range]:
    """What is read, once; the files' dates need not be old."""
    found: list[Range] = []
    real = Range.read
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1e9)
    monkeypatch.setattr(Range, "read", lambda self: found.append(self) or real(self))  # type: ignore[func-returns-value]
    return found


def images_in(folder: Path) -> Images:
    return open_source(DataConfig(data=str(folder))).train


def tarred(folder: Path) -> Path:
    for part in ("train", "validation"):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            tar.add(folder / part, part)
        shutil.rmtree(folder / part)
    return folder


@pytest.mark.parametrize("form", [Path, tarred])
def test_digests__are_read_once(images: Path, tmp_path: Path, form: Callable[[Path], Path], read: list[Range]) -> None:
    where = form(images)
    first = digests(images_in(where), tmp_path / "store")
    assert len(read) == len(first) == len(set(first)) == 36
    assert digests(images_in(where), tmp_path / "store") == first
    assert len(read) == 36
    assert digests(images_in(where), tmp_path / "elsewhere") == first


@pytest.mark.parametrize("change", ["in place", "replaced", "swapped", "tar"])
def test_digests__bytes_of_the_same_size_and_date_are_noticed(
    images: Path, tmp_path: Path, change: str, read: list[Range]
) -> None:
    if change == "tar":
        tarred(images)
    found = images_in(images)
    first = digests(found, tmp_path)
    path = Path(found.ranges[5].path)  # type: ignore[attr-defined]
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[found.ranges[5].offset + 60] ^= 1  # type: ignore[attr-defined]
    if change == "swapped":
        other = path.with_name("other")
        path.rename(other)
        path.with_name("006.png").rename(path)
        other.rename(path.with_name("006.png"))
    elif change == "replaced":
        path.with_name("new").write_bytes(data)
        path.with_name("new").rename(path)
    else:
        path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = digests(images_in(images), tmp_path)
    assert [row for row in range(36) if again[row] != first[row]] == ([5, 6] if change == "swapped" else [5])


def test_digests__a_young_file_is_hashed_again(
    images: Path, tmp_path: Path, read: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED_SECONDS", 1e9)
    for _ in range(2):
        digests(images_in(images), tmp_path)
    assert len(read) == 72


@pytest.mark.parametrize("damage", ["bit", "short", "empty"])
def test_digests__a_damaged_store_is_made_anew(images: Path, tmp_path: Path, damage: str, read: list[Range]) -> None:
    first = digests(images_in(images), tmp_path)
    (path,) = tmp_path.rglob("*.sums")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes({"bit": bytes(data), "short": path.read_bytes()[:-48], "empty": b""}[damage])
    assert digests(images_in(images), tmp_path) == first
    assert len(read) == 72


def test_digests__without_a_folder_are_hashed_each_time(images: Path, tmp_path: Path, read: list[Range]) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert len(set(digests(images_in(images), tmp_path / "file" / "store"))) == 36


# -- the data's fingerprint


def opened(folder: Path, cache: Path, **changed: Any) -> Dataset:
    transform = changed.pop("transform", None)
    config = DataConfig(data=str(folder), cache_dir=str(cache), workers=0, **changed)
    return open_data(config, lambda: 112, transform)


@pytest.mark.parametrize("kind", ["bmp", "ppm", "tiff"])
def test_fingerprint__large_images_of_the_same_bytes_long_are_other_images(tmp_path: Path, kind: str) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (128, 128), (number, 0, 0)).save(tmp_path / "images" / name / f"{number}.{kind}")
    first = opened(tmp_path / "images", tmp_path / "cache").fingerprint
    assert opened(tmp_path / "images", tmp_path / "cache").fingerprint == first
    path = tmp_path / "images" / "cat" / f"2.{kind}"
    size = path.stat().st_size
    Image.new("RGB", (128, 128), (99, 0, 0)).save(path)
    assert path.stat().st_size == size
    assert opened(tmp_path / "images", tmp_path / "cache").fingerprint != first


def test_fingerprint__small_images_are_hashed_once_where_nothing_remembers_them(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    real = Files.raw
    monkeypatch.setattr(Files, "raw", lambda self, row: hashed.append(row) or real(self, row))  # type: ignore[func-returns-value]
    (tmp_path / "cache").write_text("")
    assert opened(images, tmp_path / "cache").fingerprint
    assert len(hashed) == 36 + 18


def test_fingerprint__is_of_the_images_and_not_of_how_they_are_kept(images: Path, tmp_path: Path) -> None:
    first = opened(images, tmp_path / "cache").fingerprint
    assert opened(images, tmp_path / "cache", pixel_cache_gb=0.0).fingerprint == first
    copy = shutil.copytree(images, tmp_path / "copy")
    assert opened(copy, tmp_path / "other cache").fingerprint == first
    assert opened(copy, tmp_path / "other cache", hflip=0.25).fingerprint != first
    assert opened(copy, tmp_path / "other cache", train_images=9).fingerprint != first


class Rarely:
    """Turns an image upside down, now and then."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if np.random.random() < self.p else image


def test_fingerprint__a_transform_that_acts_rarely_counts_by_its_code(images: Path, tmp_path: Path) -> None:
    found = {p: opened(images, tmp_path / "cache", transform=Rarely(p)) for p in (0.0, 1e-9)}
    assert len({each.fingerprint for each in found.values()}) == 2
    assert len({each.transform_code() for each in found.values()}) == 2
    assert opened(images, tmp_path / "cache", transform=Rarely(0.0)).fingerprint == found[0.0].fingerprint
