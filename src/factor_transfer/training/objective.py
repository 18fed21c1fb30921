"""The student's loss as the settings make it: its terms, and what they read of teacher and student."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import (
    Paraphraser,
    Straight,
    Translator,
    factor_channels,
    factor_loss_bound,
    portable_beta,
)
from factor_transfer.method.losses import (
    AttentionTransfer,
    Encoded,
    FactorTransfer,
    Group,
    Hint,
    Reader,
    SoftTargets,
    Term,
    numbered,
)
from factor_transfer.method.presets import method_of
from factor_transfer.networks.features import Tapped, feature_map, untrained
from factor_transfer.networks.layers import find_groups
from factor_transfer.networks.pair import Pair, Side
from factor_transfer.networks.weights import load_paraphraser
from factor_transfer.tasks.base import task_of
from factor_transfer.util.arguments import imported, is_callable_name, names_in
from factor_transfer.util.checks import flag
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.seeds import part_seed, seeded

AT_BOUND = 1000 * sum(2 / side**2 for side in (32, 16, 8))
"""What the term of attention transfer is at most in the authors' CIFAR-10 program: beta 1000, these maps."""


class Factor(NamedTuple):
    """The factor of a pair of layers."""

    pair: Pair
    channels: int
    beta: float
    p: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, H, W)."""
        return self.channels, *self.pair.size

    @property
    def bound(self) -> float:
        """What beta times its loss is at most."""
        return self.beta * factor_loss_bound(math.prod(self.shape), self.p)


def new_paraphraser(config: Config, pair: Pair, file: str | None, place: int = 0) -> Paraphraser | Straight:
    """From a file, or with fresh weights, which belong to --data-seed; of the pair of layers at `place`."""
    channels = pair.teacher.shape[0]
    if config.paraphraser == "none":
        return Straight(channels)
    if file is not None:
        return load_paraphraser(file, channels=channels, k=config.k, batch_norm=config.factor_batch_norm)
    with seeded(part_seed(config.data_seed, numbered("paraphraser", place))):
        return Paraphraser(channels, factor_channels(channels, config.k), config.factor_batch_norm)


def given_paraphrasers(config: Config, count: int) -> list[str | None]:
    """The files that --paraphraser names, for so many pairs of layers."""
    if config.paraphraser is None or config.paraphraser == "none" or not count:
        return [None] * count
    files = [config.paraphraser] if count == 1 else names_in(config.paraphraser)
    if len(files) != count:
        raise ConfigError(
            f"--paraphraser {config.paraphraser}",
            found=f"{len(files)} for {count} pairs of layers",
            valid=f"{count} files, with commas",
        )
    return list(files)


def fresh_paraphrasers(config: Config, pair: Pair) -> list[Paraphraser | Straight]:
    """Of every pair of layers, as they are given, or drawn; none, where no factor is transferred."""
    pairs = pair.each() if config.beta else []
    files = given_paraphrasers(config, len(pairs))
    return [
        new_paraphraser(config, each, file, place) for place, (each, file) in enumerate(zip(pairs, files, strict=True))
    ]


def new_translator(config: Config, pair: Pair, channels: int, place: int = 0) -> nn.Module:
    """From the student's channels to so many of the factor; its weights belong to --seed.

    Raises:
        ConfigError: there shall be none, and the channels differ.
    """
    own, theirs = pair.student.shape[0], pair.teacher.shape[0]
    if config.translator == "conv":
        with seeded(part_seed(config.seed, numbered("translator", place))):
            return Translator(own, channels, config.factor_batch_norm)
    if own != channels:
        fits = f"--k {own / theirs:.6g}, which makes {own} factor channels" if config.paraphraser != "none" else None
        raise ConfigError(
            "--translator none",
            found=f"{own} channels of the student's {pair.student.layer}, {channels} of the factor",
            valid=fits or f"a student's layer of {channels} channels, or a teacher's of {own}",
        )
    return nn.Identity()


def own_term(config: Config, pair: Pair) -> Term:
    """The user's own, its first weights drawn from --seed.

    Raises:
        ConfigError: it cannot be imported or called, or gives no term.
    """
    try:
        if not is_callable_name(str(config.term)):
            raise ValueError("no package.module:callable")
        with seeded(part_seed(config.seed, "term")):
            term = imported(str(config.term))(pair)
        if not isinstance(term, Term):
            raise TypeError(f"gives a {type(term).__name__}, no factor_transfer.method.losses.Term")
    except Exception as error:  # whatever code of the user's raises
        valid = "package.module:callable, such as new_method:Distances in examples/"
        raise ConfigError(f"--term {config.term}", found=str(error), valid=valid) from error
    return term


class Objective:
    """The terms of the student's loss, those of weight 0 left out.

    Args:
        config: all settings.
        pair: teacher and student, and their layers.
        factor_channels: K of the teacher's factor, for each pair of layers; not read with --beta 0.
        classes: N of the data.
    """

    def __init__(self, config: Config, pair: Pair, factor_channels: Sequence[int], classes: int) -> None:
        self.config = config
        guided = config.at_weight or config.hint_weight or config.hint_epochs
        self.groups = groups_of(config, pair) if guided else ()
        self.factors: list[Factor] = []
        self.classes = classes
        self.terms: list[Term] = []
        self.record: dict[str, Any] = {}
        """Weights that the settings leave to be found, and what they follow from."""
        if config.label_weight:
            self.terms.append(task_of(config.task).labels(config.label_weight))
        if config.kd_weight:
            self.terms.append(SoftTargets(config.kd_weight, config.kd_temperature))
        if config.beta:
            self._transfer(pair.each(), factor_channels)
        if config.at_weight:
            bound = sum(2 / (height * width) for *_, (height, width) in self.groups)
            weight = AT_BOUND / bound if config.at_weight == "auto" else config.at_weight
            self.record |= {"at_weight": weight, "at_bound": weight * bound}
            self.terms.append(AttentionTransfer(self.groups, weight))
        if config.hint_weight:
            self.terms.append(self.hint(config.hint_weight))
        if config.term is not None:
            self.terms.append(own_term(config, pair))

    def _transfer(self, pairs: Sequence[Pair], factor_channels: Sequence[int]) -> None:
        """Factor transfer for each pair of layers; each has its own beta, and the term is their mean."""
        for place, (pair, channels) in enumerate(zip(pairs, factor_channels, strict=True)):
            p, elements = self.config.p, channels * pair.size[0] * pair.size[1]
            beta = portable_beta(elements, p) if self.config.beta == "auto" else self.config.beta
            self.factors.append(Factor(pair, channels, beta, p))
            translator = new_translator(self.config, pair, channels, place)
            layer = pair.student.layer if place else None
            self.terms.append(FactorTransfer(translator, beta / len(pairs), p, layer, place))
        first = self.factors[0]
        self.record |= {"elements": math.prod(first.shape), "factor_channels": first.channels}
        self.record |= {"beta": first.beta, "bound": first.bound}

    def lines(self) -> Iterator[str]:
        """What a user is told."""
        yield f"student: {method_of(vars(self.config))}"
        by = " (auto)" if self.config.beta == "auto" else ""
        for factor in self.factors:
            channels, height, width = factor.shape
            several = len(self.factors) > 1
            where = f" of {factor.pair.teacher.layer} for {factor.pair.student.layer}" if several else ""
            share = f", of which 1/{len(self.factors)} counts" if several else ""
            yield (
                f"factor{where}: {channels} channels of {height}x{width} ({math.prod(factor.shape)} elements); "
                f"beta {factor.beta:.4g}{by}, so its term is at most {factor.bound:.3g}{share}"
            )
        for group in self.groups:
            at = f"{group.size[0]}x{group.size[1]}"
            yield f"group: the teacher's {group.teacher}, the student's {group.student}, compared at {at}"
        if "at_weight" in self.record:
            found = self.record
            yield f"attention: weight {found['at_weight']:g}, so its term is at most {found['at_bound']:.3g}"

    def layers(self) -> dict[str, Any]:
        """The layers that the terms compare, for the summary."""
        pairs = [
            {
                "teacher": factor.pair.teacher.layer,
                "student": factor.pair.student.layer,
                "factor": list(factor.shape),
                "beta": factor.beta,
                "weight": factor.beta / len(self.factors),
            }
            for factor in self.factors
        ]
        groups = [{"teacher": group.teacher, "student": group.student, "size": group.size} for group in self.groups]
        return {"pairs": pairs, "groups": groups}

    def hint(self, weight: float = 1.0) -> Hint:
        """The term of the middle group, with a fresh regressor, which belongs to --seed."""
        with seeded(part_seed(self.config.seed, "regressor")):
            return Hint(self.groups[(len(self.groups) - 1) // 2], weight)

    def readers(self, paraphrasers: Sequence[Paraphraser | Straight]) -> dict[str, Reader]:
        """How the teacher's outputs are made that are not its own layer's."""
        found = {name: reader for term in self.terms for name, reader in term.readers().items()}
        for place, (factor, paraphraser) in enumerate(zip(self.factors, paraphrasers, strict=True)):
            if place:
                found[numbered("factor", place)] = Encoded(factor.pair.teacher.layer, factor.pair.size, paraphraser)
        return found

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """Layers of the teacher that are read besides its own."""
        groups = [group.teacher for group in self.groups]
        read = [reader.layer for term in self.terms for reader in term.readers().values()]
        return (*(factor.pair.teacher.layer for factor in self.factors[1:]), *groups, *read)

    @property
    def outputs(self) -> dict[str, tuple[int, ...] | None]:
        """What the terms read of the teacher, and its shape for one sample: None where it cannot be cached."""
        shapes: dict[str, tuple[int, ...] | None] = {
            numbered("factor", place): factor.shape for place, factor in enumerate(self.factors)
        }
        shapes["logits"] = (self.classes,)
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
    both = [found or _found(side) for found, side in zip(named, (pair.teacher, pair.student), strict=True)]
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


def _found(side: Side) -> Found:
    return find_groups(side.network.module, _example(side))


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
