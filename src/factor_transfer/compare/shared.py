"""What the runs of a comparison share: a trained teacher, and the paraphrasers of its layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from factor_transfer.compare.plan import PlannedRun
from factor_transfer.config import Config
from factor_transfer.method.term import numbered
from factor_transfer.util.arguments import names_in
from factor_transfer.util.checks import acting_on
from factor_transfer.util.files import fingerprint

Made = Literal["teacher", "paraphraser"]
"""What runs share."""

TAKEN: dict[Made, tuple[str, ...]] = {"teacher": ("teacher_weights", "teacher_epochs"), "paraphraser": ("paraphraser",)}
"""Settings that a run gets so that it uses a file instead of training: the file's path, and 0 passes."""


class Shared(NamedTuple):
    """A trained teacher, or the paraphrasers of its layers, which several runs need and the first of them makes."""

    what: Made
    runs: list[PlannedRun]

    def taken(self) -> dict[str, Any] | None:
        """The settings by which a run takes it from the first that has made and measured it; None if none has."""
        for run in self.runs:
            folder, layers = run.folder, names_in(run.config.teacher_layer)
            stages = numbered(self.what, len(layers) or 1 if self.what == "paraphraser" else 1)
            files = [folder / f"{stage}.safetensors" for stage in stages]
            made = run.finished or all((folder / "stages" / f"{stage}.json").exists() for stage in stages)
            if made and all(file.exists() for file in files):
                return dict(zip(TAKEN[self.what], [",".join(map(str, files)), 0], strict=False))
        return None


def shared_in(runs: Sequence[PlannedRun]) -> dict[str, list[Shared]]:
    """What each run needs besides its student, by the run's name; one object for all that share it."""
    sharing: dict[str, Shared] = {}
    found: dict[str, list[Shared]] = {run.name: [] for run in runs}
    for run in runs:
        for what in needs(run):
            shared = sharing.setdefault(f"{what} {_key(what, run)}", Shared(what, []))
            shared.runs.append(run)
            found[run.name].append(shared)
    return found


def takes(what: Made, saved: Mapping[str, Any]) -> bool:
    """Whether a run with these settings takes it from another run of its comparison."""
    file = Path(saved[TAKEN[what][0]] or "").name
    makes = what == "teacher" and saved["teacher_epochs"]
    return not makes and re.fullmatch(rf"{what}(_\d+)?\.safetensors", file) is not None


def needs(run: PlannedRun) -> list[Made]:
    """What a run would train besides its student, if there were no other."""
    config = run.config
    needs: list[Made] = ["teacher"] if config.teacher_epochs else []
    return [*needs, "paraphraser"] if config.beta and config.paraphraser is None else needs


def _key(what: Made, run: PlannedRun) -> str:
    """The same for runs whose settings would make the same teacher, or paraphraser."""
    decides = {name: value for name, value in run.config.to_dict().items() if name in acting_on(Config, what)}
    teacher = _key("teacher", run) if what == "paraphraser" and run.config.teacher_epochs else ""
    return fingerprint([decides, teacher])
