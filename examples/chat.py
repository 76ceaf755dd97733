"""Chat with a ternary model in the terminal, in this process: llama-cpp-python on our library.

    pt2-llama build                  # once; it installs the bindings as well
    python examples/chat.py model.gguf

Ctrl+D ends the chat.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from pt2_llama import api


def load(path: str, context: int, threads: int | None) -> Any:
    """The model. Which library the bindings load is decided when they are imported."""
    os.environ.update(api.require_build().exports())
    from llama_cpp import Llama

    return Llama(path, n_ctx=context, n_threads=threads, verbose=False)


def reply(model: Any, messages: list[dict[str, str]], tokens: int) -> str:
    """Print the answer to a chat while it is written; returns it."""
    text = ""
    parts = model.create_chat_completion(messages, max_tokens=tokens, temperature=0, stream=True)
    for part in parts:
        piece = part["choices"][0]["delta"].get("content") or ""
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--context", type=int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer, at most")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all)")
    args = parser.parse_args()
    model = load(args.model, args.context, args.threads)
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        messages.append({"role": "user", "content": question})
        answer = reply(model, messages, args.tokens)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
