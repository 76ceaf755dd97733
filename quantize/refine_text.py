"""The text of a refinement: token ids from one source or several."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quantize.calibration import encode, load_tokenizer, read_text, read_tokens
from quantize.common import PT2Error
from quantize.refine_config import RefineConfig

CHARACTERS_PER_TOKEN = 8  # of a data set's text that is read per token wanted; plenty


def text_tokens(config: RefineConfig, model: Path, vocab: int) -> Tensor:
    """The training text as one stream of token ids, int64 ``[n]``; its end is held out.

    Raises:
        PT2Error: no such text, no tokenizer, or ids outside of the vocabulary.
    """
    wanted = (config.steps * config.batch_size + config.held_out + 2) * config.seqlen
    parts = [_source_tokens(s, wanted, model, vocab) for s in config.text.split(",")]
    if config.held_out_text is not None:
        held = config.held_out * config.seqlen
        watched = _source_tokens(config.held_out_text, held, model, vocab)
        if watched.shape[0] < held:
            raise PT2Error(
                f"{config.held_out_text} has {watched.shape[0]} tokens, fewer than "
                f"{config.held_out} windows of {config.seqlen}: give a smaller --held-out"
            )
        parts.append(watched[:held])
    return torch.cat(parts)


def _source_tokens(source: str, wanted: int, model: Path, vocab: int) -> Tensor:
    stem, mark, tensor = source.partition(".safetensors")
    if mark and (not tensor or tensor.startswith(":")):
        ids = read_tokens(Path(stem + mark), tensor[1:]).flatten()
    else:
        text, _ = read_text(source, wanted * CHARACTERS_PER_TOKEN)
        ids = torch.tensor(encode(load_tokenizer(model), text), dtype=torch.int64)
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise PT2Error(f"{source} has token ids outside of the model's vocabulary of {vocab}")
    return ids
