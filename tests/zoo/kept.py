"""Files of the zoo with what they have to predict, to be held against any build of llama.cpp.

``python -m tests.zoo --keep DIR`` fills a folder; ``benchmarks/h200/zoo.py DIR --build BIN`` reads
it on another machine, which needs neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pt2_core.artifact.proof import Proof

TOP = 64  # of a whole distribution, what is kept


def keep(file: Path, proof: Proof, gaps: dict[str, str], folder: Path, name: str) -> None:
    """Copy a GGUF file into a folder, and its proof beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.gguf").write_bytes(file.read_bytes())
    small = dataclasses.replace(proof, top=proof.top[..., :TOP], logprob=proof.logprob[..., :TOP])
    np.savez_compressed(
        folder / f"{name}.npz", allow_pickle=False, gaps=np.frombuffer(json.dumps(gaps).encode(),
        np.uint8), **small.arrays(),
    )  # fmt: skip


def kept(folder: Path) -> Iterator[tuple[str, Path, Proof, dict[str, str]]]:
    """Name, GGUF file, proof, and lines whose tokens are known to differ, of each in a folder."""
    for file in sorted(folder.glob("*.gguf")):
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as stored:
            arrays = dict(stored)
        gaps = json.loads(bytes(arrays.pop("gaps")))
        yield file.stem, file, Proof.of_arrays(arrays), gaps
