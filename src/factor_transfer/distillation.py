"""The whole job in one call: teacher, paraphraser, student, baseline, export. `_work` has them in order."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from factor_transfer.config import FIELDS, Config, DataConfig, plain
from factor_transfer.data.views import Transform
from factor_transfer.doctor import quick
from factor_transfer.export.formats import EXPORT_IMAGES, export_pt2, latency_ms, metadata_of
from factor_transfer.networks.load import Network, count_parameters
from factor_transfer.networks.pair import Modules, Pair, Side
from factor_transfer.rehearsal import rehearse
from factor_transfer.report.html import write_report
from factor_transfer.report.trackers import watched
from factor_transfer.tasks.base import task_of
from factor_transfer.training.compute import COUNTED, compute_of
from factor_transfer.training.engine import Engine
from factor_transfer.training.evaluation import summed
from factor_transfer.training.finished import answers, open_images, rebuild
from factor_transfer.training.orders import check_orders
from factor_transfer.training.processes import first_difference
from factor_transfer.training.run_folder import environment, open_run, saved_config, saved_summary
from factor_transfer.training.stages import Job
from factor_transfer.training.summary import DataSummary, NetworkSummary, Summary, read_summary
from factor_transfer.util.arguments import brief
from factor_transfer.util.checks import flag, of_a_machine
from factor_transfer.util.console import say, silence, warn
from factor_transfer.util.errors import ConfigError, RunError, first_line, listed, near
from factor_transfer.util.files import state_fingerprint, write_json


@dataclass(frozen=True)
class Distilled:
    """What `distill` returns: the run folder, its summary, and the trained student in eval mode on the CPU.

    The student gives logits (B, N); what else its network would give is left out.
    """

    folder: Path
    summary: dict[str, Any] = field(repr=False)
    student: nn.Module = field(repr=False)


def distill(teacher: str | nn.Module, student: str | nn.Module, data: str | Path, **settings: Any) -> Distilled:
    """Train `student` by Factor Transfer from `teacher` on the images in `data`.

    The same call again continues an interrupted run, and returns the result of a finished one.

    Args:
        teacher: a timm name, or a trained module that takes normalised images (B, 3, H, W) and gives logits (B, N).
        student: likewise. Modules are copied; the ones given stay as they are.
        data: `digits`, a folder of images, or a timm dataset name.
        **settings: the fields of `factor_transfer.config.Config`: the command line's flags, underscored. `transform`
            may be the function itself.

    Returns:
        The run folder, its `summary.json` as a dict, and the trained student.

    Raises:
        FactorTransferError: something that was given does not fit; the message says what to do.
        Interrupted: SIGINT or SIGTERM came; the state is saved.

    Example:
        >>> result = distill("cifar_resnet56", "cifar_resnet20", "photos/", teacher_weights="t.safetensors", epochs=20)
        ... # doctest: +SKIP
        >>> result.summary["student"]["top1"]  # doctest: +SKIP
    """
    unknown = [name for name in settings if name not in FIELDS]
    if unknown:
        raise ConfigError(f"{unknown[0]}=", found="no such setting", valid=near(unknown[0], FIELDS) or FIELDS)
    modules: Modules = {}
    if isinstance(teacher, nn.Module):
        modules, teacher = {**modules, "teacher": teacher}, type(teacher).__name__
    if isinstance(student, nn.Module):
        modules, student = {**modules, "student": student}, type(student).__name__
    transform: Transform | None = None
    if callable(settings.get("transform")):
        transform = settings["transform"]
        settings["transform"] = getattr(transform, "__name__", type(transform).__name__)
    plain = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}
    config = Config(teacher=teacher, student=student, data=os.fspath(data), **plain)
    return run_distillation(config, modules, transform)


def run_distillation(config: Config, modules: Modules | None = None, transform: Transform | None = None) -> Distilled:
    """`distill`, from settings; `modules` and `transform` are what was given as an object instead of by name."""
    engine = Engine(
        config.device,
        config.precision,
        config.threads,
        sync_bn=config.sync_bn,
        timeout_minutes=config.timeout_minutes,
    )
    if not engine.main:
        silence()
    folder = Path(config.out or default_out(config))
    now = environment(**engine.describe())
    with engine.together(), ExitStack() as stack:
        _check_settings(config, engine)  # before --overwrite empties a folder
        with engine.unhurried():  # one opens, and perhaps empties, the folder
            run = stack.enter_context(open_run(folder, config, now, writes=engine.main))
        hint = "give --out a folder on a file system that all can see"
        engine.check_same(run.identity(), f"--out {folder}", "one run folder for all processes", hint)
        if engine.told(run.summary is None):
            with watched(run, config):
                with engine.unhurried():  # to decode small images takes long, where they are not kept yet
                    job = Job(config, engine, run, modules or {}, transform)
                _work(job)
        else:
            say(f"{folder} is finished; nothing was changed (--overwrite starts it anew)")
        with engine.unhurried():
            if engine.main and not run.path("report.html").exists():
                _report(folder, modules or {}, engine)
    student = rebuild(folder, "student", (modules or {}).get("student"))
    return Distilled(folder, saved_summary(folder), student.module.eval())


def _check_settings(config: Config, engine: Engine) -> None:
    """Hold all processes to the same settings, but for those that each machine may have of its own.

    Raises:
        RunError: they differ.
    """
    own = of_a_machine(Config)  # what they name is compared by what it holds
    values = engine.all_of({name: value for name, value in config.to_dict().items() if name not in own})
    differing = first_difference(values)
    if differing is not None:
        name, _ = differing
        there = listed(list(dict.fromkeys(str(each[name]) for each in values)))
        valid = "one command on all machines"
        raise RunError(f"{flag(name)}: {there}", found="processes of one run with other settings", valid=valid)


def _work(job: Job) -> None:
    job.hold_data()
    pair = job.pair()
    for finding in quick(job.config, pair, job.sample(2)):
        warn(f"{finding.what} (next: {finding.hint})")
    if not job.engine.told(job.run.begun):
        with job.engine.unhurried():  # what fails may fail in one process alone, as for want of disk space
            rehearse(job, pair)
        check_orders(pair, job.data, job.config, job.run, job.engine)
    job.count()
    job.teacher(pair.teacher)
    paraphrasers = job.paraphrasers(pair)
    student = job.student(pair, paraphrasers)
    baseline = job.baseline() if job.config.baseline else None
    with job.engine.unhurried():
        finish(job, pair, student, baseline)


def finish(job: Job, pair: Pair, student: Side, baseline: Side | None) -> None:
    """Export the student, measure latency, and write summary.json."""
    run, data = job.run, job.data
    if not run.writes:
        return
    networks = [pair.teacher.network, student.network]  # the baseline is another student: it has that one's latency
    teacher_ms, student_ms = latency_ms([each.module for each in networks], [each.size for each in networks])
    exported = _export(job, student.network)
    summary = Summary(
        teacher=_described(job, "teacher", pair.teacher, teacher_ms),
        baseline=_described(job, "baseline", baseline, student_ms) if baseline is not None else None,
        student=_described(job, "student", student, student_ms, exported),
        method=job.objective.method,
        metrics=job.task.metrics,
        loss_name=job.labels().name,
        **job.objective.layers(),
        price=job.price.to_json(),
        compute=compute_of(run.all_recorded(), job.price, job.config.to_dict(), len(data.train)),
        paraphraser=run.recorded("paraphraser"),
        seconds={stage: found["seconds"] for stage, found in run.all_recorded().items()},
        data=DataSummary(
            name=data.name,
            train=len(data.train),
            unlabelled=data.unlabelled,
            validation=len(data.validation),
            img_size=data.img_size,
            classes=list(data.classes),
        ),
        fingerprints=run.pins(),
        settings=job.given.to_dict(),
        environment=run.environment(),
    )
    write_json(run.path("summary.json"), summary.to_json())


def _export(job: Job, network: Network) -> dict[str, Any]:
    """How far student.pt2 is from the student; or why there is none: hours of training are not lost to that."""
    try:
        images, about = job.sample(EXPORT_IMAGES), metadata_of(network, job.data, job.config.task)
        path = job.run.path("student.pt2")
        return {"pt2_difference": export_pt2(network.module, network.norm(images), path, about)}
    except Exception as error:  # torch.export raises whatever it meets in foreign code
        reason = first_line(error)
        warn(f"student.pt2 was not written ({reason}); student.safetensors is whole")
        return {"pt2_error": reason}


def _described(
    job: Job, role: str, side: Side, latency: float, exported: Mapping[str, Any] | None = None
) -> NetworkSummary:
    network, keys = side.network, {metric.key for metric in job.task.metrics}
    aside = {"seconds", "images", *COUNTED}
    found = {name: value for name, value in (job.run.recorded(role) or {}).items() if name not in aside}
    tensors = network.module.state_dict().values()
    return NetworkSummary(
        name=network.name,
        weights=network.origin or None,
        measured={name: value for name, value in found.items() if name in keys},
        more={name: value for name, value in found.items() if name not in keys} | dict(exported or {}),
        parameters=count_parameters(network.module),
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        latency_ms=latency,
        layer=side.layer,
        img_size=brief(network.size),
        mean=list(network.mean),
        std=list(network.std),
        model_args=plain(network.model_args),
        output=network.output,
        is_module=side.role in job.modules,
        fingerprint=state_fingerprint(network.module.state_dict()),
    )


def _report(folder: Path, modules: Modules, engine: Engine) -> None:
    """A report that cannot be made loses no run: it can be made later."""
    try:
        write_report(folder, modules, engine)
    except Exception as error:  # foreign code in a forward pass, a full disk
        warn(f"no report.html ({error}); make it with: factor-transfer report {folder}")


def evaluate_run(folder: Path, data: DataConfig | None = None, device: str = "auto") -> dict[str, dict[str, Any]]:
    """The task's metrics of every network of a finished run, in float32, by role.

    `classes` has the headline metric of each class by name, where the task has such a one (segmentation).

    Args:
        folder: the run.
        data: other images than the run's own, of some or all of the run's classes.
        device: auto, cpu, cuda or mps.

    Raises:
        RunError: there is no finished run in `folder`, its weights are not those that it measured, or none has a head.
        DataError: the images are missing or unreadable.
        ConfigError: there are classes that the run does not know.
    """
    config, summary = saved_config(folder), read_summary(folder)
    task = task_of(config.task)
    if not summary.data.classes:
        raise _headless(folder)
    images = open_images(data or config, summary, others=data is not None)
    if not images.labelled:
        raise ConfigError(
            f"--data {images.name}",
            found="images without labels, on which nothing can be measured",
            hint="give labelled images of the run's classes with --data; what has no head, measure by its features",
        )
    for note in images.notes:
        say(f"data: {note}")
    say(f"data: {images.name}, {len(images.validation):,} images")
    engine = Engine(device, config.precision, config.threads)
    found: dict[str, dict[str, Any]] = {}
    for role in summary.networks:
        if answers(config, role, network := rebuild(folder, role)):
            shown, size = images.validation, config.batch_size
            sums = summed(network.classifier, shown, engine, task, batch_size=size, precise=True)
            found[role] = {name: float(value) for name, value in task.values(sums, len(shown)).items()}
            parts = task.by_class(sums)
            if parts is not None:
                found[role]["classes"] = dict(zip(images.classes, parts, strict=True))
    if not found:
        raise _headless(folder)
    return found


def _headless(folder: Path) -> RunError:
    return RunError(
        str(folder),
        found="no network with a trained head: they give features",
        valid="a run with one",
        hint="measure features by a classifier of your own on them",
    )


def default_out(config: Config) -> str:
    """`runs/DATA-TEACHER-STUDENT-sSEED`, of characters that are safe in a path."""
    parts = (Path(config.data).name or config.data, config.teacher, config.student, f"s{config.seed}")
    return "runs/" + "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)
