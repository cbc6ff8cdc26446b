"""A run's records and weights, kept together: what is committed is on the disk, and the weights are those after it.

Rules: a shell. A record is taken only when the chain so far proves it. Weights that are behind are brought on by the
payloads of the rounds between, or by a state that a quorum named, whichever is less to fetch; a state is compared with
its name chunk by chunk, so it matters not who gives it. Weights that are not what a quorum names are given up.
Source: TRAINING.md 3 (5, 6, 8).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
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
from gossip.rounds import Committed, Manifest, Statement, record_of, recorded_manifest
from gossip.standing import Fault
from p2p.errors import P2PError
from p2p.transport import Transport

RETRY_S = 2.0
TRIES = 4  # to have the payloads of a committed round; then a state is fetched instead
PATIENCE_S = 300.0  # for all that is missed, before peers are asked for records again

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
    def state_path(self) -> Path:
        """The weights as a file, which stays as it is until the next `apply` or `adopt`."""

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
        """Change the weights by a committed round, and write their file. payloads: of the shares that have a weight."""

    async def adopt(self, manifest: Manifest, state: Path) -> None:
        """Take over the weights before a committed round, and write their file. Raises Unsound."""


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

    async def load(self) -> None:
        """The chain as far as the disk has it. Raises CannotStore."""
        for manifest in await self._place.disk(self.manifests, 0, self.store.count):
            self.chain = self.chain.after(manifest)

    def manifests(self, first: int, count_max: int) -> list[Manifest]:
        """Committed rounds. Blocks for the disk. Raises CannotStore."""
        return [recorded_manifest(raw) for raw in self.store.records(first, count_max)]

    def members_here(self) -> list[PeerId]:
        """Peers that are connected and may be members, voters first."""
        electors, peers = self.chain.electors, self._place.transport.peers()
        return sorted(filter(self._place.admits, peers), key=lambda each: not electors.is_voter(each))

    # ---- records ----

    def record(self, raw: bytes) -> Committed:
        """Raises RemoteProtocolError, BadSignature."""
        return record_of(raw, network=self._place.network, now_ms=self._place.door.now_ms())

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
        """A quorum names other weights than ours before this round: take those. Raises Unavailable, CannotStore."""
        assert manifest.root is not None
        self.counts["diverged"] += 1
        await self._adopt(manifest, Digest(manifest.root))

    async def catch_up(self) -> None:
        """Once, as far as it goes now: look at `is_whole` afterwards, and at `trouble`."""
        behind = await self._place.disk(self.manifests, self.owner.round, self.store.count)
        try:
            with trio.move_on_after(PATIENCE_S):
                if not self._is_replay_cheaper(behind) or not await self._replay(behind):
                    await self._take_state()
                    await self._replay(await self._place.disk(self.manifests, self.owner.round, self.store.count))
        except (Unavailable, CannotStore, Unsound) as exc:
            self.trouble = f"the weights of round {self.chain.round} cannot be had: {exc}"
            _log.info("%s", self.trouble)

    def _is_replay_cheaper(self, behind: list[Manifest]) -> bool:
        """Whether the payloads of these rounds are fewer bytes than the weights themselves."""
        payloads = sum(share.weight > 0 for manifest in behind for share in manifest.shares)
        return payloads * self.owner.payload_bytes_max <= self.owner.state_bytes

    async def _replay(self, behind: list[Manifest]) -> bool:
        """Whether all payloads were there. The weights are changed by each round whose are."""
        for manifest in behind:
            try:
                payloads = await self._payloads_of(manifest)
            except (Unavailable, CannotStore) as exc:
                _log.info("round %d is committed and its payloads are not here: %s", manifest.round, exc)
                return False
            with trio.CancelScope(shield=True):  # half a change is none
                await self.owner.apply(manifest, payloads)
                await self.payloads.over(manifest.round)
            self.counts["applied"] += 1
        return True

    async def _payloads_of(self, manifest: Manifest) -> dict[Digest, Path]:
        """Raises Unavailable, CannotStore."""
        found: dict[Digest, Path] = {}
        for share in manifest.shares:
            if share.blob is not None and share.weight:
                blob = Digest(share.blob)
                holders = dict.fromkeys((PeerId(share.peer), *self.members_here()))
                found[blob] = await self.payloads.get(manifest.round, blob, holders, self.owner.payload_bytes_max)
        return found

    async def _take_state(self) -> None:
        """The newest weights that a quorum named. Raises Unavailable, CannotStore, Unsound."""
        for first in range(self.store.count - 1, self.owner.round, -1):
            (manifest,) = await self._place.disk(self.manifests, first, 1)
            if manifest.root is not None:
                return await self._adopt(manifest, Digest(manifest.root))
        raise Unavailable("no round since has weights that a quorum named")

    async def _adopt(self, manifest: Manifest, root: Digest) -> None:
        path = await self.payloads.get_state(root, self.members_here(), self.owner.state_bytes)
        with trio.CancelScope(shield=True):
            await self.owner.adopt(manifest, path)
            await self.payloads.forget(root)
        self.counts["states_fetched"] += 1
