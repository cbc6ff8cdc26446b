"""Finding out whether others can reach this node, and staying reachable through relays where they cannot.

Rules: a shell; reach.py judges, relay_places.py says which relay to ask. A dial-back goes to the IP at which we see the
asker and to no other, is a handshake that proves who answers, and leaves no connection behind. A peer behind a relay is
neither asked nor answered. Nothing here disconnects anybody.

Source: NETWORK.md "Our rules" 7; SECURITY.md S1.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

import trio

from crypto.canonical import Value
from crypto.identity import PeerId
from p2p.address import Scope, is_relayed, parse_address, scope_of, seen_group, seen_scope
from p2p.calls import Calls, Handler, Incoming
from p2p.errors import BadAddress, P2PError, RemoteError, RemoteProtocolError
from p2p.interfaces import multiaddr_text
from p2p.reach import Ask, DialBacks, Judgement, Reach, Told, Voter, ports_of, read_ask, read_told, to_value
from p2p.relay import RelayDesk
from p2p.relay_places import Places
from p2p.transport import PeerChange, Transport

TICK_S = 5.0
ASK_S = 25.0  # for an answer: up to PORTS_MAX dials at the other side
PROBE_S = 5.0  # one dial-back
PROBES_MAX = 4  # dial-backs at once
NOT_REACHED = "did not answer there"


class Outside(Protocol):
    """What this part asks of a network beside Transport; see p2p/guard_relay.py."""

    desk: RelayDesk
    observed: tuple[str, ...]  # IP addresses at which public peers see us
    punched: int  # relayed connections that became direct ones

    def dialled_at(self, peer: PeerId) -> str | None:
        """Where we dialled a peer that is connected directly, without its id; None when it came to us."""

    async def probe(self, address: str) -> None:
        """Connect, let the peer prove its key, disconnect. Raises Unreachable."""

    async def reserve(self, relay: PeerId, relay_address: str) -> float:
        """A place at a relay, for so many seconds. Raises Unreachable, Refused."""

    def leave(self, relay: PeerId) -> None:
        """Tell nobody of the place there any more."""

    def announce(self, addresses: tuple[str, ...]) -> None:
        """Tell others of these addresses too, given without our id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachStatus:
    """A snapshot for people and metrics."""

    verdict: str
    reason: str
    advice: str
    relays: dict[str, float]  # peer -> seconds that our place there still lasts
    public_addresses: tuple[str, ...]  # found by dial-backs
    relayed_peers: int  # peers that are connected through a relay
    punched: int  # relayed connections that became direct ones, since start
    carried: dict[str, object]  # for others, as a relay
    counts: dict[str, int] = field(default_factory=dict)


class Reaching:
    """This node's reachability. Wire it: `handlers()` to the Calls on RPC_PROTOCOL, then `run(calls)`."""

    def __init__(
        self,
        transport: Transport,
        outside: Outside,
        peers: Callable[[], frozenset[PeerId]],
        tell: Callable[[Calls], Awaitable[None]],
    ) -> None:
        """`peers`: the connected ones of our network; `tell`: tells them our addresses, which have changed."""
        self._transport = transport
        self._outside = outside
        self._peers = peers
        self._tell = tell
        self._reach = Reach()
        self._places = Places()
        self._dial_backs = DialBacks()
        self._probes = trio.CapacityLimiter(PROBES_MAX)
        self._relaying_allowed = outside.desk.offered
        self._asking: set[PeerId] = set()
        self._wake = trio.Event()
        self._counts: Counter[str] = Counter()

    def handlers(self) -> Mapping[str, Handler]:
        """What peers may call on RPC_PROTOCOL."""
        return {"reach": self._answer}

    def judgement(self) -> Judgement:
        """The verdict now."""
        now = trio.current_time()
        return self._reach.judge(now, self._places.held(now).keys(), self._places.why_none(self._candidates()))

    def status(self) -> ReachStatus:
        """A snapshot."""
        now, judgement = trio.current_time(), self.judgement()
        relayed = [peer for peer in self._transport.peers() if is_relayed(self._transport.remote_address(peer))]
        return ReachStatus(
            verdict=judgement.verdict.value,
            reason=judgement.reason,
            advice=judgement.advice,
            relays={str(relay): round(left_s) for relay, left_s in self._places.held(now).items()},
            public_addresses=tuple(multiaddr_text(*each) for each in self._reach.confirmed(now)),
            relayed_peers=len(relayed),
            punched=self._outside.punched,
            carried=asdict(self._outside.desk.statistics(now)),
            counts=dict(self._counts),
        )

    async def run(self, calls: Calls, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ask, judge, keep places at relays, until cancelled. Opens its own nursery."""
        self._transport.watch(self._watch)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._wake = trio.Event()
                self._tick(calls, nursery)
                with trio.move_on_after(TICK_S):
                    await self._wake.wait()
                await trio.lowlevel.checkpoint()

    def _watch(self, change: PeerChange) -> None:
        if not change.connected:
            self._wake.set()

    def _tick(self, calls: Calls, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        for peer in self._reach.due([voter for voter in map(self._voter, self._peers()) if voter is not None], now):
            nursery.start_soon(self._ask, peer, calls)
        candidates, judgement = self._candidates(), self.judgement()
        self._outside.desk.offered = self._relaying_allowed and not judgement.hidden
        self._outside.announce(tuple(multiaddr_text(*each) for each in self._reach.confirmed(now)))
        self._outside.observed = self._reach.seen_as(now)
        if not judgement.wants_relay:
            for relay in self._places.leave():
                self._outside.leave(relay)
        for relay in self._places.due(candidates, judgement.wants_relay, now):
            if relay not in self._asking:
                self._asking.add(relay)
                nursery.start_soon(self._reserve, relay, calls)

    # -- what others say of us ----------------------------------------------------------------------------------

    def _voter(self, peer: PeerId) -> Voter | None:
        """A peer that can be asked: one that sees us directly."""
        seen_at = self._transport.remote_address(peer)
        if seen_at is None or is_relayed(seen_at):
            return None
        return Voter(peer=peer, group=seen_group(seen_at) or peer)

    async def _ask(self, peer: PeerId, calls: Calls) -> None:
        """One ask; what goes wrong with it is counted, and the peer is asked again later."""
        voter, ports = self._voter(peer), ports_of(self._listening())
        if voter is None or not ports:
            return
        try:
            with trio.fail_after(ASK_S):
                told = read_told(await calls.call(peer, "reach", to_value(Ask(ports=ports))))
        except (trio.TooSlowError, P2PError) as exc:
            self._counts["asks_refused" if isinstance(exc, RemoteError) else "asks_unanswered"] += 1
            self._reach.unanswered(peer, trio.current_time())
            return
        if set(told.reached) - set(ports) or (scope := _scope_of(told.ip)) is None:
            self._counts["answers_senseless"] += 1
            return
        self._counts["answers"] += 1
        self._reach.heard(voter, scope, told, trio.current_time())
        self._wake.set()

    def _listening(self) -> list[tuple[str, int]]:
        """Hosts and ports that we listen on ourselves."""
        found = []
        for text in self._transport.addresses():
            try:
                address = parse_address(text, checked=self._transport.peer_id)
            except BadAddress:
                continue
            if address.relay is None:
                found.append((address.host, address.port))
        return found

    # -- what we say of others ----------------------------------------------------------------------------------

    async def _answer(self, call: Incoming) -> Value:
        """Dial a peer back at the IP it comes from."""
        await trio.lowlevel.checkpoint()
        try:
            ask = read_ask(call.body)
        except RemoteProtocolError as exc:
            raise RemoteError("bad_reach", str(exc), retryable=False) from exc
        seen_at = self._transport.remote_address(call.peer)
        if seen_at is None or is_relayed(seen_at):
            self._counts["asks_from_relayed"] += 1
            raise RemoteError(
                "relayed", "you are seen through a relay; ask a peer that you dial yourself", retryable=False
            )
        ip = seen_at.split("/")[2]
        if call.peer not in self._peers() or not self._dial_backs.may(
            seen_group(seen_at) or call.peer, trio.current_time()
        ):
            self._counts["asks_not_now"] += 1
            raise RemoteError("not_now", "say hello first, and ask at most every 30 s", retryable=True)
        reached = [port for port in dict.fromkeys(ask.ports) if await self._reaches(ip, port, call.peer)]
        return to_value(Told(ip=ip, reached=reached, why="" if reached else NOT_REACHED))

    async def _reaches(self, ip: str, port: int, peer: PeerId) -> bool:
        self._counts["dial_backs"] += 1
        try:
            async with self._probes:
                with trio.fail_after(PROBE_S):
                    await self._outside.probe(f"{multiaddr_text(ip, port)}/p2p/{peer}")
        except (trio.TooSlowError, P2PError):
            self._counts["dial_backs_failed"] += 1
            return False
        return True

    # -- relays -------------------------------------------------------------------------------------------------

    def _candidates(self) -> list[PeerId]:
        """Connected peers that others can dial where we dialled them: public ones, and near ones if all is near."""
        at = {peer: self._outside.dialled_at(peer) for peer in self._peers()}
        scopes = {peer: seen_scope(where) for peer, where in at.items() if where is not None}
        farthest = max(scopes.values(), default=Scope.PUBLIC)
        return sorted(peer for peer, scope in scopes.items() if scope is farthest is not Scope.LOOPBACK)

    async def _reserve(self, relay: PeerId, calls: Calls) -> None:
        try:
            where = self._outside.dialled_at(relay)
            if where is not None:
                lasts_s = await self._outside.reserve(relay, where)
                new = relay not in self._places.held(trio.current_time())
                self._places.given(relay, lasts_s, trio.current_time())
                self._counts["places_given"] += 1
                if new:
                    await self._tell(calls)
        except P2PError as exc:
            self._counts["places_refused"] += 1
            self._places.refused(relay, str(exc), trio.current_time())
        finally:
            self._asking.discard(relay)


def _scope_of(ip: str) -> Scope | None:
    """How far an IP reaches; None for what is no IP address of a machine."""
    try:
        return scope_of(ipaddress.ip_address(ip))
    except (ValueError, BadAddress):
        return None
