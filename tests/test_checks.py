"""Every field of settings takes a value that has a meaning, or names its flag."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from cyclopts.validators import Number
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factor_transfer.compare.plan import CompareConfig
from factor_transfer.config import Config, DataConfig, SuggestConfig
from factor_transfer.data.dataset import open_data
from factor_transfer.export.predict import predict_images
from factor_transfer.export.shipping import Choices
from factor_transfer.training.schedule import Plan, optimizer_and_schedule
from factor_transfer.util import checks
from factor_transfer.util.checks import acting_on, flag, free
from factor_transfer.util.errors import ConfigError, FactorTransferError

NEEDED: dict[Any, dict[str, Any]] = {
    DataConfig: {"data": "digits"},
    SuggestConfig: {"data": "digits", "teacher": "a"},
    Config: {"data": "digits", "teacher": "a", "student": "b"},
    CompareConfig: {"data": "digits", "teacher": "a", "student": "b"},
    Choices: {},
}
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 1, 5, -3, 0.5, 10**400, -(10**30), 1e308, True, False])
)
ODD = st.one_of(
    NUMBERS, NUMBERS, st.none(), st.text(max_size=4), st.sampled_from(["auto", "none", "a\0b", "", [], {}, (), object]),
    st.lists(NUMBERS, max_size=4), st.lists(NUMBERS, max_size=4).map(tuple),
    st.dictionaries(st.integers() | st.text(max_size=3), NUMBERS, max_size=2),
)  # fmt: skip
FIELDS = [(kind, each.name) for kind in NEEDED for each in dataclasses.fields(kind)]


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(FIELDS), ODD)
def test_settings__every_field_takes_a_value_of_its_kind_or_names_its_flag(field: tuple[Any, str], value: Any) -> None:
    kind, name = field
    try:
        made = kind(**{**NEEDED[kind], name: value})
    except ConfigError as error:
        assert flag(name) in str(error)
        return
    kept = getattr(made, name)
    numbers = kept if isinstance(kept, (list, tuple)) else [kept]
    for number in numbers:
        if isinstance(number, (int, float)):
            assert np.isfinite(float(number))
    if isinstance(kept, bool):
        assert get_type_hints(kind)[name] is bool
    if isinstance(made, DataConfig):
        made.to_dict() if isinstance(made, Config) else dataclasses.asdict(made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    return image_folder(tmp_path_factory.mktemp("data") / "images", train=3, validation=1)


PLACES = {"data", "data_dir", "cache_dir"}
"""Fields whose values are looked for, or made, on the disk."""


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([each.name for each in dataclasses.fields(DataConfig) if each.name not in PLACES]), ODD)
def test_data__what_is_accepted_shows_images_or_names_its_flag(folder: Path, name: str, value: Any) -> None:
    if name == "img_size" and isinstance(value, int):
        value = value % 300 - 5  # larger ones fill the memory
    try:
        found = open_data(DataConfig(**{"data": str(folder), "workers": 0, name: value}), lambda: 16)
    except FactorTransferError as error:
        assert flag(name) in str(error)
        return
    (batch,) = found.train.batches([np.arange(2)], view=0)
    assert batch.image.shape[:2] == (2, 3)
    assert len(found.validation)


@pytest.mark.parametrize(
    ("name", "value"),
    [("validation_share", 5), ("img_size", -3), ("hflip", 1.5), ("scale", (0.9, 0.1)), ("workers", 10**9),
     ("train_images", 0), ("data_seed", -1), ("skip_corrupt", "yes"), ("validate_on", "test"), ("class_map", "")],
)  # fmt: skip
def test_data__settings_are_checked_for_every_command(name: str, value: Any) -> None:
    for kind in (DataConfig, SuggestConfig, Config, CompareConfig):
        with pytest.raises(ConfigError, match=f"{flag(name)} (?s:.*)valid"):
            kind(**{**NEEDED[kind], name: value})


def test_commands__check_the_numbers_of_their_own() -> None:
    with pytest.raises(ConfigError, match="--images 1\n.*from 2"):
        Choices(images=1)
    with pytest.raises(ConfigError, match="--int8-loss -1\n.*from 0"):
        Choices(int8_loss=-1)
    for number in ({"top": 0}, {"threads": -1}):
        with pytest.raises(ConfigError, match=r"--(top 0|threads -1)\n.*a whole number from 1"):
            predict_images(Path("nowhere"), [], **{"top": 1, "threads": None, "as_json": False, **number})  # type: ignore[arg-type]


def test_numbers__have_limits_wherever_a_field_takes_one() -> None:
    """A field that is added takes any finite number only where that has a meaning, which is then said here."""
    unlimited = {"teacher_mean"}
    for kind, name in FIELDS:
        hint = get_type_hints(kind, include_extras=True)[name]
        if ("int" in str(hint) or "float" in str(hint)) and name not in unlimited:
            assert any(isinstance(each, Number) for each in getattr(hint, "__metadata__", ())), (kind, name)


def test_acting_on__says_what_runs_share() -> None:
    assert "k" not in acting_on(Config, "teacher")
    assert "lr" in acting_on(Config, "teacher") - acting_on(Config, "paraphraser")
    assert {"seed", "beta", "kd_weight"} <= acting_on(Config, "student") - acting_on(Config, "paraphraser")
    assert {"data", "workers"} <= free(Config) - acting_on(Config, "student")
    assert {"data", "data_dir"} <= checks.named(Config) < free(Config)
    assert checks.of_a_machine(Config) < free(Config)
    assert "max_skipped" not in checks.of_a_machine(Config), "each process stops by it"


TRAINING = ("opt", "lr", "momentum", "weight_decay", "sched", "sched_on_updates", "warmup_epochs", "warmup_lr",
            "min_lr", "decay_epochs", "decay_milestones", "decay_rate", "filter_bias_and_bn", "epochs")  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["cosine", "multistep", "step", "poly", "tanh", "wsd"]), st.sampled_from(TRAINING), ODD)
def test_training__what_is_accepted_makes_a_schedule_or_names_a_flag(sched: str, name: str, value: Any) -> None:
    try:
        config = Config(**{**NEEDED[Config], "sched": sched, "epochs": 200, name: value})
        module = torch.nn.Linear(2, 2)
        plan = Plan(stage="student", epochs=config.epochs, lr=config.lr, seed=0)
        optimizer, schedule = optimizer_and_schedule(module, plan, config, steps=3)
        for step in range(1, 4):
            schedule.step_update(step)
        schedule.step(1)
    except ConfigError as error:
        assert {flag(name), "--sched", "--opt", "--warmup-epochs"} & set(str(error).split())
        return
    assert all(np.isfinite(group["lr"]) for group in optimizer.param_groups)
