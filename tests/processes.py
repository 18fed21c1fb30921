"""Processes of their own that start at once: forked from one that has imported the package, and has done nothing else.

Importing torch and timm takes seconds, which a test of what the command does need not wait for. Where a test is about
a process from its first line on (what it imports, how it is launched), it uses `subprocess`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, get_context, set_start_method
from pathlib import Path

import pytest

CONTEXT = get_context("forkserver")
PRELOAD = ["processes", "factor_transfer.distillation", "factor_transfer.shipping", "factor_transfer.doctor",
           "factor_transfer.compare", "factor_transfer.predict", "factor_transfer.suggest"]  # fmt: skip
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
"""Environment of every process: one thread, no network, wide lines."""


Command = Callable[..., "subprocess.CompletedProcess[str]"]


class Started:
    """A process under way that runs `factor-transfer ARGUMENTS`, or a piece of code where `code` is given."""

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        code: str | None = None,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.arguments = [*map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        with pytest.MonkeyPatch.context() as patch:  # for the process that all others are forked from
            for name, value in ALONE.items():
                patch.setenv(name, value)
            CONTEXT.set_forkserver_preload(PRELOAD)
            forkserver.ensure_running()
        given = (code, self.arguments, str(cwd or Path.cwd()), {**os.environ, **ALONE, **(environment or {})})
        self._process = CONTEXT.Process(target=_work, args=(*given, [*map(str, self._outputs)]))
        self._process.start()

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def send_signal(self, signum: int) -> None:
        """As `subprocess.Popen` does."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signum)

    def finished(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end; it is killed after `timeout` seconds."""
        self._process.join(timeout)
        if self.running():
            self.send_signal(signal.SIGKILL)
            self._process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout, *self._read())
        code = self._process.exitcode
        assert code is not None
        return subprocess.CompletedProcess(self.arguments, code, *self._read())

    def _read(self) -> list[str]:
        return [path.read_text() if path.exists() else "" for path in self._outputs]


def _work(
    code: str | None, arguments: Sequence[str], cwd: str, environment: Mapping[str, str], outputs: Sequence[str]
) -> None:
    """What the process does: what `python -m factor_transfer` or `python -c` would."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    set_start_method(None, force=True)  # torch's loader, too, starts its workers as it does by default
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["factor-transfer" if code is None else "-c", *arguments]
    if code is not None:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        return
    sys.path.insert(0, "")
    from factor_transfer.cli import main

    main()
