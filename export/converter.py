"""Obtain metadata, tokenizer and ordinary tensors from llama.cpp's own converter.

:func:`run_converter` runs :mod:`export.converter_driver` in a process of its own and returns the
:class:`Carrier` it wrote: which GGUF tensor is which ternary weight with its rows in which order,
the tensors to quantise or copy, and the metadata.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export.converter_driver import MARK, STAND_IN
from export.fold import FoldPlan
from quantize import children
from quantize.common import PT2Error, reason

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
_READ_ONLY_KEYS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")

# The system's words for a full disk, and NumPy's, which gives no error number.
_SHORT_WRITE = re.compile(r"No space left|\d+ requested and \d+ written")


@dataclass
class CarrierTensor:
    """One tensor of the carrier.

    Attributes:
        name: GGUF name.
        shape: ``[rows, cols]`` or ``[n]``, as NumPy has it; a ternary weight's true shape.
        data: float32, mapped from the file; None for a ternary weight.
        source: the ternary weight's name in the checkpoint, else None.
        rows: int64 ``[rows]``; row i of the GGUF tensor is row ``rows[i]`` of the (folded)
            ternary weight. None unless ternary.
    """

    name: str
    shape: tuple[int, ...]
    data: NDArray[np.float32] | None = None
    source: str | None = None
    rows: NDArray[np.int64] | None = None


@dataclass
class Carrier:
    """What the converter made: architecture, metadata and tensors, in file order.

    ``header_bytes`` is the size of its metadata and list of tensors in a GGUF file.
    """

    arch: str
    fields: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]
    tensors: list[CarrierTensor]
    header_bytes: int = 0


def run_converter(
    source_dir: Path,
    model_dir: Path,
    workdir: Path,
    ternary: dict[str, tuple[int, int]],
    plan: FoldPlan,
    replaced: Mapping[str, NDArray[np.float32]],
) -> Carrier:
    """Convert all but the ternary weights.

    Args:
        source_dir: llama.cpp's source tree (with ``conversion`` and ``gguf-py``).
        model_dir: the Hugging Face checkpoint.
        workdir: a folder for the carrier, which may be as large as the model's embeddings in
            float32; the caller removes it.
        ternary: tensor name -> (rows, cols).
        plan: what to reorder.
        replaced: tensor name -> what takes the place of the checkpoint's values, not reordered.

    Raises:
        PT2Error: no tokenizer, an architecture that llama.cpp does not know, or any other failure
            of the converter, in its own words.
    """
    check_tokenizer(model_dir)
    job = {
        "source": str(source_dir),
        "model": str(model_dir.absolute()),
        "carrier": str(workdir / "carrier.gguf"),
        "orders": str(workdir / "orders.npz"),
        "replaced": str(workdir / "replaced.npz"),
        "ternary": ternary,
    }
    orders = {f"rows/{k}": v for k, v in plan.rows.items()}
    orders |= {f"cols/{k}": v for k, v in plan.cols.items()}
    np.savez(job["orders"], **orders)  # type: ignore[arg-type]
    np.savez(job["replaced"], **replaced)  # type: ignore[arg-type]
    job_file = workdir / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "export.converter_driver", str(job_file)]
    done = children.run(command, env=_child_env())
    if os.environ.get("PT2_DEBUG"):
        sys.stderr.write(done.stderr)
    if done.returncode:
        raise PT2Error(_failure(done, model_dir))
    return read_carrier(workdir / "carrier.gguf", ternary)


def check_tokenizer(model_dir: Path) -> None:
    """Raise PT2Error unless the model's folder has a tokenizer."""
    if not any((model_dir / name).is_file() for name in TOKENIZERS):
        raise PT2Error(
            f"{model_dir} has no tokenizer ({', '.join(TOKENIZERS)}): copy the tokenizer's files "
            "there from where the model came from"
        )


def read_carrier(path: Path, ternary: dict[str, tuple[int, int]]) -> Carrier:
    """Read a carrier and find out where the ternary weights went.

    Raises:
        PT2Error: a weight was changed in another way than by naming it and ordering its rows.
    """
    reader = gguf.GGUFReader(path)
    names = list(ternary)
    tensors = []
    for t in reader.tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        data = np.asarray(t.data).reshape(shape)
        if t.tensor_type == gguf.GGMLQuantizationType.F32 and shape[-1:] == (3,):
            number = _stand_in_number(t.name, data)
            if number is not None:
                tensors.append(_ternary_tensor(t.name, names[number], ternary, data[:, 0]))
                continue
        tensors.append(CarrierTensor(t.name, shape, data))
    found = {t.source for t in tensors}
    lost = [n for n in names if n not in found]
    if lost:
        raise PT2Error(f"llama.cpp's converter drops {lost[0]}: this architecture is unsupported")
    arch = reader.fields["general.architecture"].contents()
    return Carrier(arch, dict(_fields(reader)), tensors, int(reader.data_offset))


def _stand_in_number(name: str, data: NDArray[np.float32]) -> int | None:
    """The ternary weight's number when ``data`` is a stand-in, else None."""
    if data.ndim != 2 or not (data[:, 2] == STAND_IN).all():
        return None
    numbers = np.unique(data[:, 1])
    if len(numbers) != 1:
        raise PT2Error(f"llama.cpp's converter joins several weights into {name}: unsupported")
    return int(numbers[0])


def _ternary_tensor(
    name: str, source: str, ternary: dict[str, tuple[int, int]], column: NDArray[np.float32]
) -> CarrierTensor:
    rows, cols = ternary[source]
    if not np.array_equal(np.sort(column), np.arange(rows, dtype=np.float32)):
        raise PT2Error(
            f"llama.cpp's converter does more to {source} than to order its rows, so it cannot be "
            "exported as ternary; leave it out with pt2-quantize --skip"
        )
    return CarrierTensor(name, (rows, cols), source=source, rows=column.astype(np.int64))


def _fields(
    reader: gguf.GGUFReader,
) -> Iterator[tuple[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]]:
    """Metadata as ``GGUFWriter.add_key_value`` takes it."""
    for key, field in reader.fields.items():
        if key in _READ_ONLY_KEYS:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        yield key, (field.contents(), kind, inner)


def _failure(done: subprocess.CompletedProcess[str], model_dir: Path) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith(MARK) and _SHORT_WRITE.search(line):
            why = reason(OSError("some requested and fewer written"))
            return f"cannot write the converted tensors beside the output: {why}"
        if line.startswith(MARK):
            return f"llama.cpp's converter refuses {model_dir}: {line[len(MARK) :].strip()}"
    last = lines[-1].strip() if lines else f"exit code {done.returncode}"
    return f"llama.cpp's converter failed on {model_dir}: {last} (PT2_DEBUG=1 shows its log)"


def _child_env() -> dict[str, str]:
    """The child must find this package wherever it was started from, and need no network."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
