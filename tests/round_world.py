"""Members of a run on a loopback network: gossip's whole part of training, over an owner whose weights are a hash.

Rules: no thread, so that a MockClock replays it. A member's weights are SIZE bytes that each round changes by all the
payloads that count, so that equal weights mean equal histories.
"""

from __future__ import annotations

import errno
import os
import random
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from crypto.digest import Digest, digest
from crypto.disk import System
from crypto.identity import Identity, PeerId
from gossip.agreement import Timing
from gossip.blobs import Blobs, BlobsConfig
from gossip.electors import Electors, Terms
from gossip.gathering import Candidate
from gossip.round_door import RoundDoor
from gossip.round_history import RoundHistory, RunPlace, Unsound
from gossip.round_payloads import Payloads
from gossip.round_service import RoundService, Work
from gossip.round_state import Chain
from gossip.round_store import RoundStore
from gossip.rounds import WEIGHT_ONE, Contribution, Header, Manifest, Statement, sign_statement
from gossip.transfer import Manifest as Made
from gossip.transfer import manifest_of
from p2p.errors import Unreachable
from p2p.loopback import LoopbackNetwork, LoopbackTransport
from tests.blob_world import FETCH, inline

SIZE = 5_000
RUN = digest(b"a run of tests")
BASE = digest(b"genesis of it")
NETWORK = "tests"
NOTED_MAX = 1024  # rounds that an owner has notes of: tests/fuzz_victim.py goes through many thousands
START_MS = 1_800_000_000_000
TIMING = Timing(propose_s=1.0, vote_s=0.3, growth_s=0.2, gone_s=0.1)
POISON = b"poison"


class Everybody:
    """A policy: all that is proven counts alike."""

    def choose(self, candidates: tuple[Candidate, ...]) -> tuple[tuple[int, int], ...]:
        return tuple((WEIGHT_ONE if each.is_proven else 0, WEIGHT_ONE) for each in candidates)


class Killed(Exception):
    """The process ends here."""


class Disk(System):
    """A disk that may be full; after so many steps of it (0: at the next) its process is killed, in mid-write too."""

    is_full = False
    dies_after = -1
    dies_before_change = False  # of the weights

    def step(self) -> None:
        if self.dies_after == 0:
            raise Killed
        self.dies_after -= 1

    def create(self, path: Path, mode: int) -> int:
        self.step()
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().create(path, mode)

    def write(self, handle: int, content: memoryview) -> int:
        self.step()
        return super().write(handle, content[: max(1, len(content) // 2)] if self.dies_after == 0 else content)

    def sync(self, handle: int) -> None:
        self.step()
        super().sync(handle)

    def rename(self, old: Path, new: Path) -> None:
        self.step()
        super().rename(old, new)


class HashOwner:
    """Weights on disk, those of every so many rounds: the number of the round in the file's name."""

    state_bytes = SIZE
    payload_bytes_max = 400

    def __init__(self, folder: Path, disk: Disk, named_every: int = 1) -> None:
        self._folder, self._disk, self._named_every = folder, disk, named_every
        self._unnamed = b""  # weights that have no file
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(int(path.name.removeprefix("state-")) for path in folder.glob("state-*"))
        self.round = found[-1] if found else 0
        if not found:
            self._write(0, bytes(SIZE))
        self.applied: deque[Manifest] = deque(maxlen=NOTED_MAX)
        self.adopted: list[int] = []
        self.passed: list[tuple[int, Manifest | None]] = []  # at each: where it stood, and that round
        self.examined: deque[PeerId] = deque(maxlen=NOTED_MAX)

    @property
    def state_path(self) -> Path:
        return self._folder / f"state-{self.round}"

    def state_files(self) -> list[tuple[int, Path]]:
        return [(number, self._folder / f"state-{number}") for number in sorted(self.states)]

    @property
    def state(self) -> tuple[Path, Made] | None:
        return None if self.round % self._named_every else (self.state_path, manifest_of(self.weights))

    @property
    def weights(self) -> bytes:
        return self._unnamed if self.round % self._named_every else self.state_path.read_bytes()

    @property
    def states(self) -> dict[int, bytes]:
        """All weights that there were, by the round that began with them."""
        return {int(path.name.removeprefix("state-")): path.read_bytes() for path in self._folder.glob("state-*")}

    def check(self, header: Statement) -> None:
        body = header.body
        assert isinstance(body, Header)
        assert body.contribution is not None
        if body.contribution.payload_bytes > self.payload_bytes_max:
            raise Unsound(f"{body.contribution.payload_bytes} bytes are announced")

    async def examine(self, header: Statement, payload: Path) -> int | None:
        await trio.sleep(0.05)
        self.examined.append(header.sender)
        if POISON in await inline(payload.read_bytes):
            raise Unsound("there is poison in it")
        return 7

    async def apply(self, manifest: Manifest, payloads: Mapping[Digest, Path]) -> None:
        if self._disk.dies_before_change:
            raise Killed
        await trio.sleep(0.1)
        assert manifest.round == self.round
        self.applied.append(manifest)
        name = digest(self.weights + b"".join(payloads[each].read_bytes() for each in sorted(payloads)))
        self._disk.step()
        self._write(self.round + 1, random.Random(name).randbytes(SIZE))
        self.round += 1
        self._disk.step()

    async def adopt(self, manifest: Manifest, state: Path, *, passed: Manifest | None) -> None:
        await trio.sleep(0.1)
        number = manifest.round
        self.adopted.append(number)
        self.passed.append((self.round, passed))
        self._write(number, await inline(state.read_bytes))
        self.round = number

    def _write(self, number: int, content: bytes) -> None:
        if number % self._named_every:
            self._unnamed = content
        else:
            (self._folder / f"state-{number}").write_bytes(content)


@dataclass
class Member:
    """One node in a run; `stop` is a kill, and `World.start` on the same folder the start after it."""

    transport: LoopbackTransport
    owner: HashOwner
    service: RoundService
    door: RoundDoor
    blobs: Blobs
    blames: list[tuple[PeerId, str]]
    disk: Disk
    work_s: float = 1.0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    rests: bool = False
    leaves: bool = False
    poisons: bool = False

    @property
    def id(self) -> PeerId:
        return self.transport.peer_id

    @property
    def history(self) -> RoundHistory:
        return self.service.history

    @property
    def manifests(self) -> list[Manifest]:
        return self.history.manifests(0, self.service.round)

    async def train(self) -> None:
        """Work that takes work_s a round."""
        rng = random.Random(self.id)
        while True:
            chain = await self.service.opened()
            await trio.sleep(self.work_s)
            if self.rests or self.leaves:
                await self.service.contribute(chain, None, leaves=self.leaves)
                continue
            payload = rng.randbytes(300) + (POISON if self.poisons else b"")
            self.service.history.payloads.own_path(chain.round).write_bytes(payload)
            await self.service.contribute(chain, Work(steps=1, tokens=10, made_of=manifest_of(payload)))

    async def stop(self) -> None:
        self.scope.cancel()
        await self.ended.wait()


class World:
    """Members that know each other."""

    def __init__(self, path: Path, nursery: trio.Nursery, seed: int = 3) -> None:
        self.network = LoopbackNetwork(random.Random(seed))
        self._path, self._nursery = path, nursery
        self.members: list[Member] = []
        self.identities = [Identity.make() for _ in range(8)]
        self.began = trio.current_time()
        self.allowed: frozenset[PeerId] = frozenset()
        self.named_every = 1

    def genesis(self, founders: int) -> Chain:
        terms = Terms(probation=2, absent_max=2)
        electors = Electors.of_founders([each.peer_id for each in self.identities[:founders]], terms)
        return Chain(run=RUN, round=0, base=BASE, electors=electors)

    async def start(self, number: int, founders: int = 4, **changes: Any) -> Member:
        """The node of an identity, alive, with what its folder holds."""
        member: Member = await self._nursery.start(self._live, self.identities[number], self.genesis(founders), changes)
        self.members.append(member)
        await self.connect(member)
        return member

    async def connect(self, member: Member) -> None:
        """With all that live and can be reached, as a node's peering does."""
        for other in self.members:
            if other is not member and not other.scope.cancel_called:
                with suppress(Unreachable):
                    await member.transport.dial(other.transport.addresses()[0])

    def _made(
        self, identity: Identity, transport: LoopbackTransport, genesis: Chain, changes: dict[str, Any]
    ) -> Member:
        folder = self._path / identity.peer_id
        blames: list[tuple[PeerId, str]] = []
        disk = Disk()
        owner = HashOwner(folder / "weights", disk, self.named_every)
        blobs = Blobs(transport, transport, BlobsConfig(folder=folder / "blobs", fetch=FETCH), blocking=inline)
        door = RoundDoor(transport, NETWORK, lambda peer, _fault, what: blames.append((peer, what)), self.now_ms)
        place = RunPlace(
            identity=identity,
            transport=transport,
            network=NETWORK,
            door=door,
            genesis=genesis,
            plan=b"the plan",
            members=self.allowed,
            timing=TIMING,
            disk=inline,
        )
        payloads = Payloads(blobs, folder, changes.pop("rounds_kept", max(3, 2 * self.named_every)), place.admits)
        history = RoundHistory(place, owner, RoundStore(folder, NETWORK, disk), payloads)
        service = RoundService(place, history, Everybody())
        prepare = changes.pop("prepare", lambda _member: None)
        member = Member(transport, owner, service, door, blobs, blames, disk, **changes)
        prepare(member)
        return member

    def now_ms(self) -> int:
        return START_MS + round((trio.current_time() - self.began) * 1000)

    async def _live(
        self, identity: Identity, genesis: Chain, changes: dict[str, Any], *, task_status: trio.TaskStatus[Member]
    ) -> None:
        async with self.network.join(identity) as transport:
            member = self._made(identity, transport, genesis, changes)
            with suppress(Killed), member.scope:
                await self._run(member, task_status)
            member.scope.cancel()
            member.history.store.close()
        member.ended.set()

    async def _run(self, member: Member, task_status: trio.TaskStatus[Member]) -> None:
        """Raises Killed."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(member.door.calls.run)
                task_status.started(member)
                nursery.start_soon(member.train)
                await member.service.run()
                nursery.cancel_scope.cancel()
        except* Killed as exc:
            raise Killed from exc

    def agree(self) -> None:
        """No two members hold different records, or different weights before one round."""
        longest: list[Manifest] = max((each.manifests for each in self.members), key=len)
        states: dict[int, bytes] = {}
        for member in self.members:
            assert member.manifests == longest[: member.service.round]
            for number, weights in member.owner.states.items():
                assert states.setdefault(number, weights) == weights, f"the weights before round {number} differ"

    async def until(self, number: int, *members: Member, within_s: float = 60.0) -> None:
        """All these (or all that live) stand at this round or later, with weights to match."""
        with trio.fail_after(within_s):
            for member in members or tuple(each for each in self.members if not each.scope.cancel_called):
                while member.owner.round < number:  # noqa: ASYNC110  # the owner is a fake without events
                    await trio.sleep(0.05)


def announced(run: World, liar: Member, blob: Digest, size: int) -> Statement:
    """What a member says of its work in the round to come: a payload of this name and size, given or not."""
    chain = liar.history.chain
    contribution = Contribution(blob=blob, payload_bytes=size, steps=1, tokens=10)
    body = Header(run=chain.run, round=chain.round, base=chain.base, contribution=contribution)
    identity = next(one for one in run.identities if one.peer_id == liar.id)
    return sign_statement(identity, body, network=NETWORK, sequence=run.now_ms(), time_ms=run.now_ms())
