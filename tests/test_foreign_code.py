"""Python code of a model's folder, or of the folder one stands in, is never run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from export_support import make_artifact, make_model

from pt2_core.errors import PT2Error
from pt2_core.process.foreign_code import check_folder

ROOT = Path(__file__).resolve().parent.parent
MARKER = "CODE_WAS_RUN"
HOSTILE = (
    "import pathlib, sys\npathlib.Path({marker!r}).open('a').write(' '.join(sys.argv) + '\\n')\n"
)
NAMES = ("export", "quantize", "yaml", "gguf", "torch", "transformers", "numpy", "conversion",
         "json", "sentencepiece", "sitecustomize", "usercustomize")  # fmt: skip


def edit(file: Path, **changes) -> None:
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, **changes}))


def hostile_model(model: Path, marker: Path, tokenizer_class: str) -> Path:
    """Makes a model's settings name classes in files that leave a mark when they are run."""
    code = HOSTILE.format(marker=str(marker))
    for name, base in (("evil_config", "LlamaConfig"), ("evil_tokenizer", "LlamaTokenizer"),
                       ("evil_model", "LlamaForCausalLM")):  # fmt: skip
        text = f"{code}from transformers import {base}\nclass {tokenizer_class}({base}): pass\n"
        (model / f"{name}.py").write_text(text)
    names = {"AutoConfig": f"evil_config.{tokenizer_class}",
             "AutoModelForCausalLM": f"evil_model.{tokenizer_class}"}  # fmt: skip
    edit(model / "config.json", auto_map=names)
    entry = f"evil_tokenizer.{tokenizer_class}"
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [entry, entry]},
         tokenizer_class=tokenizer_class)  # fmt: skip
    return model


def python(code: str, here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code of ours in a folder, as an installed command does: that folder is not searched."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['pt2', *sys.argv[1:]]\n"
    return subprocess.run(
        [sys.executable, "-I", "-c", start + code, *arguments], cwd=here, text=True,
        capture_output=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_MODULES_CACHE": str(here / "modules"), "COLUMNS": "200"},
    )  # fmt: skip


QUANTIZE = "from quantize.cli import main; sys.exit(main())"
EXPORT = "from export.cli import main; sys.exit(main())"
BASELINE = """
from pathlib import Path
from llamacpp_bench.run import baselines
from pt2_core.cli import run_cli
def body():
    baselines._convert(Path(sys.argv[1]), Path(sys.argv[2]), print)
sys.exit(run_cli("pt2-bench", body))
"""


@pytest.mark.llama
def test_a_tokenizer_that_only_the_folder_defines_is_refused_and_not_run(tmp_path):
    # For a class of this name llama.cpp's converter asks transformers to run the folder's code.
    name, marker = "HybridDNATokenizer", tmp_path / MARKER
    artifact = make_artifact(tmp_path / "a", make_model(tmp_path / "m"))
    model = hostile_model(tmp_path / "m", marker, name)
    (tmp_path / "t.txt").write_text("a few words " * 400)
    small = ["--samples", "2", "--seqlen", "16", "--threads", "1", "--device", "cpu", "-q"]
    runs = [
        python(QUANTIZE, tmp_path, str(model), "--calibration", "t.txt", *small),
        python(EXPORT, tmp_path, "m.gguf", "--from", str(artifact)),
        python(BASELINE, tmp_path, str(model), str(tmp_path / "b.gguf")),
    ]
    for done in runs:
        assert done.returncode == 2, done.stderr
        assert "asks for Python code of the model's folder (auto_map)" in done.stderr
        assert "Traceback" not in done.stderr and "[y/N]" not in done.stderr + done.stdout
    assert not marker.exists()


@pytest.mark.llama
def test_auto_map_beside_classes_of_transformers_is_refused_too(tmp_path):
    """What the folder's code does may be something else, and the entry can be removed."""
    marker = tmp_path / MARKER
    artifact = make_artifact(tmp_path / "a", make_model(tmp_path / "m"))
    hostile_model(tmp_path / "m", marker, "LlamaTokenizer")
    done = python(EXPORT, tmp_path, "m.gguf", "--from", str(artifact))
    assert done.returncode == 2 and "remove that entry" in done.stderr, done.stderr
    assert not (tmp_path / "m.gguf").exists() and not marker.exists()


def test_the_converter_s_process_ignores_auto_map_beside_classes_of_transformers(tmp_path):
    hostile_model(make_model(tmp_path / "m"), tmp_path / MARKER, "LlamaTokenizer")
    said = " ".join(check_folder(tmp_path / "m"))
    assert "auto_map in config.json is ignored" in said
    assert "auto_map in tokenizer_config.json is ignored" in said


@pytest.mark.llama
def test_modules_of_the_working_folder_are_not_imported(made, tmp_path):
    model, artifact = made()
    marker = tmp_path / MARKER
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(HOSTILE.format(marker=str(marker)))
    done = python(EXPORT, tmp_path, "m.gguf", "--from", str(artifact))
    assert done.returncode == 0, done.stderr
    done = python(BASELINE, tmp_path, str(model), str(tmp_path / "b.gguf"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.gguf").is_file() and not marker.exists()


def test_trust_is_forced_off_whatever_a_caller_passes(tmp_path):
    marker = tmp_path / MARKER
    model = hostile_model(make_model(tmp_path / "m"), marker, "XTok")
    edit(model / "config.json", model_type="xmodel")
    code = """
from pt2_core.process import foreign_code
foreign_code.forbid()
import transformers
from transformers import dynamic_module_utils as utils
def tried(call):
    try:
        call()
    except foreign_code.ForeignCode:
        return "refused"
    except Exception as e:
        return type(e).__name__
    return "loaded"
folder = sys.argv[1]
for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
    cls = getattr(transformers, name)
    print(name, tried(lambda: cls.from_pretrained(folder, trust_remote_code=True)))
for reference in ("evil_config.XTok", "evil_tokenizer.XTok"):
    load = lambda: utils.get_class_from_dynamic_module(reference, folder)
    print(reference, tried(load))
"""
    done = python(code, tmp_path, str(model))
    assert done.returncode == 0, done.stderr
    said = dict(line.split() for line in done.stdout.splitlines())
    assert said["AutoConfig"] == said["AutoModelForCausalLM"] == "refused"
    assert said["evil_config.XTok"] == said["evil_tokenizer.XTok"] == "refused"
    assert not marker.exists()


def test_a_model_type_that_only_the_folder_defines_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "xmodel", "auto_map": {"AutoConfig": "x.X"}})
    )
    with pytest.raises(PT2Error, match="model_type 'xmodel' is defined only by Python code"):
        check_folder(tmp_path)
