"""`python -m node train export`: what a run has learnt at this node, as a folder that loads as a model.

Rules: it asks no node, and reads what the node keeps on disk: it works while the node runs and while it does not.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from node.collector import importing
from node.commands.client import EXIT_TRY_LATER, EXIT_USAGE, AsJson, CommandFailed, plainly
from node.commands.tables import print_json


def export(
    run: Annotated[str, typer.Argument(help="The run's name, or the first 8 or more digits of its id.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to make; what is there is never written over.")],
    adapters: Annotated[bool, typer.Option("--adapters", help="LoRA adapters alone, as peft has them.")] = False,
    data_dir: Annotated[Path | None, typer.Option(help="The node's own, as at `run`.")] = None,
    config: Annotated[Path | None, typer.Option(help="The node's app_config.json, as at `run`.")] = None,
    as_json: AsJson = False,
    model: Annotated[str | None, typer.Option(help="The model that the run starts from, if it has moved.")] = None,
) -> None:
    """Write what the run has learnt here as a model: python -m node run --model FOLDER."""
    with importing():
        from gossip.errors import CannotStore
        from model.errors import BadState, CannotWrite, ModelError  # torch and libp2p load only now
        from node.config import load_config
        from node.errors import BadRequest, ConfigError, NotReady
        from node.training_export import Wanted
        from node.training_export import export as written

    with plainly():
        try:
            flags: dict[str, object] = {} if data_dir is None else {"data_dir": data_dir}
            home = load_config(flags, file=config).data_dir
            wanted = Wanted(run=run, to=to, data_dir=home, model=model, adapters=adapters)
            told = written(wanted, time.strftime("%Y-%m-%d"))
        except NotReady as exc:
            raise CommandFailed(exc.message, EXIT_TRY_LATER) from None
        except (BadState, CannotStore, CannotWrite) as exc:
            raise CommandFailed(str(exc)) from None
        except (BadRequest, ConfigError, ModelError) as exc:
            raise CommandFailed(str(exc), EXIT_USAGE) from None
    if as_json:
        return print_json({**told, "to": str(to)})
    what = "adapters" if adapters else "model"
    print(f"the {what} of run {told['run']} after {told['rounds']} rounds ({told['revision']}) is in {to}")
    if newer := told["rounds_committed"] - told["rounds"]:
        print(f"{newer} newer round{'s' * (newer > 1)}: their weights are not on the disk yet; export again later")
    if not adapters:
        print(f"serve it: python -m node run --model {to}")
