"""The terms of the student's loss, for code that imports them from here: see `factor_transfer.method.term`."""

from factor_transfer.method.term import Reader, StudentOutputs, Term

__all__ = ["Reader", "StudentOutputs", "Term"]
