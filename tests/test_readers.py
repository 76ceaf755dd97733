"""Readers of files: a value or one line, whatever a file holds; each kind of fault by an example.

What changes at random finds beyond these is in tests/fuzz.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz import seeds
from fuzz.readers import _sign_sensitivity, _sign_state
from fuzz.run import time_limit
from reader_support import refused
from safetensors.numpy import load_file, save_file

from export.config import parse_size
from llamacpp_bench.results import load_results
from llamacpp_bench.show.merge import merge
from llamacpp_bench.show.published import load_published
from pt2_core.artifact import sensitivity
from pt2_core.artifact.folder import MANIFEST, Artifact, read_manifest
from pt2_core.errors import PT2Error
from pt2_core.files import read_json, write_json
from pt2_core.model.fold_edges import edges_for
from pt2_core.safetensors_file import read_header
from pt2_core.yaml_file import read_yaml
from pt2_llama.builds import STAMP, read_build
from quantize.config import load_recipe
from quantize.report import write_report

LINEAR = "model.layers.0.self_attn.q_proj"


# safetensors --------------------------------------------------------------------------------------


def write_header(path: Path, entry: str, data: int = 4, more: str = "") -> Path:
    head = f'{{{more}"a": {entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(data))
    return path


def tensor(shape: str = "[1]", offsets: str = "[0, 4]", dtype: str = '"F32"') -> str:
    return f'{{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}'


@pytest.mark.parametrize(
    "entry",
    [
        tensor(offsets="[0, Infinity]"), tensor(offsets="[0, 1e999]"), tensor(offsets="[0, NaN]"),
        tensor(offsets="[0, 4.0]"), tensor(offsets="[false, 4]"), tensor(offsets='["0", "4"]'),
        tensor(offsets="[0]"), tensor(offsets="[0, 4, 4]"), tensor(offsets="[4, 0]"),
        tensor(offsets="{}"), tensor(offsets="null"), tensor(offsets="[-4, 0]"),
        tensor(shape="[Infinity]"), tensor(shape="[1e999]"), tensor(shape="[1.0]"),
        tensor(shape="[true]"), tensor(shape='"1"'), tensor(shape="1"), tensor(shape="[-1, -1]"),
        tensor(shape="[" + "1," * 8 + "1]"), tensor(shape=f"[{2**63}, 0]"),
        tensor(shape="[" + "9" * 5000 + "]"), tensor(shape="[" * 100_000), tensor(dtype="4"),
        tensor(dtype='["F32"]'), tensor(dtype='"F7"'), "[]", "null", "7",
        tensor() + ', "a": ' + tensor(), tensor() + ', "__metadata__": {"x": 1}',
        tensor() + ', "__metadata__": []',
    ],
)  # fmt: skip
def test_a_header_of_wrong_values_is_refused(tmp_path: Path, entry: str):
    with refused("(not a whole safetensors file|has the unknown dtype)"):
        read_header(write_header(tmp_path / "x.safetensors", entry))


def test_two_million_dimensions_are_refused_at_once(tmp_path: Path):
    file = write_header(tmp_path / "x.safetensors", tensor("[" + "1," * 2_000_000 + "1]"))
    with time_limit(30), refused("not a whole safetensors file"):
        read_header(file)


def test_a_header_of_millions_of_objects_is_refused_before_it_is_parsed(tmp_path: Path):
    file = write_header(tmp_path / "x.safetensors", "[" + "{}," * 3_000_000 + "{}]")
    with refused("more than a model can have"):
        read_header(file)


# JSON and YAML ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"), ("[" * 200 + "]" * 200, "nested more than"),
        ('{"a":' * 150 + "1" + "}" * 150, "nested more than"),
        ("9" * 5000, "not valid JSON"), ('{"a": NaN}', "NaN"), ("[-Infinity]", "Infinity"),
        ("[1e999]", "too large"), ("\ufeff{}", "not valid JSON"), ("", "not valid JSON"),
    ],
)  # fmt: skip
def test_json_that_no_file_of_ours_holds_is_refused(tmp_path: Path, text: str, words: str):
    file = tmp_path / "x.json"
    file.write_text(text, encoding="utf-8")
    with refused(words):
        read_json(file)


def test_a_name_given_twice_is_refused_where_it_matters(tmp_path: Path):
    file = tmp_path / "x.json"
    file.write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    assert read_json(file)["b"] == {"c": 2}  # as every program reads a config.json
    with refused("'c' is given twice"):
        read_json(file, unique=True)


def test_what_is_long_takes_no_longer_than_it_is(tmp_path: Path):
    file = tmp_path / "x.json"
    names = [f'"{i}": 1' for i in range(100_000)]
    file.write_text("{" + ", ".join([*names, names[-1]]) + "}")
    with time_limit(20), refused("'99999' is given twice"):
        read_json(file, unique=True)
    file = tmp_path / "x.yaml"
    file.write_text("".join(f"a{i}:\n" for i in range(15_000)) + "a14999:\n")
    with time_limit(60), refused("'a14999' is given twice"):
        read_yaml(file)
    with time_limit(20):
        assert len(str(PT2Error(f"tensor {' ' * 10**6}{chr(10)}{' ' * 10**6}x"))) < 5000


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "x.json")
    for read in (read_json, read_header):
        with time_limit(20), refused("no regular file"):
            read(tmp_path / "x.json")


YAML = {
    "deep": "[" * 5000, "deep objects": "{a: " * 3000, "aliases": "a: &a [x, x]\nb: *a",
    "exploding aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\norder: [*c, *c]",
    "merge": "a: &a {order: ssr}\n<<: *a", "twice": "order: ssr\norder: none",
    "date": "order: 2001-99-99", "bool": "order: !!bool x", "int": 'order: !!int ""',
    "timestamp": "order: !!timestamp x", "code": "!!python/object/apply:os.system ['true']",
    "digits": "samples: " + "9" * 5000, "control": "order: '\x01'", "nothing": "",
    "itself": "&a [*a]", "key": "? [a]\n: b", "large": "# " + "x" * 2_000_000,
    "nan": "damping: .nan", "infinite": "damping: .inf",
    "name": "speedup: {7b: {pp128: .nan}}\nname: a\nsource: b\nwhat: c",
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_nobody_writes_is_refused_by_both_its_readers(tmp_path: Path, name: str):
    file = tmp_path / "x.yaml"
    file.write_text(YAML[name], encoding="utf-8")
    for read in (lambda: load_recipe(str(file)), lambda: load_published(file)):
        with time_limit(60), refused(""):
            read()


def test_a_path_that_is_not_utf8_is_written_to_json_and_read_back(tmp_path: Path):
    path = os.fsdecode(b"/models/mod\xff")
    write_json(tmp_path / "run.json", {"model_dir": path, "µ": "ü"})
    assert read_json(tmp_path / "run.json") == {"model_dir": path, "µ": "ü"}


def test_names_of_files_cannot_break_a_message():
    message = str(PT2Error(f"tensor a\nb\x1b[31m\x00\udcff{'x' * 100_000} is wrong; mend it"))
    assert message.isprintable() and len(message) < 5000 and message.endswith("mend it")
    assert str(PT2Error("my  folder is\n  gone")) == "my  folder is gone"


def test_signs_that_the_terminal_lacks_end_nothing():
    words = r"'1 \xb1 2 \udcff'"
    code = f"from pt2_core.cli import run_cli; run_cli('x', lambda: print({words}))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    # A sign in ASCII, and a byte of a file's name as it is.
    assert (done.returncode, done.stdout, done.stderr) == (0, b"1 +- 2 \xff\n", b"")


# artifact -----------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    seeds.measured(folder)
    return folder


def put(value: object, *keys: str):
    """A change of a JSON file: an entry replaced, or removed where ``value`` is KeyError."""

    def change(file: Path) -> None:
        top = node = json.loads(file.read_text())
        for key in keys[:-1]:
            node = node[int(key) if isinstance(node, list) else key]
        if value is KeyError:
            del node[keys[-1]]
        else:
            node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = value
        file.write_text(json.dumps(top))

    return change


MATRIX = ("matrices", LINEAR)
BAD_MANIFESTS = [
    (put(KeyError, *MATRIX, "rows"), rf"matrices\.{LINEAR}\.rows' is missing"),
    (put("16", *MATRIX, "rows"), rf"matrices\.{LINEAR}\.rows"),
    (put(16.0, *MATRIX, "cols"), rf"matrices\.{LINEAR}\.cols"),
    (put(True, *MATRIX, "cols"), rf"matrices\.{LINEAR}\.cols"),
    (put(2**70, *MATRIX, "rows"), rf"matrices\.{LINEAR}\.rows"),
    (put(0, *MATRIX, "block_size"), rf"matrices\.{LINEAR}\.block_size"),
    (put(3, *MATRIX, "block_size"), "no multiple of its block_size"),
    (put([], *MATRIX), rf"matrices\.{LINEAR}"),
    (put(["a"], *MATRIX, "E_x"), rf"matrices\.{LINEAR}\.E_x"),
    (put("0.5", *MATRIX, "E_x", "final"), rf"matrices\.{LINEAR}\.E_x\.final"),
    (put({"rows": 1, "cols": 4}, "matrices", "x\n\x1b[31m"), "unexpected entry"),
    (put("yes", *MATRIX, "transposed"), rf"matrices\.{LINEAR}\.transposed"),
    (put(3, *MATRIX, "tensor"), rf"matrices\.{LINEAR}\.tensor"),
    (put({"columns": []}, "fold"), r"fold\.rows' is missing"),
    (put(KeyError, "settings", "block_size"), r"settings\.block_size' is missing"),
    (put(None, "settings", "block_size"), r"settings\.block_size"),
    (put(7, "files", "global.safetensors"), r"files\.global\.safetensors"),
    (put("0" * 64, "files", "../other.safetensors"), "unexpected entry"),
    (put("0" * 64, "files", "block-00007.safetensors"), "not every block before it"),
    (put(1, "kept", "model.layers.0.mlp.up_proj"), r"kept\.model"),
    (put(KeyError, "model", "fingerprint"), r"model\.fingerprint' is missing"),
    (put(3, "model", "tensors"), r"model\.tensors"),
    (put([16, "16"], "model", "tensors", "model.norm.weight"), r"model\.norm\.weight\[1\]"),
    (put([1] * 9, "model", "tensors", "model.norm.weight"), "model.norm.weight"),
    (put(4, "activations", "0"), r"activations\.0"),
    (put([], "activations"), "activations"),
    (put(None, "refinement", "before", "kl"), r"refinement\.before\.kl"),
    (put("yes", "complete"), "complete"),
    (put(True, "format_version"), "format version true"),
]


@pytest.mark.parametrize("number", range(len(BAD_MANIFESTS)))
def test_a_wrong_entry_of_the_manifest_is_named_when_it_is_opened(artifact: Path, number: int):
    change, words = BAD_MANIFESTS[number]
    change(artifact / MANIFEST)
    with refused(words):
        Artifact.open(artifact)


@pytest.mark.parametrize("key", ["rows", "cols", "block_size"])
def test_a_block_that_is_not_as_the_manifest_says_is_refused(artifact: Path, key: str):
    size = read_manifest(artifact)["matrices"][LINEAR][key]
    put(2 * size, *MATRIX, key)(artifact / MANIFEST)
    with refused("not as the manifest says"):
        Artifact.open(artifact).block(0)


def test_a_block_that_lacks_a_linear_of_the_manifest_is_refused(artifact: Path):
    record = read_manifest(artifact)["matrices"][LINEAR]
    put(record, "matrices", "model.layers.1.self_attn.k_proj")(artifact / MANIFEST)
    with refused("names model.layers.1.self_attn.k_proj, which no block file holds"):
        Artifact.open(artifact).block(1)


def test_a_report_of_errors_that_are_not_there_is_refused(artifact: Path, tmp_path: Path):
    put(KeyError, *MATRIX, "E_w")(artifact / MANIFEST)
    with refused(f"{LINEAR} lacks errors|lacks errors"):
        write_report(artifact, tmp_path / "report.html")


# sensitivity, refinement --------------------------------------------------------------------------


def poison(file: Path, value: float) -> None:
    """Overwrite the data of a safetensors file, its header and record as they are."""
    data = file.read_bytes()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    rest = np.full((len(data) - begin) // 4, value, np.float32).tobytes()
    file.write_bytes(data[:begin] + rest + bytes(len(data) - begin - len(rest)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.25])
def test_energies_that_were_changed_are_refused(artifact: Path, value: float):
    poison(artifact / sensitivity.FILE, value)
    with refused("not the checksum in its record"):
        sensitivity.read(Artifact.open(artifact))
    assert _sign_sensitivity(artifact, sensitivity.FILE)
    if value == 0.25:
        assert sensitivity.read(Artifact.open(artifact)).linears[LINEAR].energy[0] == 0.25
        return
    with refused("NaN, Inf or negatives"):
        sensitivity.read(Artifact.open(artifact))


@pytest.mark.parametrize(
    "keys_and_value",
    [
        (("linears", LINEAR, "gain"), "0.1"), (("linears", LINEAR, "error"), -1.0),
        (("linears", LINEAR), None), (("tables",), {}), (("tables", "embedding"), True),
        (("kl",), [1]), (("tokens",), 0), (("tokens",), 6.5), (("linears",), {}),
    ],
)  # fmt: skip
def test_figures_that_cannot_be_are_refused(artifact: Path, keys_and_value):
    keys, value = keys_and_value
    file = artifact / sensitivity.FILE
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + length])
    record = node = json.loads(head["__metadata__"]["pt2"])
    for key in ("figures", *keys[:-1]):
        node = node[key]
    node[keys[-1]] = value
    head["__metadata__"]["pt2"] = json.dumps(record)
    text = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    _sign_sensitivity(artifact, sensitivity.FILE)
    with refused("measure it"):
        sensitivity.read(Artifact.open(artifact))


def test_a_changed_state_of_a_refinement_is_refused(tmp_path: Path):
    from quantize.refinement.state import STATE, check_tensors, load_state

    seeds.state(tmp_path)
    tensors, record = load_state(tmp_path, seeds.IDENTITY)
    assert record["step"] == 4
    with refused("parameter.1 is not of this run"):
        check_tensors(tmp_path, tensors, tensors | {"parameter.1": tensors["parameter.0"]})
    with refused("parameter.0 is not of this run"):
        check_tensors(tmp_path, tensors, tensors | {"parameter.0": tensors["parameter.0"][:2]})
    poison(tmp_path / STATE, math.nan)
    with refused("not the checksum in its metadata"):
        load_state(tmp_path, seeds.IDENTITY)
    assert _sign_state(tmp_path, STATE)
    with refused("NaN or Inf"):
        load_state(tmp_path, seeds.IDENTITY)


# config.json, sizes, stamps -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": True}, {"num_attention_heads": "4"}, {"num_attention_heads": 0},
        {"num_attention_heads": 3}, {"num_attention_heads": None}, {"num_attention_heads": 2**80},
        {"head_dim": [4]}, {"head_dim": -4}, {"head_dim": float("inf")},
    ],
)  # fmt: skip
def test_heads_that_cannot_be_have_no_order_of_their_own(change):
    o, v = (f"model.layers.0.self_attn.{n}_proj" for n in "ov")
    shapes = {f"{o}.weight": [32, 32], f"{v}.weight": [16, 32]}
    found = edges_for(seeds.CONFIG, shapes)
    assert found is not None and found.role(o) == "heads"
    found = edges_for({**seeds.CONFIG, **change}, shapes)
    assert found is not None and found.role(o) == "none"


@pytest.mark.parametrize("text", ["9" * 400 + "G", "9" * 5000, "1e9", "٣G", "0.0000000001G", "nan"])
def test_sizes_that_are_none_are_refused(text: str):
    with refused("is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "change",
    [put("llama-bench", "tools"), put([1], "tools"), put("now", "created"), put([], "smoke"),
     put(KeyError, "key"), put(3, "overlay"), put({"a": "b"}, "smoke")],
)  # fmt: skip
def test_a_damaged_stamp_is_no_build(tmp_path: Path, change):
    seeds.stamp(tmp_path)
    assert read_build(tmp_path) is not None
    change(tmp_path / STAMP)
    assert read_build(tmp_path) is None


# results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("nobody", "samples", "0", "model"), "does not list"),
        (put("nobody", "baseline", ""), "nobody"), (put(3, "commands"), "commands"),
        (put([3], "commands"), r"commands\[0\]"), (put([], "samples", "0", "round"), "round"),
        (put("fast", "samples", "0", "tokens_per_second"), "tokens_per_second"),
        (put(-1, "samples", "0", "tokens_per_second"), "tokens_per_second"),
        (put(1e308, "samples", "0", "tokens_per_second"), "tokens_per_second"),
        (put("tg" + "9" * 5000, "samples", "0", "test"), "test"),
        (put("speed", "samples", "0", "test"), "test"),
        (put("5 GB", "models", "0", "peak_rss"), "peak_rss"),
        (put(0, "models", "0", "parameters"), "parameters"),
        (put("ours", "models", "0", "name"), "one name"), (put([], "machine"), "machine"),
        (put(KeyError, "machine", "ram_bytes"), "ram_bytes"), (put(7, "machine", "gpus"), "gpus"),
        (put("two", "config", "threads"), "threads"), (put([], "config", "repeats"), "repeats"),
        (put("much", "bandwidth", "bytes_per_second"), "bytes_per_second"),
        (put(KeyError, "bandwidth", "method"), "bandwidth"),
        (put(None, "models", "0", "placement"), "placement"),
        (put({"CPU": "2"}, "models", "0", "placement", "ops", "Q2_K", "MUL_MAT"), "ops"),
        (put("1", "models", "0", "perplexity", "0", "ppl"), "ppl"),
        (put(1, "complete"), "complete"), (put("1", "schema_version"), "schema version"),
    ],
)  # fmt: skip
def test_results_with_a_wrong_entry_are_refused(tmp_path: Path, change, words: str):
    seeds.results(tmp_path)
    file = tmp_path / "results.json"
    assert merge([load_results(file), load_results(file)]).samples
    change(file)
    with refused(words):
        load_results(file)


# choices ----------------------------------------------------------------------------------------


def test_a_table_that_was_not_measured_is_refused_by_the_choice_of_types(artifact: Path):
    from export.config import ExportConfig
    from export.mixed import choose

    found = sensitivity.read(Artifact.open(artifact))
    found.tables.pop("head")
    with refused("the head has not been measured"):
        choose(ExportConfig(target_size=10**6), found, {}, None, {"head": "x"}, None, 0)


@pytest.mark.parametrize(
    "rows", [{}, [3], [{"name": "fp"}], [{"name": "fp", "title": "t", "settings": {},
             "perplexity": "9", "seconds": 1}], [{"name": "fp", "title": "t", "settings": {},
             "perplexity": 9, "seconds": 1, "E_x": []}]],
)  # fmt: skip
def test_a_damaged_table_of_ablations_is_refused(tmp_path: Path, rows: object):
    from quantize.ablate import RESULTS, _known

    write_json(tmp_path / RESULTS, rows)
    with refused("remove it"):
        _known(tmp_path)


def test_tokens_of_a_wrong_kind_are_refused(tmp_path: Path):
    from quantize.calibration import read_tokens

    file = tmp_path / "t.safetensors"
    for value in (np.ones(3, np.float32), np.ones((1, 1, 1), np.int32), np.array(1, np.int64)):
        save_file({"a": value}, file)
        assert load_file(file)
        with refused("not rows of token ids"):
            read_tokens(file)
