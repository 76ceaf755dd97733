"""What pt2-quantize refuses before it loads torch: whatever needs no more than a look at files."""

from __future__ import annotations

from pathlib import Path

from pt2_core.artifact.folder import MANIFEST, read_manifest
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.tokenizer_files import VOCABULARIES
from pt2_core.texts.sources import check_sources
from quantize.config import Config


def check_first(
    model_dir: str | Path, out: Path, config: Config, *, resume: bool = False,
    overwrite: bool = False,
) -> Checkpoint:  # fmt: skip
    """Look at output, model and calibration source.

    Raises:
        PT2Error: the output exists, the model cannot be used, or there is no such calibration
            text.
    """
    refuse_overwriting(out, resume, overwrite)
    checkpoint = Checkpoint.open(model_dir)
    check_text_source(config.calibration, "calibration text", checkpoint)
    return checkpoint


def check_text_source(source: str, what: str, checkpoint: Checkpoint) -> None:
    """Raise PT2Error unless a text is there, or token ids, and a tokenizer for the text."""
    if check_sources(source, what) and not set(VOCABULARIES) & set(checkpoint.tokenizer_files):
        raise PT2Error(
            f"{checkpoint.path} has no tokenizer ({', '.join(VOCABULARIES)}): copy the tokenizer's "
            "files there from where the model came from"
        )


def refuse_overwriting(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise PT2Error where ``out`` is a file, or holds an artifact that is not to be touched."""
    refuse_contradiction(out, resume, overwrite)
    if resume or overwrite or not (out / MANIFEST).exists():
        return
    state = "a complete" if read_manifest(out)["complete"] else "an unfinished"
    raise PT2Error(f"{out} holds {state} artifact: use --resume or --overwrite")


def refuse_contradiction(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise PT2Error for what is wrong whatever is in the folder: it needs no lock."""
    if resume and overwrite:
        raise PT2Error("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise PT2Error(f"{out} is a file; name a folder for the artifact")
