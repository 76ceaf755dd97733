"""The recipe ``refined``: the best closed form, then the refinement by gradients."""

from __future__ import annotations

import os
from pathlib import Path

from quantize.artifact import MANIFEST, read_manifest
from quantize.common import sha256_file
from quantize.config import Config
from quantize.locks import folder_lock
from quantize.machine import pick_device
from quantize.pipeline import Result, ternarize
from quantize.progress import Reporter
from quantize.refine import Refined, forget_state, refine
from quantize.refine_config import RefineConfig
from quantize.refine_state import STATE

CLOSED_FORM = "closed-form"  # the first stage's artifact, a folder inside the result's
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
) -> tuple[Result, Refined]:
    """Both stages; the closed form stays in ``OUT/closed-form``.

    Raises:
        PT2Error: of either stage.
    """
    out = Path(out_dir)
    closed = out / CLOSED_FORM
    with folder_lock(out):
        if overwrite:
            forget_state(out, reporter or Reporter())
        result = ternarize(
            model_dir, closed, config, resume=resume, overwrite=overwrite, reporter=reporter
        )
        go_on = resume and ((out / STATE).is_file() or _made_from(out, closed))
        refined = refine(
            closed, out, settings, model_dir=model_dir, reporter=reporter,
            resume=go_on, overwrite=(resume and not go_on) or overwrite,
        )  # fmt: skip
    result.path = out
    return result, refined


def _made_from(out: Path, closed: Path) -> bool:
    """Whether ``out`` holds a complete refinement of this very closed form.

    Another one is what a stopped ``--overwrite`` has not come to replace yet.
    """
    if not (out / MANIFEST).exists():
        return False
    manifest = read_manifest(out)
    source = manifest.get("refinement", {}).get("source")
    return bool(manifest["complete"]) and source == sha256_file(closed / MANIFEST)
