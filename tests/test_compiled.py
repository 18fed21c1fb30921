"""A compiled teacher says what the plain one says, or is refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer.compiled import Compiled
from factor_transfer.errors import ModelError
from factor_transfer.features import Tapped, watching


def small() -> Tapped:
    return Tapped(timm.create_model("cifar_resnet20", layers=(1, 1, 1)).eval(), "layer3")


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
    plain = Tapped(timm.create_model(name, num_classes=7, **args).eval(), layers[0], also=layers)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        made = Compiled(plain, 2)
        other = torch.randn(2, 3, size, size)
        (output, maps), (expected, expected_maps) = made.maps(other), plain.maps(other)
        assert list(maps) == list(layers)
        for found, plainly in zip((output, *maps.values()), (expected, *expected_maps.values()), strict=True):
            assert (found.shape, found.dtype) == (plainly.shape, plainly.dtype)
            assert float((found - plainly).norm() / plainly.norm()) < (2e-2 if half else 1e-5)


def test_compiled__leaves_other_batches_to_the_plain_network() -> None:
    plain = small()
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
    plain = small()
    made = Compiled(plain, 2)
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        before = made.maps(images)[0].clone()
        for part in plain.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.zero_()
        assert torch.equal(made.maps(images)[0], before)
        assert not torch.equal(plain.maps(images)[0], before)


def test_compiled__refuses_what_torch_cannot_export() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x if float(x.mean()) > 0 else -x

    with pytest.raises(ModelError, match="(?s)--torchcompile.*found.*next:.*leave --torchcompile out"):
        Compiled(Tapped(Counting(), "conv"), 2).maps(torch.randn(2, 3, 8, 8))


def test_compiled__refuses_what_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.compile

    def wrong(graph: nn.Module, **options: object) -> object:
        made = honest(graph, **options)
        return lambda *inputs: (made(*inputs)[0] * 1.1, made(*inputs)[1])

    monkeypatch.setattr(torch, "compile", wrong)
    plain = small()
    with pytest.raises(ModelError, match="outputs differ by 1e-01"):
        Compiled(plain, 2).maps(torch.randn(2, 3, 32, 32))


@pytest.mark.slow
def test_torchcompile__in_runs_with_a_compiler_and_without(tmp_path: Path) -> None:
    def run(out: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        pair = ["--teacher", "cifar_resnet20", "--teacher-args", '{"layers": [1, 1, 1]}', "--student", "cifar_resnet20",
                "--student-args", '{"layers": [1, 1, 1], "channels": [4, 8, 16]}']  # fmt: skip
        short = ["--epochs", "2", "--views", "2", "--paraphraser-epochs", "1", "--threads", "1", "--log-with", "none"]
        folders = ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / out)]
        command = "distill", "--data", "digits", *pair, *short, *folders, *more
        return subprocess.run([sys.executable, "-m", "factor_transfer", *command], capture_output=True, text=True,
                              env={**os.environ, **environment}, check=False)  # fmt: skip

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
