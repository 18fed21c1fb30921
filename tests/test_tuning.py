"""Tuning on equal terms: as many trials of each method, by images that are not reported on, and the best compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from factor_transfer.compare.plan import Plan, planned
from factor_transfer.compare.result import outcome
from factor_transfer.compare.run import _delete, compare
from factor_transfer.compare.tuning import OTHER_SEED, REACH, trials, tune
from factor_transfer.compare.words import in_words, show_outcome
from factor_transfer.util.errors import ConfigError, RunError
from factor_transfer.util.files import read_json
from processes import Command
from test_matched import config, finish

RECORDED = {"ft": {"beta": 100.0}, "ft+kd": {"beta": 100.0}}


def test_trials__are_as_many_for_each_method_and_as_far_from_what_is_given(tmp_path: Path) -> None:
    plan = planned(config(methods="baseline-matched,kd,ft,ft+kd", tune=5, seeds=3, seed=7, out=str(tmp_path)))
    every = trials(plan, RECORDED)
    assert [run.name for run in every.runs[:5]] == ["baseline-t0", "kd-t0", "ft-t0", "ft+kd-t0", "baseline-t1"]
    assert len(every.runs) == 5 * 4
    assert {run.config.validate_on for run in every.runs} == {"train-holdout"}
    assert {run.config.seed for run in every.runs} == {7 + OTHER_SEED}
    of = {run.name: run.config for run in every.runs}
    for number in range(5):
        baseline, kd, ft, both = (of[f"{method}-t{number}"] for method in ("baseline", "kd", "ft", "ft+kd"))
        assert len({each.lr for each in (baseline, kd, ft, both)}) == 1
        decay, weight, beta = (
            baseline.weight_decay / 5e-4,
            kd.kd_weight / 0.9,
            float(ft.beta or 0) / 100 if number else 1,
        )
        assert decay == pytest.approx(weight, rel=0.01) == pytest.approx(beta, rel=0.01)
        assert 1 / REACH <= decay <= REACH
        assert (kd.weight_decay, ft.weight_decay, baseline.beta, baseline.kd_weight) == (5e-4, 5e-4, 0.0, 0.0)
        assert (both.beta != both.kd_weight / 0.9 * 100) or not number
    assert of["ft-t0"].beta == "auto"
    assert len({(of[f"ft-t{number}"].lr, of[f"ft-t{number}"].beta) for number in range(5)}) == 5
    assert len({each.name for each in every.variants}) == 20


def test_trials__more_of_them_begin_with_the_same(tmp_path: Path) -> None:
    few, many = (trials(planned(config(methods="kd,ft", tune=count, out=str(tmp_path))), RECORDED) for count in (3, 6))
    assert [run.config for run in few.runs] == [run.config for run in many.runs[: len(few.runs)]]


SCORES = {"baseline-t0": 70.0, "baseline-t1": 72.0, "baseline-t2": 72.0, "ft-t0": 80.0, "ft-t1": 75.0}


def work(plan: Plan) -> dict[str, str]:
    """Trials that end with planted scores; what has none fails."""
    for run in plan.runs:
        if run.name in SCORES:
            finish(run, SCORES[run.name], beta=run.config.beta)
            summary = read_json(run.folder / "summary.json")
            summary["student"]["beta"] = 100.0
            (run.folder / "summary.json").write_text(json.dumps(summary))
    return {run.name: "not finite" for run in plan.runs if not run.finished}


def test_tune__compares_the_best_of_each_method_on_other_seeds_and_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = config(methods="baseline,baseline-matched,ft", tune=3, seeds=2, out=str(tmp_path))
    found = tune(planned(given), work)
    assert found == read_json(tmp_path / "tuning" / "tuning.json")
    assert {method: each["trial"] for method, each in found["chosen"].items()} == {
        "baseline": "baseline-t1", "ft": "ft-t0"}  # fmt: skip
    assert found["trials"][-1] == {
        "trial": "ft-t2", "method": "ft", "settings": {"lr": 0.05, "beta": 159.0}, "score": None,
        "failed": "not finite",
    }  # fmt: skip
    plan = planned(given, found)
    of = {run.name: run.config for run in plan.runs}
    best = found["chosen"]["baseline"]["settings"]
    assert best.keys() == {"lr", "weight_decay"}
    for name in ("baseline-s1", "baseline-matched-s1"):
        assert (of[name].lr, of[name].weight_decay) == (best["lr"], best["weight_decay"])
    assert (of["ft-s0"].lr, of["ft-s0"].beta, of["ft-s0"].weight_decay) == (0.1, "auto", 5e-4)
    assert {each.validate_on for each in of.values()} == {"validation"}
    assert {each.seed for each in of.values()} == {0, 1}
    for run in plan.runs:
        finish(run)
    compared = outcome(plan)
    assert compared["tuning"] == found
    assert "--tune 3" in compared["command"]
    said = in_words(compared)
    assert "| baseline-t1 | --lr 0.1, --weight-decay 0.000315 | 72.00 | chosen |" in said
    assert "| ft-t2 | --lr 0.05, --beta 159 | failed |  |" in said
    assert "held out" in said
    show_outcome(tmp_path, compared)
    assert "ft-t0" in capsys.readouterr().out
    _delete(trials(planned(given), {}))
    assert not list((tmp_path / "tuning").glob("*-t*"))


def test_tune__stops_where_a_method_fails_as_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)1 of 2 methods failed as they are given: kd-t0.*not finite"):
        tune(planned(config(methods="baseline,kd", tune=2, out=str(tmp_path))), work)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"tune": 1}, r"--tune 1\n.*one trial.*\n.*2 or more"),
        ({"tune": 4, "sweep": ("k=0.5,1",)}, r"--tune 4 with --sweep k=0.5,1\n.*two ways"),
        ({"tune": 4, "validate_on": "train-holdout"}, r"--tune 4 with --validate-on train-holdout\n.*reported on"),
        ({"tune": 4, "teacher_epochs": 3}, r"--tune 4 with --teacher-epochs 3\n.*anew\n.*--teacher-weights"),
        ({"tune": 4, "label_weight": 0.0}, r"--tune 4 with --label-weight 0"),
        ({"tune": 4, "teacher_layer": "a,b", "student_layer": "a,b"}, r"--tune with --beta auto\n.*several layers"),
    ],
)
def test_tune__names_what_contradicts_it(changed: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"(?s){wanted}"):
        compare(config(methods="kd,ft", out=str(tmp_path / "c"), **changed))


@pytest.mark.slow
def test_compare__tunes_and_then_compares(factor_transfer: Command, tmp_path: Path) -> None:
    job = [
        "--data", "digits", "--train-images", "200", "--teacher", "cifar_resnet20", "--student", "cifar_resnet20",
        "--teacher-args", "layers=(1,1,1) channels=(8,16,32)", "--student-args", "layers=(1,1,1) channels=(4,8,16)",
        "--paraphraser-epochs", "2", "--paraphraser-lr", "0.01", "--epochs", "3", "--lr", "0.05", "--batch-size", "32",
        "--threads", "1", "--device", "cpu", "--log-with", "none",
    ]  # fmt: skip
    own = ["--teacher-epochs", "4", "--beta", "0", "--out", "teacher"]
    done = factor_transfer("distill", *job, *own, cwd=tmp_path, timeout=300, exports=False)
    assert done.returncode == 0, done.stderr
    which = ["--methods", "baseline,ft", "--seeds", 1, "--tune", 2, "--jobs", 2, "--out", "c"]
    given = ["compare", *job, "--teacher-weights", "teacher/teacher.safetensors", *which]
    done = factor_transfer(*given, cwd=tmp_path, timeout=900, forks=True, exports=False)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "c" / "compare.json")
    assert [each["score"] is not None for each in found["tuning"]["trials"]] == [True] * 4
    assert found["tuning"]["trials"][-1]["settings"]["beta"] > 0
    for run in ("baseline", "ft"):
        settings = read_json(tmp_path / "c" / f"{run}-s0" / "summary.json")["settings"]
        for name, value in found["tuning"]["chosen"][run]["settings"].items():
            assert settings[name] == value
    again = factor_transfer(*given, cwd=tmp_path, timeout=300, forks=True, exports=False)
    assert again.returncode == 0, again.stderr
    assert read_json(tmp_path / "c" / "compare.json") == found
