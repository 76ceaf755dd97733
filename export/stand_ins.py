"""Stand-ins: small tensors in the place of ternary matrices, from which one reads what was done.

A stand-in of a matrix ``[rows, cols]`` has, in each row, the row's number, the matrix's number and
:data:`STAND_IN`. Whatever llama.cpp's converter does to the matrix it does to the stand-in: gives
it a name, orders its rows, joins several matrices or takes one apart, turns it. :func:`row_map`
reads off which row of which matrix every row of the result is, or finds that more was done to it
than that. A *narrow* stand-in has these three columns alone. A *wide* one has all of its matrix's,
for converters that count the columns; column c of it holds -c.

Used in the converter's own process, where torch is at hand (:mod:`export.converter_driver`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

STAND_IN = -120121.0
NARROW, WIDE, VALUES = "narrow", "wide", "values"


@dataclass(frozen=True)
class Target:
    """A tensor of the checkpoint that holds ternary matrices.

    Attributes:
        shape: in the file: ``[rows, cols]``, or ``[experts, rows, cols]``.
        first: the number of its first matrix; an expert's follows the one before it.
        transposed: whether the file holds ``[..., cols, rows]``.
    """

    shape: tuple[int, ...]
    first: int
    transposed: bool = False

    @property
    def rows(self) -> int:
        """Rows of each matrix."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def cols(self) -> int:
        """Columns of each matrix."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def count(self) -> int:
        """How many matrices it holds."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def stand_in(self, wide: bool) -> NDArray[np.float32]:
        """The stand-in in the file's own layout, float32."""
        matrices = np.empty((self.count, self.rows, self.cols if wide else 3), dtype=np.float32)
        matrices[..., 3:] = -np.arange(3, matrices.shape[-1], dtype=np.float32)
        matrices[..., 0] = np.arange(self.rows, dtype=np.float32)
        matrices[..., 1] = np.arange(self.first, self.first + self.count)[:, None]
        matrices[..., 2] = STAND_IN
        if self.transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(-1, -2))
        return matrices if len(self.shape) == 3 else matrices[0]


@dataclass(frozen=True)
class RowMap:
    """Where the rows of a tensor of the converter come from.

    Attributes:
        shape: of the tensor with its matrices' true columns.
        which: int32 ``[n]``, the matrix's number for each row, over all leading dimensions.
        row: int32 ``[n]``, the row within it.
    """

    shape: tuple[int, ...]
    which: NDArray[np.int32]
    row: NDArray[np.int32]


def row_map(data: NDArray[Any], targets: Iterable[Target], wide: bool) -> RowMap | None:
    """Read a result of the converter; None where it is more than rows of stand-ins.

    Args:
        data: what became of the stand-ins, ``[..., n, 3]`` or ``[..., n, cols]``.
        targets: those that it is made of.
    """
    targets = list(targets)
    cols = {t.cols for t in targets}
    width = next(iter(cols)) if wide else 3
    if len(cols) != 1 or not 2 <= data.ndim <= 3 or data.shape[-1] != width:
        return None
    flat = data.reshape(-1, width)
    if wide and not (flat[:, 3:] == -np.arange(3, width, dtype=np.float32)).all():
        return None
    which, row = flat[:, 1].astype(np.int32), flat[:, 0].astype(np.int32)
    if not ((flat[:, 2] == STAND_IN) & (which == flat[:, 1]) & (row == flat[:, 0])).all():
        return None
    known = np.zeros(len(which), dtype=bool)
    for t in targets:
        mine = (which >= t.first) & (which < t.first + t.count)
        known |= mine & (row >= 0) & (row < t.rows)
    return RowMap((*data.shape[:-1], next(iter(cols))), which, row) if known.all() else None


@dataclass
class Levels:
    """How every ternary tensor is given to the converter, and why it is given as values.

    Attributes:
        of: tensor -> :data:`NARROW`, :data:`WIDE` or :data:`VALUES`.
        reasons: tensor -> what the converter does that no ternary tensor survives.
    """

    of: dict[str, str]
    reasons: dict[str, str] = field(default_factory=dict)
    _raised: int = 0

    def refuse(self, tensors: Iterable[str], why: str) -> None:
        """From now on give these as values."""
        for name in tensors:
            if self.of[name] != VALUES:
                self.of[name] = VALUES
                self.reasons[name] = why

    def failed(self, at: str | None, error: Exception) -> bool:
        """The converter raised ``error`` at a tensor: what to try instead; False for nothing.

        Narrow stand-ins of its kind become wide. Where they are wide already, those of the block
        are given as values; after some blocks, those of all.
        """
        like = [n for n in self.of if at is not None and pattern(n) == pattern(at)]
        near = [n for n in self.of if at is not None and first_number(n) == first_number(at)]
        if narrow := [n for n in like if self.of[n] == NARROW]:
            self.of.update(dict.fromkeys(narrow, WIDE))
            return True
        self._raised += 1
        everywhere = self._raised > 8
        groups = (like,) if everywhere else ([n for n in like if n in near], near)
        why = f"llama.cpp's converter takes it as values only ({' '.join(str(error).split())[:80]})"
        for group in (*groups, list(self.of)):
            if any(self.of[n] != VALUES for n in group):
                self.refuse(group, why)
                return True
        return False


def pattern(name: str) -> str:
    """A tensor's name without its numbers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def first_number(name: str) -> str | None:
    """The first number in a tensor's name: its decoder block."""
    return next((part for part in name.split(".") if part.isdecimal()), None)


# Lazy tensors of the converter --------------------------------------------------------------------


_SOURCES = "_pt2_sources"


def track(lazy: Any) -> None:
    """Let every lazy tensor know the checkpoint's tensors that it is computed from.

    This is noted when it is made: one that has been evaluated has forgotten its arguments.

    Args:
        lazy: the class ``gguf.lazy.LazyBase`` of the converter.
    """
    theirs = lazy.__init__
    if hasattr(theirs, _SOURCES):
        return

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        setattr(self, _SOURCES, tuple(_found(kwargs.get("args"), kwargs.get("kwargs"))))

    setattr(init, _SOURCES, ())
    lazy.__init__ = init


def _found(*values: Any) -> dict[str, None]:
    """The sources of all lazy tensors in nested arguments, in their order."""
    found: dict[str, None] = {}
    for value in values:
        if isinstance(value, list | tuple):
            found |= _found(*value)
        elif isinstance(value, Mapping):
            found |= _found(*value.values())
        else:
            found |= dict.fromkeys(getattr(value, "__dict__", {}).get(_SOURCES, ()))
    return found


def watch(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
    """``make``, whose tensors are the checkpoint's of this name."""

    def watched() -> Any:
        tensor = make()
        setattr(tensor, _SOURCES, (name,))
        return tensor

    return watched


def sources_of(tensor: Any) -> list[str]:
    """The names of the checkpoint's tensors that a lazy one is computed from."""
    return list(_found(tensor))
