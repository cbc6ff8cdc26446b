"""What the node counts, as Prometheus text: every drop, refusal, limit, fault and ban, with its reason; and FIGURES.

Rules: pure. It is read out of what `status` tells, so that what stands in one stands in the other; a part that counts
drops says so under one of REASONED, and need not be named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

REASONED = frozenset({"drops", "dropped", "faults", "outcomes", "errors", "failures", "left_out"})
NOT_DROPPED = frozenset({"accepted"})
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_UP = """# HELP openagi_backend_up Whether what answers here can: 1, or 0 with the reason in the status.
# TYPE openagi_backend_up gauge
"""
_HEAD = """# HELP openagi_drops_total What was dropped, refused, limited or held against a peer, by part and reason.
# TYPE openagi_drops_total counter
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric. way: the dotted way to its number in the status, or to a table of numbers by kind."""

    name: str
    type: Literal["counter", "gauge"]
    help: str
    way: str


FIGURES = (
    Figure(
        "openagi_response_cache_queries_total",
        "counter",
        "Answers and vectors looked for in the cache, by kind.",
        "model.cache.queries",
    ),
    Figure("openagi_response_cache_hits_total", "counter", "Of these, found, by kind.", "model.cache.hits"),
    Figure("openagi_response_cache_evictions_total", "counter", "Put out for newer ones.", "model.cache.evicted"),
    Figure("openagi_response_cache_entries", "gauge", "Kept now.", "model.cache.entries"),
    Figure("openagi_response_cache_bytes", "gauge", "Memory that they take.", "model.cache.bytes"),
    Figure("openagi_embedding_texts_total", "counter", "Texts turned into vectors.", "model.embedding.texts"),
    Figure("openagi_embedding_tokens_total", "counter", "Their tokens.", "model.embedding.tokens"),
    Figure(
        "openagi_embedding_padded_tokens_total",
        "counter",
        "Tokens that went through the model for them, padding among them.",
        "model.embedding.padded_tokens",
    ),
    Figure("openagi_embedding_requests_waiting", "gauge", "Not ended.", "model.embedding.waiting"),
    Figure("openagi_queued_bytes", "gauge", "Of the texts of requests that have not ended.", "model.queued_bytes"),
)


def drops(status: Mapping[str, Any], part: str = "") -> Iterator[tuple[str, str, int]]:
    """(part, reason, count since start) of all that is counted by reason; `part` is the dotted way to it."""
    for name, value in status.items():
        if not isinstance(value, Mapping):
            continue
        way = f"{part}.{name}" if part else str(name)
        if name in REASONED:
            for reason, count in value.items():
                if isinstance(count, int) and reason not in NOT_DROPPED:
                    yield way, str(reason), count
        else:
            yield from drops(value, way)


def figures(status: Mapping[str, Any]) -> Iterator[str]:
    """The lines of FIGURES that the status has."""
    for figure in FIGURES:
        value: Any = status
        for name in figure.way.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            continue
        yield f"# HELP {figure.name} {figure.help}"
        yield f"# TYPE {figure.name} {figure.type}"
        if not isinstance(value, Mapping):
            yield f"{figure.name} {value}"
            continue
        for kind, count in value.items():
            yield f'{figure.name}{{kind="{_label(str(kind))}"}} {count}'


def prometheus_text(status: Mapping[str, Any]) -> str:
    """The answer to GET /metrics."""
    rows = [
        f'openagi_drops_total{{part="{_label(part)}",reason="{_label(reason)}"}} {count}'
        for part, reason, count in drops(status)
    ]
    return _HEAD + "\n".join([*rows, *figures(status)]) + "\n" + _backend(status.get("backend"))


def _backend(told: object) -> str:
    """The backend's own figure; nothing while there is none."""
    if not isinstance(told, Mapping):
        return ""
    labels = f'kind="{_label(str(told.get("kind")))}",server="{_label(str(told.get("server") or ""))}"'
    return f"{_UP}openagi_backend_up{{{labels}}} {int(not told.get('problem'))}\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
