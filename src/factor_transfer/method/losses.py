"""The terms of the student's loss: labels, factors, predictions, attention, hints. `term.py` says what a term is.

Shapes: B samples, C channels, K factor channels, H x W the feature map, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factor_transfer.config import Config
from factor_transfer.data.masks import IGNORED
from factor_transfer.method.factor_transfer import (
    Straight,
    Translator,
    factor_loss_bound,
    factor_transfer_loss,
    portable_beta,
)
from factor_transfer.method.health import relative_variety
from factor_transfer.method.slim import WIDTH, AnyParaphraser, SlimTranslator
from factor_transfer.method.term import Given, Group, Reader, StudentOutputs, Term, align, numbered
from factor_transfer.util.arguments import imported, is_callable_name
from factor_transfer.util.errors import ConfigError
from factor_transfer.util.seeds import part_seed, seeded

SAMPLE = 32
"""Samples of a batch that tell whether a factor varies."""


class Labels(Term):
    """The loss with the images' own labels (equation 3): cross-entropy, or that of another task.

    Args:
        weight: its weight.
        loss: of outputs (B, N) and labels; a scalar, averaged over the batch.
        name: what the loss is called in metrics.
    """

    weight: float
    trains_head = True
    supervised = True

    def __init__(
        self,
        weight: float = 1.0,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        name: str = "cross_entropy",
    ) -> None:
        super().__init__()
        self.weight, self.loss, self.name = weight, loss, name

    @classmethod
    def made(cls, given: Given) -> Sequence[Term]:
        """With --label-weight, and the loss of --task."""
        return [given.labels(given.config.label_weight)]

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """labels: (B,) class indices, or what the task makes of them."""
        logits = student.logits if student.logits.dtype == torch.float64 else student.logits.float()
        return self.weight * self.loss(logits, labels)


class SoftTargets(Term):
    """Knowledge distillation (Hinton, Vinyals, Dean, arXiv 1503.02531): T^2 x KL(teacher || student) at temperature T.

    Args:
        weight: its weight.
        temperature: T.
    """

    name = "soft_targets"
    label = "knowledge distillation"
    weight: float
    trains_head = True
    needs = frozenset({"logits"})

    def __init__(self, weight: float, temperature: float = 4.0) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature

    @classmethod
    def made(cls, given: Given) -> Sequence[Term]:
        """With --kd-weight and --kd-temperature."""
        return [cls(given.config.kd_weight, given.config.kd_temperature)]

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compares logits (B, N), and reads no `labels`; or maps of them, the teacher's at the student's size."""
        logits, told = student.logits, teacher["logits"]
        if logits.ndim == 4 and told.shape[-2:] != logits.shape[-2:]:
            told = F.interpolate(told.float(), size=logits.shape[-2:], mode="bilinear", align_corners=False)
        ours, theirs = (F.log_softmax(x.float() / self.temperature, 1) for x in (logits, told))
        if logits.ndim == 4:
            divergence = mean_over_pixels(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1), labels)
        else:
            divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return self.weight * self.temperature**2 * divergence


def mean_over_pixels(values: Tensor, masks: Tensor) -> Tensor:
    """Of a map (B, h, w), without the pixels that masks (B, H, W) ignore: the mean of each image, over images.

    >>> mean_over_pixels(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0, IGNORED]]]))
    tensor(1.)
    """
    if masks.shape[-2:] != values.shape[-2:]:
        masks = F.interpolate(masks[:, None].float(), size=values.shape[-2:], mode="nearest")[:, 0]
    kept = (masks != IGNORED).to(values.dtype)
    return ((values * kept).flatten(1).sum(1) / kept.flatten(1).sum(1).clamp_min(1)).mean()


class FactorTransfer(Term):
    """beta x factor transfer loss (equations 2 and 4), through a translator that is trained with the student.

    Args:
        translator: from the student's channels to the factor's.
        beta: weight.
        p: norm of the difference.
        layer: of the student, where it is not the student's own.
        number: what the names of all that belongs to its pair of layers end in, such as `_1`; see `numbered`.
    """

    label = "Factor Transfer"
    factor: Factor
    """Where it is made from the settings: what it compares."""

    def __init__(
        self, translator: nn.Module, beta: float, p: float = 1, layer: str | None = None, number: str = ""
    ) -> None:
        super().__init__()
        self.translator, self.p, self.number = translator, p, number
        self.weight = self.beta = beta
        self.name, self.output = f"factor_transfer{number}", f"factor{number}"
        self.needs = frozenset({self.output})
        self.taps = (layer,) if layer is not None else ()

    @classmethod
    def made(cls, given: Given) -> Sequence[Term]:
        """One for each pair of layers, with --beta over their number: the term is their mean."""
        config, count, found = given.config, len(given.layers), []
        for number, layers, channels in zip(numbered("", count), given.layers, given.factor_channels, strict=True):
            elements = channels * math.prod(layers.size)
            beta = portable_beta(elements, config.p) if config.beta == "auto" else config.beta
            translator = new_translator(config, layers, channels, f"translator{number}")
            term = cls(translator, beta / count, config.p, layers.student if number else None, number)
            term.factor = Factor(layers, channels, beta, config.p, config.beta == "auto", count)
            found.append(term)
        return found

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Pools the student's map to the factor's height and width where it is the larger one."""
        factor = teacher[self.output]
        feature = student.maps[self.taps[0]] if self.taps else student.feature
        translated = self.translator(align(feature, (factor.shape[-2], factor.shape[-1])))
        self._variety = relative_variety(translated[:SAMPLE].detach(), factor[:SAMPLE])
        return self.beta * factor_transfer_loss(translated, factor, self.p)

    def seen(self) -> dict[str, Tensor]:
        """How much the translator's output varies over a batch, as a share of how much the factors do."""
        return {f"factor_variety{self.number}": self._variety}

    def lines(self) -> Iterator[str]:
        """The factor, its beta, and what the term is at most."""
        factor, (channels, height, width) = self.factor, self.factor.shape
        where = share = ""
        if factor.pairs > 1:
            where = f" of {factor.layers.teacher} for {factor.layers.student}"
            share = f", of which 1/{factor.pairs} counts"
        yield (
            f"factor{where}: {channels} channels of {height}x{width} ({factor.elements} elements); beta "
            f"{factor.beta:.4g}{' (auto)' if factor.auto else ''}, so its term is at most {factor.bound:.3g}{share}"
        )

    def record(self) -> dict[str, Any]:
        """Of the first pair of layers; `layers` of the summary has all."""
        factor = self.factor
        first = {"elements": factor.elements, "factor_channels": factor.channels, "beta": factor.beta}
        return {} if self.number else {**first, "bound": factor.bound}


class Factor(NamedTuple):
    """What the term compares at one pair of layers."""

    layers: Group
    channels: int
    beta: float
    """By itself: the weight of the term is this over the number of `pairs`."""
    p: float
    auto: bool
    """Whether beta follows from the number of elements."""
    pairs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K, H, W)."""
        return self.channels, *self.layers.size

    @property
    def elements(self) -> int:
        """K x H x W."""
        return math.prod(self.shape)

    @property
    def bound(self) -> float:
        """What beta times its loss is at most."""
        return self.beta * factor_loss_bound(self.elements, self.p)


def width_of(config: Config, channels: int) -> int | None:
    """W that the slim form reduces a map of so many channels to; None where the paper's layers read it as it is.

    With --factor-form auto that is the paper's form: `form.with_form` puts what it chooses in its place.

    >>> slim = Config(data="digits", teacher="a", student="b", factor_form="slim")
    >>> width_of(slim, 1280), width_of(slim, 64)
    (64, None)
    """
    width = config.factor_width or WIDTH
    return width if config.factor_form == "slim" and channels > width else None


def drawn_translator(config: Config, own: int, channels: int) -> Translator | SlimTranslator:
    """From so many `own` channels of the student to so many of the factor, in the form that the settings name."""
    width, batch_norm = width_of(config, own), config.factor_batch_norm
    if width is None:
        return Translator(own, channels, batch_norm)
    return SlimTranslator(own, channels, batch_norm, width)


def new_translator(config: Config, layers: Group, channels: int, part: str) -> nn.Module:
    """From the student's channels to so many of the factor; its weights belong to --seed and the name of the part.

    Raises:
        ConfigError: there shall be none, and the channels differ.
    """
    theirs, own = layers.channels
    if config.translator == "conv":
        with seeded(part_seed(config.seed, part)):
            return drawn_translator(config, own, channels)
    if own != channels:
        read = width_of(config, theirs) or theirs
        able = config.paraphraser != "none" and (read == theirs or own <= read)
        fits = f"--k {own / read:.6g}, which makes {own} factor channels" if able else None
        raise ConfigError(
            "--translator none",
            found=f"{own} channels of the student's {layers.student}, {channels} of the factor",
            valid=fits or f"a student's layer of {channels} channels, or a teacher's of {own}",
        )
    return nn.Identity()


class Encoded(Reader):
    """The teacher's factor of a pair of layers, (B, K, H, W).

    Args:
        layer: the teacher's.
        size: height and width (H, W) of the factor.
        paraphraser: trained.
    """

    def __init__(self, layer: str, size: tuple[int, int], paraphraser: AnyParaphraser | Straight) -> None:
        super().__init__(layer, size)
        self.paraphraser = paraphraser
        self.shape = (paraphraser.factor_channels, *size)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, *size)."""
        return self.paraphraser.encode(align(feature, self.size))


def attention(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """The normalised spatial attention of a map (B, C, H, W): (B, 1, *size).

    The sum of squares over channels, divided by its L2 norm over places (Zagoruyko & Komodakis, section 3.1).
    Deviation: where `size` is smaller than the map, the squares are pooled first.

    >>> attention(torch.tensor([[[[1.0, 2.0]], [[1.0, 2.0]]]]), (1, 2))  # squares summed: 2 and 8
    tensor([[[[0.2425, 0.9701]]]])
    """
    precise = feature if feature.dtype == torch.float64 else feature.float()
    energy = align(precise.square().mean(1, keepdim=True), size)  # (B, 1, *size)
    return F.normalize(energy.flatten(1)).view_as(energy)


class Attention(Reader):
    """The teacher's attention map, (B, 1, H, W)."""

    def __init__(self, layer: str, size: tuple[int, int]) -> None:
        super().__init__(layer, size)
        self.shape = (1, *size)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, *size)."""
        return attention(feature, self.size)


AT_BOUND = 1000 * sum(2 / side**2 for side in (32, 16, 8))
"""What the term of attention transfer is at most in the authors' CIFAR-10 program: beta 1000, these maps."""


class AttentionTransfer(Term):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017, equation 2), summed over groups.

    As in the authors' program: weight x the mean over places of the squared difference of the normalised attention
    maps. (Equation 2 has weight / 2 x their L2 distance; a mean shrinks with the map, so that the term is at most
    2 x weight / places for each group.)

    Args:
        groups: where the maps are compared.
        weight: their beta, 1000 in the program.
    """

    name = "attention_transfer"
    label = "attention transfer"
    weight: float

    def __init__(self, groups: Sequence[Group], weight: float = 1000) -> None:
        super().__init__()
        self.groups, self.weight = tuple(groups), weight
        self.taps = tuple(group.student for group in groups)
        self.needs = frozenset(self.readers())

    @classmethod
    def made(cls, given: Given) -> Sequence[Term]:
        """With --at-weight; `auto` makes the bound that of the authors' program."""
        chosen, term = given.config.at_weight, cls(given.groups, 1.0)
        term.weight = AT_BOUND / term.bound if chosen == "auto" else chosen
        return [term]

    @property
    def bound(self) -> float:
        """What the term is at most."""
        return self.weight * sum(2 / math.prod(group.size) for group in self.groups)

    def lines(self) -> Iterator[str]:
        """The weight, and what the term is at most."""
        yield f"attention: weight {self.weight:g}, so its term is at most {self.bound:.3g}"

    def record(self) -> dict[str, Any]:
        """The weight, and the bound that it follows from."""
        return {"at_weight": self.weight, "at_bound": self.bound}

    def readers(self) -> dict[str, Reader]:
        """`attention_0`, ...: one for each group."""
        return {f"attention_{place}": Attention(group.teacher, group.size) for place, group in enumerate(self.groups)}

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compares the maps of every group; `labels` are not read."""
        losses = [
            F.mse_loss(attention(student.maps[group.student], group.size), teacher[f"attention_{place}"].float())
            for place, group in enumerate(self.groups)
        ]
        return self.weight * torch.stack(losses).sum()


class Hint(Term):
    """Hint regression (Romero et al., FitNets, ICLR 2015, equation 3): the teacher's map out of the student's.

    Deviations: the mean of the squared error over elements, not half its sum, so that a learning rate does not depend
    on size. Maps of other sizes are pooled to the smaller: the paper's kernel, which makes up for them, is then 1x1.
    The regressor is linear, whatever ends the teacher's group.

    Args:
        group: the teacher's hint layer and the student's guided layer.
        weight: its weight.
    """

    name = "hint"
    label = "hints"
    weight: float
    needs = frozenset({"hint"})

    def __init__(self, group: Group, weight: float = 1.0) -> None:
        super().__init__()
        self.group, self.weight, self.taps = group, weight, (group.student,)
        theirs, ours = group.channels
        self.regressor = nn.Conv2d(ours, theirs, 1)

    @classmethod
    def made(cls, given: Given) -> Sequence[Term]:
        """With --hint-weight."""
        return [cls.fresh(given, given.config.hint_weight)]

    @classmethod
    def fresh(cls, given: Given, weight: float = 1.0) -> Hint:
        """At the middle group, with a fresh regressor, which belongs to --seed."""
        with seeded(part_seed(given.config.seed, "regressor")):
            return cls(given.groups[(len(given.groups) - 1) // 2], weight)

    def readers(self) -> dict[str, Reader]:
        """`hint`: the whole map."""
        return {"hint": Reader(self.group.teacher, self.group.size)}

    def forward(self, student: StudentOutputs, teacher: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Compares the regressed map with the hint; `labels` are not read."""
        ours = self.regressor(align(student.maps[self.group.student], self.group.size))
        theirs = teacher["hint"]
        if ours.dtype != torch.float64:
            ours, theirs = ours.float(), theirs.float()
        return self.weight * F.mse_loss(ours, theirs)


class Own(Term):
    """A term of the user's own, which --term names."""

    @classmethod
    def made(cls, given: Given) -> Sequence[Term]:
        """What the callable makes of the pair of networks; its first weights are drawn from --seed.

        Raises:
            ConfigError: it cannot be imported or called, or gives no term.
        """
        config = given.config
        try:
            if not is_callable_name(str(config.term)):
                raise ValueError("no package.module:callable")
            with seeded(part_seed(config.seed, "term")):
                term = imported(str(config.term))(given.pair)
            if not isinstance(term, Term):
                raise TypeError(f"gives a {type(term).__name__}, no factor_transfer.method.losses.Term")
        except Exception as error:  # whatever code of the user's raises
            valid = "package.module:callable, such as new_method:Distances in examples/"
            raise ConfigError(f"--term {config.term}", found=str(error), valid=valid) from error
        term.label = term.label or str(config.term)
        return [term]
