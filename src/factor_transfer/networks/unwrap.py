"""Which tensors of a file are a network's: what fits strictly once a container or a common prefix is taken away.

There is no list of containers (`state_dict`, `model`, `ema`, ...) and prefixes (`module.`, `net.`, `teacher.`, ...).
A set of weights is whatever lies under one prefix and has the network's very names and shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from factor_transfer.networks.weightfiles import Tensors
from factor_transfer.util.errors import ModelError, listed, near

BOOKKEEPING = frozenset({"n_averaged", "total_ops", "total_params"})
"""What torch's averages (SWA) and profilers (thop) leave among the weights: last words of names."""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What data parallelism, torch.compile, FSDP and activation checkpointing put into the middle of names."""

COUNTER = "num_batches_tracked"
"""Batch norm's counter: files of before torch 0.4.1 lack it, and nothing is computed with it."""


@dataclass(frozen=True)
class Taken:
    """The tensors that were chosen, under the network's names, and what was done to get them."""

    state: dict[str, Tensor]
    said: str = ""
    """For the user; `` where the file holds the weights as they are, and nothing else."""


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
    """An average that is too young is worse than the weights, an old one better: only the user knows."""
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
