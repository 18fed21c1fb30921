"""Images without labels beside the labelled ones: which are shown when, and what learns from them."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bits import bits
from factor_transfer import distill
from factor_transfer.compare.plan import CompareConfig, planned
from factor_transfer.config import Config, DataConfig
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.data.splits import Batch
from factor_transfer.data.unlabelled import Mixed, round_of
from factor_transfer.method.factor_transfer import Paraphraser, Translator
from factor_transfer.method.losses import FactorTransfer, Labels
from factor_transfer.networks.features import FrozenTeacher, Tapped
from factor_transfer.networks.load import InputNorm
from factor_transfer.tasks.classification import Classification
from factor_transfer.training.cache import CachedTeacher, FactorCache
from factor_transfer.training.engine import Engine
from factor_transfer.training.images import batches_of
from factor_transfer.training.run_folder import Run
from factor_transfer.training.schedule import Plan
from factor_transfer.training.step import DistillationTask, TeacherSide, placed
from factor_transfer.training.trainer import Trainer, training_chunks
from factor_transfer.util.errors import ConfigError, DataError, Interrupted, RunError
from factor_transfer.util.files import state_fingerprint
from factor_transfer.util.seeds import seeded

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {
    "teacher": "cifar_resnet20", "student": "cifar_resnet20", "teacher_args": SMALL, "student_args": SMALL,
    "paraphraser_epochs": 1, "epochs": 4, "batch_size": 12, "lr": 0.05, "threads": 1, "device": "cpu", "workers": 0,
    "log_with": "none", "precision": "fp32",
}  # fmt: skip
BARE = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """24 training and 12 validation images; beside them 60 others, and copies of three of the first and two of the
    second, one of each in another file format."""
    found = tmp_path_factory.mktemp("unlabelled")
    images, bare = image_folder(found / "images", train=8, validation=4), found / "bare" / "some"
    bare.mkdir(parents=True)
    random = np.random.default_rng(1)
    for number in range(BARE):
        Image.fromarray(random.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(bare / f"{number:03}.png")
    for split, count in (("train", 3), ("validation", 2)):
        for number in range(count):
            original = images / split / "class1" / f"{number:03}.png"
            if number:
                shutil.copy(original, bare / f"{split}{number}.png")
            else:
                Image.open(original).save(bare / f"{split}{number}.bmp")
    with tarfile.open(found / "bare.tar", "w") as tar:
        tar.add(found / "bare", "bare")
    with seeded(0):
        made = timm.create_model("cifar_resnet20", **SMALL, num_classes=3)
    save_file(made.state_dict(), found / "teacher.safetensors")
    return found


def opened(folder: Path, share: float | None = None, **settings: Any) -> Dataset:
    config = DataConfig(data=str(folder / "images"), workers=0, **settings)
    return open_data(config, lambda: 16, unlabelled=(str(folder / "bare"), share))


def mixed_of(data: Dataset) -> Mixed:
    assert data.mixed is not None
    return data.mixed


# -- which they are


@pytest.mark.parametrize(("large", "holdout"), [(False, False), (True, False), (False, True)])
def test_open_data__leaves_out_what_is_among_the_labelled_images(folder: Path, large: bool, holdout: bool) -> None:
    """By content. Of large images it is that of the file, so a copy in another format is not found."""
    how: dict[str, Any] = {"img_size": 128} if large else {}
    data = opened(folder, **how, validate_on="train-holdout" if holdout else "validation", validation_share=0.5)
    notes = [note for note in data.notes if "left out" in note]
    counts = [int(note.split()[0]) for note in notes]
    assert ["validation" in note for note in notes] == [True, False]
    assert sum(counts) == (3 if large else 5)
    assert data.unlabelled == BARE + 5 - sum(counts)
    if not holdout:
        assert counts == [1 if large else 2, 2 if large else 3]
    assert opened(folder).unlabelled_fingerprint == opened(folder, share=0.3).unlabelled_fingerprint
    assert opened(folder).fingerprint == open_data(DataConfig(data=str(folder / "images")), lambda: 16).fingerprint


def test_open_data__an_image_of_the_source_that_is_not_trained_on_may_be_shown(folder: Path) -> None:
    config = DataConfig(data=str(folder / "images"), train_images=6)
    data = open_data(config, lambda: 16, unlabelled=(str(folder / "images" / "train"), None))
    assert (len(data.train), data.unlabelled) == (6, 18)
    with pytest.raises(DataError, match="(?s)--unlabelled.*24 images, all of them among the training or validation"):
        open_data(DataConfig(data=config.data), lambda: 16, unlabelled=(str(folder / "images" / "train"), None))


@pytest.mark.parametrize("name", ["hfds/faces", "nowhere", "images/train/class0/000.png"])
def test_open_data__refuses_what_is_no_folder_or_tar(folder: Path, name: str) -> None:
    given = name if "/" in name and not (folder / name).exists() else str(folder / name)
    with pytest.raises(DataError, match=r"(?s)--unlabelled .* beside --data .*images.*a folder or \.tar of images"):
        open_data(DataConfig(data=str(folder / "images")), lambda: 8, unlabelled=(given, None))


def test_open_data__takes_a_tar_beside_another_source(folder: Path) -> None:
    data = open_data(DataConfig(data="digits"), lambda: 8, unlabelled=(str(folder / "bare.tar"), None))
    assert (data.unlabelled, len(data.pool), data.pool.labels.min()) == (65, 1258 + 65, 0)


# -- what a pass shows


@pytest.mark.parametrize(("share", "part", "passes"), [(None, 30, 2), (0.2, 6, 10), (0.7, 60, 1), (0.24, 8, 8)])
def test_mixed__holds_both_kinds_by_the_share(folder: Path, share: float | None, part: int, passes: int) -> None:
    """In every batch, and in every process's part of it; in a round each unlabelled image, and once but for a few."""
    mixed = mixed_of(opened(folder, share))
    assert (mixed.part, mixed.passes, len(mixed)) == (part, passes, 24 + part)
    for first in (0, passes):
        shown = [mixed.order(0, epoch) for epoch in range(first, first + passes)]
        for order in shown:
            assert sorted(order[order < 24]) == list(range(24))
            for chunk in training_chunks(order, 11):
                for piece in (chunk, *np.array_split(chunk, 2)):
                    assert abs((piece >= 24).sum() - len(piece) * mixed.share) < 1
        counts = np.bincount(np.concatenate([order[order >= 24] for order in shown]) - 24, minlength=BARE)
        assert counts.min() == 1
        assert (counts - 1).sum() == part * passes - BARE < passes


def test_mixed__the_order_is_a_function_of_data_seed_and_pass(folder: Path) -> None:
    one, other = (mixed_of(opened(folder, data_seed=seed)) for seed in (0, 0))
    later = [other.order(0, epoch) for epoch in (3, 2, 0)]  # whatever was asked for before
    assert all(np.array_equal(one.order(0, epoch), found) for epoch, found in zip((3, 2, 0), later, strict=True))
    assert not np.array_equal(one.order(0, 0), one.order(0, 2)), "another round has another order"
    assert not np.array_equal(one.order(0, 0), one.order(1, 0))
    alone = opened(folder).train.order(0, 3)
    assert np.array_equal(one.order(0, 3)[one.order(0, 3) < 24], alone), "labelled ones come as without the others"
    assert one.view(3, 0) == (3, 1)
    assert one.view(3, 2) == (1, 1)
    assert [one.fresh(np.array([0, 30]), epoch, 1) for epoch in range(4)] == [2, 1, 0, 0]


@pytest.mark.parametrize("large", [False, True])
def test_mixed__each_kind_shows_its_own_view(folder: Path, large: bool) -> None:
    data = opened(folder, **({"img_size": 128, "color_jitter": 0.5} if large else {}))
    chunk = np.array([70, 3, 25, 11])
    (both,), (three,), (five,) = (list(mixed_of(data).batches([chunk], view)) for view in ((3, 5), 3, 5))
    assert both.label.tolist() == [-1, *data.train.labels[[3]], -1, *data.train.labels[[11]]]
    labelled = torch.tensor([False, True, False, True])
    assert torch.equal(both.image[labelled], three.image[labelled])
    assert torch.equal(both.image[~labelled], five.image[~labelled])
    assert not torch.equal(three.image, five.image)
    (plain,) = data.train.batches([chunk[[1, 3]]], 3)
    assert torch.equal(plain.image, three.image[labelled]), "as without the others"


def test_round_of__refuses_a_share_that_would_show_an_image_twice_in_a_pass() -> None:
    with pytest.raises(ConfigError, match=r"(?s)--unlabelled-share 0.5.*100 unlabelled.*900 labelled.*at most 0.100"):
        round_of(900, 100, 0.5)
    assert round_of(900, 100, 0.1) == round_of(900, 100, None) == 1


# -- what learns from them


def network(width: int) -> nn.Sequential:
    found = nn.Sequential()
    parts = {"conv": nn.Conv2d(3, width, 3, 4, 1), "map": nn.LeakyReLU(0.1), "pool": nn.AdaptiveAvgPool2d(2)}
    for name, part in {**parts, "flat": nn.Flatten(), "head": nn.Linear(4 * width, 3)}.items():
        found.add_module(name, part)
    return found


def sides() -> tuple[DistillationTask, FrozenTeacher]:
    """In float64, without batch norm."""
    norm = InputNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with seeded(0):
        teacher, student, translator = network(8), network(6), Translator(6, 4)
        side = TeacherSide(Tapped(teacher, "map"), norm, (4, 4), Paraphraser(8, 4))
    frozen = FrozenTeacher(side.double())
    task = DistillationTask(Tapped(student, "map"), norm, [Labels(), FactorTransfer(translator, 20.0)], frozen)
    return task.double(), frozen


@pytest.fixture(scope="module")
def batch(folder: Path) -> Any:
    mixed = mixed_of(opened(folder, 0.3))
    (found,) = mixed.batches([mixed.order(0, 0)[:13]], view=(0, 0))
    return found


def test_task__labels_teach_by_the_labelled_images_and_factors_by_all(folder: Path, batch: Any) -> None:
    share = mixed_of(opened(folder, 0.3)).known
    task, teacher = sides()
    shown, labels, known = placed(batch, Classification(), share, torch.device("cpu"))
    result = task(shown, labels, batch.index, (0, 0), known)
    trainee, labelled = task.trainable_module, batch.label >= 0
    logits, maps = trainee.student.maps(trainee.norm(batch.image))
    alone = F.cross_entropy(logits[labelled], batch.label[labelled], reduction="sum") / (share * 13)
    assert result["cross_entropy"].item() == pytest.approx(alone.item(), rel=1e-12)
    factors = trainee.terms["factor_transfer"]
    student = type("Outputs", (), {"feature": maps["map"], "maps": maps})
    assert result["factor_transfer"].item() == pytest.approx(factors(student, teacher(batch.image), None).item())
    assert torch.equal(result["output"], logits[labelled])
    images = batch.image.double().requires_grad_()
    loss = task(images, labels, batch.index, (0, 0), known)["cross_entropy"]
    (gradient,) = torch.autograd.grad(loss, images)
    assert (gradient.flatten(1).abs().amax(1) > 0).tolist() == labelled.tolist()


def test_task__parts_of_a_batch_add_up_to_it(folder: Path, batch: Any) -> None:
    """As two processes, of 7 images and of 6, have them."""
    share = mixed_of(opened(folder, 0.3)).known

    def gradient(rows: slice) -> torch.Tensor:
        task, _ = sides()
        part = Batch(batch.image[rows], batch.label[rows], batch.index[rows])
        images, labels, known = placed(part, Classification(), share, torch.device("cpu"))
        (task(images, labels, part.index, (0, 0), known)["loss"] * (len(images) / 13)).backward()
        return torch.cat([weight.grad.flatten() for weight in task.parameters() if weight.grad is not None])

    whole, parts = gradient(slice(None)), gradient(slice(7)) + gradient(slice(7, None))
    assert float((whole - parts).abs().max()) < 1e-12 < float(whole.abs().max())


def trainer(folder: Path, data: Dataset, epochs: int = 2, views: int = 0, **how: Any) -> Trainer:
    task, teacher = sides()
    shapes = {"factor": (4, 4, 4)}
    if views:
        cache = FactorCache(folder / "cache", {}, shapes, len(data.pool), views)
        task.teacher = CachedTeacher(teacher, cache, len(data.train))
    config = Config(teacher="t", student="s", data="x", device="cpu", batch_size=11, lr=0.05, **how)
    plan = Plan(stage="student", epochs=epochs, lr=0.05, seed=0, views=views)
    folder.mkdir(exist_ok=True)
    return Trainer(task, plan, mixed_of(data), Engine("cpu", "fp32"), config, Run(folder))


def test_trainer__a_pass_is_the_mean_over_its_labelled_images(folder: Path, tmp_path: Path) -> None:
    """Whatever batch an image was in: with a learning rate of nearly 0 the network stays the same."""
    data = opened(folder, 0.24)
    made = trainer(tmp_path / "run", data, epochs=1)
    for group in made.optimizer.param_groups:
        group["lr"] = 0.0
    made.scheduler.step_update = lambda _: None  # type: ignore[method-assign]
    before = deepcopy(made.module)
    made.fit()
    (batch,) = data.train.batches([np.arange(24)], view=0)
    logits = before.student(before.norm(batch.image))[0]
    (row,) = made.run.metrics()
    assert row["cross_entropy"] == pytest.approx(F.cross_entropy(logits, batch.label).item(), rel=1e-9)
    assert row["train_top1"] == pytest.approx(100 * (logits.argmax(1) == batch.label).float().mean().item())
    assert made.progress.trained == made.progress.teacher == 32


@pytest.mark.parametrize("views", [1, 2])
def test_cached_teacher__gives_each_image_its_own_factor(folder: Path, tmp_path: Path, views: int) -> None:
    """In every pass the factor is the live teacher's for the very image that is shown; and the teacher leaves."""
    data = opened(folder)
    made = trainer(tmp_path / "run", data, epochs=2 * views * 2, views=views)
    kept, (_, live) = made.objective.teacher, sides()
    assert isinstance(kept, CachedTeacher)
    for epoch in range(made.plan.epochs):
        view = made.train.view(epoch, views)
        chunks = training_chunks(made.train.order(0, epoch), 11)
        before = kept.asked
        for chunk, batch in zip(chunks, made.train.batches(chunks, view), strict=True):
            found, wanted = kept(batch.image, batch.index, view)["factor"], live(batch.image)["factor"]
            assert float((found - wanted).abs().max()) < 2e-3 * float(wanted.abs().max())
            assert made.train.fresh(chunk, epoch, views) == int((chunk < 24).sum()) * (epoch < views) + int(
                (chunk >= 24).sum()
            ) * (epoch // 2 < views)
        asked = (24 if epoch < views else 0) + (30 if epoch // 2 < views else 0)
        assert kept.asked - before == asked
    kept.cache.store.close()


class Killed(BaseException):
    """What nothing catches, as a kill."""


def test_trainer__is_continued_to_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a signal within a pass; and after a kill while factors were written, some of which are on disk."""
    data, how = opened(folder), {"epochs": 4, "views": 1}
    straight = trainer(tmp_path / "straight", data, **how)
    done = straight.fit()
    leave, write = Trainer._leave, FactorCache.write

    def stop(self: Trainer, signum: int) -> None:
        leave(self, 15 if (self.progress.epoch, self.progress.step) == (0, 2) else signum)

    def half(self: FactorCache, index: np.ndarray, view: int, outputs: Any) -> None:
        if len(self.written(view)) > 60:  # in the second pass, whose labelled images are there
            write(self, index[:2], view, {name: each[:2] for name, each in outputs.items()})
            raise Killed
        write(self, index, view, outputs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "_leave", stop)
        trainer(tmp_path / "run", data, checkpoint_minutes=1e-6, **how).fit()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FactorCache, "write", half)
        trainer(tmp_path / "run", data, **how).fit()
    again = trainer(tmp_path / "run", data, **how)
    assert (again.progress.epoch, again.progress.step) == (1, 0)
    continued = again.fit()
    assert state_fingerprint(again.module.state_dict()) == state_fingerprint(straight.module.state_dict())
    rows = [[{**row, "seconds": 0} for row in each.run.metrics()] for each in (straight, again)]
    assert rows[0] == rows[1]
    assert done.trained == continued.trained == 4 * 54
    assert done.teacher == done.teacher_alone == continued.teacher_alone == 24 + BARE


# -- whole runs


@pytest.fixture
def job(folder: Path, unexported: None) -> dict[str, Any]:
    headless = {**SMALL, "num_classes": 0}
    weights = folder / "teacher.safetensors"
    return {**JOB, "data": folder / "images", "teacher_args": headless, "teacher_weights": weights}


def test_distill__the_student_has_them_and_the_baseline_is_as_ever(
    job: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """With a teacher without a head, and the images in a tar: bits, records, and what the run is held to."""
    given = {**job, "baseline": True, "epochs": 2, "unlabelled": folder / "bare.tar"}
    both = distill(**given, out=tmp_path / "both").summary
    alone = distill(**{**given, "unlabelled": None}, out=tmp_path / "alone").summary
    one, other = bits(tmp_path / "both"), bits(tmp_path / "alone")
    assert one["baseline.safetensors"] == other["baseline.safetensors"]
    assert one["student.safetensors"] != other["student.safetensors"]
    assert one["paraphraser.safetensors"] != other["paraphraser.safetensors"]
    assert both["fingerprints"].keys() - alone["fingerprints"].keys() == {"unlabelled"}
    assert both["fingerprints"]["data"] == alone["fingerprints"]["data"]
    assert (both["data"]["train"], both["data"]["unlabelled"], alone["data"]["unlabelled"]) == (24, BARE, 0)
    compute = both["compute"]
    trained = {stage: found["images"]["trained"] for stage, found in compute["stages"].items()}
    assert trained == {"paraphraser": 24 + BARE, "student": 2 * 54, "baseline": 2 * 24}
    assert compute["stages"]["student"]["images"]["teacher"] == 2 * 54
    assert compute["baseline"] == alone["compute"]["baseline"] == compute["stages"]["baseline"]["multiply_adds"]
    shutil.copytree(folder / "bare", tmp_path / "others")
    (tmp_path / "others" / "some" / "000.png").unlink()
    for out, other_images in (("both", tmp_path / "others"), ("both", None), ("alone", folder / "bare.tar")):
        (tmp_path / out / "summary.json").unlink(missing_ok=True)
        with pytest.raises(RunError, match="--unlabelled holds other images"):
            distill(**{**given, "unlabelled": other_images}, out=tmp_path / out)


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"label_weight": 0}, "--unlabelled .* with --label-weight 0.*into --data"
    yield {"beta": 0}, "--unlabelled .*no term that reads it.*--beta, --kd-weight"
    yield {"unlabelled": None, "unlabelled_share": 0.5}, "--unlabelled-share 0.5.*no --unlabelled"
    yield {"unlabelled_share": 1.0}, "--unlabelled-share.*below 1"


@pytest.mark.parametrize(("changed", "said"), list(refusals()))
def test_config__refuses_what_would_do_nothing(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        Config(**{"teacher": "t", "student": "s", "data": "d", "unlabelled": "u", **changed})


def test_batches_of__refuses_a_batch_without_a_labelled_image(folder: Path) -> None:
    config = Config(teacher="t", student="s", data="d", unlabelled="u", batch_size=4)
    data = opened(folder, 0.7)
    assert len(batches_of(data, config, processes=1)) == 21
    with pytest.raises(ConfigError, match="(?s)--batch-size 4 with --unlabelled u.*smaller --unlabelled-share"):
        batches_of(data, config, processes=2)


def test_compare__the_student_without_a_teacher_has_labelled_images_only() -> None:
    given = {"teacher": "t", "student": "s", "data": "d", "unlabelled": "u", "unlabelled_share": 0.25, "seeds": 1}
    plan = planned(CompareConfig(**given, methods="baseline,kd,ft,baseline-matched"))
    found = {run.variant: (run.config.unlabelled, run.config.unlabelled_share) for run in plan.runs}
    assert found == {
        "baseline": (None, None), "kd": ("u", 0.25), "ft": ("u", 0.25), "baseline-matched": (None, None)
    }  # fmt: skip
