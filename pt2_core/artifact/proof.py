"""The artifact's proof: what its ternary model predicts, so that a file can be held against it.

The quantiser runs a few windows of a text of its own through the ternary model, in float32, and
keeps the most likely next tokens with their log-probabilities; and it keeps what the model's own
tokenizer makes of lines of many scripts. Whoever writes a file from the artifact runs the same
windows and lines through the program that will use it: see :mod:`export.proof`.

The windows are those of llama.cpp's llama-perplexity, whose every build can print its predictions:
the text is tokenised as a whole, with BOS before it where the tokenizer adds one, and cut into
windows; in each, the first token is BOS again, and the second half is looked at. Plain NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pt2_core.artifact.folder import PROOF, Array, Artifact
from pt2_core.errors import PT2Error

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

TOP = 64
DEFAULT_TOKENS = 1024
DEFAULT_LENGTH = 512
# A window beyond this length costs a large model more than it proves.
MAX_LENGTH = 10240
# The smallest mass that the tokens outside of the top ones are taken to have.
LEAST_MASS = 1e-9


@dataclass(frozen=True)
class Proof:
    """Windows with the ternary model's predictions, and lines with their token ids.

    Attributes:
        text: what the windows are cut from.
        tokens: int32 ``[windows, length]``, the text's ids as they were cut.
        bos: what takes the first place of every window when it is run; None: nothing does.
        top: int32 ``[windows, scored, k]``, the most likely next tokens at the positions
            ``length // 2`` to ``length - 2``, the likeliest first.
        logprob: float32, the same shape, their log-probabilities.
        lines: (name, text) of what only the tokenizer is tried on.
        ids: int32 token ids of each line, special tokens in the text recognised.
    """

    text: str
    tokens: I32
    bos: int | None
    top: I32
    logprob: F32
    lines: tuple[tuple[str, str], ...]
    ids: tuple[I32, ...]

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return int(self.tokens.shape[1])

    @property
    def positions(self) -> int:
        """Predictions that are compared."""
        return int(self.top.shape[0] * self.top.shape[1])

    def inputs(self) -> I32:
        """The windows as a model is to be given them."""
        return with_bos(self.tokens, self.bos)

    def first(self, windows: int) -> Proof:
        """The same with its first windows only."""
        part = slice(windows)
        return Proof(
            self.text, self.tokens[part], self.bos, self.top[part], self.logprob[part],
            self.lines, self.ids,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        windows, length = self.tokens.shape
        return {"windows": windows, "length": length, "lines": len(self.lines)}

    def arrays(self) -> dict[str, Array]:
        """As they stand in ``proof.safetensors``."""
        record = {"text": self.text, "bos": self.bos, "lines": self.lines}
        coded = json.dumps(record, ensure_ascii=True, sort_keys=True).encode()
        return {
            "record": np.frombuffer(coded, np.uint8),
            "tokens": self.tokens,
            "top": self.top,
            "logprob": self.logprob,
            "line_ids": np.concatenate([*self.ids, np.empty(0, np.int32)]).astype(np.int32),
            "line_lengths": np.array([len(i) for i in self.ids], np.int32),
        }

    @classmethod
    def read(cls, artifact: Artifact) -> Proof | None:
        """An artifact's proof; None where it was made without one.

        Raises:
            PT2Error: the file is missing or damaged.
        """
        if PROOF not in artifact.manifest["files"]:
            return None
        try:
            return cls.of_arrays(artifact.tensors(PROOF))
        except (KeyError, ValueError, TypeError, RecursionError) as e:
            raise PT2Error(f"{artifact.path / PROOF} is damaged ({e}); quantise again") from e

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Proof:
        """The inverse of :meth:`arrays`.

        Raises:
            KeyError, ValueError, TypeError: something is missing or does not fit together.
        """
        record = json.loads(bytes(arrays["record"]))
        lines = tuple((str(name), str(text)) for name, text in record["lines"])
        tokens, top, logprob = (arrays[n] for n in ("tokens", "top", "logprob"))
        lengths, flat = arrays["line_lengths"], arrays["line_ids"]
        kinds = (tokens.dtype, top.dtype, logprob.dtype, lengths.dtype, flat.dtype)
        if [k.name for k in kinds] != ["int32", "int32", "float32", "int32", "int32"]:
            raise ValueError("a tensor of another type")
        bos = record["bos"]
        if not isinstance(record["text"], str) or not (bos is None or type(bos) is int):
            raise ValueError("the record")
        windows, length = tokens.shape
        fits = top.shape[:2] == (windows, scored(length)) and top.shape == logprob.shape
        if not fits or length < 4 or top.ndim != 3 or not top.size or len(lengths) != len(lines):
            raise ValueError("the shapes do not fit together")
        if (lengths < 0).any() or int(lengths.sum(dtype=np.int64)) != len(flat):
            raise ValueError("the lines' ids")
        if not (np.isfinite(logprob).all() and (logprob <= 1e-3).all() and (top >= 0).all()):
            raise ValueError("a prediction that is none")
        ends = np.cumsum(lengths, dtype=np.int64)
        ids = tuple(flat[e - n : e] for e, n in zip(ends, lengths, strict=True))
        return cls(record["text"], tokens, bos, top, logprob, lines, ids)


@dataclass(frozen=True)
class Difference:
    """How far predictions are from a proof's.

    Attributes:
        kl: mean KL divergence of the predictions from the proof's, nats per position, with all
            tokens outside of the top ones taken together.
        same_top: share of the positions with the same most likely token.
        early, late: the KL divergence of the first and the last fifth of the positions.
        positions: that were compared.
        tokens: that were run.
    """

    kl: float
    same_top: float
    early: float
    late: float
    positions: int
    tokens: int


def difference(proof: Proof, logprob: F32, best: I32) -> Difference:
    """Compare predictions with a proof's.

    Args:
        logprob: float32 like ``proof.logprob``: log-probabilities of the proof's top tokens.
        best: int32 ``[windows, scored]``, the most likely tokens.
    """
    ours, theirs = proof.logprob.astype(np.float64), logprob.astype(np.float64)
    kl = (np.exp(ours) * (ours - theirs)).sum(-1)
    rest = [np.log(np.clip(1 - np.exp(x).sum(-1), LEAST_MASS, 1)) for x in (ours, theirs)]
    kl += np.exp(rest[0]) * (rest[0] - rest[1])
    fifth = max(1, kl.shape[1] // 5)
    return Difference(
        float(kl.mean()), float((best == proof.top[..., 0]).mean()), float(kl[:, :fifth].mean()),
        float(kl[:, -fifth:].mean()), kl.size, proof.tokens.size,
    )  # fmt: skip


def scored(length: int) -> int:
    """How many positions of a window llama-perplexity scores."""
    return length - 1 - length // 2


def with_bos(tokens: I32, bos: int | None) -> I32:
    """The windows with BOS in the first place of each."""
    tokens = tokens.copy()
    if bos is not None:
        tokens[:, 0] = bos
    return tokens


def cut(ids: Sequence[int], windows: int, length: int) -> I32:
    """The first windows of a text's ids, int32 ``[windows, length]``."""
    return np.array(ids[: windows * length], np.int32).reshape(windows, length)


def shape(settings: Mapping[str, Any], tokens: int, max_context: int = 0) -> tuple[int, int]:
    """How many windows of which length prove a model: (windows, length).

    Args:
        settings: of config.json.
        tokens: to be run at most; from 1024 on, a window may be longer where something in the
            model changes with the distance (a sliding window, a rope context).
        max_context: the longest context that the file may be used with (0: any).
    """
    trained = settings.get("max_position_embeddings")
    trained = trained if isinstance(trained, int) and trained > 0 else 1 << 30
    far = reach(settings)
    length = DEFAULT_LENGTH
    if tokens < DEFAULT_TOKENS:
        length = min(length, tokens)
    elif far + far // 4 > length:
        length = min(far + max(far // 4, 128), MAX_LENGTH)
    # What lies beyond the trained context is looked at only where the model claims to go there.
    beyond = _extends(settings)
    length = min(length, max_context or length, length if beyond else trained)
    length -= length % 32 if length >= 64 else length % 2
    return max(1, min(tokens, DEFAULT_TOKENS) // max(length, 1)), max(length, 4)


def reach(settings: Mapping[str, Any]) -> int:
    """The largest distance or position at which the model's arithmetic changes; 0: nowhere."""
    found = [0]
    if settings.get("use_sliding_window") is not False:
        found += [settings.get(k) or 0 for k in ("sliding_window", "attention_chunk_size")]
    for rope in ropes(settings):
        found.append(rope.get("original_max_position_embeddings") or 0)
        if rope_type(rope) == "dynamic":
            found.append(settings.get("max_position_embeddings") or 0)
    original = settings.get("original_max_position_embeddings") or 0
    return max(n for n in (*found, original) if isinstance(n, int) and n <= MAX_LENGTH * 4 // 5)


def ropes(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every dictionary of rope settings: one for the model, or one for each type of layer."""
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        value = settings.get(key)
        if isinstance(value, Mapping):
            inner = [v for v in value.values() if isinstance(v, Mapping)]
            found += inner or [value]
    return found


def rope_type(rope: Mapping[str, Any]) -> str:
    """Its type under either of its names."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _extends(settings: Mapping[str, Any]) -> bool:
    return any(rope_type(r) == "dynamic" for r in ropes(settings))
