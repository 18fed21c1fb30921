"""Sizes of images: (height, width), and how flags, files and messages write them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cyclopts import Token

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
