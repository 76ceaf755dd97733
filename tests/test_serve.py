"""pt2-llama serve: a ternary chat model behind the OpenAI protocol, asked in every way."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bench_support import write_gguf
from chat_model import ANSWERS, CITY, QUESTION, REPLY, RESULT, TOOL, make_chat_model

from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT
from pt2_core.gguf_info import read_gguf
from pt2_llama import api, cli
from pt2_llama.serve import Options, check_model, fitting_context, free_port, server_command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chat model's file; it takes some seconds of training."""
    api.require_build()
    return make_chat_model(tmp_path_factory.mktemp("chat"))


class Server:
    """A running ``pt2-llama serve``."""

    def __init__(self, process: subprocess.Popen[str], said: list[str], url: str) -> None:
        self.process, self.said, self.url = process, said, url

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ask(self, question: str, **more: Any) -> Any:
        """The first choice of an answer at temperature 0."""
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "max_tokens": 80, "temperature": 0, **more}
        return self.post("/v1/chat/completions", **body)["choices"][0]

    def stop(self, number: int) -> str:
        """Send a signal and wait; returns what else was said."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return said


@contextmanager
def serving(model: Path, *more: str | Path) -> Iterator[Server]:
    """Start a server on a free port; when the block is left it is gone."""
    argv = [sys.executable, "-m", "pt2_llama.cli", "serve", model, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*map(str, argv), *map(str, more)], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    said: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if match := re.match(r"ready: (http://\S+)/v1 ", line):
                yield Server(process, said, match.group(1))
                return
        pytest.fail("no server: " + "".join(said))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(chat: Path) -> Iterator[Server]:
    """One server for the tests that only ask it."""
    with serving(chat, "--slots", "8", "--log", chat.with_name("server.log")) as running:
        yield running


@pytest.mark.llama
def test_an_answer_whole_and_streamed(server: Server) -> None:
    question, answer = next(iter(ANSWERS.items()))
    choice = server.ask(question)
    assert choice["message"]["content"] == answer and choice["finish_reason"] == "stop"
    body = {
        "messages": [{"role": "user", "content": question}], "temperature": 0, "stream": True,
        "max_tokens": 80,
    }  # fmt: skip
    request = urllib.request.Request(
        server.url + "/v1/chat/completions", json.dumps(body).encode(),
        {"content-type": "application/json"},
    )  # fmt: skip
    pieces = []
    with urllib.request.urlopen(request, timeout=60) as lines:
        for line in lines:
            data = line.decode().removeprefix("data: ").strip()
            if data.startswith("{"):
                delta = json.loads(data)["choices"][0]["delta"]
                pieces.append(delta.get("content") or "")
    assert "".join(pieces) == answer
    assert sum(bool(p) for p in pieces) > 5, "token by token"


@pytest.mark.llama
def test_eight_at_a_time_are_equal_to_one_by_one(server: Server) -> None:
    single = [server.ask(q)["message"]["content"] for q in ANSWERS]
    assert single == list(ANSWERS.values())
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda q: server.ask(q)["message"]["content"], ANSWERS))
        assert together == single


@pytest.mark.llama
def test_a_template_with_tools(server: Server) -> None:
    choice = server.ask(QUESTION, tools=[TOOL])
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == CITY
    messages = [
        {"role": "user", "content": QUESTION},
        choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": RESULT},
    ]
    assert server.ask("", messages=messages, tools=[TOOL])["message"]["content"] == REPLY


@pytest.mark.llama
def test_another_web_page_may_not_use_it(server: Server) -> None:
    request = urllib.request.Request(server.url + "/v1/models", headers={"Origin": "http://x.test"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers.get("Access-Control-Allow-Origin") in (None, "")
        assert json.load(answer)["data"][0]["id"] == "chat"


@pytest.mark.llama
@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs the package openai")
def test_the_official_client(server: Server) -> None:
    spec = importlib.util.spec_from_file_location("client", ROOT / "examples/client.py")
    assert spec is not None and spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    openai = client.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    used = []

    def use(name: str, arguments: str) -> str:
        used.append((name, json.loads(arguments)))
        return RESULT

    assert client.ask_with_tool(openai, QUESTION, TOOL, use, 80) == REPLY
    assert used == [("weather", CITY)]
    program = [sys.executable, ROOT / "examples/client.py", "--url", f"{server.url}/v1"]
    for questions in (list(ANSWERS)[:1], list(ANSWERS)):
        done = subprocess.run([*program, *questions], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [ANSWERS[q] for q in questions]


@pytest.mark.llama
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs the bindings (pt2-llama bindings)"
)
def test_the_chat_in_the_terminal(chat: Path) -> None:
    question, answer = next(iter(ANSWERS.items()))
    done = subprocess.run(
        [sys.executable, ROOT / "examples/chat.py", chat, "--threads", "1", "--context", "512"],
        input=question + "\n", capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == answer + "\n"


@pytest.mark.llama
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_running_request_may_end_when_the_server_is_stopped(chat: Path, number: int) -> None:
    with serving(chat, "--slots", "2") as server, ThreadPoolExecutor(1) as pool:
        # Long enough to be under way when the signal comes, and short enough for the grace.
        slow = pool.submit(
            server.post, "/v1/completions", prompt="Most", max_tokens=400, temperature=0,
            ignore_eos=True,
        )  # fmt: skip
        busy = server.url + "/slots"
        until = time.monotonic() + 30
        while time.monotonic() < until and not slow.done():
            with urllib.request.urlopen(busy, timeout=60) as answer:
                if any(slot["is_processing"] for slot in json.load(answer)):
                    break
        said = server.stop(number)
        assert slow.result()["usage"]["completion_tokens"] == 400
        assert server.process.returncode == 128 + number
        assert "cleaning up before exit" in said, "llama-server ends by itself"
        assert said.splitlines()[-1].startswith("pt2-llama: interrupted by SIG")
        with pytest.raises(urllib.error.URLError):
            server.post("/v1/completions", prompt="x")


@pytest.mark.llama
def test_a_request_without_end_is_cut_after_the_grace(chat: Path) -> None:
    with serving(chat, "--grace", "0.5", "--server-arg=--context-shift") as server:
        body = {"prompt": "Most", "stream": True, "ignore_eos": True, "max_tokens": 100000}
        request = urllib.request.Request(
            server.url + "/v1/completions", json.dumps(body).encode(),
            {"content-type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as lines:
            lines.readline()
            began = time.monotonic()
            said = server.stop(signal.SIGTERM)
            assert time.monotonic() - began < 20
        assert server.process.returncode == 143
        assert "cleaning up before exit" in said or "get up to 0.5 s" in said


@pytest.mark.llama
def test_a_draft_changes_nothing_but_the_speed(chat: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(chat, "--draft", chat, "--log", log) as server:
        for question, answer in list(ANSWERS.items())[:3]:
            assert server.ask(question)["message"]["content"] == answer
    assert "draft acceptance" in log.read_text()


@pytest.mark.llama
def test_keys_and_a_log(chat: Path, tmp_path: Path) -> None:
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text("# mine\nsecret\n")
    with serving(chat, "--api-key-file", keys, "--log", log) as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.ask("x")
        assert any(line.startswith("serving ") for line in server.said)
        assert not any("srv" in line for line in server.said)
        server.stop(signal.SIGTERM)
    assert "model loaded" in log.read_text()


# -- before anything is started ------------------------------------------------------------------


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A build of which nothing may be started."""

    class NoBuild:
        variant = "cpu"

        def tool(self, name: str) -> Path:
            pytest.fail(f"{name} is started")

    return NoBuild()


def test_wrong_files_are_one_line(no_server: Any, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "text.gguf").write_text("text")
    plain = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}
    tensors = [("token_embd.weight", (32, 4), "F32")]
    write_gguf(tmp_path / "bare.gguf", tensors, {"general.architecture": "llama"})
    write_gguf(tmp_path / "lora.gguf", tensors, {**plain, "general.type": "adapter"})
    write_gguf(tmp_path / "vision.gguf", tensors, {**plain, "general.architecture": "clip"})
    monkeypatch.setattr(api, "require_build", lambda variant: no_server)
    for name, words in (
        ("text.gguf", "is not a GGUF file"),
        ("none.gguf", "no such file"),
        (".", "is a folder, not a GGUF file; of an artifact one is made by: pt2-export"),
        ("bare.gguf", "has no vocabulary"),
        ("lora.gguf", "holds no language model but a adapter"),
        ("vision.gguf", "holds no language model but a model (clip)"),
    ):
        assert cli.main(["serve", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    for wrong in (["--slots", "0"], ["--context", "-1"], ["--port", "70000"], ["--grace", "-1"]):
        write_gguf(tmp_path / "m.gguf", tensors, plain)
        assert cli.main(["serve", str(tmp_path / "m.gguf"), *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for option in ("--template", "--api-key-file", "--draft"):
        assert cli.main(["serve", str(tmp_path / "m.gguf"), option, str(tmp_path / "no")]) == 2
        assert "no: no such file" in capsys.readouterr().err


def test_a_port_in_use_is_refused_and_zero_finds_one() -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PT2Error, match="in use; take another --port"):
            free_port("127.0.0.1", other.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 1023


def test_the_stock_build_refuses_our_types(no_server: Any, tmp_path: Path) -> None:
    no_server.variant = "stock"
    metadata = {
        "general.architecture": "llama", "tokenizer.ggml.model": "gpt2",
        DEFAULT.layout_key(): DEFAULT.layout,
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", [("blk.0.ffn_up.weight", (256, 4), DEFAULT.name)], metadata)
    with pytest.raises(
        PT2Error, match=f"holds {DEFAULT.name}, which the stock build does not know"
    ):
        check_model(tmp_path / "m.gguf", no_server)


def test_the_context_fits_the_memory(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "llama", "llama.context_length": 32768, "llama.block_count": 10,
        "llama.attention.head_count": 10, "llama.embedding_length": 1000,
    }  # fmt: skip
    write_gguf(tmp_path / "m.gguf", [("token_embd.weight", (32, 4), "F32")], metadata)
    info = read_gguf(tmp_path / "m.gguf")
    assert info.kv_bytes_per_token() == 40_000
    whole = 4 * 8192 * 40_000
    assert fitting_context(info, 4, 10 * whole) == 8192
    assert fitting_context(info, 4, whole) == 2048, "half of what is left, at most"
    assert fitting_context(info, 4, 0) == 512
    argv = server_command(Path("llama-server"), info, Options(slots=3), 8080, 1024)
    text = " ".join(argv)
    assert "--parallel 3 --ctx-size 3072" in text and "--host 127.0.0.1" in text
    assert "--offline" in text and "--cors-origins localhost" in text
