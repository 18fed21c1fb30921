"""Compress a trained vision network into a smaller one by Factor Transfer (Kim, Park, Kwak, NeurIPS 2018).

The paper's equations are in `factor_transfer.method`; one call, `distill`, does the whole job. Public names are
loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from factor_transfer.distillation import distill as distill
    from factor_transfer.method.factor_transfer import Paraphraser as Paraphraser
    from factor_transfer.method.factor_transfer import Translator as Translator
    from factor_transfer.method.factor_transfer import factor_transfer_loss as factor_transfer_loss
    from factor_transfer.method.factor_transfer import load_reference_paraphraser as load_reference_paraphraser
    from factor_transfer.method.factor_transfer import normalize_factor as normalize_factor
    from factor_transfer.method.factor_transfer import reconstruction_loss as reconstruction_loss
    from factor_transfer.util.errors import FactorTransferError as FactorTransferError

__version__ = "0.1.0"

_HOMES = {
    "distill": "distillation",
    "FactorTransferError": "util.errors",
    "Paraphraser": "method.factor_transfer",
    "Translator": "method.factor_transfer",
    "factor_transfer_loss": "method.factor_transfer",
    "load_reference_paraphraser": "method.factor_transfer",
    "normalize_factor": "method.factor_transfer",
    "reconstruction_loss": "method.factor_transfer",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 (names, computed)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "distill":
        from factor_transfer.util.machine import check_supported

        check_supported()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
