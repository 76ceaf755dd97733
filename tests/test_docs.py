"""The documents: links lead somewhere, what they name exists, decisions are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[1]
PAGES = sorted(
    p
    for p in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]
    if not {"out", "build", "llama.cpp"} & set(p.relative_to(ROOT).parts[:-1])
    or p.parent == ROOT / "third_party/llama.cpp"
)
# In backticks and with a folder and an ending: a file of this tree, unless it is only an example.
FILES = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|yml|md|c|h|cu|cuh|sh|toml))`")
EXACT = ["CONTRIBUTING.md", "docs/design.md", "docs/howto", "docs/adr"]


def pages(*where: str) -> list[Path]:
    return [p for p in PAGES if str(p.relative_to(ROOT)).startswith(where)]


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def test_the_pages_are_found():
    assert {"README.md", "docs/design.md", "docs/adr/README.md"} <= set(names(PAGES))
    assert "third_party/llama.cpp/FORMAT.md" in names(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", pages(*EXACT), ids=names(pages(*EXACT)))
def test_files_that_are_named_exist(page):
    """As the page writes them: from the root, from the overlay, or from one of its folders."""
    overlay = ROOT / "third_party/llama.cpp/overlay"
    tq = overlay / "ggml/src/ggml-cuda/tq"
    places = [ROOT, overlay.parent, overlay, overlay / "ggml/src", tq, page.parent]
    named = FILES.findall(page.read_text(encoding="utf-8"))
    assert [n for n in named if not any((place / n).exists() for place in places)] == []


def test_every_document_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    mine = [p for p in pages("docs/") if p.parent.name != "adr" and p.name != "index.md"]
    assert [p.name for p in mine if p.name not in index] == []


def test_decisions_are_numbered_short_and_listed():
    folder = ROOT / "docs/adr"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    found = sorted(folder.glob("0*.md"))
    assert [int(p.name[:4]) for p in found] == list(range(1, len(found) + 1))
    for page in found:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {page.name[:4]}: ")
        assert text.count("\n") <= 17, page.name
        assert [w for w in ("Asked for by.", "Decided.", "Costs.") if f"**{w}**" not in text] == []
        assert f"({page.name})" in listed


def test_make_has_the_targets_that_pages_name():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    for page in pages("README", "CONTRIBUTING", "docs/"):
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|^ *)make ([a-z]+)", text, re.M))
        assert named <= targets, page.name


def test_the_walk_is_at_most_eight_files_that_exist():
    """design.md's walk of one weight, whose table names a file a row."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    walk = text.split("## One weight, from safetensors to a token\n")[1].split("\n## ")[0]
    files = re.findall(r"^\| \d+ \| `([^`]+)`", walk, re.M)
    assert 3 <= len(files) <= 8
    assert [f for f in files if not (ROOT / f).is_file()] == []
    for file, functions in re.findall(r"^\| \d+ \| `([^`]+)` \| ([^|]+)\|", walk, re.M):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", functions):
            assert name.rpartition(".")[2] in source, f"{name} in {file}"
