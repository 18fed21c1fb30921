"""Find the logits in whatever a network returns. This is done once, when the network is loaded.

A network may give a plain tensor, or tensors in dicts, tuples, lists, named tuples, dataclasses and objects like them;
and may return another form in training than in evaluation (GoogLeNet's auxiliary logits). A forward hook on the network
then picks the logits, so that every caller gets a plain tensor. The names of its parameters stay the same.

Shapes: B images, N classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from factor_transfer.util.arguments import Size
from factor_transfer.util.errors import ModelError, listed
from factor_transfer.util.seeds import seeded

LOGITS = "logits"
"""Name of the output that is taken as the logits, if there is one."""

DENSE = "out"
"""The same of networks that give a map of logits: torchvision's name."""


def tensors(output: Any, at: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in an output, in order, by name: keys, fields and indices, with dots between them.

    >>> [name for name, _ in tensors({"logits": torch.zeros(2, 5), "exits": [torch.zeros(2, 5), None]})]
    ['logits', 'exits.0']
    """
    if isinstance(output, Tensor):
        yield at, output
        return
    for name, part in _parts(output).items():
        yield from tensors(part, f"{at}.{name}" if at else name)


def tensor_at(output: Any, name: str) -> Tensor:
    """The tensor of that name; the numbers of named tuples, and those that count from the end, are names as well.

    Raises:
        KeyError: there is none.

    >>> tensor_at((torch.zeros(1), torch.ones(1)), "-1")
    tensor([1.])
    """
    found = output
    for each in name.split(".") if name else ():
        parts = _parts(found)
        if isinstance(found, (tuple, list)) and each.lstrip("-").isdecimal():
            place = int(each)
            if not -len(found) <= place < len(found):
                raise KeyError(name)
            found = found[place]
        else:
            found = parts[each]
    if not isinstance(found, Tensor):
        raise KeyError(name)
    return found


def _parts(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(name): part for name, part in output.items()}
    if isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", map(str, range(len(output))))
        return dict(zip(names, output, strict=True))
    if is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return dict(getattr(output, "__dict__", {}))


@dataclass(frozen=True)
class Choice:
    """Which tensor of a network's output is the logits."""

    name: str
    """Of the tensor; empty for a plain one."""
    output: Tensor
    others: tuple[str, ...] = ()
    """The other tensors' names and shapes."""


def choose(output: Any, classes: int, wanted: str | None, given: str, *, dense: bool = False) -> Choice | None:
    """The logits (B, N) in an output: the tensor `wanted`, the one that is called logits, or the only one of the shape.

    Args:
        output: what a network gave.
        classes: N.
        wanted: name of the tensor, where it is given.
        given: the setting that names it, for messages.
        dense: the logits are a map (B, N, h, w).

    Returns:
        None where nothing has the shape of logits.

    Raises:
        ModelError: several could be the logits, or there is no tensor of the name.
    """
    there = dict(tensors(output))
    shapes = {name: "x".join(map(str, each.shape[1:])) for name, each in there.items()}
    fitting = {name: each for name, each in there.items() if _fits(each, classes, dense=dense)}
    if wanted is not None and not isinstance(output, Tensor):
        try:
            chosen = tensor_at(output, wanted)
        except KeyError:
            raise ModelError(f"{given} {wanted}", found="no output of that name", valid=_listed(shapes)) from None
        name = next(name for name, each in there.items() if each is chosen)
    elif not fitting and isinstance(output, Tensor):
        return None
    else:
        usual = {LOGITS, DENSE} if dense else {LOGITS}
        named = [name for name in (fitting if dense else there) if name.rpartition(".")[2] in usual]
        found = named if len(named) == 1 else list(fitting)
        if len(found) > 1:
            raise ModelError(
                given,
                found=f"{len(found)} outputs that could be the logits",
                valid=_listed({name: shapes[name] for name in found}),
                hint=f"name the one that is trained and measured: {given} {found[-1]}",
            )
        if not found:
            return None
        (name,) = found
    return Choice(name, there[name], tuple(f"{other} ({shapes[other]})" for other in there if other != name))


def _fits(tensor: Tensor, classes: int, *, dense: bool) -> bool:
    return tensor.ndim == (4 if dense else 2) and tensor.is_floating_point() and tensor.shape[1] == classes


def _listed(shapes: Mapping[str, str]) -> str:
    return listed([f"{name} ({shape})" for name, shape in shapes.items()])


class Unwrap:
    """A forward hook that replaces a network's output by one of its tensors.

    Args:
        evaluation: name of the tensor in eval mode.
        training: name in training mode; or the error to raise in training mode, where it has no logits.
    """

    def __init__(self, evaluation: str, training: str | ModelError) -> None:
        self.evaluation, self.training = evaluation, training

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        """The tensor for the mode (training or evaluation) that the network is in."""
        if isinstance(output, Tensor):
            return output
        name = self.training if module.training else self.evaluation
        if isinstance(name, ModelError):
            raise name
        return tensor_at(output, name)


@torch.no_grad()
def given_by(module: nn.Module, size: Size, count: int, *, foreign: bool) -> tuple[Any, Any]:
    """What a network gives for `count` images of `size`, in eval mode and in training mode.

    A copy gives it. What training mode gives is None where the network fails in it, and where it is not `foreign`:
    timm's networks give one tensor in both modes.
    """
    copy = deepcopy(module).cpu().float().eval()
    images = torch.zeros(count, 3, *size)
    output = copy(images)
    if not foreign:
        return output, None
    try:
        with seeded(0):
            return output, copy.train()(images)
    except Exception:  # a network for evaluation only may raise anything; training it raises an error later
        return output, None


def unwrap(
    output: Any,
    training: Any,
    chosen: Choice | None,
    classes: int,
    wanted: str | None,
    given: str,
    *,
    dense: bool = False,
) -> tuple[Unwrap, str, str]:
    """The hook for a network that gives `output` in eval mode and `training` in training mode.

    Args:
        output: in eval mode.
        training: in training mode, where that is known.
        chosen: the logits in `output`; without them its first tensor is taken.
        classes: N.
        wanted: name of the tensor, where it is given.
        given: the setting that names it, for messages.
        dense: the logits are a map.

    Returns:
        The hook, the name of the output that is read, and what a user is told.
    """
    first = next((name for name, _ in tensors(output)), "")
    evaluation = chosen.name if chosen else first
    trained: str | ModelError = evaluation
    others = chosen.others if chosen else ()
    if not (training is None or isinstance(training, Tensor)):
        same = wanted if wanted is not None else evaluation
        there = {name for name, _ in tensors(training)}
        try:
            name = same if wanted is not None or same in there else None
            found = choose(training, classes, name, given, dense=dense)
        except ModelError as error:
            trained = error
        else:
            none = ModelError(given, found="no logits among its outputs in training mode", valid=sorted(there))
            trained, others = (found.name, found.others) if found else (none, others)
    name = evaluation or (trained if isinstance(trained, str) else "")
    beside = f"; nothing reads {listed(others)}" if others else ""
    return Unwrap(evaluation, trained), name, f"its logits are its output {name or 'of evaluation'}{beside}"
