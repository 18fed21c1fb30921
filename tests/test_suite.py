"""The suite itself."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DIES = """
import os, signal, time

def test_before():
    pass

def test_dies():
    os.kill(os.getpid(), signal.SIGSEGV)
"""
GOES_ON = """
import time

import pytest

@pytest.mark.parametrize("number", range(600))
def test_waits(number):
    time.sleep(1)
"""


@pytest.mark.slow
def test_make_test__ends_and_names_the_test_where_a_worker_dies(tmp_path: Path) -> None:
    """By the very flags of `make test`, while another worker has ten minutes of tests before it."""
    (tmp_path / "test_dies.py").write_text(DIES)
    (tmp_path / "test_goes_on.py").write_text(GOES_ON)
    made = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in made.splitlines() if "pytest" in line]
    flags = shlex.split(line.partition("pytest ")[2])
    where = ["--rootdir", str(tmp_path), "--config-file", str(ROOT / "pyproject.toml"), "--confcutdir", str(tmp_path)]
    ours = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--numprocesses", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *where, *ours, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    assert "a worker died while running test_dies.py::test_dies" in done.stdout
