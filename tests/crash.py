"""Kill the real command at random moments, give it again, and compare what it leaves with an uninterrupted run.

    python tests/crash.py --kills 100    # leaves results/kills.json

Every process is the command itself (`factor_transfer.cli.main`), forked from a server that has imported torch, so that
a kill meets work and not imports. Checkpoints are written after every step. A kill comes after a random time; where it
fell (stage, or the filling of the factor cache) is read from the run folder. A run is continued and killed again until
it is through; then every weight must have the bits of the uninterrupted run's, `metrics.jsonl` its lines, each once,
and `student.pt2` must compute the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from processes import PRELOAD

JOB = {
    "data": "digits", "teacher": "cifar_resnet20", "student": "cifar_resnet20_b",
    "teacher-args": '{"layers": [1, 1, 1], "channels": [8, 16, 32]}',
    "student-args": '{"layers": [1, 1, 1], "channels": [4, 8, 16], "drop_rate": 0.1}',
    "teacher-epochs": 4, "teacher-lr": 0.05, "paraphraser-epochs": 2, "epochs": 4, "views": 2, "batch-size": 64,
    "lr": 0.05, "threads": 1, "device": "cpu", "checkpoint-minutes": 0.00001,
}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "float32, momentum, baseline": {"precision": "fp32", "baseline": None},
    "float32, momentum, EMA": {"precision": "fp32", "model-ema": None},
    "bf16, AdamW": {
        "precision": "bf16", "opt": "adamw", "lr": 0.005, "teacher-lr": 0.01,
        "paraphraser-lr": 0.01,
    },
}  # fmt: skip
"""Weights are in channels-last and optimizers fused throughout."""

LONGEST = 300
"""Seconds that a run of these may take on a machine with much else to do."""


def command(folder: Path, variant: str) -> list[str]:
    """The command line of a variant, whose run and cache lie in `folder`."""
    flags = JOB | VARIANTS[variant] | {"out": folder / "run", "cache-dir": folder / "cache"}
    return ["distill", *(part for name, value in flags.items() for part in (f"--{name}", str(value)) if part != "None")]


def work(arguments: list[str], log: str) -> None:
    """The command, in a process of its own."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from factor_transfer.cli import main

    sys.argv = ["factor-transfer", *arguments]
    main()


def server() -> Any:
    """The server of forks, which imports what every run does, once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start(folder: Path, variant: str) -> Any:
    """Begin or continue the run."""
    folder.mkdir(parents=True, exist_ok=True)
    process = server().Process(target=work, args=(command(folder, variant), str(folder / "log")))
    process.start()
    return process


def place(run: Path) -> str:
    """Where in the job a killed run was."""
    done = {path.stem for path in run.glob("stages/*.json")}
    top1 = "top1" in json.loads((run / "stages/teacher.json").read_text()) if "teacher" in done else False
    if not top1:
        return "teacher" if (run / "checkpoints").exists() else "start"
    if "paraphraser" not in done:
        return "paraphraser"
    if "student" not in done:
        passes = [row for row in rows(run) if row[0] == "student"]
        return "cache filling" if len(passes) < JOB["views"] else "student from the cache"  # type: ignore[operator]
    if not (run / "checkpoints").exists() or not list((run / "checkpoints").iterdir()):
        return "export"
    return "baseline"


def rows(run: Path) -> list[tuple[Any, ...]]:
    """The lines of metrics.jsonl, without what takes another time on each run."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that the kill cut
            row = json.loads(line)
            found.append(
                (row["stage"], row["epoch"], *(v for k, v in row.items() if k not in {"seconds", "stage", "epoch"}))
            )
    return found


def result(run: Path) -> dict[str, Any]:
    """All that must be the same: hashes of weights, the metrics, what was measured, and the exported student."""
    import torch

    from bits import bits
    from factor_transfer.util.files import state_fingerprint

    summary = json.loads((run / "summary.json").read_text())
    student = torch.export.load(run / "student.pt2").module()
    logits = student(torch.linspace(-1, 1, 5 * 3 * 64).view(5, 3, 8, 8))
    return {
        "weights": bits(run),
        "metrics": rows(run),
        "top1": {role: summary[role]["top1"] for role in ("teacher", "student", "baseline") if role in summary},
        "exported": state_fingerprint({"logits": logits.detach()}),
        "left over": sorted(str(path.relative_to(run)) for path in run.rglob("*.tmp")),
    }


def uninterrupted(folder: Path, variant: str) -> tuple[dict[str, Any], float]:
    """The run that nothing disturbs, and its seconds: without those in which the server starts, which no kill meets."""
    warm = server().Process(target=int)
    warm.start()
    warm.join()
    began = time.monotonic()
    process = start(folder, variant)
    process.join(LONGEST)
    assert process.exitcode == 0, (folder / "log").read_text()
    return result(folder / "run"), time.monotonic() - began


def killed(folder: Path, variant: str, seconds: float, chance: random.Random, most: int) -> list[str]:
    """Kill and continue a run until it is through, `most` times at the most; where the kills fell."""
    places: list[str] = []
    while True:
        process = start(folder, variant)
        # Loading takes its part of every attempt: short enough to be killed often, long enough to come on.
        process.join(chance.uniform(0.1, 0.5) * seconds if len(places) < most else LONGEST)
        if process.exitcode is None:
            assert len(places) < most, f"it does not end: {folder / 'log'}"
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode == 0:
            return places
        assert process.exitcode == -signal.SIGKILL, (folder / "log").read_text()
        places.append(place(folder / "run"))


def rounds(work_folder: Path, kills: int, seed: int, most: int = 12) -> dict[str, Any]:
    """Runs of all variants in turn until there were `kills` kills."""
    chance = random.Random(seed)
    wanted = {name: uninterrupted(work_folder / f"straight-{place}", name) for place, name in enumerate(VARIANTS)}
    again, _ = uninterrupted(work_folder / "again", next(iter(VARIANTS)))
    assert again == wanted[next(iter(VARIANTS))][0], "uninterrupted runs differ already"
    found: list[dict[str, Any]] = []
    while sum(len(run["kills"]) for run in found) < kills:
        variant = list(VARIANTS)[len(found) % len(VARIANTS)]
        straight, seconds = wanted[variant]
        folder = work_folder / f"killed-{len(found):03}"
        places = killed(folder, variant, seconds, chance, most)
        got = result(folder / "run")
        differs = [name for name in straight if got[name] != straight[name]]
        found.append({"variant": variant, "kills": places, "differs": differs})
        print(json.dumps(found[-1]), flush=True)
        if not differs:
            shutil.rmtree(folder)
    return {"runs": found, "seconds_uninterrupted": {name: round(wanted[name][1], 1) for name in wanted}}


def main() -> None:
    """The long form."""
    from factor_transfer.training.run_folder import environment
    from factor_transfer.util.files import write_json

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/crash"))
    parser.add_argument("--result", type=Path, default=Path(__file__).parent.parent / "results" / "kills.json")
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    found = rounds(given.work, given.kills, given.seed)
    places = Counter(place for run in found["runs"] for place in run["kills"])
    differing = [run for run in found["runs"] if run["differs"]]
    summary = {
        "command": f"python tests/crash.py --kills {given.kills} --seed {given.seed}",
        "environment": environment(),
        "kills": sum(places.values()),
        "by_place": dict(sorted(places.items())),
        "runs": len(found["runs"]),
        "runs_that_differ": len(differing),
        **{name: found[name] for name in ("seconds_uninterrupted",)},
        "each_run": found["runs"],
    }
    write_json(given.result, summary)
    print(json.dumps({name: value for name, value in summary.items() if name != "each_run"}, indent=2))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
