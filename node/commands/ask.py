"""`python -m node ask TEXT`: one completion through a running node, printed as it comes.

Rules: the answer alone goes to stdout; who served it and how fast goes to stderr, so that the answer can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from node.commands.client import (
    NODE_URL,
    ApiKey,
    AsJson,
    CommandFailed,
    Event,
    NodeClient,
    NodeUrl,
    plainly,
    route_headers,
)
from node.commands.pages import CLIENT_EXITS, CLIENT_VARIABLES, page
from node.commands.tables import print_json, print_piece

STDIN_CHARS_MAX = 1_000_000
ASK_PAGE = page(
    [
        'python -m node ask "Once upon a time"',
        'python -m node ask --chat --temperature 0 "Why is the sky blue?"',
        "python -m node ask - --max-tokens 400 -q < prompt.txt > answer.txt",
        'python -m node ask "Once" --json | jq -r .choices[0].text',
    ],
    CLIENT_EXITS,
    CLIENT_VARIABLES,
)


def ask(
    text: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    node: NodeUrl = NODE_URL,
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the node's own choice.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The most tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.0, help="0: the same answer each time.")] = 0.7,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes a sampled answer repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    route: Annotated[str, typer.Option(metavar="WHERE", help="auto, local or remote.")] = "auto",
    peer: Annotated[str | None, typer.Option(metavar="ID", help="Only this peer may answer.")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the answer.")] = False,
) -> None:
    """Ask a running node one question. The answer goes to stdout as it comes, who gave it and how fast to stderr."""
    with plainly():
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        body |= {key: value for key, value in (("model", model), ("seed", seed)) if value is not None}
        prompt = sys.stdin.read(STDIN_CHARS_MAX) if text == "-" else text
        path, body = prompted(body, prompt, chat=chat)
        headers = route_headers(route, peer)
        with NodeClient(node, api_key) as client:
            if as_json:
                answer, told = client.post(path, body, headers)
                served = {"served_by": told.get("x-served-by"), "revision": told.get("x-model-revision")}
                print_json({**answer, **served})
                return
            _stream(client, path, body, headers, quiet=quiet)


def prompted(body: dict[str, Any], prompt: str, *, chat: bool) -> tuple[str, dict[str, Any]]:
    """The route and the body for a prompt."""
    if not prompt:
        raise CommandFailed("the prompt is empty: give some text, or - to read it from stdin", 2)
    if chat:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}
    return "/v1/completions", {**body, "prompt": prompt}


def _stream(client: NodeClient, path: str, body: dict[str, Any], headers: dict[str, str], *, quiet: bool) -> None:
    began_s = time.monotonic()
    first_s: float | None = None
    usage: dict[str, Any] = {}
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with client.stream(path, body, headers) as (told, events):
            for piece in texts(events, usage):
                first_s = first_s if first_s is not None else time.monotonic() - began_s
                print_piece(piece)
    finally:
        if first_s is not None:  # the shell's prompt, or the error, stands on a line of its own
            print()
    if not quiet:
        print(_summary(told, usage, first_s, time.monotonic() - began_s), file=sys.stderr)


def texts(events: Iterator[Event], usage: dict[str, Any]) -> Iterator[str]:
    """The text of a stream, of either kind of completion; `usage` is filled at its end."""
    for event in events:
        usage.update(event.content.get("usage") or {})
        for choice in event.content.get("choices", ()):
            piece = choice.get("text") or choice.get("delta", {}).get("content")
            if piece:
                yield piece


def _summary(told: Any, usage: dict[str, Any], first_s: float | None, total_s: float) -> str:
    tokens = usage.get("completion_tokens", 0)
    parts = [f"served by {told.get('x-served-by', 'unknown')}", f"model {told.get('x-model-revision', 'unknown')}"]
    parts.append(f"{tokens} tokens in {total_s:.2f} s")
    if first_s is not None:
        parts.append(f"first after {first_s:.2f} s")
        if tokens > 1 and total_s > first_s:
            parts.append(f"{(tokens - 1) / (total_s - first_s):.1f} tok/s")
    return "[" + ", ".join(parts) + "]"
