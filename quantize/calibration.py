"""Calibration text to windows of token ids.

Policy: the text is tokenised as a whole without special tokens and cut into windows of ``seqlen``
tokens that do not overlap; ``samples`` of them are drawn with the seed. No BOS token is put in
front, as GPTQ and its followers have it; with ``bos`` it is, and each window loses its last token.
Token ids from a safetensors file are used as they are, the first ``samples`` rows of them. Several
sources with commas between them are one text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pt2_core.artifact.folder import sha256_array
from pt2_core.errors import PT2Error
from pt2_core.texts.sources import source_name, split_sources, token_source
from pt2_core.texts.tokens import (
    check_vocabulary,
    load_tokenizer,
    read_tokens,
    refuse_degenerate_tokens,
    stream,
)


@dataclass(frozen=True)
class Calibration:
    """Token ids int64 ``[samples, seqlen]``, what the manifest says of them, notes for the user."""

    tokens: Tensor
    record: dict[str, Any]
    notes: tuple[str, ...] = ()


def load_calibration(
    source: str, model_dir: Path, *, samples: int, seqlen: int, vocab: int, seed: int, bos: bool,
    text_field: str | None = None,
) -> Calibration:  # fmt: skip
    """Read the calibration windows that a run uses.

    Args:
        source: as :mod:`pt2_core.texts.sources` has them, or ``file.safetensors[:tensor]`` with
        integer
            token ids ``[n, len]`` or ``[len]``.
        model_dir: where the tokenizer is.
        vocab: ids must be below it.
        text_field: of JSON records, the field with the text (None: the usual one).

    Raises:
        PT2Error: no such source, too few tokens (with the numbers), ids outside of the vocabulary,
            no tokenizer, a data set that cannot be loaded, or a degenerate text.
    """
    name, record = source_name(source), dict[str, Any]()
    sources = split_sources(source)
    file = token_source(sources[0]) if len(sources) == 1 else None
    notes: tuple[str, ...] = ()
    if file is not None:
        if text_field is not None:
            raise PT2Error(f"--text-field {text_field}: {name} holds token ids")
        if bos:
            raise PT2Error(f"--bos: the token ids of {name} are used as they are")
        tokens = _rows(read_tokens(*file), file[0], samples, seqlen)
        check_vocabulary(tokens, vocab, name)
    else:
        wanted = samples * seqlen
        found = stream(source, model_dir, vocab, wanted=wanted, text_field=text_field)
        tokens, notes = _windows(found.ids, name, samples, seqlen, seed), found.notes
        record = {"field": found.field} if found.field else {}
    refuse_degenerate_tokens(tokens, name)
    if bos:
        tokens = _with_bos(tokens, load_tokenizer(model_dir))
    digest = sha256_array(tokens.to(torch.int32).numpy())
    record |= {"source": name, "tokens_sha256": digest, "samples": samples, "seqlen": seqlen}
    return Calibration(tokens, record, notes)


def _windows(ids: Tensor, name: str, samples: int, seqlen: int, seed: int) -> Tensor:
    have, need = ids.shape[0], samples * seqlen
    if have < need:
        fit = have // seqlen
        advice = f"--samples {fit}" if fit else f"--seqlen {max(2, have // samples)}"
        raise PT2Error(
            f"{name} has {have} tokens, but {samples} samples of {seqlen} need {need}: "
            f"give more text, or use {advice}"
        )
    chosen = sorted(random.Random(seed).sample(range(have // seqlen), samples))
    return ids[: have // seqlen * seqlen].view(-1, seqlen)[chosen].contiguous()


def _with_bos(tokens: Tensor, tokenizer: Any) -> Tensor:
    if tokenizer.bos_token_id is None:
        raise PT2Error("this model's tokenizer has no BOS token: leave --bos out")
    first = torch.full_like(tokens[:, :1], tokenizer.bos_token_id)
    return torch.cat([first, tokens[:, :-1]], dim=1)


def _rows(tokens: Tensor, path: Path, samples: int, seqlen: int) -> Tensor:
    if tokens.dim() == 1:
        tokens = tokens[: tokens.shape[0] // seqlen * seqlen].reshape(-1, seqlen)
    if tokens.shape[0] < samples or tokens.shape[1] < seqlen:
        raise PT2Error(
            f"{path} has {tokens.shape[0]} rows of {tokens.shape[1]} tokens, but {samples} samples "
            f"of {seqlen} are wanted: set --samples and --seqlen to what is there"
        )
    return tokens[:samples, :seqlen].contiguous()
