"""One training step, input included: Factor Transfer with a live teacher, from the factor cache, and the student alone.

    python benchmarks/step.py ../shared    # ResNet-56 -> ResNet-20, batch 128, two threads; about four minutes

The three take turns of ten steps on real images, so that a disturbance of the machine meets all of them; the figure is
the median over turns, and ratios are of medians. The raw times are in `results/step.json`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from factor_transfer.cache import CachedTeacher, FactorCache
from factor_transfer.config import Config
from factor_transfer.console import silence
from factor_transfer.engine import Engine
from factor_transfer.files import write_json
from factor_transfer.frozen import FrozenTeacher
from factor_transfer.method import Paraphraser, Translator
from factor_transfer.pairs import Side
from factor_transfer.runs import Run, environment
from factor_transfer.stages import Job
from factor_transfer.tasks import DistillationTask, FactorTransfer, Labels, TeacherSide, Term
from factor_transfer.train import Plan, Trainer

TURNS, STEPS = 12, 10
RESULTS = Path(__file__).parent.parent / "results"


def main(shared: Path, work: Path) -> None:
    """Measure, print, and keep the raw times."""
    config = Config(
        data=str(shared / "cifar10-jpeg"),
        teacher="cifar_resnet56",
        teacher_weights=str(shared / "checkpoints" / "resnet56-cifar10-jpeg.safetensors"),
        student="cifar_resnet20",
        threads=2,
    )
    engine = Engine("cpu", config.precision, config.threads)
    job = Job(config, engine, Run(work), {})
    teacher, paraphraser = job.load("teacher"), Paraphraser(64, 32)
    side = TeacherSide(teacher.tapped(), teacher.network.norm, (8, 8), paraphraser)
    live = engine.place(FrozenTeacher(side))
    cache = FactorCache(work, {"benchmark": 1}, {"factor": (32, 8, 8)}, len(job.data.train), views=1)

    def trainer(name: str, terms: list[Term], from_teacher: nn.Module | None) -> Trainer:
        student: Side = job.load("student")
        task = DistillationTask(student.tapped(), student.network.norm, terms, from_teacher)
        task.train()
        return Trainer(task, Plan(stage=name, epochs=9, lr=0.01, seed=0), job.data.train, engine, config, Run(work))

    trainers = {
        "live": trainer("live", [Labels(), FactorTransfer(Translator(64, 32), 500)], live),
        "cached": trainer("cached", [Labels(), FactorTransfer(Translator(64, 32), 500)], CachedTeacher(live, cache)),
        "alone": trainer("alone", [Labels()], None),
    }
    order = np.random.default_rng(0).permutation(len(job.data.train))
    chunks = [order[start : start + 128] for start in range(0, 128 * STEPS, 128)]

    def turn(of: Trainer) -> float:
        start = time.perf_counter()
        for batch in of.train.batches(chunks, view=0):
            of._step(batch, 128, view=0)
        return (time.perf_counter() - start) / STEPS

    seconds = measure({name: partial(turn, of) for name, of in trainers.items()})
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {f"{name} / alone": medians[name] / medians["alone"] for name in ("live", "cached")}
    print({name: round(value, 4) for name, value in {**medians, **ratios}.items()})
    found = {"seconds_per_step": seconds, "medians": medians, "ratios": ratios, "turns": TURNS, "steps_a_turn": STEPS}
    write_json(RESULTS / "step.json", {**found, "environment": environment(**engine.describe())})


def measure(turns: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds of each, taking turns; the first turn warms up (and fills the cache)."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(TURNS + 1):
        for name, turn in turns.items():
            taken = turn()
            if number:
                seconds[name].append(taken)
    return seconds


if __name__ == "__main__":
    silence()
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]), Path(folder))
