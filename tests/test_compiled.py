"""A compiled network says and learns what the plain one does, or is refused with the reason."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import factor_transfer.zoo  # noqa: F401
from factor_transfer import fusible
from factor_transfer.compiled import Compiled, CompiledStudent, CompiledTeacher
from factor_transfer.errors import ModelError
from factor_transfer.features import Tapped, watching
from factor_transfer.files import state_fingerprint


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
        made = CompiledTeacher(plain, 2)
        other = torch.randn(2, 3, size, size)
        (output, maps), (expected, expected_maps) = made.maps(other), plain.maps(other)
        assert list(maps) == list(layers)
        for found, plainly in zip((output, *maps.values()), (expected, *expected_maps.values()), strict=True):
            assert (found.shape, found.dtype) == (plainly.shape, plainly.dtype)
            assert float((found - plainly).norm() / plainly.norm()) < (2e-2 if half else 1e-5)


def test_compiled__leaves_other_batches_to_the_plain_network() -> None:
    plain = small()
    made, runs = CompiledTeacher(plain, 2), []
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
    made = CompiledTeacher(plain, 2)
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        before = made.maps(images)[0].clone()
        for part in plain.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.zero_()
        assert torch.equal(made.maps(images)[0], before)
        assert not torch.equal(plain.maps(images)[0], before)


# -- what is trained


class Noisy(nn.Module):
    """8x8 images -> maps of 4x4 behind `body`, and 5 classes; with noise, and batch norms of maps and of vectors."""

    def __init__(self, noise: float = 0.5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.noise = nn.Sequential(nn.Dropout2d(noise), nn.Dropout(noise))
        self.body = nn.Sequential(nn.Conv2d(12, 20, 3, 2, 1), nn.BatchNorm2d(20), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(320, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.noise(self.stem(images))))  # type: ignore[no-any-return]


def noisy(noise: float = 0.5) -> Tapped:
    torch.manual_seed(0)
    module = Noisy(noise).to(memory_format=torch.channels_last)
    return Tapped(module, "body", also=("stem",)).train()


def shown(count: int, seed: int = 0) -> Tensor:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last)


def steps(network: Tapped, half: bool, sizes: tuple[int, ...] = (16, 16, 9, 16)) -> list[float]:
    """Losses of some steps of training, of the output and of both maps."""
    optimizer, losses = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9), []
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output, maps = network.maps(shown(size, seed=step))
        loss = output.float().square().mean() + sum(x.float().abs().mean() for x in maps.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("half", [False, True])
def test_compiled_student__learns_what_the_plain_network_learns(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise, and from its first step on: comparing leaves no trace. Our batch norm is in it."""
    norms: list[int] = []
    honest = fusible.normalised
    monkeypatch.setattr(fusible, "normalised", lambda x, *more: (norms.append(x.shape[1]), honest(x, *more))[1])
    plain = noisy()
    made = CompiledStudent(copy.deepcopy(plain), 16, "student")
    losses, expected = steps(made, half), steps(plain, half)
    assert norms == [12, 20]
    assert losses == pytest.approx(expected, rel=2e-2 if half else 1e-5)
    state, wanted = made.state_dict(), plain.state_dict()
    assert list(state) == list(wanted), "a checkpoint of one fits the other"
    for name, value in wanted.items():
        off = float((state[name].float() - value.float()).norm() / value.float().norm().clamp_min(1e-3))
        assert off < (0.1 if half else 1e-4), name
    assert int(state["module.stem.1.num_batches_tracked"]) == 4


def test_compiled_student__runs_plainly_unless_it_trains_on_a_whole_batch() -> None:
    made, runs = CompiledStudent(noisy(0.0), 4, "student"), list[int]()
    conv: Any = made.module.stem[0]
    forward = conv.forward
    conv.forward = lambda x: (runs.append(len(x)), forward(x))[1]
    made.maps(shown(4))
    assert runs == [4, 4, 4], "as it is, precisely, and for the export"
    made.maps(shown(4))
    assert len(runs) == 3, "compiled"
    made.maps(shown(3))
    with torch.no_grad():
        made.maps(shown(4))
    made.eval().maps(shown(4))
    made.train()
    assert len(runs) == 6
    with watching(made.module.stem, lambda output: runs.append(-len(output))):
        made.maps(shown(4))
    assert runs[6:] == [4, -4], "who watches a layer sees it run"
    made.maps(shown(4))
    assert len(runs) == 8, "nobody watches any more"


def test_compiled_student__a_copy_trains_weights_of_its_own() -> None:
    made = CompiledStudent(noisy(0.0), 16, "student")
    steps(made, False, (16,))
    before, other = state_fingerprint(made.state_dict()), copy.deepcopy(made)
    steps(other, False, (16,))
    assert state_fingerprint(made.state_dict()) == before
    assert state_fingerprint(other.state_dict()) != before


# -- what is refused


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if float(x.mean()) > 0 else -x


def teaching(plain: Tapped, batch: int) -> Compiled:
    return CompiledTeacher(plain, batch).eval().requires_grad_(False)


def learning(plain: Tapped, batch: int) -> Compiled:
    return CompiledStudent(plain, batch, "student").train()


@pytest.mark.parametrize("made", [teaching, learning])
def test_compiled__refuses_what_torch_cannot_export(made: Callable[[Tapped, int], Compiled]) -> None:
    network = made(Tapped(Counting(), "conv"), 2)
    with (
        torch.set_grad_enabled(made is learning),
        pytest.raises(ModelError, match="(?s)--torchcompile.*found.*next:.*leave --torchcompile out"),
    ):
        network.maps(torch.randn(2, 3, 8, 8))


def test_compiled__refuses_what_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.compile

    def wrong(graph: nn.Module, **options: object) -> object:
        made = honest(graph, **options)
        return lambda *inputs: (made(*inputs)[0] * 1.1, made(*inputs)[1])

    monkeypatch.setattr(torch, "compile", wrong)
    with torch.no_grad(), pytest.raises(ModelError, match="a compiled teacher whose outputs differ by 1e-01"):
        teaching(small(), 2).maps(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("what", ["outputs", "gradient", "buffers"])
def test_compiled_student__refuses_what_computes_something_else(
    what: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch norm whose mean is off by a half, whose gradient is lost, or whose averages stay behind."""
    forward, backward = fusible.normalised, fusible.gradients

    def wrong(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *more: Any) -> Any:
        out, *saved, new_mean, new_var = forward(x, weight, bias, mean, var, *more)
        kept = (mean, var) if what == "buffers" else (new_mean, new_var)
        return (out + (0.5 if what == "outputs" else 0), *saved, *kept)

    def lost(gradient: Tensor, *more: Any) -> Any:
        of_x, *others = backward(gradient, *more)
        return (of_x * (0 if what == "gradient" else 1), *others)

    monkeypatch.setattr(fusible, "normalised", wrong)
    monkeypatch.setattr(fusible, "gradients", lost)
    network = learning(noisy(0.0), 15)  # of no multiple of 16 numbers torch draws others in bf16
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        pytest.raises(ModelError, match=f"(?s)a compiled student whose {what} differ.*leave --torchcompile out"),
    ):
        network.maps(shown(15))


# -- whole runs


def test_start_up__does_not_wait_for_the_compiler() -> None:
    code = "import sys, factor_transfer.stages; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PAIR = ["--teacher", "cifar_resnet20", "--teacher-args", '{"layers": [1, 1, 1]}', "--student", "cifar_resnet20",
        "--student-args", '{"layers": [1, 1, 1], "channels": [4, 8, 16]}']  # fmt: skip
SHORT = ["--epochs", "2", "--views", "2", "--paraphraser-epochs", "1", "--threads", "1", "--log-with", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs share a cache, and a teacher that a plain run has trained."""
    made = tmp_path_factory.mktemp("runs")
    done = run(made, "plain", "--teacher-epochs", "6")
    assert done.returncode == 0, done.stderr
    return made


def command(folder: Path, out: str, *more: str) -> list[str]:
    where = ["--cache-dir", str(folder / "cache"), "--out", str(folder / out)]
    return [sys.executable, "-m", "factor_transfer", "distill", "--data", "digits", *PAIR, *SHORT, *where, *more]


def run(folder: Path, out: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, out, *more), capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def taught(folder: Path) -> list[str]:
    return ["--teacher-weights", str(folder / "plain" / "teacher.safetensors"), "--torchcompile"]


@pytest.mark.slow
def test_torchcompile__in_a_run_that_is_killed_and_in_one_that_is_not(folder: Path) -> None:
    made = run(folder, "compiled", *taught(folder))
    assert made.returncode == 0, made.stderr
    said = " ".join(made.stderr.split())
    assert said.count("teacher: compiled in") == 1, "once for all stages"
    assert said.count("student: compiled in") == 1
    assert "compiled" in said[said.index("factor cache") :], "the plain run's cache is not for this one"
    plain, compiled = (json.loads((folder / out / "summary.json").read_text()) for out in ("plain", "compiled"))
    assert abs(plain["student"]["top1"] - compiled["student"]["top1"]) < 5

    with subprocess.Popen(
        [*command(folder, "killed", *taught(folder)), "--checkpoint-minutes", "0.0001"], stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not list((folder / "killed/checkpoints").glob("student-*.pt")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    again = run(folder, "killed", *taught(folder))
    assert again.returncode == 0, again.stderr
    assert "student: continued after" in again.stderr
    whole, continued = ((folder / out / "student.safetensors").read_bytes() for out in ("compiled", "killed"))
    assert continued == whole


@pytest.mark.slow
def test_torchcompile__without_labels_leaves_the_head_as_it_is(folder: Path) -> None:
    """A graph would give it gradients of zero, and so its weights would decay."""
    for out, more in (("labelless", taught(folder)), ("labelless-plain", taught(folder)[:-1])):
        done = run(folder, out, *more, "--label-weight", "0", "--precision", "fp32")
        assert done.returncode == 0, done.stderr
        assert ("student: not compiled, because nothing trains its head" in done.stderr) is (out == "labelless")
    heads = [
        load_file(folder / out / "student.safetensors")["linear.weight"] for out in ("labelless", "labelless-plain")
    ]
    assert torch.equal(*heads)


@pytest.mark.slow
def test_torchcompile__without_a_compiler_is_refused_before_anything_is_computed(folder: Path) -> None:
    where = {"CXX": str(folder / "none"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    without = run(folder, "without", *taught(folder), **where)
    assert without.returncode == 2
    assert "error: --torchcompile" in without.stderr
    assert "leave --torchcompile out" in without.stderr
    assert "No working C++ compiler" in without.stderr
    assert "teacher: cifar_resnet20" not in without.stderr
    assert "Traceback" not in without.stderr
