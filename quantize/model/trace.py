"""What happens to a decoder block's weights while it runs: which are multiplied with what.

A function mode of torch sees every call of a matrix product. A weight is known by its memory, so
it does not matter whether it belongs to nn.Linear, to transformers' Conv1D or is one of the
matrices in a parameter of three dimensions that holds a layer's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm"}
_FACTORS = ("mat1", "batch1", "mat2", "batch2")  # their names in addmm and baddbmm
_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(frozen=True)
class Read:
    """One product with a weight.

    Attributes:
        param: the weight's parameter, below the block.
        index: which matrix of a parameter of three dimensions; None for two.
        transposed: the parameter holds ``[in, out]``.
        plain: the whole matrix is used, rows and columns as they are.
        x: the input, ``[..., in]``.
    """

    param: str
    index: int | None
    transposed: bool
    plain: bool
    x: Tensor


class Trace(TorchFunctionMode):
    """Tells of reads, and of sums that take a product in.

    Args:
        block: the running block; all weights in memory.
        on_read: called before each product with a weight.
        on_sum: called before a product of ``param`` is added to a tensor of its own shape that is
            no product of a weight: the residual stream.
        history: keep every result, so that a sum with what was made of the product itself (as in
            an activation) is told from one with the residual stream. For a few tokens only.
    """

    def __init__(
        self, block: nn.Module, on_read: Callable[[Read], None],
        on_sum: Callable[[str, Tensor], None] | None = None, *, history: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weights = {
            p.untyped_storage().data_ptr(): (n, p)
            for n, p in block.named_parameters() if p.dim() in (2, 3)
        }  # fmt: skip
        self.on_read, self.on_sum = on_read, on_sum
        self.history = _History() if history else None
        self.products: dict[int, tuple[str, Tensor]] = {}  # by memory; kept, so it is not reused

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        params: set[str] = set()
        if name in _PRODUCTS:
            for read in self._reads(name, args, kwargs):
                params.add(read.param)
                self.on_read(read)
        elif name in _SUMS and self.on_sum is not None and len(args) > 1:
            self._sum(args[0], args[1])
        out = func(*args, **kwargs)
        if params and self.on_sum is not None and isinstance(out, Tensor):
            self.products[out.untyped_storage().data_ptr()] = (min(params), out)
        if self.history is not None:
            self.history.add(out)
        return out

    def _reads(self, name: str, args: Any, kwargs: Mapping[str, Any]) -> list[Read]:
        if name == "linear":
            x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        elif name in ("addmm", "baddbmm"):
            given = (*args, *(kwargs[k] for k in _FACTORS if k in kwargs))
            x, weight = given[1], given[2]
        elif name == "__rmatmul__":
            x, weight = args[1], args[0]
        else:
            x, weight = args[0], args[1] if len(args) > 1 else kwargs.get("other")
        if not isinstance(weight, Tensor) or not isinstance(x, Tensor):
            return []
        found = self.weights.get(weight.untyped_storage().data_ptr())
        if found is None:
            left = self.weights.get(x.untyped_storage().data_ptr())
            return [] if left is None else [Read(left[0], None, False, False, weight)]
        param, whole = found
        swapped, index, plain = _view_of(weight, whole)
        transposed = swapped if name == "linear" else not swapped
        if whole.dim() == 3 and weight.dim() == 3:
            if not plain or x.dim() != 3 or x.shape[0] != whole.shape[0]:
                return [Read(param, None, transposed, False, x)]
            return [Read(param, i, transposed, True, x[i]) for i in range(whole.shape[0])]
        return [Read(param, index, transposed, plain, x)]

    def _sum(self, a: Any, b: Any) -> None:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return
        made = [self.products.get(t.untyped_storage().data_ptr()) for t in (a, b)]
        for product, other, own in ((made[0], made[1], b), (made[1], made[0], a)):
            if product is not None and other is None and self.on_sum is not None:
                del self.products[product[1].untyped_storage().data_ptr()]
                if self.history is None or self.history.before(own, product[1]):
                    self.on_sum(product[0], own)
                return


class _History:
    """The order in which results came to be."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[int, Tensor]] = {}

    def add(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self._made.setdefault(
                out.untyped_storage().data_ptr(), (len(self._made), out)
            )  # kept, so that its memory is not used for another

    def before(self, one: Tensor, other: Tensor) -> bool:
        """Whether a tensor was there before another was made."""
        places = [self._made.get(t.untyped_storage().data_ptr(), (-1, t))[0] for t in (one, other)]
        return places[0] < places[1]


def _view_of(weight: Tensor, whole: Tensor) -> tuple[bool, int | None, bool]:
    """How a view lies in its parameter: (swapped, number of the matrix, whether it is whole)."""
    rows, cols = whole.shape[-2:]
    stride = whole.stride()[-2:]
    at = weight.storage_offset() - whole.storage_offset()
    index = None
    if whole.dim() == 3 and weight.dim() == 2:
        index, at = divmod(int(at), whole.stride(0))
    straight = (rows, cols) == weight.shape[-2:] and weight.stride()[-2:] == stride
    turned = (cols, rows) == weight.shape[-2:] and weight.stride()[-2:] == stride[::-1]
    plain = at == 0 and weight.dim() <= whole.dim() and (straight or turned)
    return turned and not straight, index, plain


def same_input(x: Tensor) -> tuple[int, int, int, int, int]:
    """What is equal for two views of the same rows of inputs, unchanged between."""
    return (
        x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel(), x.shape[-1], x._version
    )  # fmt: skip


def find_reads(block: nn.Module, run: Callable[[], Any]) -> tuple[list[Read], dict[str, bool]]:
    """All reads of one run in their order, and the parameters whose product joins the stream."""
    reads: list[Read] = []
    joins: dict[str, bool] = {}

    def join(param: str, _: Tensor) -> None:
        joins[param] = True

    with torch.no_grad(), Trace(block, reads.append, join, history=True):
        run()
    return reads, joins
