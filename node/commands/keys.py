"""`python -m node keys identity show | export | rotate`: the key that is this node's identity; `keys create | list |
revoke`, the API keys that it gives out, are in api_keys.py.

Rules: the seed is never printed. Nothing is overwritten: an export goes to a new file, a rotated key is kept under
another name. Rotating needs the data directory's lock, so never happens under a running node.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.commands.api_keys import create, listed, revoke
from node.commands.client import EXIT_FAILED, EXIT_USAGE, AsJson, CommandFailed, plainly
from node.commands.node_settings import ConfigFile, DataDir, settings
from node.commands.pages import LOCAL_EXITS, page
from node.commands.tables import print_json

if TYPE_CHECKING:
    from node.config import NodeConfig

EXIT_LOCKED, EXIT_UNSAFE_KEY = 75, 78

keys = typer.Typer(help="Keys of this node.", no_args_is_help=True, pretty_exceptions_enable=False)
_IDENTITY_PAGE = page(
    [
        "python -m node keys identity show",
        "python -m node keys identity export ~/node.key",
        "python -m node keys identity rotate --yes",
    ],
    {**LOCAL_EXITS, 75: "a node runs on that data directory", 78: "others can read the key"},
)
identity = typer.Typer(help="The key that is the node's identity.", no_args_is_help=True, epilog=_IDENTITY_PAGE)
keys.add_typer(identity, name="identity")
_API_PAGE = page(
    [
        "python -m node keys create --name phone --limit 2/s --expires 30d",
        "python -m node keys create --name grafana --scope metrics",
        "python -m node keys list --json",
        "python -m node keys revoke 0f3c9a5d11e2",
    ],
    LOCAL_EXITS,
)
for name, command in (("create", create), ("list", listed), ("revoke", revoke)):
    keys.command(name, epilog=_API_PAGE)(command)


@identity.command(epilog=_IDENTITY_PAGE)
def show(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Print the peer id, the public key and where the key is kept."""
    with plainly(), key_failures():
        path = identity_path(settings(data_dir, config))
        own = load_identity(path)
        if as_json:
            return print_json({"peer_id": own.peer_id, "public_key": own.public_key.hex(), "path": str(path)})
        print(f"peer id     {own.peer_id}\npublic key  {own.public_key.hex()}\nkept in     {path}")


@identity.command(epilog=_IDENTITY_PAGE)
def export(
    file: Annotated[Path, typer.Argument(help="A new file for the copy of the key.")],
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Copy the secret key to a new file, for its owner alone. Whoever has it is this node."""
    with plainly(), key_failures():
        own = load_identity(identity_path(settings(data_dir, config)))
        own.save(file)
        if as_json:
            return print_json({"peer_id": own.peer_id, "path": str(file)})
        print(f"wrote the secret key of {own.peer_id} to {file}; never run two nodes with it at a time")


@identity.command(epilog=_IDENTITY_PAGE)
def rotate(
    data_dir: DataDir = None,
    config: ConfigFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a new identity; the old key is kept beside it. Peers will know this node as somebody new."""
    from crypto.identity import Identity  # PyNaCl: not for --help
    from node.start import locked  # trio: not for --help

    with plainly(), key_failures():
        path = identity_path(settings(data_dir, config))
        folder = path.parent
        old = load_identity(path)
        question = f"Give up the identity {old.peer_id} and make a new one?"
        if not yes and not typer.confirm(question, err=as_json):
            raise CommandFailed("nothing was changed", EXIT_FAILED)
        with locked(folder):
            kept = folder / f"{path.name}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
            fresh = Identity.make()
            _move_away(path, kept)
            try:
                fresh.save(path)
            finally:
                if not path.exists():
                    kept.rename(path)
        if as_json:
            return print_json({"peer_id": fresh.peer_id, "old_peer_id": old.peer_id, "kept": str(kept)})
        print(f"new peer id {fresh.peer_id}\nthe old key ({old.peer_id}) is kept in {kept}")


def _move_away(path: Path, kept: Path) -> None:
    if kept.exists():
        raise CommandFailed(f"{kept} exists already; wait a second and try again", EXIT_FAILED)
    path.rename(kept)


def identity_path(config: NodeConfig) -> Path:
    """Where the node keeps its key."""
    from node.config import KEY_FILE

    return config.data_dir / KEY_FILE


def load_identity(path: Path) -> Any:
    """The node's key. Raises CommandFailed, BadKey, UnsafePermissions."""
    from crypto.identity import Identity

    if not path.exists() and not path.is_symlink():
        raise CommandFailed(f"there is no key at {path} yet; the first start of a node makes it", EXIT_FAILED)
    return Identity.load(path)


@contextmanager
def key_failures() -> Iterator[None]:
    """What is wrong with a key or its folder, as CommandFailed."""
    from crypto.errors import BadKey, UnsafePermissions
    from node.errors import ConfigError, DataDirLocked

    try:
        yield
    except UnsafePermissions as exc:
        raise CommandFailed(str(exc), EXIT_UNSAFE_KEY) from None
    except DataDirLocked as exc:
        raise CommandFailed(str(exc), EXIT_LOCKED) from None
    except ConfigError as exc:
        raise CommandFailed(str(exc), EXIT_USAGE) from None
    except (BadKey, OSError) as exc:
        raise CommandFailed(str(exc), EXIT_FAILED) from None
