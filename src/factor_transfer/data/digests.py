"""What images hold: SHA-256 of the bytes of each, computed once and remembered.

A digest is remembered under its file's path, size, dates (mtime and ctime, in nanoseconds) and inode, and under the
place of its bytes in that file, so that a tar is read once, too. A file that was written within the last seconds is
hashed again the next time: it could change once more without another date.

CACHE/digests/ FINGERPRINT.sums   of one folder or tar: its own SHA-256, then 16 bytes of key and 32 of digest each
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import features

from factor_transfer.data.images import Files, Images
from factor_transfer.data.trees import Range
from factor_transfer.util.files import fingerprint, waiting_lock, write_atomic
from factor_transfer.util.machine import blocks

SETTLED_SECONDS = 5
"""A file whose dates are younger could change again within their grain (network file systems: 1 s, FAT: 2 s)."""

KEY, DIGEST = 16, 32


def decoders() -> dict[str, str]:
    """Versions of what makes pixels of files, and views of pixels."""
    codecs = ("jpg", "libjpeg_turbo", "zlib", "libtiff", "webp", "jpg_2000", "avif", "littlecms2")
    found = {"pillow": PIL.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    for name in codecs:
        with suppress(ValueError):  # a name that this Pillow does not know
            found[name] = str(features.version(name))
    return found


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
