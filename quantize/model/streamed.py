"""A Hugging Face causal LM run one decoder block at a time, with its weights read when needed.

Nothing is known of any architecture: the model is transformers' own class
(:mod:`quantize.model.shell`), its weights come through transformers' own conversion of checkpoints
(:mod:`pt2_core.model.layout`), and what a block multiplies with is found by watching it
(:mod:`quantize.model.sites`). Memory holds one block, and the activations.

    model = StreamedModel(Checkpoint.open("wiki-llama-7m"))
    stream = model.start(tokens, batch_size=4)
    for index in range(model.n_blocks):
        stream.advance(model.block(index).module(), index)
    for logits in model.logits(stream):  # [len, vocab] of one window after the other
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint, torch_dtype
from pt2_core.model.expected import load_config, settle
from quantize.model.block import Block
from quantize.model.shell import Batch, Shell, empty_outside, fill_outside, set_value, share
from quantize.model.sites import Matrix, Site, find_matrices, find_sites, matrix_name

PROBE_TOKENS = 8  # enough for a block to run


class Stream:
    """Windows between two decoder blocks.

    Attributes:
        batches: the windows, a few at a time.
    """

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def clone(self) -> Stream:
        """The same windows, to go another way."""
        return Stream([replace(b, hidden=b.hidden.clone()) for b in self.batches])

    @torch.no_grad()
    def advance(
        self, layer: nn.Module, index: int, step: Callable[[], None] = lambda: None
    ) -> None:
        """Replace the activations by the outputs of decoder block ``index``."""
        for batch in self.batches:
            out = batch.run(layer, index)
            # Into the same memory, so that there are never two copies of the activations.
            batch.hidden = batch.hidden.copy_(out) if out.shape == batch.hidden.shape else out
            step()


class StreamedModel:
    """A causal LM that holds at most one decoder block.

    Attributes:
        config: transformers' config (of the text model, in a model of parts).
        shell: the class without its blocks.
        layout: which tensors of the files make which parameters.
        n_blocks, hidden_size: its shape.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: str = "float32") -> None:
        """Build the class, and check the tensors against it.

        Raises:
            PT2Error: a class that transformers does not know, a broken config, or tensors that are
                not those of the class.
        """
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.dtype = torch_dtype(dtype)
        self.config = load_config(checkpoint)
        model, self.layout = settle(checkpoint, self.config)
        self.shell = Shell(model, self.device, self.dtype)
        self.n_blocks = len(self.shell.blocks)
        self.hidden_size: int = self.config.hidden_size
        self._holders = 0
        self._sites: dict[str, list[Site]] = {}
        self._probe: Batch | None = None
        self._matrices: tuple[int, list[Matrix]] = (-1, [])

    @property
    def embedding(self) -> str:
        """The files' name of the embeddings' table."""
        return self._table(self.shell.model.get_input_embeddings())

    @property
    def head(self) -> str:
        """The files' name of the head's table: the embeddings' where the two are tied."""
        return self._table(self.shell.model.get_output_embeddings())

    def _table(self, module: nn.Module | None) -> str:
        names = [n for n, m in self.shell.model.named_modules() if m is module]
        if not names:
            raise PT2Error(f"{type(self.shell.model).__name__} has no embeddings or no head")
        name = f"{names[0]}.weight"
        name = self.shell.model.all_tied_weights_keys.get(name, name)
        return self.layout.sources(name)[0]

    @torch.no_grad()
    def start(self, tokens: Tensor, batch_size: int) -> Stream:
        """Windows before the first block.

        Args:
            tokens: int64 ``[n, len]``.
            batch_size: windows in a forward pass.
        """
        with self.outside():
            batches = list(share(self.shell.record(part) for part in tokens.split(batch_size)))
            for batch in batches:
                batch.hidden = batch.hidden.clone()
        return Stream(batches)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Hold the weights outside the blocks (embeddings, head) while inside.

        :meth:`start` and :meth:`logits` hold them by themselves; between several calls they are
        then not read again.
        """
        self._holders += 1
        if self._holders == 1:
            fill_outside(self.shell, self.layout, self.checkpoint.read)
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                empty_outside(self.shell)

    def block(self, index: int) -> Block:
        """Decoder block ``index``; no tensor has been read yet."""
        sites, matrices = self.sites(index), self.matrices(index)
        return Block(self.checkpoint, self.layout, self.shell, index, sites, matrices)

    @torch.no_grad()
    def whole(self, weights: Callable[[int], Mapping[str, Tensor] | None]) -> Any:
        """The model as transformers has it, all of its weights in memory; it stays so.

        Args:
            weights: of a decoder block's number, the matrices to use in place of the files'.
        """
        self._probed()
        self._holders += 1
        if self._holders == 1:
            fill_outside(self.shell, self.layout, self.checkpoint.read)
        for index in range(self.n_blocks):
            self.shell.keep(index, self.block(index).module(weights(index)))
        return self.shell.model

    @torch.no_grad()
    def logits(self, stream: Stream, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """The logits of windows behind the last block, one window after the other.

        Args:
            first, last: the positions that are wanted, ``first:last``.

        Returns:
            float32 ``[positions, vocab]`` for each window
        """
        with self.outside():
            for batch in stream.batches:
                length = batch.tokens.shape[1]
                keep = torch.arange(length, device=self.device)[first:last]
                alike = batch.hidden.shape[0] == batch.tokens.shape[0]
                for i in range(batch.tokens.shape[0]) if alike else [None]:
                    rows = slice(None) if i is None else slice(i, i + 1)
                    part = replace(batch, tokens=batch.tokens[rows])
                    states = batch.hidden if i is None else batch.hidden[rows]
                    yield from self.shell.logits(part, states, keep)

    def sites(self, index: int) -> list[Site]:
        """The sites of a decoder block, in the order they run; blocks made alike share them."""
        kind = repr(self.shell.blocks[index])
        if kind not in self._sites:
            self._sites[kind] = find_sites(self.shell, self._probed(), index)
        return self._sites[kind]

    def matrices(self, index: int) -> list[Matrix]:
        """The matrices of the files that a decoder block multiplies with, in its sites' order."""
        if self._matrices[0] != index:
            prefix = f"{self.shell.stack}.{index}."
            found = find_matrices(self.layout, self.sites(index), prefix)
            self._matrices = (index, found)
        return self._matrices[1]

    def unread(self, index: int) -> list[str]:
        """The files' names of a block's linears that nothing was multiplied with on the trial run.

        Experts that are modules of their own run only where a token is routed to them.
        """
        known = {member.param for site in self.sites(index) for member in site.members}
        modules = self.shell.blocks[index].named_modules()
        params = [f"{name}.weight" for name, m in modules if isinstance(m, nn.Linear)]
        prefix = f"{self.shell.stack}.{index}."
        tensors = [t for p in params if p not in known for t in self.layout.sources(prefix + p)]
        return [matrix_name(tensor, None) for tensor in tensors]

    @torch.no_grad()
    def _probed(self) -> Batch:
        """A few tokens before the first block, for embeddings of zero."""
        if self._probe is None:
            assert not self._holders, "sites are found before weights are held"
            model = self.shell.model
            for name, p in list(model.named_parameters(remove_duplicate=False)):
                if not name.startswith(f"{self.shell.stack}."):
                    zeros = torch.zeros(p.shape, dtype=self.dtype, device=self.device)
                    set_value(model, name, zeros)
            tokens = torch.arange(PROBE_TOKENS) % self.config.vocab_size
            self._probe = self.shell.record(tokens[None])
            empty_outside(self.shell)
        return self._probe
