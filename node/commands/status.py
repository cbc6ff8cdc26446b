"""`python -m node status`: what a running node is, holds and does."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from node.commands.client import NODE_URL, NodeClient, NodeUrl, plainly
from node.commands.tables import flattened, print_table


def status(
    node: NodeUrl = NODE_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the node's own JSON.")] = False,
) -> None:
    """Show the state of a running node."""
    with plainly(), NodeClient(node) as client:
        told = client.get("/api/v1/status")
        if as_json:
            print(json.dumps(told, ensure_ascii=False, indent=2))
            return
        for section, content in told.items():
            print_table(str(section), ("what", "value"), list(flattened(content, "")) or [("-", "-")])
