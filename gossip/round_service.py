"""One run as this node lives it: gossip/averaging.py's effects carried out, in order.

Rules: a shell. One task carries effects out; what is to be kept is on the disk before the effects after it, and before
anybody who asks is told. Everything slow (a fetch, a look at a payload, the change of weights) has a task of its own,
which tells the core when it is done. What a peer hands on is proven before anything follows from it.
A session lasts as long as the weights keep up with the records; before it, and again after it, gossip/round_history.py
brings both up to date. What the owner of the weights cannot do for good it raises, and the run ends here.
Source: TRAINING.md 3.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import trio

from crypto.digest import Digest, digest
from crypto.errors import BadSignature
from crypto.identity import PeerId
from gossip.averaging import Averaging
from gossip.errors import RemoteProtocolError, Unavailable
from gossip.gathering import Policy
from gossip.round_effects import Accuse, Apply, Ask, Behind, Effect, Fetch, Keep, Kept, Tell
from gossip.round_fetching import Fetching
from gossip.round_history import RETRY_S, RoundHistory, RunPlace, Unsound
from gossip.round_state import OPEN, AveragingStatistics, Chain, Phase, checked_record
from gossip.rounds import Body, Committed, Contribution, Header, Statement, sign_statement
from gossip.standing import Fault
from gossip.transfer import Manifest as Made
from p2p.errors import P2PError
from p2p.transport import Transport

REPLAYED_MAX = 2  # rounds behind that are made good without a new session

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a member has done in a round; its payload lies at Payloads.own_path, and is made of this."""

    steps: int
    tokens: int
    made_of: Made


class RoundService:
    """One run. `run` it; the owner trains when `opened` says so, and hands in its work by `contribute`."""

    def __init__(self, place: RunPlace, history: RoundHistory, policy: Policy) -> None:
        self._place, self.history, self._policy = place, history, policy
        self._averaging: Averaging | None = None
        self._effects: deque[Effect] = deque()
        self._waiting: dict[int, Committed] = {}  # records that come after the one that is applied now
        self._root: tuple[int, Digest] | None = None  # of the weights before a round, as far as they were offered
        self._followed: set[PeerId] = set()  # who is being asked for what it knows
        self._promised: frozenset[Digest] = frozenset()  # own statements of this round that are on the disk
        self._woken = trio.Event()
        self._opened = trio.Event()
        self._session: trio.Nursery | None = None
        self._fetching: Fetching | None = None

    # ---- for the owner ----

    @property
    def transport(self) -> Transport:
        """What this run goes over."""
        return self._place.transport

    async def opened(self) -> Chain:
        """Wait until a round is open in which this member has not said yet what it has done."""
        while True:
            averaging = self._averaging
            if averaging is not None and averaging.phase is Phase.WORKING and not averaging.has_contributed:
                return averaging.chain
            await self._opened.wait()

    def is_open(self, chain: Chain) -> bool:
        """Whether work on this history still counts."""
        averaging = self._averaging
        return averaging is not None and averaging.chain.base == chain.base and averaging.phase in OPEN

    def is_waited_for(self, chain: Chain) -> bool:
        """Whether the others have done their work in this round, and its end is near."""
        averaging = self._averaging
        return averaging is not None and self.is_open(chain) and averaging.is_closing

    def has_others_work(self, chain: Chain) -> bool:
        """Whether somebody else has done work in this round."""
        return self.is_open(chain) and any(
            isinstance(each.body, Header) and each.body.contribution is not None and each.sender != self._place.own
            for each in self.known()
        )

    async def contribute(self, chain: Chain, work: Work | None, *, leaves: bool = False) -> bool:
        """Own work on this history is done or, without one, this round is sat out. leaves: so are those that follow.

        False: the round is over meanwhile, or it was said before. Raises CannotStore.
        """
        payloads, owner, contribution = self.history.payloads, self.history.owner, None
        if work is not None:
            blob = await payloads.add_own(chain.round, work.made_of)
            size = work.made_of.blob_bytes
            contribution = Contribution(blob=blob, payload_bytes=size, steps=work.steps, tokens=work.tokens)
        root = None if owner.state is None else await payloads.offer_state(*owner.state)
        averaging = self._averaging
        if averaging is None or not self.is_open(chain) or averaging.has_contributed or owner.round != chain.round:
            return False
        self._root = None if root is None else (chain.round, root)
        header = Header(
            run=chain.run, round=chain.round, base=chain.base, contribution=contribution, root=root, leaves=leaves
        )
        self._take(averaging.contribute(header, None, trio.current_time()))
        return averaging.chain.base != chain.base or averaging.has_contributed

    def statistics(self) -> AveragingStatistics | None:
        """The round now; None while this member catches up."""
        return None if self._averaging is None else self._averaging.statistics()

    # ---- see gossip.round_door.RunHere ----

    @property
    def id(self) -> Digest:
        """The run."""
        return Digest(self._place.genesis.run)

    @property
    def plan(self) -> bytes:
        """What joiners get."""
        return self._place.plan

    @property
    def round(self) -> int:
        """The round to come, by the records that are here."""
        return self.history.store.count

    def admits(self, peer: PeerId) -> bool:
        """Whether it may be a member."""
        return self._place.admits(peer)

    def is_voter(self, peer: PeerId) -> bool:
        """Whether its vote counts now."""
        return self.history.chain.electors.is_voter(peer)

    async def records(self, first: int, count_max: int) -> list[bytes]:
        """Raises CannotStore."""
        found: list[bytes] = await self._place.disk(self.history.store.records, first, count_max)
        return found

    def known(self) -> tuple[Statement, ...]:
        """What is known of the round to come; of what this member says, only what a kill cannot undo any more."""
        averaging, own = self._averaging, self._place.own
        if averaging is None or averaging.chain.round != self.round:
            return ()
        return tuple(each for each in averaging.known() if each.sender != own or each.id in self._promised)

    def heard(self, statement: Statement) -> None:
        """Somebody said this."""
        if self._averaging is not None:
            self._take(self._averaging.receive(statement, trio.current_time()))

    def behind(self, peer: PeerId, number: int) -> None:
        """A peer says that it has records up to this round."""
        if self._session is not None and self._averaging is not None and number > self._averaging.chain.round:
            self._session.start_soon(self._follow, peer)

    def peers_changed(self) -> None:
        """A connection has begun or ended."""
        if self._averaging is not None:
            self._take(self._averaging.connected(self._place.transport.peers(), trio.current_time()))

    # ---- the life of a run ----

    async def run(self) -> None:
        """Take part until cancelled, or until all members have left. Raises CannotStore, and what the owner raises."""
        await self.history.load()
        await self._place.door.open(self)
        try:
            while self.history.chain.electors.voters:
                await self._catch_up()
                await self._take_part()
        finally:
            self._averaging = None
            self._place.door.run = None
            self.history.payloads.close()

    async def _catch_up(self) -> None:
        """Records as far as the members here have them, then the weights that belong to them, however long it takes."""
        history = self.history
        while True:
            for peer in history.asked_next():
                await history.take_records(peer)
            if not history.is_whole:
                await history.catch_up()
            if history.is_whole:
                history.trouble = ""
                return
            await trio.sleep(RETRY_S)

    async def _take_part(self) -> None:
        """One session: from weights that stand where the records end, until they fall behind."""
        place, now = self._place, trio.current_time()
        history = self.history
        kept: Kept | None = await place.disk(history.store.kept)
        averaging = Averaging(history.chain, place.own, self._sign, self._policy, place.timing)
        has_forgotten = _has_forgotten(history, kept)
        if has_forgotten:
            _log.warning(
                "what this node said of round %d is lost: it is silent until that is over", history.chain.round
            )
        self._promised = frozenset(each.id for each in kept.said) if kept is not None else frozenset()
        self._averaging, self._woken = averaging, trio.Event()
        self._fetching = Fetching(place, history, averaging, self._take)
        self._effects.clear()
        self._waiting.clear()
        try:
            async with trio.open_nursery() as nursery:
                self._session = nursery
                self._take(averaging.begin(now, kept, has_forgotten=has_forgotten))
                self._take(averaging.connected(place.transport.peers(), now))
                self._tell_opened()
                nursery.start_soon(self._ask_around)
                await self._carry_out(averaging)
                nursery.cancel_scope.cancel()
        finally:
            self._session = self._averaging = None

    async def _carry_out(self, averaging: Averaging) -> None:
        """Effects in order; time when it is due. Ends when the run is over here."""
        while averaging.phase is not Phase.OVER:
            with trio.move_on_at(averaging.deadline()):
                if not self._effects:
                    await self._woken.wait()
            self._woken = trio.Event()
            now = trio.current_time()
            if now >= averaging.deadline():
                self._take(averaging.tick(now))
            batch = list(self._effects)
            self._effects.clear()
            keeps = [each.kept for each in batch if isinstance(each, Keep)]
            if keeps:  # the last holds all that the others do
                await self.history.surely(self.history.store.keep, keeps[-1])
                self._promised = frozenset(each.id for each in keeps[-1].said)
            for effect in batch:
                await self._perform(effect)

    async def _perform(self, effect: Effect) -> None:
        """Opens tasks in the session."""
        assert self._session is not None
        assert self._fetching is not None
        match effect:
            case Tell(statement):
                await self._place.door.tell(statement)
            case Ask(peer, _):
                self._session.start_soon(self._follow, peer)
            case Behind(peer, number):
                self._session.start_soon(self._say_behind, peer, number)
            case Fetch(header, holders):
                self._session.start_soon(self._fetching.fetch, header, holders)
            case Apply(committed):
                self._session.start_soon(self._apply, committed)
            case Accuse(peer, _, _):
                self.history.counts["accused"] += 1
                self._place.blame(peer, Fault.FATAL, "signed two statements of which it may sign one only")
            case Keep():
                pass  # on the disk

    async def _apply(self, committed: Committed) -> None:
        """The record on the disk, then the weights, then the next round. What cannot be had ends the session."""
        averaging, history, manifest = self._averaging, self.history, committed.manifest
        assert averaging is not None
        assert self._fetching is not None
        self._fetching.over()
        await history.append(committed)
        own, self._root = self._root, None
        if manifest.root is not None and own not in (None, (manifest.round, manifest.root)):
            try:
                await history.mend(manifest)
            except (Unavailable, Unsound) as exc:
                return self._end_session(f"our weights are not those that a quorum names: {exc}")
        await history.change(manifest)
        if not history.is_whole:
            return self._end_session("the payloads of a committed round cannot be had")
        self._take(averaging.applied(trio.current_time()))
        self._tell_opened()
        following = self._waiting.pop(averaging.chain.round, None)
        self._waiting = {number: each for number, each in self._waiting.items() if number > averaging.chain.round}
        if following is not None:
            self._receive_record(averaging, following, self._place.own)

    def _end_session(self, why: str) -> None:
        self.history.trouble = why
        if self._session is not None:
            self._session.cancel_scope.cancel()

    # ---- what peers know ----

    async def _ask_around(self) -> None:
        """At the start of a session, a few members: this one may have missed what was said."""
        for peer in self.history.asked_next():
            await self._follow(peer)

    async def _follow(self, peer: PeerId) -> None:
        """Ask a peer, once at a time, and take what it gives as far as it can be proven."""
        averaging = self._averaging
        assert averaging is not None
        if peer in self._followed:
            return
        self._followed.add(peer)
        try:
            given = await self._place.door.follow(peer, self.id, averaging.chain.round)
            records = await self._proven(given.records, averaging)
            statements = await self._opened_of(given.statements, averaging)
        except (RemoteProtocolError, BadSignature) as exc:
            return self._place.blame(peer, Fault.MALFORMED, f"as a member of a run it gave {exc}")
        except P2PError:
            self.history.counts["ask_failed"] += 1
            return
        finally:
            self._followed.discard(peer)
        if records and records[-1].manifest.round >= averaging.chain.round + REPLAYED_MAX:
            return self._end_session(f"{peer} is {len(records)} rounds ahead, or more")
        for record in records:
            if record.manifest.round > averaging.chain.round:
                self._waiting.setdefault(record.manifest.round, record)
            else:
                self._receive_record(averaging, record, peer)
        for statement in statements:
            self._take(averaging.receive(statement, trio.current_time()))

    async def _proven(self, raws: list[bytes], averaging: Averaging) -> list[Committed]:
        """Those that follow on the history here, as many as tell whether it is far behind.

        Raises RemoteProtocolError, BadSignature.
        """
        proven, chain = list[Committed](), averaging.chain
        for raw in raws[: REPLAYED_MAX + 1]:
            await trio.lowlevel.checkpoint()
            record = self.history.record(raw)
            if record.manifest.round < chain.round:  # it was applied while the answer came
                continue
            checked_record(record, chain)
            chain = chain.after(record.manifest)
            proven.append(record)
        return proven

    async def _opened_of(self, raws: list[bytes], averaging: Averaging) -> list[Statement]:
        """Statements of members that are not known yet. Raises RemoteProtocolError, BadSignature."""
        known, found = {each.id for each in averaging.known()}, list[Statement]()
        for raw in raws:
            if digest(raw) not in known:
                await trio.lowlevel.checkpoint()  # a signature takes its time, and there may be thousands
                statement = self._place.door.handed(raw)
                found += [statement] if self.admits(statement.sender) else []
        return found

    def _receive_record(self, averaging: Averaging, record: Committed, giver: PeerId) -> None:
        try:
            self._take(averaging.receive_record(record, trio.current_time()))
        except RemoteProtocolError as exc:
            self._place.blame(giver, Fault.MALFORMED, str(exc))

    async def _say_behind(self, peer: PeerId, number: int) -> None:
        if self.round > number and peer in self._place.transport.peers():
            try:
                await self._place.door.say_behind(peer, self.id, self.round)
            except P2PError:
                self.history.counts["ask_failed"] += 1

    # ---- parts ----

    def _take(self, effects: list[Effect]) -> None:
        self._effects.extend(effects)
        self._woken.set()

    def _tell_opened(self) -> None:
        self._opened.set()
        self._opened = trio.Event()

    def _sign(self, body: Body) -> Statement:
        place, now_ms = self._place, self._place.door.now_ms()
        return sign_statement(place.identity, body, network=place.network, sequence=now_ms, time_ms=now_ms)


def _has_forgotten(history: RoundHistory, kept: Kept | None) -> bool:
    """Whether this member may have said, of the round to come, what its disk does not hold any more."""
    if kept is not None:
        return kept.round > history.chain.round
    return history.store.has_forgotten and history.chain.round == history.loaded
