"""Builds for CUDA: architectures, cuBLAS of the toolkit or of Python, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pt2_llama_support import report

from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT, SMALLEST
from pt2_llama import builds, cli, compile, pinned, source, toolchain
from pt2_llama.cache import Places


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("90", "90a"),  # wgmma is in 90a only
        ("86,90a-real", "86;90a-real"),
        ("90-real,90-virtual,100", "90a-real;90-virtual;100"),
        ("80;90;120", "80;90a;120"),
        ("89", "89"),
    ],
)
def test_cuda_architectures(wanted: str, given: str) -> None:
    assert toolchain.cuda_architectures(wanted) == given


def test_an_unknown_cuda_architecture_is_refused() -> None:
    with pytest.raises(PT2Error, match="expected numbers such as 90"):
        toolchain.cuda_architectures("hopper")


def test_cuda_architecture_comes_from_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0'\necho 'NVIDIA A10, 8.6'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert toolchain.gpus() == [("NVIDIA H200", "90"), ("NVIDIA A10", "86")]
    assert toolchain.cuda_architectures(None) == "86;90a"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    with pytest.raises(PT2Error, match=r"no GPU is visible .*--cuda-arch 90"):
        toolchain.cuda_architectures(None)


def fake_toolkit(root: Path, cublas: bool) -> str:
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    if cublas:  # a wrapper elsewhere: where the toolkit is, only nvcc knows
        nvcc.write_text(nvcc.read_text() + f"echo '#$ TOP={root}/lib64/..'\n")
        nvcc = nvcc.rename(root.parent / "nvcc")
    nvcc.chmod(0o755)
    if cublas:
        (root / "include").mkdir()
        (root / "include" / "cublas_v2.h").touch()
        (root / "lib64").mkdir()
        (root / "lib64" / "libcublas.so").touch()
    return str(nvcc)


def test_cublas_of_the_toolkit_then_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_python_cublas_folders", list)
    found = toolchain.find_cublas(fake_toolkit(tmp_path / "with", cublas=True))
    assert found.include is None and "toolkit" in found.origin
    bare = fake_toolkit(tmp_path / "bare", cublas=False)
    with pytest.raises(PT2Error, match="pip install nvidia-cublas"):
        toolchain.find_cublas(bare)
    package = tmp_path / "site" / "nvidia" / "cu13"
    for name in ("include/cublas_v2.h", "lib/libcublas.so.13"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    monkeypatch.setattr(toolchain, "_python_cublas_folders", lambda: [package])
    found = toolchain.find_cublas(bare)
    flags = compile.cuda_flags("90a", bare, found, driver=False)
    assert "-DGGML_CUDA_NO_VMM=ON" in flags
    assert f"-DCUDA_cublas_LIBRARY={package}/lib/libcublas.so.13" in flags
    assert f"-DCMAKE_CUDA_FLAGS=-I{package}/include" in flags


def test_cuda_build_says_where_our_types_run(
    where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    nvcc = fake_toolkit(tmp_path / "cuda", cublas=True)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: nvcc)
    assert cli.main(["build", "--cuda", "--cuda-arch", "90"]) == 0
    error = capfd.readouterr().err
    assert f"{DEFAULT.name} and {SMALLEST.name} have no CUDA kernels yet" in error
    assert "no GPU was visible" in error
    made = builds.require_build(where, "cuda")
    assert "-DGGML_CUDA=ON" in made.stamp.flags and "-DGGML_CUDA_NCCL=OFF" in made.stamp.flags
    assert f"{DEFAULT.name} and {SMALLEST.name} have no CUDA kernels" in report(where)

    text = "- {file: ggml/src/ggml-cuda/mmq.cu, anchor: x, replace: y}"
    (where.pristine / "ggml/src/ggml-cuda").mkdir(parents=True)
    (where.pristine / "ggml/src/ggml-cuda/mmq.cu").write_text("x")
    digests = source.tree_digests(where.pristine, source.needed_files(where.pristine))
    monkeypatch.setattr(pinned, "TREE_SHA256", digests)
    (where.overlay / "edits-cuda.yaml").write_text(text)
    assert builds.find_build(where, "cuda") is None
    assert cli.main(["build", "--cuda", "--cuda-arch", "90"]) == 0
    assert f"{DEFAULT.name} and {SMALLEST.name} run on the GPU" in capfd.readouterr().err
    assert f"{DEFAULT.name} and {SMALLEST.name} run on the GPU" in report(where)
    assert (where.patched / "ggml/src/ggml-cuda/mmq.cu").read_text() == "y"
    assert "have no CUDA kernels" not in report(where)
    assert cli.main(["build", "--cuda-arch", "90"]) == 2
    assert "--cuda-arch needs --cuda" in capfd.readouterr().err
