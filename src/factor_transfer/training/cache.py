"""The factor cache: the frozen teacher's outputs on disk, so that the teacher runs once for each sample and view.

A view is replayable (see `views`), so its factor is too; and so is everything else that the terms read of the teacher.
Three checks come before a cached output is used:

* The folder's name is a fingerprint of all that a factor is known to depend on: the teacher with its code, layer,
  paraphraser, bytes of the images, augmentation, versions of libraries and decoders, precision. Another value of one of
  them means another folder.
* When a cache is opened, a random sample of its rows is compared with what the teacher gives for them now. This finds
  what the fingerprint misses.
* Each row has a checksum, which is compared at every read. A row that is half written or damaged is computed again (see
  `data/store.py`).

CACHE/FINGERPRINT/    see `store`: a part for each view, in it a row for each sample, its outputs one after the other in
                      fp16

Shapes: N samples, V views, B samples of one batch, factors (K, H, W).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factor_transfer.config import plain
from factor_transfer.data.dataset import Dataset
from factor_transfer.data.pixels import decoders
from factor_transfer.data.splits import View
from factor_transfer.data.store import Store
from factor_transfer.method.factor_transfer import Straight
from factor_transfer.method.slim import AnyParaphraser
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.networks.pair import Pair
from factor_transfer.training.engine import Engine
from factor_transfer.training.objective import Objective
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import RunError
from factor_transfer.util.files import cache_folder, read_json, state_fingerprint
from factor_transfer.util.identity import code_fingerprint

VERSION = 4
"""Raise it when what a row holds changes, or how the teacher computes."""

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
        self.views = views
        self._elements = [math.prod(shape) for shape in self.shapes.values()]
        outputs = {name: list(shape) for name, shape in shapes.items()}
        made_of = {"version": VERSION, "outputs": outputs, "identity": dict(identity)}
        self.store = Store(folder, made_of, samples, 2 * sum(self._elements)).open(views)

    def read(self, index: np.ndarray, view: int) -> dict[str, Tensor] | None:
        """Outputs (B, ...) in fp16 of samples `index` (B,) by name, or None unless each is there and whole."""
        found = self.store.read(index, view)
        if found is None:
            return None
        parts = torch.split(torch.from_numpy(found.view(np.float16)), self._elements, dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def write(self, index: np.ndarray, view: int, outputs: Mapping[str, Tensor]) -> None:
        """Store outputs (B, ...) of samples `index` (B,), by name, which must be finite in fp16.

        Raises:
            OSError: the disk is full or failing; what was there stays readable.
        """
        parts = [
            outputs[name].detach().to("cpu", torch.float16).reshape(len(index), -1).numpy() for name in self.shapes
        ]
        self.store.write(index, np.concatenate(parts, axis=1).view(np.uint8), view)

    def written(self, view: int) -> np.ndarray:
        """Indices of the samples that have a row in `view`: int64."""
        return self.store.written(view)


class CachedTeacher(nn.Module):
    """A frozen teacher that is asked only for what the cache does not hold.

    Args:
        live: a `FrozenTeacher` around a `TeacherSide`.
        cache: its outputs.
        labelled: where there are unlabelled images beside the others, how many samples come before them. The two kinds
            of a batch are then read, or made, each by itself: they show views of their own.
    """

    def __init__(self, live: FrozenTeacher, cache: FactorCache, labelled: int = 0) -> None:
        super().__init__()
        self.live, self.cache, self.labelled = live, cache, labelled
        self.writes = True
        """False once the disk was full: from then on the cache is only read."""

    def forward(self, images: Tensor, index: Tensor, view: View) -> dict[str, Tensor]:
        """uint8 images (B, 3, H, W), their sample indices (B,) and view -> the cache's outputs, `factor` (B, K, H, W).

        The first time, too, a factor is as it will be read back, in fp16: a resumed run sees the same numbers.
        """
        if not isinstance(view, tuple):
            return self._of_one_view(images, index, view)
        later = index >= self.labelled
        kinds = [(rows, each) for rows, each in zip((~later, later), view, strict=True) if rows.any()]
        places = torch.cat([rows.nonzero().flatten() for rows, _ in kinds]).argsort().to(images.device)
        found = [self._of_one_view(images[rows.to(images.device)], index[rows], each) for rows, each in kinds]
        return {name: torch.cat([part[name] for part in found])[places] for name in self.cache.shapes}

    def _of_one_view(self, images: Tensor, index: Tensor, view: int) -> dict[str, Tensor]:
        place = index.numpy()
        found = self.cache.read(place, view)
        if found is None:
            made = self.live(images, index, view)
            found = {name: made[name].to(torch.float16) for name in self.cache.shapes}
            if not all(output.isfinite().all() for output in found.values()):
                return {name: made[name] for name in found}
            self._store(place, view, found)
        return {name: output.to(images.device, non_blocking=True) for name, output in found.items()}

    @property
    def asked(self) -> int:
        """Images that the live teacher was shown in this process."""
        return self.live.asked

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


def behind_cache(
    live: FrozenTeacher, identity: Mapping[str, Any], objective: Objective, data: Dataset, engine: Engine, views: int
) -> FrozenTeacher | CachedTeacher:
    """The live teacher behind the factor cache; alone where a term's output, or the cache's folder, cannot take it.

    Args:
        live: the teacher.
        identity: all that its outputs depend on.
        objective: which outputs are read, and their shapes.
        data: the images.
        engine: a cache is used in all processes, or in none.
        views: of each image.

    Raises:
        RunError: the cache holds other outputs than the teacher gives now.
    """
    shapes = {name: shape for name, shape in objective.outputs.items() if shape is not None}
    if shapes.keys() != objective.outputs.keys():
        large = ", ".join(objective.outputs.keys() - shapes.keys())
        warn(f"no factor cache: {large} is too large; the teacher stays live")
        return live
    cache, problem = None, None
    folder, count = cache_folder(objective.config.cache_dir), len(data.pool)
    with engine.unhurried():  # some file systems write out all that is reserved
        try:
            cache = FactorCache(folder, identity, shapes, count, views)
        except OSError as error:
            problem = f"{error.strerror}: {error.filename}"
    problems = [each for each in engine.all_of(problem) if each is not None]
    if cache is None or problems:  # in one process: then in none
        if cache is not None:
            cache.store.close()
        warn(f"no factor cache ({problems[0]}); the teacher stays live")
        return live
    say_what_changed(cache)
    _check_rows(cache, live, data, engine)
    return CachedTeacher(live, cache, len(data.train))


def identity_of(
    pair: Pair,
    paraphrasers: Sequence[AnyParaphraser | Straight],
    objective: Objective,
    data: Dataset,
    engine: Engine,
    code: str,
) -> dict[str, Any]:
    """All that the teacher's outputs depend on; `code` is that of the teacher, as `code_fingerprint` gives it."""
    network, readers = pair.teacher.network, objective.readers(paraphrasers)
    readers.pop("factor", None)  # its paraphraser is named by itself
    identity: dict[str, Any] = {
        "architecture": [network.name, type(network.module).__name__, plain(network.model_args)],
        "teacher's code": code,
        "teacher": state_fingerprint(network.module.state_dict()),
        "teacher layer": pair.teacher.layer,
        "teacher normalisation": [network.mean, network.std, network.size],
        "paraphraser": _weights_and_code(paraphrasers[0]) if paraphrasers else None,
        "images": data.fingerprint,
        "transform's code": data.transform_code(),
        "decoders": decoders(),
        "precision": engine.describe()["precision"],
    }
    if data.unlabelled_fingerprint is not None:
        identity["unlabelled images"] = data.unlabelled_fingerprint
    if objective.config.torchcompile:
        identity["compiled"] = True
    if readers:
        identity["other layers"] = {
            name: [reader.layer, *_weights_and_code(reader)] for name, reader in readers.items()
        }
    return identity


def _check_rows(cache: FactorCache, live: FrozenTeacher, data: Dataset, engine: Engine) -> None:
    """Compare rows of the cache, drawn at random each time, with what the teacher gives for them now.

    Raises:
        RunError: they differ, in any process.
    """

    def fresh(index: np.ndarray, view: int) -> Mapping[str, Tensor]:
        (batch,) = data.pool.batches([index], view=view)
        with engine.autocast():
            outputs: Mapping[str, Tensor] = live(batch.image.to(engine.device), batch.index, view)
        return outputs

    problem = foreign_row(cache, fresh, HALF_ROWS if engine.bf16 else ROWS)
    problems = [each for each in engine.all_of(problem) if each is not None]
    if problems:
        cache.store.close()
        raise RunError(
            f"--cache-dir: the factor cache {cache.store.folder}",
            found=problems[0],
            valid="the outputs that --teacher gives now for the same images",
            hint="something changed that no fingerprint covers: delete that folder, or give another --cache-dir; if "
            "nothing changed, the teacher gives other outputs at each call: give --views 0",
        )


def _weights_and_code(module: nn.Module) -> list[str]:
    return [state_fingerprint(module.state_dict()), code_fingerprint(module)]


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
    there = [view for view in range(cache.views) if len(cache.written(view))]
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
    store, done = cache.store, sum(len(cache.written(view)) for view in range(cache.views))
    where, rows = f"factor cache: {store.folder}", store.samples * cache.views
    if done:
        say(f"{where} holds {done:,} of {rows:,} factors")
        return
    say(f"{where} is new: {cache.views} views, {store.row_bytes * rows / 1e9:.2f} GB")
    others = [path for path in store.folder.parent.glob("*/meta.json") if path.parent != store.folder]
    changed = sorted((names for names in (_differences(store.meta, path) for path in others) if names), key=len)
    if changed:
        say(f"  the nearest of {len(changed)} other caches differs in: {', '.join(changed[0])}")


def _differences(meta: Mapping[str, Any], path: Path) -> list[str]:
    try:
        other = read_json(path)
        ours, theirs = ({**value, **value["identity"], "identity": None} for value in (meta, other))
    except (ValueError, OSError, KeyError, TypeError):
        return []
    return [name for name in ours if json.dumps(ours[name]) != json.dumps(theirs.get(name))]
