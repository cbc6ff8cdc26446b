"""What the settings of a node say of its HTTP door: names and pages, keys, wallets. Each is checked here, at the start.

Rules: raises ConfigError, one sentence that names the setting; nothing listens before all of it is good.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from crypto.disk import SYSTEM
from crypto.errors import BadKey
from crypto.wallet import WalletAddress, wallet_address
from node.api_key_file import KEYS_FILE, KeyFile
from node.config import NodeConfig
from node.errors import ConfigError
from node.web.door import DoorConfig
from node.web.gate import GateConfig
from node.web.schema import Defaults

WALLETS_BYTES_MAX = 1 << 20  # 20,000 addresses
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?")

_log = logging.getLogger("node.web")


@dataclass(frozen=True, slots=True, kw_only=True)
class WebConfig:
    """What the application is told at start."""

    door: DoorConfig = field(default_factory=DoorConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    defaults: Defaults = field(default_factory=Defaults)
    self_report: bool = False  # chats may call the node's own functions (node/web/self_tools.py)


def web_config(config: NodeConfig, peer: str) -> WebConfig:
    """All of it. peer: this node. Raises ConfigError."""
    return WebConfig(
        door=door_config(config),
        gate=gate_config(config, peer),
        defaults=Defaults(max_tokens=config.max_tokens, temperature=config.temperature),
        self_report=config.self_report,
    )


def door_config(config: NodeConfig) -> DoorConfig:
    """The names and pages that may ask. Raises ConfigError."""
    return DoorConfig(hosts=frozenset(map(_host, config.hosts)), origins=frozenset(map(_origin, config.origins)))


def gate_config(config: NodeConfig, peer: str) -> GateConfig:
    """Who may ask. peer: this node. Raises ConfigError."""
    keys = KeyFile(config.data_dir / KEYS_FILE)
    if config.api_keys and not len(keys):
        _log.warning("--api-keys, and there is none yet: make one by `python -m node keys create`")
    return GateConfig(
        keys=keys,
        required=config.api_keys,
        strangers=config.strangers,
        audience=peer,
        wallets=frozenset(address for entry in config.wallets for address in _wallets(entry)),
    )


def _host(text: str) -> str:
    if not _NAME.fullmatch(text.lower()):
        raise ConfigError(f"--hosts {text[:100]!r} is not a name like node.example, without scheme and port")
    return text.lower()


def _origin(text: str) -> str:
    wanted = (
        "wanted scheme, host and port as the browser sends them, like https://chat.example or http://localhost:3000"
    )
    try:
        parts = urlsplit(text)
        whole = f"{parts.scheme}://{parts.netloc}"
        good = bool(parts.scheme and parts.hostname) and "@" not in parts.netloc and (parts.port or 1) > 0
    except ValueError:
        whole, good = "", False
    if not good or whole != text or text != text.lower() or not text.isascii() or "*" in text:
        raise ConfigError(f"--origins {text[:100]!r}: {wanted}")
    return text


def _wallets(entry: str) -> list[WalletAddress]:
    """The addresses of one entry: itself, or the lines of the file that it names."""
    if entry.startswith(("0x", "0X")):
        return [_wallet(entry, "--wallets")]
    path = Path(entry).expanduser()
    try:
        content = SYSTEM.read(path, WALLETS_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read the wallets {path}: {exc.strerror}") from exc
    if len(content) > WALLETS_BYTES_MAX:
        raise ConfigError(f"the wallets {path} are over {WALLETS_BYTES_MAX} bytes")
    lines = [line.partition("#")[0].strip() for line in content.decode("utf-8", "replace").splitlines()]
    found = [_wallet(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]
    if not found:  # an empty list would let in any wallet
        raise ConfigError(f"the wallets {path} name none: write one address a line, or leave --wallets out")
    return found


def _wallet(text: str, where: str) -> WalletAddress:
    try:
        return wallet_address(text)
    except BadKey as exc:
        raise ConfigError(f"{where}: {exc}") from exc
