"""`train status --watch`: one line of the run, rewritten in place; where no terminal reads, a line a change.

Rules: only what the node tells. Seconds left are the median round's less those that this round has lasted. Text of
peers is made printable. A line is written at once, over the one before it, and is never longer than the terminal.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Any

from node.commands.client import NodeClient
from node.commands.tables import printable

LOOK_EVERY_S = 1.0
BAR_CHARS = 20


def watch(client: NodeClient, *, as_json: bool) -> None:
    """Until Ctrl-C. as_json: all that the node tells, a line a change. Raises CommandFailed: the node is gone."""
    is_terminal = sys.stdout.isatty() and not as_json
    shown: object = None
    length = 0
    try:
        while True:
            told = client.get("/api/v1/training")
            if is_terminal:
                text = line(told)[: shutil.get_terminal_size().columns - 1]
                sys.stdout.write("\r" + text.ljust(length))
                sys.stdout.flush()
                length = len(text)
            elif (now := _changing(told)) != shown:
                shown = now
                print(json.dumps(told, ensure_ascii=False) if as_json else line(told), flush=True)
            time.sleep(LOOK_EVERY_S)
    finally:
        if length:
            print()


def line(told: dict[str, Any]) -> str:
    """What is most of interest first: a narrow terminal cuts the end."""
    run = told["run"]
    state = printable(f"{told['state']}: {told['why']}" if told["why"] else told["state"])
    problem = printable(f", {told['problem']}" if told["problem"] else "")
    if run is None:
        return f"{'in no run' if told['wanted'] is None else told['wanted']['run']}, {state}{problem}"
    parts = [
        f"{printable(run['name'])} round {told['round']} {_bar(told['step'], run['steps'])} "
        f"step {told['step']} of {run['steps']}",
        f"loss {_nats(told['loss'])}, held out {_nats(told['held_out_loss'])}",
        _left(told["round_s"], told["round_s_median"]),
        state,
    ]
    return ", ".join(part for part in parts if part) + problem


def _changing(told: dict[str, Any]) -> object:
    """What is worth a line of a log: losses and seconds change at each look."""
    return told["state"], told["why"], told["problem"], told["run"] and (told["round"], told["step"])


def _bar(step: int, steps: int) -> str:
    full = BAR_CHARS * min(step, steps) // max(1, steps)
    return f"[{'#' * full}{'-' * (BAR_CHARS - full)}]"


def _left(round_s: float, median_s: float | None) -> str:
    """Of the round, by those before it."""
    if median_s is None:
        return ""
    left_s = median_s - round_s
    return f"about {left_s:.0f} s left" if left_s >= 0.5 else f"longer than the usual {median_s:.0f} s"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
