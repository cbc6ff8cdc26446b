"""Whom to ask for a blob, when to ask again, and when it is hopeless.

Rules: core. A candidate is waited for, tried, gives, or is out for good. Who could not be reached, or was busy, is
tried again after a pause that doubles; who lied, was too slow or does not have the blob is out. The pause begins anew
when a chunk of its was stored, so that nobody is tried for ever who only answers and never gives. It is hopeless when
all are out, or when nothing was stored for patience_s.
Source: RFC 6298 section 5.5 (doubling); NETWORK.md "Our rules" 6.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from crypto.identity import PeerId

CANDIDATES_MAX = 256  # of one blob; more are not asked
TOLD_MAX = 8  # candidates whose reasons the error tells
REASON_CHARS_MAX = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class DonorsConfig:
    """Bounds of one search. Times are seconds."""

    donors_max: int = 8  # tried or giving at a time
    pause_s: float = 0.5  # before a second try
    pause_s_max: float = 15.0
    patience_s: float = 60.0  # without a chunk that could be stored

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        if self.donors_max < 1:
            raise ValueError(f"donors_max = {self.donors_max} came, wanted at least 1")
        for name in ("pause_s", "pause_s_max", "patience_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted more than 0 seconds")


class _Phase(Enum):
    WAITED_FOR = "waited for"
    BUSY = "tried or giving"
    OUT = "out"


@dataclass(slots=True)
class _Candidate:
    retry_at: float
    phase: _Phase = _Phase.WAITED_FOR
    failures: int = 0  # since a chunk of its was stored
    reason: str = "was not asked"


class Donors:
    """The candidates of one blob. Times are monotonic seconds of the caller."""

    def __init__(self, peers: Iterable[PeerId], config: DonorsConfig, now: float) -> None:
        self._config = config
        self._candidates = {peer: _Candidate(now) for peer in list(dict.fromkeys(peers))[:CANDIDATES_MAX]}
        self._stored_at = now

    def due(self, now: float) -> list[PeerId]:
        """Whom to try now; each counts as tried until `failed` or `out` is said of it."""
        room = self._config.donors_max - sum(each.phase is _Phase.BUSY for each in self._candidates.values())
        waiting = [peer for peer, each in self._candidates.items() if self._is_due(each, now)]
        chosen = sorted(waiting, key=lambda peer: self._candidates[peer].failures)[: max(0, room)]
        for peer in chosen:
            self._candidates[peer].phase = _Phase.BUSY
        return chosen

    def _is_due(self, candidate: _Candidate, now: float) -> bool:
        return candidate.phase is _Phase.WAITED_FOR and candidate.retry_at <= now

    def stored(self, peer: PeerId, now: float) -> None:
        """A chunk that this peer gave was stored."""
        self._stored_at = now
        self._candidates[peer].failures = 0

    def failed(self, peer: PeerId, reason: str, now: float) -> None:
        """It could not be reached, or it stopped: tried again later, unless it is out."""
        candidate = self._candidates[peer]
        if candidate.phase is _Phase.OUT:
            return
        pause_s = min(self._config.pause_s_max, self._config.pause_s * 2.0 ** min(candidate.failures, 16))
        candidate.phase, candidate.retry_at = _Phase.WAITED_FOR, now + pause_s
        candidate.failures += 1
        candidate.reason = reason

    def out(self, peer: PeerId, reason: str) -> bool:
        """Never ask this peer for this blob again; False when that was so already."""
        candidate = self._candidates[peer]
        if candidate.phase is _Phase.OUT:
            return False
        candidate.phase, candidate.reason = _Phase.OUT, reason
        return True

    def came(self, peer: PeerId, now: float) -> None:
        """A peer has connected: if it is waited for, it need not wait any longer."""
        candidate = self._candidates.get(peer)
        if candidate is not None and candidate.phase is _Phase.WAITED_FOR:
            candidate.retry_at = min(candidate.retry_at, now)

    def deadline(self) -> float:
        """When `due` or `hopeless` may have another answer."""
        retries = (each.retry_at for each in self._candidates.values() if each.phase is _Phase.WAITED_FOR)
        full = sum(each.phase is _Phase.BUSY for each in self._candidates.values()) >= self._config.donors_max
        patience_ends = self._stored_at + self._config.patience_s
        return patience_ends if full else min(patience_ends, min(retries, default=patience_ends))

    def hopeless(self, now: float) -> bool:
        """Whether to give up."""
        if all(each.phase is _Phase.OUT for each in self._candidates.values()):
            return True
        return now >= self._stored_at + self._config.patience_s

    def reasons(self) -> str:
        """What each candidate did, for the one error; nobody's name is left out without being counted."""
        told = [f"{peer} {each.reason[:REASON_CHARS_MAX]}" for peer, each in list(self._candidates.items())[:TOLD_MAX]]
        if len(self._candidates) > TOLD_MAX:
            told.append(f"and {len(self._candidates) - TOLD_MAX} more")
        return "; ".join(told) or "no peer was named that could have it"
