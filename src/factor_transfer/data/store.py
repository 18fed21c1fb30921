"""Rows of bytes on disk, each with a checksum: where decoded images and the teacher's factors are kept.

A store is found by what its rows were made of: the name of its folder is a hash of it, and of `FORMAT`. With any other
value it is another store. A row that was half written at a crash, lies at another's place or has a wrong bit does not
fit its checksum, and is not given. Several processes may read and write at once, as long as they write the same rows.

FOLDER/FINGERPRINT/meta.json     what the fingerprint is of
                   part-000.rows rows of one size, one after the other; the disk is reserved when the file is made
                   part-000.crc  a uint64 for each row: 2**32 + CRC-32 of its place and bytes; 0: there is no row yet
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from factor_transfer.util.files import fingerprint, reserve, write_json

FORMAT = 1
"""Raise it when the layout of a file here changes: stores of another format are then neither found nor read."""

PRESENT = 1 << 32
"""Set in the checksum of every row that was written, so that it is never the 0 of an empty place."""


class Store:
    """A folder of rows. Nothing is on disk before `open`.

    Args:
        folder: where stores are kept.
        made_of: all that a row depends on, as plain values.
        samples: rows of each part.
        row_bytes: bytes of a row.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()), {"images": "ab"}, samples=10, row_bytes=2).open()
    >>> store.write(np.array([3]), np.array([[7, 8]], np.uint8))
    >>> store.read(np.array([3])), store.read(np.array([3, 4]))
    (array([[7, 8]], dtype=uint8), None)
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any], samples: int, row_bytes: int) -> None:
        self.meta = {"format": FORMAT, "samples": samples, "row_bytes": row_bytes, **made_of}
        self.folder = folder / fingerprint(self.meta)[:32]
        self.samples, self.row_bytes = samples, row_bytes
        self._handles: list[int] = []
        self._maps: list[tuple[np.ndarray, np.ndarray]] = []

    def open(self, parts: int = 1) -> Store:
        """Open the files of so many parts, and make those that are missing; there may be more than before.

        Raises:
            OSError: the folder cannot be written to, or the disk is too full. What had not been there is gone again.
        """
        new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "meta.json").is_file():
                write_json(self.folder / "meta.json", self.meta)
            for part in range(parts):
                rows = self._open(f"part-{part:03}.rows", np.uint8, (self.samples, self.row_bytes))
                self._maps.append((rows, self._open(f"part-{part:03}.crc", np.uint64, (self.samples,))))
        except OSError:
            self.close()
            if new:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def _open(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        """A file as a read-only memory map; its handle, which writes, is added to the others.

        Nothing is written through a map: on a full disk that would end the process (SIGBUS).
        """
        path, size = self.folder / name, int(np.prod(shape)) * np.dtype(dtype).itemsize
        kept = path.is_file() and not os.access(path, os.W_OK)  # a store that may only be read
        self._handles.append(os.open(path, os.O_RDONLY if kept else os.O_RDWR | os.O_CREAT, 0o644))
        if not kept or os.fstat(self._handles[-1]).st_size < size:
            reserve(self._handles[-1], size)
        return np.memmap(path, dtype, "r", shape=shape)

    def read(self, index: np.ndarray, part: int = 0) -> np.ndarray | None:
        """Rows `index` (B,): uint8 (B, bytes). None unless each of them is there and fits its checksum."""
        rows, sums = self._maps[part]
        marks = sums[index]
        if not marks.all():
            return None
        found = np.ascontiguousarray(rows[index])  # a copy: what is checked is what is used
        whole = all(_mark(row, at, part) == mark for row, at, mark in zip(found, index, marks, strict=True))
        return found if whole else None

    def write(self, index: np.ndarray, values: np.ndarray, part: int = 0) -> None:
        """Store `values`, uint8 (B, bytes), as rows `index` (B,).

        Raises:
            OSError: the disk fails; what was there stays readable.
        """
        rows, sums = self._handles[2 * part : 2 * part + 2]
        for at, row in zip(index.tolist(), values, strict=True):
            os.pwrite(rows, row.tobytes(), at * self.row_bytes)
            os.pwrite(sums, np.uint64(_mark(row, at, part)).tobytes(), at * 8)

    def written(self, part: int = 0) -> np.ndarray:
        """The places that have a row: int64."""
        return np.flatnonzero(self._maps[part][1])

    def whole(self, part: int = 0) -> np.ndarray | None:
        """All rows as a memory map, uint8 (N, bytes). None unless each of them is there and fits its checksum."""
        rows, sums = self._maps[part]
        marks = zip(np.asarray(rows), sums.tolist(), strict=True)  # rows of a plain array are made faster than of a map
        return rows if all(_mark(row, at, part) == mark for at, (row, mark) in enumerate(marks)) else None

    def close(self) -> None:
        """Close the files; maps that were given stay readable."""
        self._maps.clear()
        while self._handles:
            os.close(self._handles.pop())


def _mark(row: np.ndarray, place: int, part: int) -> int:
    """The checksum of a row (uint8, contiguous) at its place."""
    return PRESENT | zlib.crc32(row.data, zlib.crc32(f"{place} {part}".encode()))
