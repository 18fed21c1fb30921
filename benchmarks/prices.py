"""The price of pairs of networks that people use, counted in multiply-adds: writes results/prices.json.

    python benchmarks/prices.py

Teacher and student have ten classes and fresh weights; layers and widths are those that a run finds by default.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from factor_transfer.config import Config
from factor_transfer.networks.pair import Pair, load_side
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


def main() -> None:
    """Counts every pair."""
    found = []
    for teacher, student, size in PAIRS:
        config = Config(data="digits", teacher=teacher, student=student, img_size=size)
        pair = Pair(load_side("teacher", config, 10, size), load_side("student", config, 10, size))
        kept = [paraphraser.factor_channels for paraphraser in fresh_paraphrasers(config, pair)]
        objective = Objective(config, pair, kept, 10)
        price = price_of(config, pair, objective, torch.zeros(2, 3, size, size, dtype=torch.uint8)).to_json()
        found.append({"teacher": teacher, "student": student, "pixels": size, "map": pair.teacher.shape, **price})
        live, cached, passes = (price[name] for name in ("live_step", "cached_step", "paraphraser_pass"))
        print(f"{teacher} -> {student}, {size}: step {live:.2f} / {cached:.2f}, a paraphraser pass {passes:.1f}")
    Path("results/prices.json").write_text(json.dumps({"torch": torch.__version__, "pairs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
