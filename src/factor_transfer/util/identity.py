"""One hash over what a network, a term's reader or an augmentation computes: its code, structure and plain values.

Weights are not part of it: see `state_fingerprint`. Code of the user and of this package counts by its source without
comments, code of installed libraries by the library's version. What a function reads from its module, its closure and
its defaults is followed. State inside C code and files that are read later are not seen. So results that are stored
under such a hash must be spot-checked against fresh ones, as the factor cache does.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import logging
import os
import pickle
import sys
import sysconfig
import textwrap
import types
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BOOKKEEPING = frozenset({"training", "_parameters", "_modules", "_buffers", "_non_persistent_buffers_set",
    "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_compiled_call_impl"})  # fmt: skip
"""Attributes that torch keeps in every module. Forward hooks and buffers that are not saved are added separately."""

LABELS = frozenset({"pretrained_cfg", "default_cfg"})
"""Attributes of timm's networks that say where weights came from. No output depends on them."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))


def code_fingerprint(*values: Any, versions: bool = True) -> str:
    """SHA-256, in hex, of all that `values` compute besides their weights.

    Args:
        values: modules, functions, objects that are called, or plain values.
        versions: tell versions of libraries apart. Without, only the user's own changes are seen.

    >>> code_fingerprint(nn.Sequential(nn.ReLU())) == code_fingerprint(nn.Sequential(nn.ReLU()))
    True
    >>> code_fingerprint(nn.Sequential(nn.ReLU())) == code_fingerprint(nn.Sequential(nn.GELU()))
    False
    >>> code_fingerprint(nn.LeakyReLU(0.1)) == code_fingerprint(nn.LeakyReLU(0.2))
    False
    """
    return _Walk(versions).over(values)


class _Walk:
    """One walk over everything that can be reached; each object is looked at once.

    Args:
        versions: see `code_fingerprint`.
        ranks: this walk only sorts the objects of a set. It enters no other set, which could lead back to the first.
    """

    def __init__(self, versions: bool, ranks: bool = False) -> None:
        self.digest, self.versions, self.ranks = hashlib.sha256(), versions, ranks
        self.places: dict[int, int] = {}  # of objects, by id
        self.found: list[Any] = []  # the objects, held so that no other one gets their id

    def over(self, value: Any) -> str:
        """The hash of all that can be reached from `value`, breadth first: chains may be long."""
        self.add(value)
        for place, each in enumerate(self.found):  # which grows meanwhile
            self.note("object", place)
            self._look(each)
        return self.digest.hexdigest()

    def note(self, *words: Any) -> None:
        """Add words to the hash."""
        self.digest.update(("\0".join(map(str, words)) + "\n").encode(errors="surrogateescape"))

    def add(self, value: Any) -> None:
        """Add any value."""
        if isinstance(value, PLAIN):
            self.note(type(value).__name__, repr(value))
            return
        if id(value) not in self.places:
            self.places[id(value)] = len(self.found)
            self.found.append(value)
        self.note("see", self.places[id(value)])

    def _look(self, value: Any) -> None:
        kinds: tuple[tuple[Any, Any], ...] = (
            (Tensor, self._array), (np.ndarray, self._array), (nn.Module, self._module), (type, self._class),
            (types.FunctionType, self._function), (types.MethodType, self._method),
            (functools.partial, self._partial), (types.ModuleType, self._imported),
            (types.BuiltinFunctionType, self._named), (types.CodeType, self._code),
            (logging.Logger, self._logger), (type(os.environ), self._environment), (Mapping, self._mapping),
            ((list, tuple), self._sequence), ((set, frozenset), self._set),
        )  # fmt: skip
        next((look for kind, look in kinds if isinstance(value, kind)), self._object)(value)

    # -- values

    def _array(self, value: Tensor | np.ndarray) -> None:
        values = value.detach().cpu().contiguous() if isinstance(value, Tensor) else np.ascontiguousarray(value)
        self.note("array", values.dtype, tuple(values.shape))
        if isinstance(values, Tensor):
            values = values.reshape(-1).view(torch.uint8).numpy()
        self.digest.update(values.tobytes())

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self.note(type(value).__name__, len(value))
        names = list(value)
        for name in sorted(names) if all(isinstance(each, str) for each in names) else names:
            self.add(name)
            self.add(value[name])

    def _sequence(self, value: list[Any] | tuple[Any, ...]) -> None:
        self.note(type(value).__name__, len(value))
        for each in value:
            self.add(each)

    def _set(self, value: set[Any] | frozenset[Any]) -> None:
        plain = [each for each in value if isinstance(each, PLAIN)]
        self.note(type(value).__name__, *sorted(code_fingerprint(each, versions=self.versions) for each in plain))
        others = [each for each in value if not isinstance(each, PLAIN)]
        if len(others) > 1 and self.ranks:
            self.note(*sorted(getattr(each, "__qualname__", type(each).__qualname__) for each in others))
            return
        if len(others) > 1:
            others.sort(key=lambda each: _Walk(self.versions, ranks=True).over(each))
        for each in others:
            self.add(each)

    def _logger(self, value: logging.Logger) -> None:
        """By its name: a logger refers to all others, and keeps what was logged."""
        self.note("logger", value.name)

    def _environment(self, _: Mapping[str, str]) -> None:
        """It differs from one process to the next."""
        self.note("environment")

    # -- code

    def _class(self, value: type) -> None:
        self.note("class", value.__module__, value.__qualname__)
        if self._library(value.__module__):
            return
        source = _source(value)
        self.note(source)
        for base in value.__bases__:
            self.add(base)
        for name, member in sorted(vars(value).items()):
            function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)) or member)
            if isinstance(function, types.FunctionType):
                self._reads(function)
            elif not name.startswith("__") and not callable(member) and not hasattr(member, "__get__"):
                self.note(name)
                self.add(member)

    def _function(self, value: types.FunctionType) -> None:
        self.note("function", value.__module__, value.__qualname__)
        if self._library(value.__module__):
            self.add([cell.cell_contents for cell in value.__closure__ or () if _filled(cell)])
            return
        source = _source(value)
        self.note(source)
        if not source or value.__name__ == "<lambda>":  # whose source is the whole line, perhaps with others on it
            self._code(value.__code__)
        self._reads(value)

    def _reads(self, value: types.FunctionType) -> None:
        """What a function reads besides its arguments."""
        self.add([value.__defaults__, value.__kwdefaults__])
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        for name, cell in cells:
            if _filled(cell) and name != "__class__":
                self.note(name)
                self.add(cell.cell_contents)
        for name in sorted(_names(value.__code__)):
            if name in value.__globals__:
                self.note(name)
                self.add(value.__globals__[name])

    def _code(self, value: types.CodeType) -> None:
        self.note("code", value.co_code.hex(), value.co_names, value.co_varnames)
        for constant in value.co_consts:
            self.add(constant)

    def _method(self, value: types.MethodType) -> None:
        self.note("method")
        self.add(value.__func__)
        self.add(value.__self__)

    def _partial(self, value: functools.partial[Any]) -> None:
        self.note("partial")
        self.add([value.func, value.args, value.keywords])

    def _named(self, value: Any) -> None:
        self.note("builtin", value.__module__, value.__qualname__)

    def _imported(self, value: types.ModuleType) -> None:
        self.note("module", value.__name__)
        if not self._library(value.__name__):
            file = getattr(value, "__file__", None)
            self.note(hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else "")

    def _library(self, name: str | None) -> bool:
        """Whether a module's code is an installed library's, which its version tells apart; notes that version."""
        top = (name or "builtins").partition(".")[0]
        found = _package(top)
        if found is not None and self.versions:
            self.note(top, found)
        return found is not None

    # -- objects

    def _module(self, value: nn.Module) -> None:
        self.note("network")
        self.add(type(value))
        self.add({name: each for name, each in vars(value).items() if name not in BOOKKEEPING | LABELS})
        self.add([*value._forward_pre_hooks.values(), *value._forward_hooks.values()])
        self.note(*((name, None if each is None else tuple(each.shape)) for name, each in value._parameters.items()))
        self.add({name: value._buffers[name] for name in value._non_persistent_buffers_set})
        for name, part in value._modules.items():
            self.note(name)
            self.add(part)

    def _object(self, value: Any) -> None:
        self.note("object")
        self.add(type(value))
        state = dict(vars(value)) if hasattr(value, "__dict__") else {}
        slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
        state |= {name: getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)}
        if state:
            self.add(state)
            return
        try:
            self.note(hashlib.sha256(pickle.dumps(value)).hexdigest())
        except Exception:  # whatever an object raises that cannot be pickled: its class is all that is known
            self.note("opaque")


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (empty cells raise)
    except ValueError:
        return False
    return True


def _names(code: types.CodeType) -> set[str]:
    """Names that code reads, that of functions within it, too."""
    within = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, within))


@functools.cache
def _source(value: Any) -> str:
    """Its source without comments and layout; empty where there is none."""
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(value))))
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""


@functools.cache
def _package(top: str) -> str | None:
    """The version of an installed library; None for code of the user's, and for this package's own."""
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        return f"{sys.version_info[0]}.{sys.version_info[1]}"
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    if top == "factor_transfer" or not any(Path(file).is_relative_to(place) for place in places):
        return None
    own = getattr(sys.modules[top], "__version__", None)
    if isinstance(own, str):
        return own
    try:
        return version(top)
    except PackageNotFoundError:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
