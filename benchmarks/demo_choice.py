"""How the demo's pair and schedule were chosen, and what they give on seeds and images that chose nothing.

    python benchmarks/demo_choice.py choose    # seeds 0-9, an inner split of the digits' training images
    python benchmarks/demo_choice.py confirm   # seeds 100-119, recipe:digits as shipped, the 539 held-out images

`choose` scores each candidate by the mean paired difference of Factor Transfer to the same student alone; the largest
wins, and its settings stand in `recipes/demo.yaml`. `confirm` is run once. Both are resumable, and leave their raw
figures in `results/`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats

from factor_transfer.config import Config, DataConfig
from factor_transfer.data.dataset import open_data
from factor_transfer.distillation import run_distillation
from factor_transfer.settings import recipe
from factor_transfer.training.run_folder import environment
from factor_transfer.util.console import silence
from factor_transfer.util.files import write_json

RESULTS = Path(__file__).parent.parent / "results"
WORK = Path("runs/demo-choice")

CANDIDATES = [
    {"img_size": size, "epochs": epochs, "beta": beta}
    for size, epochs, betas in ((8, 30, (30.0, 60.0, 120.0)), (8, 60, (60.0, 120.0)), (16, 16, (30.0, 60.0)))
    for beta in betas
]


def inner_images() -> str:
    """The digits' training images as a folder without validation set, so that a share of them is held out."""
    split = open_data(DataConfig(data="digits"), default_size=lambda: 8).train
    (batch,) = split.batches([np.arange(len(split))], view=None)
    for index, (image, label) in enumerate(zip(batch.image, batch.label.tolist(), strict=True)):
        folder = WORK / "images" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:04}.png")
    return str(WORK / "images")


def run(config: Config, name: str) -> dict[str, Any]:
    """The summary of one run, made or found."""
    return run_distillation(replace(config, out=str(WORK / name), threads=1)).summary


def with_teacher_of(config: Config, name: str) -> Config:
    """The same settings with teacher and paraphraser of a finished run, to the same bits, without training them."""
    folder = WORK / name
    files = {role: str(folder / f"{role}.safetensors") for role in ("teacher", "paraphraser")}
    return replace(config, teacher_epochs=0, teacher_weights=files["teacher"], paraphraser=files["paraphraser"])


def paired(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and the paired difference with its 95 % interval (Student's t)."""
    alone, student = (np.array([row[role] for row in rows]) for role in ("alone", "student"))
    difference = student - alone
    error = difference.std(ddof=1) / len(rows) ** 0.5
    half = float(stats.t.ppf(0.975, len(rows) - 1) * error)
    mean = float(difference.mean())
    return {
        "n": len(rows),
        "alone_mean": float(alone.mean()),
        "alone_sd": float(alone.std(ddof=1)),
        "student_mean": float(student.mean()),
        "student_sd": float(student.std(ddof=1)),
        "difference_mean": mean,
        "difference_sd": float(difference.std(ddof=1)),
        "interval_low": mean - half,
        "interval_high": mean + half,
    }


def choose() -> None:
    """Score every candidate on the inner split."""
    data = inner_images()
    found: list[dict[str, Any]] = []
    for size, group in itertools.groupby(CANDIDATES, key=lambda candidate: candidate["img_size"]):
        base = replace(
            recipe("digits"), data=data, validation_share=0.25, img_size=int(size), crop_padding=int(size) // 8
        )
        first = f"teacher-{size}"
        run(replace(base, epochs=1, baseline=False), first)
        base = with_teacher_of(base, first)
        alone: dict[tuple[int, int], float] = {}
        for candidate in group:
            epochs, beta = int(candidate["epochs"]), candidate["beta"]
            rows = []
            for seed in range(10):
                first_of_its_kind = (epochs, seed) not in alone
                config = replace(base, epochs=epochs, beta=beta, seed=seed, baseline=first_of_its_kind)
                summary = run(config, f"ft-{size}-{epochs}-{beta:g}-{seed}")
                if first_of_its_kind:
                    alone[epochs, seed] = summary["baseline"]["top1"]
                rows.append({"seed": seed, "alone": alone[epochs, seed], "student": summary["student"]["top1"]})
            found.append({**candidate, **paired(rows), "rows": rows})
            print({key: value for key, value in found[-1].items() if key != "rows"}, flush=True)
            save("demo-choice.json", {"candidates": found})
    best = max(found, key=lambda candidate: float(candidate["difference_mean"]))
    print("chosen:", {key: value for key, value in best.items() if key != "rows"})


def confirm() -> None:
    """The demo as shipped, on fresh seeds and on the held-out images."""
    rows, config = [], recipe("digits")
    for seed in range(100, 120):
        settings = config if seed == 100 else with_teacher_of(config, "confirm-100")
        summary = run(replace(settings, seed=seed), f"confirm-{seed}")
        rows.append({"seed": seed, "alone": summary["baseline"]["top1"], "student": summary["student"]["top1"]})
        print(rows[-1], flush=True)
    result = {"teacher": summary["teacher"]["top1"], **paired(rows), "validation": summary["data"]["validation"]}
    save("demo-confirm.json", {**result, "rows": rows, "settings": config.to_dict()})
    print(result)


def save(name: str, value: dict[str, Any]) -> None:
    """Into `results/`, with what it was computed on."""
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / name, json.loads(json.dumps({**value, "environment": environment()})))


if __name__ == "__main__":
    silence()
    {"choose": choose, "confirm": confirm}[sys.argv[1]]()
