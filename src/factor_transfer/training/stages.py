"""The stages of a run, each a method of `Job`; `distill` calls them in order.

Each is skipped where the run folder says that it is finished, and continued where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.data.balance import class_weights
from factor_transfer.data.views import VERSION, Transform
from factor_transfer.method.factor_transfer import Straight
from factor_transfer.method.losses import FactorTransfer, Labels
from factor_transfer.method.slim import AnyParaphraser
from factor_transfer.method.term import Reader, Term, numbered
from factor_transfer.networks.compiled import Compiled, check_compiler, check_exports
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.networks.load import Network, Role, count_parameters, own_size
from factor_transfer.networks.pair import Modules, Pair, Side, check_alive, load_side
from factor_transfer.networks.weights import load_weights, paraphraser_metadata
from factor_transfer.tasks.base import LabelLoss, check_knows, task_of
from factor_transfer.training.cache import CachedTeacher, behind_cache, choose_views, identity_of
from factor_transfer.training.compute import counted
from factor_transfer.training.engine import Engine
from factor_transfer.training.evaluation import evaluate, evaluate_paraphraser, say_paraphraser
from factor_transfer.training.form import with_form
from factor_transfer.training.images import NONE, UNLABELLED, batches_of, images_of, say_images, shown_for
from factor_transfer.training.objective import (
    Objective,
    fresh_paraphrasers,
    named_paraphrasers,
    new_paraphraser,
    trained_up_to,
)
from factor_transfer.training.paraphraser import train_paraphraser
from factor_transfer.training.price import Price, price_of
from factor_transfer.training.run_folder import FORM, Run, form_of
from factor_transfer.training.schedule import Plan
from factor_transfer.training.step import DistillationTask, TeacherSide
from factor_transfer.training.trainer import Trainer
from factor_transfer.util.console import begin, say, warn
from factor_transfer.util.errors import TrainingError
from factor_transfer.util.files import cache_folder, state_fingerprint
from factor_transfer.util.identity import code_fingerprint

SAMPLE = 64
"""Validation images on which the teacher's features are looked at, and an export is compared with its student."""


class Job:
    """One run: its data, machine and folder, and its stages.

    Args:
        config: all settings.
        engine: device, processes and precision.
        run: the open run folder.
        modules: networks given as modules, by role.
        transform: the user's own augmentation, where it is given as an object.

    Raises:
        DataError: the images are missing or unreadable.
        ConfigError: a process would have too few images of a batch.
    """

    def __init__(
        self, config: Config, engine: Engine, run: Run, modules: Modules, transform: Transform | None = None
    ) -> None:
        self.config, self.engine, self.run, self.modules = config, engine, run, modules
        self.given = config
        """The settings as they are given; `config` has the form that --factor-form auto chose."""
        self._compiled: dict[str, Compiled] = {}
        self.task = task_of(config.task)
        self.data = images_of(config, lambda: own_size(modules.get("student", config.student)), transform)
        self.chunks = batches_of(self.data, config, engine.processes)
        """Batches of one pass of the student: their sizes are those of every pass."""
        say_images(self.data, config)
        self.class_weights = class_weights(config.class_weights, self.data.train.labels, self.data.classes)
        """Of each class in the loss with labels; none: all count alike."""
        self.teacher_weights = ""
        """Fingerprint of the teacher that teaches."""
        self.code = ""
        """Of the teacher's code, with the versions of libraries."""

    # -- what all processes, and all continuations, have in common

    def hold(self, name: str, value: str, given: str, changed: str) -> None:
        """Hold a fingerprint to that of every process, and to what it was when the run began; see `Run.pin`.

        Args:
            name: of the fingerprint.
            value: the fingerprint.
            given: the flag that it depends on, or what it is of.
            changed: what is wrong with that where the run began with another fingerprint, as the rest of a sentence.
        """
        valid = f"the same {name} in all processes"
        self.engine.check_same(value, given, valid, f"give every process the same {given}")
        self.run.pin(name, value, f"{given} {changed}")

    def hold_data(self) -> None:
        """Hold the run to its images, and to how they are shown."""
        self.hold("pixels", str(VERSION), "images", "are decoded otherwise than by the version that began the run")
        changed = "holds other images than when the run began, or shows them otherwise"
        with self.engine.unhurried():  # to hash many images takes long, the first time
            fingerprint = self.data.fingerprint
            unlabelled = self.data.unlabelled_fingerprint or NONE
        self.hold("data", fingerprint, "--data", changed)
        begun, pinned = self.engine.told((self.run.begun, UNLABELLED in self.run.pins()))
        if pinned or {NONE} != {*self.engine.all_of(unlabelled)}:
            if begun and not pinned:
                self.run.pin(UNLABELLED, NONE, "")  # it began without them
            self.hold(UNLABELLED, unlabelled, "--unlabelled", changed)
        if self.class_weights:
            self.hold("class weights", repr(self.class_weights), "--class-weights", "gives others than before")

    def recorded(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage found, as the first process sees it; None if it is not finished."""
        return self.engine.told(self.run.recorded(stage))

    def record(self, stage: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """Mark a stage as finished, with its results, and what it cost where it trained."""
        return self.run.record(stage, counted(self.price, stage, found))

    # -- stage 0: both networks, and the teacher

    def pair(self) -> Pair:
        """Both networks, and the shapes that meet; what does not fit is found before any hours are spent."""
        if self.config.torchcompile:
            check_compiler(self.engine.device)
            if self.engine.device.type == "cpu":
                warn("--torchcompile: it is for GPUs; on a CPU it is not known to help")
        with self.engine.unhurried():  # one machine may have to fetch their weights
            pair = Pair(self.load("teacher"), self.load("student"))
        if self.config.torchcompile:
            for side in (pair.teacher, pair.student):
                tapped = deepcopy(side.tapped()).train(side is pair.student)
                check_exports(tapped, side.network.norm(self.sample(2)))
        for side in (pair.teacher, pair.student):
            # Now, since some networks write to their attributes when they run.
            code = code_fingerprint(side.network.module, versions=False)
            changed = "is built by other code than when the run began, or with other attributes"
            self.hold(f"{side.role} code", code, f"--{side.role}", changed)
        self.code = code_fingerprint(pair.teacher.network.module)
        first = state_fingerprint(pair.student.network.module.state_dict())
        self.hold("student", first, "--student", "has other first weights than when the run began")
        for each in pair.each():
            for side in (each.teacher, each.student):
                channels, *size = side.shape
                pooled = "" if tuple(size) == each.size else f", pooled to {each.size[0]}x{each.size[1]}"
                feature = f"{channels} channels of {size[0]}x{size[1]}{pooled}"
                say(f"{side.role}: {side.network.name}, layer {side.layer}, {feature}")
            if each.size == (1, 1):
                warn("the maps meet at 1x1: factors say what and not where (try another layer, or a larger --img-size)")
        before = self.engine.told(self.run.pins().get(FORM))
        self.config, why = with_form(self.config, pair, before)
        self.hold(FORM, form_of(self.config), "--factor-form", "was another when the run began")
        if self.given.factor_form == "auto" and self.config.beta and before is None:
            say(f"--factor-form auto: the {self.config.factor_form} form ({why})")
        kept = [paraphraser.factor_channels for paraphraser in fresh_paraphrasers(self.config, pair)]
        self.objective = Objective(self.config, pair, kept, len(self.data.classes), self.class_weights)
        if self.config.beta == "auto":
            factors = self.objective.factors
            for name, factor in zip(numbered("beta", len(factors)), factors, strict=True):
                self.hold(name, repr(factor.beta), "--beta", "auto set another beta when the run began")
        self.views = self._choose_views()
        self._pair = pair
        return pair

    @cached_property
    def price(self) -> Price:
        """What the run's parts cost. First asked for after the rehearsal, which says what cannot be computed."""
        return price_of(self.config, self._pair, self.objective, self.sample(2))

    def count(self) -> None:
        """Say what the run costs, and from then on what time it will take."""
        for line in self.price.lines(self.config, len(self.data.train), len(self.data.pool)):
            say(line)
        counts = len(self.data.train), len(self.data.pool), self.views, self.objective.hint_epochs
        costs = self.price.stages(self.config, *counts, shown=len(self.data.mixed or self.data.train)).items()
        begin({stage: cost for stage, cost in costs if self.recorded(stage) is None}, verbose=self.config.verbose)

    def _choose_views(self) -> int:
        """Views that are shown in turn; what `auto` chose when the run began stays, and holds for all processes."""
        config, run = self.config, self.run
        if config.views != "auto":
            return config.views
        before = self.engine.told(run.pins().get("views"))
        if before is not None:
            return int(before)
        shapes = list(self.objective.outputs.values())
        row_bytes = 2 * sum(math.prod(shape) for shape in shapes if shape is not None)
        chosen = 0
        if row_bytes and None not in shapes:
            folder = cache_folder(config.cache_dir)
            times = config.epochs // (self.data.mixed.passes if self.data.mixed else 1)  # that an image is shown
            room = self.engine.all_of(choose_views(row_bytes, len(self.data.pool), times, folder))
            chosen = min(room)
        self.hold("views", str(chosen), "--views", "auto chose otherwise when the run began")
        say(f"factor cache: --views auto chose {f'{chosen} views' if chosen else 'a live teacher'}")
        return chosen

    def teacher(self, side: Side) -> None:
        """The teacher, as loaded, or trained or fine-tuned here; evaluated before anything else."""
        config, run, metric = self.config, self.run, self.task.headline
        self._teacher = side
        if config.teacher_epochs:
            self._train_teacher(side)
        self.teacher_weights = state_fingerprint(side.network.module.state_dict())
        self.hold("teacher", self.teacher_weights, "--teacher", "has other weights than when the run began")
        for each in side.each():
            check_alive(each, self.sample(SAMPLE))
        knows = self.data.labelled and (bool(config.teacher_epochs) or side.network.knows_classes)
        found = self.recorded("teacher")
        if found is None or (knows and metric.key not in found):
            assessed = self._assess(side.network) if knows else {}
            found = self.record("teacher", {"seconds": 0.0, **(found or {}), **assessed})
        size = f"{count_parameters(side.network.module):,} parameters"
        if knows:
            measured = f"{metric.label} {metric.shown(found[metric.key])} on the validation images, in float32"
            say(f"teacher: {side.network.name}, {size}, {measured}")
            trained = run.path("teacher.safetensors") if config.teacher_epochs else None
            labels, classes = self.data.validation.labels, self.data.classes
            if less := check_knows(self.task, found[metric.key], labels, classes, config.teacher, trained):
                warn(less)
        else:
            say(f"teacher: {side.network.name}, {size}, its accuracy cannot be measured here: its features teach")

    def _train_teacher(self, side: Side) -> None:
        config, network = self.config, side.network
        if self.recorded("teacher") is not None:
            self._fetch(network, "teacher")
            return
        kind, usual = ("fine-tuning", config.lr / 10) if network.pretrained else ("training", config.lr)
        lr = config.teacher_lr or usual
        say(f"teacher: {kind} for {config.teacher_epochs} passes, learning rate {lr:g}")
        plan = Plan(stage="teacher", epochs=config.teacher_epochs, lr=lr, seed=config.data_seed)
        self.record("teacher", self._train(side, [self.labels(teacher=True)], None, plan))

    def sample(self, count: int) -> Tensor:
        """The first `count` validation images, or as many as there are twice over: uint8 (B, 3, S, S)."""
        (batch,) = self.data.validation.batches([np.arange(count) % len(self.data.validation)], view=None)
        return batch.image

    def _check_unchanged(self, stage: str, teacher: FrozenTeacher | CachedTeacher) -> None:
        """Prove that the teacher is as it was; what a changing one has taught is not kept.

        Raises:
            TrainingError: its weights or buffers have another hash than when the run began.
        """
        now = state_fingerprint(self._teacher.network.module.state_dict())
        if now == self.teacher_weights and teacher.unchanged():
            return
        self.run.forget(stage)
        raise TrainingError(
            f"--teacher {self.config.teacher}",
            found="its weights or buffers changed while it taught: its own code trains, or updates statistics",
            valid="a teacher that stays as it was",
            hint="look for code in its forward that writes to parameters or buffers in eval mode",
        )

    # -- stage 1: the paraphraser

    def paraphrasers(self, pair: Pair) -> list[AnyParaphraser | Straight]:
        """One for each pair of layers; none, where no factor is transferred."""
        if not self.config.beta:
            say("no factor transfer (--beta 0), so no paraphraser")
            return []
        if self.config.paraphraser == "none":
            say("no paraphraser: the factor is the teacher's feature map itself")
            return fresh_paraphrasers(self.config, pair)
        return [self._paraphraser(name, each, file) for name, each, file in named_paraphrasers(self.config, pair)]

    def _paraphraser(self, name: str, pair: Pair, file: str | None) -> AnyParaphraser:
        """The trained paraphraser, given in a file or trained here without labels; its error is measured either way."""
        config, run = self.config, self.run
        found = self.recorded(name)
        file = str(run.path(f"{name}.safetensors")) if found else file
        paraphraser = new_paraphraser(config, pair, file, name)
        assert not isinstance(paraphraser, Straight)
        if config.paraphraser is not None and found is None:
            weights = state_fingerprint(paraphraser.state_dict())
            self.hold(name, weights, "--paraphraser", "holds other weights than when the run began")
        if found is None:
            teacher = self._teacher_side(pair)
            training: dict[str, Any] = {"seconds": 0.0}
            if file is None:
                shown = self.data.pool, self.views, self.engine, config, run
                training = train_paraphraser(name, paraphraser, teacher, *shown)
            with self.engine.unhurried():  # each process sees all images, and one may be slower
                quality = evaluate_paraphraser(
                    paraphraser, teacher, self.data.validation, self.engine, batch_size=config.batch_size
                )
                self._check_unchanged(name, teacher)
            run.save_weights(name, paraphraser.state_dict(), paraphraser_metadata(paraphraser))
            found = self.record(name, {**quality, **training})
        weights, given = state_fingerprint(paraphraser.state_dict()), f"--paraphraser {file or 'that was trained here'}"
        self.engine.check_same(weights, given, "one paraphraser for all processes", "give --paraphraser one file")
        say_paraphraser(name, found)
        return paraphraser

    # -- stages 2 and 3: the student, and its baseline

    def student(self, pair: Pair, paraphrasers: Sequence[AnyParaphraser | Straight]) -> Side:
        """The student, by the terms that the settings name: by Factor Transfer, if there are paraphrasers."""
        teacher = self._teacher_side(pair, self.objective.readers(paraphrasers))
        found = {**self.objective.record, "views": self.views}
        for line in self.objective.lines():
            say(line)
        if not (self.config.label_weight or self.config.kd_weight):
            say("student: nothing trains a head, so it is not measured: what it has learned are features")
        if self.objective.hint_epochs:
            self._hint(pair)
        shown: FrozenTeacher | CachedTeacher = teacher
        if self.views and self.objective.outputs:
            identity = identity_of(pair, paraphrasers, self.objective, self.data, self.engine, self.code)
            shown = behind_cache(teacher, identity, self.objective, self.data, self.engine, self.views)
        try:
            return self._student("student", pair.student, self.objective.terms, shown, found)
        finally:
            if isinstance(shown, CachedTeacher):
                shown.cache.store.close()

    def _hint(self, pair: Pair) -> None:
        """FitNets' first stage: the student up to its guided layer, and a regressor, learn the teacher's hint."""
        config, network, term = self.config, pair.student.network, self.objective.hint()
        if self.recorded("hint") is not None:
            self._fetch(network, "hint")
            return
        epochs = self.objective.hint_epochs
        say(f"hint: {term.group.student} learns the teacher's {term.group.teacher} for {epochs} passes, teacher live")
        guided = replace(pair.student, layer=term.group.student)
        plan = Plan(stage="hint", epochs=epochs, lr=config.lr, seed=config.seed, views=self.views)
        teacher = self._teacher_side(pair, term.readers())
        with trained_up_to(guided.tapped(ends=True), network.norm(self.sample(2))):
            training = self._train(guided, [term], teacher, plan, ends=True)
        self._check_unchanged("hint", teacher)
        self.record("hint", training)

    def baseline(self) -> Side:
        """The same student trained on labels only, with the same initial weights, order, views and schedule."""
        return self._student("baseline", self.load("student"), [self.labels()], None, {})

    def _student(
        self,
        stage: Literal["student", "baseline"],
        side: Side,
        terms: Sequence[Term],
        teacher: FrozenTeacher | CachedTeacher | None,
        found: dict[str, Any],
    ) -> Side:
        """Train and evaluate one student, or fetch it from the run folder."""
        if self.recorded(stage) is not None:
            self._fetch(side.network, stage)
            return side
        epochs, lr, average = self.config.epochs, self.config.lr, self.config.model_ema
        plan = Plan(stage=stage, epochs=epochs, lr=lr, seed=self.config.seed, views=self.views, average=average)
        training = self._train(side, terms, teacher, plan)
        if teacher is not None:
            self._check_unchanged(stage, teacher)
        measured = self._assess(side.network) if self._measured(terms) else {}
        self.record(stage, {**measured, **training, **found})
        return side

    # -- what stages share

    def labels(self, *, teacher: bool = False) -> Labels:
        """The supervised loss by itself: of the baseline, or of a teacher that is trained here."""
        return self.task.labels(how=LabelLoss.of(self.config, self.class_weights, teacher=teacher))

    def load(self, role: Role) -> Side:
        """One of the two networks, as the settings name it, tapped."""
        data = self.data
        own, dense = self.modules.get(role), self.task.dense
        return load_side(role, self.config, len(data.classes), data.img_size, own, dense=dense)

    @staticmethod
    def student_task(
        side: Side, terms: Sequence[Term], teacher: nn.Module | None, *, ends: bool = False
    ) -> DistillationTask:
        """A network and its terms."""
        tapped = side.tapped([layer for term in terms for layer in term.taps], ends=ends)
        return DistillationTask(tapped, side.network.norm, terms, teacher)

    def _train(
        self, side: Side, terms: Sequence[Term], teacher: nn.Module | None, plan: Plan, *, ends: bool = False
    ) -> dict[str, Any]:
        """Train a network on its terms and save it under the stage's name; returns what is recorded of it.

        With `ends` the network runs no further than the side's layer.
        """
        network, task = side.network, self.student_task(side, terms, teacher, ends=ends)
        if self.config.torchcompile:
            self._compile(task, plan.stage)
        validation = self.data.validation if self._measured(terms) else None
        shown = shown_for(self.data, terms, self.config)
        trainer = Trainer(task, plan, shown, self.engine, self.config, self.run, validation)
        training = trainer.fit().record()
        trained = task.trained()
        network.module.load_state_dict(trained.student.module.state_dict())
        for term in trained.terms.values():
            if isinstance(term, FactorTransfer):  # no part of the student, but the report shows its factors
                self.run.save_weights(f"translator{term.number}", term.translator.state_dict(), {"format": "pt"})
        self.run.save_weights(plan.stage, network.module.state_dict(), {"format": "pt"})
        return training

    def _compile(self, task: DistillationTask, stage: str) -> None:
        """Have the trained network compiled, unless its head learns nothing.

        A graph gives a gradient to every weight, if only zero, and the optimizer would then decay those of the head.
        """
        if _train_head(task.terms):
            trainee = task.trainable_module
            trainee.student = Compiled(trainee.student, self._part(), trains=True)
        else:
            say(f"{stage}: not compiled, because nothing trains its head")

    def _part(self) -> int:
        """Images of a whole batch that this process computes."""
        return len(self.engine.shard(self.chunks[0]))

    def _measured(self, terms: Sequence[Term]) -> bool:
        """Whether the metrics mean something: there are labels, and something trains the head."""
        return self.data.labelled and _train_head(terms)

    def _fetch(self, network: Network, stage: str) -> None:
        """Load what `_train` saved."""
        path = self.run.path(f"{stage}.safetensors")
        load_weights(network.module, path, str(path))

    def _assess(self, network: Network) -> dict[str, float]:
        """The metrics on the validation images, in float32: that is what is shipped."""
        return evaluate(
            network.classifier,
            self.data.validation,
            self.engine,
            self.task,
            batch_size=self.config.batch_size,
            precise=True,
        )

    def _teacher_side(self, pair: Pair, readers: Mapping[str, Reader] | None = None) -> FrozenTeacher:
        tapped = pair.teacher.tapped(self.objective.teacher_layers)
        if self.config.torchcompile:
            tapped = self._compiled.setdefault(tapped.layer, Compiled(tapped, self._part(), trains=False))
        side = TeacherSide(tapped, pair.teacher.network.norm, pair.size, readers=readers)
        return self.engine.place(FrozenTeacher(side))


def _train_head(terms: Sequence[Term]) -> bool:
    return any(term.trains_head for term in terms)
