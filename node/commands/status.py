"""`python -m node status`: what a running node is, holds and does; with --watch, as it changes.

Rules: only what the node tells, and text of peers made printable. The summary leaves out what is well; --all and --json
leave out nothing. Watched on a terminal one table is drawn over itself; elsewhere it is a line a change, with --json
an object a line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NoReturn

import typer

from node.commands.client import NODE_URL, ApiKey, AsJson, NodeClient, NodeUrl, plainly
from node.commands.pages import CLIENT_EXITS, CLIENT_VARIABLES, page
from node.commands.tables import flattened, leaf, print_json, print_table, printable, table_of

LOOK_EVERY_S = 1.0
STATUS_PAGE = page(
    [
        "python -m node status",
        "python -m node status --watch",
        "python -m node status --json | jq .peering.connected",
        "python -m node status --watch --json >> status.jsonl",
    ],
    CLIENT_EXITS,
    CLIENT_VARIABLES,
)
Row = tuple[str, str]


def status(
    node: NodeUrl = NODE_URL,
    api_key: ApiKey = None,
    everything: Annotated[bool, typer.Option("--all", help="All that the node tells, not the summary.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of a running node: whether it is ready, its model, its peers, what it has answered."""
    with plainly(), NodeClient(node, api_key) as client:
        if watch:
            follow(client, as_json=as_json)
        told = client.get("/api/v1/status")
        if as_json:
            print_json(told)
        elif everything:
            for section, content in told.items():
                print_table(str(section), ("what", "value"), list(flattened(content, "")) or [("-", "-")])
        else:
            print_table("", ("what", "value"), list(summary(told)))


def follow(client: NodeClient, *, as_json: bool) -> NoReturn:
    """Until Ctrl-C, which ends it with 130. Raises CommandFailed: the node is gone."""
    if sys.stdout.isatty() and not as_json:
        _draw(client)
    shown: object = None
    while True:
        told = client.get("/api/v1/status")
        if (now := line(told)) != shown:
            shown = now
            if as_json:
                print_json(told, is_line=True)
            else:
                print(now, flush=True)
        time.sleep(LOOK_EVERY_S)


def _draw(client: NodeClient) -> NoReturn:
    from rich.live import Live  # only who watches pays for it

    first = client.get("/api/v1/status")
    with Live(table_of("", ("what", "value"), list(summary(first))), auto_refresh=False) as live:
        while True:
            told = client.get("/api/v1/status")
            live.update(table_of("Ctrl-C ends", ("what", "value"), list(summary(told))), refresh=True)
            time.sleep(LOOK_EVERY_S)


def summary(told: Mapping[str, Any]) -> Iterator[Row]:
    """What a person looks for first. A part that the node does not tell is left out."""
    node, ready = _of(told, "node"), _of(told, "readiness")
    yield "peer id", leaf(node.get("peer_id"))
    if "uptime_s" in node:
        yield (
            "node",
            f"{leaf(node.get('version'))}, up {_span(node['uptime_s'])}, {_mib(node.get('rss_bytes'))} of memory",
        )
    yield "network", leaf(node.get("network"))
    yield "http", leaf(node.get("http"))
    yield "ready", "yes" if ready.get("ready") else f"no: {leaf(ready.get('reason'))}"
    for sentence in ready.get("degraded") or ():
        yield "degraded", leaf(sentence)
    if reach := _of(told, "reach"):
        yield "reach", f"{leaf(reach.get('verdict'))}: {leaf(reach.get('reason'))}"
    yield from _peers(_of(told, "peering"))
    yield from _model(told)
    inference = _of(told, "inference")
    if "requests" in inference:
        yield "answered", _answered(inference)
    if training := _of(told, "training"):
        run = f"{training['run']}, " if training.get("run") else ""
        why = f": {training['why']}" if training.get("why") else ""
        problem = f", {training['problem']}" if training.get("problem") else ""
        yield "training", f"{run}{leaf(training.get('state'))}{why}{problem}"


def _peers(peering: Mapping[str, Any]) -> Iterator[Row]:
    yield "peers", f"{leaf(peering.get('connected'))} connected, {leaf(peering.get('known'))} known"
    for row in peering.get("bootstrap") or ():
        if row.get("state") == "failed":
            yield "bootstrap", f"{row.get('address')}: {row.get('reason')}"
    for row in peering.get("refusals") or ():
        yield "refused", f"{row.get('peer')}: {row.get('reason')}"
    if duplicate := peering.get("duplicate"):
        yield "identity", str(duplicate)


def _model(told: Mapping[str, Any]) -> Iterator[Row]:
    model, backend = _of(told, "model"), _of(told, "backend")
    if not model:
        yield "model", "none"
        return
    for facts in model.get("models") or [model]:
        yield "model", f"{leaf(facts.get('name'))} {leaf(facts.get('revision'))} on {leaf(model.get('device'))}"
    if linears := _of(model, "linears"):
        yield "linear layers", leaf(linears.get("told"))
    if backend.get("url"):
        problem = f", {backend['problem']}" if backend.get("problem") else ""
        yield "backend", f"{leaf(backend.get('server'))} at {backend['url']}{problem}"
    if engine := _of(model, "engine"):
        free, total = leaf(engine.get("slots_free")), leaf(engine.get("slots_total"))
        speed = engine.get("decode_tok_s") or 0.0
        yield "room", f"{free} of {total} slots free, {leaf(engine.get('queue_length'))} waiting, {speed:.1f} tok/s"


def _answered(inference: Mapping[str, Any]) -> str:
    failed = sum((inference.get("errors") or {}).values())
    parts = [f"{inference['requests']} requests", f"{failed} failed", f"{leaf(inference.get('running'))} running"]
    return ", ".join([*parts, f"{leaf(inference.get('completion_tokens'))} tokens made"])


def line(told: Mapping[str, Any]) -> str:
    """What is worth a line of a log when it changes."""
    rows = dict(summary(told))
    ready = "ready" if rows["ready"] == "yes" else f"not ready ({rows['ready'].removeprefix('no: ')})"
    parts = [ready, rows["peers"], *(rows[name] for name in ("model", "answered", "training") if name in rows)]
    return printable(", ".join(parts))


def _of(told: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = told.get(name)
    return value if isinstance(value, Mapping) else {}


def _span(seconds: float) -> str:
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def _mib(size: object) -> str:
    return f"{size / (1 << 20):.0f} MiB" if isinstance(size, int) else "-"
