"""Files of settings: the user's own, and the recipes that are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import resources
from pathlib import Path
from typing import Any

from factor_transfer.config import Config, plain
from factor_transfer.util.errors import ConfigError, near

RECIPES = resources.files("factor_transfer") / "recipes"

COMMON = (
    "data", "img_size", "train_images", "teacher", "teacher_weights", "teacher_epochs", "student", "student_weights",
    "student_args", "beta", "kd_weight", "views", "epochs", "batch_size", "lr", "opt", "baseline", "device", "threads",
    "seed", "out", "overwrite", "verbose",
)  # fmt: skip
"""The settings that a short help shows."""

RECIPE = "recipe:"
"""How `--config` names a shipped recipe instead of a file."""


def recipes() -> dict[str, str]:
    """Every shipped recipe, in alphabetical order, with what its first line says of it.

    >>> recipes()["demo"]
    'The settings of `factor-transfer demo`: few images of clothes, and a teacher that has seen more'
    """
    found = {}
    for path in sorted(RECIPES.iterdir(), key=lambda path: path.name):
        name, dot, kind = path.name.rpartition(".")
        if (dot, kind) == (".", "yaml"):
            first, _, _ = path.read_text(encoding="utf-8").partition("\n")
            found[name] = first.lstrip("# ").rstrip(". ")
    return found


def read_settings(given: str) -> dict[str, Any]:
    """The settings behind `--config`: a YAML file's, or those of `recipe:NAME`.

    Raises:
        ConfigError: no such file or recipe, or no settings in it.

    >>> read_settings("recipe:demo")["data"]
    'fashion'
    """
    import yaml

    try:
        values = yaml.safe_load(_text(given))
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--config {given}",
            found=str(error),
            valid=f"a YAML file of settings, or {RECIPE}NAME",
            hint="`factor-transfer recipes` lists the recipes",
        ) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"--config {given}", found=str(values)[:60], valid="settings, one a line: `epochs: 20`")
    return values


def written_settings(values: Mapping[str, Any]) -> str:
    """What a file for `--config` holds of `Config.to_dict`: all that differs from the defaults.

    >>> written_settings({"data": "digits", "epochs": 20, "lr": 0.1})
    'data: digits\\nepochs: 20\\n'
    """
    import yaml

    usual = plain({each.name: each.default for each in fields(Config) if each.default is not MISSING})
    changed = {name: value for name, value in values.items() if name not in usual or value != usual[name]}
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)


def _text(given: str) -> str:
    if not given.startswith(RECIPE):
        return Path(given).read_text(encoding="utf-8")
    name, known = given.removeprefix(RECIPE), recipes()
    if name not in known:
        raise ConfigError(
            f"--config {given}",
            found="no such recipe",
            valid=near(name, known) or list(known),
            hint="`factor-transfer recipes` says what each is for",
        )
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def recipe(name: str, **changed: Any) -> Config:
    """The settings of a shipped recipe, with some changed.

    >>> recipe("demo", epochs=2).epochs
    2
    """
    return Config(**{**read_settings(RECIPE + name), **changed})
