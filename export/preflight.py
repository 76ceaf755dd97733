"""Try an export before the quantisation: :func:`preflight`.

The exporter's own process (:mod:`export.converter_driver`) runs on the model's headers with
stand-ins for the linears: settings, metadata, tokenizer and the names of all tensors. No weight is
read and no file of any size is written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from export.converter import TOKENIZERS, Options, try_converter
from export.stand_ins import Target
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint


class NoSource(PT2Error):
    """llama.cpp's source cannot be had, so nothing was tried."""


def preflight(
    checkpoint: Checkpoint,
    ternary: Mapping[str, Sequence[int]],
    *,
    transposed: Collection[str] = (),
    max_context: int = 0,
    pre_tokenizer: str | None = None,
) -> list[str]:
    """What pt2-export would say of a model, in a few seconds.

    Args:
        ternary: full name -> shape, of the checkpoint's tensors that hold matrices which are to
            become ternary; all others are exported as they are.
        transposed: those of them that the checkpoint holds as ``[..., cols, rows]``.
        max_context: tokens that the file is meant for; 0 for all that the model has.
        pre_tokenizer: llama.cpp's name of the tokenizer's regular expressions; None to find out.

    Returns:
        Notes: what the exporter would mend or ignore, and what it could not write as ternary.

    Raises:
        NoSource: llama.cpp's source is not there and cannot be fetched.
        PT2Error: what the exporter would refuse, with the file at fault and what to do.
    """
    from pt2_llama import api

    try:
        source = api.source_dir()
    except PT2Error as e:
        raise NoSource(str(e)) from e
    notes = []
    vocab = any((checkpoint.path / name).is_file() for name in TOKENIZERS)
    if not vocab:
        notes.append(
            f"{checkpoint.path} has no tokenizer, and pt2-export refuses a model without one: copy "
            "its files there before you go on"
        )
    options = Options(max_context, pre_tokenizer)
    targets, count = {}, 0
    for name, shape in ternary.items():
        targets[name] = Target(tuple(shape), count, name in transposed)
        count += targets[name].count
    return notes + try_converter(source, checkpoint, targets, options, vocab=vocab)
