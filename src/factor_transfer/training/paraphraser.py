"""How the paraphraser is trained, without labels: on maps that the teacher makes once, or as in the authors' program.

A paraphraser learns from every place of every map, so a sample of the images holds enough of them. Their maps are kept
in memory: whole for the paper's form, reduced for the slim one. They take the images' place in the ordinary training
loop, which writes checkpoints, continues, and works in several processes. Training ends when the error falls no more.

Shapes: B samples, C channels, H x W the feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.data.splits import Batch, Sample, Split, View
from factor_transfer.data.views import permutation
from factor_transfer.method.slim import FITTED, AnyParaphraser, SlimParaphraser, core
from factor_transfer.training.chunks import training_chunks
from factor_transfer.training.engine import Engine
from factor_transfer.training.evaluation import chunks_of
from factor_transfer.training.run_folder import Run
from factor_transfer.training.schedule import Plan
from factor_transfer.training.step import ParaphraserTask
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.console import say

MOST_MAPS, MOST_BYTES = 1024, 512_000_000
"""Images whose maps are kept: at most so many, and at most so much of memory, in float32."""

BATCH = 16
"""Maps a step. Small steps are what so few maps allow many of."""

PASS_STEPS = 50
"""Steps of a pass, at least: few maps are shown several times in each."""

MOST_STEPS, COMPARED_STEPS, LESS = 1000, 100, 0.95
"""Training ends after so many steps, or once the mean error of a pass is more than `LESS` times that of the pass at
least `COMPARED_STEPS` steps before it."""


class KeptMaps(Split):
    """A teacher's maps in the place of images: float32 (N, C, H, W), so many `times`. There are no views of them."""

    def __init__(self, maps: Tensor, times: int = 1) -> None:
        self.maps, self.labels = maps, np.zeros(times * len(maps), np.int64)

    def batches(self, chunks: Iterable[np.ndarray], view: View | None) -> Iterator[Batch]:
        """See `Split`; a batch's `image` is its maps."""
        for chunk in chunks:
            index = torch.from_numpy(np.array(chunk, np.int64))
            maps = self.maps[index % len(self.maps)].contiguous(memory_format=torch.channels_last)
            yield Batch(maps, torch.zeros(len(index), dtype=torch.int64), index)


class Layers(nn.Module):
    """What is trained on kept maps: the paper's layers. Checkpoints hold the slim form's components beside them."""

    def __init__(self, paraphraser: AnyParaphraser) -> None:
        super().__init__()
        self.paraphraser = paraphraser

    def forward(self, feature: Tensor) -> Tensor:
        """The reconstruction of a map, or of a reduced one: (B, C, H, W) -> (B, C, H, W)."""
        found: Tensor = core(self.paraphraser)(feature)
        return found


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
        TrainingError: the maps of which a slim paraphraser's components are found are not finite, or all alike.
    """
    plan = Plan(stage=stage, epochs=0, lr=config.paraphraser_lr, seed=config.data_seed, views=views, constant=True)
    if config.paraphraser_epochs == "auto":
        kept = keep_maps(paraphraser, teacher, train, engine, config, run.load_checkpoint(stage))
        shown: Split = kept
        config = replace(config, batch_size=max(BATCH, 2 * engine.processes), grad_accum_steps=1)
        passes = max(1, MOST_STEPS // len(training_chunks(np.arange(len(shown)), config.batch_size)))
        plan, asked = replace(plan, epochs=passes, views=0, enough=settled), len(kept.maps)
        task = ParaphraserTask(Layers(paraphraser), Kept(), config.reconstruction)
    else:
        plan, shown = replace(plan, epochs=config.paraphraser_epochs), train
        asked = find_components(paraphraser, teacher, train, engine, config)
        task = ParaphraserTask(paraphraser, teacher, config.reconstruction)
    found = Trainer(task, plan, shown, engine, config, run).fit().record()
    for name in ("teacher", "teacher_alone"):  # each process shows its teacher all images that are asked for once
        found["images"][name] = engine.processes * asked + (found["images"][name] if shown is train else 0)
    return found


def keep_maps(
    paraphraser: AnyParaphraser,
    teacher: nn.Module,
    train: Split,
    engine: Engine,
    config: Config,
    checkpoint: Mapping[str, Any] | None = None,
) -> KeptMaps:
    """What a paraphraser is trained on. A slim one's components are found first, from the first of the maps.

    Args:
        paraphraser: with fresh weights, on the CPU.
        teacher: a frozen `TeacherSide`.
        train: the images; a sample of them is shown once, each in its first view.
        engine: device and processes. All processes compute all maps, and take the first one's components.
        config: --data-seed owns the order, --batch-size is the teacher's.
        checkpoint: of a training that is continued, whose components are taken instead of new ones.
    """
    sample, kept = Sample(train, MOST_MAPS), list[Tensor]()
    say(f"paraphraser: the teacher makes the maps of {len(sample):,} images, once")
    features = _features(teacher, sample, engine, config)
    if isinstance(paraphraser, SlimParaphraser):
        begins, there = "paraphraser.reduction.", dict(checkpoint["module"]) if checkpoint is not None else {}
        components = {name.removeprefix(begins): there[name] for name in there if name.startswith(begins)}
        if components:
            paraphraser.reduction.load_state_dict(components)
        else:
            features = chain(_fit(paraphraser, features, engine), features)
    for feature in features:
        kept.append(paraphraser.reduction(feature) if isinstance(paraphraser, SlimParaphraser) else feature)
        if sum(each.nbytes for each in kept) >= MOST_BYTES:
            break
    count = sum(map(len, kept))
    return KeptMaps(torch.cat(kept), times=-(-PASS_STEPS * BATCH // count))


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
