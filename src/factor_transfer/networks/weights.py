"""Load weights into a network, strictly: every tensor that it has, no other, all finite.

A head for another number of classes is no mismatch: the network then keeps its own, new head. `weightfiles` reads the
file. `take` finds the network's tensors in it, inside containers (`state_dict`, `model`, `ema`, ...) and behind
prefixes (`module.`, `net.`, `teacher.`, ...). There is no list of such names: a set of weights is whatever lies under
one prefix and has the network's own names and shapes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from factor_transfer.method.factor_transfer import Paraphraser, factor_channels, load_reference_paraphraser
from factor_transfer.method.health import not_finite
from factor_transfer.method.slim import AnyParaphraser, SlimParaphraser
from factor_transfer.networks.layers import conv_head
from factor_transfer.networks.weightfiles import Tensors, identify, read_tensors, split_key
from factor_transfer.util.errors import ModelError, listed, near

BOOKKEEPING = frozenset({"n_averaged", "total_ops", "total_params"})
"""Last parts of the names of tensors that torch's averages (SWA) and profilers (thop) add to the weights."""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts that data parallelism, torch.compile, FSDP and activation checkpointing insert into names."""

COUNTER = "num_batches_tracked"
"""Batch norm's counter. Files from before torch 0.4.1 lack it, and no output depends on it."""

STATISTICS = ("running_mean", "running_var")
"""Names of buffers that must be finite, like weights."""


def load_weights(module: nn.Module, path: str | Path, given: str) -> None:
    """Load a safetensors or torch file into `module`, strictly.

    Raises:
        ModelError: the file is missing or unreadable, or does not fit; the message begins with `given` and lists what
            is missing, unexpected and of wrong shape.
    """
    file, key = split_key(path)
    _load_state(module, take(read_tensors(file, given), module.state_dict(), given, key).state, given)


def check_finite(module: nn.Module, given: str) -> None:
    """Check that no weight and no batch-norm statistic of a network is NaN or infinite.

    Other buffers may be infinite: masks of attention are.

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
            hint="the training that made them had diverged: give weights from before that",
        )


def load_paraphraser(
    path: str | Path, *, channels: int, k: float, batch_norm: bool = False, width: int | None = None
) -> AnyParaphraser:
    """A trained paraphraser: `paraphraser.safetensors` of a run, or the authors' published `.pth`.

    Args:
        path: the file.
        channels: channels C of the teacher's map that it must fit.
        k: the paraphrase rate that it must have.
        batch_norm: whether it must have batch norm.
        width: channels that it must reduce the map to, in the slim form; None: the paper's form.

    Raises:
        ModelError: it is missing, unreadable, or made for another size.
    """
    given = f"--paraphraser {path}"
    paraphraser = _unloaded(path, given)
    if paraphraser is not None:
        load_weights(paraphraser, path, given)
    else:
        read_tensors(Path(path), given)  # it raises the errors of the file itself
        try:
            paraphraser = load_reference_paraphraser(path)
        except ModelError as error:
            raise ModelError(given, found=error.found, valid=error.valid) from error
    _check_form(given, getattr(paraphraser, "width", None), width)
    wanted = channels, factor_channels(width or channels, k)
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


def width_in(path: str | Path) -> int | None:
    """The width that the slim paraphraser in a file reduces maps to; None where it has the paper's form.

    Raises:
        ModelError: there is no paraphraser in the file.
    """
    found = _unloaded(path, f"--paraphraser {path}")
    return found.width if isinstance(found, SlimParaphraser) else None


def _unloaded(path: str | Path, given: str) -> AnyParaphraser | None:
    """The paraphraser that a run's file holds, without its weights; None for a torch file, such as the authors'."""
    kind, valid = identify(Path(path), given), "paraphraser.safetensors of a run"
    if kind.reader is None:
        raise ModelError(given, found=kind.what, valid=valid, hint=kind.hint)
    if kind.reader != "safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            sizes = json.loads((file.metadata() or {})["paraphraser"])
        return SlimParaphraser(**sizes) if "width" in sizes else Paraphraser(**sizes)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ModelError(given, found=f"no paraphraser ({error})", valid=valid) from error


def _check_form(given: str, found: int | None, wanted: int | None) -> None:
    """That a paraphraser reduces its map to the wanted width; None: not at all."""
    if found == wanted:
        return
    words = [
        f"one of the slim form, which reduces the map to {width} channels" if width else "one of the paper's form"
        for width in (found, wanted)
    ]
    form = f"--factor-form slim --factor-width {found}" if found else "--factor-form paper"
    raise ModelError(given, found=words[0], valid=words[1], hint=f"give {form}, or leave --paraphraser out")


def paraphraser_metadata(paraphraser: AnyParaphraser) -> dict[str, str]:
    """What `load_paraphraser` reads back: its sizes, for the header of its file."""
    names = ("in_channels", "factor_channels", "batch_norm", "width")
    sizes = {name: getattr(paraphraser, name) for name in names if hasattr(paraphraser, name)}
    return {"paraphraser": json.dumps(sizes)}


def load_but_head(module: nn.Module, weights: str, given: str) -> tuple[bool, str]:
    """Load a file of weights, whose head may be for other classes, or not there (a self-supervised backbone).

    Args:
        module: the network, with a head for the wanted classes.
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
    if not head:  # the network has no head: that of the file is left out
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
    # Files from before torch 0.4.1 lack batch norm's counter, which no output depends on.
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

    The state dict of a module also has the version of each submodule, which files lack and MNASNet needs.
    """
    own = module.state_dict()
    assert own.keys() == state.keys()
    own.update(state)
    module.load_state_dict(own)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


# -- which tensors of a file are a network's


@dataclass(frozen=True)
class Taken:
    """The tensors that were chosen, under the network's names, and what was done to get them."""

    state: dict[str, Tensor]
    said: str = ""
    """A note for the user; empty where the file holds the network's weights alone, under its names."""


@dataclass(frozen=True)
class _Set:
    """The tensors under a prefix."""

    prefix: str
    state: dict[str, Tensor]
    inner: bool = False
    """Wrappers in the middle of its names were taken away."""

    @property
    def name(self) -> str:
        return self.prefix.removesuffix(".")


def take(found: Tensors, own: Mapping[str, Tensor], given: str, key: str = "", head: Collection[str] = ()) -> Taken:
    """The one set of weights in a file that fits a network.

    Args:
        found: all tensors of the file.
        own: the network's state dict.
        given: what the user gave, for messages.
        key: where the user says that they lie; `` anywhere.
        head: the network's last layer, by name: its tensors may be missing in the file, or of another shape.

    Returns:
        What fits; where nothing does, what is nearest, for the caller to say why.

    Raises:
        ModelError: several sets fit and differ, or nothing lies under `key`.
    """
    names = {name: tensor for name, tensor in found.by_name.items() if not key or _under(name, key)}
    if not names:
        there = sorted({container for container in found.containers.values() if container})
        valid = near(key, there) or there or "no key: the file holds tensors by name alone"
        raise ModelError(f"{given}:{key}", found=f"no tensors under {key}", valid=valid)
    fitting: list[_Set] = []
    for inner in (False, True):
        sets = _sets(_unwrapped(names) if inner else names, own, head, inner=inner)
        fitting = [each for each in sets if _fits(each.state, own, head)]
        if fitting:
            break
    if not fitting:
        return Taken(_nearest(names, found, own))
    first, *others = fitting
    differing = [each for each in others if not _same(first.state, each.state)]
    if differing:
        raise _ambiguous(given, [first, *differing])
    return Taken(first.state, _said(first, others, found, names, key))


def _under(name: str, key: str) -> bool:
    return any(f"{each}.".startswith(f"{key}.") for each in (name, _without_wrappers(name)))


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _unwrapped(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without wrappers in the middle of names; nothing, where two names would become one."""
    made = {_without_wrappers(name): each for name, each in names.items()}
    return made if len(made) == len(names) else {}


def _optional(name: str, head: Collection[str]) -> bool:
    """Whether a tensor may be missing: one of the head, or a counter."""
    return name.rpartition(".")[0] in head or name.endswith(COUNTER)


def _sets(names: Mapping[str, Tensor], own: Mapping[str, Tensor], head: Collection[str], *, inner: bool) -> list[_Set]:
    """What lies under every prefix that leaves the network's names, the shortest prefix first."""
    counts = _prefixes(names, own)
    needed = sum(1 for name in own if not _optional(name, head))
    prefixes = sorted((each for each, count in counts.items() if count >= max(needed, 1)), key=len)
    return [_Set(prefix, _below(names, prefix, own), inner) for prefix in prefixes]


def _prefixes(names: Collection[str], own: Collection[str]) -> Counter[str]:
    """How many of the network's names are found behind each prefix."""
    counts: Counter[str] = Counter()
    for name in names:
        start = 0
        while True:
            if name[start:] in own:
                counts[name[:start]] += 1
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    return counts


def _below(names: Mapping[str, Tensor], prefix: str, own: Collection[str]) -> dict[str, Tensor]:
    """The tensors behind a prefix, without bookkeeping that the network does not have."""
    below = {name[len(prefix) :]: tensor for name, tensor in names.items() if name.startswith(prefix)}
    return {n: tensor for n, tensor in below.items() if n in own or n.rpartition(".")[2] not in BOOKKEEPING}


def _fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor], head: Collection[str]) -> bool:
    """Whether a set has all of the network's tensors and no other; the head may be another or missing."""
    body = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in head}
    missing = any(not _optional(name, head) for name in own.keys() - state.keys())
    return not missing and all(name in own and tensor.shape == own[name].shape for name, tensor in body.items())


def _nearest(names: Mapping[str, Tensor], found: Tensors, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What has most names in common with the network; where none has any, the largest dict of the file."""
    counts = _prefixes(names, own)
    if counts:
        return _below(names, max(counts, key=lambda prefix: (counts[prefix], -len(prefix))), own)
    largest = Counter(found.containers[name] for name in names).most_common(1)[0][0]
    return _below(names, f"{largest}." if largest else "", own)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    names = {name for name in one.keys() | other.keys() if not name.endswith(COUNTER)}
    return names <= one.keys() & other.keys() and all(torch.equal(one[name], other[name]) for name in names)


def _ambiguous(given: str, sets: list[_Set]) -> ModelError:
    """The error for several sets that fit. Nothing tells which is better: a young average is worse than the weights."""
    names = [each.name or "the file itself" for each in sets]
    averages = [name for name in names if "ema" in name.lower() or "averag" in name.lower() or "swa" in name.lower()]
    meant = f" ({listed(averages)}: an average, by its name)" if averages else ""
    return ModelError(
        given,
        found=f"{len(sets)} sets of weights that fit this network, and differ: {listed(names)}{meant}",
        valid="one of them",
        hint="say which: " + " or ".join(f"{given}:{each.name}" for each in sets[:6] if each.name),
    )


def _said(taken: _Set, others: list[_Set], found: Tensors, names: Mapping[str, Tensor], key: str) -> str:
    """What was taken and why, and what was left."""
    left = _left_out(taken, found, names)
    plain = not taken.prefix and not taken.inner
    parts = []
    if not plain:
        why = "as was asked for" if key else "the only ones in the file that fit"
        if others:
            why = f"the same as {listed([each.name for each in others])}"
        parts.append(f"its weights are those under {taken.name}, {why}" if taken.prefix else "its weights fit")
    if taken.inner:
        parts.append(f"without the wrappers in the middle of their names ({', '.join(sorted(_wrappers(names)))})")
    if left:
        parts.append(f"left out: {len(left)} other tensors there ({listed(left)})")
    return "; ".join(parts)


def _wrappers(names: Collection[str]) -> set[str]:
    return {part for name in names for part in name.split(".")} & WRAPPERS


def _left_out(taken: _Set, found: Tensors, names: Collection[str]) -> list[str]:
    """Tensors that were not taken, of the dicts from which some were: names as the file has them, sorted."""
    taken_names = {taken.prefix + name for name in taken.state}
    used = {name for name in names if (_without_wrappers(name) if taken.inner else name) in taken_names}
    containers = {found.containers[name] for name in used}
    return sorted(name for name in names if name not in used and found.containers[name] in containers)
