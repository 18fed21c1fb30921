"""Seconds and memory of a training step in both forms, beside the counted price: writes results/form-steps.json.

    nice -n -20 python benchmarks/form_steps.py [STUDENT...]

Each measurement is a process of its own: one step to warm up, then three, of which the fastest counts. Every turn
measures all variants of a pair, so what slows the machine for a while slows all of them. Ratios are within a turn.
Images and teachers are random: no value changes what a step costs. Cached steps get their factors from memory.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.networks.kernels import guard
from factor_transfer.networks.pair import Pair, load_side
from factor_transfer.training.objective import Objective, fresh_paraphrasers
from factor_transfer.training.price import price_of
from factor_transfer.training.run_folder import environment
from factor_transfer.training.step import DistillationTask, TeacherSide

PAIRS = (
    ("cifar_resnet56", "cifar_resnet20", 32, 128),
    ("resnet50", "mobilenetv2_100", 224, 16),
    ("tf_efficientnet_lite0", "mobilenetv3_small_050", 128, 64),
    ("vit_small_patch16_224", "vit_tiny_patch16_224", 224, 16),
)
"""Teacher, student, pixels, images a step."""

VARIANTS: dict[str, dict[str, Any]] = {
    "alone": {"beta": 0.0},
    "slim, cached": {"factor_form": "slim"},
    "slim, live": {"factor_form": "slim"},
    "paper, cached": {"factor_form": "paper"},
    "paper, live": {"factor_form": "paper"},
}
TURNS, STEPS, THREADS = 3, 3, 2


def main() -> None:
    """Measures every pair, prints, and keeps."""
    found = []
    for pair in [each for each in PAIRS if each[1] in sys.argv[1:] or not sys.argv[1:]]:
        turns = [{variant: _in_a_process(pair, variant) for variant in VARIANTS} for _ in range(TURNS)]
        row: dict[str, Any] = {
            "teacher": pair[0],
            "student": pair[1],
            "pixels": pair[2],
            "batch": pair[3],
            "turns": turns,
        }
        for variant in VARIANTS:
            ratios = [turn[variant]["seconds"] / turn["alone"]["seconds"] for turn in turns]
            more = median(turn[variant]["megabytes"] - turn["alone"]["megabytes"] for turn in turns)
            counted = turns[0][variant]["counted"]
            row[variant] = {"ratio": median(ratios), "least": min(ratios), "most": max(ratios), "counted": counted,
                            "more_megabytes": more}  # fmt: skip
            print(f"{pair[0]} -> {pair[1]}, {variant}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
                  f"counted {counted:.2f}, {more:+.0f} MB", flush=True)  # fmt: skip
        found.append(row)
        made = {"pairs": found, "threads": THREADS, "environment": environment()}
        Path("results/form-steps.json").write_text(json.dumps(made, indent=1) + "\n")


def _in_a_process(pair: tuple[str, str, int, int], variant: str) -> dict[str, float]:
    """Forked: it has the imports, and its peak of memory is its own beyond those."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(pair, variant, theirs))
    process.start()
    found: dict[str, float] = ours.recv()
    process.join()
    return found


def _measured(pair: tuple[str, str, int, int], variant: str, answer: Any) -> None:
    teacher, student, size, batch = pair
    torch.set_num_threads(THREADS)
    guard()
    config = Config(data="digits", teacher=teacher, student=student, img_size=size, **VARIANTS[variant])
    sides = Pair(load_side("teacher", config, 10, size), load_side("student", config, 10, size))
    paraphrasers = fresh_paraphrasers(config, sides)
    objective = Objective(config, sides, [each.factor_channels for each in paraphrasers], 10)
    side = TeacherSide(sides.teacher.tapped(objective.teacher_layers), sides.teacher.network.norm, sides.size,
                       readers=objective.readers(paraphrasers))  # fmt: skip
    frozen = FrozenTeacher(side).to(memory_format=torch.channels_last)
    task = DistillationTask(sides.student.tapped(), sides.student.network.norm, objective.terms, frozen)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    seconds = min(_timed(task, frozen, images, live="live" in variant))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    price = price_of(config, sides, objective, images[:2])  # after the peak was read: it copies the networks
    counted = 1.0 if variant == "alone" else price.live_step if "live" in variant else price.cached_step
    answer.send({"seconds": seconds, "megabytes": peak, "counted": counted})


def _timed(task: DistillationTask, frozen: nn.Module, images: Tensor, *, live: bool) -> Iterator[float]:
    trainee = task.trainable_module.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(trainee.parameters(), lr=1e-3, momentum=0.9, fused=True)
    labels = torch.zeros(len(images), dtype=torch.long)
    outputs = frozen(images[:2]) if task.teacher is not None else {}
    kept = {name: value.repeat(len(images) // 2, *[1] * (value.ndim - 1)) for name, value in outputs.items()}
    for place in range(STEPS + 1):
        start = time.perf_counter()
        _, losses = trainee(images, labels, frozen(images) if live else kept)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call] # torch's own
        optimizer.step()
        if place:
            yield time.perf_counter() - start


if __name__ == "__main__":
    main()
