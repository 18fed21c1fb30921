"""Which form paraphraser and translator take: the paper's, or the slim one (`method/slim.py`)."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from factor_transfer.config import Config
from factor_transfer.method.factor_transfer import factor_channels
from factor_transfer.method.slim import WIDTH
from factor_transfer.networks.load import count_parameters
from factor_transfer.networks.pair import Pair, Side
from factor_transfer.networks.weights import width_in
from factor_transfer.training.objective import named_paraphrasers

DEAREST_STEP = 1.25
"""The paper's form is taken where a step with cached factors costs at most so many steps of the student alone."""

WHY = {
    "paper": "its layers cost little beside the student, or are asked for by other settings",
    "slim": "the paper's layers would cost more than a quarter of the student's step, or outweigh the networks",
}
"""Why `auto` chooses a form, in words."""


def with_form(config: Config, pair: Pair) -> Config:
    """The settings, with the form chosen where --factor-form is `auto`.

    The paper's form is chosen where its translators make a step at most `DEAREST_STEP` times as dear as the student's
    own, and paraphrasers and translators hold no more parameters than teacher and student. It is also chosen where no
    map is wide enough to be reduced, and where the settings ask for what the slim form cannot do: more factor channels
    than the map has, or no paraphraser or translator. Of a paraphraser that is given as a file, its own form is chosen.
    """
    if config.factor_form != "auto":
        return config
    if not config.beta or config.k > 1 or config.paraphraser == "none" or config.translator == "none":
        return replace(config, factor_form="paper")
    if config.paraphraser is not None:
        files = [file for _, _, file in named_paraphrasers(config, pair) if file is not None]
        width = next(filter(None, map(width_in, files)), None)
        return replace(config, factor_form="slim" if width else "paper", factor_width=width)
    if all(side.shape[0] <= WIDTH for each in pair.each() for side in (each.teacher, each.student)):
        return replace(config, factor_form="paper")
    translators = encoders = paraphrasers = 0
    for each in pair.each():
        kept = factor_channels(each.teacher.shape[0], config.k)
        own = paper_weights(each.student.shape[0], kept)
        encoders += own
        translators += own * each.size[0] * each.size[1]
        paraphrasers += 2 * paper_weights(each.teacher.shape[0], kept)
    step = 1 + translators / multiply_adds(pair.student)
    small = paraphrasers <= count_parameters(pair.teacher.network.module)
    small &= encoders <= count_parameters(pair.student.network.module)
    return replace(config, factor_form="paper" if step <= DEAREST_STEP and small else "slim")


def paper_weights(channels: int, kept: int) -> int:
    """Weights of three 3x3 convolutions C -> C -> K -> K; at every place of a map each is a multiply-add.

    >>> paper_weights(64, 32)
    64512
    """
    return 9 * (channels * channels + channels * kept + kept * kept)


@torch.no_grad()
def multiply_adds(side: Side) -> float:
    """Of a network's forward pass for one image, counted on a copy of it in eval mode."""
    module = deepcopy(side.network.module).cpu().eval()
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, *side.network.size))
    return float(counter.get_total_flops()) / 2  # torch counts a product and its sum as two
