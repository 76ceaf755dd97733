"""From a checkpoint to an artifact: streams decoder blocks, resumes, reports.

What is decided before a weight is read is here and in :mod:`quantize.plan`; the blocks' turn is
:mod:`quantize.run`.
"""

from __future__ import annotations

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pt2_core.artifact.folder import MANIFEST, RUN, Artifact, ArtifactWriter
from pt2_core.errors import PT2Error
from pt2_core.files import read_json
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.process.locks import folder_lock
from pt2_core.progress import Reporter
from pt2_core.texts.tokens import check_context, context_limit
from quantize.calibration import load_calibration
from quantize.config import Config
from quantize.first_checks import check_first, refuse_contradiction
from quantize.model.streamed import StreamedModel
from quantize.model.torch_setup import arithmetic, pick_device, versions
from quantize.plan import Plan, make_plan
from quantize.proof_run import start_proof
from quantize.run import Run

# Tries what comes after a run: (model, shapes of the files' tensors with ternary matrices by name,
# those of them that hold [in, out]) -> notes.
Preflight = Callable[[Checkpoint, Mapping[str, tuple[int, ...]], Collection[str]], list[str]]


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
        offset: whether there is a mu.
    """

    path: Path
    matrices: dict[str, dict[str, Any]]
    kept: dict[str, str]
    block_size: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    offset: bool = True

    def starved(self) -> list[str]:
        """What is to be said of experts that saw few calibration tokens; empty if none did."""
        few = {n: m for n, m in self.matrices.items() if m.get("common")}
        if not few:
            return []
        experts = sum(1 for m in self.matrices.values() if "tokens" in m)
        name = min(few, key=lambda n: few[n]["tokens"])
        return [
            f"{len(few)} of {experts} matrices saw few calibration tokens (fewest: "
            f"{few[name]['tokens']}, {name}): their Hessians are blended with their layer's; "
            f"{RUN} names all"
        ]

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
    strict: bool = False,
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
        strict: refuse a model of which some linear has to stay as it is (an odd width, say); else
            it stays so, and is named.

    Raises:
        PT2Error: anything the user can mend; one line that names what and where.
    """
    out = Path(out_dir)
    refuse_contradiction(out, resume, overwrite)
    with folder_lock(out):
        return _ternarize(
            Path(model_dir), out, config or Config(), resume, overwrite, reporter or Reporter(),
            command, preflight, strict,
        )  # fmt: skip


def _ternarize(
    model_dir: Path, out: Path, config: Config, resume: bool, overwrite: bool, reporter: Reporter,
    command: str | None, preflight: Preflight | None, strict: bool,
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
        plan = make_plan(model, config, strict=strict)
        for note in [*checkpoint.notes, *plan.notes(config)]:
            reporter.warn(note)
        run = {**_run_record(out, checkpoint, resume), "resume": command}
        if preflight is not None and "preflight" not in run:
            run["preflight"] = _try_export(preflight, checkpoint, plan, reporter)
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
            "kept": plan.kept,
        }
        exists = (out / MANIFEST).exists()
        writer = (ArtifactWriter.resume if resume and exists else ArtifactWriter.create)(
            out, identity
        )
        if plan.fold is not None:
            writer.manifest["fold"] = plan.fold.to_json()
        proof = start_proof(checkpoint, config.proof_tokens, device, config.max_context)
        worker = Run(model, plan, config, writer, reporter, run, proof)
        worker.blocks(calibration.tokens[: config.samples])
        if config.sensitivity:
            _measure(
                out, checkpoint, calibration.tokens[config.samples :], config, device, reporter
            )
    seconds = time.monotonic() - began
    manifest = writer.manifest
    return Result(
        out,
        manifest["matrices"],
        manifest["kept"],
        config.block_size,
        seconds,
        reporter.warnings,
        config.offset,
    )


def _try_export(
    preflight: Preflight, checkpoint: Checkpoint, plan: Plan, reporter: Reporter
) -> list[str]:
    """Run the preflight on the tensors of ternary linears; its notes, which are said as well."""
    names = {n: str(plan.tensors[n].get("tensor", f"{n}.weight")) for n in plan.ternary}
    shapes = {tensor: checkpoint.info(tensor).shape for tensor in names.values()}
    transposed = {names[n] for n in plan.ternary if plan.tensors[n].get("transposed")}
    reporter.start("trying the export", 1)
    notes = preflight(checkpoint, shapes, transposed)
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
