"""`python -m node peers`: whom a running node is connected to, what they offer, and what it saw of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from node.commands.client import NODE_URL, ApiKey, AsJson, NodeClient, NodeUrl, plainly
from node.commands.pages import CLIENT_EXITS, CLIENT_VARIABLES, page
from node.commands.tables import flattened, leaf, print_json, print_table

PEERS_PAGE = page(
    [
        "python -m node peers",
        "python -m node peers --json | jq '.peers[] | [.peer_id, .rtt_ms]'",
    ],
    CLIENT_EXITS,
    CLIENT_VARIABLES,
)


def peers(node: NodeUrl = NODE_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show the peers of a running node: what they offer, how far away they are, what was seen of them."""
    with plainly(), NodeClient(node, api_key) as client:
        told = client.get("/api/v1/peers")
        if as_json:
            print_json(told)
            return
        rows = [row for row in told.get("peers", ()) if isinstance(row, Mapping)]
        if not rows:
            print("no peers: `python -m node doctor` says why and what to do")
            return
        columns, cells = columns_of(rows)
        print_table(f"{len(rows)} peers", columns, cells)


# what a person looks for; --json has the rest
COLUMNS = (
    "peer_id",
    "connected",
    "address",
    "relayed",
    "rtt_ms",
    "models",
    "slots_free",
    "queue_length",
    "decode_tok_s",
    "score",
)


def columns_of(rows: list[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The columns that any row has, and their cells; a model is told as name and revision."""
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    return columns, [[_cell(row.get(column)) for column in columns] for row in rows]


def _cell(value: object) -> str:
    if isinstance(value, Mapping | list | tuple):
        models = [one for one in value if isinstance(one, Mapping)]
        if models:
            return "\n".join(f"{one.get('name')} {one.get('revision')}" for one in models)
        return "\n".join(f"{name} {text}".strip() for name, text in flattened(value)) or "-"
    return leaf(value)
