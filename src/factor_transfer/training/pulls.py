"""How hard each term pulls at the student's feature maps, for whoever asks whether all of them are heard."""

from __future__ import annotations

from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factor_transfer.data.splits import Batch
from factor_transfer.method.losses import StudentOutputs
from factor_transfer.networks.features import tensor_in, watching
from factor_transfer.training.step import DistillationTask, Trainee
from factor_transfer.util.seeds import seeded


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
        inputs = trainee.norm(images)
        output, maps = tapped.maps(inputs)
        student = StudentOutputs(output, maps[tapped.layer], maps)
        losses = {name: term(student, outputs, labels) for name, term in trainee.terms.items()}
    found = {layer: tensor_in(each, tapped.module, inputs.shape[-2:]) for layer, each in raw.items()}
    read = {layer: tensor for layer, tensor in found.items() if tensor is not None}
    return {name: Pull(loss.item(), _norms(loss, read)) for name, loss in losses.items()}


def _norms(loss: Tensor, maps: dict[str, Tensor]) -> dict[str, float]:
    gradients = torch.autograd.grad(loss, list(maps.values()), retain_graph=True, allow_unused=True)
    return {layer: float(each.norm()) for layer, each in zip(maps, gradients, strict=True) if each is not None}
