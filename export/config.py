"""Every option of the exporter."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from pt2_core import formats, upstream
from pt2_core.errors import PT2Error

TYPES = (*formats.TYPES, "q2_k", *upstream.TYPES)

# Types for ordinary tensors, by llama.cpp's names, each with the type that takes its place where a
# row is no whole number of its blocks (as llama-quantize does).
ORDINARY_TYPES: dict[str, str | None] = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "q4_0": "f16",
    "q4_1": "f16",
    "q5_0": "f16",
    "q5_1": "f16",
    "q8_0": "f16",
    "f16": None,
    "bf16": None,
    "f32": None,
}

# The smallest without visible loss. Perplexity of an 82M Llama (wiki-llama-82m, 12 x 512 tokens),
# with only this tensor quantised, against full precision:
#                 q8_0    q6_k    q5_k    q4_k    q4_0    q3_k    q2_k
#   head         +0.00%  +0.07%  +0.07%  +0.33%  +0.60%  +1.46%  +6.34%
#   embeddings   +0.00%  +0.01%  +0.02%  -0.08%  +0.10%  +0.14%  +1.65%
#   both (tied)  +0.00%  +0.08%  +0.09%  +0.24%  +0.69%  +1.61%  +7.98%
DEFAULT_EMBEDDING_TYPE = "q4_k"
DEFAULT_OUTPUT_TYPE = "q5_k"

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMG]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


@dataclass(frozen=True)
class ExportConfig:
    """Settings of one export.

    Attributes:
        type: of the ternary linears: one of :data:`pt2_core.formats.TYPES`, or ``q2_k`` (2.625
            bpw), ``q2_0`` (2.25) or ``tq2_0`` (2.06), which run on an unmodified llama.cpp; the
            last two hold artifacts of these grids only.
        embedding_type: of the token embeddings, and of the head where the two are one tensor. None
            is q4_k, or ``output_type`` where they are one.
        output_type: of the head; None is q5_k.
        target_size: bytes that the file may have; types are then chosen per tensor
            (:mod:`export.mixed`), embeddings and head included unless their type is given. 0: no
            target.
        target_bpw: the same in bits of the file per parameter.
        max_context: tokens that the file is meant for, where the model has a setting that only
            matters beyond; 0 takes what the quantisation was given.
        pre_tokenizer: llama.cpp's name for the tokenizer's regular expressions; None takes what the
            quantisation was given, or finds out.
        fallback_type: of linears that the quantiser kept or whose width the type cannot hold.
        strict: make such a fallback an error.
        verify: compare the model with the artifact's fingerprint, and the written file with what
            was meant, through llama.cpp's library.
        proof_tokens: tokens to run in llama.cpp at most (at least one window of the proof), to
            compare the file's predictions with the ternary model's; 0 leaves the proof out.
        keep_refused: where to keep a file that the proof refuses (None: nowhere).
        split_max_size: bytes per output file, 0 for one file.
        overwrite: replace an existing output.
    """

    type: str = formats.DEFAULT.ggml_name
    embedding_type: str | None = None
    output_type: str | None = None
    fallback_type: str = "q8_0"
    strict: bool = False
    verify: bool = True
    proof_tokens: int = 1024
    keep_refused: str | None = None
    split_max_size: int = 0
    overwrite: bool = False
    target_size: int = 0
    target_bpw: float = 0.0
    max_context: int = 0
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in {
            "type": TYPES,
            "embedding_type": ORDINARY_TYPES,
            "output_type": ORDINARY_TYPES,
            "fallback_type": ORDINARY_TYPES,
        }.items():
            if name in ("embedding_type", "output_type") and getattr(self, name) is None:
                continue
            value = str(getattr(self, name)).lower()
            if value not in allowed:
                option = "--" + name.replace("_", "-")
                raise PT2Error(f"{option} must be one of {', '.join(allowed)}, not {value!r}")
            object.__setattr__(self, name, value)
        if self.split_max_size < 0:
            raise PT2Error(f"--split-max-size must not be negative: {self.split_max_size}")
        if self.proof_tokens < 0:
            raise PT2Error(f"--proof-tokens must not be negative: {self.proof_tokens}")
        if self.strict and self.proof_tokens == 0:
            raise PT2Error("--strict: a file without a proof is not written; leave out "
                           "--proof-tokens 0")  # fmt: skip
        if self.max_context < 0:
            raise PT2Error(f"--max-context must not be negative: {self.max_context}")
        if self.target_size and self.target_bpw:
            raise PT2Error("--target-size and --target-bpw exclude each other")
        if self.target_size < 0 or not 0 <= self.target_bpw <= 32:
            raise PT2Error("--target-size must not be negative, --target-bpw must lie in 0 to 32")
        if self.targeted and self.type not in formats.TYPES:
            raise PT2Error(
                f"--target-size and --target-bpw need --type {' or '.join(formats.TYPES)}"
            )

    @property
    def targeted(self) -> bool:
        """Whether types are chosen to fit a size."""
        return bool(self.target_size or self.target_bpw)

    def head(self) -> str:
        """The type of the head."""
        return self.output_type or DEFAULT_OUTPUT_TYPE

    def embeddings(self, tied: bool) -> str:
        """The type of the token embeddings; ``tied`` says that they are the head as well."""
        return self.embedding_type or (self.head() if tied else DEFAULT_EMBEDDING_TYPE)

    def identity(self) -> dict[str, Any]:
        """The settings that shape the file's content, for its metadata."""
        keys = ["type", "embedding_type", "output_type", "fallback_type"]
        keys += ["target_size", "target_bpw"] if self.targeted else []
        keys += [k for k in ("max_context", "pre_tokenizer") if getattr(self, k)]
        values = {k: v for k, v in asdict(self).items() if k in keys}
        return {**values, "output_type": self.head()}


def parse_size(text: str, option: str = "--split-max-size") -> int:
    """``"2G"`` -> 2000000000, ``"21.8MB"`` -> 21800000; decimal units, as llama.cpp's tools read.

    Raises:
        PT2Error: not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if not 1 <= size < 1 << 62:
        raise PT2Error(f"{option} {text[:40]!r} is not a size such as 500M or 2G")
    return int(size)
