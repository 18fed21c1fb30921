"""Processes of their own that start at once: forked from one that has imported the package, and has done nothing else.

Importing torch and timm takes seconds, which a test of what the command does need not wait for. Where a test is about
a process from its first line on (what it imports, how it is launched), it uses `subprocess`.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, get_context, set_start_method
from pathlib import Path
from typing import Any

import pytest

CONTEXT = get_context("forkserver")
PRELOAD = [
    "processes", "digits", "factor_transfer.cli", "factor_transfer.distillation", "factor_transfer.export.shipping",
    "factor_transfer.doctor", "factor_transfer.compare.run", "factor_transfer.export.predict",
    "factor_transfer.suggest",
    # what those import once they are at work
    "sklearn.datasets", "torch.utils.tensorboard", "torch.export._trace", "torch.export.pt2_archive._package",
    "torch._functorch.aot_autograd", "torch._export.serde.serialize",
]  # fmt: skip
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
"""Environment of every process: one thread, no network, wide lines."""


TORCHRUN = "from torch.distributed.run import main; main()"
"""`Started([*flags, "-m", "factor_transfer", ...], code=TORCHRUN, forks=True)`, as `torchrun` would."""

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def serve() -> None:
    """Start the process that all others are forked from. Whatever else would start one forks from this one, too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALONE.items():
            patch.setenv(name, value)
        CONTEXT.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()


class Started:
    """A process under way that runs `factor-transfer ARGUMENTS`, or a piece of code where `code` is given.

    With `forks`, what it starts with this Python is forked from it, and so need not import the package either. Without
    `exports`, runs in it (and in what it forks) end as `leave_out` says.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        code: str | None = None,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        forks: bool = False,
        exports: bool = True,
    ) -> None:
        self.arguments = [*map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        serve()
        given = (code, self.arguments, str(cwd or Path.cwd()), {**os.environ, **ALONE, **(environment or {})})
        self._process = CONTEXT.Process(target=_work, args=(*given, [*map(str, self._outputs)], forks, exports))
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
    code: str | None,
    arguments: Sequence[str],
    cwd: str,
    environment: Mapping[str, str],
    outputs: Sequence[str],
    forks: bool,
    exports: bool,
) -> None:
    """What the process does: what `python -m factor_transfer` or `python -c` would."""
    _enter(environment, [os.open(path, os.O_WRONLY | os.O_CREAT) for path in outputs])
    os.chdir(cwd)
    if forks:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess.Popen = subprocess_handler.Popen = popen  # type: ignore[assignment, misc]
    if not exports:
        leave_out(setattr)
    sys.argv = ["factor-transfer" if code is None else "-c", *arguments]
    if code is not None:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
        return
    sys.path.insert(0, "")
    from factor_transfer.cli import main

    main()


def leave_out(replace: Callable[[Any, str, Any], None]) -> None:
    """Runs leave no student.pt2 and no report, and measure no latency, which take a small one half of its time."""
    from factor_transfer import distillation

    replace(distillation, "export_pt2", lambda *_: 0.0)
    replace(distillation, "write_report", lambda *_: None)
    replace(distillation, "latency_ms", lambda modules, _: [1.0] * len(modules))


def _enter(environment: Mapping[str, str], outputs: Sequence[int]) -> None:
    """Leave nothing of the process that this one was forked from."""
    for number, file in enumerate(outputs, start=1):
        os.dup2(file, number)
    set_start_method(None, force=True)  # torch's loader, too, starts its workers as it does by default
    os.environ.clear()
    os.environ.update(environment)


class Forked:
    """What is used of `subprocess.Popen`, for `python -m MODULE ...` and `python FILE ...`."""

    def __init__(self, args: Sequence[str], **more: Any) -> None:
        self.args = args
        self._process = get_context("fork").Process(target=_run, args=(args,), kwargs=more)
        self._process.start()
        self.pid = self._process.pid
        assert self.pid is not None

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `subprocess.Popen` does."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """As `subprocess.Popen` does."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        """As `subprocess.Popen` does."""
        if self.poll() is None:
            assert self.pid is not None
            os.kill(self.pid, signum)


REAL = subprocess.Popen


def popen(args: Sequence[str], **more: Any) -> Any:
    """In place of `subprocess.Popen`."""
    return (Forked if args[0] == sys.executable else REAL)(args, **more)


def _run(
    args: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: int | None = None,
    stdout: Any = None,
    stderr: Any = None,
    start_new_session: bool = False,
    preexec_fn: Callable[[], None] | None = None,
) -> None:
    """What such a process does."""
    assert stdin in {None, subprocess.DEVNULL}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    if start_new_session:
        os.setsid()
    if preexec_fn is not None:
        preexec_fn()
    output = 1 if stdout is None else stdout.fileno()
    _enter(env, [output, 2 if stderr is None else output if stderr == subprocess.STDOUT else stderr.fileno()])
    if "RANK" in env:
        ctypes.CDLL(None).prctl(15, f"rank {env['RANK']}".encode())  # PR_SET_NAME: to be found by it
    subprocess.Popen = REAL  # type: ignore[misc]
    what, *rest = [word for word in args[1:] if word != "-u"]
    if what == "-m":
        sys.path.insert(0, "")
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(what).parent))
        sys.argv = [what, *rest]
        runpy.run_path(what, run_name="__main__")
