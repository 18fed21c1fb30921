"""What a person sees while a run works: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from factor_transfer.util.errors import harmless
from factor_transfer.util.forecast import Forecast

_console = Console(stderr=True, highlight=False, emoji=False)
PLAIN_SECONDS = 20
"""Without a terminal a line is printed this often inside a pass, and at its end."""


class _Shown:
    """What is shown of the job under way."""

    verbose = False
    forecast = Forecast({})
    held = ""
    """The last pass of the stage under way, whose line was not printed."""


def begin(costs: Mapping[str, float], *, verbose: bool = False) -> None:
    """Begin a job: `costs` of the stages left, in any unit, tell the time left; `verbose` prints every pass."""
    _Shown.verbose, _Shown.forecast, _Shown.held = verbose, Forecast(costs), ""


def say_pass(text: str) -> None:
    """A line about a pass. On a terminal only a stage's last one is printed, by `end_stage`; `verbose` prints all."""
    if _console.is_terminal and not _Shown.verbose:
        _Shown.held = text
    else:
        say(text)


def end_stage(stage: str) -> None:
    """A stage has trained to its end."""
    if _Shown.held:
        say(_Shown.held)
    _Shown.held = ""
    _Shown.forecast.end(stage)


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


Share = Callable[[float], float | None]
"""Given the share of a pass that is done, gives the seconds that the job will still take."""


class PassBar:
    """Progress of one pass: call it with the number of images and the values so far."""

    def __init__(self, label: str, total: int, progress: Progress | None, share: Share) -> None:
        self._label, self._total, self._progress, self._share = label, total, progress, share
        self._task = progress.add_task("", total=total) if progress else None
        self._done, self._start = 0, time.monotonic()
        self._told = self._start

    def __call__(self, images: int, values: Mapping[str, float]) -> None:
        """Advance by `images` and show `values`; on a terminal the first of them, for it has one line."""
        self._done += images
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        left = self._share(self._done / self._total)
        if self._progress is not None and self._task is not None:
            first = formatted(dict([*values.items()][:1]))
            text = "  ".join([self._label, first, *([] if left is None else [_left(left)])])
            self._progress.update(self._task, advance=images, description=text)
        elif now - self._told > PLAIN_SECONDS:
            self._told = now
            ahead = f"{(self._total - self._done) / rate:.0f} s left" if left is None else _left(left)
            speed = f"{rate:,.0f} images/s  {ahead}"
            say(f"{self._label}  {self._done}/{self._total}  {formatted(values)}  {speed}")


@contextmanager
def pass_bar(label: str, total: int, *, before: int = 0, passes: int = 0) -> Iterator[PassBar]:
    """A bar over `total` images; it leaves no line behind.

    Where `label` is a stage of a job, `before` of its `passes` are done, and the time left is that of the whole job.
    """

    def share(done: float) -> float | None:
        return _Shown.forecast.at(label, (before + done) / passes) if passes else None

    share(0.0)
    shown = f"{label} {before + 1}/{passes}" if passes else label
    if not _console.is_terminal or _console.quiet:
        yield PassBar(shown, total, None, share)
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn()]
    if not passes:
        columns.append(TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True) as progress:
        yield PassBar(shown, total, progress, share)


def _left(seconds: float) -> str:
    """In words, no finer than a forecast is.

    >>> _left(42.3), _left(200), _left(9000)
    ('42 s left in all', '3 min left in all', '2.5 h left in all')
    """
    minutes = seconds / 60
    shown = f"{seconds:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
    return f"{shown} left in all"


@contextmanager
def job_bar(total: float) -> Iterator[Callable[[float, str], None] | None]:
    """On a terminal, one line for a job of many runs: call it with how much of `total` is done, and what is under way.

    Elsewhere None: lines say what begins and ends.
    """
    if not _console.is_terminal or _console.quiet:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True, speed_estimate_period=300) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, text: progress.update(task, completed=done, description=escape(text))


def formatted(values: Mapping[str, float]) -> str:
    """`{"loss": 1.23456, "top1": 50.0}` as `loss 1.235  top1 50`."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
