"""The pull of each term: measured on real networks, against gradients taken by hand."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer.data.splits import Batch
from factor_transfer.doctor import pulls
from factor_transfer.method.factor_transfer import Paraphraser, Translator, factor_transfer_loss
from factor_transfer.method.losses import FactorTransfer, Labels
from factor_transfer.networks.features import FrozenTeacher, Tapped
from factor_transfer.training.step import DistillationTask, TeacherSide
from factor_transfer.util.files import state_fingerprint


def batch(count: int = 8, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, size, size, generator=generator)
    return Batch(images, torch.arange(count) % 10, torch.arange(count))


def task() -> DistillationTask:
    """A small pair with fresh weights."""
    torch.manual_seed(0)
    teacher = timm.create_model("cifar_resnet20", layers=(1, 1, 1), channels=(4, 8, 16))
    student = timm.create_model("cifar_resnet20_b", layers=(1, 1, 1), channels=(4, 4, 8))
    side = FrozenTeacher(TeacherSide(Tapped(teacher, "layer3"), nn.Identity(), (4, 4), Paraphraser(16, 8)))
    terms = [Labels(), FactorTransfer(Translator(8, 8), beta=7)]
    return DistillationTask(Tapped(student, "layer3"), nn.Identity(), terms, side)


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
    assert found["factor_transfer"].norms["layer3"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert found["factor_transfer"].size == pytest.approx(loss.item(), rel=1e-4)
    logits = trainee.student.module.forward_head(feature)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, shown.label), feature)
    assert found["cross_entropy"].norms["layer3"] == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_pulls__leave_the_student_as_it_was() -> None:
    made = task()
    made.eval()
    before = state_fingerprint(made.trainable_module.state_dict())
    pulls(made, batch())
    assert state_fingerprint(made.trainable_module.state_dict()) == before
    assert not made.trainable_module.training
    assert all(weight.grad is None for weight in made.parameters())
