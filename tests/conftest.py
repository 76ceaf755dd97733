"""Fixtures that several test files share; what they are made of is in their subject's module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench_support import Setup, configurer
from pt2_llama_support import stand_in_places

from pt2_llama.cache import Places


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """pt2-llama's cache with a tiny source, and a PATH whose cmake and compilers are stand-ins."""
    return stand_in_places(tmp_path, monkeypatch)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Makes configurations of pt2-bench that run fake tools on fast.gguf in tmp_path."""
    return configurer(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes a small model and its artifact, once for each set of arguments: only to be read."""
    from export_support import model_maker  # here: most other tests need no torch

    return model_maker(tmp_path_factory.mktemp)
