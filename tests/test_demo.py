"""The demo, and what the package carries for it: images of Fashion-MNIST, and a teacher of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import factor_transfer.zoo  # noqa: F401 (it registers the networks)
from factor_transfer.config import DataConfig
from factor_transfer.data.images import Source
from factor_transfer.data.sources import open_source
from factor_transfer.demo import METHODS, RECORD, _show
from factor_transfer.settings import read_settings

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "results/demo-fashion/compare.json"


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The demo on twenty seeds."""
    found: dict[str, Any] = json.loads(KEPT.read_text())
    return found


@pytest.fixture(scope="module")
def fashion() -> Source:
    return open_source(DataConfig(data="fashion"))


def test_fashion__has_other_images_to_measure_on_than_to_train_on(fashion: Source) -> None:
    assert fashion.validation is not None
    train, validation = ([part.raw(at) for at in range(len(part))] for part in (fashion.train, fashion.validation))
    assert (len(train), len(validation)) == (2000, 2000)
    assert not set(train) & set(validation)


def test_fashion__its_teacher_knows_the_images_and_the_order_of_their_classes(fashion: Source) -> None:
    assert fashion.validation is not None and fashion.order is not None
    teacher = timm.create_model("cifar_resnet20.fashion", pretrained=True).eval()
    mean, std = (torch.tensor(teacher.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    grey = np.stack([np.asarray(fashion.validation.open(at)) for at in range(500)])
    images = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        said = teacher((images - mean) / std).argmax(1)
    right = [fashion.order[index] == label for index, label in zip(said, fashion.validation.labels, strict=False)]
    assert sum(right) / len(right) > 0.8


def test_fashion__the_plain_name_stays_an_untrained_network() -> None:
    assert "file" not in timm.create_model("cifar_resnet20").pretrained_cfg
    assert timm.create_model("cifar_resnet20").pretrained_cfg["input_size"] == (3, 32, 32)


def test_demo__its_words_on_other_seeds_are_those_of_the_kept_result(kept: dict[str, Any]) -> None:
    assert kept["complete"]
    given = read_settings("recipe:demo")
    assert {name: kept["settings"][name] for name in given} == given
    assert f"{kept['methods'][0]['n']} other seeds" in RECORD
    assert 0 not in {run["seed"] for run in kept["runs"]}
    named = {each["name"]: each for each in kept["methods"]}
    for name in ("ft", "kd", "ft+kd"):
        gain = named[name]["to_alone"]
        mean, low, high = (f"{gain[key]:+.2f}" for key in ("mean", "low", "high"))
        assert f"{mean} ({low} to {high})" in RECORD


def test_demo__the_table_has_the_teacher_and_every_method(
    kept: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _show(kept)
    said = capsys.readouterr().out
    for each in kept["methods"]:
        row = next(line for line in said.splitlines() if re.match(rf"│ {re.escape(METHODS[each['name']])} +│", line))
        assert re.search(rf"{each['mean']:.2f}.*{each['compute_to_alone']:.2f}", row)
    assert f"{kept['teacher']['top1']:.2f}" in said
