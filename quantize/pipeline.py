"""From a checkpoint to an artifact: streams decoder blocks, resumes, reports.

For every block: the calibration activations (which come from the blocks quantised before) run
through the block as far as its last linear's input, which gives one Hessian per input; the linears
that share an input are quantised as one tall matrix; then the activations run through the block
with the weights as they are stored. Memory holds one block and the activations.
"""

from __future__ import annotations

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pt2_core.artifact.folder import (
    GLOBAL,
    MANIFEST,
    RUN,
    Artifact,
    ArtifactWriter,
    TernaryMatrix,
    pack_ternary,
    sha256_array,
)
from pt2_core.errors import PT2Error
from pt2_core.files import read_json, write_json
from pt2_core.model.architectures import Site
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.process.locks import folder_lock
from pt2_core.progress import Reporter
from pt2_core.texts.tokens import check_context, context_limit
from quantize.calibration import load_calibration
from quantize.config import Config
from quantize.first_checks import check_first, check_widths, refuse_contradiction
from quantize.method import reorder
from quantize.method.gptq import Method, Ternary, damp, quantize_matrix
from quantize.method.hessian import SiteMoments, mean_square
from quantize.method.ternary import check_range
from quantize.model.streamed import StreamedModel
from quantize.model.torch_setup import arithmetic, pick_device, versions
from quantize.proof_run import ProofRun, start_proof

# Tries what comes after a run: (model, shapes of the ternary tensors by name) -> notes.
Preflight = Callable[[Checkpoint, Mapping[str, tuple[int, int]]], list[str]]


@dataclass
class Result:
    """What a run made.

    Attributes:
        path: the artifact.
        matrices: the manifest's entries, see docs/design.md.
        kept: linears left as they are -> reason.
        block_size: columns per alpha and mu.
        seconds: of this run.
        warnings: what the log said.
    """

    path: Path
    matrices: dict[str, dict[str, Any]]
    kept: dict[str, str]
    block_size: int
    seconds: float
    warnings: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Weights that are now ternary."""
        return sum(m["rows"] * m["cols"] for m in self.matrices.values())


def ternarize(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: Config | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
    preflight: Preflight | None = None,
) -> Result:
    """Ternarise a Hugging Face causal LM into an artifact folder.

    Args:
        model_dir: folder with ``config.json``, safetensors and, for text calibration, a tokenizer.
        out_dir: the artifact's folder; made if missing.
        config: the settings; the default recipe if None.
        resume: take up a run that was stopped; ends in the same bytes as one that was not.
        overwrite: replace an artifact that is already there.
        reporter: told of progress.
        command: the command line that resumes this run; kept in run.json, for messages.
        preflight: called once the headers are known and before a weight is read; its notes are
            kept in ``run.json``.

    Raises:
        PT2Error: anything the user can mend; one line that names what and where.
    """
    out = Path(out_dir)
    refuse_contradiction(out, resume, overwrite)
    with folder_lock(out):
        return _ternarize(
            Path(model_dir), out, config or Config(), resume, overwrite, reporter or Reporter(),
            command, preflight,
        )  # fmt: skip


def _ternarize(
    model_dir: Path, out: Path, config: Config, resume: bool, overwrite: bool, reporter: Reporter,
    command: str | None, preflight: Preflight | None,
) -> Result:  # fmt: skip
    """:func:`ternarize` with the output folder locked."""
    began = time.monotonic()
    checkpoint = check_first(model_dir, out, config, resume=resume, overwrite=overwrite)
    device = pick_device(config.device)
    check_context(
        config.seqlen, context_limit(checkpoint.raw_config), checkpoint.path.name, "--seqlen",
        allow=config.allow_long, warn=reporter.warn,
    )  # fmt: skip
    with arithmetic(config.threads) as threads:
        model = StreamedModel(checkpoint, device, config.dtype)
        names, kept = check_widths(checkpoint, config)
        for note in checkpoint.notes:
            reporter.warn(note)
        run = {**_run_record(out, checkpoint, resume), "resume": command}
        if preflight is not None and "preflight" not in run:
            run["preflight"] = _try_export(preflight, checkpoint, names, reporter)
        reporter.start("reading the model", checkpoint.bytes, "bytes", every=5)
        digest, run["fingerprint"] = checkpoint.fingerprint(
            run.get("fingerprint"), lambda count: reporter.step("checksum", count)
        )
        calibration = load_calibration(
            config.calibration, checkpoint.path, samples=config.samples + config.sensitivity,
            seqlen=config.seqlen, vocab=model.config.vocab_size, seed=config.seed, bos=config.bos,
            text_field=config.text_field,
        )  # fmt: skip
        reporter.done()
        for note in calibration.notes:
            reporter.note(note)
        identity = {
            "model": checkpoint.identity(digest),
            "settings": {**config.identity(), "device": device, "threads": threads},
            "versions": versions(),
            "calibration": calibration.record,
            "kept": kept,
        }
        exists = (out / MANIFEST).exists()
        writer = (ArtifactWriter.resume if resume and exists else ArtifactWriter.create)(
            out, identity
        )
        proof = start_proof(checkpoint, config.proof_tokens, device, config.max_context)
        worker = _Run(model, config, writer, reporter, run, proof)
        worker.blocks(calibration.tokens[: config.samples])
        if config.sensitivity:
            _measure(
                out, checkpoint, calibration.tokens[config.samples :], config, device, reporter
            )
    seconds = time.monotonic() - began
    manifest = writer.manifest
    return Result(
        out, manifest["matrices"], manifest["kept"], config.block_size, seconds, reporter.warnings
    )


def _try_export(
    preflight: Preflight, checkpoint: Checkpoint, names: list[str], reporter: Reporter
) -> list[str]:
    """Run the preflight on the tensors of ternary linears; its notes, which are said as well."""
    shapes = {}
    for name in names:
        rows, cols = checkpoint.info(f"{name}.weight").shape
        shapes[f"{name}.weight"] = (rows, cols)
    reporter.start("trying the export", 1)
    notes = preflight(checkpoint, shapes)
    reporter.done()
    for note in notes:
        reporter.note(note)
    return notes


def _measure(
    out: Path, checkpoint: Checkpoint, tokens: Tensor, config: Config, device: str,
    reporter: Reporter,
) -> None:  # fmt: skip
    from pt2_core.artifact import sensitivity  # measure imports this module
    from quantize import sensitivities

    artifact = Artifact.open(out)
    result = sensitivities.measure(
        artifact, checkpoint, tokens, device=device, dtype=config.dtype,
        batch_size=config.batch_size, reporter=reporter,
    )  # fmt: skip
    sensitivity.write(artifact, result)
    reporter.note(sensitivities.summary(result))


class _Seen:
    """Inputs and streams of the wanted sites in one batch."""

    def __init__(self, wanted: list[int]) -> None:
        self.wanted = wanted
        self.inputs: dict[int, Tensor] = {}
        self.streams: dict[int, Tensor] = {}

    def input(self, number: int, x: Tensor) -> None:
        if number in self.wanted:
            self.inputs[number] = x

    def stream(self, number: int, x: Tensor) -> None:
        if number in self.wanted:
            self.streams[number] = x


class _Run:
    """One run over all blocks."""

    def __init__(
        self, model: StreamedModel, config: Config, writer: ArtifactWriter, reporter: Reporter,
        run: dict[str, Any], proof: ProofRun | str,
    ) -> None:  # fmt: skip
        self.model = model
        self.config = config
        self.writer = writer
        self.reporter = reporter
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
        batches = -(-tokens.shape[0] // self.config.batch_size)
        hidden = self.model.embed(tokens)
        # The same activations in the full-precision model, where a target asks for them.
        asymmetric = self.config.asymmetry or self.config.stream
        self.reference = hidden.clone() if asymmetric else None
        self.reporter.start("ternarising", self._passes(done) * batches)
        for index in range(self.model.n_blocks):
            if index < done:
                self._replay(hidden, index)
            else:
                self._quantize(hidden, index, batches)
            if self.reference is not None and index < self.model.n_blocks - 1:
                self._propagate(self.reference, index, None)
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
        model, sites = self.model, self.model.adapter.sites
        found = self.writer.drop_damaged(
            lambda index: [model.linear_name(index, name) for s in sites for name in s.linears]
        )
        if found:
            done = self.writer.blocks_done
            again = f"quantising again from block {done} on"
            if done == model.n_blocks:
                again = "making it again"
            self.reporter.warn(f"{self.writer.path}: {', '.join(found)}: {again}")

    def _passes(self, done: int) -> int:
        """Passes over the calibration text that are ahead; a block's matrices count as one."""
        blocks, todo = self.model.n_blocks, self.model.n_blocks - done
        hessians = len(self.model.adapter.sites) if self.config.sequential else 1
        # Nothing reads what the last block would put out.
        propagated = (blocks - 1) * (1 if self.reference is None else 2)
        return todo * (hessians + 1) + propagated

    def _quantize(self, hidden: Tensor, index: int, batches: int) -> None:
        seconds: dict[str, float] = {}
        matrices: dict[str, Ternary] = {}
        records: dict[str, dict[str, Any]] = {}
        sites = range(len(self.model.adapter.sites))
        for group in [[n] for n in sites] if self.config.sequential else [list(sites)]:
            with _timed(seconds, "hessians"):
                weights = {name: m.dequantize() for name, m in matrices.items()}
                moments = self._moments(hidden, index, group, weights)
            with _timed(seconds, "matrices"):
                for number in group:
                    site = self.model.adapter.sites[number]
                    self._quantize_site(index, site, moments.pop(number), matrices, records)
                    text = _figures(index, self.model.n_blocks, records)
                    self.reporter.step(text, batches / len(sites))
        last = index == self.model.n_blocks - 1
        with _timed(seconds, "propagation"):
            weights = {name: m.dequantize() for name, m in matrices.items()}
            self._prove(index, weights)
            if not last:
                self._propagate(hidden, index, weights)
                self.writer.record("activations", str(index), activation_digest(hidden))
        with _timed(seconds, "writing"):
            self.writer.write_block(
                index, [_stored(name, m) for name, m in matrices.items()], records
            )
        self.run.setdefault("seconds", {})[str(index)] = seconds
        self._save_run()

    def _quantize_site(
        self, index: int, site: Site, moments: SiteMoments, matrices: dict[str, Ternary],
        records: dict[str, dict[str, Any]],
    ) -> None:  # fmt: skip
        """Quantise the linears of one site, stacked by rows where they share one order."""
        kept = self.writer.manifest["kept"]
        names = [self.model.linear_name(index, linear) for linear in site.linears]
        names = [n for n in names if n not in kept]
        if not names:
            return
        hessian = moments.inputs.mean(f"input of {names[0]}")
        label, perm = self._order(site, hessian.diagonal(), names[0])
        ssr = label == "ssr"
        for group in [[n] for n in names] if ssr else [names]:
            weights = [self.model.weight(n) for n in group]
            stacked = torch.cat(weights)

            def log(message: str, name: str = group[0]) -> None:
                self.reporter.warn(f"{name}: {message}")

            try:
                target = self._target(stacked, hessian, moments)
                result, errors = quantize_matrix(
                    stacked, hessian, self.method, perm=perm, ssr=ssr, target=target, log=log
                )
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
                    **errors.rows_of(start, stop),
                }  # fmt: skip
                start = stop

    def _order(self, site: Site, energy: Tensor, name: str) -> tuple[str, Tensor | None]:
        order = self.config.order
        if order in ("none", "ssr"):
            return order, None
        if order == "random":
            return order, reorder.random_order(energy.shape[0], self.config.seed, name)
        if order == "hessian" or site.role == "free":
            return "hessian", reorder.descending(energy)
        if site.role == "heads":
            model = self.model
            return "within-head", reorder.within_heads(energy, model.head_dim, model.queries_per_kv)
        return "residual", self.residual_perm

    def _moments(
        self, hidden: Tensor, index: int, wanted: list[int], weights: dict[str, Tensor]
    ) -> dict[int, SiteMoments]:
        """Moments of the inputs of some of a block's sites, over all calibration tokens.

        Args:
            wanted: the sites' numbers.
            weights: of the block's linears that are quantised already.
        """
        model, last = self.model, max(wanted)
        layer = model.load_block(index)
        original = model.load_block(index) if self.reference is not None else layer
        model.replace_weights(layer, index, weights)
        moments = {number: SiteMoments() for number in wanted}
        references = hidden if self.reference is None else self.reference
        batch_size = self.config.batch_size
        for batch, reference in zip(
            hidden.split(batch_size), references.split(batch_size), strict=True
        ):
            seen = _Seen(wanted)
            model.capture_inputs(
                layer, batch, index, seen.input, take_stream=seen.stream, last=last
            )
            full = seen
            if self.reference is not None:
                full = _Seen(wanted)
                model.capture_inputs(
                    original, reference, index, full.input, take_stream=full.stream, last=last
                )
            for number in wanted:
                moments[number].add(
                    seen.inputs[number], full.inputs[number],
                    seen.streams.get(number), full.streams.get(number),
                    self.config.asymmetry > 0, self.config.stream > 0,
                )  # fmt: skip
            self.reporter.step(f"block {index + 1}/{model.n_blocks}")
        return moments

    def _target(self, weight: Tensor, hessian: Tensor, moments: SiteMoments) -> Tensor | None:
        """What the quantised weights are to come close to; None: the weights themselves."""
        shift = torch.zeros_like(weight, dtype=torch.float64)
        inputs, stream = moments.shift.mean(), moments.stream.mean()
        if inputs is None and stream is None:
            return None
        if inputs is not None:
            shift += self.config.asymmetry * (weight.double() @ inputs)
        if stream is not None:
            shift += self.config.stream * stream
        damped, _ = damp(hessian, self.method.damping)
        move = torch.cholesky_solve(shift.T, torch.linalg.cholesky(damped)).T
        return weight + move.float()

    def _propagate(self, hidden: Tensor, index: int, weights: dict[str, Tensor] | None) -> None:
        """Replace the activations by the block's outputs, in place."""
        layer = self.model.load_block(index, weights)
        for batch in hidden.split(self.config.batch_size):
            batch.copy_(self.model.forward_block(layer, batch, index))
            self.reporter.step()

    def _prove(self, index: int, weights: dict[str, Tensor]) -> None:
        """Take the proof's windows through a block."""
        if isinstance(self.proof, ProofRun):
            self.proof.advance(index, weights)

    def _replay(self, hidden: Tensor, index: int) -> None:
        """Run a block that an earlier run has written, and check that nothing has changed."""
        artifact = Artifact(self.writer.path, self.writer.manifest, np.empty(0, np.int32))
        stored = {n: _ternary(m).dequantize() for n, m in artifact.block(index).items()}
        weights = {n: w.to(hidden.device) for n, w in stored.items()}
        self._prove(index, weights)
        if index == self.model.n_blocks - 1:
            return
        self._propagate(hidden, index, weights)
        known = self.writer.manifest.get("activations", {}).get(str(index))
        if activation_digest(hidden) != known:
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
            perm = reorder.descending(self._residual_energy(tokens[: self.config.order_samples]))
        self.writer.write_global(perm.to(torch.int32).numpy())
        if self.known_order not in (None, self.writer.manifest["files"][GLOBAL]):
            raise PT2Error(
                f"cannot resume {self.writer.path}: {GLOBAL} is lost, and this machine computes "
                "another order than the first run did; start again with --overwrite"
            )
        return perm

    def _check_ranges(self, layer: torch.nn.Module, index: int) -> None:
        """Refuse weights of a block that cannot become ternary, before the first one is made so."""
        for linear in (name for site in self.model.adapter.sites for name in site.linears):
            name = self.model.linear_name(index, linear)
            if name in self.writer.manifest["kept"]:
                continue
            try:
                weight = layer.get_parameter(f"{linear}.weight")
                check_range(weight, self.config.block_size)
            except PT2Error as e:
                raise PT2Error(f"{name}: {e}") from e

    def _residual_energy(self, tokens: Tensor) -> Tensor:
        """Mean square of each channel at the inputs that read the residual stream.

        Taken from the full-precision model; every input counts the same (its mean is scaled to 1).

        Returns:
            float64 ``[hidden]``
        """
        batches = -(-tokens.shape[0] // self.config.batch_size)
        self.reporter.start("ordering the residual stream", batches * self.model.n_blocks)
        hidden = self.model.embed(tokens)
        total = torch.zeros(self.model.hidden_size, dtype=torch.float64)
        for index in range(self.model.n_blocks):
            layer = self.model.load_block(index)
            self._check_ranges(layer, index)
            sums: dict[int, Tensor] = {}

            def take(number: int, x: Tensor, sums: dict[int, Tensor] = sums) -> None:
                energy = x.reshape(-1, x.shape[-1]).double().square().sum(dim=0).cpu()
                sums[number] = sums[number] + energy if number in sums else energy

            for batch in hidden.split(self.config.batch_size):
                out = self.model.capture_inputs(layer, batch, index, take, to_the_end=True)
                batch.copy_(out)
                self.reporter.step(f"block {index + 1}/{self.model.n_blocks}")
            for number, site in enumerate(self.model.adapter.sites):
                if site.role == "residual":
                    total += sums[number] / sums[number].mean()
        self.reporter.done()
        if not bool(total.isfinite().all()):
            raise PT2Error("NaN or Inf in the activations of the model before any quantisation: "
                           "use --dtype float32, or check the model")  # fmt: skip
        return total

    def _save_run(self) -> None:
        self.run["warnings"] = self.reporter.warnings
        write_json(self.writer.path / RUN, self.run)


def activation_digest(hidden: Tensor) -> str:
    """A checksum of activations ``[n, len, hidden]`` that sees every bit and is quick to take.

    Each position's bits, as whole numbers, are summed with odd weights that differ by channel; the
    sums are hashed.
    """
    kind = {4: torch.int32, 2: torch.int16}[hidden.element_size()]
    weights = torch.arange(hidden.shape[-1], device=hidden.device, dtype=torch.int64) * 2 + 1
    sums = [(part.view(kind).long() * weights).sum(dim=-1).cpu() for part in hidden.split(4)]
    return sha256_array(torch.cat(sums).numpy())


def _run_record(out: Path, checkpoint: Checkpoint, resume: bool) -> dict[str, Any]:
    """``run.json`` of an earlier run, if there is a usable one, made to fit this one.

    A run that starts anew keeps only the fingerprint's cache.
    """
    run: Any = {}
    if (out / RUN).is_file():
        try:
            run = read_json(out / RUN)
        except PT2Error:
            run = {}  # it only holds timings and a cache
    run = run if isinstance(run, dict) else {}
    if not resume:
        run = {k: v for k, v in run.items() if k == "fingerprint"}
    for key in ("fingerprint", "seconds"):
        if not isinstance(run.get(key, {}), dict):
            del run[key]
    run["model_dir"] = str(checkpoint.path.resolve())
    run["notes"] = checkpoint.notes
    run["host"] = f"{platform.node()} ({platform.machine()}, {os.cpu_count()} cores)"
    return run


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
    into[key] = round(time.monotonic() - began, 3)
