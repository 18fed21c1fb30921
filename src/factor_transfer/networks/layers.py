"""Which layer of a network: the last feature map, the ends of its groups, and what follows a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from factor_transfer.networks.features import (
    Flow,
    Tapped,
    feature_shape,
    flow_of,
    in_eval_mode,
    layer_of,
    shape_of,
    tensor_in,
    watching,
)  # fmt: skip
from factor_transfer.networks.outputs import tensors
from factor_transfer.util.errors import ModelError

SMALL = 64
"""Up to this side, in pixels, a network's last map may have one place."""

_APPLIED = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "sigmoid",
    "tanh", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm",
    "add", "__add__", "__radd__", "cat", "concat", "concatenate",
))  # fmt: skip
"""Functions that still belong to the group that they are applied to."""


ENCODERS = ("encoder", "backbone")
"""What the part of a network for segmentation is called whose maps its head reads."""


@torch.no_grad()
def find_layer(module: nn.Module, images: Tensor, *, dense: bool = False) -> str:
    """The submodule whose output is the last feature map before pooling: the last group after its last activation.

    The network runs once, and the output of every submodule is looked at. With timm's `forward_features`, the layer
    is the outermost submodule that returned that very tensor (or else one of its shape). Without it, the layer is
    the last one whose map has more than one place and lies on every path from the images to the output. So one of
    several branches is not it, and neither is a head of convolutions. Of several last maps, as in CrossViT, it is
    the last one.

    Args:
        module: the network.
        images: normalised images (B, 3, H, W) of the size it will see.
        dense: its output is a map. The layer is then the encoder's last one: the last of the smallest maps, in the part
            that is called as `ENCODERS` says where there is one, else before a head of 1x1 convolution.

    Raises:
        ModelError: it makes no feature map.

    >>> find_layer(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), torch.zeros(2, 3, 6, 6))
    '1'
    """
    side, known = min(images.shape[-2:]), hasattr(module, "forward_features")
    if dense:
        flow = _encoded(module, images)
        return _named(_smallest(flow, module, images), module)
    layer, pooled = (None, True) if side <= SMALL and not known else _last_layer(module, images)
    if pooled and not known:
        # With small images the last map may have one place, as if it were pooled. Larger images tell the two apart.
        with suppress(Exception):  # whatever a network raises that is made for one size
            larger = max(4 * min(side, SMALL), 2 * side)
            layer, _ = _last_layer(module, F.interpolate(images, [each * larger // side for each in images.shape[-2:]]))
    if layer is None and side <= SMALL and not known:
        layer, _ = _last_layer(module, images)
    return _named(layer, module)


def _named(layer: str | None, module: nn.Module) -> str:
    if layer is None:
        raise ModelError(
            type(module).__name__,
            found="no submodule gives a feature map (B, C, H, W)",
            hint="name a layer with --teacher-layer or --student-layer, or give the network one as a submodule",
        )
    return layer


def _encoded(module: nn.Module, images: Tensor) -> Flow:
    """The maps of more than one place of a network's encoder; where it names none, of all before a head."""
    flow, _ = flow_of(module, images)
    flow = [each for each in flow if shape_of(each[1], module, images.shape[-2:])[1:] != (1, 1)]
    own = next((name for name in ENCODERS if isinstance(getattr(module, name, None), nn.Module)), None)
    if own is not None:
        return [each for each in flow if each[0] == own or each[0].startswith(f"{own}.")]
    head = conv_head(module)
    return flow[: next((place for place, (name, _) in enumerate(flow) if name == head), None)] or flow


def _smallest(flow: Flow, module: nn.Module, images: Tensor) -> str | None:
    """The layer of the last of the smallest maps."""
    areas = [math.prod(shape_of(tensor, module, images.shape[-2:])[1:]) for _, tensor in flow]
    last = [tensor for (_, tensor), area in zip(flow, areas, strict=True) if area == min(areas)]
    return layer_of(flow, last[-1]) if last else None


def _last_layer(module: nn.Module, images: Tensor) -> tuple[str | None, bool]:
    """The layer of the last map, and whether the very last output of a submodule has one place."""
    own = hasattr(module, "forward_features")
    with torch.set_grad_enabled(not own):  # autograd's graph tells what the output depends on
        images = images.detach().requires_grad_(not own)
        flow, output = flow_of(module, images)
    size = images.shape[-2:]
    last = tensor_in(output, module, size) if own else None
    shape = partial(shape_of, module=module, size=size)
    same = [tensor for _, tensor in flow if last is not None and shape(tensor) == shape(last)]
    fitting = [tensor for tensor in same if tensor is last] or same or _of_the_trunk(module, flow, output, images)
    pooled = bool(flow) and shape(flow[-1][1])[1:] == (1, 1)
    return layer_of(flow, fitting[-1]) if fitting else None, pooled


def _of_the_trunk(module: nn.Module, flow: Flow, output: Any, images: Tensor) -> list[Tensor]:
    """The last map with more than one place, before the head, that is no branch; all, where each is a branch."""
    maps = [(name, tensor) for name, tensor in flow if shape_of(tensor, module, images.shape[-2:])[1:] != (1, 1)]
    head = conv_head(module)
    found = maps[: next((place for place, (name, _) in enumerate(maps) if name == head), None)] or maps
    ends = [tensor for _, tensor in tensors(output)]
    through = next((tensor for _, tensor in reversed(found) if carries_all(tensor, ends, images)), None)
    return [tensor for _, tensor in found] if through is None else [through]


@torch.no_grad()
def find_groups(module: nn.Module, images: Tensor, *, dense: bool = False) -> list[tuple[str, tuple[int, int, int]]]:
    """The ends of a network's groups (stages): (layer, (C, H, W)), for each height and width the last, in order.

    A group is a submodule that holds two or more layers with weights whose maps have the size of its own map. So the
    first convolution of the next group, which may still have that size, is no group. Where no submodule is one (a flat
    network), the last layer of that size ends the group. The last group ends where `find_layer` says. A stem before the
    first group is no group, and neither is a map of one place. Of a network whose output is a map (`dense`), the groups
    are those of its encoder.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
    >>> find_groups(net, torch.zeros(2, 3, 8, 8))
    [('2', (8, 6, 6)), ('4', (16, 2, 2))]
    """
    flow = _encoded(module, images) if dense else flow_of(module, images)[0]
    shape = partial(shape_of, module=module, size=images.shape[-2:])
    by_size: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
    for name, output in flow:
        by_size.setdefault(shape(output)[1:], []).append((name, output))
    found = []
    for size, named in by_size.items():
        parts = [(name, getattr(module.get_submodule(name), "weight", None)) for name, _ in named]
        weighted = [name for name, weight in parts if isinstance(weight, Tensor) and weight.ndim > 1]
        groups = [each for each in named if sum(name.startswith(f"{each[0]}.") for name in weighted) > 1]
        _, output = groups[-1] if groups else min(reversed(named), key=lambda each: each[0].count("."))
        if size != (1, 1) and weighted:  # maps without weights come from inside attention
            found.append((layer_of(flow, output), shape(output), bool(groups)))
    found.sort(key=lambda each: each[1][1:], reverse=True)
    if not found:
        return []
    last = find_layer(module, images, dense=dense)
    whole = feature_shape(Tapped(module, last), images)
    if found[-1][1][1:] == whole[1:]:
        found[-1] = last, whole, True
    stem = len(found) > 1 and not found[0][2] and any(group for *_, group in found[:-1])
    return [(layer, shape) for layer, shape, _ in (found[1:] if stem else found)]


def carries_all(feature: Tensor, outputs: Iterable[Tensor], images: Tensor) -> bool:
    """Whether every path in autograd's graph from `outputs` to `images` goes through `feature`.

    Where there is no graph, as under `no_grad`, the answer is True.

    >>> images = torch.ones(1, requires_grad=True)
    >>> one, other = 2 * images, 3 * images
    >>> carries_all(one, [one + other], images), carries_all(both := one + other, [both.exp()], images)
    (False, True)
    """
    if not images.requires_grad:
        return True
    node: Any = feature.grad_fn
    with torch.enable_grad():
        start: Any = images.view_as(images).grad_fn
    first = start.next_functions[0][0]
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen = {node, None} if node is not None else set(waiting) | {None}
    while waiting:
        each = waiting.pop()
        if each is first:
            return False
        if each not in seen:
            seen.add(each)
            waiting += [before for before, _ in each.next_functions]
    return True


def conv_head(module: nn.Module) -> str | None:
    """The convolution that gives the classes of a network without a linear layer (SqueezeNet): the last layer, if 1x1.

    >>> conv_head(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)))
    '1'
    """
    parts = [(name, part) for name, part in module.named_modules() if list(part.parameters(recurse=False))]
    name, last = parts[-1] if parts else ("", module)
    linear = any(isinstance(part, nn.Linear) for _, part in parts)
    return name if not linear and name and isinstance(last, nn.Conv2d) and last.kernel_size == (1, 1) else None


class _Followers(TorchFunctionMode):
    """Records the functions that compute new tensors from a tensor."""

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
    """The activation, norm, sum or concatenation that is applied to a layer's output; None where there is none.

    Functions that work in place do not count: the tapped map already has their result.

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
