"""The run folder: settings, environment, metrics, checkpoints, finished stages. Every command reads a run from it.

RUN/config.json         settings as resolved
    environment.json    versions, machine, threads
    fingerprints.json   of the data and of the weights that the run began with
    stages/NAME.json    what a finished stage found; a stage without it is continued
    metrics.jsonl       one line a pass and stage
    checkpoints/        STAGE-EPOCH-STEP.pt with its .sha256, the last two of the stage under way
    *.safetensors       teacher (if trained here), paraphraser, translator, hint (the student after it), student,
                        baseline
    summary.json        the result, written last
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from factor_transfer.config import Config, plain
from factor_transfer.util.checks import flag, free
from factor_transfer.util.console import warn
from factor_transfer.util.errors import ConfigError, RunError, TrainingError
from factor_transfer.util.files import locked, read_json, sha256_file, sweep, write_atomic, write_json

FREE = free(Config)
"""Settings that may differ when a run is continued: they change no result, or what they name is fingerprinted."""

BEFORE_FORMS = {"factor_form": "paper", "paraphraser_epochs": 6}
"""What was usual before these settings could be `auto`."""

DEFAULTS = {each.name: plain(each.default) for each in fields(Config) if each.default is not MISSING} | {
    "factor_form": BEFORE_FORMS["factor_form"]
}
"""Values of settings that the config.json of an older run may lack."""

FORM = "factor form"
"""The pin of the form that paraphraser and translator have."""

IDENTITY = "2"
"""Raise it when a fingerprint of `Run.pin` is made otherwise, so that it cannot be compared with earlier ones."""

KEPT = 2
"""Checkpoints kept of the stage under way: if the newest is damaged, the other is used."""


class Run:
    """An open run folder. Use `open_run` to get one.

    Args:
        folder: where it is.
        writes: False in all processes but the first, which read only.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.watchers: list[Callable[[Any, Mapping[str, float]], None]] = []  # told of every pass; see `trackers`

    def path(self, name: str) -> Path:
        """A file in the folder."""
        return self.folder / name

    @property
    def summary(self) -> dict[str, Any] | None:
        """The result of a finished run; None while there is none."""
        path = self.path("summary.json")
        return _mapping(path, "student", "teacher", "data", "settings") if path.exists() else None

    @property
    def begun(self) -> bool:
        """Whether anything was computed."""
        return any(self.folder.glob("stages/*.json")) or any(self.folder.glob("checkpoints/*.pt"))

    def identity(self) -> str:
        """Differs between folders of one name on two machines: the content of the lock file."""
        path = self.path("lock")
        return path.read_text(errors="replace") if path.exists() else "no such folder"

    # -- what must stay the same

    def pin(self, name: str, value: str, changed: str) -> None:
        """Check a fingerprint against the one that the run began with; the first call records it.

        Raises:
            RunError: it differs; `changed` says so.
        """
        pins = self.pins()
        if pins.setdefault(name, value) != value:
            raise RunError(
                changed,
                found=f"{name} {value[:12]}",
                valid=f"{name} {pins[name][:12]}, with which {self.folder} began",
                hint="give what the run began with, another --out, or --overwrite",
            )
        if self.writes:
            write_json(self.path("fingerprints.json"), pins)

    def pins(self) -> dict[str, str]:
        """The fingerprints that the run is held to, by name."""
        path = self.path("fingerprints.json")
        return read_json(path) if path.exists() else {}

    def environment(self) -> dict[str, Any]:
        """Versions and machine that the run began on."""
        path = self.path("environment.json")
        return read_json(path) if path.exists() else {}

    # -- stages

    def recorded(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage found; None if it is not finished."""
        path = self.path(f"stages/{stage}.json")
        return read_json(path) if path.exists() else None

    def all_recorded(self) -> dict[str, dict[str, Any]]:
        """What every finished stage found, by name."""
        return {path.stem: read_json(path) for path in sorted(self.path("stages").glob("*.json"))}

    def record(self, stage: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """Mark a stage as finished, with its results, and delete its checkpoints.

        Raises:
            TrainingError: a result is not finite, because the very last step diverged.
        """
        for name, value in found.items():
            if isinstance(value, float) and not math.isfinite(value):
                rate = {"teacher": "--teacher-lr", "paraphraser": "--paraphraser-lr"}.get(stage, "--lr")
                hint = f"lower {rate}, and begin anew with --overwrite or another --out"
                raise TrainingError(f"the trained {stage}", found=f"{name} is {value}", valid="a number", hint=hint)
        if self.writes:
            self.path("stages").mkdir(exist_ok=True)
            write_json(self.path(f"stages/{stage}.json"), dict(found))
            self.forget(stage)
        return dict(found)

    def forget(self, stage: str) -> None:
        """Delete the checkpoints of a stage that must not be continued."""
        if self.writes:
            for path in self._checkpoints(stage):
                _delete_checkpoint(path)

    def save_weights(self, name: str, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write `name`.safetensors: contiguous, with `metadata` (plain strings) in its header."""
        if self.writes:
            content = save(
                {
                    key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                    for key, value in state.items()
                },
                dict(metadata),
            )
            write_atomic(self.path(f"{name}.safetensors"), content)

    # -- metrics

    def log(self, stage: str, epoch: int, values: Mapping[str, Any]) -> None:
        """Append the line of a finished pass to metrics.jsonl."""
        if self.writes:
            path = self.path("metrics.jsonl")
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"stage": stage, "epoch": epoch, **values}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                error.filename = str(path)  # a full disk names no file
                raise

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of one stage or all; a line cut by a crash is left out."""
        path = self.path("metrics.jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows = [row for row in map(_parsed, lines) if row is not None]
        return [row for row in rows if stage is None or row["stage"] == stage]

    def trim_metrics(self, stage: str, epochs: int) -> None:
        """Forget lines of `stage` past its first `epochs` passes: they will be run, and written, again."""
        rows = [row for row in self.metrics() if row["stage"] != stage or row["epoch"] <= epochs]
        if self.writes and self.path("metrics.jsonl").exists():
            write_atomic(self.path("metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))

    # -- checkpoints

    def save_checkpoint(self, stage: str, epoch: int, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, whole or not at all, and drop all but the last two.

        torch's own format keeps the strides of optimizer states, which safetensors would lose (channels-last).
        """
        if not self.writes:
            return
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        path = self.path(f"checkpoints/{stage}-{epoch:06d}-{step:08d}.pt")
        path.parent.mkdir(exist_ok=True)
        # The checksum first: a kill between the two leaves no checkpoint that looks damaged.
        write_atomic(path.with_suffix(".sha256"), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
        write_atomic(path, content)
        for old in self._checkpoints(stage)[:-KEPT]:
            _delete_checkpoint(old)

    def load_checkpoint(self, stage: str) -> dict[str, Any] | None:
        """The newest whole checkpoint of a stage; None if it has none. A damaged one is named and passed over."""
        paths = self._checkpoints(stage)
        for path in reversed(paths):
            check = path.with_suffix(".sha256")
            if check.exists() and check.read_bytes().split()[:1] == [sha256_file(path).encode()]:
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True)
                except Exception:  # whatever the reader raises on a foreign or hostile file
                    state = None
                if isinstance(state, dict):
                    return state
            before = "the checkpoint before it is used" if path != paths[0] else f"{stage} begins anew"
            warn(f"{path} is damaged; {before}")
        return None

    def _checkpoints(self, stage: str) -> list[Path]:
        return sorted(self.path("checkpoints").glob(f"{stage}-*.pt"))


@contextmanager
def open_run(folder: Path, config: Config, environment: Mapping[str, Any], *, writes: bool = True) -> Iterator[Run]:
    """Open a new run folder, or continue the one that is there, under its lock.

    Raises:
        RunError: the folder is foreign, in use, not writable, or holds a run with other settings.
    """
    run = Run(folder, writes=writes)
    if not writes:
        yield run
        return
    with ExitStack() as stack:
        try:
            _check_folder(folder, overwrite=config.overwrite)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "lock"))
            if config.overwrite:
                _empty(folder)
            sweep(folder)
            for check in folder.glob("checkpoints/*.sha256"):
                if not check.with_suffix(".pt").exists():
                    check.unlink()
            _continue_or_begin(run, config, environment)
        except OSError as error:
            found = f"{error.strerror or error}: {error.filename or folder}"
            valid = "a folder that can be written to"
            raise RunError(f"--out {folder}", found=found, valid=valid, hint="give another --out") from error
        yield run


def saved_config(folder: Path) -> Config:
    """The settings of the run in `folder`.

    Raises:
        RunError: there is no run.
    """
    if not (folder / "config.json").exists():
        raise RunError(str(folder), found="no run (no config.json)", valid="a folder that `distill` made")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in _mapping(folder / "config.json").items()
    }
    values.setdefault("factor_form", DEFAULTS["factor_form"])
    try:
        return formed(Config(**values), Run(folder).pins().get(FORM))
    except (TypeError, ConfigError) as error:
        raise RunError(
            str(folder / "config.json"), found=f"settings of another version, or damaged: {error}"
        ) from error


def form_of(config: Config) -> str:
    """The form that paraphraser and translator have, as it is pinned: `paper`, `slim`, or `slim 32`."""
    return " ".join(str(part) for part in (config.factor_form, config.factor_width) if part is not None)


def formed(config: Config, form: str | None) -> Config:
    """The settings with what --factor-form auto chose, as `form_of` tells it.

    >>> formed(Config(data="digits", teacher="a", student="b"), "slim 32").factor_width
    32
    """
    if form is None or config.factor_form != "auto":
        return config
    name, _, width = form.partition(" ")
    chosen: Any = name
    return replace(config, factor_form=chosen, factor_width=int(width) if width else None)


def same_before_forms(name: str, saved: Mapping[str, Any], here: Any) -> bool:
    """Whether a setting that is `auto` now stands for what a run of before there was a choice had."""
    return "factor_form" not in saved and here == "auto" and saved.get(name, DEFAULTS[name]) == BEFORE_FORMS.get(name)


def saved_summary(folder: Path) -> dict[str, Any]:
    """The result of the finished run in `folder`.

    Raises:
        RunError: there is none, or it is not finished.
    """
    summary = Run(folder).summary
    if summary is None:
        raise RunError(
            str(folder),
            found="a run that is not finished (no summary.json)",
            valid="a finished run",
            hint="give the command that began it again: it continues",
        )
    return summary


def environment(**more: Any) -> dict[str, Any]:
    """Versions and machine: what a run's bits depend on besides its settings."""
    packages = ("factor-transfer", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        **more,
    }


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--out {folder}", found="a file", valid="a new or empty folder, or one of an earlier run")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    entries = {name for name in names if name != "lock" and not name.endswith(".tmp")}
    if entries and "config.json" not in entries:
        raise RunError(
            f"--out {folder}",
            found=f"a folder that is no run of this program: {', '.join(sorted(entries)[:5])}",
            valid="a new or empty folder, or one of an earlier run",
            hint="give another --out" + ("; --overwrite deletes only runs" if overwrite else ""),
        )


def _continue_or_begin(run: Run, config: Config, now: Mapping[str, Any]) -> None:
    if not run.begun:  # an error ended it before anything was computed: other settings are allowed
        for name in ("config.json", "environment.json", "fingerprints.json"):
            run.path(name).unlink(missing_ok=True)
    if not run.path("config.json").exists():
        write_json(run.path("config.json"), config.to_dict())
    if not run.path("environment.json").exists():
        write_json(run.path("environment.json"), dict(now))
    if not run.path("fingerprints.json").exists():
        write_json(run.path("fingerprints.json"), {"version": IDENTITY})
    if run.summary is None and run.pins().get("version") != IDENTITY:
        raise RunError(
            f"--out {run.folder}",
            found="an unfinished run of an earlier version, whose fingerprints of images and networks say less",
            valid="a run of this version",
            hint="continue it with the version that began it, or give another --out, or --overwrite",
        )
    saved, here = _mapping(run.path("config.json")), config.to_dict()
    there = DEFAULTS | saved
    other = [name for name in here if name not in FREE and there.get(name) != here[name]]
    if run.summary is not None:
        other = [name for name in other if not same_before_forms(name, saved, here[name])]
    if other:
        raise RunError(
            f"--out {run.folder}",
            found="a run with other settings: "
            + "; ".join(f"{flag(name)} {there.get(name)} there, {here[name]} here" for name in other),
            hint="give the same settings to continue it, another --out, or --overwrite",
        )
    before = _mapping(run.path("environment.json"))
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed and run.summary is None:
        warn(f"continued on another machine or version, so not to the same bits: {'; '.join(changed)}")


def _empty(folder: Path) -> None:
    """Delete all but the lock; config.json goes last, so that what a crash leaves is still known as a run."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        if path.name == "lock":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _delete_checkpoint(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".sha256").unlink(missing_ok=True)


def _mapping(path: Path, *keys: str) -> dict[str, Any]:
    """The mapping in a JSON file, which must have `keys`."""
    value = read_json(path)
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        wanted = f"a mapping with {', '.join(keys)}" if keys else "a mapping"
        raise RunError(str(path), found="a damaged file", valid=wanted, hint="restore it, or use another --out")
    return value


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def cpu_name() -> str:
    """The processor, as the system names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
