"""What is said of a setting beside its type, and the one check of it.

    lr: Annotated[float, Number(gt=0), ActsOn("teacher", "student")] = 0.1

A dataclass of settings calls `check` when it is made, a function `check_arguments` with what it was given. The limits
are cyclopts' `Number`: a tuple is held to them number by number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts.validators import Number

from factor_transfer.util.errors import ConfigError, listed

Part = Literal["teacher", "paraphraser", "student"]
"""What a run makes."""


class ActsOn:
    """Metadata of a setting: the parts of a run whose result depends on it.

    A setting without this metadata changes every part. `ActsOn()` changes none, so such a setting may be another one
    when a run is continued.

    Args:
        *parts: names of the parts.
        named: the setting is a place, and a fingerprint of what lies there is checked in its stead.
        machine: each process of a run may have its own.
        read_by: the weights of the terms that read the setting: it does nothing where they are all off.
        refused: whether the setting is refused there.
        swept: whether a comparison may vary the setting.
    """

    def __init__(
        self,
        *parts: Part,
        named: bool = False,
        machine: bool = False,
        read_by: Sequence[str] = (),
        refused: bool = False,
        swept: bool = True,
    ) -> None:
        self.parts, self.named, self.machine = frozenset(parts), named, machine
        self.read_by, self.refused, self.swept = tuple(read_by), refused, swept and bool(parts)


class Weight(ActsOn):
    """Metadata of the setting that gives a term of the student's loss its weight, and so declares the term.

    Args:
        term: the term's class, package.module:Class; None for a stage of its own.
        off: the setting's value in a method that does not name it.
        **presets: methods with the term that are compared by name, and the settings that make each.
    """

    def __init__(self, term: str | None, *, off: Any = 0.0, **presets: Mapping[str, Any]) -> None:
        super().__init__("student")
        self.term, self.off, self.presets = term, off, presets


def flag(name: str) -> str:
    """The flag of a field: `flag("teacher_lr")` is `--teacher-lr`."""
    return "--" + name.replace("_", "-")


def check(settings: Any) -> None:
    """Hold every field of a dataclass to its type and limits.

    Raises:
        ConfigError: a value does not fit; the message names the flag.
    """
    kind: Any = type(settings)
    _check({each.name: getattr(settings, each.name) for each in fields(settings)}, _hints(kind))


def check_arguments(function: Callable[..., Any], **values: Any) -> None:
    """Hold arguments of a function to the types and limits of its signature.

    >>> def show(top: Annotated[int, Number(gte=1)]) -> None: ...
    >>> check_arguments(show, top=3)

    Raises:
        ConfigError: a value does not fit; the message names the flag.
    """
    _check(values, _hints(function))


def acting_on(kind: type, part: Part) -> frozenset[str]:
    """The fields of a dataclass that change a part of a run."""
    return frozenset(name for name, acts in _acts(kind) if acts is None or part in acts.parts)


def free(kind: type) -> frozenset[str]:
    """The fields that may differ when a run is continued: they change no result, or a fingerprint stands for them."""
    return frozenset(name for name, acts in _acts(kind) if acts is not None and not acts.parts)


def named(kind: type) -> frozenset[str]:
    """The fields that say where something lies whose fingerprint is checked."""
    return frozenset(name for name, acts in _acts(kind) if acts is not None and acts.named)


def of_a_machine(kind: type) -> frozenset[str]:
    """The fields that each process of a run may have of its own."""
    return frozenset(name for name, acts in _acts(kind) if acts is not None and acts.machine)


def weights(kind: type) -> dict[str, Weight]:
    """The fields of a dataclass that are weights of terms, in order."""
    return {name: acts for name, acts in _acts(kind) if isinstance(acts, Weight)}


def said_of(kind: type, name: str) -> ActsOn | None:
    """What is said of a field: which parts it changes; None where it changes every part."""
    return dict(_acts(kind))[name]


def taken(kind: type, name: str) -> str:
    """What a field takes, in words.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Settings:
    ...     epochs: Annotated[int | Literal["auto"], Number(gt=0)] = 1
    >>> taken(Settings, "epochs")
    'a whole number above 0, or auto'
    """
    hint = _hints(kind)[name]
    return _described(hint, " and ".join(map(_limits, _numbers(hint))))


def read_by(kind: type, name: str) -> tuple[str, ...]:
    """The weights of the terms that read a field; of a weight, itself; none where the field is no term's."""
    found = said_of(kind, name)
    return (name,) if isinstance(found, Weight) else found.read_by if found is not None else ()


def refused(kind: type) -> dict[str, tuple[str, ...]]:
    """The fields that are refused where no term reads them, and the weights of the terms that do."""
    return {name: acts.read_by for name, acts in _acts(kind) if acts is not None and acts.refused}


def swept(kind: type) -> tuple[str, ...]:
    """The fields that a comparison may vary, in order."""
    return tuple(name for name, acts in _acts(kind) if acts is None or acts.swept)


@cache
def _hints(owner: Any) -> Mapping[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _acts(kind: type) -> Iterator[tuple[str, ActsOn | None]]:
    for each in fields(kind):
        metadata = getattr(_hints(kind)[each.name], "__metadata__", ())
        yield each.name, next((found for found in metadata if isinstance(found, ActsOn)), None)


def _check(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    for name, value in values.items():
        hint = hints[name]
        if isinstance(value, Mapping) and _takes_pairs(hint):
            _check_pairs(flag(name), value)
        limits = _numbers(hint)
        if not (_fits(value, hint) and all(_within(value, each) for each in limits)):
            plain = isinstance(value, (int, float)) or (isinstance(value, str) and value and _takes_words(hint))
            shown = value if plain else repr(value)
            raise ConfigError(f"{flag(name)} {shown}", valid=_described(hint, " and ".join(map(_limits, limits))))


def _takes_pairs(hint: Any) -> bool:
    """Whether a mapping can be a value."""
    return get_origin(hint) in {dict, Mapping} or any(map(_takes_pairs, get_args(hint)))


def _check_pairs(given: str, pairs: Mapping[Any, Any]) -> None:
    """Hold a mapping to what a run folder can keep and give back.

    Raises:
        ConfigError: a value that JSON does not hold, such as a class, at any depth.
    """
    for name, value in pairs.items():
        odd = _unkept({name: value})
        if odd is not None:
            kind = "a class" if isinstance(odd, type) else f"of type {type(odd).__name__}"
            raise ConfigError(
                f"{given} {name}={value!r}",
                found=f"{odd!r} is {kind}: the run folder cannot keep it, so the network could not be built again",
                valid='numbers, texts, True, False, None, and lists or name-value pairs of these; "silu", not nn.SiLU',
                hint="give a class by the name that timm has for it, or build the network and give that",
            )


def _unkept(value: Any) -> Any:
    """The first part of a value that JSON does not hold; None where there is none.

    >>> _unkept({"layers": (3, 3), "act": [int]}), _unkept({"act": "silu", "drop": None})
    (<class 'int'>, None)
    """
    if isinstance(value, Mapping):
        keys = (key for key in value if not isinstance(key, str))
        return next((each for each in (*keys, *map(_unkept, value.values())) if each is not None), None)
    if isinstance(value, (list, tuple)):
        return next((each for each in map(_unkept, value) if each is not None), None)
    return None if isinstance(value, (str, int, float)) else value


def _numbers(hint: Any) -> list[Number]:
    return [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Number)]


def _takes_words(hint: Any) -> bool:
    """Whether a text can be a value: where it cannot, a message quotes it, since '2' is no 2."""
    return hint is str or get_origin(hint) is Literal or any(map(_takes_words, get_args(hint)))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: numbers such as the machine has, texts not empty and without a zero byte."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin in {Union, UnionType}:
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if origin in {tuple, Sequence}:
        several = not isinstance(value, str) and isinstance(value, Sequence)
        each = arguments[:1] * len(value) if several and _any_length(hint) else arguments
        return several and len(value) == len(each) and all(map(_fits, value, each))
    if origin in {dict, Mapping}:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return _is(value, hint)


def _any_length(hint: Any) -> bool:
    return get_origin(hint) is Sequence or get_args(hint)[-1] is Ellipsis


def _is(value: Any, kind: Any) -> bool:
    """`_fits` for a plain type."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.maxsize
    if kind is str:
        return isinstance(value, str) and value != "" and "\0" not in value
    return isinstance(value, os.PathLike if kind is not NoneType and issubclass(kind, os.PathLike) else kind)


def _within(value: Any, limits: Number) -> bool:
    if isinstance(value, str):  # a word, such as auto
        return True
    try:
        limits(None, value)
    except ValueError:
        return False
    return True


def _limits(limits: Number) -> str:
    """In words.

    >>> _limits(Number(gt=0, lte=1)), _limits(Number(gte=0))
    ('above 0, at most 1', 'from 0')
    """
    words = {"gt": "above", "gte": "from", "lt": "below", "lte": "at most"}
    return ", ".join(f"{word} {getattr(limits, name):g}" for name, word in words.items()
                     if getattr(limits, name) is not None)  # fmt: skip


def _described(hint: Any, limits: str) -> str:
    """What a field takes, in words.

    >>> _described(Annotated[int | Literal["auto"] | None, Number(gte=0)], "from 0")
    'a whole number from 0, or auto'
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _described(arguments[0], limits)
    if origin in {Union, UnionType}:
        return ", or ".join(_described(each, limits) for each in arguments if each is not NoneType)
    if origin is Literal:
        return listed([str(each) for each in arguments])
    if origin in {tuple, Sequence}:
        one = arguments[0] is int
        count = "" if _any_length(hint) else f"{len(arguments)} "
        what = "whole numbers" if one else "names" if arguments[0] is str else "numbers"
        return f"{count}{what} {limits}".rstrip()
    kinds = {int: "a whole number", float: "a number", str: "a text that is not empty", bool: "True or False"}
    known = kinds.get(hint, "name=value pairs" if origin in {dict, Mapping} else "a path")
    return f"{known} {limits}".rstrip() if hint in {int, float} else known
