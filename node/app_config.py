"""The sections of app_config.json, `app.enable.*` and `model.*`, as the settings of node/config.py.

Rules: core. One table names every key of a section and the setting it stands for; a key that is not in it is a
ConfigError that names it. A switch that is false switches its service off whatever else is said of it; one that is
true leaves that as it is, and no switch touches another service. Keys may be nested or dotted; a setting that is
given twice is an error. A key that begins with // is a comment. What is not in a section is a setting by its own name.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from node.errors import ConfigError

COMMENT = "//"
# key -> the setting it is
MODEL_KEYS = {
    "model.model_path": "model",
    "model.model_type": "model_type",
    "model.max_length": "max_length",
    "model.max_tokens": "max_tokens",
    "model.temperature": "temperature",
    "model.device": "device",
    "model.dtype": "dtype",
    "model.quantize": "quantize",
    "model.threads": "threads",
    "model.embedding_model": "embedding_model",
    "model.max_batch": "max_batch",
    "model.kv_cache_mb": "kv_cache_mb",
    "model.cache_mb": "cache_mb",
    "model.backend": "backend",
    "model.backend_key_file": "backend_key_file",
}
# switch -> the setting, and what it is when the service is off
SWITCHES: dict[str, tuple[str, object]] = {
    "app.enable.model": ("model", "none"),
    "app.enable.http": ("http", "off"),
    "app.enable.mdns": ("mdns", False),
    "app.enable.relay": ("relay", False),
    "app.enable.training": ("training", False),
    "app.enable.memory": ("memory", False),
}
# what a reader of the plan may look for, and why there is no such switch
ALWAYS_ON = {
    "app.enable.gossip": "gossip is how nodes learn of each other: it runs whenever the node does",
    "app.enable.p2p": "a node is its connections to peers: they run whenever the node does",
}
_SECTIONS = ("app", "app.enable", "model")


class Setting(NamedTuple):
    """A setting's value, and the key by which the file gave it."""

    key: str
    value: object


def settings_of(given: Mapping[str, object]) -> dict[str, Setting]:
    """The settings of a configuration file's object, by name. Raises ConfigError."""
    found: dict[str, Setting] = {}
    switches: list[tuple[str, object]] = []
    for key, value in _flat(given, ""):
        if key in SWITCHES:
            switches.append((key, value))
            continue
        name = MODEL_KEYS.get(key, key)
        if key.startswith(("app.", "model.")) and key not in MODEL_KEYS:
            raise ConfigError(_unknown(key))
        if name in found:
            raise ConfigError(f"{key} and {found[name].key} are the same setting: leave one of them out")
        found[name] = Setting(key, value)
    seen: set[str] = set()
    for switch, value in switches:
        if switch in seen:
            raise ConfigError(f"{switch} is given twice: leave one of them out")
        seen.add(switch)
        _turn(switch, value, found)
    return found


def _turn(switch: str, value: object, found: dict[str, Setting]) -> None:
    """Apply one switch. Raises ConfigError for one that is no switch, or that contradicts its own service's setting."""
    name, off = SWITCHES[switch]
    if not isinstance(value, bool):
        raise ConfigError(f"{switch} = {reprlib.repr(value)[:80]}: wanted true or false")
    if not value:
        found[name] = Setting(switch, off)
    elif name in found and found[name].value == off:
        raise ConfigError(f"{switch} is true and {found[name].key} is {off!r}: mend one of the two")


def _flat(given: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    """Every leaf by its dotted name; comments left out. Raises ConfigError for an object where there is no section."""
    for name, value in given.items():
        if name.startswith(COMMENT):
            continue
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key in _SECTIONS:
            yield from _flat(value, f"{key}.")
        elif isinstance(value, Mapping) and key.startswith(("app.", "model.")) and key not in (*MODEL_KEYS, *SWITCHES):
            raise ConfigError(_unknown(key))
        elif key in ("app", "app.enable"):
            raise ConfigError(f"{key} = {reprlib.repr(value)[:80]}: wanted an object of keys")
        else:
            yield key, value


def _unknown(key: str) -> str:
    if key in ALWAYS_ON:
        return f"{key} is no switch: {ALWAYS_ON[key]}; leave it out"
    known = SWITCHES if key.startswith("app.") else MODEL_KEYS
    return f"unknown key {key[:80]!r}; the known keys there are {', '.join(known)}"
