"""Trainings that are the same for one process and for several; `torchrun part_batches.py FOLDER` runs them all.

Each leaves, on rank 0, `NAME.pt`: loss and gradients of every step, weights and averaged weights at the end, and the
sample indices that each process saw in each pass.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factor_transfer.config import Config, DataConfig
from factor_transfer.data.dataset import open_data
from factor_transfer.data.splits import NO_LABEL, Split
from factor_transfer.data.unlabelled import Mixed
from factor_transfer.method.factor_transfer import Paraphraser, Translator
from factor_transfer.method.losses import FactorTransfer, Labels, Term
from factor_transfer.networks.compiled import Compiled
from factor_transfer.networks.features import FrozenTeacher, Tapped
from factor_transfer.networks.load import InputNorm
from factor_transfer.training.cache import CachedTeacher, FactorCache
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import Run
from factor_transfer.training.schedule import Plan
from factor_transfer.training.step import DistillationTask, ParaphraserTask, TeacherSide
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.console import silence
from factor_transfer.util.errors import TrainingError
from factor_transfer.util.files import state_fingerprint
from factor_transfer.util.seeds import seeded

IMAGES = 466
"""Four batches of 99, and a short one."""

LABELLED, BARE = 350, 232
"""Of `mixed`: in each of the two passes of a round all of the labelled images, and half of the others."""

NAMES = ("student", "compiled", "cached", "paraphraser", "no_labels", "mixed", "mixed_cached", "batch_norm", "float32",
         "skips", "stops")  # fmt: skip
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Faulty(Term):
    """Not a number in the last process, and only there: once, or from then on."""

    name = "faulty"

    def __init__(self, engine: Engine, always: bool) -> None:
        super().__init__()
        self.last, self.always, self.calls = engine.rank == engine.processes - 1, always, 0

    def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
        """Zero, else."""
        self.calls += 1
        bad = self.last and (self.calls == 5 or (self.always and self.calls > 5))
        zero: Tensor = student.logits.sum() * (math.nan if bad else 0)
        return zero


def network(width: int, norm: bool) -> nn.Sequential:
    """8x8 images -> maps of 4x4 behind layer `map`, and 10 classes."""
    parts: dict[str, nn.Module] = {"conv": nn.Conv2d(3, width, 3, 2, 1)}
    parts |= {"norm": nn.BatchNorm2d(width)} if norm else {}
    parts |= {"map": nn.LeakyReLU(0.1), "pool": nn.AdaptiveAvgPool2d(2), "flat": nn.Flatten(),
              "head": nn.Linear(4 * width, 10)}  # fmt: skip
    found = nn.Sequential()
    for name, part in parts.items():
        found.add_module(name, part)
    return found


def trainer(name: str, folder: Path, engine: Engine) -> Trainer:
    """One of `NAMES`: 99 images a batch, so that parts are uneven in every batch, and the last batch is short."""
    mixed = name.startswith("mixed")
    count = LABELLED + BARE if mixed else IMAGES
    train: Split = open_data(DataConfig(data="digits", train_images=count), default_size=lambda: 8).train
    if mixed:
        train.labels = np.where(np.arange(count) < LABELLED, train.labels, NO_LABEL)
        train = Mixed(train, passes=2)
    with seeded(0):
        teacher, student = network(8, True), network(6, name == "batch_norm")
        paraphraser, translator = Paraphraser(8, 4), Translator(6, 4)
    tapped = Tapped(teacher, "map")
    live: Any = FrozenTeacher(
        TeacherSide(tapped, InputNorm(*HALF), (4, 4), None if name == "paraphraser" else paraphraser)
    )
    if name in {"cached", "mixed_cached"}:
        live = CachedTeacher(live, FactorCache(folder / "cache", {}, {"factor": (4, 4, 4)}, count, 1), LABELLED)
    terms: list[Term] = [Labels(), FactorTransfer(translator, 20.0)]
    if name == "no_labels":
        terms = [FactorTransfer(translator, 20.0)]
    if name in {"skips", "stops"}:
        terms = [Labels(), Faulty(engine, always=name == "stops")]
    trained = Tapped(student, "map")
    if name == "compiled":
        trained = Compiled(trained, len(engine.shard(np.arange(99))), trains=True)
    task: Any = (
        ParaphraserTask(paraphraser, live)
        if name == "paraphraser"
        else DistillationTask(trained, InputNorm(*HALF), terms, live)
    )
    config = Config(teacher="t", student="s", data="digits", batch_size=99, device="cpu", lr=0.05)
    epochs = {"float32": 10, "skips": 3, "stops": 3}.get(name, 2)
    views = 1 if name in {"cached", "mixed_cached"} else 0
    plan = Plan(
        stage=name,
        epochs=epochs,
        lr=0.05,
        seed=0,
        views=views,
        average=mixed or name in {"student", "compiled", "cached"},
    )
    folder.mkdir(parents=True, exist_ok=True)
    task = task.float() if name == "float32" else task.double()
    return Trainer(task, plan, train, engine, config, Run(folder, writes=engine.main))


def observed(made: Trainer) -> dict[str, Any]:
    """Train to the end, and tell what happened."""
    losses: list[float] = []
    gradients: list[Tensor] = []
    shown: list[tuple[int, int]] = []
    step = made.step

    def watched(parts: Any, size: int, view: Any) -> Any:
        shown.extend((made.progress.epoch, index) for batch in parts for index in batch.index.tolist())
        values = step(parts, size, view)
        if values is None:
            return None
        losses.append(values["loss"])
        gradients.append(torch.cat([p.grad.flatten() for p in made.module.parameters() if p.grad is not None]))
        return values

    made.step = watched  # type: ignore[method-assign]
    error = ""
    try:
        made.fit()
    except TrainingError as stopped:
        error = str(stopped)
    average = made.objective.get_trainable_module(ema=True)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "gradients": torch.stack(gradients),
        "weights": {name: value.clone() for name, value in made.module.state_dict().items()},
        "average": {} if average is None else dict(average.module.state_dict()),
        "shown": made.engine.all_of(shown),
        "skipped": made.engine.all_of(made.progress.skipped),
        "errors": made.engine.all_of(error),
        "compiled": made.engine.all_of(getattr(getattr(made.module, "student", None), "_run", None) is not None),
        "fingerprints": made.engine.all_of(state_fingerprint(made.module.state_dict())),
    }


def main(folder: Path) -> None:
    """All of them."""
    torch.set_num_threads(1)
    silence()
    engine = Engine("cpu", "fp32")
    for name in NAMES:
        found = observed(trainer(name, folder / name, engine))
        if engine.main:
            torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
