"""`python -m node peers`: whom a running node is connected to, what they offer, and what it saw of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from node.commands.client import NODE_URL, NodeClient, NodeUrl, plainly
from node.commands.tables import flattened, leaf, print_table


def peers(
    node: NodeUrl = NODE_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the node's own JSON.")] = False,
) -> None:
    """Show the peers of a running node."""
    with plainly(), NodeClient(node) as client:
        told = client.get("/api/v1/peers")
        if as_json:
            print(json.dumps(told, ensure_ascii=False, indent=2))
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
