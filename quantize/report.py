"""Draw an artifact's errors per block and stage, as the paper's figure 3 does per step."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pt2_core.artifact.folder import MANIFEST, read_manifest
from pt2_core.artifact.manifest import STAGES, block_of, check_errors, kind_of
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path

TITLES = {"E_w": "weight error $E_w$ (share of $|W|^2$)",
          "E_x": "output error $E_x$ (share of $|Wx|^2$)"}  # fmt: skip
SCALES = {"E_w": "norm_w", "E_x": "norm_x"}
ORDER = STAGES  # JSON sorts by name


def write_report(artifact: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Draw E_w and E_x per decoder block and stage, and per kind of linear at the end.

    Args:
        artifact: the artifact's folder; one that is not complete shows the blocks it has.
        out: ``.html`` (with the figures as SVG and the settings) or ``.png``.

    Raises:
        PT2Error: no artifact there, no block done yet, or a name with another ending.
    """
    out = Path(out)
    manifest = read_manifest(Path(artifact))
    if not manifest["matrices"]:
        raise PT2Error(f"{artifact} has no finished block to draw")
    check_errors(manifest, Path(artifact) / MANIFEST)
    if out.suffix not in (".html", ".png"):
        raise PT2Error(f"{out}: the name must end in .html or .png")
    figure = _figure(manifest)
    with atomic_path(out) as tmp:
        if out.suffix == ".png":
            figure.savefig(tmp, format="png", dpi=150)
        else:
            svg = io.StringIO()
            figure.savefig(svg, format="svg")
            tmp.write_text(_page(manifest, svg.getvalue()), encoding="utf-8")


def stage_errors(manifest: dict[str, Any], key: str) -> dict[str, list[float]]:
    """Per stage, the blocks' errors as shares of the blocks' norms.

    Args:
        key: ``E_w`` or ``E_x``.

    Returns:
        stage -> one value per decoder block that has ternary linears, in the blocks' order.
    """
    result: dict[str, list[float]] = {}
    for _, members in sorted(_groups(manifest, block_of).items()):
        for stage, value in _shares(members, key):
            result.setdefault(stage, []).append(value)
    return result


def _groups(manifest: dict[str, Any], label: Any) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for name, m in manifest["matrices"].items():
        groups.setdefault(label(name), []).append(m)
    return groups


def _shares(members: list[dict[str, Any]], key: str) -> Iterator[tuple[str, float]]:
    scale = sum(m[SCALES[key]] for m in members) or 1.0
    for stage in sorted(members[0][key], key=ORDER.index):
        yield stage, sum(m[key][stage] for m in members) / scale


def _figure(manifest: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    blocks = sorted(_groups(manifest, block_of))
    kinds = _groups(manifest, kind_of)
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, key in enumerate(("E_w", "E_x")):
        left, right = axes[row]
        for stage, values in stage_errors(manifest, key).items():
            style = "--" if stage == "final" else "-"
            left.plot(blocks, values, style, marker="o", markersize=3, label=stage)
        left.set(title=TITLES[key], xlabel="decoder block")
        left.legend(fontsize=8)
        shares = {kind: dict(_shares(members, key)) for kind, members in kinds.items()}
        stages = list(next(iter(shares.values())))
        width = 0.8 / len(stages)
        for i, stage in enumerate(stages):
            at = [j + i * width for j in range(len(shares))]
            right.bar(at, [s[stage] for s in shares.values()], width, label=stage)
        middle = [j + 0.4 - width / 2 for j in range(len(shares))]
        right.set_xticks(middle, list(shares), rotation=20)
        right.set(title="by kind of linear, all blocks")
        for axis in (left, right):
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
    return figure


def _page(manifest: dict[str, Any], svg: str) -> str:
    settings = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in sorted(manifest["settings"].items())
    )
    name = html.escape(str(manifest["model"].get("architecture", "")))
    return (
        "<!doctype html><meta charset='utf-8'><title>pt2-quantize report</title>"
        "<style>body{font-family:sans-serif;max-width:75em;margin:2em auto}svg{width:100%;"
        "height:auto}td{padding:0 1em 0 0;font-size:90%}</style>"
        f"<h1>Errors per block and stage</h1><p>{name}, {len(manifest['matrices'])} ternary "
        "linears. The stages are errors of each block of columns against the weights it was given; "
        "<i>final</i> is the whole matrix against its original weights, for which error "
        f"compensation counts as well.</p>{svg[svg.index('<svg') :]}<h2>Settings</h2>"
        f"<table>{settings}</table>\n"
    )
