"""torchvision's networks, such that their arguments rebuild them without their weights."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torchvision.models
from torch import nn

from factor_transfer.networks.weights import head_places, load_all

TORCHVISION, TORCHVISION_CLASSES = "torchvision/", 1000
"""How names of torchvision's begin, and the classes of its weights."""


def build(
    name: str, num_classes: int, args: Mapping[str, Any], *, pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """torchvision's network, and the arguments that build its like, `num_classes` among them.

    With its own weights it is the very network that there is without them: a head for other classes than theirs is
    drawn anew, and so are auxiliary heads that are asked for.

    Args:
        name: torchvision/NAME.
        num_classes: N of its head.
        args: further arguments of its constructor.
        pretrained: it shall have torchvision's weights.
    """
    plain, more = name.removeprefix(TORCHVISION), dict(args)
    if not pretrained:
        return _bare(plain, num_classes, more), {"num_classes": num_classes, **more}
    # With weights it is built with auxiliary heads, asked for or not.
    whole = torchvision.models.get_model(
        plain, weights="DEFAULT", **{k: v for k, v in more.items() if k != "aux_logits"}
    )
    more = _set_by_weights(whole, plain, more) | more
    module = _bare(plain, num_classes, more)
    own, there = module.state_dict(), whole.state_dict()
    head = head_places(module) if num_classes != TORCHVISION_CLASSES else []
    fits = {key: value for key, value in there.items() if key in own and value.shape == own[key].shape}
    aux = [key for key in own if key.startswith(("aux", "Aux")) and key not in fits]
    drawn = {key: own[key] for key in own if key.rpartition(".")[0] in head or key in aux}
    load_all(module, fits | drawn)
    return module, {"num_classes": num_classes, **more}


def _bare(plain: str, num_classes: int, args: Mapping[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of first weights that another version will draw
        return torchvision.models.get_model(plain, weights=None, num_classes=num_classes, **args)  # type: ignore[no-any-return]


def _set_by_weights(whole: nn.Module, plain: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that weights set unasked, as GoogLeNet's `transform_input`."""
    with torch.random.fork_rng(devices=[]):  # on the CPU: RegNet computes its sizes with tensors
        bare = _bare(plain, TORCHVISION_CLASSES, args)
    names = set(inspect.signature(type(whole).__init__).parameters) & vars(whole).keys() & vars(bare).keys()
    return {name: vars(whole)[name] for name in sorted(names) if vars(whole)[name] != vars(bare)[name]}
