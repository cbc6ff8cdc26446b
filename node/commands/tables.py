"""Prints what a node told as tables for people; rich is imported on first use."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

VALUE_CHARS_MAX = 300
PIPED_COLUMNS = 1000
Cell = str | tuple[str, ...]  # a text, or lines below each other


def print_piece(text: str) -> None:
    """A piece of an answer, as it comes; raw where no terminal reads."""
    print(spoken(text) if sys.stdout.isatty() else text, end="", flush=True)


def print_json(value: object, *, is_line: bool = False) -> None:
    """One JSON value on stdout, for programs. is_line: on one line, and at once."""
    print(json.dumps(value, ensure_ascii=False, indent=None if is_line else 2), flush=is_line)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """One table on stdout; plain text when that is no terminal."""
    from rich.console import Console  # only what prints a table pays for it

    console = Console()
    if not console.is_terminal:  # piped output is for grep: a row must not be folded at 80 columns
        console = Console(width=PIPED_COLUMNS)
    console.print(table_of(title, columns, rows))


def table_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """A table for rich to draw; its cells are text, and no markup."""
    from rich.table import Table  # see print_table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", expand=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        lines = ((cell,) if isinstance(cell, str) else cell for cell in row)
        table.add_row(*(Text("\n".join(map(printable, each))) for each in lines))
    return table


def printable(text: str) -> str:
    """Text of peers without control characters: a peer must not write to the user's terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def spoken(text: str) -> str:
    """Text of a model as a terminal may have it: lines and tabs, and no escape sequence of whoever made it."""
    return "".join(char if char in "\n\t" or unicodedata.category(char) != "Cc" else "?" for char in text)


def flattened(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every leaf; lists of plain values on one line."""
    if isinstance(value, Mapping):
        if not value and name:
            yield name, "-"
        for key, inner in value.items():
            yield from flattened(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        if any(isinstance(inner, Mapping | list | tuple) for inner in value):
            for index, inner in enumerate(value):
                yield from flattened(inner, f"{name}.{index}")
        else:
            yield name, ", ".join(leaf(inner) for inner in value) or "-"
    else:
        yield name, leaf(value)


def leaf(value: object) -> str:
    """One plain value as people write it."""
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.0f}"
        case _:
            return str(value)[:VALUE_CHARS_MAX]
