"""The tensors that go into llama.cpp's converter, and what comes out of it.

Runs in the process of :mod:`export.converter_driver` (see there), which has the converter's own
version of the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from export.stand_ins import VALUES, WIDE, Levels, RowMap, Target, row_map, sources_of, track, watch


class Tensors:
    """Gives the converter's model its tensors and listens to those that it writes.

    Attributes:
        current: the checkpoint's name of the tensor that the converter works on.
        listed: the result's entry of every tensor it has made, in order.
        refused: whether one was found now that cannot be ternary, so that it must be tried anew.
    """

    def __init__(self, model: Any, job: dict[str, Any], levels: Levels) -> None:
        self.model, self.job, self.levels = model, job, levels
        self.current: str | None = None
        self.listed: list[dict[str, Any]] = []
        self.refused = False
        self._maps: dict[int, RowMap] = {}
        self.targets = {
            name: Target(tuple(shape), first, transposed)
            for name, (shape, first, transposed) in job["ternary"].items()
        }
        # The converter renames some tensors as it reads them: here each has the file's name too.
        self._theirs = {name: _renamed(model, name) for name in job["tensors"]}
        self._ours = {theirs: name for name, theirs in self._theirs.items() if theirs is not None}
        self._give()
        self._listen()

    def _give(self) -> None:
        """Put stand-ins, values, replaced and folded tensors where they belong.

        Raises:
            ValueError: the converter knows no tensor of a name that we need.
        """
        import numpy as np
        from gguf.lazy import LazyBase

        track(LazyBase)
        tensors, job = self.model.model_tensors, self.job
        for name in job["dropped"]:
            tensors.pop(_renamed(self.model, name), None)
        for name, shape in job["packed"].items():
            if name not in self.targets and self._theirs.get(name) is not None:
                given = job["given"].get(name)
                self._put(name, _from_file(given) if given else _of_shape(tuple(shape)))
        for name, target in self.targets.items():
            level = self.levels.of[name]
            if self._theirs[name] is None:
                continue  # of a part of the model that the converter leaves out
            if level != VALUES:
                self._put(name, _stand_in(target, level == WIDE))
            elif name in job["values"]:
                self._put(name, _from_file(job["values"][name]))
            elif self._theirs[name] not in tensors:
                self._put(name, _of_shape(target.shape))
        if not job["preflight"]:
            orders, replaced = np.load(job["orders"]), np.load(job["replaced"])
            for name in replaced.files:
                self._put(name, _given(replaced[name]))
            for key in orders.files:
                side, _, place = key.partition("/")
                self._order(place, orders[key], side)
        for theirs, make in list(tensors.items()):
            tensors[theirs] = watch(self._ours.get(theirs, theirs), make)

    def _put(self, name: str, make: Callable[[], Any]) -> None:
        theirs = self._theirs.get(name)
        if theirs is None:
            raise ValueError(f"llama.cpp's converter has no tensor {name} in this model")
        self.model.model_tensors[theirs] = make

    def _order(self, place: str, order: Any, side: str) -> None:
        name, _, expert = place.partition("[")
        theirs = self._theirs.get(name)
        if theirs is None or theirs not in self.model.model_tensors:
            raise ValueError(f"llama.cpp's converter has no tensor {name} in this model")
        number = int(expert[:-1]) if expert else None
        make = _reordered(self.model.model_tensors[theirs], order, side, number)
        self.model.model_tensors[theirs] = make

    def _listen(self) -> None:
        """Hear of every tensor before the writer does, and of the one that is worked on."""
        import gguf

        modify, add = self.model.modify_tensors, self.model.gguf_writer.add_tensor
        quants: Any = gguf.quants
        free, full = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32
        # With BF16 as the file's type, the converter says which tensors must be in full precision.
        self.model.ftype = gguf.LlamaFileType.MOSTLY_BF16

        def modified(data: Any, name: str, bid: int | None) -> list[Any]:
            self.current = self._ours.get(name, name)
            return list(modify(data, name, bid))

        def add_tensor(name: str, data: Any, raw_shape: Any = None, raw_dtype: Any = None) -> None:
            is_free = raw_dtype == free
            sources = sources_of(data)
            entry = {"name": name, "sources": sources, "ternary": False, "free": is_free}
            stood_in = [n for n in sources if self.levels.of.get(n, VALUES) != VALUES]
            kind = full if is_free else raw_dtype
            if stood_in:
                found = self._read(stood_in, sources, data)
                if found is None:
                    return
                entry["ternary"], data, kind = True, _never(found.shape), full
                self._maps[len(self.listed)] = found
            self.listed.append(entry)
            add(name, data, raw_shape, kind)
            entry["shape"] = [int(n) for n in self._info(name).shape]

        self.model.modify_tensors = modified
        self.model.gguf_writer.add_tensor = add_tensor
        quants.quantize = _Unrounded(quants.quantize, free, full)

    def _read(self, stood_in: list[str], sources: list[str], data: Any) -> RowMap | None:
        """The rows of a tensor that stand-ins went into; None where it takes their values."""
        from gguf import LazyNumpyTensor

        found = None
        if set(stood_in) == set(sources):
            wide = [self.levels.of[n] == WIDE for n in stood_in]
            if len(set(wide)) == 1:
                values = LazyNumpyTensor.to_eager(data)
                found = row_map(values, (self.targets[n] for n in stood_in), wide[0])
        if found is None:
            self.refused = True
            self.levels.refuse(
                stood_in, "llama.cpp's converter does more to it than to order and join rows"
            )
        return found

    def _info(self, name: str) -> Any:
        return next(t[name] for t in self.model.gguf_writer.tensors if name in t)

    def full_precision(self) -> None:
        """The file is one of float32 tensors again."""
        import gguf

        self.model.ftype = gguf.LlamaFileType.ALL_F32

    def drop_ternary(self) -> None:
        """Leave the ternary tensors out of the carrier."""
        for number in self._maps:
            for tensors in self.model.gguf_writer.tensors:
                tensors.pop(self.listed[number]["name"], None)

    def rows(self) -> dict[str, Any]:
        """``N/which`` and ``N/row`` of ternary tensor N of the list."""
        found = {}
        for number, each in self._maps.items():
            found[f"{number}/which"], found[f"{number}/row"] = each.which, each.row
        return found

    def lost(self) -> list[str]:
        """Ternary tensors that nothing was made of."""
        used = {name for entry in self.listed for name in entry["sources"]}
        return [name for name in self.targets if name not in used]


class _Unrounded:
    """The converter's ``quantize``, that leaves in full precision what could be rounded."""

    def __init__(self, quantize: Callable[..., Any], free: Any, full: Any) -> None:
        # Of a try before this one there is another of these in its place.
        self.quantize: Any = quantize.quantize if isinstance(quantize, _Unrounded) else quantize
        self.free, self.full = free, full

    def __call__(self, data: Any, kind: Any) -> Any:
        return self.quantize(data, self.full if kind == self.free else kind)


def _renamed(model: Any, name: str) -> str | None:
    """The converter's name for a tensor of the files; None for one that it leaves out."""
    import torch

    found = model.filter_tensors((name, lambda: torch.empty(0)))
    return None if found is None else str(found[0])


def _stand_in(target: Target, wide: bool) -> Callable[[], Any]:
    import torch

    lazy = _lazy_class()
    shape = list(target.shape)
    if not wide:
        shape[-2 if target.transposed else -1] = 3

    def make() -> Any:
        meta = lazy.meta_with_dtype_and_shape(torch.float32, tuple(shape))
        return lazy(meta=meta, func=lambda: torch.from_numpy(target.stand_in(wide)))

    return make


def _of_shape(shape: tuple[int, ...]) -> Callable[[], Any]:
    """A tensor of which only the shape is known yet."""
    import torch

    lazy = _lazy_class()

    def missing() -> Any:
        raise ValueError("its values are not known yet")

    def make() -> Any:
        return lazy(meta=lazy.meta_with_dtype_and_shape(torch.float32, shape), func=missing)

    return make


def _from_file(path: str) -> Callable[[], Any]:
    import numpy as np
    import torch

    lazy = _lazy_class()

    def make() -> Any:
        shape = np.load(path, mmap_mode="r").shape
        meta = lazy.meta_with_dtype_and_shape(torch.float32, tuple(shape))
        return lazy(meta=meta, func=lambda: torch.from_numpy(np.load(path)))

    return make


def _given(value: Any) -> Callable[[], Any]:
    import torch

    lazy = _lazy_class()
    return lambda: lazy.from_eager(torch.from_numpy(value))


def _never(shape: tuple[int, ...]) -> Any:
    """Stands for a ternary tensor where the writer counts parameters; has no values."""
    import gguf
    import numpy as np

    def values() -> Any:
        raise AssertionError("a ternary tensor is not written by the converter")

    lazy: Any = gguf.LazyNumpyTensor
    return lazy(meta=lazy.meta_with_dtype_and_shape(np.float32, shape), func=values)


def _reordered(
    source: Callable[[], Any], order: Any, side: str, expert: int | None
) -> Callable[[], Any]:
    """The tensor of ``source`` with its rows or columns in the given order, loaded when written.

    Args:
        side: ``rows`` or ``cols``.
        expert: of a tensor of three dimensions, the only one that is reordered; None: all.
    """
    import torch

    lazy = _lazy_class()
    index = torch.from_numpy(order.astype("int64"))

    def make() -> Any:
        tensor = source()
        axis = tensor.ndim - 1 if side == "cols" else max(tensor.ndim - 2, 0)
        if (side == "cols" and tensor.ndim < 2) or tensor.shape[axis] != len(index):
            raise ValueError(
                f"an order of {len(index)} does not fit a tensor {tuple(tensor.shape)}"
            )

        def reorder(t: Any) -> Any:
            if expert is None:
                return t.index_select(axis, index)
            result = t.clone()
            result[expert] = t[expert].index_select(axis - 1, index)
            return result

        meta = lazy.meta_with_dtype_and_shape(tensor.dtype, tuple(tensor.shape))
        return lazy(meta=meta, args=(tensor,), func=reorder)

    return make


def _lazy_class() -> Any:
    from conversion.base import LazyTorchTensor

    return LazyTorchTensor
