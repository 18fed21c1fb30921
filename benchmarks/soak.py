"""Many short runs in one process: memory, open files and threads must stay flat.

    python benchmarks/soak.py --minutes 45    # leaves results/soak.json

Each run is the whole job on the built-in digits (paraphraser, factor cache, student, the student alone, export, report)
from a teacher that the first run trained. Growth is the slope of a straight line over the runs of the second half; the
first half fills torch's and the allocator's own caches. Flat is a slope of at most `FLAT` a run.
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
from scipy.stats import linregress

from factor_transfer.config import Config
from factor_transfer.console import silence
from factor_transfer.distillation import run_distillation
from factor_transfer.files import write_json
from factor_transfer.runs import environment

RESULT = Path(__file__).parent.parent / "results" / "soak.json"
WORK = Path("runs/soak")
FLAT = {"resident_mb": 0.01, "anonymous_mb": 0.01, "open_files": 0.0, "threads": 0.0, "python_threads": 0.0}
"""The largest growth by a run that is called flat: 1 MB in a hundred runs, and no file or thread at all."""


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
        "anonymous_mb": int(status["RssAnon"].split()[0]) / 1024,  # without pages of files, which the kernel takes back
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
    began: float = time.monotonic()
    rows: list[dict[str, float]] = []
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
    """The figures, and the slope of each over the runs of the second half."""
    later = rows[len(rows) // 2 :]
    growth = {name: slope(np.array([row[name] for row in later])) for name in FLAT} if len(later) > 2 else {}
    return {
        "command": "python benchmarks/soak.py",
        "environment": environment(),
        "runs": len(rows),
        "minutes": rows[-1]["minutes"],
        "second_half": {"runs": len(later), "growth_per_run": growth, "flat_is_at_most": FLAT,
                        "flat": {name: found["slope"] <= FLAT[name] + 1e-9 for name, found in growth.items()},
                        "last_less_first": {name: later[-1][name] - later[0][name] for name in FLAT}},
        "rows": rows,
    }  # fmt: skip


def slope(values: np.ndarray) -> dict[str, float]:
    """Least squares over runs, with the standard error of the slope."""
    if np.ptp(values) == 0:
        return {"slope": 0.0, "standard_error": 0.0}
    fit = linregress(np.arange(len(values)), values)
    return {"slope": float(fit.slope), "standard_error": float(fit.stderr)}


if __name__ == "__main__":
    main()
