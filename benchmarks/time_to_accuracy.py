"""When Factor Transfer and the student alone first reach an accuracy, in passes of the student alone.

    python benchmarks/time_to_accuracy.py [COMPARISON]    # at once; results/time-to-accuracy.json

From the curves of a finished comparison (results/compare-cifar10-10k) and the measured cost of a pass of each kind
(results/passes.json): Factor Transfer pays for its paraphraser's passes first, then for passes that fill the cache,
then for passes from it. Levels are the mean result of the student alone, and so many points below it.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from pair import RESULTS

from factor_transfer.util.files import read_json, write_json

BELOW = (5.0, 2.0, 0.0)
"""Points."""


def main(folder: Path) -> None:
    """Read, print, and keep."""
    times = read_json(RESULTS / "passes.json")["times_alone"]
    found = {"alone": [*folder.glob("alone-s*"), *folder.glob("baseline-s*")], "ft": [*folder.glob("ft-s*")]}
    curves = {name: [curve(run) for run in sorted(runs)] for name, runs in found.items()}
    config = read_json(next(folder.glob("ft-s*/summary.json")))["settings"]
    before = config["paraphraser_epochs"] * times["paraphraser"]  # of runs that give a number of passes
    fills = min(config["views"], config["epochs"])

    def cost(name: str, passes: int) -> float:
        if name == "alone":
            return float(passes)
        return float(before + min(passes, fills) * times["fill"] + max(0, passes - fills) * times["cached"])

    final = statistics.mean(found[-1] for found in curves["alone"])
    levels = []
    for below in BELOW:
        row: dict[str, Any] = {"top1": final - below}
        for name, runs in curves.items():
            reached = [
                next((place + 1 for place, top1 in enumerate(run) if top1 >= final - below), None) for run in runs
            ]
            row[name] = {
                "passes": reached,
                "passes_of_the_student_alone": [None if passes is None else cost(name, passes) for passes in reached],
            }
        levels.append(row)
        print(row)
    command = f"python benchmarks/time_to_accuracy.py {folder}"
    write_json(RESULTS / "time-to-accuracy.json", {"command": command, "levels": levels, "times_alone": times})


def curve(run: Path) -> list[float]:
    """Top-1 on the validation images after each pass of a run's student."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["validation_top1"] for row in rows if row["stage"] == "student"]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "compare-cifar10-10k")
