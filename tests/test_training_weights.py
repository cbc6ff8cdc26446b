"""A run's weights at one node, without a network: what is noted of payloads, what a round takes, what is kept."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing

from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.errors import CannotStore
from gossip.gathering import Candidate
from gossip.round_history import Unsound
from gossip.rounds import WEIGHT_ONE, Contribution, Header, Manifest, Share, Statement
from gossip.transfer import manifest_of
from model.participant import Participant, Payload
from node.hosting import Hosting
from node.training_plan import Plan
from node.training_weights import BUSY_S_MAX, Weights
from node.work import Finished
from tests.fake_runtime import FakeRuntime, facts
from tests.node_swarm import work
from tests.round_statements import signed
from tests.test_participant import PEERS, member, theta, train
from tests.test_training_plan import plan as a_plan
from tests.training_world import until

OWN, OTHER, THIRD = map(PeerId, PEERS)
BASE = a_plan().genesis.base


def small_plan(**changes: Any) -> Plan:
    """As tests/test_participant.py trains: 16 tokens a step."""
    return a_plan(rows=2, context=8, accumulation=1, steps=3, **changes)


@dataclass
class Here:
    """One member's weights over an engine that serves nobody."""

    weights: Weights
    hosting: Hosting
    folder: Path

    @property
    def participant(self) -> Participant:
        return self.weights.participant

    def states(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("state-*"))

    async def sent(
        self, peer: PeerId, codec: str = "int4", base: bytes = BASE, **changes: Any
    ) -> tuple[Statement, Path]:
        """What a peer announces in this round, and its payload on disk."""
        made = self.participant if peer == OWN else member(peer, codec=codec)
        train(made)
        raw = made.write(self.weights.round, Digest(base), steps=3, tokens=48)
        path = self.folder / f"payload-of-{peer}"
        path.write_bytes(raw)
        fields = {"blob": blob_of(raw), "payload_bytes": len(raw), "steps": 3, "tokens": 48, **changes}
        body = Header(run=a_plan().id, round=self.weights.round, base=base, contribution=Contribution(**fields))
        return signed(peer, body), path

    def manifest(
        self, shares: dict[PeerId, tuple[Path, int]], base: bytes = BASE, number: int | None = None
    ) -> Manifest:
        """Of a round in which these have this weight."""
        return Manifest(
            run=a_plan().id,
            round=self.weights.round if number is None else number,
            base=base,
            shares=tuple(
                Share(peer=peer, header=digest(peer.encode()), blob=blob_of(path.read_bytes()), weight=weight)
                for peer, (path, weight) in sorted(shares.items())
            ),
            reports=(digest(b"report"),),
        )

    async def commit(self, shares: dict[PeerId, tuple[Path, int]], base: bytes = BASE) -> Manifest:
        """Such a round."""
        manifest = self.manifest(shares, base)
        await self.weights.apply(manifest, {blob_of(path.read_bytes()): path for path, _ in shares.values()})
        return manifest


def blob_of(raw: bytes) -> Digest:
    return digest(manifest_of(raw).encode())


def blob(header: Statement) -> Digest:
    assert isinstance(header.body, Header)
    assert header.body.contribution is not None
    return Digest(header.body.contribution.blob)


@asynccontextmanager
async def here(path: Path, codec: str = "int4", runtime: FakeRuntime | None = None) -> AsyncIterator[Here]:
    runtime = runtime or FakeRuntime()
    async with trio.open_nursery() as nursery:
        hosting = Hosting(runtime, peer=OWN, on_change=lambda: None)
        await nursery.start(hosting.run)
        path.mkdir(exist_ok=True)  # noqa: ASYNC240
        weights = Weights(member(OWN, codec=codec), small_plan(), hosting, OWN, path)
        await weights.restore(0, lambda _: BASE)
        with trio.fail_after(30):
            yield Here(weights, hosting, path)
        nursery.cancel_scope.cancel()


def unsent(of: Here) -> torch.Tensor:
    return of.participant._feedback.unsent_N.clone()


async def test_what_counts_nothing_in_a_round_stays_unsent(tmp_path: Path) -> None:
    """On probation, or refused by the others: the round took nothing of it."""
    left = {}
    for weight in (0, WEIGHT_ONE):
        async with here(tmp_path / str(weight)) as one:
            _, own = await one.sent(OWN)
            _, other = await one.sent(OTHER)
            trained = unsent(one)
            await one.commit({OWN: (own, weight), OTHER: (other, WEIGHT_ONE)})
            left[weight] = float(unsent(one).norm()) / float(trained.norm())
            assert one.weights.told.rounds[-1].contributed == ((OTHER,) if weight == 0 else (OWN, OTHER))
    assert left[0] == 1.0
    assert left[WEIGHT_ONE] < 0.5


@pytest.mark.parametrize("quantization", ["none", "int8"])
async def test_the_engine_goes_on_under_each_weights_once(tmp_path: Path, quantization: str) -> None:
    """Whatever it calls them: what is quantized has a revision of its own."""
    runtime = FakeRuntime(facts=facts().quantized(quantization))
    async with here(tmp_path, runtime=runtime) as one, trio.open_nursery() as nursery:
        nursery.start_soon(one.weights.serve_newest)
        _, own = await one.sent(OWN)
        await one.commit({OWN: (own, WEIGHT_ONE)})
        await until(lambda: runtime.facts.weights_revision == one.weights.told.revision)
        count = len(runtime.adopted)
        for _ in range(20):
            await one.hosting.borrow(lambda: None)
        assert len(runtime.adopted) == count
        assert runtime.facts.revision.endswith("-int8") == (quantization == "int8")
        nursery.cancel_scope.cancel()


async def test_a_payload_is_examined_and_scored_and_leaves_the_weights(tmp_path: Path) -> None:
    async with here(tmp_path) as one:
        train(one.participant)
        before = theta(one.participant)
        score = await one.weights.examine(*await one.sent(OTHER))
        assert score is not None
        assert score > 0
        assert torch.equal(theta(one.participant), before)
        assert await one.weights.examine(*await one.sent(OWN)) is None  # nobody judges itself


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"steps": 4}, "it claims 4 steps and 48 tokens, a round has at most 3 and 48"),
        ({"tokens": 49}, "it claims 3 steps and 49 tokens"),
        ({"payload_bytes": 1 << 20}, "a payload of 1,048,576 bytes, an update has"),
    ],
    ids=str,
)
async def test_a_claim_that_no_member_can_make_is_refused_before_anything_is_fetched(
    tmp_path: Path, changes: dict[str, int], why: str
) -> None:
    async with here(tmp_path) as one:
        header, _ = await one.sent(OTHER, **changes)
        with pytest.raises(Unsound, match=why):
            one.weights.check(header)
        assert why in one.weights.told.refused[OTHER]


async def test_a_header_that_says_otherwise_than_its_update_is_refused(tmp_path: Path) -> None:
    async with here(tmp_path) as one:
        header, path = await one.sent(OTHER, tokens=32)
        one.weights.check(header)
        with pytest.raises(Unsound, match="the header says 3 steps and 32 tokens, the update 3 and 48"):
            await one.weights.examine(header, path)


async def test_a_payload_that_is_gone_is_the_disks_fault_and_no_peers(tmp_path: Path) -> None:
    async with here(tmp_path) as one:
        header, path = await one.sent(OTHER)
        path.unlink()
        with pytest.raises(CannotStore, match="cannot be read"):
            await one.weights.examine(header, path)
        assert one.weights.told.refused == {}


async def test_payloads_that_come_at_once_are_all_compared_with_each_other(tmp_path: Path) -> None:
    """Else one member knows of a copy, and another does not."""
    async with here(tmp_path, codec="ef64.2b") as one:
        sent = {peer: await one.sent(peer, codec="ef64.2b") for peer in (OWN, OTHER, THIRD)}
        payloads = {
            peer: one.participant.read(path.read_bytes(), 0, Digest(BASE), peer) for peer, (_, path) in sent.items()
        }
        meeting, pairs = threading.Barrier(2, timeout=10), list[tuple[Payload, Payload]]()

        def overlaps(first: Payload, others: Sequence[Payload]) -> list[float]:
            """Two are compared with what was there before, at the same time."""
            pairs.extend((first, other) for other in others)
            if len(pairs) <= 2:
                meeting.wait()
            return [1.0] * len(others)

        one.participant.overlaps = overlaps  # type: ignore[method-assign]
        await one.weights._note(0, blob(sent[OWN][0]), payloads[OWN])
        async with trio.open_nursery() as nursery:
            for peer in (OTHER, THIRD):
                nursery.start_soon(one.weights._note, 0, blob(sent[peer][0]), payloads[peer])
        assert len(pairs) == 3
        candidates = tuple(candidate(peer, blob(sent[peer][0]), place) for place, peer in enumerate((OTHER, THIRD)))
        assert [weight > 0 for weight, _ in one.weights.choice.choose(candidates)] == [True, False]


def candidate(peer: PeerId, of: Digest, place: int) -> Candidate:
    return Candidate(
        peer=peer, header=digest(peer.encode()), blob=of, steps=3, tokens=48, scores=(), place=place, is_proven=True
    )


async def test_a_payload_of_a_round_that_is_over_has_no_score(tmp_path: Path) -> None:
    async with here(tmp_path) as one:
        header, path = await one.sent(OTHER)
        async with trio.open_nursery() as nursery:
            scores = []

            async def look() -> None:
                scores.append(await one.weights.examine(header, path))

            async with one.weights.lock:  # as a round that is being applied has it
                nursery.start_soon(look)
                await trio.testing.wait_all_tasks_blocked(0.2)
                one.weights.round += 1
        assert scores == [None]
        assert one.weights._scores.published(1) == {}


async def test_looks_wait_for_the_engine_for_a_while_in_a_round_and_rounds_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.training_weights.BUSY_S_MAX", 0.3)
    async with here(tmp_path) as one, trio.open_nursery() as nursery:

        async def ask_on() -> None:
            while True:
                async with one.hosting.generate(work("hello", 1_000)) as items:
                    async for item in items:
                        if isinstance(item, Finished):
                            break

        for _ in range(2):
            nursery.start_soon(ask_on)
        await trio.sleep(0.05)
        began_s = trio.current_time()
        for peer in (OTHER, THIRD) * 5:
            assert await one.weights.examine(*await one.sent(peer)) is None
        await one.weights.judge()
        assert one.weights.told.held_out_loss is None
        waited_s = one.weights.told.busy_s
        assert 0.3 <= waited_s < trio.current_time() - began_s
        assert waited_s < 0.3 * 10  # together, and not each
        _, path = await one.sent(OTHER)
        await one.commit({OTHER: (path, WEIGHT_ONE)})
        assert one.weights.round == 1
        assert one.weights.told.busy_s == 0.0
        nursery.cancel_scope.cancel()
    assert BUSY_S_MAX >= 1


async def test_a_look_that_is_cancelled_while_it_runs_gives_the_weights_back(tmp_path: Path) -> None:
    async with here(tmp_path) as one:
        train(one.participant)
        before = theta(one.participant)
        runs, goes_on, is_ours = threading.Event(), threading.Event(), list[bool]()

        def looking() -> Iterator[None]:
            own = theta(one.participant)
            try:
                one.participant.layout.load_into(one.participant.trainer.named, torch.zeros_like(own))
                runs.set()
                goes_on.wait(10)
                yield
            finally:
                is_ours.append(one.weights.lock.locked())
                one.participant.layout.load_into(one.participant.trainer.named, own)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.weights._lent, looking())
            await trio.to_thread.run_sync(runs.wait)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await trio.sleep(0.05)
            assert one.weights.lock.locked()  # it still runs
            goes_on.set()
        assert is_ours == [True]
        assert not one.weights.lock.locked()
        assert torch.equal(theta(one.participant), before)


@pytest.mark.parametrize(("room", "kept"), [(0, 2), (3, 3), (100, 4)])
async def test_the_disk_keeps_this_round_and_those_that_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, kept: int
) -> None:
    """room: for how many states."""
    async with here(tmp_path) as one:
        monkeypatch.setattr("node.training_weights.STATES_BYTES_MAX", room * one.weights.state_bytes)
        monkeypatch.setattr("node.training_weights.STATES_OFFERED", (2, 4))
        assert one.weights.states_offered == kept
        base: bytes = BASE
        for _ in range(6):
            _, path = await one.sent(OTHER, base=base)
            base = (await one.commit({OTHER: (path, WEIGHT_ONE)}, base)).next_base
        assert one.states() == [f"state-{number}" for number in range(6 - kept, 7)]
        assert one.weights.state is not None
        path, made_of = one.weights.state
        assert path.read_bytes() == one.participant.state()
        assert made_of == manifest_of(one.participant.state())


async def test_weights_are_written_and_named_once_in_some_rounds_where_the_plan_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plan, "named_every", 3)
    async with here(tmp_path) as one:
        base: bytes = BASE
        for number in range(1, 8):
            _, path = await one.sent(OTHER, base=base)
            base = (await one.commit({OTHER: (path, WEIGHT_ONE)}, base)).next_base
            assert (one.weights.state is None) == bool(number % 3)
            assert (one.weights.told.root == "") == bool(number % 3)
            assert one.weights.told.rounds[-1].root == one.weights.told.root
        assert one.states() == ["state-0", "state-3", "state-6"]
        reached, at = bytes(one.participant.state()), one.weights.round
    async with here(tmp_path / "else") as again:
        again.weights._folder = tmp_path
        await again.weights.restore(at, lambda _: BASE)
        assert again.weights.round == 6
        assert again.participant.state() != reached  # one round is to be made again


async def test_an_own_update_whose_round_is_over_while_it_is_written_is_not_noted(tmp_path: Path) -> None:
    async with here(tmp_path) as one:
        _, own = await one.sent(OWN)
        written = one.participant.own(steps=3, tokens=48)
        _, other = await one.sent(OTHER)
        await one.commit({OTHER: (other, WEIGHT_ONE)})
        await one.weights.add_own(blob_of(own.read_bytes()), 0, written)
        assert one.weights._payloads == {}


async def test_weights_that_a_quorum_names_otherwise_are_not_gone_on_from(tmp_path: Path) -> None:
    good, other = bytes(member(THIRD).state()), member(OTHER)
    train(other)
    other.settle([], took_ours=False)
    rotten = bytearray(good)
    rotten[2] ^= 1  # finite, and of the right length
    roots = {2: manifest_of(good).blob, 3: manifest_of(good).blob}
    for number, content in ((2, good), (3, bytes(rotten))):
        (tmp_path / f"state-{number}").write_bytes(content)
    async with here(tmp_path / "else") as one:
        one.weights._folder = tmp_path
        await one.weights.restore(3, lambda _: BASE, roots.get)
        assert one.weights.round == 2
        await one.weights.restore(3, lambda _: BASE)  # without its name nobody can tell
        assert one.weights.round == 3


@pytest.mark.parametrize(("weight", "count", "taken"), [(WEIGHT_ONE, 2, True), (0, 2, False), (WEIGHT_ONE, 0, False)])
async def test_a_state_takes_from_what_is_unsent_what_the_round_before_it_counted(
    tmp_path: Path, weight: int, count: int, taken: bool
) -> None:
    """count 0: no round was committed where the weights stood."""
    async with here(tmp_path) as one:
        _, own = await one.sent(OWN)
        _, other = await one.sent(OTHER)
        before = unsent(one)
        state = tmp_path / "given"
        state.write_bytes(member(THIRD).state())
        shares = {OWN: (own, weight), OTHER: (other, WEIGHT_ONE)}
        passed = one.manifest(shares) if count else None
        await one.weights.adopt(one.manifest({}, number=3), state, passed=passed)
        assert (not torch.equal(unsent(one), before)) == taken


async def test_weights_without_records_give_way_to_the_beginning(tmp_path: Path) -> None:
    """The records are gone: those weights belong to rounds that nobody can prove."""
    for number in (5, 6, 7):
        (tmp_path / f"state-{number}").write_bytes(b"of another history")
    async with here(tmp_path) as one:
        assert one.weights.round == 0
        assert one.states() == ["state-0"]
        assert one.weights.state is not None
        path, made_of = one.weights.state
        assert path.read_bytes() == one.participant.state()
        assert made_of == manifest_of(one.participant.state())


async def test_the_newest_weights_that_fit_are_gone_on_from(tmp_path: Path) -> None:
    other = member(OTHER)
    train(other)
    good = member(THIRD).state()
    for number, content in ((1, good), (2, good), (3, b"damaged"), (4, good)):
        (tmp_path / f"state-{number}").write_bytes(content)
    async with here(tmp_path / "else") as one:
        one.weights._folder = tmp_path
        asked = []

        def base_of(number: int) -> bytes:
            asked.append(number)
            return digest(b"%d" % number)

        await one.weights.restore(3, base_of)
        assert one.weights.round == 2
        assert asked == [2]
        assert one.weights.told.revision == f"tales-r2-{digest(b'2').hex()[:12]}"
