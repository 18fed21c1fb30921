"""How hard the factor term pulls in the authors' CIFAR-10 program: what `--beta auto` carries over to other pairs.

    python benchmarks/balance.py ../shared    # five minutes; results/balance.json

ResNet-56 -> ResNet-20 with option-B shortcuts, k 0.5, beta 500, batches of 128 of 10,000 images of CIFAR-10 as JPEG
files, the paraphraser trained as there (6 passes at 0.1). `fresh` is before the first step, with ten first weights of
student and translator; `after_passes` follows three of them at their learning rate of 0.1.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pair import Measured, keep, measured
from passes import one_pass

from factor_transfer.balance import pulls
from factor_transfer.method import Paraphraser, Translator
from factor_transfer.runs import environment
from factor_transfer.schedule import Plan
from factor_transfer.seeds import seeded
from factor_transfer.splits import Sample
from factor_transfer.stages import Job
from factor_transfer.tasks import DistillationTask, ParaphraserTask
from factor_transfer.terms import FactorTransfer, Labels
from factor_transfer.train import Trainer

SEEDS, FOLLOWED = 10, 3
AFTER = (1, 2, 5)
"""Passes."""
IMAGES = 512


def main(shared: Path) -> None:
    """Measure, print, and keep."""
    with measured(shared, images=10_000, threads=1) as pair:
        pair.live = pair.frozen(paraphraser(pair))
        fresh, after = [], {str(passes): list[float]() for passes in AFTER}
        for seed in range(SEEDS):
            task = program(pair, seed)
            fresh.append(ratio(task, pair))
            if seed < FOLLOWED:
                follow(task, pair, seed, after)
            print(seed, round(fresh[-1], 4), {name: found[-1:] for name, found in after.items()}, flush=True)
    keep("balance", {
        "command": "python benchmarks/balance.py ../shared", "beta": 500, "fresh": summed_up(fresh),
        "after_passes": {name: summed_up(found) for name, found in after.items()}, "environment": environment(),
    })  # fmt: skip


def paraphraser(pair: Measured) -> Paraphraser:
    """Trained as in the authors' program."""
    with seeded(0):
        made = Paraphraser(64, 32)
    plan = Plan(stage="paraphraser", epochs=6, lr=0.1, seed=0, constant=True)
    task = ParaphraserTask(made, pair.frozen(None))
    Trainer(task, plan, pair.train, pair.engine, pair.config, pair.job.run).fit()
    return made


def follow(task: DistillationTask, pair: Measured, seed: int, after: dict[str, list[float]]) -> None:
    """Train, and add the pull after each number of passes."""
    plan = Plan(stage=f"seed{seed}", epochs=max(AFTER), lr=0.1, seed=seed, constant=True)
    trainer = Trainer(task, plan, pair.train, pair.engine, pair.config, pair.job.run)
    for passes in range(1, 1 + max(AFTER)):
        one_pass(trainer)
        if passes in AFTER:
            after[str(passes)].append(ratio(task, pair))


def program(pair: Measured, seed: int) -> DistillationTask:
    """The authors' objective with the first weights of a seed."""
    config = replace(pair.config, student="cifar_resnet20_b", seed=seed)
    student = Job(config, pair.engine, pair.job.run, {}).load("student")
    with seeded(seed):
        transfer = FactorTransfer(Translator(64, 32), 500)
    return DistillationTask(student.tapped(), student.network.norm, [Labels(), transfer], pair.live)


def ratio(task: DistillationTask, pair: Measured) -> float:
    """Pull of the factor term over that of the cross-entropy, in the last group's map."""
    sample = Sample(pair.train, IMAGES)
    chunks = [np.arange(IMAGES)[place::4] for place in range(4)]
    found = [pulls(task, batch) for batch in sample.batches(chunks, view=0)]
    factor, labels = (
        sum(each[name].norms["layer3"] for each in found) for name in ("factor_transfer", "cross_entropy")
    )
    return factor / labels


def summed_up(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, spread, and the values."""
    return {"n": len(values), "mean": statistics.mean(values), "sd": statistics.stdev(values), "values": list(values)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
