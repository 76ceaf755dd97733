"""The sites of a decoder block: inputs, and the matrices that read them.

Found by running a block of the class with weights of zero on a few tokens, so they are known before
a weight is read; which matrices of the files they are, :mod:`pt2_core.model.layout` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pt2_core.model.layout import Layout, Rows
from quantize.model.shell import Batch, Shell, set_value
from quantize.model.trace import Read, find_reads, same_input

NOT_PLAIN = "its rows or columns are mixed before they are multiplied"
NOT_IN_FILES = "the files hold its values in another arrangement"


@dataclass(frozen=True)
class Member:
    """A parameter of a block that reads a site's input.

    Attributes:
        param: below the block.
        transposed: it holds ``[in, out]``.
        slices: how many matrices it holds; 0: it is one of two dimensions.
        plain: it is multiplied as it is.
        rows, cols: outputs and inputs of (each of) its matrices.
    """

    param: str
    transposed: bool
    slices: int
    plain: bool
    rows: int
    cols: int


@dataclass(frozen=True)
class Site:
    """An input within a decoder block and the parameters that read it, in the order they do.

    Attributes:
        members: the parameters.
        slices: of how many experts they are; each expert has an input of its own. 0: none.
        stream: a member whose product is added to the residual stream as it is, or None.
    """

    members: tuple[Member, ...]
    slices: int
    stream: str | None


@dataclass
class Matrix:
    """A matrix of the files that a block multiplies with.

    Attributes:
        name: the artifact's name for it: the tensor's, without ``.weight``, and ``[3]`` for the
            third matrix of a tensor of three dimensions.
        tensor, slice, transposed: where it is in the files; ``[in, out]`` there if transposed.
        rows, cols: outputs and inputs.
        site: number of the site in its block.
        expert: number of the expert whose input it reads, None where it is of no expert.
        parts: the rows of the class's parameters that it makes.
        reason: why it stays as it is; empty where it becomes ternary.
    """

    name: str
    tensor: str
    slice: int | None
    transposed: bool
    rows: int
    cols: int
    site: int
    expert: int | None
    parts: list[Rows] = field(default_factory=list)
    reason: str = ""

    @property
    def record(self) -> dict[str, object]:
        """What the manifest says of where it is in the files, if that is not plain."""
        found: dict[str, object] = {}
        if self.tensor != f"{self.name}.weight":
            found["tensor"] = self.tensor
        if self.transposed:
            found["transposed"] = True
        return found


@torch.no_grad()
def find_sites(shell: Shell, batch: Batch, index: int) -> list[Site]:
    """The sites of block ``index`` of the class, in the order they are read.

    Args:
        batch: of a few tokens, as :meth:`Shell.record` gives it.
    """
    block = shell.make_block(index)
    for name, parameter in list(block.named_parameters()):
        # Zeros are given memory only where they are touched.
        set_value(block, name, torch.zeros(parameter.shape, dtype=shell.dtype))
    block.to(shell.device)
    reads, joins = find_reads(block, lambda: batch.run(block, index))
    return group_reads(block, reads, set(joins))


def group_reads(block: nn.Module, reads: list[Read], joins: set[str]) -> list[Site]:
    """Sort reads into sites: parameters that ever read the same input share one."""
    parameters = dict(block.named_parameters())
    of_input: dict[tuple[int, ...], int] = {}
    of_param: dict[str, int] = {}
    groups: dict[int, list[str]] = {}
    odd = {r.param for r in reads if not r.plain}
    turned: dict[str, set[bool]] = {}
    for read in reads:
        turned.setdefault(read.param, set()).add(read.transposed)
        at = of_param.get(read.param, of_input.get(same_input(read.x)))
        if at is None:
            at = len(groups)
            groups[at] = []
        of_input.setdefault(same_input(read.x), at)
        if read.param not in of_param:
            of_param[read.param] = at
            groups[at].append(read.param)
    odd |= {p for p, ways in turned.items() if len(ways) > 1}
    sites = []
    for names in groups.values():
        members = []
        for name in names:
            whole: Tensor = parameters[name]
            transposed = min(turned[name])
            rows, cols = whole.shape[-2:][::-1] if transposed else whole.shape[-2:]
            slices = whole.shape[0] if whole.dim() == 3 else 0
            members.append(Member(name, transposed, slices, name not in odd, rows, cols))
        stream = next((n for n in names if n in joins), None)
        sites.append(Site(tuple(members), max(m.slices for m in members), stream))
    return sites


def find_matrices(layout: Layout, sites: list[Site], prefix: str) -> list[Matrix]:
    """The matrices of the files that a block's sites multiply with.

    Args:
        prefix: of the block's parameters in the class, ``model.layers.3.``.

    Returns:
        in the order of the sites, with reasons where the arrangement keeps one as it is.
    """
    found: dict[tuple[str, int | None], Matrix] = {}
    for number, site in enumerate(sites):
        for member in site.members:
            for index in range(member.slices) if member.slices else [None]:
                rows = layout.rows_of(prefix + member.param, index, member.transposed)
                for part in rows or []:
                    _add(found, layout, part, number, member, index)
                if rows is None:
                    for tensor in layout.sources(prefix + member.param):
                        _odd(found, layout, tensor, number, member)
    for matrix in found.values():
        taken = sum(p.rows.numel() for p in matrix.parts)
        if not matrix.reason and taken != matrix.rows:
            matrix.reason = NOT_IN_FILES
    return list(found.values())


def _add(
    found: dict[tuple[str, int | None], Matrix], layout: Layout, part: Rows, site: int,
    member: Member, index: int | None,
) -> None:  # fmt: skip
    key = (part.tensor, part.slice)
    if key not in found:
        shape = layout.tensors[part.tensor][-2:]
        rows, cols = shape[::-1] if part.transposed else shape
        name = matrix_name(part.tensor, part.slice)
        found[key] = Matrix(
            name, part.tensor, part.slice, part.transposed, rows, cols, site, index
        )  # fmt: skip
    matrix = found[key]
    matrix.parts.append(part)
    if (site, index, part.transposed) != (matrix.site, matrix.expert, matrix.transposed):
        matrix.reason = "parts of it read different inputs"
    if not member.plain:
        matrix.reason = NOT_PLAIN


def _odd(
    found: dict[tuple[str, int | None], Matrix], layout: Layout, tensor: str, site: int,
    member: Member,
) -> None:  # fmt: skip
    shape = layout.tensors[tensor]
    for number in range(shape[0]) if len(shape) == 3 else [None]:
        if len(shape) in (2, 3) and (tensor, number) not in found:
            found[tensor, number] = Matrix(
                matrix_name(tensor, number), tensor, number, False, shape[-2], shape[-1], site,
                None, reason=NOT_IN_FILES,
            )  # fmt: skip


def matrix_name(tensor: str, index: int | None) -> str:
    """The artifact's name of a matrix.

    >>> matrix_name("model.layers.0.mlp.up_proj.weight", None)
    'model.layers.0.mlp.up_proj'
    >>> matrix_name("model.layers.0.mlp.experts.down_proj", 5)
    'model.layers.0.mlp.experts.down_proj[5]'
    """
    name = tensor.removesuffix(".weight")
    return name if index is None else f"{name}[{index}]"
