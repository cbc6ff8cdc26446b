"""A member's part in a run: rounds of work, gathering, agreement and commit, one after the other; catching up.

Rules: core. It sees digests only. What it does comes out as effects, in order. A committed record is applied by the
owner, who then says `applied`, and only then the next round begins. What this member said of a round that is not over
is said again now and then, since gossip loses messages. Who is behind is given records, and asks for them; who
contradicts itself is accused with both statements.
Source: TRAINING.md 3; gossip/gathering.py and gossip/agreement.py decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from crypto.digest import Digest
from crypto.identity import PeerId
from gossip import agreement as voting
from gossip.agreement import Timing, Value
from gossip.gathering import Gathering, Lacking, Policy
from gossip.round_effects import Accuse, Apply, Ask, Behind, Effect, Fetch, Keep, Kept, Tell
from gossip.round_state import NEVER, AveragingStatistics, Chain, Phase, RoundState, checked_record, slot_of
from gossip.rounds import Body, Committed, Header, Manifest, Report, Sign, Statement

RESAY_S, RESAY_S_MAX = 2.0, 15.0
ASK_S = 1.0  # between two asks for what is missing
REPORTS_GRACE_S = 0.3  # for the last reports, once there is a quorum of them
EARLY_MAX = 512  # statements of the next round, kept until it begins here; peers that are told that they are behind


class Averaging:
    """One member in one run. Times are monotonic seconds."""

    def __init__(self, chain: Chain, own: PeerId, sign: Sign, policy: Policy, timing: Timing | None = None) -> None:
        """sign: signs a body as this member. Call `begin` next."""
        self._own, self._sign, self._policy, self._timing = own, sign, policy, timing or Timing()
        self._drops: Counter[str] = Counter()
        self._committed = 0
        self._gone: frozenset[PeerId] = frozenset()
        self._early: dict[Digest, Statement] = {}
        self._told_behind: dict[PeerId, float] = {}
        self._past: frozenset[Digest] = frozenset()  # statements of the round before this one
        self._out: list[Effect] = []
        self._round = self._new_round(chain, 0.0, None)

    @property
    def chain(self) -> Chain:
        """The history that this member stands on."""
        return self._round.chain

    @property
    def phase(self) -> Phase:
        """Where this member stands."""
        return self._round.phase

    @property
    def is_closing(self) -> bool:
        """Whether a quorum's work is here: who has not done its own is waited for no longer than the grace."""
        return self._round.phase is Phase.AGREEING or self._round.gathering.closes_at(NEVER) < NEVER

    @property
    def has_contributed(self) -> bool:
        """Whether this member has said what it did in the round, or may not say it any more."""
        return self._round.has_said(Header) or self._round.has_forgotten

    # ---- what happens ----

    def begin(self, now: float, kept: Kept | None = None, *, has_forgotten: bool = False) -> list[Effect]:
        """Time runs from now. kept: what was last kept, of use for its own round. has_forgotten: it is lost."""
        if kept is not None and (kept.round, kept.base) != (self.chain.round, self.chain.base):
            kept = None
        effects = self._enter(self.chain, now, kept)
        if has_forgotten:
            self._round.forget()
        return effects

    def contribute(self, header: Header, score: int | None, now: float) -> list[Effect]:
        """Own work is done and its payload is offered (or this member sits the round out). Once a round.

        Nothing happens when its round is over meanwhile: the work came too late.
        """
        state = self._round
        if not state.is_open or not self.chain.names(header) or state.has_said(Header) or state.has_forgotten:
            return []
        statement = self._speak(header, now)
        state.gathering.hold(statement.id, score, now)
        return self._done(now)

    def receive(self, statement: Statement, now: float) -> list[Effect]:
        """A statement whose signature was checked came, from whomever. What its sender forgot of its own mutes it."""
        body, state = statement.body, self._round
        if body.run != self.chain.run:
            return self._drop("other_run")
        if body.round != self.chain.round:
            return self._of_another_round(statement, now)
        if body.base != self.chain.base:
            return self._drop("other_history")
        if not state.is_open or statement.id in state.statements:
            return self._drop("known")
        if statement.sender == self._own:
            state.forget()
            return self._drop("forgotten_own")
        if not isinstance(body, Header) and not self.chain.electors.is_voter(statement.sender):
            return self._drop("not_a_voter")
        if self._heed(statement, now):
            state.statements[statement.id] = statement
        else:
            self._drop("of_no_use")
        return self._done(now)

    def held(self, header: Digest, score: int | None, now: float) -> list[Effect]:
        """This header's payload is here and sound; score: as in a report."""
        self._round.gathering.hold(header, score, now)
        return self._done(now)

    def refused(self, header: Digest, reason: str, now: float) -> list[Effect]:
        """This header's payload is not what it must be, for a reason that everybody would find."""
        self._round.gathering.refuse(header, reason)
        return self._done(now)

    def receive_record(self, committed: Committed, now: float) -> list[Effect]:
        """A record came on a stream. Raises RemoteProtocolError when it is of this round and proves nothing."""
        state, manifest = self._round, committed.manifest
        if not state.is_open or manifest.run != self.chain.run or manifest.round != self.chain.round:
            return self._drop("record_of_another_round")
        if not self.chain.names(manifest):
            return self._drop("other_history")
        checked_record(committed, self.chain)
        self._apply(committed)
        return self._done(now)

    def applied(self, now: float) -> list[Effect]:
        """The weights are those after the record: the next round begins."""
        state = self._round
        assert state.phase is Phase.APPLYING
        assert state.committed is not None
        self._committed += 1
        chain = state.chain.after(state.committed.manifest)
        self._past = frozenset(state.statements)
        return self._enter(chain, now, None)

    def connected(self, peers: Iterable[PeerId], now: float) -> list[Effect]:
        """To whom there is a connection now; a proposer without one is not waited for long."""
        self._gone = frozenset(self.chain.electors.voters) - set(peers) - {self._own}
        self._round.agreement.gone = self._gone
        return self._done(now)

    def tick(self, now: float) -> list[Effect]:
        """Time has passed."""
        self._carry_out(self._round.agreement.tick(now), now)
        return self._done(now)

    def deadline(self) -> float:
        """When `tick` is due."""
        state = self._round
        if not state.is_open:
            return NEVER
        closes_at = state.gathering.closes_at(NEVER) if state.phase is Phase.WORKING else NEVER
        return min(closes_at, state.agreement.deadline(), state.resay_at, state.propose_at)

    def known(self) -> tuple[Statement, ...]:
        """What was said of this round, for who asks."""
        return self._round.known()

    def statistics(self) -> AveragingStatistics:
        """A snapshot."""
        return self._round.statistics(self._committed, self._drops)

    # ---- statements ----

    def _of_another_round(self, statement: Statement, now: float) -> list[Effect]:
        sender, number = statement.sender, statement.body.round
        if number > self.chain.round:
            if number == self.chain.round + 1 and len(self._early) < EARLY_MAX:
                self._early.setdefault(statement.id, statement)
            self._ask(sender, now)
        elif statement.id not in self._past and now >= self._told_behind.get(sender, 0.0):
            if len(self._told_behind) >= EARLY_MAX:
                self._told_behind.clear()
            self._told_behind[sender] = now + ASK_S
            self._out.append(Behind(sender, number))
        self._drops["another_round"] += 1
        return self._flush()

    def _heed(self, statement: Statement, now: float) -> bool:
        """Whether it is worth keeping."""
        state, body = self._round, statement.body
        if isinstance(body, Header):
            is_kept = state.gathering.add_header(statement, now)
            self._fetch(state.gathering.wanted())
        elif isinstance(body, Report):
            is_kept = state.gathering.add_report(statement)
        else:
            self._carry_out(state.agreement.receive(statement.sender, body, now), now)
            is_kept = state.agreement.kept_last
        if is_kept:
            self._compare(statement)
        return is_kept

    def _compare(self, statement: Statement) -> None:
        """Its sender is accused when it said something else in the same place before."""
        state = self._round
        first = state.first.setdefault(slot_of(statement), statement)
        if first.body != statement.body and statement.sender not in state.accused:
            state.accused.add(statement.sender)
            self._out.append(Accuse(statement.sender, first, statement))

    def _speak(self, body: Body, now: float) -> Statement:
        """Sign it, count it here as everybody will, and have it kept and told."""
        state, statement = self._round, self._sign(body)
        self._count_own(statement, now)
        state.resay_s, state.resay_at = RESAY_S, now + RESAY_S
        self._out.append(Tell(statement))
        return statement

    def _count_own(self, statement: Statement, now: float) -> None:
        state = self._round
        state.said.append(statement)
        state.statements[statement.id] = statement
        if isinstance(statement.body, Header):
            state.gathering.add_header(statement, now)
        elif isinstance(statement.body, Report):
            state.gathering.add_report(statement)

    def _ask(self, peer: PeerId, now: float) -> None:
        """Ask for records and statements, not too often."""
        state = self._round
        if state.is_open and now >= state.ask_at and peer != self._own:
            state.ask_at = now + ASK_S
            self._out.append(Ask(peer, self.chain.round))

    def _ask_around(self, first: PeerId, now: float) -> None:
        """Ask `first`, and next time somebody else: a liar may have told one voter only, and answer nobody."""
        state = self._round
        voters = [each for each in self.chain.electors.voters if each != first and each not in self._gone]
        others = [each for each in (first, *voters) if each != self._own]
        if others and state.is_open and now >= state.ask_at:
            self._ask(others[state.asked % len(others)], now)
            state.asked += 1

    # ---- what follows ----

    def _done(self, now: float) -> list[Effect]:
        """Whatever became possible happens; then all effects, what is to be kept first."""
        state = self._round
        while state.is_open:
            before = (len(self._out), state.agreement.view, state.agreement.decided)
            self._close(now)
            self._judge(now)
            self._propose(now)
            self._finish(now)
            if before == (len(self._out), state.agreement.view, state.agreement.decided):
                break
        if state.is_open and now >= state.resay_at:
            self._resay(now)
        return self._flush()

    def _close(self, now: float) -> None:
        """The round is closed here: say what is held."""
        state = self._round
        if state.phase is Phase.WORKING and state.gathering.closes_at(now) <= now:
            state.phase = Phase.AGREEING
            if self.chain.electors.is_voter(self._own) and not state.has_said(Report) and not state.has_forgotten:
                self._speak(state.gathering.report(), now)
            self._carry_out(state.agreement.begin(now), now)

    def _judge(self, now: float) -> None:
        """Manifests that others proposed, as far as what is here says."""
        state = self._round
        for value, proposer in list(state.unjudged.items()):
            found = state.gathering.manifest(value.reports, self._policy)
            if isinstance(found, Lacking):
                self._fill(found, proposer, now)
                continue
            del state.unjudged[value]
            is_sound = isinstance(found, Manifest) and found.id == value.manifest
            if isinstance(found, Manifest):
                state.manifests[found.id] = found
            self._carry_out(state.agreement.judge(value, is_sound, now), now)

    def _propose(self, now: float) -> None:
        """When it is our turn: the manifest of all reports that are here, once most had time to come."""
        state, electors = self._round, self.chain.electors
        state.propose_at = NEVER
        view = state.agreement.view
        mine = state.agreement.has_begun and electors.proposer(self.chain.base, view) == self._own
        if not mine or state.offered_view == view:
            return
        usable = state.gathering.usable()
        if len(usable) < electors.quorum:
            return
        state.reports_at = min(state.reports_at, now)
        if len(usable) < len(electors.voters) and now < state.reports_at + REPORTS_GRACE_S:
            state.propose_at = state.reports_at + REPORTS_GRACE_S
            return
        ids = tuple(each.id for each in usable)
        found = state.gathering.manifest(ids, self._policy)
        if isinstance(found, Lacking):
            self._fill(found, self._own, now)
        elif isinstance(found, Manifest):
            state.offered_view = view
            state.manifests[found.id] = found
            self._carry_out(state.agreement.offer(Value(found.id, ids), now), now)

    def _finish(self, now: float) -> None:
        """It is decided: apply it, once it is known what it is."""
        state, decided = self._round, self._round.agreement.decided
        if decided is None or not state.is_open:
            return
        manifest = state.manifests.get(decided.manifest)
        if manifest is not None:
            self._apply(Committed(manifest=manifest, votes=state.proof_of(decided)))
        else:
            others = sorted(state.agreement.precommitted(decided.manifest, decided.view) - {self._own})
            if others:  # who votes alone finds it by its own proposal
                self._ask(others[int(now / ASK_S) % len(others)], now)

    def _apply(self, committed: Committed) -> None:
        self._round.phase, self._round.committed = Phase.APPLYING, committed
        self._out.append(Apply(committed))

    def _fill(self, lacking: Lacking, proposer: PeerId, now: float) -> None:
        """Get what is missing to compute a manifest."""
        state = self._round
        self._fetch(state.statements[each] for each in lacking.payloads)
        if lacking.statements:
            self._ask_around(proposer, now)

    def _fetch(self, headers: Iterable[Statement]) -> None:
        state = self._round
        for header in headers:
            if header.id not in state.fetching:
                state.fetching.add(header.id)
                self._out.append(Fetch(header, tuple(state.gathering.holders(header.id))))

    def _carry_out(self, effects: Iterable[voting.Effect], now: float) -> None:
        state = self._round
        for effect in effects:
            match effect:
                case voting.Say(body):
                    self._speak(body, now)
                case voting.Check(value, proposer):
                    state.unjudged[value] = proposer
                    state.gathering.proposed_reports.update(value.reports)
                    self._carry_out(state.agreement.begin(now), now)  # others vote: our clock runs too
                case voting.Lack(proposer, _):
                    self._ask(proposer, now)
                case voting.Decided():
                    pass  # _finish sees it

    def _resay(self, now: float) -> None:
        """What is still of use, again: gossip loses some of it."""
        state, view = self._round, self._round.agreement.view
        self._out += [Tell(each) for each in state.said if getattr(each.body, "view", view) >= view - 1]
        state.fetching.clear()
        self._fetch(state.gathering.wanted())
        self._judge(now)
        self._ask_around(self._own, now)
        state.resay_s = min(2 * state.resay_s, RESAY_S_MAX)
        state.resay_at = now + state.resay_s

    # ---- rounds ----

    def _new_round(self, chain: Chain, now: float, kept: Kept | None) -> RoundState:
        place = voting.Place(run=chain.run, round=chain.round, base=chain.base, electors=chain.electors, own=self._own)
        agreement = voting.Agreement(place, self._timing, kept.agreement if kept is not None else None)
        agreement.gone = self._gone
        phase = Phase.WORKING if chain.electors.voters else Phase.OVER
        state = RoundState(chain=chain, gathering=Gathering(place, now), agreement=agreement, phase=phase)
        state.resay_s, state.resay_at = RESAY_S, now + RESAY_S
        return state

    def _enter(self, chain: Chain, now: float, kept: Kept | None) -> list[Effect]:
        early, self._early = self._early, {}
        self._round = state = self._new_round(chain, now, kept)
        for statement in kept.said if kept is not None else ():
            self._count_own(statement, now)
            self._out.append(Tell(statement))
        state.said_kept = len(state.said)
        effects = list[Effect]()
        for statement in kept.heard if kept is not None else ():
            effects += self.receive(statement, now)
        if state.has_said(Report):
            state.phase = Phase.AGREEING
            self._carry_out(state.agreement.begin(now), now)
        for statement in early.values():
            effects += self.receive(statement, now)
        return effects + self._done(now)

    def _drop(self, reason: str) -> list[Effect]:
        self._drops[reason] += 1
        return []

    def _flush(self) -> list[Effect]:
        """All effects; what this member newly said is kept before it is told."""
        state, out = self._round, self._out
        self._out = []
        if state.said_kept < len(state.said):
            state.said_kept = len(state.said)
            out.insert(0, Keep(state.kept()))
        return out
