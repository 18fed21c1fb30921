"""The one evaluation of a network, and that of a paraphraser: each image once, on the processes there are.

Shapes: B images, N classes, C channels, H x W the feature map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factor_transfer.data.splits import Batch, Split
from factor_transfer.method.health import DEAD, relative_variety
from factor_transfer.method.slim import AnyParaphraser, core
from factor_transfer.tasks.base import Task
from factor_transfer.training.engine import Engine
from factor_transfer.util.console import say, warn

POOR_RECONSTRUCTION = 0.8
"""A paraphraser whose error is more than this share of a mean predictor's has learned little."""


def evaluate(
    model: nn.Module,
    images: Split | Sequence[Split],
    engine: Engine,
    task: Task,
    *,
    batch_size: int = 128,
    precise: bool = False,
) -> dict[str, float]:
    """The task's metrics of `model`, by key, each image counted once.

    Args: as for `summed`.
    """
    found = task.values(summed(model, images, engine, task, batch_size=batch_size, precise=precise), _count(images))
    return {name: float(value) for name, value in found.items()}


def summed(
    model: nn.Module,
    images: Split | Sequence[Split],
    engine: Engine,
    task: Task,
    *,
    batch_size: int = 128,
    precise: bool = False,
) -> dict[str, Any]:
    """The task's sums over images that the metrics of `model` are made from, each image counted once.

    Args:
        model: uint8 images (B, 3, H, W) -> logits (B, N); evaluated in eval mode, and left in the mode it was in.
        images: a split or several, shown without augmentation.
        engine: device and processes.
        task: what `model` is for.
        batch_size: images a step, over all processes.
        precise: compute in float32 whatever the precision of training.
    """
    engine.place(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    sums: dict[str, Tensor] = {}
    splits = [images] if isinstance(images, Split) else images
    with torch.no_grad():
        for batch in chain.from_iterable(_shown(split, batch_size, engine) for split in splits):
            with torch.autocast(engine.device.type, enabled=False) if precise else engine.autocast():
                outputs = model(batch.image.to(engine.device))
            _add(sums, task.sums(outputs.float(), task.targets(batch).to(engine.device)))
    for module, mode in training.items():
        module.training = mode
    totals: dict[str, Tensor] = {}
    for part in engine.all_of({name: value.cpu() for name, value in sums.items()}):  # one can be without images
        _add(totals, part)
    return {name: total.item() if total.ndim == 0 else total for name, total in totals.items()}


def _count(images: Split | Sequence[Split]) -> int:
    return len(images) if isinstance(images, Split) else sum(map(len, images))


def _add(totals: dict[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value if name in totals else value


@torch.no_grad()
def answers(
    model: nn.Module, images: Split, engine: Engine, task: Task, *, batch_size: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """(index of the answer, label) of every image, (n,) each, in float32; all processes get those of all.

    Args:
        model: uint8 images (B, 3, H, W) -> logits (B, N); left in eval mode on the engine's device.
        images: shown without augmentation.
        engine: device and processes.
        task: what `model` is for.
        batch_size: images a step, over all processes.
    """
    engine.place(model).eval()
    own: list[tuple[list[int], list[int]]] = []
    for batch in _shown(images, batch_size, engine):
        with torch.autocast(engine.device.type, enabled=False):
            _, places = task.answers(model(batch.image.to(engine.device)))
        own.append((places.tolist(), batch.label.tolist()))
    parts = [part for each in engine.all_of(own) for part in each]
    said, labels = (np.array(list(chain.from_iterable(part)), np.int64) for part in zip(*parts, strict=True))
    return said, labels


def _shown(split: Split, batch_size: int, engine: Engine) -> Iterator[Batch]:
    """This process's part of a split, as evaluation shows it."""
    parts = [engine.shard(chunk) for chunk in chunks_of(np.arange(len(split)), batch_size)]
    return split.batches([part for part in parts if len(part)], view=None)


@torch.no_grad()
def evaluate_paraphraser(
    paraphraser: AnyParaphraser, teacher: nn.Module, images: Split, engine: Engine, *, batch_size: int
) -> dict[str, float]:
    """`relative_error`: the mean absolute reconstruction error over that of the mean map; `factor_variety`: how much
    the factor varies over images, as a share of how much the map does. In the slim form that is the reduced map, and
    `variance_kept` is the reduction's share of the whole map's variance.

    Two passes, so that no set of feature maps has to fit into memory; every process sees all images.

    Args:
        paraphraser: evaluated, and left in eval mode.
        teacher: a frozen `TeacherSide`.
        images: shown without augmentation.
        engine: device and precision.
        batch_size: images a step.
    """
    engine.place(paraphraser).eval()
    layers, reduction = core(paraphraser), getattr(paraphraser, "reduction", None)

    def whole() -> Iterator[Tensor]:
        chunks = np.array_split(np.arange(len(images)), -(-len(images) // batch_size))
        for batch in images.batches(chunks, view=None):
            with engine.autocast():
                feature = teacher(batch.image.to(engine.device))["feature"]  # (B, C, H, W)
            yield feature.float()

    def reduced(feature: Tensor) -> Tensor:
        return feature if reduction is None else reduction(feature)

    mean = torch.stack([reduced(feature).sum(0) for feature in whole()]).sum(0) / len(images)
    error = spread = variety = lost = variance = 0.0
    for feature in whole():
        shown = reduced(feature)
        factor = layers.encode(shown)
        error += float((layers.decode(factor) - shown).abs().sum())
        spread += float((shown - mean).abs().sum())
        variety += float(relative_variety(factor, shown)) * len(feature) / len(images)
        if reduction is not None:
            lost += float((reduction.expand(shown) - feature).square().sum())
            variance += float((feature - reduction.mean[:, None, None]).square().sum())
    kept = {} if reduction is None else {"variance_kept": 1 - lost / max(variance, 1e-12)}
    return {"relative_error": error / max(spread, 1e-12), "factor_variety": variety, **kept}


def chunks_of(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """`indices` in batches of `size`, and the rest."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def say_paraphraser(name: str, found: Mapping[str, float]) -> None:
    """Say how good a paraphraser is."""
    if "variance_kept" in found:
        say(f"{name}: the reduced map keeps {100 * found['variance_kept']:.0f} % of the teacher's map's variance")
    say(f"{name}: its reconstruction error is {found['relative_error']:.3f} of a mean predictor's")
    if found.get("factor_variety", 1.0) < DEAD:
        share = f"{found['factor_variety']:.1e} of the variety of the teacher's maps"
        warn(
            f"the {name} is collapsed: its factor is nearly the same for every image ({share}), so it teaches "
            "nothing: try a lower --paraphraser-lr or more --k"
        )
    elif found["relative_error"] > POOR_RECONSTRUCTION:
        warn(f"the {name} learned little: try another --paraphraser-lr, more --k, or passes by --paraphraser-epochs 20")
