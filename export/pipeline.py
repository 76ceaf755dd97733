"""From an artifact and its model to GGUF files: :func:`export_gguf`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export import types
from export.checks import (
    Progress,
    check_disk,
    check_model,
    check_output,
    check_shapes,
    publish,
    source_model,
    work_folder,
)
from export.config import ExportConfig
from export.converter import Carrier, Options, check_tokenizer, run_converter
from export.encode import (
    EMBEDDING,
    HEAD,
    Item,
    TernaryRows,
    check_group_size,
    encode_ordinary,
    encode_ternary,
    plan_items,
    row_order,
)
from export.fold import FoldPlan, Heads, fold_plan
from export.ggml import Ggml
from export.mixed import Choice, choose
from export.q2k import WeightError
from export.verify import verify_files
from export.writer import Metadata, write_gguf
from quantize import sensitivity
from quantize.artifact import Artifact, TernaryMatrix
from quantize.checkpoint import Checkpoint

PT2_VERSION = 1
HF_EMBEDDING, HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"
HEADER_SPARE = 8192  # our own metadata and the padding between tensors
_FILE_TYPE = {"tq2_1": 120, "tq1_1": 121, "q2_k": int(gguf.LlamaFileType.MOSTLY_Q2_K)}


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
        mixed: what was chosen to fit a target size, in words (None: no target).
        notes: what the converter mended or ignored, in words.
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
    mixed: str | None = None
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
    types.register()
    artifact = Artifact.open(artifact_dir)
    model = Checkpoint.open(Path(model_dir) if model_dir is not None else source_model(artifact))
    check_tokenizer(model.path)
    ggml = _library(config)
    source = _Ternary.read(artifact, model, progress)
    if config.targeted:
        source.measured()  # before the long work
    check_group_size(source.group_size(), config.type)
    if config.verify:
        check_model(artifact, model, progress)
    check_disk(out, model, source.shapes())
    with work_folder(out) as work:
        progress("converting metadata and tokenizer", 0, 1)
        carrier = run_converter(
            _llama_source(), model.path, work, source.shapes(), source.plan, artifact.replaced(),
            _options(config, artifact),
        )  # fmt: skip
        progress("converting metadata and tokenizer", 1, 1)
        mixed = None
        if config.targeted:
            mixed = _mixed(config, carrier, source, ggml, progress)
        items = plan_items(carrier, config, ggml, artifact.kept, mixed)
        report = _write(out, work, carrier, items, source, config, ggml, progress)
    if mixed is not None:
        _check_target(report, config)
        report.mixed = mixed.summary(source.measured().kl)
    report.notes = carrier.notes
    return report


def _options(config: ExportConfig, artifact: Artifact) -> Options:
    """What was given to this export, else to the quantisation."""
    given = artifact.manifest["settings"]
    return Options(
        config.max_context or int(given.get("max_context") or 0),
        config.pre_tokenizer or given.get("pre_tokenizer"),
    )


def _mixed(
    config: ExportConfig, carrier: Carrier, source: _Ternary, ggml: Ggml, progress: Progress
) -> Choice:
    """Choose the types that fit the target, with what metadata and small tensors leave of it."""
    shapes = {n.removesuffix(".weight"): s for n, s in source.shapes().items()}
    ordinary = {t.name: t for t in carrier.tensors if t.source is None}
    tables = {"embedding": HF_EMBEDDING, **({"head": HF_HEAD} if HEAD in ordinary else {})}
    # Everything else has its size already: plan it, tables and linears left out.
    items = plan_items(carrier, config, ggml, source.artifact.kept)
    chosen = (HEAD, EMBEDDING)
    others = [i for i in items if i.tensor.source is None and i.tensor.name not in chosen]
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
        raise AssertionError(f"{report.file_bytes} bytes written for a target of {target}")


class _Ternary:
    """The artifact's matrices, one block in memory at a time, and where their rows go."""

    def __init__(
        self, artifact: Artifact, model: Checkpoint, plan: FoldPlan, home: dict[str, int]
    ) -> None:
        self.artifact, self.model, self.plan, self._home = artifact, model, plan, home
        self._block: tuple[int, dict[str, TernaryMatrix]] = (-1, {})
        self._measured: sensitivity.Sensitivity | None = None

    @classmethod
    def read(cls, artifact: Artifact, model: Checkpoint, progress: Progress) -> _Ternary:
        """Check every block file, collect the column orders, and plan the fold."""
        orders, home = {}, {}
        for index in range(artifact.n_blocks):
            progress("checking the artifact", index, artifact.n_blocks)
            for name, matrix in artifact.block(index).items():
                orders[name], home[name] = matrix.perm, index
        progress("checking the artifact", artifact.n_blocks, artifact.n_blocks)
        check_shapes(artifact, model, list(home))
        heads = Heads.from_config(model.raw_config)
        plan = fold_plan(model.tensors, heads, artifact.residual_perm, orders)
        return cls(artifact, model, plan, home)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Checkpoint tensor name -> (rows, cols)."""
        matrices = self.artifact.matrices
        return {f"{m}.weight": (matrices[m]["rows"], matrices[m]["cols"]) for m in self._home}

    def group_size(self) -> int:
        """Columns that share an alpha and mu."""
        return int(self.artifact.manifest["settings"]["block_size"])

    def rows(self, item: Item) -> TernaryRows:
        """The weight of an item, its rows in the file's order."""
        return TernaryRows.make(item.tensor, self._matrix(item), self.plan)

    def original(self, name: str) -> NDArray[np.float32]:
        """A tensor of the source model, or what a refinement has put in its place, float32."""
        replaced = self.artifact.replaced()
        return replaced[name] if name in replaced else self.model.read(name).float().numpy()

    def original_rows(self, item: Item) -> NDArray[np.float32]:
        """The original weight of an item, rows and columns in the file's order."""
        assert item.tensor.source is not None
        weight = self.original(item.tensor.source)
        return weight[row_order(item.tensor, self.plan)][:, self._matrix(item).perm]

    def energy(self, item: Item) -> NDArray[np.float32]:
        """The mean square of each input of an item, in the file's order."""
        matrix = self._matrix(item)
        return self.measured().linears[matrix.name].energy[matrix.perm]

    def measured(self) -> sensitivity.Sensitivity:
        """The artifact's sensitivities; PT2Error where they have not been measured."""
        if self._measured is None:
            self._measured = sensitivity.read(self.artifact)
        return self._measured

    def _matrix(self, item: Item) -> TernaryMatrix:
        assert item.tensor.source is not None
        module = item.tensor.source.removesuffix(".weight")
        index = self._home[module]
        if self._block[0] != index:
            self._block = (index, self.artifact.block(index))
        return self._block[1][module]


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
        if item.reason is not None and not item.fallback:  # mixed precision
            weight, energy = source.original_rows(item), source.energy(item)
            return encode_ordinary(weight, item.type, ggml, item.tensor.name, energy)
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
    return _report(publish(files, out, config), items, errors, config)


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
    options = _options(config, source.artifact)
    if options.max_context:
        metadata["pt2.max_context"] = (options.max_context, kind.UINT32, None)
    if options.pre_tokenizer:
        metadata["pt2.pre_tokenizer"] = (options.pre_tokenizer, kind.STRING, None)
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
