"""How the paraphraser is trained, without labels: on maps that the teacher makes once, or as in the authors' program.

A paraphraser learns from every place of every map, so a sample of the images holds enough of them. Their maps are kept
in memory: whole for the paper's form, reduced for the slim one. They take the images' place in the ordinary training
loop, which writes checkpoints, continues, and works in several processes. Training ends when the error falls no more.

Shapes: B samples, C channels, H x W the feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.data.splits import Batch, Sample, Split
from factor_transfer.data.views import permutation
from factor_transfer.method.slim import AnyParaphraser, SlimParaphraser, core
from factor_transfer.training.engine import Engine
from factor_transfer.training.evaluation import chunks_of
from factor_transfer.training.run_folder import Run
from factor_transfer.training.schedule import Plan
from factor_transfer.training.step import ParaphraserTask
from factor_transfer.training.trainer import Trainer, training_chunks
from factor_transfer.util.console import say

MOST_MAPS, MOST_BYTES = 1024, 512_000_000
"""Images whose maps are kept: at most so many, and at most so much of memory, in float32."""

FITTED = 8192
"""Places of maps (vectors of C numbers) from which the slim form's components are found; 2 C where that is more."""

BATCH = 16
"""Maps a step. Small steps are what so few maps allow many of."""

MOST_STEPS, COMPARED_STEPS, LESS = 1000, 100, 0.95
"""Training ends after so many steps, or once the mean error of a pass is more than `LESS` times that of the pass at
least `COMPARED_STEPS` steps before it."""


class KeptMaps(Split):
    """A teacher's maps in the place of images: float32 (N, C, H, W). There are no views of them."""

    def __init__(self, maps: Tensor) -> None:
        self.maps, self.labels = maps, np.zeros(len(maps), np.int64)

    def batches(self, chunks: Iterable[np.ndarray], view: int | None) -> Iterator[Batch]:
        """See `Split`; a batch's `image` is its maps."""
        for chunk in chunks:
            index = torch.from_numpy(np.array(chunk, np.int64))
            maps = self.maps[index].contiguous(memory_format=torch.channels_last)
            yield Batch(maps, torch.zeros(len(index), dtype=torch.int64), index)


class Kept(nn.Module):
    """Stands where a live teacher would: what it is shown are the maps themselves."""

    def forward(self, images: Tensor, index: Tensor | None = None, view: int = 0) -> dict[str, Tensor]:
        """The maps (B, C, H, W), as `feature`."""
        return {"feature": images}


def train_paraphraser(
    stage: str,
    paraphraser: AnyParaphraser,
    teacher: nn.Module,
    train: Split,
    views: int,
    engine: Engine,
    config: Config,
    run: Run,
) -> dict[str, Any]:
    """Train a fresh paraphraser in place.

    Args:
        stage: its name in the run folder.
        paraphraser: with fresh weights, on the CPU.
        teacher: a frozen `TeacherSide`.
        train: the images.
        views: of each image, that the passes over them show in turn; see `Plan`.
        engine: device and processes.
        config: --paraphraser-epochs says which of the two ways, --paraphraser-lr the learning rate, held constant.
        run: metrics and checkpoints go there.

    Returns:
        Seconds, and the images of teacher and paraphraser.

    Raises:
        TrainingError: the teacher's maps are not finite, or all alike.
    """
    plan = Plan(stage=stage, epochs=0, lr=config.paraphraser_lr, seed=config.data_seed, views=views, constant=True)
    if config.paraphraser_epochs == "auto":
        shown: Split = keep_maps(paraphraser, teacher, train, engine, config)
        config = replace(config, batch_size=max(BATCH, 4 * engine.processes))
        passes = math.ceil(MOST_STEPS / len(training_chunks(np.arange(len(shown)), config.batch_size)))
        plan, asked = replace(plan, epochs=passes, views=0, enough=settled), len(shown)
        task = ParaphraserTask(core(paraphraser), Kept(), config.reconstruction)
    else:
        plan, shown = replace(plan, epochs=config.paraphraser_epochs), train
        asked = find_components(paraphraser, teacher, train, engine, config)
        task = ParaphraserTask(paraphraser, teacher, config.reconstruction)
    found = Trainer(task, plan, shown, engine, config, run).fit().record()
    for name in ("teacher", "teacher_alone"):  # each process shows its teacher all images that are asked for once
        found["images"][name] = engine.processes * asked + (found["images"][name] if shown is train else 0)
    return found


def keep_maps(
    paraphraser: AnyParaphraser, teacher: nn.Module, train: Split, engine: Engine, config: Config
) -> KeptMaps:
    """What a paraphraser is trained on. A slim one's components are found first, from the first of the maps.

    Args:
        paraphraser: with fresh weights, on the CPU.
        teacher: a frozen `TeacherSide`.
        train: the images; a sample of them is shown once, each in its first view.
        engine: device and processes. All processes compute all maps, and take the first one's components.
        config: --data-seed owns the order, --batch-size is the teacher's.
    """
    sample, kept = Sample(train, MOST_MAPS), list[Tensor]()
    say(f"paraphraser: the teacher makes the maps of {len(sample):,} images, once")
    features = _features(teacher, sample, engine, config)
    if isinstance(paraphraser, SlimParaphraser):
        features = chain(_fit(paraphraser, features, engine), features)
    for feature in features:
        kept.append(paraphraser.reduction(feature) if isinstance(paraphraser, SlimParaphraser) else feature)
        if sum(each.nbytes for each in kept) >= MOST_BYTES:
            break
    return KeptMaps(torch.cat(kept))


def find_components(
    paraphraser: AnyParaphraser, teacher: nn.Module, train: Split, engine: Engine, config: Config
) -> int:
    """Find a slim paraphraser's components alone; arguments as for `keep_maps`.

    Returns:
        On how many images the teacher ran; 0 for the paper's form, which needs no components.
    """
    if not isinstance(paraphraser, SlimParaphraser):
        return 0
    return sum(map(len, _fit(paraphraser, _features(teacher, Sample(train, MOST_MAPS), engine, config), engine)))


@torch.no_grad()
def _features(teacher: nn.Module, sample: Sample, engine: Engine, config: Config) -> Iterator[Tensor]:
    """The maps (B, C, H, W) of the first view, float32 on the CPU, in an order that mixes the classes."""
    order = permutation(config.data_seed, 0, len(sample))
    for batch in sample.batches(chunks_of(order, config.batch_size), view=0):
        with engine.autocast():
            feature = teacher(batch.image.to(engine.device), batch.index, 0)["feature"]
        yield feature.float().cpu()


def _fit(paraphraser: SlimParaphraser, features: Iterator[Tensor], engine: Engine) -> list[Tensor]:
    """Find the components from the first maps, as many as that needs; these maps."""
    first, places = list[Tensor](), 0
    for feature in features:
        first.append(feature)
        places += feature[:, 0].numel()
        if places >= max(FITTED, 2 * feature.shape[1]):
            break
    paraphraser.reduction.fit(torch.cat(first))
    paraphraser.reduction.load_state_dict(engine.told(paraphraser.reduction.state_dict()))
    return first


def settled(errors: Sequence[float], steps: int) -> bool:
    """Whether training may end after passes of `steps` steps each with these mean errors.

    >>> settled([3.0, 2.0, 1.999], steps=100), settled([3.0, 2.0, 1.0], steps=100), settled([3.0, 2.999], steps=50)
    (True, False, False)
    """
    before = math.ceil(COMPARED_STEPS / steps)
    return len(errors) > before and errors[-1] > LESS * errors[-1 - before]
