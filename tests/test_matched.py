"""The baseline at equal compute: which method it is matched to, its passes and schedule, and what is said first."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from factor_transfer.compare.matched import stretched
from factor_transfer.compare.plan import CompareConfig, Plan, PlannedRun, planned
from factor_transfer.compare.result import outcome
from factor_transfer.compare.run import _check_settings, _Runner, compare
from factor_transfer.compare.words import in_words
from factor_transfer.config import Config
from factor_transfer.training.run_folder import Run
from factor_transfer.training.schedule import Plan as StagePlan
from factor_transfer.training.schedule import optimizer_and_schedule
from factor_transfer.util.errors import ConfigError, RunError
from factor_transfer.util.files import read_json, write_json
from processes import Command

N = 100
PARTS = {"teacher": 60.0, "readers": 10.0, "paraphraser": 20.0, "terms": 5.0, "student": 10.0}
"""Multiply-adds of one image. A pass of the student costs 30 N, of the student by ft 45 N, and 70 N more live."""


def config(**changed: Any) -> CompareConfig:
    usual = {"teacher": "cifar_resnet56", "student": "cifar_resnet20", "data": "digits", "epochs": 30, "threads": 1,
             "paraphraser_epochs": 6}  # fmt: skip
    return CompareConfig(**{**usual, **changed})


def finish(run: PlannedRun, top1: float = 80.0, *, views: int = 0, price: bool = True, **settings: Any) -> None:
    """What a finished run leaves, with planted figures; its compute follows from the price and its settings."""
    given = {**run.config.to_dict(), **settings}
    parts = {name: {"multiply_adds": value, "parameters": 1} for name, value in PARTS.items()}
    ratios = {"layers": 1, "taught": bool(given["beta"] or given["kd_weight"]), "cached": True}
    if not given["beta"]:
        parts |= {name: {"multiply_adds": 0.0, "parameters": 0} for name in ("readers", "paraphraser", "terms")}
    network = {"size_bytes": 4, "latency_ms": 1.0, "layer": "x", "img_size": 8, "mean": [0.0], "std": [1.0]}
    seconds = {"student": 10.0, "paraphraser": 3.0 if given["beta"] and given["paraphraser"] is None else 0.0}
    summary = {
        "teacher": {**network, "name": "big", "top1": 90.0, "parameters": 1000},
        "student": {**network, "name": "small", "top1": top1, "parameters": 100, "views": views},
        "seconds": seconds, "settings": given, "environment": {"torch": "2"},
        "data": {"name": "digits", "train": N, "validation": 50, "img_size": 8, "classes": ["0", "1"]},
        "fingerprints": {"data": "d", "teacher": "t", "student": f"s{run.seed}"},
        **({"price": {**parts, **ratios}} if price else {}),
    }  # fmt: skip
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "summary.json", summary)


def by_name(plan: Plan) -> dict[str, PlannedRun]:
    return {run.name: run for run in plan.runs}


def startable(plan: Plan) -> dict[str, dict[str, Any]]:
    """The settings of the runs that need not wait for another, in a comparison that is begun or continued now."""
    runner = _Runner(plan)
    return {run.name: settings for run in runner.pending if (settings := runner._settings(run)) is not None}


# -- the plan


def test_planned__a_matched_baseline_is_a_baseline_of_other_passes(tmp_path: Path) -> None:
    methods = "baseline,baseline-matched,baseline-matched:kd,kd,ft,alone,baseline-matched:ft"
    plan = planned(config(methods=methods, seeds=1, views=4, out=str(tmp_path)))
    matched = {each.name: each.matched for each in plan.variants}
    assert matched == {"baseline": None, "baseline-matched": "ft", "baseline-matched:kd": "kd", "kd": None, "ft": None}
    runs = by_name(plan)
    assert [*runs] == ["baseline-s0", "baseline-matched-s0", "baseline-matched-kd-s0", "kd-s0", "ft-s0"]
    alone, other = (runs[name].config.to_dict() for name in ("baseline-s0", "baseline-matched-s0"))
    assert {name for name in alone if alone[name] != other[name]} == {"out", "views"}
    assert other["views"] == 0
    variants = {each.name: each for each in plan.variants}
    assert plan.reference(variants["baseline-matched"], "baseline") == "baseline"
    assert plan.reference(variants["baseline-matched"], "kd") is None


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"methods": "baseline-matched:at,ft"}, r"no at among the methods\n.*baseline-matched, baseline-matched:ft"),
        ({"methods": "baseline-matched:baseline,ft"}, "no baseline among the methods"),
        ({"methods": "baseline-matched:,ft"}, "no method with a teacher among the methods"),
        ({"methods": "baseline,baseline-matched"}, r"no method with a teacher among the methods\n.*name the method"),
        ({"methods": "baseline-matched+kd,ft"}, r"no method baseline-matched\n"),
        ({"methods": "baseline-match,ft"}, r"no method baseline-match\n.*baseline-matched"),
        ({"methods": "baseline-matched,ft", "sweep": ("k=0.5,1",)}, r"--sweep with baseline-matched\n.*several"),
    ],
)
def test_planned__names_what_a_baseline_cannot_be_matched_to(changed: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){wanted}"):
        planned(config(**changed))


# -- the schedule


def rates(settings: Config) -> list[float]:
    """The learning rate at the begin of each pass."""
    plan = StagePlan(stage="student", epochs=settings.epochs, lr=settings.lr, seed=0)
    optimizer, scheduler = optimizer_and_schedule(nn.Linear(2, 2), plan, settings, 4)
    found = []
    for epoch in range(settings.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        for step in range(4):
            scheduler.step_update(4 * epoch + step + 1)
        scheduler.step(epoch + 1)
    return found


@pytest.mark.parametrize(
    "schedule",
    [
        {"sched": "cosine", "warmup_epochs": 3, "min_lr": 0.01},
        {"sched": "multistep", "decay_milestones": (6, 9), "warmup_epochs": 2},
        {"sched": "step", "decay_epochs": 4},
        {"sched": "wsd", "decay_epochs": 4, "warmup_epochs": 2},
    ],
)
def test_stretched__is_the_same_schedule_in_more_passes(schedule: dict[str, Any]) -> None:
    given = Config(teacher="t", student="s", data="digits", epochs=12, **schedule)
    longer = Config(**{**vars(given), **stretched(given, 36)})
    assert rates(longer)[::3] == pytest.approx(rates(given), rel=1e-6)
    assert longer.epochs == 36


# -- which runs wait, and for how long they train


def test_compare__a_matched_baseline_waits_for_its_method_and_costs_as_much(tmp_path: Path) -> None:
    plan = planned(config(methods="baseline,baseline-matched,kd,ft", seeds=2, out=str(tmp_path), warmup_epochs=3))
    runs = by_name(plan)
    assert not any("matched" in name for name in startable(plan))
    finish(runs["ft-s0"])
    (settings,) = (each for name, each in startable(plan).items() if "matched" in name)
    # 6 passes of the paraphraser (60 + 3 x 20 each) and 30 of the student (3 x 15 + 70): of the student alone, 30.
    wanted = (6 * 120 + 30 * 115) / 30
    assert (wanted, settings["epochs"]) == (139, 139)
    assert (settings["warmup_epochs"], settings["views"]) == (14, 0)
    # The next seed takes the paraphraser of the first, fills no cache, and is charged for both.
    finish(runs["ft-s1"], views=8, paraphraser=str(tmp_path / "ft-s0" / "paraphraser.safetensors"))
    cached = (6 * 120 + 30 * 45 + 8 * 70) / 30
    assert startable(plan)["baseline-matched-s1"]["epochs"] == -(-cached // 1) == 88


def test_compare__what_a_running_method_made_for_others_is_charged(tmp_path: Path) -> None:
    plan = planned(config(methods="baseline-matched,ft", seeds=2, out=str(tmp_path)))
    runs = by_name(plan)
    finish(runs["ft-s1"], paraphraser=str(tmp_path / "ft-s0" / "paraphraser.safetensors"))
    assert startable(plan).keys() == {"ft-s0"}, "nobody knows yet what the paraphraser cost"
    stages = tmp_path / "ft-s0" / "stages"
    stages.mkdir(parents=True)
    write_json(stages / "paraphraser.json", {"seconds": 1.0, "multiply_adds": 0.0, "multiply_adds_alone": 720.0 * N})
    assert startable(plan)["baseline-matched-s1"]["epochs"] == 139


def test_compare__without_ft_the_dearest_method_of_the_first_seed_is_matched(tmp_path: Path) -> None:
    plan = planned(config(methods="baseline,baseline-matched,kd,ft+kd", seeds=2, out=str(tmp_path)))
    runs = by_name(plan)
    finish(runs["ft+kd-s0"])
    finish(runs["ft+kd-s1"])
    assert not any("matched" in name for name in startable(plan)), "kd may be dearer"
    finish(runs["kd-s0"])
    found = {name: each["epochs"] for name, each in startable(plan).items() if "matched" in name}
    assert found == {"baseline-matched-s0": 139, "baseline-matched-s1": 139}


def test_compare__a_matched_baseline_keeps_its_passes_when_it_is_continued(tmp_path: Path) -> None:
    plan = planned(config(methods="baseline-matched,ft", seeds=1, out=str(tmp_path)))
    matched, ft = plan.runs
    finish(ft)
    given = startable(plan)[matched.name]
    matched.folder.mkdir()
    write_json(matched.folder / "config.json", Config(**given).to_dict())
    Run(matched.folder).record("student", {"seconds": 1.0})
    _check_settings(matched, plan)
    assert startable(plan)[matched.name]["epochs"] == given["epochs"] == 139
    finish(ft, views=8)  # which costs less
    with pytest.raises(RunError, match=r"baseline-matched-s0, a run with other settings: --epochs 139 there, 88 here"):
        _check_settings(matched, plan)
    (ft.folder / "summary.json").unlink()
    _check_settings(matched, plan)
    assert startable(plan)[matched.name]["epochs"] == 139


@pytest.mark.parametrize("old", [True, False])
def test_compare__says_why_a_matched_baseline_cannot_be_started(tmp_path: Path, old: bool) -> None:
    plan = planned(config(methods="kd,baseline-matched,ft", seeds=1, out=str(tmp_path)))
    kd, matched, ft = plan.runs
    finish(kd)
    if old:
        finish(ft, price=False)
    runner = _Runner(plan)
    if not old:
        runner.running[ft.name] = ft, subprocess.Popen(["true"])
        runner.pending.remove(ft)
        runner._give_up()
        assert not runner.failures, "it waits"
        runner.running.pop(ft.name)[1].wait()
    runner._give_up()
    why = "a version made it that counted none" if old else "ft-s0 failed"
    assert matched not in runner.pending
    assert why in runner.failures[matched.name]
    if old:
        with pytest.raises(RunError, match=r"(?s)1 of 3 runs failed: baseline-matched-s0.*counted none"):
            compare(plan.config)


# -- what is said


def test_outcome__speaks_of_equal_compute_first(tmp_path: Path) -> None:
    plan = planned(config(methods="baseline,baseline-matched,kd,ft", seeds=3, out=str(tmp_path)))
    tops = {"baseline": (70.0, 70.5, 70.2), "baseline-matched": (76.0, 76.4, 76.1), "kd": (71.9, 71.1, 71.3),
            "ft": (80.0, 80.6, 80.1)}  # fmt: skip
    for run in plan.runs:
        matched = {"epochs": 139} if run.variant == "baseline-matched" else {}
        finish(run, tops[run.variant][run.seed], **matched)
    found = outcome(plan)
    alone, matched, kd, ft = found["methods"]
    assert [each["compute_to_alone"] for each in (alone, matched, kd, ft)] == pytest.approx([1, 139 / 30, 3, 139 / 30])
    assert (matched["epochs"], matched["matched_to"], ft["epochs"]) == ([139], "ft", [30])
    assert ft["to_matched"]["what"] == "baseline-matched"
    assert ft["to_matched"]["mean"] == pytest.approx(4.0667, abs=1e-3)
    assert (alone["to_matched"], matched["to_matched"], kd["to_matched"]) == (None, None, None)
    assert ft["gap_closed_matched"]["closed"] == pytest.approx(4.0667 / (90 - 76.1667), abs=1e-3)
    said = in_words(found)
    lines = [line for line in said.splitlines() if line.startswith("- ")]
    assert lines[0].startswith("- ft, at equal compute: gains")
    assert "over baseline-matched (139 passes, 4.63 times the baseline's compute); it closes 29 % (" in lines[0]
    assert [line.partition(":")[0] for line in lines[1:]] == [
        "- baseline-matched, 139 passes", "- kd, at equal passes", "- ft, at equal passes"]  # fmt: skip
    assert "| x baseline | compute | at equal compute | p |" in said
    assert "baseline-matched: 139 passes, which cost what ft costs" in said


def test_outcome__shows_compute_where_nothing_is_matched(tmp_path: Path) -> None:
    plan = planned(config(methods="ft,kd", seeds=1, out=str(tmp_path)))
    ft, kd = plan.runs
    finish(ft, views=8)
    finish(kd, price=False)
    found = outcome(plan)
    assert [each["compute_to_alone"] for each in found["methods"]] == [pytest.approx(2630 / 900), None]
    said = in_words(found)
    assert "| x baseline | compute |\n" in said
    assert "| 2.92 |\n" in said
    assert "equal" not in said


@pytest.mark.slow
def test_compare__trains_a_baseline_at_equal_compute(factor_transfer: Command, tmp_path: Path) -> None:
    job = [
        "--data", "digits", "--train-images", "200", "--teacher", "cifar_resnet20", "--student", "cifar_resnet20",
        "--teacher-args", "layers=(1,1,1) channels=(8,16,32)", "--student-args", "layers=(1,1,1) channels=(4,8,16)",
        "--teacher-epochs", "4", "--teacher-lr", "0.05", "--paraphraser-epochs", "2", "--paraphraser-lr", "0.01",
        "--epochs", "3", "--lr", "0.05", "--batch-size", "32", "--threads", "1", "--device", "cpu",
        "--log-with", "none", "--methods", "baseline,baseline-matched,ft", "--seeds", 2, "--views", 2,
        "--cache-dir", "cache", "--jobs", 2,
    ]  # fmt: skip
    done = factor_transfer("compare", *job, "--out", "c", cwd=tmp_path, timeout=900, forks=True, exports=False)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "c" / "compare.json")
    alone, matched, ft = found["methods"]
    assert alone["compute_to_alone"] == 1
    (passes,) = matched["epochs"]
    assert passes > 3
    assert 0 <= matched["compute"] - ft["compute"] < matched["compute"] / passes
    spent = {run["name"]: run["compute"] for run in found["runs"]}
    assert spent["ft-s0"] == spent["ft-s1"], "what the second took of the first is charged to it as well"
    assert len(Run(tmp_path / "c" / "baseline-matched-s1").metrics("student")) == passes
    assert "ft, at equal compute: " in done.stderr + done.stdout
