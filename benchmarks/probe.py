"""How much of what a teacher knows is in its factors: a linear classifier on each. Writes results/probe.json.

    python benchmarks/probe.py RUN...

Each run is a finished one with a paraphraser. A linear classifier (scikit-learn's logistic regression) reads the
teacher's whole map, or the factor, flattened and divided by its length as the loss compares it, then centred and scaled
by one number. It is fitted on at most 4,000 of the run's training images, shown as evaluation shows them. Its strength
of regularisation is chosen on every fourth of these. It is measured on the validation images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from factor_transfer.data.splits import Sample, Split
from factor_transfer.method.factor_transfer import normalize_factor
from factor_transfer.method.losses import width_of
from factor_transfer.method.term import align
from factor_transfer.networks.features import Tapped, feature_shape
from factor_transfer.networks.weights import load_paraphraser
from factor_transfer.training.finished import open_images, rebuild
from factor_transfer.training.run_folder import saved_config
from factor_transfer.training.summary import read_summary

MOST, STRENGTHS = 4000, (1e-5, 1e-4, 1e-3, 1e-2)


def main(folders: list[Path]) -> None:
    """Measures every run, prints, and keeps."""
    found = [probed(folder) for folder in folders]
    Path("results/probe.json").write_text(json.dumps({"torch": torch.__version__, "runs": found}, indent=1) + "\n")


def probed(folder: Path) -> dict[str, Any]:
    """Accuracies in percent of the teacher, and of a linear classifier on its map and on its factor."""
    config, summary = saved_config(folder), read_summary(folder)
    teacher, images = rebuild(folder, "teacher"), open_images(config, summary)
    (pair,) = summary.pairs
    tapped, (_, *size) = Tapped(teacher.module.eval(), summary.teacher.layer), pair["factor"]
    channels = feature_shape(tapped, torch.zeros(2, 3, *teacher.size))[0]
    paraphraser = load_paraphraser(
        folder / "paraphraser.safetensors",
        channels=channels,
        k=config.k,
        batch_norm=config.factor_batch_norm,
        width=width_of(config, channels),
    ).eval()

    def whole(pixels: Tensor) -> Tensor:
        return align(tapped(teacher.norm(pixels))[1], (size[0], size[1]))

    readers = {"map": whole, "factor": lambda pixels: paraphraser.encode(whole(pixels))}
    scores = {name: _score(read, images.train, images.validation) for name, read in readers.items()}
    made = {
        "run": folder.name,
        "form": config.factor_form,
        "factor": pair["factor"],
        "teacher": summary.teacher.measured,
    }
    print(made, scores, flush=True)
    return {**made, "linear": scores}


@torch.no_grad()
def _vectors(read: Callable[[Tensor], Tensor], split: Split, most: int) -> tuple[np.ndarray, np.ndarray]:
    sample = Sample(split, most)
    parts = [normalize_factor(read(batch.image)) for batch in sample.batches(
        np.array_split(np.arange(len(sample)), -(-len(sample) // 64)), view=None)]  # fmt: skip
    vectors = torch.cat(parts)
    return (vectors * vectors.shape[1] ** 0.5).numpy(), sample.labels


def _score(read: Callable[[Tensor], Tensor], train: Split, validation: Split) -> float:
    vectors, labels = _vectors(read, train, MOST)
    shown, wanted = _vectors(read, validation, len(validation))
    mean, spread = vectors.mean(0), vectors.std()
    vectors, shown = (vectors - mean) / spread, (shown - mean) / spread
    aside = np.arange(len(labels)) % 4 == 0

    def fitted(strength: float, part: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=200).fit(vectors[part], labels[part])

    best = max(STRENGTHS, key=lambda strength: fitted(strength, ~aside).score(vectors[aside], labels[aside]))
    return 100 * float(fitted(best, np.full(len(labels), True)).score(shown, wanted))


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
