"""What one round has brought so far: headers, which payloads are here and sound, reports; the manifest they lead to.

Rules: core. A round is closed here when a quorum of the voters is present (its payload is here and sound, or it said
that it sits out) and the grace has passed: median + 3 median absolute deviations of their arrivals, at most a quarter
of the time so far. A report counts when it names a quorum of voters. A contribution is in the manifest when more than
half of the named reports hold it; at least one honest member can then give it to who lacks it, and by counting at
least 2 * quorum - voters voters are in it. The manifest is a function of the reports, the headers and the payloads,
so that everybody who has these can compare it.
Source: TRAINING.md 3, 4; Leys et al. 2013 (median absolute deviation).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from crypto.digest import Digest
from crypto.identity import PeerId
from gossip.agreement import Place
from gossip.electors import turn_of
from gossip.rounds import MEMBERS_MAX, Header, Held, Manifest, Report, Share, Statement

DEVIATIONS = 3.0
GRACE_SHARE = 0.25  # of the time since the round began
GRACE_S_MIN = 0.2
STATEMENTS_OF_ONE_MAX = 4  # of a kind; who contradicts itself is not listened to for long
NEWCOMERS_HEARD_MAX = 1024  # in a round; who made keys for a low lot is not heard for ever
NEWCOMERS_MAX = 8  # peers that the chain does not know yet: their payloads are fetched for nothing but their good name


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A contribution that is in. scores: what the reports say, without its author's, in order. place: the lower median
    of its places in the reports, by which who came first is not the copy."""

    peer: PeerId
    header: Digest
    blob: Digest
    steps: int
    tokens: int
    scores: tuple[int, ...]
    place: int
    is_proven: bool


class Policy(Protocol):
    """How much each contribution counts: a pure function of the payloads and of what stands in the candidates."""

    def choose(self, candidates: tuple[Candidate, ...]) -> tuple[tuple[int, int], ...]:
        """(weight, clip) of each, in parts of WEIGHT_ONE, weight 0 to leave it out. All payloads are held."""


@dataclass(frozen=True, slots=True)
class Lacking:
    """What is missing here to compute a manifest: statements, and payloads by their headers."""

    statements: bool
    payloads: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Unsound:
    """Why no manifest can follow from these reports."""

    reason: str


class Gathering:
    """One round's statements and payloads, as this member has them. Times are monotonic seconds."""

    def __init__(self, place: Place, started: float) -> None:
        self._place, self._started = place, started
        self._headers: dict[PeerId, Statement] = {}
        self._by_id: dict[Digest, Statement] = {}
        self._reports: dict[Digest, Statement] = {}
        self._scores: dict[Digest, int | None] = {}  # of held payloads
        self.refused: dict[Digest, str] = {}
        self.proposed_reports: set[Digest] = set()  # named in proposals
        self._newcomers = 0  # how many were heard
        self._arrivals: dict[PeerId, float] = {}  # of voters: since the round began

    # ---- what comes ----

    def add_header(self, statement: Statement, now: float) -> bool:
        """Keep a member's header. False: too many of its own, or of other newcomers, came before it.

        The first one counts here; others, of a member that contradicts itself, may stand in reports. Whatever stands in
        a report is kept.
        """
        peer = statement.sender
        is_named = any(statement.id in _names(report) for report in self._reports.values())
        if peer not in self._headers:
            if not self._has_room_for(peer) and not is_named:
                return False
            self._headers[peer] = statement
            if _header(statement).contribution is None:
                self._arrived(peer, now)
        elif not is_named and sum(each.sender == peer for each in self._by_id.values()) >= STATEMENTS_OF_ONE_MAX:
            return False
        self._by_id[statement.id] = statement
        return True

    def _has_room_for(self, peer: PeerId) -> bool:
        """Whether to listen to it: of those whom the chain does not know, to few, chosen by lot."""
        electors, base = self._place.electors, self._place.base
        if peer in electors.members:
            return True
        self._newcomers += 1
        others = [each for each in self._headers if each not in electors.members]
        if len(others) < NEWCOMERS_MAX or self._newcomers > NEWCOMERS_HEARD_MAX:
            return len(others) < NEWCOMERS_MAX
        waiting = [each for each in others if self._headers[each].id not in self._scores]
        last = max(waiting, key=lambda each: turn_of(base, each), default=peer)
        if turn_of(base, peer) >= turn_of(base, last):
            return False
        del self._headers[last]
        return True

    def add_report(self, statement: Statement) -> bool:
        """Keep a voter's report. False: it is no voter, or said too many different ones, and nobody proposed by it."""
        earlier = sum(each.sender == statement.sender for each in self._reports.values())
        if statement.id in self.proposed_reports:
            earlier = 0
        if earlier >= STATEMENTS_OF_ONE_MAX or not self._place.electors.is_voter(statement.sender):
            return False
        self._reports[statement.id] = statement
        return True

    def hold(self, header: Digest, score: int | None, now: float) -> None:
        """The payload of this header is here and sound."""
        statement = self._by_id.get(header)
        if statement is not None and _header(statement).contribution is not None and header not in self.refused:
            self._scores.setdefault(header, score)
            if self._headers.get(statement.sender) is statement:
                self._arrived(statement.sender, now)

    def refuse(self, header: Digest, reason: str) -> None:
        """The payload of this header is not what it must be."""
        if header in self._by_id and header not in self._scores:
            self.refused.setdefault(header, reason)

    def _arrived(self, peer: PeerId, now: float) -> None:
        if self._place.electors.is_voter(peer):
            self._arrivals.setdefault(peer, now - self._started)

    # ---- what is known ----

    @property
    def present(self) -> frozenset[PeerId]:
        """Voters whose part is here."""
        return frozenset(self._arrivals)

    def wanted(self) -> list[Statement]:
        """Headers whose payloads are neither here nor refused."""
        return [
            each
            for each in self._headers.values()
            if _header(each).contribution is not None and each.id not in self._scores and each.id not in self.refused
        ]

    def holders(self, header: Digest) -> list[PeerId]:
        """Who says that it has this payload: its author, and who reported it."""
        author = self._by_id.get(header)
        names = [author.sender] if author is not None else []
        for each in self._reports.values():
            names += [each.sender for held in _report(each).held if Digest(held.header) == header]
        return names

    def refused_peers(self) -> dict[PeerId, str]:
        """Whose contribution is not sound, and why."""
        return {self._by_id[header].sender: reason for header, reason in self.refused.items()}

    def closes_at(self, now: float) -> float:
        """When this member closes the round; infinity while no quorum is present."""
        electors = self._place.electors
        if len(self._arrivals) < electors.quorum:
            return float("inf")
        expected = {peer for peer, member in electors.members.items() if not member.missed}
        here = {each.sender for each in self._headers.values()} - {each.sender for each in self.wanted()}
        if expected | self._headers.keys() <= here:
            return now
        offsets = sorted(self._arrivals.values())
        middle = statistics.median(offsets)
        deviation = statistics.median(abs(offset - middle) for offset in offsets)
        quorum_s = offsets[electors.quorum - 1]
        grace_s = max(middle + DEVIATIONS * deviation - quorum_s, GRACE_S_MIN)
        return self._started + quorum_s + min(grace_s, max(GRACE_SHARE * quorum_s, GRACE_S_MIN))

    def report(self) -> Report:
        """What this member says when it closes the round."""
        place = self._place
        ordered = sorted(self._headers.values(), key=self._order)
        chosen = {each.id for each in [each for each in ordered if each.id in self._scores][:MEMBERS_MAX]}
        held = [header for header in self._by_id if header in chosen]  # in the order in which they came
        present = [each for each in ordered if _header(each).contribution is None]
        return Report(
            run=place.run,
            round=place.round,
            base=place.base,
            held=tuple(Held(header=each, score=self._scores[each]) for each in held),
            present=tuple(each.id for each in present[:MEMBERS_MAX]),
        )

    def _order(self, statement: Statement) -> tuple[bool, bool, PeerId]:
        """Voters first, then the proven, then others."""
        electors, peer = self._place.electors, statement.sender
        return not electors.is_voter(peer), not electors.is_proven(peer), peer

    def usable(self) -> list[Statement]:
        """Reports that count, one of each voter, whose headers are all known here; in order of their ids."""
        by_voter = dict[PeerId, Statement]()
        for each in self._reports.values():
            if self._counts(each):
                by_voter.setdefault(each.sender, each)
        return sorted(by_voter.values(), key=lambda each: each.id)

    def _counts(self, statement: Statement) -> bool:
        named = _names(statement)
        if any(header not in self._by_id for header in named):
            return False
        peers = [self._by_id[header].sender for header in named]
        voters = sum(map(self._place.electors.is_voter, peers))
        return len(set(peers)) == len(peers) and voters >= self._place.electors.quorum

    # ---- the manifest ----

    def manifest(self, report_ids: Iterable[Digest], policy: Policy) -> Manifest | Lacking | Unsound:
        """What follows from these reports."""
        wanted = tuple(report_ids)
        named = [self._reports.get(each) for each in wanted]
        reports = [each for each in named if each is not None]
        if len(reports) < len(named) or any(header not in self._by_id for each in reports for header in _names(each)):
            return Lacking(statements=True, payloads=())
        voters = {each.sender for each in reports}
        if not len(reports) == len(voters) >= self._place.electors.quorum:
            return Unsound(f"{len(reports)} reports, wanted one each of {self._place.electors.quorum} voters or more")
        if not all(map(self._counts, reports)):
            return Unsound("a report names fewer voters than a quorum, or somebody twice")
        counts = Counter(header for each in reports for header in _names(each))
        chosen = [self._by_id[header] for header, count in counts.items() if 2 * count > len(reports)]
        chosen = sorted(sorted(chosen, key=self._order)[:MEMBERS_MAX], key=lambda each: each.sender)
        contributors = [each for each in chosen if _header(each).contribution is not None]
        for each in contributors:
            if each.id in self.refused:
                return Unsound(f"{each.sender}'s contribution is not sound: {self.refused[each.id]}")
        lacking = tuple(each.id for each in contributors if each.id not in self._scores)
        if lacking:
            return Lacking(statements=False, payloads=lacking)
        candidates = tuple(self._candidate(each, reports) for each in contributors)
        parts = dict(zip((each.id for each in contributors), policy.choose(candidates), strict=True))
        return self._composed(chosen, parts, wanted)

    def _composed(
        self, chosen: list[Statement], parts: dict[Digest, tuple[int, int]], reports: tuple[Digest, ...]
    ) -> Manifest:
        shares = []
        for each in chosen:
            header = _header(each)
            weight, clip = parts.get(each.id, (0, 0))
            blob = header.contribution.blob if header.contribution is not None else None
            if blob is None:
                share = Share(peer=each.sender, header=each.id, blob=None, leaves=header.leaves)
            else:
                share = Share(
                    peer=each.sender, header=each.id, blob=blob, weight=weight, clip=clip, leaves=header.leaves
                )
            shares.append(share)
        place = self._place
        return Manifest(
            run=place.run,
            round=place.round,
            base=place.base,
            shares=tuple(shares),
            reports=reports,
            root=self._root(chosen),
        )

    def _candidate(self, statement: Statement, reports: list[Statement]) -> Candidate:
        contribution = _header(statement).contribution
        assert contribution is not None
        peer = statement.sender
        found = [
            (place, held.score, each.sender)
            for each in reports
            for place, held in enumerate(_report(each).held)
            if held.header == statement.id
        ]
        return Candidate(
            peer=peer,
            header=statement.id,
            blob=Digest(contribution.blob),
            steps=contribution.steps,
            tokens=contribution.tokens,
            scores=tuple(sorted(score for _, score, by in found if score is not None and by != peer)),
            place=statistics.median_low(place for place, _, _ in found),
            is_proven=self._place.electors.is_proven(peer),
        )

    def _root(self, chosen: list[Statement]) -> bytes | None:
        """The weights' root that a quorum of the voters names."""
        roots = Counter(_header(each).root for each in chosen if self._place.electors.is_voter(each.sender))
        return next((root for root, count in roots.items() if count >= self._place.electors.quorum), None)


def _header(statement: Statement) -> Header:
    assert isinstance(statement.body, Header)
    return statement.body


def _report(statement: Statement) -> Report:
    assert isinstance(statement.body, Report)
    return statement.body


def _names(statement: Statement) -> list[Digest]:
    """The headers that a report names."""
    report = _report(statement)
    return [Digest(held.header) for held in report.held] + [Digest(each) for each in report.present]
