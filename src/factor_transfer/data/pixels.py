"""Small images, decoded once: into a memory-mapped store that later runs and other processes share.

A store is found by what it was made of: a hash over every file's name and bytes, the size of the images and how they
are brought to it, and the decoders. So a copied folder finds it, and a changed image does not. It is written under
another name, synced and then renamed: it is whole or absent. Its pixels are hashed again whenever it is opened, and a
few images are decoded again.

CACHE/pixels/FINGERPRINT.u8      uint8 (N, H, W, 3)
                         .json   its hash, the images that could not be decoded, and what was met in the others

Shapes: N images of H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from factor_transfer.data.content import Content, from_file, to_file
from factor_transfer.data.digests import decoders, digests
from factor_transfer.data.frames import Frame
from factor_transfer.data.images import Files, Images, Unreadable
from factor_transfer.data.views import VERSION
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import RunError
from factor_transfer.util.files import fingerprint, read_json, waiting_lock, write_json
from factor_transfer.util.machine import blocks

PROBES = 4
"""Images of a store that are decoded anew whenever it is opened, and compared."""


@dataclass(frozen=True)
class Pixels:
    """All images of one part of a dataset."""

    array: np.ndarray  # (N, H, W, 3) uint8; of an unreadable image, zeros
    unreadable: dict[int, Unreadable]
    content: Content
    digest: str
    """SHA-256 of `array`."""
    sources: tuple[bytes, ...] | None = None
    """SHA-256 of each image's bytes, by which the store is found; None where they are not kept in one."""


def decode_once(images: Images, frame: Frame, folder: Path, bits: int | None = None) -> Pixels:
    """All images in `frame`, from the store in `folder` where it has them, else decoded now and stored there.

    Images that lie in memory or in another library's files are decoded into memory each time, and so are all where
    the folder cannot be written to.

    Args:
        images: small images.
        frame: their size H x W, and how they are brought to it.
        folder: where stores are kept.
        bits: see `rgb.decoded`.
    """
    if not isinstance(images, Files):
        return _in_memory(images, frame, bits)
    sources = tuple(digests(images, folder.parent))
    names = [name.encode(errors="surrogateescape").hex() for name in images.names]
    what = {
        "version": VERSION,
        "decoders": decoders(),
        "frame": frame.identity(),
        "bits": bits,
        "images": [names, [digest.hex() for digest in sources]],
    }
    path = folder / f"{fingerprint(what)[:32]}.u8"
    return replace(_stored(path, images, frame, bits), sources=sources)


def _stored(path: Path, images: Images, frame: Frame, bits: int | None) -> Pixels:
    """The store at `path`; where there is none, the images are decoded, and the store is made if it can be."""
    found = _opened(path, images, frame, bits)
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(path.with_suffix(".lock")):  # one decodes, the others read what it made
            return _opened(path, images, frame, bits) or _kept(path, _in_memory(images, frame, bits))
    except OSError as error:
        _warn_not_kept(error, path)
    return _in_memory(images, frame, bits)


def read_all(
    images: Images, bits: int | None, frame: Frame | None = None, array: np.ndarray | None = None
) -> tuple[dict[int, Unreadable], Content]:
    """Decode all images, into `array` (N, H, W, 3) where given: the unreadable ones, and what the others hold."""

    def work(rows: range) -> tuple[dict[int, Unreadable], Content]:
        bad, content = {}, Content()
        for row in rows:
            try:
                found = images.decoded(row, bits)
                if array is not None and frame is not None:
                    array[row] = images.framed(row, found.image, frame).permute(1, 2, 0).numpy()
                content.add(images.names[row], found)
            except Unreadable as error:
                bad[row] = error
        return bad, content

    unreadable: dict[int, Unreadable] = {}
    content = Content()
    for bad, more in blocks("reading images", len(images), work):
        unreadable |= bad
        content.add_all(more)
    return unreadable, content


def _in_memory(images: Images, frame: Frame, bits: int | None) -> Pixels:
    array = np.zeros((len(images), *frame.size, 3), np.uint8)
    unreadable, content = read_all(images, bits, frame, array)
    return Pixels(array, unreadable, content, _digest(array))


def _kept(path: Path, pixels: Pixels) -> Pixels:
    """Publish decoded images as a store; where the disk is too full they stay in memory."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(pixels.array.data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        reasons = {str(row): error.reason for row, error in pixels.unreadable.items()}
        found = {"sha256": pixels.digest, "unreadable": reasons, "content": to_file(pixels.content)}
        write_json(path.with_suffix(".json"), found)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        _warn_not_kept(error, path)
    else:
        say(f"data: decoded images are kept for later runs: {path} ({pixels.array.nbytes / 1e6:,.0f} MB)")
    return pixels


def _opened(path: Path, images: Images, frame: Frame, bits: int | None) -> Pixels | None:
    """The store at `path`; None if there is none, or if it is not what was written."""
    try:
        meta: Any = read_json(path.with_suffix(".json"))
        array = np.memmap(path, np.uint8, "r", shape=(len(images), *frame.size, 3))
        bad = {int(row): images.unreadable(int(row), reason) for row, reason in meta["unreadable"].items()}
        whole = path.stat().st_size == array.nbytes and _digest(array) == meta["sha256"]
        if whole and _as_decoded(array, images, bad, frame, bits):
            return Pixels(array, bad, from_file(meta["content"]), meta["sha256"])
    except (FileNotFoundError, PermissionError):
        return None
    except (OSError, RunError, ValueError, KeyError, TypeError, AttributeError):
        pass
    warn(f"{path} is damaged, or was made by another decoder; the images are decoded again")
    with suppress(OSError):
        path.with_suffix(".json").unlink()
    return None


def _as_decoded(
    array: np.ndarray, images: Images, bad: Mapping[int, Unreadable], frame: Frame, bits: int | None
) -> bool:
    """Whether a few images, drawn at random each time, are still decoded to the pixels (N, H, W, 3) of a store."""
    rows = [row for row in np.random.default_rng().integers(len(images), size=PROBES).tolist() if row not in bad]
    again = np.zeros((len(rows), *array.shape[1:]), np.uint8)
    try:
        for place, row in enumerate(rows):
            again[place] = images.framed(row, images.rgb(row, bits), frame).permute(1, 2, 0).numpy()
    except Unreadable:
        return False
    return np.array_equal(again, array[rows])


def _warn_not_kept(error: OSError, path: Path) -> None:
    place = error.filename or path
    warn(f"decoded images are not kept for later runs ({error.strerror}: {place}); --cache-dir names their place")


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.data).hexdigest()
