"""What two processes decide where each sees another machine; `torchrun machines.py FOLDER` tries every case.

Process 1 is made to see less disk, no bf16, other images, another run folder, and so on. Each case leaves `NAME.json`:
what every process said.
"""

from __future__ import annotations

import json
import os
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import factor_transfer.rehearsal
import factor_transfer.training.cache
import factor_transfer.training.engine
import factor_transfer.training.processes
import factor_transfer.training.stages
from factor_transfer import distill
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import Run
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.console import silence
from factor_transfer.util.errors import FactorTransferError

RANK = int(os.environ.get("RANK", "0"))
JOB: dict[str, Any] = {
    "teacher_args": {"layers": (1, 1, 1), "channels": (4, 4, 8)}, "paraphraser_epochs": 1, "train_images": 200,
    "student_args": {"layers": (1, 1, 1), "channels": (4, 4, 4)}, "epochs": 6, "batch_size": 64, "lr": 0.05,
    "threads": 1, "device": "cpu", "precision": "fp32", "log_with": "none",
}  # fmt: skip
Usage = namedtuple("Usage", "total used free")
CASES: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {}


def case(function: Callable[[Path, pytest.MonkeyPatch], Any]) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    CASES[function.__name__] = function
    return function


def job(folder: Path, data: str = "digits", **changed: Any) -> Any:
    settings = {**JOB, "out": str(folder / "run"), "cache_dir": str(folder / f"cache{RANK}"), **changed}
    if "teacher_epochs" not in settings:
        settings["teacher_weights"] = str(folder.parent / "less_disk" / "run" / "teacher.safetensors")
    return distill("cifar_resnet20", "cifar_resnet20_b", data, **settings)


@contextmanager
def watched() -> Iterator[dict[str, list[tuple[int, int, int]]]]:
    """(pass, view, sample) of all that is shown, by stage."""
    shown: dict[str, list[tuple[int, int, int]]] = {}
    step = Trainer.step

    def watching(self: Trainer, parts: Any, size: int, view: int) -> Any:
        seen = [(self.progress.epoch, view, index) for batch in parts for index in batch.index.tolist()]
        shown.setdefault(self.plan.stage, []).extend(seen)
        return step(self, parts, size, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", watching)
        yield shown


@case
def less_disk(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """Room for any number of views in process 0, for two in process 1; and the teacher of all other cases."""
    free = 10**12 if RANK == 0 else 2 * 2 * 200 * 32
    patch.setattr(factor_transfer.training.cache.shutil, "disk_usage", lambda _: Usage(10**12, 0, free))
    with watched() as shown:
        result = job(folder, views="auto", teacher_epochs=12, train_images=200)
    return {"views": result.summary["student"]["views"], "pins": Run(folder / "run").pins()["views"],
            "shown": shown["student"]}  # fmt: skip


@case
def slow_folder(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The run above again, its student not yet trained; process 1 is not shown what process 0 wrote."""
    run = folder.parent / "less_disk" / "run"
    Engine("cpu").wait()
    if RANK == 0:
        (run / "summary.json").unlink()
        (run / "stages" / "student.json").unlink()
    else:
        patch.setattr(Run, "recorded", lambda *_: None)
        patch.setattr(Run, "pins", lambda _: {})
    Engine("cpu").wait()
    with watched() as shown:
        job(folder.parent / "less_disk", views="auto", teacher_epochs=12)
    return {"shown": shown}


@case
def no_bf16(_: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(factor_transfer.training.engine, "_has_bf16", lambda _: RANK == 0)
    return Engine("cpu", "auto").bf16


@case
def uneven_hosts(_: Path, patch: pytest.MonkeyPatch) -> Any:
    """One process here, two there, were there a third."""
    patch.setenv("LOCAL_WORLD_SIZE", "1" if RANK == 0 else "2")
    engine = Engine("cpu")
    return {"hosts": engine.hosts, "part": engine.shard(np.arange(10), by_host=True).tolist()}


@case
def no_cache_folder(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """The cache can be opened in process 0 alone."""
    folder.mkdir(exist_ok=True)
    (folder / "cache1").write_text("")
    kinds = []
    real = factor_transfer.training.stages.DistillationTask

    def task(*given: Any) -> Any:
        kinds.append(type(given[3]).__name__)
        return real(*given)

    patch.setattr(factor_transfer.training.stages, "DistillationTask", task)
    job(folder, views=2)
    return kinds[-1]


@case
def other_images(folder: Path, _: pytest.MonkeyPatch) -> Any:
    """As many of the same names and sizes, one pixel apart."""
    for name in ("cat", "dog"):
        where = folder / f"images{RANK}" / name
        where.mkdir(parents=True)
        for number in range(8):
            pixels = np.full((8, 8, 3), 20 * number, np.uint8)
            pixels[0, 0] = RANK if (name, number) == ("dog", 5) else 0
            Image.fromarray(pixels).save(where / f"{number}.bmp")
    return job(folder, str(folder / f"images{RANK}"), train_images=None)


@case
def other_settings(folder: Path, _: pytest.MonkeyPatch) -> Any:
    return job(folder, lr=0.05 + RANK / 100)


@case
def other_room(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """No room for the run in process 0, which alone looks at it."""
    patch.setattr(
        factor_transfer.rehearsal.shutil, "disk_usage", lambda _: Usage(10**12, 0, 1000 if RANK == 0 else 10**12)
    )
    return job(folder)


@case
def other_first_weights(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    real = torch.nn.init.kaiming_normal_
    patch.setattr(torch.nn.init, "kaiming_normal_", lambda w, **how: real(w, **how).data.add_(RANK / 100))
    return job(folder)


@case
def other_checkpoint(folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """Process 1 is shown an older one."""
    ends = Trainer._end_pass

    def end(self: Trainer) -> None:
        ends(self)
        if (self.plan.stage, self.progress.epoch) == ("student", 2):
            raise FactorTransferError("stopped")

    with pytest.MonkeyPatch.context() as first:
        first.setattr(Trainer, "_end_pass", end)
        with pytest.raises(FactorTransferError, match="stopped"):
            job(folder)
    if RANK == 1:
        found = Run._checkpoints
        patch.setattr(Run, "_checkpoints", lambda self, stage: found(self, stage)[:-1])
    return job(folder)


def other_versions() -> str:
    """Before the processes are joined."""
    real = factor_transfer.training.processes.machine_facts
    with pytest.MonkeyPatch.context() as patch:
        if RANK:
            patch.setattr(
                factor_transfer.training.processes, "machine_facts", lambda device: {**real(device), "timm": "0.4"}
            )
        try:
            Engine("cpu", "fp32")
        except FactorTransferError as error:
            return f"error: {error}"
    return "joined"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if RANK:
        silence()
    versions = other_versions()
    CASES["versions"] = lambda *_: versions
    engine = Engine("cpu", "fp32")
    for name, run in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            try:
                said = run(folder / name, patch)
            except FactorTransferError as error:
                said = f"error: {error}"
        said = said if isinstance(said, (str, int, list, dict)) else "finished"
        alls = engine.all_of(said)
        if engine.main:
            (folder / f"{name}.json").write_text(json.dumps(alls))
        engine.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
