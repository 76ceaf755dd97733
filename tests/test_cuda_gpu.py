"""Our types on an NVIDIA GPU, with the programs of `pt2-llama build --cuda`.

Both ways the backend has are tested: tile form with kernels of our own (compute capability 8.0 and
more), and the templates of upstream's types (GGML_CUDA_TQ=templates), which older cards use.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llamacpp_bench.run.placement import parse_placement
from pt2_core import formats
from pt2_core.formats import DEFAULT
from pt2_core.gguf_info import read_gguf
from pt2_llama import api, toolchain
from pt2_llama.perplexity import Told

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
EXAMPLES = Path(__file__).parents[1] / "examples"
TYPES = formats.NAMES
ROUTES = pytest.mark.parametrize("route", ["tiles", "templates"])


@pytest.fixture(scope="module")
def build():
    if not toolchain.gpus():
        pytest.skip("no NVIDIA GPU is visible")
    if api.find_build("cuda") is None and shutil.which("nvcc") is None:
        pytest.skip("a GPU is visible, but there is no nvcc to build for it with")
    return api.require_build("cuda")


@pytest.fixture(scope="module")
def models(build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example model in F16 and, rounded by llama-quantize, in our types.

    Names ending in ``-128`` are the same weights read as heads of 128: nonsense as a language
    model, but its attention is the one that we have kernels for.
    """
    folder = tmp_path_factory.mktemp("models")
    source = api.source_dir()
    env = {**os.environ, "PYTHONPATH": str(source / "gguf-py"), "CUDA_VISIBLE_DEVICES": ""}
    files = {}
    for suffix, heads in (("", {}), ("-128", {"num_attention_heads": 2, "num_key_value_heads": 1})):
        hf = folder / f"hf{suffix}"
        shutil.copytree(EXAMPLES / "wiki-llama-7m", hf)
        config = json.loads((hf / "config.json").read_text())
        config |= heads | ({"head_dim": 128} if heads else {})
        (hf / "config.json").write_text(json.dumps(config))
        base = files[f"F16{suffix}"] = folder / f"F16{suffix}.gguf"
        convert = [sys.executable, str(source / "convert_hf_to_gguf.py"), "--outtype", "f16"]
        run([*convert, "--outfile", str(base), str(hf)], env)
        for kind in TYPES:
            file = files[kind + suffix] = folder / f"{kind}{suffix}.gguf"
            run([str(build.tool("llama-quantize")), str(base), str(file), kind], build.env())
    return files


def run(command: list[str], env: dict[str, str]) -> str:
    """What a program prints; the test fails with it if the program does."""
    done = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


def perplexity(build, model: Path, *options: str, route: str | None, layers: int = 99) -> Told:
    """llama-perplexity with layers on the GPU by one of the ROUTES; None: on the CPU."""
    env = {"CUDA_VISIBLE_DEVICES": ""} if route is None else {"GGML_CUDA_TQ": route}
    gpu = () if route is None else ("-ngl", str(layers))
    return build.perplexity(model, "-c", "512", *options, *gpu, env=env, timeout=900)


@ROUTES
def test_backend_operators(build, route: str) -> None:
    """Every operator within its limit; behind a softmax, in one of three rounds.

    Each round draws other values. The templates round activations by 32 and the CPU by 128, and in
    five rounds of twelve the softmax of an attention made more of that than the limit of 1e-2
    (docs/kernels/checks.md): only a case that fails every time is wrong.
    """
    tool = str(build.tool("test-backend-ops"))
    command = [tool, "test", "-b", "CUDA0", "-p", "tq[12]_1"]
    failing: set[str] = set()
    for number in range(3):
        results = operators(command, {**build.env(), "GGML_CUDA_TQ": route})
        failed = {case for case, result in results.items() if result == "FAIL"}
        failing = failed if number == 0 else failing & failed
        if not failed:
            break
        assert {case.partition("(")[0] for case in failed} == {"TQ_ATTENTION"}, failed
    assert not failing
    for op in ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS"):
        seen = [result for case, result in results.items() if case.startswith(f"{op}(")]
        assert seen.count("OK") > 10 and "not supported" not in seen, (op, seen)


def operators(command: list[str], env: dict[str, str]) -> dict[str, str]:
    """Case -> OK, FAIL or not supported, of one round of test-backend-ops."""
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", timeout=900,
    )  # fmt: skip
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    results = dict(re.findall(r"([A-Z][A-Z_]+\([^\n]*?\)): (OK|FAIL|not supported)", plain))
    told = done.returncode == 0 or "FAIL" in results.values()
    assert results and told, f"{command}\n{done.stdout[-4000:]}"
    return results


@ROUTES
def test_memory_keeps_the_files_bytes(build, route: str) -> None:
    program = str(Path(__file__).with_name("cuda_buffers.py"))
    form = "tiles" if route == "tiles" else "file"
    command = [sys.executable, program, str(build.lib_dir), "CUDA0", form]
    assert "all right" in run(command, {**build.env(), "GGML_CUDA_TQ": route})


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", [1, 8, 9, 512])
def test_nothing_of_a_ternary_model_runs_on_the_cpu(
    build, models: dict[str, Path], kind: str, tokens: int
) -> None:
    info = read_gguf(models[kind])
    env = {**build.env(), "GGML_SCHED_DEBUG": "2", "GGML_CUDA_TQ": "tiles"}
    command = [str(build.tool("llama-bench")), "-m", str(models[kind]), "-ngl", "99", "-v"]
    command += ["-p", str(tokens), "-n", "0", "-r", "1", "--no-warmup"]
    placement = parse_placement(run(command, env), info)
    layers = int(info.hparam("block_count"))
    products = placement.ops[kind]["MUL_MAT"]
    assert set(products) == {"CUDA0"} and products["CUDA0"] >= 7 * layers
    # llama.cpp keeps the embedding's table in the host's memory; parse_placement lists that apart
    assert placement.elsewhere == []


@ROUTES
@pytest.mark.parametrize("kind", [*TYPES, *(f"{kind}-128" for kind in TYPES)])
def test_perplexity_is_the_cpus(
    build, models: dict[str, Path], tmp_path: Path, kind: str, route: str
) -> None:
    text = ("-f", str(EXAMPLES / "text" / "wiki.test.txt"), "--chunks", "4")
    base = ("--kl-divergence-base", str(tmp_path / "cpu.kld"))
    on_cpu = perplexity(build, models[kind], *text, *base, route=None).perplexity()
    # -b as well: with -ub alone, several sequences at once take a token each
    for tokens in (512, 64, 40, 16, 9, 8, 3, 1) if route == "tiles" else (512, 1):
        batch = ("-b", str(tokens), "-ub", str(tokens))
        output = perplexity(
            build, models[kind], *base, "--kl-divergence", *batch, route=route
        ).output
        found = dict(re.findall(r"(Mean PPL\(Q\)|Mean    KLD)\s*:\s*([-\d.e]+)", output))
        assert abs(float(found["Mean PPL(Q)"]) / on_cpu - 1) < 0.02, (tokens, output[-2000:])
        assert float(found["Mean    KLD"]) < 0.005, (tokens, output[-2000:])


@pytest.mark.parametrize("kind", [DEFAULT.name, f"{DEFAULT.name}-128"])
def test_several_sequences_at_once_are_as_right_as_one(
    build, models: dict[str, Path], kind: str
) -> None:
    text = ("-f", str(EXAMPLES / "text" / "wiki.test.txt"), "--chunks", "8")
    on_cpu = perplexity(build, models[kind], *text, route=None).perplexity()
    for tokens in (8, 16, 64):  # 1, 2 and 8 of each of the eight sequences that -b has room for
        batch = ("-b", "4096", "-ub", str(tokens))
        found = perplexity(build, models[kind], *text, *batch, route="tiles").perplexity()
        assert abs(found / on_cpu - 1) < 0.01, tokens


@pytest.mark.parametrize("kind", TYPES)
def test_weights_lent_by_the_host_for_large_batches(
    build, models: dict[str, Path], kind: str
) -> None:
    text = ("-f", str(EXAMPLES / "text" / "wiki.test.txt"), "--chunks", "4")
    on_cpu = perplexity(build, models[kind], *text, route=None).perplexity()
    found = perplexity(build, models[kind], *text, route="tiles", layers=0).perplexity()
    assert abs(found / on_cpu - 1) < 0.005


@pytest.mark.parametrize("kind", TYPES)
def test_an_unknown_route_is_an_error(build, models: dict[str, Path], kind: str) -> None:
    command = [str(build.tool("llama-perplexity")), "-m", str(models[kind]), "-ngl", "99"]
    command += ["-f", str(EXAMPLES / "text" / "wiki.test.txt"), "-c", "512", "--chunks", "1"]
    done = subprocess.run(
        command,
        env={**build.env(), "GGML_CUDA_TQ": "tile"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )
    assert done.returncode != 0
    assert 'GGML_CUDA_TQ is "tile": tiles and templates are known' in done.stdout + done.stderr
