"""The model card for the hub: what a file was made from and how, its true size, and how to run it.

Every figure comes from the artifact and from what the export found; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.pipeline import ExportReport
from pt2_core import formats
from pt2_core.artifact.folder import Artifact
from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, human_bytes
from pt2_core.model.card import CARD, clean_card
from pt2_core.model.hub import hub_name, model_name

# Of the base model's card, what holds for a quantisation of it too.
INHERITED = ("license", "license_name", "license_link", "language")
TAGS = ("gguf", "llama.cpp", "ternary", "pt2-llm")
# An artifact's settings in words, where they are not 0, no or none.
_STEPS = {
    "itf": "iterative ternary fitting",
    "aga": "activation-aware grid alignment",
    "compensate": "exact error compensation",
    "reround": "T re-rounded with error feedback",
    "rounds": "whole rows improved (joint grid and descent on T)",
    "asymmetry": "targets that make up for earlier errors",
    "refine": "refined end to end by distillation from the base model",
}


@dataclass(frozen=True)
class Base:
    """The model that an artifact was made from.

    Attributes:
        name: as it is called; hub: its ``ORG/NAME`` on the hub, None where that is not known.
        entries: of its own card's head, see :data:`INHERITED`.
    """

    name: str
    hub: str | None
    entries: Mapping[str, Any]


def card_path(out: Path, given: str | None, overwrite: bool) -> Path:
    """Where the card goes: ``given``, or README.md beside the file, which is the hub's name for it.

    Raises:
        PT2Error: it is there already.
    """
    path = Path(given) if given else out.parent / CARD
    if path.exists() and not overwrite:
        raise PT2Error(f"{path} is there already: give another with --card FILE, or --overwrite")
    return path


def read_base(folder: Path, hub: str | None = None) -> Base:
    """What is known of the source model from its folder.

    Args:
        hub: its name on the hub, where the folder is not the hub's own.
    """
    found = hub_name(folder)
    entries: dict[str, Any] = {}
    card = folder / CARD
    if card.is_file():
        text, _ = clean_card(card.read_bytes())
        entries = _head(text or "")
    kept = {key: entries[key] for key in INHERITED if entries.get(key)}
    return Base(model_name(folder), hub or (found[0] if found else None), kept)


def _head(text: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())


def write_card(path: Path, report: ExportReport, artifact: Artifact, base: Base) -> None:
    """Write the card; huggingface_hub reads it back first, so that the hub will take it.

    Raises:
        PT2Error: the card would not be accepted, or cannot be written.
    """
    from huggingface_hub import ModelCard

    text = card_text(report, artifact, base)
    try:
        ModelCard(text)
    except (ValueError, TypeError) as e:
        raise PT2Error(f"the hub would not take the card of {base.name}: {e}") from e
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def card_text(report: ExportReport, artifact: Artifact, base: Base) -> str:
    """The card: YAML for the hub between two lines of dashes, then Markdown for people."""
    from huggingface_hub import ModelCardData

    more: dict[str, Any] = dict(base.entries)
    if base.hub is not None:
        more |= {"base_model": base.hub, "base_model_relation": "quantized"}
    data = ModelCardData(
        pipeline_tag="text-generation", library_name="gguf", tags=list(TAGS), **more
    )
    kind = report.type.upper()
    source = f"[{base.hub}](https://huggingface.co/{base.hub})" if base.hub else base.name
    licence = base.entries.get("license")
    stated = f"Licence of the base model: {licence}." if licence else (
        "The base model's folder states no licence: look it up before you publish this."
    )  # fmt: skip
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {base.name}, ternary ({kind}, GGUF)\n",
        f"{source} with ternary weights `alpha * T + mu`, T of {_levels(artifact)}, made by post-"
        f"training ternarization (pt2-llm). {stated}\n",
        _size_table(report),
        "## How it was made\n",
        _recipe(artifact),
        "## How close it is\n",
        _figures(report, artifact),
        "## How to run it\n",
        _commands(report),
    ]
    return "\n".join(parts)


def _levels(artifact: Artifact) -> str:
    four = any(m.get("levels") == 4 for m in artifact.matrices.values())
    return "{-1, 0, 1, 2}" if four else "{-1, 0, 1}"


def _size_table(report: ExportReport) -> str:
    names = ", ".join(f"`{f.name}`" for f in report.files)
    rows = {
        "file": names,
        "size": f"{human_bytes(report.file_bytes)} (1/{report.f16_bytes / report.file_bytes:.1f} "
        "of F16)",
        "bits per parameter": f"{report.bpw:.3f} of the whole file, {report.ternary_bpw:.3f} of "
        f"its {report.ternary_parameters:,} ternary weights",
        "parameters": f"{report.parameters:,}",
    }
    if report.mixed:
        rows["mixed precision"] = report.mixed
    head = "| | |\n|---|---|\n"
    return head + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _recipe(artifact: Artifact) -> str:
    settings = artifact.manifest["settings"]
    steps = [words for key, words in _STEPS.items() if settings.get(key)]
    text = artifact.manifest["calibration"]
    lines = [
        f"- Method: PT²-LLM; {'; '.join(steps) or 'the plain start'}; order {settings['order']}, "
        f"blocks of {settings['block_size']} columns."
    ]
    if text.get("source"):
        samples, length = text.get("samples"), text.get("seqlen")
        lines.append(f"- Calibration: {text['source']}, {samples} windows of {length} tokens.")
    if kept := artifact.manifest["kept"]:
        lines.append(f"- {len(kept)} linears are not ternary.")
    return "\n".join(lines) + "\n"


def _figures(report: ExportReport, artifact: Artifact) -> str:
    lines = []
    matrices = artifact.matrices.values()
    scale = sum(m.get("norm_x", 0.0) for m in matrices)
    if scale:
        error = sum(m["E_x"]["final"] for m in matrices if "final" in m.get("E_x", {})) / scale
        lines.append(
            f"- Relative squared output error of the linears, before any refinement: {error:.4f}."
        )
    if held := artifact.manifest.get("refinement", {}).get("after"):
        lines.append(
            f"- On held-out text: perplexity {held['perplexity']:.3f}, full precision "
            f"{held['teacher_perplexity']:.3f}; KL {held['kl']:.4f} nats per token; same most "
            f"likely token {held['same_top']:.1%}."
        )
    if report.error is not None:
        lines.append(
            f"- {report.type.upper()} rounds alpha and mu: {report.error:.2%} RMS of the weights."
        )
    if report.proof is not None:
        lines.append(f"- The file in llama.cpp against the ternary model: {report.proof.line()}.")
    if report.verified:
        lines.append("- Every tensor was read back bit for bit.")
    lines.append("- Ternary weights cost quality: compare it with the base model on your own task.")
    return "\n".join(lines) + "\n"


def _commands(report: ExportReport) -> str:
    name = Path(report.files[0].name)
    ours = any(kind in formats.NAMES for kind in (report.type.upper(), *_types(report)))
    tool = "llama-cli" if report.chat else "llama-completion"
    prompt = () if report.chat else ("-no-cnv", "-p", "The river", "-n", 64)
    if not ours:
        return f"With any llama.cpp:\n\n```\n{command(tool, '-m', name, *prompt)}\n```\n"
    lines = [
        "pip install pt2-llm",
        "pt2-llama build",
        command("pt2-llama", "run", tool, "-m", name, *prompt),
    ]
    if report.chat:
        lines.append(command("pt2-llama", "serve", name))
    block = "\n".join(lines)
    return f"Its type needs the llama.cpp that pt2-llm builds:\n\n```\n{block}\n```\n"


def _types(report: ExportReport) -> list[str]:
    return [kind for _, _, kind, _ in report.others]
