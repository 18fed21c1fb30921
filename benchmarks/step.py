"""One training step, input included: the published procedure, ours with a live teacher, from the factor cache, alone.

    python benchmarks/step.py ../shared    # two threads; ten minutes; results/step.json

They take turns of ten steps on real images; the figure is the median over turns, and ratios are of medians. `reference`
records the teacher's graph, as the published program does; `reference without graph` does not. `compiled` is with
--torchcompile.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
from pair import Works, keep, measured, summed_up, take_turns

from factor_transfer.training.trainer import Trainer

TURNS, STEPS = 20, 10
OURS = "live", "cached", "alone", "live compiled", "cached compiled", "alone compiled"


def main(shared: Path) -> None:
    """Measure, print, and keep the raw times."""
    with measured(shared, images=12_800) as pair:
        order = np.random.default_rng(0).permutation(len(pair.train))
        chunks = [order[start : start + 128] for start in range(0, 128 * STEPS, 128)]

        def turn(of: Trainer) -> None:
            of.task.train()
            for batch in of.train.batches(chunks, view=0):
                of._step(batch, 128, view=0)

        with pair.reference(graph=True) as recorded, pair.reference(graph=False) as plain:
            works: Works = {
                "reference": partial(recorded.run, STEPS),
                "reference without graph": partial(plain.run, STEPS),
            }
            works |= {name: partial(turn, pair.trainer(name)) for name in OURS}
            seconds = take_turns(works, TURNS)
        keep("step", summed_up(seconds, STEPS, pair.engine.describe()) | {"turns": TURNS, "steps_a_turn": STEPS})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
