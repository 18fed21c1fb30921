"""The whole job on device "cuda", where there is no GPU: see `on_cuda`. A tensor on the wrong device raises.

What the CPU computes is compared: on the stand-in every stage must end with the same weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from factor_transfer import distillation, doctor
from factor_transfer.config import Config
from factor_transfer.distillation import distill, evaluate_run
from factor_transfer.doctor import diagnose
from factor_transfer.method import losses as terms
from factor_transfer.method.factor_transfer import Paraphraser, Translator
from factor_transfer.method.losses import FactorTransfer, Hint, Labels, Reader, StudentOutputs, Term
from factor_transfer.networks.load import InputNorm
from factor_transfer.networks.pair import Modules, Pair
from factor_transfer.tasks.classification import Classification
from factor_transfer.training import engine as engine_module
from factor_transfer.training import step as tasks
from factor_transfer.training import trainer as train
from factor_transfer.training.cache import CachedTeacher
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import environment, open_run
from factor_transfer.training.stages import Job
from factor_transfer.util.errors import ModelError, TrainingError
from on_cuda import OnCuda, on_cuda

SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (8, 8, 16)}
DROPPING: dict[str, Any] = {**SMALL, "drop_rate": 0.1}
JOB: dict[str, Any] = {
    "teacher": "cifar_resnet20", "student": "cifar_resnet20_b", "teacher_args": SMALL, "student_args": SMALL,
    "paraphraser_epochs": 1, "epochs": 1, "batch_size": 36, "lr": 0.05, "threads": 1, "log_with": "none",
    "precision": "fp32",
}  # fmt: skip

TWO = {"teacher_layer": "layer2,layer3", "student_layer": "layer2,layer3"}
TERM = f"{__name__}:OwnTerm"
OTHERS: dict[str, Any] = {"kd_weight": 1.0, "at_weight": 1.0, "hint_weight": 1.0, "term": TERM}
CASES: dict[str, dict[str, Any]] = {
    "teacher trained, live, average of weights, clipped, alone":
        {"teacher_epochs": 1, "model_ema": True, "clip_grad": 0.1, "baseline": True},
    "cached": {"views": 1, "epochs": 2},
    "cached, two layers, other terms, adamw": {
        "views": 1, "epochs": 2, **TWO, "kd_weight": 1.0, "at_weight": 1.0, "term": TERM, "opt": "adamw", "lr": 1e-3,
        "paraphraser_lr": 1e-3},
    "live, two layers, every term, p 2": {**TWO, **OTHERS, "p": 2.0},
    "stage of hints": {"hint_epochs": 1, "beta": 0.0, "hint_weight": 0.0},
    "no label": {"label_weight": 0.0},
    "no label, cached, predictions": {"label_weight": 0.0, "kd_weight": 1.0, "views": 1, "epochs": 2},
    "teacher without a head": {"teacher_args": {**SMALL, "num_classes": 0}},
    "teacher of larger images": {"teacher_size": 16},
    "no paraphraser, no translator": {"paraphraser": "none", "translator": "none"},
    "slim form, kept maps": {"factor_form": "slim", "factor_width": 8, "paraphraser_epochs": "auto"},
    "l2, batch norm in factors, dropout":
        {"reconstruction": "l2", "factor_batch_norm": True, "student_args": DROPPING},
    "student without batch norm": {"student": "convnext_atto", "student_args":
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16), "patch_size": 1}},
}  # fmt: skip


class OwnTerm(Term):
    """A user's own: it has weights, a reader, and a buffer."""

    name = "own"
    needs = frozenset({"pooled"})

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.teacher = pair.teacher
        self.project = nn.Linear(pair.student.shape[0], pair.teacher.shape[0])
        self.register_buffer("share", torch.tensor(0.5))

    def readers(self) -> dict[str, Reader]:
        return {"pooled": Pooled(self.teacher.layer, self.teacher.shape[0])}

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        ours = self.project(student.feature.mean((2, 3))).float()
        return self.share * (ours - teacher["pooled"].flatten(1).float()).square().mean()


class Pooled(Reader):
    """The map's mean over places."""

    def __init__(self, layer: str, channels: int) -> None:
        super().__init__(layer, (1, 1))
        self.shape = (channels, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """Images with labels and without, and a teacher that knows them."""
    folder = tmp_path_factory.mktemp("cuda")
    labelled = image_folder(folder / "images", side=8)
    (folder / "flat").mkdir()
    for path in sorted(labelled.rglob("*.png")):
        shutil.copy(path, folder / "flat" / f"{path.parent.parent.name}-{path.parent.name}-{path.name}")
    work(folder, "first", "cpu", teacher_epochs=15, lr=0.1, beta=0.0, teacher_weights=None)
    return folder


def teacher_of(folder: Path) -> str:
    return str(folder / "first" / "teacher.safetensors")


def work(folder: Path, out: str, device: str, modules: Modules | None = None, **changed: Any) -> Path:
    """All stages of a run, without the end of it: exports, figures of speed and the report are the CPU's."""
    given = {"data": str(folder / "images"), "teacher_weights": teacher_of(folder),
             "cache_dir": str(folder / f"caches-{out}-{device}"), "out": str(folder / f"{out}-{device}")}  # fmt: skip
    config = Config(**{**JOB, **given, "device": device, **changed})
    engine = Engine(device, config.precision, config.threads)
    assert config.out is not None
    where = Path(config.out) if out != "first" else folder / out
    now = environment(**engine.describe())
    with open_run(where, config, now, writes=True) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "finish", lambda *_: None)
        distillation._work(Job(config, engine, run, modules or {}))
    return where


# -- every stage, and every option that computes


@pytest.mark.parametrize("name", CASES)
def test_stages__end_on_cuda_as_on_the_cpu(folder: Path, name: str) -> None:
    changed = dict(CASES[name])
    if "no label" in name:
        changed["data"] = str(folder / "flat")
    if "predictions" in name:
        (folder / "classes.txt").write_text("class0\nclass1\nclass2\n")
        changed["class_map"] = str(folder / "classes.txt")
    if "head" in name:
        del changed["teacher_args"]
        teacher: nn.Module = timm.create_model("cifar_resnet20", **SMALL, num_classes=3)
        teacher.load_state_dict(load_file(teacher_of(folder)))
        teacher.reset_classifier(0)  # type: ignore[operator]
        modules: Modules = {"teacher": teacher}
    else:
        modules = {}
    plain = work(folder, name, "cpu", modules, **changed)
    with on_cuda():
        found = work(folder, name, "cuda", modules, **changed)
    made = {path.name for path in plain.glob("*.safetensors")}
    assert "student.safetensors" in made
    assert {path.name for path in found.glob("*.safetensors")} == made
    for file in made:
        theirs = load_file(plain / file)
        for key, value in load_file(found / file).items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4, msg=f"{file} {key}")


def test_stages__in_half_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and translator compute in bf16, losses and what is kept in float32."""
    seen: set[tuple[str, torch.dtype]] = set()

    def noted(name: str, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any) -> Tensor:
            found = plain(*inputs)
            if found.device.type == "cuda":  # what a run costs is counted on the CPU, in float32
                seen.add((name, found.dtype))
            return found

        return call

    for name, kind in (("student", Translator), ("teacher", Paraphraser)):
        monkeypatch.setattr(kind, "_encode", noted(name, kind._encode))
    monkeypatch.setattr(terms, "factor_transfer_loss", noted("loss", terms.factor_transfer_loss))
    with on_cuda():
        engine = Engine("cuda")
        found = work(folder, "half", "cuda", precision="auto", views=1, epochs=2, **{**TWO, **OTHERS, "hint_weight": 0})
    assert (engine.bf16, engine.device) == (True, torch.device("cuda", 0)), "what the stand-in says that it can"
    assert seen >= {("student", torch.bfloat16), ("teacher", torch.bfloat16), ("loss", torch.float32)}
    assert ("student", torch.float32) not in seen
    assert {value.dtype for value in load_file(found / "student.safetensors").values()} <= {torch.float32, torch.int64}


# -- what runs outside a step


def test_stages__resume_on_cuda(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, optimizer and average come back to the device, and factors from the cache."""
    settings = {"batch_size": 12, "paraphraser": "none", "translator": "none", "checkpoint_minutes": 1e-9,
                "opt": "adamw", "lr": 1e-3, "model_ema": True, "views": 1}  # fmt: skip
    step = train.Trainer.step

    def until(self: Any, *given: Any) -> Any:
        if self.progress.step == 2:
            raise KeyboardInterrupt
        return step(self, *given)

    with on_cuda():
        straight = work(folder, "straight", "cuda", **settings)
        monkeypatch.setattr(train.Trainer, "step", until)
        with pytest.raises(KeyboardInterrupt):
            work(folder, "cut", "cuda", **settings)
        monkeypatch.undo()
        continued = work(folder, "cut", "cuda", **settings)
    assert "student: continued after 0 passes and 2 steps" in capsys.readouterr().err
    assert (continued / "student.safetensors").read_bytes() == (straight / "student.safetensors").read_bytes()


def test_distill__and_what_follows_it(folder: Path, tmp_path: Path) -> None:
    given = {name: value for name, value in JOB.items() if name not in {"teacher", "student"}}
    with on_cuda():
        result = distill(
            "cifar_resnet20", "cifar_resnet20_b", folder / "images", **{**given, "log_with": "tensorboard"},
            teacher_weights=teacher_of(folder), baseline=True, device="cuda", out=tmp_path / "run",
        )  # fmt: skip
        measured = evaluate_run(tmp_path / "run", device="cuda")
    assert result.summary["environment"]["device"] == "cuda:0"
    assert result.summary["student"]["pt2_difference"] < 1e-4
    assert {type(value) for value in result.student.state_dict().values()} == {Tensor}, "it comes back on the CPU"
    assert (tmp_path / "run" / "report.html").exists()
    for role in ("teacher", "student", "baseline"):
        assert measured[role]["top1"] == pytest.approx(result.summary[role]["top1"])


def test_doctor__looks_on_cuda(folder: Path) -> None:
    with on_cuda():
        found = diagnose(Config(**JOB, data=str(folder / "images"), teacher_weights=teacher_of(folder), device="cuda"))
    assert found.code < 2, found.findings
    rows = dict(found.tables[-1][2])
    assert rows["a pass of the student"].endswith("1.0 GB of the GPU's")


def test_doctor__waits_for_the_gpu_before_it_reads_the_clock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    with on_cuda():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: done.append("waited"))
        monkeypatch.setattr(doctor.time, "perf_counter", lambda: done.append("clock") or 0.0)
        diagnose(Config(**JOB, data=str(folder / "images"), teacher_weights=teacher_of(folder), device="cuda"))
    assert done == ["waited", "clock", "waited", "clock"] * 2


@pytest.mark.parametrize("max_skipped", [1, 0])
def test_trainer__skips_a_step_that_is_not_finite(
    folder: Path, max_skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says where it began, of a network that is elsewhere than the images."""
    forward = Translator.forward
    calls: list[bool] = []

    def broken(self: Translator, feature: Tensor) -> Tensor:
        calls.append(True)
        found = forward(self, feature)
        return found * float("nan") if len(calls) == 1 or max_skipped == 0 else found

    monkeypatch.setattr(Translator, "forward", broken)
    settings = {"max_skipped": max_skipped, "batch_size": 18}
    with on_cuda():
        if max_skipped:
            found = work(folder, "skipped", "cuda", **settings)
            assert all(value.isfinite().all() for value in load_file(found / "student.safetensors").values())
        else:
            with pytest.raises(TrainingError, match=r"first in terms\.factor_transfer\.translator"):
                work(folder, "stopped", "cuda", **settings)


# -- the device itself


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_engine__computes_where_it_is_told_whatever_the_process_did_before(first: str) -> None:
    """Accelerate gives a process one device for good: the second run was on it unsaid, or ended in a ValueError."""
    with on_cuda(fresh=True):
        Engine(first)
        found = [str(Engine(name).device) for name in ("cuda", "cpu", "cuda")]
    assert found == ["cuda:0", "cpu", "cuda:0"], "one name, by which a run folder knows it"


def test_engine__float32_is_float32() -> None:
    """Torch leaves TF32, which keeps 10 of 23 bits, to convolutions on CUDA."""
    with on_cuda():
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        Engine("cuda", "fp32")
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32


def test_engine__guards_the_cpus_kernels_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doctor, and the stage of hints, take gradients on the CPU."""
    called: list[bool] = []
    monkeypatch.setattr(engine_module, "guard", lambda: called.append(True))
    with on_cuda():
        Engine("cuda")
    assert called


def test_engine__normalises_over_processes_on_gpus_alone() -> None:
    with on_cuda():
        assert Engine("cuda", sync_bn=True).sync_bn


# -- the stand-in: it finds what is left behind, in every stage


def test_stand_in__refuses_what_a_gpu_refuses() -> None:
    with on_cuda():
        weight, image = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
        assert isinstance(weight, OnCuda)
        for mixed in (lambda: weight + image, lambda: image @ weight.T, lambda: torch.cat([image, weight]),
                      lambda: image.add_(weight), lambda: torch._foreach_add([weight], [image]),
                      lambda: nn.functional.cross_entropy(weight, torch.zeros(2, dtype=torch.long))):  # fmt: skip
            with pytest.raises(RuntimeError, match="device"):
                mixed()
        with pytest.raises(RuntimeError):
            weight.numpy()
        assert (weight + torch.tensor(1.0)).tolist() == [[2.0] * 3] * 2, "a single number may be on the CPU"
        assert (weight.to("cpu") + image).tolist() == [[2.0] * 3] * 2


def left_behind(place: Any, name: str, argument: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Plants a fault: of what a function is given, one argument is on the CPU."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        plain = getattr(place, name)

        def faulty(*given: Any, **named: Any) -> Any:
            found = list(given)
            found[argument] = (
                {key: value.cpu() for key, value in found[argument].items()}
                if isinstance(found[argument], dict)
                else found[argument].cpu()
            )
            return plain(*found, **named)

        patch.setattr(place, name, faulty)

    return plant


PLAIN: dict[str, Any] = {"beta": 0.0}
PLANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = {
    "teacher: labels": (left_behind(Labels, "forward", 3), {**PLAIN, "teacher_epochs": 1}),
    "teacher: images": (left_behind(InputNorm, "forward", 1), {**PLAIN, "teacher_epochs": 1}),
    "evaluation": (left_behind(Classification, "sums", 2), PLAIN),
    "paraphraser: feature": (left_behind(tasks, "reconstruction_loss", 1), {}),
    "paraphraser: its measure": (left_behind(Paraphraser, "decode", 1), {}),
    "student: factor": (left_behind(terms, "factor_transfer_loss", 1), {"paraphraser": "none", "translator": "none"}),
    "student: factors, two layers": (left_behind(FactorTransfer, "forward", 2), {"paraphraser": "none", **TWO}),
    "student: logits": (left_behind(terms.SoftTargets, "forward", 2), {**PLAIN, "kd_weight": 1.0}),
    "student: attention": (left_behind(terms.AttentionTransfer, "forward", 2), {**PLAIN, "at_weight": 1.0}),
    "student: own term": (left_behind(OwnTerm, "forward", 2), {**PLAIN, "term": TERM}),
    "hint: map": (left_behind(Hint, "forward", 2), {**PLAIN, "hint_epochs": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_stages__what_is_left_on_the_cpu_is_found(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, changed = PLANTS[name]
    plant(monkeypatch)
    with on_cuda(), pytest.raises((RuntimeError, ModelError), match="same device"):  # what is rehearsed is a ModelError
        work(folder, f"planted {name}".replace("/", " "), "cuda", **changed)


@pytest.mark.parametrize("name", ["cached", "average of weights", "alone"])
def test_stages__other_faults_are_found(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: dict[str, Any] = {"paraphraser": "none", "translator": "none"}
    if name == "cached":
        forward = CachedTeacher.forward
        monkeypatch.setattr(CachedTeacher, "forward", lambda *given: {
            key: value.cpu() for key, value in forward(*given).items()})  # fmt: skip
        changed["views"] = 1
    elif name == "average of weights":
        begin = tasks.DistillationTask.setup_ema
        monkeypatch.setattr(tasks.DistillationTask, "setup_ema", lambda self, **given: begin(self, **given).to("cpu"))
        changed["model_ema"] = True
    else:
        baseline = Job.baseline

        def alone(self: Job) -> Any:
            left_behind(Labels, "forward", 3)(monkeypatch)
            return baseline(self)

        monkeypatch.setattr(Job, "baseline", alone)
        changed["baseline"] = True
    with on_cuda(), pytest.raises(RuntimeError, match="device"):
        work(folder, f"planted {name}", "cuda", **changed)
