"""The quick start, word for word, where nothing is installed yet, from a wheel and without the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNKNOWN = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
"""Variables of which a newcomer's shell knows nothing."""
WHEEL = """
touch installed
pip wheel --quiet --no-deps --wheel-dir wheels .
pip install --quiet --no-deps --force-reinstall wheels/*.whl
rm -r src build pyproject.toml
"""
"""What the page has installed is replaced by a wheel, and the sources are deleted: what follows has the wheel alone."""


@pytest.mark.slow
def test_quickstart__works_word_for_word_in_a_fresh_environment(tmp_path: Path) -> None:
    """Every shell block of the page, in one shell; to install, in a copy of the project's folder."""
    page = (ROOT / "docs/quickstart.md").read_text()
    install, *rest = re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    project = tmp_path / "project"
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    environment = {name: value for name, value in os.environ.items() if name not in UNKNOWN}
    environment["PIP_NO_COMPILE"] = "0"  # which for pip is no: only what is imported is compiled
    environment["PATH"] = os.pathsep.join([f"{sys.base_prefix}/bin", environment["PATH"]])  # this Python is `python3`
    script = "\n".join(["set -e", install, WHEEL, *rest])
    where = {"cwd": project, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", script], **where, check=False)
    if not (project / "installed").exists() and not os.environ.get("FACTOR_TRANSFER_CI"):
        pytest.skip(f"pip cannot install here: {' '.join(done.stderr.split())[-300:]}")
    assert done.returncode == 0, done.stderr
    used = "import factor_transfer; print(factor_transfer.__file__)"
    found = subprocess.run(["quickstart-env/bin/python", "-c", used], **where, check=False).stdout
    assert found.startswith(str(project / "quickstart-env"))
    (wheel,) = (project / "wheels").iterdir()
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/factor_transfer").rglob("*.*")}
    missing = {path for path in sources - {*zipfile.ZipFile(wheel).namelist()} if "__pycache__" not in path}
    assert not missing, "files of the package that the wheel lacks"
    run = project / "runs/demo/ft+kd-s0"
    assert (project / "runs/demo/report.html").exists()
    assert (run / "report.html").exists()
    exports = json.loads((run / "export/exports.json").read_text())
    assert [row["format"] for row in exports["formats"]] == ["pt2", "onnx", "onnx-int8", "safetensors", "timm"]
    assert exports["failed"] == {}
    named = re.findall(r"^clothes/\d\d-([\w -]+)\.png: (.+?) +\d", done.stdout, re.MULTILINE)
    assert len(named) == 20, done.stdout
    assert sum(name == answer for name, answer in named) >= 14, named
