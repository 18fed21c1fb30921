"""The paper (`factor_transfer.py`, which needs torch alone), and the terms of the student's loss (`losses.py`).

`slim.py` is the slim form: the paper's layers on reduced maps. A term is a subclass of `Term` in `term.py`.
`presets.py` has the methods that are compared; `health.py` finds values that are not finite, and factors that are the
same for every image. The paper's names can be imported from here: `from factor_transfer.method import Paraphraser`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from factor_transfer.method.factor_transfer import *  # noqa: F403


def __getattr__(name: str) -> Any:  # so that `presets` is read without torch
    return getattr(importlib.import_module("factor_transfer.method.factor_transfer"), name)
