"""Our types in the ``gguf`` package, which a release of it does not know."""

from __future__ import annotations

from typing import Any

import gguf

from pt2_core import formats, upstream


def register() -> None:
    """Teach the installed ``gguf`` package the types of :mod:`pt2_core.formats`, and Q2_0, which
    its release may lack (idempotent).

    Its writer only needs their sizes; its reader looks ids up in an enum, which Python does not
    let one subclass, so the members are added to the enum's own tables.
    """
    enum: Any = gguf.GGMLQuantizationType
    known = [(t.id, t.name, t.block, t.nbytes) for t in formats.TYPES.values()]
    known += [(t.id, n.upper(), t.block, t.nbytes) for n, t in upstream.TYPES.items()]
    for number, name, block, nbytes in known:
        if number not in enum._value2member_map_:
            member = int.__new__(enum, number)
            member._name_, member._value_ = name, number
            enum._member_map_[name] = enum._value2member_map_[number] = member
        gguf.GGML_QUANT_SIZES[enum(number)] = (block, nbytes)
