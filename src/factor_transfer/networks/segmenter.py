"""Networks for segmentation on any timm encoder: `lraspp/NAME` and `deeplab/NAME`, with torchvision's heads.

lraspp: Howard et al., *Searching for MobileNetV3*, arXiv 1905.02244, section 6.4. It reads the encoder's last map, and
one of an eighth of the image's side. deeplab: Chen et al., *Rethinking Atrous Convolution*, arXiv 1706.05587; it reads
the last map. Deviation: encoders keep their own strides, where both papers take strides out of the last stages.

Shapes: B images of H x W pixels, N classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch.nn.functional as F
from timm.models import resolve_model_input_args
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.lraspp import LRASPPHead

import factor_transfer.zoo  # noqa: F401 (registers the paper's families with timm)
from factor_transfer.networks.weightfiles import read_tensors, split_key
from factor_transfer.networks.weights import load_but_head, load_weights
from factor_transfer.util.arguments import AnySize

HEADS = {"lraspp": 128, "deeplab": 256}
"""What can stand before the encoder's name, and the channels of such a head."""

FINE = 8
"""The finer map that LRASPP reads: one pixel for so many of the image's, at most."""


RATES = (6, 12, 18)
"""Distances between the places that DeepLab's convolutions read: the paper's, of maps of a sixteenth of the side."""


class Segmenter(nn.Module):
    """A timm encoder and a head. The network gives logits at the size of the image.

    Args:
        kind: a key of `HEADS`.
        encoder: name of a timm network.
        num_classes: N.
        pretrained: with timm's weights of the encoder.
        head_channels: of the head; None: the papers'.
        **args: constructor arguments of the encoder.

    >>> import torch
    >>> network = Segmenter("lraspp", "lcnet_035", num_classes=5)
    >>> network(torch.zeros(2, 3, 64, 96)).shape
    torch.Size([2, 5, 64, 96])
    """

    def __init__(
        self,
        kind: str,
        encoder: str,
        num_classes: int,
        *,
        pretrained: bool = False,
        head_channels: int | None = None,
        **args: Any,
    ) -> None:
        super().__init__()
        self.name, self.args = encoder, args
        made: Any = timm.create_model(encoder, pretrained, features_only=True, feature_cls="getter", **args)
        self.encoder, self.pretrained_cfg = made, getattr(made.model, "pretrained_cfg", {})
        channels, strides = made.feature_info.channels(), made.feature_info.reduction()
        self.fine = max((at for at, stride in enumerate(strides[:-1]) if stride <= FINE), default=0)
        inner = head_channels or HEADS[kind]
        self.head = (
            LRASPPHead(channels[self.fine], channels[-1], num_classes, inner)
            if kind == "lraspp"
            else nn.Sequential(
                ASPP(channels[-1], RATES, inner),
                nn.Conv2d(inner, inner, 3, padding=1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, num_classes, 1),
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, N, H, W)."""
        maps = self.encoder(images)
        given = {"low": maps[self.fine], "high": maps[-1]} if isinstance(self.head, LRASPPHead) else maps[-1]
        logits: Tensor = self.head(given)
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def kind_of(name: str) -> str | None:
    """The head that a name begins with, such as `lraspp`; None where the name is no segmenter's."""
    kind, slash, encoder = name.partition("/")
    return kind if slash and kind in HEADS and encoder else None


def build_segmenter(name: str, num_classes: int, **args: Any) -> Segmenter:
    """From `lraspp/ENCODER`, and the arguments that an export's metadata holds."""
    kind, _, encoder = name.partition("/")
    return Segmenter(kind, encoder, num_classes, **args)


def build_sized(
    name: str, num_classes: int, img_size: AnySize, args: Mapping[str, Any], *, pretrained: bool
) -> tuple[Segmenter, dict[str, Any]]:
    """The network, and the arguments that build it again: with the images' size, where the encoder is built for one."""
    made = resolve_model_input_args(name.partition("/")[2], {"img_size": img_size}, **args)
    own = {key: value for key, value in made.items() if key not in {"model_name", "pretrained_cfg"}}
    return build_segmenter(name, num_classes, pretrained=pretrained, **own), {"num_classes": num_classes, **own}


def load_segmenter(module: nn.Module, weights: str, given: str) -> tuple[bool, str]:
    """Load a file of weights: of the whole network, or of its encoder as a classifier, whose head is left out.

    Args:
        module: the network.
        weights: the file, or FILE:KEY.
        given: the setting that named it, for messages.

    Returns:
        Whether the head is as it was drawn; and which tensors were taken, where the file holds more.

    Raises:
        ModelError: as `load_weights`.
    """
    assert isinstance(module, Segmenter)
    file, _ = split_key(weights)
    if any("encoder.model." in name for name in read_tensors(file, given).by_name):
        load_weights(module, weights, given)
        return False, ""
    whole: nn.Module = timm.create_model(module.name, **module.args)
    _, said = load_but_head(whole, weights, given)
    own, there = module.encoder.model.state_dict(), whole.state_dict()
    module.encoder.model.load_state_dict({name: there[name] for name in own})
    return True, said
