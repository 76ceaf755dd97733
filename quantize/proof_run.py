"""Make an artifact's proof: run its windows through the ternary model, block by block.

The quantiser takes its :class:`ProofRun` along from block to block; :func:`make_proof` streams a
finished artifact. Both run in float32, whatever the quantiser's forward pass is in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pt2_core.artifact import proof_text
from pt2_core.artifact.folder import Artifact
from pt2_core.artifact.proof import LEAST_MASS, TOP, Proof, cut, shape
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.expected import load_config
from pt2_core.texts.tokens import bos_token, encode, has_tokenizer, load_tokenizer
from quantize.model.block import Block
from quantize.model.streamed import StreamedModel

Weights = Mapping[str, Tensor]


class ProofRun:
    """Windows on their way through the ternary model.

    Attributes:
        plan: everything of the proof but the predictions.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Proof, device: str = "cpu") -> None:
        self.plan = plan
        self.model = StreamedModel(checkpoint, device, "float32")
        self.stream = self.model.start(torch.from_numpy(plan.inputs()).long(), 1)

    @torch.no_grad()
    def advance(self, block: Block, weights: Weights) -> None:
        """Run a decoder block with the given weights of its ternary linears.

        Args:
            block: of any streamed model of the same checkpoint; its tensors are used.
        """
        self.stream.advance(block.module(weights, torch.float32), block.index)

    @torch.no_grad()
    def finish(self) -> Proof:
        """The proof, once all blocks have been run.

        Raises:
            PT2Error: the predictions are NaN or Inf.
        """
        first = self.plan.length // 2
        tops, logprobs = [], []
        for logits in self.model.logits(self.stream, first, -1):
            found = logits.log_softmax(-1).topk(min(TOP, logits.shape[-1]))
            tops.append(found.indices.int().cpu().numpy())
            logprobs.append(found.values.float().cpu().numpy())
        logprob = np.stack(logprobs)
        if not np.isfinite(logprob).all():
            logprob = np.maximum(logprob, np.log(np.float32(LEAST_MASS)))
            if not np.isfinite(logprob).all():
                raise PT2Error("the ternary model's predictions are NaN: its source may be damaged")
        return dataclasses.replace(self.plan, top=np.stack(tops), logprob=logprob)


def start_proof(
    checkpoint: Checkpoint, tokens: int, device: str, max_context: int = 0
) -> ProofRun | str:
    """A run at its first block, or why there is none.

    Args:
        tokens, max_context: see :func:`pt2_core.artifact.proof.shape`.

    Raises:
        PT2Error: the tokenizer cannot be read, or does not fit the model.
    """
    if tokens == 0:
        return "--proof-tokens 0"
    if not has_tokenizer(checkpoint.path):
        return "the model has no tokenizer"
    return ProofRun(checkpoint, plan_proof(checkpoint, tokens, max_context), device)


def plan_proof(checkpoint: Checkpoint, tokens: int, max_context: int = 0) -> Proof:
    """The texts and token ids of a proof, predictions left empty.

    Args:
        tokens, max_context: see :func:`pt2_core.artifact.proof.shape`.

    Raises:
        PT2Error: the model's tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(checkpoint.path)
    windows, length = shape(checkpoint.settings, tokens, max_context)
    bos = bos_token(tokenizer)
    # llama-perplexity wants a text of at least two windows.
    wanted = max(windows, 2) * length + 1
    text = proof_text.PROSE
    while len(ids := encode(tokenizer, text)) < wanted:
        text += "\n" + proof_text.PROSE * max(1, wanted // max(len(ids), 1) - 1)
    ids = ([] if bos is None else [bos]) + ids
    lines = tuple(proof_text.lines(special_tokens(tokenizer)))
    coded = tuple(np.array(encode_specials(tokenizer, t), np.int32) for _, t in lines)
    vocab = load_config(checkpoint).vocab_size
    if max(ids) >= vocab:
        raise PT2Error(
            f"the tokenizer in {checkpoint.path} gives token id {max(ids)}, and the model has "
            f"embeddings for {vocab}: copy the files of the tokenizer that belongs to the model"
        )
    empty = np.zeros((windows, 0, 0))
    return Proof(
        text, cut(ids, windows, length), bos, empty.astype(np.int32), empty.astype(np.float32),
        lines, coded,
    )  # fmt: skip


def special_tokens(tokenizer: Any) -> list[str]:
    """Tokens that are recognised in a text as they stand, those of chats first."""
    added = {str(t) for t in tokenizer.get_added_vocab()}
    named = [t for t in tokenizer.all_special_tokens if t in added]
    return list(dict.fromkeys([*named, *sorted(added)]))


def encode_specials(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text in which special tokens count as such."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def make_proof(
    checkpoint: Checkpoint,
    artifact: Artifact,
    plan: Proof,
    *,
    device: str = "cpu",
    override: Callable[[str], Any | None] = lambda name: None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Proof:
    """Stream an artifact's model over the windows of a plan.

    Args:
        checkpoint: the model that the artifact was made from.
        plan: of :func:`plan_proof`, or an older proof of the same model.
        override: gives float32 values to use in place of a tensor's, by the tensor's name in the
            checkpoint, or None: what a file rounds, so that only its mistakes are seen.
        step: called with (blocks done, blocks) after each block.

    Raises:
        PT2Error: of the model or the artifact.
    """
    replaced = {k: torch.from_numpy(v) for k, v in artifact.replaced().items()}
    tables = StreamedModel(checkpoint)
    for name in dict.fromkeys((tables.embedding, tables.head)):
        value = override(name)
        if value is not None:
            replaced[name] = torch.from_numpy(np.ascontiguousarray(value))
    run = ProofRun(dataclasses.replace(checkpoint, replaced=replaced), plan, device)
    for index in range(run.model.n_blocks):
        run.advance(run.model.block(index), block_weights(artifact, index, override))
        step(index + 1, run.model.n_blocks)
    return run.finish()


def block_weights(
    artifact: Artifact, index: int, override: Callable[[str], Any | None] = lambda name: None
) -> dict[str, Tensor]:
    """Weights of a block's ternary linears by module name, float32, the source's column order."""
    result = {}
    for name, matrix in artifact.block(index).items():
        value = override(f"{name}.weight")
        weight = matrix.dequantize() if value is None else np.ascontiguousarray(value)
        result[name] = torch.from_numpy(weight)
    return result


def renew_proof(
    checkpoint: Checkpoint, source: Artifact, artifact: Artifact, device: str
) -> Proof | str:
    """The proof of an artifact that another was changed into, over the same windows.

    Returns:
        the proof, or why there is none: the reason that the source's manifest gives.
    """
    plan = Proof.read(source)
    if plan is None:
        record = source.manifest.get("proof")
        reason = record.get("left_out") if isinstance(record, dict) else None
        return str(reason or f"{source.path.name} has none")
    return make_proof(checkpoint, artifact, plan, device=device)
