"""Writes settings.md, the page of all settings, from the fields of `Config`: `make settings`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from textwrap import fill
from typing import Any, get_args

from factor_transfer.cli import app
from factor_transfer.config import Config
from factor_transfer.report.html import described
from factor_transfer.util.checks import Part, flag, said_of, taken

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

These are all settings of `factor-transfer distill`, in the groups of `factor-transfer distill --help-all`. `doctor` and
`compare` have them too. In Python and in a YAML file their names have underscores: `--batch-size` is `batch_size`. This
page is made from the code by `make settings`.

*Acts on* names the parts of a run that a setting changes. A run is not continued with other settings, except for those
that change no result.
"""


def page() -> str:
    """The text of the page."""
    groups: dict[str, list[str]] = {}
    for argument in app["distill"].assemble_argument_collection():
        name = argument.names[0].removeprefix("--").replace("-", "_")
        if name in FIELD:
            (group,) = argument.parameter.group
            groups.setdefault(getattr(group, "name", str(group)), []).append("\n".join(entry(name)))
    return "\n".join([HEAD, *("\n".join([f"## {group}\n", *entries]) for group, entries in groups.items())])


FIELD = {each.name: each for each in fields(Config)}
HELP = described()


def entry(name: str) -> Iterator[str]:
    """A heading, a line of facts, and the help."""
    default = FIELD[name].default
    takes = taken(Config, name).replace(" that is not empty", "")
    facts = [f"a switch: `{switch(name)}`" if isinstance(default, bool) else takes]
    if default is MISSING:
        facts.append("must be given")
    elif default is not None:
        facts.append(f"default {shown(default)}")
    yield f"### {flag(name)}\n"
    yield f"*{'; '.join(facts)}; {acting(name)}*\n"
    yield f"{fill(HELP[name], 120, break_on_hyphens=False)}\n"


def switch(name: str) -> str:
    """Both flags of a setting that is on or off."""
    return f"{flag(name)}`, `{flag('no_' + name)}"


def shown(default: Any) -> str:
    """A default as the command line takes it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def acting(name: str) -> str:
    """What the setting changes, in words."""
    found = said_of(Config, name)
    if found is None or len(found.parts) == len(get_args(Part)):
        return "acts on everything"
    if found.named:
        return "names a place: what lies there acts on everything"
    parts = " and ".join(part for part in get_args(Part) if part in found.parts)
    changed = f"acts on {parts}" if parts else ""
    read = f", with {' or '.join(f'`{flag(weight)}`' for weight in found.read_by)} above 0" if found.read_by else ""
    return changed + read or "changes no result"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
