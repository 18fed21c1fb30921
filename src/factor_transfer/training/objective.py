"""The student's loss as the settings make it: its terms, and what they read of teacher and student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import Paraphraser, Straight, factor_channels
from factor_transfer.method.losses import Encoded, FactorTransfer, Hint, width_of
from factor_transfer.method.presets import BASELINE
from factor_transfer.method.slim import AnyParaphraser, SlimParaphraser, core, start_as_identity
from factor_transfer.method.term import Given, Group, Reader, Term, numbered
from factor_transfer.networks.features import Tapped, feature_map, untrained
from factor_transfer.networks.layers import find_groups
from factor_transfer.networks.pair import Pair, Side
from factor_transfer.networks.weights import load_paraphraser
from factor_transfer.tasks.base import LabelLoss, task_of
from factor_transfer.util.arguments import imported, names_in
from factor_transfer.util.checks import flag, refused, weights
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.seeds import part_seed, seeded


def new_paraphraser(
    config: Config, pair: Pair, file: str | None, part: str = "paraphraser"
) -> AnyParaphraser | Straight:
    """Of a pair of layers: from a file, or with fresh weights, which belong to --data-seed and the name of the part."""
    channels = pair.teacher.shape[0]
    if config.paraphraser == "none":
        return Straight(channels)
    width = width_of(config, channels)
    if file is not None:
        return load_paraphraser(file, channels=channels, k=config.k, batch_norm=config.factor_batch_norm, width=width)
    with seeded(part_seed(config.data_seed, part)):
        kept, batch_norm = factor_channels(width or channels, config.k), config.factor_batch_norm
        paraphraser: AnyParaphraser
        if width is None:
            paraphraser = Paraphraser(channels, kept, batch_norm)
        else:
            paraphraser = SlimParaphraser(channels, kept, batch_norm, width)
    if config.paraphraser_epochs == "auto":
        start_as_identity(core(paraphraser))
    return paraphraser


def named_paraphrasers(config: Config, pair: Pair) -> list[tuple[str, Pair, str | None]]:
    """For every pair of layers the name of its paraphraser, and the file that --paraphraser gives for it.

    Raises:
        ConfigError: there are not as many files as pairs.
    """
    pairs = pair.each() if config.beta else []
    files: list[str | None] = [None] * len(pairs)
    if config.paraphraser not in {None, "none"} and pairs:
        files = [config.paraphraser] if len(pairs) == 1 else [*names_in(config.paraphraser)]
    if len(files) != len(pairs):
        raise ConfigError(
            f"--paraphraser {config.paraphraser}",
            found=f"{len(files)} for {len(pairs)} pairs of layers",
            valid=f"{len(pairs)} files, with commas",
        )
    return list(zip(numbered("paraphraser", len(pairs)), pairs, files, strict=True))


def fresh_paraphrasers(config: Config, pair: Pair) -> list[AnyParaphraser | Straight]:
    """Of every pair of layers, as they are given, or drawn; none, where no factor is transferred."""
    return [new_paraphraser(config, each, file, part) for part, each, file in named_paraphrasers(config, pair)]


class Objective:
    """The terms of the student's loss, those of weight 0 left out.

    Args:
        config: all settings.
        pair: teacher and student, and their layers.
        factor_channels: K of the teacher's factor, for each pair of layers; not read with --beta 0.
        classes: N of the data.
        class_weights: of each class in the loss with labels; none: all count alike.
    """

    def __init__(
        self,
        config: Config,
        pair: Pair,
        factor_channels: Sequence[int],
        classes: int,
        class_weights: tuple[float, ...] = (),
    ) -> None:
        self.config, self.classes, self.dense = config, classes, task_of(config.task).dense
        guided = any(getattr(config, weight) for weight in refused(type(config))["teacher_groups"])
        self.groups = groups_of(config, pair) if guided else ()
        layers = [
            Group(each.teacher.layer, each.student.layer, (each.teacher.shape[0], each.student.shape[0]), each.size)
            for each in pair.each()
        ]
        labels = partial(task_of(config.task).labels, how=LabelLoss.of(config, class_weights))
        self._given = Given(config, pair, labels, layers, factor_channels, self.groups)
        self.terms: list[Term] = [
            term
            for name, weight in weights(type(config)).items()
            if weight.term is not None and getattr(config, name)
            for term in imported(weight.term).made(self._given)
        ]
        self.factors = [term.factor for term in self.terms if isinstance(term, FactorTransfer)]
        self.record: dict[str, Any] = {}
        """Weights that the settings leave to be found, and what they follow from."""
        for term in self.terms:
            self.record |= term.record()

    @property
    def method(self) -> str:
        """What people call the sum of terms: a method's own term comes before those that it shares with others."""
        labels = [term.label for term in self.terms] + ([Hint.label] if self.config.hint_epochs else [])
        return " + ".join(label for label in dict.fromkeys(reversed(labels)) if label) or BASELINE

    def lines(self) -> Iterator[str]:
        """What a user is told."""
        yield f"student: {self.method}"
        for group in self.groups:
            at = f"{group.size[0]}x{group.size[1]}"
            yield f"group: the teacher's {group.teacher}, the student's {group.student}, compared at {at}"
        for term in self.terms:
            yield from term.lines()

    def layers(self) -> dict[str, Any]:
        """The terms with their weights, and the layers that they compare, for the summary."""
        pairs = [
            {
                "teacher": factor.layers.teacher,
                "student": factor.layers.student,
                "factor": list(factor.shape),
                "beta": factor.beta,
                "weight": factor.beta / factor.pairs,
            }
            for factor in self.factors
        ]
        groups = [{"teacher": group.teacher, "student": group.student, "size": group.size} for group in self.groups]
        terms = [{"name": term.name, "label": term.label, "weight": term.weight} for term in self.terms]
        return {"terms": terms, "pairs": pairs, "groups": groups}

    def hint(self) -> Hint:
        """The only term of the first stage."""
        return Hint.fresh(self._given)

    def readers(self, paraphrasers: Sequence[AnyParaphraser | Straight]) -> dict[str, Reader]:
        """How the teacher's outputs are made that the terms read, besides its logits."""
        found = {name: reader for term in self.terms for name, reader in term.readers().items()}
        names = numbered("factor", len(self.factors))
        for name, factor, paraphraser in zip(names, self.factors, paraphrasers, strict=True):
            found[name] = Encoded(factor.layers.teacher, factor.layers.size, paraphraser)
        return found

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """Layers of the teacher that are read besides its own."""
        groups = [group.teacher for group in self.groups]
        read = [reader.layer for term in self.terms for reader in term.readers().values()]
        return (*(factor.layers.teacher for factor in self.factors[1:]), *groups, *read)

    @property
    def outputs(self) -> dict[str, tuple[int, ...] | None]:
        """What the terms read of the teacher, and its shape for one sample: None where it cannot be cached."""
        names = numbered("factor", len(self.factors))
        shapes: dict[str, tuple[int, ...] | None] = {
            name: factor.shape for name, factor in zip(names, self.factors, strict=True)
        }
        shapes["logits"] = None if self.dense else (self.classes,)
        shapes |= {name: reader.shape for term in self.terms for name, reader in term.readers().items()}
        needs = {name for term in self.terms for name in term.needs}
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
    dense = task_of(config.task).dense
    both = [found or _found(side, dense=dense) for found, side in zip(named, (pair.teacher, pair.student), strict=True)]
    count = min(len(found) for found in both)
    if not count or (len(both[0]) != len(both[1]) and any(named)):
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
    return torch.zeros(2, 3, *side.network.size)


def _found(side: Side, *, dense: bool) -> Found:
    return find_groups(side.network.module, _example(side), dense=dense)


def _named(config: Config, side: Side) -> Found:
    """The layers that the settings name, and their maps' shapes."""
    name = f"{side.role}_groups"
    found: Found = []
    for layer in names_in(vars(config)[name]):
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
    with untrained(beyond):
        yield
