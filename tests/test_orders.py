"""A head that numbers the classes in another order is noticed before anything is trained."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import factor_transfer.training.orders
import factor_transfer.zoo
from factor_transfer import distill
from factor_transfer.config import Config
from factor_transfer.data.images import natural
from factor_transfer.doctor import diagnose
from factor_transfer.training.orders import find_order
from factor_transfer.util.errors import ModelError, TrainingError
from processes import TORCHRUN, Command, Started

pytestmark = pytest.mark.usefixtures("unexported")
NUMBERS = [str(number) for number in range(1, 13)]  # plain strings: 1, 10, 11, 12, 2, ...
WORDS = ["apple", "Zebra", "cherry", "Banana", "fig", "Date", "elder", "Grape", "item10", "item9", "Item11", "kiwi"]
SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {
    "teacher_mean": (0.0,) * 3, "teacher_std": (1.0,) * 3, "student_args": SMALL, "epochs": 1, "paraphraser_epochs": 1,
    "batch_size": 16, "threads": 1, "device": "cpu", "lr": 0.05,
}  # fmt: skip


def network(order: Sequence[str], classes: Sequence[str], wrong: float = 0.0) -> nn.Module:
    """Tells grey images apart by their brightness, which is the class's number; its outputs are in `order`."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(classes))
    )
    conv, head = made[0], made[4]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        conv.weight[0] = 0
        conv.weight[0, :, 1, 1] = 1 / 3
        conv.bias[0] = 0  # type: ignore[index]
        head.weight.zero_()
        mean = torch.tensor([brightness(name, classes) / 255 for name in order])
        head.weight[:, 0], head.bias[:] = 200 * mean, -100 * mean**2
    made.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}  # type: ignore[assignment]
    return made


def brightness(name: str, classes: Sequence[str]) -> float:
    return 255 * (sorted(classes, key=natural).index(name) + 0.5) / len(classes)


def folder(where: Path, classes: Sequence[str], train: int = 3, validation: int = 8) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for name in classes:
            (where / split / name).mkdir(parents=True)
            for number in range(count):
                noise = random.integers(-4, 5, (16, 16))
                grey = (brightness(name, classes) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(np.stack([grey] * 3, -1)).save(where / split / name / f"{number}.png")
    return where


def case(order: str) -> list[str]:
    sort: dict[str, Callable[[str], Any]] = {
        "plain": lambda name: name, "casefold": str.casefold,
        "natural with case": lambda name: (name[0].islower(), natural(name)),
    }  # fmt: skip
    return sorted(WORDS, key=sort[order])


# -- the rule


def answered(order: Sequence[str], classes: Sequence[str], right: float, each: int = 20, seed: int = 0) -> Any:
    """(said, labels) of a head whose outputs are in `order` and which is right on that share of the images."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(classes)), each)
    said = np.array([list(order).index(classes[label]) for label in labels])
    lost = random.random(len(labels)) > right
    said[lost] = random.integers(0, len(classes), lost.sum())
    return said, labels


def named(classes: Sequence[str]) -> dict[str, list[str]]:
    return {"strings": sorted(classes), "later": [classes[-1], *classes[:-1]]}


@pytest.mark.parametrize("right", [0.5, 0.75, 1.0])
def test_find_order__names_the_order_of_a_good_head_and_of_a_middling_one(right: float) -> None:
    found = find_order(*answered(sorted(NUMBERS), NUMBERS, right), NUMBERS, named(NUMBERS))
    assert found is not None
    assert found.name == "strings"
    assert found.classes == tuple(sorted(NUMBERS))
    assert found.right > found.here + 30
    rolled = [NUMBERS[-1], *NUMBERS[:-1]]
    found = find_order(*answered(rolled, NUMBERS, right), NUMBERS, named(NUMBERS))
    assert found is not None
    assert found.name == "later"


@pytest.mark.parametrize("right", [0.0, 0.1, 0.3, 0.9])
def test_find_order__raises_no_false_alarm(right: float) -> None:
    """Heads in the right order, weak ones and those that only guess."""
    for seed in range(60):
        assert find_order(*answered(NUMBERS, NUMBERS, right, seed=seed), NUMBERS, named(NUMBERS)) is None


def test_find_order__a_head_with_one_answer_has_no_order() -> None:
    """Most images are of class 2, and it always gives the output that is class 2 in string order."""
    labels = np.array([1] * 300 + list(range(12)) * 10)
    said = np.full_like(labels, sorted(NUMBERS).index("2"))
    assert find_order(said, labels, NUMBERS, named(NUMBERS)) is None


def test_find_order__finds_an_order_without_a_name_on_half_of_the_images() -> None:
    order = list(np.random.default_rng(3).permutation(NUMBERS))
    found = find_order(*answered(order, NUMBERS, 0.8), NUMBERS, named(NUMBERS))
    assert found is not None
    assert (found.classes, found.sure) == (tuple(order), True)
    two = ["2", "1", *NUMBERS[2:]]
    found = find_order(*answered(two, NUMBERS, 0.95, each=40), NUMBERS, named(NUMBERS))
    assert found is not None
    assert found.classes == tuple(two)


def test_find_order__does_not_vouch_for_places_that_nothing_shows() -> None:
    many = [str(number) for number in range(100)]
    said, labels = answered(list(np.random.default_rng(3).permutation(many)), many, 0.8, each=4)
    there = labels >= 3
    found = find_order(said[there], labels[there], many, {})
    assert found is not None
    assert not found.sure


def test_find_order__few_images_tell_nothing() -> None:
    said, labels = answered(sorted(NUMBERS), NUMBERS, 1.0, each=1)
    assert find_order(said[:6], labels[:6], NUMBERS, named(NUMBERS)) is None


# -- the commands


def test_distill__stops_and_writes_the_class_map_that_puts_it_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = folder(tmp_path / "images", NUMBERS), tmp_path / "run"
    teacher = network(sorted(NUMBERS), NUMBERS)
    with pytest.raises(ModelError) as caught:
        distill(teacher, "cifar_resnet20", images, **JOB, out=out)
    said, file = str(caught.value), tmp_path / "run.classes.txt"
    assert "in another order of the classes, plain string order, which is torchvision's and Keras's: 1, 10, 11" in said
    assert "Of 96 validation images it is right on 8.3 % as the data numbers the classes, on 100.0 % in" in said
    assert f"--class-map {file}, which now has that order; or use its features alone: --teacher-args num_cl" in said
    assert file.read_text().split() == sorted(NUMBERS)
    assert not list(out.glob("stages/*"))
    student = network(NUMBERS, NUMBERS)
    given = {**JOB, "student_args": None, "class_map": file, "out": out}
    done = distill(teacher, student, images, **given)
    assert done.summary["teacher"]["top1"] == 100
    assert done.summary["data"]["classes"] == sorted(NUMBERS)
    assert "warning: --student Sequential: its outputs are in another order" in capsys.readouterr().err


def test_distill__looks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, out = folder(tmp_path / "images", NUMBERS, validation=2), tmp_path / "run"
    teacher = network(NUMBERS, NUMBERS)
    distill(teacher, "cifar_resnet20", images, **JOB, out=out)
    for name in ("summary.json", "report.html", "stages/student.json"):
        (out / name).unlink(missing_ok=True)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("looked at again")

    monkeypatch.setattr(factor_transfer.training.orders, "answers", again)
    distill(teacher, "cifar_resnet20", images, **JOB, out=out)
    assert (out / "summary.json").exists()


@pytest.mark.parametrize("order", ["plain", "casefold", "natural with case"])
def test_doctor__names_the_order_and_the_command_that_mends_it(tmp_path: Path, order: str) -> None:
    images = folder(tmp_path / "images", WORDS, train=2, validation=6)
    config = {**JOB, "data": str(images), "teacher": "t", "student": "cifar_resnet20"}
    teacher = network(case(order), WORDS)
    found = diagnose(Config(**config), {"teacher": teacher})
    assert found.code == 2
    (finding,) = [each for each in found.findings if "in another order" in each.what]
    wanted = {
        "plain": "plain string order",
        "casefold": "string order without case",
        "natural with case": "natural order",
    }
    assert wanted[order] in finding.what
    command = finding.hint.partition("after: ")[2].partition(";")[0]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, executable="/bin/sh")
    assert (tmp_path / "classes.txt").read_text().split() == case(order)
    mended = diagnose(Config(**config, class_map=str(tmp_path / "classes.txt")), {"teacher": teacher})
    assert not [each for each in mended.findings if "order" in each.what]


def test_doctor__looks_at_a_teacher_that_will_be_fine_tuned_too(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", NUMBERS, train=2, validation=6)
    config = Config(**JOB, data=str(images), teacher="t", student="cifar_resnet20", teacher_epochs=2)
    found = diagnose(config, {"teacher": network(sorted(NUMBERS), NUMBERS)})
    assert any("in another order" in each.what and each.level == "error" for each in found.findings)


def test_distill__without_labels_the_names_that_came_with_the_teacher_tell(
    image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, names = tmp_path / "flat", ["class2", "class0", "class1"]
    flat.mkdir()
    for path in image_folder(tmp_path / "images", train=4, validation=1).rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}{path.parent.parent.name}{path.name}")
    teacher = timm.create_model("cifar_resnet20", **SMALL, num_classes=3)
    timm.models.save_for_hf(teacher, tmp_path / "t", model_config={"label_names": names}, safe_serialization=True)
    (tmp_path / "classes.txt").write_text("class0\nclass1\nclass2\n")
    settings = {name: value for name, value in JOB.items() if not name.startswith("teacher")}
    settings |= {"label_weight": 0.0, "kd_weight": 1.0, "class_map": tmp_path / "classes.txt", "out": tmp_path / "run"}
    with pytest.raises(ModelError, match="(?s)label_names that came with it: class2, class0, class1.*--class-map"):
        distill(f"local-dir:{tmp_path / 't'}", "cifar_resnet20", flat, **settings)
    mended = tmp_path / "run.classes.txt"
    assert mended.read_text().split() == names
    distill(f"local-dir:{tmp_path / 't'}", "cifar_resnet20", flat, **settings | {"class_map": mended})
    unnamed = {**settings, "out": tmp_path / "other"}
    distill(teacher, "cifar_resnet20", flat, **unnamed)
    assert "without labels nothing tells whether its head has the order" in capsys.readouterr().err


def test_distill__says_where_one_answer_would_be_as_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher that is right on every image of two rare classes, and on none of the common one."""
    names = ["a", "b", "c"]
    images = folder(tmp_path / "images", names, validation=10)
    for number in range(10, 45):
        shutil.copy(images / "validation/c/0.png", images / f"validation/c/{number}.png")
    teacher = network(names, names)
    with torch.no_grad():
        teacher[4].bias[2] = -1000  # type: ignore[index, union-attr]
        teacher[0].weight[1:] = torch.randn(7, 3, 3, 3)  # type: ignore[index, union-attr]
    with pytest.raises(TrainingError, match="(?s)top-1 30.77 % on the validation images, where chance is 33.33 %"):
        distill(teacher, "cifar_resnet20", images, **JOB, out=tmp_path / "bad")
    for number in range(28, 45):
        (images / f"validation/c/{number}.png").unlink()
    distill(teacher, "cifar_resnet20", images, **JOB, out=tmp_path / "run")
    said = "warning: --teacher Sequential: top-1 41.67 % on the validation images; always answering `c` would have 58"
    assert said in capsys.readouterr().err


# -- processes of their own

CODE = """
import torch
from torch import nn


def teacher():
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *pool, nn.Linear(8, 12))
"""


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A working folder, and settings that any process can read."""
    folder(tmp_path / "images", NUMBERS)
    (tmp_path / "nets.py").write_text(CODE)
    torch.save(network(sorted(NUMBERS), NUMBERS).state_dict(), tmp_path / "t.pth")
    return tmp_path, {
        **JOB, "data": "images", "teacher": "nets:teacher", "teacher_weights": "t.pth", "student": "cifar_resnet20",
    }  # fmt: skip


FLAGS = shlex.split(
    "--data images --teacher nets:teacher --teacher-weights t.pth --teacher-mean 0 0 0 --teacher-std 1 1 1 --student "
    "cifar_resnet20 --student-args 'layers=(1,1,1) channels=(4,4,8)' --epochs 1 --device cpu --threads 1 --out run"
)


@pytest.mark.slow
def test_distill__several_processes_come_to_the_same(job: tuple[Path, dict[str, Any]]) -> None:
    where, _ = job
    command = ["--standalone", "--nproc-per-node", "2", "-m", "factor_transfer", "distill", *FLAGS]
    done = Started(command, code=TORCHRUN, cwd=where, forks=True).finished(150)
    assert done.returncode != 0
    for rank in range(2):
        assert f"[process {rank}] error: --teacher nets:teacher" in done.stderr
    assert done.stderr.count("Of 96 validation images it is right on 8.3 %") == 2
    assert (where / "run.classes.txt").read_text().split() == sorted(NUMBERS)


@pytest.mark.slow
def test_compare__stops_at_its_first_run(job: tuple[Path, dict[str, Any]], factor_transfer: Command) -> None:
    which = ["--methods", "ft,kd", "--seeds", 2, "--out", "compared"]
    done = factor_transfer("compare", *FLAGS[:-2], *which, cwd=job[0], forks=True)
    assert done.returncode == 2
    assert re.search("(?s)1 of 4 runs failed.*in another order.*compared/ft-s0.classes.txt", done.stderr)
