"""Our types in the ``gguf`` package, which a release of it does not know."""

from __future__ import annotations

from typing import Any

import gguf

from pt2_core import formats


def register() -> None:
    """Teach the installed ``gguf`` package the types of :mod:`pt2_core.formats` (idempotent).

    Its writer only needs their sizes; its reader looks ids up in an enum, which Python does not
    let one subclass, so the members are added to the enum's own tables.
    """
    enum: Any = gguf.GGMLQuantizationType
    for t in formats.TYPES.values():
        if t.id not in enum._value2member_map_:
            member = int.__new__(enum, t.id)
            member._name_, member._value_ = t.name, t.id
            enum._member_map_[t.name] = enum._value2member_map_[t.id] = member
        gguf.GGML_QUANT_SIZES[enum(t.id)] = (t.block, t.nbytes)
