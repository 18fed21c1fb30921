"""One process of two threads against two processes of one: passes of the real command, teacher live.

    python benchmarks/processes.py ../shared PARAPHRASER    # eight minutes; results/processes.json

They take turns of one pass over 12,800 images. PARAPHRASER is a trained paraphraser.safetensors of this pair, so that
only the student's stage is run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pair import keep

from factor_transfer.training.run_folder import environment

REPEATS = 3
SHAPES = {"1 process, 2 threads": (1, 2), "2 processes, 1 thread": (2, 1)}


def seconds(shared: Path, paraphraser: Path, processes: int, threads: int) -> float:
    """Of one pass."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "factor_transfer",
            "distill", "--data", str(shared / "cifar10-jpeg"), "--teacher", "cifar_resnet56",
            "--teacher-weights", str(shared / "checkpoints" / "resnet56-cifar10-jpeg.safetensors"),
            "--student", "cifar_resnet20", "--paraphraser", str(paraphraser), "--epochs", "1",
            "--train-images", "12800", "--threads", str(threads), "--out", f"{folder}/run",
        ]  # fmt: skip
        environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
        if done.returncode:
            sys.exit(done.stderr)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        return float(summary["seconds"]["student"])


def main(shared: Path, paraphraser: Path) -> None:
    """Measure in turns, print, and keep after every repeat."""
    found: dict[str, list[float]] = {name: [] for name in SHAPES}
    for _ in range(REPEATS):
        for name, shape in SHAPES.items():
            found[name].append(seconds(shared, paraphraser, *shape))
            print(name, found[name][-1], flush=True)
        medians = {name: statistics.median(times) for name, times in found.items()}
        keep("processes", {"median_seconds_a_pass": medians, "raw_seconds": found, "environment": environment()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
