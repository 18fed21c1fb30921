"""The pull of each term, and a beta that carries over: measured on real networks, against gradients taken by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer.balance import BALANCE, balanced, pulls
from factor_transfer.config import Config
from factor_transfer.distillation import run_distillation
from factor_transfer.features import Tapped
from factor_transfer.files import state_fingerprint
from factor_transfer.frozen import FrozenTeacher
from factor_transfer.method import Paraphraser, Translator, factor_transfer_loss, portable_beta
from factor_transfer.splits import Batch
from factor_transfer.tasks import DistillationTask, TeacherSide
from factor_transfer.terms import FactorTransfer, Labels, Term

ROOT = Path(__file__).parent.parent


def batch(count: int = 8, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, size, size, generator=generator)
    return Batch(images, torch.arange(count) % 10, torch.arange(count))


def task(
    *, p: float = 1, beta: float = 7.0, factors: int = 8, scale: float = 1.0, labels: bool = True
) -> DistillationTask:
    """A small pair with fresh weights; `scale` is that of the student's last map."""
    torch.manual_seed(0)
    teacher = timm.create_model("cifar_resnet20", layers=(1, 1, 1), channels=(4, 8, 16))
    student = timm.create_model("cifar_resnet20_b", layers=(1, 1, 1), channels=(4, 4, 8))
    side = FrozenTeacher(TeacherSide(Tapped(teacher, "layer3"), nn.Identity(), (4, 4), Paraphraser(16, factors)))
    translator = Translator(8, factors)
    for conv in (translator.conv0, translator.conv1, translator.conv2):
        nn.init.zeros_(conv.bias)
    terms: list[Term] = [Labels()] if labels else []
    tapped = Tapped(Scaled(student, scale), "scaled")
    return DistillationTask(tapped, nn.Identity(), [*terms, FactorTransfer(translator, beta, p)], side)


class Scaled(nn.Module):
    """A network whose last map is scaled; its head makes up for that."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale, self.scaled = network, scale, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        feature = self.scaled(self.network.forward_features(images) * self.scale)
        logits: Tensor = self.network.forward_head(feature / self.scale)
        return logits


def test_pulls__are_the_gradients_in_the_students_map() -> None:
    made, shown = task(), batch()
    found = pulls(made, shown)
    trainee = made.trainable_module.train()
    logits, feature = trainee.student(shown.image)
    feature = feature.detach().requires_grad_()
    with torch.no_grad():
        factor = made.teacher(shown.image)["factor"]
    loss = 7 * factor_transfer_loss(made.terms[1].translator(feature), factor)
    (gradient,) = torch.autograd.grad(loss, feature)
    assert found["factor_transfer"].norms["scaled"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert found["factor_transfer"].size == pytest.approx(loss.item(), rel=1e-4)
    logits = trainee.student.module.network.forward_head(feature)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, shown.label), feature)
    assert found["cross_entropy"].norms["scaled"] == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_pulls__leave_the_student_as_it_was() -> None:
    made = task()
    made.eval()
    before = state_fingerprint(made.trainable_module.state_dict())
    pulls(made, batch())
    assert state_fingerprint(made.trainable_module.state_dict()) == before
    assert not made.trainable_module.training
    assert all(weight.grad is None for weight in made.parameters())


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("factors", [2, 8, 32])
@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_balanced__pulls_as_hard_for_any_norm_size_and_scale(p: float, factors: int, scale: float) -> None:
    """Whatever the reduction, the number of elements and the size of the student's map."""
    made, shown = task(p=p, factors=factors, scale=scale), batch()
    (beta,) = balanced(made, [shown])
    again = pulls(task(p=p, factors=factors, scale=scale, beta=beta), shown)
    ratio = again["factor_transfer"].norms["scaled"] / again["cross_entropy"].norms["scaled"]
    assert ratio == pytest.approx(BALANCE, rel=1e-3)


def test_balanced__does_not_depend_on_the_weight_it_begins_with() -> None:
    first, second = (balanced(task(beta=beta), [batch()])[0] for beta in (1e-3, 1e3))
    assert first == pytest.approx(second, rel=1e-4)


def test_balanced__is_none_where_a_term_does_not_pull() -> None:
    made = task()
    nn.init.zeros_(made.terms[1].translator.conv2.weight)
    nn.init.zeros_(made.terms[1].translator.conv2.bias)
    assert math.isnan(balanced(made, [batch()])[0])


def test_balance__is_what_was_measured() -> None:
    found = json.loads((ROOT / "results" / "balance.json").read_text())
    assert pytest.approx(found["fresh"]["mean"], rel=0.005) == BALANCE


# -- in a run


def settings(out: Path, **more: object) -> Config:
    small, smaller = ({"layers": (1, 1, 1), "channels": widths} for widths in ((8, 16, 32), (4, 8, 16)))
    return Config(**{
        "data": "digits", "teacher": "cifar_resnet20", "teacher_args": small, "student": "cifar_resnet20",
        "student_args": smaller, "teacher_epochs": 6, "paraphraser_epochs": 1, "epochs": 1, "views": 1, "lr": 0.05,
        "threads": 1, "device": "cpu", "log_with": "none", "cache_dir": str(out / "cache"), "out": str(out / "run"),
        **more,
    })  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("auto")
    run_distillation(settings(out))
    return out / "run"


def test_auto__is_measured_and_written_into_the_run(ran: Path, tmp_path: Path) -> None:
    summary = json.loads((ran / "summary.json").read_text())
    beta = summary["student"]["beta"]
    assert beta != pytest.approx(portable_beta(summary["student"]["elements"]), rel=0.02)
    assert summary["pairs"][0]["beta"] == beta
    assert json.loads((ran / "fingerprints.json").read_text())["beta"] == repr(beta)
    shared = {"teacher_epochs": 0, "teacher_weights": str(ran / "teacher.safetensors")}
    shared["paraphraser"] = str(ran / "paraphraser.safetensors")
    again = run_distillation(settings(tmp_path, **shared)).summary
    assert again["student"]["beta"] == beta


def test_auto__of_several_layers_is_measured_at_each(ran: Path, tmp_path: Path) -> None:
    more = {"teacher_layer": "layer3,layer2", "student_layer": "layer3,layer2", "teacher_epochs": 0}
    pairs = run_distillation(settings(tmp_path, **more, teacher_weights=str(ran / "teacher.safetensors"))).summary[
        "pairs"
    ]
    assert pairs[0]["beta"] != pairs[1]["beta"]
    assert [pair["weight"] for pair in pairs] == [pair["beta"] / 2 for pair in pairs]


def test_auto__without_labels_keeps_the_authors_bound(ran: Path, tmp_path: Path) -> None:
    more = {"label_weight": 0.0, "teacher_epochs": 0, "teacher_weights": str(ran / "teacher.safetensors")}
    found = run_distillation(settings(tmp_path, **more)).summary["student"]
    assert (found["beta"], found["beta_by"]) == (pytest.approx(portable_beta(found["elements"])), "bound")
