"""Ask a model that ``pt2-llama serve`` runs, through the official OpenAI client.

    pip install openai
    pt2-llama serve model.gguf                             # in another terminal
    python examples/client.py "Where do rivers begin?"     # streamed, as it is written
    python examples/client.py "One question" "Another" ... # all at a time, an answer a line

Everything that speaks this protocol works in the same way: the address is http://HOST:PORT/v1, any
name of a model will do, and any key, unless the server has been given keys.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI


def stream(client: OpenAI, question: str, tokens: int) -> None:
    """Print an answer while it is written."""
    parts = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
    )
    for part in parts:
        if part.choices and part.choices[0].delta.content:
            print(part.choices[0].delta.content, end="", flush=True)
    print()


def ask(client: OpenAI, question: str, tokens: int) -> str:
    """An answer as a whole."""
    done = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
    )
    return done.choices[0].message.content or ""


def ask_with_tool(client: OpenAI, question: str, tool: Any, use: Any, tokens: int) -> str:
    """An answer for which the model may call a function first.

    Args:
        tool: the function's description, as the protocol has it.
        use: called with the function's name and its arguments as JSON; returns the result as text.
    """
    messages: list[Any] = [{"role": "user", "content": question}]
    while True:
        done = client.chat.completions.create(
            model="model", messages=messages, tools=[tool], max_tokens=tokens, temperature=0
        )
        message = done.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message)
        for call in message.tool_calls:
            result = use(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="(default: %(default)s)")
    parser.add_argument("--key", default="none", help="one of the server's keys, if it has some")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer, at most")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url, api_key=args.key)
    if len(args.questions) == 1:
        return stream(client, args.questions[0], args.tokens)
    with ThreadPoolExecutor(len(args.questions)) as pool:
        for answer in pool.map(lambda q: ask(client, q, args.tokens), args.questions):
            print(answer)
    return None


if __name__ == "__main__":
    sys.exit(main())
