"""One run over all decoder blocks: order, Hessians, matrices, activations, files.

For every block the calibration activations (which come from the blocks quantised before) run
through the block as far as its last site, which gives one Hessian per input; the matrices that
share an input are quantised as one tall matrix; then the activations run through the block with the
weights as they are stored. Memory holds one block and the activations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pt2_core.artifact.folder import GLOBAL, RUN, Artifact, ArtifactWriter, sha256_array
from pt2_core.artifact.matrix import TernaryMatrix, pack_ternary
from pt2_core.errors import PT2Error
from pt2_core.files import write_json
from pt2_core.progress import Reporter
from quantize.config import Config
from quantize.method import reorder
from quantize.method.gptq import Method, Ternary, quantize_matrix
from quantize.method.hessian import SiteMoments, blend, mean_square
from quantize.method.target import target
from quantize.method.ternary import check_range
from quantize.model.block import Block
from quantize.model.sites import Matrix, Site
from quantize.model.streamed import Stream, StreamedModel
from quantize.moments import gather, gather_experts, stream_error, watch
from quantize.plan import GATE, ROUTER, Plan
from quantize.proof_run import ProofRun

# Bytes of experts' Hessians at a time; more experts take another pass over the text.
EXPERT_BYTES = 4 << 30


class Run:
    """One run over all blocks."""

    def __init__(
        self, model: StreamedModel, plan: Plan, config: Config, writer: ArtifactWriter,
        reporter: Reporter, run: dict[str, Any], proof: ProofRun | str,
    ) -> None:  # fmt: skip
        self.model, self.plan, self.config = model, plan, config
        self.writer, self.reporter = writer, reporter
        self.run = run
        self.proof = proof
        self.known_order = writer.manifest["files"].get(GLOBAL)
        self.method = Method(**{f.name: getattr(config, f.name) for f in fields(Method)})

    def blocks(self, tokens: Tensor) -> None:
        """Quantise, or replay, every block in turn."""
        self._forget_damaged()
        done = self.writer.blocks_done
        manifest = self.writer.manifest
        if manifest["complete"] and "proof" in manifest:
            # Nothing to do, but say so only of what is sound.
            artifact = Artifact.open(self.writer.path)
            for index in range(artifact.n_blocks):
                artifact.block(index)
            return
        self._save_run()
        self.residual_perm = self._residual_perm(tokens)
        stream = self.model.start(tokens, self.config.batch_size)
        # The same activations in the full-precision model, where a target asks for them.
        asymmetric = self.config.asymmetry or self.config.stream
        self.reference = stream.clone() if asymmetric else None
        batches = len(stream.batches)
        self.reporter.start("ternarising", self._passes(done) * batches)
        for index in range(self.model.n_blocks):
            block = self.model.block(index)
            if index < done:
                self._replay(stream, block)
            else:
                self._quantize(stream, block)
            if self.reference is not None and index < self.model.n_blocks - 1:
                self.reference.advance(block.module(), index, self.reporter.step)
        if isinstance(self.proof, ProofRun):
            proof = self.proof.finish()
            self.writer.write_proof(proof.arrays(), proof.record())
        else:
            self.writer.manifest["proof"] = {"left_out": self.proof}
            self.reporter.warn(f"the artifact has no proof: {self.proof}")
        self.reporter.done()
        self._save_run()
        self.writer.finish()

    def _forget_damaged(self) -> None:
        """Quantise again from the first block on whose file is gone or damaged."""
        found = self.writer.drop_damaged(lambda index: self.plan.blocks[index])
        if found:
            done = self.writer.blocks_done
            again = f"quantising again from block {done} on"
            if done == self.model.n_blocks:
                again = "making it again"
            self.reporter.warn(f"{self.writer.path}: {', '.join(found)}: {again}")

    def _passes(self, done: int) -> int:
        """Passes over the calibration text that are ahead; a block's matrices count as one."""
        blocks = self.model.n_blocks
        # Nothing reads what the last block would put out.
        passes = (blocks - 1) * (1 if self.reference is None else 2)
        for index in range(done, blocks):
            sites = self.model.sites(index)
            passes += 1 + sum(len(_parts(sites, group)) for group in self._groups(sites))
        return passes

    def _groups(self, sites: Sequence[Site]) -> list[list[int]]:
        """Sites whose moments are gathered together: those of experts take a pass each."""
        plain = [n for n, s in enumerate(sites) if not s.slices]
        if self.config.sequential:
            return [[n] for n in range(len(sites))]
        return [*([plain] if plain else []), *([n] for n, s in enumerate(sites) if s.slices)]

    def _quantize(self, stream: Stream, block: Block) -> None:
        index = block.index
        seconds: dict[str, float] = {}
        matrices: dict[str, Ternary] = {}
        records: dict[str, dict[str, Any]] = {}
        share = len(stream.batches) / max(len(block.sites), 1)
        for group in self._groups(block.sites):
            weights = {name: m.dequantize() for name, m in matrices.items()}
            if block.sites[group[0]].slices:
                self._experts(stream, block, group[0], weights, matrices, records, seconds)
            else:
                self._plain(stream, block, group, weights, matrices, records, seconds)
            self.reporter.step(_figures(index, self.model.n_blocks, records), share * len(group))
        last = index == self.model.n_blocks - 1
        with _timed(seconds, "propagation"):
            weights = {name: m.dequantize() for name, m in matrices.items()}
            if isinstance(self.proof, ProofRun):
                self.proof.advance(block, weights)
            if not last:
                stream.advance(block.module(weights), index, self.reporter.step)
                self.writer.record("activations", str(index), activation_digest(stream))
        with _timed(seconds, "writing"):
            self.writer.write_block(
                index, [_stored(name, m) for name, m in matrices.items()], records
            )
        self.run.setdefault("seconds", {})[str(index)] = seconds
        self._save_run()

    def _plain(
        self, stream: Stream, block: Block, group: list[int], weights: dict[str, Tensor],
        matrices: dict[str, Ternary], records: dict[str, dict[str, Any]],
        seconds: dict[str, float],
    ) -> None:  # fmt: skip
        """Gather the moments of sites without experts, and quantise what reads them."""
        wanted = [n for n in group if self._ternary_of(block, n)]
        with _timed(seconds, "hessians"):
            layer = block.module()
            original = block.module() if self.reference is not None else layer
            block.put(layer, weights)
            text = f"block {block.index + 1}/{self.model.n_blocks}"
            moments = gather(
                block, (layer, original), (stream, self.reference or stream), wanted,
                shift=self.config.asymmetry > 0, stream=self.config.stream > 0,
                step=lambda: self.reporter.step(text),
            )  # fmt: skip
        with _timed(seconds, "matrices"):
            for number in wanted:
                names = [m.name for m in self._ternary_of(block, number)]
                found = moments.pop(number)
                if found.inputs.count:
                    hessian, more = found.inputs.mean(f"input of {names[0]}"), {}
                else:
                    cols = block.matrices[names[0]].cols
                    hessian = torch.eye(cols, dtype=torch.float64, device=self.model.device)
                    more = {"tokens": 0}
                self._quantize_site(block, names, hessian, found, matrices, records, more)

    def _experts(
        self, stream: Stream, block: Block, number: int, weights: dict[str, Tensor],
        matrices: dict[str, Ternary], records: dict[str, dict[str, Any]],
        seconds: dict[str, float],
    ) -> None:  # fmt: skip
        """Gather the moments of a site's experts, a few at a time, and quantise them."""
        of_expert: dict[int, list[str]] = {}
        for matrix in self._ternary_of(block, number):
            of_expert.setdefault(matrix.expert or 0, []).append(matrix.name)
        if not of_expert:
            return
        common: Tensor | None = None
        text = f"block {block.index + 1}/{self.model.n_blocks}"
        for part in _parts(block.sites, [number]):
            with _timed(seconds, "hessians"):
                layer = block.module(weights)
                moments = gather_experts(
                    block, layer, stream, number, part, common is None,
                    lambda: self.reporter.step(text),
                )  # fmt: skip
                del layer
            with _timed(seconds, "matrices"):
                if moments.common is not None:
                    common = moments.common.mean(f"inputs of {self._first(of_expert)}")
                for expert in (e for e in part if e in of_expert):
                    own, names = moments.own.pop(expert), of_expert[expert]
                    assert common is not None
                    hessian, share = blend(own, common, f"input of {names[0]}")
                    more: dict[str, Any] = {"tokens": own.count}
                    if share:
                        more["common"] = round(share, 4)
                    self._quantize_site(block, names, hessian, None, matrices, records, more)

    @staticmethod
    def _first(of_expert: dict[int, list[str]]) -> str:
        return next(iter(of_expert.values()))[0]

    def _ternary_of(self, block: Block, site: int) -> list[Matrix]:
        return [
            m for m in block.matrices.values() if m.site == site and m.name in self.plan.ternary
        ]

    def _quantize_site(
        self, block: Block, names: list[str], hessian: Tensor, moments: SiteMoments | None,
        matrices: dict[str, Ternary], records: dict[str, dict[str, Any]], more: dict[str, Any],
    ) -> None:  # fmt: skip
        """Quantise the matrices that read one input, stacked by rows where they share one order."""
        for label, perm, group in self._orders(names, hessian.diagonal()):
            weights = [block.weight(n) for n in group]
            stacked = torch.cat(weights)

            def log(message: str, name: str = group[0]) -> None:
                self.reporter.warn(f"{name}: {message}")

            try:
                aim = self._target(stacked, hessian, moments, block, names)
                result, errors = quantize_matrix(
                    stacked, hessian, self.method, perm=perm, ssr=label == "ssr", target=aim,
                    log=log,
                )  # fmt: skip
            except PT2Error as e:
                raise PT2Error(f"{group[0]}: {e}") from e
            start = 0
            for name, weight in zip(group, weights, strict=True):
                stop = start + weight.shape[0]
                matrices[name] = result.rows_of(start, stop)
                records[name] = {
                    "rows": weight.shape[0], "cols": weight.shape[1],
                    "block_size": self.method.block_size, "levels": self.method.levels,
                    "order": label,
                    "norm_w": float(weight.square().sum(dtype=torch.float64)),
                    "norm_x": mean_square(weight, hessian),
                    **self.plan.tensors[name], **more, **errors.rows_of(start, stop),
                }  # fmt: skip
                start = stop

    def _target(
        self, stacked: Tensor, hessian: Tensor, moments: SiteMoments | None, block: Block,
        names: list[str],
    ) -> Tensor | None:  # fmt: skip
        if moments is None:
            return None
        members = [block.matrices[n] for n in names]
        try:
            stream = stream_error(moments.stream.mean(), members, block.sites[members[0].site])
        except PT2Error as e:
            self.reporter.warn(str(e))
            stream = None
        return target(
            stacked, hessian, self.method.damping,
            (self.config.asymmetry, moments.shift.mean()), (self.config.stream, stream),
        )  # fmt: skip

    def _orders(
        self, names: list[str], energy: Tensor
    ) -> Iterator[tuple[str, Tensor | None, list[str]]]:
        """(label, order, matrices that share it) of the matrices that read one input."""
        order = self.config.order
        if order == "ssr":
            yield from (("ssr", None, [n]) for n in names)
            return
        if order == "random":
            yield order, reorder.random_order(energy.shape[0], self.config.seed, names[0]), names
            return
        if order == "hessian":
            yield order, reorder.descending(energy), names
            return
        groups: dict[str, list[str]] = {}
        for name in names:
            role = self.plan.role(name) if order == "foldable" else "none"
            # An order that is free folds into the rows before one matrix, and so only if it is one.
            groups.setdefault(role if role in ("residual", "none") else name, []).append(name)
        for role, group in groups.items():
            yield (*self._order(role, group[0], energy), group)

    def _order(self, group: str, name: str, energy: Tensor) -> tuple[str, Tensor | None]:
        if group == "none":
            return "none", None
        if group == "residual":
            return "residual", self.residual_perm
        assert self.plan.fold is not None
        heads = self.plan.fold.edges[name].heads
        if heads is None:
            return "hessian", reorder.descending(energy)
        return "within-head", reorder.within_heads(energy, heads.dim, heads.n_head // heads.n_kv)

    def _replay(self, stream: Stream, block: Block) -> None:
        """Run a block that an earlier run has written, and check that nothing has changed."""
        index = block.index
        artifact = Artifact(self.writer.path, self.writer.manifest, np.empty(0, np.int32))
        stored = {n: _ternary(m).dequantize() for n, m in artifact.block(index).items()}
        weights = {n: w.to(self.model.device) for n, w in stored.items()}
        if isinstance(self.proof, ProofRun):
            self.proof.advance(block, weights)
        if index == self.model.n_blocks - 1:
            return
        stream.advance(block.module(weights), index, self.reporter.step)
        known = self.writer.manifest.get("activations", {}).get(str(index))
        if activation_digest(stream) != known:
            raise PT2Error(
                f"cannot resume {self.writer.path}: this machine computes other activations after "
                f"block {index} than the first run did; start again with --overwrite"
            )

    def _residual_perm(self, tokens: Tensor) -> Tensor:
        """The residual stream's order, from the artifact if it is there already."""
        if GLOBAL in self.writer.manifest["files"]:
            artifact = Artifact.open(self.writer.path, allow_incomplete=True)
            return torch.from_numpy(artifact.residual_perm).long()
        perm = torch.arange(self.model.hidden_size)
        if self.config.order == "foldable":
            energy = self._residual_energy(tokens[: self.config.order_samples])
            perm = perm if energy is None else reorder.descending(energy)
        self.writer.write_global(perm.to(torch.int32).numpy())
        if self.known_order not in (None, self.writer.manifest["files"][GLOBAL]):
            raise PT2Error(
                f"cannot resume {self.writer.path}: {GLOBAL} is lost, and this machine computes "
                "another order than the first run did; start again with --overwrite"
            )
        return perm

    def _check_ranges(self, block: Block) -> None:
        """Refuse weights of a block that cannot become ternary, before the first one is made so."""
        for name in self.plan.blocks[block.index]:
            try:
                check_range(block.weight(name), self.config.block_size)
            except PT2Error as e:
                raise PT2Error(f"{name}: {e}") from e

    def _residual_energy(self, tokens: Tensor) -> Tensor | None:
        """Mean square of each channel at the inputs that read the residual stream.

        Taken from the full-precision model; every input counts the same (its mean is scaled to 1).

        Returns:
            float64 ``[hidden]``; None where no matrix reads the stream in an order that folds
        """
        stream = self.model.start(tokens, self.config.batch_size)
        total = torch.zeros(self.model.hidden_size, dtype=torch.float64)
        text = "ordering the residual stream"
        self.reporter.start(text, len(stream.batches) * self.model.n_blocks)
        for index in range(self.model.n_blocks):
            block = self.model.block(index)
            self._check_ranges(block)
            if self.plan.fold is None:
                continue
            for energy in self._energies(block, stream):
                total += energy / energy.mean()
        self.reporter.done()
        if not bool(total.isfinite().all()):
            raise PT2Error("NaN or Inf in the activations of the model before any quantisation: "
                           "use --dtype float32, or check the model")  # fmt: skip
        return total if bool(total.any()) else None

    def _energies(self, block: Block, stream: Stream) -> list[Tensor]:
        """Sums of squares of the channels, of every site of a block that reads the stream."""
        layer = block.module()
        wanted = sorted(
            {
                m.site
                for m in block.matrices.values()
                if self.plan.role(m.name) == "residual"
                and self.plan.kept.get(m.name) not in (ROUTER, GATE)
            }
        )
        sums: dict[int, Tensor] = {}
        for batch in stream.batches:
            seen, out = watch(
                layer, block.sites, wanted, partial(batch.run, layer, block.index),
                to_the_end=True,
            )  # fmt: skip
            inputs = [(n, x) for n in wanted if (x := seen.inputs.get(n)) is not None]
            inputs += [(n, x) for n in wanted for x in seen.experts.get(n, {}).values()]
            for number, x in inputs:
                energy = x.reshape(-1, x.shape[-1]).double().square().sum(dim=0).cpu()
                sums[number] = sums[number] + energy if number in sums else energy
            batch.hidden.copy_(out)
            self.reporter.step(f"block {block.index + 1}/{self.model.n_blocks}")
        return [sums[n] for n in wanted if n in sums]

    def _save_run(self) -> None:
        self.run["warnings"] = self.reporter.warnings
        few = {n: m for n, m in self.writer.manifest["matrices"].items() if m.get("common")}
        if few:
            self.run["few_tokens"] = {n: m["tokens"] for n, m in few.items()}
        write_json(self.writer.path / RUN, self.run)


def _parts(sites: Sequence[Site], group: list[int]) -> list[range]:
    """The experts of a site, as many at a time as memory is meant for; one part without experts."""
    site = sites[group[0]]
    if not site.slices:
        return [range(1)]
    size = max(1, EXPERT_BYTES // (8 * max(m.cols for m in site.members) ** 2))
    return [range(at, min(at + size, site.slices)) for at in range(0, site.slices, size)]


def activation_digest(stream: Stream) -> str:
    """A checksum of activations ``[..., len, hidden]`` that sees every bit and is quick to take.

    Each position's bits, as whole numbers, are summed with odd weights that differ by channel; the
    sums are hashed.
    """
    sums = []
    for batch in stream.batches:
        hidden = batch.hidden
        kind = {4: torch.int32, 2: torch.int16}[hidden.element_size()]
        weights = torch.arange(hidden.shape[-1], device=hidden.device, dtype=torch.int64) * 2 + 1
        sums += [(part.view(kind).long() * weights).sum(dim=-1).cpu() for part in hidden.split(4)]
    return sha256_array(torch.cat(sums).numpy())


def _stored(name: str, m: Ternary) -> TernaryMatrix:
    return TernaryMatrix(
        name,
        pack_ternary(m.t.cpu().numpy()),
        m.alpha.half().cpu().numpy(),
        m.mu.half().cpu().numpy(),
        m.perm.to(torch.int32).cpu().numpy(),
    )


def _ternary(m: TernaryMatrix) -> Ternary:
    return Ternary(
        torch.from_numpy(m.codes()),
        torch.from_numpy(m.alpha).float(),
        torch.from_numpy(m.mu).float(),
        torch.from_numpy(m.perm).long(),
    )


def _figures(index: int, n_blocks: int, records: dict[str, dict[str, Any]]) -> str:
    """One line for the progress bar: the relative output error of the linears done so far."""
    parts = [
        f"{name.rpartition('.')[2].removesuffix('_proj')} "
        f"{r['E_x']['final'] / r['norm_x'] if r['norm_x'] else 0:.3f}"
        for name, r in records.items()
    ]
    return f"block {index + 1}/{n_blocks}  E_x " + " ".join(parts[-4:])


@contextmanager
def _timed(into: dict[str, float], key: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    into[key] = round(into.get(key, 0.0) + time.monotonic() - began, 3)
