"""Suggested students fit their limits, and their commands are commands."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from factor_transfer.cli import app
from factor_transfer.config import Config, SuggestConfig
from factor_transfer.errors import ConfigError
from factor_transfer.models import count_parameters, load_network
from factor_transfer.suggest import suggest


def ask(**limits: Any) -> list[Any]:
    return suggest(SuggestConfig(data="digits", img_size=16, teacher="cifar_resnet56", threads=1, **limits))[0]


def test_suggest__keeps_to_every_limit_the_largest_first() -> None:
    found = ask(max_params=50_000)
    assert len(found) >= 4
    assert [each.parameters for each in found] == sorted((each.parameters for each in found), reverse=True)
    for each in found:
        network = load_network(each.name, role="student", num_classes=10, img_size=16, args=each.args)
        assert count_parameters(network.module) == each.parameters <= 50_000
        assert each.size_mb == pytest.approx(4 * each.parameters / 1e6, rel=0.1)
        assert each.latency_ms > 0
    assert 0 < len(ask(max_params=50_000, max_size_mb=0.1)) < len(found)


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
