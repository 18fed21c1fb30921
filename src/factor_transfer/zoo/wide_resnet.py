"""Wide ResNet: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146.

Table 1: a 3x3 convolution, three groups of (depth - 4) / 6 pre-activation blocks B(3,3) with 16, 32 and 64 times
`width` channels, batch norm and ReLU, global average pooling and a linear layer. `cifar_wrn_40_2` has depth 40 and
width 2. Parameters: 16_1 has 0.18 M, 16_2 0.69 M, 40_1 0.56 M, 40_2 2.2 M, 46_4 10 M.

The map to tap is the output of `relu`: pre-activation blocks end in a sum, so `layer3` is tapped too early, before
the last batch norm and ReLU. (B, 64 x width, 8, 8) for 32x32 images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from factor_transfer.util.errors import ConfigError
from factor_transfer.zoo.base import CifarNet, Group, build, cifar_cfg, conv3x3, rectified, registered


class CifarWideResNet(CifarNet):
    """Wide ResNet (table 1).

    The maps of the groups before the last are sums before their activation, as in timm's own pre-activation networks.

    Deviation: the paper's optional dropout lies inside the blocks (section 2.4); `drop_rate` acts before the
    classifier, as everywhere in timm.

    Args:
        num_classes: classes; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's pooling before the classifier.
        drop_rate: dropout before the classifier.
        depth: layers, 6n + 4.
        width: factor on the channels of the groups.
        channels: channels of the groups at width 1; the first is also the stem's.

    >>> import torch
    >>> net = CifarWideResNet(depth=10, width=2, channels=(4, 8, 16))
    >>> net.forward_features(torch.zeros(2, 3, 32, 32)).shape, net(torch.zeros(2, 3, 32, 32)).shape
    (torch.Size([2, 32, 8, 8]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        depth: int = 16,
        width: int = 1,
        channels: Sequence[int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ConfigError(f"depth {depth}", valid="6n + 4: 10, 16, 22, 28, 34, 40, ...")
        self.conv1 = conv3x3(in_chans, channels[0])
        groups = [f"layer{place + 1}" for place in range(len(channels))]
        wide = [count * width for count in channels]
        before = channels[0]
        for place, (group, after) in enumerate(zip(groups, wide, strict=True)):
            first = PreActivationBlock(before, after, 1 if place == 0 else 2)
            rest = (PreActivationBlock(after, after, 1) for _ in range((depth - 4) // 6 - 1))
            self.add_module(group, Group(first, *rest))
            before = after
        self.bn = nn.BatchNorm2d(before)
        self.relu = nn.ReLU()
        taps = [*groups[:-1], "relu"]
        self._finish(
            taps, wide, num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate
        )


class PreActivationBlock(nn.Module):
    """Twice batch norm, ReLU and a 3x3 convolution, around which the input is carried (section 2, figure 1a).

    Where the shape changes, what is carried is a 1x1 convolution of the activated input (authors' program).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        changes = stride != 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        active = rectified(self.bn1, x)
        carried = x if self.shortcut is None else self.shortcut(active)
        y: Tensor = self.conv2(rectified(self.bn2, self.conv1(active)))
        return y + carried


def _wrn(depth: int, width: int) -> Callable[..., CifarWideResNet]:
    """timm's entry point for one depth and width, such as `cifar_wrn_40_2`."""

    def entry_point(pretrained: bool = False, **kwargs: Any) -> CifarWideResNet:
        args = {"depth": depth, "width": width, "channels": (16, 32, 64), **kwargs}
        return build(CifarWideResNet, name, pretrained, groups=len(args["channels"]), **args)

    name = entry_point.__name__ = f"cifar_wrn_{depth}_{width}"
    return entry_point


_VARIANTS = [_wrn(*size) for size in ((16, 1), (16, 2), (40, 1), (40, 2), (46, 4))]
default_cfgs = generate_default_cfgs({variant.__name__: cifar_cfg("conv1", 8) for variant in _VARIANTS})
globals().update({variant.__name__: registered(variant) for variant in _VARIANTS})
