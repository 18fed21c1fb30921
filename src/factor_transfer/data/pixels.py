"""Small images decoded once, and the bytes of all images hashed once: both are remembered on disk.

Decoded images lie in a `Store` that later runs and other processes share. It is found by what it was made of: every
file's name and bytes, the size of the images and how they are brought to it, and the decoders. So a copied folder finds
it, and a changed image does not. Whenever it is opened its checksums are checked, and a few images are decoded again.

The hash of an image's bytes (SHA-256) is remembered under its file's path, size, dates (mtime and ctime, in
nanoseconds) and inode, and under the place of its bytes in that file, for tars. A file that was written within the last
seconds is hashed again the next time: it could change once more without another date.

CACHE/pixels/FINGERPRINT/        see `store`: rows of uint8 (H, W, 3)
                        /content.json  images that could not be decoded, and what was met in the others; written last
CACHE/digests/FINGERPRINT.sums   of one folder or tar: its own SHA-256, then 16 bytes of key and 32 of hash each

Shapes: N images of H x W pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import features

from factor_transfer.data.content import Content
from factor_transfer.data.frames import Frame
from factor_transfer.data.images import Files, Images, Range, Unreadable
from factor_transfer.data.store import Store
from factor_transfer.data.views import VERSION
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import RunError
from factor_transfer.util.files import fingerprint, read_json, waiting_lock, write_atomic, write_json
from factor_transfer.util.machine import blocks

PROBES = 4
"""Images of a store that are decoded anew whenever it is opened, and compared."""

SETTLED_SECONDS = 5
"""A file whose dates are younger could change again without another date (network file systems: 1 s, FAT: 2 s)."""

KEY, DIGEST = 16, 32

CONTENT = "content.json"


@dataclass(frozen=True)
class Pixels:
    """All images of one part of a dataset."""

    array: np.ndarray  # (N, H, W, 3) uint8; of an unreadable image, zeros
    unreadable: dict[int, Unreadable]
    content: Content
    digests: tuple[bytes, ...] | None = None
    """SHA-256 of each image's bytes; None where they were not hashed."""


def decoders() -> dict[str, str]:
    """Versions of the libraries that make pixels of files, and views of pixels."""
    codecs = ("jpg", "libjpeg_turbo", "zlib", "libtiff", "webp", "jpg_2000", "avif", "littlecms2")
    found = {"pillow": PIL.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    for name in codecs:
        with suppress(ValueError):  # a name that this Pillow does not know
            found[name] = str(features.version(name))
    return found


# -- decoded once


def decode_once(images: Images, frame: Frame, cache: Path, bits: int | None = None) -> Pixels:
    """All images in `frame`, from their store in `cache` if it is there; else decoded now, and stored.

    Images that lie in memory or in another library's files are decoded into memory each time, and so are all where
    the folder cannot be written to.

    Args:
        images: small images.
        frame: their size H x W, and how they are brought to it.
        cache: the folder of caches.
        bits: see `images.decoded`.
    """
    if not isinstance(images, Files):
        return _in_memory(images, frame, bits)
    sources = tuple(digests(images, cache))
    names = [name.encode(errors="surrogateescape").hex() for name in images.names]
    made_of = {
        "version": VERSION,
        "decoders": decoders(),
        "frame": frame.identity(),
        "bits": bits,
        "images": fingerprint([names, [digest.hex() for digest in sources]]),
    }
    store = Store(cache / "pixels", made_of, len(images), 3 * math.prod(frame.size))
    return replace(_kept(store, images, frame, bits), digests=sources)


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
                    array[row] = images.shown(row, found.image, frame).permute(1, 2, 0).numpy()
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
    return Pixels(array, *read_all(images, bits, frame, array))


def _kept(store: Store, images: Images, frame: Frame, bits: int | None) -> Pixels:
    """The images as the store has them; if it has not, they are decoded, and stored if that can be done."""
    found = _read(store, images, frame, bits)
    if found is not None:
        return found
    with ExitStack() as stack:
        problem = None
        try:
            store.folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(waiting_lock(store.folder.with_suffix(".lock")))  # one process decodes, others wait
        except OSError as error:
            problem = error
        else:
            found = _read(store, images, frame, bits)
        if found is None:
            found = _in_memory(images, frame, bits)
            problem = problem or _write(store, found)
    if problem is not None:
        place = problem.filename or store.folder
        warn(f"decoded images are not kept for later runs ({problem.strerror}: {place}); --cache-dir names their place")
    return found


def _write(store: Store, pixels: Pixels) -> OSError | None:
    """Store decoded images; gives the error where that cannot be done."""
    if (store.folder / CONTENT).exists():
        warn(f"{store.folder} is damaged, or was made by another decoder; the images are decoded again")
    shutil.rmtree(store.folder, ignore_errors=True)
    try:
        store.open().write(np.arange(store.samples), pixels.array.reshape(store.samples, -1))
        reasons = {str(row): error.reason for row, error in pixels.unreadable.items()}
        write_json(store.folder / CONTENT, {"unreadable": reasons, "content": asdict(pixels.content)})
    except OSError as error:
        shutil.rmtree(store.folder, ignore_errors=True)
        return error
    finally:
        store.close()
    say(f"data: decoded images are kept for later runs: {store.folder} ({pixels.array.nbytes / 1e6:,.0f} MB)")
    return None


def _read(store: Store, images: Images, frame: Frame, bits: int | None) -> Pixels | None:
    """The images of a store; None if there is none, or if it is not what was written."""
    if not (store.folder / CONTENT).is_file():
        return None
    try:
        meta: Any = read_json(store.folder / CONTENT)
        bad = {int(row): images.unreadable(int(row), reason) for row, reason in meta["unreadable"].items()}
        rows, content = store.open().whole(), Content(**meta["content"])
        if rows is None:
            return None
        found = Pixels(rows.reshape(-1, *frame.size, 3), bad, content)
        return found if _as_decoded(found, images, frame, bits) else None
    except (OSError, RunError, ValueError, KeyError, TypeError, AttributeError):
        return None
    finally:
        store.close()


def _as_decoded(pixels: Pixels, images: Images, frame: Frame, bits: int | None) -> bool:
    """Whether a few images, drawn at random each time, are still decoded to the same pixels."""
    rows = np.random.default_rng().integers(len(images), size=PROBES).tolist()
    try:
        return all(
            np.array_equal(
                images.shown(row, images.decoded(row, bits).image, frame).permute(1, 2, 0).numpy(), pixels.array[row]
            )
            for row in rows
            if row not in pixels.unreadable
        )
    except Unreadable:
        return False


# -- hashed once


def digests(images: Images, cache: Path) -> list[bytes]:
    """SHA-256 of every image's bytes (of its pixels, where it lies in memory), in order.

    Args:
        images: in files, tars, or elsewhere: those are hashed each time.
        cache: the folder of caches, where digests are remembered; where it cannot be written to they are not.
    """
    if not isinstance(images, Files):
        return _hashed(images, range(len(images)))
    name = fingerprint([str(Path(images.where).expanduser().absolute())])[:32]
    path = cache / "digests" / f"{name}.sums"
    if None not in (found := _known(images, path)[1]):
        return [digest for digest in found if digest is not None]
    with ExitStack() as stack:
        with suppress(OSError):  # where no lock can be had, all processes hash
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(waiting_lock(path.with_suffix(".lock")))
        keys, found = _known(images, path)  # which another process may have made meanwhile
        missing = [row for row, digest in enumerate(found) if digest is None]
        for row, digest in zip(missing, _hashed(images, missing), strict=True):
            found[row] = digest
        complete = [digest for digest in found if digest is not None]
        lines = b"".join(key + digest for key, digest in zip(keys, complete, strict=True) if key is not None)
        with suppress(OSError):
            write_atomic(path, hashlib.sha256(lines).digest() + lines)
    return complete


def _known(images: Files, path: Path) -> tuple[list[bytes | None], list[bytes | None]]:
    """Of every image its key, where it may be remembered, and its digest, where it is."""
    stats: dict[str, os.stat_result | None] = {}
    keys = [_key(place, stats) for place in images.ranges]
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    checksum, lines = data[:DIGEST], data[DIGEST:]
    there: dict[bytes, bytes] = {}
    if hashlib.sha256(lines).digest() == checksum:
        step = KEY + DIGEST
        there = {lines[place : place + KEY]: lines[place + KEY : place + step] for place in range(0, len(lines), step)}
    return keys, [there.get(key) if key is not None else None for key in keys]


def _key(place: Range, stats: dict[str, os.stat_result | None]) -> bytes | None:
    """What a digest is remembered under; None where its file is too young, or not there."""
    if place.path not in stats:
        stats[place.path] = None
        with suppress(OSError):
            stats[place.path] = os.stat(place.path)  # noqa: PTH116 (a million names)
    stat = stats[place.path]
    if stat is None or time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED_SECONDS:
        return None
    known = f"{place.path}\0{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_dev}"
    text = f"{known} {place.offset} {place.size}"
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=KEY).digest()


def _hashed(images: Images, rows: Sequence[int]) -> list[bytes]:
    """The digests of some images."""

    def work(part: range) -> list[bytes]:
        return [hashlib.sha256(images.raw(rows[place])).digest() for place in part]

    return list(itertools.chain.from_iterable(blocks("hashing images", len(rows), work)))
