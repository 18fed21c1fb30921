"""Methods under one protocol: every run a process of the ordinary `distill`, in a folder of its own.

COMPARE/METHOD-sSEED/    the run folder of each
        METHOD-sSEED.log what its process said
        compare.json     the result, written anew after every run; compare.md says it in words

A run folder is all that is known of a run, so the same command continues, and of finished runs summary.json suffices.
What runs share is made once: the first run that needs a trained teacher or paraphraser makes it, and the others take
its file. Where that file is gone, the next run that needs it makes it again, to the same bits on the same machine.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from factor_transfer.compare.plan import CompareConfig, Plan, PlannedRun, planned
from factor_transfer.compare.result import outcome, write_outcome
from factor_transfer.config import Config
from factor_transfer.method.term import numbered
from factor_transfer.report.html import repeat_command
from factor_transfer.training.engine import stop_signals
from factor_transfer.training.run_folder import DEFAULTS, FREE, Run
from factor_transfer.training.summary import read_summary
from factor_transfer.util.arguments import names_in
from factor_transfer.util.checks import acting_on, flag
from factor_transfer.util.console import say, warn
from factor_transfer.util.errors import ConfigError, Interrupted, RunError
from factor_transfer.util.files import fingerprint, locked, read_json

Made = Literal["teacher", "paraphraser"]
"""What runs share."""

POLL_SECONDS = 0.5


def compare(config: CompareConfig) -> tuple[Path, dict[str, Any]]:
    """Run what is not finished of a comparison, and say what comes out.

    Returns:
        The folder, and the content of its compare.json.

    Raises:
        ConfigError: the settings do not make a comparison.
        RunError: the folder is foreign, in use, or has runs with other settings; or runs failed.
        Interrupted: SIGINT or SIGTERM came; the runs under way are saved.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        found = f"{os.environ['WORLD_SIZE']} processes, of which each would start every run"
        raise ConfigError("compare under a launcher", found=found, hint="start it once, with --jobs for runs at once")
    plan = planned(config)
    _check_folder(plan.folder)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {plan.folder}", found=str(error), valid="a folder that can be written to") from error
    with locked(plan.folder / "lock"):
        if config.overwrite:
            _delete(plan)
        for run in plan.runs:
            _check_settings(run, plan)
        failures = _Runner(plan).work()
        result = outcome(plan)
        write_outcome(plan.folder, result)
    if failures:
        raise RunError(
            f"{len(failures)} of {len(plan.runs)} runs failed: {', '.join(failures)}",
            found="\n".join(["", *(f"{name}: {said}" for name, said in failures.items())]),
            hint="mend what they say; the same command continues, and the finished runs stay",
        )
    return plan.folder, result


class _Runner:
    """The processes of a comparison."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.pending = [run for run in plan.runs if not finished(run)]
        self.running: dict[str, tuple[PlannedRun, subprocess.Popen[bytes]]] = {}
        self.makes: dict[str, set[Made]] = {}  # of the runs that were started here
        self.keys = {run.name: {what: _key(what, run) for what in _needs(run)} for run in plan.runs}
        self.sharing: dict[str, list[PlannedRun]] = {}
        for run in plan.runs:
            for key in self.keys[run.name].values():
                self.sharing.setdefault(key, []).append(run)
        self.failures: dict[str, str] = {}
        self.done, self.began = 0, time.monotonic()

    def work(self) -> dict[str, str]:
        """Run all that is pending, as many at once as --jobs; what failed, and what it said."""
        there = len(self.plan.runs) - len(self.pending)
        say(f"compare: {len(self.plan.runs)} runs in {self.plan.folder}, {there} of them finished")
        try:
            with stop_signals() as stop:
                while self.pending or self.running:
                    self._reap()
                    if stop.signum:
                        self._stop(stop.signum)
                        raise Interrupted(stop.signum)
                    if self.failures and not (self.done or there):
                        self.pending.clear()  # the first runs failed: so would the others
                    while len(self.running) < self.plan.config.jobs and self._start_next():
                        pass
                    time.sleep(POLL_SECONDS)
        finally:
            self._stop(signal.SIGTERM)
        return self.failures

    def _start_next(self) -> bool:
        """Start the first pending run that need not wait for another; False where there is none."""
        known: dict[str, str | bool] = {}
        for run in self.pending:
            settings = None if _held(_folder(run)) else self._settings(run, known)
            if settings is not None:
                self.pending.remove(run)
                self._start(run, settings)
                return True
        return False

    def _start(self, run: PlannedRun, settings: Mapping[str, Any]) -> None:
        words = shlex.split(repeat_command(settings))[1:]
        command = [sys.executable, "-m", "factor_transfer", *words, "--out", str(run.config.out)]
        code = str(Path(__file__).parents[2])  # the very code that runs here, wherever it was found
        path = os.pathsep.join([code, *filter(None, [os.environ.get("PYTHONPATH")])])
        with _log(run, self.plan).open("ab") as log:
            log.write(f"$ {shlex.join(['factor-transfer', *command[3:]])}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C comes from here, once
                preexec_fn=_end_with_parent,  # noqa: PLW1509 (it makes one system call)
            )
        self.running[run.name] = run, process
        say(f"{run.name}: started, {len(self.pending)} to come")

    def _reap(self) -> None:
        """Take note of the runs that have ended."""
        for name, (run, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            if code == 0 and finished(run):
                self.done += 1
                self._tell(run)
            else:
                self.failures[name] = _last_words(_log(run, self.plan), code)
                warn(f"{name} failed: {self.failures[name]}")

    def _tell(self, run: PlannedRun) -> None:
        write_outcome(self.plan.folder, outcome(self.plan))
        summary = read_summary(_folder(run))
        left = len(self.pending) + len(self.running)
        minutes = (time.monotonic() - self.began) / self.done * left / 60
        value = summary.value("student")
        found = "finished" if value is None else summary.metric.shown(value)
        say(f"{run.name}: {found}; {left} to go, about {minutes:.0f} min")

    def _stop(self, signum: int) -> None:
        """Let all runs under way save and end."""
        for _, process in self.running.values():
            with suppress(ProcessLookupError):
                process.send_signal(signum)
        for _, process in self.running.values():
            process.wait()
        self.running.clear()

    # -- what runs share

    def _settings(self, run: PlannedRun, known: dict[str, str | bool]) -> dict[str, Any] | None:
        """The settings to start a run with; None while another makes what it will take. `known`: by key, `_shared`."""
        if self._cache_is_filling(run):
            return None
        needs = self.keys[run.name]
        if Run(_folder(run)).begun:
            settings = run.config.to_dict() | _taken_by(run)
            self.makes[run.name] = {what for what in needs if not taken(what, settings)}
            return settings
        for what, key in needs.items():
            if key not in known:
                known[key] = self._shared(what, key)
            if known[key] is True:
                return None
        settings, there = run.config.to_dict(), {what: known[key] for what, key in needs.items() if known[key]}
        if "teacher" in there:
            settings |= {"teacher_weights": there["teacher"], "teacher_epochs": 0}
        if "paraphraser" in there:
            settings["paraphraser"] = there["paraphraser"]
        self.makes[run.name] = needs.keys() - there.keys()
        return settings

    def _shared(self, what: Made, key: str) -> str | bool:
        """The files that some run has made, or taken, and measured; else whether one makes it, or will go on to."""
        waiting = {each.name for each in self.pending}
        awaited = False
        for run in self.sharing[key]:
            folder = _folder(run)
            files = [folder / f"{stage}.safetensors" for stage in _stages(what, run)]
            marks = [folder / "stages" / f"{stage}.json" for stage in _stages(what, run)]
            if (finished(run) or all(mark.exists() for mark in marks)) and all(file.exists() for file in files):
                return ",".join(map(str, files))
            if run.name in self.running:
                awaited |= what in self.makes[run.name]
            elif run.name in waiting and Run(folder).begun:
                awaited |= not taken(what, {**run.config.to_dict(), **_taken_by(run)})
        return awaited

    def _cache_is_filling(self, run: PlannedRun) -> bool:
        """Whether a run under way still fills the factor cache that this one will read."""
        if not run.config.views:
            return False
        for other, _ in self.running.values():
            there = Run(_folder(other))
            views = there.pins().get("views") if run.config.views == "auto" else run.config.views
            if other.variant == run.variant and (views is None or len(there.metrics("student")) < int(views)):
                return True
        return False


def finished(run: PlannedRun) -> bool:
    """Whether a run's result is there."""
    return (_folder(run) / "summary.json").exists()


def taken(what: Made, settings: Mapping[str, Any]) -> bool:
    """Whether a run with these settings takes the teacher (or paraphraser) that another run of its comparison made."""
    if what == "paraphraser":
        return re.fullmatch(r"paraphraser(_\d+)?\.safetensors", Path(settings["paraphraser"] or "").name) is not None
    return not settings["teacher_epochs"] and Path(settings["teacher_weights"] or "").name == "teacher.safetensors"


def _folder(run: PlannedRun) -> Path:
    return Path(run.config.out or "")


def _needs(run: PlannedRun) -> list[Made]:
    """What a run would train besides its student, were it alone."""
    config = run.config
    needs: list[Made] = ["teacher"] if config.teacher_epochs else []
    return [*needs, "paraphraser"] if config.beta and config.paraphraser is None else needs


def _stages(what: Made, run: PlannedRun) -> list[str]:
    """The stages that make it: a paraphraser for each of the teacher's layers."""
    count = len(names_in(run.config.teacher_layer)) if what == "paraphraser" else 1
    return numbered(what, count or 1)


def _key(what: Made, run: PlannedRun) -> str:
    """The same for runs whose settings would make the same teacher, or paraphraser."""
    decides = {name: value for name, value in run.config.to_dict().items() if name in acting_on(Config, what)}
    teacher = _key("teacher", run) if what == "paraphraser" and run.config.teacher_epochs else ""
    return f"{what} {fingerprint([decides, teacher])}"


def _saved(run: PlannedRun) -> dict[str, Any] | None:
    """The settings of the run that is there; None where nothing was computed."""
    folder = _folder(run)
    if (folder / "summary.json").exists():
        found = read_json(folder / "summary.json").get("settings", {})
    elif Run(folder).begun and (folder / "config.json").exists():
        found = read_json(folder / "config.json")
    else:
        return None
    return {**DEFAULTS, **found}


def _taken_by(run: PlannedRun) -> dict[str, Any]:
    """Of a run that has begun, the settings that name what it takes of another."""
    saved = _saved(run) or {}
    return {name: saved[name] for name in ("teacher_epochs", "teacher_weights", "paraphraser") if name in saved}


# -- the folder


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--out {folder}", found="a file", valid="a new or empty folder, or one of a comparison")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    ours = {"lock", "compare.json", "compare.md"} & names or list(folder.glob("*/summary.json"))
    if names and ("config.json" in names or not ours):
        found = (
            "a single run" if "config.json" in names else f"a folder of something else: {', '.join(sorted(names)[:5])}"
        )
        raise RunError(f"--out {folder}", found=found, valid="a new or empty folder, or one of a comparison")


def _check_settings(run: PlannedRun, plan: Plan) -> None:
    """A run that is there was made with what is asked for now.

    Raises:
        RunError: it was not; the message names the settings.
    """
    saved = _saved(run)
    if saved is None:
        return
    here, skip = run.config.to_dict(), set(FREE)
    needs = _needs(run)
    if "teacher" in needs and taken("teacher", saved):
        skip |= {"teacher_epochs", "teacher_weights"}
    if "paraphraser" in needs and taken("paraphraser", saved):
        skip.add("paraphraser")
    other = [name for name in here if name not in skip and saved.get(name) != here[name]]
    if other:
        differing = "; ".join(f"{flag(name)} {saved.get(name)} there, {here[name]} here" for name in other)
        raise RunError(
            f"--out {plan.folder}",
            found=f"{run.name}, a run with other settings: {differing}",
            hint="give the same settings to continue, another --out, or --overwrite",
        )


def _delete(plan: Plan) -> None:
    """Delete the runs that are about to be made, and nothing else."""
    for run in plan.runs:
        folder = _folder(run)
        if (folder / "config.json").exists() or finished(run):
            shutil.rmtree(folder)
        _log(run, plan).unlink(missing_ok=True)


def _log(run: PlannedRun, plan: Plan) -> Path:
    return plan.folder / f"{run.name}.log"


def _held(folder: Path) -> bool:
    """Whether a process still works in a run folder: one whose comparison was killed saves before it ends."""
    if not (folder / "lock").exists():
        return False
    try:
        with locked(folder / "lock"):
            return False
    except RunError:
        return True


def _last_words(log: Path, code: int) -> str:
    """What a process that failed said last."""
    lines = log.read_text(errors="replace").rstrip().splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith(("$ ", "error: "))]
    if code < 0:
        why = "most often because memory ran out" if code == -signal.SIGKILL else "by someone else"
        return f"ended by {signal.Signals(-code).name}, {why} (see {log})"
    last = lines[starts[-1] :] if starts and lines[starts[-1]].startswith("error: ") else lines[-3:]
    return "\n".join(last).removeprefix("error: ") + f" (see {log})"


def _end_with_parent() -> None:
    """In the new process: if this one is killed it is asked to end, and saves. (Linux; elsewhere it works on.)"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
