"""Commands that messages, help texts and documents suggest can be pasted and have real options."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path, PurePath

import pytest

import export.cli
import export.verify_cli
import llamacpp_bench.cli
import pt2_eval.cli
import pt2_llama.cli
import quantize.cli
import quantize.refinement.cli
from export.pipeline import ExportReport
from pt2_core.artifact.folder import Artifact
from pt2_core.cli import run_cli
from pt2_core.commands import command, resume_command
from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT
from pt2_core.texts.bundled import bundled_file, bundled_names
from pt2_core.texts.sources import source_name, split_sources

ROOT = Path(__file__).parents[1]
NAMES = ["two  words", "it's", 'a "b"', "[red]x[/red]", "-dash", "$HOME;`ls`", "tab\there", "ü*?"]
PARSERS = {
    "pt2-quantize": quantize.cli.build_parser,
    "pt2-refine": quantize.refinement.cli.build_parser,
    "pt2-export": export.cli._parser,
    "pt2-eval": pt2_eval.cli.build_parser,
    "pt2-bench": llamacpp_bench.cli.make_parser,
    "pt2-llama": pt2_llama.cli.make_parser,
}


def parsed(line: str) -> argparse.Namespace:
    """What the command that a line suggests makes of its arguments; fails on a wrong option."""
    program, *argv = shlex.split(line, comments=True)
    if argv[:1] == ["verify"]:
        return export.verify_cli._parser().parse_args(argv[1:])
    return PARSERS[program]().parse_args(argv)


@pytest.mark.parametrize("name", NAMES)
def test_a_suggested_command_gives_back_its_arguments(name):
    line = command("pt2-export", "model.gguf", "--from", PurePath(name))
    words = shlex.split(line)
    assert words[:3] == ["pt2-export", "model.gguf", "--from"]
    assert PurePath(words[3]) == PurePath(name) and not words[3].startswith("-")
    assert parsed(line).artifact == Path(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_resumes_a_run_parses_back_to_the_same_run(name, capsys):
    model = f"./{name}" if name.startswith("-") else name
    argv = [model, "-o", f"out {name}", "--overwrite", "--skip", "a|b"]
    line = resume_command("pt2-quantize", argv)

    def stopped() -> int:
        raise KeyboardInterrupt

    assert run_cli("pt2-quantize", stopped, resume=lambda: line) == 130
    said = capsys.readouterr().err
    assert said.startswith("pt2-quantize: interrupted") and said.count("\n") == 1
    given = parsed(said[said.index("pt2-quantize ", 1) :].removesuffix("\n"))
    assert (given.model, given.out, given.skip) == (model, f"out {name}", "a|b")
    assert given.resume and not given.overwrite
    assert resume_command("pt2-refine", ["a", "--resume", "--", "-b"]).endswith("--resume -- -b")


@pytest.mark.parametrize("name", NAMES)
def test_every_summary_ends_with_a_command_to_paste(name, tmp_path, capsys):
    folder = tmp_path / name
    quantize.cli.print_summary(quantize_result(folder))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("next"))
    assert parsed(line.removeprefix("next").strip()).artifact == folder
    for chat, tool in ((True, "llama-cli"), (False, "llama-completion")):
        report = ExportReport(
            [Path(f"{name}.gguf")], DEFAULT.ggml_name, 1, 1, 1, 1, [], [], chat=chat
        )
        given = parsed(export.cli.next_command(report))
        assert given.command == "run" and given.tool == tool
        assert PurePath(given.args[given.args.index("-m") + 1]) == PurePath(f"{name}.gguf")
        assert ("-no-cnv" in given.args) is not chat


def quantize_result(folder: Path):
    from quantize.pipeline import Result

    return Result(folder, {}, {}, 128, 1.0, [])


@pytest.mark.parametrize("name", NAMES)
def test_an_unfinished_artifact_says_how_to_finish_it(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    manifest = {k: {} for k in ("files", "kept", "matrices", "model", "settings", "versions",
                                "calibration")}  # fmt: skip
    manifest |= {"format": "pt2-artifact", "format_version": 1, "complete": False,
                 "model": {"fingerprint": "0"}, "settings": {"block_size": 128}}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    first = resume_command("pt2-quantize", ["a model", "-o", str(folder), "--samples", "3"])
    for run in ({}, {"resume": first}):
        (folder / "run.json").write_text(json.dumps(run))
        with pytest.raises(PT2Error, match="not complete") as error:
            Artifact.open(folder)
        line = str(error.value).partition("finish it with: ")[2]
        given = parsed(line.removesuffix(" and the settings it had"))
        assert given.out == str(folder) and given.resume
        assert not run or (given.model == "a model" and given.samples == 3)


def test_a_message_keeps_the_blanks_of_a_quoted_path(capsys):
    def body() -> int:
        raise PT2Error(f"no:\n  run {command('pt2-export', 'm.gguf', '--from', Path('a  b'))}")

    assert run_cli("x", body) == 2
    assert capsys.readouterr().err == "x: error: no: run pt2-export m.gguf --from 'a  b'\n"


def suggested(text: str) -> list[str]:
    """The command lines of an indented or fenced block, joined, without what explains them."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"^ *(pt2-[a-z]+ .+)$", joined, re.M)
    return [re.split(r"\s{2,}", line)[0] for line in found]


@pytest.mark.parametrize("file", ["README.md", "docs/quality.md", "docs/refine.md",
                                  "docs/quantize.md", "docs/results.md"])  # fmt: skip
def test_commands_in_documents_have_options_that_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```|((?:^    .+\n)+)", text, re.M | re.S)
    for block in blocks:
        for line in suggested("".join(block)):
            for part in re.split(r" && |; done", line):
                if not part.startswith(("pt2-bench report", "pt2-bench compare")):
                    parsed(part)


@pytest.mark.parametrize("program", PARSERS)
def test_commands_in_help_texts_have_options_that_exist(program):
    lines = suggested(str(PARSERS[program]().epilog))
    assert lines
    for line in lines:
        if not line.startswith(("pt2-bench report", "pt2-bench compare")):
            parsed(line)


def test_bundled_texts_have_names(tmp_path):
    assert bundled_names() == ["bundled:austen.test", "bundled:calibration", "bundled:wiki.test"]
    assert (
        Path(bundled_file("bundled:wiki.test")).read_bytes()
        == (ROOT / "examples/text/wiki.test.txt").read_bytes()
    )
    both = split_sources("c4,bundled:calibration")
    assert both[0] == "c4" and Path(both[1]).is_file()
    assert source_name("bundled:calibration") == "calibration.txt"
    assert bundled_file("my bundled:file.txt") == "my bundled:file.txt"
    with pytest.raises(PT2Error, match=r"no text 'bundled:x'; bundled are bundled:austen\.test"):
        bundled_file("bundled:x")
