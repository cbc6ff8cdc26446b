"""model/scheduler.py: every request ends once and right, in its turn, within bounds, over drawn histories."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.chunk_pace import RESTS, ChunkPace
from model.errors import BadInput, EngineFull
from model.fair_share import ABSENT_MAX, Account, FairShare
from model.scheduler import Scheduler
from model.step import Outcome, Priority, SchedulerConfig, Step
from tests.scheduler_world import Asked, World, dear, seconds

OWN, PEER, STRANGER = Priority

SMALL = SchedulerConfig(
    slots=3, blocks=8, block_tokens=4, step_tokens=9, chunk_min=2, queue_max=5, requester_queue_max=3, age_steps=20
)
configs = st.builds(
    SchedulerConfig,
    slots=st.integers(1, 4),
    blocks=st.integers(6, 14),
    block_tokens=st.integers(1, 4),
    step_tokens=st.integers(8, 16),
    chunk_min=st.integers(1, 4),
    queue_max=st.integers(0, 6),
    requester_queue_max=st.integers(0, 4),
    age_steps=st.integers(1, 40),
)


rngs = st.integers(0, 1 << 32).map(random.Random)  # richer histories than hypothesis draws itself


def drawn_prompt(rng: random.Random, tokens_max: int) -> list[int]:
    """Texts that often begin alike."""
    system = [[1] * 8, [1, 1, 1, 1, 2, 2, 2, 2], []][rng.randrange(3)]
    return (system + [rng.randrange(3) for _ in range(rng.randint(1, 8))])[: max(1, tokens_max)]


def act(world: World, rng: random.Random) -> None:
    """One drawn event."""
    kind = rng.random()
    alive = [asked for asked in world.asked.values() if asked.ended is None]
    if kind < 0.35:
        room = world.config.blocks * world.config.block_tokens
        world.offer(
            drawn_prompt(rng, room // 2),
            rng.randint(1, max(1, room // 2)),
            requester=rng.choice("abc"),
            priority=rng.choice(list(Priority)),
            shared=rng.choice([None, None, None, 0, 5]),
            stop_after=rng.randint(1, 20),
            fails=rng.random() < 0.1,
        )
    elif kind < 0.42 and alive:
        world.cancel(rng.choice(alive))
    elif kind < 0.44:
        world.forget()
    else:

        def leaves(step: Step) -> Asked | None:
            there = [asked for asked in alive if asked.ended is None]
            return rng.choice(there) if there and rng.random() < 0.05 else None

        world.step(leaves)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(config=configs, rng=rngs, events=st.integers(40, 120), time=st.sampled_from([seconds, dear]))
def test_every_request_ends_once_and_right(
    config: SchedulerConfig, rng: random.Random, events: int, time: Callable[[int, int], float]
) -> None:
    world = World(config, time)
    for _ in range(events):
        act(world, rng)
    world.run(world.bound())
    world.check_end()
    assert all(asked.ended - asked.came <= world.bound() for asked in world.asked.values() if asked.ended is not None)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(config=configs, rng=rngs, time=st.sampled_from([lambda decodes, prefilled: 0.0, dear]))
def test_nobody_starves_while_others_never_stop_asking(
    config: SchedulerConfig, rng: random.Random, time: Callable[[int, int], float]
) -> None:
    """A stranger's request and, as fast as the queue takes them, those of others who go before it."""
    world = World(config, time)
    room = config.blocks * config.block_tokens
    for _ in range(rng.randint(0, 5)):
        act(world, rng)
    asked = world.offer(drawn_prompt(rng, room // 2), room // 2, requester="patient", priority=STRANGER)
    if asked is None:
        return
    limit = world.bound()
    for _ in range(limit):
        for _ in range(3):
            own = rng.random() < 0.8
            world.offer(
                drawn_prompt(rng, room // 2),
                rng.randint(1, room // 2),
                rng.choice("abcdefgh"),
                OWN if own else STRANGER,
            )
        world.step()
        if asked.ended is not None:
            break
    assert asked.ended is not None, f"a stranger's request did not end within {limit} steps"


def flood(world: World, steps: int, priority: Priority = OWN, requester: str = "flood") -> None:
    """So many steps, while somebody keeps the queue as full as it gets."""
    for _ in range(steps):
        while world.offer([3, 3], 3, requester=requester, priority=priority) is not None:
            pass
        world.step()


def test_the_promised_steps_are_about_right_for_one_waiting() -> None:
    """What a flood of own requests costs a stranger: its age, those that run, and itself."""
    world = World(SMALL)
    flood(world, 3)
    asked = world.ask([1] * 8, 4, requester="patient", priority=STRANGER)
    flood(world, SMALL.age_steps)
    assert asked.reader is None, "classes go in order until it is overdue"
    flood(world, 40)
    assert asked.ended is not None
    assert asked.ended - asked.came <= SMALL.age_steps + 2 * (4 + 8)


def test_a_prompt_gets_on_although_better_classes_have_prompts_in_every_step() -> None:
    config = SchedulerConfig(
        slots=3, blocks=64, block_tokens=4, step_tokens=8, chunk_min=2, queue_max=5, age_steps=20
    )  # fmt: skip
    world = World(config)
    patient = world.ask([1] * 20, 4, requester="patient", priority=STRANGER)
    for k in range(200):
        world.offer([2, 3] * 15 + [k % 7, k % 5], 1, requester=str(k), shared=0)
        world.step()
        assert patient.reader is not None, "it has a slot from the start"
        if k < config.age_steps:
            assert patient.reader.computed == 0
        if patient.ended is not None:
            break
    assert patient.ended is not None
    assert patient.ended <= config.age_steps + 20 // config.chunk_min + 4 + 1


def test_overdue_requests_leave_the_others_a_rest() -> None:
    """A queue of overdue strangers does not turn the classes round: one at a time, and then age_steps by class."""
    world = World(SMALL)
    # three run at once, three may wait
    waiting = [world.ask([1, k], 4, requester=f"s{k}", priority=STRANGER) for k in range(6)]
    world.step()
    flood(world, 12 * SMALL.age_steps)
    ends = sorted(asked.ended for asked in waiting[3:] if asked.ended is not None)
    assert len(ends) == 3
    assert all(later - earlier >= SMALL.age_steps for earlier, later in pairwise(ends))
    own = [asked for asked in world.asked.values() if asked.priority is OWN and asked.ended is not None]
    assert len(own) > 12 * SMALL.age_steps // 3


def test_no_rest_is_due_after_one_that_ran_anyway() -> None:
    world = World(SchedulerConfig(slots=1, queue_max=8, age_steps=20))
    long = world.ask([1], 50)
    world.step()
    patient = world.ask([2], 4, requester="patient", priority=STRANGER)
    flood(world, 60)
    assert long.ended == 50
    assert patient.ended == 54


def test_classes_go_in_order() -> None:
    world = World(SchedulerConfig(slots=1, queue_max=8))
    world.ask([1], 3)
    world.step()
    asked = [
        world.ask([1, 2], 2, requester=priority.name, priority=priority)
        for priority in (STRANGER, PEER, OWN, STRANGER, OWN)
    ]
    world.run(100)
    ended = sorted(range(5), key=lambda at: asked[at].ended or 0)
    assert ended == [2, 4, 1, 0, 3]


def test_within_a_class_the_least_served_requester_is_next_and_its_own_in_order() -> None:
    world = World(SchedulerConfig(slots=1, queue_max=16))
    greedy = [world.ask([1, k], 10, requester="greedy") for k in range(4)]
    modest = [world.ask([2, k], 10, requester="modest") for k in range(2)]
    world.run(200)
    ends = {asked.name: asked.ended for asked in (*greedy, *modest)}
    order = sorted(ends, key=lambda name: ends[name] or 0)
    assert order == ["r0", "r4", "r1", "r5", "r2", "r3"]


def test_free_slots_do_not_all_go_to_one_requester() -> None:
    world = World(SchedulerConfig(slots=2, queue_max=16))
    for k in range(3):
        world.ask([1, k], 5, requester="greedy")
    other = world.ask([2], 5, requester="other")
    step = world.step()
    assert [admitted.request_id for admitted in step.admitted] == ["r0", other.name]


@pytest.mark.slow
def test_shares_are_even_over_time() -> None:
    """Of two who ask without end, one for long answers and one for short ones, each is served half."""
    world = World(SchedulerConfig(slots=1, queue_max=16))
    for _ in range(1_500):
        for requester, max_tokens in (("long", 40), ("short", 4)):
            if sum(a.ended is None and a.requester == requester for a in world.asked.values()) < 2:
                world.ask([1, 2, 3], max_tokens, requester=requester)
        world.step()
    tokens = {
        requester: sum(len(a.said) for a in world.asked.values() if a.requester == requester)
        for requester in ("long", "short")
    }
    assert 0.6 < tokens["short"] / tokens["long"] < 1.1  # prompts count too, and the short ones have more of them


def test_absence_earns_nothing_and_debts_are_bounded() -> None:
    shares = FairShare()
    busy, late = Account(OWN, "busy"), Account(OWN, "late")
    shares.join(busy)
    shares.serve(busy, 500)
    shares.join(late)
    assert shares.served(late) == shares.served(busy) == 500
    shares.serve(late, 100)
    shares.leave(late)
    shares.join(late)
    assert shares.served(late) == 600, "leaving and coming back does not wipe out what was served"
    shares.leave(late)
    shares.leave(busy)
    assert shares.served(busy) == shares.served(late) == 600, "when nobody is left all start level"
    for k in range(2 * ABSENT_MAX):
        account = Account(STRANGER, str(k))
        shares.join(account)
        shares.leave(account)
    assert len(shares._absent) == ABSENT_MAX


def test_a_long_prompt_at_most_doubles_the_time_between_tokens() -> None:
    config = SchedulerConfig(slots=4, blocks=256, step_tokens=260)
    world = World(config, seconds)
    decoding = [world.ask([k] * 20, 400, requester=str(k)) for k in range(3)]
    for _ in range(30):
        world.step()
    alone_s = world.times[-1]
    assert world.time(3, 0) == alone_s
    long = world.ask([5] * 2_000, 4, requester="long")
    begin = len(world.times)
    while not long.said:
        step = world.step()
        assert {span.request_id for span in step.decodes} == {asked.name for asked in decoding}
        assert all(span.end - span.begin > 32 or span.samples for span in step.chunks), "few large chunks"
    gaps = world.times[begin:]
    assert sum(gaps) <= 2.1 * alone_s * len(gaps)
    assert max(gaps) <= 4.0 * alone_s
    assert len(gaps) <= 2_000 / (0.9 * alone_s / 0.0005), "and the prompt is not slower than that allows"


def test_an_engine_with_nothing_else_to_do_takes_whole_chunks() -> None:
    world = World(SchedulerConfig(slots=2, step_tokens=256), seconds)
    world.ask([1] * 1_000, 1)
    assert [world.step().chunks[0].end for _ in range(4)] == [256, 512, 768, 1_000]


def test_a_prompt_of_one_step_does_not_wait_until_decodes_have_caught_up() -> None:
    world = World(SchedulerConfig(slots=8, blocks=256, step_tokens=260), seconds)
    for k in range(3):
        world.ask([k] * 20, 400, requester=str(k))
    for _ in range(30):
        world.step()
    world.ask([5] * 2_000, 4, requester="long")
    while not world.step().chunks:
        pass
    assert not world.step().chunks, "a rest"
    short = world.ask([6] * 20, 4, requester="short")
    assert [span.request_id for span in world.step().chunks] == [short.name]
    assert short.said


def decoding(world: World, count: int, priority: Priority = OWN) -> list[Asked]:
    """So many who decode on, with their times known."""
    asked = [world.ask([k] * 20, 400, requester=str(k), priority=priority) for k in range(count)]
    for _ in range(30):
        world.step()
    return asked


def crowded(slots: int = 8) -> World:
    """One where a pass of one decode and one of four have been measured, and decodes are dear."""
    world = World(SchedulerConfig(slots=slots, blocks=256, step_tokens=260), dear)
    world.ask([9] * 20, 10)
    world.run(20)
    return world


def test_a_prompt_has_a_step_of_its_own_where_many_decode() -> None:
    world = crowded()
    others = decoding(world, 4)
    short = world.ask([5] * 40, 4, requester="short")
    step = world.step()
    assert step.decodes == ()
    assert [span.request_id for span in step.chunks] == [short.name]
    assert short.said
    assert world.times[-1] == dear(0, 40)
    assert {span.request_id for span in world.step().decodes} == {asked.name for asked in (*others, short)}


def test_a_prompt_goes_beside_decodes_that_hardly_cost_more_than_one() -> None:
    world = World(SchedulerConfig(slots=8, blocks=256, step_tokens=260), seconds)
    world.ask([9] * 20, 10)
    world.run(20)
    decoding(world, 4)
    world.ask([5] * 40, 4, requester="short")
    step = world.step()
    assert (len(step.decodes), len(step.chunks)) == (4, 1)


def test_with_a_queue_a_prompt_goes_beside_the_decodes() -> None:
    """What every pass costs is then paid once: tokens a second count for all who wait."""
    world = crowded(slots=5)
    decoding(world, 4)
    for k in range(2):
        world.ask([5 + k] * 40, 4, requester=f"short {k}")
    step = world.step()
    assert (len(step.decodes), len(step.chunks)) == (4, 1)


def test_a_prompt_is_not_put_before_decodes_of_a_better_class() -> None:
    for priority, is_before in ((PEER, True), (OWN, True), (STRANGER, False)):
        world = crowded()
        decoding(world, 4, PEER)
        world.ask([5] * 40, 4, requester="short", priority=priority)
        assert (world.step().decodes == ()) == is_before


def test_an_overdue_request_is_not_passed_over() -> None:
    world = World(SchedulerConfig(slots=8, blocks=256, step_tokens=260, age_steps=40), dear)
    world.ask([9] * 20, 10)
    world.run(20)
    decoding(world, 4)
    for _ in range(20):
        world.step()
    world.ask([5] * 40, 4, requester="short")
    assert len(world.step().decodes) == 4


def test_short_prompts_that_never_stop_at_most_double_the_time_between_tokens() -> None:
    """And a prompt of 2,000 tokens that comes in between them gets on."""
    world = crowded()
    others = decoding(world, 4)
    alone_s = world.times[-1]
    long = world.ask([5] * 2_000, 4, requester="long")
    gaps, gap_s = list[float](), 0.0
    while not long.said:
        if world.now % 4 == 0:
            world.offer([world.now % 7, world.now % 5, 3] * 20, 1, requester=str(world.now), shared=0)
        step = world.step()
        gap_s += world.times[-1]
        if step.decodes:
            assert {asked.name for asked in others} <= {span.request_id for span in step.decodes}
            gaps.append(gap_s)
            gap_s = 0.0
    assert world.passed_over >= 3
    assert sum(gaps) <= 2.1 * alone_s * len(gaps)
    assert max(gaps) <= 4.0 * alone_s
    assert len(gaps) < 60, "and it gets on"


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    world = World(SchedulerConfig(slots=3, step_tokens=64), seconds)
    world.ask([1] * 2_000, 1, requester="long")
    world.step()
    short = world.ask([2] * 40, 1, requester="short")
    world.step()
    world.step()
    assert short.ended is not None


@example(steps=[(4, 0, 0.01), (0, 1, 100.0)], decodes=4)  # a prompt's token costs more than all decodes
@example(steps=[(4, 0, 1.0), (4, 1, 0.5)], decodes=4)  # and nothing at all
@given(
    steps=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 300), st.floats(0.0, 1e6)), max_size=30),
    decodes=st.integers(0, 8),
)
def test_a_chunk_is_bounded_whatever_was_measured(steps: list[tuple[int, int, float]], decodes: int) -> None:
    pace = ChunkPace(16, 256)
    for step in steps:
        pace.note(*step)
    chunks = [pace.chunk(decodes) for _ in range(RESTS + 1)]
    assert all(16 <= chunk <= 256 or (decodes and chunk == 0) for chunk in chunks)
    assert max(chunks) > 0
    assert 0 <= pace.at_once(decodes) <= 256
    assert 0 <= pace.alone(decodes) <= 256


def test_a_crowd_that_comes_while_nothing_decodes_soon_decodes_together() -> None:
    pace = ChunkPace(16, 256)
    taken = [pace.chunk(0)]
    pace.note(0, 256, 0.256)
    pace.note(4, 0, 0.010)
    assert pace.chunk(4) == 30, "a step without a prompt ends it"
    pace.chunk(0)
    for decodes in (0, 4, 8, 12, 16, 16):
        taken.append(pace.chunk(decodes))
        pace.note(decodes, taken[-1], 0.3)
    assert taken == [256, 256, 256, 256, 256, 27, 0], "and then they are held back"


def measured() -> ChunkPace:
    """One decode takes 10 ms, eight take 20 and a prompt's token half a one."""
    pace = ChunkPace(16, 256)
    pace.note(0, 100, 0.050)
    pace.note(1, 0, 0.010)
    pace.note(8, 0, 0.020)
    return pace


def test_prompts_have_a_step_of_their_own_by_what_was_measured() -> None:
    assert 99 <= measured().alone(8) <= 100, "with what a pass costs, three times what the decodes take"
    assert measured().alone(1) == 0, "one decode costs no more than a pass"
    assert measured().alone(0) == 0
    assert ChunkPace(16, 256).alone(8) == 0


def test_decodes_are_not_passed_over_twice_and_what_it_took_counts() -> None:
    pace = measured()
    assert pace.at_once(8) == 120
    pace.note(0, 1, 0.001, passed_over=8)
    assert pace.alone(8) == 0
    pace = measured()
    pace.note(0, 90, 0.045, passed_over=8)
    assert pace.at_once(8) == 30, "of the 60 ms that they may wait, 45 are spent"
    assert pace.chunk(8) == 0, "and they have waited more than twice their time"
    pace.note(8, 0, 0.020)
    assert pace.alone(8) == 0, "they are still behind"
    pace.note(8, 0, 0.020)
    assert pace.alone(8) > 0


def test_a_crowd_that_comes_at_once_is_not_passed_over() -> None:
    pace = measured()
    pace.chunk(0)
    assert pace.alone(8) == 0


def test_a_step_without_a_prompt_is_measured_first() -> None:
    """Who comes into a crowd that an engine begins with waits one step, and not for chunk after chunk_min."""
    pace = ChunkPace(16, 256)
    pace.note(0, 100, 0.100)
    assert (pace.chunk(4), pace.at_once(4)) == (0, 0)
    pace.note(4, 0, 0.020)
    assert pace.chunk(4) == 60


def test_an_engine_that_does_not_measure_is_taken_to_be_slow() -> None:
    pace = ChunkPace(16, 256)
    assert [pace.chunk(4) for _ in range(4)] == [0, 16, 0, 16]
    pace.note(0, 100, 0.0)
    pace.note(4, 0, 0.010)
    pace.note(4, 0, 0.0)
    assert pace.chunk(4) == 16


def test_one_slow_step_does_not_set_the_pace() -> None:
    pace = ChunkPace(1, 10_000)
    for _ in range(50):
        pace.note(4, 0, 0.010)
        pace.note(4, 20, 0.020)
    assert 57 <= pace.chunk(4) <= 63
    assert 42 <= pace.chunk(3) <= 48  # of fewer decodes at least their part is known
    pace.note(4, 0, 0.030)
    assert pace.chunk(4) <= 90


def test_room_runs_out_and_all_still_end() -> None:
    """Three whose prompts fit and whose answers do not: the last that came is preempted, goes on where it was."""
    world = World(SMALL)
    asked = [world.ask([k] * 8, 16, requester=str(k)) for k in range(3)]
    while not (gone := world.step().preempted):
        pass
    assert world.scheduler.progress(gone[0]).prefilled_tokens == 0
    world.run(300)
    world.check_end()
    assert world.scheduler.statistics().recomputed > 0
    # and nobody is charged for what is computed a second time
    assert set(world.scheduler._shares._absent.values()) == {8 + 16 - 1}
    assert all(len(item.said) == 16 for item in asked)
    ends = [item.ended for item in asked if item.ended is not None]
    assert ends == sorted(ends)


def test_strangers_are_preempted_before_peers_and_those_before_our_own() -> None:
    config = SchedulerConfig(slots=3, blocks=6, block_tokens=4, step_tokens=64)
    world = World(config)
    stranger = world.ask([1] * 3, 12, requester="s", priority=STRANGER)
    peer = world.ask([2] * 3, 12, requester="p", priority=PEER)
    own = world.ask([3] * 3, 12, requester="o")
    gone: list[str] = []
    for _ in range(60):
        gone += world.step().preempted
    assert gone[0] == stranger.name
    assert own.name not in gone
    assert (own.ended or 0) < (peer.ended or 0) < (stranger.ended or 0)


def test_the_overdue_are_not_preempted() -> None:
    world = World(SchedulerConfig(slots=3, blocks=6, block_tokens=4, step_tokens=64, age_steps=2))
    stranger = world.ask([1] * 3, 12, requester="s", priority=STRANGER)
    world.ask([2] * 3, 12, requester="p")
    world.ask([3] * 3, 12, requester="o")
    gone: list[str] = []
    for _ in range(60):
        gone += world.step().preempted
    assert gone
    assert stranger.name not in gone


def test_the_preempted_wait_at_the_front_of_their_class() -> None:
    world = World(SMALL)
    asked = [world.ask([k] * 8, 16, requester=str(k)) for k in range(3)]
    while not world.preempted:
        world.step()
    late = world.ask([4], 1, requester="never served")
    world.run(300)
    assert all((item.ended or 0) < (late.ended or 0) for item in asked[:2])


def test_who_came_is_not_preempted_at_once() -> None:
    """A block is spare for each that runs: admission does not take what the next decode needs."""
    world = World(SchedulerConfig(slots=2, blocks=4, block_tokens=4, step_tokens=64))
    world.ask([1] * 7, 6)
    world.step()
    world.ask([2] * 8, 2)
    world.run(50)
    assert world.preempted == 0


def test_a_system_prompt_is_computed_once() -> None:
    """Also for those who come in one moment, before it is there."""
    config = SchedulerConfig(slots=8, blocks=64, block_tokens=16, step_tokens=128)
    world = World(config)
    system = [k % 7 for k in range(320)]
    for k in range(8):
        world.ask([*system, k % 7, k % 3], 4, requester=str(k), priority=STRANGER)
    world.run(100)
    figures = world.scheduler.statistics()
    assert figures.prefilled <= 320 + 8 * 2 + 4
    assert figures.reused == 7 * 320
    assert figures.blocks.hits == 7 * 20
    world.ask([*system, 5], 1, priority=STRANGER)
    step = world.step()
    assert step.admitted[0].reused == 320


def test_the_next_turn_of_a_conversation_finds_its_first() -> None:
    world = World(SchedulerConfig(block_tokens=4))
    first = world.ask([1] * 10, 12)
    world.run(100)
    world.ask([*first.prompt, *first.said, 6], 1)
    assert world.step().admitted[0].reused == 20  # 21 tokens had their KV


def test_only_those_of_one_class_share() -> None:
    """How soon a stranger's first token comes says nothing of what this node's users ask."""
    world = World(SchedulerConfig(slots=1, block_tokens=4))
    reused = []
    for priority in (OWN, STRANGER, PEER, OWN, STRANGER):
        before = world.scheduler.statistics().reused
        world.ask([1] * 20, 2, priority=priority)
        world.run(100)
        reused.append(world.scheduler.statistics().reused - before)
    assert reused == [0, 0, 0, 16, 16]


def test_private_requests_share_nothing() -> None:
    world = World(SchedulerConfig(block_tokens=4))
    for shared in (0, 0, None, 0):
        world.ask([1] * 20, 2, shared=shared)
        world.run(100)
    figures = world.scheduler.statistics()
    assert figures.reused == 0
    assert figures.blocks.cached == 5
    assert figures.prefilled == 80


def test_forgotten_weights_serve_nobody() -> None:
    world = World(SchedulerConfig(block_tokens=4))
    world.ask([1] * 20, 2)
    world.run(100)
    world.forget()
    world.ask([1] * 20, 2)
    assert world.step().admitted[0].reused == 0


def test_a_failed_pass_leaves_no_kv() -> None:
    world = World(SchedulerConfig(block_tokens=4))
    world.ask([1] * 20, 2, fails=True, stop_after=1)
    world.run(100)
    assert world.scheduler.statistics().blocks.cached == 0


def test_what_can_never_fit_is_refused_with_its_numbers() -> None:
    scheduler = Scheduler(SMALL)
    with pytest.raises(BadInput, match=r"20 tokens and max_tokens is 14: together they need 33 .* this node has 32"):
        scheduler.add("a", [1] * 20, 14, Account(OWN, "me"))
    scheduler.add("a", [1] * 20, 13, Account(OWN, "me"))
    with pytest.raises(BadInput, match="'a' is already in use"):
        scheduler.add("a", [1], 1, Account(OWN, "me"))
    with pytest.raises(BadInput, match="no tokens"):
        scheduler.add("b", [], 1, Account(OWN, "me"))
    with pytest.raises(BadInput, match="at least 1, not 0"):
        scheduler.add("b", [1], 0, Account(OWN, "me"))


def full_queue(*asks: tuple[Priority, str, int]) -> Scheduler:
    """One that has its three slots taken, and then takes these: class, requester, how many."""
    scheduler = Scheduler(SMALL)
    for k in range(3):
        scheduler.add(f"runs {k}", [1], 4, Account(OWN, f"runner {k}"))
    scheduler.plan()
    for priority, requester, count in asks:
        for k in range(count):
            scheduler.add(f"{priority} {requester} {k}", [1], 4, Account(priority, requester))
    return scheduler


def test_the_queue_is_bounded_and_says_so() -> None:
    scheduler = full_queue((OWN, "a", 3), (OWN, "b", 2))
    with pytest.raises(EngineFull, match="3 requests run and 5 wait; the queue is full at 5, try again later"):
        scheduler.add("c", [1], 4, Account(OWN, "c"))


def test_a_requester_is_bounded_and_told() -> None:
    scheduler = full_queue((PEER, "a", 3))
    with pytest.raises(
        EngineFull, match="3 requests run and 3 wait; with this one 4 of this requester's would wait, which may have 3"
    ):
        scheduler.add("more", [1], 4, Account(PEER, "a"))
    scheduler.add("other", [1], 4, Account(PEER, "b"))


def test_this_nodes_user_may_fill_the_queue() -> None:
    scheduler = full_queue((OWN, "a", 5))
    with pytest.raises(EngineFull, match="the queue is full at 5"):
        scheduler.add("more", [1], 4, Account(OWN, "a"))


def test_strangers_leave_room_in_the_queue() -> None:
    scheduler = full_queue((STRANGER, "a", 2), (STRANGER, "b", 1))
    with pytest.raises(
        EngineFull, match="with this one 4 of class stranger or lower would wait, which may fill 3 of 5"
    ):
        scheduler.add("c", [1], 4, Account(STRANGER, "c"))
    scheduler.add("peer", [1], 4, Account(PEER, "p"))
    with pytest.raises(EngineFull, match="with this one 5 of class peer or lower would wait, which may fill 4 of 5"):
        scheduler.add("peer 2", [1], 4, Account(PEER, "p2"))
    scheduler.add("own", [1], 4, Account(OWN, "o"))


def test_an_idle_engine_without_a_queue_takes_what_it_can_run_at_once() -> None:
    scheduler = Scheduler(SchedulerConfig(slots=2, queue_max=0, requester_queue_max=0))
    scheduler.add("a", [1], 4, Account(STRANGER, "s"))
    scheduler.add("b", [1], 4, Account(STRANGER, "s"))
    with pytest.raises(EngineFull):
        scheduler.add("c", [1], 4, Account(STRANGER, "s"))
    with pytest.raises(EngineFull):
        scheduler.add("c", [1], 4, Account(OWN, "me"))


def test_an_engine_without_a_queue_counts_the_blocks_that_stay_spare() -> None:
    scheduler = Scheduler(SchedulerConfig(slots=2, blocks=4, block_tokens=4, queue_max=0))
    scheduler.add("a", [1] * 7, 4, Account(OWN, "me"))
    scheduler.plan()
    with pytest.raises(EngineFull, match="1 requests run and 0 wait; the queue is full at 0"):
        scheduler.add("b", [2] * 8, 4, Account(OWN, "me"))
    scheduler.add("b", [2] * 4, 4, Account(OWN, "me"))


def test_progress_tells_the_place_in_the_queue_and_what_is_prefilled() -> None:
    scheduler = Scheduler(SchedulerConfig(slots=1, step_tokens=32, queue_max=8))
    scheduler.add("runs", [1] * 100, 4, Account(OWN, "me"))
    scheduler.plan()
    scheduler.took(Outcome())
    scheduler.add("stranger", [1], 4, Account(STRANGER, "s"))
    scheduler.add("own", [1], 4, Account(OWN, "me"))
    assert scheduler.progress("runs") == (0, 32)
    assert scheduler.progress("own") == (1, 0)
    assert scheduler.progress("stranger") == (2, 0)
    scheduler.cancel("own")
    assert scheduler.progress("stranger") == (1, 0)
    with pytest.raises(BadInput, match="no request 'own'"):
        scheduler.progress("own")
    scheduler.cancel("own")


def test_an_id_that_comes_back_during_a_step_is_another_request() -> None:
    scheduler = Scheduler(SchedulerConfig())
    scheduler.add("a", [1, 2], 4, Account(OWN, "me"))
    scheduler.plan()
    scheduler.cancel("a")
    scheduler.add("a", [3, 4, 5], 4, Account(OWN, "me"))
    assert scheduler.took(Outcome(sampled={"a": 9})) == ()
    assert scheduler.plan().chunks == (("a", 0, 3, True),)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"slots": 0}, "slots = 0 came, wanted at least 1"),
        ({"queue_max": -1}, "queue_max = -1 came, wanted 0 or more"),
        ({"slots": 8, "chunk_min": 8, "step_tokens": 15}, r"step_tokens = 15 came, wanted slots \+ chunk_min = 16"),
    ],
)
def test_bad_bounds_are_said(bounds: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**bounds)
