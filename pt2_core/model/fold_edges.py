"""What a column order of a matrix folds into, as the quantiser notes it and the exporter reads it.

A matrix quantised in the order ``perm`` computes ``W[:, perm] @ x[perm]``, and llama.cpp has no
gather, so that ``x`` itself must arrive in that order. :class:`FoldEdges` names what makes ``x``,
by the tensors of the files:

- the residual stream has one order for the model: ``columns`` of what reads it, ``rows`` of what
  writes to it and of the norms on it;
- any other input belongs to one matrix, and its order folds into the rows that make it.

:func:`edges_for` looks a model up among the families (:mod:`pt2_core.model.folds`); the manifest's
key ``fold`` holds what it found. Free of torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pt2_core.errors import PT2Error
from pt2_core.model.folds import families
from pt2_core.model.folds.family import Family
from pt2_core.schema import Check, anything, integer, mapping, record, sequence, text, validate

Shapes = Mapping[str, Sequence[int]]
_EXPERT = re.compile(r"(.+)\[(\d+)\]")


@dataclass(frozen=True)
class Rows:
    """Rows ``start:stop`` of a tensor of the files.

    Attributes:
        tensor: its full name, with ``[e]`` behind it for one expert of ``[E, rows, cols]``.
        start, stop: the rows; of a tensor of one dimension its elements.
    """

    tensor: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Heads:
    """``n_head`` query heads of ``dim`` channels, each ``n_head / n_kv`` of which share values."""

    n_head: int
    n_kv: int
    dim: int


@dataclass(frozen=True)
class Edge:
    """What the order of one matrix's columns folds into.

    Attributes:
        rows: each takes the order of the columns; with ``heads``, that of the values' rows.
        heads: the order must stay within heads; None where it is free.
    """

    rows: tuple[Rows, ...]
    heads: Heads | None = None


@dataclass(frozen=True)
class FoldEdges:
    """All that the orders of a model's columns fold into.

    Attributes:
        columns: tensors of the files whose columns follow the residual stream's order.
        rows: tensors whose rows follow it.
        edges: the other inputs, by the matrix that reads them (``TENSOR`` without its ``.weight``,
            or ``TENSOR[e]``).
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    edges: Mapping[str, Edge] = field(default_factory=dict)

    def role(self, matrix: str) -> str:
        """``residual``, ``heads``, ``free``, or ``none`` where only the natural order will do."""
        if matrix in self.edges:
            return "free" if self.edges[matrix].heads is None else "heads"
        return "residual" if self._columns & set(tensor_names(matrix)) else "none"

    @property
    def _columns(self) -> frozenset[str]:
        found = self.__dict__.get("_known")
        if found is None:
            found = frozenset(self.columns)
            object.__setattr__(self, "_known", found)
        return found

    def to_json(self) -> dict[str, Any]:
        """The manifest's key ``fold``."""
        edges: dict[str, Any] = {}
        for matrix, edge in self.edges.items():
            edges[matrix] = {"rows": [[r.tensor, r.start, r.stop] for r in edge.rows]}
            if edge.heads is not None:
                edges[matrix]["heads"] = [edge.heads.n_head, edge.heads.n_kv, edge.heads.dim]
        return {"columns": list(self.columns), "rows": list(self.rows), "edges": edges}

    @classmethod
    def from_json(cls, value: Any, file: Any = "manifest.json") -> FoldEdges:
        """The inverse of :meth:`to_json`.

        Raises:
            PT2Error: an entry is missing or of the wrong type; its place in ``file`` is named.
        """
        validate({"fold": value}, record({"fold": FOLD}), file, MEND)
        edges = {}
        for matrix, entry in value["edges"].items():
            rows = tuple(Rows(*place) for place in entry["rows"])
            edges[matrix] = Edge(rows, Heads(*entry["heads"]) if "heads" in entry else None)
        return cls(tuple(value["columns"]), tuple(value["rows"]), edges)


MEND = "quantise again, or copy the artifact again"
_COUNT = integer(0, (1 << 31) - 1)


def _row(*checks: Check) -> Check:
    """A list of as many values as there are checks."""

    def check_all(value: Any, where: str) -> None:
        sequence(anything, longest=len(checks))(value, where)
        for i, check in enumerate(checks):
            check(value[i] if i < len(value) else None, f"{where}[{i}]")

    return check_all


# What the manifest's key ``fold`` looks like.
FOLD = record(
    {
        "columns": sequence(text()),
        "rows": sequence(text()),
        "edges": mapping(
            record(
                {"rows": sequence(_row(text(), _COUNT, _COUNT))},
                {"heads": _row(*[integer(1, 1 << 20)] * 3)},
            )
        ),
    }
)


def tensor_names(matrix: str) -> tuple[str, ...]:
    """The names that the tensor of a matrix can have in the files, with and without ``.weight``."""
    match = _EXPERT.fullmatch(matrix)
    name = match[1] if match else matrix
    return f"{name}.weight", name


def split_expert(place: str) -> tuple[str, int | None]:
    """A tensor's name and the expert's number, None where it is all of the tensor.

    >>> split_expert("model.layers.0.mlp.experts.down_proj[3]")
    ('model.layers.0.mlp.experts.down_proj', 3)
    """
    match = _EXPERT.fullmatch(place)
    return (match[1], int(match[2])) if match else (place, None)


def rows_and_columns(tensor: str, shape: Sequence[int]) -> tuple[int, int | None]:
    """Rows and columns of a tensor (or of each expert in it); a vector has rows alone."""
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"{tensor} has {len(shape)} dimensions")
    return (shape[0], None) if len(shape) == 1 else (shape[-2], shape[-1])


# What must hold between a fold and the tensors --------------------------------------------------


def check_edges(fold: FoldEdges, tensors: Shapes, matrices: Mapping[str, int], hidden: int) -> None:
    """Raise PT2Error unless a fold fits the model's tensors.

    Args:
        tensors: full name -> shape, of the files' tensors that count.
        matrices: name -> columns, of the ternary matrices.
        hidden: channels of the residual stream.
    """
    problem = _stream_problem(fold, tensors, hidden) or _edge_problem(fold, tensors, matrices)
    if problem:
        raise PT2Error(f"the manifest's 'fold' is wrong: {problem}; {MEND}")


def _stream_problem(fold: FoldEdges, tensors: Shapes, hidden: int) -> str | None:
    for kind, names in (("columns", fold.columns), ("rows", fold.rows)):
        for name in names:
            shape = tensors.get(name)
            if shape is None or not 1 <= len(shape) <= 3:
                return f"'{kind}' names {name}, which is no vector or matrix of the model"
            rows, cols = rows_and_columns(name, shape)
            if (rows if kind == "rows" else cols) != hidden:
                return f"the {kind} of {name} are not the {hidden} channels of the stream"
    return None


def _edge_problem(fold: FoldEdges, tensors: Shapes, matrices: Mapping[str, int]) -> str | None:
    moved: dict[str, list[Rows]] = {name: [] for name in fold.rows}
    for matrix, edge in fold.edges.items():
        cols = matrices.get(matrix)
        wanted = cols
        if (heads := edge.heads) is not None:
            if heads.n_head % heads.n_kv:
                return f"{matrix} has {heads.n_head} heads over {heads.n_kv}"
            if cols is not None and cols != heads.n_head * heads.dim:
                return f"{matrix} has not the columns of its heads"
            wanted = heads.n_kv * heads.dim
        for place in edge.rows:
            tensor, expert = split_expert(place.tensor)
            shape = tensors.get(tensor)
            if shape is None or not 1 <= len(shape) <= 3:
                return f"{matrix} folds into {place.tensor}, which is no tensor of the model"
            if (expert is not None) != (len(shape) == 3) or (expert or 0) >= shape[0]:
                return f"{matrix} folds into {place.tensor}, and the tensor is of another shape"
            if not place.start < place.stop <= rows_and_columns(tensor, shape)[0]:
                return f"{matrix} folds into rows that {place.tensor} has not"
            if wanted is not None and len(place) != wanted:
                return f"{matrix} folds into {len(place)} rows of {place.tensor}, not {wanted}"
            if tensor in moved and tensor in fold.rows:
                return f"the rows of {tensor} follow two orders"
            others = moved.setdefault(place.tensor, [])
            if any(place.start < o.stop and o.start < place.stop for o in others):
                return f"the rows of {place.tensor} follow two orders"
            others.append(place)
    return None


# Looking a model up among the families ------------------------------------------------------------


def edges_for(settings: Mapping[str, Any], tensors: Shapes) -> FoldEdges | None:
    """What the column orders of a model fold into.

    Args:
        settings: ``model_type`` and ``num_attention_heads``, as ``config.json`` or transformers'
            config of the text model has them.
        tensors: full name -> shape, of the files' tensors that count.

    Returns:
        None where no family claims the model type, or the model has a tensor that its family does
        not name: only the natural order will do then.
    """
    family = families().get(str(settings.get("model_type")))
    if family is None:
        return None
    names = _Names(family)
    columns, rows, edges = [], [], {}
    for tensor, shape in tensors.items():
        found = names.find(tensor)
        if found is None or not 0 <= len(shape) <= 3:
            return None
        module, kind = found
        if kind == "weight" and module in names.columns and len(shape) > 1:
            columns.append(tensor)
        if module in names.rows:
            rows.append(tensor)
    for matrix, edge in _edges(family, names, settings, tensors):
        edges[matrix] = edge
    return FoldEdges(tuple(columns), tuple(rows), edges)


class _Names:
    """Finds which entry of a family a tensor's name is of."""

    def __init__(self, family: Family) -> None:
        self.columns, self.rows = set(family.columns), set(family.rows)
        read = {name for name in (*family.heads, *family.free)}
        made = {n.partition(":")[0] for n in family.heads.values()}
        made |= {n.partition(":")[0] for names in family.free.values() for n in names}
        self.known = {*self.columns, *self.rows, *read, *made, *family.still}

    def find(self, tensor: str) -> tuple[str, str] | None:
        """(the entry, ``weight`` or ``bias``) of a tensor; None for one that no entry names."""
        whole = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor)
        if whole in self.known:
            return whole, "weight"
        module, _, kind = whole.rpartition(".")
        return (module, kind) if kind in ("weight", "bias") and module in self.known else None


def _edges(
    family: Family, names: _Names, settings: Mapping[str, Any], tensors: Shapes
) -> Iterator[tuple[str, Edge]]:
    """Every matrix that has an edge, and the edge; an expert is a matrix of its own."""
    for tensor, shape in tensors.items():
        found = names.find(tensor)
        if found is None or found[1] != "weight" or len(shape) < 2:
            continue
        matrix, numbers = tensor.removesuffix(".weight"), re.findall(r"(?<=\.)\d+(?=\.)", tensor)
        makers: Sequence[str] = family.free.get(found[0], ())
        heads = None
        if found[0] in family.heads:
            makers = (family.heads[found[0]],)
            heads = _heads(settings, shape[-1], makers[0], numbers, tensors)
            if heads is None:
                continue
        experts = [f"[{e}]" for e in range(shape[0])] if len(shape) == 3 else [""]
        for expert in experts if makers else ():
            rows = [r for m in makers for r in _made(m, numbers, expert, heads, tensors)]
            wanted = shape[-1] if heads is None else heads.n_kv * heads.dim
            if rows and all(len(r) == wanted for r in rows):
                yield matrix + expert, Edge(tuple(rows), heads)


def _tensors_of(module: str, numbers: Sequence[str], tensors: Shapes) -> list[str]:
    """The tensors of an entry, ``*`` filled in: the weight, then the bias."""
    parts, wanted = module.split("*"), iter(numbers)
    name = parts[0] + "".join(next(wanted, "") + part for part in parts[1:])
    weight = [n for n in (f"{name}.weight", name) if n in tensors]
    return [*weight[:1], *([f"{name}.bias"] if f"{name}.bias" in tensors else [])]


def _heads(
    settings: Mapping[str, Any], cols: int, maker: str, numbers: Sequence[str], tensors: Shapes
) -> Heads | None:
    """The attention layout, from the number of heads and the shapes; None where they do not fit."""
    n_head, dim = settings.get("num_attention_heads"), settings.get("head_dim")
    made = _tensors_of(maker.partition(":")[0], numbers, tensors)
    if type(n_head) is not int or n_head < 1 or cols % n_head or not made:
        return None
    if dim not in (None, cols // n_head):
        return None
    dim, rows = cols // n_head, tensors[made[0]][0]
    if maker.endswith(":v"):
        rows = (rows - cols) // 2 if (rows - cols) % 2 == 0 else 0
    if rows < 1 or rows % dim or n_head % (rows // dim):
        return None
    return Heads(n_head, rows // dim, dim)


def _made(
    maker: str, numbers: Sequence[str], expert: str, heads: Heads | None, tensors: Shapes
) -> Iterator[Rows]:
    """The rows that a maker's entry means, of its weight and its bias."""
    module, _, part = maker.partition(":")
    for tensor in _tensors_of(module, numbers, tensors):
        shape = tensors[tensor]
        rows, _ = rows_and_columns(tensor, shape)
        start, stop = 0, rows
        if part == "v" and heads is not None:
            start = (heads.n_head + heads.n_kv) * heads.dim
        elif part:
            number, _, of = part.partition("/")
            start, stop = (rows * (int(number) - 1) // int(of), rows * int(number) // int(of))
        yield Rows(tensor + (expert if len(shape) == 3 else ""), start, stop)
