"""The terms of the student's loss, for code that imports them from here: see `factor_transfer.method.losses`."""

from factor_transfer.method.losses import Reader, StudentOutputs, Term

__all__ = ["Reader", "StudentOutputs", "Term"]
