"""Second moments of the inputs of a block's sites, gathered while calibration text runs through it.

An expert's inputs are the tokens that are routed to it. Where a site has many experts its moments
are gathered some experts at a time, so that they fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pt2_core.errors import PT2Error
from quantize.method.hessian import ExpertMoments, SiteMoments
from quantize.model.block import Block
from quantize.model.sites import Matrix, Site
from quantize.model.streamed import Stream
from quantize.model.trace import Read, Trace


class _Enough(Exception):
    """Ends a forward pass whose remaining results are not wanted."""


class Seen:
    """What one forward pass of a block shows of some of its sites.

    Attributes:
        inputs: site -> its input.
        streams: site -> the residual stream that its product is added to.
        experts: site -> expert -> its input.
    """

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.streams: dict[int, Tensor] = {}
        self.experts: dict[int, dict[int, Tensor]] = {}


@torch.no_grad()
def watch(
    layer: nn.Module, sites: Sequence[Site], wanted: Sequence[int], run: Callable[[], Any], *,
    streams: bool = False, to_the_end: bool = False,
) -> tuple[Seen, Any]:  # fmt: skip
    """Run a block as far as it takes to see the inputs of some of its sites.

    Args:
        layer: the block as a module.
        run: runs it.
        streams: look out for the residual streams as well.
        to_the_end: run the whole block in any case.

    Returns:
        (what was seen, the block's output; None where the run was cut short)
    """
    seen = Seen()
    home = {m.param: (n, s) for n, s in enumerate(sites) for m in s.members}
    joining = {n for n in wanted if streams and sites[n].stream is not None}
    # Experts take turns, so that there is no telling which read is the last one.
    whole = to_the_end or any(sites[n].slices for n in wanted)

    def done() -> None:
        missing = set(wanted) - set(seen.inputs)
        if not whole and not missing and joining <= set(seen.streams):
            raise _Enough

    def on_read(read: Read) -> None:
        number, site = home.get(read.param, (-1, None))
        if number not in wanted or site is None:
            return
        if site.slices:
            seen.experts.setdefault(number, {}).setdefault(read.index or 0, read.x)
        elif number not in seen.inputs:
            seen.inputs[number] = read.x
            done()

    def on_sum(param: str, stream: Tensor) -> None:
        number, site = home.get(param, (-1, None))
        if number in joining and site is not None and number not in seen.streams:
            seen.streams[number] = stream
            done()

    with Trace(layer, on_read, on_sum if joining else None):
        try:
            return seen, run()
        except _Enough:
            return seen, None


def gather(
    block: Block, layers: tuple[nn.Module, nn.Module], streams: tuple[Stream, Stream],
    wanted: Sequence[int], *, shift: bool, stream: bool, step: Callable[[], None],
) -> dict[int, SiteMoments]:  # fmt: skip
    """Moments of the inputs of sites without experts, over all calibration tokens.

    Args:
        layers, streams: of the model as quantised so far, and of the full-precision model; the
            same twice where no target asks for the second.
        shift, stream: which of the targets' moments are wanted.
    """
    moments = {number: SiteMoments() for number in wanted}
    twice = streams[0] is not streams[1]
    for batch, reference in zip(streams[0].batches, streams[1].batches, strict=True):
        seen, _ = watch(
            layers[0], block.sites, wanted, partial(batch.run, layers[0], block.index),
            streams=stream,
        )  # fmt: skip
        full = seen
        if twice:
            full, _ = watch(
                layers[1], block.sites, wanted,
                partial(reference.run, layers[1], block.index), streams=stream,
            )  # fmt: skip
        for number in wanted:
            if number in seen.inputs:
                moments[number].add(
                    seen.inputs[number], full.inputs[number], seen.streams.get(number),
                    full.streams.get(number), shift, stream,
                )  # fmt: skip
        step()
    return moments


def gather_experts(
    block: Block, layer: nn.Module, stream: Stream, site: int, experts: Sequence[int],
    common: bool, step: Callable[[], None],
) -> ExpertMoments:  # fmt: skip
    """Moments of the inputs of some of a site's experts.

    Args:
        common: add up the inputs of all experts as well.
    """
    moments = ExpertMoments(experts, common)
    for batch in stream.batches:
        seen, _ = watch(
            layer, block.sites, [site], partial(batch.run, layer, block.index)
        )  # fmt: skip
        moments.add(seen.experts.get(site, {}))
        step()
    return moments


def stream_error(error: Tensor | None, members: Sequence[Matrix], site: Site) -> Tensor | None:
    """(The full-precision model's residual stream - the stream) x^T for stacked matrices.

    Args:
        error: float64 ``[rows, cols]``, for the matrix that is added to the stream.
        members: the matrices that are stacked; they read the site's input x.

    Returns:
        float64 ``[rows of all, cols]``, zero for matrices that do not join the stream; None where
        none does.

    Raises:
        PT2Error: a part of a matrix joins the stream.
    """
    joining = [any(p.param.endswith(f".{site.stream}") for p in m.parts) for m in members]
    if error is None or not any(joining):
        return None
    parts = []
    for matrix, joins in zip(members, joining, strict=True):
        if joins and matrix.rows != error.shape[0]:
            raise PT2Error(
                f"{matrix.name}: only a part of it is added to the residual stream, whose error "
                "(stream) is made up for by other matrices alone"
            )
        parts.append(error if joins else error.new_zeros(matrix.rows, error.shape[1]))
    return torch.cat(parts)
