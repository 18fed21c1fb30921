"""Whole passes, with input, checkpoints and all: the published procedure against ours, and what a long schedule costs.

    python benchmarks/passes.py ../shared [REPEATS [TURNS]]    # two threads; 3 times 2; 40 minutes; results/passes.json

The kinds take turns of one pass over 12,800 images: the machine's speed swings within minutes, and short turns meet the
same swing. Every repeat starts its processes anew: all passes of one may be several per cent faster than those of
another. `reference` records the teacher's graph, as the published program does; `reference without graph` does not;
each is a process of its own. `fill` is a pass with a live teacher that fills the cache, `cached` one from a full cache.
From the medians: `schedule`, what 164 passes with 8 views cost (6 passes of the paraphraser, 8 that fill the cache, 156
from it) over 164 passes of the student alone.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from pair import VIEWS, Works, keep, measured, summed_up, take_turns

from factor_transfer.training.engine import stop_signals
from factor_transfer.training.trainer import Trainer

EPOCHS, SHOWN, PARAPHRASER_EPOCHS = 164, 8, 6
STEPS = 20
"""Of warming up."""

IMAGES = 12_800
KINDS = "live", "fill", "cached", "alone"


def main(shared: Path, repeats: int, turns: int) -> None:
    """Measure, print, and keep the raw times, after every repeat."""
    seconds: dict[str, list[float]] = {}
    for done in range(1, repeats + 1):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(repeat, shared, turns).result()
        for name, values in found["seconds"].items():
            seconds.setdefault(name, []).extend(values)
        keep("passes", costs(seconds, found["machine"]) | {"images": IMAGES, "repeats": done, "turns": turns})


def repeat(shared: Path, turns: int) -> dict[str, Any]:
    """Seconds of passes of each kind, which take turns."""
    with (
        measured(shared, IMAGES) as pair,
        pair.reference(graph=True) as recorded,
        pair.reference(graph=False) as plain,
    ):
        trainers = {name: pair.trainer(name) for name in (*KINDS, "paraphraser")}
        one_pass(trainers["cached"])  # fills the cache for all that read from it

        def some_steps(name: str) -> None:
            trainer, view = trainers[name], VIEWS - 1 if "fill" in name else 0  # one that no measured pass fills
            trainer.objective.train()
            for batch in trainer.train.batches(np.arange(STEPS * 128).reshape(STEPS, 128), view=view):
                trainer.step([batch], 128, view=view)

        works: Works = {"reference": recorded.run_pass, "reference without graph": plain.run_pass}
        works |= {name: partial(one_pass, trainer) for name, trainer in trainers.items()}
        works["input"] = partial(input_only, trainers["alone"])
        warm_up: Works = {name: partial(some_steps, name) for name in trainers}
        warm_up |= {"reference": partial(recorded.run, STEPS), "plain": partial(plain.run, STEPS)}
        return {"seconds": take_turns(works, turns, warm_up), "machine": pair.engine.describe()}


def costs(seconds: dict[str, list[float]], machine: dict[str, Any]) -> dict[str, Any]:
    """Medians, and what they say."""
    cost = summed_up(seconds, 1, machine)
    times: dict[str, float] = cost["times_alone"]
    ours = [name for name in times if "reference" not in name]
    return cost | {
        "reference_over": {name: times["reference"] / times[name] for name in ours},
        "reference_without_graph_over": {name: times["reference without graph"] / times[name] for name in ours},
        "schedule": {
            "epochs": EPOCHS,
            "views": SHOWN,
            "times_alone": schedule(times),
        },
    }


def schedule(times: dict[str, float]) -> float:
    """The cost of a whole schedule over that of the student alone."""
    ours = SHOWN * times["fill"] + (EPOCHS - SHOWN) * times["cached"]
    return (PARAPHRASER_EPOCHS * times["paraphraser"] + ours) / (EPOCHS * times["alone"])


def one_pass(trainer: Trainer) -> None:
    """A pass of our own engine, and the checkpoint at its end."""
    with stop_signals() as stop:
        trainer.run_pass(stop)


def input_only(trainer: Trainer) -> None:
    """The input of a pass: order, pixels and augmentation."""
    chunks = np.array_split(np.random.default_rng(0).permutation(len(trainer.train)), trainer.steps)
    for _ in trainer.train.batches(chunks, view=0):
        pass


if __name__ == "__main__":
    folder, repeats, turns = [*sys.argv[1:], *("3", "2")[len(sys.argv) - 2 :]]
    main(Path(folder), int(repeats), int(turns))
