"""Whole passes, with input, checkpoints and all: the published procedure against ours, and what a long schedule costs.

    python benchmarks/passes.py ../shared [REPEATS]    # two threads; three repeats, 25 minutes; results/passes.json

Every repeat starts its processes anew: all passes of one may be several per cent faster than those of another.
`reference` records the teacher's graph, as the published program does; `reference without graph` does not; each is a
process of its own. `fill` is a pass with a live teacher that fills the cache, from which `cached` reads. From the
medians: `schedule`, what 164 passes with 8 views cost (6 passes of the paraphraser, 8 that fill the cache, 156 from it)
over 164 passes of the student alone.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from pair import Works, keep, measured, summed_up, take_turns

from factor_transfer.engine import stop_signals
from factor_transfer.train import Trainer

EPOCHS, VIEWS, PARAPHRASER_EPOCHS = 164, 8, 6
STEPS = 20
"""Of warming up."""


def main(shared: Path, repeats: int) -> None:
    """Measure, print, and keep the raw times, after every repeat."""
    seconds: dict[str, list[float]] = {}
    for done in range(1, repeats + 1):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(repeat, shared).result()
        for name, value in found["seconds"].items():
            seconds.setdefault(name, []).append(value)
        keep("passes", costs(seconds, found["machine"]) | {"images": found["images"], "repeats": done})


def repeat(shared: Path) -> dict[str, Any]:
    """Seconds of one pass of each kind."""
    with measured(shared) as pair, pair.reference(graph=True) as recorded, pair.reference(graph=False) as plain_loop:
        trainers = {name: pair.trainer(name) for name in ("live", "cached", "alone", "paraphraser")}

        def some_steps(name: str) -> None:
            trainers[name].task.train()
            for batch in trainers[name].train.batches(np.arange(STEPS * 128).reshape(STEPS, 128), view=0):
                trainers[name]._step(batch, 128, view=0)

        works: Works = {
            "reference": recorded.run_pass,
            "reference without graph": plain_loop.run_pass,
            "live": partial(one_pass, trainers["live"]),
            "fill": partial(one_pass, trainers["cached"]),  # into the empty cache
            "cached": partial(one_pass, trainers["cached"]),
            "alone": partial(one_pass, trainers["alone"]),
            "paraphraser": partial(one_pass, trainers["paraphraser"]),
            "input": partial(input_only, trainers["alone"]),
        }
        warm_up: Works = {name: partial(some_steps, name) for name in ("live", "alone", "paraphraser")}
        warm_up |= {"reference": partial(recorded.run, STEPS), "plain": partial(plain_loop.run, STEPS)}
        seconds = {name: times[0] for name, times in take_turns(works, 1, warm_up).items()}
        return {"seconds": seconds, "images": len(pair.train), "machine": pair.engine.describe()}


def costs(seconds: dict[str, list[float]], machine: dict[str, Any]) -> dict[str, Any]:
    """Medians, and what they say."""
    cost = summed_up(seconds, 1, machine)
    times = cost["times_alone"]
    parts = PARAPHRASER_EPOCHS * times["paraphraser"] + VIEWS * times["fill"] + (EPOCHS - VIEWS) * times["cached"]
    ours = ("live", "fill", "cached", "alone")
    return cost | {
        "reference_over": {name: times["reference"] / times[name] for name in ours},
        "reference_without_graph_over": {name: times["reference without graph"] / times[name] for name in ours},
        "schedule": {"epochs": EPOCHS, "views": VIEWS, "times_alone": parts / EPOCHS},
    }


def one_pass(trainer: Trainer) -> None:
    """A pass of our own engine, and the checkpoint at its end."""
    with stop_signals() as stop:
        trainer._pass(stop)
    trainer._end_pass()


def input_only(trainer: Trainer) -> None:
    """The input of a pass: order, pixels and augmentation."""
    chunks = np.array_split(np.random.default_rng(0).permutation(len(trainer.train)), trainer.steps)
    for _ in trainer.train.batches(chunks, view=0):
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
