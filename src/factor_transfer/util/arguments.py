"""What the text of a setting means: constructor arguments, names of code, lists of names, sizes of images.

Nothing here imports torch.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import Token

from factor_transfer.util.errors import ConfigError

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


def check_trust(
    given: str,
    values: Mapping[str, Any],
    *,
    trusted: bool,
    valid: str = "names, or --trust-config",
) -> None:
    """Files come from anywhere: one does not get to run code unless its user says so.

    Args:
        given: the file.
        values: its settings that may name code.
        trusted: whether --trust-config was given.
        valid: what the file may have instead.

    Raises:
        ConfigError: a value names code, and the file is not trusted.
    """
    code = [name for name, value in values.items() if is_callable_name(str(value))]
    if code and not trusted:
        raise ConfigError(
            given,
            found=f"{code[0]}: {values[code[0]]}, which is code that would be run",
            valid=valid,
            hint="read that code, then add --trust-config",
        )


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


# -- sizes of images

Size = tuple[int, int]
"""Height and width, in pixels."""

AnySize = int | Sequence[int]
"""One number is a square; two are height and width."""


def as_size(given: AnySize) -> Size:
    """Height and width.

    Raises:
        ValueError: neither one nor two whole numbers above 0.

    >>> as_size(32), as_size([256, 128])
    ((32, 32), (256, 128))
    """
    sides = (given, given) if isinstance(given, int) else tuple(given) if isinstance(given, (list, tuple)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError("one whole number above 0 (a square), or two (height and width)")
    return sides[0], sides[1]


def brief(size: AnySize) -> int | Size:
    """A square as one number, as files hold it.

    >>> brief((32, 32)), brief((256, 128))
    (32, (256, 128))
    """
    height, width = as_size(size)
    return height if height == width else (height, width)


def written(size: AnySize) -> str:
    """As messages write it: height x width.

    >>> written((256, 128))
    '256x128'
    """
    return "x".join(map(str, as_size(size)))


def as_flag(size: AnySize) -> str:
    """As the command line takes it.

    >>> as_flag(32), as_flag((256, 128))
    ('32', '256 128')
    """
    sides = brief(size)
    return str(sides) if isinstance(sides, int) else " ".join(map(str, sides))


def parse_size(_: Any, tokens: Sequence[Token]) -> int | Size:
    """`--img-size 256 128`, or one number for a square."""
    return brief(tuple(int(token.value) for token in tokens) if len(tokens) > 1 else int(tokens[0].value))


SIZE: dict[str, Any] = {"converter": parse_size, "accepts_keys": False, "n_tokens": -1, "consume_multiple": True}
"""How cyclopts reads them."""
