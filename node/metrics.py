"""What the node counts, as Prometheus text: every drop, refusal, limit, fault and ban, with its reason.

Rules: pure. It is read out of what `status` tells, so that what stands in one stands in the other; a part that counts
drops says so under one of REASONED, and need not be named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

REASONED = frozenset({"drops", "dropped", "faults", "outcomes", "errors", "failures", "left_out"})
NOT_DROPPED = frozenset({"accepted"})
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_UP = """# HELP openagi_backend_up Whether what answers here can: 1, or 0 with the reason in the status.
# TYPE openagi_backend_up gauge
"""
_HEAD = """# HELP openagi_drops_total What was dropped, refused, limited or held against a peer, by part and reason.
# TYPE openagi_drops_total counter
"""


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


def prometheus_text(status: Mapping[str, Any]) -> str:
    """The answer to GET /metrics."""
    rows = [
        f'openagi_drops_total{{part="{_label(part)}",reason="{_label(reason)}"}} {count}'
        for part, reason, count in drops(status)
    ]
    return _HEAD + "\n".join(rows) + "\n" + _backend(status.get("backend"))


def _backend(told: object) -> str:
    """The backend's own figure; nothing while there is none."""
    if not isinstance(told, Mapping):
        return ""
    labels = f'kind="{_label(str(told.get("kind")))}",server="{_label(str(told.get("server") or ""))}"'
    return f"{_UP}openagi_backend_up{{{labels}}} {int(not told.get('problem'))}\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
