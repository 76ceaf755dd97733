"""The edit engine and the patched tree: an edit fits exactly, or nothing is built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_llama.edit_lists import parse_edits
from pt2_llama.edits import Edit, EditsDoNotFit, apply_edits
from pt2_llama.overlay import (
    Overlay,
    load_overlay,
    patched_files,
    stamp_digest,
    sync_patched,
)

LINES = st.lists(st.text("abc {}=;\t", max_size=12), min_size=1, max_size=12)


def edit(
    anchor: str, action: str = "replace", text: str = "NEW", inside: str | None = None
) -> Edit:
    return Edit("ggml/a.c", anchor, action, text, inside)  # type: ignore[arg-type]


@given(LINES, st.data())
def test_unique_marker_is_replaced_and_nothing_else(lines: list[str], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(lines)))
    text = "\n".join([*lines[:at], "x MARK y", *lines[at:]])
    assert apply_edits(text, [edit("MARK", text="new")]) == text.replace("MARK", "new")


@given(LINES, st.sampled_from(["before", "after"]), st.data(), st.booleans())
def test_insertions_are_whole_lines(
    lines: list[str], action: str, data: st.DataObject, last_newline: bool
) -> None:
    at = data.draw(st.integers(0, len(lines)))
    old = [*lines[:at], "  x MARK y", *lines[at:]]
    text = "\n".join(old) + ("\n" if last_newline else "")
    new = apply_edits(text, [edit("MARK", action, "one\ntwo")]).split("\n")
    where = at if action == "before" else at + 1
    expected = [*old[:where], "one", "two", *old[where:]]
    if last_newline or where == len(old):
        expected.append("")
    assert new == expected


@given(st.lists(st.sampled_from(["A", "B", "-"]), max_size=8), st.integers(0, 3))
def test_an_anchor_counts_in_the_body_that_is_named(names: list[str], which: int) -> None:
    """Every function has the same line; the one that is named is changed, the others are not."""
    functions = [f"int f{i}(int x) {{\n    same; // {n}\n}}" for i, n in enumerate(names)]
    text = "\n".join(functions)
    change = edit("    same;", text="    other;", inside=f"f{which}(")
    if which >= len(names):
        with pytest.raises(EditsDoNotFit, match="not found" if not names else "begins 0 bodies"):
            apply_edits(text, [change])
        return
    functions[which] = functions[which].replace("same", "other")
    assert apply_edits(text, [change]) == "\n".join(functions)


def test_inside_demands_one_body_and_one_anchor_in_it() -> None:
    text = "int f(int);\nint f(int x) {\n    a; a;\n}\nint g() {\n    f(1); b;\n}\nb;\n"
    for anchor, inside, message in [
        ("a;", "f(", r"'a;' occurs 2 times inside 'f\('; it stands in line 3, 3"),
        ("b;", "f(", r"'b;' occurs 0 times inside 'f\('; it stands in line 6, 8"),
        ("b;", "h(", r"'h\(' begins 0 bodies and not one"),
        ("b;", "int ", r"'int' begins 2 bodies and not one"),
    ]:
        with pytest.raises(EditsDoNotFit, match=message):
            apply_edits(text, [edit(anchor, inside=inside)])
    assert "f(1); c;" in apply_edits(text, [edit("b;", text="c;", inside="g(")])


def test_every_edit_that_does_not_fit_is_named_with_the_lines_next_to_it() -> None:
    text = "one line here\nanother place there\nthe same\nthe same\n"
    edits = [
        edit("one  line here"),
        edit("another place there"),
        edit("the same"),
        edit("the same", inside="f("),
        edit("place there"),
        edit("another place there\none line here"),
    ]
    with pytest.raises(EditsDoNotFit) as e:
        apply_edits(text, edits)
    assert [str(m) for m in e.value.misfits] == [
        "ggml/a.c: anchor 'one  line here' not found; nearest: line 1, 'one line here'",
        "ggml/a.c: anchor 'the same' occurs 2 times; make it longer or say inside what; "
        "it stands in line 3, 4",
        "ggml/a.c: 'f(' begins 0 bodies and not one",
        "ggml/a.c: anchor 'another place there...' not found; nearest: line 2, "
        "'another place there'; nearest: line 1, 'one line here'",
        "ggml/a.c: the edits at 'another place there' and 'place there' overlap; merge them",
    ]
    assert str(e.value).startswith("5 edits do not fit: ggml/a.c: anchor 'one  line here' not")
    assert str(e.value).endswith("expected the files of llama.cpp 0c1e57098")


@given(st.permutations([0, 1, 2]))
def test_order_of_the_list_does_not_matter(order: list[int]) -> None:
    # The second edit inserts the first one's anchor: looked up in the original, it stays unique.
    edits = [edit("alpha", text="1"), edit("beta", "before", "alpha"), edit("gamma", text="beta")]
    text = "alpha\nbeta\ngamma\n"
    assert apply_edits(text, [edits[i] for i in order]) == "1\nalpha\nbeta\nbeta\n"


def test_insertions_at_one_place_keep_the_order_of_the_list() -> None:
    edits = [edit("b", "before", "one"), edit("a", "after", "two"), edit("b", "before", "three")]
    assert apply_edits("a\nb\n", edits) == "a\none\ntwo\nthree\nb\n"


def test_an_anchor_that_ends_with_a_newline_ends_on_its_own_line() -> None:
    assert apply_edits("a\nb\nc\n", [edit("a\n", "after", "new")]) == "a\nnew\nb\nc\n"


@pytest.mark.parametrize("text", ["", "anch", "x\ny\n"])
def test_missing_anchor_names_file_anchor_and_version(text: str) -> None:
    with pytest.raises(PT2Error, match=r"ggml/a\.c: anchor 'anchor' not found.*0c1e57098"):
        apply_edits(text, [edit("anchor")])


def test_ambiguous_anchor_is_refused_also_when_occurrences_overlap() -> None:
    with pytest.raises(PT2Error, match="occurs 2 times; make it longer or say inside what"):
        apply_edits("aXa aXa", [edit("aXa")])
    with pytest.raises(PT2Error, match="occurs 2 times"):
        apply_edits("aXaXa", [edit("aXa")])


def test_overlapping_edits_are_refused() -> None:
    with pytest.raises(PT2Error, match="overlap; merge them"):
        apply_edits("int a = 1;", [edit("int a"), edit("a = 1")])
    with pytest.raises(PT2Error, match="overlap"):
        apply_edits("one\ntwo\n", [edit("one\ntwo"), edit("two", "before", "x")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid YAML"),
        ("a: 1", "must be a list"),
        ("- 5", "edit 1: expected a mapping"),
        ("- {file: a, anchor: b, replace: c}\n- {file: a, anchor: b}", "edit 2: exactly one of"),
        ("- {file: a, anchor: b, before: c, after: d}", "exactly one of"),
        ("- {file: a, anchor: b, replace: c, colour: red}", "unknown key 'colour'"),
        ("- {file: a, anchor: 3, replace: c}", "anchor must be a text"),
        ("- {anchor: b, replace: c}", "file must be a text"),
        ("- {file: a, anchor: b, replace: c, occurrence: 1}", "unknown key 'occurrence'"),
        ("- {file: a, anchor: b, replace: c, for: all}", "for: is one of types, activations, once"),
        (
            "- {file: a, anchor: b, replace: '{nam}', for: types}",
            "unknown placeholder {nam}; known",
        ),
        ("- {file: a, anchor: b, replace: '{id}', for: once}", "unknown placeholder {id}; known"),
        ("- {file: a, anchor: b, replace: '{layout}', for: activations}", "placeholder {layout}"),
        ("- {file: a, anchor: b, replace: c, inside: 1}", "inside must be a text, or a list"),
        ("- {file: a, anchor: b, replace: c, inside: []}", "inside must be a text, or a list"),
        ("- {file: a, anchor: b, replace: c, inside: [d, 1]}", "inside must be a text, or a list"),
        ("- {file: a, anchor: b, replace: c, inside: [d, ' ']}", "a text of inside is empty"),
        ("- {file: ../a, anchor: b, replace: c}", "plain path inside"),
        ("- {file: /a, anchor: b, replace: c}", "plain path inside"),
        ("- {file: a, anchor: '', replace: c}", "the anchor is empty"),
    ],
)
def test_malformed_lists_say_which_edit_and_what(text: str, message: str) -> None:
    with pytest.raises(PT2Error, match=message):
        parse_edits(text)


def test_empty_and_missing_lists_are_no_edits(tmp_path: Path) -> None:
    assert parse_edits("") == [] == parse_edits("# only a comment\n")
    assert load_overlay(tmp_path) == Overlay({}, ())


# -- the tree ------------------------------------------------------------------------------------


@pytest.fixture
def pristine(tmp_path: Path) -> Path:
    root = tmp_path / "pristine"
    for path, text in {
        "CMakeLists.txt": "project(x)\n",
        "ggml/include/ggml.h": "enum {\n    COUNT = 43,\n};\n",
        "src/llama.cpp": "int main() { return 0; }\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        os.utime(root / path, (1_000_000, 1_000_000))
    return root


def changes(count: str = "COUNT = 123,", new: bytes = b"int tq;\n") -> Overlay:
    edit = Edit("ggml/include/ggml.h", "COUNT = 43,", "replace", count)
    return Overlay({"ggml/src/tq.c": new}, (edit,))


def times(tree: Path) -> dict[str, int]:
    files = [p for p in tree.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {p.relative_to(tree).as_posix(): p.stat().st_mtime_ns for p in files}


def test_sync_writes_only_what_changes(pristine: Path, tmp_path: Path) -> None:
    tree = tmp_path / "patched"
    assert sync_patched(pristine, tree, changes()) == 4
    assert "COUNT = 123," in (tree / "ggml/include/ggml.h").read_text()
    assert (tree / "ggml/src/tq.c").read_bytes() == b"int tq;\n"
    assert stamp_digest(tree) == changes().digest()

    for path in times(tree):
        os.utime(tree / path, (2_000_000, 2_000_000))
    before = times(tree)
    assert sync_patched(pristine, tree, changes()) == 0
    assert times(tree) == before
    assert sync_patched(pristine, tree, changes(new=b"int tq2;\n")) == 1
    assert [p for p, t in times(tree).items() if t != before[p]] == ["ggml/src/tq.c"]


def test_sync_takes_back_what_the_overlay_no_longer_has(pristine: Path, tmp_path: Path) -> None:
    tree = tmp_path / "patched"
    sync_patched(pristine, tree, changes())
    (tree / "src/llama.cpp").write_text("tampered")
    sync_patched(pristine, tree, Overlay({}, ()))
    assert not (tree / "ggml/src").exists()
    for path in times(pristine):
        assert (tree / path).read_bytes() == (pristine / path).read_bytes()


def test_a_patched_tree_is_not_patched_again(pristine: Path, tmp_path: Path) -> None:
    tree = tmp_path / "patched"
    sync_patched(pristine, tree, changes())
    with pytest.raises(PT2Error, match="already patched"):
        sync_patched(tree, tmp_path / "twice", changes())
    with pytest.raises(PT2Error, match="not found"):
        apply_edits((tree / "ggml/include/ggml.h").read_text(), changes().edits)


def test_a_failing_edit_leaves_the_tree_and_its_stamp(pristine: Path, tmp_path: Path) -> None:
    tree = tmp_path / "patched"
    sync_patched(pristine, tree, changes())
    before = times(tree)
    bad = Overlay({}, (Edit("src/llama.cpp", "no such text", "replace", ""),))
    with pytest.raises(PT2Error, match=r"src/llama\.cpp: anchor 'no such text' not found"):
        sync_patched(pristine, tree, bad)
    assert times(tree) == before and stamp_digest(tree) == changes().digest()


def test_overlay_may_not_replace_a_file_of_the_source(pristine: Path) -> None:
    with pytest.raises(PT2Error, match=r"src/llama\.cpp exists in llama\.cpp already"):
        patched_files(pristine, Overlay({"src/llama.cpp": b""}, ()))


def test_all_files_that_edits_do_not_fit_are_named_at_once(pristine: Path) -> None:
    edits = (
        Edit("src/none.cpp", "a", "replace", "b", where="edits.yaml, edit 1"),
        Edit("src/llama.cpp", "int main", "replace", "b", where="edits.yaml, edit 2"),
        Edit("src/llama.cpp", "int maim() {", "replace", "b", where="edits.yaml, edit 3"),
        Edit("ggml/include/ggml.h", "NO", "replace", "b", where="edits-cuda.yaml, edit 1"),
    )
    with pytest.raises(EditsDoNotFit) as e:
        patched_files(pristine, Overlay({}, edits))
    assert [str(m) for m in e.value.misfits] == [
        "edits.yaml, edit 1: src/none.cpp: not in the source tree",
        "edits.yaml, edit 3: src/llama.cpp: anchor 'int maim() {' not found; nearest: line 1, "
        "'int main() { return 0; }'",
        "edits-cuda.yaml, edit 1: ggml/include/ggml.h: anchor 'NO' not found",
    ]


def test_one_item_may_name_several_bodies() -> None:
    made = parse_edits("- {file: a, anchor: b, replace: c, inside: [f, g]}", "x.yaml")
    assert [(e.inside, e.where) for e in made] == [("f", "x.yaml, edit 1"), ("g", "x.yaml, edit 1")]


def test_a_text_for_types_is_written_once_per_type() -> None:
    item = "- {file: a, anchor: b, for: %s, after: %s}"
    (made,) = parse_edits(item % ("types", r'"case T_{NAME}: {id} {file_type} {bpw} {sizes};\n"'))
    lines = [
        f"case T_{t.name}: {t.id} {t.file_type} {8 * t.nbytes / t.block:g} "
        f"{' + '.join(map(str, t.fields.values()))};"
        for t in formats.TYPES.values()
    ]
    assert made.text.splitlines() == lines and len(lines) > 1
    assert parse_edits("- {file: a, anchor: b, for: once, after: 'N = {count}'}")[0].text == (
        f"N = {max(t.id for t in formats.ALL) + 1}"
    )
    (made,) = parse_edits("- {file: a, anchor: b, for: activations, after: 'T_{NAME}; { NAME }; '}")
    assert made.text == "T_Q8_T; { NAME }; "
    # without for, braces are what they are
    assert parse_edits("- {file: a, anchor: b, after: '{NAME}'}")[0].text == "{NAME}"


def test_all_lists_of_edits_are_joined(tmp_path: Path) -> None:
    (tmp_path / "edits.yaml").write_text("- {file: a, anchor: b, replace: c}")
    (tmp_path / "edits-cuda.yaml").write_text("- {file: d, anchor: e, replace: f}")
    (tmp_path / "notes.yaml").write_text("not a list of edits")
    assert [e.file for e in load_overlay(tmp_path).edits] == ["d", "a"]
    (tmp_path / "edits-cuda.yaml").write_text("- {file: d}")
    with pytest.raises(PT2Error, match=r"edits-cuda\.yaml, edit 1: exactly one"):
        load_overlay(tmp_path)


def test_digest_follows_content_and_not_comments(tmp_path: Path) -> None:
    item = "- file: a\n  anchor: b\n  replace: c\n"
    (tmp_path / "overlay" / "ggml").mkdir(parents=True)
    (tmp_path / "edits.yaml").write_text(item)
    (tmp_path / "overlay" / "ggml" / "tq.c").write_text("1")
    first = load_overlay(tmp_path).digest()
    (tmp_path / "edits.yaml").write_text("# a comment\n" + item + "  why: because\n")
    (tmp_path / "overlay" / "ggml" / "tq.c~").write_text("an editor's backup")
    (tmp_path / "overlay" / ".hidden").write_text("x")
    assert load_overlay(tmp_path).digest() == first
    (tmp_path / "overlay" / "ggml" / "tq.c").write_text("2")
    second = load_overlay(tmp_path).digest()
    (tmp_path / "edits.yaml").write_text(item.replace("replace: c", "replace: d"))
    assert len({first, second, load_overlay(tmp_path).digest()}) == 3


def test_a_damaged_stamp_counts_as_none(tmp_path: Path) -> None:
    for text in ("", "[]", '{"overlay": 5}'):
        (tmp_path / ".pt2-overlay.json").write_text(text)
        assert stamp_digest(tmp_path) is None
