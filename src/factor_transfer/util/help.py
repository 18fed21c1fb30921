"""The help of commands with many settings: the common ones, or all."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from attrs import evolve
from cyclopts.help import DefaultFormatter
from rich.text import Text

from factor_transfer.util.checks import flag

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

WHOLE = "--help-all"


class Help(DefaultFormatter):
    """cyclopts' own help, without the settings that few need; with `whole` it has all.

    Args:
        settings: names of the settings that may be left out, ...
        common: ... but for these.
    """

    def __init__(self, settings: Collection[str], common: Collection[str]) -> None:
        super().__init__()
        self.whole = False
        self._rare = frozenset(flag(name) for name in settings if name not in common)

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        """Say of a short help that it is one."""
        super().render_description(console, options, description)
        if not self.whole:
            console.print(Text(f"These are the common settings; {WHOLE} shows all.\n"))

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a group of settings, if any of it is shown."""
        shown = [each for each in panel.entries if self.whole or self._rare.isdisjoint(each.all_options)]
        if shown:
            super().__call__(console, options, evolve(panel, entries=shown))
