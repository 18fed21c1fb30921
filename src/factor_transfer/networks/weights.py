"""Weights into a network: all of what it needs, and nothing else; finite, and data, never code.

A head of another size is a choice, not a mismatch. `weightfiles` reads files, `unwrap` finds the weights in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from factor_transfer.method.factor_transfer import Paraphraser, factor_channels, load_reference_paraphraser
from factor_transfer.method.health import not_finite
from factor_transfer.networks.trunk import conv_head
from factor_transfer.networks.unwrap import COUNTER, take
from factor_transfer.networks.weightfiles import identify, read_tensors, split_key
from factor_transfer.util.errors import ModelError, listed

STATISTICS = ("running_mean", "running_var")
"""Buffers that are computed with as weights are."""


def load_weights(module: nn.Module, path: str | Path, given: str) -> None:
    """Load a safetensors or torch file into `module`, strictly.

    Raises:
        ModelError: the file is missing or unreadable, or does not fit; the message begins with `given` and lists what
            is missing, unexpected and of wrong shape.
    """
    file, key = split_key(path)
    _load_state(module, take(read_tensors(file, given), module.state_dict(), given, key).state, given)


def check_finite(module: nn.Module, given: str) -> None:
    """That a network can compute: no weight and no statistic of it is NaN or infinite.

    Other buffers may be infinite, as masks of attention are.

    Raises:
        ModelError: a tensor is not; the message names it.
    """
    state = module.state_dict(keep_vars=True)
    masks = {
        name
        for name, value in state.items()
        if not isinstance(value, nn.Parameter) and not name.endswith(STATISTICS) and not bool(value.isnan().any())
    }
    bad = not_finite((name, value) for name, value in state.items() if name not in masks and _is_float(value))
    if bad:
        raise ModelError(
            given,
            found=f"{len(bad)} of {len(state)} tensors that are not finite (NaN or infinite values): {listed(bad)}",
            valid="finite weights",
            hint="the training that made them had diverged: give weights of before that",
        )


def load_paraphraser(path: str | Path, *, channels: int, k: float, batch_norm: bool = False) -> Paraphraser:
    """A trained paraphraser: `paraphraser.safetensors` of a run, or the authors' published `.pth`.

    Args:
        path: the file.
        channels: channels C of the teacher's map that it must fit.
        k: the paraphrase rate that it must have.
        batch_norm: whether it must have batch norm.

    Raises:
        ModelError: it is missing, unreadable, or made for another size.
    """
    given = f"--paraphraser {path}"
    kind = identify(Path(path), given)
    if kind.reader is None:
        raise ModelError(given, found=kind.what, valid="paraphraser.safetensors of a run", hint=kind.hint)
    if kind.reader == "safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                sizes = json.loads((file.metadata() or {})["paraphraser"])
            paraphraser = Paraphraser(**sizes)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ModelError(
                given, found=f"no paraphraser ({error})", valid="paraphraser.safetensors of a run"
            ) from error
        load_weights(paraphraser, path, given)
    else:
        read_tensors(Path(path), given)  # which says what is wrong with the file itself
        try:
            paraphraser = load_reference_paraphraser(path)
        except ModelError as error:
            raise ModelError(given, found=error.found, valid=error.valid) from error
    wanted = channels, factor_channels(channels, k)
    found = paraphraser.in_channels, paraphraser.factor_channels
    if found != wanted:
        raise ModelError(
            given,
            found=f"made for {found[0]} teacher channels and {found[1]} factor channels",
            valid=f"one for {wanted[0]} teacher channels and {wanted[1]} factor channels (--k {k:g})",
            hint="leave --paraphraser out to train one here, or give the --k and --teacher-layer it was made with",
        )
    if paraphraser.batch_norm != batch_norm:
        made, hint = ("with", "give") if paraphraser.batch_norm else ("without", "leave out")
        raise ModelError(given, found=f"made {made} batch norm", hint=f"{hint} --factor-batch-norm")
    return paraphraser


def paraphraser_metadata(paraphraser: Paraphraser) -> dict[str, str]:
    """What `load_paraphraser` reads back: its sizes, for the header of its file."""
    sizes = {name: getattr(paraphraser, name) for name in ("in_channels", "factor_channels", "batch_norm")}
    return {"paraphraser": json.dumps(sizes)}


def load_but_head(module: nn.Module, weights: str, given: str) -> tuple[bool, str]:
    """Load a file of weights, whose head may be for other classes, or not there (a self-supervised backbone).

    Args:
        module: the network, with a head for the classes that it shall have.
        weights: the file, or FILE:KEY where it holds several sets of weights.
        given: the setting that named it, for messages.

    Returns:
        Whether the file has no head for these classes, so that the network keeps its own; and which of its tensors
        were taken, where it holds more than the weights alone.

    Raises:
        ModelError: as `load_weights`; or several sets of weights in the file fit, and differ.
    """
    file, key = split_key(weights)
    own, places = module.state_dict(), head_places(module)
    taken = take(read_tensors(file, given), own, given.removesuffix(f":{key}"), key, places)
    state = taken.state
    head = [name for name in own if name.rpartition(".")[0] in places]
    if not head:  # the network shall have none, whatever the file has
        state = {name: value for name, value in state.items() if name.rpartition(".")[0] not in places}
    bare = hasattr(module, "get_classifier") and not any(name in state for name in head)
    other = bool(head) and (bare or any(state[n].shape[0] != own[n].shape[0] for n in head if n in state))
    if other:
        state = state | {name: own[name] for name in head if bare or name in state}
    _load_state(module, state, given)
    return other, taken.said


def head_places(module: nn.Module) -> list[str]:
    """Names of the last layer: timm's classifier, or else the last linear layer, or else a last 1x1 convolution.

    >>> head_places(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    ['2']
    """
    find: Any = getattr(module, "get_classifier", None)
    classifier = find() if find is not None else None
    parts = [(name, part) for name, part in module.named_modules() if name]
    if classifier is None:
        linear = [name for name, part in parts if isinstance(part, nn.Linear)]
        return linear[-1:] or list(filter(None, [conv_head(module)]))
    return [name for name, part in parts if part is classifier]


def _load_state(module: nn.Module, state: Mapping[str, Tensor], given: str) -> None:
    own = module.state_dict()
    # Files of before torch 0.4.1 lack batch norm's counter, which counts and is not computed with.
    counters = {name: value for name, value in own.items() if name.endswith(COUNTER)}
    state = counters | dict(state)
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of wrong shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if own[name].shape != state[name].shape
        ],
        "of wrong type": [
            f"{name} {state[name].dtype} instead of {own[name].dtype}"
            for name in sorted(own.keys() & state.keys())
            if _is_float(own[name]) != _is_float(state[name])
        ],
    }
    wrong = [f"{len(names)} {problem} ({listed(names)})" for problem, names in problems.items() if names]
    if wrong:
        raise ModelError(
            given,
            found=f"tensors that do not fit {type(module).__name__}: " + "; ".join(wrong),
            valid=f"all {len(own)} tensors of the network, and no other",
            hint="check that the weights are of this very network and of these constructor arguments",
        )
    load_all(module, state)
    check_finite(module, given)


def load_all(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load tensors for every name of a module's state.

    Files hold tensors alone. A module's state also has the version of each part, without which MNASNet loads nothing.
    """
    own = module.state_dict()
    assert own.keys() == state.keys()
    own.update(state)
    module.load_state_dict(own)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()
