"""The student leaves alone: `student.pt2` needs only torch, `student.safetensors` only a reader of tensors."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from factor_transfer.errors import RunError
from factor_transfer.files import write_atomic

TOLERANCE = 1e-4
"""Largest difference of a logit between the trained student and its export, relative to the largest logit."""


def export_pt2(module: nn.Module, images: Tensor, path: Path) -> float:
    """Write `module` as a `torch.export` program with a dynamic batch; read it back and compare.

    Args:
        module: normalised float images (B, 3, H, W) -> logits (B, N).
        images: normalised images to compare on, at least two.
        path: the `.pt2` file; written only if the comparison passes.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        RunError: what was read back does not agree.
    """
    plain = plain_copy(module)
    images = images.cpu().float().contiguous()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(plain, (images[:2],), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with torch.no_grad():
        wanted, got = plain(images), torch.export.load(buffer).module()(images)
    difference = float((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise RunError(str(path), found=f"logits off by {difference:.2g} after export", valid=f"at most {TOLERANCE:g}")
    write_atomic(path, buffer.getvalue())
    return difference


def latency_ms(modules: Sequence[nn.Module], size: int, repeats: int = 30) -> list[float]:
    """Median milliseconds of one image of `size` x `size` pixels through each module, on the CPU, in float32.

    The modules take turns, so that a disturbance of the machine meets all of them.
    """
    image = torch.zeros(1, 3, size, size)
    plain = [plain_copy(module) for module in modules]
    times: list[list[float]] = [[] for _ in plain]
    with torch.no_grad():
        for turn in range(repeats + 3):  # the first three warm up
            for module, taken in zip(plain, times, strict=True):
                start = time.perf_counter()
                module(image)
                if turn >= 3:
                    taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy for inference: on the CPU, float32, contiguous, in eval mode."""
    return deepcopy(module).cpu().float().to(memory_format=torch.contiguous_format).eval()
