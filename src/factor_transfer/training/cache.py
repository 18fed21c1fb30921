"""The factor cache: the frozen teacher's outputs on disk, so that the teacher runs once for each sample and view.

A view is replayable (see `views`), so its factor is too; and so is whatever else of the teacher's the terms read. It is
used only if it is provably the right one:

* the folder's name is a fingerprint of all that a factor depends on (teacher with its code, layer, paraphraser, bytes
  of the images, views, versions of libraries and decoders, precision); with any other value the cache is another one;
* when it is opened, rows drawn at random are compared with what the teacher gives for them now;
* each row carries a checksum over its bytes, sample and view, written after the row. A row that was half written at a
  crash, lies at another's place or has lost a bit fails it, and is computed again.

CACHE/FINGERPRINT/meta.json      what the fingerprint is of, and the shape of a row
                  view-000.f16   a row for each sample, its outputs one after the other in fp16; preallocated: a full
                                 disk is met before it can kill
                  view-000.crc   a uint64 for each sample: 2**32 + CRC-32; 0 where there is no row yet

Shapes: N samples, V views, B samples of one batch, factors (K, H, W).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.util.console import say, warn
from factor_transfer.util.files import fingerprint, read_json, reserve, write_json

VERSION = 4
"""Raise it when the layout of a row or a file changes, or how the teacher computes."""

PRESENT = 1 << 32
"""Set in the checksum of every row that was written, so that it is never the 0 of an empty place."""

PROBES, PROBED_VIEWS = 32, 4
"""Rows that are compared with the live teacher whenever a cache is opened, and of how many views."""

ROWS, HALF_ROWS = 5e-3, 6e-2
"""How far a row may be from the live teacher's, relatively (L2): in float32, and in bf16.

Of ResNet-56 on an AVX2 machine, 32 images, the largest: in float32 3e-4, all of it fp16's, with another instruction
set, layout or batch; in bf16 9e-3 with another instruction set, and 2.3e-2 with batch norms folded into convolutions.
"""

AUTO_VIEWS = 8
"""Most views that `auto` takes; more bring little and cost disk."""

SMALLEST = 2.0**-25
"""What rounding to fp16 does to the smallest values."""

SHARE = 0.5
"""Most of the free disk, and of the memory, that `auto` fills."""


class FactorCache:
    """Teacher outputs of `samples` x `views`, read and written by row; safe under kill -9 and several processes.

    Args:
        folder: where caches are kept.
        identity: all that an output depends on, as plain values; see the module's docstring.
        shapes: of each output for one sample, by its name: `factor` (K, H, W).
        samples: N.
        views: V.

    Raises:
        OSError: the folder cannot be written to, or the disk is too full.

    >>> import tempfile
    >>> cache = FactorCache(Path(tempfile.mkdtemp()), {"teacher": "ab"}, {"factor": (2, 1, 1)}, samples=10, views=1)
    >>> cache.write(np.array([3]), 0, {"factor": torch.ones(1, 2, 1, 1)})
    >>> cache.read(np.array([3]), 0)["factor"].flatten().tolist(), cache.read(np.array([3, 4]), 0)
    ([1.0, 1.0], None)
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], samples: int, views: int
    ) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.samples, self.views = samples, views
        outputs = {name: list(shape) for name, shape in shapes.items()}
        self.meta = {"version": VERSION, "outputs": outputs, "samples": samples, "identity": dict(identity)}
        self.folder = folder / fingerprint(self.meta)[:32]
        self._elements = [math.prod(shape) for shape in self.shapes.values()]
        self.row_bytes = 2 * sum(self._elements)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "meta.json", self.meta)
        self._handles: list[int] = []
        try:
            self._files = [self._open(view) for view in range(views)]
        except OSError:
            self.close()
            raise

    def read(self, index: np.ndarray, view: int) -> dict[str, Tensor] | None:
        """Outputs (B, ...) in fp16 of samples `index` (B,) by name, or None unless each is there and whole."""
        rows, sums, _ = self._files[view]
        marks = sums[index]
        if not marks.all():
            return None
        found = np.ascontiguousarray(rows[index])  # a copy: what is checked is what is used
        if any(_mark(row, sample, view) != mark for row, sample, mark in zip(found, index, marks, strict=True)):
            return None
        parts = torch.split(torch.from_numpy(found.view(np.float16)), self._elements, dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def write(self, index: np.ndarray, view: int, outputs: Mapping[str, Tensor]) -> None:
        """Store outputs (B, ...) of samples `index` (B,), by name, which must be finite in fp16.

        Raises:
            OSError: the disk is full or failing; what was there stays readable.
        """
        _, _, handles = self._files[view]
        parts = [
            outputs[name].detach().to("cpu", torch.float16).reshape(len(index), -1).numpy() for name in self.shapes
        ]
        for sample, values in zip(index.tolist(), np.concatenate(parts, axis=1), strict=True):
            row = values.view(np.uint8)
            os.pwrite(handles[0], row.tobytes(), sample * self.row_bytes)
            os.pwrite(handles[1], np.uint64(_mark(row, sample, view)).tobytes(), sample * 8)

    def filled(self, view: int) -> int:
        """Samples that have a row in `view`."""
        return int(np.count_nonzero(self._files[view][1]))

    def written(self, view: int) -> np.ndarray:
        """Indices of the samples that have a row in `view`: int64."""
        return np.flatnonzero(self._files[view][1])

    def _open(self, view: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Rows (N, bytes) and checksums (N,) as memory maps, and the handles that write them.

        Never written through a map: a full disk would then end the process (SIGBUS).
        """
        for name, size in ((f"view-{view:03}.f16", self.row_bytes), (f"view-{view:03}.crc", 8)):
            self._handles.append(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o644))
            reserve(self._handles[-1], self.samples * size)
        rows, sums = (
            np.memmap(self.folder / f"view-{view:03}.{kind}", dtype, "r", shape=shape)
            for kind, dtype, shape in (
                ("f16", np.uint8, (self.samples, self.row_bytes)),
                ("crc", np.uint64, (self.samples,)),
            )
        )
        return rows, sums, (self._handles[-2], self._handles[-1])

    def close(self) -> None:
        """Let go of the files."""
        while self._handles:
            os.close(self._handles.pop())


class CachedTeacher(nn.Module):
    """A frozen teacher that is asked only for what the cache does not hold.

    Args:
        live: a `FrozenTeacher` around a `TeacherSide`.
        cache: its outputs.
    """

    def __init__(self, live: FrozenTeacher, cache: FactorCache) -> None:
        super().__init__()
        self.live, self.cache = live, cache
        self.writes = True
        """False once the disk was full: from then on the cache is only read."""

    def forward(self, images: Tensor, index: Tensor, view: int) -> dict[str, Tensor]:
        """uint8 images (B, 3, H, W), their sample indices (B,) and view -> the cache's outputs, `factor` (B, K, H, W).

        The first time, too, a factor is as it will be read back, in fp16: a resumed run sees the same numbers.
        """
        place = index.numpy()
        found = self.cache.read(place, view)
        if found is None:
            made = self.live(images, index, view)
            found = {name: made[name].to(torch.float16) for name in self.cache.shapes}
            if not all(output.isfinite().all() for output in found.values()):
                return {name: made[name] for name in found}
            self._store(place, view, found)
        return {name: output.to(images.device, non_blocking=True) for name, output in found.items()}

    def unchanged(self) -> bool:
        """Whether the live teacher's weights and buffers are those that it was frozen with."""
        return self.live.unchanged()

    def _store(self, index: np.ndarray, view: int, outputs: Mapping[str, Tensor]) -> None:
        if not self.writes:
            return
        try:
            self.cache.write(index, view, outputs)
        except OSError as error:
            self.writes = False
            warn(f"the factor cache cannot be written ({error.strerror}); the teacher goes on live")


def foreign_row(
    cache: FactorCache, fresh: Callable[[np.ndarray, int], Mapping[str, Tensor]], tolerance: float
) -> str | None:
    """Compare a few rows with the teacher's outputs now; describes the first row that differs, None if none does.

    The rows are drawn at random, others each time: so what no fingerprint covers is found sooner or later.

    Args:
        cache: some of its rows are written.
        fresh: the live teacher's outputs for sample indices (B,) and a view.
        tolerance: largest relative distance (L2) of one output of one row.
    """
    chance = np.random.default_rng()
    there = [view for view in range(cache.views) if cache.filled(view)]
    views = chance.choice(there, min(len(there), PROBED_VIEWS), replace=False).tolist()
    for view in views:
        written = cache.written(view)
        drawn = chance.choice(written, min(len(written), PROBES // len(views)), replace=False).tolist()
        rows = {row: kept for row in drawn if (kept := cache.read(np.array([row]), view)) is not None}
        if not rows:
            continue
        index = np.array(list(rows))
        made = fresh(index, view)
        for name in cache.shapes:
            stored = torch.cat([kept[name] for kept in rows.values()]).float().flatten(1)
            ours = made[name].detach().float().cpu().flatten(1)
            least = np.sqrt(stored.shape[1]) * SMALLEST
            off = (ours - stored).norm(dim=1) / (ours.norm(dim=1) + least / tolerance)  # (B,)
            worst = int(off.argmax())
            if not off[worst] <= tolerance:
                return (
                    f"{name} of training image {index[worst]}, view {view}: its relative distance from the "
                    f"teacher's is {off[worst]:.1e} (at most {tolerance:g} is allowed)"
                )
    return None


def choose_views(row_bytes: int, samples: int, epochs: int, folder: Path) -> int:
    """`--views auto`: as many views as fit into half of the free disk and half of the memory, and pay.

    A view pays from its second pass on, so at most half of `epochs`. 0 (a live teacher) where not even two fit.

    >>> choose_views(4096, 50_000, epochs=3, folder=Path("."))
    0
    """
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    room = SHARE * min(shutil.disk_usage(existing).free, _memory())
    views = min(AUTO_VIEWS, epochs // 2, int(room // (row_bytes * samples)))
    return views if views >= 2 else 0


def _memory() -> float:
    """Bytes of this machine; without end where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return math.inf


def say_what_changed(cache: FactorCache) -> None:
    """Say whether the cache is new, and if a similar one is there, in what it differs."""
    done = sum(cache.filled(view) for view in range(cache.views))
    where = f"factor cache: {cache.folder}"
    if done:
        say(f"{where} holds {done:,} of {cache.samples * cache.views:,} factors")
        return
    size = cache.row_bytes * cache.samples * cache.views / 1e9
    say(f"{where} is new: {cache.views} views, {size:.2f} GB")
    others = [path for path in cache.folder.parent.glob("*/meta.json") if path.parent != cache.folder]
    changed = sorted((names for names in (_differences(cache.meta, path) for path in others) if names), key=len)
    if changed:
        say(f"  the nearest of {len(changed)} other caches differs in: {', '.join(changed[0])}")


def _differences(meta: Mapping[str, Any], path: Path) -> list[str]:
    try:
        other = read_json(path)
        ours, theirs = ({**value, **value["identity"], "identity": None} for value in (meta, other))
    except (ValueError, OSError, KeyError, TypeError):
        return []
    return [name for name in ours if json.dumps(ours[name]) != json.dumps(theirs.get(name))]


def _mark(row: np.ndarray, sample: int, view: int) -> int:
    """The checksum of a row (uint8) at its place."""
    return PRESENT | zlib.crc32(row.data, zlib.crc32(f"{sample} {view}".encode()))
