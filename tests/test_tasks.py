"""The objectives, against the authors' three training steps and against the traps of the field."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import Paraphraser, Translator, load_reference_paraphraser
from factor_transfer.method.losses import FactorTransfer, Labels, SoftTargets, StudentOutputs
from factor_transfer.networks.features import FrozenTeacher, Tapped
from factor_transfer.training.schedule import Plan, optimizer_and_schedule
from factor_transfer.training.step import DistillationTask, ParaphraserTask, TeacherSide
from factor_transfer.util.files import state_fingerprint

Golden = dict[str, Tensor]


def part(golden: Golden, prefix: str) -> Golden:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def teacher_side(teacher: nn.Module, paraphraser: Paraphraser | None, size: tuple[int, int] = (8, 8)) -> FrozenTeacher:
    return FrozenTeacher(TeacherSide(Tapped(teacher, "layer3"), nn.Identity(), size, paraphraser))


def test_distillation__repeats_the_authors_three_steps(golden: Golden, shared: Path) -> None:
    """Through the project's own models, task, optimizer and schedule, in float64."""
    student = timm.create_model("cifar_resnet20_b")
    student.load_state_dict(part(golden, "student."))
    teacher = timm.create_model("cifar_resnet56_b")
    teacher.load_state_dict(part(golden, "teacher."))
    paraphraser = load_reference_paraphraser(shared / "checkpoints" / "reference-paraphraser-cifar10.pth")
    translator = Translator(64, 32)
    translator.load_state_dict(part(golden, "step_translator."))
    terms = [Labels(), FactorTransfer(translator, beta=500)]
    task = DistillationTask(Tapped(student, "layer3"), nn.Identity(), terms, teacher_side(teacher, paraphraser))
    task.double().train()
    config = Config(teacher="t", student="s", data="digits", sched="constant")
    plan = Plan(stage="student", epochs=164, lr=0.1, seed=0)
    optimizer, _ = optimizer_and_schedule(task.get_trainable_module(), plan, config, steps=391)

    found = []
    for _ in range(3):
        result = task(golden["step_images"].double(), golden["step_labels"])
        found.append(torch.stack([result["factor_transfer"] / 500, result["cross_entropy"]]))
        torch.testing.assert_close(result["loss"], result["factor_transfer"] + result["cross_entropy"])
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    torch.testing.assert_close(torch.stack(found).detach(), golden["step_losses"].double(), rtol=1e-6, atol=0)


@pytest.fixture
def small() -> tuple[nn.Module, nn.Module]:
    teacher = timm.create_model("cifar_resnet20", layers=(1, 1, 1), channels=(4, 8, 16))
    student = timm.create_model("cifar_resnet20_b", layers=(1, 1, 1), channels=(4, 4, 8))
    return teacher, student


def test_frozen_teacher__never_changes_whatever_is_called_above_it(small: tuple[nn.Module, nn.Module]) -> None:
    teacher, student = small
    before = state_fingerprint(teacher.state_dict())
    side = teacher_side(teacher, Paraphraser(16, 8), (4, 4))
    terms = [Labels(), FactorTransfer(Translator(8, 8), beta=100)]
    task = DistillationTask(Tapped(student, "layer3"), nn.Identity(), terms, side)
    task.train()
    assert student.training
    assert not any(module.training for module in side.modules())
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss = task(torch.randn(4, 3, 16, 16), torch.arange(4))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert state_fingerprint(teacher.state_dict()) == before
    assert all(parameter.grad is None for parameter in side.parameters())


def test_distillation__trains_student_and_translator_and_nothing_else(small: tuple[nn.Module, nn.Module]) -> None:
    teacher, student = small
    translator = Translator(8, 8)
    side = teacher_side(teacher, Paraphraser(16, 8), (4, 4))
    terms = [Labels(), FactorTransfer(translator, 100)]
    task = DistillationTask(Tapped(student, "layer3"), nn.Identity(), terms, side)
    trained = {id(parameter) for parameter in task.get_trainable_module().parameters()}
    assert trained == {id(p) for module in (student, translator) for p in module.parameters()}
    task(torch.randn(4, 3, 16, 16), torch.arange(4))["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.get_trainable_module().parameters())


def test_teacher_side__taps_after_the_last_activation_and_does_not_normalise(
    small: tuple[nn.Module, nn.Module],
) -> None:
    """Ports reconstruct a normalised feature, or one from before batch norm, the residual sum or the ReLU."""
    teacher = small[0]
    images = torch.randn(4, 3, 16, 16)
    outputs = teacher_side(teacher, None, (4, 4))(images)
    torch.testing.assert_close(outputs["feature"], teacher.eval().forward_features(images))
    assert (outputs["feature"] >= 0).all()
    assert (outputs["feature"] == 0).any()


def test_distillation__without_a_term_that_needs_it_runs_no_teacher(small: tuple[nn.Module, nn.Module]) -> None:
    teacher, student = small
    task = DistillationTask(Tapped(student, "layer3"), nn.Identity(), [Labels()], teacher_side(teacher, None))
    assert task.teacher is None
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    result = task(images, labels)
    wanted = nn.functional.cross_entropy(copy.deepcopy(student)(images), labels)
    torch.testing.assert_close(result["loss"], wanted)


def test_factor_transfer__pools_the_larger_map(small: tuple[nn.Module, nn.Module]) -> None:
    teacher, student = small
    side = teacher_side(teacher, Paraphraser(16, 8), (2, 2))
    terms = [FactorTransfer(Translator(8, 8), 100)]
    task = DistillationTask(Tapped(student, "layer3"), nn.Identity(), terms, side)
    images = torch.randn(4, 3, 16, 16)
    assert side(images)["factor"].shape == (4, 8, 2, 2)
    assert task(images, torch.arange(4))["loss"].isfinite()


def test_paraphraser_task__reconstructs_the_teachers_own_map(small: tuple[nn.Module, nn.Module]) -> None:
    teacher = small[0]
    paraphraser = Paraphraser(16, 8)
    task = ParaphraserTask(paraphraser, teacher_side(teacher, None, (4, 4)))
    images = torch.randn(4, 3, 16, 16)
    feature = teacher.eval().forward_features(images).detach()
    loss = task(images, torch.zeros(4, dtype=torch.long))["loss"]
    torch.testing.assert_close(loss, (paraphraser(feature) - feature).abs().mean())
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_soft_targets__is_hintons_loss() -> None:
    """Against its definition: the cross-entropy of softened predictions less their entropy, times T squared."""
    torch.manual_seed(0)
    ours, theirs, temperature = torch.randn(4, 5), torch.randn(4, 5), 3.0
    p, q = (torch.softmax(x.double() / temperature, 1) for x in (theirs, ours))
    wanted = 0.7 * temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    student = StudentOutputs(ours, torch.zeros(4, 1, 1, 1))
    found = SoftTargets(0.7, temperature)(student, {"logits": theirs}, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found, wanted.float())
    assert SoftTargets(1.0)(student, {"logits": ours}, torch.zeros(4)).abs() < 1e-6
