"""Whole passes, with input, checkpoints and all: the published procedure against ours, and what a long schedule costs.

    python benchmarks/passes.py ../shared [REPEATS]    # two threads; three repeats, half an hour; results/passes.json

`reference` records the teacher's graph, as the published program does; `reference without graph` does not. `fill` is a
pass with a live teacher that also fills the cache. From the medians: `schedule`, what 164 passes with 8 views cost
(6 passes of the paraphraser, 8 that fill the cache, 156 from it) over 164 passes of the student alone.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from pair import FACTOR, Measured, keep, measured, summed_up, take_turns

from factor_transfer.cache import CachedTeacher, FactorCache
from factor_transfer.engine import stop_signals
from factor_transfer.train import Trainer

EPOCHS, VIEWS, PARAPHRASER_EPOCHS = 164, 8, 6


def main(shared: Path, repeats: int) -> None:
    """Measure, print, and keep the raw times."""
    with measured(shared) as pair:
        trainers = {name: pair.trainer(name) for name in ("live", "cached", "alone", "paraphraser")}
        filling = pair.trainer("cached")
        works: dict[str, Callable[[], None]] = {
            "reference": pair.reference(graph=True).run_pass,
            "reference without graph": pair.reference(graph=False).run_pass,
            "fill": partial(fill, pair, filling),
            **{name: partial(one_pass, trainer) for name, trainer in trainers.items()},
            "input": partial(input_only, trainers["alone"]),
        }
        cost = summed_up(take_turns(works, repeats), 1, pair.engine)
        times = cost["times_alone"]
        parts = PARAPHRASER_EPOCHS * times["paraphraser"] + VIEWS * times["fill"] + (EPOCHS - VIEWS) * times["cached"]
        reference = {name: times["reference"] / times[name] for name in ("live", "fill", "cached", "alone")}
        plain = {name: times["reference without graph"] / times[name] for name in ("live", "fill", "cached", "alone")}
        keep(
            "passes",
            cost
            | {
                "reference_over": reference,
                "reference_without_graph_over": plain,
                "schedule": {"epochs": EPOCHS, "views": VIEWS, "times_alone": parts / EPOCHS},
                "images": len(pair.train),
                "repeats": repeats,
            },
        )


def one_pass(trainer: Trainer) -> None:
    """A pass of our own engine, and the checkpoint at its end."""
    with stop_signals() as stop:
        trainer._pass(stop)
    trainer._end_pass()


def fill(pair: Measured, trainer: Trainer) -> None:
    """A pass of our own engine into an empty cache."""
    folder = pair.work / "filled"
    cache = FactorCache(folder, {"benchmark": 2}, FACTOR, len(pair.train), views=1)
    trainer.task.teacher = CachedTeacher(pair.live, cache)
    one_pass(trainer)
    cache.close()
    shutil.rmtree(folder)


def input_only(trainer: Trainer) -> None:
    """The input of a pass: order, pixels and augmentation."""
    chunks = np.array_split(np.random.default_rng(0).permutation(len(trainer.train)), trainer.steps)
    for _ in trainer.train.batches(chunks, view=0):
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
