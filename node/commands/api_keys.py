"""`python -m node keys create | list | revoke`: the API keys that this node gives out.

Rules: a key is told once, on stdout, and is in no file and no log; the table and the JSON never have one. A running
node notices the change within a second.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from node.api_keys import (
    ID_BYTES,
    KEYS_MAX,
    NAME_CHARS_MAX,
    SECRET_BYTES,
    ApiKey,
    KeyScope,
    digest_of,
    key_text,
    parse_rate,
    parse_span_s,
)
from node.commands.client import EXIT_FAILED, EXIT_USAGE, CommandFailed, plainly
from node.commands.node_settings import ConfigFile, DataDir, settings

BURST_S = 4.0  # what may come at once is what comes in so many seconds: SECURITY.md has 20 for 5/s

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def create(
    name: Annotated[str, typer.Option(help="Whose it is, or what for.")],
    scope: Annotated[list[str], typer.Option(help="infer, train, metrics or admin; repeatable.")] = ["infer"],  # noqa: B006
    limit: Annotated[str, typer.Option(help="Requests, as 5/s, 30/m or 100/h.")] = "5/s",
    tokens: Annotated[int | None, typer.Option(help="Tokens a minute, prompts and answers; default: no limit.")] = None,
    concurrent: Annotated[int, typer.Option(help="Answers under way at a time.")] = 2,
    expires: Annotated[str | None, typer.Option(help="In how long it ends, as 12h or 30d; default: never.")] = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key and tell it, this once."""
    with plainly():
        path = _path(data_dir, config)
        now = int(time.time())
        id, secret = secrets.token_hex(ID_BYTES), secrets.token_bytes(SECRET_BYTES)
        text = key_text(id, secret)
        try:
            rate = parse_rate(limit)
            given = {
                "id": id,
                "name": name,
                "sha256": digest_of(text),
                "scopes": list(dict.fromkeys(scope)),
                "created_s": now,
                "expires_s": None if expires is None else now + parse_span_s(expires),
                "requests_per_s": rate,
                "burst": max(1.0, BURST_S * rate),
                "tokens_per_min": tokens,
                "concurrent": concurrent,
            }
            key = msgspec.convert(given, ApiKey)
        except msgspec.ValidationError as exc:
            raise CommandFailed(_sentence(exc), EXIT_USAGE) from None
        except ValueError as exc:
            raise CommandFailed(str(exc), EXIT_USAGE) from None
        with _changing(path) as keys:
            if len(keys) >= KEYS_MAX:
                raise CommandFailed(f"{path} has {KEYS_MAX} keys, as many as a node keeps: remove some", EXIT_FAILED)
            keys.append(key)
        if as_json:
            print(json.dumps({**_told(key, now), "key": text}))
        else:
            print(text)
            typer.echo(
                f"API key {id} of {name}: this is the only time that it is told; only its hash is kept", err=True
            )


def listed(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show the API keys that were made."""
    from node.api_key_file import read_keys
    from node.errors import ConfigError

    with plainly():
        path, now = _path(data_dir, config), int(time.time())
        try:
            rows = [_told(key, now) for key in read_keys(path)]
        except ConfigError as exc:
            raise CommandFailed(str(exc), EXIT_FAILED) from None
        if as_json:
            print(json.dumps({"keys": rows}))
        elif not rows:
            print("there are no API keys; make one by `python -m node keys create --name NAME`")
        else:
            _print(rows)


def revoke(
    id: Annotated[str, typer.Argument(help="The id of a key, as `keys list` shows it.")],
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """End an API key at once; it stays in the list."""
    with plainly():
        path, now = _path(data_dir, config), int(time.time())
        with _changing(path) as keys:
            found = next((number for number, key in enumerate(keys) if key.id == id), None)
            if found is None:
                known = ", ".join(key.id for key in keys[:10]) or "none"
                raise CommandFailed(f"there is no API key {id[:40]!r}; there are: {known}", EXIT_USAGE)
            if keys[found].revoked_s is None:
                keys[found] = msgspec.structs.replace(keys[found], revoked_s=now)
            told = _told(keys[found], now)
        print(json.dumps(told) if as_json else f"the API key {id} of {told['name']} is revoked")


def _path(data_dir: Path | None, config: Path | None) -> Path:
    from node.api_key_file import KEYS_FILE

    return settings(data_dir, config).data_dir / KEYS_FILE


@contextmanager
def _changing(path: Path) -> Iterator[list[ApiKey]]:
    """changing_keys, whose failures are a command's."""
    from node.api_key_file import changing_keys
    from node.errors import ConfigError

    try:
        with changing_keys(path) as keys:
            yield keys
    except ConfigError as exc:
        raise CommandFailed(str(exc), EXIT_FAILED) from None


def _sentence(exc: msgspec.ValidationError) -> str:
    what, _, where = str(exc).partition(" - at `$.")
    field = where.strip("`").partition("[")[0]
    match field:
        case "name":
            return f"--name wants 1 to {NAME_CHARS_MAX} characters"
        case "scopes":
            return f"--scope wants one of {', '.join(KeyScope)}; it may be repeated"
        case "tokens_per_min":
            return f"--tokens: {what}"
        case "concurrent":
            return f"--concurrent: {what}"
        case _:
            return f"--limit: {what}"


def _told(key: ApiKey, now: int) -> dict[str, Any]:
    """What may be known of a key."""
    from crypto.disk import told_time

    is_over = key.expires_s is not None and key.expires_s <= now
    return {
        "id": key.id,
        "name": key.name,
        "scopes": [scope.value for scope in key.scopes],
        "state": "revoked" if key.revoked_s is not None else "expired" if is_over else "valid",
        "requests_per_s": key.requests_per_s,
        "tokens_per_min": key.tokens_per_min,
        "concurrent": key.concurrent,
        "created": told_time(key.created_s),
        "expires": told_time(key.expires_s),
        "revoked": told_time(key.revoked_s),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("id", "name", "scopes", "state", "requests/s", "tokens/min", "concurrent", "expires"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row["id"],
            escape(row["name"]),
            ", ".join(row["scopes"]),
            row["state"],
            f"{row['requests_per_s']:g}",
            str(row["tokens_per_min"] or "any"),
            str(row["concurrent"]),
            row["expires"] or "never",
        )
    Console(width=140).print(table)
