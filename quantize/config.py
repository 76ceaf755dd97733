"""Every setting of the quantiser, the built-in recipes, and recipe files (YAML)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pt2_core import upstream
from pt2_core.cli import check_threads
from pt2_core.errors import PT2Error
from pt2_core.model.widths import BLOCK_SIZES
from pt2_core.schema import LARGEST, shown
from pt2_core.texts.sources import source_name
from pt2_core.yaml_file import read_yaml

ORDERS = ("none", "random", "hessian", "ssr", "foldable")
LEVELS = (3, 4)
# Ours, with an offset, and those of upstream's types, without.
GRIDS = ("pt2", *upstream.TYPES)
SCALES = ("float16", "pair")
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
CLOSED_FORM = "closed-form"  # of --recipe refined: the first stage's folder inside the result's


@dataclass(frozen=True)
class Config:
    """Settings of one run. The defaults are the ``fast`` recipe.

    Attributes:
        order: columns' order. none, random, hessian (falling Hessian diagonal, per matrix), ssr
            (the paper's eq. 16, per matrix, chosen block by block), foldable (one order of the
            residual stream for the whole model, a free one for down_proj, one within each head for
            o_proj: the exporter can fold all of them into neighbouring weights).
        block_size: columns that share one alpha and mu per row.
        levels: how many values T may take: 3 (-1, 0, 1, the paper's) or 4 (-1, 0, 1, 2).
        grid: pt2 (alpha and mu), or the values of a type of upstream's, without an offset: q2_0
            (d * {-1, 0, 1, 2}, d of either sign, groups of 64) or tq2_0 (d * {-1, 0, 1}, groups of
            256). It sets levels and block_size.
        scales: what alpha and mu are rounded to before the errors are made up for: float16 each, or
            pair, 16 bits for both (docs/scale-pairs.md). The artifact holds halves in any case.
        itf: Iterative Ternary Fitting (eq. 9-10), at most ``itf_steps`` steps.
        aga: Activation-aware Grid Alignment (eq. 12-13).
        compensate: spread each block's error over the columns that are still to come.
        reround: rounds of re-rounding T inside the block with error feedback, each followed by AGA
            (0: T stays as ITF left it, as in the paper).
        rounds: of improving whole rows once all blocks are done: alpha and mu of all blocks of a
            row by one solve, then coordinate descent on T (0: none).
        sweeps: of the coordinate descent in each of these rounds, at most.
        noise: in steps of T, on the values that the descent chooses between; it fades over the
            sweeps, so that the search does not end in the first place where no single change helps
            (0: plain descent).
        asymmetry: share (0 to 1) of the inputs' error, left by what was quantised before, that the
            linears are to make up for: their target then lies that far towards the least-squares
            match of the full-precision model's outputs (as GPTAQ).
        stream: the same for the residual stream's error, made up for by the linears that write to
            it (o_proj and down_proj).
        sequential: take the Hessians of a block's sites one after the other, each with the block's
            linears before it already quantised.
        damping: share of the Hessian's mean diagonal that is added to the diagonal.
        calibration: text file, JSON lines, folder, data set name, ``file.safetensors:tensor`` of
            token ids, or several with commas between them.
        text_field: of JSON records, the field with the text (None: ``text``, a chat's
            ``messages``, or the only string field).
        samples, seqlen: calibration windows and tokens in each.
        allow_long: take windows that are longer than the model's context.
        bos: put the model's BOS token in front of every calibration window.
        order_samples: windows from which the foldable order's activation energies are taken.
        sensitivity: windows of text, beyond those of the calibration, from which is measured at the
            end what each linear costs the model (:mod:`quantize.sensitivities`), for pt2-export's
            mixed precision (0: not measured).
        proof_tokens: tokens of the text whose predictions are kept with the artifact, for
            pt2-export to compare the file's with (0: none; from 1024 on, more where a sliding
            window or a rope context begins to count only then).
        skip: regular expression; linears whose name it matches are left as they are.
        device, dtype: of the forward pass. The quantiser's arithmetic is float32 and float64.
        threads: CPU threads (0: as torch chooses).
        seed: of the calibration windows and the random order.
        batch_size: windows per forward pass.
        max_context: tokens that the model is to be used with at most, where a setting of it that
            llama.cpp does not have (a sliding window, dynamic NTK) only matters beyond (0: all that
            it has). pt2-export keeps to it.
        pre_tokenizer: llama.cpp's name for the regular expressions of the model's tokenizer, where
            it does not know it by itself.
    """

    order: str = "foldable"
    block_size: int = 128
    levels: int = 3
    grid: str = "pt2"
    scales: str = "float16"
    itf: bool = True
    itf_steps: int = 50
    aga: bool = True
    compensate: bool = True
    reround: int = 1
    rounds: int = 0
    sweeps: int = 4
    noise: float = 0.0
    asymmetry: float = 0.0
    stream: float = 0.0
    sequential: bool = False
    damping: float = 0.01
    calibration: str = "wikitext2"
    text_field: str | None = None
    samples: int = 128
    seqlen: int = 2048
    allow_long: bool = False
    bos: bool = False
    order_samples: int = 16
    sensitivity: int = 0
    proof_tokens: int = 1024
    skip: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    threads: int = 0
    seed: int = 0
    batch_size: int = 4
    max_context: int = 0
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f.name, getattr(self, f.name), str(f.type)))
        _one_of("order", self.order, ORDERS)
        _one_of("block_size", self.block_size, BLOCK_SIZES)
        _one_of("levels", self.levels, LEVELS)
        _one_of("grid", self.grid, GRIDS)
        self._set_grid()
        _one_of("scales", self.scales, SCALES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, DEVICES)
        least = {"itf_steps": 1, "reround": 0, "rounds": 0, "sweeps": 0, "samples": 1, "seqlen": 2,
                 "order_samples": 1, "sensitivity": 0, "proof_tokens": 0, "threads": 0, "seed": 0,
                 "batch_size": 1, "max_context": 0}  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise PT2Error(f"setting {name} must be at least {low}, not {getattr(self, name)}")
        check_threads(self.threads)
        if not 0 < self.damping <= 10:
            raise PT2Error(f"setting damping must be above 0 and at most 10, not {self.damping}")
        for name in ("asymmetry", "stream", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise PT2Error(f"setting {name} must lie in 0 to 1, not {getattr(self, name)}")
        if self.skip is not None:
            try:
                re.compile(self.skip)
            except (re.error, OverflowError, RecursionError) as e:
                raise PT2Error(f"setting skip is not a regular expression: {e}") from e

    def _set_grid(self) -> None:
        """Levels and group of a grid of upstream's; other ones that were given are refused."""
        if self.offset:
            return
        default = {f.name: f.default for f in dataclasses.fields(self)}
        changed = {n: v for n, v in vars(self).items() if v != default[n]}
        for name, value in _of_grid(self.grid, changed).items():
            object.__setattr__(self, name, value)
        if self.scales != "float16":
            raise PT2Error(f"grid {self.grid} has no offset: leave out scales {self.scales}")

    @property
    def offset(self) -> bool:
        """Whether the grid has a mu."""
        return self.grid == "pt2"

    def identity(self) -> dict[str, Any]:
        """The settings as the manifest holds them: no folders of this machine.

        The last two are there only where they were given.
        """
        values = dataclasses.asdict(self)
        for name in ("max_context", "pre_tokenizer"):
            if not values[name]:
                del values[name]
        if self.offset:
            del values["grid"]
        values["calibration"] = source_name(self.calibration)
        # The text is known by its tokens' checksum, and what is allowed changes nothing.
        for name in ("text_field", "allow_long"):
            values.pop(name)
        return values


# What differs from the defaults: "paper" is the paper to the letter, "fast" adds re-rounding and an
# order that can be folded, "best" is the best without gradients, and "refined" is the start for a
# refinement by gradients (pt2-refine).
BEST: dict[str, Any] = {
    "rounds": 8, "sweeps": 2, "noise": 0.1, "sequential": True, "asymmetry": 0.5, "stream": 0.5,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"order": "ssr", "reround": 0},
    "fast": {},
    "best": BEST,
    "refined": BEST,
}
ALIASES = {"default": "fast"}


def load_recipe(name: str, **overrides: Any) -> Config:
    """Make a Config from a recipe and the settings given beside it.

    Args:
        name: ``paper``, ``fast`` (or ``default``), ``best``, ``refined``, or a YAML file with
            settings (its ``recipe`` key may name one of these to start from).
        overrides: settings that win over the recipe's; None means not given.

    Raises:
        PT2Error: no such recipe or file, not YAML, an unknown setting, or a wrong value.
    """
    name = ALIASES.get(name, name)
    values = dict(RECIPES[name]) if name in RECIPES else _recipe_file(Path(name))
    values.update({k: v for k, v in overrides.items() if v is not None})
    _of_grid(str(values.get("grid")), values)
    return Config(**values)


def _of_grid(grid: str, given: Mapping[str, Any]) -> dict[str, int]:
    """The settings that a grid of upstream's decides.

    Raises:
        PT2Error: one of them is given, and has another value.
    """
    kind = upstream.TYPES.get(grid)
    decided = {} if kind is None else {"levels": kind.levels, "block_size": kind.block}
    for name, value in decided.items():
        if given.get(name, value) != value:
            raise PT2Error(f"grid {grid} has {name} {value}, not {given[name]}: leave it out")
    return decided


def _recipe_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PT2Error(f"no recipe {str(path)!r}: give {', '.join(RECIPES)} or a YAML file")
    try:
        raw = read_yaml(path)
    except PT2Error as e:
        raise PT2Error(f"cannot read the recipe: {e}") from e
    if not isinstance(raw, dict):
        raise PT2Error(f"the recipe {path} must hold lines such as 'order: ssr'")
    base = raw.pop("recipe", "fast")
    base = ALIASES.get(str(base), str(base))
    if base not in RECIPES:
        raise PT2Error(f"{path}: recipe must be one of {', '.join(RECIPES)}, not {shown(base)}")
    known = {f.name for f in dataclasses.fields(Config)}
    unknown = sorted(str(k) for k in raw if k not in known)
    if unknown:
        raise PT2Error(f"{path}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return {**RECIPES[base], **raw}


def _typed(name: str, value: Any, kind: str) -> Any:
    if kind == "str | None" and value is None:
        return None
    wanted = {"int": int, "float": float, "bool": bool}.get(kind, str)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and abs(value) <= LARGEST and wanted is float:
        return float(value)
    wrong = not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))
    if wrong or (whole and abs(value) > LARGEST):
        raise PT2Error(f"setting {name} must be of type {wanted.__name__}, not {shown(value)}")
    return value


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed)
        raise PT2Error(f"setting {name} must be one of {choices}, not {shown(value)}")
