"""The text of a refinement: token ids from one source or several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pt2_core.errors import PT2Error
from pt2_core.texts.tokens import refuse_degenerate_tokens, stream
from quantize.refinement.config import RefineConfig


def text_tokens(
    config: RefineConfig, model: Path, vocab: int, note: Callable[[str], None] = lambda line: None
) -> Tensor:
    """The training text as one stream of token ids, int64 ``[n]``; its end is held out.

    Args:
        note: told what was done to the text.

    Raises:
        PT2Error: no such text, no tokenizer, ids outside of the vocabulary, or a degenerate text.
    """
    wanted = (config.steps * config.batch_size + config.held_out + 2) * config.seqlen
    found = stream(config.text, model, vocab, wanted=wanted, text_field=config.text_field)
    refuse_degenerate_tokens(found.ids, config.text)
    for line in found.notes:
        note(line)
    if config.held_out_text is None:
        return found.ids
    held = config.held_out * config.seqlen
    watched = _held_out(config.held_out_text, config, model, vocab, held)
    return torch.cat([found.ids, watched])


def _held_out(source: str, config: RefineConfig, model: Path, vocab: int, count: int) -> Tensor:
    """The first ``count`` tokens of the text that is watched."""
    ids = stream(source, model, vocab, wanted=count).ids
    if ids.shape[0] < count:
        raise PT2Error(
            f"{source} has {ids.shape[0]} tokens, fewer than {config.held_out} windows of "
            f"{config.seqlen}: give a smaller --held-out"
        )
    refuse_degenerate_tokens(ids[:count], source)
    return ids[:count]
