"""CIFAR ResNet: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385.

Section 4.2: a 3x3 convolution, three groups of n basic blocks with 16, 32 and 64 channels, global average pooling and
a linear layer; 6n + 2 layers. Shortcuts that change shape are parameter-free (option A, `cifar_resnet20`, the paper's
choice for CIFAR) or 1x1 convolutions (option B, `cifar_resnet20_b`, as in the program of the factor transfer paper).

Depths are 20 (0.27 M parameters), 32 (0.46 M), 44 (0.66 M), 56 (0.85 M) and 110 (1.7 M).

The map to tap is the output of `layer3`: the last block after its final ReLU, (B, 64, 8, 8) for 32x32 images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from factor_transfer.util.errors import ConfigError
from factor_transfer.zoo.base import CifarNet, Group, build, cifar_cfg, conv3x3, rectified, registered

Shortcut = Literal["A", "B"]


class CifarResNet(CifarNet):
    """CIFAR ResNet (section 4.2).

    Args:
        num_classes: classes; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's pooling before the classifier.
        drop_rate: dropout before the classifier.
        layers: basic blocks of each group.
        channels: channels of each group; the first is also the stem's.
        shortcut: `A`, parameter-free, or `B`, 1x1 convolution and batch norm, where a group changes the shape.

    >>> import torch
    >>> net = CifarResNet(layers=(1, 1, 1), channels=(4, 8, 16))
    >>> net.forward_features(torch.zeros(2, 3, 32, 32)).shape, net(torch.zeros(2, 3, 32, 32)).shape
    (torch.Size([2, 16, 8, 8]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        layers: Sequence[int] = (3, 3, 3),
        channels: Sequence[int] = (16, 32, 64),
        shortcut: Shortcut = "A",
    ) -> None:
        super().__init__()
        if len(layers) != len(channels):
            raise ConfigError(
                f"layers {tuple(layers)}", found=f"channels {tuple(channels)}", valid="one of each a group"
            )
        self.conv1 = conv3x3(in_chans, channels[0])
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        taps = [f"layer{place + 1}" for place in range(len(layers))]
        before = channels[0]
        for place, (tap, blocks, after) in enumerate(zip(taps, layers, channels, strict=True)):
            first = BasicBlock(before, after, 1 if place == 0 else 2, shortcut)
            rest = (BasicBlock(after, after, 1, shortcut) for _ in range(blocks - 1))
            self.add_module(tap, Group(first, *rest))
            before = after
        self._finish(
            taps, channels, num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is carried (section 3.3); ReLU after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _make_shortcut(in_channels, channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        y = rectified(self.bn1, self.conv1(x))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class PadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, and zero channels added, half of them on each side. No parameters.

    >>> import torch
    >>> PadShortcut(16, 32, 2)(torch.ones(1, 16, 8, 8))[0, ::8, 0, 0]
    tensor([0., 1., 1., 0.])
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        extra = channels - in_channels
        if extra < 0:
            raise ConfigError(
                f"channels fall from {in_channels} to {channels}",
                valid="as many or more in the next group: option A can only add zeros",
                hint="shortcut B",
            )
        self.stride, self.padding = stride, (extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        # As the map lies in memory: so will its gradient, and another order slows all layers before down.
        if x.is_contiguous(memory_format=torch.channels_last):
            return F.pad(x.permute(0, 2, 3, 1)[:, :: self.stride, :: self.stride], self.padding).permute(0, 3, 1, 2)
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))


def _make_shortcut(in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> nn.Module:
    if shortcut not in ("A", "B"):
        raise ConfigError(f"shortcut {shortcut}", valid=["A", "B"])
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    if shortcut == "A":
        return PadShortcut(in_channels, channels, stride)
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


def _resnet(depth: int, shortcut: Shortcut) -> Callable[..., CifarResNet]:
    """timm's entry point for one depth: `cifar_resnet20` with option A, `cifar_resnet20_b` with option B."""

    def entry_point(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
        args = {"layers": ((depth - 2) // 6,) * 3, "shortcut": shortcut, **kwargs}
        return build(CifarResNet, name, pretrained, groups=len(args["layers"]), **args)

    name = entry_point.__name__ = f"cifar_resnet{depth}" + ("_b" if shortcut == "B" else "")
    return entry_point


_VARIANTS = [_resnet(depth, shortcut) for depth in (20, 32, 44, 56, 110) for shortcut in get_args(Shortcut)]
_FASHION = {
    **cifar_cfg("conv1", 7),
    "input_size": (3, 28, 28),
    "file": str(resources.files("factor_transfer") / "builtin/cifar_resnet20.fashion.safetensors"),
}
"""Trained on Fashion-MNIST by benchmarks/builtin.py. The classes are in the order of its labels."""

default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet20.fashion": _FASHION,
        # A star makes it the network's default, so that the plain name stays the untrained one.
        **{f"{variant.__name__}.*": cifar_cfg("conv1", 8) for variant in _VARIANTS},
    }
)
globals().update({variant.__name__: registered(variant) for variant in _VARIANTS})
