"""The settings of a node for commands that look at its data directory, and the flags that find it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.commands.client import EXIT_USAGE, CommandFailed

if TYPE_CHECKING:
    from node.config import NodeConfig

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="The node's data directory.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="app_config.json of the node.")]


def settings(data_dir: Path | None, config: Path | None, **flags: object) -> NodeConfig:
    """The node's settings as `run` would take them. Raises CommandFailed (exit 2)."""
    from node.config import load_config  # pydantic: not for --help
    from node.errors import ConfigError

    given: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if data_dir is not None:
        given["data_dir"] = data_dir
    try:
        return load_config(given, file=config)
    except ConfigError as exc:
        raise CommandFailed(str(exc), EXIT_USAGE) from None
