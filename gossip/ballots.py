"""Who voted for what: one ballot for each kind of vote and view, bounded whatever liars send.

Rules: core. A liar's votes for several manifests are kept, few, and those for what somebody proposed in any case.
Source: gossip/agreement.py says why.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final

from crypto.digest import Digest
from crypto.identity import PeerId
from gossip.rounds import Proposal

VOTES_OF_ONE_MAX: Final = 3  # of a kind in a view; who is honest has one
NOBODY: Final = Digest(b"")  # stands for "no manifest"


class Ballot:
    """Votes of one kind in one view."""

    def __init__(self) -> None:
        self.by_manifest: defaultdict[Digest, set[PeerId]] = defaultdict(set)

    def add(self, sender: PeerId, manifest: Digest, *, is_proposed: bool) -> bool:
        """Keep it; of one sender few, beside those for what somebody proposed."""
        others = sum(sender in senders for senders in self.by_manifest.values())
        if sender in self.by_manifest[manifest] or (others >= VOTES_OF_ONE_MAX and not is_proposed):
            return False
        self.by_manifest[manifest].add(sender)
        return True

    def count(self, manifest: Digest) -> int:
        """How many voted for it."""
        return len(self.by_manifest.get(manifest, ()))

    @property
    def voters(self) -> int:
        """How many voted at all."""
        return len(set[PeerId]().union(*self.by_manifest.values()))


@dataclass(slots=True)
class Tally:
    """What was heard of each view."""

    proposals: dict[int, Proposal] = field(default_factory=dict)
    prevotes: defaultdict[int, Ballot] = field(default_factory=lambda: defaultdict(Ballot))
    precommits: defaultdict[int, Ballot] = field(default_factory=lambda: defaultdict(Ballot))
    reached: dict[PeerId, int] = field(default_factory=dict)  # the highest view that a voter spoke in
