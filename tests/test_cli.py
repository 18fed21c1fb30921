"""Errors are interface: one clear message, what to do next, exit code 2, no traceback, and nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from factor_transfer.cli import app, main
from factor_transfer.config import FIELDS
from factor_transfer.export.predict import find_images
from factor_transfer.settings import COMMON
from factor_transfer.util.checks import flag
from factor_transfer.util.console import table
from factor_transfer.util.errors import DataError
from processes import Command

Told = Callable[..., str]

SMALL = "layers=(1,1,1) channels=(4,4,8)"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Told:
    """Run the command line in this process; it must end with exit code 2; what it said."""

    def run(*arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["factor-transfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        assert left.value.code == 2, said
        assert "Traceback" not in said.err + said.out
        return said.err

    return run


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Weights of a small network with a head for three classes."""
    import timm

    import factor_transfer.zoo  # noqa: F401

    path = tmp_path / "teacher.safetensors"
    args: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8), "num_classes": 3}
    save_file(timm.create_model("cifar_resnet20", **args).state_dict(), path)
    return path


def flags(data: Path, *more: object, **changed: object) -> list[object]:
    """A job whose teacher is trained in a pass; `changed` replaces flags."""
    settings: dict[str, object] = {
        "data": data, "teacher": "cifar_resnet20", "teacher-args": SMALL, "teacher-epochs": 1,
        "student": "cifar_resnet20", "student-args": SMALL, "epochs": 1, "paraphraser-epochs": 1,
        "batch-size": 8, "device": "cpu", "out": "run",
    }  # fmt: skip
    settings |= {name.replace("_", "-"): value for name, value in changed.items()}
    return ["distill", *(part for name, value in settings.items() for part in (f"--{name}", value)), *more]


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"teacher": "cifar_resnet21"}, r"--teacher cifar_resnet21\n.*no such network\n.*cifar_resnet20"),
        ({"student": "resnet_18"}, r"--student resnet_18\n.*no such network\n.*resnet18"),
        ({"student": "local-dir:nowhere"}, r"--student local-dir:nowhere\n.*nowhere"),
        ({"student_args": "layerz=3"}, r"--student .*layerz"),
        ({"student_args": "layers"}, r"--student-args: 'layers'"),
        ({"teacher_weights": "none.safetensors"}, r"--teacher-weights none\.safetensors\n.*no such file"),
        ({"teacher_layer": "layer4"}, r"--teacher-layer layer4\n.*no submodule.*\n.*layer3"),
        ({"student_layer": "linear"}, r"--student-layer linear\n.*no feature map"),
        ({"k": 0.01}, r"--k 0\.01\n.*8 teacher channels x 0\.01 = 0 factor channels\n.*valid"),
        ({"paraphraser": "none.pth"}, r"--paraphraser none\.pth\n.*no such file"),
        ({"lr": 1e30}, r"not finite in pass 1(?s:.*)--lr 1e\+30(?s:.*)next:.*lower --lr"),
        ({"opt": "momentun"}, r"--opt momentun\n.*\n.*momentum"),
        ({"out": "/proc/run"}, r"--out /proc/run\n.*found.*\n.*can be written to\n.*another --out"),
        ({"device": "mps"}, r"--device mps\n.*no mps device"),
        ({"epochs": 0}, r"--epochs 0\n.*above 0"),
        ({"sched": "multistep"}, r"--sched multistep\n.*pass 83, is after --epochs 1\n.*--decay-milestones"),
        ({"warmup_epochs": 5}, r"--warmup-epochs 5\n.*fewer than --epochs 1"),
        ({"student_args": "layers=(1,1,1"}, r"--student-args.*bracket"),
        ({"student_args": "img_size=64"}, r"--student-args img_size\n.*\n.*--img-size"),
        ({"epochs": "many"}, r"--epochs.*\"many\""),
        ({"epoch": 3}, r"--epoch.*Did you mean --epochs"),
        ({"config": "none.yaml"}, r"--config none\.yaml\n.*No such file"),
    ],
)
def test_distill__names_a_wrong_setting(told: Told, images: Path, changed: dict[str, object], wanted: str) -> None:
    said = told(*flags(images, **changed))
    assert re.search(wanted, said), said


def test_distill__names_weights_that_do_not_fit(told: Told, images: Path, teacher: Path) -> None:
    said = told(*flags(images, teacher="cifar_resnet20_b", teacher_weights=teacher))
    assert re.search(r"--teacher-weights .*\n.*missing \(layer2.0.shortcut.0.weight, .*next: ", said, re.DOTALL)


def test_distill__a_head_of_another_size_is_replaced_and_said(
    factor_transfer: Command, images: Path, teacher: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    four = image_folder(tmp_path / "four", classes=4)
    arguments = flags(four, teacher_weights=teacher, teacher_epochs=12, teacher_lr=0.1)
    done = factor_transfer(*arguments, "--threads", 1, cwd=tmp_path, exports=False)
    assert "no head for 4 classes, so that it has a new one" in done.stderr
    assert "fine-tuning for 12 passes" in done.stderr
    assert done.returncode in {0, 2}, done.stderr  # 2: four classes in three colours are hard


def test_distill__a_teacher_of_other_classes_teaches_its_features(
    factor_transfer: Command, teacher: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    four = image_folder(tmp_path / "four", classes=4)
    done = factor_transfer(
        *flags(four, teacher_weights=teacher, teacher_epochs=0), "--threads", 1, cwd=tmp_path, exports=False
    )
    assert done.returncode == 0, done.stderr
    assert "its accuracy cannot be measured here: its features teach" in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "top1" not in summary["teacher"]
    assert summary["student"]["top1"] >= 0
    measured = factor_transfer("evaluate", "run", "--json", cwd=tmp_path)
    assert json.loads(measured.stdout).keys() == {"student"}


def broken(images: Path, how: str) -> None:
    first = images / "train" / "class0" / "000.png"
    if how == "empty class":
        for path in (images / "train" / "class1").iterdir():
            path.unlink()
    elif how == "no images":
        shutil.rmtree(images)
        (images / "train").mkdir(parents=True)
    elif how == "corrupt":
        first.write_bytes(first.read_bytes()[:60])
        (images / "validation" / "class2" / "001.png").write_bytes(b"")
    elif how == "foreign class":
        (images / "validation" / "class0").rename(images / "validation" / "other")
    elif how == "gone":
        images.rename(images.with_name("imagez"))
    elif how == "truncated tar":
        with tarfile.open(images / "train.tar", "w") as tar:
            tar.add(images / "train", arcname=".")
        shutil.rmtree(images / "train")
        (images / "train.tar").write_bytes((images / "train.tar").read_bytes()[:5000])


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("empty class", r"found:.*class1"),
        ("no images", r"found:.*no images"),
        ("corrupt", r"2 unreadable images:.*train/class0/000\.png.*validation/class2/001\.png.*--skip-corrupt"),
        ("foreign class", r"in validation that training lacks: other"),
        ("gone", r"imagez"),
        ("truncated tar", r"train\.tar"),
    ],
)
def test_distill__names_what_is_wrong_with_the_images(told: Told, images: Path, how: str, wanted: str) -> None:
    broken(images, how)
    said = told(*flags(images))
    assert "--data" in said
    assert re.search(wanted, said, re.DOTALL), said


def test_distill__goes_on_without_corrupt_images_when_told_to(factor_transfer: Command, images: Path) -> None:
    broken(images, "corrupt")
    arguments = flags(images, teacher_epochs=10, lr=0.05)
    done = factor_transfer(*arguments, "--skip-corrupt", "--threads", 1, cwd=images.parent, exports=False)
    assert done.returncode == 0, done.stderr
    assert "2 unreadable images" in done.stderr
    assert "35 training and 17 validation images" in done.stderr


def test_distill__leaves_a_foreign_folder_alone(told: Told, images: Path) -> None:
    said = told(*flags(images, out=images), "--overwrite")
    assert re.search(r"--out .*\n.*no run of this program: train, validation", said)
    assert (images / "train" / "class0" / "000.png").exists()


def test_distill__an_error_leaves_the_run_as_it_was(told: Told, images: Path, tmp_path: Path) -> None:
    """A loss that is no longer finite keeps the last good state; the same folder goes on with what is mended."""
    told(*flags(images, lr=1e30, teacher_epochs=1, teacher_lr=0.05))
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"config.json", "environment.json"}
    assert not list((tmp_path / "run").rglob("*.tmp"))
    said = told(*flags(images, lr=0.05, teacher_lr=0.05))
    assert re.search(r"--out run\n.*--lr 1e\+30 there, 0\.05 here\n.*--overwrite", said)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("epochs: [", "--config job.yaml"),
        ("- epochs", "settings, one a line"),
        ("epocs: 3", "epocs"),
        ("1: 2", "--config job.yaml"),
        ("lr: many", "many"),
        ("!!python/object/apply:os.mkdir [canary]", "--config job.yaml"),
    ],
)
def test_distill__names_what_is_wrong_in_a_file_of_settings(
    told: Told, images: Path, tmp_path: Path, content: str, wanted: str
) -> None:
    (tmp_path / "job.yaml").write_text(content)
    assert wanted in told(*flags(images), "--config", "job.yaml")
    assert not (tmp_path / "canary").exists()


def test_distill__runs_the_users_own_code_only_when_the_user_names_it(
    told: Told, factor_transfer: Command, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "mynets.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path('ran').write_text('')\n"
        "def small(width=4):\n"
        "    nn = torch.nn\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))\n"
    )
    (tmp_path / "job.yaml").write_text("student: mynets:small\nstudent_args: {width: 8}\n")
    arguments = flags(images, teacher_epochs=10, lr=0.05)
    place = arguments.index("--student")
    arguments = [*arguments[:place], *arguments[place + 4 :], "--config", "job.yaml"]
    assert re.search(r"--config job.yaml\n.*mynets:small, which is code.*--trust-config", told(*arguments), re.DOTALL)
    assert not (tmp_path / "ran").exists()
    done = factor_transfer(*arguments, "--trust-config", "--threads", 1, cwd=tmp_path, exports=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").exists()
    assert "student: mynets:small, layer 2, 8 channels" in done.stderr
    assert re.search(r"config.json\n.*mynets:small", told("evaluate", "run"))
    measured = factor_transfer("evaluate", "run", "--trust-config", cwd=tmp_path)
    assert "student by Factor Transfer" in measured.stdout
    for name, found in (("mynets:smal", "smal"), ("nowhere.at.all:x", "No module"), ("os:getcwd", "not a torch")):
        assert found in told(*flags(images, student=name, student_args="{}", out="other"), "--overwrite")


def test_evaluate__says_that_there_is_no_finished_run(told: Told, tmp_path: Path) -> None:
    assert "no run (no config.json)" in told("evaluate", tmp_path)
    assert "nowhere" in told("evaluate", "nowhere")


def test_help__answers_at_once_and_names_every_setting(factor_transfer: Command) -> None:
    start = time.perf_counter()
    done = factor_transfer("distill", "--help-all")
    seconds = time.perf_counter() - start
    assert done.returncode == 0
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in done.stdout
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "factor_transfer", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert not re.search(r"\| +(torch|timm|accelerate|numpy)$", imported, re.MULTILINE), (
        f"heavy imports: {seconds:.1f} s"
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_help__shows_common_settings_and_says_how_to_see_all(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert set(COMMON) < set(FIELDS)
    app(["distill", "--help"], result_action="return_value")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) < 100
    shown = set(re.findall(r"(--[\w-]+)", "\n".join(lines)))
    assert {flag(name) for name in COMMON} | {"--config", "--help-all"} <= shown
    assert not {flag(name) for name in ("decay_rate", "sync_bn", "crop_pct")} & shown
    assert [line.split("─")[1].strip() for line in lines if line.startswith("╭")] == [
        "Data", "Teacher", "Student", "Factor transfer", "Other terms", "Training", "Machine", "Run"
    ]  # fmt: skip


def test_predict__takes_a_dash_for_standard_input(told: Told) -> None:
    said = told("predict", "nowhere", "-", "--json")  # told of the run, and not of the dash
    assert "error: nowhere" in said
    assert "Unknown option" not in said
    with pytest.raises(DataError, match=r"(?s)--tpo.*no such file.*predict --help"):
        list(find_images(["--tpo"]))


def test_main__unknown_commands_get_near_names(told: Told) -> None:
    assert "distill" in told("distil")
    assert "Traceback" not in told("evaluate")


def test_table__keeps_names_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [["student.int8.onnx", "safetensors, factor_transfer.zoo", "1.35", "85.72", "4.8e-06"]]
    table("exports", ["file", "needs", "MB", "top-1 %", "difference"], rows)
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in ("student.int8.onnx", "factor_transfer.zoo", "4.8e-06"))
    assert "…" not in shown
