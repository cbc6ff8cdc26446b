"""`python -m node demo`: three real nodes; the one that serves is killed in mid-answer; the answer completes.

Rules: everything happens in a temporary directory and on loopback; every process started here has ended when the
command ends, however it ends. What is printed was measured in this run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from node.commands.client import AsJson
from node.commands.pages import page
from node.commands.processes import Cluster, NodeProcess, NotStarted
from node.commands.tables import print_json

FOUND_S_MAX = 60.0
ANSWER_S_MAX = 120.0
PROMPT = "Once upon a time there was a poor woodcutter"
KILL_AFTER_PIECES = 8
DEMO_PAGE = page(
    ["python -m node demo", "python -m node demo --tokens 400 --keep-logs", "python -m node demo --json | jq .killed"],
    {0: "the answer completed, unchanged", 1: "it did not; the nodes' logs follow", 130: "Ctrl-C; all have ended"},
)


class DemoFailed(Exception):
    """A step did not do what it should; the sentence says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One streamed answer as a client saw it. Times in seconds."""

    text: str
    served_by: str
    first_token_s: float
    longest_gap_s: float
    total_s: float
    finish: str


def demo(
    tokens: Annotated[int, typer.Option(metavar="N", min=20, help="Length of the answer that is interrupted.")] = 200,
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Print the nodes' logs at the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Three nodes on this machine: ask through one without a model, kill the one that answers, see it complete.

    With --json what is told meanwhile goes to stderr, and what was measured to stdout.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="openagi-demo-") as place:
        root = Path(place)
        try:
            with Cluster(root) as cluster:
                say = _say_aside if as_json else _say
                say("starting three nodes ...")
                seed = cluster.reserve("server-1")
                servers = [cluster.start("server-1"), cluster.start("server-2", join=[seed])]
                door = cluster.start("door", "--model", "none", join=[seed])
                figures = _show([node.wait_ready() for node in (door, *servers)], tokens, began, say)
        except (DemoFailed, NotStarted) as exc:
            typer.echo(f"demo: {exc}", err=True)
            _logs(root)
            raise typer.Exit(1) from exc
        if keep_logs:
            _logs(root)
    if as_json:
        return print_json({**figures, "seconds": round(time.monotonic() - began, 3)})
    typer.echo(f"done in {time.monotonic() - began:.1f} s; all processes ended, nothing is left behind")


def _say(line: str) -> None:
    print(line, flush=True)


def _say_aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(nodes: Sequence[NodeProcess], tokens: int, began: float, say: Callable[[str], None]) -> dict[str, object]:
    """Ask twice and kill once; what was measured. Raises DemoFailed."""
    door, *servers = nodes
    names = {node.peer_id: node.name for node in nodes}
    for node in nodes:
        say(f"{node.name}: {node.peer_id}  {node.url}  model {node.ready['model'] or 'none'}")
    model = servers[0].ready["model"]
    _await_model(door, model, len(servers))
    say(f"the door sees {len(servers)} peers that serve {model} ({time.monotonic() - began:.1f} s from the start)")

    calm = _ask(door, model, tokens)
    say(f"\nasked the door, which holds no model: answered by {names[calm.served_by]}")
    say(f"  first token after {calm.first_token_s * 1000:.0f} ms, {tokens} tokens in {calm.total_s:.2f} s")
    say("  " + PROMPT + calm.text[:300].replace("\n", " ") + " ...")

    by_peer = {node.peer_id: node for node in nodes}
    killed: list[str] = []

    def kill(served_by: str) -> None:
        by_peer[served_by].process.kill()
        killed.append(served_by)

    stormy = _ask(door, model, tokens, kill)
    say(f"\nasked again; {names[killed[0]]} served and was killed after {KILL_AFTER_PIECES} pieces")
    say(f"  the answer went on after {stormy.longest_gap_s * 1000:.0f} ms and ended by {stormy.finish!r}")
    if stormy.text != calm.text:
        raise DemoFailed("the interrupted answer differs from the undisturbed one")
    say("  it is byte for byte the undisturbed answer")
    return {
        "nodes": names,
        "model": model,
        "killed": killed[0],
        "undisturbed": asdict(calm),
        "interrupted": asdict(stormy),
        "identical": True,
    }


def _await_model(door: NodeProcess, model: str, servers: int) -> None:
    import httpx  # only when a command needs it

    until = time.monotonic() + FOUND_S_MAX
    seen = 0
    while time.monotonic() < until:
        rows = httpx.get(f"{door.url}/v1/models").json()["data"]
        seen = max([row["peers"] for row in rows if row["id"] == model], default=0)
        if seen >= servers:
            return
        time.sleep(0.1)
    raise DemoFailed(f"the door saw {seen} of {servers} peers that serve {model} within {FOUND_S_MAX:.0f} s")


def _ask(door: NodeProcess, model: str, tokens: int, interrupt: Callable[[str], None] | None = None) -> Answer:
    import httpx  # only when a command needs it

    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    anew = {"cache-control": "no-store"}
    began = last = time.monotonic()
    text, first, gap, finish, pieces = "", 0.0, 0.0, "", 0
    with httpx.stream("POST", f"{door.url}/v1/completions", json=body, headers=anew, timeout=ANSWER_S_MAX) as response:
        if response.status_code != 200:
            raise DemoFailed(f"the door answered {response.status_code}: {response.read().decode()}")
        served_by = response.headers["x-served-by"]
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise DemoFailed(f"the answer ended in an error: {event['error']['message']}")
            now = time.monotonic()
            for choice in event["choices"]:
                text += choice["text"]
                finish = choice["finish_reason"] or finish
            first = first or now - began
            gap, last, pieces = max(gap, now - last) if pieces else 0.0, now, pieces + 1
            if interrupt is not None and pieces == KILL_AFTER_PIECES:
                interrupt(served_by)
    if not finish:
        raise DemoFailed("the stream ended without a finish reason")
    return Answer(
        text=text, served_by=served_by, first_token_s=first, longest_gap_s=gap, total_s=last - began, finish=finish
    )


def _logs(root: Path) -> None:
    for log in sorted(root.glob("*.log")):
        typer.echo(f"--- {log.stem}\n{log.read_text(errors='replace')[-4000:]}", err=True)
