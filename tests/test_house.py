"""The house's own rules: which room may know which, what a reader loads, how long a file is."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each package may import, besides itself. docs/design.md draws it.
BELOW = {
    "pt2_core": set(),
    "pt2_llama": {"pt2_core"},
    "quantize": {"pt2_core"},
    "export": {"pt2_core", "pt2_llama"},
    "llamacpp_bench": {"pt2_core", "pt2_llama"},
    "pt2_eval": {"pt2_core", "pt2_llama", "quantize"},
}
# The only arrows beside these, each of them in one place and inside a function.
NAMED = {
    ("quantize.cli", "export.preflight"): "what the exporter would refuse is refused first",
    ("export.prove", "quantize.proof_run"): "a proof that an older artifact lacks is made",
    ("llamacpp_bench.run.baselines", "export.converter"): "baselines of a folder are converted",
}
LONGEST = 600  # lines; about 400 ask for a second look


def source_files() -> dict[str, Path]:
    """Module name -> file, of everything that a wheel installs."""
    found = {}
    for package in BELOW:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if "llama.cpp" not in parts:  # the link to the overlay
                found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imports(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports anywhere: at its head, in a function, for types."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & known.keys() or {node.module}
    return found & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports; a package's front door is no step of a circle."""
    known = source_files()
    found = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[name] = {m for m in imports(tree, known) if m != name and m not in BELOW}
    assert len(found) > 100
    return found


def test_imports_lead_downwards(graph):
    wrong, used = [], set()
    for module, imported in graph.items():
        mine = module.partition(".")[0]
        for other in imported:
            package = other.partition(".")[0]
            if package == mine or package in BELOW[mine]:
                continue
            if (module, other) in NAMED:
                used.add((module, other))
            else:
                wrong.append(f"{module} imports {other}")
    assert not wrong
    assert used == NAMED.keys(), "an exception that nobody needs any more"


def test_there_is_no_circle_of_imports(graph):
    """Not even of imports inside functions or for type checkers, which hide a circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_a_circle_and_a_step_upwards_would_be_seen():
    """The two rules above find what they look for."""
    known = {name: Path() for name in ("a.x", "a.y", "a")}
    lazy = ast.parse("def f():\n    from a import y\n")
    typed = ast.parse("if TYPE_CHECKING:\n    import a.x\n")
    assert imports(lazy, known) == {"a.y"} and imports(typed, known) == {"a.x"}
    with pytest.raises(CycleError):
        TopologicalSorter({"a.x": {"a.y"}, "a.y": {"a.x"}}).prepare()


@pytest.mark.parametrize("package", ["pt2_core", "pt2_llama", "export", "llamacpp_bench"])
def test_who_only_reads_loads_no_torch(package):
    """Every module of these packages can be imported without torch and transformers."""
    modules = [m for m in source_files() if m.partition(".")[0] == package]
    code = (
        f"import importlib, sys\nfor m in {modules}:\n    importlib.import_module(m)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_files_are_short_enough_to_read():
    tests = {str(p): p for p in (ROOT / "tests").rglob("*.py")}
    lines = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for path in {**source_files(), **tests}.values()
    }
    assert {name: n for name, n in lines.items() if n > LONGEST} == {}


def test_the_quick_tests_are_files_that_exist():
    """A file that was renamed would silently leave ``make quick``."""
    from conftest import QUICK

    assert [name for name in sorted(QUICK) if not (ROOT / f"tests/{name}.py").is_file()] == []
