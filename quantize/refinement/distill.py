"""What the refinement minimises and watches: the KL divergence to the full-precision model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from quantize.model.student import Network

LOGITS = 1 << 26  # logits held at a time, of each model


def kl_divergence(student: Tensor, teacher: Tensor, head_s: Tensor, head_t: Tensor) -> Tensor:
    """Mean over the tokens of KL(teacher || student), in nats.

    The logits are made piece by piece, and again in the backward pass: at a vocabulary of 128 000
    those of one batch would take more memory than a 7B model.

    Args:
        student, teacher: final states ``[tokens, hidden]``.
        head_s, head_t: ``[vocab, hidden]``.
    """
    rows = max(1, LOGITS // head_t.shape[0])
    total = torch.zeros((), dtype=torch.float32, device=student.device)
    for s, t in zip(student.split(rows), teacher.split(rows), strict=True):
        total = total + checkpoint(_kl_sum, s, t, head_s, head_t, use_reentrant=False)
    return total / student.shape[0]


def _kl_sum(s: Tensor, t: Tensor, head_s: Tensor, head_t: Tensor) -> Tensor:
    theirs = functional.log_softmax((t @ head_t.T).float(), dim=-1)
    ours = functional.log_softmax((s @ head_s.T).float(), dim=-1)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True)


@dataclass(frozen=True)
class Held:
    """The student on held-out text.

    Attributes:
        kl: mean KL divergence to the teacher, nats per token.
        same_top: share of positions where both have the same most likely token.
        perplexity, teacher_perplexity: of the text, every token of a window but its first scored.
    """

    kl: float
    same_top: float
    perplexity: float
    teacher_perplexity: float

    @property
    def ratio(self) -> float:
        """The student's perplexity over the teacher's."""
        return self.perplexity / self.teacher_perplexity


@torch.no_grad()
def held_out(student: Network, teacher: Network, tokens: Tensor, batch: int) -> Held:
    """Measure on windows of token ids, int64 ``[n, len]`` on the models' device."""
    sums = torch.zeros(4, dtype=torch.float64)
    head_s, head_t = student.head_weight(), teacher.head_weight()
    for part in tokens.split(batch):
        states = zip(student.states(part), teacher.states(part), part, strict=True)
        for s, t, ids in states:
            ours = functional.log_softmax((s[:-1] @ head_s.T).float(), dim=-1)
            theirs = functional.log_softmax((t[:-1] @ head_t.T).float(), dim=-1)
            sums += torch.stack([
                functional.kl_div(ours, theirs, reduction="sum", log_target=True),
                (ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum(),
                functional.nll_loss(ours, ids[1:], reduction="sum"),
                functional.nll_loss(theirs, ids[1:], reduction="sum"),
            ]).double().cpu()  # fmt: skip
    kl, same, nll_s, nll_t = (sums / (tokens.shape[0] * (tokens.shape[1] - 1))).tolist()
    return Held(kl, same, math.exp(min(nll_s, 700)), math.exp(min(nll_t, 700)))


class Windows:
    """Endless batches of windows from a stream of token ids, the same for the same seed.

    Every pass over the text cuts it at another offset and takes the windows in another order.

    Args:
        ids: int64 ``[n]``.
    """

    def __init__(self, ids: Tensor, seqlen: int, batch: int, seed: int) -> None:
        self.ids, self.seqlen, self.batch, self.seed = ids, seqlen, batch, seed
        self.per_pass = max(1, ids.shape[0] // seqlen - 1)
        if ids.shape[0] < 2 * seqlen:
            raise ValueError(f"{ids.shape[0]} tokens are fewer than two windows of {seqlen}")

    def step(self, number: int) -> Tensor:
        """The batch of step ``number`` (from 0): int64 ``[batch, seqlen]``."""
        first = number * self.batch
        return torch.stack([self._window(i) for i in range(first, first + self.batch)])

    def _window(self, index: int) -> Tensor:
        turn, place = divmod(index, self.per_pass)
        offset, order = self._pass(turn)
        at = offset + int(order[place]) * self.seqlen
        return self.ids[at : at + self.seqlen]

    def _pass(self, turn: int) -> tuple[int, Tensor]:
        if getattr(self, "_turn", None) != turn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            offset = int(torch.randint(self.seqlen, (1,), generator=generator))
            self._turn = turn
            self._cut = (offset, torch.randperm(self.per_pass, generator=generator))
        return self._cut

    def passes(self, steps: int) -> float:
        """How often ``steps`` steps read the text."""
        return steps * self.batch / self.per_pass
