"""A data source of the user's own, as `--data package.module:callable`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from factor_transfer import distill
from factor_transfer.cli import main
from factor_transfer.config import DataConfig
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.errors import DataError, Interrupted

PAGE = (Path(__file__).parent.parent / "docs" / "images.md").read_text(encoding="utf-8")
SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {
    "teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 4, "paraphraser_epochs": 1, "epochs": 2,
    "batch_size": 12, "lr": 0.05, "threads": 1, "device": "cpu", "workers": 0,
}  # fmt: skip

MODULE = """
import io, numpy as np
from PIL import Image

def noise(number, side=16):
    return Image.fromarray(np.random.default_rng(number).integers(256, size=(side, side, 3), dtype=np.uint8))

def sideways(number):
    exif = Image.Exif()
    exif[274] = 6
    file = io.BytesIO()
    noise(number).save(file, "PNG", exif=exif)
    image = Image.open(file)
    image.load()
    return image

class Part:
    def __init__(self, count, side=16, targets=None):
        self.pictures = [noise(number, side) for number in range(count)]
        if targets is not None:
            self.targets = targets
    def __len__(self):
        return len(self.pictures)
    def __getitem__(self, index):
        return self.pictures[index], index % 2

items = [(noise(number), number % 2) for number in range(12)]
names = [(picture, "ab"[label]) for picture, label in items]

def numbers(): return items, items[:4], ["a", "b"]
def words(): return names, None, ("a", "b")
def unnamed(): return names, names[:4], None
def png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
def encoded(): return [(png(picture), label) for picture, label in items], items[:4], ["a", "b"]
def parts(): return Part(12), Part(4), ["a", "b"]
def targets(): return Part(12, targets=[0] * 6 + [1] * 6), None, ["a", "b"]
turned_items = [(sideways(number), label) for number, (_, label) in enumerate(items)]
def turned(): return turned_items, turned_items[:4], ["a", "b"]
def large(): return Part(6, side=128), Part(4, side=128), ["a", "b"]
def bare(): return [(picture, None) for picture, _ in items], None, None
def fails(): raise KeyError("no such table")
def two(): return items, None
def empty(): return [], None, ["a", "b"]
def doubled(): return items, None, ["a", "b", "a"]
def beyond(): return items, None, ["a"]
def unknown(): return names, None, ["a", "c"]
def half(): return [*items, (noise(0), None)], None, ["a", "b"]
def flat(): return [1, 2], None, ["a", "b"]
def matrices(): return [(np.zeros((9, 9, 3), np.uint8), index % 2) for index in range(8)], None, ["a", "b"]
def lost(): return [*names[:5], ("nowhere.png", "b")], None, None
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules of the user's, in which this process works."""
    (tmp_path / "own.py").write_text(MODULE)
    (tmp_path / "my_images.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own", "my_images"):
        sys.modules.pop(name, None)


def opened(name: str, **changed: Any) -> Dataset:
    return open_data(DataConfig(data=f"own:{name}", workers=0, **changed), lambda: 112)


@pytest.mark.parametrize("name", ["numbers", "words", "unnamed", "encoded", "parts", "turned", "large"])
def test_own__gives_its_images_and_labels_by_index(module: Path, name: str) -> None:
    found = opened(name)
    assert found.classes == ("a", "b")
    assert found.held_out is (name == "words")
    (batch,) = found.train.batches([np.arange(len(found.train))], view=None)
    again = opened(name)
    if name == "turned":
        upright = opened("numbers").train
        (other,) = upright.batches([np.arange(len(upright))], view=None)
        assert batch.image.equal(other.image.rot90(-1, (2, 3)))
    (other,) = again.train.batches([np.arange(len(again.train))], view=None)
    assert batch.image.equal(other.image)
    if not found.held_out:
        assert batch.label.tolist() == [index % 2 for index in range(len(found.train))]
    assert found.fingerprint == again.fingerprint


def test_own__targets_spare_the_images(module: Path) -> None:
    assert opened("targets", validation_share=0.01).train.labels.tolist() == [0] * 5 + [1] * 5


def test_own__images_without_labels(module: Path) -> None:
    assert not opened("bare", label_weight=0.0).labelled


def test_own__another_pixel_or_label_is_another_fingerprint(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened("numbers").fingerprint
    own = sys.modules["own"]
    monkeypatch.setattr(own, "items", [*own.items[:-1], (own.items[-1][0], 0)])
    assert opened("numbers").fingerprint != first
    monkeypatch.setattr(own, "items", [*own.items[:-1], (Image.new("RGB", (16, 16)), 1)])
    assert opened("numbers").fingerprint != first


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "has no attribute 'nowhere'"),
        ("items", "not callable"),
        ("fails", "KeyError: 'no such table'"),
        ("two", "not enough values"),
        ("empty", "no training images"),
        ("doubled", "named twice: a"),
        ("beyond", "label 1 of item 1 is none of the 1 classes"),
        ("unknown", "label 'b' of item 1 is none of the 2 classes"),
        ("half", "without a label.*--label-weight 0"),
        ("bare", "without a label.*--label-weight 0"),
        ("flat", "TypeError"),
        ("lost", "nowhere.png"),
        ("matrices", "a ndarray, which is no image"),
    ],
)
def test_own__what_is_wrong_is_said(module: Path, name: str, said: str) -> None:
    with pytest.raises(DataError, match=f"(?s)--data own:{name}\n.*{said}"):
        opened(name)


@pytest.mark.usefixtures("unexported")
def test_own__of_the_page_is_distilled_continued_and_evaluated(
    module: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_folder(module / "images", train=8, validation=4)
    for part in ("train", "validation"):
        files = sorted((images / part).rglob("*.png"))
        (module / f"{part}.csv").write_text("".join(f"{path},{path.parent.name}\n" for path in files))
    leave = Trainer._leave

    def stop(self: Trainer, signum: int) -> None:
        leave(self, 15 if (self.plan.stage, self.progress.epoch) == ("student", 1) else signum)

    job = {**JOB, "data": "my_images:photos"}
    distill("cifar_resnet20", "cifar_resnet20", **job, out=module / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_leave", stop)
        with pytest.raises(Interrupted):
            distill("cifar_resnet20", "cifar_resnet20", **job, out=module / "run")
    distill("cifar_resnet20", "cifar_resnet20", **job, out=module / "run")
    assert "student: continued after 1 passes" in capsys.readouterr().err
    weights = [(module / name / "student.safetensors").read_bytes() for name in ("straight", "run")]
    assert weights[0] == weights[1]

    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["factor-transfer", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    assert command("evaluate", "run") == 2
    assert "data: my_images:photos, which is code that would be run" in capsys.readouterr().err
    assert command("evaluate", "run", "--trust-config", "--json") == 0
    own = json.loads(capsys.readouterr().out)
    assert command("evaluate", "run", "--data", images, "--json") == 0
    assert json.loads(capsys.readouterr().out)["student"]["top1"] == own["student"]["top1"]


def test_own__a_file_of_settings_does_not_get_to_name_it_unasked(
    module: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (module / "job.yaml").write_text("data: own:numbers\nteacher: cifar_resnet20\nstudent: cifar_resnet20\n")
    monkeypatch.setattr(sys, "argv", ["factor-transfer", "distill", "--config", "job.yaml"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "--trust-config" in capsys.readouterr().err
    assert "own" not in sys.modules
