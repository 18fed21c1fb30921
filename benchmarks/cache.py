"""The factor cache: bytes, rates, and what fp16 on disk does to the factor loss and its gradient.

    python benchmarks/cache.py ../shared RUN PARAPHRASER    # about three minutes; results/cache.json

RUN is a checkpoint of the student's stage of a run on this pair (RUN/checkpoints/student-*.pt, there while it runs),
for student and translator late in training; beside it both are measured with fresh weights. PARAPHRASER is the run's
paraphraser.safetensors. Teacher precision is the same on both sides, bf16 and float32.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pair import FACTOR, Measured, keep, measured
from torch import Tensor

from factor_transfer.data.splits import Batch
from factor_transfer.method.factor_transfer import Translator
from factor_transfer.method.losses import FactorTransfer, Labels
from factor_transfer.method.slim import core
from factor_transfer.networks.features import FrozenTeacher
from factor_transfer.networks.weights import load_paraphraser
from factor_transfer.training.cache import CachedTeacher, FactorCache
from factor_transfer.training.engine import Engine
from factor_transfer.training.run_folder import environment
from factor_transfer.training.step import DistillationTask
from factor_transfer.util.seeds import seeded

BATCHES, SIZE = 40, 128


def main(shared: Path, checkpoint: Path, paraphraser: Path) -> None:
    """Measure, print, and keep."""
    with measured(shared, images=BATCHES * SIZE) as pair:
        pair.paraphraser = core(load_paraphraser(str(paraphraser), channels=64, k=0.5, batch_norm=False))
        live = pair.frozen(pair.paraphraser)
        batches = list(pair.train.batches(np.array_split(np.arange(BATCHES * SIZE), BATCHES), view=0))
        found: dict[str, Any] = {"rates": rates(pair, batches), "quantisation": {}}
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        for when, weights in (("fresh", None), (f"after {state['progress']['epoch']} passes", state["module"])):
            for precision in ("bf16", "fp32"):
                engine = Engine("cpu", precision, 2)
                found["quantisation"][f"{when}, {precision}"] = errors(pair, engine, live, weights, batches)
        keep("cache", found | {"environment": environment(**pair.engine.describe())})


def rates(pair: Measured, batches: list[Batch]) -> dict[str, float]:
    """Bytes of a sample and view, and MB/s of random rows, a batch at a time; read from the page cache."""
    cache = FactorCache(pair.work / "rates", {}, FACTOR, len(pair.train), views=1)
    rows = {"factor": torch.randn(SIZE, *FACTOR["factor"]).half()}
    start = time.perf_counter()
    for batch in batches:
        cache.write(batch.index.numpy(), 0, rows)
    middle = time.perf_counter()
    for batch in batches:
        cache.read(batch.index.numpy(), 0)
    seconds = middle - start, time.perf_counter() - middle
    write, read = (len(batches) * SIZE * cache.store.row_bytes / 1e6 / taken for taken in seconds)
    milliseconds = 1000 * seconds[1] / len(batches)
    return {
        "bytes_per_row": cache.store.row_bytes + 8,
        "write_mb_s": write,
        "read_mb_s": read,
        "read_ms_a_batch": milliseconds,
    }


def errors(
    pair: Measured, engine: Engine, live: FrozenTeacher, weights: dict[str, Tensor] | None, batches: list[Batch]
) -> dict[str, float]:
    """Relative difference of the factor loss, and cosine of its gradient, cached against live."""
    cache = FactorCache(pair.work / str(time.time_ns()), {}, FACTOR, len(pair.train), views=1)
    with seeded(0):
        student, translator = pair.job.load("student"), Translator(64, 32)
    task = DistillationTask(student.tapped(), student.network.norm, [Labels(), FactorTransfer(translator, 500)], live)
    engine.place(task)
    if weights is not None:
        task.trainable_module.load_state_dict(weights)
    task.eval()  # so that batch norm is the same for both
    losses, cosines = [], []
    for batch in batches:
        pairs = []
        for teacher in (live, CachedTeacher(live, cache), CachedTeacher(live, cache)):  # fills, then reads
            task.teacher = teacher
            task.zero_grad()
            with engine.autocast():
                loss = task(batch.image, batch.label, batch.index, 0)["factor_transfer"]
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in task.trainable_module.parameters() if p.grad is not None])
            pairs.append((float(loss.detach()), gradient))
        (expected, right), _, (cached, ours) = pairs
        losses.append(abs(cached - expected) / expected)
        cosines.append(float(torch.nn.functional.cosine_similarity(ours.double(), right.double(), dim=0)))
    return {
        "loss_relative_mean": float(np.mean(losses)),
        "loss_relative_max": float(np.max(losses)),
        "gradient_cosine_min": float(np.min(cosines)),
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
