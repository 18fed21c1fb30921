"""Whether two versions of the code train the same bits: small runs of every method, and one that is interrupted.

    python benchmarks/same_bits.py FOLDER > before.json   # with the one version
    python benchmarks/same_bits.py FOLDER2 > after.json   # with the other, on the same machine
    diff before.json after.json

Each run is float32 on one thread of the CPU, on scikit-learn's digits. What is kept of it: SHA-256 of the weights that
it ends with, and every pass's metrics without its seconds.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.numpy import load_file

COMMON = """distill --config recipe:digits --paraphraser-epochs 2 --epochs 4 --precision fp32 --threads 1 --device cpu
            --log-with none"""

STUDENT = '"stage": "student"'

RUNS = {
    "ft live": "",
    "ft cached": "--views 2",
    "ft+kd": "--kd-weight 0.9 --label-weight 0.1 --no-baseline",
    "at": "--beta 0 --at-weight auto --no-baseline",
    "fitnet": "--beta 0 --kd-weight 0.9 --label-weight 0.1 --hint-epochs 1 --no-baseline",
    "two layers": "--teacher-layer layer2,layer3 --student-layer layer2,layer3 --no-baseline",
    "label-free": "--label-weight 0 --no-baseline",
    "ft interrupted": "--no-baseline",
}


def main(folder: Path) -> None:
    """Runs all; what was run before is not run again."""
    found = {}
    for name, settings in RUNS.items():
        out = folder / name.replace(" ", "-")
        teacher = f"--teacher-epochs 0 --teacher-weights {folder / 'ft-live' / 'teacher.safetensors'}"
        words = f"{settings} {teacher if 'label-free' in name else '--teacher-epochs 4'}".split()
        command = [sys.executable, "-m", "factor_transfer", *COMMON.split(), *words, "--out", str(out)]
        if "interrupted" in name and not out.exists():
            interrupt(command, out)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found[name] = kept(out)
    print(json.dumps(found, indent=1))


def interrupt(command: list[str], out: Path) -> None:
    """Ends a run by SIGTERM after the student's first pass."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (path := out / "metrics.jsonl").exists() or STUDENT not in path.read_text():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)


def kept(out: Path) -> dict[str, object]:
    """What must not change."""
    weights = {}
    for path in sorted(out.glob("*.safetensors")):
        state = load_file(path)
        weights[path.stem] = hashlib.sha256(b"".join(state[key].tobytes() for key in sorted(state))).hexdigest()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second", "time", "when")
    return {"weights": weights, "passes": [{k: v for k, v in row.items() if k not in timed} for row in rows]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
