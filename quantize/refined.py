"""The recipe ``refined``: the best closed form, then the refinement by gradients."""

from __future__ import annotations

import os
from pathlib import Path

from pt2_core.progress import Reporter
from quantize.artifact import MANIFEST, Artifact, read_manifest
from quantize.common import PT2Error
from quantize.config import CLOSED_FORM, Config
from quantize.distill import Held
from quantize.machine import pick_device
from quantize.pipeline import Preflight, Result, ternarize
from quantize.refine import Refined, refine
from quantize.refine_config import RefineConfig
from quantize.refine_state import STATE

TOKENS = 16384  # of a step
PASS = 4096  # of these, at a time


def refine_settings(config: Config, text: str | None, steps: int | None) -> RefineConfig:
    """Settings of the second stage that fit the first's.

    Args:
        text: what to train on; None takes the calibration's text.
        steps: None takes the default.
    """
    device = pick_device(config.device)
    return RefineConfig(
        steps=RefineConfig.steps if steps is None else steps,
        text=text or config.calibration, seqlen=config.seqlen, seed=config.seed,
        text_field=None if text else config.text_field, allow_long=config.allow_long,
        batch_size=max(1, TOKENS // config.seqlen), micro_batch=max(1, PASS // config.seqlen),
        embeddings=True,
        device=device, dtype="bfloat16" if device == "cuda" else config.dtype,
        threads=config.threads,
    )  # fmt: skip


def ternarize_and_refine(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: Config,
    settings: RefineConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str | None = None,
    preflight: Preflight | None = None,
) -> tuple[Result, Refined]:
    """Both stages; the closed form stays in ``OUT/closed-form``.

    ``command`` and ``preflight`` are as in :func:`quantize.pipeline.ternarize`.

    Raises:
        PT2Error: of either stage.
    """
    out = Path(out_dir)
    closed = out / CLOSED_FORM
    if resume and (out / MANIFEST).exists() and read_manifest(out)["complete"]:
        result = ternarize(model_dir, closed, config, resume=True, reporter=reporter)
        return result, _finished(out)
    result = ternarize(
        model_dir, closed, config, resume=resume, overwrite=overwrite, reporter=reporter,
        command=command, preflight=preflight,
    )  # fmt: skip
    refined = refine(
        closed, out, settings, model_dir=model_dir, overwrite=overwrite, reporter=reporter,
        resume=resume and (out / STATE).is_file(),
    )  # fmt: skip
    result.path = out
    return result, refined


def _finished(out: Path) -> Refined:
    """What an earlier run made, checked."""
    artifact = Artifact.open(out)
    for index in range(artifact.n_blocks):
        artifact.block(index)
    artifact.replaced()
    record = artifact.manifest.get("refinement")
    if record is None:
        raise PT2Error(f"{out} holds an artifact that was not refined: name another folder with -o")
    return Refined(out, Held(**record["before"]), Held(**record["after"]))
