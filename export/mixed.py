"""Mixed precision: the best type for every tensor at a size budget.

Every ternary linear may become Q2_K, Q3_K or Q4_K of its original weights instead, and embeddings
and head may take any of these types up to Q8_0. What a choice gains is estimated from the figures
of ``python -m quantize.sensitivities``: a linear whose restoration lowers the KL divergence by
``gain``, and whose output error falls from ``error`` (ternary) to ``e`` in another type, gains
``gain * (1 - e / error)``; embeddings and head cost their measured slope times the relative error
of the type. The choices of least divergence that fit into the budget are a multiple-choice
knapsack, solved exactly but for sizes rounded up to 1/8192 of what there is to spend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export.config import ExportConfig
from export.ggml import Ggml, type_of
from pt2_core.artifact.sensitivity import Sensitivity
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes

LINEAR_TYPES = ("q2_k", "q3_k", "q4_k")
TABLE_TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
BUCKETS = 8192
# Rows of a tensor that its error in a type is estimated from.
SAMPLE_ROWS = 512

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Option:
    """One type for one tensor: its size in bytes and the divergence it adds (nats per token)."""

    type: str
    nbytes: int
    loss: float


@dataclass
class Choice:
    """What was chosen.

    Attributes:
        linears: Hugging Face module name -> type, where it is not the ternary one.
        tables: ``embedding`` and ``head`` -> type.
        divergence: the ternary model's KL divergence from full precision, nats per token, less the
            single gains: a figure to compare choices by, since together they gain more or less.
        nbytes: of all tensors that were chosen for.
    """

    linears: dict[str, str] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    divergence: float = 0.0
    nbytes: int = 0

    def summary(self, ternary: float) -> str:
        """One line for people.

        Args:
            ternary: the divergence with every linear ternary and the tables in full precision.
        """
        counts = Counter(self.linears.values())
        parts = [f"{n} linears {kind.upper()}" for kind, n in sorted(counts.items())]
        parts += [f"{table} {kind.upper()}" for table, kind in self.tables.items()]
        return (
            f"{', '.join(parts)}; measured one by one, they save {ternary - self.divergence:.4f} "
            f"of the KL divergence of {ternary:.4f} nats per token"
        )


def knapsack(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose one option per item, of least total loss, with at most ``budget`` bytes.

    Deterministic: of equal losses the option that stands first.

    Returns:
        the index of the option for every item.

    Raises:
        PT2Error: even the smallest options do not fit.
    """
    least = [min(o.nbytes for o in options) for options in items]
    rest = budget - sum(least)
    if rest < 0:
        raise PT2Error(
            f"the budget leaves {human_bytes(max(budget, 0))} for the tensors, but their smallest "
            f"types take {human_bytes(sum(least))}: use a larger --target-size or --target-bpw"
        )
    unit = max(1, -(-rest // BUCKETS))
    size = rest // unit + 1
    best = np.zeros(size)  # least loss with at most so many units spent
    taken = np.zeros((len(items), size), dtype=np.uint8)
    for i, options in enumerate(items):
        total = np.full(size, np.inf)
        for number, option in enumerate(options):
            cost = -(-(option.nbytes - least[i]) // unit)
            if cost >= size:
                continue
            candidate = np.full(size, np.inf)
            candidate[cost:] = best[: size - cost] + option.loss
            better = candidate < total
            total[better], taken[i][better] = candidate[better], number
        best = total
    chosen, left = [], size - 1
    for i in range(len(items) - 1, -1, -1):
        number = int(taken[i][left])
        chosen.append(number)
        left -= -(-(items[i][number].nbytes - least[i]) // unit)
    return chosen[::-1]


def choose(
    config: ExportConfig,
    sensitivity: Sensitivity,
    shapes: Mapping[str, tuple[int, int]],
    original: Callable[[str], F32],
    tables: Mapping[str, str],
    ggml: Ggml,
    budget: int,
    step: Callable[[], None] = lambda: None,
) -> Choice:
    """Choose types for the linears and the tables.

    Args:
        shapes: matrix -> (rows, cols) of the ternary linears that are tensors of their own.
        original: gives a matrix's or a table's weights, float32 ``[rows, cols]``.
        tables: ``embedding`` and, where it is another tensor, ``head`` -> name in the checkpoint.
        budget: bytes for all of these tensors together.
        step: called after each tensor.
    """
    names: list[str] = []
    items: list[list[Option]] = []
    for module, shape in shapes.items():
        items.append(_linear_options(config.type, module, shape, sensitivity, original, ggml))
        names.append(module)
        step()
    for table, name in tables.items():
        if table not in sensitivity.tables:
            raise PT2Error(
                f"the {table} has not been measured; run python -m quantize.sensitivities"
            )
        fixed = config.embedding_type if table == "embedding" else config.output_type
        kinds = (fixed,) if fixed else TABLE_TYPES
        items.append(_table_options(kinds, original(name), sensitivity.tables[table], ggml))
        names.append(table)
        step()
    choice = Choice(divergence=sensitivity.kl)
    for name, options, number in zip(names, items, knapsack(items, budget), strict=True):
        option = options[number]
        choice.nbytes += option.nbytes
        choice.divergence += option.loss
        if name in tables:
            choice.tables[name] = option.type
        elif option.type != config.type:
            choice.linears[name] = option.type
    return choice


def _linear_options(
    ternary: str, module: str, shape: tuple[int, int], sensitivity: Sensitivity,
    original: Callable[[str], F32], ggml: Ggml,
) -> list[Option]:  # fmt: skip
    rows, cols = shape
    options = [Option(ternary, rows * ggml.row_size(type_of(ternary), cols), 0.0)]
    figures = sensitivity.linears.get(module)
    if figures is None:
        raise PT2Error(
            f"{module} has not been measured; run python -m quantize.sensitivities again"
        )
    if figures.gain <= 0:
        return options
    sample = _sample(original(module))
    for kind in LINEAR_TYPES:
        if cols % ggml.block_size(type_of(kind)):
            continue
        off = sample - _rounded(sample, kind, ggml, figures.energy)
        error = float((np.square(off, dtype=np.float64) @ figures.energy).mean()) * rows
        gain = figures.gain * (1 - error / figures.error) if figures.error > 0 else 0.0
        if gain > 0:
            options.append(Option(kind, rows * ggml.row_size(type_of(kind), cols), -gain))
    return options


def _table_options(kinds: Sequence[str], weight: F32, slope: float, ggml: Ggml) -> list[Option]:
    rows, cols = weight.shape
    sample = _sample(weight)
    energy = float(np.square(sample, dtype=np.float64).sum())
    options = []
    for kind in kinds:
        if cols % ggml.block_size(type_of(kind)):
            continue
        off = sample - _rounded(sample, kind, ggml)
        error = float(np.square(off, dtype=np.float64).sum()) / energy if energy else 0.0
        # A slope of 0 or less is noise of the measurement: the smaller error is never the worse.
        loss = max(slope, 1e-3) * error
        options.append(Option(kind, rows * ggml.row_size(type_of(kind), cols), loss))
    if not options:
        raise PT2Error(f"a table of {cols} columns fits none of {', '.join(kinds)}")
    return options


def _sample(weight: F32) -> F32:
    """At most SAMPLE_ROWS rows, evenly spread."""
    step = max(1, len(weight) // SAMPLE_ROWS)
    return np.ascontiguousarray(weight[::step], dtype=np.float32)


def _rounded(values: F32, kind: str, ggml: Ggml, energy: F32 | None = None) -> F32:
    number = type_of(kind)
    return ggml.dequantize(ggml.quantize(values, number, energy), number)
