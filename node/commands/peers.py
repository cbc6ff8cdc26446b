"""`python -m node peers`: whom a running node is connected to, what they offer, and what it saw of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from shutil import get_terminal_size
from typing import Any

from node.commands.client import NODE_URL, ApiKey, AsJson, NodeClient, NodeUrl, plainly
from node.commands.pages import CLIENT_EXITS, CLIENT_VARIABLES, page
from node.commands.tables import Cell, flattened, leaf, print_json, print_table

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
        is_brief = sys.stdout.isatty() and get_terminal_size().columns < WIDE_COLUMNS
        columns, cells = brief_of(rows) if is_brief else columns_of(rows)
        print_table("1 peer" if len(rows) == 1 else f"{len(rows)} peers", columns, cells)
        if is_brief:
            print("ids and addresses in full: a wider window, | cat, or --json")


WIDE_COLUMNS = 170  # from here on a row of COLUMNS stands on one line, or on one for each model
BRIEF_COLUMNS = ("peer", "way", "rtt ms", "models", "free", "tok/s")
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


def columns_of(rows: list[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """The columns that any row has, and their cells; a model is told as name and revision."""
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    return columns, [[_cell(row.get(column)) for column in columns] for row in rows]


def brief_of(rows: list[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """What has room in 80 columns: ids as the dashboard shortens them, a revision below its model's name."""
    cells: list[list[Cell]] = []
    for row in rows:
        peer_id, here = str(row.get("peer_id")), row.get("connected")
        way = ("relay" if row.get("relayed") else "direct") if here else "none"
        told = _cell(row.get("models"))
        models = told if isinstance(told, str) else tuple(word for line in told for word in line.split(" "))
        rest = (_cell(row.get(name)) for name in ("slots_free", "decode_tok_s"))
        cells.append([f"{peer_id[:4]}…{peer_id[-6:]}", way, _cell(row.get("rtt_ms")), models, *rest])
    return list(BRIEF_COLUMNS), cells


def _cell(value: object) -> Cell:
    if isinstance(value, Mapping | list | tuple):
        models = [one for one in value if isinstance(one, Mapping)]
        if models:
            return tuple(f"{one.get('name')} {one.get('revision')}" for one in models)
        return tuple(f"{name} {text}".strip() for name, text in flattened(value)) or "-"
    return leaf(value)
