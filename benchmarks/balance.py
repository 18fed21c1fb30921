"""How hard the factor term pulls at a student's map, beside the cross-entropy: with equal bounds, in four pairs.

    python benchmarks/balance.py ../shared    # a quarter of an hour of one core; results/balance.json

The first is the authors' CIFAR-10 program: ResNet-56 -> ResNet-20 with option-B shortcuts, k 0.5, beta 500, batches of
128 of 10,000 images of CIFAR-10 as JPEG files, the paraphraser trained as there (6 passes at 0.1). The others have
another student, and the beta of `--beta auto`. `fresh` is before the first step, with ten first weights of student and
translator; `after_passes` follows three of the program's at its learning rate of 0.1.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pair import Measured, keep, measured
from passes import one_pass

from factor_transfer.data.splits import Sample
from factor_transfer.doctor import pulls
from factor_transfer.method.factor_transfer import Paraphraser, Translator, portable_beta
from factor_transfer.method.losses import FactorTransfer, Labels
from factor_transfer.training.run_folder import environment
from factor_transfer.training.schedule import Plan
from factor_transfer.training.stages import Job
from factor_transfer.training.step import DistillationTask, ParaphraserTask
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.seeds import seeded

SEEDS, FOLLOWED = 10, 3
AFTER = (1, 2, 5)
"""Passes."""
IMAGES = 512
PROGRAM = "the authors' program"
STUDENTS: dict[str, dict[str, Any]] = {
    PROGRAM: {"student": "cifar_resnet20_b"},
    "ResNet-20": {"student": "cifar_resnet20"},
    "WRN-16-1": {"student": "cifar_wrn_16_1"},
    "MobileNetV2 of half its width": {"student": "mobilenetv2_050", "student_layer": "blocks.2"},
}


def main(shared: Path) -> None:
    """Measure, print, and keep, after every pair."""
    found = {}
    with measured(shared, images=10_000, threads=1) as pair:
        trained = paraphraser(pair)
        for name, student in STUDENTS.items():
            found[name] = weighed(pair, trained, student, FOLLOWED if name == PROGRAM else 0)
            keep("balance", {
                "command": "python benchmarks/balance.py ../shared", "pairs": found, "environment": environment(),
            })  # fmt: skip


def weighed(pair: Measured, trained: Paraphraser, student: dict[str, Any], followed: int) -> dict[str, Any]:
    """The ratio of the pulls of one pair, before the first step and, with some seeds, while it learns."""
    fresh, after = [], {str(passes): list[float]() for passes in AFTER}
    for seed in range(SEEDS):
        task, beta = program(pair, trained, student, seed)
        fresh.append(ratio(task, pair))
        if seed < followed:
            plan = Plan(stage=f"{student['student']}-{seed}", epochs=max(AFTER), lr=0.1, seed=seed, constant=True)
            follow(task, pair, plan, after)
        print(student, seed, round(fresh[-1], 4), {name: found[-1:] for name, found in after.items()}, flush=True)
    after_passes = {name: summed_up(found) for name, found in after.items() if found}
    return {**student, "beta": beta, "fresh": summed_up(fresh), "after_passes": after_passes}


def paraphraser(pair: Measured) -> Paraphraser:
    """Trained as in the authors' program."""
    with seeded(0):
        made = Paraphraser(64, 32)
    plan = Plan(stage="paraphraser", epochs=6, lr=0.1, seed=0, constant=True)
    task = ParaphraserTask(made, pair.frozen(None))
    Trainer(task, plan, pair.train, pair.engine, pair.config, pair.job.run).fit()
    return made


def follow(task: DistillationTask, pair: Measured, plan: Plan, after: dict[str, list[float]]) -> None:
    """Train, and add the pull after each number of passes."""
    trainer = Trainer(task, plan, pair.train, pair.engine, pair.config, pair.job.run)
    for passes in range(1, 1 + max(AFTER)):
        one_pass(trainer)
        if passes in AFTER:
            after[str(passes)].append(ratio(task, pair))


def program(pair: Measured, trained: Paraphraser, student: dict[str, Any], seed: int) -> tuple[DistillationTask, float]:
    """The authors' objective with the first weights of a seed, and its beta."""
    job = Job(replace(pair.config, **student, seed=seed), pair.engine, pair.job.run, {})
    side = job.load("student")
    channels, *size = side.shape
    beta = portable_beta(trained.factor_channels * math.prod(size))
    with seeded(seed):
        transfer = FactorTransfer(Translator(channels, trained.factor_channels), beta)
    teacher = pair.frozen(trained, size=(size[0], size[1]))
    return DistillationTask(side.tapped(), side.network.norm, [Labels(), transfer], teacher), beta


def ratio(task: DistillationTask, pair: Measured) -> float:
    """Pull of the factor term over that of the cross-entropy, in the map that both reach."""
    sample = Sample(pair.train, IMAGES)
    chunks = [np.arange(IMAGES)[place::4] for place in range(4)]
    found = [pulls(task, batch) for batch in sample.batches(chunks, view=0)]
    factor, labels = (
        sum(sum(each[name].norms.values()) for each in found) for name in ("factor_transfer", "cross_entropy")
    )
    return factor / labels


def summed_up(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, spread, and the values."""
    return {"n": len(values), "mean": statistics.mean(values), "sd": statistics.stdev(values), "values": list(values)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
