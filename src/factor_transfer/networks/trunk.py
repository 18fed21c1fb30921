"""What of a network its output depends on: a map through which all goes, one of several branches, a head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def carries_all(feature: Tensor, outputs: Iterable[Tensor], images: Tensor) -> bool:
    """Whether `outputs` depend on `images` through `feature` alone: the graph of autograd has no way around it.

    Where there is no graph, as of code under `no_grad`, nothing tells, and the answer is True.

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
