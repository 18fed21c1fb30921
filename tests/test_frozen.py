"""The frozen teacher never changes, and folding its batch norms changes nothing that it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer.errors import ModelError
from factor_transfer.features import Tapped, find_layer, watching
from factor_transfer.frozen import Compiled, FrozenTeacher, folded


def with_statistics(module: nn.Module) -> nn.Module:
    """As after training: fresh batch norms are nearly the identity, and hide a wrong folding."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None:
            for tensor, low, high in ((part.running_mean, -1, 1), (part.running_var, 0.5, 2),
                                      (part.weight.data, 0.5, 1.5), (part.bias.data, -1, 1)):  # fmt: skip
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
    return module.eval()


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("cifar_resnet20", 32, 19), ("cifar_resnet20_b", 32, 21), ("cifar_wrn_16_1", 32, 6), ("cifar_vgg13", 32, 10),
        ("resnet18", 64, 20), ("test_efficientnet", 64, 13), ("mobilenetv3_small_050", 64, 34), ("vgg11_bn", 64, 8),
        ("regnetx_002", 64, 44), ("densenet121", 64, 59), ("test_vit", 160, 0), ("test_convnext", 64, 0),
    ],
)  # fmt: skip
def test_folded__says_what_the_plain_network_says(name: str, size: int, count: int) -> None:
    plain = with_statistics(timm.create_model(name, num_classes=7))
    tapped = Tapped(plain, find_layer(plain, images(size)))
    before = deepcopy(plain.state_dict())
    folding = folded(tapped, images(size))
    assert folding.count == count
    assert folding.difference < 1e-5
    other = torch.randn(3, 3, size, size)
    with torch.no_grad():
        for found, expected in zip(folding.network(other), tapped(other), strict=True):
            assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items()), "the given one is left"


def test_folded__keeps_the_tapped_convolution_as_it_is() -> None:
    plain = with_statistics(timm.create_model("resnet18", num_classes=7))
    tapped = Tapped(plain, "layer4.1.conv2")
    folding = folded(tapped, images(64))
    assert folding.count == 19
    with torch.no_grad():
        assert torch.allclose(folding.network(images(64))[1], tapped(images(64))[1], rtol=1e-3, atol=1e-4)


class ReadTwice(nn.Module):
    """Its convolution feeds a batch norm, and something that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        return self.pool(self.norm(made) + F.relu(made)).flatten(1)


class TwoNorms(ReadTwice):
    """One convolution, two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.conv(x)
        return self.pool(self.norm(made) * self.other(made)).flatten(1)


class SharedConv(ReadTwice):
    """One convolution that runs twice, once without its batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.norm(self.conv(x)) + self.conv(-x)).flatten(1)


@pytest.mark.parametrize("kind", [ReadTwice, TwoNorms, SharedConv])
def test_folded__leaves_a_network_plain_where_folding_would_change_it(kind: type[ReadTwice]) -> None:
    tapped = Tapped(with_statistics(kind()), "norm")
    folding = folded(tapped, images(8))
    assert folding.count == 0
    with torch.no_grad():
        for found, expected in zip(folding.network(images(8)), tapped(images(8)), strict=True):
            assert torch.equal(found, expected)


class Counts(nn.Module):
    """Writes to a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


def test_frozen_teacher__knows_whether_it_changed() -> None:
    still = FrozenTeacher(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    still.train()
    still(images(8))
    assert still.unchanged()
    moving = FrozenTeacher(Counts())
    moving(images(8))
    assert not moving.unchanged()


# -- compiled


@pytest.mark.parametrize(
    ("name", "args", "layers", "size", "half"),
    [
        ("cifar_resnet20", {"layers": (1, 1, 1)}, ("layer3", "layer2"), 32, False),
        ("cifar_resnet20", {"layers": (1, 1, 1)}, ("layer3", "layer2"), 32, True),
        pytest.param("test_vit", {}, ("norm",), 160, True, marks=pytest.mark.slow),
    ],
)
def test_compiled__says_what_the_plain_network_says(
    name: str, args: dict[str, Any], layers: tuple[str, ...], size: int, half: bool
) -> None:
    plain = Tapped(with_statistics(timm.create_model(name, num_classes=7, **args)), layers[0], also=layers)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        made = Compiled(plain, 2)
        other = torch.randn(2, 3, size, size)
        (output, maps), (expected, expected_maps) = made.maps(other), plain.maps(other)
        assert list(maps) == list(layers)
        for found, plainly in zip((output, *maps.values()), (expected, *expected_maps.values()), strict=True):
            assert (found.shape, found.dtype) == (plainly.shape, plainly.dtype)
            assert float((found - plainly).norm() / plainly.norm()) < (2e-2 if half else 1e-5)


def test_compiled__leaves_other_batches_to_the_plain_network() -> None:
    plain = Tapped(with_statistics(timm.create_model("cifar_resnet20", layers=(1, 1, 1))), "layer3")
    made, runs = Compiled(plain, 2), []
    forward = plain.module.conv1.forward
    plain.module.conv1.forward = lambda x: (runs.append(len(x)), forward(x))[1]  # type: ignore[assignment]
    with torch.no_grad():
        for count in (2, 3, 1, 2):
            output, maps = made.maps(torch.randn(count, 3, 32, 32))
            assert len(output) == len(maps["layer3"]) == count
        assert runs == [2, 2, 3, 1], "to compare, to export, and twice for batches that are not whole"
        with watching(plain.module.layer1, runs.append):
            made.maps(torch.randn(2, 3, 32, 32))
    assert isinstance(runs[-1], Tensor), "who watches a layer sees it run"


def test_compiled__has_its_weights_among_the_constants() -> None:
    """Those of convolutions are repacked, so changing them, which nobody may, changes nothing any more."""
    plain = Tapped(with_statistics(timm.create_model("cifar_resnet20", layers=(1, 1, 1))), "layer3")
    made = Compiled(plain, 2)
    with torch.no_grad():
        before = made.maps(images(32))[0].clone()
        for part in plain.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.zero_()
        assert torch.equal(made.maps(images(32))[0], before)
        assert not torch.equal(plain.maps(images(32))[0], before)


def test_compiled__refuses_what_torch_cannot_export() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x if float(x.mean()) > 0 else -x

    with pytest.raises(ModelError, match="(?s)--torchcompile.*found.*next:.*leave --torchcompile out"):
        Compiled(Tapped(Counting(), "conv"), 2).maps(images(8))


def test_compiled__refuses_what_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.compile

    def wrong(graph: nn.Module, **options: object) -> object:
        made = honest(graph, **options)
        return lambda *inputs: (made(*inputs)[0] * 1.1, made(*inputs)[1])

    monkeypatch.setattr(torch, "compile", wrong)
    plain = Tapped(with_statistics(timm.create_model("cifar_resnet20", layers=(1, 1, 1))), "layer3")
    with pytest.raises(ModelError, match="outputs differ by 1e-01"):
        Compiled(plain, 2).maps(images(32))


@pytest.mark.slow
def test_torchcompile__in_runs_with_a_compiler_and_without(tmp_path: Path) -> None:
    def run(out: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        pair = ["--teacher", "cifar_resnet20", "--teacher-args", '{"layers": [1, 1, 1]}', "--student", "cifar_resnet20",
                "--student-args", '{"layers": [1, 1, 1], "channels": [4, 8, 16]}']  # fmt: skip
        short = ["--epochs", "2", "--views", "2", "--paraphraser-epochs", "1", "--threads", "1", "--log-with", "none"]
        folders = ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / out)]
        command = [
            sys.executable,
            "-m",
            "factor_transfer",
            "distill",
            "--data",
            "digits",
            *pair,
            *short,
            *folders,
            *more,
        ]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)

    assert run("plain", "--teacher-epochs", "6").returncode == 0
    taught = "--teacher-weights", str(tmp_path / "plain" / "teacher.safetensors"), "--torchcompile"
    made = run("compiled", *taught)
    assert made.returncode == 0, made.stderr
    said = " ".join(made.stderr.split())
    assert said.count("teacher: compiled in") == 1, "once for all stages"
    assert "compiled" in said[said.index("factor cache") :], "the plain run's cache is not for this one"
    plain, compiled = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("plain", "compiled"))
    assert abs(plain["student"]["top1"] - compiled["student"]["top1"]) < 5

    without = run("without", *taught, CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    assert without.returncode == 2
    assert "error: --torchcompile" in without.stderr
    assert "leave --torchcompile out" in without.stderr
    assert "No working C++ compiler" in without.stderr
    assert "teacher: cifar_resnet20" not in without.stderr, "before anything is computed"
    assert "Traceback" not in without.stderr
