"""How the voters of one round come to commit one manifest, or wait: views, prevotes, locks, precommits.

Rules: core. Two honest voters never decide differently, whatever is lost, late, doubled or said by fewer than a third
liars; one decision comes once messages arrive within the time-outs, which grow from view to view. A voter locks on a
manifest before it precommits it, and gives the lock up only for a quorum of prevotes in a later view. What a voter has
said it never says otherwise, also after a restart: `save()` is to be kept before what `said` holds goes out. Votes name
a manifest by its digest; whether it is sound is told by `judge`. Who does not vote decides by the votes of others. A
liar's votes for several manifests count for each of them, since another voter may have seen one of them only. That it
ends needs members who ask each other, from time to time, for all that they heard: a liar may tell one voter only.
Source: Buchman, Kwon, Milosevic, "The latest gossip on BFT consensus" (arXiv 1807.04938), algorithm 1: its lines are
named at the rules here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from crypto.digest import Digest
from crypto.identity import PeerId
from gossip.ballots import NOBODY, Tally
from gossip.electors import Electors, liars_max
from gossip.rounds import VIEWS_MAX, Precommit, Prevote, Proposal, Vote

VIEWS_AHEAD_MAX = 16  # votes for views further ahead are not kept, only that their sender is there
VIEWS_KEPT_MAX = 1024
GROWTH_S_MAX = 60.0


class Step(IntEnum):
    """Where a voter stands in its view."""

    PROPOSE = 0
    PREVOTE = 1
    PRECOMMIT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a view waits, in seconds: `*_s`, and `growth_s` more for each view before it."""

    propose_s: float = 3.0
    vote_s: float = 1.0
    growth_s: float = 0.5
    gone_s: float = 0.25  # for a proposer to whom there is no connection any more

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        for name in ("propose_s", "vote_s", "growth_s", "gone_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted more than 0 seconds")


@dataclass(frozen=True, slots=True)
class Value:
    """A manifest by its digest, and the reports it is computed from."""

    manifest: Digest
    reports: tuple[Digest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What must outlive a restart. `said`: own proposals and votes of this round, in their order."""

    view: int = 0
    step: Step = Step.PROPOSE
    locked: tuple[int, Digest] | None = None  # (view, manifest)
    valid: tuple[int, Value] | None = None
    said: tuple[Proposal | Vote, ...] = ()


@dataclass(frozen=True, slots=True)
class Say:
    """Sign this and tell everybody."""

    body: Proposal | Vote


@dataclass(frozen=True, slots=True)
class Check:
    """Somebody proposed this: `judge` it."""

    value: Value
    proposer: PeerId


@dataclass(frozen=True, slots=True)
class Lack:
    """This proposer says that a manifest had a quorum of prevotes in a view; they are not here: get them from it."""

    proposer: PeerId
    valid_view: int


@dataclass(frozen=True, slots=True)
class Decided:
    """It is committed: a quorum precommitted it in this view."""

    manifest: Digest
    view: int


Effect = Say | Check | Lack | Decided


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which round of which history is agreed on, and by whom. own: None for who only looks on."""

    run: bytes
    round: int
    base: bytes
    electors: Electors
    own: PeerId | None


@dataclass(slots=True)
class _Clock:
    """The time of one view: when it began, when each step is given up, whether its proposer was asked for a proof."""

    began: float = float("inf")
    due: list[float] = field(default_factory=lambda: [float("inf")] * 3)
    has_asked: bool = False


class Agreement:
    """One voter in one round. Every method returns what to do, in order."""

    def __init__(self, place: Place, timing: Timing, saved: Saved | None = None) -> None:
        """saved: what was kept of this round before a restart."""
        self._place, self._timing = place, timing
        self._votes = place.own is not None and place.electors.is_voter(place.own)
        self._tally = Tally()
        # None: asked, not known yet. By value: a liar may name a sound manifest with reports that are not its own
        self._judged: dict[Value, bool | None] = {}
        self._offer: Value | None = None
        self._clock = _Clock()
        self.gone: frozenset[PeerId] = frozenset()  # voters without a connection; the owner keeps it up to date
        self.decided: Decided | None = None
        self.kept_last = False  # whether what was received last is part of the tally
        kept = saved or Saved()
        self.view, self.step, self._locked, self._valid = kept.view, kept.step, kept.locked, kept.valid
        self.said = list(kept.said)
        for body in kept.said:
            self._note(place.own or PeerId(""), body)

    def save(self) -> Saved:
        """What must be kept before anything newly said goes out."""
        return Saved(view=self.view, step=self.step, locked=self._locked, valid=self._valid, said=tuple(self.said))

    @property
    def has_begun(self) -> bool:
        """Whether this voter's clock runs."""
        return self._clock.began < float("inf")

    @property
    def _quorum(self) -> int:
        return self._place.electors.quorum

    def mute(self) -> None:
        """This voter has forgotten what it said (its disk is gone): it votes no more in this round."""
        self._votes = False

    # ---- what happens ----

    def begin(self, now: float) -> list[Effect]:
        """The round is closed here, or others have begun to vote: time runs from now. After a restart: go on."""
        if self.has_begun:
            return []
        self._set_clocks(now)
        return list(self._advance(now))

    def offer(self, value: Value, now: float) -> list[Effect]:
        """What this voter proposes when it is its turn; it is sound as far as this voter knows."""
        self._offer = value
        self._judged[value] = True
        return list(self._advance(now))

    def judge(self, value: Value, is_sound: bool, now: float) -> list[Effect]:
        """Whether a manifest that somebody proposed is what follows from its reports, and all of it is here."""
        self._judged[value] = is_sound
        return list(self._advance(now))

    def receive(self, sender: PeerId, body: Proposal | Vote, now: float) -> list[Effect]:
        """A proposal or vote of this round. Of two proposals in one view the first counts; only voters are heard."""
        if self.decided is not None or not self._place.electors.is_voter(sender) or sender == self._place.own:
            return []
        self.kept_last = body.view <= self.view + VIEWS_AHEAD_MAX and self._note(sender, body)
        self._tally.reached[sender] = max(body.view, self._tally.reached.get(sender, 0))
        return list(self._advance(now))

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        return list(self._advance(now))

    def deadline(self) -> float:
        """When `tick` is due; infinity when only a message can change anything."""
        if not self.has_begun or self.decided is not None:
            return float("inf")
        step_due = self._propose_due() if self.step == Step.PROPOSE else self._clock.due[self.step]
        return min(step_due, self._clock.due[Step.PRECOMMIT])

    def precommitted(self, manifest: Digest, view: int) -> frozenset[PeerId]:
        """Who precommitted this in this view."""
        return frozenset(self._tally.precommits[view].by_manifest.get(manifest, ()))

    # ---- the rules ----

    def _advance(self, now: float) -> Iterator[Effect]:
        """Apply rules until none applies. Deciding and asking need no clock; the others wait for `begin`."""
        yield from self._ask_about_proposals()
        rules: tuple[Callable[[float], Iterator[Effect]], ...] = (self._decide,)
        if self.has_begun:
            rules += (self._skip, self._propose, self._prevote, self._lock, self._give_up_view, self._time_out)
        while self.decided is None:
            before = (self.view, self.step, len(self.said))
            for rule in rules:
                yield from rule(now)
            if before == (self.view, self.step, len(self.said)):
                return

    def _ask_about_proposals(self) -> Iterator[Effect]:
        for view, proposal in self._tally.proposals.items():
            value = _value_of(proposal)
            if value not in self._judged:
                self._judged[value] = None
                yield Check(value, self._place.electors.proposer(self._place.base, view))

    def _decide(self, _now: float) -> Iterator[Effect]:
        """Line 49. A quorum of precommits proves it, whether or not its payloads are here."""
        for view, ballot in self._tally.precommits.items():
            for manifest, voters in ballot.by_manifest.items():
                if manifest != NOBODY and len(voters) >= self._quorum:
                    self.decided = Decided(manifest, view)
                    yield self.decided
                    return

    def _skip(self, now: float) -> Iterator[Effect]:
        """Line 55: one honest voter at least is in a later view."""
        reached = sorted(self._tally.reached.values(), reverse=True)
        enough = liars_max(len(self._place.electors.voters))
        if len(reached) > enough and reached[enough] > self.view:
            self._start(reached[enough], now)
        yield from ()

    def _propose(self, _now: float) -> Iterator[Effect]:
        """Lines 14 to 19."""
        mine = self._votes and self._place.electors.proposer(self._place.base, self.view) == self._place.own
        if not mine or self.step != Step.PROPOSE or self.view in self._tally.proposals:
            return
        valid_view, value = self._valid or (-1, self._offer)
        if value is not None:
            place = self._place
            yield self._say(
                Proposal(
                    run=place.run,
                    round=place.round,
                    base=place.base,
                    view=self.view,
                    valid_view=valid_view,
                    manifest=value.manifest,
                    reports=value.reports,
                )
            )

    def _prevote(self, _now: float) -> Iterator[Effect]:
        """Lines 22 to 33."""
        proposal = self._tally.proposals.get(self.view)
        if self.step != Step.PROPOSE or proposal is None:
            return
        manifest = Digest(proposal.manifest)
        sound = self._judged.get(_value_of(proposal))
        if sound is None:
            return
        if proposal.valid_view >= 0 and self._tally.prevotes[proposal.valid_view].count(manifest) < self._quorum:
            if not self._clock.has_asked:
                self._clock.has_asked = True
                yield Lack(self._place.electors.proposer(self._place.base, self.view), proposal.valid_view)
            return
        locked_view, locked = self._locked or (-1, manifest)
        free = locked == manifest or locked_view <= proposal.valid_view
        self.step = Step.PREVOTE
        yield from self._vote(Prevote, manifest if sound and free else NOBODY)

    def _lock(self, _now: float) -> Iterator[Effect]:
        """Lines 36 to 43."""
        proposal = self._tally.proposals.get(self.view)
        if self.step < Step.PREVOTE or proposal is None or not self._judged.get(_value_of(proposal)):
            return
        manifest = Digest(proposal.manifest)
        if self._tally.prevotes[self.view].count(manifest) < self._quorum:
            return
        if self._valid is None or self._valid[0] < self.view:
            self._valid = (self.view, _value_of(proposal))
        if self.step == Step.PREVOTE:
            self._locked = (self.view, manifest)
            self.step = Step.PRECOMMIT
            yield from self._vote(Precommit, manifest)

    def _give_up_view(self, now: float) -> Iterator[Effect]:
        """Lines 34, 44 to 46, 47: nothing can come of this view, or its time begins to run."""
        prevotes, precommits = self._tally.prevotes[self.view], self._tally.precommits[self.view]
        if self.step == Step.PREVOTE and prevotes.count(NOBODY) >= self._quorum:
            self.step = Step.PRECOMMIT
            yield from self._vote(Precommit, NOBODY)
            return
        wait_s = self._timing.vote_s + self._growth_s()
        if self.step == Step.PREVOTE and prevotes.voters >= self._quorum:
            self._clock.due[Step.PREVOTE] = min(self._clock.due[Step.PREVOTE], now + wait_s)
        if precommits.voters >= self._quorum:
            self._clock.due[Step.PRECOMMIT] = min(self._clock.due[Step.PRECOMMIT], now + wait_s)

    def _time_out(self, now: float) -> Iterator[Effect]:
        """Lines 57 to 67."""
        if self._clock.due[Step.PRECOMMIT] <= now:
            self._start(self.view + 1, now)
        elif self.step == Step.PROPOSE and self._propose_due() <= now:
            self.step = Step.PREVOTE
            yield from self._vote(Prevote, NOBODY)
        elif self.step == Step.PREVOTE and self._clock.due[Step.PREVOTE] <= now:
            self.step = Step.PRECOMMIT
            yield from self._vote(Precommit, NOBODY)

    # ---- parts ----

    def _start(self, view: int, now: float) -> None:
        """Line 11."""
        self.view, self.step = min(view, VIEWS_MAX), Step.PROPOSE
        self._set_clocks(now)

        kept = {self.view - VIEWS_KEPT_MAX, self._valid[0] if self._valid else -1}
        for views in (self._tally.proposals, self._tally.prevotes, self._tally.precommits):
            for old in [each for each in views if each < self.view - VIEWS_KEPT_MAX and each not in kept]:
                del views[old]

    def _set_clocks(self, now: float) -> None:
        self._clock = _Clock(began=now)
        self._clock.due[Step.PROPOSE] = now + self._timing.propose_s + self._growth_s()

    def _growth_s(self) -> float:
        return min(self.view * self._timing.growth_s, GROWTH_S_MAX)

    def _propose_due(self) -> float:
        """Until when this view's proposer is waited for: not long when there is no connection to it."""
        due = self._clock.due[Step.PROPOSE]
        if self._place.electors.proposer(self._place.base, self.view) in self.gone:
            due = min(due, self._clock.began + self._timing.gone_s)
        return due

    def _note(self, sender: PeerId, body: Proposal | Vote) -> bool:
        """Whether it is new and worth keeping."""
        tally, view = self._tally, body.view
        tally.reached[sender] = max(view, tally.reached.get(sender, 0))
        if isinstance(body, Proposal):
            if sender != self._place.electors.proposer(self._place.base, view) or view in tally.proposals:
                return False
            tally.proposals[view] = body
            return True
        ballots = tally.prevotes if isinstance(body, Prevote) else tally.precommits
        is_proposed = any(proposal.manifest == body.manifest for proposal in tally.proposals.values())
        return ballots[view].add(sender, Digest(body.manifest or NOBODY), is_proposed=is_proposed)

    def _vote(self, kind: type[Prevote] | type[Precommit], manifest: Digest) -> Iterator[Effect]:
        """One vote of a kind in a view, ever."""
        if not self._votes or any(type(body) is kind and body.view == self.view for body in self.said):
            return
        place = self._place
        yield self._say(
            kind(run=place.run, round=place.round, base=place.base, view=self.view, manifest=manifest or None)
        )

    def _say(self, body: Proposal | Vote) -> Say:
        assert self._place.own is not None
        self.said.append(body)
        self._note(self._place.own, body)
        return Say(body)


def _value_of(proposal: Proposal) -> Value:
    return Value(Digest(proposal.manifest), tuple(Digest(each) for each in proposal.reports))
