"""Try, before anything is trained, what a run does only at its end or only with its last batch.

There is a training step of every stage on its smallest batch. Every trained network is built again from its record,
with weights from a file, as later commands do, and evaluated on a single image. Disk space is checked. All this works
on copies and a few images.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from factor_transfer.config import plain
from factor_transfer.export.formats import export_pt2, metadata_of, plain_copy
from factor_transfer.method.factor_transfer import Straight
from factor_transfer.method.term import Reader
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.networks.pair import Pair, Side, check_can_teach
from factor_transfer.networks.weights import load_weights
from factor_transfer.training.finished import build_again
from factor_transfer.training.images import shown_for
from factor_transfer.training.objective import fresh_paraphrasers
from factor_transfer.training.run_folder import Run
from factor_transfer.training.stages import Job
from factor_transfer.training.step import DistillationTask, ParaphraserTask, TeacherSide, placed
from factor_transfer.util.arguments import is_callable_name
from factor_transfer.util.console import warn
from factor_transfer.util.errors import ConfigError, FactorTransferError, ModelError, RunError, first_line
from factor_transfer.util.seeds import seeded

ENOUGH = 8
"""Images of a trial step. If a step on so many fails, it also fails on more; only memory may still be short."""

COPIES = 12
"""Disk space that a stage needs, in sizes of its network: checkpoints (weights, optimizer, average) and exports."""

CLOSE = 1e-3
"""Largest difference of logits that count as the same, relative to the largest."""

Task = DistillationTask | ParaphraserTask


def rehearse(job: Job, pair: Pair) -> None:
    """Try what a run will do; nothing is kept.

    Raises:
        ConfigError: a batch too small to train on, or too large for the device.
        ModelError: a network that cannot be trained, evaluated or built again; and as `check_can_teach`.
        RunError: too little space in the run's folder.
    """
    check_can_teach(pair.teacher.network, job.config, job.data.labelled)
    trained = [pair.student] + ([pair.teacher] if job.config.teacher_epochs else [])
    _check_space(job, trained)
    sizes = [len(job.engine.shard(chunk)) for chunk in job.chunks]
    counts = [min([*sizes, ENOUGH])]
    counts += [max(sizes)] if job.engine.device.type != "cpu" else []  # whose memory it takes
    if job.config.teacher_epochs:
        task = _copied(job.student_task(pair.teacher, [job.labels(teacher=True)], None))
        _try_steps(job, task, counts, f"--teacher {pair.teacher.network.name}")
        _try_what_is_trained(job, pair.teacher, task.trained().student.module)
    for task, what in _paraphrasers(job, pair):
        _try_steps(job, task, counts, what)
    student = _student(job, pair)
    _try_steps(job, student, counts, f"--student {pair.student.network.name}")
    _try_what_is_trained(job, pair.student, student.trained().student.module)


def _check_space(job: Job, sides: list[Side]) -> None:
    """Room for checkpoints and what the run leaves."""
    if not job.run.writes:
        return
    tensors = [tensor for side in sides for tensor in side.network.module.state_dict().values()]
    needed = COPIES * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    free = shutil.disk_usage(job.run.folder).free
    if free < needed:
        raise RunError(
            f"--out {job.run.folder}",
            found=f"{free / 1e6:,.0f} MB free",
            valid=f"{needed / 1e6:,.0f} MB: checkpoints of weights and optimizer, and what the run leaves",
            hint="make room, or give --out on another disk",
        )


# -- training steps


def _copied(task: DistillationTask) -> DistillationTask:
    """The task with copies of all that it trains."""
    task.trainable_module = deepcopy(task.trainable_module)
    return task


def _teacher(pair: Pair, readers: Mapping[str, Reader] | None = None, also: tuple[str, ...] = ()) -> FrozenTeacher:
    """A copy of the teacher, frozen: the teacher itself may still have to be trained."""
    side = TeacherSide(pair.teacher.tapped(also), pair.teacher.network.norm, pair.size, readers=readers)
    return FrozenTeacher(deepcopy(side))


def _paraphrasers(job: Job, pair: Pair) -> list[tuple[ParaphraserTask, str]]:
    config = job.config
    if config.paraphraser is not None or config.paraphraser_epochs == 0:
        return []
    fresh = zip(fresh_paraphrasers(config, pair), pair.each(), strict=False)
    return [
        (ParaphraserTask(paraphraser, _teacher(each), config.reconstruction), f"--teacher-layer {each.teacher.layer}")
        for paraphraser, each in fresh
        if not isinstance(paraphraser, Straight)
    ]


def _student(job: Job, pair: Pair) -> DistillationTask:
    """The student's own task; and a step of its first stage, where it has one, is tried here."""
    objective = job.objective
    paraphrasers = fresh_paraphrasers(job.config, pair)
    teacher = _teacher(pair, objective.readers(paraphrasers), also=objective.teacher_layers)
    if objective.hint_epochs:
        term = objective.hint()
        hint = _teacher(pair, term.readers(), also=(term.group.teacher,))
        guided = replace(pair.student, layer=term.group.student)
        task = _copied(job.student_task(guided, [term], hint, ends=True))
        _try_steps(job, task, [min(ENOUGH, len(job.data.train))], f"--student-groups {term.group.student}")
    return _copied(job.student_task(pair.student, objective.terms, teacher))


def _try_steps(job: Job, task: Task, counts: list[int], what: str) -> None:
    """Try a training step for each number of images."""
    config, processes = job.config, job.engine.processes
    job.engine.place(task)
    for count in counts:
        error = _failure(partial(_step, job, task, count))
        if error is None:
            continue
        if isinstance(error, torch.OutOfMemoryError):
            raise ConfigError(
                f"--batch-size {config.batch_size}",
                found=f"{what}: no memory for a step on {count} images",
                hint="a smaller --batch-size, or --precision bf16 where the device has it",
            ) from error
        more = min(2 * ENOUGH, len(job.data.train))
        if more > count and _failure(partial(_step, job, task, more)) is None:
            share = f"{count} image{'s' * (count > 1)}" + (
                f" for each of {processes} processes" if processes > 1 else ""
            )
            raise ConfigError(
                f"--batch-size {config.batch_size}",
                found=f"{what} cannot train on a batch of {share}: {first_line(error)}",
                valid="more images: batch norm trains on more than one value a channel",
                hint="give a larger --batch-size, or fewer processes"
                if processes > 1
                else "give a larger --batch-size",
            ) from error
        raise ModelError(
            what,
            found=f"it fails in training, on {count} images: {first_line(error)}",
            valid="a network that runs forward and backward in training mode",
            hint="give another --img-size, or other arguments; what only training runs is at fault",
        ) from error


def _failure(run: Callable[[], object]) -> Exception | None:
    """The exception that `run` raises, if any. Errors of our own, with their message for the user, go through."""
    try:
        run()
    except FactorTransferError:
        raise
    except Exception as error:  # whatever a network's code raises
        return error
    return None


def _step(job: Job, task: Task, count: int) -> None:
    engine = job.engine
    shown = shown_for(job.data, task.terms, job.config) if isinstance(task, DistillationTask) else job.data.pool
    chunk = np.arange(count) if shown.known == 1 else shown.order(job.config.data_seed, 0)[:count]
    (batch,) = shown.batches([chunk], view=0)
    task.train()
    with seeded(0), engine.autocast():
        images, targets, known = placed(batch, job.task, shown.known, engine.device)
        result = task(images, targets, batch.index, 0, known)
    result["loss"].backward()


# -- what is trained


def _try_what_is_trained(job: Job, side: Side, trained: nn.Module) -> None:
    """Evaluate a network on one image and on two, and build it again; export what is the user's own."""
    network, given = side.network, f"--{side.role} {side.network.name}"
    module, images = plain_copy(trained), deepcopy(network.norm).cpu()(job.sample(2))
    both, again = _said(module, images, given), _said(module, images, given)
    one = _said(module, images[:1], given)
    if one.shape != both[:1].shape:
        raise ModelError(
            given,
            found=f"an output of {tuple(one.shape)} for one image, of {tuple(both.shape)} for two",
            valid=f"{tuple(both[:1].shape)} for one",
            hint="look for a squeeze, or a number of images that its code takes for granted",
        )
    steady = _same(both, again)
    if not (steady and _same(one, both[:1])):
        warn(f"{given}: what it says of an image is not the same each time, or depends on the others of its batch")
    other = _built_again(job, side, trained)
    if steady and not _same(_said(plain_copy(other), images, given), both):
        raise ModelError(
            given,
            found="built again from its settings, with the same weights, it gives other outputs",
            valid="a network that its arguments and its state dict tell in full",
            hint="look for values that it keeps elsewhere: attributes, or buffers that are not persistent",
        )
    if side.role == "student" and (side.role in job.modules or is_callable_name(network.name)):
        with tempfile.TemporaryDirectory() as folder:
            about = metadata_of(network, job.data, job.config.task)
            error = _failure(lambda: export_pt2(module, images, Path(folder) / "student.pt2", about))
        if error is not None:
            warn(f"{given}: student.pt2 will not be written ({first_line(error)}); student.safetensors will")


@torch.no_grad()
def _said(module: nn.Module, images: Tensor, given: str) -> Tensor:
    try:
        return torch.as_tensor(module(images))
    except FactorTransferError:
        raise
    except Exception as error:
        found = f"it fails on {len(images)} image{'s' * (len(images) > 1)} in evaluation: {first_line(error)}"
        raise ModelError(given, found=found, valid="any number of images") from error


def _same(one: Tensor, other: Tensor) -> bool:
    largest = float(other.abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and bool(((one - other).abs() <= CLOSE * largest).all())


def _built_again(job: Job, side: Side, trained: nn.Module) -> nn.Module:
    """The network as later commands build it, with the trained weights from a file."""
    network, config = side.network, job.config
    there = {name: getattr(network, name) for name in ("mean", "std")} | {"img_size": network.size}
    there["model_args"] = plain(network.model_args)
    module = job.modules.get(side.role)
    other = build_again(config, side.role, there, len(job.data.classes), module, trained=True).module
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        run.save_weights(side.role, trained.state_dict(), {"format": "pt"})
        try:
            load_weights(
                other,
                run.path(f"{side.role}.safetensors"),
                f"--{side.role} {network.name}, built again from its settings",
            )
        except ModelError as error:
            hint = "its constructor makes other networks each time, or from what is outside its arguments"
            raise ModelError(error.given, found=error.found, valid=error.valid, hint=hint) from error
    return other
