"""Check what was read from a file before anybody uses it: types, ranges, and where it is wrong.

A check is a function of (value, where) that raises :class:`Mismatch` with the place of the bad
entry, ``matrices.model.layers.0.mlp.up_proj.rows`` say. They are put together from those below, or
derived from a dataclass:

    SHAPE = sequence(integer(0), longest=8)
    validate(read_json(file), record({"name": text(), "shape": SHAPE}), file, "write it again")

Plain Python, no torch and no numpy.
"""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

from pt2_core.errors import PT2Error

Check = Callable[[Any, str], None]
LARGEST = (1 << 63) - 1  # of sizes and counts: what C and safetensors can hold as well


class Mismatch(Exception):
    """A value is not what the check wants; the message names the place."""


def validate(value: Any, check: Check, file: str | os.PathLike[str], mend: str) -> None:
    """Apply ``check`` to the content of ``file``.

    Raises:
        PT2Error: with the place of the first bad entry, and ``mend``, what to do about it.
    """
    try:
        check(value, "")
    except Mismatch as e:
        raise PT2Error(f"{os.fspath(file)} is damaged: {e}; {mend}") from e


def anything(value: Any, where: str) -> None:
    """Any value."""


def boolean(value: Any, where: str) -> None:
    """``true`` or ``false``."""
    if not isinstance(value, bool):
        _refuse(where, "true or false", value)


def integer(low: int = -LARGEST, high: int = LARGEST) -> Check:
    """A whole number; neither a bool nor a float counts as one."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            _refuse(where, f"a whole number from {low} to {high}", value)

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number."""

    def check(value: Any, where: str) -> None:
        ok = type(value) in (int, float) and abs(value) <= 1e300 and low <= value <= high
        if not ok:  # NaN compares false with everything
            limits = "" if low == -math.inf else f", {low:g} or more"
            limits += "" if high == math.inf else f", at most {high:g}"
            _refuse(where, "a finite number" + limits, value)

    return check


def text(pattern: str = "", longest: int = 1 << 20) -> Check:
    """A string, of a regular expression where one is given."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > longest:
            _refuse(where, "a text", value)
        if pattern and not re.fullmatch(pattern, value):
            _refuse(where, f"a text of the form {pattern}", value)

    return check


def optional(check: Check) -> Check:
    """``null``, or what ``check`` accepts."""
    return lambda value, where: None if value is None else check(value, where)


def sequence(check: Check, longest: int = LARGEST) -> Check:
    """A list of such values."""

    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > longest:
            limit = "" if longest == LARGEST else f" of at most {longest}"
            _refuse(where, "a list" + limit, value)
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return check_all


def mapping(check: Check, names: str = "") -> Check:
    """An object whose values are such, under names of a regular expression."""

    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(where, "an object", value)
        for name, item in value.items():
            if not isinstance(name, str) or (names and not re.fullmatch(names, name)):
                raise Mismatch(f"{where or 'the file'} has the unexpected entry {shown(name)}")
            check(item, _join(where, name))

    return check_all


def record(required: Mapping[str, Check], other: Mapping[str, Check] | None = None) -> Check:
    """An object with these entries; those of ``other`` may be missing, unknown ones are left."""
    every = {**required, **(other or {})}

    def check_all(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(where, "an object", value)
        for name in required:
            if name not in value:
                raise Mismatch(f"{_join(where, name)!r} is missing")
        for name, check in every.items():
            if name in value:
                check(value[name], _join(where, name))

    return check_all


@cache
def of(cls: type) -> Check:
    """The check for the JSON form of a dataclass, from the types of its fields."""
    hints = typing.get_type_hints(cls)
    needed: dict[str, Check] = {}
    rest: dict[str, Check] = {}
    for f in fields(cls):
        has_default = f.default is not MISSING or f.default_factory is not MISSING
        (rest if has_default else needed)[f.name] = _of_type(hints[f.name])
    return record(needed, rest)


def _of_type(kind: Any) -> Check:
    plain: dict[Any, Check] = {
        bool: boolean, int: integer(), float: number(), str: text(), Any: anything,
    }  # fmt: skip
    if kind in plain:
        return plain[kind]
    if is_dataclass(kind):
        return of(typing.cast(type, kind))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        return sequence(_of_type(inner[0]))
    if origin is dict:
        return mapping(_of_type(inner[1]))
    if origin in (typing.Union, types.UnionType) and inner[1] is type(None):
        return optional(_of_type(inner[0]))
    raise TypeError(f"no check for the type {kind}")


def shown(value: Any) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number of more than 63 bits"
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:50]}...{words[-1]}"


def _join(where: str, name: str) -> str:
    short = name if len(name) <= 120 else f"{name[:110]}..."
    return f"{where}.{short}" if where else short


def _refuse(where: str, wanted: str, value: Any) -> typing.NoReturn:
    place = f"{where!r} is missing or wrong" if where else "its content is wrong"
    raise Mismatch(f"{place}: it must be {wanted}, not {shown(value)}")
