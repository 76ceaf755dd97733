"""``pt2-export verify FILE --artifact DIR``: is a GGUF file what its artifact says?

Three questions, each answered by itself: do its metadata say what llama.cpp's converter says of the
model; do its tensors hold the artifact's and the model's values; and does a llama.cpp, ours or
another, predict from it what the ternary model predicts.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export import gguf_types
from export.checks import Progress, check_model, source_model
from export.converter import Carrier, CarrierTensor, Options, run_converter
from export.encode import F32_TYPE, Item
from export.ggml import Ggml
from export.levels import wrong_levels
from export.proof import Folder, Programs, Verdict
from export.prove import MAX_ROW_ERROR, Prover, row_error
from export.source import TernarySource
from export.verify import check_blocks, compare_weights
from pt2_core import formats, upstream
from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.process.temporary import temporary_folder
from pt2_llama import api

# Relative RMS error of a row of Q2_K's encoding of a ternary weight (0.5 to 4% were seen).
MAX_TERNARY_ERROR = 0.15
# Keys that say how a file was written, not what the model is.
_OWN_KEYS = re.compile(
    r"pt2\.|split\.|GGUF\.|general\.(file_type|quantization_version|name|size_label|architecture)"
)
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass
class Findings:
    """What a file was found to be.

    Attributes:
        metadata, tensors: how many keys and tensors were compared.
        problems: what is wrong, in words; empty for a right file.
        proof: what the predictions say; None where that was left out.
    """

    metadata: int = 0
    tensors: int = 0
    problems: list[str] = field(default_factory=list)
    proof: Verdict | None = None


def verify_file(
    file: str | os.PathLike[str],
    artifact_dir: str | os.PathLike[str],
    *,
    model_dir: str | os.PathLike[str] | None = None,
    variant: str = "cpu",
    llama: str | os.PathLike[str] | None = None,
    proof_tokens: int = 1024,
    progress: Progress = lambda stage, done, total: None,
) -> Findings:
    """Hold a GGUF file against an artifact.

    Args:
        file: the file, or the first of its splits.
        artifact_dir: a complete artifact.
        model_dir: the source model; None takes the folder that the artifact was made from.
        variant: of our llama.cpp build: ``cpu``, ``cuda`` or ``stock``.
        llama: a folder with the programs of any other build, in place of it.
        proof_tokens: tokens to be run at most, in whole windows; 0: none.
        progress: called with (stage, done, total).

    Raises:
        PT2Error: artifact, model, build or file cannot be used at all.
    """
    gguf_types.register()
    files = splits(Path(file))
    artifact = Artifact.open(artifact_dir)
    model = Checkpoint.open(Path(model_dir) if model_dir is not None else source_model(artifact))
    check_model(artifact, model, progress)
    model.as_made(artifact.manifest["model"])
    programs: Programs = Folder(Path(llama)) if llama is not None else api.require_build(variant)
    ggml = Ggml(api.require_build().lib_dir)
    source = TernarySource.read(artifact, model, progress)
    findings = Findings()
    with temporary_folder(Path(tempfile.gettempdir()), "pt2-verify-") as work:
        progress("converting metadata and tokenizer", 0, 1)
        fields, tensors = _read(files)
        options = Options(int(fields.get("pt2.max_context") or 0), fields.get("pt2.pre_tokenizer"))
        carrier = run_converter(
            api.source_dir(), model, work, source.targets, source.plan, artifact.replaced(),
            source.values, source.whole, options,
        )  # fmt: skip
        _compare_metadata(carrier, fields, findings)
        findings.problems += wrong_levels(artifact, fields, tensors.values())
        items = _compare_tensors(carrier, tensors, source, ggml, findings, progress)
        if proof_tokens:
            prover = Prover(
                source, items, files, fields, ggml, programs, proof_tokens, options.max_context,
                progress,
            )  # fmt: skip
            findings.proof = prover.verdict()
            if findings.proof.problem is not None:
                findings.problems.append(findings.proof.problem)
    return findings


def splits(file: Path) -> list[Path]:
    """A file, or all splits that belong to the first one.

    Raises:
        PT2Error: there is no such file, or a split is missing.
    """
    match = _SPLIT.fullmatch(file.name)
    count = int(match[3]) if match else 1
    files = [file]
    if match:
        files = [file.with_name(f"{match[1]}-{i + 1:05d}-of-{match[3]}.gguf") for i in range(count)]
    for each in files:
        if not each.is_file():
            raise PT2Error(f"there is no file {each}")
    return files


def _read(files: list[Path]) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    fields: dict[str, Any] = {}
    tensors: dict[str, gguf.ReaderTensor] = {}
    for file in files:
        try:
            reader = gguf.GGUFReader(file)
        except (ValueError, KeyError, IndexError, OSError) as e:
            raise PT2Error(f"{file} is not a whole GGUF file ({e})") from e
        fields = {**{k: f.contents() for k, f in reader.fields.items()}, **fields}
        tensors |= {t.name: t for t in reader.tensors}
    return fields, tensors


def _compare_metadata(carrier: Carrier, fields: Mapping[str, Any], findings: Findings) -> None:
    if fields.get("general.architecture") != carrier.arch:
        findings.problems.append(
            f"its architecture is {fields.get('general.architecture')}, the model's {carrier.arch}"
        )
    for key, (value, *_) in carrier.fields.items():
        if _OWN_KEYS.match(key):
            continue
        findings.metadata += 1
        if key not in fields:
            findings.problems.append(f"the key {key} is missing")
        elif not _same(value, fields[key]):
            findings.problems.append(f"{key} is {_shown(value, fields[key])}")


def _same(meant: Any, found: Any) -> bool:
    if isinstance(meant, float) and isinstance(found, float):
        return bool(np.float32(meant) == np.float32(found)) or (meant != meant and found != found)
    return bool(meant == found)


def _shown(meant: Any, found: Any) -> str:
    if isinstance(meant, list) and isinstance(found, list):
        if len(meant) != len(found):
            return f"a list of {len(found)} in place of {len(meant)}"
        at = next(i for i, (a, b) in enumerate(zip(meant, found, strict=True)) if a != b)
        return f"{found[at]!r} in place of {meant[at]!r} at {at}"
    return f"{str(found)[:60]!r} in place of {str(meant)[:60]!r}"


def _compare_tensors(
    carrier: Carrier,
    tensors: Mapping[str, gguf.ReaderTensor],
    source: TernarySource,
    ggml: Ggml,
    findings: Findings,
    progress: Progress,
) -> list[Item]:
    """Compare all tensors; returns those that are there, with the file's types."""
    meant = {t.name: t for t in carrier.tensors}
    missing = [f"{n} is missing" for n in meant if n not in tensors]
    more = [f"{n} does not belong to the model" for n in tensors if n not in meant]
    findings.problems += missing + more
    items = []
    for number, (name, tensor) in enumerate(meant.items()):
        progress("comparing the tensors", number, len(meant))
        if name not in tensors:
            continue
        found = tensors[name]
        shape = tuple(reversed(found.shape.tolist()))
        if shape != tensor.shape:
            findings.problems.append(f"{name} is {list(shape)} in place of {list(tensor.shape)}")
            continue
        item = Item(tensor, found.tensor_type, int(found.n_bytes), None)
        items.append(item)
        findings.tensors += 1
        findings.problems += _wrong_values(item, np.asarray(found.data), source, ggml)
    progress("comparing the tensors", len(meant), len(meant))
    return items


def _wrong_values(
    item: Item, data: NDArray[Any], source: TernarySource, ggml: Ggml
) -> Iterator[str]:
    """What is wrong with a tensor's values, if anything."""
    tensor = item.tensor
    kind = item.type.name.lower()
    if kind in formats.TYPES:
        try:
            check_blocks(data, formats.TYPES[kind])
        except ValueError as e:
            yield f"{tensor.name} is damaged: {e}"
            return
    if tensor.ternary and kind in (*formats.TYPES, *upstream.TYPES):
        try:
            compare_weights(tensor.name, data, item, source.rows, ggml)
        except PT2Error:
            yield f"{tensor.name} does not hold the artifact's alpha, mu and codes"
        return
    values = _decoded(tensor, data, item, ggml)
    if not np.isfinite(values).all():
        yield f"{tensor.name} has NaN or Inf in it"
    elif tensor.data is not None:
        limit = 0.0 if item.type == F32_TYPE else MAX_ROW_ERROR
        worst = row_error(values, tensor.data.reshape(values.shape).astype(np.float32))
        if worst > limit:
            yield f"{tensor.name} is not the model's (a row is {worst:.1%} off)"
    else:
        ternary = row_error(values, source.rows(item).dequantize())
        # In a file of a chosen size, a linear may have its original weights.
        if ternary > MAX_TERNARY_ERROR:
            single = len(source.matrices_of(tensor)) == 1
            if not single or row_error(values, source.original_rows(item)) > MAX_ROW_ERROR:
                yield f"{tensor.name} is not the artifact's (a row is {ternary:.1%} off)"


def _decoded(
    tensor: CarrierTensor, data: NDArray[Any], item: Item, ggml: Ggml
) -> NDArray[np.float32]:
    """A tensor's values as llama.cpp decodes them, float32 ``[rows, cols]``."""
    cols = tensor.shape[-1]
    if item.type == F32_TYPE:
        return data.reshape(-1, cols).astype(np.float32)
    if item.type == gguf.GGMLQuantizationType.F16:
        return data.reshape(-1, cols).astype(np.float32)
    if item.type.name in ("F64", "I8", "I16", "I32", "I64"):
        return data.reshape(-1, cols).astype(np.float32)
    raw = data.view(np.uint8).reshape(-1, ggml.row_size(item.type, cols))
    return ggml.dequantize(raw, item.type)
