"""A model of transformers' own class without its decoder blocks.

The class is built on the meta device, its stack of decoder blocks is found, and a stand-in takes
each block's place. One forward pass of the class's own code then leaves the first block's input and
the arguments that the model gives every block (masks, rotary tables, positions); another one, with
the streamed result in the last block's place, makes the logits. Embeddings and how they are scaled,
final norm, head and soft caps are the model's own code, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pt2_core.errors import PT2Error
from pt2_core.model.layout import Layout

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments behind a block's input


@dataclass
class Batch:
    """Windows on their way through the model.

    Attributes:
        tokens: int64 ``[n, len]``.
        hidden: what the next block reads, mostly ``[n, len, hidden]``.
        calls: the other arguments of each block.
        by_name: the keyword of the block's input, None where it comes first.
    """

    tokens: Tensor
    hidden: Tensor
    calls: list[Call] = field(repr=False)
    by_name: str | None = None

    def run(self, layer: nn.Module, index: int, hidden: Tensor | None = None) -> Tensor:
        """The output of decoder block ``index`` for ``hidden`` (None: the batch's own)."""
        args, kwargs = self.calls[index]
        x = self.hidden if hidden is None else hidden
        if self.by_name is None:
            out = layer(x, *args, **kwargs)
        else:
            out = layer(*args, **{**kwargs, self.by_name: x})
        return out[0] if isinstance(out, tuple | list) else out


class _Stop(Exception):
    """Ends a forward pass whose remaining results are not wanted."""


class _StandIn(nn.Module):
    """Takes a block's place; answers for its attributes, which some models look at."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # no submodule: its weights are not there

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Recorder(_StandIn):
    """Keeps what the model gives the block, and hands its input on."""

    def __init__(self, block: nn.Module, last: bool, as_tuple: bool) -> None:
        super().__init__(block)
        self.last, self.as_tuple = last, as_tuple
        self.input: Tensor | None = None
        self.by_name: str | None = None
        self.call: Call = ((), {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            self.input, self.call = args[0], (args[1:], kwargs)
        else:
            self.by_name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            self.input = kwargs[self.by_name]
            self.call = ((), {k: v for k, v in kwargs.items() if k != self.by_name})
        if self.last:
            raise _Stop
        return (self.input,) if self.as_tuple else self.input


class _Result(_StandIn):
    """Returns what streaming has made; in all but the last block's place, what it is given."""

    def __init__(self, block: nn.Module, result: Tensor | None, as_tuple: bool) -> None:
        super().__init__(block)
        self.result, self.as_tuple = result, as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.result
        if out is None:
            out = args[0] if args else next(iter(kwargs.values()))
        return (out,) if self.as_tuple else out


class Shell:
    """The class of a model, its stack of decoder blocks found.

    Attributes:
        model: the model; all weights on the meta device, all computed buffers on ``device``.
        stack: the name of the list of decoder blocks, ``model.layers``.
        blocks: the decoder blocks, weights on the meta device.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        compute_buffers(model, device)
        self.stack, blocks = find_stack(model)
        self.blocks: list[nn.Module] = list(blocks)
        self._places = blocks
        self._as_tuple = False

    def outside(self) -> list[str]:
        """Parameters and stored buffers outside the stack, tied ones left out."""
        tied = self.model.all_tied_weights_keys
        names = [n for n, _ in self.model.named_parameters(remove_duplicate=False)]
        stored = set(self.model.state_dict())
        names += [n for n, _ in self.model.named_buffers() if n in stored]
        return [n for n in names if n not in tied and not n.startswith(f"{self.stack}.")]

    def make_block(self, index: int) -> nn.Module:
        """A decoder block of the class, weights on the meta device."""
        return deepcopy(self.blocks[index]).eval()

    def keep(self, index: int, layer: nn.Module) -> None:
        """Put a block with its weights into the model for good."""
        self.blocks[index] = self._places[index] = layer

    def record(self, tokens: Tensor) -> Batch:
        """Run the model as far as its blocks.

        Args:
            tokens: int64 ``[n, len]``.

        Raises:
            PT2Error: the model's code gives its blocks something that streaming cannot repeat.
        """
        tokens = tokens.to(self.device)
        recorders = self._record(tokens)
        if len(recorders) > 1 and not _same(recorders[0].input, recorders[1].input):
            self._as_tuple = True  # the model takes the first of what a block returns
            recorders = self._record(tokens)
        first = recorders[0]
        if first.input is None or not all(_same(r.input, first.input) for r in recorders):
            raise PT2Error(
                f"{type(self.model).__name__} gives its decoder blocks more than the states of the "
                "block before, so it cannot be run block by block"
            )
        return Batch(tokens, first.input, [r.call for r in recorders], first.by_name)

    def _record(self, tokens: Tensor) -> list[_Recorder]:
        last = len(self.blocks) - 1
        recorders = [_Recorder(b, i == last, self._as_tuple) for i, b in enumerate(self.blocks)]
        with self._in_place(recorders):
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _Stop:
                pass
            except Exception as e:
                if recorders[0].input is None or self._as_tuple:
                    raise
                self._as_tuple = True
                del e
                return self._record(tokens)
        return recorders

    def logits(self, batch: Batch, states: Tensor, keep: Tensor | None = None) -> Tensor:
        """The logits of the streamed states of all blocks.

        Args:
            states: what the last block put out for this batch.
            keep: int64, the positions that are wanted (None: all).

        Returns:
            float32 ``[n, kept, vocab]``
        """
        results = [_Result(b, None, self._as_tuple) for b in self.blocks[:-1]]
        results.append(_Result(self.blocks[-1], states, self._as_tuple))
        given: dict[str, Any] = {}
        if keep is not None and _takes(self.model.forward, "logits_to_keep"):
            given["logits_to_keep"] = keep
        with self._in_place(results):
            logits: Tensor = self.model(input_ids=batch.tokens, use_cache=False, **given).logits
        if keep is not None and not given:
            logits = logits[:, keep]
        return logits.float()

    def _in_place(self, stand_ins: Iterable[nn.Module]) -> _InPlace:
        return _InPlace(self._places, self.blocks, list(stand_ins))


class _InPlace:
    """Stand-ins in the blocks' places while inside."""

    def __init__(self, places: Any, blocks: list[nn.Module], stand_ins: list[nn.Module]) -> None:
        self.places, self.blocks, self.stand_ins = places, blocks, stand_ins

    def __enter__(self) -> None:
        self._put(self.stand_ins)

    def __exit__(self, *_: Any) -> None:
        self._put(self.blocks)

    def _put(self, modules: list[nn.Module]) -> None:
        for i, module in enumerate(modules):
            self.places[i] = module


def find_stack(model: Any) -> tuple[str, Any]:
    """The name of the list of decoder blocks, and the list: the outermost of its length.

    Raises:
        PT2Error: there is none.
    """
    count = model.config.num_hidden_layers
    found = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count
    ]
    if not found:
        raise PT2Error(
            f"{type(model).__name__} has no list of {count} decoder blocks: it cannot be run block "
            "by block"
        )
    return min(found, key=lambda item: item[0].count("."))


@torch.no_grad()
def compute_buffers(model: Any, device: torch.device) -> None:
    """Give a model on the meta device the buffers that it computes, as transformers does."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers then leaves it alone
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    model.initialize_weights()
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def set_value(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter, or a stored buffer, into a module."""
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    if leaf in place._buffers:
        place._buffers[leaf] = value
    else:
        place._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def fill(
    module: nn.Module, names: Iterable[str], values: Callable[[list[str]], dict[str, Tensor]],
    device: torch.device, dtype: torch.dtype, prefix: str = "",
) -> None:  # fmt: skip
    """Give parameters and stored buffers their values; buffers keep their own dtype.

    Args:
        names: in the module, below ``prefix`` of the model.
        values: of :meth:`pt2_core.model.layout.Layout.values`, by names in the model.
    """
    wanted = list(names)
    found = values([prefix + n for n in wanted])
    for name in wanted:
        value = found.get(prefix + name)
        if value is None:
            continue
        owner, _, leaf = name.rpartition(".")
        buffer = module.get_submodule(owner)._buffers.get(leaf)
        set_value(module, name, value.to(device, dtype if buffer is None else buffer.dtype))


def fill_outside(shell: Shell, layout: Layout, read: Callable[[str], Tensor]) -> None:
    """Give everything outside the stack its weights, and tie what is tied."""
    model = shell.model
    fill(model, shell.outside(), lambda names: layout.values(names, read), shell.device,
         shell.dtype)  # fmt: skip
    for name, source in model.all_tied_weights_keys.items():
        if not name.startswith(f"{shell.stack}."):
            set_value(model, name, model.get_parameter(source).data)


def empty_outside(shell: Shell) -> None:
    """Let go of the weights outside the stack."""
    parameters = {n for n, _ in shell.model.named_parameters(remove_duplicate=False)}
    names = [*shell.outside(), *shell.model.all_tied_weights_keys]
    for name in (n for n in names if n in parameters and not n.startswith(f"{shell.stack}.")):
        set_value(shell.model, name, shell.model.get_parameter(name).data.to("meta"))


def share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches whose equal arguments are one tensor, so that a mask is kept once."""
    known: list[Tensor] = []
    for batch in batches:
        seen: dict[int, Tensor] = {}
        batch.calls = [_shared(call, known, seen) for call in batch.calls]
        yield batch


def _shared(value: Any, known: list[Tensor], seen: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in seen:
            same = (k for k in known if k.shape == value.shape and k.dtype == value.dtype)
            twin = next((k for k in same if torch.equal(k, value)), None)
            if twin is None:
                known.append(value)
                twin = value
            seen[id(value)] = twin
        return seen[id(value)]
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_shared(v, known, seen) for v in value)
    if type(value) is dict:
        return {k: _shared(v, known, seen) for k, v in value.items()}
    return value


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether a block got exactly what the block before was given (recorders pass it on)."""
    return a is b or (
        a is not None and b is not None and a.shape == b.shape and bool(torch.equal(a, b))
    )


def _takes(function: Callable[..., Any], name: str) -> bool:
    import inspect

    return name in inspect.signature(function).parameters
