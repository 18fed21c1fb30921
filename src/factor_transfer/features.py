"""Feature maps of any `nn.Module`: find the last spatial map, tap it, give it the shape (B, C, H, W), align sizes.

Shapes: B samples, C channels, H x W the map, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factor_transfer.errors import ModelError, listed, near


class Tapped(nn.Module):
    """A network that gives, beside its own output, the output of one of its submodules as a feature map.

    The network itself is left as it is: the hook lives only while `forward` runs. Where a later layer overwrites the
    output in place, the map is what that layer made of it.

    Args:
        module: the network.
        layer: dotted name of the submodule, as `named_modules` gives it.
        flag: the setting that named the layer, for messages.

    Raises:
        ModelError: there is no such submodule; the message lists what there is.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> output, feature = Tapped(net, "1")(torch.zeros(2, 3, 6, 6))
    >>> output.shape, feature.shape
    (torch.Size([2, 8]), torch.Size([2, 8, 4, 4]))
    """

    def __init__(self, module: nn.Module, layer: str, *, flag: str = "layer") -> None:
        super().__init__()
        names = [name for name, _ in module.named_modules() if name]
        if layer not in names:
            raise ModelError(
                f"{flag} {layer}",
                found="no submodule of that name",
                valid=f"one of its {len(names)}, such as "
                + listed(near(layer, names) or [name for name in names if "." not in name]),
                hint=f"leave {flag} out to have it found; all: [name for name, _ in network.named_modules()]",
            )
        self.module, self.layer, self.flag = module, layer, flag

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> the network's output, and the feature map (B, C, H, W)."""
        kept: list[Any] = []
        with _watching(self.module.get_submodule(self.layer), kept.append):
            output = self.module(images)
        if not kept:
            raise ModelError(f"{self.flag} {self.layer}", found="not used when the network runs", valid="another layer")
        feature = _as_map(kept[-1], self.module)
        if feature is None:
            raise ModelError(
                f"{self.flag} {self.layer}",
                found=f"{_described(kept[-1])}, which is no feature map",
                valid="a layer that gives (B, C, H, W), or (B, N, C) tokens of a square image",
                hint=f"leave {self.flag} out: the last feature map is found by itself",
            )
        return output, feature


@torch.no_grad()
def find_layer(module: nn.Module, images: Tensor) -> str:
    """The submodule whose output is the last feature map before pooling: the last group after its last activation.

    It is found by looking at what flows: the outermost submodule that returns the very tensor that timm's
    `forward_features` returns (or one of its shape), or without `forward_features` the last one to return a map
    with more than one place.

    Args:
        module: the network.
        images: normalised images (B, 3, H, W) of the size it will see.

    Raises:
        ModelError: it makes no feature map.

    >>> find_layer(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), torch.zeros(2, 3, 6, 6))
    '1'
    """
    flow: list[tuple[str, Any]] = []
    with _in_eval_mode(module), _watching_all(module, flow):
        features: Any = getattr(module, "forward_features", None)
        last = features(images) if features is not None else None
        if last is None:
            module(images)
    maps = [(name, output) for name, output in flow if _as_map(output, module) is not None]
    if features is not None:  # a network that gives something else there has several maps, or none
        same = [output for _, output in maps if isinstance(last, Tensor) and output.shape == last.shape]
        last = next((output for output in same if output is last), same[-1] if same else None)
    else:
        spatial = [output for _, output in maps if _as_map(output, module).shape[-2:].numel() > 1]  # type: ignore[union-attr]
        last = (spatial or [output for _, output in maps] or [None])[-1]
    if last is None:
        raise ModelError(
            type(module).__name__,
            found="no one submodule gives the last feature map (B, C, H, W)",
            hint="name one with --teacher-layer or --student-layer",
        )
    return min((name for name, output in maps if output is last), key=lambda name: name.count("."))


@torch.no_grad()
def feature_shape(tapped: Tapped, images: Tensor) -> tuple[int, int, int]:
    """(C, H, W) of the tapped map for `images` (B, 3, H, W), the network in eval mode meanwhile."""
    with _in_eval_mode(tapped):
        channels, height, width = tapped(images)[1].shape[1:]
    return channels, height, width


def align(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool a map (B, C, H, W) to `size` (height, width), which is no larger; (B, C, *size).

    Deviation: the paper's pairs have maps of one size. Where they differ, the larger is pooled to the smaller.

    >>> align(torch.zeros(2, 64, 8, 8), (4, 4)).shape
    torch.Size([2, 64, 4, 4])
    """
    return feature if tuple(feature.shape[-2:]) == tuple(size) else F.adaptive_avg_pool2d(feature, size)


def _as_map(output: Any, module: nn.Module) -> Tensor | None:
    """An output as (B, C, H, W), or None where it is no feature map.

    Channels-last maps are known by timm's `output_fmt`; class and register tokens by `num_prefix_tokens`.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if str(getattr(module, "output_fmt", "NCHW")) == "NHWC" else output
    if output.ndim == 3:
        tokens = output[:, int(getattr(module, "num_prefix_tokens", 0)) :]  # (B, N, C)
        side = math.isqrt(tokens.shape[1])
        if side * side == tokens.shape[1] and side > 1:
            return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, side, side)  # (B, C, side, side)
    return None


def _described(output: Any) -> str:
    return f"an output of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


@contextmanager
def _watching(module: nn.Module, keep: Callable[[Any], None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: keep(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watching_all(module: nn.Module, flow: list[tuple[str, Any]]) -> Iterator[None]:
    """Append (name, output) of every submodule to `flow`, in the order in which they return."""
    handles = [
        part.register_forward_hook(lambda _module, _inputs, output, name=name: flow.append((name, output)))
        for name, part in module.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every part is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
