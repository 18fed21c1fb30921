"""Peak memory of a process that trains for fifty steps: reference, live, cached, alone; each in a process of its own.

    python benchmarks/memory.py ../shared    # about three minutes; results/memory.json

The difference to `nothing`, which only loads images and networks, is what training itself takes.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from pair import keep, measured
from reference import Reference

from factor_transfer.training.run_folder import environment

KINDS = ("nothing", "reference", "live", "cached", "alone")
STEPS = 50


def work(shared: Path, kind: str) -> None:
    """Train, and print the peak resident memory in MB."""
    with measured(shared, images=12_800) as pair:
        if kind == "reference":
            Reference(**pair.reference_parts(graph=True)).run(STEPS)
        elif kind != "nothing":
            trainer = pair.trainer(kind)
            trainer.objective.train()
            for batch in trainer.train.batches(np.arange(STEPS * 128).reshape(STEPS, 128), view=0):
                trainer.step([batch], 128, view=0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main(shared: str) -> None:
    """Measure each, print, and keep."""
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, shared, kind]
        found[kind] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(kind, found[kind], flush=True)
    keep("memory", {"peak_mb": found, "environment": environment(cores=os.cpu_count())})


if __name__ == "__main__":
    if len(sys.argv) > 2:
        work(Path(sys.argv[1]), sys.argv[2])
    else:
        main(sys.argv[1])
