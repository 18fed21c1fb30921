"""What torch.compile brings to the student's own step, as it is and with a batch norm that the compiler can fuse.

    python benchmarks/compiled_student.py ../shared    # two threads; five minutes; results/compiled-student.json

ResNet-20, batch 128, bf16, labels only, without input. `compiled` has torch's own batch norm, which its compiler sums
over all images at once. `fusible` sums each image first, as the map lies in memory, and the images after that: these
sums the compiler runs in vectors of channels, beside each other on all threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pair import Works, keep, measured, summed_up, take_turns
from torch import Tensor, nn

TURNS, STEPS = 20, 10


class FusibleBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` in training mode, on maps (B, C, H, W) that are channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        averages = self.running_mean, self.running_var, self.momentum, self.eps
        out: Tensor = _Normalised.apply(x, self.weight, self.bias, *averages)
        return out


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float
    ) -> Tensor:
        rows, count = _rows(x).float() - mean, x.numel() // x.shape[1]  # squares of a far mean would drown the variance
        shift = _sum(rows) / count
        spread = (_sum(rows * rows) / count - shift * shift).clamp_min(0)
        centre, scale = mean + shift, (spread + eps).rsqrt()
        mean.add_(momentum * shift)
        var.add_(momentum * (spread * (count / (count - 1)) - var))
        ctx.save_for_backward(x, weight, centre, scale)
        slope = weight * scale
        return (x.float() * _channels(slope) + _channels(bias - centre * slope)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, centre, scale = ctx.saved_tensors
        given, count = _rows(gradient).float(), x.numel() // x.shape[1]
        plain, along = given.sum(1), (given * (_rows(x).float() - centre)).sum(1) * scale
        # Each a sum, because the compiler keeps sums, and computes anything else anew for every value of the map.
        slope = -(along * (weight * scale**2 / count)).sum(0)
        offset = -(plain * (weight * scale / count) - along * (centre * weight * scale**2 / count)).sum(0)
        of_x = gradient.float() * _channels(weight * scale) + x.float() * _channels(slope) + _channels(offset)
        return of_x.to(x.dtype), along.sum(0), plain.sum(0), None, None, None, None


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last -> (B, H W, C), as it lies in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(1).sum(0)


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]


def training(
    student: nn.Module, images: Tensor, labels: Tensor, run: Callable[[Tensor], Tensor]
) -> Callable[[], float]:
    """A step of training, which gives its loss; `run` is the student or what was compiled of it."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(run(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.item()

    return step


def main(shared: Path) -> None:
    """Measure, print, and keep the raw times."""
    with measured(shared, images=12_800) as pair:
        side = pair.job.load("student")
        (batch,) = pair.train.batches([np.arange(128)], view=0)
        images = side.network.norm(batch.image).contiguous(memory_format=torch.channels_last)
        first = pair.engine.place(side.network.module).train()
        steps: dict[str, Callable[[], float]] = {"plain": training(first, images, batch.label, first)}
        for name in ("compiled", "fusible"):
            student = deepcopy(first)
            if name == "fusible":
                for module in student.modules():
                    if type(module) is nn.BatchNorm2d:
                        module.__class__ = FusibleBatchNorm2d
            steps[name] = training(student, images, batch.label, torch.compile(student, dynamic=False))
        losses = {name: [step() for _ in range(5)] for name, step in steps.items()}
        works: Works = {name: partial(_repeated, step) for name, step in steps.items()}
        found = summed_up(take_turns(works, TURNS), STEPS, pair.engine.describe(), base="plain")
        keep("compiled-student", found | {"first_losses": losses, "turns": TURNS, "steps_a_turn": STEPS})


def _repeated(step: Callable[[], float]) -> None:
    for _ in range(STEPS):
        step()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
