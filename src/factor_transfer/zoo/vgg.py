"""CIFAR VGG: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
arXiv 1409.1556.

Configuration B of table 1 (VGG-13) in its usual form for 32x32 images: 3x3 convolutions, each with bias, batch norm
and ReLU; 64,64, M, 128,128, M, 256,256, M, 512,512, M, 512,512; then global average pooling and one linear layer in
place of the paper's three, and no fifth max pooling (M), which would leave a single pixel of a 32x32 image.

The map to tap is the output of `layer5`: a pooling opens a group, so that the last group ends in its ReLU.
(B, 512, 2, 2) for 32x32 images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from factor_transfer.zoo.base import CifarNet, Group, build, cifar_cfg, conv3x3, rectified, registered

VGG13 = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))


class CifarVgg(CifarNet):
    """VGG with batch norm (section 2.1, table 1).

    Deviation: batch norm, which is younger than the paper; one linear layer instead of three; He initialisation.

    Args:
        num_classes: classes; 0 for no classifier.
        in_chans: channels of the images.
        global_pool: timm's pooling before the classifier.
        drop_rate: dropout before the classifier.
        channels: channels of the convolutions of each group; all groups but the first open with max pooling.

    >>> import torch
    >>> net = CifarVgg(channels=((4,), (8,), (16, 16)))
    >>> net.forward_features(torch.zeros(2, 3, 32, 32)).shape, net(torch.zeros(2, 3, 32, 32)).shape
    (torch.Size([2, 16, 8, 8]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        channels: Sequence[Sequence[int]] = VGG13,
    ) -> None:
        super().__init__()
        taps = [f"layer{place + 1}" for place in range(len(channels))]
        before = in_chans
        for place, (tap, counts) in enumerate(zip(taps, channels, strict=True)):
            # ceil_mode: a single row or column of pixels passes, so that 8x8 images get through four poolings.
            layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if place else []
            for after in counts:
                layers.append(ConvBlock(before, after))
                before = after
            self.add_module(tap, Group(*layers))
        last = [counts[-1] for counts in channels]
        self._finish(
            taps, last, num_classes=num_classes, in_chans=in_chans, global_pool=global_pool, drop_rate=drop_rate
        )


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(in_channels, channels, bias=True)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return rectified(self.bn, self.conv(x))


default_cfgs = generate_default_cfgs({"cifar_vgg13": cifar_cfg("layer1.0.conv", 2)})


@registered
def cifar_vgg13(pretrained: bool = False, **kwargs: Any) -> CifarVgg:
    """VGG-13 for 32x32 images; 9.4 M parameters."""
    groups = len(kwargs.get("channels", VGG13))
    return build(CifarVgg, "cifar_vgg13", pretrained, groups=groups, **kwargs)
