"""What the three families share: the head, the walk through the body, and everything that timm asks of a model.

Shapes: B samples, C channels, H x W the last map, N classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from factor_transfer.util.errors import ConfigError

Model = TypeVar("Model", bound="CifarNet")
EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])


class CifarNet(nn.Module):
    """A network whose body is a chain: its children, in the order they were set, one after the other.

    A family sets its layers, then calls `_finish`. The chain is what lets one walk serve `forward_features`,
    `forward_intermediates` and timm's `features_only`, in all three families.

    >>> from factor_transfer.zoo import CifarVgg
    >>> net = CifarVgg(channels=((4,), (8,)))
    >>> net.body, net.feature_info[-1]
    (('layer1', 'layer2'), {'num_chs': 8, 'reduction': 2, 'module': 'layer2'})
    """

    body: tuple[str, ...]
    feature_info: list[dict[str, Any]]
    global_pool: Any
    linear: nn.Module

    def _finish(
        self,
        taps: Sequence[str],
        channels: Sequence[int],
        *,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        """Close the body, name the tap of each group and its channels, initialise, and add the head."""
        self.body = tuple(name for name, _ in self.named_children())
        self.feature_info = [
            {"num_chs": count, "reduction": 2**place, "module": tap}
            for place, (tap, count) in enumerate(zip(taps, channels, strict=True))
        ]
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015, equation 14. Deviation: the program of the factor transfer paper keeps torch's own.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._set_head(num_classes, global_pool)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        self.num_classes = num_classes
        pool, linear = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self)
        )
        self.global_pool, self.linear = pool.train(self.training), linear.train(self.training)
        self.head_hidden_size = self.num_features * pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> the last map after its last activation, (B, C, H, W)."""
        for name in self.body:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map (B, C, H, W) -> logits (B, N), or with `pre_logits` the pooled vector (B, C)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) -> logits (B, N)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map and the maps of the groups, each (B, C, H, W); timm's signature.

        Args:
            x: images (B, in_chans, height, width).
            indices: which groups: the last n, or places in `feature_info`; all by default.
            norm: no effect. The last map is always the one after the network's last activation.
            stop_early: leave out what follows the last group asked for.
            output_fmt: NCHW.
            intermediates_only: only the list.
        """
        if output_fmt != "NCHW":
            raise ConfigError(f"output_fmt {output_fmt}", valid="NCHW")
        taps = [info["module"] for info in self.feature_info]
        places, last = feature_take_indices(len(taps), indices)
        wanted = {taps[place] for place in places}
        intermediates: list[Tensor] = []
        for name in self._body_up_to(last) if stop_early else self.body:
            x = getattr(self, name)(x)
            if name in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Delete what the groups at `indices` do not need; their places. `prune_norm` has no effect."""
        places, last = feature_take_indices(len(self.feature_info), indices)
        kept = self._body_up_to(last)
        prune_head = prune_head or kept != self.body
        for name in self.body[len(kept) :]:
            delattr(self, name)
        self.body, self.feature_info = kept, self.feature_info[: last + 1]
        self.num_features = self.feature_info[-1]["num_chs"]
        if prune_head:
            self._set_head(0, "")
        return cast(list[int], places)

    def _body_up_to(self, place: int) -> tuple[str, ...]:
        return self.body[: self.body.index(self.feature_info[place]["module"]) + 1]

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none), and another pooling if one is given."""
        self._set_head(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters for layer-wise rates: the stem, then each block (`coarse`: each group)."""
        block = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": [(block, None), (r"^bn\.", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save memory: recompute each block in the backward pass. Batch-norm statistics then move twice a step."""
        for module in self.modules():
            if isinstance(module, Group):
                module.grad_checkpointing = enable


class Group(nn.Sequential):
    """A convolutional group: blocks at one size. It checkpoints itself, so that a hook on it always fires."""

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if self.grad_checkpointing:
            return cast(Tensor, checkpoint_seq(self, x))
        for block in self:
            x = block(x)
        return x


def conv3x3(in_channels: int, channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A padded 3x3 convolution: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=bias)


def rectified(norm: nn.Module, x: Tensor) -> Tensor:
    """ReLU of a batch norm's output, (B, C, H, W) -> the same: in its place, which spares a map, where no hook sees it.

    A norm that gives back `x` itself has `x` overwritten.

    >>> import torch
    >>> x = torch.tensor([-1.0, 2.0])
    >>> rectified(nn.Identity(), x), x
    (tensor([0., 2.]), tensor([0., 2.]))
    """
    hooked = norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return F.relu(norm(x), inplace=not hooked)


def registered(entry_point: EntryPoint) -> EntryPoint:
    """timm's `register_model`, with the type it lacks."""
    register_model(entry_point)
    return entry_point


def cifar_cfg(first_conv: str, map_size: int) -> dict[str, Any]:
    """timm's configuration of an untrained CIFAR-10 network whose last map is `map_size` x `map_size`."""
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (map_size, map_size),
        "crop_pct": 1.0,  # timm's 0.875 would enlarge 32-pixel images and crop them
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "linear",
    }


def build(family: type[Model], name: str, pretrained: bool, groups: int, **kwargs: Any) -> Model:
    """The network `name`, as timm builds one. `groups`: how many maps `features_only` gives by default."""
    # timm's default asks for five maps.
    feature_cfg = {"out_indices": tuple(range(groups))}
    return cast(Model, build_model_with_cfg(family, name, pretrained, feature_cfg=feature_cfg, **kwargs))
