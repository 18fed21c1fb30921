"""What torch.compile brings to the student's own step: as it is, and as --torchcompile has it.

    python benchmarks/compiled_student.py ../shared    # two threads; five minutes; results/compiled-student.json

ResNet-20, batch 128, bf16, labels only, without input. `compiled` is torch.compile's own; `ours` has a batch norm that
the compiler can fuse, and calls its kernels from C++.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pair import Works, keep, measured, summed_up, take_turns
from torch import Tensor, nn

from factor_transfer.compiled import CompiledStudent

TURNS, STEPS = 20, 10


def training(
    student: nn.Module, images: Tensor, labels: Tensor, run: Callable[[Tensor], Tensor]
) -> Callable[[], float]:
    """A step of training, which gives its loss; `run` is the student, or what was compiled of it."""
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
        first = pair.engine.place(side.tapped()).train()
        plain, compiled = deepcopy(first), deepcopy(first)
        ours = CompiledStudent(first, 128, "student")
        steps = {
            "plain": training(plain, images, batch.label, lambda shown: plain.maps(shown)[0]),
            "compiled": training(compiled, images, batch.label, torch.compile(compiled.module, dynamic=False)),
            "ours": training(ours, images, batch.label, lambda shown: ours.maps(shown)[0]),
        }
        losses = {name: [step() for _ in range(5)] for name, step in steps.items()}
        works: Works = {name: partial(_repeated, step) for name, step in steps.items()}
        found = summed_up(take_turns(works, TURNS), STEPS, pair.engine.describe(), base="plain")
        keep("compiled-student", found | {"first_losses": losses, "turns": TURNS, "steps_a_turn": STEPS})


def _repeated(step: Callable[[], float]) -> None:
    for _ in range(STEPS):
        step()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
