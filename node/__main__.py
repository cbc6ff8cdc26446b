"""`python -m node`: the command line. Reads the flags, then hands over; nothing heavy is imported before that.

Rules: a command's signature is the declaration of its flags. Every expected failure is one sentence on stderr and an
exit code of docs (2 usage or configuration, 69 nothing to listen on, 75 data directory locked, 78 unsafe key file);
a traceback means a bug.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from node.collector import importing
from node.commands.ask import ask
from node.commands.chat import chat
from node.commands.demo import demo
from node.commands.doctor import doctor
from node.commands.keys import keys
from node.commands.peers import peers
from node.commands.status import status
from node.commands.train import train

app = typer.Typer(
    name="node",
    help="A peer-to-peer node for shared AI. With no command it runs a node.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (ask, chat, demo, doctor, peers, status):
    app.command()(command)
app.add_typer(keys, name="keys")
app.add_typer(train, name="train")


@app.command()
def run(
    config: Annotated[Path | None, typer.Option(help="app_config.json; its keys are these flags' names.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Identity, address book and other state.")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of the HTTP door (port 0: any), or off.")] = None,
    listen: Annotated[list[str] | None, typer.Option(help="Multiaddr to listen on; may be repeated.")] = None,
    bootstrap: Annotated[list[str] | None, typer.Option(help="Multiaddr of a peer, with /p2p/; repeatable.")] = None,
    bootstrap_file: Annotated[Path | None, typer.Option(help="List of peers to join through.")] = None,
    network: Annotated[str | None, typer.Option(help="Name of the network to join.")] = None,
    psk_file: Annotated[Path | None, typer.Option(help="Pre-shared key of a private network (64 hex).")] = None,
    mdns: Annotated[bool | None, typer.Option(help="Find peers on the local network.")] = None,
    direct_port: Annotated[int | None, typer.Option(help="TCP port of direct channels for bulk (0: any).")] = None,
    upload_mb_s: Annotated[int | None, typer.Option(help="MB/s of blobs given to all peers together.")] = None,
    relay: Annotated[bool | None, typer.Option(help="Relay for peers behind NAT while reachable.")] = None,
    model: Annotated[str | None, typer.Option(help="Name, path or none; default: the embedded one.")] = None,
    embedding_model: Annotated[str | None, typer.Option(help="Name or path of an encoder for embeddings.")] = None,
    backend: Annotated[str | None, typer.Option(help="transformers, or openai:URL of a server.")] = None,
    backend_key_file: Annotated[Path | None, typer.Option(help="File with that server's key.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    quantize: Annotated[str | None, typer.Option(help="none, int8 or int4: the weights, on a CPU.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the model; default: cores - 1.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Requests answered at the same time.")] = None,
    kv_cache_mb: Annotated[int | None, typer.Option(help="Memory for the context of running requests.")] = None,
    cache_mb: Annotated[int | None, typer.Option(help="Memory for answers that are asked for again; 0: none.")] = None,
    train: Annotated[str | None, typer.Option(help="Run to join, by name or id; wants --data.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Text to train on, file or folder; repeatable.")] = None,
    train_hours: Annotated[str | None, typer.Option(help="Hours to train in, as 22-6.")] = None,
    train_on_battery: Annotated[bool | None, typer.Option("--train-on-battery", help="Train there too.")] = None,
    train_epsilon: Annotated[float | None, typer.Option(help="Train privately, spending at most this.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="JSON written when ready, removed on exit.")] = None,
    open: Annotated[bool | None, typer.Option("--open", help="Answer anybody on a bind beyond loopback.")] = None,
    api_keys: Annotated[bool | None, typer.Option("--api-keys", help="Answer only who has a key or signs.")] = None,
    strangers: Annotated[bool | None, typer.Option(help="Answer signed requests of keys nobody vouched for.")] = None,
    wallets: Annotated[list[str] | None, typer.Option(help="Address that may sign in, or file of such.")] = None,
    hosts: Annotated[list[str] | None, typer.Option(help="Name of this node, as node.example; repeatable.")] = None,
    origins: Annotated[list[str] | None, typer.Option(help="Page that may ask, as https://chat.example.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Log lines as JSON.")] = None,
) -> None:
    """Start a node and serve until SIGTERM. Each flag is also a key of --config and OPENAGI_... in the environment."""
    given: dict[str, Any] = {key: value for key, value in locals().items() if value not in (None, [])}
    file = given.pop("config", None)
    for key in ("listen", "bootstrap", "data", "wallets", "hosts", "origins"):
        if key in given:
            given[key] = tuple(given[key])
    with importing():
        from node.start import start  # libp2p and torch load only now, after the flags are known

    raise typer.Exit(start(given, file))


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        context.invoke(run)


def main() -> None:
    """Entry point. Flags with no command before them belong to `run`."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("--help", "-h"):
        arguments = ["run", *arguments]
    app(args=arguments, prog_name="python -m node")


if __name__ == "__main__":
    main()
