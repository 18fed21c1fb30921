"""What a run's training computes, counted: images of every stage, through caches, interruptions and older files."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from factor_transfer import distill
from factor_transfer.report.html import write_report
from factor_transfer.report.several import comparison_values
from factor_transfer.report.terminal import show
from factor_transfer.training.compute import Compute
from factor_transfer.training.summary import read_summary
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.errors import Interrupted
from factor_transfer.util.files import read_json, write_json

pytestmark = pytest.mark.usefixtures("unexported")

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
JOB: dict[str, Any] = {
    "teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 8, "teacher_lr": 0.1, "paraphraser_epochs": 2,
    "epochs": 3, "views": 2, "batch_size": 12, "lr": 0.05, "threads": 1, "device": "cpu", "workers": 0,
    "log_with": "none", "hflip": 0.5, "checkpoint_minutes": 1e-9,
}  # fmt: skip
N = 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """A run alone, and one after it that finds its factors in the cache; and their images."""
    folder = tmp_path_factory.mktemp("compute")
    image_folder(folder / "images", train=8, validation=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factor_transfer.distillation.export_pt2", lambda *_: 0.0)
        train(folder, "first", baseline=True)
        train(folder, "second", seed=1)
    return folder


def train(folder: Path, name: str, **changed: Any) -> Path:
    settings = {**JOB, "cache_dir": folder / "cache", "out": folder / name, **changed}
    return distill("cifar_resnet20", "cifar_resnet20", folder / "images", **settings).folder


def compute_of(folder: Path) -> Compute:
    found = read_summary(folder).compute
    assert found is not None
    return found


def images(folder: Path) -> dict[str, tuple[int, ...]]:
    return {stage: tuple(each.images.values()) for stage, each in compute_of(folder).stages.items()}


def test_compute__counts_what_each_stage_trained_on_and_where_its_teacher_ran(runs: Path) -> None:
    alone = {
        "teacher": (8 * N, 0, 0),
        "paraphraser": (2 * N, 2 * N, 2 * N),
        "student": (3 * N, 2 * N, 2 * N),
        "baseline": (3 * N, 0, 0),
    }
    assert images(runs / "first") == alone
    assert images(runs / "second")["student"] == (3 * N, 0, 2 * N)
    first, second, price = compute_of(runs / "first"), compute_of(runs / "second"), read_summary(runs / "first").price
    assert price is not None
    teacher, readers, paraphraser, terms, student = (
        price[name]["multiply_adds"] for name in ("teacher", "readers", "paraphraser", "terms", "student")
    )
    made = 2 * N * (teacher + 3 * paraphraser)
    learned = 9 * N * (student + terms)
    assert first.student == pytest.approx(made + learned + 2 * N * (teacher + readers))
    assert second.student == first.student
    assert second.whole == pytest.approx(24 * N * teacher + made + learned)
    assert first.to_baseline == pytest.approx(first.student / (9 * N * student))
    written = read_json(runs / "first" / "summary.json")
    assert (written["compute"]["unit"], written["compute"]["student"]) == ("multiply-adds", first.student)
    assert "images" not in written["student"]


def test_compute__is_that_of_one_run_wherever_it_is_stopped(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "images", tmp_path / "images")
    leave = Trainer._leave
    stops = [("teacher", 1, 1), ("paraphraser", 0, 1), ("student", 0, 1), ("student", 1, 1), ("student", 2, 0)]

    def stop(self: Trainer, signum: int) -> None:
        place = self.plan.stage, self.progress.epoch, self.progress.step
        if place in stops:
            stops.remove(place)
            leave(self, 15)

    monkeypatch.setattr(Trainer, "_leave", stop)
    for _ in range(5):
        with pytest.raises(Interrupted):
            train(tmp_path, "run", baseline=True)
    assert not stops
    assert images(train(tmp_path, "run", baseline=True)) == images(runs / "first")


@pytest.mark.parametrize("views", [0, 2])
def test_compute__follows_from_the_place_of_a_checkpoint_that_counted_no_images(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    shutil.copytree(runs / "images", tmp_path / "images")
    leave = Trainer._leave

    def stop(self: Trainer, signum: int) -> None:
        there = self.plan.stage, self.progress.epoch, self.progress.step
        leave(self, 15 if there == ("student", 2, 1) else signum)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "_leave", stop)
        train(tmp_path, "run", views=views)
    (file,) = (tmp_path / "run" / "checkpoints").glob("student-000002-00000001.pt")
    state = torch.load(file, weights_only=True)
    for name in ("trained", "teacher", "teacher_alone"):
        del state["progress"][name]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    file.write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    file.with_suffix(".sha256").write_text(f"{digest}  {file.name}\n")
    asked = 3 * N if not views else 2 * N
    assert images(train(tmp_path, "run", views=views))["student"] == (3 * N, asked, asked)


def test_compute__of_a_summary_that_has_none_follows_from_its_price_and_settings(runs: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        written = read_json(runs / name / "summary.json")
        del written["compute"]
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "summary.json", written)
        assert compute_of(tmp_path / name).student == compute_of(runs / name).student
    del written["price"]
    write_json(tmp_path / "second" / "summary.json", written)
    assert read_summary(tmp_path / "second").compute is None


def test_compute__a_paraphraser_from_a_file_costs_nothing_and_the_run_says_so(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(runs, "given", paraphraser=str(runs / "first" / "paraphraser.safetensors"))
    compute, own = compute_of(found), compute_of(runs / "first")
    assert compute.given == ["paraphraser"]
    assert compute.student == own.student - own.stages["paraphraser"].alone
    capsys.readouterr()
    show(found)
    said = capsys.readouterr().err
    assert "paraphraser from a file, not counted" in said
    assert f"{compute.to_baseline:.2f} times the baseline's" in said
    assert compute.line() in write_report(found).read_text().replace("&#39;", "'")
    rows = comparison_values([runs / "first", found])["rows"]
    assert [(row["compute"], row["given"]) for row in rows] == [(own.to_baseline, False), (compute.to_baseline, True)]


def test_compute__of_a_first_stage_of_hints_is_that_of_the_layers_below_it(runs: Path) -> None:
    found = compute_of(train(runs, "hints", beta=0.0, hint_epochs=2, views=0))
    price = read_summary(runs / "hints").price
    assert price is not None
    teacher, hint, student = (price[name]["multiply_adds"] for name in ("teacher", "hint", "student"))
    # 3x3 convolutions: the stem, two at 16x16 and two at 8x8; then the regressor, and in the student the last group.
    assert hint == 16**2 * 9 * (3 * 4 + 2 * 4 * 4) + 8**2 * (9 * 2 * 4 * 4 + 4 * 4)
    assert student > hint
    assert found.stages["hint"].multiply_adds == pytest.approx(2 * N * (3 * hint + teacher))
    assert found.student == pytest.approx(found.stages["hint"].alone + found.stages["student"].alone)
