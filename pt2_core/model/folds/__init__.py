"""What column orders fold into, one file a family of architectures.

A new file with a ``FAMILY`` in it is found by itself; docs/howto/architecture.md writes one. A
model that is in none of them is quantised in natural order, which needs no fold.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pt2_core.model.folds.family import Family


@cache
def families() -> dict[str, Family]:
    """``model_type`` -> its family.

    Raises:
        ValueError: two families claim the same model type.
    """
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is None:
            continue
        for kind in family.model_types:
            if kind in found:
                raise ValueError(f"two files of {__name__} claim the model type {kind}")
            found[kind] = family
    return found
