"""Write the GGUF file or files, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export.converter import Carrier
from export.encode import Item
from pt2_core.errors import PT2Error, reason

Metadata = dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]


def write_gguf(
    folder: Path,
    name: str,
    carrier: Carrier,
    metadata: Metadata,
    items: Sequence[Item],
    encode: Callable[[Item], NDArray[Any]],
    split_max_size: int = 0,
) -> tuple[list[Path], dict[str, str]]:
    """Write ``folder/name``, or its splits as llama.cpp names them.

    Args:
        folder: an empty folder on the disk of the final file.
        name: the final file's name.
        carrier: gives the architecture and the metadata.
        metadata: replaces or adds to the carrier's.
        items: what to write, in this order.
        encode: gives an item's data: uint8 ``[..., row bytes]`` or float32.
        split_max_size: bytes of tensor data per file, 0 for one file.

    Returns:
        The files in order, and tensor name -> SHA-256 of its data.

    Raises:
        PT2Error: the disk is full, or the files cannot be written.
    """
    # What its writer logs (that nothing was split, say) the caller sees from the files returned.
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    writer = gguf.GGUFWriter(folder / name, carrier.arch, split_max_size=split_max_size)
    for key, (value, kind, inner) in {**carrier.fields, **metadata}.items():
        writer.add_key_value(key, value, kind, inner)
    for item in items:
        _announce(writer, item)
    digests = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in items:
            data = encode(item)
            if data.nbytes != item.nbytes:
                raise AssertionError(f"{item.tensor.name}: {data.nbytes} bytes, not {item.nbytes}")
            digests[item.tensor.name] = digest(data)
            writer.write_tensor_data(data)
        writer.close()
    except OSError as e:
        raise _cannot_write(e, name) from e
    files = sorted(folder.iterdir())
    for file in files:
        _flush_to_disk(file)
    return files, digests


def digest(data: NDArray[Any]) -> str:
    """Hex SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()


def _announce(writer: gguf.GGUFWriter, item: Item) -> None:
    shape: tuple[int, ...] = item.tensor.shape
    kind: type = np.float32
    if item.type != gguf.GGMLQuantizationType.F32:
        rows = item.elements // shape[-1]
        shape, kind = (*shape[:-1], item.nbytes // rows), np.uint8
    writer.add_tensor_info(
        item.tensor.name, shape, np.dtype(kind), item.nbytes, raw_dtype=item.type
    )


def _flush_to_disk(file: Path) -> None:
    with file.open("rb") as f:
        os.fsync(f.fileno())


def _cannot_write(e: OSError, name: str) -> PT2Error:
    return PT2Error(f"cannot write {name}: {reason(e)}")
