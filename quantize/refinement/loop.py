"""Refine an artifact by gradients: end-to-end KL distillation from the full-precision model.

    pt2-refine MODEL-pt2 -o MODEL-refined --text calib.txt --device cuda
    pt2-refine MODEL-pt2 -o MODEL-refined --text calib.txt --codes frozen --steps 300
    pt2-refine MODEL-pt2 -o MODEL-refined --resume ...        take up a run that was stopped

The artifact's model (the student) and the source model (the teacher) read the same text; alpha, mu
and the norms, and with --codes ste or soft the ternary codes themselves, move so that the student's
next-token distribution comes close to the teacher's. The result is an artifact again: same format,
same size, same speed. The text's last windows are not trained on but watched, and what is written
is the state that was best on them.
"""

from __future__ import annotations

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pt2_core.artifact.folder import (
    MANIFEST,
    PROOF,
    RUN,
    Artifact,
    ArtifactWriter,
    first_difference,
    read_manifest,
    remove_leftovers,
    sha256_array,
)
from pt2_core.artifact.proof import Proof
from pt2_core.artifact.source import check_made_from
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes, human_seconds, sha256_file, write_json
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.process.locks import folder_lock
from pt2_core.progress import Reporter
from pt2_core.texts.tokens import check_context, context_limit
from quantize.model.streamed import StreamedModel
from quantize.model.student import (
    check_trainable,
)
from quantize.model.torch_setup import arithmetic, pick_device, versions
from quantize.proof_run import renew_proof
from quantize.refinement.config import RefineConfig
from quantize.refinement.distill import Held
from quantize.refinement.state import STATE, remove_state, save_state
from quantize.refinement.store import (
    changed_codes,
    store_proof,
    write_refined,
)
from quantize.refinement.texts import text_tokens
from quantize.refinement.training import Run


@dataclass
class Refined:
    """What a run made.

    Attributes:
        path: the refined artifact.
        before, after: on the held-out windows.
        history: one record per look: step, tokens, kl (training), and the held-out figures.
        seconds: of this run; tokens_per_second: of its steps, looks left out.
        peak_bytes: most GPU memory that was allocated (0 on a CPU).
        changed: share of the ternary codes that are no longer what they were.
    """

    path: Path
    before: Held
    after: Held
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    changed: float = 0.0

    def summary(self) -> str:
        """Three lines: what was gained, how many codes changed, what it cost."""
        a, b = self.before, self.after
        cost = f"{human_seconds(self.seconds)}, {self.tokens_per_second:.0f} tokens/s"
        if self.peak_bytes:
            cost += f", {human_bytes(self.peak_bytes)} of GPU memory"
        return (
            f"held-out  KL {a.kl:.4f} -> {b.kl:.4f}, perplexity {a.perplexity:.3f} -> "
            f"{b.perplexity:.3f} (full precision {b.teacher_perplexity:.3f}), same top token "
            f"{a.same_top:.1%} -> {b.same_top:.1%}\n"
            f"codes     {self.changed:.2%} changed\n"
            f"time      {cost}"
        )


def refine(
    artifact_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: RefineConfig,
    *,
    model_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Refined:
    """Refine an artifact into a new one.

    Args:
        artifact_dir: a complete artifact.
        out_dir: the refined artifact's folder; made if missing.
        model_dir: the source model; None takes the folder that the artifact was made from.
        resume: go on from the last state of a run that was stopped.
        overwrite: replace an artifact that is already there.

    Raises:
        PT2Error: anything the user can mend; one line that names what and where.
    """
    source, out = Artifact.open(artifact_dir), Path(out_dir)
    _check_names(source, out, resume, overwrite)
    with folder_lock(out):
        return _refine(source, out, config, model_dir, resume, overwrite, reporter or Reporter())


def _refine(
    source: Artifact, out: Path, config: RefineConfig, model_dir: str | os.PathLike[str] | None,
    resume: bool, overwrite: bool, reporter: Reporter,
) -> Refined:  # fmt: skip
    """:func:`refine` with the output folder locked."""
    began = time.monotonic()
    _check_output(out, resume, overwrite)
    model = source.source_model(model_dir, "--model")
    device = pick_device(config.device)
    checkpoint = Checkpoint.open(model)
    check_made_from(source, checkpoint)
    with arithmetic(config.threads), torch.enable_grad():
        streamed = StreamedModel(checkpoint, device, config.dtype)
        check_trainable(streamed.shell.model)
        check_context(
            config.seqlen, context_limit(checkpoint.raw_config), checkpoint.path.name, "--seqlen",
            allow=config.allow_long, warn=reporter.warn,
        )  # fmt: skip
        for note in checkpoint.notes:
            reporter.warn(note)
        vocab = streamed.config.vocab_size
        tokens = text_tokens(config, checkpoint.path, vocab, reporter.note)
        identity = {
            "settings": {**config.identity(), "device": device},
            "source": sha256_file(source.path / MANIFEST),
            "tokens_sha256": sha256_array(tokens.to(torch.int32).numpy()),
            "versions": versions(),
        }
        remove_leftovers(out)
        if resume and not (out / STATE).is_file() and (out / MANIFEST).exists():
            done = _complete(out, source, model, identity)
            _mend_proof(checkpoint, source, out, device, reporter)
            return done
        run = Run(config, device, tokens, reporter)
        run.prepare(streamed.config, checkpoint, source, out if resume else None, identity)
        if not resume:
            forget_state(out, reporter)  # now that nothing more can refuse this run
        if not run.ended:
            run.train(lambda: save_state(out, identity, run.state()))
            # From here on a stop costs nothing but the writing.
            save_state(out, identity, run.result())
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    write_refined(
        out, source, run.snapshot, identity, run.before, run.best,
        lambda artifact: renew_proof(checkpoint, source, artifact, device),
    )  # fmt: skip
    result = Refined(
        out, run.before, run.best, run.history, time.monotonic() - began, run.speed(), peak,
        changed_codes(source, run.snapshot),
    )  # fmt: skip
    write_json(out / RUN, _run_record(source, model, result))
    remove_state(out)
    return result


def forget_state(out: Path, reporter: Reporter) -> None:
    """Remove the state of an unfinished run, and say so first."""
    if (out / STATE).is_file():
        reporter.warn(f"{out / STATE}, the state of an unfinished refinement, is removed")
        remove_state(out)


def _complete(out: Path, source: Artifact, model: Path, identity: dict[str, Any]) -> Refined:
    """What an earlier run made of the same input, checked.

    Raises:
        PT2Error: it is unfinished without a state, damaged, or of other settings.
    """
    if not read_manifest(out)["complete"]:
        raise PT2Error(f"{out} is unfinished and has no {STATE} to go on from: use --overwrite")
    artifact = Artifact.open(out)
    record = artifact.manifest.get("refinement", {})
    old = {"settings": artifact.manifest["settings"].get("refine"),
           **{k: record.get(k) for k in ("source", "tokens_sha256", "versions")}}  # fmt: skip
    difference = first_difference(old, json.loads(json.dumps(identity)), "refine")
    if difference:
        raise PT2Error(f"cannot resume {out}: {difference}; use the old settings, or --overwrite")
    for index in range(artifact.n_blocks):
        artifact.block(index)
    artifact.replaced()
    result = Refined(out, Held(**record["before"]), Held(**record["after"]))
    if not (out / RUN).is_file():
        write_json(out / RUN, _run_record(source, model, result))
    return result


def _mend_proof(
    checkpoint: Checkpoint, source: Artifact, out: Path, device: str, reporter: Reporter
) -> None:
    """Make a finished refinement's proof again where its file is gone or damaged."""
    artifact = Artifact.open(out)
    with suppress(PT2Error):
        if Proof.read(artifact) is not None or "proof" in artifact.manifest:
            return
    reporter.warn(f"{out / PROOF} is gone or damaged: making it again")
    proof = renew_proof(checkpoint, source, artifact, device)
    store_proof(ArtifactWriter(out, artifact.manifest), proof)


def _check_names(source: Artifact, out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise PT2Error("--resume and --overwrite exclude each other")
    if out.resolve() == source.path.resolve():
        raise PT2Error(f"{out} is the artifact to be refined: name another folder with -o")
    if out.exists() and not out.is_dir():
        raise PT2Error(f"{out} is a file; name a folder for the artifact")


def _check_output(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to replace what is there, or to forget a state, unless told to."""
    if overwrite or resume:
        return
    if (out / STATE).is_file():
        raise PT2Error(f"{out} holds the state of an unfinished run: use --resume or --overwrite")
    if (out / MANIFEST).exists():
        state = "a complete" if read_manifest(out)["complete"] else "an unfinished"
        raise PT2Error(f"{out} holds {state} artifact already: use --overwrite")


def _run_record(source: Artifact, model: Path, result: Refined) -> dict[str, Any]:
    return {
        "model_dir": str(model.resolve()), "refined_from": str(source.path.resolve()),
        "history": result.history, "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "peak_memory": human_bytes(result.peak_bytes), "codes_changed": result.changed,
    }  # fmt: skip
