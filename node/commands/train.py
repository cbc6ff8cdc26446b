"""`python -m node train`: begin or join a run with a running node, look at it, pause it, leave it.

Rules: the node does it; here is only said what the operator wants, and shown what the node tells. `export` alone asks
no node (train_export.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from node.commands.client import NODE_URL, ApiKey, AsJson, NodeClient, NodeUrl, plainly
from node.commands.pages import CLIENT_EXITS, CLIENT_VARIABLES, LOCAL_EXITS, page
from node.commands.tables import print_json, print_table
from node.commands.train_export import export
from node.commands.train_watch import watch as follow

train = typer.Typer(
    help="Train a model together with others, on text that stays here.",
    no_args_is_help=True,
    epilog=page(
        [
            "python -m node train start tales --data ~/my-texts",
            "python -m node train join tales --data ~/other-texts",
            "python -m node train status --watch",
            "python -m node train export tales --to ~/models/tales",
        ],
        CLIENT_EXITS,
        CLIENT_VARIABLES,
    ),
)
Data = Annotated[
    list[Path], typer.Option("--data", metavar="PATH", help="Text to train on, file or folder; may be repeated.")
]
Epsilon = Annotated[
    float | None, typer.Option(metavar="E", help="Train privately (docs/PRIVACY.md), spending at most this.")
]
Delta = Annotated[float, typer.Option(metavar="D", help="The delta of --epsilon: well below 1 / rows of the text.")]
ROUNDS_SHOWN = 10  # the newest


def _page(*examples: str) -> str:
    return page([f"python -m node train {example}" for example in examples], CLIENT_EXITS, CLIENT_VARIABLES)


train.command(
    epilog=page(
        [
            "python -m node train export tales --to ~/models/tales",
            "python -m node train export tales --adapters --to ~/tales-lora",
        ],
        {**LOCAL_EXITS, 75: "the run has no weights on the disk yet"},
    )
)(export)


@train.command(epilog=_page("start tales --data ~/my-texts", "start tales --data ~/my-texts --lora-rank 8 --json"))
def start(
    name: Annotated[str, typer.Argument(help="What others join it by: a-z 0-9 . _ -")],
    data: Data,
    node: NodeUrl = NODE_URL,
    api_key: ApiKey = None,
    founder: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Peer id of another founder; may be repeated.")
    ] = None,
    member: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Peer id that may join; none: anybody.")
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Optimiser steps in a round.")] = 20,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows of text at once: how long a request may wait.")] = 2,
    context: Annotated[int, typer.Option(metavar="N", help="Tokens of a row.")] = 128,
    accumulation: Annotated[int, typer.Option(metavar="N", help="Times `rows` that make a step.")] = 4,
    rate: Annotated[float, typer.Option(metavar="R", help="Rate of the optimiser.")] = 3e-4,
    codec: Annotated[
        str | None, typer.Option(metavar="CODEC", help="int4, int8, bf16, fp32, ef64.2b or ef256.2b.")
    ] = None,
    rule: Annotated[
        str, typer.Option(metavar="RULE", help="How updates are merged: adaptive, weighted, multi_krum, ...")
    ] = "adaptive",
    probation: Annotated[int, typer.Option(metavar="N", help="Rounds before a newcomer counts.")] = 3,
    lora_rank: Annotated[int | None, typer.Option(metavar="N", help="Train LoRA adapters of this rank only.")] = None,
    epsilon: Epsilon = None,
    delta: Delta = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Begin a run from the model that the node hosts."""
    asked = {
        "name": name,
        "data": _paths(data),
        "founders": founder or [],
        "members": member or [],
        "steps": steps,
        "rows": rows,
        "context": context,
        "accumulation": accumulation,
        "rate": rate,
        "codec": codec,
        "rule": rule,
        "probation": probation,
        "lora_rank": lora_rank,
        "privacy": _privacy(epsilon, delta),
    }
    told = _said(node, api_key, "start", asked)
    if as_json:
        return print_json(told)
    print(f"run {told['name']} has begun; others join by: python -m node train join {told['name']} --data THEIR_TEXT")
    print(f"its id is {told['id']}")


@train.command(epilog=_page("join tales --data ~/other-texts", "join 3f9a01c2 --data ~/texts --epsilon 4"))
def join(
    run: Annotated[str, typer.Argument(help="The run's name, or the first 8 or more digits of its id.")],
    data: Data,
    node: NodeUrl = NODE_URL,
    api_key: ApiKey = None,
    epsilon: Epsilon = None,
    delta: Delta = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Join a run that a connected peer is in."""
    asked = {"run": run, "data": _paths(data), "privacy": _privacy(epsilon, delta)}
    told = _said(node, api_key, "join", asked)
    if as_json:
        return print_json(told)
    print(f"joining {run}; `python -m node train status` says how far it is")


@train.command(epilog=_page("status", "status --watch", "status --json | jq .round"))
def status(
    node: NodeUrl = NODE_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="One line that follows the round, until Ctrl-C.")] = False,
) -> None:
    """Show the run: rounds, losses, members, what was refused and why."""
    with plainly(), NodeClient(node, api_key) as client:
        if watch:
            follow(client, as_json=as_json)
        told = client.get("/api/v1/training")
        if as_json:
            print_json(told)
        else:
            _show(told)


@train.command(epilog=_page("pause"))
def pause(node: NodeUrl = NODE_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Train no more until `resume`; the node stays a member, and sits rounds out."""
    told = _said(node, api_key, "pause", {})
    if as_json:
        return print_json(told)
    print("paused; `python -m node train resume` goes on")


@train.command(epilog=_page("resume"))
def resume(node: NodeUrl = NODE_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Train again."""
    told = _said(node, api_key, "resume", {})
    if as_json:
        return print_json(told)
    print("training goes on")


@train.command(epilog=_page("leave"))
def leave(node: NodeUrl = NODE_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Leave the run, and tell the others. What was learnt is served until the node ends."""
    told = _said(node, api_key, "leave", {})
    if as_json:
        return print_json(told)
    print("leaving; the others go on without this node")


def _said(node: str, api_key: str | None, what: str, body: dict[str, Any]) -> dict[str, Any]:
    with plainly(), NodeClient(node, api_key) as client:
        told, _ = client.post(f"/api/v1/training/{what}", body, {})
        answer: dict[str, Any] = told
        return answer
    raise AssertionError("plainly ends the process")


def _privacy(epsilon: float | None, delta: float) -> dict[str, float] | None:
    return None if epsilon is None else {"epsilon": epsilon, "delta": delta}


def _paths(data: list[Path]) -> list[str]:
    return [str(path.expanduser().absolute()) for path in data]


def _show(told: dict[str, Any]) -> None:
    run = told["run"]
    is_resting = told["paused"] and told["state"] not in ("paused", "idle")
    state = f"{told['state']}{', to be paused' if is_resting else ''}{': ' if told['why'] else ''}{told['why']}"
    facts = [("state", state)]
    if told["problem"]:
        facts.append(("problem", told["problem"]))
    if run is None:
        return print_table("training", ("what", "value"), facts)
    facts += [
        ("run", f"{run['name']} ({run['id'][:16]})"),
        ("from", f"{run['model']} {run['started_from']}, {run['parameters']:,} parameters"),
        ("round", f"{told['round']}, step {told['step']} of {run['steps']}"),
        ("serving", told["revision"]),
        ("loss", f"{_number(told['loss'])} in training, {_number(told['held_out_loss'])} held out (nats a token)"),
        ("update", f"{run['codec']}, merged by {run['rule']}, at most {run['update_bytes_max'] / 1e6:.2f} MB a round"),
        ("trained here", f"{told['work']['steps']:,} steps, {told['work']['tokens']:,} tokens{_ahead(told)}"),
    ]
    print_table("training", ("what", "value"), facts)
    if told["refused"]:
        print_table("refused", ("peer", "why"), list(told["refused"].items()))
    print_table("members", ("peer", "votes", "proven", "missed", "connected"), [
        (each["peer_id"], _yes(each["votes"]), _yes(each["proven"]), str(each["rounds_missed"]),
         _yes(each["connected"]))
        for each in told["members"]
    ])  # fmt: skip
    if not told["rounds"]:
        return
    print_table("rounds", ("round", "contributed", "missing", "not counted", "by", "held out", "s"), [
        (str(each["round"]), str(len(each["contributed"])), _peers(each["missing"]),
         _peers(list(each["not_counted"])), each["rule"], _number(each["held_out_loss"]), f"{each['seconds']:.1f}")
        for each in told["rounds"][-ROUNDS_SHOWN:]
    ])  # fmt: skip


def _ahead(told: dict[str, Any]) -> str:
    steps = told["work"]["ahead"]
    return f"; {steps:,} of the steps are for the next round" if steps else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _peers(peers: list[str]) -> str:
    return ", ".join(peer[-6:] for peer in peers) or "-"
