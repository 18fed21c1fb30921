"""What comes with the package: its extras, completion in a shell, and the Dockerfile."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from factor_transfer.cli import app

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
COMPLETE = """
. "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_factor_transfer
printf '%s\\n' "${COMPREPLY[@]}"
"""


def tool(name: str) -> str:
    """A development tool of this environment."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None and os.environ.get("FACTOR_TRANSFER_CI"):
        raise AssertionError(f"{name} is not installed: `make .venv/installed-dev` does it")
    return found or pytest.skip(f"{name} is not installed: `make .venv/installed-dev` does it")


def test_extras__all_has_every_one_that_a_user_may_want() -> None:
    (every,) = EXTRAS["all"]
    assert set(re.findall(r"[\w-]+", every.partition("[")[2])) == EXTRAS.keys() - {"all", "dev"}
    assert "factor-transfer[all]" in EXTRAS["dev"]


def completed(script: Path, *words: str) -> list[str]:
    """What the tab key offers for the last of the words."""
    call = ["bash", "-c", COMPLETE, "bash", str(script), *words]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()


def test_completion__offers_commands_flags_and_values_in_bash(tmp_path: Path) -> None:
    script = app.install_completion(shell="bash", output=tmp_path / "script", add_to_startup=False)
    assert completed(script, "factor-transfer", "dist") == ["distill"]
    assert "--teacher-weights" in completed(script, "factor-transfer", "distill", "--teacher-")
    assert completed(script, "factor-transfer", "distill", "--factor-form", "") == ["auto", "paper", "slim"]
    assert "--install-completion" in completed(script, "factor-transfer", "--")


def test_dockerfile__copies_what_is_there_and_ends_without_root() -> None:
    steps = re.findall(r"^([A-Z]+) (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    sources = [word for what, rest in steps if what == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    assert set(sources) == kept
    assert all((ROOT / each).exists() for each in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "src"} <= set(sources)
    bases = [rest for what, rest in steps if what == "FROM"]
    assert all(fnmatch.fnmatch(base, "python:3.*.*-slim-*") for base in bases), "a base that moves"
    users = [rest for what, rest in steps[[what for what, _ in steps].index("FROM", 1) :] if what == "USER"]
    assert users == ["1000:1000"]


@pytest.mark.slow
def test_notebook__runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    if not os.environ.get("FACTOR_TRANSFER_CI"):
        pytest.importorskip("nbclient", reason="`make .venv/installed-dev` installs it")
    import nbclient
    import nbformat

    book = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "outputs are not kept"
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "runs/tour/report.html" in str(code[-1].outputs)
    assert (tmp_path / "runs/tour/report.html").exists()


def test_dockerfile__passes_its_linter() -> None:
    done = subprocess.run([tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
