"""Who counts in a round, and for how much: gossip's Policy by the gate of model/.

Rules: core. It computes from the manifest's candidates and from numbers that every member finds in the payloads (norms,
overlaps), noted when each payload was looked at; so all members choose alike. Verdicts are kept for people.
Source: TRAINING.md 4.
"""

from __future__ import annotations

from collections.abc import Mapping

from crypto.digest import Digest
from crypto.identity import PeerId
from gossip.gathering import Candidate
from model.errors import CannotMerge
from model.gate import ONE, Entrant, Run, Verdict, judge


class Choice:
    """One run's, a round at a time: `note` what came, `forget` when the round is over."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._norms: dict[Digest, float] = {}  # by blob
        self._overlaps: dict[frozenset[Digest], float] = {}
        self.verdicts: tuple[Verdict, ...] = ()  # of the last manifest that was computed

    def note(self, blob: Digest, norm: float, overlaps: Mapping[Digest, float]) -> None:
        """A payload was looked at. overlaps: with those noted before."""
        self._norms[blob] = norm
        for other, share in overlaps.items():
            self._overlaps[frozenset((blob, other))] = share

    def forget(self) -> None:
        """A new round begins."""
        self._norms.clear()
        self._overlaps.clear()

    def choose(self, candidates: tuple[Candidate, ...]) -> tuple[tuple[int, int], ...]:
        """(weight, clip) of each, in parts of ONE; weight 0 leaves it out."""
        peers = {each.blob: each.peer for each in candidates}
        overlaps: dict[tuple[str, str], float] = {
            (peers[one], peers[other]): share
            for (one, other), share in ((tuple(pair), share) for pair, share in self._overlaps.items())
            if one in peers and other in peers
        }
        try:
            self.verdicts = judge([self._entrant(each) for each in candidates], self._run, overlaps)
        except CannotMerge:
            self.verdicts = ()
        found = {PeerId(each.peer): (each.weight_parts, each.clip_parts or ONE) for each in self.verdicts}
        return tuple(found.get(each.peer, (0, ONE)) for each in candidates)

    def _entrant(self, candidate: Candidate) -> Entrant:
        return Entrant(
            peer=candidate.peer,
            elements=self._run.elements,
            sparse=self._run.sparse,
            norm=self._norms[candidate.blob],
            tokens=candidate.tokens,
            arrived=candidate.place,
            scores_parts=candidate.scores,
            probation=not candidate.is_proven,
        )
