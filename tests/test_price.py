"""What a run costs, counted: against numbers worked out by hand from the layers' sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factor_transfer.config import Config
from factor_transfer.networks.pair import Pair, load_side
from factor_transfer.training.form import DEAREST_STEP, with_form
from factor_transfer.training.objective import Objective, fresh_paraphrasers
from factor_transfer.training.paraphraser import BATCH, MOST_MAPS, MOST_STEPS
from factor_transfer.training.price import Price, price_of

ENCODER = 9 * 64 * (64 * 64 + 64 * 32 + 32 * 32)
"""Three 3x3 convolutions from 64 to 32 channels at 8x8; the translator's and the decoder's are as large."""


def priced(**settings: Any) -> tuple[Price, list[str]]:
    config = Config(data="digits", teacher="cifar_resnet56", student="cifar_resnet20", **settings)
    pair = Pair(load_side("teacher", config, 10, 32), load_side("student", config, 10, 32))
    config, _ = with_form(config, pair)
    kept = [paraphraser.factor_channels for paraphraser in fresh_paraphrasers(config, pair)]
    price = price_of(config, pair, Objective(config, pair, kept, 10), torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    return price, list(price.lines(config, images=1000))


def test_price__is_that_of_the_layers() -> None:
    price, lines = priced(paraphraser_epochs=6)
    assert price.terms.multiply_adds == price.readers.multiply_adds == ENCODER
    assert price.paraphraser.multiply_adds == 2 * ENCODER
    assert price.student.parameters == 269_722
    assert price.student.multiply_adds == pytest.approx(40.55e6, rel=0.01)  # He et al. 2016 give 41 M
    assert price.teacher.multiply_adds == pytest.approx(125.5e6, rel=0.01)
    step = 3 * price.student.multiply_adds
    assert price.cached_step == pytest.approx(1 + 3 * ENCODER / step)
    assert price.live_step == pytest.approx((step + 4 * ENCODER + price.teacher.multiply_adds) / step)
    assert price.paraphraser_pass == pytest.approx((6 * ENCODER + price.teacher.multiply_adds) / step)
    assert f"a step costs {price.live_step:.2f} times" in lines[0]
    assert f"the paraphraser costs {6 * price.paraphraser_pass:.1f} passes" in lines[1]
    assert "; --views auto would lower it" in lines[0], "no map is wide enough for the slim form"


def test_price__advises_no_cached_views_to_a_sampler_that_refuses_them() -> None:
    price, lines = priced(sampler="balanced")
    assert price.live_step > DEAREST_STEP
    assert "--views auto" not in lines[0]


def test_price__names_the_slim_form_only_where_it_would_reduce_a_map() -> None:
    tiny = {"student_args": {"layers": (1, 1, 1), "channels": (4, 8, 16)}}
    price, lines = priced(**tiny, factor_form="paper")
    assert price.cached_step > DEAREST_STEP
    assert "--factor-form" not in lines[0]
    wide, lines = priced(**tiny, factor_form="paper", teacher_args={"channels": (16, 32, 128)})
    assert wide.wide
    assert "; --factor-form slim and --views auto would lower it" in lines[0]


def test_price__of_a_paraphraser_on_kept_maps() -> None:
    price, lines = priced()
    teacher, student = price.teacher.multiply_adds, price.student.multiply_adds
    trained = MOST_STEPS * BATCH * 3 * 2 * ENCODER
    whole = (1000 * teacher + trained) / (3 * student * 1000)
    assert price.paraphraser_stage(Config(data="digits", teacher="a", student="b"), 1000) == pytest.approx(whole)
    assert f"costs at most {whole:.1f} passes" in lines[1]
    many = price.paraphraser_stage(Config(data="digits", teacher="a", student="b"), 100_000)
    assert many == pytest.approx((MOST_MAPS * teacher + trained) / (3 * student * 100_000))


def test_price__of_the_slim_form() -> None:
    price, _ = priced(factor_form="slim", factor_width=16)
    layers = 9 * 64 * (16 * 16 + 16 * 8 + 8 * 8)  # 16 channels to 8, at 8x8
    assert price.terms.multiply_adds == layers + 64 * 64 * 16
    assert price.readers.multiply_adds == layers + 64 * 64 * 8  # half as many components as channels
    assert price.paraphraser.multiply_adds == 2 * layers  # of the reduced map
    live, _ = priced(factor_form="slim", factor_width=16, paraphraser_epochs=6)
    assert live.paraphraser.multiply_adds == 2 * layers + 2 * 64 * 64 * 8


def test_price__counts_what_the_terms_train_and_read() -> None:
    alone, said = priced(beta=0)
    assert (alone.live_step, alone.taught, said) == (pytest.approx(1 + alone.teacher.multiply_adds / (
        3 * alone.student.multiply_adds)), False, [])  # fmt: skip
    kd, said = priced(beta=0, kd_weight=1.0)
    assert kd.cached_step == 1
    assert kd.cached
    assert len(said) == 1
    hint, said = priced(beta=0, hint_weight=1.0)
    assert hint.terms.multiply_adds > 0
    assert not hint.cached
    assert "on disk" not in said[0]
    two, _ = priced(teacher_layer="layer2,layer3", student_layer="layer2,layer3")
    assert two.terms.multiply_adds == two.readers.multiply_adds == 2 * ENCODER  # 32 channels at 16x16 cost the same
    assert two.layers == 2


def test_price__leaves_the_networks_as_they_are() -> None:
    config = Config(data="digits", teacher="cifar_resnet20", student="cifar_resnet20", seed=1)
    pair = Pair(load_side("teacher", config, 10, 32), load_side("student", config, 10, 32))
    kept = [paraphraser.factor_channels for paraphraser in fresh_paraphrasers(config, pair)]
    objective = Objective(config, pair, kept, 10)
    modules = [pair.teacher.network.module, pair.student.network.module, *objective.terms]
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    modes = [module.training for module in modules]
    images = torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)
    drawn = torch.random.get_rng_state()
    price_of(config, pair, objective, images)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert modes == [module.training for module in modules]
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
