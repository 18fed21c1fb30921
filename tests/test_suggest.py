"""Suggested students fit their limits, and their commands are commands."""

from __future__ import annotations

import shlex
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factor_transfer import suggest as suggesting
from factor_transfer.cli import app
from factor_transfer.config import Config, DataConfig, SuggestConfig
from factor_transfer.networks.load import count_parameters, load_network
from factor_transfer.suggest import _command, suggest
from factor_transfer.util.errors import ConfigError
from processes import serve


@pytest.fixture(autouse=True)
def _one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """How often each network is timed is of no account here; it is timed in forks of one process."""
    serve()
    monkeypatch.setattr(suggesting, "TURNS", 1)


def ask(**limits: Any) -> list[Any]:
    return suggest(SuggestConfig(data="digits", img_size=16, teacher="cifar_resnet56", threads=1, **limits))[0]


def test_suggest__keeps_to_every_limit_the_largest_first() -> None:
    found = ask(max_params=20_000)
    assert len(found) >= 4
    assert [each.parameters for each in found] == sorted((each.parameters for each in found), reverse=True)
    for each in found:
        network = load_network(each.name, role="student", num_classes=10, img_size=16, args=each.args)
        assert count_parameters(network.module) == each.parameters <= 20_000
        assert each.size_mb == pytest.approx(4 * each.parameters / 1e6, rel=0.1)
        assert each.latency_ms > 0
    assert 0 < len(ask(max_params=20_000, max_size_mb=0.06)) < len(found)


TEXTS = st.sampled_from(["a", "my photos/x", "-x", "--data", "none", "auto", "1", "True", "it's", "{a: 1}", "a=b", "ä"])


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, within all limits that a field has."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        return st.one_of([values(each) for each in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        each = arguments[:1] * 2 if arguments[-1] is Ellipsis else arguments
        return st.tuples(*map(values, each)).map(lambda found: tuple(sorted(found)))
    plain = {str: TEXTS, int: st.integers(1, 9), float: st.sampled_from([0.25, 0.5, 1e-7]), bool: st.booleans()}
    return plain.get(hint, st.none())


OTHERS = {name: values(hint) for name, hint in get_type_hints(SuggestConfig).items() if name not in {"data", "teacher"}}
OTHERS["bit_depth"] = st.integers(9, 16)


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({"data": TEXTS, "teacher": TEXTS}, optional=OTHERS))
def test_suggest__keeps_every_setting_of_the_data_in_its_commands(given: dict[str, Any]) -> None:
    config = SuggestConfig(**given)
    words = shlex.split(_command(config, ("cifar_resnet20", {"layers": (1, 1, 1)})))
    _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
    found: Config = bound.arguments["settings"]
    for each in fields(DataConfig):
        assert getattr(found, each.name) == getattr(config, each.name), words
    assert (found.teacher, found.teacher_weights) == (config.teacher, config.teacher_weights)
    assert (found.student, found.student_args) == ("cifar_resnet20", {"layers": (1, 1, 1)})
    assert found.baseline is (config.label_weight > 0)


def test_suggest__gives_commands_that_are_commands() -> None:
    each = ask(max_params=6_000)[0]
    words = shlex.split(each.command)
    _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
    settings: Config = bound.arguments["settings"]
    assert (settings.student, settings.student_args or {}) == (each.name, each.args)
    assert settings.baseline


def test_suggest__says_what_is_least_where_nothing_fits() -> None:
    with pytest.raises(ConfigError, match=r"(?s)--max-params 10\n.*none of .*the least among them: .*parameters"):
        ask(max_params=10)
    with pytest.raises(ConfigError, match="(?s)--max-latency-ms 1e-06.* ms"):
        ask(max_latency_ms=1e-6, max_params=6_000)
    with pytest.raises(ConfigError, match="no limit"):
        ask()
