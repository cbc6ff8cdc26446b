"""A run's records and weights, kept together: what is committed is on the disk, and the weights are those after it.

Rules: a shell. A record is taken only when the chain so far proves it. Weights that are behind are brought on by the
payloads of the rounds between, or by a state that a quorum named, whichever is less to fetch; a state is compared with
its name chunk by chunk, so it matters not who gives it. Weights that are not what a quorum names are given up, and no
round changes them. What is asked of members is asked of all in turn. A disk on which the owner cannot keep weights that
have changed already ends the run: the next start reads those from before.
Source: TRAINING.md 3 (5, 6, 8).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from crypto.digest import Digest
from crypto.errors import BadSignature
from crypto.identity import Identity, PeerId
from gossip.agreement import Timing
from gossip.blob_serving import Blocking
from gossip.errors import CannotStore, RemoteProtocolError, Unavailable
from gossip.round_door import RoundDoor
from gossip.round_payloads import Payloads
from gossip.round_state import Chain, checked_record
from gossip.round_store import RoundStore
from gossip.rounds import ANY_TIME_MS, Committed, Header, Manifest, Statement, record_of, recorded_manifest
from gossip.standing import Fault
from gossip.transfer import Manifest as Made
from p2p.errors import P2PError
from p2p.transport import Transport

RETRY_S = 2.0
TRIES = 4  # to have the payloads of a committed round; then a state is fetched instead
PATIENCE_S = 300.0  # for all that is missed, before peers are asked for records again
ASKED_AT_ONCE = 4  # peers, for what they know of a run
READ_AT_ONCE = 256  # records

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Unsound(Exception):
    """A payload or state is not what it must be, for a reason that everybody would find: the argument says it."""


class Owner(Protocol):
    """Who has the weights, and looks at payloads. May wait; one call of a kind at a time."""

    @property
    def round(self) -> int:
        """The weights are those before this round."""

    @property
    def state(self) -> tuple[Path, Made] | None:
        """The weights as a file, which stays as it is until the next `apply` or `adopt`, and what it is made of. None:
        those of this round are not named, and lie nowhere: a restart makes them again."""

    def state_files(self) -> list[tuple[int, Path]]:
        """Such files that are still there, the newest at least, and before which round their weights stand; the oldest
        first."""

    @property
    def state_bytes(self) -> int:
        """Of such a file."""

    @property
    def payload_bytes_max(self) -> int:
        """Of any member's update."""

    def check(self, header: Statement) -> None:
        """Before its payload is fetched. Raises Unsound when it cannot be one of this run."""

    async def examine(self, header: Statement, payload: Path) -> int | None:
        """Its score, as in a report. Raises Unsound."""

    async def apply(self, manifest: Manifest, payloads: Mapping[Digest, Path]) -> None:
        """Change the weights by a committed round, and write their file, if they have one. payloads: of the shares that
        have a weight.

        Raises CannotStore: they were changed and cannot be written, so that nothing here may go on with them.
        """

    async def adopt(self, manifest: Manifest, state: Path, *, passed: Manifest | None) -> None:
        """Take over the weights before a committed round, and write their file. Raises Unsound, and as `apply`.

        passed: the round before which the weights stood until now, if it is committed.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlace:
    """What a run stands on. genesis: its chain before the first round. members: who may take part; empty: anybody."""

    identity: Identity
    transport: Transport
    network: str
    door: RoundDoor
    genesis: Chain
    plan: bytes
    members: frozenset[PeerId] = frozenset()
    timing: Timing = field(default_factory=Timing)
    disk: Blocking = trio.to_thread.run_sync  # runs what waits for a disk; a cancellation waits for it

    @property
    def own(self) -> PeerId:
        """This member."""
        return self.transport.peer_id

    def blame(self, peer: PeerId, fault: Fault, what: str) -> None:
        """A peer did wrong; it is never this node."""
        if peer != self.own:
            self.door.blame(peer, fault, what)

    def admits(self, peer: PeerId) -> bool:
        """Whether it may be a member."""
        return not self.members or peer in self.members


class RoundHistory:
    """One run's. One task uses it at a time."""

    def __init__(self, place: RunPlace, owner: Owner, store: RoundStore, payloads: Payloads) -> None:
        self._place, self.owner, self.store, self.payloads = place, owner, store, payloads
        self.chain = place.genesis
        self.counts: Counter[str] = Counter()
        self.trouble = ""  # why nothing goes on now; '' when it does
        self.loaded = 0  # how many records there were at the start
        self._is_wrong = False  # a quorum named other weights than ours, and we have not got those yet
        self._turn = 0  # which members are asked next
        self._sought: Digest | None = None  # the state that was fetched last, or in part

    async def load(self) -> None:
        """The chain as far as the disk has it. Once more is the same as once. Raises CannotStore."""
        chain, newest = self._place.genesis, deque[Manifest](maxlen=self.payloads.rounds_kept)
        for first in range(0, self.store.count, READ_AT_ONCE):
            for manifest in await self._place.disk(self.manifests, first, READ_AT_ONCE):
                if not chain.names(manifest):
                    raise CannotStore(
                        f"record {chain.round} on the disk is of another history: move the run's folder away"
                    )
                chain = chain.after(manifest)
                newest.append(manifest)
        self.chain, self.loaded = chain, chain.round
        kept = await self._place.disk(self.store.kept)
        await self.payloads.restore(newest, announced(kept.heard) if kept is not None else ())
        await self.payloads.offer_again(await self._place.disk(self._named))

    def _named(self) -> list[tuple[Path, Digest]]:
        """The weights on the disk that a quorum has named, the oldest first. Blocks for it. Raises CannotStore."""
        found = list[tuple[Path, Digest]]()
        for number, path in self.owner.state_files():
            roots = [each.root for each in self.manifests(number, 1)] if number < self.loaded else []
            found += [(path, Digest(root)) for root in roots if root is not None]
        return found

    def manifests(self, first: int, count_max: int) -> list[Manifest]:
        """Committed rounds. Blocks for the disk. Raises CannotStore."""
        try:
            return [recorded_manifest(raw) for raw in self.store.records(first, count_max)]
        except RemoteProtocolError as exc:
            raise CannotStore(f"records from {first} on were written whole and cannot be read: {exc}") from exc

    def members_here(self) -> list[PeerId]:
        """Peers that are connected and may be members, voters first."""
        electors, peers = self.chain.electors, self._place.transport.peers()
        return sorted(filter(self._place.admits, peers), key=lambda each: (not electors.is_voter(each), each))

    def asked_next(self) -> list[PeerId]:
        """A few of them, all in turn: some may be liars, or know nothing."""
        here = self.members_here()
        start = self._turn % max(1, len(here))
        self._turn = start + ASKED_AT_ONCE
        return (here[start:] + here[:start])[:ASKED_AT_ONCE]

    # ---- records ----

    def record(self, raw: bytes) -> Committed:
        """Raises RemoteProtocolError, BadSignature."""
        return record_of(raw, network=self._place.network, now_ms=ANY_TIME_MS)

    async def append(self, committed: Committed) -> None:
        """A record that is proven: on the disk when this returns."""
        await self.surely(self.store.append, committed.encode())
        self.chain = self.chain.after(committed.manifest)

    async def take_records(self, peer: PeerId) -> None:
        """All that this peer has and we have not, each proven."""
        while True:
            try:
                given = await self._place.door.follow(peer, Digest(self.chain.run), self.chain.round)
                for raw in given.records:
                    committed = self.record(raw)
                    checked_record(committed, self.chain)
                    await self.append(committed)
            except (RemoteProtocolError, BadSignature) as exc:
                return self._place.blame(peer, Fault.MALFORMED, f"as a member of a run it gave {exc}")
            except P2PError:
                self.counts["ask_failed"] += 1
                return
            if not given.records or given.round <= self.chain.round:
                return

    async def surely(self, write: Callable[[_T], None], content: _T) -> None:
        """On the disk, however long it refuses: nothing that follows may be said or done before."""
        while True:
            try:
                await self._place.disk(write, content)
                return
            except CannotStore as exc:
                self.trouble = str(exc)
                self.counts["save_failed"] += 1
                await trio.sleep(RETRY_S)

    # ---- weights ----

    @property
    def is_whole(self) -> bool:
        """Whether the weights are those after the last record."""
        return self.owner.round == self.chain.round

    async def change(self, manifest: Manifest) -> None:
        """The weights by one committed round, when its payloads can be had; else they stay."""
        for _ in range(TRIES):
            if await self._replay([manifest]):
                self.trouble = ""
                return
            await trio.sleep(RETRY_S)

    async def mend(self, manifest: Manifest) -> None:
        """A quorum names other weights than ours before this round: take those. Raises Unavailable, Unsound."""
        assert manifest.root is not None
        self.counts["diverged"] += 1
        self._is_wrong = True
        await self._adopt(manifest, Digest(manifest.root))

    async def catch_up(self) -> None:
        """Once, as far as it goes now: look at `is_whole` afterwards, and at `trouble`."""
        why = f"not within {PATIENCE_S:g} s"
        try:
            with trio.move_on_after(PATIENCE_S):
                if (
                    self._is_wrong
                    or not await self._is_replay_cheaper()
                    or not await self._replay(await self._behind())
                ):
                    try:
                        await self._take_state()
                    except Unavailable:
                        if self._is_wrong:
                            raise  # no round may change these
                        # dear as they are, payloads are all that there is since the last weights that were named
                    await self._replay(await self._behind())
                why = (
                    "their payloads are not to be had"
                    if self.owner.round < self.chain.round
                    else "records are lost here"
                )
        except (Unavailable, Unsound) as exc:
            why = str(exc)
        if not self.is_whole:
            self.trouble = f"the weights of round {self.chain.round} cannot be had: {why}"
            _log.info("%s", self.trouble)

    async def _behind(self) -> list[Manifest]:
        """Rounds that the weights lack, the oldest first. Raises CannotStore."""
        missed: list[Manifest] = await self._place.disk(self.manifests, self.owner.round, READ_AT_ONCE)
        return missed

    async def _is_replay_cheaper(self) -> bool:
        """Whether what is to be fetched for the rounds that the weights lack is less than the weights themselves."""
        if self.store.count - self.owner.round > READ_AT_ONCE:
            return False
        shares = [share for manifest in await self._behind() for share in manifest.shares if share.weight]
        absent = sum(share.blob is not None and not self.payloads.has(Digest(share.blob)) for share in shares)
        return absent * self.owner.payload_bytes_max <= self.owner.state_bytes

    async def _replay(self, behind: list[Manifest]) -> bool:
        """Whether all payloads were there. The weights are changed by each round whose are."""
        for manifest in behind:
            try:
                payloads = await self._payloads_of(manifest)
            except (Unavailable, CannotStore, RemoteProtocolError) as exc:
                _log.info("round %d is committed and its payloads are not here: %s", manifest.round, exc)
                return False
            with trio.CancelScope(shield=True):  # half a change is none
                await self.owner.apply(manifest, payloads)
            self.counts["applied"] += 1
            try:
                await self.payloads.over(manifest.round)
            except CannotStore as exc:
                _log.warning("what is not needed any more stays: %s", exc)
        return True

    async def _payloads_of(self, manifest: Manifest) -> dict[Digest, Path]:
        """Raises Unavailable, CannotStore, RemoteProtocolError."""
        found: dict[Digest, Path] = {}
        for share in manifest.shares:
            if share.blob is not None and share.weight:
                blob = Digest(share.blob)
                holders = dict.fromkeys((PeerId(share.peer), *self.members_here()))
                found[blob] = await self.payloads.get(manifest.round, blob, holders, self.owner.payload_bytes_max)
        return found

    async def _take_state(self) -> None:
        """The newest weights that a quorum named. Raises Unavailable, CannotStore, Unsound."""
        least = self.owner.round + (not self._is_wrong)
        for first in range(self.store.count - 1, least - 1, -1):
            (manifest,) = await self._place.disk(self.manifests, first, 1)
            if manifest.root is not None:
                return await self._adopt(manifest, Digest(manifest.root))
        raise Unavailable("no round since has weights that a quorum named")

    async def _adopt(self, manifest: Manifest, root: Digest) -> None:
        """Raises Unavailable, Unsound, and CannotStore as the owner does."""
        try:
            if self._sought is not None and self._sought != root:  # what came of it would lie there for ever
                await self.payloads.forget(self._sought)
            self._sought = root
            path = await self.payloads.get_state(root, self.members_here(), self.owner.state_bytes)
        except CannotStore as exc:
            raise Unavailable(str(exc)) from exc
        passed: list[Manifest] = await self._place.disk(self.manifests, self.owner.round, 1)
        try:
            with trio.CancelScope(shield=True):
                await self.owner.adopt(manifest, path, passed=next(iter(passed), None))
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await self.payloads.forget(root)
                except CannotStore as exc:
                    _log.warning("weights that were fetched stay: %s", exc)
        self._is_wrong = False
        self.counts["states_fetched"] += 1


def announced(statements: Iterable[Statement]) -> list[Digest]:
    """The payloads that these announce."""
    bodies = [each.body for each in statements if isinstance(each.body, Header)]
    return [Digest(each.contribution.blob) for each in bodies if each.contribution is not None]
