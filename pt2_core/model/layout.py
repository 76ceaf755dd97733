"""How the tensors of a model's files become the parameters of transformers' class for it.

transformers renames, joins and splits tensors while it loads them (Mixtral's experts are one linear
each in the files and one tensor of three dimensions in the class). The same operations are used
here, so nothing about an architecture is known: which rows of which file tensor make which rows of
a parameter is read off numbers that are pushed through them. Torch and transformers are imported
when a layout is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pt2_core.errors import PT2Error

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Read = Callable[[str], "Tensor"]
TEXT_PART = "language_model."  # the prefix of the text model in a model of text and images


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix in a file that are rows of a matrix in the class.

    A tensor of three dimensions is a stack of matrices; a matrix in it is named by its number.

    Attributes:
        tensor: the file's tensor.
        slice: the matrix's number in it, None for a tensor of two dimensions.
        transposed: the file holds ``[in, out]``.
        param, param_slice, param_transposed: the same of the class's parameter.
        rows, param_rows: int64, row ``rows[i]`` of the file's is row ``param_rows[i]`` of the
            class's, both as ``[out, in]``.
    """

    tensor: str
    slice: int | None
    transposed: bool
    param: str
    param_slice: int | None
    param_transposed: bool
    rows: Tensor
    param_rows: Tensor

    def whole(self, file_rows: int, param_rows: int) -> bool:
        """Whether all rows of the file's matrix are all rows of the class's, in their order."""
        same = self.rows.numel() == file_rows == param_rows
        return same and _counts(self.rows) and _counts(self.param_rows)


@dataclass
class _Recipe:
    """What one step of the loading makes: ``targets`` out of the tensors of ``sources``."""

    first: str
    converter: Any  # transformers' WeightConverter; None where the tensor is taken as it is
    sources: dict[str, list[str]]  # pattern -> file tensors

    def names(self) -> list[str]:
        return [n for names in self.sources.values() for n in names]


class Layout:
    """The files' tensors and a class's parameters.

    Attributes:
        shapes: parameter (and stored buffer) of the class -> shape.
        extra: tensors of the files that the class does not take.
        missing: parameters that no tensor makes, tied ones left out.
        misshapen: what is wrong with a tensor of another shape than the class's, by its parameter.
    """

    def __init__(self, model: Any, tensors: Mapping[str, Shape]) -> None:
        """Sort a model's tensors into the class's parameters.

        Args:
            model: transformers' model on the meta device.
            tensors: name in the files -> shape.

        Raises:
            PT2Error: transformers cannot join the tensors.
        """
        self.model = model
        self.tensors = dict(tensors)
        self.shapes = {n: tuple(p.shape) for n, p in model.state_dict().items()}
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self.extra: list[str] = []
        self.misshapen: dict[str, tuple[str, str]] = {}
        recipes = self._recipes()
        self._of: dict[str, _Recipe] = {}
        for recipe in recipes:
            for target, shape in self._results(recipe).items():
                if target not in self.shapes:
                    self.extra += [n for n in recipe.names() if n not in self.extra]
                    continue
                self._check_shape(recipe, target, shape)
                self._of[target] = recipe
        self.missing = [n for n in self.shapes if n not in self._of and n not in self.tied]

    def sources(self, param: str) -> list[str]:
        """The tensors of the files that a parameter is made of; empty where there are none."""
        recipe = self._of.get(param)
        return recipe.names() if recipe else []

    def values(self, params: Iterable[str], read: Read) -> dict[str, Tensor]:
        """Parameters' values.

        Args:
            read: gives a tensor of the files.

        Returns:
            parameter -> value, of those that the files hold.
        """
        done: dict[str, Tensor] = {}
        for param in params:
            if param in done or param not in self._of:
                continue
            done |= _run(self.model, self._of[param], read)
        return done

    def rows_of(self, param: str, index: int | None, transposed: bool) -> list[Rows] | None:
        """Which matrices of the files make a matrix of the class.

        Args:
            index: its number in a parameter of three dimensions, else None.
            transposed: the class holds it as ``[in, out]``.

        Returns:
            the matrices in the order of their first rows; None where the matrix is no plain
            arrangement of rows (its columns are mixed, or it is not in the files).
        """
        recipe = self._of.get(param)
        if recipe is None:
            return None
        if recipe.converter is None:
            return [self._identity(recipe.names()[0], param, index, transposed)]
        found = self._pushed(recipe).get((param, index))
        if found is None:
            return None
        return _read_off(found, recipe.names(), self.tensors, param, index, transposed)

    def _identity(self, tensor: str, param: str, index: int | None, transposed: bool) -> Rows:
        import torch

        shape = self.tensors[tensor][-2:]
        rows = torch.arange(shape[1] if transposed else shape[0])
        return Rows(tensor, index, transposed, param, index, transposed, rows, rows)

    def _recipes(self) -> list[_Recipe]:
        """As ``convert_and_load_state_dict_in_model`` sorts the tensors, nothing read."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        entries = self._conversions
        renamings = [e for e in entries if isinstance(e, WeightRenaming)]
        converters = [e for e in entries if isinstance(e, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        recipes: dict[str, _Recipe] = {}
        for name in sorted(self.tensors, key=dot_natural_key):
            for candidate in _candidates(name):
                param, pattern = self._renamed(candidate, renamings, converters)
                if param in self.shapes:
                    break
            else:
                self.extra.append(name)
                continue
            converter = None if pattern is None else by_pattern[pattern]
            recipe = recipes.setdefault(param, _Recipe(param, converter, {}))
            recipe.sources.setdefault(pattern or name, []).append(name)
        return list(recipes.values())

    def _renamed(
        self, name: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix, known = self.model.base_model_prefix, self._known
        param, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if param not in known and name in known:
            param, pattern = rename_source_key(name, [], [], prefix, known)
        return param, pattern

    @cached_property
    def _known(self) -> dict[str, Any]:
        return dict(self.model.state_dict())

    @cached_property
    def _conversions(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(self.model))

    def _results(self, recipe: _Recipe) -> dict[str, Shape]:
        """What a recipe makes, from shapes alone."""
        import torch

        if recipe.converter is None:
            return {recipe.first: self.tensors[recipe.names()[0]]}
        made = _run(self.model, recipe, lambda n: torch.empty(self.tensors[n], device="meta"))
        return {n: tuple(v.shape) for n, v in made.items()}

    def _check_shape(self, recipe: _Recipe, target: str, shape: Shape) -> None:
        if shape != self.shapes[target]:
            name = recipe.names()[0]
            of = "" if recipe.converter is None else f" of {target}, which is made of it"
            wanted = f"{list(self.tensors[name])}, but config.json asks for "
            self.misshapen[target] = (name, f"{wanted}{list(self.shapes[target])}{of}")

    def _pushed(self, recipe: _Recipe) -> dict[tuple[str, int | None], tuple[Tensor, Tensor]]:
        """Matrix of the class -> the numbers that arrived there, of rows and of columns.

        Blocks are made alike, so the numbers of one serve all whose tensors have the same shapes.
        """
        import torch

        first = recipe.first
        place = _numberless(first)
        shapes = tuple(tuple(self.tensors[n] for n in names) for names in recipe.sources.values())
        key = (place, tuple(recipe.sources), shapes)
        known = self.__dict__.setdefault("_pushes", {})
        if key not in known:
            numbers, at = {}, 0
            for name in recipe.names():
                numbers[name] = at
                at += _row_count(self.tensors[name])

            def rows(name: str) -> Tensor:
                shape = self.tensors[name]
                ids = torch.arange(_row_count(shape), dtype=torch.int32) + numbers[name]
                return ids.view(*shape[:-1], 1).expand(shape)

            def columns(name: str) -> Tensor:
                shape = self.tensors[name]
                return torch.arange(shape[-1], dtype=torch.int32).expand(shape)

            try:
                made = [_run(self.model, recipe, read) for read in (rows, columns)]
            except PT2Error:  # an operation on values, not on places
                made = [{}, {}]
            known[key] = (first, {n: (v, made[1][n]) for n, v in made[0].items()})
        was, found = known[key]
        result: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = {}
        for name, (row_ids, column_ids) in found.items():
            param = first if name == was else _moved(name, was, first)
            if row_ids.dim() == 2:
                result[param, None] = (row_ids, column_ids)
            elif row_ids.dim() == 3:
                for i in range(row_ids.shape[0]):
                    result[param, i] = (row_ids[i], column_ids[i])
        return result


def _run(model: Any, recipe: _Recipe, read: Read) -> dict[str, Tensor]:
    """Make a recipe's parameters."""
    if recipe.converter is None:
        return {recipe.first: read(recipe.names()[0])}
    converter = deepcopy(recipe.converter)
    for pattern, names in recipe.sources.items():
        for name in names:
            converter.add_tensor(recipe.first, name, pattern, read(name))
    try:
        made = converter.convert(recipe.first, model=model, config=model.config)
    except Exception as e:  # whatever an operation of transformers raises
        raise PT2Error(
            f"transformers cannot make {recipe.first} of {recipe.names()[0]} and the tensors like "
            f"it: {e}"
        ) from e
    return {n: v[0] if isinstance(v, list) else v for n, v in made.items()}


def _candidates(name: str) -> list[str]:
    """A tensor's name, and what it is called where the text model stands alone."""
    names = [name]
    if TEXT_PART in name:
        names.append(name.replace(TEXT_PART, "", 1))
    return names


def _read_off(
    pushed: tuple[Tensor, Tensor], names: list[str], tensors: Mapping[str, Shape], param: str,
    index: int | None, transposed: bool,
) -> list[Rows] | None:  # fmt: skip
    """The matrices of the files that the numbers in a matrix of the class name.

    Args:
        pushed: numbers of rows (over all of ``names``) and of columns, int ``[a, b]`` as the class
            holds the matrix.
    """
    import torch

    ids, columns = (v.T if transposed else v for v in pushed)  # [out, in] of the class
    wide = torch.arange(ids.shape[1])
    if bool((ids == ids[:, :1]).all()) and bool((columns == wide).all()):
        flipped, rows, widths = False, ids[:, 0].long(), columns.shape[1]
    elif bool((columns == columns[:, :1]).all()) and bool((ids - ids[:, :1] == wide).all()):
        flipped, rows, widths = True, ids[:, 0].long(), ids.shape[1]
    else:
        return None
    found: list[Rows] = []
    at = 0
    for name in names:
        shape = tensors[name]
        for number in range(shape[0] if len(shape) == 3 else 1):
            stop = at + shape[-2]
            inside = ((rows >= at) & (rows < stop)).nonzero()[:, 0]
            if inside.numel():
                own = columns[inside, 0].long() if flipped else rows[inside] - at
                begins = not flipped or bool((rows[inside] == at).all())
                if widths != shape[-2 if flipped else -1] or not begins:
                    return None
                place = number if len(shape) == 3 else None
                found.append(
                    Rows(name, place, flipped, param, index, transposed, own, inside)
                )  # fmt: skip
            at = stop
    return sorted(found, key=lambda r: int(r.param_rows[0]))


def _counts(rows: Tensor) -> bool:
    import torch

    return bool((rows == torch.arange(rows.numel())).all())


def _row_count(shape: Shape) -> int:
    count = 1
    for size in shape[:-1]:
        count *= size
    return count


def _numberless(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _moved(name: str, was: str, now: str) -> str:
    """A parameter beside ``was``, as it is called beside ``now`` in another block."""
    old, new, parts = was.split("."), now.split("."), name.split(".")
    return ".".join(
        new[i] if i < len(old) and part == old[i] and part.isdigit() else part
        for i, part in enumerate(parts)
    )
