"""One error family: what was given, what was found, what would be valid, what to do next.

Everything a user can cause is a `FactorTransferError`; the command line prints it without a traceback and
leaves with exit code 2. What only a bug can cause is an `assert`.

>>> print(FactorTransferError("--k 0.001", found="64 channels x 0.001 = 0 factor channels", hint="raise --k"))
--k 0.001
  found: 64 channels x 0.001 = 0 factor channels
  next:  raise --k
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence

SHOWN_CHOICES = 12


class FactorTransferError(ValueError):
    """A mistake that its user can mend.

    Args:
        given: what the user gave, beginning with the flag's name where there is one.
        found: what was found in its place.
        valid: what would have been accepted: a sentence, or the choices themselves.
        hint: what to do next.
    """

    def __init__(
        self,
        given: str,
        *,
        found: str | None = None,
        valid: str | Sequence[str] | None = None,
        hint: str | None = None,
    ) -> None:
        self.given, self.found, self.hint = given, found, hint
        self.valid = valid if valid is None or isinstance(valid, str) else listed(valid)
        lines = [given]
        lines += [
            f"  {label + ':':<6} {text}"
            for label, text in (("found", found), ("valid", self.valid), ("next", hint))
            if text
        ]
        super().__init__(harmless("\n".join(lines)))


class ConfigError(FactorTransferError):
    """A setting out of range, or settings that contradict each other."""


class ModelError(FactorTransferError):
    """An unknown network or layer, or weights that do not fit it."""


class DataError(FactorTransferError):
    """Images or classes that are missing, unreadable or contradictory."""


class RunError(FactorTransferError):
    """A run folder that is foreign, damaged, in use, or made with other settings."""


class TrainingError(FactorTransferError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class Interrupted(Exception):  # noqa: N818 (no error: the user or the machine asked)
    """SIGINT or SIGTERM came; the state is saved. `code` is the shell's exit code for that signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the same command continues")
        self.code = 128 + signum


def near(name: str, choices: Iterable[str], n: int = 5) -> list[str]:
    """The choices that look most like `name`, best first.

    >>> near("resnet81", ["resnet18", "vgg13"])
    ['resnet18']
    """
    return difflib.get_close_matches(name, list(choices), n=n, cutoff=0.6)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class, where it has no message.

    >>> first_line(ValueError("no such layer\\n  in this network")), first_line(KeyError())
    ('no such layer', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def harmless(text: str, keep: str = "\n") -> str:
    """`text` with what a terminal would obey or hide (escape sequences, right-to-left marks) written out.

    >>> harmless("cats\\x1b[2J\\u202egnp")
    'cats\\\\x1b[2J\\\\u202egnp'
    """
    return "".join(char if char in keep or char.isprintable() else repr(char)[1:-1] for char in text)


def listed(choices: Sequence[str]) -> str:
    """`choices` in one line, cut after a dozen.

    >>> listed(["a", "b"])
    'a, b'
    """
    more = len(choices) - SHOWN_CHOICES
    return ", ".join(harmless(choice, keep="") for choice in choices[:SHOWN_CHOICES]) + (
        f" and {more} more" if more > 0 else ""
    )
