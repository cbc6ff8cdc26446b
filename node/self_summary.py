"""What of the node's self-state is told to peers: a summary of figures, made of a ConsciousnessState.

Rules: core, pure. Only what was measured is told, each figure cut to the bounds of gossip/summaries.py; no text, no
peer, nothing of any request. The head of the memory's chain goes with it, so that peers who kept it would see if the
log were given another past.
Source: SELF.md "Peers' states are claims".
"""

from __future__ import annotations

import re
from typing import Final

from gossip.routing import QUEUE_PER_SLOT
from gossip.summaries import HEAD_BYTES, SECONDS_MAX, SKILL_MIN, SelfSummary
from model.histogram import Distribution
from model.requests import EngineStatistics
from node.consciousness import ConsciousnessState

_REVISION: Final = re.compile(r"[!-~]{1,96}")
_HEAD: Final = re.compile(rf"[0-9a-f]{{{2 * HEAD_BYTES}}}")


def self_summary(state: ConsciousnessState, engine: EngineStatistics | None = None) -> SelfSummary:
    """The summary of a state. engine: of the model that this node hosts, for its slots and times; None: it has none."""
    identity, load, forecasts, memory = state.identity, state.load, state.self_prediction_error, state.memory
    slots = 0 if engine is None else engine.slots_total
    has_head = memory.head_id is not None and _HEAD.fullmatch(memory.head_hash or "") is not None
    return SelfSummary(
        revision=identity.revision if _REVISION.fullmatch(identity.revision or "") else None,
        uptime_s=_cut(identity.uptime_s, 0.0, SECONDS_MAX),
        boot_count=identity.boot_count,
        loop_lag_ms=_cut(load.loop_lag_ms, 0.0, SECONDS_MAX),
        busy=_share(load.active_requests, slots),
        queued=_share(load.queue_length, slots * QUEUE_PER_SLOT),
        first_token_s=_first_token_s(engine),
        entropy_nats=state.uncertainty.entropy_nats,
        margin=state.uncertainty.margin,
        calibration_error=state.calibration.error,
        latency_skill=_cut(forecasts.latency_s.skill, SKILL_MIN, 1.0),
        load_skill=_cut(forecasts.active_requests.skill, SKILL_MIN, 1.0),
        success_mean=state.social.success_mean,
        success_least=state.social.success_least,
        head_id=memory.head_id if has_head else None,
        head_hash=bytes.fromhex(memory.head_hash or "") if has_head else None,
    )


def _first_token_s(engine: EngineStatistics | None) -> float | None:
    """The mean time of a request here until its first token, since the start: in the queue, and while it was read."""
    if engine is None or engine.timings is None:
        return None
    waited, read = _mean(engine.timings.queue_s), _mean(engine.timings.prefill_s)
    return None if waited is None or read is None else _cut(waited + read, 0.0, SECONDS_MAX)


def _mean(times: Distribution) -> float | None:
    return times.sum / times.count if times.count else None


def _share(part: int | None, whole: int) -> float | None:
    return None if part is None or not whole else min(1.0, part / whole)


def _cut(figure: float | None, least: float, most: float) -> float | None:
    return None if figure is None else min(most, max(least, float(figure)))
