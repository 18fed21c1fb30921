"""A finished run, read back: its networks with their weights, and its images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from factor_transfer.config import Config, DataConfig, part_of
from factor_transfer.data.dataset import Dataset, open_data
from factor_transfer.networks.load import TORCHVISION, Network, Role, load_network
from factor_transfer.networks.weights import load_weights
from factor_transfer.tasks.base import task_of
from factor_transfer.training.run_folder import saved_config
from factor_transfer.training.summary import Summary, read_summary
from factor_transfer.util.arguments import as_size
from factor_transfer.util.errors import ConfigError, RunError
from factor_transfer.util.files import state_fingerprint


def rebuild(folder: Path, role: str, module: nn.Module | None = None) -> Network:
    """A network of a finished run (`teacher`, `student` or `baseline`), with its weights.

    Args:
        folder: the run.
        role: which network.
        module: the network itself, where it was given to `distill` as a module.

    Raises:
        RunError: the run is not finished, or has no such network.
        ModelError: its weights are missing or do not fit.
    """
    config, summary = saved_config(folder), read_summary(folder)
    if role not in summary.networks:
        raise RunError(str(folder), found=f"no {role}", valid=list(summary.networks))
    side: Role = "teacher" if role == "teacher" else "student"
    own, there = vars(config), summary.networks[role]
    if module is None and there.is_module:
        raise RunError(
            str(folder),
            found=f"its {side} was given in Python as a module, {own[side]}, which no command can build",
            hint=f"in Python: from factor_transfer.training.finished import rebuild; rebuild(folder, {role!r}, module)",
        )
    trained_here = side == "student" or config.teacher_epochs > 0
    recorded = {name: getattr(there, name) for name in ("img_size", "mean", "std", "model_args")}
    network = build_again(config, side, recorded, len(summary.data.classes), module, trained=trained_here)
    if trained_here:
        file = folder / f"{role}.safetensors"
        load_weights(network.module, file, str(file))
    if there.fingerprint is not None and state_fingerprint(network.module.state_dict()) != there.fingerprint:
        raise RunError(
            str(folder),
            found=f"a {role} with other weights than those that were trained and measured here",
            hint="put the file of weights back, or distil again with another --out",
        )
    return network


def answers(config: Config, role: str, network: Network) -> bool:
    """Whether a network of a run has a head that was trained to tell the classes apart.

    Args:
        config: the run's settings.
        role: which network.
        network: itself.
    """
    if role == "teacher":
        return network.knows_classes or bool(config.teacher_epochs)
    return bool(config.label_weight or config.kd_weight)


def build_again(
    config: Config, side: Role, there: Mapping[str, Any], classes: int, module: nn.Module | None, *, trained: bool
) -> Network:
    """A network of a run, as its settings and what was recorded of it build it.

    Args:
        config: the run's settings.
        side: teacher or student.
        there: its `img_size`, `mean`, `std` and `model_args`.
        classes: of the data.
        module: the network itself, where it was given as a module.
        trained: it was trained in the run, so that its first weights do not matter.
    """
    own = vars(config)
    args = dict(own[f"{side}_args"] or {})
    if trained and module is None and own[side].startswith(TORCHVISION):
        recorded = {**there["model_args"]}  # with what torchvision's weights set, which are not fetched again
        args = {name: recorded[name] for name in recorded.keys() - {"architecture", "num_classes"}} | args
    return load_network(
        own[side] if module is None else module,
        role=side,
        num_classes=classes,
        img_size=as_size(there["img_size"]),
        args=args,
        weights=None if trained else own[f"{side}_weights"],
        output=own[f"{side}_output"],
        mean=tuple(there["mean"]),
        std=tuple(there["std"]),
        dense=task_of(config.task).dense,
    )


def open_images(shown: DataConfig, summary: Summary, others: bool = False) -> Dataset:
    """The images that `shown` names, as the networks of a finished run see them.

    Args:
        shown: the images.
        summary: the run's.
        others: they are other images than the run's own, all there to be measured; classes may be absent.

    Raises:
        DataError: the images are missing or unreadable.
        ConfigError: their classes are not those of the run.
    """
    settings = {**part_of(shown, DataConfig), "img_size": summary.data.img_size, "transform": None}
    if others:  # numbered as the run numbers them
        settings |= {"class_map": None, "train_images": None, "validate_on": "validation"}
    known = summary.data.classes if others else None
    dense = task_of(summary.settings.get("task", "classification")).dense
    images = open_data(DataConfig(**settings), lambda: as_size(summary.data.img_size), known=known, masked=dense)
    if list(images.classes) != summary.data.classes:
        raise ConfigError(
            f"--data {images.name}",
            found=f"classes {', '.join(images.classes[:8])}",
            valid=f"those of the run: {', '.join(summary.data.classes[:8])}",
        )
    return images
