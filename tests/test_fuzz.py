"""Whatever is in a file or a name: a message or a result, never a crash, and nothing written where it does not belong.

`make fuzz` gives each test thousands of inputs instead of a few dozen, and leaves the counts in results/fuzz.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cyclopts import CycloptsError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from factor_transfer.cli import app
from factor_transfer.config import FIELDS, Config, DataConfig
from factor_transfer.data.dataset import open_data
from factor_transfer.distillation import default_out
from factor_transfer.training.cache import FactorCache, say_what_changed
from factor_transfer.training.run_folder import Run, environment, saved_config, saved_summary
from factor_transfer.util.errors import FactorTransferError, harmless
from factor_transfer.util.files import read_json, write_json

INPUTS = int(os.environ.get("FACTOR_TRANSFER_FUZZ", "25"))
LONG = "FACTOR_TRANSFER_FUZZ" in os.environ
fuzz = settings(
    max_examples=INPUTS, deadline=None, database=None, derandomize=not LONG, suppress_health_check=list(HealthCheck)
)
slower = settings(fuzz, max_examples=max(INPUTS // 3, 10))
count: Counter[str] = Counter()
ends: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    yield
    if LONG:
        found = {
            "command": f"make fuzz FUZZ={INPUTS}",
            "inputs": count.total(),
            "by_test": dict(sorted(count.items())),
            "outcomes": dict(sorted(ends.items())),
            "environment": environment(),
        }
        write_json(Path(__file__).parent.parent / "results" / "fuzz.json", found)


@pytest.fixture(scope="module")
def here() -> Iterator[Path]:
    """A folder in which all of it happens; nothing may appear beside what a test puts there."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    assert sorted(os.listdir(folder)) == [], "something was written outside"  # noqa: PTH208
    shutil.rmtree(folder)


def tried(name: str, what: Callable[[], Any]) -> Any:
    """What it gives; None where it ends in a message of ours."""
    count[name] += 1
    try:
        found = what()
    except FactorTransferError as error:
        assert str(error).strip()
        ends[f"{name}: {type(error).__name__}"] += 1
        return None
    except CycloptsError as error:
        assert str(error).strip()
        ends[f"{name}: message of the command line"] += 1
        return None
    ends[f"{name}: taken"] += 1
    return found


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["auto", "digits", "1e400", "-1", "nan", "0x10", "[", "{", "!!python/name:os.system", "/dev/null"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
NAMES = st.one_of(st.sampled_from([*FIELDS, *(name.replace("_", "-") for name in FIELDS)]), st.text(max_size=12))
SETTINGS = st.dictionaries(NAMES, VALUES, max_size=6)
NEEDED = ["--data", "digits", "--teacher", "cifar_resnet20", "--student", "cifar_resnet20"]
DEEP = b"[" * 3_000


@slower
@given(
    st.one_of(
        st.binary(max_size=200), st.sampled_from([DEEP, b"a: &a [*a]", b"epochs: 3"]), SETTINGS, SETTINGS, SETTINGS
    )
)
def test_config__a_file_of_settings_is_read_or_named(here: Path, content: bytes | dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content if isinstance(content, bytes) else json.dumps(content).encode())
        file.flush()
        words = ["distill", *NEEDED, "--config", file.name]
        tried("config file", lambda: app.parse_args(words, exit_on_error=False, print_error=False))


WORDS = st.one_of(
    st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS]),
    st.text(max_size=12),
    st.from_type(float).map(str),
    st.integers().map(str),
    st.just("("),
)


@fuzz
@given(st.lists(WORDS, max_size=8))
def test_config__flags_are_taken_or_named(here: Path, words: list[str]) -> None:
    words = [word for word in words if word not in {"--help", "-h", "--version"}]
    tried("flags", lambda: app.parse_args(["distill", *NEEDED, *words], exit_on_error=False, print_error=False))


@fuzz
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6))
def test_config__a_run_folders_settings_are_taken_or_named(here: Path, values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        needed = {"data": "digits", "teacher": "a", "student": "b"}
        Path(folder, "config.json").write_text(json.dumps({**needed, **values}))
        Path(folder, "summary.json").write_text(json.dumps(values))
        tried("saved settings", lambda: saved_config(Path(folder)))
        tried("saved summary", lambda: saved_summary(Path(folder)))


class Canary:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("canary"),))


def checkpoint() -> bytes:
    folder = Path(tempfile.mkdtemp())
    state = {"progress": {"epoch": 1}, "module": {"a": torch.arange(6.0).view(2, 3)}, "ema": None, "optimizer": {}}
    Run(folder).save_checkpoint("student", 1, 0, state)
    return next(folder.glob("checkpoints/*.pt")).read_bytes()


WHOLE = checkpoint()
EDITS = st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=4)), max_size=6)


@fuzz
@given(EDITS, st.integers(0, len(WHOLE)), st.booleans(), st.one_of(st.none(), st.binary(max_size=80)))
def test_checkpoint__is_whole_or_passed_over(
    here: Path, edits: list[tuple[int, bytes]], end: int, signed: bool, instead: bytes | None
) -> None:
    """Also where whoever changed it has changed the checksum, too."""
    content = bytearray(WHOLE)
    for where, what in edits:
        content[where : where + len(what)] = what
    changed = bytes(content[: end or None]) if instead is None else pickle.dumps([Canary(), instead])
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        run.save_checkpoint("student", 1, 0, {"kept": 1})
        run.save_checkpoint("student", 2, 0, {"kept": 2})
        newest = Path(folder, "checkpoints", "student-000002-00000000.pt")
        newest.write_bytes(changed)
        check = hashlib.sha256(changed if signed else WHOLE).hexdigest().encode() if end % 7 else instead or b"\xff"
        newest.with_suffix(".sha256").write_bytes(check)
        state = tried("checkpoint", lambda: run.load_checkpoint("student"))
        assert isinstance(state, dict)
        if changed != WHOLE and not signed:
            assert state == {"kept": 1}


@fuzz
@given(st.one_of(st.binary(max_size=60), st.just(DEEP), VALUES.map(lambda value: json.dumps(value).encode())),
       st.binary(max_size=200), st.binary(max_size=100), st.booleans())  # fmt: skip
def test_cache__gives_what_was_written_or_nothing(
    here: Path, meta: bytes, factors: bytes, sums: bytes, other: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = FactorCache(Path(folder), {"teacher": "ab"}, {"factor": (2, 2, 1)}, samples=6, views=1)
        wanted = torch.randn(6, 2, 2, 1).half()
        cache.write(np.arange(6), 0, {"factor": wanted})
        cache.store.close()
        where = cache.store.folder if not other else cache.store.folder.with_name("other")
        where.mkdir(exist_ok=True)
        for name, content in (("meta.json", meta), ("part-000.rows", factors), ("part-000.crc", sums)):
            (where / name).write_bytes(content)
        identity = {"teacher": "cd" if other else "ab"}
        again = FactorCache(Path(folder), identity, {"factor": (2, 2, 1)}, samples=6, views=1)
        tried("cache", lambda: say_what_changed(again))
        for sample in range(6):
            found = again.read(np.array([sample]), 0)
            assert found is None or (not other and torch.equal(found["factor"], wanted[sample : sample + 1]))
        again.store.close()


ODD = st.one_of(
    st.sampled_from(
        ["[red]x[/]", "a\nb", "\x1b[2J", "\u202egnp", "..x", "-rf", "x" * 200, " ", "\udcff", "<b>&", "%s"]
    ),
    st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=40),
)
PNG_FILE = tempfile.SpooledTemporaryFile()  # noqa: SIM115
Image.fromarray(np.full((9, 7, 3), 90, np.uint8)).save(PNG_FILE, "PNG")
PNG_FILE.seek(0)
PNG = PNG_FILE.read()
FILES = st.dictionaries(ODD, st.one_of(st.just(PNG), st.binary(max_size=64), st.just(PNG[:50])), max_size=3)


@slower
@given(st.dictionaries(ODD, FILES, max_size=4), st.sampled_from(["", "train", "val"]), st.booleans(), st.booleans())
def test_data__any_folder_is_read_or_named(
    here: Path, classes: dict[str, dict[str, bytes]], split: str, skip: bool, keep: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, files in classes.items():
            for place, (file, content) in enumerate(files.items()):
                path = Path(folder, split, name, f"{file[:60]}{place}.png")
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                except OSError:
                    continue  # this file system has no such names
        before = sorted(map(str, Path(folder).rglob("*")))
        kept = tempfile.TemporaryDirectory()
        config = DataConfig(data=folder, skip_corrupt=skip, pixel_cache_gb=float(keep), cache_dir=kept.name, workers=0)
        data = tried("data folder", lambda: open_data(config, default_size=lambda: 8))
        assert sorted(map(str, Path(folder).rglob("*"))) == before
        if data is not None:
            whole = np.arange(len(data.train))
            batches = tried("data folder's images", lambda: list(data.train.batches([whole], view=0)))
            assert batches is None or len(batches[0].label) == len(data.train)
            with tempfile.NamedTemporaryFile() as file:
                write_json(Path(file.name), list(data.classes))
                assert read_json(Path(file.name)) == list(data.classes)
        kept.cleanup()


@fuzz
@given(ODD, ODD, ODD)
def test_out__any_names_give_one_folder_under_runs(here: Path, data: str, teacher: str, student: str) -> None:
    count["run folder's name"] += 1
    path = Path(default_out(Config(data=data, teacher=teacher, student=student)))
    assert path.parts[0] == "runs"
    assert len(path.parts) == 2
    assert path.parts[1].isprintable()


@fuzz
@given(ODD)
def test_messages__hold_nothing_that_a_terminal_obeys(here: Path, name: str) -> None:
    count["terminal"] += 1
    assert all(char == "\n" or char.isprintable() for char in harmless(name))
