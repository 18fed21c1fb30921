"""Feature maps of any `nn.Module`: find the last spatial map, tap it, give it the shape (B, C, H, W), align sizes.

Shapes: B samples, C channels, H x W the map, N tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factor_transfer.errors import ModelError, listed, near
from factor_transfer.outputs import tensors
from factor_transfer.trunk import carries_all, conv_head

SMALL = 64
"""Up to this side, in pixels, a network's last map may have one place."""

PREFIXES = (0, 1, 2, 4, 5)
"""Class, distillation and register tokens that are looked for where a network does not say how many it has."""

POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
"""What comes after the last map, even where (as in VGG) its output has more than one place."""


class Tapped(nn.Module):
    """A network that gives, beside its own output, the output of one of its submodules as a feature map.

    The network itself is left as it is: the hook lives only while `forward` runs. Where a later layer overwrites the
    output in place, the map is what that layer made of it.

    Args:
        module: the network.
        layer: dotted name of the submodule, as `named_modules` gives it.
        flag: the setting that named the layer, for messages.
        also: other submodules whose maps `maps` gives too.
        ends: the network runs no further than the layer, and its output is None.

    Raises:
        ModelError: there is no such submodule; the message lists what there is.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> output, feature = Tapped(net, "1")(torch.zeros(2, 3, 6, 6))
    >>> output.shape, feature.shape
    (torch.Size([2, 8]), torch.Size([2, 8, 4, 4]))
    """

    def __init__(
        self, module: nn.Module, layer: str, *, flag: str = "layer", also: Sequence[str] = (), ends: bool = False
    ) -> None:
        super().__init__()
        self.module, self.layer, self.flag, self.ends = module, layer, flag, ends
        self.layers = tuple(dict.fromkeys((layer, *also)))
        names = [name for name, _ in module.named_modules() if name]
        for each in self.layers:
            if each not in names:
                raise ModelError(
                    f"{flag} {each}",
                    found="no submodule of that name",
                    valid=f"one of its {len(names)}, such as "
                    + listed(near(each, names) or [name for name in names if "." not in name]),
                    hint=f"leave {flag} out to have it found; all: [name for name, _ in network.named_modules()]",
                )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> the network's output, and the feature map (B, C, H, W)."""
        output, found = self.maps(images)
        return output, found[self.layer]

    def maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised images (B, 3, H, W) -> the network's output, and the map (B, C, H, W) of every layer by name."""
        kept: dict[str, Any] = {}
        output: Any = None
        with ExitStack() as stack, suppress(_Reached):
            for layer in self.layers:
                stack.enter_context(watching(self.module.get_submodule(layer), partial(self._keep, kept, layer)))
            output = self.module(images)
        for found in kept.values():
            _keep_layout(found)
        return output, {layer: self._as_map(layer, kept, images) for layer in self.layers}

    def _keep(self, kept: dict[str, Any], layer: str, output: Any) -> None:
        kept[layer] = output
        if self.ends and layer == self.layer:
            raise _Reached

    def _as_map(self, layer: str, kept: Mapping[str, Any], images: Tensor) -> Tensor:
        feature = as_map(kept[layer], self.module) if layer in kept else None
        if feature is None:
            found = f"{_described(kept[layer])}, which is no feature map" if layer in kept else None
            raise ModelError(
                f"{self.flag} {layer}",
                found=found or "not used when the network runs",
                valid="a layer that gives (B, C, H, W), or (B, N, C) tokens of a square image: "
                + listed([f"{name} {'x'.join(map(str, shape))}" for name, shape in maps(self.module, images[:2])]),
                hint=f"leave {self.flag} out: the last feature map is found by itself",
            )
        return feature


class _Reached(Exception):  # noqa: N818 (no error)
    """The last layer that is wanted has run."""


def _keep_layout(found: Any) -> None:
    """Have the gradient of a channels-last map arrive channels-last.

    That of pooling does not, and every layer before it would then compute several times slower.
    """
    if not (isinstance(found, Tensor) and found.requires_grad and found.ndim == 4):
        return
    if found.is_contiguous(memory_format=torch.channels_last):
        found.register_hook(_channels_last)  # type: ignore[no-untyped-call] # torch's own


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def find_layer(module: nn.Module, images: Tensor) -> str:
    """The submodule whose output is the last feature map before pooling: the last group after its last activation.

    It is found by looking at what flows: the outermost submodule that returns the very tensor that timm's
    `forward_features` returns (or one of its shape), or without `forward_features` the last one to return a map
    with more than one place through which all goes that the output depends on: one of several branches is none, and
    neither is what a head of convolutions makes. Of several last maps, as CrossViT has, it is the last one.

    Args:
        module: the network.
        images: normalised images (B, 3, H, W) of the size it will see.

    Raises:
        ModelError: it makes no feature map.

    >>> find_layer(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), torch.zeros(2, 3, 6, 6))
    '1'
    """
    side, known = images.shape[-1], hasattr(module, "forward_features")
    layer, pooled = (None, True) if side <= SMALL and not known else _last_layer(module, images)
    if pooled and not known:
        # The last map of small images may have one place, as if it were pooled: larger ones tell them apart.
        with suppress(Exception):  # whatever a network raises that is made for one size
            layer, _ = _last_layer(module, F.interpolate(images, max(4 * min(side, SMALL), 2 * side)))
    if layer is None and side <= SMALL and not known:
        layer, _ = _last_layer(module, images)
    if layer is None:
        raise ModelError(
            type(module).__name__,
            found="no submodule gives a feature map (B, C, H, W)",
            hint="name a layer with --teacher-layer or --student-layer, or give the network one as a submodule",
        )
    return layer


def _last_layer(module: nn.Module, images: Tensor) -> tuple[str | None, bool]:
    """The layer of the last map, and whether maps of one place come after all others."""
    own = hasattr(module, "forward_features")
    with torch.set_grad_enabled(not own):  # whose graph tells what the output depends on
        images = images.detach().requires_grad_(not own)
        flow, output = _flow(module, images)
    last = tensor_in(output, module) if own else None
    same = [tensor for _, tensor in flow if last is not None and _shape(tensor, module) == _shape(last, module)]
    fitting = [tensor for tensor in same if tensor is last] or same or _of_the_trunk(module, flow, output, images)
    pooled = bool(flow) and _shape(flow[-1][1], module)[1:] == (1, 1)
    return _named(flow, fitting[-1]) if fitting else None, pooled


def _of_the_trunk(module: nn.Module, flow: Flow, output: Any, images: Tensor) -> list[Tensor]:
    """Of the maps with more than one place before the head the last that is no branch; all, where each is one."""
    maps = [(name, tensor) for name, tensor in flow if _shape(tensor, module)[1:] != (1, 1)]
    head = conv_head(module)
    found = maps[: next((place for place, (name, _) in enumerate(maps) if name == head), None)] or maps
    ends = [tensor for _, tensor in tensors(output)]
    through = next((tensor for _, tensor in reversed(found) if carries_all(tensor, ends, images)), None)
    return [tensor for _, tensor in found] if through is None else [through]


@torch.no_grad()
def maps(module: nn.Module, images: Tensor) -> list[tuple[str, tuple[int, int, int]]]:
    """The feature maps that flow: (layer, (C, H, W)), the last layer of each height and width, in order.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
    >>> maps(net, torch.zeros(2, 3, 8, 8))
    [('1', (8, 6, 6)), ('3', (16, 2, 2))]
    """
    flow, _ = _flow(module, images)
    last = {_shape(output, module)[1:]: output for _, output in flow}
    order = [id(output) for _, output in flow]
    found = sorted(last.values(), key=lambda output: order.index(id(output)))
    return [(_named(flow, output), _shape(output, module)) for output in found]


@torch.no_grad()
def find_groups(module: nn.Module, images: Tensor) -> list[tuple[str, tuple[int, int, int]]]:
    """The ends of a network's groups (stages): (layer, (C, H, W)), for each height and width the last, in order.

    A group is a submodule that holds two or more layers with weights of its map's size; so the next group's first
    convolution, which may still have that size, is none. Where no submodule is (a flat network), it is the last layer.
    The last group ends where `find_layer` says. What comes before the first group (a stem) is none, and neither is a
    map of one place.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
    >>> find_groups(net, torch.zeros(2, 3, 8, 8))
    [('2', (8, 6, 6)), ('4', (16, 2, 2))]
    """
    flow, _ = _flow(module, images)
    by_size: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
    for name, output in flow:
        by_size.setdefault(_shape(output, module)[1:], []).append((name, output))
    found = []
    for size, named in by_size.items():
        parts = [(name, getattr(module.get_submodule(name), "weight", None)) for name, _ in named]
        weighted = [name for name, weight in parts if isinstance(weight, Tensor) and weight.ndim > 1]
        groups = [each for each in named if sum(name.startswith(f"{each[0]}.") for name in weighted) > 1]
        _, output = groups[-1] if groups else min(reversed(named), key=lambda each: each[0].count("."))
        if size != (1, 1) and weighted:  # maps that no weights make are attention's own
            found.append((_named(flow, output), _shape(output, module), bool(groups)))
    found.sort(key=lambda each: each[1][1:], reverse=True)
    if not found:
        return []
    last = find_layer(module, images)
    shape = feature_shape(Tapped(module, last), images)
    if found[-1][1][1:] == shape[1:]:
        found[-1] = last, shape, True
    stem = len(found) > 1 and not found[0][2] and any(group for *_, group in found[:-1])
    return [(layer, shape) for layer, shape, _ in (found[1:] if stem else found)]


@torch.no_grad()
def feature_map(tapped: Tapped, images: Tensor) -> Tensor:
    """The tapped map (B, C, H, W) of normalised images (B, 3, S, S), the network in eval mode meanwhile."""
    with in_eval_mode(tapped):
        feature: Tensor = tapped(images)[1]
    return feature


def feature_shape(tapped: Tapped, images: Tensor) -> tuple[int, int, int]:
    """(C, H, W) of the tapped map for `images` (B, 3, S, S)."""
    channels, height, width = feature_map(tapped, images).shape[1:]
    return channels, height, width


def align(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool a map (B, C, H, W) to `size` (height, width), which is no larger; (B, C, *size).

    Deviation: the paper's pairs have maps of one size. Where they differ, the larger is pooled to the smaller.

    >>> align(torch.zeros(2, 64, 8, 8), (4, 4)).shape
    torch.Size([2, 64, 4, 4])
    """
    return feature if tuple(feature.shape[-2:]) == tuple(size) else F.adaptive_avg_pool2d(feature, size)


def as_map(output: Any, module: nn.Module) -> Tensor | None:
    """What a submodule of `module` gave, as a map (B, C, H, W); None where it is no feature map.

    The first map in a tuple or dict (what follows is beside it), the last in a list (of its like). Channels-last maps
    are known by their equal height and width, or by timm's `output_fmt`; class and register tokens by timm's
    `num_prefix_tokens`, or by what is left over from a square.

    >>> as_map((torch.zeros(2, 1 + 49, 32), None), nn.Identity()).shape
    torch.Size([2, 32, 7, 7])
    """
    tensor = tensor_in(output, module)
    if tensor is None or tensor.ndim == 4:
        last = tensor is not None and (
            str(getattr(module, "output_fmt", "NCHW")) == "NHWC"
            if tensor.shape[1] == tensor.shape[2] == tensor.shape[3] or tensor.shape[2:] == (1, 1)
            else tensor.shape[1] == tensor.shape[2] != tensor.shape[3]
        )
        return tensor.permute(0, 3, 1, 2) if tensor is not None and last else tensor
    tokens = tensor[:, _prefix(tensor.shape[1], module) :]  # (B, N, C)
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, side, side)  # (B, C, side, side)


def tensor_in(output: Any, module: nn.Module) -> Tensor | None:
    """The tensor in an output that `as_map` makes a map of."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        found = [tensor for tensor in (tensor_in(value, module) for value in output) if tensor is not None]
        return found[-1 if isinstance(output, list) else 0] if found else None
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    shape = output.shape
    square = output.ndim == 4 and shape[2] in (shape[1], shape[3])  # as the images are
    return output if square or (output.ndim == 3 and _prefix(shape[1], module) >= 0) else None


def _prefix(tokens: int, module: nn.Module) -> int:
    """How many of so many tokens stand before those of a square image; -1 where they are none."""
    told: list[Any] = [part.num_prefix_tokens for part in module.modules() if hasattr(part, "num_prefix_tokens")]
    for prefix in (*told[:1], *PREFIXES):
        side = math.isqrt(max(tokens - prefix, 0))
        if side > 1 and side * side == tokens - prefix:
            return int(prefix)
    return -1


Flow = list[tuple[str, Tensor]]
"""(name, tensor) of every submodule that gave a map, in the order in which they returned."""


def _flow(module: nn.Module, images: Tensor) -> tuple[Flow, Any]:
    """What flows through a network, in eval mode, and what it, or its `forward_features`, ends with."""
    seen: list[tuple[str, Any]] = []
    features: Any = getattr(module, "forward_features", None)
    with in_eval_mode(module), _watching_all(module, seen):
        output = module(images) if features is None else features(images)
    flow = [(name, tensor_in(given, module)) for name, given in seen]
    kept = [(name, tensor) for name, tensor in flow if tensor is not None and len(tensor) == len(images)]
    return kept, output


def _shape(output: Tensor, module: nn.Module) -> tuple[int, int, int]:
    found = as_map(output, module)
    assert found is not None
    _, channels, height, width = found.shape
    return channels, height, width


def _named(flow: Flow, chosen: Tensor) -> str:
    """The outermost submodule that returned `chosen`; the last of these, which may have worked in place."""
    names = [name for name, output in flow if output is chosen]
    return min(reversed(names), key=lambda name: name.count("."))


def _described(output: Any) -> str:
    return f"an output of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"


@contextmanager
def watching(module: nn.Module, keep: Callable[[Any], None]) -> Iterator[None]:
    """Give `keep` what a module returns, inside the block."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: keep(output))
    try:
        with _uncompiled():
            yield
    finally:
        handle.remove()


@contextmanager
def _watching_all(module: nn.Module, flow: list[tuple[str, Any]]) -> Iterator[None]:
    """Append (name, output) of every submodule to `flow`, in the order in which they return."""
    handles = [
        part.register_forward_hook(lambda _module, _inputs, output, name=name: flow.append((name, output)))
        for name, part in module.named_modules()
        if name and not isinstance(part, (nn.Identity, *POOLS))
    ]
    try:
        with _uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled() -> AbstractContextManager[Any]:
    """What `torch.compile` has made of a module before knows of no hook that came later: inside, it runs as written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return] # torch's own


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every part is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
