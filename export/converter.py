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
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export import converter_driver
from export.converter_driver import MARK, REFUSED, check_arrived, check_rows, stand_in_number
from export.fold import FoldPlan
from pt2_core.errors import PT2Error, reason
from pt2_core.files import read_json
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.view import view_folder, write_view
from pt2_core.process import children
from pt2_core.process.isolated import child_env, isolated, search_path
from pt2_core.process.temporary import temporary_folder

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

    ``header_bytes`` is the size of its metadata and list of tensors in a GGUF file; ``notes`` say
    what was mended or ignored.
    """

    arch: str
    fields: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]
    tensors: list[CarrierTensor]
    header_bytes: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """What a user may settle for the converter.

    Attributes:
        max_context: tokens that the file is meant for, where the model has a setting that only
            matters beyond (a sliding window); 0 for all that the model has.
        pre_tokenizer: llama.cpp's name of the tokenizer's regular expressions; None to find out.
    """

    max_context: int = 0
    pre_tokenizer: str | None = None


def run_converter(
    source_dir: Path,
    model: Checkpoint,
    workdir: Path,
    ternary: dict[str, tuple[int, int]],
    plan: FoldPlan,
    replaced: Mapping[str, NDArray[np.float32]],
    options: Options = Options(),
) -> Carrier:
    """Convert all but the ternary weights.

    Args:
        source_dir: llama.cpp's source tree (with ``conversion`` and ``gguf-py``).
        model: the Hugging Face checkpoint; the converter sees a view of what counts of it.
        workdir: a folder for the carrier, which may be as large as the model's embeddings in
            float32; the caller removes it.
        ternary: tensor name -> (rows, cols).
        plan: what to reorder.
        replaced: tensor name -> what takes the place of the checkpoint's values, not reordered.

    Raises:
        PT2Error: no tokenizer, an architecture that llama.cpp does not know, a setting that it does
            not have, or any other failure of the converter, in its own words.
    """
    check_tokenizer(model.path)
    orders = {f"rows/{k}": v for k, v in plan.rows.items()}
    orders |= {f"cols/{k}": v for k, v in plan.cols.items()}
    np.savez(workdir / "orders.npz", **orders)  # type: ignore[arg-type]
    np.savez(workdir / "replaced.npz", **replaced)  # type: ignore[arg-type]
    notes = _drive(source_dir, model, workdir, options, ternary=ternary)
    carrier = read_carrier(workdir / "carrier.gguf", ternary)
    carrier.notes = notes
    return carrier


def try_converter(
    source_dir: Path,
    model: Checkpoint,
    ternary: dict[str, tuple[int, int]],
    options: Options = Options(),
    *,
    vocab: bool = True,
) -> list[str]:
    """Run the converter without reading a weight or writing a file; what it would say.

    Args:
        ternary: tensor name -> (rows, cols) of the linears that are to become ternary.
        vocab: whether to try the tokenizer too.

    Returns:
        Notes: what would be mended or ignored.

    Raises:
        PT2Error: whatever :func:`run_converter` would refuse.
    """
    with temporary_folder(Path(tempfile.gettempdir()), "pt2-preflight-") as work:
        more: dict[str, Any] = {"ternary": ternary, "preflight": True, "vocab": vocab}
        return _drive(source_dir, model, work, options, **more)


def convert_whole(
    source_dir: Path, model: Checkpoint, out: Path, options: Options, log: Path | None = None,
    *, outtype: str = "bf16",
) -> list[str]:  # fmt: skip
    """Convert a checkpoint to a file as it is, with the same repairs as an export.

    Args:
        out: the file to write.
        log: where the converter's own log goes.
        outtype: of its tensors: ``bf16`` or ``f32``.

    Returns:
        Notes: what was mended or ignored.

    Raises:
        PT2Error: as :func:`run_converter`.
    """
    check_tokenizer(model.path)
    with temporary_folder(Path(tempfile.gettempdir()), "pt2-convert-") as work:
        more = {"outtype": outtype, "carrier": str(out.absolute())}
        return _drive(source_dir, model, work, options, log, **more)


def _drive(
    source_dir: Path, model: Checkpoint, workdir: Path, options: Options, log: Path | None = None,
    **more: Any,
) -> list[str]:  # fmt: skip
    """Run the driver's process on a view of the model; returns its notes and the view's."""
    view = view_folder(model, workdir)
    notes = write_view(model, view)
    job = {
        "path": search_path(),
        "source": str(source_dir.resolve()),
        "model": str(view.resolve()),
        "shown": str(model.path),
        "dropped": sorted(model.dropped),
        "carrier": str(workdir.resolve() / "carrier.gguf"),
        "notes": str(workdir.resolve() / "notes.json"),
        "orders": str(workdir.resolve() / "orders.npz"),
        "replaced": str(workdir.resolve() / "replaced.npz"),
        "ternary": {},
        "outtype": "f32",
        "max_context": options.max_context,
        "pre_tokenizer": options.pre_tokenizer,
        "vocab": True,
        "preflight": False,
        **more,
    }
    job_file = workdir.resolve() / "job.json"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    command = isolated(Path(converter_driver.__file__).resolve(), [str(job_file)])
    done = children.run(command, env=child_env())
    if os.environ.get("PT2_DEBUG"):
        sys.stderr.write(done.stderr)
    if log is not None:
        log.write_text(done.stderr, encoding="utf-8")
    if done.returncode:
        raise PT2Error(_failure(done, job["shown"]))
    return [*notes, *read_json(job["notes"])]


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
    try:
        tensors = _tensors(reader, ternary)
        check_arrived(list(ternary), {t.source for t in tensors})
    except ValueError as e:
        raise PT2Error(str(e)) from e
    arch = reader.fields["general.architecture"].contents()
    return Carrier(arch, dict(_fields(reader)), tensors, int(reader.data_offset))


def _tensors(reader: gguf.GGUFReader, ternary: dict[str, tuple[int, int]]) -> list[CarrierTensor]:
    names, tensors = list(ternary), []
    for t in reader.tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        data = np.asarray(t.data).reshape(shape)
        if t.tensor_type == gguf.GGMLQuantizationType.F32 and shape[-1:] == (3,):
            number = stand_in_number(t.name, data)
            if number is not None:
                tensors.append(_ternary_tensor(t.name, names[number], ternary, data[:, 0]))
                continue
        tensors.append(CarrierTensor(t.name, shape, data))
    return tensors


def _ternary_tensor(
    name: str, source: str, ternary: dict[str, tuple[int, int]], column: NDArray[np.float32]
) -> CarrierTensor:
    rows, cols = ternary[source]
    check_rows(source, rows, column)
    return CarrierTensor(name, (rows, cols), source=source, rows=column.astype(np.int64))


def _fields(
    reader: gguf.GGUFReader,
) -> Iterator[tuple[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]]:
    """Metadata as ``GGUFWriter.add_key_value`` takes it."""
    for key, entry in reader.fields.items():
        if key in _READ_ONLY_KEYS:
            continue
        kind = entry.types[0]
        inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        yield key, (entry.contents(), kind, inner)


def _failure(done: subprocess.CompletedProcess[str], model_dir: str) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith(MARK) and _SHORT_WRITE.search(line):
            why = reason(OSError("some requested and fewer written"))
            return f"cannot write the converted tensors beside the output: {why}"
        if line.startswith(REFUSED):
            return line[len(REFUSED) :].strip()
        if line.startswith(MARK):
            return f"llama.cpp's converter refuses {model_dir}: {line[len(MARK) :].strip()}"
    last = lines[-1].strip() if lines else f"exit code {done.returncode}"
    return f"llama.cpp's converter failed on {model_dir}: {last} (PT2_DEBUG=1 shows its log)"
