"""Replace a kernel of torch that writes past its memory on some CPUs.

It computes the gradient of the weights of a 1x1 convolution with a stride, channels-last, with fewer input channels
than oneDNN's kernel takes at once: 8 with AVX2, 16 with AVX-512. It kills the process, or gives wrong values without
an error. The cause is known to oneDNN (its issue 6035: the offset into a workspace). `benchmarks/kernels.py`
searches for such shapes. `results/kernels.json` lists those that were tried, with the versions.

The replacement is registered with torch's dispatcher. So it works for every caller and layout, and inside activation
checkpointing. All CPUs are treated alike, because oneDNN's choice of a kernel also depends on environment variables;
and so the same shape gives the same bits everywhere.

Shapes: B samples, C input channels, O output channels, H x W the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from factor_transfer.util.console import say

BACKWARD = torch.ops.aten.convolution_backward.default

BLOCK = 16
"""Input channels that the widest of these kernels takes at once."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of a convolution's input, weight and bias."""

_said: set[tuple[int, ...]] = set()
_library: Library | None = None


def guard() -> None:
    """Register the replacement, for CPUs and in this process. The user is told of each shape once."""
    global _library  # noqa: PLW0603 # there is one dispatcher in a process
    _said.clear()
    if _library is not None:
        return
    usual = _usual()

    def backward(keys: Any, *given: Any) -> Any:
        found = gradients(*given)
        return usual(keys, *given) if found is NotImplemented else found

    _library = Library("aten", "IMPL")  # type: ignore[no-untyped-call] # torch's own, and so is `impl`
    _library.impl("convolution_backward", backward, "CPU", with_keyset=True)  # type: ignore[no-untyped-call]


def _usual() -> Callable[..., Any]:
    """Torch's own `convolution_backward`, after `guard` has replaced it."""
    if hasattr(torch.library, "get_kernel"):
        return torch.library.get_kernel(BACKWARD, "CPU").call_boxed
    # Before torch 2.10. One kernel serves all devices, so that of another, unchanged device is the same.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.MkldnnCPU)
    return lambda _, *given: BACKWARD.redispatch(keys, *given)


def broken(weight: Tensor, stride: list[int], transposed: bool) -> bool:
    """Whether the gradient of such weights (O, C, ...) may be computed by a kernel that corrupts memory."""
    pixel = all(side == 1 for side in weight.shape[2:])
    return pixel and not transposed and weight.shape[1] < BLOCK and any(step > 1 for step in stride)


def gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: list[int] | None, stride: list[int], padding: list[int],
    dilation: list[int], transposed: bool, output_padding: list[int], groups: int, wanted: list[bool],
) -> Any:  # fmt: skip
    """As `torch.ops.aten.convolution_backward`, for convolutions that are `broken`; NotImplemented for all others.

    A 1x1 convolution reads every `stride`-th pixel alone. These pixels are taken out first; the stride is then 1.

    Args:
        gradient: of the output, (B, O, ...).
        x: the input, (B, C, ...).
        weight: (O, C / groups, 1, ...).
        bias: its shape, or None.
        stride: of each side.
        padding: of each side.
        dilation: is not read: one pixel has none.
        transposed: is False.
        output_padding: is not read.
        groups: of channels.
        wanted: which of the three gradients.
    """
    if not broken(weight, stride, transposed) or not (wanted[1] or wanted[2]):
        return NotImplemented
    _tell(weight, stride)
    sides = len(stride)
    kept = F.pad(x, [value for side in reversed(padding) for value in (side, side)]) if any(padding) else x
    for place, (step, size) in enumerate(zip(stride, gradient.shape[2:], strict=True), start=2):
        kept = kept[(slice(None),) * place + (slice(0, (size - 1) * step + 1, step),)]
    ones, zeros = [1] * sides, [0] * sides
    _, of_weight, of_bias = BACKWARD(
        gradient, kept, weight, bias, ones, zeros, ones, False, zeros, groups, [False, *wanted[1:]]
    )
    of_input = None
    if wanted[0]:
        of_input, _, _ = BACKWARD(
            gradient, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups,
            [True, False, False],
        )  # fmt: skip
    return of_input, of_weight, of_bias


def _tell(weight: Tensor, stride: list[int]) -> None:
    shape = (*weight.shape, *stride)
    if shape in _said:
        return
    _said.add(shape)
    sides = "x".join("1" for _ in stride)
    say(
        f"a {sides} convolution with stride {max(stride)} of {weight.shape[1]} channels: torch's kernel for the "
        "gradient of its weights corrupts memory on some CPUs; it is computed with stride 1 from the "
        "pixels that the convolution reads"
    )
