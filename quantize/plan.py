"""Which matrices of a model become ternary, which stay as they are and why, and in which order.

Decided before a weight is read, from the sites of the class and the headers of the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from pt2_core.artifact.manifest import kind_of
from pt2_core.errors import PT2Error
from pt2_core.model.expected import in_all_layers
from pt2_core.model.fold_edges import FoldEdges, edges_for
from pt2_core.model.widths import storable, width_problem
from quantize.config import Config
from quantize.model.sites import Matrix, Site
from quantize.model.streamed import StreamedModel

EXPORTED_ORDERS = ("none", "foldable")  # pt2-export cannot fold the others
ROUTER = "it routes tokens to experts"
GATE = "it has one row: a gate"
UNREAD = "nothing was multiplied with it on the trial run"


@dataclass
class Plan:
    """What is to be done with a model's matrices.

    Attributes:
        ternary: matrix -> (rows, cols), as ``[out, in]``.
        kept: matrix that stays as it is -> reason.
        tensors: matrix -> the files' tensor, and how it lies there (``tensor``, ``transposed``),
            where that is not plain.
        fold: what column orders fold into; None where nothing is known of it.
        by_need: those of ``kept`` that the user did not ask for.
        experts: how many of the ternary matrices are of an expert.
        blocks: the ternary matrices of each decoder block.
    """

    ternary: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    fold: FoldEdges | None = None
    by_need: dict[str, str] = field(default_factory=dict)
    experts: int = 0
    blocks: list[list[str]] = field(default_factory=list)

    def role(self, matrix: str) -> str:
        """Which order a matrix's columns may have: see :meth:`FoldEdges.role`."""
        return "none" if self.fold is None else self.fold.role(matrix)

    def notes(self, config: Config) -> list[str]:
        """What a user should know of it, a line each."""
        lines = []
        for reason in dict.fromkeys(self.by_need.values()):
            names = [n for n, r in self.by_need.items() if r == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{names[0]}{more} stay as they are: {reason}")
        if config.order == "foldable" and self.fold is None:
            lines.append(NO_FOLD)
        if self.experts and (config.asymmetry > 0 or config.stream > 0):
            lines.append(OWN_WEIGHTS.format(self.experts))
        return lines


NO_FOLD = (
    "no fold edges are known for this architecture, so every matrix keeps its natural order of "
    "columns (a perplexity 1 to 4 % higher, of wiki-llama-82m 22.38 in place of 22.24)"
)
OWN_WEIGHTS = (
    "{} matrices of experts come close to their own weights: the errors of blocks before them "
    "(asymmetry, stream) are made up for by the other matrices alone"
)


def make_plan(model: StreamedModel, config: Config, *, strict: bool = False) -> Plan:
    """Decide on every matrix of a model.

    Args:
        strict: refuse what has to stay as it is, but for routers and gates.

    Raises:
        PT2Error: nothing is left to be done, or ``strict`` and something must stay.
    """
    plan = Plan()
    # A grid of upstream's has a type that holds its very groups: its width is all that counts.
    exported = config.order in EXPORTED_ORDERS and config.offset
    widths: dict[str, list[int]] = {}
    for index in range(model.n_blocks):
        router = _router(model.sites(index))
        plan.blocks.append([])
        for matrix in model.matrices(index):
            name = matrix.name
            if config.skip is not None and re.search(config.skip, name):
                plan.kept[name] = f"matches --skip {config.skip}"
                continue
            reason, forced = _reason(matrix, router, config.block_size, exported)
            if reason:
                plan.kept[name] = reason
                if forced:
                    plan.by_need[name] = reason
            else:
                plan.ternary[name] = (matrix.rows, matrix.cols)
                plan.experts += matrix.expert is not None
                plan.tensors[name] = matrix.record
                plan.blocks[-1].append(name)
            if not reason or "columns" in reason:
                widths.setdefault(kind_of(name), []).append(matrix.cols)
        for name in model.unread(index):
            if name not in plan.kept and name not in plan.ternary:
                plan.kept[name] = plan.by_need[name] = UNREAD
    problem = width_problem(widths, config.block_size, config.skip, exported=exported)
    if strict and plan.by_need:
        name, reason = next(iter(plan.by_need.items()))
        raise PT2Error(problem or f"--strict: {name} must stay as it is: {reason}")
    if not plan.ternary:
        if config.skip is not None and not plan.by_need:
            raise PT2Error(f"--skip {config.skip} matches every linear: nothing is left to "
                           "ternarise")  # fmt: skip
        raise PT2Error(problem or "no matrix of the model can be ternarised")
    shapes = {n: t.shape for n, t in model.checkpoint.tensors.items()}
    plan.fold = edges_for(_settings(model), shapes)
    return plan


def _settings(model: StreamedModel) -> dict[str, Any]:
    names = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {n: in_all_layers(model.config, n) for n in names}


def _reason(
    matrix: Matrix, router: str | None, block_size: int, exported: bool
) -> tuple[str, bool]:
    """Why a matrix stays as it is (empty: it does not), and whether that is a pity."""
    if matrix.reason:
        return matrix.reason, True
    if any(p.param.endswith(f".{router}") for p in matrix.parts if router is not None):
        return ROUTER, False
    if matrix.rows == 1:
        return GATE, False
    if not storable(matrix.cols, block_size, exported=exported):
        return f"blocks of {block_size} do not fit its {matrix.cols} columns", True
    return "", False


def _router(sites: list[Site]) -> str | None:
    """The parameter whose outputs choose the experts: the last before them with one a piece."""
    found = None
    for site in sites:
        if site.slices:
            return found
        for member in site.members:
            if not member.slices and member.rows == _experts(sites):
                found = member.param
    return None


def _experts(sites: list[Site]) -> int:
    return max((s.slices for s in sites), default=0)
