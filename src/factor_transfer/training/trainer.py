"""The one training loop, used by every stage.

Whatever happens in step s of pass e is a function of the settings, e and s: the order, the views and the noise inside
layers are addressed (see `views`), the learning rate is timm's function of the step. So a checkpoint holds weights,
optimizer, position and sums, and a run that continues from it ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from factor_transfer.config import Config
from factor_transfer.data.splits import Batch, Split, View
from factor_transfer.method.health import first_bad_layer, not_finite
from factor_transfer.networks.features import untrained
from factor_transfer.tasks.base import task_of
from factor_transfer.training.cache import CachedTeacher
from factor_transfer.training.chunks import images_of_update, parts_in, training_chunks
from factor_transfer.training.engine import Engine, StopRequest, stop_signals
from factor_transfer.training.evaluation import evaluate
from factor_transfer.training.run_folder import Run
from factor_transfer.training.schedule import Plan, optimizer_and_schedule
from factor_transfer.training.step import DistillationTask, Known, ParaphraserTask, placed
from factor_transfer.util.console import PassBar, end_stage, formatted, pass_bar, say, say_pass, warn
from factor_transfer.util.errors import Interrupted, RunError, TrainingError
from factor_transfer.util.files import state_fingerprint
from factor_transfer.util.seeds import part_seed


@dataclass
class Progress:
    """Where training stands, and the sums of the pass under way."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    """Steps of all passes that left no trace, because loss or gradient was not finite."""
    in_a_row: int = 0
    """The last of them that followed each other."""
    sums: dict[str, float] = field(default_factory=dict)
    trained: int = 0
    """Images of all steps so far, the skipped ones included."""
    teacher: int = 0
    """Those on which the teacher ran."""
    teacher_alone: int = 0
    """Those on which it would have run if no other run had filled the factor cache."""

    def skip(self) -> None:
        """Count a step that left no trace."""
        self.step, self.skipped, self.in_a_row = self.step + 1, self.skipped + 1, self.in_a_row + 1

    def add(self, images: int, values: dict[str, float]) -> None:
        """Add the values of one step, as sums over images."""
        self.step, self.in_a_row = self.step + 1, 0
        for name, value in {"images": 1.0, **values}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * images

    def means(self) -> dict[str, float]:
        """Averages over the images of the pass so far."""
        images = self.sums.get("images", 0.0)
        return {name: value / images for name, value in self.sums.items() if name != "images"}

    def record(self) -> dict[str, Any]:
        """What is kept of a finished training: its seconds, its images, and its skipped steps where there were any."""
        images = {name: getattr(self, name) for name in ("trained", "teacher", "teacher_alone")}
        return {"seconds": self.seconds, "images": images} | ({"skipped_steps": self.skipped} if self.skipped else {})

    def next_pass(self) -> None:
        """Begin the next pass."""
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}


class Trainer:
    """One stage's training; `fit` runs it to its end, or on from the run folder's checkpoint.

    Args:
        objective: gives `loss` (and `output`, logits) for images and targets. Its `trainable_module` is trained in
            place, and its `troubles` are said after every pass.
        plan: passes, learning rate and seed of this stage.
        train: the images.
        engine: device, processes and precision.
        config: optimizer, schedule, batch size and the seed of order and views.
        run: metrics and checkpoints go there.
        validation: where given, the network is evaluated on it every `val_interval` passes and after the last one, for
            the curves.
    """

    def __init__(
        self,
        objective: DistillationTask | ParaphraserTask,
        plan: Plan,
        train: Split,
        engine: Engine,
        config: Config,
        run: Run,
        validation: Split | None = None,
    ) -> None:
        self.objective, self.plan, self.engine, self.config, self.run = objective, plan, engine, config, run
        self.train, self.validation = train, validation
        self.task = task_of(config.task)
        self.steps = len(training_chunks(np.arange(len(train)), images_of_update(config)))
        engine.place(objective)
        self.module: nn.Module = objective.get_trainable_module()
        if plan.average:
            objective.setup_ema(decay=config.model_ema_decay, use_warmup=True)
        self.teacher: nn.Module | None = objective.teacher
        self._collect()
        self.optimizer, self.scheduler = optimizer_and_schedule(self.module, plan, config, self.steps)
        self.progress = self._restore()

    def fit(self) -> Progress:
        """Train to the last pass.

        Returns:
            The progress at the end; its `seconds` count training only, over all interruptions.

        Raises:
            Interrupted: a signal came, to any of the processes; the state is saved.
            TrainingError: too many steps in a row were not finite; the last good checkpoint is kept.
        """
        with self._all_reached():
            self.objective.trainable_module = self.engine.wrap(self.module)
            self._collect()
            with stop_signals() as stop:
                while self.progress.epoch < self.plan.epochs and not self._enough():
                    self.run_pass(stop)
                    self._leave(self.engine.largest(stop.signum))
            end_stage(self.plan.stage)
            self.objective.trainable_module = self.module
        return self.progress

    def _enough(self) -> bool:
        """Whether the plan ends training here, by the passes that are written down, as the first process says."""
        rows = self.run.metrics(self.plan.stage) if self.plan.enough else []
        losses = [row["loss"] for row in rows if "loss" in row]  # a pass whose every step was skipped has none
        return self.plan.enough is not None and self.engine.told(self.plan.enough(losses, self.steps))

    @contextmanager
    def _all_reached(self) -> Iterator[None]:
        """Inside the block, with several processes, only weights that the loss depends on require a gradient.

        DDP expects a gradient of each such weight in every step. A head without labels gets none: one process leaves it
        as it is, and so do several with this.
        """
        trained = [weight for weight in self._weights if weight.requires_grad]
        reached = [True] * len(trained)
        if self.engine.processes > 1 and self.progress.epoch < self.plan.epochs:
            reached = [any(each) for each in zip(*self.engine.all_of(self._reached(trained)), strict=True)]
        beyond = [weight for weight, there in zip(trained, reached, strict=True) if not there]
        with untrained(beyond):
            yield

    def _reached(self, weights: Sequence[Tensor]) -> list[bool]:
        """Which weights the loss of the next step depends on; nothing of the step stays."""
        chunks, view = self._ahead()
        batch, *_ = self._shown(chunks[:1], view)
        buffers = [buffer.clone() for buffer in self._buffers]
        self.objective.train()
        images, labels, known = self._placed(batch)
        with self.engine.autocast():
            loss = self.objective(images, labels, batch.index, view, known)["loss"]
        gradients = torch.autograd.grad(loss, list(weights), allow_unused=True)
        for buffer, value in zip(self._buffers, buffers, strict=True):
            buffer.copy_(value)
        return [gradient is not None for gradient in gradients]

    def _ahead(self) -> tuple[list[np.ndarray], View]:
        """The batches that are left of the pass under way, and its view."""
        epoch, kept = self.progress.epoch, self.plan.views
        chunks = training_chunks(self.train.order(self.config.data_seed, epoch), images_of_update(self.config))
        return chunks[self.progress.step :], self.train.view(epoch, kept)

    def _shown(self, chunks: Sequence[np.ndarray], view: View) -> Iterator[Batch]:
        """This process's share of each part of the batches."""
        by_host = bool(self.plan.views) and self.train.known == 1  # or a part might be without labelled images
        parts = [part for chunk in chunks for part in np.array_split(chunk, parts_in(len(chunk), self.config))]
        parts = [self.engine.shard(part, by_host=by_host) for part in parts]
        return self.train.batches(parts, view=view)

    def _placed(self, batch: Batch) -> tuple[Tensor, Tensor, Known | None]:
        """Images and targets of a batch, on the device; and where not all are labelled, those that are."""
        return placed(batch, self.task, self.train.known, self.engine.device)

    def _collect(self) -> None:
        """Walk over the module's tensors once, and not in every step."""
        self._weights, self._buffers = list(self.module.parameters()), list(self.module.buffers())

    def run_pass(self, stop: StopRequest) -> None:
        """Train what is left of the pass under way, evaluate, and save.

        Raises:
            Interrupted: `stop` has a signal; the state is saved.
        """
        self._train_pass(stop)
        self._end_pass()

    def _train_pass(self, stop: StopRequest) -> None:
        """The rest of the pass under way."""
        progress, plan = self.progress, self.plan
        chunks, view = self._ahead()
        saved = started = time.monotonic()
        before = progress.seconds
        self.objective.train()
        with pass_bar(plan.stage, len(self.train), before=progress.epoch, passes=plan.epochs) as bar:
            self._show(bar, round(progress.sums.get("images", 0)))
            shown = self._shown(chunks, view)
            for chunk in chunks:
                parts = list(islice(shown, parts_in(len(chunk), self.config)))
                values = self.step(parts, len(chunk), view)
                if values is None:
                    progress.skip()
                else:
                    progress.add(len(chunk), values)
                progress.seconds = before + time.monotonic() - started
                self._show(bar, len(chunk))
                signum = self.engine.largest(stop.signum)  # any process's signal is for all
                late = time.monotonic() - saved > 60 * self.config.checkpoint_minutes
                if (late or signum) and progress.step < self.steps:
                    self._save()
                    saved = time.monotonic()
                    self._leave(signum)

    def step(self, parts: Sequence[Batch], size: int, view: View) -> dict[str, float] | None:
        """One update from this process's share of a batch of `size` images, which is computed in parts.

        Returns:
            Means over the whole batch; None where loss or gradient is not finite, and then nothing has changed.
        """
        engine, objective = self.engine, self.objective
        update = self.progress.epoch * self.steps + self.progress.step
        buffers, asked = [buffer.clone() for buffer in self._buffers], self._asked()
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        again, fresh, images = list[Callable[[], Any]](), 0, 0
        for part, batch in enumerate(parts):
            forward = partial(self._forward, batch, view, update, part)
            with self._reduced(last=part == len(parts) - 1):
                result, labels, weight = forward()
                share = len(batch.index) / size
                # Gradients are averaged over processes, and the parts of one batch can differ in size.
                (result["loss"] * (share * engine.processes)).backward()
            for name, value in self._values(result, labels, weight).items():
                sums[name] = sums.get(name, 0) + value.to(result["loss"].dtype) * share
            fresh += self.train.fresh(batch.index.numpy(), self.progress.epoch, self.plan.views)
            images += len(batch.index)
            again.append(forward)
        norm = nn.utils.get_total_norm([weight.grad for weight in self._weights if weight.grad is not None])
        if self.config.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self._weights, self.config.clip_grad, norm)
        sums["gradient_norm"] = norm.to(sums["loss"].dtype) * (images / size)
        counted = [sums["loss"].new_full((), value / size) for value in (self._asked() - asked, fresh)]
        *totals, live, new = engine.total(torch.stack([*sums.values(), *counted])).tolist()
        means = dict(zip(sums, totals, strict=True))
        self._count(size, round(live * size), round(new * size))
        # Sums over processes and the averaged gradient: all processes decide alike.
        if not (math.isfinite(means["loss"]) and norm.isfinite()):
            self._skip(means, lambda: [forward() for forward in again])
            for buffer, value in zip(self._buffers, buffers, strict=True):
                buffer.copy_(value)
            self.scheduler.step_update(update + 1)
            return None
        self.optimizer.step()
        self.scheduler.step_update(update + 1)
        engine.share_buffers(self.module)
        objective.update_ema(step=update)
        return means

    def _forward(self, batch: Batch, view: View, update: int, part: int) -> tuple[dict[str, Any], Tensor, float]:
        """Losses of a part of an update's batch; its labels, and the weight of a mean over them."""
        seed = (self.plan.seed, "noise", self.plan.stage, update, self.engine.rank, *([part] if part else []))
        images, labels, known = self._placed(batch)
        self.engine.seed_noise(part_seed(*seed))
        with self.engine.autocast():
            found: dict[str, Any] = self.objective(images, labels, batch.index, view, known)
        return found, labels, 1.0 if known is None else known.weight

    def _reduced(self, *, last: bool) -> AbstractContextManager[None]:
        """Inside the block, several processes add up their gradients, if the part is the last of its batch."""
        trained = self.objective.trainable_module
        whole = last or not isinstance(trained, DistributedDataParallel)
        return nullcontext() if whole else trained.no_sync()  # type: ignore[operator]

    def _values(self, result: Mapping[str, Any], labels: Tensor, weight: float) -> dict[str, Tensor]:
        """What the curves show of a part of a batch, as means over it; a place is kept for the gradient's norm."""
        values = {name: value.detach() for name, value in result.items() if name != "output"}
        values["gradient_norm"] = torch.zeros_like(values["loss"])
        if result["output"] is not None:
            shown = self.task.step(result["output"].detach(), labels)
            values |= {f"train_{name}": value * weight for name, value in shown.items()}
        return values

    def _asked(self) -> int:
        """Images that this process's teacher has been shown so far."""
        return int(getattr(self.teacher, "asked", 0))

    def _count(self, images: int, live: int, fresh: int) -> None:
        """Count the images of a step, and those of them that the teacher was shown, over all processes."""
        progress = self.progress
        progress.trained += images
        progress.teacher += live
        progress.teacher_alone += max(live, fresh) if self.teacher is not None else live  # their views are new

    def _skip(self, means: dict[str, float], forward: Callable[[], Any]) -> None:
        """Say what was not finite, and stop where that is so too often."""
        bad = [name for name in getattr(self.module, "terms", {}) if not math.isfinite(means[name])]
        what = " and ".join(bad) if bad else "loss" if not math.isfinite(means["loss"]) else "gradient"
        if self.progress.in_a_row < self.config.max_skipped:
            if not self.progress.in_a_row:
                place = f"pass {self.progress.epoch + 1}, step {self.progress.step + 1}"
                warn(f"{self.plan.stage}: {what} not finite in {place}; the step is skipped ({formatted(means)})")
            return
        self.objective.trainable_module = self.module
        layers = [found for found in self.engine.all_of(first_bad_layer(self.objective, forward)) if found]
        if not layers:  # backward comes to the last parameters first
            layers = not_finite((name, weight.grad) for name, weight in self.module.named_parameters())[:-2:-1]
        where = f", first in {layers[0].removeprefix('trainable_module.')}" if layers else ""
        raise self._not_finite(f"the {what}{where}; {formatted(means)}")

    def _leave(self, signum: int) -> None:
        """Leave training if a signal came, when all is saved.

        Raises:
            Interrupted: one came.
        """
        if signum:
            self.engine.wait()
            raise Interrupted(signum)

    def _end_pass(self) -> None:
        """Evaluate, write the pass down, and save."""
        progress, plan = self.progress, self.plan
        means = progress.means()
        row = {"lr": self.optimizer.param_groups[0]["lr"], **means}
        if self.validation is not None and self._measured():
            found = evaluate(
                self.objective.trained().classifier(),
                self.validation,
                self.engine,
                self.task,
                batch_size=self.config.batch_size,
            )
            row |= {f"validation_{name}": value for name, value in found.items()}
        if not all(map(math.isfinite, row.values())):
            raise self._not_finite(formatted(row))
        if progress.skipped:
            row["skipped_steps"] = progress.skipped
        for trouble in self.objective.troubles(means):
            warn(f"{plan.stage}: {trouble}")
        with self.engine.unhurried():  # a tracker may speak with a slow server
            self.run.log(plan.stage, progress.epoch + 1, {**row, "seconds": round(progress.seconds, 3)})
            for watcher in self.run.watchers:
                watcher(self, row)
        shown = {name: value for name, value in row.items() if name not in {"lr", "gradient_norm"}}
        say_pass(f"{plan.stage} {progress.epoch + 1}/{plan.epochs}  {formatted(shown)}  {progress.seconds:.0f} s")
        progress.next_pass()
        self.scheduler.step(progress.epoch)
        self._save()

    def _measured(self) -> bool:
        """Whether the pass under way is one that is measured."""
        ended = self.progress.epoch + 1
        return ended == self.plan.epochs or ended % self.config.val_interval == 0

    def _save(self) -> None:
        bad = not_finite(self.module.state_dict().items())
        if bad:
            raise self._not_finite(f"the weights of {bad[0]}, after the last step")
        if self.progress.in_a_row:
            return  # what makes these steps fail may be in the weights; the checkpoints before them are kept
        ema = self.objective.get_trainable_module(ema=True)
        state = {
            "progress": vars(self.progress),
            "module": self.module.state_dict(),
            "ema": ema.module.state_dict() if ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
        }
        self.run.save_checkpoint(self.plan.stage, self.progress.epoch, self.progress.step, state)

    def _restore(self) -> Progress:
        state = self.run.load_checkpoint(self.plan.stage)
        try:
            progress = Progress(**state["progress"]) if state is not None else Progress()
            if state is not None and "trained" not in state["progress"]:  # of a version that counted no images
                self._recount(progress)
            seen = state_fingerprint(state["module"]) if state is not None else ""
        except (KeyError, TypeError, AttributeError) as error:
            raise self._foreign(str(error)) from error
        self.engine.check_same(
            f"{progress.epoch} {progress.step} {seen}",
            str(self.run.path("checkpoints")),
            f"one newest checkpoint of {self.plan.stage} for all processes",
            "a file system that is slow to show new files: give the same command again",
        )
        self.run.trim_metrics(self.plan.stage, progress.epoch)
        if state is not None:
            try:
                self.module.load_state_dict(state["module"])
                if self.plan.average:
                    self.objective.get_trainable_module(ema=True).module.load_state_dict(state["ema"])
                self.optimizer.load_state_dict(state["optimizer"])
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise self._foreign(str(error)) from error
            say(f"{self.plan.stage}: continued after {progress.epoch} passes and {progress.step} steps")
        return progress

    def _recount(self, progress: Progress) -> None:
        """The images up to a checkpoint that does not tell them, as if this run had filled its cache alone."""
        sizes = list(map(len, training_chunks(np.arange(len(self.train)), images_of_update(self.config))))
        progress.trained = progress.epoch * len(self.train) + sum(sizes[: progress.step])
        if self.teacher is not None:
            kept = isinstance(self.teacher, CachedTeacher)
            most = self.plan.views * len(self.train) if kept else progress.trained
            progress.teacher = progress.teacher_alone = min(progress.trained, most)

    def _foreign(self, reason: str) -> RunError:
        where = self.run.path("checkpoints")
        hint = f"delete its {self.plan.stage}-* files to begin that stage anew"
        return RunError(str(where), found=f"a checkpoint of something else: {reason[:200]}", hint=hint)

    def _not_finite(self, what: str) -> TrainingError:
        plan, progress = self.plan, self.progress
        row = f", the last of {progress.in_a_row + 1} in a row" if progress.in_a_row else ""
        precision = "bf16" if self.engine.bf16 else "fp32"
        rate = self.optimizer.param_groups[0]["lr"]
        terms: Any = getattr(self.module, "terms", nn.ModuleDict())
        weight = "".join(f", --beta {term.beta:g}" for term in terms.values() if hasattr(term, "beta"))
        return TrainingError(
            f"{plan.stage}: not finite in pass {progress.epoch + 1}, step {progress.step + 1}{row}: {what}",
            found=f"--lr {plan.lr:g} (now {rate:.3g}){weight}, --precision {precision}",
            valid="finite losses; the last good checkpoint is kept",
            hint="give a lower --lr or --beta, --clip-grad 5, or --precision fp32, with another --out or --overwrite",
        )

    def _show(self, bar: PassBar, images: int) -> None:
        if images:
            means = self.progress.means()
            shown = ("loss", f"train_{self.task.headline.key}")
            bar(images, {name: means[name] for name in shown if name in means})
