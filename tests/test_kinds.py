"""Every kind of run goes through every later command: with and without labels, heads, a baseline, several layers."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factor_transfer import distill
from factor_transfer.cli import main
from factor_transfer.compare.plan import CompareConfig, planned
from factor_transfer.compare.result import outcome
from factor_transfer.compare.words import in_words, tabulated, write_outcome
from factor_transfer.config import Config, SuggestConfig
from factor_transfer.distillation import run_distillation
from factor_transfer.doctor import diagnose
from factor_transfer.report.several import runs_in, write_comparison
from factor_transfer.suggest import suggest
from processes import serve

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
HEADLESS = {**SMALL, "num_classes": 0}
LABELLED: dict[str, dict[str, Any]] = {
    "baseline": {"baseline": True},
    "headless teacher": {"teacher_args": HEADLESS},
    "labels only": {"beta": 0.0},
    "two layers": {"teacher_layer": "layer2,layer3", "student_layer": "layer2,layer3"},
    "raw map": {"paraphraser": "none", "translator": "none", "kd_weight": 0.9, "label_weight": 0.1},
}
"""Settings by kind."""
FREE: dict[str, dict[str, Any]] = {
    "features": {"teacher_args": HEADLESS},
    "features by attention": {"teacher_args": HEADLESS, "beta": 0.0, "at_weight": "auto"},
    "predictions": {"kd_weight": 1.0, "class_map": "classes.txt"},
    "an untrained head": {"class_map": "classes.txt"},
}
"""Without labels."""
HEADS = {*LABELLED, "predictions"}
"""Kinds whose students have a trained head."""
FORMATS = {"features": "pt2,onnx,onnx-int8,safetensors,timm", "predictions": "onnx-int8,safetensors"}
"""More than one where the format could make a difference: each takes seconds."""

Says = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """Images with and without labels, their classes, and a trained teacher."""
    folder = tmp_path_factory.mktemp("kinds")
    images = image_folder(folder / "images", train=8, validation=4)
    (folder / "flat").mkdir()
    for path in sorted((images / "train").rglob("*.png")):
        shutil.copy(path, folder / "flat" / f"{path.parent.name[-1]}{path.name}")
    (folder / "classes.txt").write_text("class0\nclass1\nclass2\n")
    job(folder, "teacher", beta=0.0, teacher_epochs=12, teacher_weights=None, teacher_lr=0.1)
    return folder


def settings_of(place: Path, kind: str, **more: Any) -> dict[str, Any]:
    """Of a run of a kind."""
    found: dict[str, Any] = {
        "data": str(place / ("flat" if kind in FREE else "images")), "teacher": "cifar_resnet20",
        "teacher_args": SMALL, "teacher_weights": str(place / "runs" / "teacher" / "teacher.safetensors"),
        "student": "cifar_resnet20", "student_args": SMALL, "label_weight": 0.0 if kind in FREE else 1.0, "epochs": 1,
        "paraphraser_epochs": 1, "batch_size": 12, "lr": 0.05, "device": "cpu", "threads": 1, "workers": 0,
        "log_with": "none", **{**LABELLED, **FREE}.get(kind, {}), **more,
    }  # fmt: skip
    return found | ({"class_map": str(place / found["class_map"])} if "class_map" in found else {})


def job(place: Path, kind: str, **more: Any) -> Path:
    out = place / "runs" / kind.replace(" ", "-")
    with pytest.MonkeyPatch.context() as patch:
        if kind not in {*FORMATS, "baseline"}:  # students of other kinds differ in nothing that is exported
            patch.setattr("factor_transfer.distillation.export_pt2", lambda *_: 0.0)
        distill(out=out, **settings_of(place, kind, **more))
    return out


@pytest.fixture(scope="module", params=[*LABELLED, *FREE])
def run(request: pytest.FixtureRequest, place: Path) -> Path:
    """A finished run of each kind, in turn."""
    return job(place, request.param)


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Says:
    """A command in this process, which must end with this exit code; what it printed."""

    def told(*arguments: object, code: int = 0) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["factor-transfer", *map(str, arguments)])
        left = 0
        try:
            main()
        except SystemExit as error:
            left = int(error.code or 0)
        said = capsys.readouterr()
        assert left == code, said
        return said.out + said.err

    return told


def kind_of(run: Path) -> str:
    return next(kind for kind in (*LABELLED, *FREE) if kind.replace(" ", "-") == run.name)


def test_report__shows_every_kind_of_run(run: Path, says: Says) -> None:
    page = run / "report.html"
    assert page.exists(), "made when the run ended"
    page.unlink()
    said = says("report", run)
    assert said.strip().splitlines()[-1] == str(page)
    text, kind = page.read_text(), kind_of(run)
    assert ("of the teacher&#39;s top-1 kept" in text) is (kind in LABELLED and kind != "headless teacher")
    assert ("Validation top-1" in text) is (kind in LABELLED)
    assert ("They give different answers" in text) is (kind in HEADS and kind != "headless teacher")
    assert ("Sorted by" in text) is (kind in LABELLED), "right answers need labels"
    assert ("mean cosine" in text) is (kind not in {"labels only", "features by attention", "raw map"})
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_report__compares_every_kind_with_another(run: Path, place: Path, says: Says) -> None:
    says("report", run, place / "runs" / "teacher")
    assert run.name in Path("comparison.html").read_text()


def test_evaluate__measures_what_has_a_head(run: Path, place: Path, says: Says) -> None:
    kind = kind_of(run)
    said = says("evaluate", run, code=0 if kind in LABELLED else 2)
    assert ("images without labels" in said) is (kind in {"predictions", "an untrained head"})
    assert ("no network with a trained head" in said) is kind.startswith("features")
    if kind in {"predictions", "an untrained head"}:
        found = json.loads(says("evaluate", run, "--data", place / "images", "--json").splitlines()[0])
        assert found.keys() == ({"teacher", "student"} if kind == "predictions" else {"teacher"})


@pytest.mark.usefixtures("answered_here")
def test_export__and_predict_take_every_kind(run: Path, place: Path, says: Says) -> None:
    kind = kind_of(run)
    formats = FORMATS.get(kind, "safetensors")
    says("export", run, "--formats", formats, "--no-latency", "--int8-loss", 100)
    files = sorted(path.name for path in (run / "export").iterdir())
    assert len(files) == 2 + len(formats.split(",")), files
    found, card = json.loads((run / "export" / "exports.json").read_text()), (run / "export" / "README.md").read_text()
    assert (found["reference_top1"] is not None) is (kind in LABELLED)
    assert all(row["max_difference"] < 0.1 or row["format"] == "onnx-int8" for row in found["formats"])
    assert ("An image classifier" in card) is (kind in HEADS)
    assert ("type: accuracy" in card) is (kind in LABELLED)
    image = next((place / "images").rglob("*.png"))
    said = says("predict", run / "export" / "student.safetensors", image, code=0 if "classes" in card_head(card) else 2)
    assert ("names no classes" in said) is (kind.startswith("features"))
    assert "What ships" in (run / "report.html").read_text()


def card_head(card: str) -> str:
    return "classes" if "in the order of the classes" in card else ""


@pytest.mark.parametrize("kind", [*LABELLED, *FREE])
def test_doctor__looks_at_every_kind(kind: str, place: Path) -> None:
    found = diagnose(Config(**settings_of(place, kind)))
    assert found.code < 2, found.findings


@pytest.mark.usefixtures("unexported")
def test_compare__takes_a_teacher_without_a_head(place: Path, tmp_path: Path) -> None:
    settings = settings_of(place, "headless teacher") | {"out": str(tmp_path / "compare")}
    plan = planned(CompareConfig(**settings, methods="baseline,ft", seeds=2))
    for each in plan.runs:
        run_distillation(each.config)
    found = outcome(plan)
    write_outcome(plan.folder, found)
    assert found["complete"]
    assert found["teacher"]["top1"] is None
    assert "gap closed" in in_words(found)
    page = write_comparison(runs_in([plan.folder]), tmp_path / "page.html", tabulated(plan.folder))
    assert "ft-s1" in page.read_text()


def test_suggest__takes_images_without_labels(place: Path) -> None:
    serve()
    found, size = suggest(
        SuggestConfig(data=str(place / "flat"), label_weight=0.0, teacher="a", max_params=6000, threads=1)
    )
    assert size == (16, 16)
    assert found
    assert all("--label-weight 0" in each.command and "--baseline" not in each.command for each in found)
