"""Signs that a training dies: values that are not finite, and factors that say nothing.

Shapes: B samples, K factor channels, H x W the feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from factor_transfer.method.factor_transfer import normalize_factor

DEAD = 0.01
"""A factor that varies less than this share of what it should follow is called dead. Real ones: 0.2 and more."""


def variety(factor: Tensor) -> Tensor:
    """How much the direction of a factor (B, K, H, W) varies over samples: 0 for a constant one, at most 1; a scalar.

    The mean squared distance of the normalised factors from their mean.

    >>> variety(torch.ones(8, 2, 1, 1)).item()
    0.0
    >>> variety(torch.eye(2).view(2, 2, 1, 1)).item()
    0.5
    """
    unit = normalize_factor(factor)
    return (unit.square().sum(1).mean() - unit.mean(0).square().sum()).clamp_min(0)


def relative_variety(factor: Tensor, reference: Tensor) -> Tensor:
    """`variety` of a factor over that of what it should follow; 1 where there is nothing to follow; a scalar."""
    wanted = variety(reference)
    return torch.where(wanted > 0, variety(factor) / wanted.clamp_min(1e-12), 1.0)


def not_finite(values: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """The names of tensors that hold a value which is not finite.

    >>> not_finite([("a", torch.tensor(1.0)), ("b", torch.tensor([0.0, float("nan")])), ("c", None)])
    ['b']
    """
    return [name for name, value in values if value is not None and not bool(value.isfinite().all())]


@torch.no_grad()
def first_bad_layer(module: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first submodule, in order of computation, whose output is not finite while `forward` runs; None if all are.

    Args:
        module: what `forward` runs.
        forward: runs it.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    >>> _ = nn.init.constant_(net[1].weight, float("inf"))
    >>> first_bad_layer(net, lambda: net(torch.ones(1, 2)))
    '1'
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            leaves = [(name, leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if not found:
                found.extend(not_finite(leaves)[:1])

        return hook

    handles = [part.register_forward_hook(look(name)) for name, part in module.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
