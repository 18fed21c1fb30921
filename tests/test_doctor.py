"""The doctor's verdict on planted faults, and on good cases."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer.config import Config, DataConfig
from factor_transfer.data.dataset import open_data
from factor_transfer.doctor import Diagnosis, diagnose
from factor_transfer.networks.load import InputNorm
from factor_transfer.util.seeds import seeded
from processes import Command

TEACHER: dict[str, Any] = {"layers": (1, 1, 1), "channels": (8, 16, 32)}
STUDENT: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 8, 16)}
MEAN, STD = (0.2, 0.2, 0.2), (0.1, 0.1, 0.1)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network that knows the digits, in the normalisation MEAN, STD."""
    data = open_data(DataConfig(data="digits", img_size=16), default_size=lambda: 16)
    with seeded(0):
        network = timm.create_model("cifar_resnet20", **TEACHER, num_classes=10)
        norm = InputNorm(MEAN, STD)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for _ in range(8):
            for batch in data.train.batches(np.array_split(torch.randperm(len(data.train)).numpy(), 20), view=None):
                loss = nn.functional.cross_entropy(network(norm(batch.image)), batch.label)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


def look(teacher: nn.Module | None = None, student: nn.Module | None = None, **changed: Any) -> Diagnosis:
    """The good case, with settings changed."""
    settings: dict[str, Any] = {
        "data": "digits", "img_size": 16, "teacher": "cifar_resnet20", "student": "cifar_resnet20",
        "teacher_args": None if teacher else TEACHER, "student_args": None if student else STUDENT,
        "teacher_mean": MEAN, "teacher_std": STD, "threads": 1, "device": "cpu",
    }  # fmt: skip
    modules = {role: module for role, module in (("teacher", teacher), ("student", student)) if module is not None}
    return diagnose(Config(**{**settings, **changed}), modules)  # type: ignore[arg-type]


def says(found: Diagnosis, code: int, what: str, hint: str = "") -> None:
    assert found.code == code, found.findings
    assert any(what in f"{each.what}" and hint in each.hint for each in found.findings), found.findings


# -- good cases


def test_doctor__finds_nothing_in_a_good_case(trained: nn.Module) -> None:
    found = look(trained)
    assert found.findings == []
    assert found.code == 0
    assert [title for title, *_ in found.tables] == [
        "networks", "layers that give a map", "teacher", "losses on one batch", "factor transfer",
    ]  # fmt: skip


def test_doctor__finds_nothing_with_another_family(trained: nn.Module) -> None:
    student = timm.create_model("test_efficientnet", num_classes=10)
    assert (
        look(trained, student, img_size=32, teacher_size=16, opt="adamw", lr=1e-3, paraphraser_lr=1e-3, beta=60.0).code
        <= 1
    )


def test_doctor__a_headless_teacher_is_a_good_case(trained: nn.Module) -> None:
    headless = copy.deepcopy(trained)
    headless.reset_classifier(0)  # type: ignore[operator]
    assert look(headless).findings == []


def test_doctor__a_teacher_that_is_trained_first_is_a_good_case() -> None:
    assert look(teacher_epochs=3).findings == []


# -- planted faults: the teacher


def test_doctor__wrong_normalisation(trained: nn.Module) -> None:
    found = look(trained, teacher_mean=(5.0, 5.0, 5.0), teacher_std=(0.3, 0.3, 0.3))
    says(found, found.code, "with another normalisation", "--teacher-mean")
    assert found.code > 0


def test_doctor__shuffled_class_order(trained: nn.Module) -> None:
    shuffled = copy.deepcopy(trained)
    order = torch.roll(torch.arange(10), 3)
    shuffled.linear.weight.data = shuffled.linear.weight.data[order]  # type: ignore[union-attr, index]
    shuffled.linear.bias.data = shuffled.linear.bias.data[order]  # type: ignore[union-attr, index]
    says(look(shuffled), 2, "in another order", "--class-map")


def test_doctor__a_teacher_that_knows_nothing() -> None:
    torch.manual_seed(0)
    says(look(timm.create_model("cifar_resnet20", **TEACHER)), 2, "where chance is 10.00 %", "--teacher-weights")


def test_doctor__no_trained_weights() -> None:
    says(look(), 2, "no trained weights", "--teacher-weights")


def test_doctor__weights_of_another_network(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    says(
        look(teacher="cifar_resnet20_b", teacher_weights=str(tmp_path / "w.safetensors")), 2, "tensors that do not fit"
    )


def test_doctor__a_dead_layer(trained: nn.Module) -> None:
    dead = copy.deepcopy(trained)
    for name, parameter in dead.named_parameters():
        if name.startswith("layer3"):
            parameter.data.zero_()
    dead.layer3[0].bn2.bias.data.fill_(-1000)  # type: ignore[index, union-attr]
    says(look(dead), 2, "the same for every image", "--teacher-layer")


def test_doctor__a_layer_that_is_half_dead(trained: nn.Module) -> None:
    dead = copy.deepcopy(trained)
    dead.layer3[0].bn2.bias.data[:20] = -1000  # type: ignore[index, union-attr]
    found = look(dead)
    says(found, found.code, "of its channels are the same for every image")


class Restless(nn.Module):
    """A teacher whose own code puts it into train mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        self.network.train()
        return self.network(images)  # type: ignore[no-any-return]


class Dropping(Restless):
    def forward(self, images: Tensor) -> Tensor:
        return self.network(nn.functional.dropout(images, 0.1, training=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Restless, Dropping])
def test_doctor__a_teacher_whose_own_code_trains(trained: nn.Module, kind: type[Restless]) -> None:
    says(look(kind(copy.deepcopy(trained))), 2, "its own code trains", "train()")


# -- heads, layers and sizes


def test_doctor__a_student_with_another_number_of_classes(trained: nn.Module) -> None:
    student = timm.create_model("cifar_resnet20", **STUDENT, num_classes=7)
    says(look(trained, student), 2, "logits (2, 10)", "10 outputs")


def test_doctor__fine_tuning_a_teacher_with_another_head(trained: nn.Module) -> None:
    headless = copy.deepcopy(trained)
    headless.reset_classifier(7)  # type: ignore[operator]
    says(look(headless, teacher_epochs=2), 2, "gives no logits for these classes")


@pytest.mark.parametrize("layer", ["layer3.0.bn2", "layer3.0.conv1"])
def test_doctor__a_tap_before_the_last_activation(trained: nn.Module, layer: str) -> None:
    says(look(trained, teacher_layer=layer), 1, f"--teacher-layer {layer}: ", "leave --teacher-layer out")


@pytest.mark.parametrize(
    ("layer", "what"), [("layer4", "no submodule"), ("linear", "no feature map: a layer"), ("linear", "layer3 32x4x4")]
)
def test_doctor__a_layer_that_cannot_be_tapped(trained: nn.Module, layer: str, what: str) -> None:
    found = look(trained, teacher_layer=layer)
    assert found.code == 2
    text = found.findings[0].what.replace("which is no feature map\nvalid:", "which is no feature map:")
    assert what in text or "no feature map" in text


def test_doctor__maps_that_meet_in_one_place(trained: nn.Module) -> None:
    says(look(trained, img_size=4), 2, "1x1")


def test_doctor__a_student_that_is_no_smaller(trained: nn.Module) -> None:
    says(look(trained, student_args=TEACHER), 1, "no smaller than the teacher")


# -- factors and losses


def test_doctor__beta_that_is_negligible(trained: nn.Module) -> None:
    says(look(trained, beta=1.0), 1, "--beta 1: ", "--beta auto")


def test_doctor__beta_that_drowns_the_labels(trained: nn.Module) -> None:
    says(look(trained, beta=1e6), 1, "--beta 1e+06: ", "--beta auto")


def test_doctor__k_too_small(trained: nn.Module) -> None:
    says(look(trained, k=0.05), 1, "--k 0.05: 2 factor channels", "0.5")


def test_doctor__k_that_leaves_nothing(trained: nn.Module) -> None:
    says(look(trained, k=0.01), 2, "= 0 factor channels")


def test_doctor__a_paraphraser_of_another_teacher(trained: nn.Module, shared: Path) -> None:
    given = str(shared / "checkpoints" / "reference-paraphraser-cifar10.pth")
    says(look(trained, paraphraser=given), 2, "made for 64 teacher channels", "--paraphraser")


def test_doctor__an_adaptive_optimizer_at_the_papers_rate(trained: nn.Module) -> None:
    says(look(trained, opt="adamw"), 1, "--paraphraser-lr 0.1 with --opt adamw", "1e-3")


def test_doctor__a_batch_of_all_images(trained: nn.Module) -> None:
    says(look(trained, batch_size=5000), 1, "one step a pass", "--batch-size")


# -- data


def test_doctor__an_empty_class(images: Path) -> None:
    for path in (images / "train" / "class1").iterdir():
        path.unlink()
    says(look(data=str(images), teacher_epochs=1), 2, "class1")


def test_doctor__corrupt_files(images: Path) -> None:
    (images / "train" / "class0" / "000.png").write_bytes(b"no image")
    says(look(data=str(images), teacher_epochs=1), 2, "1 unreadable image", "--skip-corrupt")


def test_doctor__images_in_both_splits(images: Path) -> None:
    shutil.copy(images / "train" / "class0" / "000.png", images / "validation" / "class0" / "again.png")
    says(look(data=str(images), teacher_epochs=1, batch_size=8), 1, "1 images are in training and in validation")


def test_doctor__grey_images_among_colours(images: Path) -> None:
    path = images / "train" / "class2" / "003.png"
    Image.open(path).convert("L").save(path)
    says(look(data=str(images), teacher_epochs=1, batch_size=8), 1, "are grey")


def test_doctor__classes_of_very_different_sizes(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", train=30)
    for path in sorted((folder / "train" / "class1").iterdir())[1:]:
        path.unlink()
    says(look(data=str(folder), teacher_epochs=1, batch_size=8), 1, "30 images of class0, 1 of class1")


@pytest.mark.slow
def test_doctor__the_command_writes_nothing_and_exits_with_its_verdict(
    trained: nn.Module, factor_transfer: Command, tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    save_file(trained.state_dict(), weights)
    flags = [
        "doctor", "--data", "digits", "--img-size", 16, "--teacher", "cifar_resnet20", "--teacher-args",
        "layers=(1,1,1) channels=(8,16,32)", "--teacher-weights", weights, "--teacher-mean", 0.2, 0.2, 0.2,
        "--teacher-std", 0.1, 0.1, 0.1, "--student", "cifar_resnet20", "--student-args",
        "layers=(1,1,1) channels=(4,8,16)", "--threads", 1,
    ]  # fmt: skip
    place = tmp_path / "empty"
    place.mkdir()
    for more, code, text in (((), 0, "fit to run"), (("--beta", 1), 1, "hardly be heard"), (("--k", 0.001), 2, "--k")):
        done = factor_transfer(*flags, *more, cwd=place)
        assert done.returncode == code, done.stderr
        assert text in done.stderr
    assert not list(place.iterdir())


def test_doctor__reads_nothing_that_others_can_have_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for folder in (tmp_path / "factor-transfer" / "nowhere", tmp_path / "factor-transfer"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fingerprints.json").write_text('{"data": "planted", "student": "planted"}')
    before = sorted(tmp_path.rglob("*"))
    found = look(teacher_epochs=1)
    assert not [finding for finding in found.findings if finding.level == "error"]
    assert sorted(tmp_path.rglob("*")) == before
