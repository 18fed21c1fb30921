"""Training flags of timm's: each against timm's own code, and through whole runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

import factor_transfer.zoo  # noqa: F401
from factor_transfer import distill
from factor_transfer.config import Config, DataConfig
from factor_transfer.data.balance import Balanced, class_weights
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.method.losses import Labels
from factor_transfer.method.term import Term
from factor_transfer.networks.features import Tapped
from factor_transfer.networks.pair import Side
from factor_transfer.tasks.base import LabelLoss, Task, task_of
from factor_transfer.tasks.classification import ClassLoss
from factor_transfer.training.chunks import training_chunks
from factor_transfer.training.engine import Engine
from factor_transfer.training.images import shown_for
from factor_transfer.training.run_folder import Run
from factor_transfer.training.schedule import Plan
from factor_transfer.training.stages import Job
from factor_transfer.training.step import DistillationTask
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.seeds import seeded

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {
    "teacher": "cifar_resnet20", "student": "cifar_resnet20", "teacher_args": SMALL, "student_args": SMALL,
    "teacher_epochs": 8, "teacher_lr": 0.1, "epochs": 1, "beta": 0, "kd_weight": 0.5, "batch_size": 12, "lr": 0.05,
    "threads": 1, "device": "cpu", "precision": "fp32", "log_with": "none",
}  # fmt: skip


def config(**changed: Any) -> Config:
    return Config(**{"teacher": "t", "student": "s", "data": "digits", **changed})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path_factory.mktemp("regime") / "images", train=12, validation=4)


@pytest.mark.parametrize(
    ("given", "timms"),
    [
        ({"smoothing": 0.1}, LabelSmoothingCrossEntropy(0.1)),
        ({"bce_loss": True}, BinaryCrossEntropy(0.0)),
        ({"bce_loss": True, "smoothing": 0.2}, BinaryCrossEntropy(0.2)),
    ],
)
def test_labels__are_learned_by_timms_loss(given: dict[str, Any], timms: torch.nn.Module) -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), torch.arange(8) % 5
    task = task_of("classification")
    ours = task.labels(how=LabelLoss.of(config(**given))).loss
    wanted, found = timms(outputs, labels), ours(outputs, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, outputs)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    teacher = task.labels(how=LabelLoss.of(config(**given), teacher=True)).loss(outputs, labels)  # plain labels
    plain = BinaryCrossEntropy(0.0) if "bce_loss" in given else F.cross_entropy
    torch.testing.assert_close(teacher, plain(outputs, labels))


def test_class_weights__balanced_are_scikit_learns_and_files_name_every_class(tmp_path: Path) -> None:
    labels, classes = np.array([0] * 5 + [1] * 2 + [3]), ("a", "b", "none", "d")
    wanted = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    found = class_weights("balanced", labels, classes)
    assert found == pytest.approx([*wanted[:2], 1, wanted[2]])
    assert np.mean([found[label] for label in labels]) == pytest.approx(1)
    path = tmp_path / "weights.json"
    for text, said in (
        ('{"a": 1, "b": 2}', "no weight of none, d"),
        ('{"a": 1, "b": 2, "none": 1, "d": 1, "e": 1}', "no such class: e"),
        ('{"a": 1, "b": 0, "none": 1, "d": 1}', "b: 0"), ("[1, 2]", "a list"), ("{", "expected"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"(?s)--class-weights {path}.*{said}"):
            class_weights(str(path), labels, classes)


@pytest.mark.parametrize("bce", [False, True])
def test_class_loss__counts_each_image_by_its_class_and_is_linear_in_the_labels(bce: bool) -> None:
    """So that parts of a batch add up to it, and mixed labels to the mix of their losses."""
    torch.manual_seed(0)
    outputs, one, other = torch.randn(6, 3).double(), torch.arange(6) % 3, torch.tensor([2, 2, 1, 0, 1, 0])
    weights, smoothing = (0.5, 2.0, 3.0), 0.1
    loss = ClassLoss(LabelLoss(smoothing, bce, weights))
    timms = BinaryCrossEntropy(smoothing) if bce else LabelSmoothingCrossEntropy(smoothing)
    wanted = sum(weights[label] * timms(outputs[[at]], one[[at]]) for at, label in enumerate(one)) / 6
    torch.testing.assert_close(loss(outputs, one), wanted)
    mixed = 0.3 * F.one_hot(one, 3) + 0.7 * F.one_hot(other, 3).double()
    torch.testing.assert_close(loss(outputs, mixed), 0.3 * loss(outputs, one) + 0.7 * loss(outputs, other))


@pytest.mark.usefixtures("unexported")
def test_distill__trains_student_baseline_and_teacher_by_the_loss_that_is_asked_for(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    weights = tmp_path / "weights.yaml"
    weights.write_text("class1: 2\nclass0: 1\nclass2: 0.5\n")
    trained = Job._train

    def train(self: Job, side: Side, terms: Sequence[Term], teacher: Any, plan: Plan, **how: Any) -> dict[str, Any]:
        seen[plan.stage] = next((term.loss.smoothing, term.loss.weights) for term in terms if term.supervised)
        return trained(self, side, terms, teacher, plan, **how)

    monkeypatch.setattr(Job, "_train", train)
    run = distill(
        data=pictures,
        out=tmp_path / "run",
        baseline=True,
        **JOB,
        smoothing=0.3,
        bce_loss=True,
        class_weights=str(weights),
    )
    assert seen == {
        role: (0.0 if role == "teacher" else 0.3, (1, 2, 0.5)) for role in ("teacher", "student", "baseline")
    }
    assert run.summary["loss_name"] == "binary_cross_entropy"
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows if "binary_cross_entropy" in row} == {"teacher", "student", "baseline"}


def test_settings__of_labels_contradict_what_reads_none() -> None:
    for given, said in (
        ({"smoothing": 0.1}, "--smoothing 0.1"),
        ({"bce_loss": True}, "--bce-loss"),
        ({"class_weights": "balanced"}, "--class-weights balanced"),
        ({"sampler": "balanced"}, "--sampler balanced"),
    ):
        with pytest.raises(ConfigError, match=f"{said} with --label-weight 0"):
            config(label_weight=0, **given)
    for given, said in (
        ({"views": 2}, "--views 2"),
        ({"views": "auto"}, "--views auto"),
        ({"unlabelled": "u"}, "--unl"),
    ):
        with pytest.raises(ConfigError, match=f"--sampler balanced with {said}"):
            config(sampler="balanced", **given)
    with pytest.raises(ConfigError, match="--smoothing 1\n"):
        config(smoothing=1)


def test_task__with_a_loss_of_its_own_refuses_another() -> None:
    class Own(Task):
        loss = sums = None  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="(?s)--smoothing with --task.*Own"):
        Own().labels(how=LabelLoss(smoothing=0.1))


# -- several batches for one update


class Plain(torch.nn.Module):
    """A network without batch norm, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = torch.nn.Conv2d(3, 4, 3, 2), torch.nn.Linear(4, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = torch.tanh(self.layer(images.double() / 16))
        found: torch.Tensor = self.head(maps.mean((2, 3)))
        return found


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_data(DataConfig(data="digits", train_images=70), default_size=lambda: 8)


class LostError(Exception):
    """A process that is lost."""


def trained(folder: Path, data: Dataset, cut: int | None = None, **given: Any) -> tuple[Trainer, list[float]]:
    """Two passes over 70 images; `cut` loses the process after so many updates."""
    with seeded(0):
        network = Plain().double()
    settings = config(epochs=2, lr=0.5, threads=1, model_ema=True, clip_grad=1.0, warmup_epochs=1, warmup_lr=0.1,
                      checkpoint_minutes=1e-9, data_seed=3, **given)  # fmt: skip
    plan = Plan(stage="student", epochs=2, lr=0.5, seed=0, average=True)
    task = DistillationTask(Tapped(network, "layer"), torch.nn.Identity(), [Labels()])
    folder.mkdir(exist_ok=True)
    made = Trainer(task, plan, data.train, Engine("cpu", "fp32"), settings, Run(folder))
    rates, step = [], made.step

    def watched(*batch: Any) -> Any:
        if len(rates) == cut:
            raise LostError
        rates.append(made.optimizer.param_groups[0]["lr"])
        return step(*batch)

    made.step = watched  # type: ignore[method-assign]
    with contextlib.suppress(LostError):
        made.fit()
    return made, rates


def weights_of(made: Trainer) -> dict[str, torch.Tensor]:
    average = made.objective.get_trainable_module(ema=True).module
    return {**made.module.state_dict(), **{f"average {name}": each for name, each in average.state_dict().items()}}


def test_grad_accum_steps__equal_the_large_batch_and_continue_to_the_same_bits(tmp_path: Path, digits: Dataset) -> None:
    """32 and 38 images an update, of which the last has an uneven part; weights, average, rates and curves."""
    parts = {"batch_size": 8, "grad_accum_steps": 4}
    large, rates = trained(tmp_path / "large", digits, batch_size=32)
    small, same = trained(tmp_path / "small", digits, **parts)
    assert rates == same
    assert len(rates) == 2 * small.steps == 2 * len(training_chunks(np.arange(70), 32))
    for name, value in weights_of(large).items():
        torch.testing.assert_close(weights_of(small)[name], value, rtol=1e-9, atol=1e-11)
    rows = [Run(tmp_path / name).metrics() for name in ("large", "small")]
    for one, other in zip(*rows, strict=True):
        assert [*one] == [*other]
        for name in ("loss", "gradient_norm", "train_top1", "lr"):
            assert other[name] == pytest.approx(one[name], rel=1e-6), name
    assert vars(small.progress)["trained"] == 140

    trained(tmp_path / "cut", digits, cut=1, **parts)
    again, _ = trained(tmp_path / "cut", digits, **parts)
    assert all(torch.equal(value, weights_of(again)[name]) for name, value in weights_of(small).items())


# -- passes that show all classes alike


def test_sampler__shows_classes_alike_and_every_image_of_a_class_equally_often(digits: Dataset) -> None:
    split = copy.copy(digits.train)
    split.labels = np.array([0] * 50 + [1] * 15 + [2] * 5)
    balanced = Balanced(split)
    passes = [balanced.order(7, epoch) for epoch in range(6)]
    assert [np.bincount(split.labels[order]).tolist() for order in passes] == [[24, 23, 23]] * 6
    times = np.bincount(np.concatenate(passes), minlength=70)
    for label in range(3):
        assert np.ptp(times[split.labels == label]) <= 1
    for count in (1, 2, 3):
        assert balanced.hidden(count) == 70 - len(np.unique(np.concatenate(passes[:count])))
    assert (Balanced(split).order(7, 4) == passes[4]).all()
    assert (passes[4] != passes[3]).any()
    assert "26 of 70 images are not in it, and 0 in none of 3 passes" in balanced.told(3)


def test_sampler__is_what_networks_with_labels_are_trained_by(digits: Dataset, tmp_path: Path) -> None:
    """And it continues to the same bits."""
    split = shown_for(digits, [Labels()], config(sampler="balanced"))
    assert isinstance(split, Balanced)
    assert shown_for(digits, [Labels()], config()) is digits.train
    balanced = dataclasses.replace(digits, train=split)
    whole, _ = trained(tmp_path / "whole", balanced, batch_size=20)
    trained(tmp_path / "cut", balanced, cut=4, batch_size=20)
    again, _ = trained(tmp_path / "cut", balanced, batch_size=20)
    assert all(torch.equal(value, weights_of(again)[name]) for name, value in weights_of(whole).items())
