"""Where rounds come in: the topic on which they are told, and what peers may ask of a run (ROUND_PROTOCOL).

Rules: a shell. Quotas come before any signature is looked at. What is gossiped comes from whom it is signed by, and not
long ago, lest somebody replay a member's old words to use up its quota; what is handed on over a stream need not, and
no clock is asked: its base dates it. Statements of runs that are not ours are forwarded, within the quotas, and not
kept. An answer has a bound in items and in time, and little of it is in memory while a peer takes it. The topic is
subscribed to when the first run begins here, so that a node that does not train hears none of it.
Source: NETWORK.md "Our rules"; SECURITY.md P9, P12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import trio
from msgspec import Meta, Struct

from crypto.canonical import Limits, Value, convert
from crypto.digest import Digest, digest
from crypto.envelope import SKEW_MS, time_ms_of
from crypto.errors import BadEncoding, BadSignature
from crypto.identity import PeerId
from gossip.errors import CannotStore, RemoteProtocolError
from gossip.round_state import HANDED_ON_MAX
from gossip.rounds import (
    ANY_TIME_MS,
    RECORD_BYTES_MAX,
    Id,
    Round,
    Statement,
    open_statement,
    round_topic,
    statement_of,
)
from gossip.standing import Fault
from p2p.allowance import Buckets
from p2p.calls import Calls, Handler, Incoming
from p2p.errors import P2PError, RemoteError, Unreachable
from p2p.transport import PeerChange, Transport

ROUND_PROTOCOL = "/openagi/round/1"
PLAN_BYTES_MAX = 32_768
RUNS_MAX = 16  # that a peer is in
RECORDS_A_CALL = 64
RECORDS_AT_ONCE = 8  # in memory, for each call that is answered
FOLLOWS_OF_ONE_MAX = 2  # calls of one peer that are answered at a time
ANSWER_S = 60.0  # for a whole answer
SAID_MS_MAX = 900_000  # what is gossiped was made no longer ago
ROUND_LIMITS = Limits(bytes_max=RECORD_BYTES_MAX + 1024, bin_max=RECORD_BYTES_MAX, array_max=64, items_max=256)
SAID_PER_S, SAID_BURST = 20.0, 400.0  # statements of one peer: a round has six, and some of them again
ASKED_PER_S, ASKED_BURST = 2.0, 20.0
SEEN_MAX = 8192


class AskedRun(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of which run, and from which round on."""

    run: Id
    round: Round


class Handed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One item of an answer: a record, or a statement of the round to come."""

    record: Annotated[bytes, Meta(max_length=RECORD_BYTES_MAX)] | None = None
    statement: Annotated[bytes, Meta(max_length=4096)] | None = None


class Followed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The end of an answer: the round to come at who gave it."""

    round: Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A whole answer: envelopes and records that were not looked at, and the round to come at the giver."""

    records: list[bytes]
    statements: list[bytes]
    round: int


class RunHere(Protocol):
    """A run that this node is a member of."""

    @property
    def id(self) -> Digest:
        """The run."""

    @property
    def plan(self) -> bytes:
        """What a run is, for who joins; the digest of it names the run."""

    def admits(self, peer: PeerId) -> bool:
        """Whether this peer may be a member at all."""

    def is_voter(self, peer: PeerId) -> bool:
        """Whether its vote counts now."""

    def heard(self, statement: Statement) -> None:
        """Somebody said this."""

    def behind(self, peer: PeerId, number: int) -> None:
        """A peer says that it has records up to this round."""

    async def records(self, first: int, count_max: int) -> list[bytes]:
        """Raises CannotStore."""

    def known(self) -> tuple[Statement, ...]:
        """What is known of the round to come."""

    @property
    def round(self) -> int:
        """The round to come."""

    def peers_changed(self) -> None:
        """A connection has begun or ended."""


class RoundDoor:
    """One node's. Make it, run its `calls`; `run` is the run that this node is in."""

    def __init__(
        self,
        transport: Transport,
        network: str,
        blame: Callable[[PeerId, Fault, str], None],
        wall_clock_ms: Callable[[], int],
    ) -> None:
        self._transport, self._network, self.blame, self.now_ms = transport, network, blame, wall_clock_ms
        self.run: RunHere | None = None
        self.drops: Counter[str] = Counter()
        self._said = Buckets(rate_per_s=SAID_PER_S, burst=SAID_BURST)
        self._asked = Buckets(rate_per_s=ASKED_PER_S, burst=ASKED_BURST)
        self._seen: dict[Digest, None] = {}
        self._following: Counter[PeerId] = Counter()
        self._is_subscribed = False
        self.calls = Calls(transport, ROUND_PROTOCOL, self._handlers(), self._breach, ROUND_LIMITS)
        transport.watch(self._peer_changed)

    def _peer_changed(self, _change: PeerChange) -> None:
        if self.run is not None:
            self.run.peers_changed()

    async def open(self, run: RunHere) -> None:
        """Listen for this run."""
        self.run = run
        if not self._is_subscribed:
            self._is_subscribed = True
            await self._transport.subscribe(round_topic(self._network), self._heard)

    def is_member(self, peer: PeerId) -> bool:
        """Whether a peer votes in our run: it is not let go of."""
        return self.run is not None and self.run.is_voter(peer)

    async def tell(self, statement: Statement) -> None:
        """Gossip it, best effort: it is said again."""
        try:
            await self._transport.publish(round_topic(self._network), statement.raw)
        except P2PError:
            self.drops["publish_failed"] += 1

    # ---- what we ask ----

    async def plans(self, peer: PeerId) -> list[bytes]:
        """The runs of a peer, as plans. Raises P2PError, RemoteProtocolError."""
        answer = await self._asked_of(peer, "runs", None)
        plans = [each for each in answer if isinstance(each, bytes)] if isinstance(answer, list) else []
        if answer != plans:
            raise RemoteProtocolError(f"{peer} answered `runs` with no list of plans")
        if len(plans) > RUNS_MAX or max(map(len, plans), default=0) > PLAN_BYTES_MAX:
            raise RemoteProtocolError(
                f"{peer} answered `runs` with more than {RUNS_MAX} plans of {PLAN_BYTES_MAX} bytes"
            )
        return plans

    async def follow(self, peer: PeerId, run: Digest, number: int) -> Given:
        """A peer's records from a round on, then what it knows of its own round, then how far it is.

        Raises P2PError (also after ANSWER_S), RemoteProtocolError (also for more than we asked for).
        """
        records, statements = list[bytes](), list[bytes]()
        with self._in_time(peer):
            async with self.calls.open(peer, "follow", {"run": run, "round": number}) as outgoing:
                async for item in outgoing:
                    handed = _decoded(item, Handed)
                    if (handed.record is None) == (handed.statement is None):
                        raise RemoteProtocolError(f"{peer} hands on an item that is not one record or one statement")
                    records += [handed.record] if handed.record is not None else []
                    statements += [handed.statement] if handed.statement is not None else []
                    if len(records) > RECORDS_A_CALL or len(statements) > HANDED_ON_MAX:
                        raise RemoteProtocolError(
                            f"{peer} hands on over {RECORDS_A_CALL} records, or {HANDED_ON_MAX} words"
                        )
                end = _decoded(outgoing.result, Followed)
        return Given(records=records, statements=statements, round=end.round)

    async def say_behind(self, peer: PeerId, run: Digest, number: int) -> None:
        """Tell a peer that there are records for it; it asks for them itself. Raises P2PError."""
        await self._asked_of(peer, "behind", {"run": run, "round": number})

    def handed(self, raw: bytes) -> Statement:
        """A statement that a peer handed on. Raises RemoteProtocolError, BadSignature."""
        return statement_of(raw, network=self._network, now_ms=ANY_TIME_MS)

    async def _asked_of(self, peer: PeerId, method: str, body: Value) -> Value:
        """Raises P2PError."""
        with self._in_time(peer):
            return await self.calls.call(peer, method, body)

    @contextmanager
    def _in_time(self, peer: PeerId) -> Iterator[None]:
        """An answer that does not end is none, and blamed. Raises Unreachable."""
        try:
            with trio.fail_after(ANSWER_S):
                yield
        except trio.TooSlowError as exc:
            self.blame(peer, Fault.TIMEOUT, f"did not answer a question about a run within {ANSWER_S:g} s")
            raise Unreachable(f"{peer} did not answer within {ANSWER_S:g} s") from exc

    # ---- what comes ----

    def _heard(self, publisher: PeerId, raw: bytes) -> bool:
        """Gossip; True when it is worth forwarding."""
        name = digest(raw)
        if name in self._seen:
            return self._drop("doubled")
        try:
            age_ms = self.now_ms() - time_ms_of(raw)
        except BadEncoding as exc:
            self.blame(publisher, Fault.MALFORMED, f"an envelope of a round cannot be opened: {exc}")
            return self._drop("malformed")
        if not -SKEW_MS <= age_ms <= SAID_MS_MAX:  # replayed, or a clock is wrong: nobody's fault that can be told
            return self._drop("of_another_time")
        if not self._said.take(publisher, trio.current_time()):
            self.blame(publisher, Fault.OVER_QUOTA, "more statements of rounds than its quota")
            return self._drop("over_quota")
        try:
            statement = open_statement(raw, network=self._network, now_ms=self.now_ms())
        except (RemoteProtocolError, BadSignature) as exc:
            self.blame(publisher, Fault.MALFORMED, str(exc))
            return self._drop("malformed")
        if statement.sender != publisher:
            self.blame(publisher, Fault.MALFORMED, f"gossiped a statement that {statement.sender} signed")
            return self._drop("wrong_sender")
        if len(self._seen) >= SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        self._seen[name] = None
        run = self.run
        if run is not None and statement.body.run == run.id:
            if not run.admits(publisher):
                return self._drop("not_a_member")
            run.heard(statement)
        return True

    def _handlers(self) -> Mapping[str, Handler]:
        return {"runs": self._runs, "follow": self._follow, "behind": self._behind}

    async def _runs(self, incoming: Incoming) -> Value:
        await trio.lowlevel.checkpoint()
        self._check_quota(incoming.peer)
        run = self.run
        return [] if run is None or not run.admits(incoming.peer) else [run.plan]

    async def _follow(self, incoming: Incoming) -> Value:
        (asked, run), peer = self._run_of(incoming), incoming.peer
        if self._following[peer] >= FOLLOWS_OF_ONE_MAX:
            raise RemoteError("busy", f"{FOLLOWS_OF_ONE_MAX} such calls of yours are being answered", retryable=True)
        self._following[peer] += 1
        try:
            with trio.fail_after(ANSWER_S):
                await self._hand_on(incoming, run, asked.round)
        except CannotStore as exc:
            raise RemoteError("unavailable", "the records here cannot be read now", retryable=True) from exc
        except trio.TooSlowError as exc:
            raise RemoteError("too_slow", "what you asked for was not taken in time", retryable=True) from exc
        finally:
            self._following[peer] -= 1
            if not self._following[peer]:
                del self._following[peer]
        return {"round": run.round}

    async def _hand_on(self, incoming: Incoming, run: RunHere, number: int) -> None:
        """Raises CannotStore."""
        for first in range(number, number + RECORDS_A_CALL, RECORDS_AT_ONCE):
            for record in await run.records(first, RECORDS_AT_ONCE):
                await incoming.send({"record": record, "statement": None})
        if run.round <= number + RECORDS_A_CALL:
            for statement in run.known():
                await incoming.send({"record": None, "statement": statement.raw})

    async def _behind(self, incoming: Incoming) -> Value:
        await trio.lowlevel.checkpoint()
        asked, run = self._run_of(incoming)
        run.behind(incoming.peer, asked.round)
        return None

    def _run_of(self, incoming: Incoming) -> tuple[AskedRun, RunHere]:
        """Raises RemoteError."""
        self._check_quota(incoming.peer)
        try:
            asked = _decoded(incoming.body, AskedRun)
        except RemoteProtocolError as exc:
            raise RemoteError("bad_request", str(exc), retryable=False) from exc
        run = self.run
        if run is None or run.id != asked.run or not run.admits(incoming.peer):
            raise RemoteError("unknown_run", "this node is in no such run", retryable=False)
        return asked, run

    def _check_quota(self, peer: PeerId) -> None:
        if not self._asked.take(peer, trio.current_time()):
            self.drops["asked_too_often"] += 1
            raise RemoteError("too_often", "more questions about runs than your quota", retryable=True)

    def _breach(self, peer: PeerId, what: str) -> None:
        self.blame(peer, Fault.MALFORMED, what)

    def _drop(self, reason: str) -> bool:
        self.drops[reason] += 1
        return False


def _decoded(value: Any, kind: type[Any]) -> Any:
    """Raises RemoteProtocolError."""
    try:
        return convert(value, kind)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a message about a run does not fit: {exc}") from exc
