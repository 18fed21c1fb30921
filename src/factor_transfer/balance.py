"""How hard each term pulls at the student's feature maps, and the beta at which the factor term pulls as in the paper.

The factor term's gradient shrinks with the elements of a factor and grows as the student's map gets smaller, so a beta
copied to another pair can vanish or drown the labels. What carries over is the pull: the norm of the term's gradient in
the student's map, beside that of the cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factor_transfer.features import Logits, tensor_in, watching
from factor_transfer.seeds import seeded
from factor_transfer.splits import Batch
from factor_transfer.tasks import DistillationTask, Trainee
from factor_transfer.terms import FactorTransfer, Labels, StudentOutputs

BALANCE = 1.98
"""Pull of the factor term over that of the cross-entropy, in the authors' CIFAR-10 program before its first step:
measured by benchmarks/balance.py (mean of ten first weights, sd 0.25; results/balance.json)."""


class Pull(NamedTuple):
    """What a term does on one batch."""

    size: float
    """Its weighted loss."""
    norms: dict[str, float]
    """Norm of its gradient in the student's maps, by layer; only of those that it reads."""


def pulls(task: DistillationTask, batch: Batch) -> dict[str, Pull]:
    """Of each term of a task its size and pull, in training mode and float32; the task stays as it is.

    Args:
        task: student, terms and teacher.
        batch: at least two images.
    """
    trainee: Trainee = deepcopy(task.trainable_module).train()
    device = next(trainee.parameters()).device
    images, labels = batch.image.to(device), batch.label.to(device)
    outputs = {} if task.teacher is None else task.teacher(images)
    tapped, raw = trainee.student, dict[str, Any]()  # raw: a map may be a view beside the network's own way
    with seeded(0), ExitStack() as stack:
        for layer in tapped.layers:
            stack.enter_context(watching(tapped.module.get_submodule(layer), partial(raw.__setitem__, layer)))
        output, maps = tapped.maps(trainee.norm(images))
        student = StudentOutputs(Logits()(output), maps[tapped.layer], maps)
        losses = {name: term(student, outputs, labels) for name, term in trainee.terms.items()}
    found = {layer: tensor_in(each, tapped.module) for layer, each in raw.items()}
    read = {layer: tensor for layer, tensor in found.items() if tensor is not None}
    return {name: Pull(loss.item(), _norms(loss, read)) for name, loss in losses.items()}


def _norms(loss: Tensor, maps: dict[str, Tensor]) -> dict[str, float]:
    gradients = torch.autograd.grad(loss, list(maps.values()), retain_graph=True, allow_unused=True)
    return {layer: float(each.norm()) for layer, each in zip(maps, gradients, strict=True) if each is not None}


def balanced(task: DistillationTask, batches: Iterable[Batch]) -> list[float]:
    """The weight of each factor term at which it pulls `BALANCE` times as hard as the cross-entropy of weight 1.

    Args:
        task: its terms are `Labels` of weight 1, and `FactorTransfer` terms of any weight but 0.
        batches: pulls are averaged over these.

    Returns:
        One for each factor term, in order; nan where one of the two does not pull at all.
    """
    each = [pulls(task, batch) for batch in batches]
    weights = []
    for term in task.terms:
        if isinstance(term, FactorTransfer):
            layer = term.taps[0] if term.taps else task.trainable_module.student.layer
            labels, factor = (
                sum(found[name].norms.get(layer, 0.0) for found in each) for name in (Labels.name, term.name)
            )
            there = math.isfinite(labels) and math.isfinite(factor) and labels > 0 and factor > 0
            weights.append(BALANCE * term.beta * labels / factor if there else math.nan)
    return weights
