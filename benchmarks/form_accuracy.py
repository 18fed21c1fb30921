"""The slim form's students beside the paper's and others': paired differences. Writes results/form-accuracy.json.

    benchmarks/forms.sh ../shared FOLDER
    benchmarks/fashion.sh /usr/share/datasets/fashion-mnist FOLDER
    python benchmarks/form_accuracy.py FOLDER

Reads the comparisons that the two left in the folder, and copies what they rest on to results/forms.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from factor_transfer.compare.statistics import paired

PAIRS = {
    "photographs: slim less paper": ("trashnet-slim:ft", "trashnet-paper:ft"),
    "photographs: slim less baseline, equal passes": ("trashnet-slim:ft", "trashnet-slim:baseline"),
    "photographs: slim less baseline, equal compute": ("trashnet-slim:ft", "trashnet-slim:baseline-matched"),
    "Fashion-MNIST: slim less paper": ("fashion-slim:ft", "fashion-paper:ft"),
    "Fashion-MNIST: slim less paper, forty passes": ("fashion-slim:ft", "fashion-paper-40:ft"),
    "Fashion-MNIST: slim less baseline, equal passes": ("fashion-slim:ft", "fashion-baseline:baseline"),
    "Fashion-MNIST: slim less baseline, equal compute": ("fashion-slim:ft", "fashion-baseline-127:baseline"),
    "Fashion-MNIST: slim less kd, equal passes": ("fashion-slim:ft", "fashion-baseline:kd"),
    "Fashion-MNIST: slim less kd of 80 passes": ("fashion-slim:ft", "fashion-kd-80:kd"),
    "Fashion-MNIST: slim and kd less kd of 80 passes": ("fashion-slim-kd:ft+kd", "fashion-kd-80:kd"),
    "CIFAR-10: slim, 32 channels, less paper": ("cifar-slim-32:ft", "cifar-paper:ft"),
    "CIFAR-10: slim, 32 channels, less baseline": ("cifar-slim-32:ft", "cifar-slim-32:baseline"),
    "CIFAR-10: paper less baseline": ("cifar-paper:ft", "cifar-slim-32:baseline"),
    "CIFAR-10: paper, six passes, less baseline": ("cifar-paper-6-passes:ft", "cifar-slim-32:baseline"),
    "CIFAR-10: the paper's form, paraphraser auto less six passes": ("cifar-paper:ft", "cifar-paper-6-passes:ft"),
}
KEPT = ("compare.json", "compare.md", "*/summary.json", "*/metrics.jsonl")


def main(folder: Path) -> None:
    """Compare, print and keep."""
    results, found = Path("results"), {}
    for title, names in PAIRS.items():
        one, other = (_method(folder, name) for name in names)
        if one is None or other is None:
            print(f"{title}: a comparison has not ended")
            continue
        difference = paired(*({int(seed): top1 for seed, top1 in each["top1"].items()} for each in (one, other)))
        assert difference is not None, f"{title}: no seed in common"
        found[title] = {
            "of": names,
            "mean": [one["mean"], other["mean"]],
            "compute": [one["compute"], other["compute"]],
            "difference": difference.to_dict(),
        }
        print(title, json.dumps(found[title], indent=1))
    for path in (path for pattern in KEPT for path in sorted(folder.glob(f"*/{pattern}"))):
        kept = results / "forms" / path.relative_to(folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, kept)
    (results / "form-accuracy.json").write_text(json.dumps(found, indent=1) + "\n")


def _method(folder: Path, name: str) -> dict[str, Any] | None:
    """What `compare` found of a method, or None where that comparison does not exist."""
    place, method = name.split(":")
    path = folder / place / "compare.json"
    if not path.exists():
        return None
    (one,) = (each for each in json.loads(path.read_text())["methods"] if each["name"] == method)
    return dict(one)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
