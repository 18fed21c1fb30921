"""What the text of a setting means: constructor arguments, names of code, lists of names."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import Token

ModelArgs = dict[str, Any]


def parse_model_args(_: Any, tokens: Sequence[Token]) -> dict[str, Any]:
    """Constructor arguments as timm's `--model-kwargs` takes them: `layers=(3,3,3) channels=(16,32,64)`; or JSON.

    >>> parse_model_args(dict, [Token(value="layers=(3,3,3)"), Token(value="act=gelu")])
    {'layers': (3, 3, 3), 'act': 'gelu'}
    """
    text = " ".join(token.value for token in tokens)
    if text.lstrip().startswith("{"):
        values = json.loads(text)
    else:
        pairs = [pair.partition("=") for pair in re.split(r"\s+(?=\w+=)", text.strip())]
        if not all(name.isidentifier() and equals for name, equals, _ in pairs):
            raise ValueError(f"{text!r}: give name=value pairs, such as layers=(3,3,3), or a JSON object")
        values = {name: _literal(value) for name, _, value in pairs}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text[:1] in "([{'\"":
            raise ValueError(f"{text!r}: a bracket or quote that does not close") from None
        return text


MODEL_ARGS: dict[str, Any] = {
    "converter": parse_model_args, "accepts_keys": False, "n_tokens": -1, "consume_multiple": True,
}  # fmt: skip
"""How cyclopts reads them."""


def is_callable_name(name: str) -> bool:
    """True for `package.module:callable`, whose code is run; not for timm's `local-dir:FOLDER`.

    >>> is_callable_name("nets.small:make"), is_callable_name("local-dir:nets"), is_callable_name("resnet18")
    (True, False, False)
    """
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) is not None


def imported(name: str) -> Any:
    """What `package.module:attribute` names; modules in the working folder are found too.

    >>> imported("math:sqrt")(16)
    4.0
    """
    path, _, attribute = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(path), attribute)
    finally:
        sys.path.remove(str(Path.cwd()))


def names_in(value: str | None) -> list[str]:
    """The names in a setting that takes several, with commas.

    >>> names_in("layer2, layer3"), names_in(None)
    (['layer2', 'layer3'], [])
    """
    return [name.strip() for name in (value or "").split(",") if name.strip()]
