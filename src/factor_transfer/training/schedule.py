"""How a stage is trained: its passes and learning rate, with timm's optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from factor_transfer.config import Config
from factor_transfer.util.errors import ConfigError, near

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
    """Seed of the noise inside layers."""
    views: int = 0
    """Pass e shows view e mod `views`; 0: every pass a view of its own."""
    average: bool = False
    """Keep an average of the weights over steps (--model-ema)."""
    constant: bool = False
    """Hold the learning rate (the paraphraser's program) instead of following --sched."""
    enough: Callable[[Sequence[float], int], bool] | None = None
    """Whether to end before the last pass: of the mean losses of the passes so far, and the steps of a pass."""


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
