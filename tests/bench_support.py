"""What the tests of pt2-bench share: tiny GGUF files, and programs that play llama.cpp's tools."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llamacpp_bench import Config
from llamacpp_bench.results import Model, Perplexity, Results, Sample
from pt2_core.gguf_info import header_bytes, padded

Setup = Callable[..., Config]  # Config's fields by name -> a configuration of the fake tools

# Plays every tool. Each call is appended to the file CALLS beside it. llama-bench gives a speed
# that depends on the name (fast.gguf twice that of others) and on the call, so that order shows.
FAKE_TOOL = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
name, args = Path(__file__).name, sys.argv[1:]
with open(here / "CALLS", "a") as f:
    f.write(json.dumps([name, *args]) + "\\n")
calls = len((here / "CALLS").read_text().splitlines())
mode = os.environ.get("FAKE_MODE", "")
if not any(os.environ.get("FAKE_ONLY", "") in a for a in args):
    mode = ""
def value(flag):
    return args[args.index(flag) + 1]
if "-f" in args:
    (here / f"TEXT-{{name}}").write_bytes(Path(value("-f")).read_bytes())
if mode == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if mode == "hang":
    time.sleep(60)
if mode == "fail":
    sys.exit("some banner\\nerror: the model is purple")
if mode == "garbage":
    print("not json")
    sys.exit(0)
if name == "llama-bench":
    model = value("-m")
    if "-v" in args:
        backend = os.environ.get("FAKE_BACKEND", "CPU")
        for i in range(2):
            print(f"node #  {{i}} (   MUL_MAT):   out (  1K) [{{backend:>5}}         ] use=1,c=1: "
                  f"blk.{{i}}.ffn_up.weight ( 21K) [{{backend:>5}}         ]  x (  1K) [  CPU   ]",
                  file=sys.stderr)
        print("node #  3 (  GET_ROWS):  embd (  1K) [  CPU    ] use=1,c=1: token_embd.weight "
              "( 1K) [  CPU    ]", file=sys.stderr)
        print("repack: repack tensor blk.0.ffn_up.weight with q8_0_4x8", file=sys.stderr)
        print("load_tensors:   CPU_Mapped model buffer size =     3.24 MiB", file=sys.stderr)
    rows = []
    factor = 2.0 if "fast" in model else 1.0
    tests = [(int(value("-p")), 0), (0, int(value("-n")))]
    if "-pg" in args:
        tests.append(tuple(map(int, value("-pg").split(","))))
    for p, n in tests:
        if p or n:
            ts = factor * (100.0 if p else 10.0) + 0.01 * calls
            samples = [ts + 3 * k for k in range(int(value("-r")))]
            rows.append(dict(n_prompt=p, n_gen=n, n_depth=0, samples_ts=samples, build_commit="abc",
                             build_number=1, backends="CPU", cpu_info="fake", gpu_info=""))
    print(json.dumps(rows))
elif name == "llama-batched-bench":
    for b in value("-npl").split(","):
        if not (mode == "lost" and calls % 2 and b == value("-npl").split(",")[-1]):
            print(json.dumps(dict(pp=int(value("-npp")), tg=int(value("-ntg")), pl=int(b),
                                  speed_tg=5.0 * int(b))))
elif name == "llama-perplexity":
    print("perplexity: calculating perplexity over 3 chunks, n_ctx=512", file=sys.stderr)
    if mode == "short":
        print("perplexity: the data file you provided tokenizes to only 17 tokens", file=sys.stderr)
        sys.exit(0)
    print("[1]10.0,[2]11.0," if mode == "lost" else "[1]10.0,[2]11.0,[3]12.0,")
    if "--ppl-stride" not in args and mode != "lost":
        print("Final estimate: PPL = 12.0000 +/- 0.50000", file=sys.stderr)
elif name == "llama-quantize":
    source, target = args[-4], args[-3]
    Path(target).write_bytes(Path(source).read_bytes())
elif name == "llama-imatrix":
    Path(value("-o")).write_text("imatrix")
"""

TOOLS = (
    *("llama-bench", "llama-batched-bench", "llama-perplexity", "llama-quantize", "llama-imatrix"),
)
TENSORS: list[tuple[str, tuple[int, ...], str]] = [
    ("token_embd.weight", (256, 8), "Q8_0"),
    ("blk.0.ffn_up.weight", (256, 4), "Q8_0"),
    ("blk.1.ffn_up.weight", (256, 4), "Q8_0"),
    ("output_norm.weight", (256,), "F32"),
    ("output.weight", (256, 8), "Q8_0"),
]
METADATA: dict[str, str | bool | int | float] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 4,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 1024,
}


def write_gguf(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...], str]] | None = None,
    metadata: dict[str, str | bool | int | float] | None = None,
) -> Path:
    """A GGUF file of zeros."""
    head, listed = header_bytes(metadata or METADATA, tensors or TENSORS)
    path.write_bytes(head + bytes(listed[-1].offset + padded(listed[-1].nbytes)))
    return path


def fake_tools(folder: Path) -> Path:
    """A bin folder whose programs are :data:`FAKE_TOOL`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOOLS:
        path = folder / name
        path.write_text(FAKE_TOOL.format(python=sys.executable))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def configurer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Makes configurations that run the fake tools: fast.gguf and its source.gguf lie there too."""
    monkeypatch.setenv("PT2_CACHE", str(tmp_path / "cache"))
    bin_dir = fake_tools(tmp_path / "bin")
    (tmp_path / "text.txt").write_text("some words " * 100)
    (tmp_path / "calibration.txt").write_text("other words " * 100)
    write_gguf(tmp_path / "fast.gguf")
    floats = [(n, s, "F16" if len(s) > 1 else "F32") for n, s, _ in TENSORS]
    write_gguf(tmp_path / "source.gguf", floats)

    def make(**options: object) -> Config:
        settings = {
            "bin_dir": str(bin_dir),
            "source": str(tmp_path / "source.gguf"),
            "text": str(tmp_path / "text.txt"),
            "out": str(tmp_path / "out"),
            "bandwidth": 1e9,
            "rounds": 3,
            "threads": 1,
            "quiet": True,
        }
        return Config(**{**settings, **options})  # type: ignore[arg-type]

    return make


def calls(tmp_path: Path, name: str) -> list[list[str]]:
    """The arguments of every call of one fake tool so far."""
    lines = (tmp_path / "bin" / "CALLS").read_text().splitlines()
    return [c[1:] for c in map(json.loads, lines) if c[0] == name]


def make_results(speeds: dict[str, list[float]], **config: object) -> Results:
    """Results of a decode test with these speeds by round; the first model is the baseline."""
    models = [
        Model(
            name=name,
            file=f"{name}.gguf",
            origin="given",
            file_bytes=1000 + i,
            sha256="0" * 64,
            parameters=4000,
            bpw=2.0,
            main_type="Q2_K",
            types={"Q2_K": {"tensors": 1, "elements": 4000, "bytes": 1000}},
            decode_bytes=900,
            kv_bytes=2,
            perplexity=[Perplexity("llama.cpp", 10.0 + i, 0.1, 512, 10, 2550)],
        )
        for i, name in enumerate(speeds)
    ]
    samples = [Sample(n, "tg256", r, v) for n, vs in speeds.items() for r, v in enumerate(vs)]
    machine = {
        "cpu": "Test CPU",
        "cores": 2,
        "ram_bytes": 1 << 30,
        "gpus": [],
        "system": "Linux",
        "load_average": 0.0,
        "date": "2026-01-01 00:00 UTC",
    }
    build = {"description": "test", "variant": "cpu", "build_commit": "abc", "backends": "CPU"}
    settings = {"threads": 2, "rounds": 5, "text": "t.txt", "text_sha256": "1", "chunks": None}
    return Results(
        machine=machine,
        build=build,
        config={**settings, **config},
        models=models,
        samples=samples,
        baseline={"": next(iter(speeds))},
        bandwidth={"bytes_per_second": 1e6, "method": "test", "note": ""},
        complete=True,
    )
