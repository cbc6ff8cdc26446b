"""`python -m node chat`: a conversation with a model through a running node, in the terminal.

Rules: a turn that fails is taken back, so that the next one stands on what was really said. Ctrl-C ends the answer
under way (and its work on the peer); a second one, /quit or the end of input ends the conversation.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from node.commands.ask import texts
from node.commands.client import NODE_URL, CommandFailed, NodeClient, NodeUrl, plainly

TURNS_KEPT_MAX = 200  # far above any context; the model's own limit speaks first


def chat(
    node: NodeUrl = NODE_URL,
    model: Annotated[str | None, typer.Option(help="Which model; default: the node's own choice.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
) -> None:
    """Chat with a model through a running node. /reset forgets, /quit ends."""
    with plainly(), NodeClient(node) as client:
        client.get("/healthz")
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature} | (
            {"model": model} if model else {}
        )
        opening = [{"role": "system", "content": system}] if system else []
        turns: list[dict[str, str]] = []
        while (said := _read()) is not None:
            if said in ("/quit", "/exit"):
                return
            if said == "/reset":
                turns.clear()
            elif said:
                turns.append({"role": "user", "content": said})
                answer = _answer(client, {**body, "messages": opening + turns})
                if answer:
                    turns.append({"role": "assistant", "content": answer})
                else:
                    turns.pop()
                del turns[:-TURNS_KEPT_MAX]


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(client: NodeClient, body: dict[str, Any]) -> str:
    """Print one answer; what was printed, empty when it failed before any text."""
    pieces: list[str] = []
    try:
        with client.stream("/v1/chat/completions", {**body, "stream": True}, {}) as (_, events):
            for piece in texts(events, {}):
                pieces.append(piece)
                print(piece, end="", flush=True)
    except CommandFailed as failure:
        print(f"node: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(pieces)
