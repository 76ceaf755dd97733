"""Perplexity in two protocols (:data:`pt2_core.texts.tokens.PROTOCOLS`), KL divergence and
agreement with a reference.

Divergence and agreement are taken at the positions that the llama.cpp protocol scores, as
llama-perplexity --kl-divergence does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pt2_core.errors import PT2Error
from pt2_eval.models import Model


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, its standard error, and how many tokens were scored."""

    value: float
    error: float
    tokens: int


@dataclass(frozen=True)
class Divergence:
    """From a reference: mean KL(reference || model) in nats, its standard error, same top token."""

    kl: float
    error: float
    same_top: float
    tokens: int


def perplexity(
    model: Model, windows: Tensor, *, second_half: bool, batch: int = 1,
    step: Callable[[], None] = lambda: None,
) -> Perplexity:  # fmt: skip
    """Score windows of token ids.

    Args:
        windows: int64 ``[n, len]``.
        second_half: only what the llama.cpp protocol scores.
        batch: windows at a time.
        step: called after each batch.
    """
    losses = []
    first = windows.shape[1] // 2 if second_half else 0
    for part, logits in _run(model, windows, batch):
        ids = part[:, first + 1 :].to(logits.device)
        scored = logits[:, first:-1].transpose(1, 2)
        losses.append(functional.cross_entropy(scored, ids, reduction="none").flatten().cpu())
        step()
    nll = torch.cat(losses).double()
    mean = float(nll.mean())
    if not math.isfinite(mean):
        raise PT2Error(f"{model.name}: the logits are NaN or Inf; try --dtype float32")
    value = math.exp(mean)
    return Perplexity(value, value * float(nll.std()) / math.sqrt(nll.numel()), nll.numel())


def divergence(
    model: Model, reference: Model, windows: Tensor, *, batch: int = 1,
    step: Callable[[], None] = lambda: None,
) -> Divergence:  # fmt: skip
    """Compare with a reference on the second halves of windows ``[n, len]``.

    Raises:
        PT2Error: the two have different vocabularies.
    """
    if model.vocab != reference.vocab:
        raise PT2Error(
            f"{model.name} has {model.vocab} tokens and {reference.name} {reference.vocab}: "
            "they cannot be compared"
        )
    divergences, same = [], 0
    first = windows.shape[1] // 2
    runs = zip(_run(model, windows, batch), _run(reference, windows, batch), strict=True)
    for (_, ours), (_, theirs) in runs:
        ours, theirs = ours[:, first:-1].flatten(0, 1).cpu(), theirs[:, first:-1].flatten(0, 1)
        theirs = theirs.cpu()
        each = functional.kl_div(
            ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True
        )
        divergences.append(each.sum(dim=-1))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        step()
    kl = torch.cat(divergences).double()
    error = float(kl.std()) / math.sqrt(kl.numel())
    return Divergence(float(kl.mean()), error, same / kl.numel(), kl.numel())


def _run(model: Model, windows: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for part in windows.split(batch):
        yield part, model.logits(part)
