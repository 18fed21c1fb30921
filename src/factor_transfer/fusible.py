"""Batch norm in training, decomposed so that torch's compiler runs it in vectors and joins it to what is beside it.

The compiler's own decomposition sums over all images at once, and of channels-last maps it makes loops without vectors.
Here each image is summed first, as the map lies in memory, and the images after that.

Shapes: B samples, C channels, H x W the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor

from factor_transfer import kernels

FORWARD = torch.ops.aten._native_batch_norm_legit_functional.default
BACKWARD = torch.ops.aten.native_batch_norm_backward.default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """All of the compiler's, for noise from torch's own generators, with batch norm's replaced.

    It keeps its own for what is no channels-last map (B, C, H, W) in training. Compiled code calls torch's kernels past
    the dispatcher, so the convolutions that `kernels` guards are replaced here, too.
    """
    from torch._inductor.decomposition import select_decomp_table  # the compiler with it, which takes its time

    with inductor.patch(fallback_random=True):
        table: dict[Any, Callable[..., Any]] = dict(select_decomp_table())
    usual_forward, usual_backward = table[FORWARD], table[BACKWARD]

    def forward(x: Tensor, weight: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
        _, mean, _, training, *_ = others
        function = normalised if _fits(x, weight, mean, training) else usual_forward
        return function(x, weight, *others)

    def backward(gradient: Tensor, x: Tensor, weight: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
        mean, *_, training, _, _ = others
        function = gradients if _fits(x, weight, mean, training) else usual_backward
        return function(gradient, x, weight, *others)

    return table | {FORWARD: forward, BACKWARD: backward, kernels.BACKWARD: kernels.gradients}


def _fits(x: Tensor, weight: Tensor | None, mean: Tensor | None, training: bool) -> bool:
    """The same for both directions, because each saves for the other what the usual one would not."""
    single = mean is not None and mean.dtype == torch.float32 and (weight is None or weight.dtype == torch.float32)
    return training and single and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, training: bool,
    momentum: float, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `_native_batch_norm_legit_functional`: the output, this batch's mean and 1 / deviation, the new averages.

    Args:
        x: (B, C, H, W), channels-last.
        weight: (C,).
        bias: (C,).
        mean: (C,), running average.
        var: (C,), running average.
        training: is True.
        momentum: share of this batch in the averages.
        eps: added to the variance.
    """
    count = x.numel() // x.shape[1]
    away = _rows(x) - mean  # the squares of a far mean would drown the variance
    shift = _sum(away) / count
    spread = (_sum(away * away) / count - shift * shift).clamp_min(0)
    centre, scale = mean + shift, (spread + eps).rsqrt()
    slope = scale if weight is None else scale * weight
    offset = -centre * slope if bias is None else bias - centre * slope
    out = (x.float() * _channels(slope) + _channels(offset)).to(x.dtype)
    unbiased = spread * (count / (count - 1))
    return out, centre, scale, mean + momentum * shift, var + momentum * (unbiased - var)


def gradients(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, centre: Tensor, scale: Tensor,
    training: bool, eps: float, wanted: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """As `native_batch_norm_backward`: of the input (B, C, H, W), the weight (C,) and the bias (C,).

    Args:
        gradient: of the output, (B, C, H, W).
        x: as `normalised` had it, and so `weight`; `mean`, `var` and `eps` are not read.
        weight: (C,).
        mean: (C,).
        var: (C,).
        centre: this batch's mean, (C,).
        scale: this batch's 1 / deviation, (C,).
        training: is True.
        eps: that of the variance.
        wanted: which of the three.
    """
    given, count = _rows(gradient), x.numel() // x.shape[1]
    plain, along = given.sum(1), (given * (_rows(x) - centre)).sum(1) * scale  # (B, C)
    slope = scale if weight is None else scale * weight
    # Each a sum, because the compiler keeps sums, and computes anything else anew for every value of the map.
    of_x = -(along * (slope * scale / count)).sum(0)
    offset = -(plain * (slope / count) - along * (centre * slope * scale / count)).sum(0)
    out = gradient.float() * _channels(slope) + x.float() * _channels(of_x) + _channels(offset)
    return out.to(x.dtype), along.sum(0) if wanted[1] else None, plain.sum(0) if wanted[2] else None


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W), channels-last -> (B, H W, C), as it lies in memory; float32."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).float()


def _sum(rows: Tensor) -> Tensor:
    """Over images and places: (B, H W, C) -> (C,)."""
    return rows.sum(1).sum(0)


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]
