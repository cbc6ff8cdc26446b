"""How `python -m node self` shows a state, a history and remembered events to people."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from shutil import get_terminal_size
from statistics import fmean
from typing import Any

from node.commands.plots import BLOCKS, COLUMNS_MAX, DIGITS, plot
from node.commands.tables import Cell, flattened, leaf, print_table, printable

WORDS_SHOWN = 10  # changes of a word, the newest
_UNIX_MS = "Unix ms"


def show_state(told: Mapping[str, Any], *, formulas: bool) -> None:
    """What was measured, by member; with formulas every member, and what it is made of."""
    rows = [row for row in told["fields"] if formulas or _is_measured(row["value"])]
    missing = _missing(told["fields"])
    print(f"now: {printable(str(told['doing']))}")
    if told.get("before"):
        print(f"before the last stop: {printable(str(told['before']))}")
    columns: list[str] = ["member", "value", "unit"]
    cells: list[list[Cell]] = [[row["path"], _value(row["value"], row["unit"]), row["unit"]] for row in rows]
    if formulas:
        columns += ["formula", "source"]
        cells = [[*cell, row["formula"], row["source"]] for cell, row in zip(cells, rows, strict=True)]
    print_table(f"measured at {_time(told['at_ms'])}", columns, cells)
    if missing and not formulas:
        print(f"not measured so far: {', '.join(missing)}")
    if prediction := told.get("prediction"):
        span = f"{_time(prediction['from_ms'])} to {_time(prediction['to_ms'])}"
        names = ("value", "naive", "low", "high")
        print_table(
            f"foretold for {span}",
            ("figure", "expected", "as now", "low", "high"),
            [[name, *(leaf(each.get(key)) for key in names)] for name, each in prediction["figures"].items()],
        )
    for title in ("memory", "cost"):
        print_table(title, ("what", "value"), list(flattened(told.get(title) or {})) or [("-", "-")])


def show_history(told: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Each member as a plot and in numbers; a word as its changes."""
    units = {row["path"]: row["unit"] for row in state["fields"]}
    times: Sequence[int] = told["ts_ms"]
    if not times:
        print("no snapshot is remembered yet")
        return
    span = f"{len(times)} snapshots from {_time(times[0])} to {_time(times[-1])}"
    columns = min(get_terminal_size().columns, COLUMNS_MAX) if sys.stdout.isatty() else COLUMNS_MAX
    for path, numbers in told["figures"].items():
        unit = f" ({units[path]})" if units.get(path) else ""
        print(f"{path}{unit}, {span}")
        known = [each for each in numbers if each is not None]
        if not known:
            print("  not measured in these")
            continue
        print(plot(numbers, columns=columns, signs=_signs()))
        span_told = f"least {leaf(min(known))}, mean {leaf(fmean(known))}, most {leaf(max(known))}"
        print(f"{span_told}, last {leaf(known[-1])}; measured in {len(known)}")
    for path, words in told["words"].items():
        print(f"{path}, {span}")
        changes = list(_changes(times, words))
        for at, word in changes[-WORDS_SHOWN:]:
            print(f"  {_time(at)}  {printable(word)}")
        if not changes:
            print("  not measured in these")


def show_events(told: Mapping[str, Any]) -> None:
    """One row an event."""
    events = told["events"]
    if not events:
        print("nothing is remembered that fits")
        return
    has_likeness = any("likeness" in event for event in events)
    rows: list[list[Cell]] = []
    for event in events:
        body = event["body"]
        what = "forgotten" if body is None else tuple(f"{name} {text}" for name, text in flattened(body) if text != "-")
        like = [leaf(event.get("likeness"))] if has_likeness else []
        rows.append([str(event["id"]), _time(event["ts_ms"]), str(event["kind"]), *like, what])
    columns = ["id", "time", "kind", *(["likeness"] if has_likeness else []), "what"]
    print_table("1 event" if len(rows) == 1 else f"{len(rows)} events", columns, rows)


def _changes(times: Sequence[int], values: Sequence[object]) -> Iterator[tuple[int, str]]:
    before: object = None
    for at, value in zip(times, values, strict=True):
        if value is not None and value != before:
            yield at, str(value)
        before = value


def _missing(fields: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was not measured; of a field of which nothing was, its name alone."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in fields:
        groups.setdefault(str(row["path"]).split(".")[0], []).append(row)
    told = []
    for name, rows in groups.items():
        paths = [str(row["path"]) for row in rows if not _is_measured(row["value"])]
        told += [f"{name} (all)"] if len(paths) == len(rows) else paths
    return told


def _is_measured(value: object) -> bool:
    return value is not None and value != {}


def _value(value: object, unit: str) -> Cell:
    if unit == _UNIX_MS and isinstance(value, int):
        return f"{value} ({_time(value)})"
    if isinstance(value, Mapping | list | tuple):
        return tuple(f"{name} {text}".strip() for name, text in flattened(value)) or "-"
    return leaf(value)


def _time(ms: object) -> str:
    """In UTC, so that two nodes' tables can be laid side by side."""
    from datetime import UTC, datetime  # not for --help

    if not isinstance(ms, int):
        return "-"
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(ms)


def _signs() -> str:
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return DIGITS
    return BLOCKS
