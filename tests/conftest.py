"""Fixtures that several test files share, and the one policy for builds of llama.cpp.

A test that needs one is marked ``llama`` (or ``llama("stock")``, the unmodified one). Where that
build is missing, or older than the overlay, the test fails with the command to run: a test that
is skipped because something is stale has tested nothing. ``pytest --no-llama`` leaves them out.

:data:`QUICK` is what ``make quick`` runs, besides tests that are marked ``quick`` themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from bench_support import Setup, configurer
from pt2_llama_support import stand_in_places

from pt2_core.errors import PT2Error
from pt2_llama import api
from pt2_llama.cache import Places

# Files of a few seconds of processor time that between them touch every package.
_QUICK_FILES = """
    test_artifact test_bench_compare test_bench_files test_bench_names test_bench_placement
    test_bench_report test_checkpoint test_commands test_converter_vocab test_export_fold
    test_export_types test_fingerprint test_formats test_house test_mixed test_model_view
    test_progress test_pt2_llama_bindings test_pt2_llama_c_source test_pt2_llama_edits
    test_ternary
"""
QUICK = frozenset(_QUICK_FILES.split())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--no-llama``."""
    text = "leave out the tests that need a build of llama.cpp (without it they fail if none fits)"
    parser.addoption("--no-llama", action="store_true", help=text)


def variants_of(item: pytest.Item) -> list[str]:
    """The builds that a test is marked to need."""
    return [v for mark in item.iter_markers("llama") for v in mark.args or ("cpu",)]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is quick, before ``-m`` chooses, and leave out what ``--no-llama`` leaves out."""
    for item in items:
        if item.path.stem in QUICK:
            item.add_marker(pytest.mark.quick)
    if config.getoption("--no-llama"):
        for item in filter(variants_of, items):
            item.add_marker(pytest.mark.skip(reason="left out by --no-llama"))


@cache
def missing_build(variant: str) -> str | None:
    """Why there is no build of a variant, None if there is one."""
    try:
        api.require_build(variant)
    except PT2Error as e:
        return str(e)
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose build is missing, before any of its fixtures is made."""
    if item.config.getoption("--no-llama"):
        return
    for variant in variants_of(item):
        if reason := missing_build(variant):
            pytest.fail(f"{reason} (or leave these tests out: pytest --no-llama)", pytrace=False)


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
