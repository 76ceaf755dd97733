"""A folder that holds exactly what counts of a model's folder, for programs that read a folder.

Weights and tokenizer are links; ``config.json``, the index, the model card and
``generation_config.json`` are written anew. Nothing else gets in: no Python code, no other weights.
Free of torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pt2_core.errors import PT2Error
from pt2_core.files import read_json
from pt2_core.model.card import CARD, GENERATION, clean_card, clean_generation
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.hub import model_name
from pt2_core.model.settings import CONFIG, clean_settings, read_config
from pt2_core.model.weight_files import INDEX, SINGLE
from pt2_core.safetensors_file import TensorInfo, header_bytes, read_header

TOKENIZER_CONFIG = "tokenizer_config.json"
# llama.cpp's converter skips these by itself.
_SKIPPED = (".rotary_emb.inv_freq", ".attention.masked_bias")
_PIECE = 1 << 24


def view_folder(checkpoint: Checkpoint, parent: Path) -> Path:
    """Where to write a view: its name is the model's, which the converter puts into the file."""
    return parent / "view" / (model_name(checkpoint.path) or "model")


def write_view(checkpoint: Checkpoint, folder: Path, *, without_dropped: bool = False) -> list[str]:
    """Write the view of a checkpoint.

    Args:
        folder: is made; must not exist or be empty.
        without_dropped: write files with tensors that do not count anew, without these. Else they
            are linked as they are, and whoever reads them must leave out ``checkpoint.dropped``.

    Returns:
        one line for each thing that was dropped from card and ``generation_config.json``.

    Raises:
        PT2Error: the folder cannot be written.
    """
    notes: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / CONFIG, checkpoint.settings)
        _weights(checkpoint, folder, without_dropped)
        _tokenizer(checkpoint.path, folder, checkpoint.tokenizer_files)
        if (card := _optional(checkpoint.path / CARD, notes)) is not None:
            text, more = clean_card(card)
            notes += more
            if text is not None:
                (folder / CARD).write_text(text, encoding="utf-8")
        if (generation := _optional(checkpoint.path / GENERATION, notes)) is not None:
            values, more = clean_generation(generation)
            notes += more
            if values is not None:
                _write_json(folder / GENERATION, values)
    except OSError as e:
        raise PT2Error(f"cannot write {folder}: {e.strerror or e}") from e
    return notes


def _optional(file: Path, notes: list[str]) -> bytes | None:
    """The bytes of a file that is not needed; None where there is none, or none to be read."""
    if not file.is_file():
        return None
    try:
        return file.read_bytes()
    except OSError as e:
        notes.append(f"ignored {file.name}: {e.strerror}")
        return None


def write_tokenizer_view(model_dir: Path, folder: Path, names: Iterable[str]) -> None:
    """Write a view of the tokenizer alone: its files that count, and the settings beside them.

    Args:
        names: as :func:`pt2_core.model.tokenizer_files.tokenizer_files` gives them.
    """
    if (model_dir / CONFIG).is_file():
        settings, _ = clean_settings(model_dir, read_config(model_dir))
        _write_json(folder / CONFIG, settings)
    _tokenizer(model_dir, folder, names)


def _write_json(path: Path, value: Any) -> None:
    """As the file was read: NaN, infinities and lone surrogates included."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _tokenizer(model_dir: Path, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        source, target = model_dir / name, folder / name
        target.parent.mkdir(exist_ok=True)
        if name != TOKENIZER_CONFIG:
            target.symlink_to(source.resolve())
            continue
        settings: dict[str, Any] = read_json(source)
        settings.pop("auto_map", None)
        _write_json(target, settings)


def _weights(checkpoint: Checkpoint, folder: Path, without_dropped: bool) -> None:
    """The shards under the names that every program looks for, and their index."""
    count = len(checkpoint.shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(checkpoint.shards, 1):
        name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        stored = checkpoint.parts | (checkpoint.home.keys() - checkpoint.packed.keys())
        stored |= {p.weight for p in checkpoint.packed.values()}
        members = {n for n in stored if checkpoint.home[n] == shard}
        gone = {n for n in members if n in checkpoint.dropped and not n.endswith(_SKIPPED)}
        source = checkpoint.path / shard
        if gone and without_dropped:
            header = read_header(source)
            copy_tensors(source, folder / name, {n: header[n] for n in members - gone})
            members -= gone
        else:
            (folder / name).symlink_to(source.resolve())
        weight_map |= dict.fromkeys(sorted(members), name)
    if count > 1:
        _write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def copy_tensors(source: Path, target: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Write some tensors of a safetensors file to another one, byte for byte."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    order = sorted(tensors.items(), key=lambda item: item[1].begin)
    for name, info in order:
        size = info.end - info.begin
        place = [at, at + size]
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": place}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = header_bytes(source)
    with source.open("rb") as read, target.open("wb") as write:
        write.write(struct.pack("<Q", len(text)) + text)
        for _, info in order:
            read.seek(start + info.begin)
            _copy(read, write, info.end - info.begin)


def _copy(read: BinaryIO, write: BinaryIO, size: int) -> None:
    while size:
        piece = read.read(min(size, _PIECE))
        if not piece:
            raise OSError("the file became shorter while it was read")
        write.write(piece)
        size -= len(piece)
