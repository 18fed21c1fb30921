"""What a person sees of a run: a real terminal of 80 columns, whose text is read from the other end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from factor_transfer import distill
from factor_transfer.report.terminal import show
from factor_transfer.util import console

SMALL = {"layers": (1, 1, 1), "channels": (4, 4, 8)}
PASSES = {"teacher_epochs": 3, "paraphraser_epochs": 2, "epochs": 4, "baseline": True}

Seen = Callable[[], list[str]]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """The package writes to a pseudo-terminal; gives the lines that it has been sent so far."""
    there, here = pty.openpty()
    fcntl.ioctl(here, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    read: list[bytes] = []

    def listen() -> None:
        while chunk := os.read(there, 65536):
            read.append(chunk)
            if b"\x04" in chunk:
                return

    listener = threading.Thread(target=listen)
    listener.start()
    with os.fdopen(here, "w") as file:
        monkeypatch.setattr(console, "_console", Console(file=file, highlight=False, emoji=False))

        def seen() -> list[str]:
            file.write("\x04")
            file.flush()
            listener.join()
            text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", b"".join(read).decode())
            return [line.strip() for line in re.split(r"[\r\n\x04]+", text) if line.strip()]

        yield seen
        if listener.is_alive():
            seen()


def of_passes(lines: list[str]) -> list[str]:
    """The lines that stay of passes: `student 4/4 ... 1 s`; a live line ends with its count of images."""
    return [line for line in lines if re.match(r"\w+ \d+/\d+  ", line) and not re.search(r"\d+/\d+$|left in all", line)]


@pytest.mark.usefixtures("unexported")
def test_run__shows_one_live_line_with_the_time_of_the_whole_job_and_keeps_one_for_each_stage(
    terminal: Seen, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill("cifar_resnet20", "cifar_resnet20", images, out=tmp_path / "run", teacher_args=SMALL, student_args=SMALL,
            device="cpu", batch_size=8, lr=0.05, log_with="none", **PASSES)  # fmt: skip
    lines, order = terminal(), list[str]()
    monkeypatch.setattr("factor_transfer.report.terminal.say", order.append)
    monkeypatch.setattr("factor_transfer.report.terminal.table", lambda *_: order.append("the table"))
    show(tmp_path / "run")
    assert "parameters and" in order[0]
    assert order.index("the table") == 2, "the verdict is not first"
    kept = [line.split("  ")[0] for line in of_passes(lines)]
    assert kept == ["teacher 3/3", "paraphraser 2/2", "student 4/4", "baseline 4/4"]
    live = [line for line in lines if "left in all" in line]
    assert {line.split()[0] for line in live} <= {"teacher", "paraphraser", "student", "baseline"}
    assert any("student" in line for line in live)
    assert all(len(line) <= 80 for line in live)


def test_passes__are_printed_where_verbose_or_no_terminal(terminal: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    console.begin({"student": 1.0}, verbose=True)
    console.say_pass("student 1/2  loss 1")
    console.begin({"student": 1.0})
    console.say_pass("student 1/2  loss 2")
    console.say_pass("student 2/2  loss 3")
    console.end_stage("student")
    console.end_stage("student")
    assert terminal() == ["student 1/2  loss 1", "student 2/2  loss 3"]
