"""Convolutions whose kernels corrupt memory are computed in another way, whoever calls them.

What would be ended by a memory fault runs in a process of its own, with the kernels for AVX2. Such processes are
forked from one that looks at memory strictly and has imported the package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from factor_transfer.networks.kernels import gradients, guard

STRICT = {
    "MALLOC_CHECK_": "3",  # glibc looks at every block that is freed; since 2.34 with this library alone
    "LD_PRELOAD": "libc_malloc_debug.so.0",
    "MALLOC_PERTURB_": "7",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "OMP_NUM_THREADS": "1",
}

WAYS = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from factor_transfer.training.engine import Engine

CHANNELS_LAST = torch.channels_last
engine = Engine("cpu", "fp32")

class Own(nn.Module):
    # no nn.Conv2d anywhere, and its own layout
    def __init__(self, channels, ways):
        super().__init__()
        self.weight, self.ways = nn.Parameter(torch.randn(8, channels, 1, 1)), ways

    def forward(self, x):
        if "turns" in self.ways:
            x = x.contiguous(memory_format=CHANNELS_LAST)
        if "again" in self.ways:
            return checkpoint(lambda x: F.conv2d(x, self.weight, None, 2), x, use_reentrant=False)
        return torch.convolution(x, self.weight, None, (2, 2), (0, 0), (1, 1), False, (0, 0), 1)

def layer(channels):
    return nn.Conv2d(channels, 8, 1, stride=2, bias=True)

worst = 0.0
for channels in (*range(1, 8), 15):
    made = [layer(channels), Own(channels, ()), Own(channels, ("turns",)), Own(channels, ("again",)),
            torch.jit.trace(layer(channels), torch.randn(4, channels, 8, 8))]
    for place, network in enumerate(made):
        network = network.to(memory_format=CHANNELS_LAST)
        for side in (8, 9):
            x = torch.randn(8, channels, side, side).requires_grad_()
            weights = list(network.parameters())
            given = x if place == 2 else x.contiguous(memory_format=CHANNELS_LAST)
            out = network(given)
            shown = torch.randn_like(out)
            found = torch.autograd.grad(out, [x, *weights], shown)
            twin = [value.detach().double().requires_grad_() for value in [x, *weights]]
            wanted = torch.autograd.grad(F.conv2d(*twin, stride=2), twin, shown.double())
            for ours, theirs in zip(found, wanted):
                worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
print(f"worst {worst:.1e}")
sys.exit(worst > 1e-5)
"""


JOB = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
import factor_transfer
from factor_transfer import distillation

class Own(nn.Module):
    # a pixel of the image is looked at by a function, and option B's shortcut by a layer
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 1, 1))
        self.body, self.head = nn.Conv2d(6, 8, 1, 2), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.body(F.relu(F.conv2d(x, self.weight, stride=2))).mean((2, 3)))

def trained(job, pair, student, baseline):  # what comes next trains nothing
    print(*(side.network.name for side in (pair.teacher, student, baseline)))
    raise SystemExit(0)

distillation.finish = trained
narrow = {"layers": [1, 1, 1], "channels": [4, 7, 16]}
factor_transfer.distill(
    "cifar_resnet20_b", Own(), "digits", out=sys.argv[1], teacher_args=narrow, teacher_epochs=4, epochs=1,
    batch_size=32, train_images=320, lr=0.05, device="cpu", threads=1, log_with="none", baseline=True,
    paraphraser_epochs=1, model_ema=True, hint_weight=1, student_layer="body", student_groups="body",
    teacher_groups="layer2",
)
"""


EACH = """
import os, sys, traceback
import factor_transfer.distillation
import torch

torch.set_num_threads(1)
folder, *names = sys.argv[1:]
for name in names:
    if not os.fork():
        sys.argv = [name, os.path.join(folder, name + "-run")]
        for number, stream in enumerate(("stdout", "stderr"), start=1):
            os.dup2(os.open(f"{folder}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        code = 1
        try:
            exec(open(f"{folder}/{name}.py").read(), {"__name__": "__main__"})
            code = 0
        except SystemExit as left:
            code = left.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))
    with open(f"{folder}/{name}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""
"""Scripts, one after another, each in a fork of its own."""


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the scripts left."""
    folder = tmp_path_factory.mktemp("strict")
    scripts = {"ways": WAYS, "job": JOB}
    for name, script in scripts.items():
        (folder / f"{name}.py").write_text(script)
    subprocess.run(
        [sys.executable, "-c", EACH, str(folder), *scripts], env=os.environ | STRICT, timeout=240, check=True
    )
    return folder


def survives(folder: Path, name: str) -> tuple[str, str]:
    """What a script printed, where no memory fault and no error has ended it."""
    code, stdout, stderr = ((folder / f"{name}.{what}").read_text() for what in ("code", "stdout", "stderr"))
    assert code == "0", (code, stdout, stderr)
    return stdout, stderr


def said(stderr: str) -> list[str]:
    lines = [line for line in stderr.splitlines() if "1x1 convolution" in line]
    assert all("corrupts memory" in line for line in lines)
    return [line.partition(":")[0] for line in lines]


def test_guard__every_way_to_such_a_convolution_is_caught(strict: Path) -> None:
    """A layer, functions, a network that turns its input, one that computes anew in backward, TorchScript."""
    _, stderr = survives(strict, "ways")
    assert said(stderr) == [
        f"a 1x1 convolution with stride 2 of {channels} channels" for channels in (*range(1, 8), 15)
    ]


def test_distill__survives_such_shapes_in_every_network(strict: Path) -> None:
    """Teacher, student, its average and the baseline; as layers, and called by a network of the user's own."""
    stdout, stderr = survives(strict, "job")
    assert stdout.split() == ["cifar_resnet20_b", "Own", "Own"]
    wanted = [f"a 1x1 convolution with stride 2 of {channels} channels" for channels in (3, 4, 6, 7)]
    assert sorted(said(stderr)) == wanted


@pytest.mark.parametrize(
    ("network", "channels"),
    [(nn.Conv2d(16, 4, 1, 2), 16), (nn.Conv2d(3, 4, 3, 2), 3), (nn.Conv2d(4, 4, 1), 4)],
    ids=["16 channels", "3x3", "stride 1"],
)
def test_guard__leaves_other_convolutions_as_they_are(
    network: nn.Conv2d, channels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is said, and the gradients lie channels-last, as torch's own kernel leaves them."""
    guard()
    network = network.to(memory_format=torch.channels_last)
    x = torch.randn(2, channels, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = network(x)
    of_input, _ = torch.autograd.grad(out.square().sum(), [x, network.weight])
    assert of_input.is_contiguous(memory_format=torch.channels_last)
    assert "convolution" not in capsys.readouterr().err


def test_gradients__of_any_stride_padding_and_groups_are_torchs() -> None:
    """Against a 3x3 convolution that has zeros around its middle, in float64."""
    for stride, padding, groups, side in [((2, 2), (0, 0), 1, 8), ((3, 1), (1, 2), 2, 7), ((1, 2), (2, 0), 4, 5)]:
        x = torch.randn(3, 4, side, side + 1, dtype=torch.float64)
        weight = torch.randn(8, 4 // groups, 1, 1, dtype=torch.float64)
        out = F.conv2d(x, weight, None, stride, padding, groups=groups)
        given = (
            torch.randn_like(out), x, weight, [8], list(stride), list(padding), [1, 1], False, [0, 0], groups,
            [True, True, True],
        )  # fmt: skip
        ours = gradients(*given)
        x.requires_grad_(), weight.requires_grad_()
        bias = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        wider = F.pad(weight, (1, 1, 1, 1))  # zeros around it: the same convolution, and no guarded one
        out = F.conv2d(x, wider, bias, stride, (padding[0] + 1, padding[1] + 1), groups=groups)
        theirs = torch.autograd.grad(out, [x, weight, bias], given[0])
        for found, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, wanted)


COMPILED = """
import torch
from torch import nn
from factor_transfer.networks.compiled import Compiled
from factor_transfer.training.engine import Engine
from factor_transfer.networks.features import Tapped

engine = Engine("cpu", "fp32", 1)
network = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
student = engine.place(Compiled(Tapped(network, "1"), 8, trains=True).train())
images = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
for _ in range(5):
    student(images)[0].sum().backward()
print(student._run is not None)
"""


@pytest.mark.slow
def test_guard__holds_in_compiled_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper in C++, if the environment asks for one, would call the kernel itself."""
    monkeypatch.setenv("TORCHINDUCTOR_CPP_WRAPPER", "1")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=os.environ | STRICT,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert done.stdout == "True\n"
    assert said(done.stderr) == ["a 1x1 convolution with stride 2 of 3 channels"]
