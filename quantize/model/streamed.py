"""A Hugging Face causal LM run one decoder block at a time, with its weights read when needed.

The decoder layers and the rotary embedding are transformers' own classes, so attention, QK-norm,
biases and rope scaling are theirs. :mod:`pt2_core.model.architectures` says where those classes are
and which linears a block has, which of them share an input, and what their orders fold into.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pt2_core.model.architectures import ADAPTERS, EMBEDDING, HEAD, NORM
from pt2_core.model.checkpoint import Checkpoint, torch_dtype
from pt2_core.model.expected import load_config, settle


class _LastSite(Exception):
    """Ends a forward pass whose remaining results are not wanted."""


class StreamedModel:
    """A causal LM that holds at most one decoder block.

    Attributes:
        config: transformers' config.
        n_blocks, hidden_size, head_dim, queries_per_kv: the shapes the orders need.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: str = "float32") -> None:
        """Read the config, and check architecture and tensors against transformers' class.

        Raises:
            PT2Error: an unknown architecture (the known ones are named), a broken config, or
                tensors that are not those of the class.
        """
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.dtype = torch_dtype(dtype)
        checkpoint.check_architecture()
        self.adapter = ADAPTERS[checkpoint.architecture]
        self.config = load_config(checkpoint)
        settle(checkpoint, self.config)
        heads = self.config.num_attention_heads
        self.n_blocks: int = self.config.num_hidden_layers
        self.hidden_size: int = self.config.hidden_size
        self.head_dim: int = getattr(self.config, "head_dim", None) or self.hidden_size // heads
        self.queries_per_kv: int = heads // (self.config.num_key_value_heads or heads)
        self._module = importlib.import_module(f"transformers.models.{self.adapter.module}")
        self._rotary = self._class("RotaryEmbedding")(self.config).to(self.device)

    def linear_name(self, block: int, linear: str) -> str:
        """The module's full name, e.g. ``model.layers.3.mlp.up_proj``."""
        return f"model.layers.{block}.{linear}"

    def weight(self, module: str) -> Tensor:
        """A linear's weight, float32 ``[out, in]``, on the device."""
        return self.checkpoint.read(f"{module}.weight").to(self.device, torch.float32)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """int64 ``[n, len]`` -> the residual stream, ``[n, len, hidden]`` in the forward dtype."""
        shape = (self.config.vocab_size, self.hidden_size)
        table = self.checkpoint.read(EMBEDDING, shape).to(self.device, self.dtype)
        return nn.functional.embedding(tokens.to(self.device), table)

    def load_block(self, index: int, replace: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Build decoder block ``index`` with its weights in the forward dtype.

        Args:
            replace: module name -> weight ``[out, in]`` to use instead of the checkpoint's.
        """
        with torch.device("meta"):
            layer = self._class("DecoderLayer")(self.config, layer_idx=index)
        prefix = f"model.layers.{index}."
        for name, parameter in list(layer.named_parameters()):
            module = prefix + name.rpartition(".")[0]
            if replace is not None and name.endswith(".weight") and module in replace:
                value = replace[module]
            else:
                value = self.checkpoint.read(prefix + name, tuple(parameter.shape))
            _set_parameter(layer, name, value.to(self.device, self.dtype))
        return layer.eval()

    def replace_weights(self, layer: nn.Module, index: int, replace: Mapping[str, Tensor]) -> None:
        """Give linears of a loaded block other weights (module name -> ``[out, in]``)."""
        prefix = f"model.layers.{index}."
        for module, value in replace.items():
            name = f"{module.removeprefix(prefix)}.weight"
            _set_parameter(layer, name, value.to(self.device, self.dtype))

    @torch.no_grad()
    def forward_block(self, layer: nn.Module, hidden: Tensor, index: int) -> Tensor:
        """One decoder block on ``[n, len, hidden]``, every window from position 0, causal."""
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device)[None]
        out = layer(
            hidden,
            attention_mask=self._sliding_mask(index, length),
            position_ids=positions,
            position_embeddings=self._rotary(hidden, positions),
        )
        return out[0] if isinstance(out, tuple) else out

    def capture_inputs(
        self,
        layer: nn.Module,
        hidden: Tensor,
        index: int,
        take: Callable[[int, Tensor], None],
        *,
        take_stream: Callable[[int, Tensor], None] | None = None,
        last: int | None = None,
        to_the_end: bool = False,
    ) -> Tensor | None:
        """Run a block only as far as needed to see the inputs of its sites.

        Args:
            take: called with (index into ``adapter.sites``, input ``[n, len, in]``).
            take_stream: called, for sites that write to the residual stream, with (index, the
                stream ``[n, len, hidden]`` before they do).
            last: index of the last site that is wanted (None: all).
            to_the_end: run the whole block and return its output.
        """
        handles = []
        last = len(self.adapter.sites) - 1 if last is None else last
        for number, site in enumerate(self.adapter.sites):
            if take_stream is not None and site.stream is not None:

                def stream_hook(
                    _: nn.Module, args: tuple[Tensor, ...], number: int = number
                ) -> None:
                    take_stream(number, args[0])

                norm = layer.get_submodule(site.stream)
                handles.append(norm.register_forward_pre_hook(stream_hook))

            def hook(_: nn.Module, args: tuple[Tensor, ...], number: int = number) -> None:
                take(number, args[0])
                if number == last and not to_the_end:
                    raise _LastSite

            module = layer.get_submodule(site.linears[0])
            handles.append(module.register_forward_pre_hook(hook))
        try:
            return self.forward_block(layer, hidden, index)
        except _LastSite:
            return None
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def head(self) -> Callable[[Tensor], Tensor]:
        """The final norm and the output head: ``[n, hidden]`` -> float32 logits ``[n, vocab]``."""
        with torch.device("meta"):
            norm = self._class("RMSNorm")(self.hidden_size, eps=self.config.rms_norm_eps)
        scale = self.checkpoint.read(NORM, (self.hidden_size,))
        _set_parameter(norm, "weight", scale.to(self.device, self.dtype))
        shape = (self.config.vocab_size, self.hidden_size)
        table = self.checkpoint.read(EMBEDDING if self.checkpoint.tied else HEAD, shape)
        table = table.to(self.device, self.dtype)
        return lambda hidden: (norm(hidden) @ table.T).float()

    def _class(self, kind: str) -> Any:
        return getattr(self._module, self.adapter.prefix + kind)

    def _sliding_mask(self, index: int, length: int) -> Tensor | None:
        """None where plain causal attention is right: sdpa then masks by itself."""
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        if types is not None and types[index] != "sliding_attention":
            return None
        if window is None or length <= window:
            return None
        at = torch.arange(length, device=self.device)
        distance = at[:, None] - at[None, :]
        return ((distance >= 0) & (distance < window))[None, None]


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), leaf, parameter)
