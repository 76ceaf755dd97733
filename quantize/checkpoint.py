"""A Hugging Face checkpoint on the disk: config, tensors read one by one, fingerprint."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pt2_core.commands import command
from quantize.common import PT2Error, read_json
from quantize.safetensors_file import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "F16", "BF16")


@dataclass
class Checkpoint:
    """An opened checkpoint; no tensor has been read yet.

    Attributes:
        path: the folder.
        raw_config: ``config.json`` as it stands.
        shards: file names, sorted.
        tensors: tensor name -> what its header says.
        replaced: tensors that are used instead of the checkpoint's (an artifact's refined norms).
    """

    path: Path
    raw_config: dict[str, Any]
    shards: list[str]
    tensors: dict[str, TensorInfo]
    _home: dict[str, str]
    replaced: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, model_dir: str | Path) -> Checkpoint:
        """Open a checkpoint folder and check every shard's header.

        Raises:
            PT2Error: no folder, no or broken ``config.json``, no safetensors, a shard that is
                missing, truncated or damaged.
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
        if not (path / "config.json").is_file():
            raise PT2Error(f"{path} has no config.json: it is not a Hugging Face model")
        config = read_json(path / "config.json")
        if not isinstance(config, dict):
            raise PT2Error(f"{path / 'config.json'} does not hold a model's settings")
        shards = _shards(path)
        tensors: dict[str, TensorInfo] = {}
        home: dict[str, str] = {}
        for shard in shards:
            for name, info in read_header(path / shard).items():
                tensors[name], home[name] = info, shard
        return cls(path, config, shards, tensors, home)

    @property
    def architecture(self) -> str:
        """The first entry of ``architectures``; empty if there is none."""
        names = self.raw_config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def bytes(self) -> int:
        """Size of the config and all shards."""
        return sum((self.path / n).stat().st_size for n in ("config.json", *self.shards))

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
        where = f"tensor {name} in {self.path / self._home[name]}"
        if info.dtype not in FLOATS:
            raise PT2Error(f"{where} is {info.dtype}; only {', '.join(FLOATS)} can be ternarised")
        if shape is not None and info.shape != tuple(shape):
            raise PT2Error(
                f"{where} has shape {list(info.shape)}, but config.json asks for {list(shape)}"
            )
        if name in self.replaced:
            return self.replaced[name]
        try:
            with safe_open(self.path / self._home[name], framework="pt") as f:
                value = f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise PT2Error(f"{where} cannot be read: {e}") from e
        if not bool(value.isfinite().all()):
            raise PT2Error(f"{where} has NaN or Inf in it; download the model again")
        return value

    def fingerprint(
        self,
        known: dict[str, Any] | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[str, dict[str, Any]]:
        """SHA-256 over ``config.json`` and the contents of all shards in the order of their names.

        Args:
            known: what an earlier call returned; used when names, sizes and times are unchanged.
            progress: called with the number of bytes after each piece.

        Returns:
            (hex digest, a record to hand in as ``known`` next time)
        """
        files = [self.path / name for name in ("config.json", *self.shards)]
        stats = [f.stat() for f in files]
        state = [[f.name, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
        if known and known.get("state") == state and isinstance(known.get("sha256"), str):
            return known["sha256"], known
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as f:
                while piece := f.read(1 << 24):
                    digest.update(piece)
                    progress(len(piece))
        return digest.hexdigest(), {"state": state, "sha256": digest.hexdigest()}

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """What the manifest says of the model."""
        return {
            "fingerprint": fingerprint,
            "architecture": self.architecture,
            "model_type": self.raw_config.get("model_type"),
            "tensors": {name: list(info.shape) for name, info in self.tensors.items()},
        }


def _shards(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        named = weight_map.values() if isinstance(weight_map, dict) else []
        if not named or not all(isinstance(v, str) for v in named):
            raise PT2Error(f"{path / INDEX} has no weight_map; download the model again")
        shards = sorted(set(named))
        missing = [s for s in shards if not os.path.isfile(path / s)]
        if missing:
            raise PT2Error(f"{path} lacks {missing[0]}, which {INDEX} names; download it again")
        return shards
    if (path / SINGLE).is_file():
        return [SINGLE]
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    if not shards:
        others = any(path.glob("*.bin")) or any(path.glob("*.gguf"))
        hint = "; only safetensors are read, convert it with save_pretrained" if others else ""
        raise PT2Error(f"{path} has no {SINGLE}{hint}")
    return shards


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``."""
    return getattr(torch, name)
