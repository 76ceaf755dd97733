"""The state of an unfinished refinement on the disk: ``refine-state.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize.artifact import first_difference
from quantize.common import PT2Error, atomic_path
from quantize.refine_config import STATE_FILE
from quantize.safetensors_file import read_header

STATE = STATE_FILE


def save_state(out: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a state atomically.

    Args:
        identity: what a resumed run must have the same.
        state: ``tensors`` (name -> tensor) and ``record`` (JSON).
    """
    notes = {"identity": json.dumps(identity), "record": json.dumps(state["record"])}
    tensors = {k: v.detach().contiguous().cpu() for k, v in state["tensors"].items()}
    with atomic_path(out / STATE) as tmp:
        try:
            save_file(tensors, tmp, metadata=notes)
        except SafetensorError as e:
            raise PT2Error(f"cannot write {out / STATE}: {e}") from e


def load_state(out: Path, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state and check that it belongs to this run.

    Raises:
        PT2Error: there is none, it is damaged, or of a run with other settings (the first
            difference is named).
    """
    file = out / STATE
    if not file.is_file():
        raise PT2Error(f"{out} has no state to resume from ({STATE}): start without --resume")
    read_header(file)
    try:
        with safe_open(file, framework="pt") as f:
            notes = f.metadata()
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        known, record = json.loads(notes["identity"]), json.loads(notes["record"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        raise PT2Error(f"{file} cannot be read ({e}); start without --resume") from e
    difference = first_difference(known, json.loads(json.dumps(identity)), "refine")
    if difference:
        raise PT2Error(f"cannot resume {out}: {difference}; use the old settings, or --overwrite")
    return tensors, record


def remove_state(out: Path) -> None:
    """Remove a state that is no longer needed."""
    (out / STATE).unlink(missing_ok=True)
