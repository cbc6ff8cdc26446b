"""`python -m node chat`: a conversation with a model through a running node, in the terminal.

Rules: a turn that fails is taken back, so that the next one stands on what was really said. Ctrl-C ends the answer
under way (and its work on the peer), not the conversation; at the prompt Ctrl-C, /quit or the end of input ends it.
Answers alone go to stdout, all else to stderr.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from node.commands.ask import texts
from node.commands.client import EXIT_USAGE, NODE_URL, ApiKey, CommandFailed, NodeClient, NodeUrl, plainly
from node.commands.pages import CLIENT_EXITS, CLIENT_VARIABLES, page
from node.commands.tables import print_json, print_piece, printable

TURNS_KEPT_MAX = 200  # far above any context; the model's own limit speaks first
HELP = """\
/help          this
/new           forget what was said (also /reset)
/model [NAME]  which models there are; or ask this one from now on
/quit          end (also Ctrl-C or the end of input at the prompt)
Ctrl-C         stop the answer that comes"""
CHAT_PAGE = page(
    [
        "python -m node chat",
        'python -m node chat --system "You answer in one sentence." --temperature 0',
        "printf 'Hello\\nAnd then?\\n' | python -m node chat --json",
    ],
    {0: "the conversation was ended", **{code: told for code, told in CLIENT_EXITS.items() if code not in (0, 130)}},
    CLIENT_VARIABLES,
)


def chat(
    node: NodeUrl = NODE_URL,
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the node's own choice.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before all.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of one answer; default: the node's.")
    ] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0.0, help="0 is greedy.")] = 0.7,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as a line of JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not say who answered.")] = False,
) -> None:
    """Chat with a model through a running node. /help at the prompt says what else there is."""
    with plainly(), NodeClient(node, api_key) as client:
        client.get("/healthz")
        opening = [{"role": "system", "content": system}] if system else []
        body: dict[str, Any] = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens else {})
        talk = _Talk(client=client, body=body, opening=opening, as_json=as_json, quiet=quiet)
        if model:
            body["model"] = model
        if sys.stdin.isatty():
            _aside("/help says what there is, /quit ends")
        while (said := _read()) is not None:
            if said in ("/quit", "/exit"):
                return
            if said.startswith("/"):
                talk.command(said)
            elif said:
                talk.turn(said)


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(slots=True, kw_only=True)
class _Talk:
    """The conversation so far, and how it goes on."""

    client: NodeClient
    body: dict[str, Any]
    opening: list[dict[str, str]]
    as_json: bool
    quiet: bool
    turns: list[dict[str, str]] = field(default_factory=list)

    def command(self, said: str) -> None:
        """One line that begins with a slash."""
        word, _, rest = said.partition(" ")
        match word:
            case "/new" | "/reset":
                self.turns.clear()
                _aside("forgotten")
            case "/model" | "/models":
                self._choose(rest.strip())
            case "/help":
                _aside(HELP)
            case _:
                _aside(f"there is no {printable(word)[:40]}; /help says what there is")

    def turn(self, said: str) -> None:
        """One question and its answer; both are taken back when no answer came."""
        self.turns.append({"role": "user", "content": said})
        answer = self._answer()
        if answer:
            self.turns.append({"role": "assistant", "content": answer})
        else:
            self.turns.pop()
        del self.turns[:-TURNS_KEPT_MAX]

    def _choose(self, name: str) -> None:
        try:
            rows = self.client.get("/v1/models")["data"]
        except CommandFailed as failure:
            return _aside(f"node: {failure}")
        names = [str(row["id"]) for row in rows if row.get("kind") == "causal"]
        if name in names:
            self.body["model"] = name
            return _aside(f"asking {printable(name)} from now on")
        if name:
            _aside(f"nobody serves {printable(name)[:80]} for chats")
        for each in names:
            now = " (asked now)" if each == self.body.get("model") else ""
            _aside(f"  {printable(each)}{now}")

    def _answer(self) -> str:
        """Print one answer; what was printed, empty when it failed before any text."""
        pieces: list[str] = []
        told: dict[str, Any] = {"role": "assistant", "end": "complete"}
        usage: dict[str, Any] = {}
        body = {**self.body, "messages": self.opening + self.turns, "stream": True}
        body["stream_options"] = {"include_usage": True}
        try:
            with self.client.stream("/v1/chat/completions", body, {}) as (headers, events):
                told |= {"served_by": headers.get("x-served-by"), "revision": headers.get("x-model-revision")}
                for piece in texts(events, usage):
                    pieces.append(piece)
                    if not self.as_json:
                        print_piece(piece)
        except CommandFailed as failure:
            _aside(f"node: {failure}")
            if len(self.turns) > 1 and failure.exit_code == EXIT_USAGE:  # it may have grown too long for the model
                _aside("/new forgets what was said")
            told |= {"end": "error", "error": str(failure)}
        except KeyboardInterrupt:
            _aside(" [stopped]")
            told["end"] = "stopped"
        if self.as_json:
            print_json({**told, "content": "".join(pieces), "usage": usage or None}, is_line=True)
            return "".join(pieces)
        print()
        if pieces and not self.quiet and told.get("served_by"):
            tokens = f", {usage['completion_tokens']} tokens" if usage else ""
            _aside(f"[{told['served_by']}, {told['revision']}{tokens}]")
        return "".join(pieces)
