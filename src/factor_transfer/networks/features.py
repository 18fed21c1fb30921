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

from factor_transfer.networks.outputs import tensors
from factor_transfer.networks.trunk import carries_all, conv_head
from factor_transfer.util.errors import ModelError, listed, near

SMALL = 64
"""Up to this side, in pixels, a network's last map may have one place."""

PREFIXES = (0, 1, 2, 4, 5)
"""Class, distillation and register tokens that are looked for where a network does not say how many it has."""

SQUARE = (1, 1)
"""Height and width of images, where only their aspect matters."""

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
        feature = as_map(kept[layer], self.module, images.shape[-2:]) if layer in kept else None
        if feature is None:
            found = f"{_described(kept[layer])}, which is no feature map" if layer in kept else None
            raise ModelError(
                f"{self.flag} {layer}",
                found=found or "not used when the network runs",
                valid="a layer that gives (B, C, H, W), or (B, N, C) tokens, of the images' aspect: "
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
    side, known = min(images.shape[-2:]), hasattr(module, "forward_features")
    layer, pooled = (None, True) if side <= SMALL and not known else _last_layer(module, images)
    if pooled and not known:
        # The last map of small images may have one place, as if it were pooled: larger ones tell them apart.
        with suppress(Exception):  # whatever a network raises that is made for one size
            larger = max(4 * min(side, SMALL), 2 * side)
            layer, _ = _last_layer(module, F.interpolate(images, [each * larger // side for each in images.shape[-2:]]))
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
    size = images.shape[-2:]
    last = tensor_in(output, module, size) if own else None
    shape = partial(_shape, module=module, size=size)
    same = [tensor for _, tensor in flow if last is not None and shape(tensor) == shape(last)]
    fitting = [tensor for tensor in same if tensor is last] or same or _of_the_trunk(module, flow, output, images)
    pooled = bool(flow) and shape(flow[-1][1])[1:] == (1, 1)
    return _named(flow, fitting[-1]) if fitting else None, pooled


def _of_the_trunk(module: nn.Module, flow: Flow, output: Any, images: Tensor) -> list[Tensor]:
    """Of the maps with more than one place before the head the last that is no branch; all, where each is one."""
    maps = [(name, tensor) for name, tensor in flow if _shape(tensor, module, images.shape[-2:])[1:] != (1, 1)]
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
    shape = partial(_shape, module=module, size=images.shape[-2:])
    last = {shape(output)[1:]: output for _, output in flow}
    order = [id(output) for _, output in flow]
    found = sorted(last.values(), key=lambda output: order.index(id(output)))
    return [(_named(flow, output), shape(output)) for output in found]


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
    shape_of = partial(_shape, module=module, size=images.shape[-2:])
    by_size: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
    for name, output in flow:
        by_size.setdefault(shape_of(output)[1:], []).append((name, output))
    found = []
    for size, named in by_size.items():
        parts = [(name, getattr(module.get_submodule(name), "weight", None)) for name, _ in named]
        weighted = [name for name, weight in parts if isinstance(weight, Tensor) and weight.ndim > 1]
        groups = [each for each in named if sum(name.startswith(f"{each[0]}.") for name in weighted) > 1]
        _, output = groups[-1] if groups else min(reversed(named), key=lambda each: each[0].count("."))
        if size != (1, 1) and weighted:  # maps that no weights make are attention's own
            found.append((_named(flow, output), shape_of(output), bool(groups)))
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
    """The tapped map (B, C, H, W) of normalised images (B, 3, H, W), the network in eval mode meanwhile."""
    with in_eval_mode(tapped):
        feature: Tensor = tapped(images)[1]
    return feature


def feature_shape(tapped: Tapped, images: Tensor) -> tuple[int, int, int]:
    """(C, H, W) of the tapped map for `images` (B, 3, H, W)."""
    channels, height, width = feature_map(tapped, images).shape[1:]
    return channels, height, width


def as_map(output: Any, module: nn.Module, size: Sequence[int] = SQUARE) -> Tensor | None:
    """What a submodule of `module` gave, as a map (B, C, H, W); None where it is no feature map.

    The first map in a tuple or dict (what follows is beside it), the last in a list (of its like). A map has the aspect
    of the images, which tells channels-last ones, beside timm's `output_fmt`; class and register tokens are known by
    timm's `num_prefix_tokens`, or are what is left over from that aspect.

    Args:
        output: of a submodule.
        module: the network.
        size: height and width of its images.

    >>> as_map((torch.zeros(2, 1 + 49, 32), None), nn.Identity()).shape
    torch.Size([2, 32, 7, 7])
    >>> as_map(torch.zeros(2, 1 + 8, 32), nn.Identity(), (64, 32)).shape
    torch.Size([2, 32, 4, 2])
    """
    tensor = tensor_in(output, module, size)
    if tensor is None or tensor.ndim == 4:
        return (
            tensor.permute(0, 3, 1, 2) if tensor is not None and _channels_come_last(tensor, module, size) else tensor
        )
    prefix = _prefix(tensor.shape[1], module, size)
    grid = _grid(tensor.shape[1] - prefix, size)
    return tensor[:, prefix:].transpose(1, 2).reshape(len(tensor), -1, *(grid or ()))  # (B, N, C) -> (B, C, H, W)


def tensor_in(output: Any, module: nn.Module, size: Sequence[int] = SQUARE) -> Tensor | None:
    """The tensor in an output that `as_map` makes a map of."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        found = [tensor for tensor in (tensor_in(value, module, size) for value in output) if tensor is not None]
        return found[-1 if isinstance(output, list) else 0] if found else None
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    shape = output.shape
    fits = output.ndim == 4 and (_like(shape[2:], size) or _like(shape[1:3], size))
    return output if fits or (output.ndim == 3 and _prefix(shape[1], module, size) >= 0) else None


def _channels_come_last(tensor: Tensor, module: nn.Module, size: Sequence[int]) -> bool:
    """Whether a map is (B, H, W, C)."""
    shape = tensor.shape
    first, last = _like(shape[2:], size), _like(shape[1:3], size)
    if shape[2:] == (1, 1) or (first and last and (shape[1] == shape[3] or size[0] != size[1])):  # no aspect tells
        return str(getattr(module, "output_fmt", "NCHW")) == "NHWC"
    return last and not first


def _like(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a map's height and width are those of images, divided and rounded."""
    (height, width), (rows, columns) = size, shape
    if height == width:
        return rows == columns
    return abs(rows * width - columns * height) <= max(height, width)


def _grid(places: int, size: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of so many tokens of images; None where there are no such.

    >>> _grid(49, (224, 224)), _grid(8, (32, 16)), _grid(7, (32, 16))
    ((7, 7), (4, 2), None)
    """
    if places < 2:
        return None
    rows = round(math.sqrt(places * size[0] / size[1]))
    near_by = [each for each in range(max(rows - 1, 1), rows + 2) if places % each == 0]
    fitting = [(each, places // each) for each in near_by if _like((each, places // each), size)]
    return min(fitting, key=lambda grid: abs(grid[0] * size[1] - grid[1] * size[0]), default=None)


def _prefix(tokens: int, module: nn.Module, size: Sequence[int]) -> int:
    """How many of so many tokens stand before those of an image; -1 where they are none."""
    told: list[Any] = [part.num_prefix_tokens for part in module.modules() if hasattr(part, "num_prefix_tokens")]
    return next((int(each) for each in (*told[:1], *PREFIXES) if _grid(tokens - each, size)), -1)


Flow = list[tuple[str, Tensor]]
"""(name, tensor) of every submodule that gave a map, in the order in which they returned."""


def _flow(module: nn.Module, images: Tensor) -> tuple[Flow, Any]:
    """What flows through a network, in eval mode, and what it, or its `forward_features`, ends with."""
    seen: list[tuple[str, Any]] = []
    features: Any = getattr(module, "forward_features", None)
    with in_eval_mode(module), _watching_all(module, seen):
        output = module(images) if features is None else features(images)
    size = images.shape[-2:]
    flow = [(name, tensor_in(given, module, size)) for name, given in seen]
    kept = [(name, tensor) for name, tensor in flow if tensor is not None and len(tensor) == len(images)]
    return kept, output


def _shape(output: Tensor, module: nn.Module, size: Sequence[int]) -> tuple[int, int, int]:
    found = as_map(output, module, size)
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
