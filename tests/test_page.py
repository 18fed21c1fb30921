"""The report, in a real browser: drawn, silent, self-contained, without overflow, and with names that are only text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import Page, check
from factor_transfer import distill
from factor_transfer.cli import app
from factor_transfer.compare.words import tabulated
from factor_transfer.config import Config
from factor_transfer.report.figures import photograph
from factor_transfer.report.findings import findings
from factor_transfer.report.html import repeat_command, write_report
from factor_transfer.report.several import comparison_values, runs_in, write_comparison
from factor_transfer.training.run_folder import Run, saved_config
from factor_transfer.util.errors import RunError
from factor_transfer.util.files import read_json, write_json

HOSTILE = ("<img src=x onerror=alert(1)>", "<script>alert(1)<", "قطة")
SCRIPT = "<script>alert(1)</script>"
SMALL: dict[str, Any] = {"layers": (1, 1, 1), "channels": (4, 4, 8)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Callable[..., Path]) -> Path:
    """A finished run on images whose classes have hostile names."""
    data = image_folder(tmp_path_factory.mktemp("data") / "images")
    for split in ("train", "validation"):
        for place, name in enumerate(HOSTILE):
            (data / split / f"class{place}").rename(data / split / name)
    out = tmp_path_factory.mktemp("runs") / "one"
    settings = {"teacher_args": SMALL, "student_args": SMALL, "teacher_epochs": 3, "epochs": 2, "batch_size": 8}
    more = {"paraphraser_epochs": 1, "baseline": True, "device": "cpu", "threads": 1, "lr": 0.05}
    distill("cifar_resnet20", "cifar_resnet20", data, out=out, **settings, **more)
    return out


def test_report__is_made_at_the_end_of_a_run_and_drawn_in_a_browser(run: Path, page: Page) -> None:
    check(page, run / "report.html")
    titles = page.run("[...document.querySelectorAll('figcaption')].map(each => each.textContent).join('|')")
    for wanted in ("Top-1 against latency", "Top-1 against size", "Validation top-1", "Norm of the gradient",
                   "Reconstruction error by channel", "Reconstruction error by place", "cosine"):  # fmt: skip
        assert wanted in titles
    assert not page.run("document.querySelector('.missing')")


def test_report__a_class_name_is_text_and_never_markup(run: Path, page: Page, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    summary = read_json(copy / "summary.json")
    summary["data"]["classes"] = [HOSTILE[0], SCRIPT, HOSTILE[2]]  # no folder can have a slash in its name
    write_json(copy / "summary.json", summary)
    page.open(write_report(copy))
    names = page.run("[...document.querySelectorAll('td bdi')].map(each => each.textContent)")
    assert set(names) == {HOSTILE[0], SCRIPT, HOSTILE[2]}
    assert page.run("document.scripts.length") == 1
    assert page.errors == []
    attributes = page.run("[...document.images].map(each => each.alt).join('|')")
    assert SCRIPT in attributes


def test_report__tips_and_sorting_work(run: Path, page: Page) -> None:
    page.open(run / "report.html")
    page.show(1400)
    place = page.run(
        "(mark => { mark.scrollIntoView(); const b = mark.getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })(document.querySelector('svg g.teacher .mark'))"
    )
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    # Marks may lie on each other: networks of this size are measured alike.
    there = page.run(f"document.elementFromPoint({place[0]}, {place[1]}).closest('[data-tip]').dataset.tip")
    assert page.run("document.getElementById('tip').textContent") == there
    assert there.split(":")[0] in {"teacher", "baseline", "student by Factor Transfer"}
    assert page.run("!document.getElementById('tip').hidden")
    column = (
        "(t => [...t.tBodies[0].rows].map(row => Number(row.cells[2].textContent)))"
        "(document.querySelector('#classes ~ .scroll table'))"
    )
    click = "document.querySelector('#classes ~ .scroll table').tHead.rows[0].cells[2].firstChild.click()"
    page.run(click)
    assert page.run(column) == sorted(page.run(column))
    page.run(click)
    assert page.run(column) == sorted(page.run(column), reverse=True)


def test_report__stays_small_with_100_classes_and_300_passes(run: Path, page: Page, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    summary, found = read_json(copy / "summary.json"), read_json(copy / "findings.json")
    summary["data"]["classes"] = [f"class {place} with a rather long name" for place in range(100)]
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    found["count"], found["similarity"] = [50] * 100, [0.9] * 100
    found["right"] = {
        role: [(7 * place + shift) % 51 for place in range(100)] for shift, role in enumerate(found["right"])
    }
    some = {"picture": photograph(noise), "label": 3, "index": 4, "teacher": [3, 0.9], "student": [99, 0.8]}
    found["disagreements"] = {"count": 2000, "shown": [some] * 24}
    found["examples"] = [{**example, "picture": photograph(noise)} for example in found["examples"]] * 2
    found["reconstruction"]["per_channel"] = [0.5] * 2048
    write_json(copy / "summary.json", summary)
    write_json(copy / "findings.json", found)
    rows = {row["stage"]: row for row in Run(run).metrics()}
    lines = [json.dumps({**row, "epoch": epoch}) for row in rows.values() for epoch in range(1, 301)]
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    file = write_report(copy)
    assert file.stat().st_size < 5e6
    check(page, file)


def test_report__names_what_an_early_run_lacks(run: Path, page: Page, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for name in ("translator.safetensors", "findings.json"):
        (copy / name).unlink()
    summary, config = read_json(copy / "summary.json"), read_json(copy / "config.json")
    for role in ("teacher", "student", "baseline"):
        del summary[role]["fingerprint"], summary[role]["is_module"]
    for name in ("log_with", "views"):
        del config[name], summary["settings"][name]
    write_json(copy / "summary.json", summary)
    write_json(copy / "config.json", config)
    check(page, write_report(copy))
    assert "translator" in page.run("document.querySelector('.missing').textContent")
    shutil.move(saved_config(run).data, tmp_path / "elsewhere")
    try:
        (copy / "findings.json").unlink()
        check(page, write_report(copy))
        assert "images" in page.run("document.querySelector('.missing').textContent")
    finally:
        shutil.move(tmp_path / "elsewhere", saved_config(run).data)


def test_findings__agree_with_the_run(run: Path) -> None:
    summary, found = read_json(run / "summary.json"), findings(run)
    assert found["missing"] == {}
    assert summary["baseline"]["latency_ms"] == summary["student"]["latency_ms"], "one architecture has one latency"
    for role, right in found["right"].items():
        assert 100 * sum(right) / found["images"] == pytest.approx(summary[role]["top1"])
    assert found["only"]["teacher not student"] - found["only"]["student not teacher"] == pytest.approx(
        sum(found["right"]["teacher"]) - sum(found["right"]["student"])
    )
    assert all(-1 <= value <= 1 for value in found["similarity"])


def test_repeat_command__makes_the_same_settings(run: Path) -> None:
    import shlex

    config = saved_config(run)
    for given in (config, Config(data="a b", teacher="x", student="y", scale=(0.5, 1.0), sched_on_updates=False)):
        words = shlex.split(repeat_command(given.to_dict()))
        _, bound, _ = app.parse_args(words[1:], print_error=False, exit_on_error=False)
        again = bound.arguments["settings"].to_dict()
        assert again == {**given.to_dict(), "out": None}


def test_comparison__gives_mean_and_spread_over_seeds(run: Path, page: Page, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        copy = Path(shutil.copytree(run, tmp_path / "runs" / f"s{seed}"))
        summary = read_json(copy / "summary.json")
        summary["settings"]["seed"] = seed
        summary["student"]["top1"] = 50.0 + seed
        write_json(copy / "summary.json", summary)
    folders = runs_in([tmp_path / "runs"])
    assert [folder.name for folder in folders] == ["s0", "s1", "s2"]
    values = comparison_values(folders)
    assert values["differing"] == ["--seed"]
    assert values["groups"][0]["columns"][0] == "51.00 ± 1.00"
    file = write_comparison(folders, tmp_path / "comparison.html")
    check(page, file)
    with pytest.raises(RunError, match="no run"):
        runs_in([tmp_path])


def test_comparison__of_methods_fits_every_width(page: Page, tmp_path: Path) -> None:
    """The kept runs of the demo: methods differ in many settings, so the table of runs is wide."""
    kept = Path(__file__).parent.parent / "results/demo-fashion"
    page_of_methods = write_comparison(sorted(kept.glob("*-s100")), tmp_path / "comparison.html", tabulated(kept))
    check(page, page_of_methods)


def test_runs_in__says_which_runs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, files in (("a", ("config.json", "summary.json")), ("b", ("config.json",)), ("notes", ())):
        (tmp_path / name).mkdir()
        for file in files:
            write_json(tmp_path / name / file, {})
    assert runs_in([tmp_path]) == [tmp_path / "a"]
    assert f"in {tmp_path}, not finished and left out: b" in capsys.readouterr().err
