"""The whole job, through the real command and through the call, on the built-in digits."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bits import bits
from factor_transfer import distill
from factor_transfer.config import Config
from factor_transfer.distillation import default_out, evaluate_run, rebuild
from factor_transfer.method.factor_transfer import portable_beta
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import Run
from factor_transfer.util.errors import ConfigError, Interrupted, ModelError, RunError, TrainingError
from factor_transfer.util.files import sha256_file, state_fingerprint
from processes import TORCHRUN, Command, Started

TEACHER: dict[str, Any] = {"layers": (1, 1, 1), "channels": (8, 16, 32)}
STUDENT: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 8, 16)}
JOB: dict[str, Any] = {
    "teacher_args": TEACHER, "student_args": STUDENT, "teacher_epochs": 4, "paraphraser_epochs": 2, "epochs": 3,
    "batch_size": 32, "lr": 0.05, "threads": 1, "device": "cpu", "baseline": True, "train_images": 320,
}  # fmt: skip
FLAGS = [
    "--data", "digits", "--teacher", "cifar_resnet20", "--student", "cifar_resnet20_b",
    "--teacher-args", "layers=(1,1,1)", "channels=(8,16,32)", "--student-args", "layers=(1,1,1) channels=(4,8,16)",
    "--teacher-epochs", "4", "--paraphraser-epochs", "2", "--epochs", "3", "--batch-size", "32", "--lr", "0.05",
    "--threads", "1", "--device", "cpu", "--baseline", "--train-images", "320",
]  # fmt: skip


def job(out: Path, **changed: Any) -> Any:
    return distill("cifar_resnet20", "cifar_resnet20_b", "digits", **{**JOB, "out": str(out), **changed})


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, factor_transfer: Command) -> Path:
    """A run made by the command."""
    folder = tmp_path_factory.mktemp("finished")
    done = factor_transfer("distill", *FLAGS, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder / "run"


def test_distill__tells_and_writes_what_was_gained(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    table = (finished.parent / "stdout").read_text()
    for role, name in (
        ("teacher", "teacher"),
        ("student", "student by Factor Transfer"),
        ("baseline", "baseline"),
    ):
        assert 0 <= summary[role]["top1"] <= 100
        assert summary[role]["latency_ms"] > 0
        assert name in table
        assert f"{summary[role]['top1']:.2f}" in table
    assert summary["teacher"]["top1"] > 40
    assert summary["student"]["parameters"] == summary["baseline"]["parameters"] < summary["teacher"]["parameters"]
    assert summary["student"]["size_bytes"] == pytest.approx(4 * summary["student"]["parameters"], rel=0.2)
    assert set(summary["seconds"]) == {"teacher", "paraphraser", "student", "baseline"}
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    assert summary["student"]["beta"] == pytest.approx(portable_beta(summary["student"]["elements"]))
    assert float(Run(finished).pins()["beta"]) == summary["student"]["beta"]
    stages = [row["stage"] for row in Run(finished).metrics()]
    assert stages == ["teacher"] * 4 + ["paraphraser"] * 2 + ["student"] * 3 + ["baseline"] * 3
    assert not list((finished / "checkpoints").iterdir())


def test_distill__the_student_leaves_alone(finished: Path) -> None:
    """As a file for any number of images, and as a plain state dict. test_shipping.py runs one without this package."""
    student = rebuild(finished, "student").module.eval()
    shipped = torch.export.load(finished / "student.pt2").module()
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 8, 8)
        torch.testing.assert_close(shipped(images), student(images), rtol=1e-4, atol=1e-5)
    state = load_file(finished / "student.safetensors")
    assert not [name for name in state if "translator" in name or "conv0" in name]
    assert set(state) == set(student.state_dict())


def test_distill__a_finished_run_is_left_alone(finished: Path, factor_transfer: Command) -> None:
    before = contents(finished)
    again = factor_transfer("distill", *FLAGS, "--out", "run", cwd=finished.parent)
    assert again.returncode == 0
    assert "is finished; nothing was changed" in again.stderr
    assert again.stdout == (finished.parent / "stdout").read_text()
    after = contents(finished)
    after["lock"] = before["lock"]
    assert after == before


def test_evaluate__finds_the_same_again(finished: Path, factor_transfer: Command) -> None:
    done = factor_transfer("evaluate", finished, "--json")
    assert done.returncode == 0, done.stderr
    found, summary = json.loads(done.stdout), json.loads((finished / "summary.json").read_text())
    assert {role: values["top1"] for role, values in found.items()} == {
        role: pytest.approx(summary[role]["top1"]) for role in ("teacher", "student", "baseline")
    }
    assert "student by Factor Transfer" in factor_transfer("evaluate", finished).stdout


@pytest.mark.usefixtures("unexported")
def test_distill__is_the_same_from_python_and_from_the_shell(finished: Path, tmp_path: Path) -> None:
    result = job(tmp_path / "run")
    assert bits(tmp_path / "run") == bits(finished)
    assert state_fingerprint(result.student.state_dict()) == bits(finished)["student.safetensors"]
    assert not result.student.training


@pytest.mark.usefixtures("unexported")
def test_distill__a_seed_owns_the_student_alone(finished: Path, tmp_path: Path) -> None:
    job(tmp_path / "other", seed=1, epochs=1)
    one, other = bits(finished), bits(tmp_path / "other")
    for name, same in (("teacher", True), ("paraphraser", True), ("student", False), ("baseline", False)):
        assert (one[f"{name}.safetensors"] == other[f"{name}.safetensors"]) is same, name


def test_distill__reads_settings_from_yaml_and_flags_win(
    finished: Path, tmp_path: Path, factor_transfer: Command
) -> None:
    (tmp_path / "job.yaml").write_text(
        "data: digits\nteacher: cifar_resnet20\nstudent: cifar_resnet20_b\nepochs: 7\nbaseline: false\n"
        "teacher_args: {layers: [1, 1, 1], channels: [8, 16, 32]}\n"
        "student-args: {layers: [1, 1, 1], channels: [4, 8, 16]}\n"
        f"teacher_weights: {finished / 'teacher.safetensors'}\nparaphraser: {finished / 'paraphraser.safetensors'}\n"
        "lr: 0.05\nbatch_size: 32\nthreads: 1\ndevice: cpu\ntrain_images: 320\n"
    )
    done = factor_transfer(
        "distill", "--config", "job.yaml", "--epochs", "3", "--out", "run", cwd=tmp_path, exports=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["settings"]["epochs"], summary["settings"]["lr"]) == (3, 0.05)
    assert bits(tmp_path / "run")["student.safetensors"] == bits(finished)["student.safetensors"], (
        "what was given is used"
    )


@pytest.mark.parametrize(
    ("signum", "code", "stage"),
    [
        pytest.param(signal.SIGINT, 130, "teacher", marks=pytest.mark.slow),
        (signal.SIGKILL, -9, "student"),
        pytest.param(signal.SIGTERM, 143, "student", marks=pytest.mark.slow),
    ],
)
def test_distill__the_same_command_continues(
    finished: Path, tmp_path: Path, factor_transfer: Command, signum: signal.Signals, code: int, stage: str
) -> None:
    flags = [*FLAGS, "--out", "run"]
    process = Started(["distill", *flags, "--checkpoint-minutes", "0.0001"], cwd=tmp_path, exports=False)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob(f"{stage}-*.sha256")):
        assert time.monotonic() < deadline
        assert process.running(), process.finished().stderr
        time.sleep(0.01)
    process.send_signal(signum)
    stopped = process.finished()
    assert stopped.returncode == code, stopped.stderr
    assert "Traceback" not in stopped.stderr
    if signum != signal.SIGKILL:
        assert "the same command continues" in stopped.stderr
    again = factor_transfer("distill", *flags, cwd=tmp_path, exports=False)
    assert again.returncode == 0, again.stderr
    assert bits(tmp_path / "run") == bits(finished)
    rows = [(row["stage"], row["epoch"]) for row in Run(tmp_path / "run").metrics()]
    assert rows == [(row["stage"], row["epoch"]) for row in Run(finished).metrics()]


OWN: dict[str, Any] = {**JOB, "teacher_args": None, "student_args": None, "teacher_epochs": 8, "teacher_lr": 0.5,
                       "paraphraser_epochs": 1, "epochs": 1, "baseline": False}  # fmt: skip
"""Of networks that are given as modules."""


class Small(nn.Module):
    """A user's own network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.body(images)).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("unexported")
def test_distill__takes_modules_and_leaves_them_as_they_are(tmp_path: Path) -> None:
    teacher, student = Small(16).train(), Small(4).train()
    before = [state_fingerprint(module.state_dict()) for module in (teacher, student)]
    result = distill(teacher, student, "digits", out=str(tmp_path / "run"), **OWN)
    assert result.summary["teacher"]["layer"] == "body"
    assert isinstance(result.student, Small)
    assert before == [state_fingerprint(module.state_dict()) for module in (teacher, student)]
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


class Branching(Small):
    """A network whose path depends on its input, which torch.export does not take."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) if images.sum() > 0 else super().forward(images) * 2


def test_distill__a_student_that_cannot_be_exported_is_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = distill(Small(16), Branching(4), "digits", out=str(tmp_path / "run"), **OWN)
    assert "student.pt2 was not written" in capsys.readouterr().err
    assert not (tmp_path / "run" / "student.pt2").exists()
    assert result.summary["student"]["pt2_error"]
    assert (tmp_path / "run" / "student.safetensors").exists()


class Drifting(Small):
    """A teacher that goes on counting inside forward, whatever mode it is put in."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(images)


def test_distill__a_teacher_that_changes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="weights or buffers changed while it taught"):
        distill(Drifting(16), Small(4), "digits", out=str(tmp_path / "run"), **OWN)
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_evaluate_run__never_measures_other_weights(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / f"{name}.safetensors"
    state = load_file(path)
    state["linear.bias"][0] += 1
    save_file(state, path)
    with pytest.raises(RunError, match=f"a {name} with other weights than"):
        evaluate_run(tmp_path / "run")
    path.unlink()
    with pytest.raises(ModelError, match=f"(?s){name}.safetensors.*no such file"):
        evaluate_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "summary.json", "environment.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"epochz": 3}'])
def test_distill__a_damaged_run_folder_is_named(finished: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    if name == "environment.json" and content.startswith("{"):
        return  # it only says what changed since
    with pytest.raises(RunError, match=r"\.json|other settings"):
        job(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "gpu"}, "(?s)--device gpu.*cuda"),
        ({"precision": "fp16"}, "(?s)--precision fp16.*bf16"),
        ({"epochs": "2"}, "--epochs '2'"),
        ({"beta": "autoo"}, "--beta autoo"),
        ({"teacher_std": (0.2, 0.0, 0.2)}, "--teacher-std"),
        ({"scale": ()}, "(?s)--scale.*2 numbers"),
        ({"student_args": {"act_layer": nn.SiLU}}, '(?s)--student-args act_layer=.*SiLU.*a class.*valid:.*"silu"'),
        ({"teacher_args": {"kinds": {"act": ["silu", nn.SiLU()]}}}, "(?s)--teacher-args kinds=.*of type SiLU"),
        ({"student_args": {"rates": {1: 0.5}}}, "(?s)--student-args rates=.*1 is of type int"),
    ],
)
def test_distill__checks_what_python_gives(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unexported")
def test_evaluate__of_a_run_made_of_modules_says_why_it_cannot(tmp_path: Path, factor_transfer: Command) -> None:
    distill(Small(16), Small(4), "digits", out=tmp_path / "run", **OWN)
    done = factor_transfer("evaluate", tmp_path / "run")
    assert done.returncode == 2
    assert "was given in Python as a module, Small" in done.stderr


@pytest.mark.usefixtures("unexported")
def test_distill__a_teacher_near_chance_is_an_error_with_likely_causes(finished: Path, tmp_path: Path) -> None:
    state = load_file(finished / "teacher.safetensors")
    for name in ("linear.weight", "linear.bias"):
        state[name] = torch.zeros_like(state[name])
    state["linear.bias"][3] = 1  # the same answer for every image
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(TrainingError, match="(?s)chance is 10.00.*--teacher-mean.*--class-map"):
        job(tmp_path / "run", teacher_epochs=0, teacher_weights=tmp_path / "w.safetensors")
    with pytest.raises(TrainingError, match="(?s)train on from --teacher-weights .*teacher.safetensors"):
        job(tmp_path / "trained", lr=1e-6, teacher_epochs=1)
    assert (tmp_path / "trained" / "teacher.safetensors").exists()


@pytest.mark.usefixtures("unexported")
def test_distill__says_that_a_paraphraser_is_collapsed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A given one, whose factor is its biases for every image."""
    state = load_file(finished / "paraphraser.safetensors")
    state["conv2.weight"] *= 1e-4
    with safe_open(finished / "paraphraser.safetensors", framework="pt") as file:
        save_file(state, tmp_path / "p.safetensors", file.metadata())
    given = {"teacher_epochs": 0, "teacher_weights": finished / "teacher.safetensors", "baseline": False, "epochs": 1}
    result = job(tmp_path / "run", **given, paraphraser=tmp_path / "p.safetensors")
    assert "the paraphraser is collapsed: its factor is nearly the same for every image" in capsys.readouterr().err
    assert result.summary["paraphraser"]["factor_variety"] < 1e-4
    job(tmp_path / "well", **given, paraphraser=finished / "paraphraser.safetensors")
    assert "collapsed" not in capsys.readouterr().err


def test_distill__an_untrained_teacher_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="(?s)no trained weights.*--teacher-weights.*--teacher-epochs"):
        job(tmp_path / "run", teacher_epochs=0)


def test_distill__other_data_or_weights_do_not_continue_a_run(finished: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes((finished / "teacher.safetensors").read_bytes())
    given = {"teacher_epochs": 0, "teacher_weights": str(weights), "out": tmp_path / "run", "lr": 1e30}
    with pytest.raises(TrainingError, match="not finite"):
        job(**given)
    state = load_file(weights)
    state["linear.bias"][0] += 1e-6
    save_file(state, weights)
    with pytest.raises(RunError, match="--teacher has other weights than when"):
        job(**given)


def test_evaluate_run__refuses_other_classes(finished: Path, images: Path) -> None:
    from dataclasses import replace

    from factor_transfer.training.run_folder import saved_config

    with pytest.raises(
        ConfigError, match="(?s)classes that the run does not know: class0, class1.*those of the run: 0, 1"
    ):
        evaluate_run(finished, replace(saved_config(finished), data=str(images)))


def test_evaluate__measures_the_classes_that_are_there(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from factor_transfer.config import DataConfig
    from factor_transfer.data.dataset import open_data

    split = open_data(DataConfig(data="digits"), default_size=lambda: 8).validation
    (batch,) = split.batches([np.flatnonzero(split.labels == 3)], view=None)
    (tmp_path / "some" / "3").mkdir(parents=True)
    for number, image in enumerate(batch.image):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "some" / "3" / f"{number}.png")
    found = evaluate_run(finished, DataConfig(data=str(tmp_path / "some")))
    assert "9 of 10 classes have no images here, and are not measured: 0, 1, 2, 4" in capsys.readouterr().err
    network = rebuild(finished, "student").classifier.eval()
    right = (network(batch.image).detach().argmax(1) == 3).float().mean()
    assert found["student"]["top1"] == pytest.approx(100 * float(right))


@pytest.mark.parametrize("flag", ["--data-dir", "--label-column", "--image-column"])
def test_evaluate__refuses_what_it_would_not_read(finished: Path, factor_transfer: Command, flag: str) -> None:
    done = factor_transfer("evaluate", finished, flag, "x")
    assert done.returncode == 2
    assert f"error: {flag} x\n  found: no --data" in done.stderr


def test_rebuild__names_the_networks_there_are(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        rebuild(tmp_path, "student")
    with pytest.raises(RunError, match="teacher, baseline, student"):
        rebuild(finished, "nobody")


def test_distill__names_a_setting_that_it_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="(?s)epoch=.*epochs"):
        job(tmp_path, epoch=3)


def test_default_out__is_safe_in_a_path() -> None:
    config = Config(data="/x/../my photos/", teacher="local-dir:/a b/c", student="test_vit.r160_in1k", seed=3)
    assert default_out(config) == "runs/my_photos-local_dir_a_b_c-test_vit.r160_in1k-s3"


def test_distill__settings_that_differ_between_processes_leave_an_old_run_as_it_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(_: Engine, value: Any) -> list[Any]:
        return [value, {**value, "seed": 3}] if isinstance(value, dict) and "seed" in value else [value]

    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run)
    monkeypatch.setattr(Engine, "all_of", two)
    with pytest.raises(RunError, match="--seed"):
        job(run, overwrite=True)
    assert contents(run) == before


def test_interrupted__is_not_caught_as_an_error() -> None:
    assert not issubclass(Interrupted, ValueError)


@pytest.mark.slow
def test_distill__runs_under_torchrun(finished: Path, tmp_path: Path) -> None:
    """Two processes see each image once a pass, agree on every weight, and write one run folder."""
    place = FLAGS.index("--teacher-epochs")
    flags = [*FLAGS[:place], "--teacher-weights", str(finished / "teacher.safetensors"), *FLAGS[place + 2 :]]
    command = ["--nproc-per-node", "2", "-m", "factor_transfer", "distill", *flags, "--out", "run"]
    done = Started(command, code=TORCHRUN, cwd=tmp_path, forks=True, exports=False).finished()
    assert done.returncode == 0, done.stderr
    two, one = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "run", finished))
    assert two["environment"]["processes"] == 2
    assert two["fingerprints"]["teacher"] == one["fingerprints"]["teacher"]
    assert two["teacher"]["top1"] == pytest.approx(one["teacher"]["top1"])
    assert len(Run(tmp_path / "run").metrics()) == 2 + 3 + 3
    assert set(bits(tmp_path / "run")) == set(bits(finished)) - {"teacher.safetensors"}


@pytest.mark.usefixtures("unexported")
@pytest.mark.usefixtures("unexported")
def test_distill__takes_the_users_own_augmentation_and_knows_it_again(tmp_path: Path) -> None:
    def lighter(image: Image.Image) -> Image.Image:
        return image.point(lambda value: min(255, value + random.randrange(32)))

    settings = {"epochs": 1, "teacher_epochs": 2, "paraphraser_epochs": 1, "baseline": False, "workers": 0}
    first = job(tmp_path / "run", transform=lighter, **settings)
    assert first.summary["settings"]["transform"] == "lighter"
    assert job(tmp_path / "run", transform=lighter, **settings).summary == first.summary
    (tmp_path / "run" / "summary.json").unlink()

    def lighter(image: Image.Image) -> Image.Image:  # type: ignore[no-redef]
        return image

    with pytest.raises(RunError, match="--data holds other images"):
        job(tmp_path / "run", transform=lighter, **settings)
