"""What stands below the options on every help page: examples, exit codes, environment variables.

Rules: one form for all pages, at most 78 columns wide; what a command can end in is said where it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RUN_EXITS = {
    0: "stopped in order",
    2: "a flag, variable or key is wrong; the sentence names it",
    69: "nothing to listen on: the port is taken, or not ours",
    75: "another node holds the data directory",
    78: "the identity key is damaged, or others can read it",
}
CLIENT_EXITS = {
    0: "done",
    1: "the node failed at it",
    2: "what was asked for, or a flag, is wrong",
    69: "no node answers there",
    75: "not now: try again later",
    130: "Ctrl-C",
}
LOCAL_EXITS = {0: "done", 1: "not done; the sentence says why", 2: "a flag or setting is wrong"}
CLIENT_VARIABLES = {"OPENAGI_NODE": "as --node", "OPENAGI_API_KEY": "as --api-key, and not seen in ps"}
RUN_VARIABLES = {"OPENAGI_...": "any flag, as OPENAGI_LOG_LEVEL; flags win over it"}


def page(examples: Sequence[str], exits: Mapping[int, str], variables: Mapping[str, str] | None = None) -> str:
    """The lower part of a help page, in rich's markup."""
    parts = [_part("Examples", [f"  {_plain(line)}" for line in examples])]
    parts.append(_part("Exit codes", [f"  {code:<5}{_plain(told)}" for code, told in sorted(exits.items())]))
    if variables:
        parts.append(_part("Environment", [f"  {name:<17}{_plain(told)}" for name, told in variables.items()]))
    return "\n\n".join(parts)


def _part(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"[bold]{title}[/bold]", *lines])


def _plain(text: str) -> str:
    """Brackets of the text itself are no markup."""
    return text.replace("[", r"\[")
