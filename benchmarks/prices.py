"""The price of pairs of networks that people use, counted in multiply-adds: writes results/prices.json.

    python benchmarks/prices.py

Each pair is counted twice: `before`, with the paper's form and the authors' six passes of the paraphraser over all
images, and `after`, as a run chooses by default. Teacher and student have ten classes and fresh weights; there are
10,000 training images. The paraphraser's stage is counted to its last allowed step: most end sooner.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from factor_transfer.config import Config
from factor_transfer.networks.pair import Pair, load_side
from factor_transfer.training.form import with_form
from factor_transfer.training.objective import Objective, fresh_paraphrasers
from factor_transfer.training.price import price_of

PAIRS = (
    ("cifar_resnet56", "cifar_resnet20", 32),
    ("resnet34", "resnet18", 224),
    ("resnet50", "resnet18", 224),
    ("resnet50", "mobilenetv2_100", 224),
    ("tf_efficientnet_lite0", "mobilenetv3_small_050", 128),
    ("efficientnet_b0", "mobilenetv3_small_100", 224),
    ("convnext_tiny", "mobilenetv3_large_100", 224),
    ("convnext_tiny", "convnext_atto", 224),
    ("vit_small_patch16_224", "vit_tiny_patch16_224", 224),
    ("vit_base_patch16_224", "resnet18", 224),
    ("resnet101", "efficientnet_b0", 224),
)


IMAGES = 10_000
BEFORE: dict[str, Any] = {"factor_form": "paper", "paraphraser_epochs": 6}


def main() -> None:
    """Counts every pair."""
    found = []
    for teacher, student, size in PAIRS:
        row: dict[str, Any] = {"teacher": teacher, "student": student, "pixels": size}
        for when, settings in (("before", BEFORE), ("after", {})):
            config = Config(data="digits", teacher=teacher, student=student, img_size=size, **settings)
            row[when] = priced(config, size)
            print(f"{teacher} -> {student}, {size}, {when}: {said(row[when])}", flush=True)
        found.append(row)
    made = {"torch": torch.__version__, "images": IMAGES, "pairs": found}
    Path("results/prices.json").write_text(json.dumps(made, indent=1) + "\n")


def priced(config: Config, size: int) -> dict[str, Any]:
    """The price of one pair, with the form that is chosen and the teacher's map."""
    pair = Pair(load_side("teacher", config, 10, size), load_side("student", config, 10, size))
    config, _ = with_form(config, pair)
    kept = [paraphraser.factor_channels for paraphraser in fresh_paraphrasers(config, pair)]
    objective = Objective(config, pair, kept, 10)
    price = price_of(config, pair, objective, torch.zeros(2, 3, size, size, dtype=torch.uint8))
    stage = price.paraphraser_stage(config, IMAGES)
    shapes = {"map": pair.teacher.shape, "students_map": pair.student.shape, "factor_channels": kept}
    return {"form": config.factor_form, **shapes, **price.to_json(), "paraphraser_stage": stage}


def said(price: dict[str, Any]) -> str:
    """In words."""
    parts = ", ".join(
        f"{price[part]['parameters'] / 1e6:.2f}" for part in ("teacher", "student", "paraphraser", "terms")
    )
    step = f"step {price['live_step']:.2f} / {price['cached_step']:.2f}"
    return f"{price['form']}, {step}, paraphraser {price['paraphraser_stage']:.1f} passes, parameters {parts} M"


if __name__ == "__main__":
    main()
