"""The built-in digits, read and decoded once a process for each size: most runs of the tests are on them.

To import this module is enough. The server of forks imports it and decodes the digits, so that its forks need not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

from factor_transfer.data import dataset, pixels, sources
from factor_transfer.data.frames import Frame

SOURCE: Any = cache(sources._digits)


def _once(real: Callable[..., Any]) -> Callable[..., Any]:
    """A function of images, which is called once for the digits; each caller has a copy of its own."""
    known: dict[Any, Any] = {}

    def made(images: Any, *how: Any) -> Any:
        if images is not SOURCE().train and images is not SOURCE().validation:
            return real(images, *how)
        key = id(images), how
        if key not in known:
            known[key] = real(images, *how)
        return copy.deepcopy(known[key])

    return made


sources._digits = SOURCE
pixels._in_memory = _once(pixels._in_memory)
dataset.look = _once(dataset.look)
for part in (SOURCE().train, SOURCE().validation):  # as most runs see them
    dataset.look(part, None)
    pixels._in_memory(part, Frame.of(8), None)
