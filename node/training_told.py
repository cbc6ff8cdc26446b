"""What a node says of its run: for GET /api/v1/training, `train status` and the metrics.

Rules: nothing here decides or waits; every number is asked of the part that owns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from node.training_plan import PARTS
from node.training_session import Session

ROUNDS_SHOWN = 50


def told_run(session: Session, drops: Mapping[str, int]) -> dict[str, Any]:
    """The run, its members, rounds, losses and bytes. drops: of the topic and of what peers asked."""
    plan, weights, service = session.weights.plan, session.weights, session.service
    history, told, now = service.history, session.told, service.statistics()
    peers = service.transport.peers() | {service.transport.peer_id}
    return {
        "run": {
            "name": plan.name,
            "id": plan.id.hex(),
            "model": plan.model,
            "started_from": plan.revision,
            "parameters": plan.elements,
            "codec": plan.codec,
            "rule": plan.rule,
            "outer_rate": plan.outer_rate / PARTS,
            "steps": plan.steps,
            "tokens_a_round": weights.tokens_of(plan.steps),
            "rate": plan.rate / 1e9,
            "private": bool(plan.members),
            "update_bytes_max": weights.payload_bytes_max,
            "state_bytes": weights.state_bytes,
        },
        "round": history.chain.round,
        "revision": weights.told.revision,
        "root": weights.told.root,
        "phase": None if now is None else str(now.phase),
        "view": None if now is None else now.view,
        "step": told.step,
        "loss": told.loss,
        "held_out_loss": weights.told.held_out_loss,
        "work": {
            "steps": told.steps,
            "tokens": told.tokens,
            "skipped": told.skipped,
            "late": told.late,
            "ahead": told.ahead,
        },
        "members": [
            {
                "peer_id": peer,
                "votes": member.votes,
                "proven": history.chain.electors.is_proven(peer),
                "rounds_missed": member.missed,
                "connected": peer in peers,
                "here_this_round": now is not None and peer in now.present,
            }
            for peer, member in sorted(history.chain.electors.members.items())
        ],
        "refused": {**weights.told.refused, **({} if now is None else now.refused)},
        "round_s": round(weights.round_s, 3),
        "round_s_median": weights.told.round_s_median,
        "rounds": [asdict(each) for each in list(weights.told.rounds)[-ROUNDS_SHOWN:]],
        "counts": dict(history.counts),
        "drops": {**drops, **({} if now is None else now.drops)},
    }
