"""The state of an unfinished refinement on the disk: ``refine-state.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pt2_core.artifact.folder import first_difference
from pt2_core.artifact.manifest import HELD
from pt2_core.digest import sha256_content
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, parse_json
from pt2_core.safetensors_file import read_header
from pt2_core.schema import boolean, integer, number, optional, record, sequence, validate
from quantize.refinement.config import STATE_FILE

STATE = STATE_FILE


def save_state(out: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a state atomically.

    Args:
        identity: what a resumed run must have the same.
        state: ``tensors`` (name -> tensor) and ``record`` (JSON).
    """
    tensors = {k: v.detach().contiguous().cpu() for k, v in state["tensors"].items()}
    content = {"identity": identity, "record": state["record"]}
    notes = {k: json.dumps(v) for k, v in content.items()} | {"sha256": _digest(content, tensors)}
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
    again = "start again with --overwrite"
    try:
        with safe_open(file, framework="pt") as f:
            notes = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as e:
        raise PT2Error(f"{file} cannot be read ({e}); {again}") from e
    if missing := [k for k in ("identity", "record", "sha256") if k not in notes]:
        raise PT2Error(f"{file} has no {missing[0]} in its metadata; {again}")
    content = {k: parse_json(notes[k], f"{file}: its {k}") for k in ("identity", "record")}
    difference = first_difference(
        content["identity"], json.loads(json.dumps(identity)), "refine"
    )  # first, since it says most
    if difference:
        raise PT2Error(f"cannot resume {out}: {difference}; use the old settings, or --overwrite")
    if notes["sha256"] != _digest(content, tensors):
        raise PT2Error(f"{file} is damaged (not the checksum in its metadata); {again}")
    validate(content["record"], _RECORD, file, again)
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise PT2Error(f"{file}: {name} has NaN or Inf in it; {again}")
    return tensors, content["record"]


_LOOK = {"step": integer(0), "tokens": integer(0), "kl": optional(number()), "held_out": HELD}
_RECORD = record(
    {"step": integer(0), "looks_without_gain": integer(0), "elapsed": number(0),
     "history": sequence(record(_LOOK)), "before": HELD, "best": HELD},
    {"ended": boolean},
)  # fmt: skip


def check_tensors(out: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise PT2Error unless a state's tensors have the names, shapes and dtypes of ``wanted``."""
    for name in sorted(tensors.keys() | wanted.keys()):
        ours, theirs = (
            None if t is None else (t.shape, t.dtype) for t in (wanted.get(name), tensors.get(name))
        )
        if ours != theirs:
            raise PT2Error(
                f"{out / STATE}: {name} is not of this run; start again with --overwrite"
            )


def _digest(content: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    arrays = {k: v.reshape(-1).view(torch.uint8).numpy() for k, v in tensors.items()}
    shapes = {k: [str(v.dtype), *v.shape] for k, v in tensors.items()}
    return sha256_content({**content, "tensors": shapes}, arrays)


def remove_state(out: Path) -> None:
    """Remove a state that is no longer needed."""
    (out / STATE).unlink(missing_ok=True)
