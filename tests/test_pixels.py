"""The pixel store: whatever happens to its files, the pixels are those of the images."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from factor_transfer.config import DataConfig
from factor_transfer.data import images as images_module
from factor_transfer.data import pixels as pixels_module
from factor_transfer.data.frames import Frame
from factor_transfer.data.images import Files, Images
from factor_transfer.data.pixels import PROBES, decode_once
from factor_transfer.data.sources import open_source
from processes import Started

SIZE = Frame.of(16)


@pytest.fixture
def files(images: Path) -> Images:
    """36 files of 16x16."""
    found = open_source(DataConfig(data=str(images))).train
    assert isinstance(found, Files)
    return found


def right(images: Images) -> np.ndarray:
    return np.stack([np.asarray(images.decoded(row).image) for row in range(len(images))])


def decoding_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the few images that are compared."""
    real, left = Images.decoded, iter(range(PROBES))

    def decoded(self: Images, row: int, bits: int | None = None) -> Any:
        if next(left, None) is None:
            raise AssertionError("an image was decoded")
        return real(self, row, bits)

    monkeypatch.setattr(Images, "decoded", decoded)


def stores(folder: Path) -> list[Path]:
    return [path for path in (folder / "pixels").iterdir() if path.is_dir()]


def store(folder: Path) -> Path:
    (found,) = stores(folder)
    return found


def test_decode_once__decodes_once(
    files: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = right(files)
    first = decode_once(files, SIZE, tmp_path)
    assert "kept for later runs" in capsys.readouterr().err
    decoding_forbidden(monkeypatch)
    second = decode_once(files, SIZE, tmp_path)
    for found in (first, second):
        assert np.array_equal(found.array, expected)
    assert isinstance(second.array, np.memmap)


def test_decode_once__a_copied_dataset_finds_it(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_once(open_source(DataConfig(data=str(images))).train, SIZE, tmp_path / "store")
    shutil.copytree(images, tmp_path / "copy")
    decoding_forbidden(monkeypatch)
    decode_once(open_source(DataConfig(data=str(tmp_path / "copy"))).train, SIZE, tmp_path / "store")


@pytest.mark.parametrize("change", ["pixel", "size", "order"])
def test_decode_once__anything_else_is_another_store(files: Images, tmp_path: Path, change: str) -> None:
    first = decode_once(files, SIZE, tmp_path)
    size = SIZE
    if change == "pixel":
        path = Path(files.ranges[5].path)  # type: ignore[attr-defined]
        before = path.stat()
        values = np.asarray(Image.open(path)).copy()
        values[3, 3, 0] ^= 1
        Image.fromarray(values).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # its date tells nothing
    elif change == "size":
        size = Frame.of(12)
    else:
        path = Path(files.ranges[0].path)  # type: ignore[attr-defined]
        path.rename(path.with_name("zzz.png"))
        files = open_source(DataConfig(data=str(path.parents[2]))).train
    again = decode_once(files, size, tmp_path)
    assert not np.array_equal(again.array, first.array)
    assert len(stores(tmp_path)) == 2
    if size == SIZE:
        assert np.array_equal(again.array, right(files))


@pytest.mark.parametrize("damage", ["bit", "short", "long", "no json", "half json", "other json"])
def test_decode_once__a_damaged_store_is_made_anew(
    files: Images, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    decode_once(files, SIZE, tmp_path)
    path, json = store(tmp_path) / "part-000.rows", store(tmp_path) / "content.json"
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[1000] ^= 4
    path.write_bytes({"short": data[:-1], "long": data + b"\0"}.get(damage, data))
    if damage == "no json":
        json.unlink()
    elif damage == "half json":
        json.write_text(json.read_text()[:20])
    elif damage == "other json":
        json.write_text("[]")
    capsys.readouterr()
    for time_ in range(2):
        assert np.array_equal(decode_once(files, SIZE, tmp_path).array, right(files))
        assert ("is damaged" in capsys.readouterr().err) == (time_ == 0 and damage not in ("no json", "long"))


@pytest.mark.parametrize("what", ["codec", "code"])
def test_decode_once__another_decoder_makes_another_store(
    files: Images, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its version tells, and where that does not, a few images."""
    decode_once(files, SIZE, tmp_path)
    if what == "codec":
        monkeypatch.setattr(pixels_module.features, "version", lambda name: "3.0" if name == "libjpeg_turbo" else "1")
    real = images_module.decoded

    def inverted(*given: Any) -> Any:
        found = real(*given)
        return found._replace(image=ImageOps.invert(found.image))

    monkeypatch.setattr(images_module, "decoded", inverted)
    capsys.readouterr()
    assert np.array_equal(decode_once(files, SIZE, tmp_path).array, right(files))
    assert ("made by another decoder" in capsys.readouterr().err) is (what == "code")
    assert len(stores(tmp_path)) == (2 if what == "codec" else 1)


def test_decode_once__unreadable_images_are_remembered(
    files: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(files.ranges[7].path).write_bytes(b"no image")  # type: ignore[attr-defined]
    first = decode_once(files, SIZE, tmp_path)
    decoding_forbidden(monkeypatch)
    second = decode_once(files, SIZE, tmp_path)
    assert list(first.unreadable) == list(second.unreadable) == [7]
    assert second.unreadable[7].name == first.unreadable[7].name
    assert second.unreadable[7].reason == first.unreadable[7].reason


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 kB."""
    mount = tmp_path / "full"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def test_decode_once__without_room_or_folder_pixels_stay_in_memory(
    files: Images, tmp_path: Path, full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (full_disk, a_file(tmp_path)):
        assert np.array_equal(decode_once(files, SIZE, folder).array, right(files))
        assert "not kept" in capsys.readouterr().err
    assert not stores(full_disk)


def in_process(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def test_decode_once__survives_kills_at_any_moment(files: Images, tmp_path: Path) -> None:
    expected, chance = right(files), random.Random(0)
    for number in range(12):
        folder = tmp_path / str(number)
        child = in_process(lambda folder=folder: decode_once(files, SIZE, folder))  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert np.array_equal(decode_once(files, SIZE, folder).array, expected)
        assert (store(folder) / "content.json").is_file(), "the half of a store is made whole"


def test_decode_once__waits_for_the_process_that_decodes(images: Path, files: Images, tmp_path: Path) -> None:
    wanted = decode_once(files, SIZE, tmp_path).array
    path = store(tmp_path)
    shutil.rmtree(path)
    script = f"""
from pathlib import Path
from factor_transfer.config import DataConfig
from factor_transfer.data.frames import Frame
from factor_transfer.data.pixels import decode_once
from factor_transfer.data.sources import open_source
from processes import Started
files = open_source(DataConfig(data={str(images)!r})).train
Path({str(tmp_path / "begins")!r}).touch()
print(decode_once(files, Frame.of(16), Path({str(tmp_path)!r})).array.sum())
"""
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = Started([], code=script)
        while not (tmp_path / "begins").exists():
            assert other.running(), other.finished().stderr
            time.sleep(0.01)
        time.sleep(1)
        assert not path.exists()
    assert other.finished(60).stdout.strip() == str(wanted.sum())
    assert path.exists()
