"""Settings of the refinement, and the memory that they ask for."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from pt2_core.cli import check_threads
from pt2_core.errors import PT2Error

CODES = ("frozen", "ste", "soft")
STATE_FILE = "refine-state.safetensors"  # of an unfinished run, in the result's folder


@dataclass(frozen=True)
class RefineConfig:
    """Settings of one refinement.

    Attributes:
        codes: ``frozen`` leaves T as it is; ``ste`` moves it by straight-through gradients;
            ``soft`` by a smooth staircase that hardens during the run.
        steps: optimiser steps.
        minutes: let the schedule follow the clock and end the run by then, or at ``steps`` if they
            come first (0: follow the steps).
            Such a run is not reproducible to the bit.
        batch_size: windows per step; micro_batch: windows that go through the models at a time.
        seqlen: tokens in a window.
        lr: step size of alpha, mu and norms, relative to their size; lr_codes: of the latents, in
            units of alpha; lr_tables: of embeddings and head, relative to their RMS.
        norms, embeddings: whether norms, and embeddings and head, are trained too.
        warmup: share of the steps in which the step size rises; it then falls as a cosine to 0.
        restore: regular expression; linears whose name it matches get their original weights back
            and the others are refined around them (None: none).
        tau: width of the soft staircase at the start; it falls to a tenth.
        per_weight: keep Adam's second moment for every weight's latent, not for every block.
        text: what to train on: text file, JSON lines, folder, data set name, or
            ``file.safetensors:tensor``; several with commas between them.
        text_field: of the text's JSON records, the field to read (None: ``text``, a chat's
            ``messages``, or the only string field).
        allow_long: take windows that are longer than the model's context.
        held_out: windows that are not trained on, but watched: of the text's end, or of the
            beginning of held_out_text, where that is given.
        eval_every: steps between two looks at them.
        patience: stop after so many looks without a new best (0: never).
        save_every: steps between two states on the disk, from which --resume goes on.
        seed: of the windows' order.
        checkpointing: keep only each decoder block's input for the backward pass.
        device, dtype: of the forward pass. Latents and steps are float32.
        threads: CPU threads (0: as torch chooses).
    """

    codes: str = "ste"
    steps: int = 1000
    minutes: float = 0.0
    batch_size: int = 32
    micro_batch: int = 8
    seqlen: int = 512
    lr: float = 5e-3
    lr_codes: float = 4e-3
    lr_tables: float = 2e-3
    norms: bool = True
    embeddings: bool = False
    warmup: float = 0.05
    restore: str | None = None
    tau: float = 0.3
    per_weight: bool = False
    text: str = "wikitext2"
    text_field: str | None = None
    allow_long: bool = False
    held_out: int = 32
    held_out_text: str | None = None
    eval_every: int = 50
    patience: int = 0
    save_every: int = 200
    seed: int = 0
    checkpointing: bool = True
    device: str = "auto"
    dtype: str = "bfloat16"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.codes not in CODES:
            raise PT2Error(f"setting codes must be one of {', '.join(CODES)}, not {self.codes!r}")
        least = {"steps": 1, "batch_size": 1, "micro_batch": 1, "seqlen": 2, "held_out": 1,
                 "eval_every": 1, "patience": 0, "save_every": 1, "seed": 0,
                 "threads": 0}  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise PT2Error(f"setting {name} must be at least {low}, not {getattr(self, name)}")
        check_threads(self.threads)
        for name in ("lr", "lr_codes", "lr_tables", "tau"):
            if not 0 < getattr(self, name) <= 1:
                raise PT2Error(f"setting {name} must be above 0 and at most 1")
        if not 0 <= self.minutes < 1e6:
            raise PT2Error("setting minutes must be at least 0 and below 1e6")
        if self.restore is not None:
            try:
                re.compile(self.restore)
            except re.error as e:
                raise PT2Error(f"setting restore is not a regular expression: {e}") from e
        if not 0 <= self.warmup < 1:
            raise PT2Error("setting warmup must be at least 0 and below 1")

    def identity(self) -> dict[str, Any]:
        """What decides about the result; a resumed run must have the same."""
        values = dataclasses.asdict(self)
        # The texts are known by their tokens' checksum, and what is allowed changes nothing.
        for name in ("text", "text_field", "allow_long", "held_out_text", "save_every", "threads"):
            values.pop(name)
        return values
