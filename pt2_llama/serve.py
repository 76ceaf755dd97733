"""``pt2-llama serve``: llama-server with settings that suit a machine of one's own.

The server's own log goes to stderr (or into a file); what this module says of it comes in between:
what is loaded, where it listens, and how it ended. A signal first lets the running requests end.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pt2_core.commands import command
from pt2_core.errors import PT2Error, reason
from pt2_core.files import human_bytes, human_seconds
from pt2_core.formats import NAMES
from pt2_core.gguf_info import GGUFInfo, read_gguf
from pt2_core.process import children
from pt2_core.process.stop import Stopped
from pt2_core.progress import say
from pt2_llama.builds import Build
from pt2_llama.toolchain import available_memory

LARGEST_CONTEXT, SMALLEST_CONTEXT = 8192, 512
# The key-value caches may take this share of the memory that the model leaves.
CACHE_SHARE = 0.5
TEMPLATE_KEY, VOCABULARY_KEY = "tokenizer.chat_template", "tokenizer.ggml.model"


@dataclass(frozen=True)
class Options:
    """How to serve a model.

    Attributes:
        host: address to listen on; port: 0 takes a free one.
        slots: requests that are answered at a time; the others wait.
        context: tokens of one request, prompt and answer; 0 takes the model's own, at most 8192 and
            less where the memory is short.
        threads: of the CPU; 0 leaves it to llama-server.
        template: file with a chat template in the place of the model's own.
        draft: small model that proposes tokens, for speculative decoding.
        api_key_file: file with the keys that a request must show one of.
        log: file for the server's log, None: stderr.
        grace: seconds that running requests get when the server is stopped.
        more: further arguments of llama-server.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    slots: int = 4
    context: int = 0
    threads: int = 0
    template: Path | None = None
    draft: Path | None = None
    api_key_file: Path | None = None
    log: Path | None = None
    grace: float = 5.0
    more: tuple[str, ...] = ()


def serve(build: Build, model: Path, options: Options) -> None:
    """Serve a model until a signal comes, or llama-server ends by itself.

    Raises:
        PT2Error: the file is none that can be served, the address cannot be used, or llama-server
            ends by itself.
        Stopped: a signal came; by then the server has ended.
    """
    info = check_model(model, build)
    for given in (options.template, options.api_key_file):
        if given is not None and not given.is_file():
            raise PT2Error(f"{given}: no such file")
    if options.draft is not None:
        check_model(options.draft, build)
    port = free_port(options.host, options.port)
    context = options.context or fitting_context(info, options.slots, available_memory())
    argv = server_command(build.tool("llama-server"), info, options, port, context)
    say(_intention(info, options, context))
    if not is_loopback(options.host) and options.api_key_file is None:
        say(f"warning: whoever reaches {options.host} can use this server: see --api-key-file")
    if TEMPLATE_KEY not in info.metadata and options.template is None:
        say(
            "warning: the file has no chat template, so chats are put into llama-server's default; "
            "a base model is asked through /v1/completions, and --template FILE gives another"
        )
    with _log_file(options.log) as log:
        # The log has to come through while we wait, whoever reads it.
        streams: dict[str, Any] = {"stdout": log, "stderr": children.STDOUT}
        with children.child(argv, env=build.env(), **streams) as process:
            try:
                _wait_until_ready(process, options, port)
                say(f"ready: {_address(options.host, port)}/v1 (stop with Ctrl+C)")
                status = process.wait()
            except Stopped:
                _let_requests_end(process, options, port)
                raise
    raise PT2Error(f"llama-server ended by itself ({_how(status)}); {_see(options)}")


def check_model(path: Path, build: Build) -> GGUFInfo:
    """Refuse what llama-server cannot serve, before it is started.

    Raises:
        PT2Error: what the file is instead, and what to do.
    """
    if path.is_dir():
        made = command("pt2-export", "model.gguf", "--from", path)
        raise PT2Error(
            f"{path} is a folder, not a GGUF file; of an artifact one is made by: {made}"
        )
    info = read_gguf(path)
    if path != info.shards[0]:
        raise PT2Error(f"{path} is not the first of its parts; serve {info.shards[0]}")
    kind = info.metadata.get("general.type", "model")
    if kind != "model" or info.architecture == "clip":
        raise PT2Error(f"{path} holds no language model but a {kind} ({info.architecture})")
    if info.metadata.get(VOCABULARY_KEY, "none") in ("none", "no_vocab"):
        raise PT2Error(f"{path} has no vocabulary; export the model again, with its tokenizer")
    ours = [t for t in info.types() if t in NAMES]
    if ours and build.variant == "stock":
        raise PT2Error(f"{path} holds {ours[0]}, which the stock build does not know; leave it out")
    return info


def fitting_context(info: GGUFInfo, slots: int, memory: int) -> int:
    """Tokens per slot: the model's own context, at most 8192, halved until the caches fit.

    Args:
        memory: bytes that the model and the caches may take together.
    """
    context = min(info.hparam("context_length") or LARGEST_CONTEXT, LARGEST_CONTEXT)
    room = CACHE_SHARE * max(0, memory - info.file_bytes)
    while context > SMALLEST_CONTEXT and slots * context * info.kv_bytes_per_token() > room:
        context //= 2
    return context


def server_command(
    tool: Path, info: GGUFInfo, options: Options, port: int, context: int
) -> list[str]:
    """llama-server's command line. It fetches nothing, and other web pages may not use it."""
    argv: list[str | Path | int] = [
        *(tool, "--model", info.path, "--alias", info.path.stem),
        *("--host", options.host, "--port", port),
        *("--parallel", options.slots, "--ctx-size", options.slots * context),
        *("--no-kv-unified", "--jinja", "--no-ui", "--offline", "--cors-origins", "localhost"),
        # A stream is only ended between two of its pings, and they come every 30 s by default.
        *("--sse-ping-interval", 1),
    ]
    if options.threads:
        argv += ["--threads", options.threads]
    if options.template is not None:
        argv += ["--chat-template-file", options.template]
    if options.draft is not None:
        argv += ["--model-draft", options.draft, "--spec-type", "draft-simple"]
    if options.api_key_file is not None:
        argv += ["--api-key-file", options.api_key_file]
    return [*map(str, argv), *options.more]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in ("::1", "localhost") or host.startswith("127.")


def free_port(host: str, port: int) -> int:
    """``port``, or a free one for 0.

    Raises:
        PT2Error: another program has it, or this machine has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as e:
        why = reason(e) if isinstance(e, OSError) else "ports are numbers below 65536"
        raise PT2Error(f"cannot listen on {host}:{port}: {why}; take another --port") from e


def _intention(info: GGUFInfo, options: Options, context: int) -> str:
    cache = options.slots * context * info.kv_bytes_per_token()
    caches = f", caches {human_bytes(cache)}" if cache else ""
    return (
        f"serving {info.path} ({info.main_type()}, {human_bytes(info.file_bytes)}): "
        f"{options.slots} requests at a time, {context} tokens each{caches}"
    )


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Stderr:
    """Our stderr as a log file that is not closed."""

    def __enter__(self) -> int:
        return 2

    def __exit__(self, *error: object) -> None: ...


def _log_file(path: Path | None) -> IO[bytes] | _Stderr:
    if path is None:
        return _Stderr()
    try:
        return path.open("ab")
    except OSError as e:
        raise PT2Error(f"cannot write the log {path}: {reason(e)}") from e


def _wait_until_ready(process: subprocess.Popen[Any], options: Options, port: int) -> None:
    began = time.monotonic()
    while process.poll() is None:
        if _get(options, port, "/health") is not None:
            return say(f"loaded in {human_seconds(time.monotonic() - began)}")
        time.sleep(0.1)
    how = _how(process.returncode)
    raise PT2Error(f"llama-server could not load the model ({how}); {_see(options)}")


def _let_requests_end(process: subprocess.Popen[Any], options: Options, port: int) -> None:
    """Wait while a slot works, at most ``options.grace`` seconds, and end the server."""
    until = time.monotonic() + options.grace
    told = False
    while process.poll() is None and time.monotonic() < until:
        slots = _get(options, port, "/slots")
        busy = sum(bool(slot.get("is_processing")) for slot in slots or [])
        if not busy:
            break
        if not told:
            say(f"stopping: {busy} requests get up to {human_seconds(options.grace)} to end")
            told = True
        time.sleep(0.1)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(children.GRACE_SECONDS)


def _get(options: Options, port: int, path: str) -> Any:
    """The server's JSON answer, None where it does not answer or is not ready."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", path, headers=_authorization(options.api_key_file))
        answer = connection.getresponse()
        return json.loads(answer.read()) if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def _authorization(keys: Path | None) -> Mapping[str, str]:
    if keys is None:
        return {}
    lines = keys.read_text(encoding="utf-8").splitlines()
    key = next((line for line in lines if line and not line.startswith("#")), "")
    return {"Authorization": f"Bearer {key}"}


def _how(status: int) -> str:
    return f"stopped by signal {-status}" if status < 0 else f"exit status {status}"


def _see(options: Options) -> str:
    where = "the lines above" if options.log is None else os.fspath(options.log)
    return f"see {where}"
