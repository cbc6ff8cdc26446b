"""One member of bench.averaging's group, in a process of its own: a host, blobs, rounds and weights, without a model.

Rules: what a node has (node/training_weights.py, gossip/round_service.py), over a stand-in for the trainer that only
holds a vector. Random changes are made before a round begins. Prints one line of JSON in the end.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trio

from crypto.digest import Digest
from crypto.disk import write_whole
from crypto.identity import Identity, PeerId
from gossip.agreement import Timing
from gossip.blobs import Blobs, BlobsConfig
from gossip.round_door import RoundDoor
from gossip.round_history import RoundHistory, RunPlace
from gossip.round_payloads import Payloads
from gossip.round_service import RoundService, Work
from gossip.round_store import RoundStore
from gossip.rounds import Header, round_topic
from gossip.transfer import manifest_of
from model.codecs import codec_named
from model.layout import Layout, TensorSpec
from model.participant import Course, Participant
from model.rules import Rule
from node.training_plan import PARTS, Plan
from node.training_weights import Weights
from p2p.direct import Direct, DirectConfig
from p2p.host import open_host
from p2p.host_config import HostConfig

NETWORK = "averaging"
CHANGE = 1e-3
REST_S = 0.5  # after the last has come: what made its numbers ready is over


class Vector:
    """Stands for a model.train.Trainer: weights that change at random, and are moved about as a trainer does."""

    def __init__(self, elements: int) -> None:
        self.layout = Layout((TensorSpec("weights", (elements,)),))
        self.start_vector_N = torch.zeros(elements)
        self.named = {"weights": torch.zeros(elements)}

    def rebase(self, vector_N: torch.Tensor, *, is_given: bool = False) -> None:
        """As Trainer.rebase."""
        self.layout.load_into(self.named, vector_N)
        self.start_vector_N = vector_N if is_given else vector_N.clone()

    def held_out(self, _rows: int) -> torch.Tensor:
        """No text: no scores."""
        return torch.zeros(0, 2, dtype=torch.int64)

    def train(self, rng: np.random.Generator) -> None:
        """A new change, outside of what is measured."""
        change_N = rng.standard_normal(len(self.start_vector_N), dtype=np.float32) * np.float32(CHANGE)
        self.named["weights"].copy_(self.start_vector_N).sub_(torch.from_numpy(change_N))


class Lender:
    """Stands for a node.hosting.Hosting without an engine."""

    async def borrow(self, act: Callable[[], Any]) -> Any:
        """In a thread."""
        return await trio.to_thread.run_sync(act)


async def meet(folder: Path, number: int, count: int, address: str) -> list[str]:
    """Everybody's address, through files."""
    write_whole(folder / f"address-{number}", address.encode(), over=True)
    while True:
        found = [folder / f"address-{each}" for each in range(count)]
        if all(each.exists() for each in found):
            return [each.read_text() for each in found]
        await trio.sleep(0.05)


async def main(arguments: list[str]) -> None:
    """FOLDER NUMBER COUNT CODEC RULE ROUNDS ELEMENTS."""
    folder, number, count = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    codec, rule, rounds, elements = arguments[3], arguments[4], int(arguments[5]), int(arguments[6])
    torch.set_num_threads(1)
    identity = Identity.make()
    own = folder / f"member-{number}"
    config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), topics=frozenset({round_topic(NETWORK)}))
    async with open_host(identity, config) as transport, trio.open_nursery() as nursery:
        direct = Direct(transport, DirectConfig())
        await nursery.start(direct.run)
        addresses = await meet(folder, number, count, transport.addresses()[0])
        for address in addresses[:number]:
            await transport.dial(address)
        while len(transport.peers()) < count - 1:  # noqa: ASYNC110  # they dial, we look
            await trio.sleep(0.02)
        vector = Vector(elements)
        plan = _plan([address.rpartition("/")[2] for address in addresses], vector, codec, rule)
        course = Course(run=plan.id, codec=codec_named(codec), rule=Rule(rule))
        participant = Participant(vector, course, identity.peer_id)  # type: ignore[arg-type]  # stands for a Trainer
        weights = Weights(participant, plan, Lender(), identity.peer_id, own)  # type: ignore[arg-type]  # stands for a Hosting
        blobs = Blobs(transport, direct, BlobsConfig(folder=own / "blobs"))
        door = RoundDoor(transport, NETWORK, lambda *_: None, lambda: time.time_ns() // 1_000_000)
        await nursery.start(door.calls.run)
        place = RunPlace(
            identity=identity, transport=transport, network=NETWORK, door=door, genesis=plan.genesis, plan=plan.raw,
            timing=Timing(),
        )  # fmt: skip
        history = RoundHistory(place, weights, RoundStore(own, NETWORK), Payloads(blobs, own, 2, place.admits))
        service = RoundService(place, history, weights.choice)
        await weights.restore(0, lambda _number: plan.genesis.base)
        nursery.start_soon(service.run)
        barrier = Barrier(folder, number, count)
        print(json.dumps(await _measure(service, weights, vector, barrier, rounds)), flush=True)
        await trio.sleep(2)  # for the others' last fetches
        nursery.cancel_scope.cancel()


async def _measure(
    service: RoundService, weights: Weights, vector: Vector, barrier: Barrier, rounds: int
) -> dict[str, Any]:
    """The first round warms up; how long the group took to form is told by it."""
    rng = np.random.default_rng(barrier.own)
    cpu_s, wall_s, size, group_s = list[float](), list[float](), 0, 0.0
    for number in range(rounds + 1):  # as many are measured as have their share of named weights
        chain = await service.opened()
        vector.train(rng)
        participant = weights.participant
        participant._is_unnoted = True  # as a step does
        await barrier.wait()
        began_cpu, began = _cpu_s(), time.monotonic()
        base = Digest(chain.base)
        raw = await trio.to_thread.run_sync(lambda: participant.write(chain.round, base, steps=1, tokens=1))  # noqa: B023  # run at once
        write_whole(service.history.payloads.own_path(chain.round), raw, over=True)
        made_of = await trio.to_thread.run_sync(manifest_of, raw)
        written = await trio.to_thread.run_sync(lambda: participant.own(steps=1, tokens=1))  # noqa: B023  # run at once
        await weights.add_own(made_of.blob, chain.round, written)
        if number == 0:
            await barrier.wait()
        await service.contribute(chain, Work(steps=1, tokens=1, made_of=made_of))
        size = len(raw)
        if number == 0:
            group_s = await _all_known(service, chain.base)
        await service.opened()
        if number:
            cpu_s.append(_cpu_s() - began_cpu)
            wall_s.append(time.monotonic() - began)
    return {
        "cpu_s": sum(cpu_s) / len(cpu_s),
        "round_s": sorted(wall_s)[len(wall_s) // 2],
        "group_s": group_s,
        "payload_bytes": size,
        "root": weights.told.root,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class Barrier:
    """Members wait for each other, through files, and go on in the same moment."""

    def __init__(self, folder: Path, own: int, count: int) -> None:
        self._folder, self.own, self._count, self._passed = folder, own, count, 0

    async def wait(self) -> None:
        """The last to come says when."""
        self._passed += 1
        files = [self._folder / f"ready-{self._passed}-{each}" for each in range(self._count)]
        write_whole(files[self.own], str(time.time() + REST_S).encode(), over=True)
        while not all(file.exists() for file in files):  # noqa: ASYNC110  # other processes
            await trio.sleep(0.005)
        await trio.sleep(max(float(file.read_text()) for file in files) - time.time())


async def _all_known(service: RoundService, base: bytes) -> float:
    """How long until every member's header of this round is here."""
    began = trio.current_time()
    voters = len(service.history.chain.electors.voters)
    while service.history.chain.base == base:
        senders = {each.sender for each in service.known() if isinstance(each.body, Header)}
        if len(senders) == voters:
            break
        await trio.sleep(0.005)
    return trio.current_time() - began


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _plan(founders: list[str], vector: Vector, codec: str, rule: str) -> Plan:
    return Plan(
        name="averaging", network=NETWORK, model="none", revision="none", layout=vector.layout.digest,
        elements=vector.layout.size, start=bytes(32), codec=codec, rule=rule, outer_rate=PARTS, steps=1, rows=1,
        context=1, accumulation=1, rate=1, warmup_steps=0, founders=tuple(sorted(map(PeerId, founders))), probation=3,
        absent_max=2, created_ms=0,
    )  # fmt: skip


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
