"""`python -m node doctor`: what is wrong with this node's settings, machine and network, and what to do about it.

Rules: it works with and without a running node. Exit 0 when nothing needs attention, else 1. It reads and tells;
it mends nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from node.commands.checks import Check, Verdict, bad, local_checks, look, ok
from node.commands.client import EXIT_UNREACHABLE, EXIT_USAGE, ApiKey, AsJson, CommandFailed, NodeClient, plainly
from node.commands.node_settings import settings
from node.commands.pages import page
from node.commands.tables import print_json, print_table
from p2p.reach import FORWARD

PLAINLY = "it serves, more slowly; choose another --dtype or --quantize to be served by packed layers"
DOCTOR_PAGE = page(
    [
        "python -m node doctor",
        "python -m node doctor --config app_config.json",
        "python -m node doctor --json | jq '.checks[] | select(.verdict != \"ok\")'",
    ],
    {0: "nothing needs attention", 1: "something does: the table says what to do", 2: "a flag or setting is wrong"},
    {"OPENAGI_...": "the node's settings, as at run", "OPENAGI_API_KEY": "as --api-key, and not seen in ps"},
)
TOLD_MAX = 8  # of failed or refused peers; more say nothing new


def doctor(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="app_config.json of the node.")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="The node's data directory.")] = None,
    http: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The node's HTTP door.")] = None,
    bootstrap_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The node's bootstrap file.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="The node's model.")] = None,
    backend: Annotated[str | None, typer.Option(metavar="BACKEND", help="The node's backend.")] = None,
    backend_key_file: Annotated[Path | None, typer.Option(metavar="FILE", help="The key of that backend.")] = None,
    node: Annotated[
        str | None, typer.Option("--node", metavar="URL", envvar="OPENAGI_NODE", help="The node, if it is elsewhere.")
    ] = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Check this node and say what to do: settings, key, files, ports, clock, disk, peers. It mends nothing.

    Give it the flags that the node runs with. docs/operators/troubleshooting.md has all that it can say.
    """
    with plainly():
        node_config = settings(
            data_dir,
            config,
            http=http,
            bootstrap_file=bootstrap_file,
            model=model,
            backend=backend,
            backend_key_file=backend_key_file,
        )
    checks = list(local_checks(node_config, now_s=time.time()))
    running = any(check.name == "data directory" and check.found.startswith("in use") for check in checks)
    url = node or _url_of(node_config.http_address())
    checks += node_checks(url, expected=running or node is not None, api_key=api_key) if url else []
    is_well = all(check.verdict is Verdict.OK for check in checks)
    if as_json:
        rows = [{"check": c.name, "verdict": c.verdict.value, "result": c.found, "advice": c.advice} for c in checks]
        print_json({"ok": is_well, "checks": rows})
    else:
        rows_told = [(check.name, check.verdict.value, check.found, check.advice) for check in checks]
        print_table("", ("check", "", "result", "what to do"), rows_told)
    raise typer.Exit(0 if is_well else 1)


def _url_of(address: Any) -> str | None:
    """Where the node of these settings answers; None when it has no door or a port that only it knows."""
    if address is None or address.port == 0:
        return None
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    return f"http://[{host}]:{address.port}" if ":" in host else f"http://{host}:{address.port}"


def node_checks(url: str, *, expected: bool, api_key: str | None = None) -> Iterator[Check]:
    """What a running node says of itself. `expected`: one should be there."""
    try:
        with NodeClient(url, api_key) as client:
            told = client.get("/api/v1/status")
    except CommandFailed as failure:
        if failure.exit_code == EXIT_UNREACHABLE and not expected:
            yield ok("running node", f"none at {url}")
        elif failure.exit_code == EXIT_USAGE:  # it is there, and refuses: a key is missing, wrong, or lacks the scope
            yield bad("running node", str(failure), "give a key that may look (keys create --scope metrics)")
        else:
            yield bad("running node", str(failure), "start it, or give its address with --node")
        return
    yield from status_checks(told)


def status_checks(told: Mapping[str, Any]) -> Iterator[Check]:
    """Checks over the JSON of /api/v1/status. What is missing there is not checked."""
    node, peering = _mapping(told.get("node")), _mapping(told.get("peering"))
    yield ok("running node", str(node.get("peer_id") or "it answers"))
    readiness = _mapping(told.get("readiness"))
    if readiness.get("ready", True):
        yield ok("readiness", "ready")
    elif readiness.get("loading"):
        yield look("readiness", str(readiness.get("reason")), "wait: the model is loading")
    else:
        yield bad("readiness", str(readiness.get("reason")), "see the node's log")
    for sentence in readiness.get("degraded") or []:
        if str(sentence).startswith("this machine's clock"):
            yield bad("clock", str(sentence), "timedatectl set-ntp true, or what your system has for it")
    backend = _mapping(told.get("backend"))
    if problem := backend.get("problem"):
        yield bad("backend", str(problem), "is that server running? the node offers nothing until it answers")
    elif backend.get("url"):
        yield ok("backend", f"{backend.get('server')} at {backend.get('url')} answers as {backend.get('model')}")
    linears = _mapping(_mapping(told.get("model")).get("linears"))
    if problem := linears.get("problem"):
        yield look("linear layers", f"{linears.get('kind')}: {problem}", PLAINLY)
    elif linears:
        yield ok("linear layers", str(linears.get("told")))
    yield _connected(peering)
    yield from _reachable(_mapping(told.get("reach")))
    yield from _discovery(peering)
    disk = _mapping(told.get("disk"))
    for row in _rows(disk.get("degraded")):
        yield bad("state on disk", f"since {row.get('since')}: {row.get('sentence')}", "the node serves meanwhile")
    for sentence in disk.get("set_aside") or []:
        yield look("state on disk", str(sentence), "it was learned anew; look at that file, then remove it")
    if duplicate := peering.get("duplicate"):
        yield bad(
            "identity",
            str(duplicate),
            "a data directory was copied: on one of the two, stop the node and `keys identity rotate`",
        )


def _connected(peering: Mapping[str, Any]) -> Check:
    connected, known = peering.get("connected") or 0, peering.get("known") or 0
    if connected:
        return ok("peers", f"{connected} connected, {known} known")
    return look(
        "peers",
        f"none connected, {known} known",
        "alone it serves itself; to join others give --bootstrap MULTIADDR of one of them",
    )


def _reachable(reach: Mapping[str, Any]) -> Iterator[Check]:
    """Whether others can connect to this node, and by which relay where they cannot."""
    verdict, reason = reach.get("verdict"), str(reach.get("reason"))
    advice = str(reach.get("advice") or "")
    if verdict == "unreachable":
        yield bad("reachable", f"unreachable: {reason}", advice)
    elif verdict == "relayed":
        yield look("reachable", f"relayed: {reason}", "it works, more slowly; for a direct way " + FORWARD)
    elif verdict:
        yield ok("reachable", f"{verdict}: {reason}")


def _discovery(peering: Mapping[str, Any]) -> Iterator[Check]:
    """What stands in the way of meeting others: bootstrap peers, refusals, mDNS."""
    for result in _rows(peering.get("bootstrap")):
        if result.get("state") == "failed":
            found = f"{result.get('address')}: {result.get('reason')}"
            yield look("bootstrap peer", found, "is it running, and its port open to this machine?")
    for refusal in _rows(peering.get("refusals")):
        found = f"{refusal.get('peer')} at {refusal.get('address')}: {refusal.get('reason')}"
        yield look("refused peer", found, "nodes meet only with the same --network, --psk-file and protocol version")
    if (mdns := peering.get("mdns", "off")) not in ("off", "starting", "on"):
        yield look("mDNS", str(mdns), "use --bootstrap, or --no-mdns to silence this")


def _rows(value: object) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)][:TOLD_MAX] if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
