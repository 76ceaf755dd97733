"""Read a small YAML file that somebody wrote by hand: a recipe, say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from pt2_core.errors import PT2Error
from pt2_core.files import first_double, read_bytes

MAX_BYTES = 1 << 17  # written by hand: far more than anybody needs; parsed in a second or two
MAX_DEPTH = 20


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (a few lines of them stand for gigabytes) and double keys."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not taken: write the value out")
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if (double := first_double(names)) is not None:
            raise yaml.YAMLError(f"{double!r} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file.

    Raises:
        PT2Error: missing, not UTF-8, not YAML, larger than MAX_BYTES, nested too deeply, with
            aliases, with a key given twice, or with a value that its tag does not allow.
    """
    raw = read_bytes(path, MAX_BYTES)
    try:
        return yaml.load(raw.decode("utf-8"), _Loader)
    except yaml.YAMLError as e:
        raise PT2Error(f"{Path(path)} is not valid YAML: {e}") from e
    except RecursionError as e:
        raise PT2Error(f"{Path(path)} is not valid YAML: it is nested too deeply") from e
    # What PyYAML's constructors let through: dates of no calendar, `!!bool x`, `!!int ""`, ...
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as e:
        raise PT2Error(f"{Path(path)} is not valid YAML: a value that cannot be read ({e})") from e
