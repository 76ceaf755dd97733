"""Where the body of a function ends: through comments, literals and the preprocessor."""

from __future__ import annotations

import pytest

from pt2_llama.c_source import blanked, bodies, line_of, outermost


def body(text: str, head: str) -> str:
    (span,) = bodies(text, head)
    return text[slice(*span)]


@pytest.mark.parametrize(
    "inner",
    [
        "a;",
        "if (x) { b; } else { c; }",
        "// }",
        "// } \\\n still a comment }",
        "/* } \n } */",
        'char * s = "}\\"}";',
        "char c = '}'; char d = '\\''; int n = 1'000'000;",
        'auto s = R"(} " })"; auto t = u8R"x( )" } )x";',
        "#define END }\n",
        "#define END \\\n }\n",
        "#ifdef A\nif (x) {\n#else\nif (y) {\n#endif\n}",
        "#if 0\n}\n#else\na;\n#endif",
        "#if 0\n}\n#elif A\n{\n#else\n{{\n#endif\n}",
        "#if A\n#if B\n{\n#else\n{ {\n#endif\n#else\n}\n#endif\n}",
        "x = {1, {2, 3}};",
        "call([](int i) { return i; });",
    ],
)
def test_the_body_is_all_of_it_and_no_more(inner: str) -> None:
    text = f"int before() {{\n}}\nint f(int x) {{\n{inner}\n}}\nint after() {{\n    z;\n}}\n"
    assert body(text, "f(int") == f"{{\n{inner}\n}}"
    assert body(text, "after(") == "{\n    z;\n}"
    assert len(blanked(text)) == len(text)
    assert blanked(text).count("\n") == text.count("\n")


@pytest.mark.parametrize(
    "text",
    [
        "int f(int x);",
        "int y = f(1);",
        "call(f(1)); {}",
        "// f(int x) {\n}",
        'char * s = "f(int x) {";',
        "if (f(1)) { }",
        "#define f(x) { }",
        "int f(int x",
        "",
    ],
)
def test_prototypes_calls_comments_and_texts_are_no_heads(text: str) -> None:
    assert bodies(text, "f(") == []


def test_heads_of_switches_cases_tables_and_templates() -> None:
    text = (
        "template <int N, int M = (N > 2)>\nstatic void f(const int (&a)[N])\n{\n"
        "    switch (op->op) {\n        case A:\n        case B:\n            {\n"
        "                b;\n            } break;\n        case C: call(A); break;\n    }\n}\n"
        "static const int all[] = {\n    1,\n};\nstatic const int some[] = {\n    1,\n};\n"
    )
    assert body(text, "    switch (op->op) {").count("case") == 3
    assert "b;" in body(text, "case A:") and "case" not in body(text, "case A:")
    assert body(text, "void f(") == body(text, "template <int N")
    assert body(text, "some[] =") == "{\n    1,\n}"
    assert [line_of(text, start) for start, _ in bodies(text, "static const")] == [13, 16]


def test_a_body_without_an_end_is_all_that_is_left() -> None:
    assert body("int f() {\n a;\n", "f(") == "{\n a;\n"


def test_the_function_around_a_place() -> None:
    text = "#include <a>\n\nint f(\n    int x) {\n    // }\n    HERE;\n}\n\nTHERE\n"
    assert outermost(text, text.index("HERE;")) == "int f("
    assert outermost(text, text.index("\nTHERE")) == ""
    assert outermost(text, 3) == ""
