"""Methods under one protocol: every run a process of the ordinary `distill`, in a folder of its own.

COMPARE/METHOD-sSEED/    the run folder of each
        METHOD-sSEED.yaml the settings that its process was given: `distill --config` runs it again
        METHOD-sSEED.log what its process said
        compare.json     the result, written anew after every run; compare.md says it in words

A run folder is all that is known of a run, so the same command continues, and of finished runs summary.json suffices.
What runs share is made once: of those that need a trained teacher or paraphraser the first makes it, the others wait
for its file and take it. Where that file is gone, the next run that needs it makes it again, to the same bits on the
same machine.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from factor_transfer.compare.matched import STRETCHED, Costs, awaited, costs, finished, matched_settings
from factor_transfer.compare.plan import CompareConfig, Plan, PlannedRun, planned
from factor_transfer.compare.result import outcome
from factor_transfer.compare.shared import TAKEN, needs, shared_in, takes
from factor_transfer.compare.tuning import trials, tune
from factor_transfer.compare.words import write_outcome
from factor_transfer.settings import written_settings
from factor_transfer.training.engine import stop_signals
from factor_transfer.training.run_folder import DEFAULTS, FREE, Run, same_before_forms
from factor_transfer.training.summary import read_summary
from factor_transfer.util.checks import flag
from factor_transfer.util.console import job_bar, say, warn
from factor_transfer.util.errors import ConfigError, Interrupted, RunError
from factor_transfer.util.files import locked, read_json, write_atomic

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
            _delete(trials(plan, {}))
        if config.tune:
            plan = planned(config, tune(plan, _worked))
        failures = _worked(plan)
        result = outcome(plan)
        write_outcome(plan.folder, result)
    if failures:
        raise RunError(
            f"{len(failures)} of {len(plan.runs)} runs failed: {', '.join(failures)}",
            found="\n".join(["", *(f"{name}: {said}" for name, said in failures.items())]),
            hint="mend what they say; the same command continues, and the finished runs stay",
        )
    return plan.folder, result


def _worked(plan: Plan) -> dict[str, str]:
    """Run what is not finished of a plan; what failed, and what it said.

    Raises:
        RunError: runs that are there were made with other settings.
    """
    for run in plan.runs:
        _check_settings(run, plan)
    return _Runner(plan).work()


class _Runner:
    """The processes of a comparison."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.pending = [run for run in plan.runs if not run.finished]
        self.running: dict[str, tuple[PlannedRun, subprocess.Popen[bytes]]] = {}
        self.shared = shared_in(plan.runs)
        self.costs = self._costs()
        self.failures: dict[str, str] = {}
        self.bar: Callable[[float, str], None] | None = None
        self.done, self.began = 0, time.monotonic()

    def work(self) -> dict[str, str]:
        """Run all that is pending, as many at once as --jobs; what failed, and what it said."""
        there = len(self.plan.runs) - len(self.pending)
        say(f"compare: {len(self.plan.runs)} runs in {self.plan.folder}, {there} of them finished")
        try:
            with stop_signals() as stop, job_bar(sum(run.config.epochs for run in self.plan.runs)) as bar:
                self.bar = bar
                while self.pending or self.running:
                    self._reap()
                    if stop.signum:
                        self._stop(stop.signum)
                        raise Interrupted(stop.signum)
                    if self.failures and not (self.done or there):
                        self.pending.clear()  # the first runs failed: so would the others
                    self._give_up()
                    while len(self.running) < self.plan.config.jobs and self._start_next():
                        pass
                    if bar is not None:
                        bar(self._passes(), ", ".join(self.running))
                    time.sleep(POLL_SECONDS)
        finally:
            self._stop(signal.SIGTERM)
        return self.failures

    def _start_next(self) -> bool:
        """Start the first pending run that need not wait for another; False where there is none."""
        for run in self.pending:
            settings = None if _held(run.folder) else self._settings(run)
            if settings is not None:
                self.pending.remove(run)
                self._start(run, settings)
                return True
        return False

    def _start(self, run: PlannedRun, settings: Mapping[str, Any]) -> None:
        file, log = _beside(run, ".yaml"), _beside(run, ".log")
        write_atomic(file, written_settings(settings))
        # Code that the settings name was named by whoever started the comparison.
        words = ["distill", "--config", str(file), "--trust-config"]
        code = str(Path(__file__).parents[2])  # the very code that runs here, wherever it was found
        path = os.pathsep.join([code, *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("ab") as output:
            output.write(f"$ factor-transfer {' '.join(words)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "factor_transfer", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C comes from here, once
                preexec_fn=_end_with_parent,  # noqa: PLW1509 (it makes one system call)
            )
        self.running[run.name] = run, process
        if self.bar is None:
            say(f"{run.name}: started, {len(self.pending)} to come")

    def _passes(self) -> float:
        """How many of the planned passes are done; those of a matched baseline are shares of the passes planned."""
        ended = {run.name for run in self.plan.runs} - {run.name for run in self.pending} - self.running.keys()
        done = float(sum(run.config.epochs for run in self.plan.runs if run.name in ended))
        for run, _ in self.running.values():
            there = Run(run.folder)
            if there.begun:
                planned = int((_saved(run) or {}).get("epochs", run.config.epochs))
                done += run.config.epochs * len(there.metrics("student")) / planned
        return done

    def _reap(self) -> None:
        """Take note of the runs that have ended."""
        for name, (run, process) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            self.costs = self._costs()
            if code == 0 and run.finished:
                self.done += 1
                self._tell(run)
            else:
                self.failures[name] = _last_words(_beside(run, ".log"), code)
                warn(f"{name} failed: {self.failures[name]}")

    def _tell(self, run: PlannedRun) -> None:
        write_outcome(self.plan.folder, outcome(self.plan))
        summary = read_summary(run.folder)
        left = len(self.pending) + len(self.running)
        value = summary.value("student")
        found = "finished" if value is None else f"{summary.metric.label} {summary.metric.shown(value)}"
        if left and self.bar is None:
            minutes = (time.monotonic() - self.began) / self.done * left / 60
            found += f"; {left} to go, about {max(minutes, 1):.0f} min"
        say(f"{run.name}: {found}")

    def _stop(self, signum: int) -> None:
        """Let all runs under way save and end."""
        for _, process in self.running.values():
            with suppress(ProcessLookupError):
                process.send_signal(signum)
        for _, process in self.running.values():
            process.wait()
        self.running.clear()

    def _settings(self, run: PlannedRun) -> dict[str, Any] | None:
        """The settings to start a run with; None while another makes what it will take."""
        if self._cache_is_filling(run):
            return None
        settings = run.config.to_dict()
        if Run(run.folder).begun:
            return settings | _taken_by(run)
        if self.plan.variant(run).matched is not None:
            matched = matched_settings(self.plan, run, self.costs)
            if matched is None:
                return None
            settings |= matched
        for shared in self.shared[run.name]:
            taken = shared.taken()
            maker = next(each for each in shared.runs if each in self.pending or each.name in self.running)
            if taken is None and maker is not run:
                return None
            settings |= taken or {}
        return settings

    def _costs(self) -> Costs:
        """What the finished runs have cost."""
        return costs(self.plan, self.shared, finished(self.plan))

    def _give_up(self) -> None:
        """Fail the matched runs whose passes will never be known: what they wait for has ended without them."""
        ahead = {*self.pending, *(run for run, _ in self.running.values())}
        for run in [run for run in self.pending if self.plan.variant(run).matched is not None]:
            waits = [] if Run(run.folder).begun else awaited(self.plan, run, self.costs)
            if waits and not ahead.intersection(waits):
                self.pending.remove(run)
                lost = [each.name for each in waits if not each.finished]
                why = "failed" if lost else "told no compute: a version made it that counted none"
                self.failures[run.name] = f"not started: {', '.join(lost or [each.name for each in waits])} {why}"
                warn(f"{run.name}: {self.failures[run.name]}")

    def _cache_is_filling(self, run: PlannedRun) -> bool:
        """Whether a run under way still fills the factor cache that this one will read."""
        if not run.config.views:
            return False
        for other, _ in self.running.values():
            there = Run(other.folder)
            views = there.pins().get("views") if run.config.views == "auto" else run.config.views
            if other.variant == run.variant and (views is None or len(there.metrics("student")) < int(views)):
                return True
        return False


def _beside(run: PlannedRun, ending: str) -> Path:
    """A file of the run's name in the comparison's folder."""
    return run.folder.with_name(run.name + ending)


def _written(run: PlannedRun) -> dict[str, Any] | None:
    """The settings that the run which is there wrote down; None where nothing was computed."""
    folder = run.folder
    if (folder / "summary.json").exists():
        found: dict[str, Any] = read_json(folder / "summary.json").get("settings", {})
    elif Run(folder).begun and (folder / "config.json").exists():
        found = read_json(folder / "config.json")
    else:
        return None
    return found


def _saved(run: PlannedRun) -> dict[str, Any] | None:
    """The settings of the run that is there; None where nothing was computed."""
    found = _written(run)
    return None if found is None else {**DEFAULTS, **found}


def _taken_by(run: PlannedRun) -> dict[str, Any]:
    """Of a run that has begun, the settings that name what it takes of another, and the passes that follow from it."""
    saved = _saved(run) or {}
    taken = [name for names in TAKEN.values() for name in names]
    return {name: saved[name] for name in [*taken, *STRETCHED] if name in saved}


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
    here = run.config.to_dict()
    skip = FREE.union(*(TAKEN[what] for what in needs(run) if takes(what, saved)))
    if plan.variant(run).matched is not None:
        matched = matched_settings(plan, run, costs(plan, shared_in(plan.runs), finished(plan)))
        here, skip = here | (matched or {}), skip.union(() if matched else STRETCHED)
    other = [name for name in here if name not in skip and saved.get(name) != here[name]]
    if run.finished:
        own = _written(run) or {}
        other = [name for name in other if not same_before_forms(name, own, here[name])]
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
        folder = run.folder
        if (folder / "config.json").exists() or run.finished:
            shutil.rmtree(folder)
        for ending in (".yaml", ".log"):
            _beside(run, ending).unlink(missing_ok=True)


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
