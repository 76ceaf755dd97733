"""Obtain metadata, tokenizer and ordinary tensors from llama.cpp's own converter.

:func:`run_converter` runs :mod:`export.converter_driver` in a process of its own and returns the
:class:`Carrier` it wrote: which row of a GGUF tensor is which row of which ternary weight, the
tensors to quantise or copy, and the metadata.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export import converter_driver
from export.converter_driver import MARK, REFUSED
from export.fold import FoldPlan
from export.stand_ins import VALUES, RowMap, Target, pattern
from pt2_core.errors import PT2Error, reason
from pt2_core.files import read_json
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.fold_edges import split_expert
from pt2_core.model.view import view_folder, write_view
from pt2_core.process import children
from pt2_core.process.isolated import child_env, isolated, search_path
from pt2_core.process.temporary import temporary_folder

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
_READ_ONLY_KEYS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")

_TENSOR_ENTRY = 48  # bytes of a matrix or its experts in a GGUF file's list, but for its name
# The system's words for a full disk, and NumPy's, which gives no error number.
_SHORT_WRITE = re.compile(r"No space left|\d+ requested and \d+ written")


@dataclass
class CarrierTensor:
    """One tensor of the carrier.

    Attributes:
        name: GGUF name.
        shape: ``[..., rows, cols]`` or ``[n]``, as NumPy has it; a ternary tensor's true shape.
        data: float32, mapped from the file; None for a ternary tensor.
        sources: names of the checkpoint's tensors that it is made of.
        rows: which row of which ternary matrix each of its rows is; None unless ternary.
        free: whether llama.cpp lets it have another type than F32.
    """

    name: str
    shape: tuple[int, ...]
    data: NDArray[np.float32] | None = None
    sources: tuple[str, ...] = ()
    rows: RowMap | None = None
    free: bool = True

    @property
    def ternary(self) -> bool:
        """Whether it is made of ternary matrices, and of their rows alone."""
        return self.rows is not None


@dataclass
class Carrier:
    """What the converter made: architecture, metadata and tensors, in file order.

    ``header_bytes`` is the size of its metadata and list of tensors in a GGUF file; ``notes`` say
    what was mended or ignored; ``fallbacks`` say of the checkpoint's ternary tensors that the
    converter does more to than to order and join rows, why they are not ternary in the file.
    """

    arch: str
    fields: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]]
    tensors: list[CarrierTensor]
    header_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)

    def source_of(self, name: str) -> str | None:
        """The checkpoint's tensor that a tensor of this name is, if it is made of one alone."""
        found = next((t for t in self.tensors if t.name == name), None)
        return found.sources[0] if found is not None and len(found.sources) == 1 else None


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


# Values of a tensor that cannot be ternary in the file: a float32 array, by the tensor's name.
Values = Callable[[str], NDArray[np.float32]]


def run_converter(
    source_dir: Path,
    model: Checkpoint,
    workdir: Path,
    ternary: Mapping[str, Target],
    plan: FoldPlan,
    replaced: Mapping[str, NDArray[np.float32]],
    values: Values,
    whole: Mapping[str, str] | None = None,
    options: Options = Options(),
) -> Carrier:
    """Convert all but the ternary weights.

    Args:
        source_dir: llama.cpp's source tree (with ``conversion`` and ``gguf-py``).
        model: the Hugging Face checkpoint; the converter sees a view of what counts of it.
        workdir: a folder for the carrier, which may be as large as the model's embeddings in
            float32; the caller removes it.
        ternary: the checkpoint's tensors that hold ternary matrices.
        plan: what to reorder.
        replaced: tensor name -> what takes the place of the checkpoint's values, not reordered.
        values: gives what to write of a ternary tensor that the converter does more to than to
            order and join its rows, folded.
        whole: ternary tensors that must be given as values from the outset -> why.

    Raises:
        PT2Error: no tokenizer, an architecture that llama.cpp does not know, a setting that it does
            not have, or any other failure of the converter, in its own words.
    """
    check_tokenizer(model.path)
    orders = {f"rows/{k}": v for k, v in plan.rows.items() if split_expert(k)[0] not in ternary}
    orders |= {f"cols/{k}": v for k, v in plan.cols.items() if split_expert(k)[0] not in ternary}
    np.savez(workdir / "orders.npz", **orders)  # type: ignore[arg-type]
    np.savez(workdir / "replaced.npz", **replaced)  # type: ignore[arg-type]
    levels = dict.fromkeys(whole or {}, VALUES)
    reasons, files = dict(whole or {}), dict[str, str]()
    # What the files hold in 4 or 8 bits and is not ternary.
    packed = {
        name: _save(workdir / f"packed-{i:05d}.npy", model.read(name).float().numpy())
        for i, name in enumerate(n for n in model.packed if n not in ternary)
    }
    view = _View(model, workdir)
    while True:
        for name in (n for n, level in levels.items() if level == VALUES and n not in files):
            files[name] = _save(workdir / f"values-{len(files):05d}.npy", values(name))
        result = view.drive(
            source_dir, options, ternary=_as_json(ternary), levels=levels, reasons=reasons,
            values=files, given=packed,
        )  # fmt: skip
        levels, reasons = result["levels"], result["reasons"]
        if result["written"]:
            break
    carrier = read_carrier(workdir / "carrier.gguf", result, workdir / "result.json.npz")
    carrier.notes = result["notes"]
    return carrier


def _save(file: Path, value: NDArray[np.float32]) -> str:
    np.save(file, np.ascontiguousarray(value, dtype=np.float32))
    return str(file.resolve())


def try_converter(
    source_dir: Path,
    model: Checkpoint,
    ternary: Mapping[str, Target],
    options: Options = Options(),
    *,
    vocab: bool = True,
) -> list[str]:
    """Run the converter without reading a weight or writing a file; what it would say.

    Args:
        ternary: the checkpoint's tensors that hold matrices that are to become ternary.
        vocab: whether to try the tokenizer too.

    Returns:
        Notes: what would be mended or ignored, and what would not be ternary in the file.

    Raises:
        PT2Error: whatever :func:`run_converter` would refuse.
    """
    with temporary_folder(Path(tempfile.gettempdir()), "pt2-preflight-") as work:
        result = _View(model, work).drive(
            source_dir, options, ternary=_as_json(ternary), preflight=True, vocab=vocab
        )
        return [*result["notes"], *fallback_notes(result["reasons"])]


def fallback_notes(reasons: Mapping[str, str]) -> list[str]:
    """One line for every kind of tensor that is not ternary in the file."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, why in reasons.items():
        kinds.setdefault((pattern(name), why), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else kind} cannot be ternary in the file: {why}"
        + (f" ({len(names)} tensors)" if len(names) > 1 else "")
        for (kind, why), names in kinds.items()
    ]


def _as_json(ternary: Mapping[str, Target]) -> dict[str, Any]:
    return {name: [list(t.shape), t.first, t.transposed] for name, t in ternary.items()}


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
    if model.packed:  # the converter unpacks it by itself
        how = {"quantization_config": model.raw_config["quantization_config"]}
        model = replace(model, settings={**model.settings, **how}, packed={})
    with temporary_folder(Path(tempfile.gettempdir()), "pt2-convert-") as work:
        more = {"whole": True, "outtype": outtype, "carrier": str(out.absolute())}
        notes: list[str] = _View(model, work).drive(source_dir, options, log, **more)["notes"]
        return notes


class _View:
    """A view of a model in a working folder, and the driver's process on it."""

    def __init__(self, model: Checkpoint, workdir: Path) -> None:
        self.model, self.workdir = model, workdir.resolve()
        self.folder = view_folder(model, workdir)
        self.notes = write_view(model, self.folder)

    def drive(
        self, source_dir: Path, options: Options, log: Path | None = None, **more: Any
    ) -> dict[str, Any]:
        """Run the driver; returns its result, whose notes have the view's before them."""
        job = {
            "path": search_path(),
            "source": str(source_dir.resolve()),
            "model": str(self.folder.resolve()),
            "shown": str(self.model.path),
            "tensors": sorted(self.model.tensors),
            "dropped": sorted([*self.model.dropped, *self.model.parts]),
            "packed": {n: list(p.shape) for n, p in self.model.packed.items()},
            "given": {},
            "carrier": str(self.workdir / "carrier.gguf"),
            "result": str(self.workdir / "result.json"),
            "orders": str(self.workdir / "orders.npz"),
            "replaced": str(self.workdir / "replaced.npz"),
            "ternary": {},
            "levels": {},
            "reasons": {},
            "values": {},
            "whole": False,
            "outtype": "f32",
            "max_context": options.max_context,
            "pre_tokenizer": options.pre_tokenizer,
            "vocab": True,
            "preflight": False,
            **more,
        }
        job_file = self.workdir / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = isolated(Path(converter_driver.__file__).resolve(), [str(job_file)])
        done = children.run(command, env=child_env())
        if os.environ.get("PT2_DEBUG"):
            sys.stderr.write(done.stderr)
        if log is not None:
            log.write_text(done.stderr, encoding="utf-8")
        if done.returncode:
            raise PT2Error(_failure(done, str(job["shown"])))
        result: dict[str, Any] = read_json(str(job["result"]))
        result["notes"] = [*self.notes, *result.get("checked", []), *result["notes"]]
        return result


def check_tokenizer(model_dir: Path) -> None:
    """Raise PT2Error unless the model's folder has a tokenizer."""
    if not any((model_dir / name).is_file() for name in TOKENIZERS):
        raise PT2Error(
            f"{model_dir} has no tokenizer ({', '.join(TOKENIZERS)}): copy the tokenizer's files "
            "there from where the model came from"
        )


def read_carrier(path: Path, result: Mapping[str, Any], maps: Path) -> Carrier:
    """Read a carrier, and where the rows of the ternary tensors come from.

    Args:
        result: of the driver.
        maps: the .npz beside it.

    Raises:
        PT2Error: the converter has left out a weight that is ternary in the artifact.
    """
    if result["lost"]:
        raise PT2Error(
            f"llama.cpp's converter leaves out {result['lost'][0]}: leave it out of the artifact "
            "too, with pt2-quantize --skip"
        )
    reader = gguf.GGUFReader(path)
    found = {t.name: t for t in reader.tensors}
    tensors = []
    with np.load(maps) as rows:
        for number, entry in enumerate(result["tensors"]):
            shape, sources = tuple(entry["shape"]), tuple(entry["sources"])
            if entry["ternary"]:
                made = RowMap(shape, rows[f"{number}/which"], rows[f"{number}/row"])
                tensors.append(CarrierTensor(entry["name"], shape, None, sources, made))
            else:
                data = _values(found[entry["name"]]).reshape(shape)
                free = bool(entry["free"])
                tensors.append(CarrierTensor(entry["name"], shape, data, sources, free=free))
    arch = reader.fields["general.architecture"].contents()
    listed = sum(_TENSOR_ENTRY + len(t.name) for t in tensors if t.ternary)
    return Carrier(
        arch, dict(_fields(reader)), tensors, int(reader.data_offset) + listed,
        fallbacks=dict(result["reasons"]),
    )  # fmt: skip


def _values(tensor: gguf.ReaderTensor) -> NDArray[Any]:
    """An ordinary tensor's values; whole numbers stay such, all else is float32."""
    data = np.asarray(tensor.data)
    if tensor.tensor_type.name in ("F32", "F64", "I8", "I16", "I32", "I64"):
        return data
    return gguf.dequantize(data, tensor.tensor_type)


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
