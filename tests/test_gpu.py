"""What needs a GPU: `python benchmarks/gpu.py ../shared` runs these, too.

FACTOR_TRANSFER_STAND_IN=1 runs them on the stand-in of `on_cuda`, to see that the tests themselves work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.gpu import golden_distances
from torch import Tensor

from factor_transfer import distill
from factor_transfer.distillation import evaluate_run
from factor_transfer.method.factor_transfer import Paraphraser
from factor_transfer.networks.features import FrozenTeacher, Tapped
from factor_transfer.networks.load import load_network
from factor_transfer.training import trainer as train
from factor_transfer.training.cache import CachedTeacher, FactorCache
from factor_transfer.training.engine import Engine
from factor_transfer.training.step import TeacherSide
from factor_transfer.util.seeds import seeded
from on_cuda import on_cuda

STAND_IN = bool(os.environ.get("FACTOR_TRANSFER_STAND_IN"))
SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (8, 8, 16)}
JOB: dict[str, Any] = {
    "teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 12, "paraphraser_epochs": 1, "epochs": 2, "lr": 0.1,
    "batch_size": 12, "device": "cuda", "threads": 1, "log_with": "none", "baseline": True,
}  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (STAND_IN or torch.cuda.is_available()), reason="no GPU that torch can use"),
]


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    with on_cuda() if STAND_IN else nullcontext():
        yield


def test_method__meets_the_authors_numbers_on_cuda_in_float32(shared: Path) -> None:
    """TF32 would be off by 1e-3."""
    found = golden_distances(shared, Engine("cuda", "fp32"))
    assert found.pop("step_losses") < 1e-3, "three steps, each of which multiplies what rounding left"
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distill__on_cuda_from_the_cache_and_continued(
    precision: str, image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The whole job, cut in the student's second step."""
    images, step = image_folder(tmp_path / "images", side=8), train.Trainer.step
    given = {**JOB, "precision": precision, "views": 1, "model_ema": True, "clip_grad": 5.0, "out": tmp_path / "run",
             "cache_dir": tmp_path / "cache", "checkpoint_minutes": 1e-9}  # fmt: skip

    def until(self: Any, *batch: Any) -> Any:
        if (self.plan.stage, self.progress.step) == ("student", 2):
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(train.Trainer, "step", until)
    with pytest.raises(KeyboardInterrupt):
        distill("cifar_resnet20", "cifar_resnet20_b", images, **given)
    monkeypatch.undo()
    result = distill("cifar_resnet20", "cifar_resnet20_b", images, **given)
    said = capsys.readouterr().err
    assert "student: continued after 0 passes and 2 steps" in said
    assert "holds 24 of 36 factors" in said
    assert result.summary["environment"]["device"] == "cuda:0"
    assert result.summary["student"]["pt2_difference"] < 1e-4
    for role, found in evaluate_run(tmp_path / "run", device="cpu").items():
        assert found["loss"] == pytest.approx(result.summary[role]["loss"], rel=1e-3), "the CPU says so, too"


@pytest.mark.parametrize("bf16", [False, True])
def test_cache__and_live_teacher_agree_on_cuda(bf16: bool, tmp_path: Path) -> None:
    engine = Engine("cuda", "bf16" if bf16 else "fp32")
    network = load_network("cifar_resnet20", role="teacher", num_classes=10, img_size=32)
    with seeded(0):
        paraphraser = Paraphraser(64, 32)
    side = TeacherSide(Tapped(network.module, "layer3"), network.norm, (8, 8), paraphraser)
    live = engine.place(FrozenTeacher(side))
    cached = CachedTeacher(live, FactorCache(tmp_path, {}, {"factor": (32, 8, 8)}, samples=16, views=1))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 3, 32, 32), np.uint8)).to(engine.device)
    index = torch.arange(16)
    with engine.autocast():
        wanted = live(images, index, 0)["factor"].float()
        made, read = (cached(images, index, 0)["factor"] for _ in range(2))
    assert torch.equal(made, read)
    assert read.device == wanted.device == engine.device
    assert float((read.float() - wanted).norm() / wanted.norm()) < 1e-3


def test_losses__in_bf16_are_near_those_in_float32() -> None:
    found: dict[bool, Tensor] = {}
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 3, 32, 32), np.uint8))
    for bf16 in (False, True):
        engine = Engine("cuda", "bf16" if bf16 else "fp32")
        network = load_network("cifar_resnet20", role="student", num_classes=10, img_size=32)
        model = engine.place(network.classifier).train()
        with engine.autocast():
            logits = model(images.to(engine.device)).float()
        found[bf16] = torch.nn.functional.cross_entropy(logits, torch.arange(16).remainder(10).to(engine.device))
    assert found[True].item() == pytest.approx(found[False].item(), rel=0.02)
    assert found[True].item() != found[False].item()


def test_engine__one_process_may_ask_for_synchronised_batch_norm() -> None:
    assert Engine("cuda", sync_bn=True).sync_bn
