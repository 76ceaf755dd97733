"""Speeds that others state, as one YAML file has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.schema import Mismatch, mapping, number, record, text
from pt2_core.yaml_file import read_yaml


@dataclass(frozen=True)
class Published:
    """Speeds relative to a 2-bit baseline that others state: `speedup[shape][test]`."""

    name: str
    source: str
    what: str
    speedup: dict[str, dict[str, float]]


_PUBLISHED = record(
    {"name": text(), "source": text(), "what": text(), "speedup": mapping(mapping(number(0, 1e6)))}
)


def load_published(path: str | Path) -> Published:
    """Read such a file.

    Raises:
        PT2Error: it is not there, not YAML, or something is missing or not a number.
    """
    if not Path(path).is_file():
        raise PT2Error(f"{path}: No such file")
    raw = read_yaml(path)
    try:
        _PUBLISHED(raw, "")
    except Mismatch as e:
        wanted = "name, source, what and speedup (shape: test: number)"
        raise PT2Error(f"{path} needs {wanted}: {e}") from e
    speedup = {s: {t: float(v) for t, v in tests.items()} for s, tests in raw["speedup"].items()}
    return Published(raw["name"], raw["source"], raw["what"], speedup)
