"""Bad input of every kind: one clear line, a non-zero exit, and nothing under the final name.

Each case breaks one thing in a copy of a small model, artifact or GGUF and runs one command on it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pt2_core.files import sha256_file

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = EXAMPLES / "text" / "calibration.txt"
QUICK = ["--calibration", str(TEXT), "--samples", "2", "--seqlen", "64", "--device", "cpu"]


@dataclass
class World:
    """A scratch folder with a tiny model, an artifact of it, and a GGUF header to break."""

    root: Path
    model: Path = field(init=False)
    artifact: Path = field(init=False)
    out: Path = field(init=False)
    gguf: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.root / "model"
        self.artifact = self.root / "artifact"
        self.out = self.root / "out"
        self.gguf = self.root / "out.gguf"


def make_model(folder: Path, hidden: int = 256, ffn: int = 256) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "wiki-llama-7m" / name, folder / name)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("bad-input"))
    make_model(world.model)
    code, err = call(
        "pt2-quantize", [str(world.model), "-o", str(world.artifact), *QUICK], world.root
    )
    assert code == 0, err
    return world


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    copy = World(tmp_path / "w")
    shutil.copytree(template.root, copy.root)
    return copy


MAINS = {
    "pt2-quantize": "quantize.cli",
    "pt2-export": "export.cli",
    "pt2-bench": "llamacpp_bench.cli",
    "pt2-llama": "pt2_llama.cli",
}


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*MAINS.values(), "transformers", "safetensors.torch"])


def call(command: str, args: list[str], cwd: Path) -> tuple[int, str]:
    """Run a command's ``main`` in a clean child that has its imports already; its stderr."""
    log = cwd / "stderr.txt"
    child = SERVER.Process(target=_child, args=(command, args, str(cwd), str(log)))
    child.start()
    child.join(timeout=300)
    if child.is_alive():
        child.kill()
        raise AssertionError(f"{command} {args} hangs: {log.read_text()}")
    return child.exitcode or 0, log.read_text()


def _child(command: str, args: list[str], cwd: str, log: str) -> None:
    os.chdir(cwd)
    if args[0] == "build":
        os.environ["PT2_CACHE"] = str(Path(cwd) / "cache")  # never the user's builds
    os.dup2(os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = [command, *args]
    sys.exit(importlib.import_module(MAINS[command]).main())


def truncate(path: Path, keep: float = 0.6) -> None:
    with path.open("r+b") as f:
        f.truncate(int(path.stat().st_size * keep))


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(bytes(data))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def poison(path: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})


def drop_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def header(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:8] + change(data[8 : 8 + n]) + data[8 + n :])


def weights(w: World) -> Path:
    return w.model / "model.safetensors"


def block(w: World) -> Path:
    return w.artifact / "block-00001.safetensors"


def rehash(w: World) -> None:
    """Make the manifest agree with a changed block file, so that the file itself is judged."""
    edit_json(
        w.artifact / "manifest.json",
        lambda m: m["files"].update({block(w).name: sha256_file(block(w))}),
    )


def scramble_perm(w: World) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(block(w))
    name = "model.layers.1.self_attn.q_proj.perm"
    tensors[name] = torch.flip(tensors[name], [0]).contiguous()
    save_file(tensors, block(w))
    rehash(w)


SPEED = ["--no-perplexity", "--baseline", "none"]


Break = Callable[[World], object]
Q, E, B, L = "pt2-quantize", "pt2-export", "pt2-bench", "pt2-llama"
OUT = "{out}"
QUANT = ["{model}", "-o", OUT, *QUICK]
AGAIN = ["{model}", "-o", "{artifact}", *QUICK]
EXPORT = ["{gguf}", "--from", "{artifact}", "--model", "{model}"]


def nothing(w: World) -> None:
    pass


# name, command, what is broken, arguments, words that the line must hold
CASES: list[tuple[str, str, Break, list[str], str]] = [
    # the model
    ("model-missing", Q, lambda w: shutil.rmtree(w.model), QUANT, "model"),
    ("model-is-a-file", Q, nothing, [str(TEXT), "-o", OUT, *QUICK], "folder"),
    ("config-missing", Q, lambda w: (w.model / "config.json").unlink(), QUANT, "config.json"),
    ("config-truncated", Q, lambda w: truncate(w.model / "config.json"), QUANT, "config.json"),
    ("config-not-an-object", Q, lambda w: (w.model / "config.json").write_text("[]"), QUANT,
     "config.json"),
    ("architecture-unknown", Q, lambda w: edit_json(w.model / "config.json", lambda c: c.update(
        architectures=["GPT9ForCausalLM"], model_type="gpt9")), QUANT, "GPT9ForCausalLM"),
    ("architecture-missing", Q, lambda w: edit_json(w.model / "config.json", lambda c: c.pop(
        "architectures")), QUANT, "architecture"),
    ("weights-missing", Q, lambda w: weights(w).unlink(), QUANT, "safetensors"),
    ("weights-truncated", Q, lambda w: truncate(weights(w)), QUANT, "model.safetensors"),
    ("weights-empty", Q, lambda w: weights(w).write_bytes(b""), QUANT, "model.safetensors"),
    ("weights-header-flipped", Q, lambda w: header(weights(w), lambda h: b"x" + h[1:]), QUANT,
     "model.safetensors"),
    ("weights-header-length", Q, lambda w: flip(weights(w), 6.5 / weights(w).stat().st_size),
     QUANT, "model.safetensors"),
    ("weights-dtype-flipped", Q, lambda w: header(weights(w), lambda h: h.replace(
        b'"BF16"', b'"BX16"', 1)), QUANT, "model.safetensors"),
    ("weights-tensor-missing", Q, lambda w: drop_tensor(weights(w)), QUANT, "up_proj"),
    ("weights-shape-wrong", Q, lambda w: edit_json(w.model / "config.json", lambda c: c.update(
        intermediate_size=384)), QUANT, "proj"),
    ("weights-nan", Q, lambda w: poison(weights(w), float("nan")), QUANT, "up_proj"),
    ("weights-inf", Q, lambda w: poison(weights(w), float("inf")), QUANT, "up_proj"),
    ("shard-missing", Q, lambda w: (weights(w).unlink(), (
        w.model / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))), QUANT,
     "model-00001-of-00002"),
    ("width-not-divisible", Q, lambda w: (shutil.rmtree(w.model), make_model(w.model, 192, 192)),
     QUANT, "192"),
    ("tokenizer-missing", Q, lambda w: [p.unlink() for p in w.model.glob("tokenizer*")], QUANT,
     "tokenizer"),
    ("tokenizer-broken", Q, lambda w: [truncate(p) for p in w.model.glob("tokenizer*")], QUANT,
     "tokenizer"),
    # the calibration
    ("text-missing", Q, nothing, [*QUANT, "--calibration", "{root}/none.txt"],
     "none.txt"),
    ("text-too-short", Q, lambda w: (w.root / "short.txt").write_text("A few words only.\n"),
     ["{model}", "-o", OUT, *QUICK, "--calibration", "{root}/short.txt"], "tokens"),
    ("text-not-utf8", Q, lambda w: (w.root / "bin.txt").write_bytes(bytes(range(128, 256)) * 99),
     ["{model}", "-o", OUT, *QUICK, "--calibration", "{root}/bin.txt"], "bin.txt"),
    ("text-folder-empty", Q, lambda w: (w.root / "empty").mkdir(),
     ["{model}", "-o", OUT, *QUICK, "--calibration", "{root}/empty"], "empty"),
    # options
    ("samples-not-a-number", Q, nothing, [*QUANT, "--samples", "many"], "samples"),
    ("samples-zero", Q, nothing, [*QUANT, "--samples", "0"], "samples"),
    ("block-size-100", Q, nothing, [*QUANT, "--block-size", "100"], "100"),
    ("order-unknown", Q, nothing, [*QUANT, "--order", "sorted"], "sorted"),
    ("recipe-unknown", Q, nothing, [*QUANT, "--recipe", "magic"], "magic"),
    ("recipe-unknown-setting", Q, lambda w: (w.root / "r.yaml").write_text("blocksize: 64\n"),
     [*QUANT, "--recipe", "{root}/r.yaml"], "blocksize"),
    ("recipe-not-yaml", Q, lambda w: (w.root / "r.yaml").write_text("a: [1\n"),
     [*QUANT, "--recipe", "{root}/r.yaml"], "r.yaml"),
    ("option-unknown", Q, nothing, [*QUANT, "--smaples", "2"], "smaples"),
    # the output
    ("out-is-a-file", Q, lambda w: w.out.write_text("x"), QUANT, "out"),
    ("out-not-writable", Q, nothing, ["{model}", "-o", "/proc/pt2/out", *QUICK], "/proc"),
    ("out-complete-already", Q, nothing, AGAIN, "--overwrite"),
    ("resume-other-settings", Q, lambda w: edit_json(w.artifact / "manifest.json",
     lambda m: m.update(complete=False)), [*AGAIN, "--resume", "--seed", "7"], "seed"),
    ("resume-other-model", Q, lambda w: poison(weights(w), 0.5), [*AGAIN, "--resume"], "model"),
    ("resume-manifest-truncated", Q, lambda w: truncate(w.artifact / "manifest.json"),
     [*AGAIN, "--resume"], "manifest.json"),
    # the artifact
    ("artifact-missing", E, lambda w: shutil.rmtree(w.artifact), EXPORT, "artifact"),
    ("artifact-none-here", E, lambda w: shutil.rmtree(w.artifact), ["{gguf}"], "--from"),
    ("manifest-missing", E, lambda w: (w.artifact / "manifest.json").unlink(), EXPORT,
     "manifest.json"),
    ("manifest-truncated", E, lambda w: truncate(w.artifact / "manifest.json"), EXPORT,
     "manifest.json"),
    ("manifest-flipped", E, lambda w: flip(w.artifact / "manifest.json", 0.0), EXPORT,
     "manifest.json"),
    ("manifest-version", E, lambda w: edit_json(w.artifact / "manifest.json",
     lambda m: m.update(format_version=99)), EXPORT, "99"),
    ("manifest-incomplete", E, lambda w: edit_json(w.artifact / "manifest.json",
     lambda m: m.update(complete=False)), EXPORT, "--resume"),
    ("block-missing", E, lambda w: block(w).unlink(), EXPORT, "block-00001"),
    ("block-flipped", E, lambda w: flip(block(w), 0.9), EXPORT, "block-00001"),
    ("block-truncated", E, lambda w: truncate(block(w)), EXPORT, "block-00001"),
    ("block-truncated-rehashed", E, lambda w: (truncate(block(w)), rehash(w)), EXPORT,
     "block-00001"),
    ("perm-not-foldable", E, scramble_perm, EXPORT, "foldable"),
    ("model-changed", E, lambda w: poison(weights(w), 0.5), EXPORT, "model"),
    ("export-type-unknown", E, nothing, [*EXPORT, "--type", "tq3"], "tq3"),
    ("export-embedding-unknown", E, nothing, [*EXPORT, "--embedding-type", "q99"], "q99"),
    ("export-split-garbage", E, nothing, [*EXPORT, "--split-max-size", "lots"], "lots"),
    ("export-into-a-folder", E, lambda w: w.gguf.mkdir(), EXPORT, "out.gguf"),
    ("export-no-such-folder", E, nothing, ["{root}/no/x.gguf", *EXPORT[1:]], "no"),
    ("export-not-writable", E, nothing, ["/proc/x.gguf", *EXPORT[1:]], "/proc"),
    ("export-tokenizer-missing", E, lambda w: [p.unlink() for p in w.model.glob("tokenizer*")],
     EXPORT, "tokenizer"),
    # GGUF files, results and tools
    ("gguf-missing", B, nothing, ["{root}/none.gguf", *SPEED], "none.gguf"),
    ("gguf-is-text", B, nothing, [str(TEXT), *SPEED], "GGUF"),
    ("gguf-header-cut", B, lambda w: (w.root / "x.gguf").write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 5, 9)), ["{root}/x.gguf", *SPEED], "x.gguf"),
    ("gguf-version", B, lambda w: (w.root / "x.gguf").write_bytes(
        b"GGUF" + struct.pack("<IQQ", 77, 0, 0)), ["{root}/x.gguf", *SPEED], "77"),
    ("bench-baseline-unknown", B, nothing, ["--synthetic", "1b", "--types", "q77"], "q77"),
    ("bench-size-unknown", B, nothing, ["--synthetic", "9z"], "9z"),
    ("compare-not-json", B, lambda w: (w.root / "a.json").write_text("{"),
     ["compare", "{root}/a.json", "{root}/a.json"], "a.json"),
    ("compare-other-schema", B, lambda w: (w.root / "a.json").write_text("{}"),
     ["compare", "{root}/a.json", "{root}/a.json"], "a.json"),
    ("tool-unknown", L, nothing, ["run", "llama-dance"], "llama-dance"),
    ("source-missing", L, nothing, ["build", "--force", "--source", "{root}/none"], "none"),
    ("source-not-the-pinned-one", L, lambda w: (w.root / "s.tar.gz").write_bytes(b"\x1f\x8b" * 50),
     ["build", "--force", "--source", "{root}/s.tar.gz"], "s.tar.gz"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "broken", "args", "words"),
    [
        pytest.param(
            *c[1:],
            id=c[0],
            marks=[pytest.mark.llama] if c[1] == E or c[0] == "tool-unknown" else [],
        )
        for c in CASES
    ],
)
def test_one_line_and_no_output(
    world: World, command: str, broken: Break, args: list[str], words: str
) -> None:
    broken(world)
    before = finished(world)
    names = {k: str(getattr(world, k)) for k in ("root", "model", "artifact", "out", "gguf")}
    code, err = call(command, [a.format(**names) for a in args], world.root)
    lines = [line for line in err.splitlines() if ": error: " in line]
    assert code > 0, f"exit {code}: {err}"
    assert "Traceback" not in err, err
    assert len(lines) == 1, err
    assert words.lower() in lines[0].lower(), lines[0]
    assert finished(world) == before, "something was left under the output's name"


def finished(world: World) -> list[object]:
    """What stands under the outputs' final names. A folder whose manifest says that it is not
    complete is no artifact yet, and no command takes it for one."""
    results: list[object] = []
    for path in (world.out, world.gguf):
        manifest = path / "manifest.json"
        if manifest.exists():
            results.append(json.loads(manifest.read_text())["complete"] or None)
        else:
            results.append(path.read_bytes() if path.is_file() else None)
    return results


def test_every_command_has_cases_and_no_two_share_a_name() -> None:
    assert {c[1] for c in CASES} == set(MAINS)
    assert len({c[0] for c in CASES}) == len(CASES)


FULL_DISK = """
import os, sys
os.chdir({root!r})
from {module} import main
sys.argv = {argv!r}
sys.exit(main())
"""


@pytest.mark.parametrize("command", [Q, pytest.param(E, marks=pytest.mark.llama)])
def test_full_disk(world: World, command: str) -> None:
    """A real full disk: a file system of 200 KiB, mounted in a namespace of its own."""
    small = world.root / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=200k none {small}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here (unshare -rm)")
    args = {
        Q: [str(world.model), "-o", str(small / "out"), *QUICK],
        E: [str(small / "out.gguf"), "--from", str(world.artifact), "--model", str(world.model)],
    }[command]
    code = FULL_DISK.format(root=str(world.root), module=MAINS[command], argv=[command, *args])
    python = f'"{sys.executable}" - <<"END"\n{code}\nEND\n'
    script = f"{mount} && {python}status=$?; ls {small}; exit $status"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "full" in done.stderr.strip().splitlines()[-1], done.stderr
    if command == E:
        assert "out.gguf" not in done.stdout.split(), done.stdout
