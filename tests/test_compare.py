"""Comparisons: what is planned, and real ones on a few digits, killed and continued by the same command."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factor_transfer.cli import app, main
from factor_transfer.compare.plan import CompareConfig, Plan, planned
from factor_transfer.compare.result import outcome
from factor_transfer.compare.run import _delete, _Runner, compare
from factor_transfer.compare.shared import shared_in
from factor_transfer.compare.words import in_words
from factor_transfer.config import DataConfig
from factor_transfer.data.dataset import open_data
from factor_transfer.method.presets import METHODS
from factor_transfer.settings import written_settings
from factor_transfer.util.errors import ConfigError, RunError
from factor_transfer.util.files import write_json
from processes import Command, Started

JOB = [
    "--data", "digits", "--train-images", "200", "--teacher", "cifar_resnet20", "--student", "cifar_resnet20",
    "--teacher-args", "layers=(1,1,1) channels=(8,16,32)", "--student-args", "layers=(1,1,1) channels=(4,8,16)",
    "--teacher-epochs", "4", "--teacher-lr", "0.05", "--paraphraser-epochs", "2", "--paraphraser-lr", "0.01",
    "--epochs", "3", "--lr", "0.05", "--batch-size", "32", "--threads", "1", "--device", "cpu", "--log-with", "none",
    "--checkpoint-minutes", "0.0001",
]  # fmt: skip
WHICH = ["--methods", "alone,kd,ft", "--seeds", "2"]


def config(**changed: Any) -> CompareConfig:
    return CompareConfig(**{"teacher": "cifar_resnet56", "student": "cifar_resnet20", "data": "digits", **changed})


# -- the plan


def test_planned__runs_seed_by_seed_and_method_by_method() -> None:
    plan = planned(config(methods="alone,kd,ft", seeds=2, seed=5, out="c"))
    names = ["baseline-s5", "kd-s5", "ft-s5", "baseline-s6", "kd-s6", "ft-s6"]
    assert [run.name for run in plan.runs] == names
    assert [run.config.out for run in plan.runs] == [f"c/{name}" for name in names]
    assert [run.config.seed for run in plan.runs] == [5] * 3 + [6] * 3
    assert [plan.reference(each, "baseline") for each in plan.variants] == [None, "baseline", "baseline"]
    assert [plan.reference(each, "kd") for each in plan.variants] == ["kd", None, "kd"]
    for run in plan.runs:  # one protocol: nothing but what makes the method differs
        differing = {name for name, value in vars(run.config).items() if value != vars(plan.runs[2].config)[name]}
        assert differing <= {"beta", *METHODS["kd"], "seed", "out"}


def test_planned__the_baseline_has_another_name_which_folders_may_have(tmp_path: Path) -> None:
    (tmp_path / "alone-s0").mkdir()
    plans = [planned(config(methods=methods, seeds=2, out=str(tmp_path))) for methods in ("alone,ft", "baseline,ft")]
    for plan in plans:
        assert [run.name for run in plan.runs] == ["alone-s0", "ft-s0", "baseline-s1", "ft-s1"]
        assert [each.name for each in plan.variants] == ["baseline", "ft"]


def test_planned__groups_are_for_the_methods_that_read_them() -> None:
    plan = planned(config(methods="alone,at,fitnet,ft", seeds=1, teacher_groups="layer1", student_groups="layer2"))
    of = {run.variant: (run.config.teacher_groups, run.config.student_groups) for run in plan.runs}
    given = ("layer1", "layer2")
    assert of == {"baseline": (None, None), "at": given, "fitnet": given, "ft": (None, None)}


def test_planned__every_run_is_a_file_of_settings(tmp_path: Path) -> None:
    more: dict[str, Any] = {"sweep": ("student_args={layers: [1, 1, 1]},{layers: [2, 2, 2]}", "lr=0.1,1e-3")}
    plan = planned(
        config(
            methods=",".join([*METHODS, "ft+kd"]), seeds=1, out="c", scale=(0.5, 1.0), filter_bias_and_bn=True, **more
        )
    )
    assert len(plan.runs) == 4 * (len(METHODS) + 1)
    for run in plan.runs:
        file = tmp_path / f"{run.name}.yaml"
        file.write_text(written_settings(run.config.to_dict()))
        _, bound, _ = app.parse_args(["distill", "--config", str(file)], exit_on_error=False)
        assert bound.args[0].to_dict() == run.config.to_dict()


def test_planned__a_sweep_varies_one_setting_where_it_acts_and_is_scored_on_a_holdout() -> None:
    plan = planned(config(methods="alone,kd,ft", seeds=1, sweep=("k=0.5,1", "beta=auto,100")))
    assert [each.name for each in plan.variants] == ["baseline", "kd", "ft k=0.5", "ft k=1", "ft beta=100"]
    by_name = {run.variant: run.config for run in plan.runs}
    assert (by_name["ft k=1"].k, by_name["ft k=1"].beta) == (1, "auto")
    assert (by_name["ft beta=100"].k, by_name["ft beta=100"].beta) == (0.5, 100)
    assert {run.config.validate_on for run in plan.runs} == {"train-holdout"}
    shown = planned(config(methods="ft", sweep=("k=1",), sweep_on="validation"))
    assert {run.config.validate_on for run in shown.runs} == {"validation"}


def test_planned__a_swept_protocol_has_its_own_reference() -> None:
    plan = planned(config(methods="alone,ft", seeds=1, sweep=("lr=0.05,0.2", "k=1,2")))
    references = {each.name: plan.reference(each, "baseline") for each in plan.variants}
    assert references == {
        "baseline": None,
        "baseline lr=0.05": None,
        "baseline lr=0.2": None,
        "ft lr=0.05": "baseline lr=0.05",
        "ft lr=0.2": "baseline lr=0.2",
        "ft k=1": "baseline",
        "ft k=2": "baseline",
    }


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        (["--methods", "alone,ftt"], r"--methods alone,ftt\n.*no method ftt\n.*ft"),
        (["--methods", ","], r"--methods\n.*no method\n.*baseline, kd"),
        (
            ["--kd-weight", "2"],
            r"--kd-weight 2.0\n.*set it themselves: baseline 0.0, kd 0.9.*\n.*--sweep kd_weight=2.0",
        ),
        (
            ["--teacher-groups", "layer1", "--methods", "alone,ft"],
            r"--teacher-groups layer1\n.*baseline, ft\n.*add at or fitnet",
        ),
        (["--seeds", "0"], r"--seeds 0\n.*from 1"),
        (["--jobs", "2"], r"--jobs 2\n.*no --threads.*\n.*--threads 1"),
        (["--baseline"], r"--baseline\n.*\n.*name baseline"),
        (["--sweep", "kk=1"], r"--sweep kk=1\n.*kk: no such setting\n.*k"),
        (["--sweep", "seed=1,2"], r"--sweep seed=1,2\n.*a setting that all runs share"),
        (["--sweep", "k="], r"--sweep k=\n.*no values\n.*--sweep k=VALUE"),
        (["--sweep", "k=1,0"], r"--k 0\n.*above 0"),
        (["--sweep", "k=1", "--methods", "alone,kd"], r"--sweep k\n.*none of baseline, kd\n.*ft\n"),
        (["--out", "/proc/c"], r"--out /proc/c\n.*\n.*can be written to"),
    ],
)
def test_compare__names_a_wrong_setting(
    changed: list[str], wanted: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    job = ["--data", "digits", "--teacher", "cifar_resnet20", "--student", "cifar_resnet20"]
    monkeypatch.setattr(sys, "argv", ["factor-transfer", "compare", *job, *changed])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert re.search(wanted, said), said
    assert not list(tmp_path.iterdir())


# -- what is found


def write_summaries(folder: Path, tops: dict[str, list[float]], given: CompareConfig, **more: Any) -> None:
    """What finished runs leave, with planted figures."""
    for run in planned(given).runs:
        if run.seed >= len(tops[run.variant]):
            continue
        pins = {"data": "d", "teacher": "t", "student": f"s{run.seed}"}
        network = {"size_bytes": 4, "latency_ms": 1.0, "layer": "x", "img_size": 8, "mean": [0.0], "std": [1.0]}
        top1 = tops[run.variant][run.seed]
        summary = {
            "teacher": {**network, "name": "big", "top1": 90.0, "parameters": 1000},
            "student": {**network, "name": "small", "top1": top1, "loss": 1.0, "parameters": 100},
            "seconds": {"student": 10.0 if run.variant == "baseline" else 15.0, "paraphraser": 3.0},
            "data": {"name": "digits", "train": 100, "validation": 50, "img_size": 8, "classes": ["0", "1"]},
            "fingerprints": pins, "settings": run.config.to_dict(), "environment": {"torch": "2"}, **more,
        }  # fmt: skip
        where = folder / run.name
        where.mkdir(parents=True, exist_ok=True)
        write_json(where / "summary.json", summary)


TOPS = {"baseline": [80.0, 80.5, 80.2], "kd": [80.9, 80.1, 80.3], "ft": [83.0, 83.6, 83.1]}


def test_outcome__is_what_the_runs_say(tmp_path: Path) -> None:
    given = config(methods="alone,kd,ft", seeds=3, out=str(tmp_path))
    terms = [{"name": "distances", "label": "relational distances", "weight": 25.0}]
    write_summaries(tmp_path, TOPS, given, terms=terms)
    found = outcome(planned(given))
    assert [each["terms"] for each in found["methods"]] == [terms] * 3
    alone, kd, ft = found["methods"]
    assert found["complete"]
    assert [each["n"] for each in found["methods"]] == [3, 3, 3]
    assert alone["to_alone"] is None
    assert alone["gap_closed"] is None
    assert kd["to_alone"]["verdict"].startswith("no difference to baseline is shown")
    assert ft["to_alone"]["mean"] == pytest.approx(3.0)
    assert ft["to_alone"]["verdict"].startswith("gains")
    assert ft["to_kd"]["what"] == "kd"
    assert ft["gap_closed"]["closed"] == pytest.approx(3.0 / (90 - 241.7 / 3 + 1), abs=0.02)
    assert (ft["seconds"], ft["seconds_to_alone"]) == (15.0, 1.5)
    assert [run["top1"] for run in found["runs"] if run["method"] == "ft"] == TOPS["ft"]
    said = in_words(found)
    assert "| ft | 83.00 | 83.60 | 83.10 |" in said
    assert f"- ft: {ft['to_alone']['verdict']}; {ft['to_kd']['verdict']}" in said
    assert found["command"] in said


def test_outcome__of_one_seed_claims_nothing(tmp_path: Path) -> None:
    given = config(methods="alone,ft", seeds=3, out=str(tmp_path))
    write_summaries(tmp_path, {name: values[:1] for name, values in TOPS.items()}, given)
    found = outcome(planned(given))
    assert not found["complete"]
    assert "one seed" in found["methods"][1]["to_alone"]["verdict"]
    assert found["methods"][1]["gap_closed"] is None
    assert "2 of 6 runs" in in_words(found)


def test_outcome__gives_no_gap_where_the_teacher_may_know_the_holdout(tmp_path: Path) -> None:
    given = config(methods="alone,ft", seeds=3, out=str(tmp_path), sweep=("k=1",), teacher_weights="t.safetensors")
    write_summaries(tmp_path, {"baseline": TOPS["baseline"], "ft k=1": TOPS["ft"]}, given)
    found = outcome(planned(given))
    assert found["methods"][1]["to_alone"]["verdict"].startswith("gains")
    assert found["methods"][1]["gap_closed"] is None
    assert "may have been trained on them" in found["scored_on"]


@pytest.mark.parametrize("pin", ["data", "teacher", "student"])
def test_outcome__refuses_runs_that_do_not_share_their_protocol(tmp_path: Path, pin: str) -> None:
    given = config(methods="alone,ft", seeds=2, out=str(tmp_path))
    write_summaries(tmp_path, TOPS, given)
    file = tmp_path / "ft-s1" / "summary.json"
    summary = json.loads(file.read_text())
    summary["fingerprints"][pin] = "another"
    write_json(file, summary)
    with pytest.raises(RunError, match="ft-s1 and baseline-s1 had not the same"):
        outcome(planned(given))


def test_compare__reuses_finished_runs_of_which_only_the_summary_is_left(tmp_path: Path) -> None:
    given = config(methods="alone,kd,ft", seeds=3, out=str(tmp_path), threads=1)
    write_summaries(tmp_path, TOPS, given)
    folder, found = compare(given)
    assert folder == tmp_path
    assert found == json.loads((tmp_path / "compare.json").read_text())
    assert not list(tmp_path.glob("*.log")), "a process was started"
    with pytest.raises(RunError, match=r"(?s)baseline-s0, a run with other settings: --epochs 30 there, 7 here"):
        compare(config(methods="alone,kd,ft", seeds=3, out=str(tmp_path), threads=1, epochs=7))


@pytest.mark.parametrize("name", ["config.json", "holiday.jpg"])
def test_compare__leaves_a_foreign_folder_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match="one of a comparison"):
        compare(config(out=str(tmp_path), overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_compare__is_started_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes"):
        compare(config(out=str(tmp_path / "c")))


def test_compare__knows_who_shares_a_teacher_and_a_paraphraser(tmp_path: Path) -> None:
    sweep = ("k=0.5,1", "lr=0.1,0.2", "teacher_layer=layer2,layer3", "paraphraser=none")
    given = config(methods="alone,ft,ft+kd", seeds=1, teacher_epochs=2, sweep=sweep, out=str(tmp_path / "c"))
    plan = planned(given)
    keys = shared_by_variant(plan)
    assert keys["baseline"].keys() == keys["ft paraphraser=none"].keys() == {"teacher"}
    teachers = {name: each["teacher"] for name, each in keys.items()}
    assert len({key for name, key in teachers.items() if "lr=0.2" not in name}) == 1
    assert len({key for name, key in teachers.items() if "lr=0.2" in name}) == 1
    assert teachers["baseline"] != teachers["baseline lr=0.2"], "--teacher-lr is --lr by default"
    paraphrasers = {name: each["paraphraser"] for name, each in keys.items() if "paraphraser" in each}
    for name, key in paraphrasers.items():
        if name.startswith("ft "):
            assert key == paraphrasers[name.replace("ft ", "ft+kd ")]
    assert paraphrasers["ft lr=0.2"] != paraphrasers["ft k=0.5"], "it learned from another teacher"
    assert len(set(paraphrasers.values())) == 5, "k = 1, two layers, another teacher, and all others"
    plan = planned(config(methods="ft", seeds=2, sweep=("lr=0.1,0.2",), out=str(tmp_path / "c")))
    given_teacher = [each["paraphraser"] for each in shared_by_variant(plan).values()]
    assert len(set(given_teacher)) == 1, "a paraphraser has a learning rate of its own"


def shared_by_variant(plan: Plan) -> dict[str, dict[str, int]]:
    """For each variant, in its last seed, what it shares: a number for each that is made."""
    shared = shared_in(plan.runs)
    return {run.variant: {each.what: id(each.runs) for each in shared[run.name]} for run in plan.runs}


def test_compare__the_first_run_that_is_not_finished_makes_what_is_shared(tmp_path: Path) -> None:
    plan = planned(config(methods="baseline,kd,ft", seeds=2, teacher_epochs=2, threads=1, out=str(tmp_path)))
    runner = _Runner(plan)
    names = [run.name for run in plan.runs if runner._settings(run) is not None]
    assert names == ["baseline-s0"]
    stamp(tmp_path / "baseline-s0", "teacher")
    started = {run.name: settings for run in plan.runs if (settings := runner._settings(run)) is not None}
    assert [*started] == ["baseline-s0", "kd-s0", "ft-s0", "baseline-s1", "kd-s1"], "ft-s1 waits for a paraphraser"
    taken = (str(tmp_path / "baseline-s0" / "teacher.safetensors"), 0)
    for settings in (started["kd-s0"], started["ft-s0"]):
        assert (settings["teacher_weights"], settings["teacher_epochs"]) == taken
    assert started["ft-s0"]["paraphraser"] is None
    stamp(tmp_path / "ft-s0", "paraphraser")
    assert (runner._settings(plan.runs[-1]) or {})["paraphraser"] == str(tmp_path / "ft-s0" / "paraphraser.safetensors")
    # Where the file is gone and its maker finished, the next run makes it again.
    (tmp_path / "ft-s0" / "paraphraser.safetensors").unlink()
    runner.pending.remove(plan.runs[2])
    assert (runner._settings(plan.runs[-1]) or {})["paraphraser"] is None


def stamp(folder: Path, stage: str) -> None:
    """What a finished stage leaves."""
    (folder / "stages").mkdir(parents=True)
    (folder / "stages" / f"{stage}.json").touch()
    (folder / f"{stage}.safetensors").touch()


def test_compare__overwrite_deletes_its_own_runs_and_no_others(tmp_path: Path) -> None:
    given = config(methods="alone,ft", seeds=2, out=str(tmp_path), threads=1, overwrite=True)
    write_summaries(tmp_path, TOPS, given)
    shutil.copytree(tmp_path / "ft-s1", tmp_path / "kd-s1")
    _delete(planned(given))
    assert [path.name for path in tmp_path.iterdir()] == ["kd-s1"]


@pytest.mark.parametrize(
    ("views", "pinned", "passes", "waits"),
    [(2, None, 1, True), (2, None, 2, False), (0, None, 0, False), ("auto", None, 0, True), ("auto", "3", 2, True),
     ("auto", "3", 3, False), ("auto", "0", 0, False)],
)  # fmt: skip
def test_compare__waits_while_a_run_of_the_same_method_fills_the_factor_cache(
    tmp_path: Path, views: Any, pinned: str | None, passes: int, waits: bool
) -> None:
    plan = planned(config(methods="kd,ft", seeds=2, jobs=2, threads=1, views=views, out=str(tmp_path), epochs=9))
    runner = _Runner(plan)
    _, ft, next_kd, next_ft = plan.runs
    folder = Path(ft.config.out or "")
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"stage": "student", "epoch": 1}\n' * passes)
    if pinned:
        write_json(folder / "fingerprints.json", {"views": pinned})
    runner.pending = [next_kd, next_ft]
    runner.running = {ft.name: (ft, subprocess.Popen(["true"]))}
    stamp(folder, "paraphraser")
    assert (runner._settings(next_ft) is None) == waits
    assert runner._settings(next_kd) is not None
    runner.running[ft.name][1].wait()


# -- real runs


def figures(folder: Path) -> dict[str, tuple[Any, ...]]:
    """What must be the same however a comparison came to its end."""
    found = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        student = summary["student"]
        found[path.parent.name] = student["top1"], student["loss"], student["fingerprint"], summary["teacher"]["top1"]
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, factor_transfer: Command) -> Path:
    """A comparison that nothing disturbs, one run after another."""
    folder = tmp_path_factory.mktemp("straight")
    done = factor_transfer(
        "compare", *JOB, *WHICH, "--out", folder / "c", cwd=folder, timeout=900, forks=True, exports=False
    )
    assert done.returncode == 0, done.stderr
    assert "to baseline" in done.stdout
    assert "no difference" in done.stderr or "gains" in done.stderr or "loses" in done.stderr
    return folder / "c"


@pytest.mark.slow
def test_compare__makes_what_is_shared_once(straight: Path, factor_transfer: Command) -> None:
    summaries = {path.parent.name: json.loads(path.read_text()) for path in straight.glob("*/summary.json")}
    assert len(summaries) == 6
    assert [name for name, each in summaries.items() if each["settings"]["teacher_epochs"]] == ["baseline-s0"]
    assert [name for name, each in summaries.items() if each["seconds"].get("paraphraser")] == ["ft-s0"]
    assert len({each["fingerprints"]["teacher"] for each in summaries.values()}) == 1
    assert len({each["fingerprints"]["student"] for each in summaries.values()}) == 2
    page = straight / "page.html"
    done = factor_transfer("report", straight, "--out", page)
    assert done.returncode == 0, done.stderr
    found = json.loads((straight / "compare.json").read_text())
    for each in found["methods"][1:]:
        assert each["to_alone"]["verdict"] in page.read_text()


@pytest.mark.slow
def test_compare__alone_is_the_baseline_of_distill(straight: Path, factor_transfer: Command, tmp_path: Path) -> None:
    done = factor_transfer(
        "distill", *JOB, "--baseline", "--out", "run", "--seed", 1, cwd=tmp_path, timeout=900, exports=False
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    both = figures(straight)
    assert summary["baseline"]["fingerprint"] == both["baseline-s1"][2]
    assert summary["student"]["fingerprint"] == both["ft-s1"][2], "what is shared has the bits of what is not"


def start(folder: Path, *more: str) -> Started:
    return Started(["compare", *JOB, *WHICH, "--jobs", "2", "--out", "c", *more], cwd=folder, forks=True, exports=False)


def until(there: Callable[[], bool], process: Started) -> None:
    deadline = time.monotonic() + 600
    while not there():
        assert process.running(), process.finished()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_compare__killed_and_stopped_and_continued_two_at_once_ends_with_the_same_numbers(
    straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    process = start(tmp_path)
    until(lambda: bool(list(folder.glob("baseline-s0/checkpoints/teacher-*.pt"))), process)
    assert not list(folder.glob("kd-*")), "it waits for its teacher"
    process.send_signal(signal.SIGKILL)
    process.finished()
    process = start(tmp_path)  # the run that was under way may still be saving
    until(lambda: bool(list(folder.glob("ft-s0/checkpoints/paraphraser-*.pt"))), process)
    process.send_signal(signal.SIGTERM)
    assert process.finished(120).returncode == 143
    assert not (folder / "compare.json").exists() or not json.loads((folder / "compare.json").read_text())["complete"]
    process = start(tmp_path)
    until((folder / "baseline-s1" / "metrics.jsonl").exists, process)  # which stays, so that no moment is missed
    process.send_signal(signal.SIGINT)
    assert process.finished(120).returncode == 130
    done = start(tmp_path).finished(900)
    assert done.returncode == 0, done.stderr
    assert figures(folder) == figures(straight)
    refused = start(tmp_path, "--min-lr", "0.01").finished(120)
    assert refused.returncode == 2
    assert "--min-lr 0.0 there, 0.01 here" in refused.stderr
    assert figures(folder) == figures(straight)


@pytest.mark.slow
def test_compare__fills_a_factor_cache_once(factor_transfer: Command, tmp_path: Path) -> None:
    """Its runs are started as a user's are, and not forked as those of the other tests."""
    which = ["--methods", "ft", "--seeds", 2, "--jobs", 2, "--views", 2, "--cache-dir", "cache", "--out", "c"]
    done = factor_transfer("compare", *JOB, *which, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "is new: 2 views" in (tmp_path / "c" / "ft-s0.log").read_text()
    assert "holds 400 of 400 factors" in (tmp_path / "c" / "ft-s1.log").read_text()


@pytest.mark.slow
def test_compare__says_why_a_run_failed_and_lets_the_others_go_on(factor_transfer: Command, tmp_path: Path) -> None:
    job = [*JOB, "--seeds", 1, "--out", "c"]
    sweep = ["--methods", "alone,ft", "--sweep", "k=0.001,0.5"]
    done = factor_transfer("compare", *job, *sweep, cwd=tmp_path, timeout=900, forks=True, exports=False)
    assert done.returncode == 2
    assert "1 of 3 runs failed: ft-k=0.001-s0" in done.stderr
    assert "0 factor channels" in done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["baseline-s0", "ft-k=0.5-s0"]
    assert "held out" in found["scored_on"]
    whole = open_data(DataConfig(data="digits"), default_size=lambda: 8)
    assert found["data"]["validation"] == round(0.1 * len(whole.train)) != len(whole.validation)
    shutil.rmtree(tmp_path / "c")
    both = ["--methods", "ft,alone", "--k", 0.001]
    done = factor_transfer("compare", *job, *both, cwd=tmp_path, timeout=900, forks=True, exports=False)
    assert done.returncode == 2
    assert "1 of 2 runs failed" in done.stderr, "the first failed before any was through: none is started after it"


def test_compare__checks_all_settings_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--p 0.5"):
        compare(config(methods="alone,ft", sweep=("p=1,0.5",), out=str(tmp_path / "c")))
    assert not (tmp_path / "c").exists()
