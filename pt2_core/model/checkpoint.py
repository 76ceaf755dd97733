"""The one reading of a Hugging Face model's folder.

:meth:`Checkpoint.open` decides which files, tensors, tied tables and settings count, from the
headers alone; every command works on what it says, and llama.cpp's converter is given a folder that
holds exactly that (:mod:`pt2_core.model.view`). What was left out or decided is in ``notes``.
Free of torch until a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.model.fingerprint import fingerprint
from pt2_core.model.leftovers import FLOATS, check_leftovers, in_words
from pt2_core.model.packed import Packed, packed_tensors
from pt2_core.model.settings import (
    CONFIG,
    TIE,
    architecture_of,
    clean_settings,
    read_config,
    tie_flag,
)
from pt2_core.model.tied_tables import EMBEDDING, HEAD, decide_tied
from pt2_core.model.tokenizer_files import tokenizer_files
from pt2_core.model.weight_files import INDEX, weight_files, weight_tensors
from pt2_core.safetensors_file import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAME_TABLE = "it is the embeddings' table (tied)"


@dataclass
class Checkpoint:
    """An opened checkpoint; no tensor has been read yet.

    Attributes:
        path: the folder.
        raw_config: ``config.json`` as it stands.
        settings: ``config.json`` made true to the files: this is what counts.
        shards: names of the files with the weights, sorted.
        tensors: tensor name -> what its header says, of the tensors that count.
        tied: whether the embeddings' table is the head's too, as far as names say it;
            :func:`pt2_core.model.expected.settle` knows.
        dropped: tensors of the shards that do not count -> why.
        tokenizer_files: the tokenizer's files, relative to the folder.
        notes: one line for each thing that was left out or decided.
        replaced: tensors that are used instead of the checkpoint's (an artifact's refined norms).
        packed: tensors that the files hold in 4 or 8 bits; ``tensors`` has them as bfloat16.
        filled: settings that ``config.json`` lacks, as transformers takes them.
    """

    path: Path
    raw_config: dict[str, Any]
    settings: dict[str, Any]
    shards: list[str]
    tensors: dict[str, TensorInfo]
    home: dict[str, str]
    tied: bool
    dropped: dict[str, str]
    tokenizer_files: list[str]
    notes: list[str]
    replaced: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, Packed] = field(default_factory=dict)
    filled: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, model_dir: str | Path) -> Checkpoint:
        """Open a checkpoint folder and decide what of it counts.

        Raises:
            PT2Error: no folder, no or broken ``config.json``, no safetensors, a shard that is
                missing, truncated or damaged, weights that are quantised already or of an adapter,
                no head, or a folder that asks for Python code of its own.
        """
        path = Path(model_dir)
        if not path.is_dir():
            hint = ""
            if re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model_dir)):
                download = command("hf", "download", path, "--local-dir", path)
                hint = f"; download it first: {download}"
            raise PT2Error(f"there is no model folder {path}{hint}")
        if any("\ud800" <= c <= "\udfff" for c in str(path)):  # safetensors refuses it, but late
            raise PT2Error(
                f"{path}: a path of bytes that are not UTF-8 cannot be opened: rename it"
            )
        raw = read_config(path)
        shards, index, notes = weight_files(path)
        chosen = raw.get("transformers_weights")  # transformers then loads this file alone
        if chosen is not None and chosen not in (INDEX, *shards):
            raise PT2Error(
                f"{path / CONFIG} names {chosen!r} as the weights (transformers_weights), the "
                f"folder {shards[0]}: remove that entry, or the files that are not meant"
            )
        tensors, home, more = weight_tensors(path, shards, index)
        notes += more
        packed = packed_tensors(path, raw, tensors)
        if packed:
            parts = {part for p in packed.values() for part in (p.weight, p.scale)}
            home.update({name: home[p.weight] for name, p in packed.items()})
            tensors = {n: t for n, t in tensors.items() if n not in parts}
            tensors |= {name: p.info for name, p in packed.items()}
            kind = next(iter(packed.values())).kind.upper()
            notes.append(f"{len(packed)} tensors in {kind} are read as the 16-bit values they mean")
        dropped = check_leftovers(path, tensors)
        counted = {n: t for n, t in tensors.items() if n not in dropped}
        notes += in_words(dropped)
        settings, more = clean_settings(path, _unpacked(raw) if packed else raw)
        notes += more
        flag = tie_flag(path, raw)
        tied = HEAD not in counted
        if EMBEDDING in counted:
            tied, more = decide_tied(path, flag, counted, home)
            if flag is not None or not tied:
                settings[TIE] = tied
            notes += more
        if tied and counted.pop(HEAD, None) is not None:
            dropped[HEAD] = SAME_TABLE
        files, more = tokenizer_files(path)
        notes += more
        return cls(
            path, raw, settings, shards, counted, home, tied, dropped, files, notes, packed=packed
        )

    @property
    def architecture(self) -> str:
        """The first entry of ``architectures``; empty if there is none."""
        return architecture_of(self.raw_config)

    @property
    def files(self) -> list[str]:
        """All files that count, relative to the folder."""
        return [CONFIG, *self.shards, *self.tokenizer_files]

    @property
    def bytes(self) -> int:
        """Size of all files that count."""
        return sum((self.path / n).stat().st_size for n in self.files)

    def drop(self, why: Mapping[str, str]) -> None:
        """Let tensors not count (name -> reason) and say so."""
        new = {n: w for n, w in why.items() if n in self.tensors}
        for name in new:
            del self.tensors[name]
        self.dropped.update(new)
        self.notes += in_words(new)

    def fill_in(self, values: Mapping[str, Any]) -> None:
        """Complete the settings by what ``config.json`` lacks."""
        self.filled.update(values)
        self.settings.update(values)

    def as_made(self, record: Mapping[str, Any]) -> None:
        """Let count what did when an artifact was made: tensors, tie and settings.

        Args:
            record: the manifest's ``model``.

        Raises:
            PT2Error: one of the tensors is not there.
        """
        self.tied = bool(record.get("tied", self.tied))
        self.fill_in(record.get("filled", {}))
        wanted = set(record.get("tensors", self.tensors))
        for name in sorted(wanted - set(self.tensors)):
            self.info(name)
        self.drop({n: "the artifact was made without it" for n in set(self.tensors) - wanted})

    def info(self, name: str) -> TensorInfo:
        """The header's entry of a tensor that must be there."""
        if name not in self.tensors:
            raise PT2Error(f"{self.path} has no tensor {name}")
        return self.tensors[name]

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read one tensor, on the CPU, in its own dtype.

        Raises:
            PT2Error: it is missing, of another shape, not of a floating type, or has NaN or Inf.
        """
        info = self.info(name)
        where = f"tensor {name} in {self.path / self.home[name]}"
        if info.dtype not in FLOATS:
            raise PT2Error(f"{where} is {info.dtype}; only {', '.join(FLOATS)} can be ternarised")
        if shape is not None and info.shape != tuple(shape):
            raise PT2Error(
                f"{where} has shape {list(info.shape)}, but config.json asks for {list(shape)}"
            )
        if name in self.replaced:
            return self.replaced[name]
        value = self.packed[name].read(self._raw) if name in self.packed else self._raw(name)
        if not bool(value.isfinite().all()):
            raise PT2Error(f"{where} has NaN or Inf in it; download the model again")
        return value

    def _raw(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        from safetensors import SafetensorError, safe_open

        file = self.path / self.home[name]
        try:
            with safe_open(file, framework="pt") as f:
                value: Tensor = f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise PT2Error(f"tensor {name} in {file} cannot be read: {e}") from e
        return value

    @property
    def parts(self) -> set[str]:
        """Tensors of the files that the packed ones are made of."""
        return {n for p in self.packed.values() for n in (p.weight, p.scale)} - self.tensors.keys()

    def fingerprint(
        self,
        known: dict[str, Any] | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[str, dict[str, Any]]:
        """SHA-256 over all files that count: config, shards and tokenizer.

        Arguments and result are those of :func:`pt2_core.model.fingerprint.fingerprint`.
        """
        return fingerprint(self.path, self.files, known, progress)

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """What the manifest says of the model: its tensors are those that count."""
        return {
            "fingerprint": fingerprint,
            "architecture": self.architecture,
            "model_type": self.settings.get("model_type"),
            "tied": self.tied,
            **({"filled": self.filled} if self.filled else {}),
            "tensors": {name: list(info.shape) for name, info in self.tensors.items()},
        }


def _unpacked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model whose weights are read as 16-bit values."""
    return {k: v for k, v in config.items() if k != "quantization_config"}


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``."""
    import torch

    return getattr(torch, name)
