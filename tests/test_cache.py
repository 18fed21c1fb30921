"""The factor cache: whatever happens to its files, a factor is the right one or none."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from factor_transfer import distill
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.training.cache import (
    HALF_ROWS,
    PROBES,
    ROWS,
    CachedTeacher,
    FactorCache,
    choose_views,
    foreign_row,
    say_what_changed,
)
from factor_transfer.training.run_folder import Run
from factor_transfer.util.errors import RunError
from processes import Command

SHAPE = (3, 2, 2)
SHAPES = {"factor": SHAPE, "logits": (5,)}
pytestmark = pytest.mark.usefixtures("unexported")
N, V = 12, 2
IDENTITY = {"teacher": "aa", "paraphraser": "bb"}


def right(index: np.ndarray, view: int) -> dict[str, Tensor]:
    """The one right row of each sample and view, by output."""
    made = [torch.Generator().manual_seed(1000 * view + sample) for sample in index.tolist()]
    return {name: torch.stack([torch.randn(shape, generator=g).half() for g in made]) for name, shape in SHAPES.items()}


def same(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    return found is not None and all(torch.equal(found[name], expected[name]) for name in SHAPES)


def fill(cache: FactorCache) -> None:
    for view in range(V):
        cache.write(np.arange(N), view, right(np.arange(N), view))


def check(cache: FactorCache) -> int:
    """Every factor that is given is the right one; how many were given."""
    given_ = 0
    for view in range(V):
        for sample in range(N):
            found = cache.read(np.array([sample]), view)
            if found is not None:
                assert same(found, right(np.array([sample]), view)), (sample, view)
                given_ += 1
    return given_


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, V - 1), st.lists(st.integers(0, N - 1), min_size=1, unique=True)), max_size=6))
def test_cache__gives_what_was_written_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, batches: list[tuple[int, list[int]]]
) -> None:
    cache = FactorCache(tmp_path_factory.mktemp("c"), IDENTITY, SHAPES, N, V)
    there = set()
    for view, samples in batches:
        cache.write(np.array(samples), view, right(np.array(samples), view))
        there |= {(view, sample) for sample in samples}
    for view in range(V):
        for sample in range(N):
            found = cache.read(np.array([sample]), view)
            assert (found is not None) == ((view, sample) in there)
            assert found is None or same(found, right(np.array([sample]), view))
        assert len(cache.written(view)) == sum(1 for where, _ in there if where == view)
    cache.store.close()


def test_cache__is_found_again_by_another_process(tmp_path: Path, python: Command) -> None:
    fill(FactorCache(tmp_path, IDENTITY, SHAPES, N, V))
    assert check(FactorCache(tmp_path, IDENTITY, SHAPES, N, V)) == N * V
    script = (
        "import sys, numpy as np; from pathlib import Path; from factor_transfer.training.cache import FactorCache\n"
        f"found = FactorCache(Path({str(tmp_path)!r}), {IDENTITY!r}, {SHAPES!r}, {N}, {V}).read(np.arange({N}), 1)\n"
        "print(found['logits'].float().sum().item())"
    )
    done = python(script)
    expected = right(np.arange(N), 1)["logits"].float().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6), done.stderr


def test_cache__2000_kill_points_give_no_wrong_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash may leave any part of the writes, in any order, the last of them cut anywhere."""
    writes: list[tuple[str, bytes, int]] = []
    cache = FactorCache(tmp_path / "recorded", IDENTITY, SHAPES, N, V)
    name_of = {handle: Path(f"/proc/self/fd/{handle}").readlink().name for handle in cache.store._handles}
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, place: writes.append((name_of[handle], data, place)))
    fill(cache)
    monkeypatch.setattr(os, "pwrite", real)

    torn = FactorCache(tmp_path / "torn", IDENTITY, SHAPES, N, V)
    paths = {name: torn.store.folder / name for name in name_of.values()}
    empty = {name: path.read_bytes() for name, path in paths.items()}
    chance, seen = random.Random(0), 0
    for _ in range(2000):
        contents = {name: bytearray(data) for name, data in empty.items()}
        part = chance.sample(writes, chance.randrange(len(writes) + 1))
        for place, (name, data, offset) in enumerate(part):
            cut = chance.randrange(len(data) + 1) if place == len(part) - 1 else len(data)
            contents[name][offset : offset + cut] = data[:cut]
        for name, data in contents.items():
            with paths[name].open("r+b") as file:  # in place: the maps stay valid
                file.write(data)
        seen += check(torn)
    assert 2000 < seen < 2000 * N * V, "both whole and torn rows were met"


@pytest.mark.parametrize("damage", ["bit", "swap", "other view", "zeros"])
def test_cache__damaged_rows_are_not_given(tmp_path: Path, damage: str) -> None:
    cache = FactorCache(tmp_path, IDENTITY, SHAPES, N, V)
    fill(cache)
    rows, sums = (cache.store.folder / f"part-000.{kind}" for kind in ("rows", "crc"))
    data, size = bytearray(rows.read_bytes()), cache.store.row_bytes
    if damage == "bit":
        data[size + 5] ^= 1
    elif damage == "swap":
        data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]
        marks = bytearray(sums.read_bytes())
        marks[:8], marks[8:16] = marks[8:16], marks[:8]
        sums.write_bytes(marks)
    elif damage == "other view":
        data = bytearray((cache.store.folder / "part-001.rows").read_bytes())
        sums.write_bytes((cache.store.folder / "part-001.crc").read_bytes())
    else:
        data[: 2 * size] = bytes(2 * size)
    rows.write_bytes(data)
    again = FactorCache(tmp_path, IDENTITY, SHAPES, N, V)
    assert again.read(np.array([1]), 0) is None
    assert check(again) < N * V


def write_for_ever(folder: Path, begun: int) -> None:
    cache = FactorCache(folder, IDENTITY, SHAPES, N, V)
    os.write(begun, b".")
    while True:
        fill(cache)


@pytest.mark.slow
def test_cache__real_kills_give_no_wrong_factor(tmp_path: Path) -> None:
    chance, seen = random.Random(0), 0
    for number in range(24):
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ready)
            write_for_ever(tmp_path / str(number // 4), begun)
        os.close(begun)
        os.read(ready, 1)
        os.close(ready)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen += check(FactorCache(tmp_path / str(number // 4), IDENTITY, SHAPES, N, V))
    assert seen > 0


@pytest.mark.parametrize("name", ["teacher", "paraphraser"])
def test_cache__anything_else_is_another_cache_and_it_says_what_changed(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(FactorCache(tmp_path, IDENTITY, SHAPES, N, V))
    other = FactorCache(tmp_path, {**IDENTITY, name: "zz"}, SHAPES, N, V)
    assert check(other) == 0
    say_what_changed(other)
    assert f"differs in: {name}\n" in capsys.readouterr().err
    more = FactorCache(tmp_path, IDENTITY, SHAPES, N, V + 1)
    say_what_changed(more)
    assert f"holds {N * V} of {N * (V + 1)} factors" in capsys.readouterr().err


class Counting(nn.Module):
    """A live teacher that counts how often it is asked."""

    def __init__(self, scale: float = 1) -> None:
        super().__init__()
        self.asked, self.scale = 0, scale

    def forward(self, images: Tensor, index: Tensor, view: int) -> dict[str, Tensor]:
        self.asked += 1
        return {name: self.scale * output.float() for name, output in right(index.numpy(), view).items()}


def test_cached_teacher__asks_once_for_each_view(tmp_path: Path) -> None:
    live = Counting()
    teacher = CachedTeacher(FrozenTeacher(live), FactorCache(tmp_path, IDENTITY, SHAPES, N, V))
    images, index = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([7, 1, 3, 0])
    for _ in ("live", "from disk"):
        assert same(teacher(images, index, 1), right(index.numpy(), 1))
    assert live.asked == 1
    teacher(images, index, 0)
    assert live.asked == 2


def test_cached_teacher__factors_beyond_fp16_stay_live(tmp_path: Path) -> None:
    live = Counting(scale=1e6)
    teacher = CachedTeacher(FrozenTeacher(live), FactorCache(tmp_path, IDENTITY, SHAPES, N, V))
    for _ in range(2):
        found = teacher(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), 0)["factor"]
        assert found.isfinite().all()
    assert live.asked == 2


def test_cached_teacher__a_full_disk_is_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(OSError, match="No space left"):
            FactorCache(mount, IDENTITY, SHAPES, 10_000, V)
        live = Counting()
        teacher = CachedTeacher(FrozenTeacher(live), FactorCache(tmp_path / "wide", IDENTITY, SHAPES, N, V))
        for handle in teacher.cache.store._handles:
            os.dup2(os.open("/dev/full", os.O_RDWR), handle)
        for _ in range(2):
            found = teacher(torch.zeros(2, 3, 8, 8), torch.tensor([4, 5]), 0)["factor"]
            assert torch.equal(found, right(np.array([4, 5]), 0)["factor"])
        assert live.asked == 2
        assert capsys.readouterr().err.count("the teacher goes on live") == 1
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_choose_views__heeds_passes_and_room(tmp_path: Path) -> None:
    assert choose_views(4096, 50_000, 164, tmp_path) == 8
    assert choose_views(4096, 50_000, 9, tmp_path) == 4
    assert choose_views(4096, 50_000, 3, tmp_path) == 0
    assert choose_views(4096, 10**12, 164, tmp_path) == 0


JOB: dict[str, Any] = {
    "teacher_args": {"layers": (1, 1, 1), "channels": (8, 16, 32)}, "teacher_epochs": 4, "paraphraser_epochs": 2,
    "student_args": {"layers": (1, 1, 1), "channels": (4, 8, 16)}, "epochs": 4, "batch_size": 32, "lr": 0.05,
    "threads": 1, "device": "cpu", "views": 2, "train_images": 250,
}  # fmt: skip


def job(out: Path, cache: Path, **changed: Any) -> list[dict[str, Any]]:
    settings_ = {**JOB, "out": str(out), "cache_dir": str(cache), **changed}
    distill("cifar_resnet20", "cifar_resnet20_b", "digits", **settings_)
    return Run(out).metrics("student")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher that was trained beforehand."""
    folder = tmp_path_factory.mktemp("trained")
    job(folder / "run", folder / "cache", beta=0, epochs=1)
    return {"teacher_epochs": 0, "teacher_weights": folder / "run" / "teacher.safetensors", "epochs": 3}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_distill__cached_factors_teach_as_live_ones_do(
    trained: dict[str, Any], tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given_ = {**trained, "precision": precision, "kd_weight": 0.5}
    cached = job(tmp_path / "cached", tmp_path / "cache", **given_)
    assert sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*.rows")) == 250 * 2 * 2 * (16 * 2 * 2 + 10)
    (tmp_path / "file").write_text("")
    live = job(tmp_path / "live", tmp_path / "file", **given_)
    assert "the teacher stays live" in capsys.readouterr().err
    for ours, theirs in zip(cached, live, strict=True):
        assert ours["factor_transfer"] == pytest.approx(theirs["factor_transfer"], rel=5e-3)
        assert ours["soft_targets"] == pytest.approx(theirs["soft_targets"], rel=5e-3), "which no norm is taken of"
    again = job(tmp_path / "again", tmp_path / "cache", **{**given_, "epochs": 1}, seed=1, beta=7)
    assert "holds 500 of 500 factors" in capsys.readouterr().err
    assert len(again) == 1


def test_distill__a_cached_run_ends_with_the_same_bits_from_an_empty_and_a_full_cache(tmp_path: Path) -> None:
    one = job(tmp_path / "one", tmp_path / "cache")
    other = job(tmp_path / "other", tmp_path / "cache")
    assert [row["loss"] for row in one] == [row["loss"] for row in other]
    assert (tmp_path / "one" / "student.safetensors").read_bytes() == (
        tmp_path / "other" / "student.safetensors"
    ).read_bytes()
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["student"]["views"] == 2


# -- what no row may outlive


def fresh_of(scale: float, noise: float = 0.0) -> Any:
    """A live teacher that gives the right rows, times `scale`."""

    def fresh(index: np.ndarray, view: int) -> dict[str, Tensor]:
        made = {name: scale * output.float() for name, output in right(index, view).items()}
        return {name: output + noise * output.std() * torch.randn(output.shape) for name, output in made.items()}

    return fresh


@pytest.mark.parametrize(
    ("scale", "noise", "tolerance", "foreign"),
    [
        (1, 0, ROWS, False),
        (1, 1e-3, ROWS, False),
        (1, 0.01, HALF_ROWS, False),
        (1.03, 0, ROWS, True),
        (1.1, 0, HALF_ROWS, True),
        (float("nan"), 0, ROWS, True),
    ],
)
def test_foreign_row__finds_what_another_teacher_made_and_forgives_rounding(
    tmp_path: Path, scale: float, noise: float, tolerance: float, foreign: bool
) -> None:
    cache = FactorCache(tmp_path, IDENTITY, SHAPES, N, V)
    assert foreign_row(cache, fresh_of(2), ROWS) is None, "there are no rows"
    fill(cache)
    found = foreign_row(cache, fresh_of(scale, noise), tolerance)
    assert (found is not None) is foreign
    assert found is None or "of training image" in found


def test_foreign_row__reads_a_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FactorCache(tmp_path, IDENTITY, SHAPES, N, V)
    fill(cache)
    read: list[tuple[int, int]] = []
    real = FactorCache.read

    def counted(self: FactorCache, index: np.ndarray, view: int) -> dict[str, Tensor] | None:
        read.extend((row, view) for row in index.tolist())
        return real(self, index, view)

    monkeypatch.setattr(FactorCache, "read", counted)
    assert foreign_row(cache, fresh_of(1), ROWS) is None
    assert len(read) == len(set(read)) > 0


def test_foreign_row__draws_others_each_time_whatever_is_seeded(tmp_path: Path) -> None:
    shapes = {"factor": (1, 1, 1)}
    cache = FactorCache(tmp_path, IDENTITY, shapes, 1000, 1)
    cache.write(np.arange(1000), 0, {"factor": torch.ones(1000, 1, 1, 1)})
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        foreign_row(cache, lambda index, _: drawn.append(index) or {"factor": torch.ones(len(index), 1, 1, 1)}, ROWS)  # type: ignore[func-returns-value]
    assert len(drawn[0]) == len(set(drawn[0])) == PROBES
    assert set(drawn[0]) != set(drawn[1])


class Small(nn.Module):
    """A teacher of features; what its environment says is part of no fingerprint."""

    def __init__(self, act: nn.Module, power: float = 1.0) -> None:
        super().__init__()
        self.conv, self.act, self.power = nn.Conv2d(3, 8, 3, 2, 1), act, power
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(self.conv.weight)
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.conv(x) * float(os.environ.get("SMALL_SCALE", "1")))
        return found


def taught(folder: Path, name: str, teacher: nn.Module, **changed: Any) -> list[Path]:
    """The caches after a short run with this teacher."""
    given_ = {name: value for name, value in JOB.items() if not name.startswith("teacher")}
    settings_ = {**given_, "epochs": 2, "paraphraser": "none", "train_images": 40, **changed}
    distill(teacher, "cifar_resnet20_b", "digits", out=str(folder / name), cache_dir=str(folder / "cache"), **settings_)
    return sorted((folder / "cache").glob("*/meta.json"))


def test_distill__a_teacher_of_other_code_or_attributes_has_another_cache(tmp_path: Path) -> None:
    assert len(taught(tmp_path, "relu", Small(nn.ReLU()))) == 1
    assert len(taught(tmp_path, "again", Small(nn.ReLU()), seed=1)) == 1
    assert len(taught(tmp_path, "gelu", Small(nn.GELU()))) == 2
    assert len(taught(tmp_path, "power", Small(nn.ReLU(), power=2.0))) == 3


def test_distill__other_decoders_or_libraries_have_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught(tmp_path, "one", Small(nn.ReLU()))
    monkeypatch.setattr("factor_transfer.training.cache.decoders", lambda: {"libjpeg_turbo": "9"})
    assert len(taught(tmp_path, "other", Small(nn.ReLU()))) == 2


TERM = """
    from factor_transfer.method.losses import Reader, Term

    POWER = 1.0

    class Root(Reader):
        shape = (8, 2, 2)
        def __init__(self, layer, power):
            super().__init__(layer, (2, 2))
            self.power = power
        def forward(self, feature):
            return super().forward(feature).abs() ** self.power

    class Roots(Term):
        name = "roots"
        needs = frozenset({"roots"})
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
        def readers(self):
            return {"roots": Root(self.layer, POWER)}
        def forward(self, student, teacher, labels):
            return student.logits.mean() * teacher["roots"].mean()

    def roots(pair):
        return Roots(pair.teacher.layer)
"""


def test_distill__a_reader_with_another_attribute_has_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_roots.py").write_text(textwrap.dedent(TERM))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(taught(tmp_path, "one", Small(nn.ReLU()), term="own_roots:roots")) == 1
    monkeypatch.setattr("own_roots.POWER", 0.5)
    assert len(taught(tmp_path, "other", Small(nn.ReLU()), term="own_roots:roots")) == 2


def test_distill__a_cache_whose_rows_the_teacher_does_not_make_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changed is part of no fingerprint."""
    taught(tmp_path, "one", Small(nn.ReLU()))
    monkeypatch.setenv("SMALL_SCALE", "1.1")
    with pytest.raises(RunError, match="(?s)--cache-dir: the factor cache .*of training image.*delete that folder"):
        taught(tmp_path, "other", Small(nn.ReLU()))
    assert len(taught(tmp_path, "live", Small(nn.ReLU()), views=0)) == 1


@pytest.mark.parametrize("reserves", ["posix", "refused", "absent"])
def test_cache__files_are_reserved_on_every_system(
    tmp_path: Path, reserves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    if reserves == "absent":
        monkeypatch.delattr(os, "posix_fallocate")
    elif reserves == "refused":
        monkeypatch.setattr(os, "posix_fallocate", refuses)
    large = FactorCache(tmp_path, IDENTITY, SHAPES, 50_000, V)
    large.write(np.arange(1), 0, right(np.arange(1), 0))
    for path in large.store.folder.glob("part-*"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size >= 400_000, "a hole would meet a full disk later"
    fill(FactorCache(tmp_path, IDENTITY, SHAPES, N, V))
    assert check(FactorCache(tmp_path, IDENTITY, SHAPES, N, V)) == N * V, "what is there stays"
