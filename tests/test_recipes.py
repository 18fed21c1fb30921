"""The shipped recipes: settings that exist, networks at full size, two steps of each stage, the authors' schedule."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from factor_transfer.config import FIELDS, Config
from factor_transfer.networks.load import load_network
from factor_transfer.settings import RECIPES, recipes
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import environment, open_run
from factor_transfer.training.schedule import Plan, optimizer_and_schedule
from factor_transfer.training.stages import Job
from factor_transfer.util.files import state_fingerprint
from processes import Command

AUTHORS = "cifar10-resnet56-resnet20"
OWN: dict[str, Any] = {"data": "photos", "teacher": "cifar_resnet56", "student": "cifar_resnet20"}
"""What a recipe without networks or images leaves to its user."""

SLOW = {"imagenet-resnet34-resnet18", "cifar10-wrn46-4-vgg13", "cifar100-resnet110-resnet56"}


def settings(name: str, **changed: Any) -> Config:
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return Config(**{**OWN, **values, **changed})


def fake_images(folder: Path, classes: int, side: int, count: int) -> Path:
    """Noise, in as many class folders as there are images."""
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for place in range(count):
            where = folder / split / f"{place % classes:04}"
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(where / f"{place}.png")
    return folder


def see_once(module: nn.Module, side: int) -> None:
    """Batch statistics as of a network that has seen images: without them deep maps grow beyond all bounds."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        module.train()(torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", recipes())
def test_recipes__are_settings_with_a_line_on_each(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert set(yaml.safe_load(text)) <= set(FIELDS)
    assert 20 < len(recipes()[name]) < 100
    settings(name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in recipes()]
)
def test_recipes__train_their_networks_for_two_steps(name: str, tmp_path: Path) -> None:
    """Every stage after the teacher's, with the recipe's losses, optimizer and views, on full-size networks."""
    asked = settings(name)
    usual = 28 if asked.data == "fashion" else 32
    classes, side = (1000, 224) if "imagenet" in name else (100 if "cifar100" in name else 10, asked.img_size or usual)
    # A head for other classes, so that the teacher need not know what is on noise: its features teach.
    teacher = load_network(asked.teacher, role="teacher", num_classes=7, img_size=side, args=asked.teacher_args)
    see_once(teacher.module, side)
    save_file(teacher.module.state_dict(), tmp_path / "teacher.safetensors")
    (tmp_path / "classes.txt").write_text("".join(f"{place:04}\n" for place in range(classes)))
    reduced: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "paraphraser_epochs": 1, "batch_size": 2}
    if asked.sched == "multistep":
        reduced["decay_milestones"] = (1,)  # within the one pass
    config = settings(
        name,
        **reduced,
        data=str(fake_images(tmp_path / "images", classes, side, 4)),
        class_map=str(tmp_path / "classes.txt"),
        teacher_weights=str(tmp_path / "teacher.safetensors"),
        teacher_epochs=0,
        train_images=None,
        baseline=False,
        device="cpu",
        threads=1,
        workers=0,
    )
    engine = Engine("cpu", config.precision, 1)
    with open_run(tmp_path / "run", config, environment(**engine.describe())) as run:
        job = Job(config, engine, run, {})
        assert (len(job.data.classes), job.data.img_size) == (classes, side)
        pair = job.pair()
        first = state_fingerprint(pair.student.network.module.state_dict())
        job.teacher(pair.teacher)
        student = job.student(pair, job.paraphrasers(pair))
        assert student.network.module(torch.zeros(2, 3, side, side)).shape == (2, classes)
        assert state_fingerprint(student.network.module.state_dict()) != first
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["paraphraser", "student"]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_recipes__the_authors_program_has_their_rates_pass_by_pass_and_their_optimizer() -> None:
    """train_student.py: range(0, 163 + 1) passes; 0.1, x0.1 by MultiStepLR([82, 123]) at the end of each pass."""
    config, parameters = settings(AUTHORS), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plan = Plan(stage="student", epochs=config.epochs, lr=config.lr, seed=0)
    optimizer, scheduler = optimizer_and_schedule(parameters, plan, config, 391)
    theirs = torch.optim.SGD(parameters.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    their_schedule = torch.optim.lr_scheduler.MultiStepLR(theirs, milestones=[82, 123], gamma=0.1)
    assert config.epochs == 163 + 1
    for epoch in range(config.epochs):
        (ours,), (wanted,) = optimizer.param_groups, theirs.param_groups
        for setting in ("lr", "momentum", "weight_decay", "nesterov", "dampening"):
            assert ours[setting] == pytest.approx(wanted[setting]), (epoch, setting)
        assert len(ours["params"]) == len(wanted["params"])
        for step in range(391):
            scheduler.step_update(epoch * 391 + step + 1)
        scheduler.step(epoch + 1)
        theirs.step()
        their_schedule.step()


def test_recipes__the_authors_program_has_their_settings() -> None:
    config = settings(AUTHORS)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    assert (config.k, config.p, config.beta, config.reconstruction) == (0.5, 1, 500, "l1")
    assert (config.paraphraser_epochs, config.paraphraser_lr) == (5 + 1, 0.1)
    assert (config.batch_size, config.precision, config.crop_padding, config.hflip) == (128, "fp32", 4, 0.5)
    assert (config.model_ema, config.clip_grad, config.views, config.factor_batch_norm) == (False, None, 0, False)
    assert (config.label_weight, config.kd_weight, config.warmup_epochs) == (1.0, 0.0, 0)
    student = load_network(config.student, role="student", num_classes=10, img_size=32, args=config.student_args)
    assert (student.mean, student.std) == (mean, std)
    assert (tuple(config.teacher_mean or ()), tuple(config.teacher_std or ())) == (mean, std)
    assert {config.teacher, config.student} == {"cifar_resnet56_b", "cifar_resnet20_b"}


def test_config__names_a_recipe_and_flags_win(factor_transfer: Command, tmp_path: Path) -> None:
    """The run keeps the settings of the recipe, but for those that a flag names."""
    data = fake_images(tmp_path / "images", 2, 16, 4)
    done = factor_transfer(
        "distill", "--config", f"recipe:{AUTHORS}", "--data", data, "--epochs", 130, "--beta", 7, "--out", "run",
        "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no trained weights" in done.stderr  # the teacher's are the user's to give
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    recipe = yaml.safe_load((RECIPES / f"{AUTHORS}.yaml").read_text())
    assert {name: kept[name] for name in recipe} == recipe | {"epochs": 130, "beta": 7}


def test_config__an_unknown_recipe_gets_near_names(factor_transfer: Command, tmp_path: Path) -> None:
    done = factor_transfer("doctor", "--config", "recipe:small_data", "--data", "digits", cwd=tmp_path)
    assert done.returncode == 2
    assert re.search(
        r"--config recipe:small_data\n.*no such recipe\n.*small-data\n.*factor-transfer recipes", done.stderr
    )
    assert "Traceback" not in done.stderr


def test_recipes__are_listed_with_a_line_each(factor_transfer: Command) -> None:
    done = factor_transfer("recipes")
    assert done.returncode == 0
    for name, what in recipes().items():
        assert f"recipe:{name}\n    {what}\n" in done.stdout
