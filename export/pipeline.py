"""From an artifact and its model to GGUF files: :func:`export_gguf`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from export import types
from export.config import ExportConfig
from export.converter import Carrier, check_tokenizer, run_converter
from export.encode import (
    HEAD,
    Item,
    TernaryRows,
    check_group_size,
    encode_ordinary,
    encode_ternary,
    plan_items,
)
from export.fold import FoldPlan, Heads, fold_plan
from export.ggml import Ggml
from export.q2k import WeightError
from export.verify import verify_files
from export.writer import Metadata, write_gguf
from quantize.artifact import MANIFEST, RUN, Artifact, TernaryMatrix
from quantize.checkpoint import Checkpoint
from quantize.common import PT2Error, human_bytes, read_json

PT2_VERSION = 1
_FILE_TYPE = {"tq2_1": 120, "tq1_1": 121, "q2_k": int(gguf.LlamaFileType.MOSTLY_Q2_K)}
# Metadata, tokenizer and padding beside the tensors, when guessing what the disk must hold.
_SPARE_BYTES = 32 << 20

Progress = Callable[[str, int, int], None]


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        files: the output, one file or splits.
        type: of the ternary linears.
        parameters, ternary_parameters: element counts.
        file_bytes: of all files together.
        ternary_bits: of the ternary tensors' data.
        others: tensors that are not ternary: name, shape, type, reason.
        fallbacks: names of those that would be ternary if they could.
        errors: relative RMS weight error per GGUF tensor (Q2_K only).
        error: the same over all of them (None unless Q2_K).
        verified: whether the file was read back and compared.
        tied: whether the embeddings serve as the head too.
    """

    files: list[Path]
    type: str
    parameters: int
    ternary_parameters: int
    file_bytes: int
    ternary_bits: int
    others: list[tuple[str, tuple[int, ...], str, str]]
    fallbacks: list[str]
    errors: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    verified: bool = False
    tied: bool = False

    @property
    def bpw(self) -> float:
        """Bits of the files per parameter."""
        return 8 * self.file_bytes / self.parameters

    @property
    def ternary_bpw(self) -> float:
        """Bits per parameter of the ternary tensors alone (0 where there are none)."""
        return self.ternary_bits / max(self.ternary_parameters, 1)

    @property
    def f16_bytes(self) -> int:
        """Size of the same tensors in F16."""
        return 2 * self.parameters


def export_gguf(
    artifact_dir: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    config: ExportConfig | None = None,
    *,
    model_dir: str | os.PathLike[str] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ExportReport:
    """Write an artifact as GGUF.

    Args:
        artifact_dir: a complete artifact of pt2-quantize.
        out_path: the file to write; with ``split_max_size`` the stem of the splits' names.
        config: the settings; the defaults if None.
        model_dir: the source model; None takes the folder that the artifact was made from.
        progress: called with (stage, done, total).

    Raises:
        PT2Error: anything wrong with artifact, model, settings, disk, or the written file. Nothing
            is left under the final name then.
    """
    config = config or ExportConfig()
    out = Path(out_path)
    _check_output(out, config)
    types.register()
    artifact = Artifact.open(artifact_dir)
    model = Checkpoint.open(Path(model_dir) if model_dir is not None else source_model(artifact))
    check_tokenizer(model.path)
    ggml = _library(config)
    source = _Ternary.read(artifact, model, progress)
    check_group_size(source.group_size(), config.type)
    if config.verify:
        _check_model(artifact, model, progress)
    _check_disk(out, model, source)
    with _work_folder(out) as work:
        progress("converting metadata and tokenizer", 0, 1)
        carrier = run_converter(_llama_source(), model.path, work, source.shapes(), source.plan)
        progress("converting metadata and tokenizer", 1, 1)
        items = plan_items(carrier, config, ggml, artifact.kept)
        report = _write(out, work, carrier, items, source, config, ggml, progress)
    return report


def source_model(artifact: Artifact) -> Path:
    """The folder of the model that an artifact was made from, as ``run.json`` remembers it.

    Raises:
        PT2Error: it does not say, or the folder is gone.
    """
    file = artifact.path / RUN
    record = read_json(file) if file.is_file() else {}
    folder = record.get("model_dir") if isinstance(record, dict) else None
    if not isinstance(folder, str):
        raise PT2Error(f"{file} does not name the source model: give its folder with --model DIR")
    if not Path(folder).is_dir():
        raise PT2Error(f"the source model is no longer at {folder}: give its folder with --model")
    return Path(folder)


class _Ternary:
    """The artifact's matrices, one block in memory at a time, and where their rows go."""

    def __init__(self, artifact: Artifact, plan: FoldPlan, home: dict[str, int]) -> None:
        self.artifact, self.plan, self._home = artifact, plan, home
        self._block: tuple[int, dict[str, TernaryMatrix]] = (-1, {})

    @classmethod
    def read(cls, artifact: Artifact, model: Checkpoint, progress: Progress) -> _Ternary:
        """Check every block file, collect the column orders, and plan the fold."""
        orders, home = {}, {}
        for index in range(artifact.n_blocks):
            progress("checking the artifact", index, artifact.n_blocks)
            for name, matrix in artifact.block(index).items():
                orders[name], home[name] = matrix.perm, index
        progress("checking the artifact", artifact.n_blocks, artifact.n_blocks)
        _check_shapes(artifact, model, home)
        heads = Heads.from_config(model.raw_config)
        plan = fold_plan(model.tensors, heads, artifact.residual_perm, orders)
        return cls(artifact, plan, home)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Checkpoint tensor name -> (rows, cols)."""
        matrices = self.artifact.matrices
        return {f"{m}.weight": (matrices[m]["rows"], matrices[m]["cols"]) for m in self._home}

    def group_size(self) -> int:
        """Columns that share an alpha and mu."""
        return int(self.artifact.manifest["settings"]["block_size"])

    def rows(self, item: Item) -> TernaryRows:
        """The weight of an item, its rows in the file's order."""
        assert item.tensor.source is not None
        module = item.tensor.source.removesuffix(".weight")
        index = self._home[module]
        if self._block[0] != index:
            self._block = (index, self.artifact.block(index))
        return TernaryRows.make(item.tensor, self._block[1][module], self.plan)


def _write(
    out: Path,
    work: Path,
    carrier: Carrier,
    items: list[Item],
    source: _Ternary,
    config: ExportConfig,
    ggml: Ggml,
    progress: Progress,
) -> ExportReport:
    """Write into the work folder, verify there, and move to the final names."""
    folder = work / "out"
    folder.mkdir()
    errors: dict[str, WeightError] = {}
    done = 0

    def encode(item: Item) -> Any:
        nonlocal done
        done += 1
        progress("writing", done, len(items))
        if item.tensor.source is None:
            assert item.tensor.data is not None
            return encode_ordinary(item.tensor.data, item.type, ggml, item.tensor.name)
        data, error = encode_ternary(source.rows(item), item.type, ggml)
        if error is not None:
            errors[item.tensor.name] = error
        return data

    metadata = _metadata(source, items, config)
    files, digests = write_gguf(
        folder, out.name, carrier, metadata, items, encode, config.split_max_size
    )
    if config.verify:
        checked = iter(range(1, len(items) + 1))

        def step() -> None:
            progress("verifying", next(checked), len(items))

        verify_files(files, items, digests, source.rows, ggml, step)
    return _report(_publish(files, out, config), items, errors, config)


def _metadata(source: _Ternary, items: list[Item], config: ExportConfig) -> Metadata:
    """What docs/design.md lists under GGUF metadata, and the file type."""
    manifest = source.artifact.manifest
    settings = {"quantize": manifest["settings"], "export": config.identity()}
    kind = gguf.GGUFValueType
    bits = 8 * sum(i.nbytes for i in items) / sum(i.elements for i in items)
    metadata: Metadata = {
        "general.file_type": (_FILE_TYPE[config.type], kind.UINT32, None),
        "general.quantization_version": (gguf.GGML_QUANT_VERSION, kind.UINT32, None),
        "pt2.version": (PT2_VERSION, kind.UINT32, None),
        "pt2.type": (config.type, kind.STRING, None),
        "pt2.group_size": (source.group_size(), kind.UINT32, None),
        "pt2.model_fingerprint": (manifest["model"]["fingerprint"], kind.STRING, None),
        "pt2.settings": (json.dumps(settings, sort_keys=True), kind.STRING, None),
        "pt2.bpw": (bits, kind.FLOAT32, None),
    }
    if config.type in types.TERNARY_TYPES:
        metadata[f"pt2.{config.type}.layout"] = (types.LAYOUT_VERSION, kind.UINT32, None)
    return metadata


def _report(
    files: list[Path], items: list[Item], errors: dict[str, WeightError], config: ExportConfig
) -> ExportReport:
    ternary = [i for i in items if i.reason is None]
    others = [
        (i.tensor.name, i.tensor.shape, i.type.name, i.reason)
        for i in items
        if i.reason is not None
    ]
    return ExportReport(
        files=files,
        type=config.type,
        parameters=sum(i.elements for i in items),
        ternary_parameters=sum(i.elements for i in ternary),
        file_bytes=sum(f.stat().st_size for f in files),
        ternary_bits=8 * sum(i.nbytes for i in ternary),
        others=others,
        fallbacks=[i.tensor.name for i in items if i.fallback],
        errors={name: e.rms for name, e in errors.items()},
        error=sum(errors.values(), WeightError()).rms if errors else None,
        verified=config.verify,
        tied=all(i.tensor.name != HEAD for i in items),
    )


# Checks and files ---------------------------------------------------------------------------------


def _check_output(out: Path, config: ExportConfig) -> None:
    if out.is_dir():
        raise PT2Error(f"{out} is a folder: name a file in it, such as {out / 'model.gguf'}")
    if out.suffix != ".gguf":
        raise PT2Error(f"the output {out} must end in .gguf")
    if not out.parent.is_dir():
        raise PT2Error(f"the folder {out.parent} does not exist: make it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PT2Error(f"cannot write into {out.parent}: permission denied; choose another output")
    splits = sorted(out.parent.glob(f"{out.stem}-*-of-*.gguf")) if config.split_max_size else []
    for old in [out, *splits]:
        if old.exists() and not config.overwrite:
            raise PT2Error(f"{old} exists: give another name, or --overwrite")


def _check_model(artifact: Artifact, model: Checkpoint, progress: Progress) -> None:
    total = sum((model.path / shard).stat().st_size for shard in model.shards)
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress("checking the model (MiB)", min(done, total) >> 20, max(total >> 20, 1))

    fingerprint, _ = model.fingerprint(progress=step)
    if fingerprint != artifact.manifest["model"].get("fingerprint"):
        raise PT2Error(
            f"{model.path} is not the model that {artifact.path} was made from (its files differ): "
            "give the right one with --model"
        )


def _check_shapes(artifact: Artifact, model: Checkpoint, home: dict[str, int]) -> None:
    missing = sorted(set(artifact.matrices) - set(home))
    if missing:
        raise PT2Error(f"{artifact.path / MANIFEST} names {missing[0]}, which no block file holds")
    for module in home:
        record = artifact.matrices[module]
        shape = (record["rows"], record["cols"])
        info = model.tensors.get(f"{module}.weight")
        if info is None or info.shape != shape:
            raise PT2Error(
                f"{model.path} is not the model of {artifact.path}: {module} should be "
                f"{shape[0]} x {shape[1]}; give the right one with --model"
            )
    hidden = model.raw_config.get("hidden_size")
    if hidden is not None and len(artifact.residual_perm) != hidden:
        raise PT2Error(f"{model.path} is not the model of {artifact.path}: another hidden size")


def _check_disk(out: Path, model: Checkpoint, source: _Ternary) -> None:
    ternary = source.shapes()
    ordinary = sum((t.end - t.begin) for n, t in model.tensors.items() if n not in ternary)
    # The carrier holds the ordinary tensors in float32, the output at most in float32 again.
    needed = 4 * ordinary + sum(r * c * 3 // 8 for r, c in ternary.values()) + _SPARE_BYTES
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise PT2Error(
            f"{out.parent.absolute()} has {human_bytes(free)} free and exporting needs about "
            f"{human_bytes(needed)}: the disk is too full; free some space or choose another"
        )


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output, removed whatever happens."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as e:
        raise PT2Error(f"cannot write into {out.parent}: {e.strerror}") from e
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(files: list[Path], out: Path, config: ExportConfig) -> list[Path]:
    """Move finished files to their final names; the first split last, it is the one to load."""
    final = [out.parent / f.name for f in files]
    for target in final:
        if target.exists() and not config.overwrite:
            raise PT2Error(f"{target} exists: give another name, or --overwrite")
    for file, target in reversed(list(zip(files, final, strict=True))):
        os.replace(file, target)
    return final


def _library(config: ExportConfig) -> Ggml:
    from third_party.pt2_llama import api

    ggml = Ggml(api.require_build().lib_dir)
    if config.type in types.TERNARY_TYPES:
        t = types.TERNARY_TYPES[config.type]
        ggml.check_type(t.id, config.type, types.BLOCK, t.nbytes)
    return ggml


def _llama_source() -> Path:
    from third_party.pt2_llama import api

    return api.source_dir()
