"""Many short runs in one process: memory, open files and threads must stay flat.

    python benchmarks/soak.py --minutes 45    # leaves results/soak.json

Each run is the whole job on the built-in digits (paraphraser, factor cache, student, the student alone, export) from a
teacher that the first run trained. The first `WARM_UP` runs fill torch's and the allocator's own caches and are left
out of the slope.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np

from factor_transfer.config import Config
from factor_transfer.console import silence
from factor_transfer.distillation import run_distillation
from factor_transfer.files import write_json
from factor_transfer.runs import environment

RESULT = Path(__file__).parent.parent / "results" / "soak.json"
WORK = Path("runs/soak")
WARM_UP = 10


def config(out: Path, teacher: Path | None) -> Config:
    """A run of seconds; the first trains the teacher, too."""
    small, smaller = ({"layers": (1, 1, 1), "channels": widths} for widths in ((8, 16, 32), (4, 8, 16)))
    return Config(
        data="digits", teacher="cifar_resnet20", teacher_args=small, student="cifar_resnet20", student_args=smaller,
        teacher_weights=str(teacher) if teacher else None, teacher_epochs=0 if teacher else 6,
        paraphraser_epochs=1, epochs=2, views=1, cache_dir=str(WORK / "cache"), batch_size=128, lr=0.05, baseline=True,
        threads=1, device="cpu", checkpoint_minutes=0.001, out=str(out),
    )  # fmt: skip


def figures() -> dict[str, float]:
    """What this process holds."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "resident_mb": int(status["VmRSS"].split()[0]) / 1024,
        "open_files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
        "python_threads": threading.active_count(),
    }


def main() -> None:
    """Run until the time is up, and say how much each figure grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45)
    minutes = parser.parse_args().minutes
    silence()
    shutil.rmtree(WORK, ignore_errors=True)
    run_distillation(config(WORK / "first", None))
    began, rows = time.monotonic(), []
    while time.monotonic() - began < 60 * minutes:
        shutil.rmtree(WORK / "cache")  # so that every run fills it anew
        run_distillation(config(WORK / "again", WORK / "first" / "teacher.safetensors"))
        shutil.rmtree(WORK / "again")
        rows.append({"minutes": round((time.monotonic() - began) / 60, 2), **figures()})
        if len(rows) % 10 == 0:
            write_json(RESULT, result(rows))
    write_json(RESULT, result(rows))
    print(json.dumps({name: value for name, value in result(rows).items() if name != "rows"}, indent=2))


def result(rows: list[dict[str, float]]) -> dict[str, object]:
    """The figures, and the slope of each over runs after the warm-up."""
    later = rows[WARM_UP:]
    names = [name for name in rows[0] if name != "minutes"]
    slopes = {}
    if len(later) > 2:
        runs = np.arange(len(later))
        slopes = {name: float(np.polyfit(runs, [row[name] for row in later], 1)[0]) for name in names}
    return {
        "command": "python benchmarks/soak.py",
        "environment": environment(),
        "runs": len(rows),
        "minutes": rows[-1]["minutes"],
        "warm_up_runs": WARM_UP,
        "growth_per_run": slopes,
        "last_less_first_after_warm_up": {name: later[-1][name] - later[0][name] for name in names} if later else {},
        "rows": rows,
    }


if __name__ == "__main__":
    main()
