"""Look before the hours are spent: one batch through everything, nothing written, and what to mend.

Whatever `distill` checks on opening is checked by the same code; here its mistakes become findings beside the others.

Shapes: B images, C channels, K factor channels, H x W a feature map, N classes.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn

from factor_transfer.config import Config, Rgb
from factor_transfer.data.dataset import Dataset
from factor_transfer.data.splits import Batch, Sample, Split
from factor_transfer.method.factor_transfer import factor_channels
from factor_transfer.method.losses import width_of
from factor_transfer.method.slim import WIDTH
from factor_transfer.method.term import StudentOutputs
from factor_transfer.networks.features import FrozenTeacher, maps, tensor_in, watching
from factor_transfer.networks.layers import follower
from factor_transfer.networks.load import InputNorm, Network, Role, count_parameters
from factor_transfer.networks.pair import Modules, Pair, Side, check_alive
from factor_transfer.rehearsal import rehearse
from factor_transfer.tasks.base import check_knows
from factor_transfer.tasks.metric import Metric
from factor_transfer.training.chunks import images_of_update
from factor_transfer.training.engine import Engine
from factor_transfer.training.evaluation import answers, evaluate
from factor_transfer.training.objective import fresh_paraphrasers
from factor_transfer.training.orders import misordered
from factor_transfer.training.price import Price, price_of
from factor_transfer.training.run_folder import Run
from factor_transfer.training.stages import Job
from factor_transfer.training.step import DistillationTask, TeacherSide, Trainee
from factor_transfer.util.arguments import written
from factor_transfer.util.checks import flag
from factor_transfer.util.errors import FactorTransferError
from factor_transfer.util.files import state_fingerprint
from factor_transfer.util.seeds import seeded

SAMPLE, DENSE_SAMPLE = 512, 64
"""Images of each split that are looked at; fewer where each has a mask."""

NEGLIGIBLE, DROWNING = 0.1, 100.0
"""Sizes of the factor term, as multiples of the cross-entropy, below and above which one of the two hardly counts."""

NORMS: dict[str, tuple[Rgb, Rgb]] = {
    "ImageNet's": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "Inception's": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_MEAN),
    "CLIP's": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "none (pixels in 0..1)": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""Normalisations that teachers are usually trained with."""

Level = Literal["warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and which flag mends it."""

    level: Level
    what: str
    hint: str


@dataclass
class Diagnosis:
    """What was looked at, as tables (title, header, rows), and what was found wrong."""

    tables: list[tuple[str, Sequence[str], list[Sequence[str]]]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Exit code: 0 when fit to run, 1 with warnings, 2 when not."""
        levels = {finding.level for finding in self.findings}
        return 2 if "error" in levels else 1 if levels else 0


def diagnose(config: Config, modules: Modules | None = None) -> Diagnosis:
    """Look at data, networks, layers, factors and losses on one batch; nothing is written.

    Args:
        config: all settings of `distill`.
        modules: networks that are given as modules, by role.
    """
    found = Diagnosis()
    try:
        with tempfile.TemporaryDirectory(prefix="factor-transfer-") as nowhere:  # no one else can have put a run there
            _look(config, modules or {}, found, Run(Path(nowhere), writes=False))
    except FactorTransferError as error:
        found.findings.append(_finding("error", error))
    return found


def _finding(level: Level, error: FactorTransferError) -> Finding:
    what = [line.strip() for line in str(error).splitlines() if not line.startswith("  next:")]
    return Finding(level, "\n".join(what), error.hint or "")


def quick(config: Config, pair: Pair, images: Tensor) -> Iterator[Finding]:
    """What `distill` looks at first: settings and layers, within a second.

    Args:
        config: all settings.
        pair: teacher and student.
        images: a few, uint8 (B, 3, H, W).
    """
    channels = width_of(config, pair.teacher.shape[0]) or pair.teacher.shape[0]
    kept = factor_channels(channels, config.k)
    sides = [side for each in pair.each() for side in (each.teacher, each.student)]
    if config.factor_form == "slim" and config.beta and not any(width_of(config, side.shape[0]) for side in sides):
        what = f"--factor-form slim: no map has more than {config.factor_width or WIDTH} channels, so none is reduced"
        yield Finding("warning", what, "leave it out, or give a smaller --factor-width")
    if config.beta and config.paraphraser != "none" and kept < channels / 8:
        found = f"{kept} factor channels for {channels} that the paraphraser reads: little of the map is left"
        yield Finding("warning", f"--k {config.k:g}: {found}", "the paper uses --k 0.5 to 1")
    for name in ("lr", "paraphraser_lr"):
        adaptive = "adam" in config.opt or config.opt.startswith(("lion", "lamb"))
        unused = name == "paraphraser_lr" and (config.paraphraser is not None or not config.beta)
        if adaptive and getattr(config, name) > 0.02 and not unused:
            what = f"{flag(name)} {getattr(config, name):g} with --opt {config.opt}: such optimizers diverge there"
            yield Finding("warning", what, f"{flag(name)} 1e-3")
    for side in sides:
        after = follower(side.network.module, side.layer, deepcopy(side.network.norm).cpu()(images[:2]))
        if after is not None:
            what = f"--{side.role}-layer {side.layer}: {after} is applied to it: the end of its group comes later"
            yield Finding("warning", what, f"leave --{side.role}-layer out, or name the layer after it")


def _look(config: Config, modules: Modules, found: Diagnosis, nowhere: Run) -> None:
    engine = Engine(config.device, config.precision, config.threads)
    job = Job(config, engine, nowhere, modules)
    found.findings += _data(job.data, config, job.task.headline)
    if job.data.pixels is not None:
        found.tables.append(("training masks", ("class", "of the pixels"), _pixels(job.data, job.data.pixels)))
    pair = job.pair()
    validation = Sample(job.data.validation, DENSE_SAMPLE if job.task.dense else SAMPLE)
    images = job.sample(min(config.batch_size, 64))
    found.tables.append(("networks", ("", "teacher", "student"), _networks(pair)))
    found.tables.append(("layers that give a map", ("", "layer", "map"), _layers(pair)))
    if pair.size == (1, 1):
        what = "the maps meet at 1x1: factors say what and not where"
        found.findings.append(Finding("warning", what, "a larger --img-size, or an earlier --teacher-layer"))
    if count_parameters(pair.student.network.module) >= count_parameters(pair.teacher.network.module):
        found.findings.append(Finding("warning", "the student is no smaller than the teacher", "a smaller --student"))
    found.findings += quick(job.config, pair, images)
    network = pair.teacher.network
    rehearse(job, pair)
    levels: dict[Role, Level] = {"teacher": "error", "student": "warning"}  # a student's head will be trained
    orders = {side.role: misordered(side, job.data, config, nowhere, engine) for side in (pair.teacher, pair.student)}
    found.findings += [_finding(levels[role], error) for role, error in orders.items() if error is not None]
    if config.teacher_epochs == 0:
        measures = job.data.labelled and network.knows_classes and orders["teacher"] is None
        found.findings += _teacher(pair.teacher, images, validation if measures else None, found, job)
    found.findings += _losses(job, pair, found)


# -- data


def _data(data: Dataset, config: Config, metric: Metric) -> Iterator[Finding]:
    for note in data.notes:
        if "no training images" in note or "no training pixels" in note:
            yield Finding("warning", f"--data: {note}", "add images, or take the class out of --class-map")
    for what, hint in data.lost:
        yield Finding("warning", f"--data: {what}", hint)
    if data.mixed is not None and (never := data.mixed.never_shown(config.epochs)):
        yield Finding("warning", f"--unlabelled: {never}", "more --epochs, or a larger --unlabelled-share")
    if images_of_update(config) > len(data.train):
        times = f" --grad-accum-steps {config.grad_accum_steps}" if config.grad_accum_steps > 1 else ""
        what = f"--batch-size {config.batch_size}{times} for {len(data.train)} training images: one step a pass"
        yield Finding("warning", what, f"--batch-size {max(2, len(data.train) // 10)}")
    counts = np.bincount(data.train.labels, minlength=len(data.classes))
    if data.pixels is None and counts.max() > 20 * max(counts.min(), 1):
        few = data.classes[int(counts.argmin())]
        what = f"--data: {counts.max():,} images of {data.classes[int(counts.argmax())]}, {counts.min():,} of {few}"
        yield Finding("warning", what, f"more images of {few}: {metric.label} will say little of it")
    pixels = Sample(data.train, SAMPLE if data.pixels is None else DENSE_SAMPLE).whole().image.int()
    grey = float(((pixels[:, 0] == pixels[:, 1]) & (pixels[:, 1] == pixels[:, 2])).flatten(1).all(1).float().mean())
    if 0 < grey < 1:
        what = f"--data: {grey:.0%} of the training images are grey, the others in colour"
        yield Finding("warning", what, "see that the grey ones belong there, and in every class")
    if data.frame.small:
        same = _hashes(data.train) & _hashes(data.validation)
        if same:
            what = f"--data: {len(same):,} images are in training and in validation: {metric.label} will look too good"
            yield Finding("warning", what, "remove them from one of the two")


def _pixels(data: Dataset, counts: Sequence[int]) -> list[Sequence[str]]:
    """The share of each class."""
    whole = max(sum(counts), 1)
    return [(name, f"{100 * count / whole:.2f} %") for name, count in zip(data.classes, counts, strict=True)]


def _hashes(split: Split) -> set[bytes]:
    chunks = np.array_split(np.arange(len(split)), -(-len(split) // 1024))
    return {image.numpy().tobytes() for batch in split.batches(chunks, view=None) for image in batch.image}


# -- the teacher


def _teacher(side: Side, images: Tensor, sample: Sample | None, found: Diagnosis, job: Job) -> Iterator[Finding]:
    """Its features and, where there is a `sample` that its head fits, its answers."""
    module = side.network.module
    before = state_fingerprint(module.state_dict())
    health = check_alive(side, images)
    if health.dead > 0.5:
        what = f"--teacher-layer {side.layer}: {health.dead:.0%} of its channels are the same for every image"
        yield Finding("warning", what, "check the teacher's normalisation and weights, or name another --teacher-layer")
    frozen = FrozenTeacher(TeacherSide(side.tapped(), side.network.norm, side.shape[1:]))
    one, two = (frozen(images)["feature"] for _ in range(2))
    if not torch.equal(one, two) or state_fingerprint(module.state_dict()) != before:
        what = "--teacher: its own code trains: the same images give other features, or its buffers change"
        yield Finding("error", what, "look for train(), dropout or writes to buffers in its forward")
        return
    if sample is None:
        return
    task, metric = job.task, job.task.headline
    model = _model(side, side.network.norm)
    value = evaluate(model, sample, job.engine, task, batch_size=64, precise=True)[metric.key]
    rows: list[Sequence[str]] = [(metric.label, metric.shown(value)), ("images", f"{len(sample):,} of validation")]
    found.tables.append(("teacher", ("", "on a sample"), rows))
    right = _right(model, sample, job)
    for name, (mean, std) in NORMS.items():
        other = _right(_model(side, InputNorm(mean, std, side.network.size)), sample, job)
        if other > right + max(3, 3 * 100 / len(sample) ** 0.5 * 0.5):
            what = f"--teacher: right on {right:.1f} % of a sample, on {other:.1f} % with another normalisation, {name}"
            if task.dense:
                what = f"--teacher: {metric.label} {right:.1f} % on a sample, {other:.1f} % with another norm, {name}"
            yield Finding("warning", what, f"--teacher-mean {_plain(mean)} --teacher-std {_plain(std)}")
            break
    if less := check_knows(task, value, sample.labels, job.data.classes, job.config.teacher):
        yield Finding("warning", less, "another teacher, or --teacher-epochs")


def _model(side: Side, norm: nn.Module) -> nn.Module:
    """A copy of the network, which the evaluation may move to another device."""
    return deepcopy(nn.Sequential(norm, side.network.module))


def _right(model: nn.Module, sample: Sample, job: Job) -> float:
    """Share of the images whose answer is their class, in percent; of a dense task the headline metric."""
    if job.task.dense:
        return evaluate(model, sample, job.engine, job.task, batch_size=8, precise=True)[job.task.headline.key]
    said, labels = answers(model, sample, job.engine, job.task, batch_size=64)
    return 100 * float((said == labels).mean())


# -- the losses


def _losses(job: Job, pair: Pair, found: Diagnosis) -> Iterator[Finding]:
    """One batch through teacher, paraphraser, student and translator: sizes, gradients, seconds."""
    config, data, objective = job.config, job.data, job.objective
    paraphrasers = fresh_paraphrasers(config, pair)
    sample = Sample(data.train, config.batch_size)
    (batch,) = sample.batches([np.arange(len(sample))], view=0)
    batch = batch._replace(label=job.task.targets(batch))
    network, readers = pair.teacher.tapped(objective.teacher_layers), objective.readers(paraphrasers)
    teacher = FrozenTeacher(TeacherSide(network, pair.teacher.network.norm, pair.size, readers=readers))
    task = job.student_task(pair.student, objective.terms, teacher)
    measured = pulls(task, batch)
    sizes = {name: pull.size for name, pull in measured.items()}
    own = pair.student.layer
    norms = {
        term.name: math.hypot(*map(measured[term.name].norms.__getitem__, term.taps or (own,))) for term in task.terms
    }
    task.train()
    seconds = min(_step_seconds(task, batch, job.engine) for _ in range(2))
    steps = len(job.chunks)
    found.tables.append(("losses on one batch", ("", "size", "gradient in the student's map"), [
        (name.replace("_", " "), f"{sizes[name]:.3g}", f"{norms[name]:.3g}") for name in sizes
    ]))  # fmt: skip
    rows: list[Sequence[str]] = []
    for each, factor in zip(pair.each(), objective.factors, strict=False):
        left = "" if config.paraphraser == "none" else "paraphraser -> "
        right = "" if config.translator == "none" else " <- translator"
        shape = "x".join(map(str, factor.shape))
        maps = f"{_shape(each.teacher)} -> {left}{shape}{right} <- {_shape(each.student)}"
        rows += [("shapes", maps), ("beta", f"{factor.beta:g}: its term is at most {factor.bound:.3g}")]
    view = 2 * sum(math.prod(shape or ()) for shape in objective.outputs.values())
    rows += [
        *_price(price_of(config, pair, objective, job.sample(2)), config, data),
        ("a pass of the student", f"about {seconds * steps:,.0f} s ({steps:,} steps), {job.engine.memory()}"),
        ("factor cache", f"{view * len(data.pool) / 1e9:.2f} GB a view; --views {job.views or 'not in use'}"),
    ]
    found.tables.append(("factor transfer" if config.beta else objective.method, ("", "value"), rows))
    yield from _weights(config, job.labels().name, sizes, norms)


def _price(price: Price, config: Config, data: Dataset) -> list[Sequence[str]]:
    """What the parts cost, in multiply-adds of one image's forward pass; and a step, beside the student's alone."""
    rows: list[Sequence[str]] = []
    for name, part in (("teacher", price.teacher), ("paraphraser", price.paraphraser), ("terms", price.terms),
                       ("student", price.student)):  # fmt: skip
        rows.append((name, f"{part.multiply_adds / 1e6:,.2f} million multiply-adds, {part.parameters:,} parameters"))
    rows += [("price", line.partition(": ")[2]) for line in price.lines(config, len(data.train), len(data.pool))]
    return rows


def _weights(config: Config, labels: str, sizes: Mapping[str, float], norms: Mapping[str, float]) -> Iterator[Finding]:
    """Whether factor term and the loss with labels, which has the name `labels`, are both heard."""
    if not all(np.isfinite([*sizes.values(), *norms.values()])):
        yield Finding("error", "the losses or their gradients are not finite on the first batch", "--precision fp32")
    if not {"factor_transfer", labels} <= sizes.keys():
        return
    ratio = sum(size for name, size in sizes.items() if name.startswith("factor_transfer")) / max(sizes[labels], 1e-9)
    beta = config.beta if config.beta == "auto" else f"{config.beta:g}"
    said = labels.replace("_", "-")
    if ratio < NEGLIGIBLE:
        what = f"--beta {beta}: the factor term is {ratio:.2g} of the {said}: the teacher will hardly be heard"
        yield Finding("warning", what, "--beta auto")
    elif ratio > DROWNING:
        what = f"--beta {beta}: the factor term is {ratio:.2g} times the {said}: the labels will drown"
        yield Finding("warning", what, "--beta auto")


def _step_seconds(task: nn.Module, batch: Batch, engine: Engine) -> float:
    task = engine.place(task)
    engine.settle()
    start = time.perf_counter()
    with engine.autocast():
        loss = task(batch.image.to(engine.device), batch.label.to(engine.device))["loss"]
    loss.backward()
    engine.settle()
    return time.perf_counter() - start


# -- what is shown


def _networks(pair: Pair) -> list[Sequence[str]]:
    sides = (pair.teacher, pair.student)
    networks = [side.network for side in sides]
    return [
        ("name", *(network.name for network in networks)),
        ("parameters", *(f"{count_parameters(network.module):,}" for network in networks)),
        ("images", *(written(network.size) for network in networks)),
        ("mean", *(_plain(network.mean) for network in networks)),
        ("std", *(_plain(network.std) for network in networks)),
        ("layer", *(side.layer for side in sides)),
        ("output", *(network.output or "one tensor" for network in networks)),
        ("classes", *(_classes(network) for network in networks)),
        ("map", *(_shape(side) for side in sides)),
    ]


def _layers(pair: Pair) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for side in (pair.teacher, pair.student):
        for layer, shape in maps(side.network.module, torch.zeros(2, 3, *side.network.size))[-4:]:
            rows.append((side.role, layer, "x".join(map(str, shape)) + (" *" if layer == side.layer else "")))
    return rows


def _classes(network: Network) -> str:
    """What its head is for."""
    return (
        "no head for the data's"
        if network.headless
        else "the data's, not yet trained"
        if network.new_head
        else "the data's"
    )


def _shape(side: Side) -> str:
    return "x".join(map(str, side.shape))


def _plain(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


# -- how hard each term pulls at the student's maps


class Pull(NamedTuple):
    """What a term does on one batch."""

    size: float
    """Its weighted loss."""
    norms: dict[str, float]
    """Norm of its gradient in the student's maps, by layer; only of those that it reads."""


def pulls(task: DistillationTask, batch: Batch) -> dict[str, Pull]:
    """Of each term of a task its size and pull, in training mode and float32; the task stays as it is.

    Args:
        task: student, terms and teacher.
        batch: at least two images.
    """
    trainee: Trainee = deepcopy(task.trainable_module).train()
    device = next(trainee.parameters()).device
    images, labels = batch.image.to(device), batch.label.to(device)
    outputs = {} if task.teacher is None else task.teacher(images)
    tapped, raw = trainee.student, dict[str, Any]()  # raw: a map may be a view beside the network's own way
    with seeded(0), ExitStack() as stack:
        for layer in tapped.layers:
            stack.enter_context(watching(tapped.module.get_submodule(layer), partial(raw.__setitem__, layer)))
        inputs = trainee.norm(images)
        output, features = tapped.maps(inputs)
        student = StudentOutputs(output, features[tapped.layer], features)
        losses = {name: term(student, outputs, labels) for name, term in trainee.terms.items()}
    found = {layer: tensor_in(each, tapped.module, inputs.shape[-2:]) for layer, each in raw.items()}
    read = {layer: tensor for layer, tensor in found.items() if tensor is not None}
    return {name: Pull(loss.item(), _norms(loss, read)) for name, loss in losses.items()}


def _norms(loss: Tensor, maps: dict[str, Tensor]) -> dict[str, float]:
    gradients = torch.autograd.grad(loss, list(maps.values()), retain_graph=True, allow_unused=True)
    return {layer: float(each.norm()) for layer, each in zip(maps, gradients, strict=True) if each is not None}
