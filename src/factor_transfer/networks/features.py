"""Feature maps of any `nn.Module`: read the output of a layer, in the shape (B, C, H, W); and the frozen teacher.

Shapes: B samples, C channels, H x W the map, N tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from factor_transfer.util.errors import ModelError, listed, near
from factor_transfer.util.files import state_fingerprint

PREFIXES = (0, 1, 2, 4, 5)
"""Numbers of class, distillation and register tokens to try where a network does not say how many it has."""

SQUARE = (1, 1)
"""Height and width of square images; only the aspect matters."""

POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
"""Pooling after the last map: never a feature map itself, even where (as in VGG) its output has several places."""


class Tapped(nn.Module):
    """A network that gives, beside its own output, the output of one of its submodules as a feature map.

    The hook exists only while `forward` runs, so the network itself is not changed. If a later layer works in place on
    the output (as ReLU may), the map is the result of that layer.

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
    """Put the gradient of a channels-last map into channels-last layout.

    The gradient of pooling has another layout, with which every layer before it computes several times slower.
    """
    if not (isinstance(found, Tensor) and found.requires_grad and found.ndim == 4):
        return
    if found.is_contiguous(memory_format=torch.channels_last):
        found.register_hook(_channels_last)  # type: ignore[no-untyped-call] # torch's own


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def maps(module: nn.Module, images: Tensor) -> list[tuple[str, tuple[int, int, int]]]:
    """The feature maps that flow: (layer, (C, H, W)), the last layer of each height and width, in order.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
    >>> maps(net, torch.zeros(2, 3, 8, 8))
    [('1', (8, 6, 6)), ('3', (16, 2, 2))]
    """
    flow, _ = flow_of(module, images)
    shape = partial(shape_of, module=module, size=images.shape[-2:])
    last = {shape(output)[1:]: output for _, output in flow}
    order = [id(output) for _, output in flow]
    found = sorted(last.values(), key=lambda output: order.index(id(output)))
    return [(layer_of(flow, output), shape(output)) for output in found]


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

    Of a tuple or dict the first map is taken: the others are auxiliary. Of a list the last one is taken: a list is a
    pyramid of features. A map has the aspect ratio of the images. That, and timm's `output_fmt`, tell whether its
    channels come last. The number of class and register tokens is timm's `num_prefix_tokens`; where a network has none,
    it is the number of tokens that are left over from a map of that aspect ratio.

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
    """Rows and columns of the tokens of an image; None where no grid of the image's aspect has so many.

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
    """How many of `tokens` come before those of the image; -1 where these are no tokens of such an image."""
    told: list[Any] = [part.num_prefix_tokens for part in module.modules() if hasattr(part, "num_prefix_tokens")]
    return next((int(each) for each in (*told[:1], *PREFIXES) if _grid(tokens - each, size)), -1)


Flow = list[tuple[str, Tensor]]
"""(name, tensor) of every submodule that gave a map, in the order in which they returned."""


def flow_of(module: nn.Module, images: Tensor) -> tuple[Flow, Any]:
    """What flows through a network, in eval mode, and what it, or its `forward_features`, ends with."""
    seen: list[tuple[str, Any]] = []
    features: Any = getattr(module, "forward_features", None)
    with in_eval_mode(module), _watching_all(module, seen):
        output = module(images) if features is None else features(images)
    size = images.shape[-2:]
    flow = [(name, tensor_in(given, module, size)) for name, given in seen]
    kept = [(name, tensor) for name, tensor in flow if tensor is not None and len(tensor) == len(images)]
    return kept, output


def shape_of(output: Tensor, module: nn.Module, size: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of the map that `tensor_in` found in an output."""
    found = as_map(output, module, size)
    assert found is not None
    _, channels, height, width = found.shape
    return channels, height, width


def layer_of(flow: Flow, chosen: Tensor) -> str:
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
    """Run modules uncompiled inside: code that `torch.compile` made earlier would skip hooks that were added later."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled then; and importing it takes a second
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


# -- a network that does not change


class FrozenTeacher(nn.Module):
    """A module that is in eval mode and without gradient, whatever mode the modules around it are put in.

    `no_grad`, not inference mode: losses save the teacher's outputs for their backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.train(False)
        self._before = state_fingerprint(module.state_dict())
        self.asked = 0
        """Images that it was shown in this process."""

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode: in train mode its batch-norm statistics would drift."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        """As the module's own; the first input holds the images."""
        self.asked += len(inputs[0])
        return self.module(*inputs)

    def unchanged(self) -> bool:
        """Whether weights and buffers are those that it was frozen with."""
        return state_fingerprint(self.module.state_dict()) == self._before


@contextmanager
def untrained(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Exclude weights from training inside the block: they require no gradient, so no optimizer changes them."""
    kept = list(weights)
    for weight in kept:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in kept:
            weight.requires_grad_(True)
