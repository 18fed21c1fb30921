"""The student in every format, each run by a fresh environment that has one library and not this package."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

from factor_transfer import distill
from factor_transfer.config import DataConfig
from factor_transfer.data.dataset import open_data
from factor_transfer.export import runtimes, shipping
from factor_transfer.export.predict import find_images, open_student
from factor_transfer.export.shipping import Choices, export_run
from factor_transfer.training.finished import rebuild
from factor_transfer.util.errors import ConfigError, DataError, RunError
from processes import Command, leave_out

ROOT = Path(__file__).parent.parent
SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 8, 16)}
JOB: dict[str, Any] = {"teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 2, "paraphraser_epochs": 1,
                       "epochs": 1, "batch_size": 64, "device": "cpu", "threads": 1, "lr": 0.05}  # fmt: skip

TORCH = """
import importlib.util, sys, torch
from array import array
assert not any(map(importlib.util.find_spec, ("factor_transfer", "timm", "onnxruntime", "torchvision", "numpy")))
images = torch.frombuffer(bytearray(open("images", "rb").read()), dtype=torch.float32).view(-1, 3, 32, 32)
student = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    array("f", student(images).flatten().tolist()).tofile(open("logits", "wb"))
"""
ONNX = """
import importlib.util, sys, numpy, onnxruntime
assert not any(map(importlib.util.find_spec, ("factor_transfer", "torch", "timm", "onnx")))
images = numpy.fromfile("images", numpy.float32).reshape(-1, 3, 32, 32)
onnxruntime.InferenceSession(sys.argv[1]).run(None, {"images": images})[0].tofile("logits")
"""
TIMM = """
import importlib.util, sys, timm, torch
assert not any(map(importlib.util.find_spec, ("factor_transfer", "onnxruntime", "accelerate")))
images = torch.frombuffer(bytearray(open("images", "rb").read()), dtype=torch.float32).view(-1, 3, 32, 32)
student = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
with torch.no_grad():
    student(images).numpy().tofile("logits")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "digits"
    distill("cifar_resnet20", "cifar_resnet20", "digits", out=out, **JOB)
    return out


def test_export__writes_what_agrees_and_a_card(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that must need nothing but torch is proved in a fresh process, and the folder in this one."""
    asked: list[str] = []
    fresh = shipping._fresh

    def here(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(Path(request["path"]).name)
        return fresh(request) if asked[-1] == "student.pt2" else runtimes.answer({**request, "without": []})

    monkeypatch.setattr(shipping, "_fresh", here)
    found = export_run(run, Choices(formats=["pt2", "timm"], out=tmp_path, images=100, latency=False, license="mit"))
    assert asked == ["student.pt2", "timm"]
    assert [row["format"] for row in found["formats"]] == ["pt2", "timm"]
    assert all(row["max_difference"] < 1e-4 and row["other_answers"] == 0 for row in found["formats"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "exports.json", "student.pt2", "timm"]
    assert (tmp_path / "student.pt2").stat().st_size < 500_000  # the example images are not in it
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm")
    assert "\nlicense: mit\n" in card
    assert "teacher's weights: not stated" in card
    assert "import factor_transfer.zoo" in (tmp_path / "timm" / "README.md").read_text()


@pytest.mark.usefixtures("answered_here")
def test_export__does_not_write_what_disagrees(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that gets one weight wrong, behind the real checks."""
    real = shipping.export_safetensors

    def wrong(module: torch.nn.Module, path: Path, metadata: Any) -> None:
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] += 0.5
        real(module, path, metadata)

    choices = Choices(formats=["safetensors"], out=tmp_path, images=50, latency=False)
    monkeypatch.setattr(shipping, "export_safetensors", wrong)
    with pytest.raises(RunError, match="does not agree"):
        export_run(run, choices)
    assert not (tmp_path / "student.safetensors").exists()
    left = json.loads((tmp_path / "exports.json").read_text())
    assert left["formats"] == []
    assert "safetensors" in left["failed"]


def test_export__refuses_what_it_cannot_do(run: Path, tmp_path: Path, python: Command) -> None:
    with pytest.raises(ConfigError, match=r"--formats tflite\n.*no such format\n.*pt2, onnx"):
        export_run(run, Choices(formats=["tflite"]))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(RunError, match="not finished"):
        export_run(unfinished)
    script = (
        "import sys; sys.modules['onnxruntime'] = None; from factor_transfer.cli import main\n"
        f"sys.argv = ['factor-transfer', 'export', {str(run)!r}, '--formats', 'onnx']; main()"
    )
    done = python(script)
    assert done.returncode == 2
    assert "onnxruntime not installed" in done.stderr
    assert "pip install 'factor-transfer[export]'" in done.stderr


def test_predict__tells_its_mistakes(run: Path, tmp_path: Path, factor_transfer: Command) -> None:
    (tmp_path / "no.jpg").write_text("no image")
    picture = tmp_path / "yes.png"
    Image.new("RGB", (8, 8), "white").save(picture)
    done = factor_transfer("predict", run, tmp_path, "--json")
    assert done.returncode == 2
    assert "no.jpg is no image" in done.stderr
    (answer,) = json.loads(done.stdout)
    assert answer["image"] == str(picture)
    assert len(answer["top"]) == 5
    assert sum(each["probability"] for each in answer["top"]) <= 1.0001
    for given, wanted in (
        (tmp_path, "no exported student"),
        (picture, "no .pt2, .onnx"),
        (run / "gone", "nothing there"),
    ):
        with pytest.raises(RunError, match=wanted):
            open_student(given)
    plain = torch.export.export(torch.nn.Flatten(), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(plain, tmp_path / "student.pt2")  # as earlier versions wrote it: nothing said of its images
    with pytest.raises(RunError, match="factor-transfer export RUN"):
        open_student(tmp_path / "student.pt2")
    with pytest.raises(DataError, match="no such file"):
        list(find_images([str(tmp_path / "gone.jpg")]))


# -- real images, and fresh environments


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, cifar10_files: Path) -> Path:
    """Runs on real JPEG files, exported. Only the students matter here: their teacher is as small as they are."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "data").symlink_to(cifar10_files)
    small = {"layers": (1, 1, 1), "channels": (8, 16, 32)}
    job: dict[str, Any] = {"data": "data", "teacher": "cifar_resnet20", "teacher_args": small, "beta": 0, "epochs": 3,
                           "threads": 1, "device": "cpu", "batch_size": 64, "lr": 0.05, "log_with": "none"}  # fmt: skip
    knows = {"teacher_weights": "cifar/teacher.safetensors"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(shipping, "_fresh", lambda request: runtimes.answer({**request, "without": []}))
        distill(student="cifar_resnet20", student_args=small, teacher_epochs=4, out="cifar", **job)
        leave_out(patch.setattr)
        distill(student="test_resnet", out="timm", **job, **knows)
        for out, formats in (("cifar", ["pt2", "onnx", "onnx-int8"]), ("timm", ["pt2", "timm"])):
            export_run(Path(out), Choices(formats=formats, latency=False))
    return folder


def environment(folder: Path, *wanted: str) -> Path:
    """The interpreter of a fresh environment that has these packages with what they require, and nothing else.

    Packages are linked from the environment of the tests, so that several gigabytes are not copied.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    seen: set[str] = set()
    waiting = list(wanted)
    while waiting:
        found = distribution(waiting.pop())
        if found.name in seen:
            continue
        seen.add(found.name)
        needs = map(Requirement, found.requires or [])
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
        for top in {Path(file).parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "packages", "exports"),
    [
        (TORCH, ["torch"], ["cifar/export/student.pt2", "timm/export/student.pt2"]),
        (ONNX, ["onnxruntime"], ["cifar/export/student.onnx", "cifar/export/student.int8.onnx"]),
        (TIMM, ["timm"], ["timm/export/timm"]),
    ],
)
def test_exports__agree_where_only_their_library_is(
    real: Path, tmp_path: Path, script: str, packages: list[str], exports: list[str]
) -> None:
    python = environment(tmp_path / "environment", *packages)
    data = open_data(DataConfig(data=str(real / "data")), default_size=lambda: 32)
    (batch,) = data.validation.batches([np.arange(len(data.validation))], view=None)
    for file in exports:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(real)
            network = rebuild(Path(file.partition("/")[0]), "student")
        images = network.norm(batch.image).contiguous()
        with torch.no_grad():
            wanted = network.module.eval()(images)
        (tmp_path / "images").write_bytes(images.numpy().tobytes())
        subprocess.run([python, "-E", "-c", script, real / file], cwd=tmp_path, check=True, timeout=300)
        logits = array("f", (tmp_path / "logits").read_bytes())
        got = torch.tensor(logits).view(wanted.shape)
        difference = float((got - wanted).abs().max())
        top1 = [100 * float((each.argmax(1) == batch.label).float().mean()) for each in (wanted, got)]
        print(f"{file}: largest difference {difference:.2e}, top-1 {top1[0]:.2f} -> {top1[1]:.2f}")
        if "int8" in file:
            assert top1[0] - top1[1] <= 1
        else:
            assert difference <= 1e-4
            assert torch.equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.slow
def test_predict__agrees_with_the_evaluation_on_1000_files(real: Path, factor_transfer: Command) -> None:
    """Real JPEG files through the command and onnxruntime, against the run's own evaluation."""
    evaluated = json.loads(factor_transfer("evaluate", "cifar", "--json", cwd=real).stdout)["student"]["top1"]
    for student in ("cifar", "cifar/export/student.pt2"):
        done = factor_transfer("predict", student, "data/validation", "--json", "--top", 1, cwd=real)
        answers = json.loads(done.stdout)
        assert len(answers) == 1000
        right = sum(Path(answer["image"]).parent.name == answer["top"][0]["class"] for answer in answers)
        assert 100 * right / 1000 == pytest.approx(evaluated)


@pytest.mark.slow
def test_example__needs_onnxruntime_numpy_and_pillow_alone(
    real: Path, tmp_path: Path, factor_transfer: Command
) -> None:
    files = sorted((real / "data" / "validation").rglob("*.jpg"))[::100]
    python = environment(tmp_path / "environment", "onnxruntime", "pillow")
    command = [python, "-E", ROOT / "examples" / "predict_onnx.py", real / "cifar/export/student.onnx", *files]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    done = factor_transfer("predict", "cifar", *files, "--top", 1, cwd=real)
    assert said == done.stdout.replace(": ", " ")
