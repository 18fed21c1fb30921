"""The student's loss as the settings make it: its terms, and what they read of teacher and student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from factor_transfer.config import Config, flag
from factor_transfer.errors import ConfigError
from factor_transfer.features import Tapped, feature_map, find_groups
from factor_transfer.method import Translator
from factor_transfer.methods import method_of
from factor_transfer.pairs import Pair, Side, factor_weight
from factor_transfer.seeds import part_seed, seeded
from factor_transfer.terms import (
    AttentionTransfer,
    FactorTransfer,
    Group,
    Hint,
    Labels,
    Reader,
    SoftTargets,
    Term,
)

AT_BOUND = 1000 * sum(2 / side**2 for side in (32, 16, 8))
"""What the term of attention transfer is at most in the authors' CIFAR-10 program: beta 1000, these maps."""


class Objective:
    """The terms of the student's loss, those of weight 0 left out.

    Args:
        config: all settings.
        pair: teacher and student.
        factor_channels: K of the teacher's factor; not read with --beta 0.
        classes: N of the data.
    """

    def __init__(self, config: Config, pair: Pair, factor_channels: int, classes: int) -> None:
        self.config = config
        guided = config.at_weight or config.hint_weight or config.hint_epochs
        self.groups = groups_of(config, pair) if guided else ()
        self._shapes: dict[str, tuple[int, ...]] = {"factor": (factor_channels, *pair.size), "logits": (classes,)}
        self.terms: list[Term] = []
        self.record: dict[str, Any] = {}
        """Weights that the settings leave to be found, and what they follow from."""
        if config.label_weight:
            self.terms.append(Labels(config.label_weight))
        if config.kd_weight:
            self.terms.append(SoftTargets(config.kd_weight, config.kd_temperature))
        if config.beta:
            elements = factor_channels * pair.size[0] * pair.size[1]
            beta, bound = factor_weight(config, elements)
            self.record |= {"beta": beta, "bound": bound, "elements": elements, "factor_channels": factor_channels}
            with seeded(part_seed(config.seed, "translator")):
                translator = Translator(pair.student.shape[0], factor_channels, config.factor_batch_norm)
            self.terms.append(FactorTransfer(translator, beta, config.p))
        if config.at_weight:
            bound = sum(2 / (height * width) for *_, (height, width) in self.groups)
            weight = AT_BOUND / bound if config.at_weight == "auto" else config.at_weight
            self.record |= {"at_weight": weight, "at_bound": weight * bound}
            self.terms.append(AttentionTransfer(self.groups, weight))
        if config.hint_weight:
            self.terms.append(self.hint(config.hint_weight))

    def lines(self) -> Iterator[str]:
        """What a user is told."""
        found = self.record
        yield f"student: {method_of(vars(self.config))}"
        if "beta" in found:
            channels, height, width = self._shapes["factor"]
            yield (
                f"factor: {channels} channels of {height}x{width} ({found['elements']} elements); "
                f"beta {found['beta']:g}, so its term is at most {found['bound']:.3g}"
            )
        for group in self.groups:
            at = f"{group.size[0]}x{group.size[1]}"
            yield f"group: the teacher's {group.teacher}, the student's {group.student}, compared at {at}"
        if "at_weight" in found:
            yield f"attention: weight {found['at_weight']:g}, so its term is at most {found['at_bound']:.3g}"

    def hint(self, weight: float = 1.0) -> Hint:
        """The term of the middle group, with a fresh regressor, which belongs to --seed."""
        with seeded(part_seed(self.config.seed, "regressor")):
            return Hint(self.groups[(len(self.groups) - 1) // 2], weight)

    @property
    def readers(self) -> dict[str, Reader]:
        """How the teacher's outputs that terms add are made."""
        return {name: reader for term in self.terms for name, reader in term.readers().items()}

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """Layers of the teacher that are read besides its own."""
        return tuple(group.teacher for group in self.groups)

    @property
    def outputs(self) -> dict[str, tuple[int, ...] | None]:
        """What the terms read of the teacher, and its shape for one sample: None where it cannot be cached."""
        needs = {name for term in self.terms for name in term.needs}
        shapes = {**self._shapes, **{name: reader.shape for name, reader in self.readers.items()}}
        return {name: shape for name, shape in shapes.items() if name in needs}

    @property
    def hint_epochs(self) -> int:
        """Passes of the first stage."""
        chosen, epochs = self.config.hint_epochs, self.config.epochs
        return max(1, round(epochs / 8)) if chosen == "auto" else chosen


def groups_of(config: Config, pair: Pair) -> tuple[Group, ...]:
    """Groups of teacher and student side by side, as the settings name them, or the last beside the last.

    Raises:
        ConfigError: they are not as many, or meet where a map has one place.
        ModelError: an unknown layer.
    """
    named = [_named(config, side) for side in (pair.teacher, pair.student)]
    both = [found or _found(side) for found, side in zip(named, (pair.teacher, pair.student), strict=True)]
    count = min(len(found) for found in both)
    if len(both[0]) != len(both[1]) and (named[0] or named[1] or not count):
        found = f"{len(both[0])} of the teacher, {len(both[1])} of the student"
        raise ConfigError(
            f"--teacher-groups {_layers(both[0])} --student-groups {_layers(both[1])}",
            found=found,
            valid="as many of one as of the other, each a map of more than one place",
        )
    groups = []
    for (theirs, (channels, *large)), (ours, (own, *small)) in zip(both[0][-count:], both[1][-count:], strict=True):
        size = min(large[0], small[0]), min(large[1], small[1])
        if size == (1, 1):
            raise ConfigError(
                f"--teacher-groups {theirs} --student-groups {ours}",
                found=f"maps of {large[0]}x{large[1]} and {small[0]}x{small[1]}, which meet at one place",
                valid="maps of more places: an earlier group, or a larger --img-size",
            )
        groups.append(Group(theirs, ours, (channels, own), size))
    return tuple(groups)


Found = list[tuple[str, tuple[int, int, int]]]


def _example(side: Side) -> Tensor:
    return torch.zeros(2, 3, side.network.size, side.network.size)


def _found(side: Side) -> Found:
    return find_groups(side.network.module, _example(side))


def _named(config: Config, side: Side) -> Found:
    """The layers that the settings name, and their maps' shapes."""
    name = f"{side.role}_groups"
    found: Found = []
    for layer in filter(None, (layer.strip() for layer in (vars(config)[name] or "").split(","))):
        channels, height, width = feature_map(
            Tapped(side.network.module, layer, flag=flag(name)), _example(side)
        ).shape[1:]
        found.append((layer, (channels, height, width)))
    return found


def _layers(found: Found) -> str:
    return ",".join(layer for layer, _ in found) or "(none found)"


@contextmanager
def trained_up_to(tapped: Tapped, images: Tensor) -> Iterator[None]:
    """Only the parameters that the tapped map depends on are trained inside the block.

    Args:
        tapped: the network and its layer.
        images: normalised images (B, 3, S, S).
    """
    tapped.eval()  # the images shall leave no trace in its batch norms
    weights = [weight for weight in tapped.module.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(tapped(images)[1].sum(), weights, allow_unused=True)
    beyond = [weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is None]
    for weight in beyond:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in beyond:
            weight.requires_grad_(True)
