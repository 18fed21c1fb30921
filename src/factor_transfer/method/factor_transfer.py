"""The paper: Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer",
NeurIPS 2018, arXiv 1802.04977. Numbers of sections and equations are those of the paper.

Shapes::

    B      samples in a batch
    C      channels of a feature map (the paper's m for the teacher's)
    K      factor channels, round(C x k) with the paraphrase rate k
    H, W   height and width of the feature map; kept by every layer here

The teacher's last feature map (B, C, H, W) is encoded by the `Paraphraser` to its factor (B, K, H, W). The student's
`Translator` makes a factor of the same shape out of the student's own map, and `factor_transfer_loss` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factor_transfer.util.errors import ConfigError, ModelError, first_line, listed

SLOPE = 0.1
"""Negative slope of every LeakyReLU (authors' program)."""

NORM_FLOOR = 1e-6
"""Factors shorter than this count as zero. Real ones have a length between 1 and 1000."""


def factor_channels(channels: int, k: float) -> int:
    """Channels of the factor, K = round(C x k) (section 3.1; `k` may exceed 1).

    Raises:
        ConfigError: there would be none.

    >>> factor_channels(64, 0.5)
    32
    """
    count = round(channels * k)
    if count < 1:
        raise ConfigError(
            f"--k {k:g}",
            found=f"{channels} teacher channels x {k:g} = {count} factor channels",
            valid=f"{0.5 / channels:.2g} < k; the paper uses 0.5 to 1",
        )
    return count


class _Encoder(nn.Module):
    """Three 3x3 convolutions C -> C -> K -> K; what paraphraser and translator have in common (figure 2)."""

    def __init__(self, in_channels: int, factor_channels: int, batch_norm: bool = False) -> None:
        super().__init__()
        c, k = in_channels, factor_channels
        self.in_channels, self.factor_channels, self.batch_norm = c, k, batch_norm
        self.conv0 = nn.Conv2d(c, c, 3, padding=1)
        self.conv1 = nn.Conv2d(c, k, 3, padding=1)
        self.conv2 = nn.Conv2d(k, k, 3, padding=1)
        self.encoder_norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (c, k, k) if batch_norm)

    def _encode(self, feature: Tensor) -> Tensor:
        return _activate((self.conv0, self.conv1, self.conv2), self.encoder_norms, feature)


def _activate(convs: Sequence[nn.Module], norms: nn.ModuleList, x: Tensor) -> Tensor:
    """Each convolution, its batch norm where there is one, and LeakyReLU(0.1), the last layer included."""
    for place, conv in enumerate(convs):
        x = conv(x)
        x = F.leaky_relu(norms[place](x) if norms else x, SLOPE)
    return x


class Translator(_Encoder):
    """Makes the student's factor out of the student's feature map (section 3.2); trained together with the student.

    Args:
        in_channels: channels C of the student's map.
        factor_channels: channels K of the teacher's factor.
        batch_norm: batch norm before every activation. Deviation: the paper and the authors' program have none.

    >>> Translator(64, 32)(torch.zeros(2, 64, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        return self._encode(feature)


class Paraphraser(_Encoder):
    """Convolutional autoencoder of the teacher's feature map, trained without labels (section 3.1).

    Encoder: conv3x3 C -> C -> K -> K. Decoder: transposed conv3x3 K -> K -> C -> C. Stride 1, padding 1, with bias,
    LeakyReLU(0.1) after every layer, the last of both halves included (authors' program).

    Args:
        in_channels: channels C of the teacher's map.
        factor_channels: channels K of the factor.
        batch_norm: batch norm before every activation. Deviation: the paper and the authors' program have none.

    >>> paraphraser = Paraphraser(64, factor_channels(64, k=0.5))
    >>> paraphraser.encode(torch.zeros(2, 64, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    >>> paraphraser(torch.zeros(2, 64, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """

    def __init__(self, in_channels: int, factor_channels: int, batch_norm: bool = False) -> None:
        super().__init__(in_channels, factor_channels, batch_norm)
        c, k = in_channels, factor_channels
        self.deconv0 = nn.ConvTranspose2d(k, k, 3, padding=1)
        self.deconv1 = nn.ConvTranspose2d(k, c, 3, padding=1)
        self.deconv2 = nn.ConvTranspose2d(c, c, 3, padding=1)
        self.decoder_norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (k, c, c) if batch_norm)

    def encode(self, feature: Tensor) -> Tensor:
        """The factor of a feature map: (B, C, H, W) -> (B, K, H, W). The authors' mode 1."""
        return self._encode(feature)

    def decode(self, factor: Tensor) -> Tensor:
        """The feature map of a factor: (B, K, H, W) -> (B, C, H, W). The authors' mode 2."""
        return _activate((self.deconv0, self.deconv1, self.deconv2), self.decoder_norms, factor)

    def forward(self, feature: Tensor) -> Tensor:
        """The reconstruction: (B, C, H, W) -> (B, C, H, W). The authors' mode 0."""
        return self.decode(self.encode(feature))


class Straight(nn.Module):
    """No paraphraser: the factor is the feature map itself (an ablation).

    >>> Straight(64).encode(torch.zeros(2, 64, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor_channels = channels

    def encode(self, feature: Tensor) -> Tensor:
        """(B, C, H, W), as it is."""
        return feature


def reconstruction_loss(reconstruction: Tensor, feature: Tensor, norm: Literal["l1", "l2"] = "l1") -> Tensor:
    """The paraphraser's loss (equation 1) on maps of shape (B, C, H, W); a scalar, in float32 at least.

    Deviation: the paper writes the squared L2 norm; the authors' program takes the mean L1 error, which is the
    default here. `l2` is the paper's, as a mean over elements, so that a learning rate does not depend on size.

    >>> reconstruction_loss(torch.zeros(2, 4, 1, 1), torch.full((2, 4, 1, 1), 3.0), norm="l2").item()
    9.0
    """
    error = _precise(reconstruction) - _precise(feature)
    return error.abs().mean() if norm == "l1" else error.square().mean()


def normalize_factor(factor: Tensor) -> Tensor:
    """Flatten each sample's factor and divide it by its L2 norm (section 3.2): (B, K, H, W) -> (B, K x H x W).

    Computed in float32 at least: the squares of half-precision factors overflow. An all-zero factor stays zero, and
    receives no gradient (the paper divides by zero there).

    >>> normalize_factor(torch.tensor([[[[3.0]], [[4.0]]]]))
    tensor([[0.6000, 0.8000]])
    """
    flat = _precise(factor).flatten(1)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat * torch.where(length > NORM_FLOOR, 1 / length.clamp_min(NORM_FLOOR), 0.0)


def factor_transfer_loss(student_factor: Tensor, teacher_factor: Tensor, p: float = 1) -> Tensor:
    """The p-norm difference of the normalised factors (equation 4), averaged over samples; a scalar.

    Both factors are (B, K, H, W). With p = 1 this is the mean absolute difference over all elements, as in the
    authors' program. Deviation: for any p the norm is divided by (K x H x W)^(1/p), which is that same mean for p = 1
    and gives p = 2 the same bound (see `factor_loss_bound`), so that one beta serves both. The teacher's factor
    receives no gradient.

    >>> factor = torch.randn(2, 32, 8, 8)
    >>> factor_transfer_loss(factor, 7 * factor).item() < 1e-7  # only the direction counts
    True
    """
    if student_factor.shape != teacher_factor.shape:
        raise ConfigError(
            "factors of different shapes cannot be compared",
            found=f"student {tuple(student_factor.shape)}, teacher {tuple(teacher_factor.shape)}",
            valid="one batch, one number of factor channels, one height and width",
        )
    # Channels last, as the maps lie in memory. The loss does not depend on the elements' order, but another order would
    # cost time: here, and in the backward of every earlier layer, whose gradient would differ from its map in layout.
    ours, theirs = (factor.movedim(1, -1) for factor in (student_factor, teacher_factor.detach()))
    difference = normalize_factor(ours) - normalize_factor(theirs)
    if p == 1:
        return difference.abs().mean()
    norm: Tensor = torch.linalg.vector_norm(difference, ord=p, dim=1).mean() / difference.shape[1] ** (1 / p)
    return norm


def factor_loss_bound(elements: int, p: float = 1) -> float:
    """The largest value that `factor_transfer_loss` can take for factors of `elements` = K x H x W numbers.

    Two unit vectors differ by at most 2 in the L2 norm. The bound shrinks with size, so beta is not portable.

    >>> round(500 * factor_loss_bound(2048), 1)  # the authors' CIFAR-10 program
    22.1
    """
    return float(2 / elements ** (1 / max(p, 2)))


def portable_beta(elements: int, p: float = 1) -> float:
    """The beta whose bound on the factor term is that of the authors' CIFAR-10 program (beta 500 at 2048 elements).

    For p of 1 and 2 an equal bound is an equal pull: half of it, beta / sqrt(elements), is the norm of the gradient in
    an image's normalised factor, however near the factors have come (of p = 1, where all elements differ). For other p
    it is the most that the norm can be.

    >>> round(portable_beta(2048)), round(portable_beta(512))
    (500, 250)
    """
    return 500 * factor_loss_bound(2048) / factor_loss_bound(elements, p)


def load_reference_paraphraser(path: str | Path) -> Paraphraser:
    """The paraphraser that the paper's authors published, from their `.pth` file (keys `conv0..2`, `deconv0..2`).

    Sizes are read off the file; keys and shapes must fit exactly; nothing in the file is executed.

    Raises:
        ModelError: the file is missing, is no such checkpoint, or does not fit.
    """
    try:
        with Path(path).open("rb") as file:  # by its name torch would take some files for safetensors
            content = torch.load(file, map_location="cpu", weights_only=True)
        state = content["state_dict"]
        factor_channels, in_channels = state["conv1.weight"].shape[:2]
    except Exception as error:  # whatever torch's reader raises on a foreign file
        raise ModelError(
            str(path),
            found=first_line(error),
            valid="a torch file with a state_dict whose keys are conv0..2 and deconv0..2",
        ) from error
    paraphraser = Paraphraser(in_channels, factor_channels)
    wanted = paraphraser.state_dict()
    wrong = sorted(set(wanted) ^ set(state)) or [n for n in wanted if wanted[n].shape != state[n].shape]
    if wrong:
        raise ModelError(str(path), found=f"tensors that do not fit: {listed(wrong)}", valid=listed(list(wanted)))
    paraphraser.load_state_dict(state)
    return paraphraser


def _precise(x: Tensor) -> Tensor:
    """Float32 at least: half precision is for the networks, not for the losses."""
    return x if x.dtype == torch.float64 else x.float()
