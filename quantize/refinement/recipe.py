"""The recipe ``refined``: the best closed form, then the refinement by gradients."""

from __future__ import annotations

import os
from pathlib import Path

from pt2_core.artifact.folder import MANIFEST, read_manifest
from pt2_core.errors import PT2Error
from pt2_core.files import sha256_file
from pt2_core.process.locks import folder_lock
from pt2_core.progress import Reporter
from quantize.config import CLOSED_FORM, Config
from quantize.model.torch_setup import pick_device
from quantize.pipeline import Preflight, Result, ternarize
from quantize.refinement.config import RefineConfig
from quantize.refinement.loop import Refined, forget_state, refine
from quantize.refinement.state import STATE

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
    strict: bool = False,
) -> tuple[Result, Refined]:
    """Both stages; the closed form stays in ``OUT/closed-form``.

    ``command``, ``preflight`` and ``strict`` are as in :func:`quantize.pipeline.ternarize`.

    Raises:
        PT2Error: of either stage.
    """
    out = Path(out_dir)
    closed = out / CLOSED_FORM
    with folder_lock(out):
        if resume:
            _refuse_unrefined(out)
        if overwrite:
            forget_state(out, reporter or Reporter())
        result = ternarize(
            model_dir, closed, config, resume=resume, overwrite=overwrite, reporter=reporter,
            command=command, preflight=preflight, strict=strict,
        )  # fmt: skip
        go_on = resume and ((out / STATE).is_file() or _made_from(out, closed))
        refined = refine(
            closed, out, settings, model_dir=model_dir, reporter=reporter,
            resume=go_on, overwrite=(resume and not go_on) or overwrite,
        )  # fmt: skip
    result.path = out
    return result, refined


def _refuse_unrefined(out: Path) -> None:
    """Raise PT2Error where another recipe's artifact would be replaced."""
    if (out / MANIFEST).exists() and "refinement" not in read_manifest(out):
        raise PT2Error(f"{out} holds an artifact that was not refined: name another folder with -o")


def _made_from(out: Path, closed: Path) -> bool:
    """Whether ``out`` holds a complete refinement of this very closed form.

    Another one is what a stopped ``--overwrite`` has not come to replace yet.
    """
    if not (out / MANIFEST).exists():
        return False
    manifest = read_manifest(out)
    source = manifest.get("refinement", {}).get("source")
    return bool(manifest["complete"]) and source == sha256_file(closed / MANIFEST)
