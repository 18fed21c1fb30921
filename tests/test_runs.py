"""The run folder: whole files, one owner, honest continuation."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from factor_transfer.config import FIELDS, Config
from factor_transfer.training.run_folder import Run, environment, open_run, saved_config, saved_summary
from factor_transfer.util.errors import RunError, TrainingError
from factor_transfer.util.files import locked, read_json, state_fingerprint, write_atomic, write_json


def config(**changed: Any) -> Config:
    return Config(**{"teacher": "cifar_resnet56", "student": "cifar_resnet20", "data": "digits", **changed})


def begin(folder: Path, **changed: Any) -> None:
    with open_run(folder, config(**changed), environment()):
        pass


def test_open_run__keeps_every_setting(tmp_path: Path) -> None:
    changed = {"teacher_mean": (0.1, 0.2, 0.3), "student_args": {"layers": [3, 3, 3]}, "beta": 7.0, "epochs": 3}
    begin(tmp_path / "run", **changed)
    assert saved_config(tmp_path / "run") == config(**changed)
    assert set(read_json(tmp_path / "run" / "config.json")) == set(FIELDS)


def test_open_run__is_not_held_to_settings_before_anything_was_computed(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", config(epochs=3), environment()) as run:
        run.pin("data", "aa", "other data")
    with open_run(tmp_path / "run", config(epochs=4), environment()) as run:
        run.pin("data", "bb", "other data")
    assert saved_config(tmp_path / "run").epochs == 4


def test_open_run__refuses_other_settings_and_names_them(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", config(epochs=3, beta="auto"), environment()) as run:
        run.record("teacher", {"top1": 50.0})
    with pytest.raises(RunError, match="(?s)--epochs 3 there, 4 here.*--overwrite"):
        begin(tmp_path / "run", epochs=4, beta="auto")
    begin(tmp_path / "run", epochs=3, workers=7, checkpoint_minutes=1.0)  # these change no result


def test_record__names_the_rate_of_a_stage_that_ended_with_no_finite_output(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", config(), environment()) as run:
        with pytest.raises(TrainingError, match="(?s)paraphraser.*relative_error is nan.*lower --paraphraser-lr"):
            run.record("paraphraser", {"relative_error": float("nan"), "factor_variety": 1.0})
        assert run.recorded("paraphraser") is None


def test_open_run__a_setting_that_an_early_version_did_not_have_was_at_its_default(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", config(epochs=3), environment()) as run:
        run.record("teacher", {"top1": 50.0})
        write_json(run.path("config.json"), {name: v for name, v in config(epochs=3).to_dict().items() if name != "k"})
    begin(tmp_path / "run", epochs=3)
    with pytest.raises(RunError, match=r"--k 0.5 there, 1.0 here"):
        begin(tmp_path / "run", epochs=3, k=1.0)


def test_open_run__an_unfinished_run_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", config(), environment()) as run:
        run.record("teacher", {"top1": 50.0})
        write_json(run.path("fingerprints.json"), {"data": "aa", "teacher": "bb"})
    with pytest.raises(RunError, match="(?s)an unfinished run of an earlier version.*--overwrite"):
        begin(tmp_path / "run")
    summary: dict[str, Any] = {"student": {}, "teacher": {}, "data": {}, "settings": {}}
    write_json(tmp_path / "run" / "summary.json", summary)
    begin(tmp_path / "run")


def test_open_run__overwrite_begins_anew(tmp_path: Path) -> None:
    begin(tmp_path / "run", epochs=3)
    (tmp_path / "run" / "stages").mkdir()
    (tmp_path / "run" / "stages" / "teacher.json").write_text("{}")
    begin(tmp_path / "run", epochs=4, overwrite=True)
    assert saved_config(tmp_path / "run").epochs == 4
    assert not (tmp_path / "run" / "stages").exists()


def test_open_run__leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="(?s)no run of this program: thesis.tex"):
            begin(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="a file"):
        begin(tmp_path / "thesis.tex")


def hold(folder: Path, ready: Any, done: Any) -> None:
    with open_run(folder, config(), environment()):
        ready.set()
        done.wait(60)


def test_open_run__one_process_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready, done))
    other.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match=f"in use by process {other.pid}"):
        begin(tmp_path / "run")
    other.kill()  # the lock goes with its process
    other.join()
    begin(tmp_path / "run")


def test_run__checkpoints_two_are_kept_and_a_damaged_one_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    for epoch in range(1, 4):
        run.save_checkpoint("student", epoch, 0, {"epoch": epoch})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"student-00000{e}-00000000.{kind}" for e in (2, 3) for kind in ("pt", "sha256")]
    assert run.load_checkpoint("student") == {"epoch": 3}
    newest = tmp_path / "checkpoints" / "student-000003-00000000.pt"
    whole = newest.read_bytes()
    middle = len(whole) // 2
    cuts = [*range(70), middle - 1, middle, middle + 1, *range(len(whole) - 30, len(whole))]
    flips = [(byte, bit) for byte in (*range(0, len(whole), 41), len(whole) - 1) for bit in (0, 7)]
    flipped = [whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :] for byte, bit in flips]
    for damaged in [*(whole[:cut] for cut in cuts), *flipped, whole + b"x"]:
        newest.write_bytes(damaged)
        assert run.load_checkpoint("student") == {"epoch": 2}
        assert "student-000003" in capsys.readouterr().err
    newest.write_bytes(whole)
    for damaged in (b"", b"\xff\x80", newest.with_suffix(".sha256").read_bytes()[:63]):
        newest.with_suffix(".sha256").write_bytes(damaged)
        assert run.load_checkpoint("student") == {"epoch": 2}
    assert run.load_checkpoint("baseline") is None
    (tmp_path / "checkpoints" / "student-000002-00000000.pt").write_bytes(b"")
    assert run.load_checkpoint("student") is None
    assert "student begins anew" in capsys.readouterr().err


def test_open_run__sweeps_up_what_a_kill_left(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", config(), environment()) as run:
        run.save_checkpoint("student", 1, 0, {"epoch": 1})
    left = [".config.json.0a1b2c3d.tmp", "checkpoints/.student-000002-00000000.pt.0a1b2c3d.tmp",
            "checkpoints/student-000002-00000000.sha256"]  # fmt: skip
    for name in left:
        (tmp_path / "run" / name).write_bytes(b"half")
    with open_run(tmp_path / "run", config(), environment()) as run:
        assert run.load_checkpoint("student") == {"epoch": 1}
    assert not [name for name in left if (tmp_path / "run" / name).exists()]


def test_write_json__keeps_names_that_are_no_unicode(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", ["caf\u00e9", "\udcff"])
    assert read_json(tmp_path / "x.json") == ["caf\u00e9", "\udcff"]
    assert "caf\u00e9" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_run__checkpoint_keeps_strides(tmp_path: Path) -> None:
    """Fused optimizers on channels-last weights read garbage from a momentum that came back contiguous."""
    momentum = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    Run(tmp_path).save_checkpoint("student", 1, 0, {"momentum": momentum})
    state = Run(tmp_path).load_checkpoint("student")
    assert state is not None
    assert state["momentum"].stride() == momentum.stride()


def test_run__pins_hold_what_it_began_with(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.pin("teacher", "aa", "--teacher has other weights")
    run.pin("teacher", "aa", "--teacher has other weights")
    with pytest.raises(RunError, match="(?s)--teacher has other weights.*bb.*aa"):
        run.pin("teacher", "bb", "--teacher has other weights")


def test_run__metrics_survive_a_cut_line_and_are_not_doubled(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for epoch in (1, 2, 3):
        run.log("student", epoch, {"loss": 1 / epoch})
    with run.path("metrics.jsonl").open("a") as file:
        file.write('{"stage": "student", "ep')
    run.trim_metrics("student", 2)
    run.log("student", 3, {"loss": 9.0})
    rows = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_write_atomic__leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_state_fingerprint__sees_values_and_not_layout() -> None:
    weight = torch.randn(2, 3, 4, 4)
    one = state_fingerprint({"a": weight})
    assert one == state_fingerprint({"a": weight.to(memory_format=torch.channels_last)})
    assert one != state_fingerprint({"b": weight})
    assert one != state_fingerprint({"a": weight.nextafter(torch.tensor(9.0))})
    assert one != state_fingerprint({"a": weight.reshape(3, 2, 4, 4)})


def test_saved_summary__says_that_a_run_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        saved_config(tmp_path)
    begin(tmp_path / "run")
    with pytest.raises(RunError, match="(?s)not finished.*it continues"):
        saved_summary(tmp_path / "run")


def test_locked__lets_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock"):
        raise ZeroDivisionError
    with locked(tmp_path / "lock"):
        pass


def test_read_json__names_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(RunError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
