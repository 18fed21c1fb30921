"""The pair that all benchmarks of speed measure: ResNet-56 -> ResNet-20, batch 128, CIFAR-10 as JPEG files."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from reference import Cifar, Loop, apart
from torch import nn

from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import Paraphraser, Translator
from factor_transfer.method.losses import FactorTransfer, Labels
from factor_transfer.method.term import Term
from factor_transfer.networks.compiled import Compiled
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.training.cache import CachedTeacher, FactorCache
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import Run, environment
from factor_transfer.training.schedule import Plan
from factor_transfer.training.stages import Job
from factor_transfer.training.step import DistillationTask, ParaphraserTask, TeacherSide
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.console import silence
from factor_transfer.util.files import write_json
from factor_transfer.util.seeds import seeded

RESULTS = Path(__file__).parent.parent / "results"
FACTOR = {"factor": (32, 8, 8)}
VIEWS = 16
"""Of a cache that is filled in every pass."""


class Measured:
    """Everything that takes part, built once.

    Args:
        shared: folder of cifar10-jpeg and checkpoints.
        work: an empty folder.
        images: training images to use; all by default.
        threads: of torch.
        device: where it computes.
        batch_size: images a step.
    """

    def __init__(
        self,
        shared: Path,
        work: Path,
        images: int | None = None,
        threads: int = 2,
        *,
        device: str = "cpu",
        batch_size: int = 128,
    ) -> None:
        self.config = Config(
            data=str(shared / "cifar10-jpeg"),
            teacher="cifar_resnet56",
            teacher_weights=str(shared / "checkpoints" / "resnet56-cifar10-jpeg.safetensors"),
            student="cifar_resnet20",
            cache_dir=str(work),
            threads=threads,
            batch_size=batch_size,
            train_images=images,
        )
        self.threads = threads
        self.work, self.engine = work, Engine(device, self.config.precision, threads)
        self.job = Job(self.config, self.engine, Run(work), {})
        self.train = self.job.data.train
        self.teacher = self.job.load("teacher")
        with seeded(0):
            self.paraphraser = Paraphraser(64, 32)
        self.live = self.frozen(self.paraphraser)
        self.cache = self.new_cache("shared", 1)

    def new_cache(self, name: str, views: int) -> FactorCache:
        """An empty cache of its own."""
        return FactorCache(self.work, {"benchmark": name}, FACTOR, len(self.train), views)

    def frozen(self, paraphraser: Paraphraser | None, size: tuple[int, int] = (8, 8)) -> FrozenTeacher:
        """Our teacher, with a paraphraser or without, its map pooled to `size`."""
        side = TeacherSide(self.teacher.tapped(), self.teacher.network.norm, size, paraphraser)
        return self.engine.place(FrozenTeacher(side))

    def compiled(self) -> FrozenTeacher:
        """Our teacher as --torchcompile makes it."""
        network = Compiled(self.teacher.tapped(), self.config.batch_size, trains=False)
        side = TeacherSide(network, self.teacher.network.norm, (8, 8), self.paraphraser)
        return self.engine.place(FrozenTeacher(side))

    def trainer(self, name: str) -> Trainer:
        """Our engine: `live`, `fill`, `cached`, `alone`, each also with ` compiled` after it, or `paraphraser`.

        Every pass of `fill` shows a further view, which its cache does not have; all of `cached` share one.
        """
        name, _, compiled = name.partition(" ")
        live = self.compiled() if compiled and name in {"live", "fill"} else self.live
        views = VIEWS if name == "fill" else 1
        plan = Plan(stage=name, epochs=1000, lr=0.01, seed=0, views=views)
        if name == "paraphraser":
            with seeded(0):
                task: Any = ParaphraserTask(Paraphraser(64, 32), self.frozen(None))
        else:
            teachers: dict[str, Callable[[], nn.Module | None]] = {
                "live": lambda: live,
                "fill": lambda: CachedTeacher(live, self.new_cache(f"fill {compiled}", VIEWS)),
                "cached": lambda: CachedTeacher(live, self.cache),
                "alone": lambda: None,
            }
            terms: list[Term] = [Labels()]
            if name != "alone":
                with seeded(0):
                    terms.append(FactorTransfer(Translator(64, 32), 500))
            student = self.job.load("student")
            tapped = Compiled(student.tapped(), self.config.batch_size, trains=True) if compiled else student.tapped()
            task = DistillationTask(tapped, student.network.norm, terms, teachers[name]())
        return Trainer(task, plan, self.train, self.engine, self.config, Run(self.work))

    def reference(self, *, graph: bool) -> AbstractContextManager[Loop]:
        """The published procedure on the same images and networks, in a process of its own."""
        return apart(self.threads, **self.reference_parts(graph=graph))

    def reference_parts(self, *, graph: bool) -> dict[str, Any]:
        """What a `Reference` is made of."""
        (batch,) = self.train.batches([np.arange(len(self.train))], view=None)
        pixels = np.ascontiguousarray(batch.image.permute(0, 2, 3, 1).numpy())
        teacher, student = self.job.load("teacher"), self.job.load("student")
        norm = teacher.network
        with seeded(0):
            return {
                "teacher": teacher.tapped(),
                "student": student.tapped(),
                "paraphraser": Paraphraser(64, 32),
                "translator": Translator(64, 32),
                "images": Cifar(pixels, self.train.labels, list(norm.mean), list(norm.std)),
                "graph": graph,
            }


@contextmanager
def measured(shared: Path, images: int | None = None, threads: int = 2, **more: Any) -> Iterator[Measured]:
    """`Measured` in a temporary folder, without any output but the benchmark's own."""
    silence()
    with tempfile.TemporaryDirectory() as folder:
        yield Measured(shared, Path(folder), images, threads, **more)


Works = dict[str, Callable[[], Any]]


def take_turns(works: Works, turns: int, warm_up: Works | None = None) -> dict[str, list[float]]:
    """Seconds of each, taking turns, so that a disturbance meets all.

    `warm_up` comes first and is not counted: a turn, where it is not given.
    """
    for work in (warm_up or works).values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            time.sleep(1)  # for processes that still load images for the one before
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
        print({name: round(times[-1], 3) for name, times in seconds.items()}, flush=True)
    return seconds


def summed_up(
    seconds: dict[str, list[float]], unit: float, machine: dict[str, Any], base: str = "alone"
) -> dict[str, Any]:
    """Medians in `unit`s (steps or passes), how many times the time of `base` each takes, and the raw times."""
    medians = {name: statistics.median(times) / unit for name, times in seconds.items()}
    return {
        "median_seconds": medians,
        f"times_{base}": {name: value / medians[base] for name, value in medians.items()},
        "raw_seconds": seconds,
        "environment": environment(**machine),
    }


def keep(name: str, found: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    write_json(RESULTS / f"{name}.json", found)
    print({key: value for key, value in found.items() if key not in {"raw_seconds", "environment"}})
