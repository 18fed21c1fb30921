"""Which form paraphraser and translator take: the paper's, or the slim one (`method/slim.py`)."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import factor_channels
from factor_transfer.method.slim import WIDTH
from factor_transfer.networks.load import count_parameters
from factor_transfer.networks.pair import Pair, Side
from factor_transfer.networks.weights import width_in
from factor_transfer.training.objective import named_paraphrasers
from factor_transfer.training.run_folder import formed

Found = TypeVar("Found")

DEAREST_STEP = 1.25
"""The paper's form is taken where a step with cached factors costs at most so many steps of the student alone."""


def with_form(config: Config, pair: Pair, before: str | None = None) -> tuple[Config, str]:
    """The settings, with the form chosen where --factor-form is `auto`; and why, in words.

    What a run chose `before`, when it began, stays.

    The paper's form is chosen where its translators make a step at most `DEAREST_STEP` times as dear as the student's
    own, and paraphrasers and translators hold no more parameters than teacher and student. It is also chosen where no
    map is wide enough to be reduced, and where the settings ask for what the slim form cannot do: more factor channels
    than the map has, or no paraphraser or translator. A paraphraser of a wide map that is given as a file has a form,
    and decides.
    """
    if config.factor_form != "auto" or before is not None:
        return formed(config, before), "as --factor-form says, or as the run began"
    paper = replace(config, factor_form="paper")
    if not config.beta or config.k > 1 or config.paraphraser == "none" or config.translator == "none":
        return paper, "as other settings ask for it"
    if not any(is_wide(side.shape[0]) for each in pair.each() for side in (each.teacher, each.student)):
        return paper, f"no map has more than {WIDTH} channels"
    if config.paraphraser is not None and any(is_wide(each.teacher.shape[0]) for each in pair.each()):
        files = [file for _, _, file in named_paraphrasers(config, pair) if file is not None]
        width = next(filter(None, map(width_in, files)), None)
        form = paper if width is None else replace(config, factor_form="slim", factor_width=width)
        return form, "that of the file of --paraphraser"
    step, larger = _price_of_the_papers(config, pair)
    if step <= DEAREST_STEP and not larger:
        return paper, f"a step with cached factors costs {step:.2f} times the student's"
    why = f"a step would cost {step:.2f} times the student's" if step > DEAREST_STEP else larger
    return replace(config, factor_form="slim"), f"in the paper's form {why}"


def is_wide(channels: int) -> bool:
    """Whether the slim form, at its usual width, reduces a map of so many channels."""
    return channels > WIDTH


def _price_of_the_papers(config: Config, pair: Pair) -> tuple[float, str]:
    """A step in the paper's form, as a multiple of the student's; and what has too many parameters, or nothing."""
    translators = trained = paraphrasers = 0
    for each in pair.each():
        kept = factor_channels(each.teacher.shape[0], config.k)
        own = paper_weights(each.student.shape[0], kept)
        trained += own
        translators += own * each.size[0] * each.size[1]
        paraphrasers += 2 * paper_weights(each.teacher.shape[0], kept)
    larger = ""
    if paraphrasers > count_parameters(pair.teacher.network.module):
        larger = "the paraphraser would be larger than the teacher"
    elif trained > count_parameters(pair.student.network.module):
        larger = "the translator would be larger than the student"
    return 1 + translators / max(multiply_adds(pair.student), 1), larger


def paper_weights(channels: int, kept: int) -> int:
    """Weights of three 3x3 convolutions C -> C -> K -> K; at every place of a map each is a multiply-add.

    >>> paper_weights(64, 32)
    64512
    """
    return 9 * (channels * channels + channels * kept + kept * kept)


def multiply_adds(side: Side) -> float:
    """Of a network's forward pass for one image, counted on a copy of it in eval mode."""
    module, images = deepcopy(side.network.module).cpu().eval(), torch.zeros(2, 3, *side.network.size)
    return metered(lambda: module(images), images)[1]


def metered(run: Callable[[], Found], images: Tensor) -> tuple[Found, float]:
    """What `run` gives for `images` (B, ...), and its multiply-adds for one of them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = run()
    return found, counter.get_total_flops() / 2 / len(images)  # torch counts a product and its sum as two
