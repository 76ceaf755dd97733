"""`pt2-bench compare a.json b.json`: what changed between two runs, and what of it is noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from llamacpp_bench.report import figure
from llamacpp_bench.results import Model, Results, load_results
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes
from pt2_core.words import screen


@dataclass(frozen=True)
class Difference:
    """One figure in both runs. `error_a`, `error_b`: standard deviations (0: exact).

    `significant` is None where an error is unknown.
    """

    model: str
    what: str
    a: float
    b: float
    error_a: float | None
    error_b: float | None

    @property
    def change(self) -> float:
        """Relative change from a to b."""
        return self.b / self.a - 1 if self.a else math.inf

    @property
    def significant(self) -> bool | None:
        """Whether the intervals of two standard errors around a and b are apart."""
        if self.error_a is None or self.error_b is None:
            return None
        return abs(self.b - self.a) > 2 * (self.error_a + self.error_b)


def compare(a: Results, b: Results) -> list[Difference]:
    """Differences of the models that both runs have, by name.

    Speeds are compared by their means with the standard errors of these; sizes are exact.

    Raises:
        PT2Error: the runs have no model in common.
    """
    other = {m.name: m for m in b.models}
    common = [(m, other[m.name]) for m in a.models if m.name in other]
    if not common:
        names = ", ".join(m.name for m in a.models), ", ".join(other)
        raise PT2Error(f"the two runs have no model in common: {names[0]} against {names[1]}")
    out: list[Difference] = []
    for x, y in common:
        for test in a.tests():
            if a.values(x.name, test) and b.values(y.name, test):
                s, t = a.summary(x.name, test), b.summary(y.name, test)
                errors = [v.stdev / math.sqrt(v.n) if v.n > 1 else None for v in (s, t)]
                what = f"{test} (tokens/s)"
                out.append(Difference(x.name, what, s.mean, t.mean, errors[0], errors[1]))
        out += _perplexities(a, b, x, y)
        out.append(Difference(x.name, "size (bytes)", x.file_bytes, y.file_bytes, 0.0, 0.0))
    return out


def _perplexities(a: Results, b: Results, x: Model, y: Model) -> list[Difference]:
    """Perplexities of the same protocol, window and text; others cannot be compared."""
    if any(a.config.get(k) != b.config.get(k) for k in ("text_sha256", "chunks")):
        return []
    theirs = {(p.protocol, p.context): p for p in y.perplexity}
    return [
        Difference(x.name, f"PPL {p.protocol}", p.ppl, q.ppl, p.error, q.error)
        for p in x.perplexity
        if (q := theirs.get((p.protocol, p.context)))
    ]


def remarks(a: Results, b: Results) -> list[str]:
    """What makes the two runs differ besides what was to be compared."""
    out = []
    for key in ("cpu", "cores", "gpus", "system"):
        if a.machine.get(key) != b.machine.get(key):
            out.append(f"{key} differs: {a.machine.get(key)} against {b.machine.get(key)}")
    for key in ("build_commit", "variant", "description"):
        if a.build.get(key) != b.build.get(key):
            out.append(f"build {key} differs: {a.build.get(key)} against {b.build.get(key)}")
    for key in ("threads", "repack", "prompt", "gen", "gpu_layers"):
        if a.config.get(key) != b.config.get(key):
            out.append(f"{key} differs: {a.config.get(key)} against {b.config.get(key)}")
    if any(a.config.get(k) != b.config.get(k) for k in ("text_sha256", "chunks")):
        out.append("the texts of the perplexity differ, so perplexities are left out")
    for name, r in (("the first", a), ("the second", b)):
        if not r.complete:
            out.append(f"{name} run was not finished")
    return out


def print_comparison(path_a: Path, path_b: Path, console: Console | None = None) -> None:
    """Read two results files and print what differs."""
    a, b = load_results(path_a), load_results(path_b)
    console = console or screen()
    table = Table(title=f"{path_a} -> {path_b}", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("model", "figure", "first", "second", "change", ""):
        left = name in ("model", "figure", "")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for d in compare(a, b):
        table.add_row(d.model, d.what, *_shown(d), f"{d.change:+.1%}", verdict(d))
    console.print(table)
    console.print("Significant: intervals of two standard errors do not overlap.")
    for line in remarks(a, b):
        console.print(f"note: {line}", markup=False)


def verdict(d: Difference) -> str:
    if d.a == d.b:
        return "same"
    return {None: "one round: unknown", True: "significant", False: "within noise"}[d.significant]


def _shown(d: Difference) -> tuple[str, str]:
    if d.what.startswith("size"):
        return human_bytes(d.a), human_bytes(d.b)
    return tuple(  # type: ignore[return-value]
        figure(v) + ("" if e is None else f" ± {figure(e)}")
        for v, e in ((d.a, d.error_a), (d.b, d.error_b))
    )
