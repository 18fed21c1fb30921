"""Kills at random moments, a disk that fails: nothing is lost, and the same command ends with the same bits.

The long form is `python tests/crash.py --kills 100`; its raw result is results/kills.json.
"""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from factor_transfer.training.run_folder import Run

sys.path.append(str(Path(__file__).parent))  # the server of forks imports it, too
crash = importlib.import_module("crash")
crash.JOB["train-images"] = 960  # 15 steps a pass, and a checkpoint of each

FP32, BF16 = "float32, momentum, EMA", "bf16, AdamW"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], float]]:
    """Runs that nothing disturbs, and their seconds."""
    folder = tmp_path_factory.mktemp("straight")
    return {name: crash.uninterrupted(folder / name[:4], name) for name in (FP32, BF16)}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [FP32, BF16])
def test_distill__kills_at_random_moments_lose_nothing(
    variant: str, straight: dict[str, tuple[dict[str, Any], float]], tmp_path: Path
) -> None:
    wanted, seconds = straight[variant]
    chance = random.Random(time.time_ns())  # each run of the suite tries other moments
    kills: list[str] = []
    for number in range(20):  # a run may end before its kill comes
        folder = tmp_path / str(number)
        kills += crash.killed(folder, variant, seconds, chance, most=4)
        assert crash.result(folder / "run") == wanted, f"after kills in {kills}"
        if len(kills) >= 4:
            return
    raise AssertionError(f"20 runs, and no more than {len(kills)} kills met one")


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small disk of its own at `folder`."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--recursive", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (65536, 1024, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


@pytest.mark.slow
@pytest.mark.parametrize(("how", "said"), [("full", "No space left on device"), ("read-only", "Read-only file system")])
def test_distill__a_disk_that_fails_loses_nothing(
    how: str, said: str, straight: dict[str, tuple[dict[str, Any], float]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with mounted(run):
        process = crash.start(tmp_path, FP32)
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/student-000001-*.pt")):
            assert process.is_alive(), (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if how == "full":
            fill(run)
        else:
            subprocess.run(["mount", "--bind", str(run), str(run)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(run)], check=True)
        process.join(120)
        log = (tmp_path / "log").read_text()
        assert process.exitcode == 2, log
        assert said in log
        assert str(run) in log.splitlines()[-2], "the message names the file"
        assert "the same command continues" in log
        assert "Traceback" not in log
        assert Run(run, writes=False).load_checkpoint("student") is not None
        assert not list(run.rglob("*.tmp"))
        if how == "full":
            (run / "filler").unlink()
        else:
            subprocess.run(["umount", str(run)], check=True)
        process = crash.start(tmp_path, FP32)
        process.join(300)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        assert crash.result(run) == straight[FP32][0]
