"""`python -m node self`: what a node measured of itself, over time, and what it remembers.

Rules: only what the node tells, or what stands in its memory's file; text that was remembered is made printable. One
thing at a time. `--verify` asks the running node, which has the file open; with --data-dir, or when no node answers at
the usual place, it looks at the file itself and changes nothing. It always says which of the two was done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import urlencode

import typer

from node.commands.client import (
    EXIT_FAILED,
    EXIT_TRY_LATER,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    NODE_URL,
    ApiKey,
    AsJson,
    CommandFailed,
    NodeClient,
    NodeUrl,
    plainly,
)
from node.commands.itself_shown import show_events, show_history, show_state
from node.commands.node_settings import DataDir
from node.commands.pages import CLIENT_EXITS, CLIENT_VARIABLES, page
from node.commands.tables import print_json, printable

SNAPSHOTS, EVENTS = 60, 20  # without --n
SELF_PAGE = page(
    [
        "python -m node self --formulas",
        "python -m node self --history load.loop_lag_ms --history surprise.nll_nats",
        'python -m node self --recall "what was merged" --meaning',
        'python -m node self --note "moved to the cellar" --subject house',
        "python -m node self --verify --data-dir /srv/node",
    ],
    CLIENT_EXITS | {1: "the node failed at it, or its memory is not whole", 78: "others can read the key"},
    CLIENT_VARIABLES,
)


def itself(
    node: NodeUrl = NODE_URL,
    api_key: ApiKey = None,
    formulas: Annotated[bool, typer.Option("--formulas", help="Every member, with formula and source.")] = False,
    history: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A member over time, as load.loop_lag_ms; repeatable.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Walk the whole memory: is anything changed?")] = False,
    recall: Annotated[str | None, typer.Option(metavar="TEXT", help="What is remembered, by words.")] = None,
    meaning: Annotated[bool, typer.Option("--meaning", help="Of --recall: by likeness instead.")] = False,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Of --recall: note, merge, peer, ...")] = None,
    note: Annotated[str | None, typer.Option(metavar="TEXT", help="Remember a text.")] = None,
    subject: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of --note: forgotten by it. Of --recall: only of it.")
    ] = None,
    forget: Annotated[str | None, typer.Option(metavar="SUBJECT", help="Erase all of a subject, for good.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Of --forget: do not ask.")] = False,
    n: Annotated[int | None, typer.Option("--n", metavar="N", help="So many snapshots or events.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what a node measured of itself and what it remembers; walk its memory; note and forget."""
    with plainly():
        said = {"--history": history, "--verify": verify, "--recall": recall is not None, "--note": note is not None,
                "--forget": forget is not None}  # fmt: skip
        wanted = [name for name, value in said.items() if value]
        if len(wanted) > 1:
            raise CommandFailed(f"{' and '.join(wanted)} came together: one at a time", EXIT_USAGE)
        if verify:
            _verify(node, api_key, data_dir, as_json=as_json)
            return
        if data_dir is not None:
            raise CommandFailed("--data-dir is of --verify: all else is asked of the running node", EXIT_USAGE)
        if forget is not None and not yes:
            _confirm(forget, as_json=as_json)
        with NodeClient(node, api_key) as client:
            if history:
                told = client.get(
                    "/api/v1/self/history?" + urlencode({"path": history, "n": SNAPSHOTS if n is None else n}, True)
                )
                return print_json(told) if as_json else show_history(told, client.get("/api/v1/self"))
            if recall is not None:
                by = "meaning" if meaning else "words"
                asked = {"q": recall, "by": by, "n": EVENTS if n is None else n, "kind": kind, "subject": subject}
                given = {name: value for name, value in asked.items() if value is not None}
                told = client.get("/api/v1/memory?" + urlencode(given))
                return print_json(told) if as_json else show_events(told)
            if note is not None:
                told, _ = client.post("/api/v1/memory", {"text": note, "subject": subject or ""}, {})
                return print_json(told) if as_json else print(f"remembered as event {told['id']}")
            if forget is not None:
                told = client.delete("/api/v1/memory?" + urlencode({"subject": forget}))
                return print_json(told) if as_json else print(_forgotten(told["forgotten"], forget))
            told = client.get("/api/v1/self")
            print_json(told) if as_json else show_state(told, formulas=formulas)


def _confirm(subject: str, *, as_json: bool) -> None:
    """Raises CommandFailed unless the subject is typed again; typer.Abort at the end of input."""
    if as_json:
        raise CommandFailed("--forget erases for good: with --json add --yes", EXIT_USAGE)
    said = typer.prompt(f"All of {printable(subject)!r} is erased for good. Type the subject again", err=True)
    if said != subject:
        raise CommandFailed("that is another subject: nothing was forgotten", EXIT_FAILED)


def _forgotten(count: int, subject: str) -> str:
    if not count:
        return f"nothing is remembered of {printable(subject)}"
    events = "1 event of" if count == 1 else f"{count} events of"
    return f"{events} {printable(subject)} erased; the chain names their places and is whole without them"


# --- the walk ---


def _verify(node: str, api_key: str | None, data_dir: Path | None, *, as_json: bool) -> None:
    """Raises CommandFailed when the memory cannot be walked; ends the process with 1 when it is not whole."""
    if data_dir is not None:
        found = _look(data_dir) or _asked_of_its_node(node, api_key, data_dir)
    else:
        try:
            found = _asked(node, api_key)
        except CommandFailed as failure:
            looked = _look(None) if failure.exit_code == EXIT_UNREACHABLE and node == NODE_URL else None
            if looked is None:
                raise
            found = looked
    if as_json:
        print_json(found)
    else:
        _say(found)
    if not found["is_whole"]:
        raise typer.Exit(EXIT_FAILED)


def _say(found: dict[str, Any]) -> None:
    where = printable(str(found["where"]))
    print(f"asked the running node at {where}" if found["by"] == "node" else f"looked at the file {where} itself")
    if found["is_whole"]:
        head = f", the last one {found['head_id']}, hash {found['head_hash']}" if found["head_id"] else ""
        print(f"whole: {found['events']} events{head}")
        return
    fault = found["fault"]
    which = f"event {fault['id']}" if fault["id"] else "the file"
    print(f"NOT WHOLE: {which}: {printable(str(fault['why']))}")


def _asked(node: str, api_key: str | None) -> dict[str, Any]:
    with NodeClient(node, api_key) as client:
        return {**client.get("/api/v1/memory/verify"), "by": "node", "where": client.url}


def _asked_of_its_node(node: str, api_key: str | None, data_dir: Path) -> dict[str, Any]:
    """The node that has the file of this folder open, when it is the one at this address. Raises CommandFailed."""
    try:
        with NodeClient(node, api_key) as client:
            peer_id = client.get("/api/v1/status")["node"]["peer_id"]
    except CommandFailed as failure:
        if failure.exit_code != EXIT_UNREACHABLE:
            raise
        _locked(data_dir, f"and no node answers at {node}")
    if peer_id != _peer_id(data_dir):
        _locked(data_dir, f"and at {node} answers another node, {printable(str(peer_id))}")
    return _asked(node, api_key)


def _locked(data_dir: Path, why: str) -> NoReturn:
    raise CommandFailed(
        f"a node has the memory of {data_dir} open, {why}: name its address by --node, or stop it", EXIT_TRY_LATER
    )


def _peer_id(data_dir: Path | None) -> str:
    """Of the key in a folder, that of the settings if none is named. Raises CommandFailed."""
    from node.commands.keys import identity_path, key_failures, load_identity
    from node.commands.node_settings import settings

    with key_failures():
        return str(load_identity(identity_path(settings(data_dir, None))).peer_id)


def _look(data_dir: Path | None) -> dict[str, Any] | None:
    """What the file itself says; None: a node has it open, or there is none where none was named.

    Raises CommandFailed."""
    from crypto.identity import PeerId  # not for --help
    from node.commands.node_settings import settings
    from node.errors import StoreLocked, StoreUnavailable
    from node.store_look import MEMORY_FILE, look

    path = settings(data_dir, None).data_dir / MEMORY_FILE
    if data_dir is None and not path.exists():
        return None
    peer_id = PeerId(_peer_id(data_dir))
    try:
        found = look(path, peer_id)
    except StoreLocked:
        return None
    except StoreUnavailable as exc:
        raise CommandFailed(str(exc)) from None
    fault = None if found.fault is None else {"id": found.fault.id, "why": found.fault.why}
    return {
        "is_whole": fault is None,
        "events": found.events,
        "head_id": found.head_id,
        "head_hash": found.head_hash,
        "fault": fault,
        "by": "file",
        "where": str(path),
    }
