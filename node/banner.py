"""What a node prints when it is ready: who it is, where it listens, what it serves.

Rules: once, on stdout, when it is true and not before. Nobody has to read it.
"""

from __future__ import annotations

import json
import logging

from node.config import NodeConfig

_log = logging.getLogger("node")


def print_banner(ready: dict[str, object], config: NodeConfig, peers: int) -> None:
    """Print it, once; with --log-json as one object on a line."""
    if config.log_json:
        _told(json.dumps({**ready, "network": config.network, "peers": peers, "ready": True}))
        return
    lines = [f"peer id   {ready['peer_id']}"]
    lines += [f"listening {address}" for address in ready["listen"]]  # type: ignore[attr-defined]  # a list of str
    lines.append(f"http      http://{ready['http']}" if ready["http"] else "http      off")
    lines.append(f"model     {ready['model']} {ready['revision']}" if ready["model"] else "model     none")
    lines.append(f"network   {config.network}, {peers} {'peer' if peers == 1 else 'peers'} connected")
    lines.append("ready; Ctrl-C stops")
    _told("\n".join(lines))


def _told(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as exc:  # a log on a full disk, a pipe that was closed: nobody reads, and the node serves
        _log.warning("the banner cannot be printed: %s", exc.strerror)
