"""What a node says when it is asked for its state: text made of records alone, and the functions that a model may call.

Rules: core, pure. Every figure is one that node/self_face.py told; none is rounded below FIGURE_DIGITS digits. What was
not measured is named as that. No sentence says more than a record does: no mood, no single level, no claim of
experience.
Source: SELF.md, "Surface"; node/consciousness_fields.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from node.errors import BadRequest
from node.self_face import QUESTION_CHARS_MAX, Question
from node.tools import Tool, ToolCall, json_object

REPORT: Final = "self_report"
RECALL: Final = "self_recall"
FIGURE_DIGITS: Final = 6
RECALL_EVENTS: Final = 8  # of one answer to a model
EVENT_CHARS_MAX: Final = 500  # of one event there: what is longer is cut, and says so

_REPORT_PARAMETERS: Final = {
    "type": "object",
    "properties": {"about": {"type": "string", "description": "one field, as load or memory; left out: all of them"}},
}
_RECALL_PARAMETERS: Final = {
    "type": "object",
    "properties": {"query": {"type": "string", "description": "words that must all be in what is remembered"}},
    "required": ["query"],
}
TOOLS: Final = {
    REPORT: Tool(
        name=REPORT,
        description="What this node measured of its own state, from its records, each figure with its unit.",
        parameters=msgspec.json.encode(_REPORT_PARAMETERS).decode(),
    ),
    RECALL: Tool(
        name=RECALL,
        description="What this node remembers: events and notes, the newest first.",
        parameters=msgspec.json.encode(_RECALL_PARAMETERS).decode(),
    ),
}


def report(told: Mapping[str, Any], about: str = "") -> str:
    """The report. told: as SelfFace.told gives it; about: one field alone, all for one that is none."""
    fields = [row for row in told["fields"] if row["path"].split(".")[0] == about] or told["fields"]
    return "\n".join(_lines(told, fields))


def _lines(told: Mapping[str, Any], fields: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    head_id, head_hash = (told["memory"].get(name) or "none" for name in ("head_id", "head_hash"))  # none: not open yet
    yield (
        f"This is made from the node's own records, at {told['at_ms']} (Unix ms). "
        f"The last event in its memory is {head_id}, of hash {head_hash}."
    )
    yield f"Now: {told['doing']}."
    if told["before"]:
        yield f"Before the last stop: {told['before']}."
    missing = []
    for row in fields:
        if row["value"] is None or row["value"] == {}:
            missing.append(row["path"])
            continue
        unit = f" {row['unit']}" if row["unit"] else ""
        yield f"{row['path']} = {shown(row['value'])}{unit}"
    if missing:
        yield f"Not measured: {', '.join(missing)}."
    prediction = told["prediction"]
    if prediction is not None:
        for name, each in sorted(prediction["figures"].items()):
            low, high = shown(each["low"]), shown(each["high"])
            yield (
                f"Foretold until {prediction['to_ms']} (Unix ms): {name} = {shown(each['value'])}, "
                f"most likely {low} to {high}"
            )


def shown(value: object) -> str:
    """A member's value as the report has it."""
    match value:
        case float():
            return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.{FIGURE_DIGITS}g}"
        case Mapping():
            return ", ".join(f"{name}: {shown(inner)}" for name, inner in sorted(value.items()))
        case list() | tuple():
            return " ".join(map(shown, value))
    return str(value)


def about_of(call: ToolCall) -> str:
    """Which field a call of REPORT is about. Broken arguments are about all: the model wrote them."""
    try:
        about = json_object(call.arguments, "the arguments", "tools").get("about")
    except BadRequest:
        return ""
    return about if isinstance(about, str) else ""


def question_of(call: ToolCall) -> Question | None:
    """What a call of RECALL asks; None: nothing that can be asked."""
    try:
        query = json_object(call.arguments, "the arguments", "tools").get("query")
    except BadRequest:
        return None
    if not isinstance(query, str) or not query.strip() or len(query) > QUESTION_CHARS_MAX:
        return None
    return Question(query=query, n=RECALL_EVENTS)


def recalled(events: Sequence[Mapping[str, Any]]) -> str:
    """Events as a model reads them."""
    lines = [_event(event) for event in events[:RECALL_EVENTS]]
    return "\n".join(lines) or "Nothing is remembered that has all these words."


def _event(event: Mapping[str, Any]) -> str:
    body = "forgotten" if event["body"] is None else msgspec.json.encode(event["body"]).decode()
    cut = body if len(body) <= EVENT_CHARS_MAX else f"{body[:EVENT_CHARS_MAX]} (cut: {len(body)} characters)"
    return f"event {event['id']}, {event['kind']}, at {event['ts_ms']} (Unix ms): {cut}"
