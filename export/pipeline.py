"""From an artifact and its model to GGUF files: :func:`export_gguf`."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from export import gguf_types
from export.checks import (
    Progress,
    check_disk,
    check_grid,
    check_model,
    check_output,
    publish,
    source_model,
    work_folder,
)
from export.config import ExportConfig
from export.converter import (
    Carrier,
    CarrierTensor,
    Options,
    check_tokenizer,
    fallback_notes,
    run_converter,
)
from export.encode import (
    EMBEDDING,
    HEAD,
    Item,
    check_group_size,
    encode_ordinary,
    encode_parts,
    plan_items,
)
from export.ggml import Ggml
from export.levels import check_levels, levels_entry
from export.mixed import Choice, choose
from export.proof import Verdict
from export.prove import Prover, placeholders, write_figures
from export.q2k import WeightError
from export.source import TernarySource
from export.verify import verify_files
from export.writer import Metadata, write_gguf
from pt2_core import formats, upstream
from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_llama import api

PT2_VERSION = 1
HEADER_SPARE = 8192  # our own metadata and the padding between tensors
_FILE_TYPE = {
    **{name: t.file_type for name, t in formats.TYPES.items()},
    **{name: t.file_type for name, t in upstream.TYPES.items()},
    "q2_k": int(gguf.LlamaFileType.MOSTLY_Q2_K),
}


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
        proof: how llama.cpp's predictions from the file compare with the ternary model's (None:
            that was left out).
        tied: whether the embeddings serve as the head too.
        mixed: what was chosen to fit a target size, in words (None: no target).
        chat: whether the file has a chat template.
        notes: what of the model's folder was left out or decided, and what the converter mended or
            ignored, one line each.
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
    proof: Verdict | None = None
    tied: bool = False
    mixed: str | None = None
    chat: bool = False
    notes: list[str] = field(default_factory=list)

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
    check_output(out, config)
    gguf_types.register()
    artifact = Artifact.open(artifact_dir)
    check_grid(artifact, config.type)
    model = Checkpoint.open(Path(model_dir) if model_dir is not None else source_model(artifact))
    check_tokenizer(model.path)
    ggml = _library(config)
    model.as_made(artifact.manifest["model"])
    if config.proof_tokens:
        api.require_build(_judge(config.type))  # before the long work
    source = TernarySource.read(artifact, model, progress)
    if config.targeted:
        source.measured()  # before the long work
    _check_group_size(source, config)
    check_levels(artifact, config.type)
    if config.verify:
        check_model(artifact, model, progress)
    check_disk(out, model, source.targets)
    with work_folder(out) as work:
        progress("converting metadata and tokenizer", 0, 1)
        carrier = run_converter(
            _llama_source(), model, work, source.targets, source.plan, artifact.replaced(),
            source.values, source.whole, _options(config, artifact),
        )  # fmt: skip
        progress("converting metadata and tokenizer", 1, 1)
        _check_tied(carrier, model)
        mixed = None
        if config.targeted:
            mixed = _mixed(config, carrier, source, ggml, progress)
        items = _plan(carrier, config, ggml, source, mixed)
        report = _write(out, work, carrier, items, source, config, ggml, progress)
    report.chat = "tokenizer.chat_template" in carrier.fields
    if mixed is not None:
        report.mixed = mixed.summary(source.measured().kl)
    report.notes = [*model.notes, *carrier.notes, *fallback_notes(carrier.fallbacks)]
    return report


def _check_group_size(source: TernarySource, config: ExportConfig) -> None:
    """Refuse a type that can hold no matrix's blocks; a single one is a named fallback."""
    columns = {name: entry["cols"] for name, entry in source.artifact.matrices.items()}
    sizes = {source.block_size(name) for name in columns}
    if len(sizes) == 1:
        check_group_size(sizes.pop(), config.type, columns)


def _plan(
    carrier: Carrier, config: ExportConfig, ggml: Ggml, source: TernarySource,
    mixed: Choice | None,
) -> list[Item]:  # fmt: skip
    chosen = mixed or Choice()

    def better(tensor: CarrierTensor) -> str | None:
        matrices = source.matrices_of(tensor)
        return chosen.linears.get(matrices[0]) if len(matrices) == 1 else None

    kept = source.artifact.kept
    return plan_items(carrier, config, ggml, kept, source.group_of, better, chosen.tables)


def _check_tied(carrier: Carrier, model: Checkpoint) -> None:
    """Raise PT2Error where the model has a head of its own and the file would have none."""
    if not model.tied and all(t.name != HEAD for t in carrier.tensors):
        raise PT2Error(
            f"the head of {model.path} is a table of its own, and llama.cpp's converter makes it "
            "otherwise: it cannot be exported"
        )


def _options(config: ExportConfig, artifact: Artifact) -> Options:
    """What was given to this export, else to the quantisation."""
    given = artifact.manifest["settings"]
    return Options(
        config.max_context or int(given.get("max_context") or 0),
        config.pre_tokenizer or given.get("pre_tokenizer"),
    )


def _mixed(
    config: ExportConfig, carrier: Carrier, source: TernarySource, ggml: Ggml, progress: Progress
) -> Choice:
    """Choose the types that fit the target, with what metadata and small tensors leave of it."""
    # Experts that are joined in one tensor have one type, and stay ternary.
    alone = [t for t in carrier.tensors if t.ternary and len(source.matrices_of(t)) == 1]
    shapes = {source.matrices_of(t)[0]: (t.shape[0], t.shape[1]) for t in alone}
    named = {"embedding": carrier.source_of(EMBEDDING), "head": carrier.source_of(HEAD)}
    tables = {table: name for table, name in named.items() if name is not None}
    # Everything else has its size already: plan it, tables and linears left out.
    items = _plan(carrier, config, ggml, source, None)
    chosen = {*(t.name for t in alone), *(t for t in (HEAD, EMBEDDING) if carrier.source_of(t))}
    others = [i for i in items if i.tensor.name not in chosen]
    parameters = sum(i.elements for i in items)
    target = config.target_size or int(config.target_bpw * parameters / 8)
    fixed = sum(i.nbytes for i in others) + carrier.header_bytes + HEADER_SPARE
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress("choosing types", done, len(shapes) + len(tables))

    return choose(
        config, source.measured(), shapes, source.original, tables, ggml, target - fixed, step
    )


def _check_target(report: ExportReport, config: ExportConfig) -> None:
    target = config.target_size or config.target_bpw * report.parameters / 8
    if report.file_bytes > target:  # the allowance for metadata was too small
        raise PT2Error(
            f"{report.file_bytes} bytes were needed for a target of {int(target)}: "
            "give a target that is a little larger"
        )


def _write(
    out: Path,
    work: Path,
    carrier: Carrier,
    items: list[Item],
    source: TernarySource,
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
        if item.tensor.data is not None:
            return encode_ordinary(item.tensor.data, item.type, ggml, item.tensor.name)
        if item.reason is not None and not item.fallback:  # mixed precision
            weight, energy = source.original_rows(item), source.energy(item)
            return encode_ordinary(weight, item.type, ggml, item.tensor.name, energy)
        data, error = encode_parts(item, source.rows, ggml)
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
    verdict = None
    if config.proof_tokens:
        longest = _options(config, source.artifact).max_context
        prover = Prover(
            source, items, files, {k: v[0] for k, v in carrier.fields.items()}, ggml,
            api.require_build(_judge(config.type)), config.proof_tokens, longest, progress,
        )  # fmt: skip
        verdict = prover.verdict()
        if verdict.problem is not None:
            raise PT2Error(verdict.problem + _kept(files, out, config))
        write_figures(files[0], verdict)
    report = _report(files, items, errors, config, source.model.tied)
    report.proof = verdict
    if config.targeted:
        _check_target(report, config)
    report.files = publish(files, out, config)
    return report


def _kept(files: list[Path], out: Path, config: ExportConfig) -> str:
    """Keep a refused file, or its splits, where that is wanted; what to say of it."""
    if config.keep_refused is None:
        return "; nothing was written (--keep-refused FILE.gguf keeps such a file to look at)"
    kept = Path(config.keep_refused)
    for file in reversed(files):
        target = kept.with_name(kept.stem + file.name.removeprefix(out.stem))
        shutil.move(file, target)
    return f"; the refused file is {target}"


def _metadata(source: TernarySource, items: list[Item], config: ExportConfig) -> Metadata:
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
    metadata |= placeholders()
    options = _options(config, source.artifact)
    if options.max_context:
        metadata["pt2.max_context"] = (options.max_context, kind.UINT32, None)
    if options.pre_tokenizer:
        metadata["pt2.pre_tokenizer"] = (options.pre_tokenizer, kind.STRING, None)
    if ours := formats.TYPES.get(config.type):
        metadata[ours.layout_key()] = (ours.layout, kind.UINT32, None)
    for key, levels in levels_entry(source.artifact, config.type).items():
        metadata[key] = (levels, kind.UINT32, None)
    return metadata


def _report(
    files: list[Path], items: list[Item], errors: dict[str, WeightError], config: ExportConfig,
    tied: bool,
) -> ExportReport:  # fmt: skip
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
        tied=tied,
    )


def _judge(kind: str) -> str:
    """The build that proves a file: the unmodified one where it is made for that alone."""
    return "stock" if kind in upstream.TYPES else "cpu"


def _library(config: ExportConfig) -> Ggml:
    ggml = Ggml(api.require_build().lib_dir)
    if ours := formats.TYPES.get(config.type):
        ggml.check_type(ours.id, ours.ggml_name, ours.block, ours.nbytes)
    return ggml


def _llama_source() -> Path:
    return api.source_dir()
