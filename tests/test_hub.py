"""A model by its name on the hub: what is fetched, the cache alone, and what fails."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from pt2_core.errors import PT2Error
from pt2_core.model.hub import hub_name, model_folder, model_name

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE.txt": b"MIT",
    "merges.txt": b"a b",
}
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"GGUF",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"x",
    "original/consolidated.00.pth": b"x",
    "picture.png": b"x",
    "modeling_x.py": b"raise SystemExit",
}
SHARDS = {
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "consolidated.safetensors": b"the same again",
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
}


class Hub(ThreadingHTTPServer):
    """A hub with one model in memory; ``served`` are the files that were sent."""

    files: dict[str, bytes]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.served = {}, []
        self.tokens: set[str] = set()


class Answer(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        files = self.server.files
        if self.server.tokens and self.headers.get("Authorization") not in self.server.tokens:
            return self._send(b"", 403, {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/acme/tiny/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", COMMIT):
                return self._send(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            return self._json({"id": "acme/tiny", "sha": COMMIT, "siblings": []})
        if path.startswith("/api/models/acme/tiny/tree/"):
            return self._json(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]
            )
        name = path.removeprefix(f"/acme/tiny/resolve/{COMMIT}/")
        if name in files:
            if self.command == "GET":
                self.server.served.append(name)
            head = {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self._send(files[name], 200, head)
        return self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, head: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in head.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def fetch(hub: Hub, home: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """model_folder("acme/tiny") in a process of its own: the hub's settings are read on import."""
    code = (
        "import sys\nfrom pt2_core.cli import run_cli\n"
        "from pt2_core.model.hub import model_folder\n"
        "sys.exit(run_cli('x', lambda: print(model_folder(*sys.argv[1:]))))"
    )
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    return subprocess.run(
        [sys.executable, "-c", code, *(more or ("acme/tiny",))], capture_output=True, text=True,
        env={**keep, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (SHARDS, set(SHARDS) - {"consolidated.safetensors"}),
        (
            {"model.safetensors": b"all", "consolidated.safetensors": b"again"},
            {"model.safetensors"},
        ),
        ({"odd-name.safetensors": b"all"}, {"odd-name.safetensors"}),
    ],
)
def test_only_what_counts_is_fetched_and_once(
    hub: Hub, tmp_path: Path, weights: dict[str, bytes], wanted: set[str]
) -> None:
    hub.files = {**SMALL, **OTHERS, **weights}
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert names(folder) == set(SMALL) | wanted == set(hub.served)
    assert hub_name(folder) == ("acme/tiny", COMMIT) and model_name(folder) == "tiny"
    hub.served.clear()
    assert fetch(hub, tmp_path).returncode == 0
    assert fetch(hub, tmp_path, HF_HUB_OFFLINE="1").stdout == done.stdout
    assert hub.served == [], "the cache is used"


def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.files = SMALL
    for more, env, words in (
        (("acme/tiny",), {}, "has no safetensors"),
        (("acme/none",), {}, "no such model on the hub; for a private one: hf auth login"),
        (("acme/tiny", "v2"), {}, "the hub's acme/tiny has no revision v2"),
        (("acme/new",), {"HF_HUB_OFFLINE": "1"}, "not in the hub's cache and the hub cannot be"),
        (("acme/new",), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ):
        done = fetch(hub, tmp_path, *more, **env)
        assert done.returncode == 2 and words in done.stderr
        assert done.stderr.splitlines()[-1].startswith("x: error: ")
    hub.tokens = {"Bearer right"}
    refused = fetch(hub, tmp_path / "other")
    assert "acme/tiny is gated: accept its terms" in refused.stderr
    hub.files = {**SMALL, "model.safetensors": b"all"}
    assert fetch(hub, tmp_path / "other", HF_TOKEN="right").returncode == 0


def test_a_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme/tiny").mkdir(parents=True)
    assert model_folder("acme/tiny") == Path("acme/tiny")
    with pytest.raises(PT2Error, match="--revision v1 belongs to a name on the hub"):
        model_folder("acme/tiny", "v1")
    for path in ("models/none/deep", "/abs/none", "none", "./a/b", "../a"):
        assert model_folder(path) == Path(path), "no name on the hub: the reader says what is wrong"
    assert hub_name(tmp_path) is None and model_name(tmp_path / "x") == "x"


def test_a_name_is_quantised_from_the_cache_without_a_connection(tmp_path: Path) -> None:
    """The hub's own layout: links into a folder of blobs."""
    from export_support import make_model

    model = make_model(tmp_path / "model")
    repo = tmp_path / "hf" / "hub" / "models--acme--tiny"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in model.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(repo / "blobs" / blob)
        (repo / "snapshots" / COMMIT / file.name).symlink_to(Path("../../blobs") / blob)
    env = {
        **os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    options = ["--calibration", "bundled:calibration", "--samples", "2", "--seqlen", "32"]
    done = subprocess.run(
        [sys.executable, "-m", "quantize.cli", "acme/tiny", *options, "--no-preflight",
         "--proof-tokens", "0", "--device", "cpu", "--threads", "1"],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run = json.loads((tmp_path / "tiny-pt2" / "run.json").read_text())
    assert hub_name(Path(run["model_dir"])) == ("acme/tiny", COMMIT)
