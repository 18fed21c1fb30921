"""Outputs of every kind: logits are found, or asked for, where a network is loaded; all else sees one tensor."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from factor_transfer import distill
from factor_transfer.export.shipping import Choices, export_run
from factor_transfer.networks.load import Network, load_network
from factor_transfer.training.finished import rebuild
from factor_transfer.util.errors import ModelError

CLASSES = 3
Exits = namedtuple("Exits", ["first", "last"])


@dataclass
class Answer:
    """As transformers' outputs are."""

    loss: Tensor | None
    logits: Tensor
    hidden: Tensor


class Net(nn.Module):
    """A network whose output `form` makes of its map (B, 3, H, W), its embedding (B, 3) and its logits (B, 3)."""

    def __init__(self, form: str = "tensor", training: str | None = None) -> None:
        super().__init__()
        self.form, self.other = form, training or form
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU())
        self.head = nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Any:
        feature = self.body(images)
        embedding = feature.mean((2, 3))
        return FORMS[self.other if self.training else self.form](feature, embedding, self.head(embedding))


FORMS: dict[str, Any] = {
    "tensor": lambda f, e, x: x,
    "dict": lambda f, e, x: {"embedding": e, "logits": x},
    "nested dict": lambda f, e, x: OrderedDict(a={"embedding": e}, b={"logits": x}),
    "dataclass": lambda f, e, x: Answer(None, x, e),
    "object": lambda f, e, x: SimpleNamespace(embedding=e, logits=x),
    "by width": lambda f, e, x: (e.repeat(1, 2), x, f),
    "tuple": lambda f, e, x: (e, x),
    "list": lambda f, e, x: [f, [e, x]],
    "named tuple": lambda f, e, x: Exits(e, x),
    "named": lambda f, e, x: {"embedding": e, "classes": x},
}


def load(form: str, training: str | None = None, **more: Any) -> Network:
    settings: dict[str, Any] = {"role": "student", "num_classes": CLASSES, "img_size": 8}
    return load_network(Net(form, training), **{**settings, **more})


def check(network: Network) -> None:
    """Both modes give the head's own answer, in copies too, and the weights keep their names."""
    module, images = copy.deepcopy(network.module), torch.randn(4, 3, 8, 8)
    for mode in (True, False):
        module.train(mode)
        wanted = module.head(module.body(images).mean((2, 3)))  # type: ignore[operator]
        got = module(images)
        assert isinstance(got, Tensor)
        torch.testing.assert_close(got, wanted)
    assert list(module.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize("form", ["tensor", "dict", "nested dict", "dataclass", "object", "by width"])
def test_load_network__finds_the_logits_in_every_kind_of_output(form: str) -> None:
    network = load(form)
    check(network)
    assert bool(network.module._forward_hooks) == (form != "tensor"), "a plain network is left as it is"


@pytest.mark.parametrize(
    ("form", "name", "candidates"),
    [
        ("tuple", "1", r"0 \(3\), 1 \(3\)"),
        ("tuple", "-1", ""),
        ("list", "1.1", r"1\.0 \(3\), 1\.1 \(3\)"),
        ("named tuple", "last", r"first \(3\), last \(3\)"),
        ("named tuple", "1", ""),
        ("named", "classes", r"embedding \(3\), classes \(3\)"),
    ],
)
def test_load_network__asks_where_two_outputs_could_be_the_logits(form: str, name: str, candidates: str) -> None:
    with pytest.raises(ModelError, match=f"(?s)--student-output\n.*2 outputs that could be.*{candidates}"):
        load(form)
    check(load(form, output=name))


def test_load_network__refuses_a_name_that_names_nothing() -> None:
    for form, name in (("tuple", "2"), ("named", "logits"), ("list", "0.1"), ("list", "1")):
        with pytest.raises(ModelError, match=f"(?s)--student-output {name}\n.*no output of that name"):
            load(form, output=name)
    with pytest.raises(ModelError, match="(?s)--student-output 0\n.*one tensor"):
        load("tensor", output="0")
    with pytest.raises(ModelError, match=r"(?s)\(2, 6\).*logits \(2, 3\)"):
        load("by width", output="0")
    with pytest.raises(ModelError, match=r"(?s)\(2, 3\).*logits \(2, 6\)"):  # and not its embedding, which would fit
        load_network(Net("dict"), role="student", num_classes=6, img_size=8)


def test_load_network__training_may_give_another_kind_than_evaluation() -> None:
    check(load("tensor", "dict"))
    check(load("dict", "dataclass"))
    check(load("tensor", "named", output="classes"))
    network = load("tensor", "tuple")  # a frozen teacher never trains, so that this alone is no mistake
    assert network.module.eval()(torch.zeros(2, 3, 8, 8)).shape == (2, CLASSES)
    with pytest.raises(ModelError, match="(?s)--student-output\n.*2 outputs"):
        network.module.train()(torch.zeros(2, 3, 8, 8))


def test_load_network__two_images_of_two_classes_are_not_mistaken() -> None:
    """A matrix between images is as wide as two classes only where there are two images."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net().body
            self.head = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            embedding = self.body(images).mean((2, 3))
            return embedding @ embedding.T, self.head(embedding)

    network = load_network(Pairs(), role="student", num_classes=2, img_size=8)
    assert network.output == "1"


def test_load_network__a_teacher_of_features_gives_a_tensor_too() -> None:
    network = load("by width", role="teacher", num_classes=7)
    assert network.headless
    assert isinstance(network.module(torch.zeros(2, 3, 8, 8)), Tensor)


def test_distill__a_student_of_several_outputs_trains_ships_and_is_read_back(images: Path, tmp_path: Path) -> None:
    """A teacher with a dataclass, a student with nested lists, an average of weights: to the report and the exports."""
    modules = {"teacher": Net("dataclass"), "student": Net("list")}
    run = distill(
        modules["teacher"], modules["student"], images, student_output="1.1", out=tmp_path / "run",
        teacher_epochs=10, teacher_lr=0.1, epochs=1, paraphraser_epochs=1, batch_size=12, lr=0.05, kd_weight=0.1,
        model_ema=True, device="cpu", threads=1, log_with="none",
    )  # fmt: skip
    assert (tmp_path / "run" / "report.html").exists()
    assert run.summary["student"]["output"] == "1.1"
    assert run.summary["student"]["pt2_difference"] < 1e-4
    assert run.student(torch.zeros(2, 3, 16, 16)).shape == (2, CLASSES)
    with safe_open(tmp_path / "run" / "student.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(Net().state_dict())
    found = export_run(run.folder, Choices(formats=["safetensors"], images=9, latency=False), modules)
    assert [row["format"] for row in found["formats"]] == ["safetensors"]
    assert found["reference_top1"] == pytest.approx(run.summary["student"]["top1"], abs=0.01 + 100 / 9)
    again = rebuild(run.folder, "student", modules["student"])
    assert again.output == "1.1"
