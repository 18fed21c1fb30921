"""Whole passes, with input, checkpoints and all: the published procedure against ours, and what a long schedule costs.

    python benchmarks/passes.py ../shared [REPEATS]    # two threads; three repeats, 25 minutes; results/passes.json

`reference` records the teacher's graph, as the published program does; `reference without graph` does not; each is a
process of its own. `fill` is a pass with a live teacher that also fills the cache. From the medians: `schedule`, what
164 passes with 8 views cost (6 passes of the paraphraser, 8 that fill the cache, 156 from it) over 164 passes of the
student alone.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from pair import FACTOR, Measured, Works, keep, measured, summed_up, take_turns

from factor_transfer.cache import CachedTeacher, FactorCache
from factor_transfer.engine import stop_signals
from factor_transfer.train import Trainer

EPOCHS, VIEWS, PARAPHRASER_EPOCHS = 164, 8, 6
STEPS = 20
"""Of warming up."""


def main(shared: Path, repeats: int) -> None:
    """Measure, print, and keep the raw times."""
    with measured(shared) as pair, pair.reference(graph=True) as recorded, pair.reference(graph=False) as plain_loop:
        trainers = {name: pair.trainer(name) for name in ("live", "cached", "alone", "paraphraser")}
        works: Works = {
            "reference": recorded.run_pass,
            "reference without graph": plain_loop.run_pass,
            "fill": partial(fill, pair, pair.trainer("cached")),
            **{name: partial(one_pass, trainer) for name, trainer in trainers.items()},
            "input": partial(input_only, trainers["alone"]),
        }
        warm_up: Works = {name: partial(some_steps, trainer) for name, trainer in trainers.items()}
        warm_up |= {"reference": partial(recorded.run, STEPS), "plain": partial(plain_loop.run, STEPS)}
        warm_up |= {"cached": works["cached"]}  # fills the cache
        cost = summed_up(take_turns(works, repeats, warm_up), 1, pair.engine)
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


def some_steps(trainer: Trainer) -> None:
    """A few steps, to warm up."""
    trainer.task.train()
    for batch in trainer.train.batches(np.arange(STEPS * 128).reshape(STEPS, 128), view=0):
        trainer._step(batch, 128, view=0)


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
