"""What is pinned of the source we build on. Nothing here is found at run time.

``pt2-llama repin VERSION --write`` writes the constants of another version.
"""

from __future__ import annotations

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SDIST_BYTES = 76_589_250
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

# The llama.cpp commit that the package carries in vendor/llama.cpp.
LLAMA_COMMIT = "0c1e57098"


def sdist_name(version: str) -> str:
    """Name of the package's source archive."""
    return f"llama_cpp_python-{version}.tar.gz"


def sdist_prefix(version: str) -> str:
    """Folder of llama.cpp in that archive."""
    return f"llama_cpp_python-{version}/vendor/llama.cpp/"


SDIST_NAME = sdist_name(VERSION)
SDIST_PREFIX = sdist_prefix(VERSION)

# What a build, the converters and gguf-py need. The rest (web interface, documentation, vocabulary
# models, other devices' backends) is three quarters of the package.
KEEP_FOLDERS = (
    "cmake",
    "common",
    "conversion",
    "ggml",
    "gguf-py",
    "include",
    "licenses",
    "src",
    "tests",
    "tools",
    "vendor",
)
KEEP_FILES = (
    "CMakeLists.txt",
    "LICENSE",
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "scripts/ui-assets.cmake",
    "tools/ui/CMakeLists.txt",
    "tools/ui/sources.cmake",
    "tools/ui/ui.cpp.in",
    "tools/ui/ui.h.in",
)
KEEP_BACKENDS = ("ggml-blas", "ggml-cpu", "ggml-cuda", "ggml-rpc")
DROP_FOLDERS = (
    "gguf-py/examples",
    "gguf-py/tests",
    "tests/snapshots",
    "tools/mtmd/legacy-models",
    "tools/mtmd/tests",
    "tools/server/bench",
    "tools/server/tests",
    "tools/server/themes",
    "tools/ui",
)

# SHA-256 over the sorted (path, SHA-256) pairs of the kept files, per top-level folder ("." is the
# files at the top), so that an unpacked tree can be checked as strictly as the archive.
TREE_SHA256: dict[str, str] = {
    ".": "000bd0da676d7d92a428a165ee0ac282aad990f921171ce81798a1d24feb9791",
    "cmake": "a882b04892f77c36f7b13ee40b180613e6826b2834f199681ace4e0ec6efbc8e",
    "common": "240ed7d2615f4b1803850cd18732d183dcfec60bf7fc3895f1dc4909d9edbda4",
    "conversion": "7a0dfce30c5c38d434c078510835d47b4fa78f82c05eef8f1c035168d8fef232",
    "ggml": "43ccfde756aeefd6958e599e6e1b1afcc7ee42789d331bd02b303b99087757e3",
    "gguf-py": "dd0df667bef122a8f04680055750c7b36293928ecd8190868a8eb08837557014",
    "include": "d5b64cb2f6a85618b87e24a70f08aad72dd41bc868617a1aaadb35937d9b6a49",
    "licenses": "5060cfeb9dfd0e37422e2cf09731b5d177975d259f7dc8a91a161d1a7c096cc7",
    "scripts": "4c2dc55e6067bad640a7a533d4e9c372cd16d463729622075e34f7792dc5594a",
    "src": "bf7f4072d1237c7e08bedb7173b3f1ef5ea7011dab3f68092743655f0fc47bdd",
    "tests": "453f0c2ac7fcd7f9e11596f5806d838512c40cb7922986d19612ca78b794e998",
    "tools": "08055f7b23229e11d1e89ea840aabeb713823d9c01c0815973c556155fe464a4",
    "vendor": "fe519423ef199e37b690ccb4ee5ce91d9fef7662dd75349aa65c4b72319a2852",
}

# CMake and Ninja of the package index, for machines that have none: (version, SHA-256 of the wheels
# for Linux with glibc and with musl, each on x86-64 and aarch64, and for macOS).
BUILD_PROGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cmake": (
        "3.31.10",
        (
            "2f766bb46367e5e0559fa33184653754bce044583a06014dcaebf8e6dff8a1f1",
            "a4a5615f31f692c9b9aa8b365704e4b76172348af6fa40e16fea3f118bb01194",
            "678fc23db37cc69f01e18eb28790450ecc9401fd2fcd43364cc18f92330c12c2",
            "c2e5361dea9754ed3b06cf834894fb47dcbe7036d5e5d87acaeb10ff3dd5fd10",
            "ad697643a00d9ba85179590a383c4f7401169b55ebf4b8b2938daf28c6bdeb6d",
        ),
    ),
    "ninja": (
        "1.13.0",
        (
            "fb46acf6b93b8dd0322adc3a4945452a4e774b75b91293bafcc7b7f8e6517dfa",
            "3d00c692fb717fd511abeb44b8c5d00340c36938c12d6538ba989fe764e79630",
            "b4f2a072db3c0f944c32793e91532d8948d20d9ab83da9c0c7c15b5768072200",
            "11be2d22027bde06f14c343f01d31446747dbb51e72d00decca2eb99be911e2f",
            "fa2a8bfc62e31b08f83127d1613d10821775a0eb334197154c4d6067b7068ff1",
        ),
    ),
}
