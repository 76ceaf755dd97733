"""The report of a run as files: results.md, results.csv and the plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from llamacpp_bench.results import Results
from llamacpp_bench.show.look import plain_tests, protocols
from llamacpp_bench.show.plots import (
    quality_figure,
    scaling_figure,
    scaling_points,
    speed_figure,
)
from llamacpp_bench.show.published import Published
from llamacpp_bench.show.speedup import speedup_figure
from llamacpp_bench.show.tables import markdown, to_csv
from pt2_core.files import atomic_path

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "savefig.dpi": 200,
}


def write_reports(results: Results, out: Path, published: Published | None = None) -> None:
    """Write results.md, results.csv and the plots into the folder `out`."""
    plots = write_plots(results, out, published)
    write_text(out / "results.md", markdown(results, [p.name for p in plots]))
    write_text(out / "results.csv", to_csv(results))


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_plots(results: Results, out: Path, published: Published | None = None) -> list[Path]:
    """Write speed.png, and the other plots of what was measured.

    These are speedup.png (several shapes with ratios), depth.png, batch.png, size-perplexity.png.

    Returns:
        The files written.
    """
    written = []
    with matplotlib.rc_context(rc=STYLE):  # type: ignore[arg-type]  # its keys are literals
        if plain_tests(results):
            written.append(_save(speed_figure(results), out / "speed.png"))
            if published is not None or len(results.groups()) > 1:
                fig = speedup_figure(results, published)
                written.append(_save(fig, out / "speedup.png"))
        for mark, name in (("@d", "depth.png"), ("@b", "batch.png")):
            if any(scaling_points(results, m, mark)[0][1:] for m in results.models):
                written.append(_save(scaling_figure(results, mark), out / name))
        if protocols(results):
            written.append(_save(quality_figure(results), out / "size-perplexity.png"))
    return written


def _save(fig: Figure, path: Path) -> Path:
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", bbox_inches="tight")
    plt.close(fig)
    return path
