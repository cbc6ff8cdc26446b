"""Where a run's history stands, and what a member has of the round to come; whether a record proves its round.

Rules: core. A RoundState belongs to one Averaging, which alone changes it, and is thrown away with its round.
Source: TRAINING.md 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from crypto.digest import Digest
from crypto.identity import PeerId
from gossip.agreement import Agreement, Decided, Value
from gossip.electors import Electors
from gossip.errors import RemoteProtocolError
from gossip.gathering import Gathering
from gossip.round_effects import Kept
from gossip.rounds import Body, Committed, Manifest, Precommit, Statement

NEVER = float("inf")
HANDED_ON_MAX = 4096  # statements of a round: 64 members, each with a few votes in a few views
HEARD_KEPT_MAX = 8192


class Phase(StrEnum):
    """Where a member stands in its round."""

    WORKING = "working"  # own work, and that of others, comes in
    AGREEING = "agreeing"  # closed here: reports and votes
    APPLYING = "applying"  # committed; the owner changes the weights
    OVER = "over"  # nobody votes any more


OPEN = (Phase.WORKING, Phase.AGREEING)  # the round is still to be decided here


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Where a run's history stands: `round` is the one to come after `base`."""

    run: bytes
    round: int
    base: bytes
    electors: Electors

    def after(self, manifest: Manifest) -> Chain:
        """The history that ends with this manifest."""
        return Chain(
            run=self.run, round=self.round + 1, base=manifest.next_base, electors=self.electors.after(manifest)
        )

    def names(self, body: Body | Manifest) -> bool:
        """Whether this is said of the round to come, after this very history."""
        return (body.run, body.round, body.base) == (self.run, self.round, self.base)


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragingStatistics:
    """The round now, and counts since start."""

    round: int
    phase: Phase
    view: int
    voters: tuple[PeerId, ...]
    present: tuple[PeerId, ...]  # voters whose part is here
    refused: dict[PeerId, str]
    committed: int
    drops: dict[str, int]


@dataclass(slots=True, kw_only=True)
class RoundState:
    """One round, as this member has it. Times are monotonic seconds."""

    chain: Chain
    gathering: Gathering
    agreement: Agreement
    phase: Phase = Phase.WORKING
    statements: dict[Digest, Statement] = field(default_factory=dict)
    first: dict[tuple[PeerId, type, int], Statement] = field(default_factory=dict)
    accused: set[PeerId] = field(default_factory=set)
    said: list[Statement] = field(default_factory=list)  # by this member
    has_forgotten: bool = False  # its disk lost what it said: it is silent until the round is over
    said_kept: int = 0  # how many of them are on disk
    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    unjudged: dict[Value, PeerId] = field(default_factory=dict)  # what others proposed, and who
    fetching: set[Digest] = field(default_factory=set)
    offered_view: int = -1
    reports_at: float = NEVER  # when there were reports of a quorum
    propose_at: float = NEVER
    resay_s: float = 0.0
    resay_at: float = NEVER
    ask_at: float = 0.0
    asked: int = 0  # whose turn it is to be asked
    committed: Committed | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is still to be decided here."""
        return self.phase in OPEN

    def has_said(self, kind: type) -> bool:
        """Whether this member made such a statement."""
        return any(isinstance(each.body, kind) for each in self.said)

    def statistics(self, committed: int, drops: Mapping[str, int]) -> AveragingStatistics:
        """A snapshot for people; what is counted since start comes from the owner."""
        return AveragingStatistics(
            round=self.chain.round,
            phase=self.phase,
            view=self.agreement.view,
            voters=self.chain.electors.voters,
            present=tuple(sorted(self.gathering.present)),
            refused=self.gathering.refused_peers(),
            committed=committed,
            drops=dict(drops),
        )

    def forget(self) -> None:
        """What this member said of the round is lost: it says nothing more in it."""
        self.has_forgotten = True
        self.agreement.mute()

    def known(self, count_max: int = HANDED_ON_MAX) -> tuple[Statement, ...]:
        """What was said of the round, in the order in which it came. Of more: headers, reports, the newest votes and
        those on which the agreement's valid value rests. A round that cannot end for hours has very many views."""
        if len(self.statements) <= count_max:
            return tuple(self.statements.values())
        valid = self.agreement.save().valid

        def of_use(statement: Statement) -> float:
            view = getattr(statement.body, "view", NEVER)
            return NEVER if valid is not None and view == valid[0] else view

        chosen = {each.id for each in sorted(self.statements.values(), key=of_use, reverse=True)[:count_max]}
        return tuple(each for each in self.statements.values() if each.id in chosen)

    def kept(self) -> Kept:
        """What is to be on disk before what was said goes out."""
        said = tuple(self.said)
        own = {each.id for each in said}
        return Kept(
            round=self.chain.round,
            base=self.chain.base,
            said=said,
            heard=tuple(each for each in self.known(HEARD_KEPT_MAX) if each.id not in own),
            agreement=self.agreement.save(),
        )

    def proof_of(self, decided: Decided) -> tuple[Statement, ...]:
        """The precommits that decided it."""
        votes = {
            each.sender: each
            for each in self.statements.values()
            if isinstance(each.body, Precommit)
            and (each.body.view, each.body.manifest) == (decided.view, decided.manifest)
        }
        return tuple(votes[peer] for peer in sorted(votes))


def slot_of(statement: Statement) -> tuple[PeerId, type, int]:
    """Of what a member may make one statement only."""
    return statement.sender, type(statement.body), getattr(statement.body, "view", 0)


def checked_record(committed: Committed, chain: Chain) -> None:
    """Return when a quorum of the voters precommitted this manifest in one view. Raises RemoteProtocolError."""
    manifest, voters, views = committed.manifest, set[PeerId](), set[int]()
    if not chain.names(manifest):
        raise RemoteProtocolError(
            f"a record of round {manifest.round} came, wanted round {chain.round} of this history"
        )
    wanted = manifest.id
    for vote in committed.votes:
        body = vote.body
        if not isinstance(body, Precommit) or not chain.names(body) or body.manifest != wanted:
            raise RemoteProtocolError(f"a record of round {manifest.round} has a vote for something else")
        if not chain.electors.is_voter(vote.sender):
            raise RemoteProtocolError(f"a record of round {manifest.round} has a vote of {vote.sender}, who has none")
        voters.add(vote.sender)
        views.add(body.view)
    if len(views) != 1 or len(voters) < chain.electors.quorum:
        raise RemoteProtocolError(
            f"a record of round {manifest.round} has votes of {len(voters)} voters in {len(views)} views, wanted"
            f" {chain.electors.quorum} in one"
        )
