"""The slim form: the paper's paraphraser and translator on reduced maps, for networks that end wide.

The paper's layers are as wide as the maps that they read. Its networks end with 64 to 512 channels; a MobileNet ends
with 1280, after layers that are far cheaper than a 3x3 convolution of that width. The slim form reduces a map of more
than W channels to W by one 1x1 convolution. All that follows is the paper's: its layers, its losses, equations 1 to 4.

Deviations from the paper, all of them here:

* The teacher's map is reduced before the paraphraser, by its W / 2 first principal components (`Reduction`). They are
  found in closed form and stay as they are. The paraphraser reconstructs the reduced map.
* The student's map is reduced before the translator, by a 1x1 convolution that is trained with it (`SlimTranslator`).
* The factor has round(W x k) channels, and not round(C x k).

Shapes: B samples, C channels of a map, W of a reduced one, K of the factor, H x W' the map's height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factor_transfer.method.factor_transfer import Paraphraser, Translator
from factor_transfer.util.errors import TrainingError

WIDTH = 64
"""W where the settings do not say: what the CIFAR ResNets of the authors' program end with."""

FITTED = 8192
"""Places of maps (vectors of C numbers) from which the components are found; 2 C where that is more."""


class Reduction(nn.Module):
    """A map's principal components, each twice: its positive part, and its negative part with the sign turned.

    A component has both signs, and LeakyReLU(0.1) nearly cuts off one of them. As two parts it loses neither. The parts
    are not negative, like the paper's maps, which end with a ReLU. `expand` gives the map back, up to the components
    that were left out.

    Until `fit` finds them, the components are drawn at random.

    Args:
        channels: C of the map.
        width: W of the reduced map, an even number.

    >>> reduction = Reduction(8, 4).fit(torch.randn(100, 8, 2, 2))
    >>> reduced = reduction(torch.randn(3, 8, 2, 2))
    >>> reduced.shape, bool((reduced >= 0).all()), reduction.expand(reduced).shape
    (torch.Size([3, 4, 2, 2]), True, torch.Size([3, 8, 2, 2]))
    """

    mean: Tensor
    components: Tensor
    scale: Tensor

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("components", nn.init.orthogonal_(torch.empty(width // 2, channels)))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, maps: Tensor) -> Reduction:
        """Find the components of maps (B, C, H, W'), in float64 on the CPU. The reduced maps' mean square becomes 1.

        Where there are several times `FITTED` places (or 2 C, where that is more), evenly spaced ones are taken.

        Raises:
            TrainingError: the maps are not finite, or all alike.
        """
        vectors = maps.detach().cpu().movedim(1, -1).flatten(0, -2)  # (B x H x W', C)
        vectors = vectors[:: max(1, len(vectors) // max(FITTED, 2 * vectors.shape[1]))].double()
        mean = vectors.mean(0)
        covariance = torch.cov(vectors.T, correction=0)
        spread = float(covariance.diagonal().sum())
        if not 0 < spread < torch.inf:
            found = "maps that are all alike" if spread == 0 else "maps that are not finite"
            raise TrainingError("the teacher's map", found=found, hint="check the teacher's weights and normalisation")
        variances, directions = torch.linalg.eigh(covariance)  # in rising order
        width = 2 * len(self.components)
        components = directions.flip(1)[:, : width // 2].T
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.mean.copy_(mean)
        self.components.copy_(components * largest.sign())  # or the sign would be the library's choice
        self.scale.copy_((variances.flip(0)[: width // 2].sum() / width).sqrt())
        return self

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W') -> (B, W, H, W'): each component's positive part, and beside it its negative part."""
        with torch.autocast(feature.device.type, enabled=False):  # bf16 would lose the spread beside a large mean
            kernel, shift = self.components / self.scale, -(self.components @ self.mean) / self.scale
            parts = F.conv2d(feature.to(kernel.dtype), kernel[:, :, None, None], shift)  # (B, W / 2, H, W')
            return torch.stack([parts, -parts], 2).flatten(1, 2).relu()

    def expand(self, reduced: Tensor) -> Tensor:
        """The map of a reduced one: (B, W, H, W') -> (B, C, H, W')."""
        parts = (reduced[:, ::2] - reduced[:, 1::2]) * self.scale
        return F.conv2d(parts, self.components.T[:, :, None, None].to(parts.dtype), self.mean.to(parts.dtype))


class SlimParaphraser(nn.Module):
    """The paper's paraphraser behind a `Reduction` of the teacher's map. It is used as `Paraphraser` is.

    Args:
        in_channels: channels C of the teacher's map.
        factor_channels: channels K of the factor.
        batch_norm: as the paper's class.
        width: channels W of the reduced map.

    >>> paraphraser = SlimParaphraser(1280, 32)
    >>> paraphraser.encode(torch.zeros(2, 1280, 4, 4)).shape, paraphraser(torch.zeros(2, 1280, 4, 4)).shape
    (torch.Size([2, 32, 4, 4]), torch.Size([2, 1280, 4, 4]))
    """

    def __init__(self, in_channels: int, factor_channels: int, batch_norm: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.in_channels, self.factor_channels, self.batch_norm = in_channels, factor_channels, batch_norm
        self.width = width
        self.reduction = Reduction(in_channels, width)
        self.inner = Paraphraser(width, factor_channels, batch_norm)
        """What is trained: the paper's paraphraser of the reduced map."""

    def encode(self, feature: Tensor) -> Tensor:
        """The factor of the teacher's map: (B, C, H, W') -> (B, K, H, W')."""
        return self.inner.encode(self.reduction(feature))

    def decode(self, factor: Tensor) -> Tensor:
        """The teacher's map of a factor: (B, K, H, W') -> (B, C, H, W')."""
        return self.reduction.expand(self.inner.decode(factor))

    def forward(self, feature: Tensor) -> Tensor:
        """The reconstruction: (B, C, H, W') -> (B, C, H, W')."""
        return self.decode(self.encode(feature))


AnyParaphraser = Paraphraser | SlimParaphraser


def core(paraphraser: AnyParaphraser) -> Paraphraser:
    """The paper's layers in a paraphraser of either form."""
    return paraphraser.inner if isinstance(paraphraser, SlimParaphraser) else paraphraser


class SlimTranslator(nn.Sequential):
    """The paper's translator behind a trained 1x1 convolution.

    Args:
        in_channels: channels C of the student's map.
        factor_channels: channels K of the teacher's factor.
        batch_norm: as the paper's class.
        width: channels W that the map is reduced to.

    >>> SlimTranslator(576, 32)(torch.zeros(2, 576, 4, 4)).shape
    torch.Size([2, 32, 4, 4])
    """

    def __init__(self, in_channels: int, factor_channels: int, batch_norm: bool = False, width: int = WIDTH) -> None:
        super().__init__(nn.Conv2d(in_channels, width, 1), Translator(width, factor_channels, batch_norm))


@torch.no_grad()
def start_as_identity(paraphraser: Paraphraser, noise: float = 0.3) -> None:
    """Let a fresh paraphraser begin near the identity on the first K channels of what its layers read.

    Each 3x3 kernel becomes what was drawn, times `noise`, with 1 added where channel i leads to channel i. On maps that
    are not negative LeakyReLU then changes little. So the slim form begins with the first K / 2 principal components,
    and the paper's form with the first K channels.

    >>> paraphraser = Paraphraser(8, 4)
    >>> start_as_identity(paraphraser, noise=0)
    >>> feature = torch.rand(1, 8, 2, 2)
    >>> bool((paraphraser.encode(feature) - feature[:, :4]).abs().max() < 0.5)
    True
    """
    for layer in paraphraser.children():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.weight.mul_(noise)
            layer.weight[:, :, 1, 1].diagonal().add_(1)
