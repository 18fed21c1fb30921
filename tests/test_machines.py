"""Several machines decide as one, and a system that is not supported is refused at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from factor_transfer.cli import main
from processes import TORCHRUN, Command, Started

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each of two processes said, by case of `machines.py`."""
    folder = tmp_path_factory.mktemp("machines")
    flags = ["--nproc-per-node", "2", "--standalone", HERE / "machines.py", folder]
    done = Started(flags, code=TORCHRUN, forks=True, exports=False).finished(600)
    assert done.returncode == 0, done.stderr[-5000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_two_machines__views_that_do_not_fit_everywhere_are_chosen_by_none(said: dict[str, list[Any]]) -> None:
    one, other = said["less_disk"]
    assert one["views"] == other["views"] == 2
    assert one["pins"] == other["pins"] == "2"
    shown = [tuple(each) for each in one["shown"] + other["shown"]]
    assert sorted(shown) == [(epoch, epoch % 2, index) for epoch in range(6) for index in range(200)]


@pytest.mark.slow
def test_two_machines__one_that_is_slow_to_show_files_does_what_the_first_one_does(said: dict[str, list[Any]]) -> None:
    one, other = (each["shown"] for each in said["slow_folder"])
    assert one.keys() == other.keys() == {"student"}, "teacher and paraphraser were finished"
    shown = [tuple(each) for each in one["student"] + other["student"]]
    assert sorted(shown) == [(epoch, epoch % 2, index) for epoch in range(6) for index in range(200)]


@pytest.mark.slow
def test_two_machines__decide_alike_on_precision_hosts_and_cache(said: dict[str, list[Any]]) -> None:
    assert said["no_bf16"] == [False, False]
    assert said["uneven_hosts"] == [{"hosts": 1, "part": list(range(5))}, {"hosts": 1, "part": list(range(5, 10))}]
    assert said["no_cache_folder"] == ["FrozenTeacher", "FrozenTeacher"]


REFUSED = {
    "versions": ("2 processes on machines that differ", "of process 0, 0.4 of process 1"),
    "other_images": ("--data", "the same data in all processes"),
    "other_settings": ("--lr: 0.05, 0.06", "processes of one run with other settings"),
    "other_first_weights": ("--student", "process 1 of 2 does not see what process 0 sees"),
    "other_checkpoint": ("checkpoints", "one newest checkpoint of student"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_two_machines__what_differs_is_refused_by_both(name: str, said: dict[str, list[Any]]) -> None:
    for each in said[name]:
        assert each.startswith("error: ")
        for words in REFUSED[name]:
            assert words in each


@pytest.mark.slow
def test_two_machines__what_fails_in_one_alone_is_told_to_the_other(said: dict[str, list[Any]]) -> None:
    one, other = said["other_room"]
    assert "0 MB free" in one
    assert "process 0 failed" in other


@pytest.mark.parametrize("command", [["--help"], ["distill", "--data", "digits"]])
def test_main__a_system_that_is_not_supported_is_refused_with_a_word(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("platform.system", lambda: "Windows")
    monkeypatch.setattr(sys, "argv", ["factor-transfer", *command])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Windows\n")
    assert "valid: Linux or macOS" in said
    assert "WSL 2" in said


def test_import__without_what_windows_lacks_refuses_and_does_not_crash(python: Command) -> None:
    code = """
import sys, logging, multiprocessing, pathlib, tempfile, numpy, PIL.Image, rich.progress, torch, torchvision
for name in [name for name in sys.modules if name.partition(".")[0] == "factor_transfer"]:
    del sys.modules[name]
sys.platform = "win32"
for name in ("fcntl", "resource"):
    sys.modules[name] = None
from factor_transfer import Paraphraser, FactorTransferError
import factor_transfer.util.files, factor_transfer.data.pixels
try:
    from factor_transfer import distill
except FactorTransferError as error:
    print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "a system that factor-transfer does not support" in done.stdout
