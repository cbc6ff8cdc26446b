"""Parts of what a node says of itself (node/state.py), as JSON has them.

Rules: pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from crypto.disk import FileStatus, told_time
from gossip.messages import ModelKind, ModelOffer
from model.requests import EngineStatistics
from node.front import ModelRow


def engine_told(figures: EngineStatistics) -> dict[str, Any]:
    """Without the timings, which are for the metrics."""
    return {name: told for name, told in asdict(replace(figures, timings=None)).items() if name != "timings"}


def training_told(training: dict[str, Any]) -> dict[str, Any]:
    """What the status says of a run: its own route has its rounds and members."""
    return {name: told for name, told in training.items() if name not in ("rounds", "members", "run", "wanted")} | {
        "run": None if training["run"] is None else training["run"]["name"]
    }


def disk_told(known: Sequence[FileStatus]) -> dict[str, Any]:
    """What cannot be saved now and since when, what was moved aside at start, and each file's counts."""
    return {
        "degraded": [
            {"what": file.what, "reason": file.reason, "since": told_time(file.since_s), "sentence": file.problem}
            for file in known
            if file.problem
        ],
        "set_aside": [file.set_aside for file in known if file.set_aside],
        "files": [
            {
                "what": file.what,
                "path": file.path,
                "saved": told_time(file.saved_s),
                "writes": file.writes,
                "failures": file.failures,
            }
            for file in known
        ],
    }


def row_of(offer: ModelOffer, peers: int, *, local: bool) -> ModelRow:
    """A model that so many peers serve."""
    return ModelRow(
        id=offer.name,
        revision=offer.revision,
        kind=str(offer.kind),
        peers=peers,
        context_tokens=offer.context_tokens,
        local=local,
        embeds=offer.kind is ModelKind.ENCODER or offer.embeds,
    )


def offer_told(offer: ModelOffer) -> dict[str, Any]:
    """A model as a peer advertises it."""
    return {
        "name": offer.name,
        "revision": offer.revision,
        "kind": str(offer.kind),
        "context_tokens": offer.context_tokens,
        "dtype": offer.dtype,
    }
