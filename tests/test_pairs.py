"""Any teacher with any student: the right layers, a loss that falls, and a student that leaves alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.export.formats import export_pt2
from factor_transfer.method.factor_transfer import Paraphraser, Translator, factor_channels, portable_beta
from factor_transfer.method.losses import FactorTransfer, Labels
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.networks.load import Role
from factor_transfer.networks.pair import Pair, Side, feature_health, load_side
from factor_transfer.training.step import DistillationTask, ParaphraserTask, TeacherSide

SIZE, CLASSES = 32, 5


class WithDict(nn.Module):
    """A user's network: a ViT without timm's names, behind a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("test_vit", img_size=SIZE, num_classes=0, patch_size=8)
        self.classify = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.backbone.forward_features(images)
        return {"tokens": tokens, "logits": self.classify(tokens[:, 0])}


TEACHERS: dict[str, tuple[str | nn.Module, dict[str, object], str]] = {
    "ResNet": ("test_resnet", {}, "layer4"),
    "ConvNeXt": ("test_convnext", {}, "stages"),
    "EfficientNet": ("test_efficientnet", {}, "bn2"),
    "MobileNet": ("mobilenetv3_small_050", {}, "blocks"),
    "VGG": ("cifar_vgg13", {}, "layer5"),
    "ViT with a class token": ("test_vit", {"patch_size": 8}, "norm"),
    "ViT with registers": ("test_vit", {"patch_size": 8, "reg_tokens": 4}, "norm"),
    "Swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2),
                                              "window_size": 4}, "norm"),
    "Mixer": (MlpMixer(CLASSES, SIZE, patch_size=8, num_blocks=2, embed_dim=32), {}, "norm"),
    "torchvision": ("torchvision/resnet18", {}, "layer4"),
    "a dict": (WithDict(), {}, "backbone.norm"),
}  # fmt: skip
STUDENTS = ("ResNet", "ConvNeXt", "MobileNet", "ViT with registers", "Swin", "a dict")


@cache
def side(role: Role, family: str) -> Side:
    given, args, _ = TEACHERS[family]
    name, module = (given, None) if isinstance(given, str) else (type(given).__name__, given)
    config = Config(data="digits", teacher=name, student=name, teacher_args=args, student_args=args)
    return load_side(role, config, CLASSES, SIZE, module)


def batch() -> tuple[Tensor, Tensor]:
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (8, 3, SIZE, SIZE), np.uint8)), torch.arange(8) % CLASSES


trained: dict[tuple[str, tuple[int, int]], Paraphraser] = {}
"""By teacher and size of its map, which students share."""


def paraphraser_of(teacher: str, pair: Pair) -> Paraphraser:
    """It has taken ten steps on one batch."""
    if (teacher, pair.size) not in trained:
        torch.manual_seed(0)
        channels = pair.teacher.shape[0]
        made = Paraphraser(channels, factor_channels(channels, 0.5))
        frozen = FrozenTeacher(TeacherSide(pair.teacher.tapped(), pair.teacher.network.norm, pair.size))
        descend(ParaphraserTask(made, frozen), *batch(), lr=1e-3)
        trained[teacher, pair.size] = made
    return trained[teacher, pair.size]


def check(teacher: str, student_: str) -> None:
    """A paraphraser and a student take ten steps each on one batch."""
    pair = Pair(side("teacher", teacher), side("student", student_))
    norm, (images, labels) = pair.teacher.network.norm, batch()
    paraphraser = paraphraser_of(teacher, pair)
    torch.manual_seed(1)
    frozen = FrozenTeacher(TeacherSide(pair.teacher.tapped(), norm, pair.size, paraphraser))
    translator = Translator(pair.student.shape[0], paraphraser.factor_channels)
    beta = portable_beta(paraphraser.factor_channels * pair.size[0] * pair.size[1])
    terms = [Labels(), FactorTransfer(translator, beta)]
    student = DistillationTask(pair.student.tapped(), pair.student.network.norm, terms, frozen)
    factor = [result["factor_transfer"].item() for result in descend(student, images, labels, lr=3e-3)]
    assert factor[-1] < 0.95 * factor[0], factor


def descend(task: nn.Module, images: Tensor, labels: Tensor, lr: float) -> Iterator[dict[str, Tensor]]:
    task.train()
    optimizer = torch.optim.Adam(task.get_trainable_module().parameters(), lr)  # type: ignore[operator, union-attr]
    results = []
    for _ in range(11):  # the last shows what ten steps gave
        results.append(task(images, labels))
        optimizer.zero_grad()
        results[-1]["loss"].backward()
        optimizer.step()
    return iter(results)


@pytest.mark.parametrize("family", TEACHERS)
def test_load_side__finds_the_layer_of_every_family(family: str) -> None:
    found = side("teacher", family)
    assert found.layer == TEACHERS[family][2]
    health = feature_health(found, batch()[0])
    assert health.finite
    assert health.dead < 0.8


@pytest.mark.parametrize("place", range(len(STUDENTS)))
def test_pair__each_student_learns_from_one_teacher(place: int) -> None:
    """The thin form: a teacher of another family each."""
    teacher = list(TEACHERS)[(2 * place + 5) % len(TEACHERS)]
    check(teacher, STUDENTS[place])


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_pair__every_student_learns_from_every_teacher(teacher: str, student: str) -> None:
    check(teacher, student)


@pytest.mark.slow
def test_export__every_student_runs_without_this_package(tmp_path: Path) -> None:
    """In one process, which begins without it."""
    for place, student in enumerate(STUDENTS):
        network = side("student", student).network
        images = network.norm(batch()[0])
        export_pt2(network.module, images, tmp_path / f"{place}.pt2")
        with torch.no_grad():
            wanted = network.module.eval()(images)
        torch.save({"images": images, "wanted": wanted}, tmp_path / f"{place}.pt")
    alone = (
        "import sys, torch\n"
        "torch.set_num_threads(1)  # as here: another number adds up in another order\n"
        "for name in ('factor_transfer', 'timm', 'torchvision'): sys.modules[name] = None\n"
        f"for place, name in enumerate({STUDENTS}):\n"
        "    io = torch.load(f'{place}.pt')\n"
        "    found = torch.export.load(f'{place}.pt2').module()(io['images'])\n"
        "    torch.testing.assert_close(found, io['wanted'], msg=name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", alone], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_matrix__covers_what_it_should() -> None:
    assert len(TEACHERS) >= 10
    assert len(STUDENTS) >= 6
    assert set(STUDENTS) <= set(TEACHERS)


def test_load_side__sees_through_compiled_and_parallel_wrappers() -> None:
    """The network in them is what is trained and shipped; its layers keep their names."""
    config = Config(data="digits", teacher="x", student="x")
    plain = timm.create_model("test_resnet", num_classes=CLASSES)
    for wrapped in (torch.compile(plain), nn.DataParallel(plain)):
        found = load_side("student", config, CLASSES, SIZE, wrapped)  # type: ignore[arg-type]
        assert found.layer == "layer4"
        assert found.network.module.state_dict().keys() == plain.state_dict().keys()


def test_load_side__shows_the_teacher_its_own_size() -> None:
    config = Config(data="digits", teacher="test_vit", student="test_resnet", teacher_size=64)
    teacher = load_side("teacher", config, CLASSES, SIZE)
    assert teacher.shape == (64, 4, 4)
    images = batch()[0]
    shown = teacher.network.norm(images)
    assert shown.shape == (8, 3, 64, 64)
    torch.testing.assert_close(shown.mean(), teacher.network.norm(shown_at(images, 64)).mean())
    assert load_side("student", config, CLASSES, SIZE).network.size == (SIZE, SIZE)
    assert feature_health(teacher, images).finite


def shown_at(images: Tensor, size: int) -> Tensor:
    return nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)


def test_feature_health__sees_dead_channels_and_a_dead_map() -> None:
    config = Config(data="digits", teacher="x", student="x")
    network = timm.create_model("test_resnet", num_classes=CLASSES)
    images = batch()[0]
    assert feature_health(load_side("teacher", config, CLASSES, SIZE, network), images).dead < 0.8
    network.layer4[-1].bn2.weight.data.zero_()
    network.layer4[-1].bn2.bias.data.fill_(-100)
    assert feature_health(load_side("teacher", config, CLASSES, SIZE, network), images).dead == 1
