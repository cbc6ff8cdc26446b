"""One run as this node lives it: gossip/averaging.py's effects carried out, in order.

Rules: a shell. One task carries effects out; what is to be kept is on the disk before the effects after it. Everything
slow (a fetch, a look at a payload, the change of weights) has a task of its own, which tells the core when it is done.
A session lasts as long as the weights keep up with the records; before it, and again after it, gossip/round_history.py
brings both up to date. What the owner of the weights cannot do for good it raises, and the run ends here.
Source: TRAINING.md 3.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import trio

from crypto.digest import Digest
from crypto.errors import BadSignature
from crypto.identity import PeerId
from gossip.averaging import Averaging
from gossip.errors import CannotStore, RemoteProtocolError, Unavailable
from gossip.gathering import Policy
from gossip.round_effects import Accuse, Apply, Ask, Behind, Effect, Fetch, Keep, Tell
from gossip.round_history import RETRY_S, RoundHistory, RunPlace, Unsound
from gossip.round_state import OPEN, AveragingStatistics, Chain, Phase
from gossip.rounds import Body, Committed, Contribution, Header, Statement, sign_statement
from gossip.standing import Fault
from p2p.errors import P2PError
from p2p.transport import PeerChange, Transport

ASKED_AT_ONCE = 4  # peers, for what they know of a run
REPLAYED_MAX = 2  # rounds behind that are made good without a new session

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a member has done in a round; its payload lies at Payloads.own_path."""

    steps: int
    tokens: int


class RoundService:
    """One run. `run` it; the owner trains when `opened` says so, and hands in its work by `contribute`."""

    def __init__(self, place: RunPlace, history: RoundHistory, policy: Policy) -> None:
        self._place, self.history, self._policy = place, history, policy
        self._averaging: Averaging | None = None
        self._effects: deque[Effect] = deque()
        self._waiting: dict[int, Committed] = {}  # records that come after the one that is applied now
        self._root: tuple[int, Digest] | None = None  # of the weights before a round, as far as they were offered
        self._woken = trio.Event()
        self._opened = trio.Event()
        self._session: trio.Nursery | None = None

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
            blob = await payloads.add_own(chain.round)
            size = payloads.own_path(chain.round).stat().st_size
            contribution = Contribution(blob=blob, payload_bytes=size, steps=work.steps, tokens=work.tokens)
        root = await payloads.offer_state(owner.state_path)
        averaging = self._averaging
        if averaging is None or not self.is_open(chain) or averaging.has_contributed or owner.round != chain.round:
            return False
        self._root = (chain.round, root)
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
        """What is known of the round to come."""
        return () if self._averaging is None else self._averaging.known()

    def heard(self, statement: Statement) -> None:
        """Somebody said this."""
        if self._averaging is not None:
            self._take(self._averaging.receive(statement, trio.current_time()))

    def behind(self, peer: PeerId, number: int) -> None:
        """A peer says that it has records up to this round."""
        if self._session is not None and self._averaging is not None and number > self._averaging.chain.round:
            self._session.start_soon(self._follow, peer)

    # ---- the life of a run ----

    async def run(self) -> None:
        """Take part until cancelled, or until all members have left. Raises CannotStore, and what the owner raises."""
        self._place.transport.watch(self._peer_changed)
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
            for peer in history.members_here()[:ASKED_AT_ONCE]:
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
        kept = await place.disk(self.history.store.kept, place.door.now_ms())
        averaging = Averaging(self.history.chain, place.own, self._sign, self._policy, place.timing)
        self._averaging, self._woken = averaging, trio.Event()
        self._effects.clear()
        self._waiting.clear()
        try:
            async with trio.open_nursery() as nursery:
                self._session = nursery
                self._take(averaging.begin(now, kept))
                self._take(averaging.connected(place.transport.peers(), now))
                if averaging.has_contributed and self.history.payloads.own_path(averaging.chain.round).exists():
                    await self.history.payloads.add_own(averaging.chain.round)
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
            for effect in batch:
                await self._perform(effect)

    async def _perform(self, effect: Effect) -> None:
        """Opens tasks in the session."""
        assert self._session is not None
        match effect:
            case Tell(statement):
                await self._place.door.tell(statement)
            case Ask(peer, _):
                self._session.start_soon(self._follow, peer)
            case Behind(peer, number):
                self._session.start_soon(self._say_behind, peer, number)
            case Fetch(header, holders):
                self._session.start_soon(self._fetch, header, holders)
            case Apply(committed):
                self._session.start_soon(self._apply, committed)
            case Accuse(peer, _, _):
                self.history.counts["accused"] += 1
                self._place.blame(peer, Fault.FATAL, "signed two statements of which it may sign one only")
            case Keep():
                pass  # on the disk

    async def _fetch(self, header: Statement, holders: tuple[PeerId, ...]) -> None:
        averaging, history, body = self._averaging, self.history, header.body
        assert averaging is not None
        assert isinstance(body, Header)
        assert body.contribution is not None
        blob = Digest(body.contribution.blob)
        try:
            history.owner.check(header)
            path = await history.payloads.get(body.round, blob, holders, history.owner.payload_bytes_max)
            score = await history.owner.examine(header, path)
        except Unsound as exc:
            history.counts["refused"] += 1
            self._place.blame(header.sender, Fault.MALFORMED, f"its payload of round {body.round} is refused: {exc}")
            self._take(averaging.refused(header.id, str(exc), trio.current_time()))
        except (Unavailable, CannotStore) as exc:  # it is asked for again
            history.counts["fetch_failed"] += 1
            _log.info("round %d: %s", body.round, exc)
        else:
            self._take(averaging.held(header.id, score, trio.current_time()))

    async def _apply(self, committed: Committed) -> None:
        """The record on the disk, then the weights, then the next round. What cannot be had ends the session."""
        averaging, history, manifest = self._averaging, self.history, committed.manifest
        assert averaging is not None
        await history.append(committed)
        own, self._root = self._root, None
        if manifest.root is not None and own not in (None, (manifest.round, manifest.root)):
            try:
                await history.mend(manifest)
            except (Unavailable, CannotStore, Unsound) as exc:
                return self._end_session(f"our weights are not those that a quorum names: {exc}")
        await history.change(manifest)
        if not history.is_whole:
            return self._end_session("the payloads of a committed round cannot be had")
        self._take(averaging.applied(trio.current_time()))
        self._tell_opened()
        following = self._waiting.pop(averaging.chain.round, None)
        if following is not None:
            self._receive_record(averaging, following, self._place.own)

    def _end_session(self, why: str) -> None:
        self.history.trouble = why
        if self._session is not None:
            self._session.cancel_scope.cancel()

    # ---- what peers know ----

    async def _ask_around(self) -> None:
        """At the start of a session, a few members: this one may have missed what was said."""
        for peer in self.history.members_here()[:ASKED_AT_ONCE]:
            await self._follow(peer)

    async def _follow(self, peer: PeerId) -> None:
        averaging, door = self._averaging, self._place.door
        assert averaging is not None
        try:
            given = await door.follow(peer, self.id, averaging.chain.round)
            statements = [door.handed(raw) for raw in given.statements]
            records = [self.history.record(raw) for raw in given.records]
        except (RemoteProtocolError, BadSignature) as exc:
            return self._place.blame(peer, Fault.MALFORMED, f"as a member of a run it gave {exc}")
        except P2PError:
            self.history.counts["ask_failed"] += 1
            return
        if len(records) > REPLAYED_MAX:
            return self._end_session(f"{peer} is {len(records)} rounds ahead, or more")
        for record in records:
            if record.manifest.round > averaging.chain.round or averaging.phase is Phase.APPLYING:
                self._waiting.setdefault(record.manifest.round, record)
            else:
                self._receive_record(averaging, record, peer)
        for statement in statements:
            if self.admits(statement.sender):
                self._take(averaging.receive(statement, trio.current_time()))

    def _receive_record(self, averaging: Averaging, record: Committed, giver: PeerId) -> None:
        try:
            self._take(averaging.receive_record(record, trio.current_time()))
        except RemoteProtocolError as exc:
            self._waiting.clear()
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

    def _peer_changed(self, _change: PeerChange) -> None:
        if self._averaging is not None:
            self._take(self._averaging.connected(self._place.transport.peers(), trio.current_time()))

    def _sign(self, body: Body) -> Statement:
        place, now_ms = self._place, self._place.door.now_ms()
        return sign_statement(place.identity, body, network=place.network, sequence=now_ms, time_ms=now_ms)
