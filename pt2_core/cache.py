"""Where everything is kept that can be made again: builds, baselines, fingerprints."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$PT2_CACHE``, else ``$XDG_CACHE_HOME/pt2``, else ``~/.cache/pt2``, absolute."""
    if own := os.environ.get("PT2_CACHE"):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser().absolute() / "pt2"
    return Path.home() / ".cache" / "pt2"
