"""What a person sees while a run works: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from factor_transfer.util.errors import harmless

_console = Console(stderr=True, highlight=False, emoji=False)
PLAIN_SECONDS = 20
"""Without a terminal a line is printed this often inside a pass, and at its end."""


def silence() -> None:
    """Print nothing from here on: for all processes but the first."""
    _console.quiet = True


def say(text: str) -> None:
    """A line of progress, on standard error."""
    _console.print(escape(harmless(text)), soft_wrap=True)


def warn(text: str) -> None:
    """A warning, on standard error."""
    _console.print(f"[yellow]warning:[/] {escape(harmless(text))}", soft_wrap=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A result, on standard output: the first column to the left, the others to the right.

    On a narrow terminal cells break between words, and a column of single words stays whole.
    """
    made = Table(title=escape(harmless(title)), title_justify="left")
    for place, name in enumerate(header):
        whole = not any(" " in row[place] for row in rows)
        made.add_column(name, justify="left" if place == 0 else "right", no_wrap=whole)
    for row in rows:
        made.add_row(*(escape(harmless(cell)) for cell in row))
    Console(highlight=False, emoji=False, quiet=_console.quiet).print(made)


class PassBar:
    """Progress of one pass: call it with the number of images and the values so far."""

    def __init__(self, label: str, total: int, progress: Progress | None) -> None:
        self._label, self._total, self._progress = label, total, progress
        self._task = progress.add_task("", total=total) if progress else None
        self._done, self._start = 0, time.monotonic()
        self._told = self._start

    def __call__(self, images: int, values: Mapping[str, float]) -> None:
        """Advance by `images` and show `values`."""
        self._done += images
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        if self._progress is not None and self._task is not None:
            text = f"{self._label}  {formatted(values)}  {rate:,.0f} images/s"
            self._progress.update(self._task, advance=images, description=text)
        elif now - self._told > PLAIN_SECONDS:
            self._told = now
            speed = f"{rate:,.0f} images/s  {(self._total - self._done) / rate:.0f} s left"
            say(f"{self._label}  {self._done}/{self._total}  {formatted(values)}  {speed}")


@contextmanager
def pass_bar(label: str, total: int) -> Iterator[PassBar]:
    """A bar over `total` images; it leaves no line behind."""
    if not _console.is_terminal or _console.quiet:
        yield PassBar(label, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True) as progress:
        yield PassBar(label, total, progress)


def formatted(values: Mapping[str, float]) -> str:
    """`{"loss": 1.23456, "top1": 50.0}` as `loss 1.235  top1 50`."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
