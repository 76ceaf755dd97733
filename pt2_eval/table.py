"""One row per model, and the rows as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pt2_eval.measure import Divergence, Perplexity


@dataclass
class Row:
    """What was measured of one model; what was not is None or empty."""

    name: str
    kind: str
    size: int
    papers: dict[str, Perplexity] = field(default_factory=dict)
    llama: dict[str, Perplexity] = field(default_factory=dict)
    divergence: dict[str, Divergence] = field(default_factory=dict)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def average(self, metric: str = "acc") -> float | None:
        """Mean accuracy over the tasks that have the metric."""
        values = [t[metric] for t in self.tasks.values() if metric in t]
        return sum(values) / len(values) if values else None


def markdown(rows: list[Row], reference: str | None = None) -> str:
    """A Markdown table; ``reference`` names the row to which ratios are given."""
    base = next((r for r in rows if r.name == reference), None)
    columns: list[tuple[str, Any]] = [("model", lambda r: r.name)]
    # An artifact holds no embeddings: its size is not that of a model.
    columns.append(("MB", lambda r: "" if r.kind == "artifact" else f"{r.size / 1e6:.2f}"))
    for text in dict.fromkeys(t for r in rows for t in (*r.papers, *r.llama)):
        columns += _text_columns(text, base)
    for task in dict.fromkeys(t for r in rows for t in r.tasks):
        columns.append((task, lambda r, t=task: _accuracy(r.tasks.get(t))))
    if any(r.tasks for r in rows):
        columns.append(("average", lambda r: _percent(r.average())))
    columns = [(title, cell) for title, cell in columns if any(cell(r) for r in rows)]
    lines = ["| " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("|---" * len(columns) + "|")
    lines += ["| " + " | ".join(cell(r) for _, cell in columns) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def _text_columns(text: str, base: Row | None) -> list[tuple[str, Any]]:
    def ppl(row: Row, which: str) -> str:
        value = getattr(row, which).get(text)
        if value is None:
            return ""
        known = getattr(base, which).get(text) if base is not None else None
        ratio = f" ({value.value / known.value:.3f}x)" if known and base is not row else ""
        return f"{value.value:.3f} ± {value.error:.3f}{ratio}"

    def kl(row: Row) -> str:
        d = row.divergence.get(text)
        return f"{d.kl:.4f} ± {d.error:.4f}" if d else ""

    def same(row: Row) -> str:
        d = row.divergence.get(text)
        return f"{d.same_top:.1%}" if d else ""

    return [
        (f"{text}: papers' perplexity", lambda r: ppl(r, "papers")),
        (f"{text}: llama.cpp's", lambda r: ppl(r, "llama")),
        (f"{text}: KL", kl),
        (f"{text}: same top", same),
    ]


def _accuracy(values: dict[str, float] | None) -> str:
    return _percent(values.get("acc")) if values else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
