"""gossip/service.py, pace.py and saved.py over the loopback network: told, found, withdrawn, cut off, restarted."""

from __future__ import annotations

import errno
import random
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from trio.testing import MockClock

from crypto.disk import StateFile, System
from crypto.identity import Identity, PeerId
from gossip.directory import FLOOR_KEEP_S
from gossip.errors import LocalProtocolError
from gossip.messages import Advert, seal_advert
from gossip.pace import FEW_NEIGHBOURS, INTERVAL_S, JOINED_AGAIN_S, JOINED_S, REFRESH_S, AdvertPace, matters
from gossip.routing import Need, WhyNot
from gossip.saved import FILE_BYTES_MAX, SAVE_S, Keeper, SavedState
from gossip.service import ADVERTS_PROTOCOL, GOODBYE_S, GossipService
from gossip.standing import Fault, SavedBan, Verdict
from gossip.summaries import SelfSummary, seal_summary, summary_topic
from p2p.allowance import Buckets
from p2p.errors import Unreachable
from p2p.loopback import LoopbackNetwork, LoopbackTransport
from p2p.loopback_wire import Faults
from p2p.transport import Stream, Transport
from tests.gossip_swarm import CAPACITY, START_MS, TOPIC, Node, config, connect, node, swarm, until, wall_clock_ms


@pytest.fixture
def network() -> LoopbackNetwork:
    return LoopbackNetwork(random.Random(5))


async def test_what_one_offers_the_others_know_soon(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with swarm(network, 5) as nodes:
        await trio.sleep(3)
        nodes[0].gossip.offer(CAPACITY)
        await until(lambda: all(nodes[0].peer in other.sees() for other in nodes[1:]), INTERVAL_S)
        offer = nodes[3].gossip.directory.offer_of(nodes[0].peer, trio.current_time())
        assert offer is not None
        assert offer.capacity == CAPACITY
        assert offer.advert.addresses == nodes[0].transport.addresses()
        assert nodes[0].sees() == set()  # itself it need not be told of


async def test_a_newcomer_learns_of_everybody_from_its_first_neighbour(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with swarm(network, 5) as nodes:
        for other in nodes:
            other.gossip.offer(CAPACITY)
        await trio.sleep(20)
        async with node(network) as newcomer:
            await connect(newcomer, nodes[2])
            took_s = await until(lambda: newcomer.sees() == {other.peer for other in nodes}, 5)
            assert took_s < 0.2  # it asked, and did not wait for anybody's refresh


async def test_a_newcomer_is_heard_of_at_once(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as old, node(network) as newcomer:
        newcomer.gossip.offer(CAPACITY)
        await trio.sleep(4)
        await connect(newcomer, old)
        await until(lambda: old.sees() == {newcomer.peer}, 1)


async def test_adverts_are_refreshed_and_rare(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with swarm(network, 3) as nodes:
        nodes[0].gossip.offer(CAPACITY)
        await trio.sleep(5)
        before = nodes[0].gossip.statistics().adverts_sent
        for _ in range(300):
            await trio.sleep(1)
            assert nodes[0].peer in nodes[1].sees()
        sent = nodes[0].gossip.statistics().adverts_sent - before
        assert 300 / REFRESH_S <= sent <= 300 / (REFRESH_S * 0.9) + 1


async def test_changes_are_told_at_most_once_a_second(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with swarm(network, 3) as nodes:
        for step in range(500):  # ten seconds of a busy engine
            nodes[0].gossip.offer(replace(CAPACITY, slots_free=step % 5))
            await trio.sleep(0.02)
        assert nodes[0].gossip.statistics().adverts_sent <= 11
        await until(lambda: nodes[1].gossip.directory.offers(trio.current_time())[0].capacity.slots_free == 4, 1)


async def test_after_goodbye_nobody_asks_it(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with swarm(network, 5) as nodes:
        nodes[0].gossip.offer(CAPACITY)
        await trio.sleep(3)
        assert isinstance(nodes[2].gossip.rank(Need(model="tale")), tuple)
        began = trio.current_time()
        await nodes[0].gossip.withdraw()
        assert trio.current_time() - began < GOODBYE_S
        await until(lambda: not any(nodes[0].peer in other.sees() for other in nodes), 0.2)
        nodes[0].gossip.offer(CAPACITY)  # the engine still counts its slots while it drains
        await trio.sleep(30)
        assert not any(nodes[0].peer in other.sees() for other in nodes)
        assert nodes[2].gossip.rank(Need(model="tale")) == WhyNot.none_serves()


async def test_goodbye_takes_no_longer_than_its_bound(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    class Stuck(LoopbackTransport):
        async def publish(self, topic: str, payload: bytes) -> None:
            await trio.sleep_forever()

    async with node(network) as stuck:
        stuck.transport.__class__ = Stuck
        with trio.fail_after(GOODBYE_S + 0.1):
            await stuck.gossip.withdraw()


async def test_a_killed_peer_is_forgotten_when_its_advert_ends(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with swarm(network, 4) as nodes:
        for other in nodes:
            other.gossip.offer(CAPACITY)
        await trio.sleep(5)
        network.crash(nodes[0].peer)
        await trio.sleep(0.1)
        assert nodes[1].gossip.observations.observed(nodes[0].peer, 0.0).connected is False
        await trio.sleep(31)
        assert not any(nodes[0].peer in other.sees() for other in nodes[1:])
        await trio.sleep(FLOOR_KEEP_S)
        assert not any(nodes[0].peer in other.gossip.directory.floors() for other in nodes[1:])


@pytest.mark.parametrize("seed", range(3))
async def test_a_swarm_with_loss_and_a_partition_comes_together_again(seed: int, autojump_clock: MockClock) -> None:
    faults = Faults(gossip_loss=0.3, gossip_duplicate=0.2, gossip_reorder=0.3, gossip_delay_s=(0.02, 0.08))
    network = LoopbackNetwork(random.Random(seed), faults)
    async with swarm(network, 5) as nodes:
        everybody = {other.peer for other in nodes}

        def all_know(who: set[PeerId], by: list[Node]) -> bool:
            return all(who - {here.peer} <= here.sees() for here in by)

        for other in nodes:
            other.gossip.offer(CAPACITY)
        await until(lambda: all_know(everybody, nodes), 25)
        left, right = nodes[:2], nodes[2:]
        for one in left:
            for other in right:
                network.partition(one.peer, other.peer)
        await trio.sleep(32)
        assert not any({other.peer for other in right} & here.sees() for here in left)
        network.heal()
        for one in left:  # as the health monitor and then peering's reconciler would
            for other in right:
                network.break_connections(one.peer, other.peer)
                await connect(one, other)
        took_s = await until(lambda: all_know(everybody, nodes), 15)
        assert took_s <= 15  # SECURITY.md 3.2
        for here in nodes:
            faults_seen = here.gossip.statistics().standing.faults
            assert set(faults_seen.values()) == {0}, "loss and doubling are nobody's fault"


# --- those who do wrong ---


async def test_two_faces_are_found_out_and_cut_off(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as honest, network.join(liar := Identity.make()) as transport:
        await transport.dial(honest.transport.addresses()[0])
        for slots in (4, 5):
            await transport.publish(TOPIC, statement(liar, 1, slots))
        await until(lambda: not honest.transport.peers(), 1)
        assert honest.sees() == set()
        assert len(honest.gossip.directory.evidence()) == 1
        assert honest.gossip.standing.verdict(liar.peer_id, trio.current_time()) is Verdict.BANNED
        await transport.dial(honest.transport.addresses()[0])
        await until(lambda: not honest.transport.peers(), 1)  # a banned peer does not stay
        await transport.publish(TOPIC, statement(liar, 2, 4))
        await trio.sleep(1)
        assert honest.sees() == set()


def statement(who: Identity, sequence: int, slots: int = 4, instance: str = "ab" * 8, time_ms: int = 0) -> bytes:
    capacity = replace(CAPACITY, slots_total=slots)
    advert = Advert(instance=instance, started_ms=START_MS, agent="liar", capacity=capacity)
    return seal_advert(who, advert, network="main", sequence=sequence, time_ms=time_ms or wall_clock_ms())


async def test_a_banned_peer_is_not_heard_through_others_either(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as honest, node(network) as between:
        banned = Identity.make()
        honest.gossip.blame(banned.peer_id, Fault.FATAL, "proven")
        assert not honest.gossip._heard(banned.peer_id, statement(banned, 1))
        assert honest.gossip.statistics().drops == {"banned": 1}
        assert between.gossip._heard(banned.peer_id, statement(banned, 1))  # each has its own opinion
        await connect(honest, between)  # and hands on what it knows
        await trio.sleep(1)
        assert honest.gossip.directory.floors() != {}
        assert honest.sees() == set()


async def test_who_passes_another_off_is_to_blame_and_not_the_other(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as honest, node(network) as victim, network.join(mallory := Identity.make()) as transport:
        victim.gossip.offer(CAPACITY)
        await connect(victim, honest)
        await transport.dial(honest.transport.addresses()[0])
        await until(lambda: victim.peer in honest.sees(), 3)
        await transport.publish(TOPIC, statement(victim.identity, 1 << 62))
        await until(lambda: mallory.peer_id not in honest.transport.peers(), 1)
        assert honest.sees() == {victim.peer}
        assert honest.transport.peers() == {victim.peer}


async def test_a_flood_is_cut_off_within_three_seconds_and_an_honest_peer_is_heard(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with (
        node(network) as honest,
        node(network) as neighbour,
        network.join(flooder := Identity.make()) as transport,
        trio.open_nursery() as nursery,
    ):

        async def flood() -> None:
            for sequence in range(1, 400):
                await transport.publish(TOPIC, statement(flooder, sequence))
                await trio.sleep(0.01)

        await connect(neighbour, honest)
        await transport.dial(honest.transport.addresses()[0])
        nursery.start_soon(flood)
        await trio.sleep(1)
        neighbour.gossip.offer(CAPACITY)
        await until(lambda: neighbour.peer in honest.sees(), 1)
        await until(lambda: flooder.peer_id not in honest.transport.peers(), 2)
        nursery.cancel_scope.cancel()
        assert honest.gossip.statistics().drops["over_quota"] > 50
        assert neighbour.peer in honest.transport.peers()


async def test_old_words_replayed_in_bulk_slander_nobody(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as honest:
        victim = Identity.make()
        recorded = [statement(victim, number, time_ms=START_MS - 3_600_000) for number in range(1, 200)]
        for raw in recorded:  # the transport vouches that the victim wrote them, once
            honest.gossip._heard(victim.peer_id, raw)
            await trio.sleep(0.05)
        assert honest.gossip.standing.score(victim.peer_id, trio.current_time()) == 0.0
        assert honest.sees() == set()


async def test_strangers_together_are_bounded_before_any_signature_is_checked(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as honest:
        for number in range(2_000):
            honest.gossip._heard(PeerId(f"stranger-{number}"), b"\x00")
        statistics = honest.gossip.statistics()
        assert statistics.drops["strangers_over_quota"] >= 1_700
        assert sum(statistics.directory.outcomes.values()) <= 250


async def test_a_wrong_clock_is_told_and_costs_nothing_else(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as right, node(network, wall_clock_ms=lambda: wall_clock_ms() + 600_000) as wrong:
        for here in (right, wrong):
            here.gossip.offer(CAPACITY)
        await connect(wrong, right)
        await trio.sleep(30)
        assert right.sees() == wrong.sees() == set()
        statistics = wrong.gossip.statistics()
        assert statistics.directory.clock_offset_ms == pytest.approx(-600_000, abs=1_000)
        assert set(statistics.standing.faults.values()) == {0}
        assert right.transport.peers() == {wrong.peer}


async def test_a_copied_identity_is_told_to_its_owner(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    told: list[str] = []
    twin = Identity.make()
    async with node(network, twin, on_duplicate=told.append) as first, node(network) as between:
        await connect(first, between)
        await trio.sleep(1)
        raw = statement(twin, wall_clock_ms() + 5, instance="cd" * 8)
        await between.transport.publish(TOPIC, raw)  # as gossip would bring it
        await trio.sleep(1)
        first.gossip._heard(twin.peer_id, raw)
        assert len(told) == 1
        assert "stop one of the two" in told[0]
        assert first.gossip.statistics().duplicate_identity == told[0]
        assert first.gossip.standing.verdict(first.peer, trio.current_time()) is Verdict.FINE


async def test_a_capacity_out_of_bounds_is_refused_at_the_door(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as here:
        with pytest.raises(LocalProtocolError, match="slots_total"):
            here.gossip.offer(replace(CAPACITY, slots_total=-1))


@pytest.mark.parametrize(
    "bad",
    [
        {"network": "Main"},
        {"network": ""},
        {"network": "n" * 65},
        {"instance": "x"},
        {"agent": ""},
        {"agent": "a" * 65},
    ],
)
def test_a_config_that_no_envelope_could_carry_is_refused(bad: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="came, wanted"):
        config(**bad)


# --- asked for what it knows ---


async def test_a_peer_that_hands_on_rubbish_is_to_blame(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async def rubbish(stream: Stream) -> None:
        await stream.send(b"rubbish")
        await stream.send(b"more rubbish")
        await trio.sleep(1)

    async with node(network) as honest, network.join(Identity.make()) as transport:
        transport.serve(ADVERTS_PROTOCOL, rubbish)
        await honest.transport.dial(transport.addresses()[0])
        await until(lambda: not honest.transport.peers(), 1)
        assert honest.gossip.standing.score(transport.peer_id, trio.current_time()) == pytest.approx(-20, abs=0.1)


async def test_a_peer_that_never_answers_does_not_keep_others_waiting(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async def silence(_stream: Stream) -> None:
        await trio.sleep_forever()

    async with node(network) as honest, AsyncExitStack() as stack:
        for _ in range(6):
            transport = await stack.enter_async_context(network.join(Identity.make()))
            transport.serve(ADVERTS_PROTOCOL, silence)
            await honest.transport.dial(transport.addresses()[0])
        async with node(network) as other:
            other.gossip.offer(CAPACITY)
            await connect(honest, other)
            await until(lambda: other.peer in honest.sees(), 4)
        await trio.sleep(15)
        assert honest.gossip.statistics().drops["pull_too_slow"] == 6


async def test_asking_too_often_is_refused(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as honest, network.join(Identity.make()) as transport:
        honest.gossip.offer(CAPACITY)
        await trio.sleep(1)
        await transport.dial(honest.transport.addresses()[0])
        answers = 0
        for _ in range(20):
            stream = await transport.open_stream(honest.peer, ADVERTS_PROTOCOL)
            try:
                await stream.receive()
                answers += 1
            except Unreachable:
                pass
        assert answers == 5
        assert honest.gossip.statistics().drops["asked_too_often"] == 15


# --- over a restart ---


async def test_a_restart_keeps_sequences_and_bans(
    network: LoopbackNetwork, autojump_clock: MockClock, tmp_path: Path
) -> None:
    path = tmp_path / "data" / "gossip.json"
    who, other = Identity.make(), Identity.make()
    raw = b""
    async with node(network, who, port=1, state_path=path) as before:
        raw = statement(other, 7)
        assert before.gossip._heard(other.peer_id, raw)
        before.gossip.blame(PeerId("eve"), Fault.FATAL, "equivocation")
        before.gossip.offer(CAPACITY)
        await trio.sleep(1)
        first = before.gossip._own.sequence
    async with node(network, who, port=1, state_path=path, wall_clock_ms=lambda: START_MS - 900_000_000) as after:
        after.gossip.offer(CAPACITY)
        await trio.sleep(1)
        assert after.gossip._own.sequence > first  # though the clock was set back
        assert after.gossip.standing.verdict(PeerId("eve"), trio.current_time()) is Verdict.BANNED
    async with node(network, who, port=1, state_path=path) as again:
        assert not again.gossip._heard(other.peer_id, raw)
        assert again.sees() == set()
        assert again.gossip.statistics().directory.outcomes == {"stale": 1}


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


async def test_what_comes_after_the_last_save_is_not_believed_and_leaves_no_page_beside(
    network: LoopbackNetwork, autojump_clock: MockClock, tmp_path: Path
) -> None:
    who, other = Identity.make(), Identity.make()
    async with network.join(who) as transport:
        gossip = GossipService(transport, who, config(state_path=tmp_path / "gossip.json"), random.Random(1))
        async with trio.open_nursery() as nursery:
            await nursery.start(gossip.run)
            assert gossip._heard(other.peer_id, statement(other, 7))
            assert names(tmp_path) == ["gossip.json", "gossip.json.heard-0"]
            nursery.cancel_scope.cancel()
        async with node(network) as late:  # the transport hears until it is closed
            await late.transport.dial(transport.addresses()[0])
            late.gossip.offer(CAPACITY)
            await trio.sleep(2)
            assert late.gossip.statistics().adverts_sent
        assert names(tmp_path) == ["gossip.json"]
        assert gossip.statistics().directory.outcomes == {"accepted": 1}


async def test_after_a_kill_no_sequence_is_used_twice_though_the_clock_was_set_back(
    network: LoopbackNetwork, autojump_clock: MockClock, tmp_path: Path
) -> None:
    path, who = tmp_path / "gossip.json", Identity.make()
    used: list[int] = []
    for life in range(4):
        async with node(
            network, who, port=1, state_path=path, wall_clock_ms=lambda back=life: wall_clock_ms() - back * 10**7
        ) as here:
            here.gossip.offer(CAPACITY)
            await trio.sleep((0.5, 4.5, 31.0, 1.0)[life])
            here.gossip.offer(replace(CAPACITY, accepting=False))  # said at once, and perhaps long after the last save
            await trio.sleep(INTERVAL_S)
            assert here.gossip._own.sequence > max(used, default=0)
            used.append(here.gossip._own.sequence)
            raw = path.read_bytes()
        path.write_bytes(raw)  # as a kill would have left it


async def test_a_ban_is_saved_at_the_next_tick(
    network: LoopbackNetwork, autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with node(network, state_path=tmp_path / "gossip.json") as here:
        keeper, now = here.gossip._keeper, trio.current_time()
        assert keeper.take_turn(now)
        assert not keeper.take_turn(now)
        here.gossip.blame(PeerId("eve"), Fault.FATAL, "equivocation")
        assert keeper.take_turn(now)
        assert not keeper.take_turn(now + SAVE_S / 2)
        assert keeper.take_turn(now + SAVE_S)


@pytest.mark.parametrize("broken", [b"", b"{", b"[" * 100_000, b'{"extra": 1}', b"\xff", b'{"floors": {"\xff": 1}}'])
def test_a_whole_file_that_is_no_state_starts_afresh(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "gossip.json"
    keeper = Keeper(path)
    assert keeper.load() == SavedState()
    StateFile(path, kind="gossip_state", version=1, bytes_max=FILE_BYTES_MAX).write(broken)
    assert keeper.load() == SavedState()
    assert not path.exists()
    assert path.with_name("gossip.json.corrupt-1").read_bytes().endswith(broken)


def test_what_is_saved_is_loaded_and_nothing_is_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gossip.json"
    state = SavedState(sequence=7, floors={"p": 3}, bans=(SavedBan(peer="eve", until_ms=9, reason="x"),))
    assert Keeper(path).save(SavedState())
    assert Keeper(path).save(state)
    assert Keeper(path).load() == state
    assert [item.name for item in path.parent.iterdir()] == ["gossip.json"]
    assert Keeper(None).save(state)
    assert (Keeper(None).load(), Keeper(None).status()) == (SavedState(), None)


class Failing(System):
    """A disk whose flushes fail until it is mended."""

    broken = True

    def sync(self, handle: int) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        super().sync(handle)


async def test_a_disk_that_fails_costs_no_node_and_is_said_until_it_works(
    network: LoopbackNetwork, autojump_clock: MockClock, tmp_path: Path
) -> None:
    disk, path = Failing(), tmp_path / "gossip.json"
    async with node(network, state_path=path, system=disk) as here, node(network) as other:
        await here.transport.dial(other.transport.addresses()[0])
        here.gossip.offer(CAPACITY)
        await trio.sleep(30)
        assert other.sees() == {here.peer}
        file = here.gossip.file_status()
        assert file is not None
        assert (file.reason, file.writes) == ("io_error", 0)
        assert here.gossip.statistics().drops["save_failed"] == file.failures["io_error"] > 0
        assert not path.exists()
        disk.broken = False
        with trio.fail_after(1000):
            while (file := here.gossip.file_status()) is None or file.problem:  # noqa: ASYNC110  # by a thread
                await trio.sleep(1)
        assert file.writes > 0
    assert Keeper(path).load().sequence > 0


# --- pace ---


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(("changed", "joined", "wait")), st.floats(0.0, 4.0)), max_size=60))
def test_the_pace_is_kept_whatever_happens(history: list[tuple[str, float]]) -> None:
    pace, now, said, begun = AdvertPace(random.Random(1)), 0.0, list[float](), False
    for what, wait_s in history:
        match what:
            case "changed":
                pace.changed(now)
                begun = True
            case "joined":
                pace.joined(now, 1)
            case _:
                end = now + wait_s
                while pace.deadline() <= end:
                    now = max(now, pace.deadline())
                    said.append(now)
                    pace.published(now)
                now = end
        assert begun or pace.deadline() == float("inf")
        assert not begun or pace.deadline() <= max(now, *(said[-1:] or [now])) + REFRESH_S
    assert all(later - earlier >= INTERVAL_S - 1e-9 for earlier, later in pairwise(said))


def test_a_newcomer_is_told_twice_for_it_is_not_in_the_mesh_at_once() -> None:
    pace = AdvertPace(random.Random(1))
    pace.joined(0.0, 1)
    assert pace.deadline() == float("inf")  # nothing to tell yet
    pace.changed(0.0)
    pace.published(0.0)
    pace.joined(5.0, FEW_NEIGHBOURS + 1)  # no news to the network: the newcomer asks us itself
    assert pace.deadline() > 5.0 + JOINED_S
    pace.joined(5.0, FEW_NEIGHBOURS)
    assert pace.deadline() == 5.0 + JOINED_S
    pace.published(5.0 + JOINED_S)
    assert pace.deadline() == 5.0 + JOINED_AGAIN_S
    pace.published(5.0 + JOINED_AGAIN_S)
    assert pace.deadline() > 5.0 + 0.9 * REFRESH_S


async def test_what_is_heard_decides_how_often_we_speak_and_how_long_we_are_believed(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as here, node(network) as other:
        await connect(here, other)
        here.gossip._hearing.flow.stretch = 3.0
        await trio.sleep(2.5)
        assert 2.0 < here.gossip._own.pace.stretch < 3.0  # there is no crowd here
        assert here.gossip.statistics().flow.stretch == here.gossip._own.pace.stretch
        here.gossip.offer(CAPACITY)
        await until(lambda: here.peer in other.sees(), 10.0)
        (offer,) = other.gossip.directory.offers(trio.current_time())
        assert offer.expires_s - offer.received_s > 60.0


def test_in_a_crowd_everything_is_said_less_often() -> None:
    pace = AdvertPace(random.Random(1))
    pace.stretch = 6.0
    pace.changed(0.0)
    pace.published(0.0)
    assert 0.9 * 6 * REFRESH_S <= pace.deadline() <= 6 * REFRESH_S
    pace.changed(1.0)
    assert pace.deadline() == 6 * INTERVAL_S


def test_small_changes_can_wait() -> None:
    busy = replace(CAPACITY, slots_total=64, slots_free=32, decode_tok_s=100.0)
    assert not matters(busy, replace(busy, slots_free=30, device_free_bytes=5, decode_tok_s=110.0))
    assert matters(busy, replace(busy, slots_free=10))
    assert matters(busy, replace(busy, slots_free=0))
    assert matters(busy, replace(busy, queue_length=20))
    assert matters(busy, replace(busy, decode_tok_s=10.0))
    assert matters(busy, replace(busy, accepting=False))
    assert matters(busy, replace(busy, models=()))
    assert matters(CAPACITY, replace(CAPACITY, slots_free=3))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.0, 3.0)), max_size=80))
def test_buckets_grant_no_more_than_their_rate_and_stay_few(history: list[tuple[int, float]]) -> None:
    buckets, now, granted = Buckets(rate_per_s=2.0, burst=10.0, keys_max=6), 0.0, [0] * 6
    for key, wait_s in history:
        now += wait_s
        granted[key] += buckets.take(key, now)
        assert len(buckets) <= 6
        assert all(count <= 10 + 2.0 * now for count in granted)


def test_buckets_forget_the_longest_silent() -> None:
    buckets = Buckets(rate_per_s=1.0, burst=1.0, keys_max=2)
    assert [buckets.take(key, 0.0) for key in (1, 2, 1, 3, 1)] == [True, True, False, True, False]
    assert len(buckets) == 2


def test_time_that_goes_back_takes_nothing_from_a_bucket() -> None:
    buckets = Buckets(rate_per_s=1.0, burst=3.0)
    assert [buckets.take("a", now) for now in (10.0, 0.0, 0.0, 0.0)] == [True, True, True, False]


# --- the real network ---


@pytest.mark.slow
async def test_over_libp2p_on_localhost() -> None:
    """Three hosts in a row: adverts and summaries pass the middle one, a newcomer is told at once, a goodbye comes."""
    from p2p.host import open_host
    from p2p.host_config import HostConfig

    host_config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), topics=frozenset({TOPIC, summary_topic("main")}))
    with trio.fail_after(60):
        async with AsyncExitStack() as stack:
            nursery = await stack.enter_async_context(trio.open_nursery())
            services: list[GossipService] = []
            transports: list[Transport] = []
            identities = [Identity.make() for _ in range(3)]
            for identity in identities:
                transport = await stack.enter_async_context(open_host(identity, host_config))
                service = GossipService(transport, identity, config(), random.Random(1))
                await nursery.start(service.run)
                services.append(service)
                transports.append(transport)
            stack.callback(nursery.cancel_scope.cancel)
            first, last = services[0], services[2]

            def seen_by_last() -> set[PeerId]:
                return {offer.peer for offer in last.directory.offers(trio.current_time())}

            await transports[1].dial(transports[0].addresses()[0])
            first.offer(CAPACITY)
            services[1].offer(CAPACITY)
            await until(lambda: len(services[1].directory.offers(trio.current_time())) == 1, 20)
            await transports[2].dial(transports[1].addresses()[0])
            await until(lambda: seen_by_last() == {transports[0].peer_id, transports[1].peer_id}, 20)
            told = {"network": "main", "sequence": 1, "time_ms": wall_clock_ms()}
            raw = seal_summary(identities[0], SelfSummary(busy=0.5), **told)  # type: ignore[arg-type]  # each its own
            await transports[0].publish(summary_topic("main"), raw)
            claims = last.self_topic.claims
            await until(lambda: claims.claim_of(transports[0].peer_id, trio.current_time()) is not None, 20)
            await first.withdraw()
            await until(lambda: seen_by_last() == {transports[1].peer_id}, 20)
            assert {count for service in services for count in service.statistics().standing.faults.values()} == {0}
