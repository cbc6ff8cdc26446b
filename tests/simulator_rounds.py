"""A simulated run of training: members work, gather, vote and commit over bad wires, some lie; commits are compared.

Rules: the members' code is gossip/averaging.py and what stands under it; wires, disks, payloads and signatures are
simulated. All chance comes from the seed. Faults end at `faults_s`; then everybody alive must commit again.
Honest members are watched: none may say two things in one place, be accused, or commit what another did not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from crypto.canonical import encode_struct
from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.agreement import Timing
from gossip.averaging import Averaging
from gossip.electors import Electors, Terms, liars_max
from gossip.errors import RemoteProtocolError
from gossip.gathering import Candidate
from gossip.round_effects import Accuse, Apply, Ask, Behind, Effect, Fetch, Keep, Kept, Tell
from gossip.round_state import Chain, Phase, checked_record, slot_of
from gossip.rounds import (
    WEIGHT_ONE,
    Body,
    Committed,
    Contribution,
    Header,
    Held,
    Precommit,
    Prevote,
    Proposal,
    Report,
    Statement,
)
from tests.simulator_net import History, Loop

RUN = bytes(32)
WORK_S = (0.5, 2.0)
APPLY_S = (0.02, 0.2)
TIMING = Timing(propose_s=2.0, vote_s=0.6, growth_s=0.4, gone_s=0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What befalls a run. Shares are chances; liars are at most what agreement bears when `liars` is None."""

    members: int = 7
    newcomers: int = 1
    liars: int | None = None
    faults_s: float = 40.0
    quiet_s: float = 60.0
    loss: float = 0.1
    duplicate: float = 0.05
    delay_s: tuple[float, float] = (0.01, 0.3)
    late: float = 0.05  # of messages: up to 5 s later
    crashes_per_min: float = 6.0
    down_s: tuple[float, float] = (0.2, 15.0)
    cuts_per_min: float = 4.0
    cut_s: tuple[float, float] = (1.0, 15.0)
    absent_max: int = 1000
    rounds_after: int = 2  # that everybody commits once faults have ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a seed."""

    wrong: tuple[str, ...]
    rounds: int  # committed by who committed most
    views_max: int
    accused: frozenset[PeerId]
    digest: str
    lines: tuple[str, ...]


class Equal:
    """A policy: who is proven counts, all the same."""

    def choose(self, candidates: tuple[Candidate, ...]) -> tuple[tuple[int, int], ...]:
        return tuple((WEIGHT_ONE if each.is_proven else 0, WEIGHT_ONE) for each in candidates)


@dataclass(slots=True)
class Disk:
    """What outlives a crash."""

    kept: Kept | None = None
    records: list[Committed] = field(default_factory=list)
    payloads: dict[Digest, int] = field(default_factory=dict)  # header -> score


class Member:
    """One life after the other of a member."""

    def __init__(self, world: World, peer: PeerId, *, is_liar: bool) -> None:
        self.world, self.peer, self.is_liar = world, peer, is_liar
        self.disk = Disk()
        self.alive, self.life = False, 0
        self.averaging: Averaging | None = None
        self._wake_at = float("inf")

    # ---- life ----

    def start(self) -> None:
        """Everything from the disk."""
        chain = self.world.genesis
        for committed in self.disk.records:
            checked_record(committed, chain)
            chain = chain.after(committed.manifest)
        self.alive, self.life = True, self.life + 1
        self.averaging = Averaging(chain, self.peer, self.sign, Equal(), TIMING)
        self._wake_at = float("inf")
        self.world.note("start", self.peer, chain.round)
        self.carry_out(self.averaging.begin(self.world.loop.now, self.disk.kept))
        if self.averaging is not None:
            self.work()

    def crash(self) -> None:
        """All memory is lost."""
        self.world.note("crash", self.peer)
        self.alive, self.averaging = False, None

    def work(self) -> None:
        """Own work for the round to come; its end is the contribution."""
        averaging = self.averaging
        assert averaging is not None
        chain = averaging.chain
        self.later(self.world.rng.uniform(*WORK_S), lambda: self._contribute(chain))

    def _contribute(self, chain: Chain) -> None:
        averaging = self.averaging
        assert averaging is not None
        if averaging.chain != chain:
            return
        rests = self.world.rng.random() < 0.05
        blob = digest(self.world.rng.randbytes(8))
        contribution = None if rests else Contribution(blob=blob, payload_bytes=100, steps=1, tokens=10)
        header = Header(run=RUN, round=chain.round, base=chain.base, contribution=contribution, root=chain.base)
        effects = averaging.contribute(header, 5, self.world.loop.now)
        for effect in effects:  # the payload is on disk before its header is told
            if isinstance(effect, Tell) and isinstance(effect.statement.body, Header):
                self.disk.payloads[effect.statement.id] = 5
        self.carry_out(effects)

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Unless it crashes before."""
        life = self.life
        self.world.loop.after(seconds, lambda: act() if self.alive and self.life == life else None)

    def sign(self, body: Body) -> Statement:
        self.world.signed += 1
        raw = encode_struct(body) + self.peer.encode() + b"%d" % self.world.signed
        return Statement(sender=self.peer, body=body, raw=raw, id=digest(raw))

    # ---- effects ----

    def carry_out(self, effects: list[Effect]) -> None:
        """One after the other; a crash may fall between two."""
        world = self.world
        dies_at = world.rng.randrange(len(effects)) if world.may_fail(0.003) and len(effects) > 1 else -1
        for number, effect in enumerate(effects):
            if number == dies_at:
                world.fell(self)
                return
            self._perform(effect)
        self._arm()

    def _perform(self, effect: Effect) -> None:
        world = self.world
        match effect:
            case Keep(kept):
                self.disk.kept = kept
            case Tell(statement):
                world.broadcast(self, statement)
            case Fetch(header, holders):
                self._fetch(header, holders)
            case Ask(peer, number):
                world.direct(self, peer, lambda other: other.answer(self, number))
            case Behind(peer, number):
                world.direct(self, peer, lambda other: other.learn(self.disk.records[number:], ()))
            case Apply(committed):
                self.disk.records.append(committed)
                world.committed(self, committed)
                self.later(world.rng.uniform(*APPLY_S), self._applied)
            case Accuse(peer, _, _):
                world.accuse(self, peer)

    def _applied(self) -> None:
        averaging = self.averaging
        assert averaging is not None
        self.disk.payloads.clear()
        self.carry_out(averaging.applied(self.world.loop.now))
        if self.alive and averaging.phase is not Phase.OVER:
            self.work()

    def _fetch(self, header: Statement, holders: Iterable[PeerId]) -> None:
        world = self.world

        def arrive() -> None:
            sources = [world.members[each] for each in holders if each in world.members]
            has = [each for each in sources if each.alive and header.id in each.disk.payloads]
            averaging = self.averaging
            assert averaging is not None
            if header.id in self.disk.payloads or any(not world.is_cut(each, self) for each in has):
                self.disk.payloads[header.id] = 7
                self.carry_out(averaging.held(header.id, 7, world.loop.now))

        self.later(world.rng.uniform(0.02, 0.5), arrive)

    def answer(self, asker: Member, number: int) -> None:
        """Records from there on, and what is known of this round."""
        averaging = self.averaging
        assert averaging is not None
        records, known = self.disk.records[number:], averaging.known()
        self.world.direct(self, asker.peer, lambda other: other.learn(records, known))

    def learn(self, records: Iterable[Committed], statements: Iterable[Statement]) -> None:
        """What a peer gave: a record at a time, since each has to be applied before the next."""
        averaging, now = self.averaging, self.world.loop.now
        assert averaging is not None
        for record in records:
            try:
                self.carry_out(averaging.receive_record(record, now))
            except RemoteProtocolError as exc:
                self.world.wrong.append(f"{self.peer} was given a bad record: {exc}")
            if not self.alive:
                return
        for statement in statements:
            if self.alive:
                self.carry_out(averaging.receive(statement, now))

    def hear(self, statement: Statement) -> None:
        """Gossip."""
        averaging = self.averaging
        assert averaging is not None
        self.carry_out(averaging.receive(statement, self.world.loop.now))

    def _arm(self) -> None:
        averaging = self.averaging
        if averaging is None or averaging.deadline() >= self._wake_at:
            return
        self._wake_at = averaging.deadline()
        self.later(max(0.0, self._wake_at - self.world.loop.now) + 0.001, self._tick)

    def _tick(self) -> None:
        averaging = self.averaging
        assert averaging is not None
        self._wake_at = float("inf")
        self.world.views_max = max(self.world.views_max, averaging.statistics().view)
        self.carry_out(averaging.tick(self.world.loop.now))
        self._arm()


class Liar(Member):
    """Takes part as everybody does, and says different things to different peers; votes for all it sees."""

    def _perform(self, effect: Effect) -> None:
        rng = self.world.rng
        if not isinstance(effect, Tell):
            if not isinstance(effect, Keep) or rng.random() < 0.5:
                super()._perform(effect)
            return
        act = rng.choice(("honest", "silent", "two_faced", "two_faced", "invent"))
        if act == "honest":
            super()._perform(effect)
        elif act != "silent":
            others = [each for each in self.world.members if each != self.peer]
            some = set(rng.sample(others, len(others) // 2))
            first = effect.statement
            second = self.sign(self._twisted(first.body, invent=act == "invent"))
            self.world.broadcast(self, first, some)
            self.world.broadcast(self, second, set(others) - some)

    def hear(self, statement: Statement) -> None:
        """Whatever is proposed gets its votes at once, in two kinds."""
        super().hear(statement)
        body = statement.body
        if self.alive and isinstance(body, Proposal) and self.world.rng.random() < 0.7:
            for kind in (Prevote, Precommit):
                vote = kind(run=RUN, round=body.round, base=body.base, view=body.view, manifest=body.manifest)
                self.world.broadcast(self, self.sign(vote))

    def _twisted(self, body: Body, *, invent: bool) -> Body:
        rng = self.world.rng
        noise = digest(rng.randbytes(8))
        match body:
            case Header(contribution=Contribution()):
                other = Contribution(blob=noise, payload_bytes=1, steps=1, tokens=1 << 50)
                return Header(run=RUN, round=body.round, base=body.base, contribution=other)
            case Report():
                held = [*body.held[1:], Held(header=noise, score=-5)] if invent else list(body.held[1:])
                return Report(run=RUN, round=body.round, base=body.base, held=tuple(held[:64]), present=body.present)
            case Proposal():
                fewer = body.reports[1:] if len(body.reports) > 1 and not invent else (noise,)
                return Proposal(
                    run=RUN,
                    round=body.round,
                    base=body.base,
                    view=body.view,
                    valid_view=rng.randrange(-1, max(0, body.view)) if body.view else -1,
                    manifest=noise if invent else body.manifest,
                    reports=tuple(sorted(fewer)),
                )
            case Prevote() | Precommit():
                seen = [each.body.manifest for each in self._known() if isinstance(each.body, Proposal)]
                named = rng.choice([None, noise, *seen])
                return type(body)(run=RUN, round=body.round, base=body.base, view=body.view, manifest=named)
        return body

    def _known(self) -> tuple[Statement, ...]:
        return self.averaging.known() if self.averaging is not None else ()


class World:
    """One seed's run."""

    def __init__(self, seed: int, scenario: Scenario) -> None:
        self.scenario, self.rng = scenario, random.Random(seed)
        self.loop = Loop()
        self.history = History(self.loop)
        self.history.keep = True
        names = [PeerId(f"m{number:02}") for number in range(scenario.members + scenario.newcomers)]
        founders = names[: scenario.members]
        liars = liars_max(len(founders)) if scenario.liars is None else scenario.liars
        lying = set(self.rng.sample(founders, liars))
        terms = Terms(probation=2, absent_max=scenario.absent_max)
        self.genesis = Chain(run=RUN, round=0, base=digest(b"genesis"), electors=Electors.of_founders(founders, terms))
        self.members = {name: (Liar if name in lying else Member)(self, name, is_liar=name in lying) for name in names}
        self.cut: set[tuple[PeerId, PeerId]] = set()
        self.has_faults = True
        self.signed, self.views_max = 0, 0
        self.wrong: list[str] = []
        self.accused: set[PeerId] = set()
        self._commits: dict[int, Digest] = {}
        self._said: dict[tuple[object, ...], Body] = {}

    def run(self) -> Outcome:
        scenario, loop = self.scenario, self.loop
        for member in self.members.values():
            loop.after(self.rng.random(), member.start)
        self._each(scenario.crashes_per_min / 60, self._crash)
        self._each(scenario.cuts_per_min / 60, self._cut)
        loop.run_until(scenario.faults_s)
        self.has_faults = False
        self.cut.clear()
        for member in self.members.values():
            if not member.alive:
                member.start()
        before = len(self._commits)
        loop.run_until(scenario.faults_s + scenario.quiet_s)
        self._check_progress(before)
        return Outcome(
            wrong=tuple(self.wrong),
            rounds=len(self._commits),
            views_max=self.views_max,
            accused=frozenset(self.accused),
            digest=self.history.digest(),
            lines=tuple(self.history.lines),
        )

    def _check_progress(self, before: int) -> None:
        for member in self.members.values():
            count = len(member.disk.records)
            if not member.is_liar and count < before + self.scenario.rounds_after:
                self.wrong.append(f"{member.peer} has committed {count} rounds only, {before} were there at the quiet")

    def _each(self, rate_per_s: float, act: Callable[[], None]) -> None:
        def again() -> None:
            if self.has_faults:
                act()
                self.loop.after(self.rng.expovariate(rate_per_s), again)

        if rate_per_s > 0:
            self.loop.after(self.rng.expovariate(rate_per_s), again)

    def _crash(self) -> None:
        alive = [each for each in self.members.values() if each.alive]
        if alive:
            self.fell(self.rng.choice(alive))

    def fell(self, member: Member) -> None:
        """It crashes, and comes back."""
        member.crash()

        def back() -> None:
            if not member.alive:
                member.start()

        self.loop.after(self.rng.uniform(*self.scenario.down_s), back)

    def _cut(self) -> None:
        names = list(self.members)
        if self.rng.random() < 0.5:  # a partition
            side = set(self.rng.sample(names, self.rng.randint(1, len(names) - 1)))
            cut = {(one, two) for one in side for two in names if two not in side}
            cut |= {(two, one) for one, two in cut}
        else:
            one, two = self.rng.sample(names, 2)
            cut = {(one, two)}
        self.cut |= cut
        self.note("cut", len(cut))

        def mend() -> None:
            self.cut -= cut

        self.loop.after(self.rng.uniform(*self.scenario.cut_s), mend)

    # ---- wires ----

    def may_fail(self, chance: float) -> bool:
        return self.has_faults and self.rng.random() < chance

    def is_cut(self, one: Member, two: Member) -> bool:
        return (one.peer, two.peer) in self.cut

    def broadcast(self, sender: Member, statement: Statement, to: set[PeerId] | None = None) -> None:
        """Gossip: lost, late, doubled and out of order."""
        self._watch(sender, statement)
        for member in self.members.values():
            if member is sender or (to is not None and member.peer not in to) or self.is_cut(sender, member):
                continue
            copies = 1 - self.may_fail(self.scenario.loss) + self.may_fail(self.scenario.duplicate)
            for _ in range(copies):
                delay_s = self.rng.uniform(*self.scenario.delay_s)
                if self.may_fail(self.scenario.late):
                    delay_s += self.rng.uniform(0.0, 5.0)
                self.loop.after(delay_s, lambda member=member: member.hear(statement) if member.alive else None)  # type: ignore[misc]

    def direct(self, sender: Member, to: PeerId, act: Callable[[Member], None]) -> None:
        """A stream: whole, or nothing."""
        target = self.members[to]

        def arrive() -> None:
            if target.alive and not self.is_cut(sender, target):
                act(target)

        if not self.is_cut(sender, target):
            self.loop.after(self.rng.uniform(*self.scenario.delay_s), arrive)

    # ---- what is watched ----

    def note(self, what: str, *about: object) -> None:
        self.history.note(what, *about)

    def _watch(self, sender: Member, statement: Statement) -> None:
        if sender.is_liar:
            return
        key = (*slot_of(statement), statement.body.round, statement.body.base)
        if self._said.setdefault(key, statement.body) != statement.body:
            self.wrong.append(f"{sender.peer} said two things: {self._said[key]} and {statement.body}")

    def accuse(self, accuser: Member, peer: PeerId) -> None:
        self.accused.add(peer)
        if not self.members[peer].is_liar and not accuser.is_liar:
            self.wrong.append(f"{accuser.peer} accuses {peer}, who is honest")

    def committed(self, member: Member, committed: Committed) -> None:
        if member.is_liar:
            return
        manifest = committed.manifest
        self.note("commit", member.peer, manifest.round, manifest.id.hex()[:8], len(manifest.shares))
        first = self._commits.setdefault(manifest.round, manifest.id)
        if first != manifest.id:
            self.wrong.append(f"{member.peer} committed another manifest in round {manifest.round}")
        if len(member.disk.records) != manifest.round + 1:
            self.wrong.append(f"{member.peer} committed round {manifest.round} after {len(member.disk.records) - 1}")


def simulate(seed: int, scenario: Scenario | None = None) -> Outcome:
    """Run one seed to its quiet end."""
    return World(seed, scenario or Scenario()).run()
