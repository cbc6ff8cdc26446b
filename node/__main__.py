"""`python -m node`: the command line. Reads the flags, then hands over; nothing heavy is imported before that.

Rules: a command's signature is the declaration of its flags. Every expected failure is one sentence on stderr and an
exit code of docs (2 usage or configuration, 69 nothing to listen on, 75 data directory locked, 78 unsafe key file);
a traceback means a bug. Flags of `run` are told by what they are for.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main: Ctrl-C among the imports ends it without a traceback

from pathlib import Path
from typing import Annotated, Any

import typer

from node.collector import importing
from node.commands.ask import ASK_PAGE, ask
from node.commands.chat import CHAT_PAGE, chat
from node.commands.demo import DEMO_PAGE, demo
from node.commands.doctor import DOCTOR_PAGE, doctor
from node.commands.itself import SELF_PAGE, itself
from node.commands.keys import keys
from node.commands.pages import CLIENT_VARIABLES, RUN_EXITS, RUN_VARIABLES, page
from node.commands.peers import PEERS_PAGE, peers
from node.commands.status import STATUS_PAGE, status
from node.commands.train import train

_RUN_PAGE = page(
    [
        "python -m node",
        "python -m node run --model ~/models/qwen --http 127.0.0.1:8765",
        "python -m node run --model none --bootstrap ADDRESS_OF_A_PEER",
        "python -m node run --config app_config.json --log-json",
    ],
    RUN_EXITS,
    RUN_VARIABLES,
)
_PAGE = page(
    [
        "python -m node",
        'python -m node ask "Once upon a time"',
        "python -m node doctor",
        "python -m node COMMAND --help",
    ],
    {**RUN_EXITS, 1: "a command failed; each says its own codes"},
    {**CLIENT_VARIABLES, **RUN_VARIABLES},
)
SCRIPT = "openagi-node"  # what pip installs beside python; a shell completes this name
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer gives the kind no public name
_HELP_WORDS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="node",
    help="A peer-to-peer node for shared AI. With no command it runs a node.",
    epilog=_PAGE,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_HELP_WORDS,
)
for command, its_page in (
    (ask, ASK_PAGE),
    (chat, CHAT_PAGE),
    (demo, DEMO_PAGE),
    (doctor, DOCTOR_PAGE),
    (peers, PEERS_PAGE),
    (status, STATUS_PAGE),
):
    app.command(epilog=its_page)(command)
app.command("self", epilog=SELF_PAGE)(itself)
app.add_typer(keys, name="keys")
app.add_typer(train, name="train")


@app.command(epilog=_RUN_PAGE)
def run(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="app_config.json: flags by name, and its sections."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Identity, address book and other state.")
    ] = None,
    http: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The HTTP door (port 0: any), or off.")] = None,
    open: Annotated[bool | None, typer.Option("--open", help="Answer anybody on a bind beyond loopback.")] = None,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON written when ready, removed on exit.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = None,
    log_json: Annotated[
        bool | None, typer.Option("--log-json", "--json", help="What is printed, and log lines, as JSON.")
    ] = None,
    api_keys: Annotated[
        bool | None,
        typer.Option("--api-keys", rich_help_panel="Who may ask", help="Answer only who has a key or signs."),
    ] = None,
    strangers: Annotated[
        bool | None, typer.Option(rich_help_panel="Who may ask", help="Answer who signs by a key nobody vouched for.")
    ] = None,
    self_report: Annotated[
        bool | None,
        typer.Option("--self-report", rich_help_panel="Who may ask", help="Chats may have the node tell its state."),
    ] = None,
    wallets: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", rich_help_panel="Who may ask", help="May sign in; or a file of such."),
    ] = None,
    hosts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", rich_help_panel="Who may ask", help="Of this node, as node.example; repeatable."),
    ] = None,
    origins: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", rich_help_panel="Who may ask", help="Page that may, as https://chat.example."),
    ] = None,
    memory: Annotated[
        bool | None, typer.Option(rich_help_panel="Memory", help="Keep what the node did and how it was, on its disk.")
    ] = None,
    memory_mb: Annotated[
        int | None, typer.Option(metavar="MB", rich_help_panel="Memory", help="That it may take on disk.")
    ] = None,
    remember_text: Annotated[
        bool | None,
        typer.Option("--remember-text", rich_help_panel="Memory", help="Also what own clients asked and got."),
    ] = None,
    remember_peers: Annotated[
        bool | None, typer.Option(rich_help_panel="Memory", help="Which answered, over a restart: a hint to routing.")
    ] = None,
    foresight: Annotated[
        bool | None, typer.Option(rich_help_panel="Memory", help="Decline at once what would miss its deadline.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel="Model", help="Name, path or none; default: the embedded one."),
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option(metavar="TYPE", rich_help_panel="Model", help="auto, causal or encoder: what it must be."),
    ] = None,
    embedding_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel="Model", help="Name or path of an encoder for embeddings."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel="Model", help="Tokens of prompt and answer; default: all it reads."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel="Model", help="Of an answer whose request names no limit."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", rich_help_panel="Model", help="Of a request that names none.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", rich_help_panel="Model", help="auto, cpu, cuda or mps.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", rich_help_panel="Model", help="auto, float32, bfloat16 or float16.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="HOW", rich_help_panel="Model", help="none, int8 or int4: the weights, on a CPU."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", rich_help_panel="Model", help="CPU threads of the model; default: cores - 1."),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel="Model", help="Requests answered at the same time.")
    ] = None,
    kv_cache_mb: Annotated[
        int | None,
        typer.Option(metavar="MB", rich_help_panel="Model", help="Memory for the context of running requests."),
    ] = None,
    cache_mb: Annotated[
        int | None,
        typer.Option(metavar="MB", rich_help_panel="Model", help="Memory for answers asked for again; 0: none."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="BACKEND", rich_help_panel="Model", help="transformers, or openai:URL of a server."),
    ] = None,
    backend_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel="Model", help="File with that server's key.")
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(metavar="MULTIADDR", rich_help_panel="Network", help="Where to listen; may be repeated."),
    ] = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option(metavar="MULTIADDR", rich_help_panel="Network", help="A peer, with /p2p/; may be repeated."),
    ] = None,
    bootstrap_file: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel="Network", help="List of peers to join through.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel="Network", help="Name of the network to join.")
    ] = None,
    psk_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel="Network", help="Pre-shared key of a private network (64 hex)."),
    ] = None,
    mdns: Annotated[
        bool | None, typer.Option(rich_help_panel="Network", help="Find peers on the local network.")
    ] = None,
    relay: Annotated[
        bool | None, typer.Option(rich_help_panel="Network", help="Relay for peers behind NAT while reachable.")
    ] = None,
    direct_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", rich_help_panel="Network", help="Of direct channels for bulk (0: any)."),
    ] = None,
    upload_mb_s: Annotated[
        int | None,
        typer.Option(metavar="MB", rich_help_panel="Network", help="A second, of blobs given to all peers together."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="RUN", rich_help_panel="Training", help="Run to join, by name or id; wants --data."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", rich_help_panel="Training", help="Text to train on, file or folder; repeatable."),
    ] = None,
    training: Annotated[
        bool | None, typer.Option(rich_help_panel="Training", help="Take part in runs, as train start and join say.")
    ] = None,
    train_hours: Annotated[
        str | None, typer.Option(metavar="FROM-TO", rich_help_panel="Training", help="Hours to train in, as 22-6.")
    ] = None,
    train_on_battery: Annotated[
        bool | None, typer.Option("--train-on-battery", rich_help_panel="Training", help="Train there too.")
    ] = None,
    train_when_busy: Annotated[
        bool | None, typer.Option("--train-when-busy", rich_help_panel="Training", help="Whatever load is expected.")
    ] = None,
    train_epsilon: Annotated[
        float | None,
        typer.Option(metavar="E", rich_help_panel="Training", help="Train privately, spending at most this."),
    ] = None,
) -> None:
    """Start a node and serve until SIGTERM.

    Each flag is also a key of --config (docs/app_config.example.json) and OPENAGI_... in the environment.
    """
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
    """Entry point. Flags with no command before them belong to `run`; a wrong one is told in one sentence."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments, name = sys.argv[1:], "python -m node"
    own = ("--help", "-h", "--show-completion", "--install-completion")
    if arguments and arguments[0].startswith("-") and arguments[0] not in own:
        arguments = ["run", *arguments]
    if Path(sys.argv[0]).stem == SCRIPT or arguments[:1] in (["--show-completion"], ["--install-completion"]):
        name = SCRIPT
    try:
        code = app(args=arguments, prog_name=name, standalone_mode=False)
    except UsageError as exc:
        code = _refused(exc, name)
    except typer.Abort:
        print("node: stopped, nothing was done", file=sys.stderr)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _refused(exc: Exception, name: str) -> int:
    """A usage error on stderr; its exit code. A group that was given no command shows its page."""
    told = str(getattr(exc, "format_message", lambda: exc)()).strip()
    context: Any = getattr(exc, "ctx", None)
    path = context.command_path if context is not None else name
    if type(exc).__name__ != "NoArgsIsHelpError":  # its page is printed already
        end = " " if told.endswith("?") else "; "
        print(f"node: {told.rstrip('.')}{end}see `{path} --help`", file=sys.stderr)
    return int(getattr(exc, "exit_code", 2))


if __name__ == "__main__":
    main()
