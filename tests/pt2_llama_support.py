"""What the tests of pt2-llama share: a cache whose cmake, compilers and programs are stand-ins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pt2_llama import pinned, source, toolchain
from pt2_llama.cache import Places
from pt2_llama.doctor import build_findings

SOURCE = {
    "CMakeLists.txt": "project(x)\n",
    "ggml/CMakeLists.txt": "# ggml\n",
    "ggml/include/ggml.h": "enum { COUNT = 43, };\n",
}


# Plays cmake: "configures" by writing a file, "builds" by writing programs that are shell scripts.
# MODE selects a failure. Every call is noted in the file CALLS.
FAKE_CMAKE = r"""#!/bin/sh
echo "$@" >> "$CALLS"
if [ "$1" = --version ]; then echo "cmake version ${FAKE_VERSION:-3.25.1}"; exit 0; fi
if [ "$1" = -S ]; then
  case "$*" in *no-amx.cmake*) export AMX=off;; *) AMX=on;; esac
  echo "$AMX" > "$4/amx"
  if [ "$MODE" = configure ]; then echo "No CMAKE_CXX_COMPILER could be found."; exit 1; fi
  exit 0
fi
objects=$2; mkdir -p "$objects/bin"; shift 5
case "$MODE" in
  disk) echo "FAILED: x.o"; echo "x.c: error: No space left on device"; exit 1;;
  memory) echo "c++: fatal error: Killed signal terminated program cc1plus"; exit 1;;
  code) echo "tq.c:7:1: error: unknown type name 'foo'"; exit 1;;
  hang) sleep 60;;
esac
i=0
for tool in "$@"; do
  i=$((i+1)); echo "[$i/$#] Linking $tool"
  [ "$MODE" = forgets ] && continue
  cat > "$objects/bin/$tool" <<END
#!/bin/sh
case "\$0" in
*quantize) [ "\$2" = --help ] || : > "\$3"; exit 0;;
*perplexity)
  if [ "$MODE" = amx ] && [ "$(cat "$objects/amx")" = on ]; then kill -SEGV \$\$; fi
  if [ "$MODE" = crash ]; then kill -ILL \$\$; fi
  echo "Final estimate: PPL = ${PPL:-320.5} +/- 1"; exit 0;;
esac
echo "\$(basename "\$0") got \$*"; echo "lib=\$LLAMA_CPP_LIB_PATH"; exit 7
END
  chmod +x "$objects/bin/$tool"
done
echo lib > "$objects/bin/libllama.so.0"; ln -sf libllama.so.0 "$objects/bin/libllama.so"
"""


def stand_in_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A cache with a tiny source, an overlay, and a PATH whose cmake is the stand-in."""
    monkeypatch.setenv("PT2_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "llama.cpp" / "src"
    places = Places(root=root, overlay=tmp_path / "third_party")
    for path, text in SOURCE.items():
        (places.pristine / path).parent.mkdir(parents=True, exist_ok=True)
        (places.pristine / path).write_text(text)
    digests = source.tree_digests(places.pristine, source.needed_files(places.pristine))
    monkeypatch.setattr(pinned, "TREE_SHA256", digests)
    (places.overlay / "overlay").mkdir(parents=True)
    set_overlay(places, "int tq;\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "cmake": FAKE_CMAKE,
        "ninja": "#!/bin/sh\nexit 0\n",
        "cc": '#!/bin/sh\n[ -n "$HAS_AMX" ] && echo "#define __AMX_INT8__ 1"\nexit 0\n',
        "c++": "#!/bin/sh\necho 'c++ 12'\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in ("CC", "CXX", "MODE", "LD_LIBRARY_PATH", "GGML_TQ_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "gpus", list)
    # Nothing of the Python that runs the tests counts, nor is anything installed into it.
    monkeypatch.setattr(toolchain, "_beside_python", lambda name: None)
    monkeypatch.setattr("pt2_llama.bindings.installed_version", lambda: pinned.VERSION)
    monkeypatch.setattr("pt2_llama.cache.places", lambda: places)
    for module in ("api", "cli"):
        monkeypatch.setattr(f"pt2_llama.{module}.places", lambda: places)
    return places


def set_overlay(where: Places, text: str) -> None:
    (where.overlay / "overlay" / "tq.c").write_text(text)


def calls(where: Places) -> list[str]:
    """The command lines that the stand-in cmake was given so far."""
    path = Path(os.environ["CALLS"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line != "--version"]


def command_line(where: Places, *args: str) -> list[str]:
    """The command for a process of its own, with the test's cache and source."""
    program = f"""
import sys; from pathlib import Path
from pt2_llama import api, cli, pinned
from pt2_llama.cache import Places
pinned.TREE_SHA256 = {pinned.TREE_SHA256!r}
where = Places(Path({str(where.root)!r}), Path({str(where.overlay)!r}))
api.places = cli.places = lambda: where
sys.exit(cli.main(sys.argv[1:]))
"""
    return [sys.executable, "-c", program, *args]


def report(where: Places, ask=lambda b: "avx2 on the CPU") -> str:
    """What `pt2-llama doctor` finds out about the builds, a line each."""
    return "\n".join(f"{f.name}|{f.state}|{f.value}|{f.advice}" for f in build_findings(where, ask))
