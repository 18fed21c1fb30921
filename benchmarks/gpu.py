"""What only a GPU can tell, in at most four minutes on one: golden numbers, losses in bf16, speed, memory, tests.

    python benchmarks/gpu.py ../shared    # one GPU, otherwise idle; results/gpu.json

* `golden`: how far the authors' numbers are from ours in float32, relatively (TF32 off).
* `losses`: ResNet-56 -> ResNet-20 in bf16 beside float32, step by step from the same weights.
* `steps`: images a second, input included, and the most memory taken: teacher live, its factors from the cache, student
  alone; as it is, and with --torchcompile (with the seconds of its first step, in which it compiles).
* `tests`: tests/test_gpu.py.

Each is written down as soon as it is known, so a run that is cut leaves what it had; what the time is too short for
says so. `--device cpu --tiny` does all of it for a moment on the CPU, without figures that mean anything: it shows that
the script works. tests/test_gpu.py then runs on a stand-in for CUDA (tests/on_cuda.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from cyclopts import App
from safetensors.torch import load_file
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import (
    Translator,
    factor_transfer_loss,
    load_reference_paraphraser,
    reconstruction_loss,
)
from factor_transfer.method.losses import FactorTransfer, Labels
from factor_transfer.networks.features import FrozenTeacher, Tapped
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import environment
from factor_transfer.training.schedule import Plan, optimizer_and_schedule
from factor_transfer.training.step import DistillationTask, TeacherSide
from factor_transfer.util.files import write_json

if TYPE_CHECKING:
    from pair import Measured

    from factor_transfer.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
KINDS = "live", "cached", "alone", "alone compiled", "live compiled", "cached compiled"
COMPILING = 45.0
"""Seconds that must be left for a compiled kind to be begun."""

TESTING = 60.0
"""Seconds that are kept for the tests."""

app = App()


# -- golden numbers


def golden_distances(shared: Path, engine: Engine) -> dict[str, float]:
    """How far the project's numbers are from the authors', relatively, in float32 on the engine's device.

    Args:
        shared: folder of golden numbers and checkpoints.
        engine: where to compute.
    """
    golden = {
        name: value.to(engine.device) for name, value in load_file(shared / "golden/reference.safetensors").items()
    }
    file = shared / "checkpoints" / "reference-paraphraser-cifar10.pth"
    paraphraser, translator = engine.place(load_reference_paraphraser(file)).eval(), engine.place(Translator(64, 32))
    translator.load_state_dict(_part(golden, "translator."))
    feature = golden["teacher_feature"]
    with torch.no_grad():
        factor = paraphraser.encode(feature)
        made = {"paraphraser_mode0": paraphraser(feature), "paraphraser_mode1": factor}
        made |= {"paraphraser_mode2": paraphraser.decode(factor)}
        made |= {"reconstruction_l1": reconstruction_loss(made["paraphraser_mode0"], feature)}
    own = golden["student_feature"].clone().requires_grad_()
    made["student_factor"] = translator(own)
    made["factor_loss"] = factor_transfer_loss(made["student_factor"], factor)
    torch.autograd.backward(made["factor_loss"])
    gradients = {"student_feature": own.grad} | {f"translator.{n}": p.grad for n, p in translator.named_parameters()}
    made |= {f"grad.{name}": value for name, value in gradients.items() if value is not None}
    made["step_losses"] = _three_steps(golden, shared, engine)
    return {name: float((value.detach() - golden[name]).norm() / golden[name].norm()) for name, value in made.items()}


def _three_steps(golden: dict[str, Tensor], shared: Path, engine: Engine) -> Tensor:
    """Factor transfer loss and cross-entropy of three steps (3, 2) of the authors' program."""
    networks: dict[str, nn.Module] = {}
    for role, name in (("student", "cifar_resnet20_b"), ("teacher", "cifar_resnet56_b")):
        networks[role] = timm.create_model(name)
        networks[role].load_state_dict(_part(golden, f"{role}."))
    translator = Translator(64, 32)
    translator.load_state_dict(_part(golden, "step_translator."))
    paraphraser = load_reference_paraphraser(shared / "checkpoints" / "reference-paraphraser-cifar10.pth")
    side = TeacherSide(Tapped(networks["teacher"], "layer3"), nn.Identity(), (8, 8), paraphraser)
    terms = [Labels(), FactorTransfer(translator, 500)]
    task = DistillationTask(Tapped(networks["student"], "layer3"), nn.Identity(), terms, FrozenTeacher(side))
    engine.place(task).train()
    config = Config(teacher="t", student="s", data="digits", sched="constant")
    plan = Plan(stage="student", epochs=164, lr=0.1, seed=0)
    optimizer, _ = optimizer_and_schedule(task.get_trainable_module(), plan, config, steps=391)
    found = []
    for _ in range(3):
        result = task(golden["step_images"].float(), golden["step_labels"])
        found.append(torch.stack([result["factor_transfer"].detach() / 500, result["cross_entropy"].detach()]))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    return torch.stack(found)


def _part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


# -- losses and speed


def losses(pair: Measured, steps: int, *, bf16: bool) -> list[dict[str, float]]:
    """The values of the first steps, live, all from the same weights and images."""
    before, pair.engine.bf16 = pair.engine.bf16, bf16
    try:
        trainer = pair.trainer("live")
        return list(_run(trainer, _chunks(pair, steps)))
    finally:
        pair.engine.bf16 = before


def speed(pair: Measured, kind: str, warm: int, steps: int) -> dict[str, float]:
    """Of a kind of training: see the top of the file."""
    trainer, chunks, size = pair.trainer(kind), _chunks(pair, steps), pair.config.batch_size
    gpu = pair.engine.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    list(_run(trainer, chunks[:1]))
    pair.engine.settle()
    first = time.perf_counter() - start
    list(_run(trainer, chunks))  # fills the cache
    list(_run(trainer, chunks[:warm]))
    pair.engine.settle()
    start = time.perf_counter()
    list(_run(trainer, chunks))
    pair.engine.settle()
    seconds = time.perf_counter() - start
    found = {"images_per_second": size * steps / seconds, "step_seconds": seconds / steps, "first_step_seconds": first}
    return found | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if gpu else {})


def _chunks(pair: Measured, steps: int) -> list[np.ndarray]:
    size = pair.config.batch_size
    order = np.random.default_rng(0).permutation(len(pair.train))
    return [order[place * size : (place + 1) * size] for place in range(steps)]


def _run(trainer: Trainer, chunks: list[np.ndarray]) -> Any:
    trainer.objective.train()
    for chunk, batch in zip(chunks, trainer.train.batches(chunks, view=0), strict=True):
        yield trainer.step([batch], len(chunk), view=0)


# -- the tests


def tests(shared: Path, seconds: float, *, stand_in: bool) -> dict[str, Any]:
    """What tests/test_gpu.py says; cut after so many seconds."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    more = {"FACTOR_TRANSFER_SHARED": str(shared), "PYTHONPATH": str(ROOT / "src")}
    if stand_in:
        more["FACTOR_TRANSFER_STAND_IN"] = "1"
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **more}, timeout=seconds, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return {"cut_after_seconds": seconds}
    return {"returncode": done.returncode, "output": done.stdout.splitlines()[-40:]}


@app.default
def main(
    shared: Path,
    out: Path = ROOT / "results" / "gpu.json",
    device: str = "cuda",
    minutes: float = 4.0,
    tiny: bool = False,
) -> None:
    """Measure, print, and write down.

    Args:
        shared: folder of cifar10-jpeg, checkpoints and golden numbers.
        out: the JSON file.
        device: cuda; cpu with --tiny.
        minutes: when to be done.
        tiny: two steps of a few images, nothing compiled but the student alone.
    """
    from pair import measured

    began, shared = time.monotonic(), shared.resolve()
    engine = Engine(device, "fp32")
    found: dict[str, Any] = {"environment": environment(**engine.describe(), cuda=torch.version.cuda)}
    if engine.device.type == "cuda":
        found["environment"]["gpu"] = torch.cuda.get_device_name()

    def left() -> float:
        return 60 * minutes - (time.monotonic() - began)

    def keep(name: str, work: Callable[[], Any]) -> None:
        """Whatever goes wrong in one part, the others are measured."""
        try:
            made = work()
        except Exception as error:  # what a GPU, its driver or a compiler raises
            made = {"error": f"{type(error).__name__}: {error}"[:1000]}
        place, _, entry = name.partition("/")
        if entry:
            found.setdefault(place, {})[entry] = made
        else:
            found[place] = made
        write_json(out, found | {"seconds": time.monotonic() - began})
        print(f"{name}: {made}", flush=True)

    images, batch_size, warm, steps = (64, 16, 1, 2) if tiny else (12_800, 128, 10, 80)
    keep("golden", partial(golden_distances, shared, engine))
    with measured(shared, images, threads=os.cpu_count() or 1, device=device, batch_size=batch_size) as pair:
        for name, bf16 in (("fp32", False), ("bf16", True)):
            keep(f"losses/{name}", partial(losses, pair, min(steps, 20), bf16=bf16))
        for kind in KINDS[:4] if tiny else KINDS:
            late = "compiled" in kind and left() < COMPILING + TESTING
            keep(
                f"steps/{kind}",
                partial(dict, error="no time left") if late else partial(speed, pair, kind, warm, steps),
            )
    keep("tests", partial(tests, shared, max(left(), 5.0), stand_in=device == "cpu"))


if __name__ == "__main__":
    app()
