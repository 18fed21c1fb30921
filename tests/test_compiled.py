"""A compiled network says and learns what the plain one does, or is refused with the reason."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from factor_transfer.networks.compiled import Compiled
from factor_transfer.networks.features import Tapped, watching
from factor_transfer.util.errors import ModelError
from factor_transfer.util.files import state_fingerprint
from processes import Started


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
    return Tapped(Noisy(noise).to(memory_format=torch.channels_last), "body", also=("stem",)).train()


def shown(count: int, seed: int = 0) -> Tensor:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return images.contiguous(memory_format=torch.channels_last)


def steps(network: Tapped, sizes: tuple[int, ...] = (16, 16, 9, 16)) -> list[float]:
    """Losses of some steps of training, of the output and of both maps."""
    optimizer, losses = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9), []
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        output, maps = network.maps(shown(size, seed=step))
        loss = output.square().mean() + sum(x.abs().mean() for x in maps.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_compiled__teacher_says_what_the_plain_network_says() -> None:
    plain = noisy().eval()
    made = Compiled(plain, 2, trains=False)
    with torch.no_grad():
        (output, maps), (expected, expected_maps) = made.maps(shown(2)), plain.maps(shown(2))
    assert made._run is not None
    assert list(maps) == list(expected_maps) == ["body", "stem"]
    torch.testing.assert_close([output, *maps.values()], [expected, *expected_maps.values()])


def test_compiled__student_learns_what_the_plain_network_learns() -> None:
    """With the same noise; its last batch but one is not whole."""
    plain = noisy()
    made = Compiled(copy.deepcopy(plain), 16, trains=True)
    assert steps(made) == pytest.approx(steps(plain), rel=1e-5)
    state, wanted = made.state_dict(), plain.state_dict()
    assert list(state) == list(wanted), "a checkpoint of one fits the other"
    torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-5)
    assert int(state["module.stem.1.num_batches_tracked"]) == 4


def test_compiled__runs_plainly_unless_it_trains_on_a_whole_batch() -> None:
    made, runs = Compiled(noisy(), 16, trains=True), list[int]()
    conv: Any = made.module.stem[0]
    forward = conv.forward
    conv.forward = lambda x: (runs.append(len(x)), forward(x))[1]
    made.maps(shown(16))
    made.maps(shown(16))
    assert runs == [16], "for the export"
    made.maps(shown(3))
    with torch.no_grad():
        made.maps(shown(16))
    made.eval().maps(shown(16))
    made.train()
    assert runs[1:] == [3, 16, 16]
    with watching(made.module.stem, lambda output: runs.append(-len(output))):
        made.maps(shown(16))
    assert runs[4:] == [16, -16], "who watches a layer sees it run"
    made.maps(shown(16))
    assert len(runs) == 6, "nobody watches any more"


def test_compiled__a_copy_trains_weights_of_its_own() -> None:
    made = Compiled(noisy(), 16, trains=True)
    steps(made, (16,))
    before, other = state_fingerprint(made.state_dict()), copy.deepcopy(made)
    steps(other, (16,))
    assert state_fingerprint(made.state_dict()) == before
    assert state_fingerprint(other.state_dict()) != before


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if float(x.mean()) > 0 else -x


@pytest.mark.parametrize("trains", [False, True])
def test_compiled__refuses_what_torch_cannot_export(trains: bool) -> None:
    network = Compiled(Tapped(Deciding(), "conv"), 2, trains=trains).train(trains)
    with (
        torch.set_grad_enabled(trains),
        pytest.raises(ModelError, match="(?s)--torchcompile.*found.*next:.*leave --torchcompile out"),
    ):
        network.maps(shown(2))


# -- whole runs


@pytest.mark.slow
def test_start_up__does_not_wait_for_the_compiler() -> None:
    code = "import sys, factor_transfer.training.stages; sys.exit('torch._inductor.compile_fx' in sys.modules)"
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
    return ["distill", "--data", "digits", *PAIR, *SHORT, *where, *more]


def run(folder: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    return Started(command(folder, out, *more), exports=False).finished()


def taught(folder: Path) -> list[str]:
    return ["--teacher-weights", str(folder / "plain" / "teacher.safetensors"), "--torchcompile"]


@pytest.mark.slow
def test_torchcompile__in_a_run_that_is_killed_and_in_one_that_is_not(folder: Path) -> None:
    made = run(folder, "compiled", *taught(folder))
    assert made.returncode == 0, made.stderr
    said = " ".join(made.stderr.split())
    assert said.count("on a CPU it is not known to help") == 1
    assert "compiled" in said[said.index("factor cache") :], "the plain run's cache is not for this one"
    plain, compiled = (json.loads((folder / out / "summary.json").read_text()) for out in ("plain", "compiled"))
    assert abs(plain["student"]["top1"] - compiled["student"]["top1"]) < 5

    process = Started([*command(folder, "killed", *taught(folder)), "--checkpoint-minutes", "0.0001"], exports=False)
    deadline = time.monotonic() + 120
    while not list((folder / "killed/checkpoints").glob("student-*.pt")):
        assert time.monotonic() < deadline
        assert process.running()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.finished()
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
    given = [sys.executable, "-m", "factor_transfer", *command(folder, "without", *taught(folder))]
    without = subprocess.run(given, env={**os.environ, **where}, capture_output=True, text=True, check=False)
    assert without.returncode == 2
    assert "error: --torchcompile" in without.stderr
    assert "leave --torchcompile out" in without.stderr
    assert "No working C++ compiler" in without.stderr
    assert "teacher: cifar_resnet20" not in without.stderr
    assert "Traceback" not in without.stderr
