"""Constructor arguments of networks, as the command line takes them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
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
