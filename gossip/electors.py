"""Who votes in a run: how many must agree, who proposes in which view, who becomes a voter and who ceases to be one.

Rules: core. Everything here follows from the chain of manifests alone, so all who have the same chain name the same
voters. Of n voters fewer than a third may lie; a quorum is so large that two of them share an honest voter. A new
member contributes with weight 0 until it was there `probation` rounds; few become voters in one round, so that a crowd
of newcomers cannot outvote those it came to. Who misses `absent_max` rounds in a row is no voter any more.
Source: TRAINING.md 3, 4; SECURITY.md S2, S3; Lamport, Shostak, Pease, "The Byzantine generals problem" (1982).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.rounds import MEMBERS_MAX, Manifest

NEW_VOTERS_SHARE = 4  # one new voter for so many old ones, at least one a round
MEMBERS_KNOWN_MAX = 1024  # newcomers remembered; of more, those who came last wait


def liars_max(voters: int) -> int:
    """How many of them may lie without harm: fewer than a third."""
    return (voters - 1) // 3


def quorum(voters: int) -> int:
    """How many must agree: any two such groups share one who does not lie."""
    return (voters + liars_max(voters)) // 2 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A run's rules of membership, part of what its id names. Rounds."""

    probation: int = 3
    absent_max: int = 2
    voters_max: int = MEMBERS_MAX

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        if self.probation < 1 or self.absent_max < 1:
            raise ValueError(f"probation {self.probation} and absent_max {self.absent_max} came, wanted 1 or more each")
        if not 1 <= self.voters_max <= MEMBERS_MAX:
            raise ValueError(f"voters_max {self.voters_max} came, wanted 1 to {MEMBERS_MAX}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One member by the chain: rounds that it was there for since it came, and how many it missed in a row."""

    there: int
    missed: int
    votes: bool


@dataclass(frozen=True, slots=True)
class Electors:
    """Who votes on the next round."""

    terms: Terms
    members: dict[PeerId, Membership]  # never changed in place

    @classmethod
    def of_founders(cls, founders: Iterable[PeerId], terms: Terms) -> Electors:
        """Those who begin a run, all voters. Raises ValueError for none, or for too many."""
        chosen = sorted(set(founders))
        if not 1 <= len(chosen) <= terms.voters_max:
            raise ValueError(f"{len(chosen)} founders came, wanted 1 to {terms.voters_max}")
        return cls(terms, {peer: Membership(there=terms.probation, missed=0, votes=True) for peer in chosen})

    @property
    def voters(self) -> tuple[PeerId, ...]:
        """In order. Nobody: all have left, and the run is over."""
        return tuple(sorted(peer for peer, member in self.members.items() if member.votes))

    @property
    def quorum(self) -> int:
        """How many voters must agree."""
        return quorum(len(self.voters))

    def is_voter(self, peer: PeerId) -> bool:
        """Whether its vote counts."""
        member = self.members.get(peer)
        return member is not None and member.votes

    def is_proven(self, peer: PeerId) -> bool:
        """Whether what it contributes may have weight."""
        member = self.members.get(peer)
        return member is not None and member.there >= self.terms.probation

    def proposer(self, base: bytes, view: int) -> PeerId:
        """Whose turn it is, of some voters: everybody once before anybody twice, in an order that nobody can choose."""
        voters = self.voters
        number = view % len(voters)
        return sorted(voters, key=lambda peer: turn_of(base, peer))[number]

    def after(self, manifest: Manifest) -> Electors:
        """Who votes once this is committed."""
        shares = {PeerId(share.peer): share for share in manifest.shares}
        members = dict[PeerId, Membership]()
        for peer, member in self.members.items():
            share = shares.pop(peer, None)
            if share is not None and share.leaves:
                continue
            if share is None:
                missed = member.missed + 1
                if missed < self.terms.absent_max:
                    members[peer] = dataclasses.replace(member, missed=missed)
                continue
            there = member.there + (share.blob is not None)
            members[peer] = dataclasses.replace(member, there=there, missed=0)
        for peer, share in sorted(shares.items()):
            if share.blob is not None and not share.leaves and len(members) < MEMBERS_KNOWN_MAX:
                members[peer] = Membership(there=1, missed=0, votes=False)
        return Electors(self.terms, self._promoted(members))

    def _promoted(self, members: dict[PeerId, Membership]) -> dict[PeerId, Membership]:
        votes = sum(member.votes for member in members.values())
        room = min(max(1, votes // NEW_VOTERS_SHARE), self.terms.voters_max - votes)
        due = [
            peer
            for peer, member in members.items()
            if not member.votes and not member.missed and member.there >= self.terms.probation
        ]
        due.sort(key=lambda peer: (-members[peer].there, peer))
        for peer in due[: max(0, room)]:
            members[peer] = dataclasses.replace(members[peer], votes=True)
        return members


def turn_of(base: bytes, peer: PeerId) -> Digest:
    """A lot that nobody can choose, drawn anew each round; the lowest comes first."""
    return digest(b"openagi:turn:" + base + peer.encode())
