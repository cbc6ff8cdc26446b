"""From settings to a server behind this node.

Rules: the key is read from its file at start, and again never; no message has it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from node.config import NodeConfig
from node.errors import ConfigError
from node.upstream import Upstream
from node.upstream_answer import REFUSED_KEY
from node.upstream_facts import Served, Unfit
from node.upstream_http import Answered, Server, Trouble
from node.upstream_look import look
from node.upstream_stream import Garbled
from node.upstream_watch import UpstreamConfig

KEY_BYTES_MAX = 4_096


def upstream_of(config: NodeConfig, *, peer: str, on_change: Callable[[], None]) -> Upstream:
    """The server of these settings, not asked yet. Inside trio. Raises ConfigError."""
    return Upstream(server_of(config), wanted_of(config), peer=peer, on_change=on_change)


def server_of(config: NodeConfig) -> Server:
    """The door to it. Raises ConfigError for a key that cannot be read."""
    url = config.upstream_url()
    assert url is not None, "no server is named"
    return Server(url, None if config.backend_key_file is None else read_key(config.backend_key_file))


def wanted_of(config: NodeConfig) -> UpstreamConfig:
    """What is asked of it. A number of requests counts when the operator set it; the default is for own engines."""
    return UpstreamConfig(
        model=None if config.model == "default" else config.model,
        embedding_model=config.embedding_model,
        slots=config.max_batch if "max_batch" in config.model_fields_set else None,
    )


def read_key(path: Path) -> str:
    """The one line of a key file. Raises ConfigError, without the key."""
    try:
        with path.open("rb") as file:
            content = file.read(KEY_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read the key file {path}: {exc.strerror}") from exc
    key = content.strip()
    if not key or len(content) > KEY_BYTES_MAX or not key.isascii() or any(byte <= 32 or byte == 127 for byte in key):
        raise ConfigError(f"the key file {path} must hold one key: printable ASCII, no blanks, one line")
    return key.decode()


async def glance_at(config: NodeConfig) -> Served:
    """Ask the server once what it has. Raises ConfigError in words for the operator."""
    server, wanted = server_of(config), wanted_of(config)
    try:
        async with server:
            main, _ = await look(server, wanted.model, wanted.embedding_model, "")
            return main
    except (Trouble, Garbled, Unfit) as exc:
        refused = isinstance(exc, Answered) and exc.status in (401, 403)
        raise ConfigError(f"the server at {server.base}: {REFUSED_KEY if refused else exc}") from exc
