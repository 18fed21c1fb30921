"""What is applied to a layer's output, and so belongs to its group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from factor_transfer.networks.features import in_eval_mode, tensor_in, watching

_APPLIED = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "sigmoid",
    "tanh", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm",
    "add", "__add__", "__radd__", "cat", "concat", "concatenate",
))  # fmt: skip
"""Functions that still belong to the group whose output they are applied to."""


class _Followers(TorchFunctionMode):
    """Notes the functions that make new tensors of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor: Tensor | None = None
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, Tensor) and result is not self.tensor
        joined = [part for arg in args if isinstance(arg, (list, tuple)) for part in arg]
        if self.tensor is not None and made and any(arg is self.tensor for arg in (*args, *joined)):
            self.names.append(getattr(func, "__name__", ""))
        return result


@torch.no_grad()
def follower(module: nn.Module, layer: str, images: Tensor) -> str | None:
    """The activation, norm, sum or concatenation that takes a layer's output: None, where it ends its group.

    (What works in place needs no word: the map is then what it has made of it.)

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    >>> follower(net, "0", torch.zeros(2, 3, 6, 6)), follower(net, "1", torch.zeros(2, 3, 6, 6))
    ('relu', None)
    """
    mode = _Followers()

    def keep(output: Any) -> None:
        mode.tensor = tensor_in(output, module, images.shape[-2:])

    with in_eval_mode(module), watching(module.get_submodule(layer), keep), mode:
        module(images)
    return next((name for name in mode.names[:1] if name in _APPLIED), None)
