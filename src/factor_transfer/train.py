"""The one training loop and the one evaluation, used by every stage.

Whatever happens in step s of pass e is a function of the settings, e and s: the order, the views and the noise inside
layers are addressed (see `views`), the learning rate is timm's function of the step. So a checkpoint holds weights,
optimizer, position and sums, and a run that continues from it ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from torch import nn

from factor_transfer.config import Config
from factor_transfer.console import PassBar, formatted, pass_bar, say
from factor_transfer.engine import Engine, StopRequest, stop_signals
from factor_transfer.errors import ConfigError, TrainingError, near
from factor_transfer.runs import Run
from factor_transfer.seeds import part_seed
from factor_transfer.splits import Batch, Split
from factor_transfer.views import permutation

BY_PASSES = ("multistep", "step")
"""Schedules that always go by passes: by updates, timm would drop one pass later for the same milestone."""

SCHEDULES = ("cosine", "multistep", "step", "constant", "poly", "tanh", "wsd", "rsqrt")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one stage is trained; what is not here comes from the settings."""

    stage: str
    epochs: int
    lr: float
    seed: int
    """Owns the noise inside layers."""
    views: int = 0
    """Pass e shows view e mod `views`; 0: every pass a view of its own."""
    average: bool = False
    """Keep an average of the weights over steps (--model-ema)."""
    constant: bool = False
    """Hold the learning rate (the paraphraser's program) instead of following --sched."""


@dataclass
class Progress:
    """Where training stands, and the sums of the pass under way."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, images: int, values: dict[str, float]) -> None:
        """Add the values of one step, as sums over images."""
        self.step += 1
        for name, value in {"images": 1.0, **values}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * images

    def means(self) -> dict[str, float]:
        """Averages over the images of the pass so far."""
        images = self.sums.get("images", 0.0)
        return {name: value / images for name, value in self.sums.items() if name != "images"}

    def next_pass(self) -> None:
        """Begin the next pass."""
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}


class Trainer:
    """One stage's training; `fit` runs it to its end, or on from the run folder's checkpoint.

    Args:
        task: gives `loss` (and `output`, logits) for images and labels; its `trainable_module` is trained in place.
        plan: passes, learning rate and seed of this stage.
        train: the images.
        engine: device, processes and precision.
        config: optimizer, schedule, batch size and the seed of order and views.
        run: metrics and checkpoints go there.
        validation: where given, the network is evaluated on it after every pass, for the curves.
    """

    def __init__(
        self,
        task: TrainingTask,
        plan: Plan,
        train: Split,
        engine: Engine,
        config: Config,
        run: Run,
        validation: Split | None = None,
    ) -> None:
        self.task, self.plan, self.engine, self.config, self.run = task, plan, engine, config, run
        self.train, self.validation = train, validation
        self.steps = len(_chunks(np.arange(len(train)), config.batch_size, least=2 * engine.processes))
        engine.place(task)
        self.module: nn.Module = task.get_trainable_module()
        if plan.average:
            task.setup_ema(decay=config.model_ema_decay, use_warmup=True)
        self.optimizer, self.scheduler = optimizer_and_schedule(self.module, plan, config, self.steps)
        self.progress = self._restore()

    def fit(self) -> Progress:
        """Train to the last pass.

        Returns:
            The progress at the end; its `seconds` count training only, over all interruptions.

        Raises:
            Interrupted: a signal came; the state is saved.
            TrainingError: the loss is no longer finite; the last good checkpoint is kept.
        """
        self.task.trainable_module = self.engine.wrap(self.module)
        with stop_signals() as stop:
            while self.progress.epoch < self.plan.epochs:
                self._pass(stop)
                self._end_pass()
                stop.leave_if_any()
        self.task.trainable_module = self.module
        return self.progress

    def _pass(self, stop: StopRequest) -> None:
        """The rest of the pass under way."""
        progress, plan = self.progress, self.plan
        view = progress.epoch % plan.views if plan.views else progress.epoch
        order = permutation(self.config.data_seed, progress.epoch, len(self.train))
        chunks = _chunks(order, self.config.batch_size, least=2 * self.engine.processes)[progress.step :]
        saved = started = time.monotonic()
        before = progress.seconds
        self.task.train()
        with pass_bar(f"{plan.stage} {progress.epoch + 1}/{plan.epochs}", len(self.train)) as bar:
            self._show(bar, round(progress.sums.get("images", 0)))
            parts = [self.engine.shard(chunk, by_host=bool(plan.views)) for chunk in chunks]
            batches = self.train.batches(parts, view=view)
            for chunk, batch in zip(chunks, batches, strict=True):
                values = self._step(batch, len(chunk), view)
                progress.add(len(chunk), values)
                progress.seconds = before + time.monotonic() - started
                self._show(bar, len(chunk))
                late = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
                if (late or stop.signum) and progress.step < self.steps:
                    self._save()
                    saved = time.monotonic()
                    stop.leave_if_any()

    def _step(self, batch: Batch, size: int, view: int) -> dict[str, float]:
        """One update from this process's part of a batch of `size` images; the values are means over all of it."""
        engine, task = self.engine, self.task
        update = self.progress.epoch * self.steps + self.progress.step
        torch.manual_seed(part_seed(self.plan.seed, "noise", self.plan.stage, update, engine.rank))
        images, labels = batch.image.to(engine.device), batch.label.to(engine.device)
        with engine.autocast():
            result = task(images, labels, batch.index, view)
        share = len(labels) / size
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over processes, and the parts of one batch can differ in size.
        (result["loss"] * (share * engine.processes)).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        if self.config.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.config.clip_grad, norm)
        values = {name: value.detach() for name, value in result.items() if name != "output"} | {"gradient_norm": norm}
        if result["output"] is not None:
            values["train_top1"] = 100 * (result["output"].detach().argmax(1) == labels).float().mean()
        totals = engine.total(torch.stack([value.float() for value in values.values()]) * share)
        means = dict(zip(values, totals.tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise self._not_finite(f"the loss, {formatted(means)}")
        if not norm.isfinite():
            raise self._not_finite(f"the gradient, where {formatted(means)}")
        self.optimizer.step()
        self.scheduler.step_update(update + 1)
        task.update_ema(step=update)
        return means

    def _end_pass(self) -> None:
        """Evaluate, write the pass down, and save."""
        progress, plan = self.progress, self.plan
        average = self.task.get_trainable_module(ema=True)
        for module in (self.module, average):
            if module is not None:
                self.engine.average_buffers(module)
        row = {"lr": self.optimizer.param_groups[0]["lr"], **progress.means()}
        if self.validation is not None:
            found = evaluate(
                self.task.trained().classifier(), self.validation, self.engine, batch_size=self.config.batch_size
            )
            row |= {f"validation_{name}": value for name, value in found.items()}
        if not all(map(math.isfinite, row.values())):
            raise self._not_finite(formatted(row))
        self.run.log(plan.stage, progress.epoch + 1, {**row, "seconds": round(progress.seconds, 3)})
        for watcher in self.run.watchers:
            watcher(self, row)
        shown = {name: value for name, value in row.items() if name not in {"lr", "gradient_norm"}}
        say(f"{plan.stage} {progress.epoch + 1}/{plan.epochs}  {formatted(shown)}  {progress.seconds:.0f} s")
        progress.next_pass()
        self.scheduler.step(progress.epoch)
        self._save()

    def _save(self) -> None:
        if not all(tensor.isfinite().all() for tensor in self.module.state_dict().values()):
            raise self._not_finite("the weights, after the last step")
        ema = self.task.get_trainable_module(ema=True)
        state = {
            "progress": vars(self.progress),
            "module": self.module.state_dict(),
            "ema": ema.module.state_dict() if ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
        }
        self.run.save_checkpoint(self.plan.stage, self.progress.epoch, self.progress.step, state)

    def _restore(self) -> Progress:
        state = self.run.load_checkpoint(self.plan.stage)
        progress = Progress(**state["progress"]) if state is not None else Progress()
        self.run.trim_metrics(self.plan.stage, progress.epoch)
        if state is not None:
            self.module.load_state_dict(state["module"])
            if state["ema"] is not None:
                self.task.get_trainable_module(ema=True).module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            say(f"{self.plan.stage}: continued after {progress.epoch} passes and {progress.step} steps")
        return progress

    def _not_finite(self, what: str) -> TrainingError:
        plan, progress = self.plan, self.progress
        return TrainingError(
            f"{plan.stage}: not finite in pass {progress.epoch + 1}, step {progress.step + 1}: {what}",
            found=f"--lr {plan.lr:g}, --beta {self.config.beta}",
            valid="finite losses; the last good checkpoint is kept",
            hint="give a lower --lr or --beta, --clip-grad 5, or --precision fp32, with another --out or --overwrite",
        )

    def _show(self, bar: PassBar, images: int) -> None:
        if images:
            means = self.progress.means()
            bar(images, {name: means[name] for name in ("loss", "train_top1") if name in means})


def evaluate(
    model: nn.Module, images: Split | Sequence[Split], engine: Engine, *, batch_size: int = 128, precise: bool = False
) -> dict[str, float]:
    """`top1` in percent and `loss` (cross-entropy) of `model`, each image counted once.

    Args:
        model: uint8 images (B, 3, H, W) -> logits (B, N); evaluated in eval mode, and left in the mode it was in.
        images: a split or several, shown without augmentation.
        engine: device and processes.
        batch_size: images a step, over all processes.
        precise: compute in float32 whatever the precision of training.
    """
    engine.place(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    sums = torch.zeros(3, device=engine.device)  # right, loss, images
    splits = [images] if isinstance(images, Split) else images
    with torch.no_grad():
        for batch in chain.from_iterable(_shown(split, batch_size, engine) for split in splits):
            labels = batch.label.to(engine.device)
            with torch.autocast(engine.device.type, enabled=False) if precise else engine.autocast():
                logits = model(batch.image.to(engine.device))
            right = (logits.argmax(1) == labels).sum()
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            sums += torch.stack([right.float(), loss, torch.full_like(loss, len(labels))])
    for module, mode in training.items():
        module.training = mode
    right, loss, count = engine.total(sums).tolist()
    return {"top1": 100 * right / count, "loss": loss / count}


def _shown(split: Split, batch_size: int, engine: Engine) -> Iterator[Batch]:
    """This process's part of a split, as evaluation shows it."""
    parts = [engine.shard(chunk) for chunk in _chunks(np.arange(len(split)), batch_size)]
    return split.batches([part for part in parts if len(part)], view=None)


def optimizer_and_schedule(
    module: nn.Module, plan: Plan, config: Config, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimizer over all of `module`, and timm's schedule for `steps` updates a pass.

    Raises:
        ConfigError: timm knows no such optimizer or schedule, or the schedule's settings contradict each other.
    """
    if config.sched not in SCHEDULES:
        raise ConfigError(f"--sched {config.sched}", found="no such schedule", valid=SCHEDULES)
    if config.opt not in list_optimizers():
        close = near(config.opt, list_optimizers())
        raise ConfigError(f"--opt {config.opt}", found="no such optimizer in timm", valid=close or list_optimizers())
    try:
        known = signature(get_optimizer_class(config.opt, bind_defaults=False)).parameters
        optimizer = create_optimizer_v2(
            module,
            opt=config.opt,
            lr=plan.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=config.filter_bias_and_bn,
            **({"fused": True} if "fused" in known else {}),  # one kernel for all weights
        )
    except (ImportError, AssertionError, RuntimeError) as error:  # of a package or device that is not here
        raise ConfigError(f"--opt {config.opt}", found=f"it does not run here: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise ConfigError(f"--opt {config.opt}", found="an optimizer of second order", valid="one of first order")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="constant" if plan.constant else config.sched,
            num_epochs=plan.epochs,
            decay_epochs=config.decay_epochs,
            decay_milestones=list(config.decay_milestones),
            decay_rate=config.decay_rate,
            min_lr=config.min_lr,
            warmup_lr=config.warmup_lr,
            warmup_epochs=0 if plan.constant else config.warmup_epochs,
            step_on_epochs=not config.sched_on_updates or config.sched in BY_PASSES,
            updates_per_epoch=steps,
        )
    except (ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"--sched {config.sched}", found=str(error)) from error
    return optimizer, scheduler


def _chunks(indices: np.ndarray, size: int, least: int = 1) -> list[np.ndarray]:
    """`indices` in batches of `size`; a rest of fewer than `least` goes with the batch before it.

    Batch norm cannot train on one image, and every process needs one.
    """
    starts = list(range(0, len(indices), size))
    if len(starts) > 1 and len(indices) - starts[-1] < least:
        starts.pop()
    return [indices[start:end] for start, end in zip(starts, [*starts[1:], len(indices)], strict=True)]
