"""Prove an export: find the artifact's proof or make one, judge the file, and write the figures.

What decides is in :mod:`export.proof`; here is what it needs of an export: the proof itself, the
file's own values of the tensors that it rounds, and a word on what is unusual about the model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export.checks import Progress
from export.encode import EMBEDDING, F32_TYPE, HEAD, Item
from export.ggml import Ggml
from export.proof import KNOWN_GAPS, Programs, Verdict, check_file
from export.source import TernarySource
from export.writer import Metadata
from pt2_core import formats, upstream
from pt2_core.artifact.proof import Proof, rope_type, ropes
from pt2_core.artifact.proof_text import AFTER_SPECIAL, COMPOSED, DECOMPOSED
from pt2_core.errors import PT2Error

STAGE = "proving in llama.cpp"
HEAD_BYTES = 1 << 27  # metadata with the largest vocabulary, and room
KEYS = {
    "pt2.proof.kl": gguf.GGUFValueType.FLOAT32,
    "pt2.proof.same_top": gguf.GGUFValueType.FLOAT32,
    "pt2.proof.tokens": gguf.GGUFValueType.UINT32,
}
# A table whose values are further than this from the model's (relative RMS error of a row) is not a
# rounded one but a wrong one. Q2_K, the coarsest type for tables, is at 0.3 at the most.
MAX_ROW_ERROR = 0.5
_EXACT = ("F32", "F16", "BF16", *formats.NAMES, *(name.upper() for name in upstream.TYPES))
# Types that round so little that the limits allow for them.
_FINE = (*_EXACT, "Q8_0")


@dataclass
class Prover:
    """Judges files of one export.

    Attributes:
        source: the artifact and its model.
        items: the file's tensors and their types.
        files: the GGUF file or its splits, the one to load first.
        fields: the file's metadata.
        ggml: llama.cpp's library.
        programs: its programs.
        tokens: to be run at most, in whole windows.
        max_context: the longest context that the file is meant for (0: any).
        progress: told of the work.
    """

    source: TernarySource
    items: Sequence[Item]
    files: Sequence[Path]
    fields: Mapping[str, Any]
    ggml: Ggml
    programs: Programs
    tokens: int
    max_context: int
    progress: Progress

    def verdict(self) -> Verdict:
        """Run the proof.

        Raises:
            PT2Error: llama.cpp cannot run the file, or no proof can be made.
        """
        self.progress(STAGE, 0, 1)
        proof = self._proof()
        model = self.source.model
        result = check_file(
            self.files[0], proof, self.programs, gaps=known_gaps(proof, self.fields),
            renew=lambda: self._renew(proof), hint=unusual(model.settings),
        )  # fmt: skip
        self.progress(STAGE, 1, 1)
        return result

    def _proof(self) -> Proof:
        """The artifact's proof, as many windows as are wanted; made here where it has none."""
        proof = Proof.read(self.source.artifact)
        longest = self.max_context
        if proof is None or (longest and proof.length > longest):
            from quantize.proof_run import plan_proof

            proof = self._made(plan_proof(self.source.model, self.tokens, longest), {})
        return proof.first(max(1, self.tokens // proof.length))

    def _renew(self, proof: Proof) -> tuple[Proof, str] | None:
        """The proof of the model with the file's values of what it rounds."""
        rounded = [i for i in self.items if self._is_rounded(i)]
        if not rounded:
            return None
        kinds = {i.type.name for i in rounded}
        what = f"own values of {len(rounded)} tensors in {', '.join(sorted(kinds))}"
        return self._made(proof, self._known(rounded)), what

    def _known(self, rounded: Sequence[Item]) -> dict[str, tuple[Item, str | None]]:
        """The name that the model knows a rounded tensor by -> the item, and which matrix of it."""
        found: dict[str, tuple[Item, str | None]] = {}
        for item in rounded:
            if item.tensor.ternary:
                for matrix in self.source.matrices_of(item.tensor):
                    found[f"{matrix}.weight"] = item, matrix
            else:
                found[item.tensor.sources[0]] = item, None
        return found

    def _made(self, plan: Proof, rounded: Mapping[str, tuple[Item, str | None]]) -> Proof:
        from quantize.proof_run import make_proof

        data = self._data() if rounded else {}

        def override(name: str) -> NDArray[np.float32] | None:
            if name not in rounded:
                return None
            item, matrix = rounded[name]
            return self._values(item, data[item.tensor.name], matrix)

        def step(done: int, total: int) -> None:
            self.progress("making the proof anew", done, total)

        return make_proof(
            self.source.model, self.source.artifact, plan, override=override, step=step
        )

    def _is_rounded(self, item: Item) -> bool:
        if item.type.name in _FINE:
            return False
        table = item.tensor.name in (EMBEDDING, HEAD) and len(item.tensor.sources) == 1
        return table or item.tensor.ternary

    def _data(self) -> dict[str, Any]:
        return {t.name: t.data for f in self.files for t in gguf.GGUFReader(f).tensors}

    def _values(self, item: Item, data: Any, matrix: str | None) -> NDArray[np.float32]:
        """The file's values of a rounded matrix or table in the source's order.

        Raises:
            PT2Error: a table that is not the model's.
        """
        raw = np.asarray(data)
        raw = raw.reshape(-1, raw.shape[-1])
        if matrix is not None:
            raw = raw[self.source.matrix_rows(item, matrix)]
        values = raw if item.type == F32_TYPE else self.ggml.dequantize(raw, item.type)
        values = self.source.in_source_order(item, values, matrix)
        if matrix is None:
            source = item.tensor.sources[0]
            worst = row_error(values, self.source.original(source))
            if worst > MAX_ROW_ERROR:
                raise PT2Error(
                    f"{item.tensor.name} in the file is not the model's {source} "
                    f"(a row is {worst:.0%} off): export again, and report it if it stays so"
                )
        return values


def row_error(values: NDArray[np.float32], original: NDArray[np.float32]) -> float:
    """The largest relative RMS error of a row; rows of next to nothing count by the mean row."""
    off = np.sqrt(np.square(values - original, dtype=np.float64).mean(-1))
    size = np.sqrt(np.square(original, dtype=np.float64).mean(-1))
    return float((off / np.maximum(size, 0.1 * size.mean() + 1e-30)).max())


def known_gaps(proof: Proof, fields: Mapping[str, Any]) -> dict[str, str]:
    """Lines whose tokens may differ, for llama.cpp is known to lack what this tokenizer does there.

    Args:
        proof: whose ids say whether the tokenizer composes letters.
        fields: the file's metadata, which say whether llama.cpp puts spaces before words.
    """
    ids = {name: found for (name, _), found in zip(proof.lines, proof.ids, strict=True)}
    spaced = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    found = []
    if {COMPOSED, DECOMPOSED} <= ids.keys() and np.array_equal(ids[COMPOSED], ids[DECOMPOSED]):
        found.append(DECOMPOSED)
    if fields.get("tokenizer.ggml.model") == "llama" and spaced:
        found.append(AFTER_SPECIAL)
    return {name: KNOWN_GAPS[name] for name in found}


def unusual(settings: Mapping[str, Any]) -> str:
    """Settings of config.json that a graph of llama.cpp is most likely not to have, in words."""
    found = []
    activation = settings.get("hidden_act") or settings.get("hidden_activation")
    if activation not in (None, "silu", "swish"):
        found.append(f"hidden_act {activation!r}")
    if settings.get("sliding_window") and settings.get("use_sliding_window") is not False:
        found.append(f"sliding_window {settings['sliding_window']}")
    for rope in ropes(settings):
        if rope_type(rope) != "default":
            more = sorted(set(rope) - {"rope_type", "type", "rope_theta", "factor"})
            found.append(f"rope type {rope_type(rope)!r} ({', '.join(more)})")
    found += [f"{k} {settings[k]}" for k in ("attention_bias", "mlp_bias") if settings.get(k)]
    return f"config.json has {'; '.join(found)}: look there first" if found else ""


def placeholders() -> Metadata:
    """The proof's metadata before it is known: what says that nothing was proved."""
    values = {"pt2.proof.kl": math.nan, "pt2.proof.same_top": math.nan, "pt2.proof.tokens": 0}
    return {key: (values[key], kind, None) for key, kind in KEYS.items()}


def write_figures(file: Path, verdict: Verdict) -> None:
    """Put a verdict's figures in the place of the placeholders.

    KL and share are rounded to what another thread count leaves as it is.
    """
    d = verdict.difference
    figures = {
        "pt2.proof.kl": round(d.kl, 4),
        "pt2.proof.same_top": round(d.same_top, 2),
        "pt2.proof.tokens": d.tokens,
    }
    with file.open("r+b") as f:
        head = f.read(HEAD_BYTES)
        for key, value in figures.items():
            # A key stands behind its length and before its type and value.
            mark = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", KEYS[key])
            at = head.index(mark) + len(mark)
            f.seek(at)
            f.write(struct.pack("<f" if KEYS[key] == gguf.GGUFValueType.FLOAT32 else "<I", value))
