"""The task that looks at the model: when, at what cost, giving way to whom, and what it tells."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from trio.testing import MockClock

from crypto.disk import StateFile
from model.config import ModelFacts, RuntimeConfig
from model.errors import ComputeFailed
from model.load import Found, load
from model.look import held_out_slices
from model.requests import Looked, Openness
from model.runtime import Runtime
from node.averages import binned
from node.consciousness import NATS_MAX, ConsciousnessState
from node.facts import Fact, Generated, HeldOut, Probed
from node.hosting import Hosting
from node.self_looks import (
    FIRST_S,
    LOOK_EVERY_S,
    LOOK_SHARE,
    LOOK_SLICES,
    PIECES,
    PROBE_EVERY_S,
    PROBE_MERGED_S,
    PROBE_SHARE,
    Looks,
)
from node.self_probes import ANSWER_TOKENS, FILE_BYTES_MAX, PROMPTS, TEXTS, decode
from node.self_probing import FILE, SELF
from node.work import Finished
from tests.fake_runtime import TALE, FakeRuntime, Turns, token_at
from tests.node_swarm import work
from tests.tiny_models import save_causal, save_encoder

SLICES = held_out_slices()
QUICK = {"step_s": 0.001, "embed_s": 0.001, "look_s": 0.001}  # so that nothing has to be waited for


@dataclass
class World:
    """A hosted model, and what its looks told."""

    hosting: Hosting
    looks: Looks
    runtime: Any
    told: list[Fact] = field(default_factory=list)
    merges: int = 0

    def of(self, kind: type[Fact]) -> list[Any]:
        return [fact for fact in self.told if isinstance(fact, kind)]


async def here(turn: Callable[[], Any]) -> Any:
    """A hop with no thread: time stands still in it."""
    await trio.lowlevel.checkpoint()
    return turn()


@asynccontextmanager
async def world(folder: Path, runtime: Any = None, *, looks: int = 0, **changes: object) -> AsyncIterator[World]:
    """Everything runs within; at its end all is cancelled. changes: of the fake runtime, if no other one is given."""
    if runtime is None:
        runtime = FakeRuntime(**{**QUICK, **changes})  # type: ignore[arg-type]  # a test's own fields
    is_fake = isinstance(runtime, FakeRuntime)
    hosting = Hosting(runtime, peer="me", on_change=lambda: None, hop=Turns(runtime) if is_fake else here)
    made: list[World] = []

    def cpu_s() -> float:  # a turn of the fake takes Trio's time when it is over
        return trio.current_time() + (runtime.takes_s if is_fake else 0.0)

    def tell(fact: Fact) -> None:
        made[0].told.append(fact)

    def state() -> ConsciousnessState:
        before = ConsciousnessState()
        learning, surprise = replace(before.learning, merges=made[0].merges), replace(before.surprise, looks=looks)
        return replace(before, learning=learning, surprise=surprise)

    task = Looks(hosting, tell, folder, state=state, cpu_s=cpu_s, off_loop=here)
    made.append(World(hosting, task, runtime))
    async with trio.open_nursery() as nursery:
        await nursery.start(hosting.run)
        await nursery.start(task.run)
        yield made[0]
        nursery.cancel_scope.cancel()


async def until(is_so: Callable[[], bool]) -> None:
    for _ in range(100_000):
        if is_so():
            return
        await trio.sleep(0.1)
    raise AssertionError("it never is")


# --- held-out text ---


async def test_looks_come_at_intervals_and_slices_in_order(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, **QUICK) as at:
        await trio.sleep(FIRST_S - 1)
        assert not at.told
        await trio.sleep(2)
        assert len(at.of(HeldOut)) == 1
        await trio.sleep(3 * LOOK_EVERY_S + 1)
        assert len(at.of(HeldOut)) == 4
        texts = [text for text, _ in at.runtime.looks]
        assert texts == list(SLICES[: 4 * LOOK_SLICES])
        first = SLICES[:LOOK_SLICES]
        judged = [(0.75, True), (0.75, False)] * LOOK_SLICES
        assert at.of(HeldOut)[0] == HeldOut(nll_nats=sum(map(len, first)) / len(judged), bins=binned(judged))
        told = at.looks.statistics()
        assert (told.looks, told.look_tokens, told.failures) == (4, 4 * len(judged), {})


async def test_a_start_goes_on_behind_the_looks_before_and_wraps_around(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    rounds = len(SLICES) // LOOK_SLICES
    async with world(tmp_path, looks=rounds - 1) as at:
        await trio.sleep(FIRST_S + 2 * LOOK_EVERY_S + 2)
        texts = [text for text, _ in at.runtime.looks]
        begin = (rounds - 1) * LOOK_SLICES
        assert texts == [SLICES[place % len(SLICES)] for place in range(begin, begin + 3 * LOOK_SLICES)]
        assert SLICES[0] in texts


async def test_the_same_twice_is_the_same_to_the_bit(tmp_path: Path, autojump_clock: MockClock) -> None:
    told = []
    for run in range(2):
        async with world(tmp_path / str(run)) as at:
            await trio.sleep(FIRST_S + 5 * LOOK_EVERY_S + 2)
            told.append(at.told)
    assert told[0] == told[1]
    assert len(told[0]) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("look_s", [0.001, 0.05, 1.0, 20.0])
async def test_looks_cost_no_more_than_their_share(look_s: float, tmp_path: Path, autojump_clock: MockClock) -> None:
    """By their own measure, at every moment, one look ahead; on a slow model they become rare and do not end."""
    async with world(tmp_path, look_s=look_s) as at:
        began = trio.current_time()
        a_look_s = look_s * 2 * LOOK_SLICES
        for _ in range(200):
            await trio.sleep(max(LOOK_EVERY_S, a_look_s / LOOK_SHARE / 10))
            told, passed_s = at.looks.statistics(), trio.current_time() - began
            assert told.look_cpu_s <= LOOK_SHARE * passed_s + a_look_s + 1e-6
            assert told.look_cpu_s == pytest.approx(a_look_s * len(at.runtime.looks) / LOOK_SLICES, abs=a_look_s)
        wanted = min(passed_s / LOOK_EVERY_S, LOOK_SHARE * passed_s / a_look_s)
        assert 0.9 * wanted <= told.looks <= 1.1 * wanted + 1


async def test_passes_are_made_short(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, look_s=1.0) as at:
        await trio.sleep(2 * FIRST_S)
        assert [piece for _, piece in at.runtime.looks] == list(PIECES)
        at.runtime.look_s = 0.001
        await trio.sleep(10_000)
        pieces = [piece for _, piece in at.runtime.looks[len(PIECES) :]]
        assert pieces[:5] == [8, 16, 32, 64, 64]
        assert at.looks.statistics().piece_tokens == 64
        assert at.looks.statistics().pass_cpu_s_max == 1.0


async def test_no_look_while_a_request_is_here(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, slots=1, step_s=1.0) as at:
        await trio.sleep(1)
        async with at.hosting.generate(work("hello", 300)) as items:
            await trio.sleep(200)
            assert not at.runtime.looks
            assert not at.told
            assert at.runtime.added[0].prompt == tuple(map(ord, "hello"))
            assert len(at.runtime.added) == 1, "no probe either"
            async for _ in items:
                pass
        assert at.looks.statistics().probe_cpu_s == 0.0, "waiting costs nothing"
        await trio.sleep(LOOK_EVERY_S * 2)
        assert len(at.of(HeldOut)) == 1


async def test_a_client_waits_for_one_pass_at_most(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, look_s=0.4, look_passes=20) as at:
        await until(lambda: len(at.runtime.looks) >= 2)
        began = trio.current_time()
        async with at.hosting.generate(work("hello", 3)) as items:
            looks = len(at.runtime.looks)
            async for _ in items:
                pass
        assert trio.current_time() - began <= 0.4 + 4 * 0.001 + 1e-6
        assert len(at.runtime.looks) == looks
        await trio.sleep(100)
        assert len(at.of(HeldOut)) == 1, "and then the look went on where it was"


async def test_weights_that_change_meanwhile_are_not_mixed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, look_s=1.0) as at:
        await until(lambda: len(at.runtime.looks) >= 3)
        await at.hosting.switch({}, "r2")
        await until(lambda: at.looks.statistics().looks_left == 1)
        assert not at.of(HeldOut)
        await trio.sleep(3 * LOOK_EVERY_S / LOOK_SHARE)
        assert at.of(HeldOut)


async def test_weights_that_change_between_two_slices_are_not_mixed(tmp_path: Path, autojump_clock: MockClock) -> None:
    class GoesOn(FakeRuntime):
        def looking(self, text: str, piece: int) -> Generator[None, None, Looked | None]:
            if len(self.looks) == LOOK_SLICES - 1:
                self.facts = self.facts.at("r2")
            return super().looking(text, piece)

    async with world(tmp_path, GoesOn(**QUICK)) as at:
        await trio.sleep(FIRST_S + 5)
        assert at.looks.statistics().looks_left == 1
        assert not at.of(HeldOut)
        await trio.sleep(LOOK_EVERY_S + 5)
        assert len(at.of(HeldOut)) == 1


async def test_a_failure_is_counted_said_once_and_the_next_slices_come(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, look_error=ComputeFailed("not finite")) as at:
        with caplog.at_level(logging.WARNING):
            await trio.sleep(FIRST_S + 3 * LOOK_EVERY_S + 2)
        assert at.looks.statistics().failures == {"ComputeFailed": 4}
        assert not at.of(HeldOut)
        assert [text for text, _ in at.runtime.looks] == list(SLICES[: 4 * LOOK_SLICES : LOOK_SLICES])
        assert sum("not finite" in line.message for line in caplog.records) == 1
        assert at.looks.statistics().look_cpu_s > 0.0, "what fails is paid for, too"
        at.runtime.look_error = None
        await trio.sleep(LOOK_EVERY_S + 1)
        assert len(at.of(HeldOut)) == 1


async def test_weights_that_are_broken_end_no_node(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, look_nats=1e9) as at:
        await trio.sleep(FIRST_S + 1)
        assert at.of(HeldOut)[0].nll_nats == NATS_MAX


async def test_cancelled_it_leaves_nothing_in_the_engine(tmp_path: Path, autojump_clock: MockClock) -> None:
    for wait_s in (FIRST_S + 0.5, FIRST_S + 5.0, FIRST_S + 20.0):
        async with world(tmp_path, step_s=0.3, look_s=0.3) as at:
            await trio.sleep(wait_s)
        assert at.hosting.requests_running == 0


async def test_an_encoder_is_not_asked_for_text(tmp_path: Path, autojump_clock: MockClock) -> None:
    encoder = replace(TALE, kind="encoder")
    for run in range(2):
        async with world(tmp_path, facts=encoder) as at:
            await trio.sleep(10 * LOOK_EVERY_S)
            assert (at.runtime.looks, at.runtime.added) == ([], [])
            assert at.looks.statistics().look_due_s == math.inf
            wanted = [] if run == 0 else [Probed(rounds=0, answers=None, embeddings=1.0)]
            assert at.told == wanted


async def test_a_model_that_does_not_embed_is_not_asked_for_vectors(tmp_path: Path, autojump_clock: MockClock) -> None:
    for run in range(2):
        async with world(tmp_path, facts=replace(TALE, embeds=False)) as at:
            await trio.sleep(FIRST_S + 5)
            assert at.runtime.embedded == []
            assert at.of(Probed) == ([] if run == 0 else [Probed(rounds=0, answers=1.0, embeddings=None)])


# --- probes ---


async def test_the_first_round_is_kept_and_asked_again_after_a_restart(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as at:
        await trio.sleep(FIRST_S + 5)
        told = at.looks.statistics()
        assert (told.probes_stored, told.probes, at.of(Probed)) == (1, 0, [])
        for request, prompt in zip(at.runtime.added, PROMPTS, strict=True):
            assert request.prompt == at.runtime.encode(prompt)
            assert (request.private, request.sampling.temperature) == (True, 0.0)
            assert (request.requester, request.priority) == (SELF.name, SELF.priority)
            assert request.sampling.max_tokens == ANSWER_TOKENS
    file = StateFile(tmp_path / FILE, kind="self_probes", version=1, bytes_max=FILE_BYTES_MAX)
    kept = file.read(decode)
    assert kept is not None
    (first,) = kept._rounds.values()
    prompts = [at.runtime.encode(prompt) for prompt in PROMPTS]
    assert first.answers == tuple(tuple(token_at(ids, n) for n in range(ANSWER_TOKENS)) for ids in prompts)
    assert first.revision == "r1"
    for _ in range(2):
        async with world(tmp_path) as at:
            await trio.sleep(FIRST_S + 5)
            assert at.of(Probed) == [Probed(rounds=0, answers=1.0, embeddings=1.0)]


@pytest.mark.slow
async def test_probes_are_asked_every_some_hours_and_soon_after_a_merge(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as at:
        await trio.sleep(PROBE_EVERY_S)
        assert at.of(Probed) == []
        await trio.sleep(LOOK_EVERY_S + FIRST_S)
        assert len(at.of(Probed)) == 1
        at.merges = 3
        await at.hosting.switch({}, "r2")
        await trio.sleep(PROBE_MERGED_S - 2 * LOOK_EVERY_S)
        assert len(at.of(Probed)) == 1, "not sooner after the last"
        await trio.sleep(3 * LOOK_EVERY_S)
        assert at.of(Probed)[1] == Probed(rounds=3, answers=1.0, embeddings=1.0)
        await trio.sleep(2 * PROBE_MERGED_S)
        assert len(at.of(Probed)) == 2, "the same weights are not asked again so soon"


@pytest.mark.slow
async def test_probes_cost_no_more_than_their_share(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, step_s=1.0, look_s=0.001) as at:
        began, a_round_s = trio.current_time(), 80.0
        for n in range(200):
            await at.hosting.switch({}, f"r{n}")
            await trio.sleep(PROBE_MERGED_S)  # what is due sooner waits for what is paid
            told = at.looks.statistics()
            assert told.probe_cpu_s <= PROBE_SHARE * (trio.current_time() - began) + a_round_s
        assert told.probes >= 2
        assert told.probe_cpu_s > 0.5 * PROBE_SHARE * (trio.current_time() - began)


async def test_a_probe_gives_way_to_a_client_and_goes_on_later(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, slots=1, step_s=0.5) as at:
        await until(lambda: len(at.runtime.added) >= 2)
        await trio.sleep(1.0)  # in the middle of the second answer
        began = trio.current_time()
        async with at.hosting.generate(work("hello", 4)) as items:
            got = [item async for item in items]
        assert isinstance(got[-1], Finished)
        assert trio.current_time() - began <= 0.5 * (1 + 1 + 4) + 1e-6, "a step, its end, and the answer's own"
        assert at.looks.statistics().probes_left == 1
        await trio.sleep(20_000)
        assert at.looks.statistics().probes_stored == 1
        asked = [request.prompt for request in at.runtime.added]
        prompts = [at.runtime.encode(prompt) for prompt in PROMPTS]
        assert asked == [*prompts[:2], at.runtime.encode("hello"), *prompts[1:]], "what was answered stands"
    async with world(tmp_path) as at:
        await trio.sleep(FIRST_S + 5)
        assert at.of(Probed) == [Probed(rounds=0, answers=1.0, embeddings=1.0)]


@pytest.mark.parametrize("answers", range(1, len(PROMPTS) + 1))
async def test_answers_of_two_revisions_are_not_mixed(answers: int, tmp_path: Path, autojump_clock: MockClock) -> None:
    """Nor are vectors of one with answers of another."""
    async with world(tmp_path, step_s=0.5) as at:
        await until(lambda: len(at.runtime.added) >= answers)
        await at.hosting.switch({}, "r2")
        await trio.sleep(20_000)
        assert at.looks.statistics().probes_stored == 1
        prompts = [at.runtime.encode(prompt) for prompt in PROMPTS]
        assert [request.prompt for request in at.runtime.added][-4:] == prompts, "all of them by r2"
        (first,) = at.looks._probing._kept._rounds.values()
        assert first.revision == "r2"


async def test_nothing_is_asked_of_a_node_that_stops(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, step_s=0.5) as at:
        await trio.sleep(FIRST_S + 3)
        assert at.hosting.requests_running == 1
        at.hosting.draining = True
        with trio.fail_after(2.0):
            await at.hosting.wait_idle()
        asked = len(at.runtime.added)
        await trio.sleep(1000)
        assert (len(at.runtime.added), at.runtime.looks) == (asked, [])


@pytest.mark.slow
async def test_probes_are_not_kept_as_answers(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as at:
        await trio.sleep(PROBE_EVERY_S + FIRST_S + 2 * LOOK_EVERY_S)
        assert len(at.runtime.added) == 2 * len(PROMPTS), "asked anew of the model"
        assert sum(at.runtime.embedded) == 2 * len(TEXTS)
        assert at.hosting.answers.cache.statistics().entries == 0


# --- the file ---


@pytest.mark.parametrize("damage", ["flipped", "cut", "newer", "other"])
async def test_a_file_that_cannot_be_read_is_moved_aside_and_said(
    damage: str, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path) as at:
        await trio.sleep(FIRST_S + 5)
    path = tmp_path / FILE
    content = path.read_bytes()
    match damage:
        case "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        case "cut":
            content = content[: len(content) // 2]
        case "newer":
            StateFile(path, kind="self_probes", version=2, bytes_max=FILE_BYTES_MAX).write(b"of tomorrow")
            content = path.read_bytes()
        case "other":
            StateFile(path, kind="self_probes", version=1, bytes_max=FILE_BYTES_MAX).write(b"\xc1")
            content = path.read_bytes()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        async with world(tmp_path) as at:
            await trio.sleep(FIRST_S + 5)
            told = at.looks.statistics()
            assert (told.probes_stored, at.of(Probed)) == (1, []), "a first round, since nothing can be compared"
            assert "moved aside" in at.looks.file().set_aside
    assert "moved aside" in caplog.text
    assert (tmp_path / f"{FILE}.corrupt-1").read_bytes() == content
    async with world(tmp_path) as at:
        await trio.sleep(FIRST_S + 5)
        assert at.of(Probed) == [Probed(rounds=0, answers=1.0, embeddings=1.0)]


@pytest.mark.slow
async def test_each_model_has_a_first_round_of_its_own(tmp_path: Path, autojump_clock: MockClock) -> None:
    async def told(facts: ModelFacts) -> list[Any]:
        async with world(tmp_path, facts=facts) as at:
            await trio.sleep(FIRST_S + 5)
            return at.of(Probed)

    again = [Probed(rounds=0, answers=1.0, embeddings=1.0)]
    assert await told(TALE) == []
    assert await told(replace(TALE, name="other")) == []
    assert await told(TALE.quantized("int8")) == []
    assert await told(TALE) == again
    assert await told(replace(TALE, name="other")) == again
    assert await told(TALE.quantized("int8")) == again


@pytest.mark.slow
async def test_a_disk_that_takes_nothing_is_said_and_tried_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    folder = tmp_path / "gone"
    folder.write_text("a file where the folder should be")
    async with world(folder) as at:
        await trio.sleep(FIRST_S + 5)
        assert at.looks.file().problem
        folder.unlink()
        await trio.sleep(PROBE_EVERY_S + 2 * LOOK_EVERY_S)
        assert not at.looks.file().problem
        assert at.of(Probed) == [Probed(rounds=0, answers=1.0, embeddings=1.0)], "compared with what was not lost"
        assert (folder / FILE).is_file()


# --- what the engine judged ---


async def test_generated_is_what_came_since_it_was_last_asked(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as at:

        async def judged(told: Openness) -> Generated | None:
            at.runtime.openness = told
            async with at.hosting.generate(work("x", 1)) as items:
                async for _ in items:
                    pass
            return at.looks.generated()

        assert at.looks.generated() is None
        one = await judged(Openness(tokens=10, chosen=90, entropy_sum_nats=21.5, margin_sum=2.5))
        assert one == Generated(tokens=10, entropy_sum_nats=21.5, margin_sum=2.5)
        assert at.looks.generated() is None, "no cause, no fact"
        two = await judged(Openness(tokens=12, chosen=99, entropy_sum_nats=30.0, margin_sum=3.0))
        assert two == Generated(tokens=2, entropy_sum_nats=8.5, margin_sum=0.5)
        big = 1e9 + 0.1
        await judged(Openness(tokens=2 * 10**9, chosen=1, entropy_sum_nats=big, margin_sum=big))
        edge = await judged(
            Openness(tokens=2 * 10**9 + 1, chosen=1, entropy_sum_nats=big - 1e-7, margin_sum=big + 1.0 + 3e-7)
        )
        assert edge == Generated(tokens=1, entropy_sum_nats=0.0, margin_sum=1.0), "rounding may step over an end"


# --- real models: each field by its cause, and none without ---

FP32 = RuntimeConfig(device="cpu", dtype="float32", threads=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_causal(path)
    return path


def moved(path: Path, change: float) -> dict[str, torch.Tensor]:
    named = load(Found("tiny", path, path), device="cpu", dtype="float32").model.named_parameters()
    return {
        name: weight + change * torch.sin(torch.arange(weight.numel(), dtype=torch.float32)).reshape(weight.shape)
        for name, weight in named
    }


async def looked(folder: Path, runtime: Runtime) -> tuple[HeldOut | None, Probed | None]:
    """The first look and probe of a start."""
    async with world(folder, runtime) as at:
        await trio.sleep(FIRST_S + 5)
        assert at.looks.statistics().failures == {}
        held_out, probed = at.of(HeldOut), at.of(Probed)
        return (held_out[0] if held_out else None), (probed[0] if probed else None)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
async def test_of_the_same_weights_nothing_moves(
    quantize: str, path: Path, tmp_path: Path, autojump_clock: MockClock
) -> None:
    config = replace(FP32, quantize=quantize)
    first, none = await looked(tmp_path, Runtime.load(str(path), config))
    assert none is None
    for _ in range(2):
        again, probed = await looked(tmp_path, Runtime.load(str(path), config))
        assert again == first
        assert probed == Probed(rounds=0, answers=1.0, embeddings=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8"])
async def test_of_other_weights_each_field_moves(
    quantize: str, path: Path, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """surprise.*, calibration.*, coherence.*: their cause is the weights."""
    async with world(tmp_path, Runtime.load(str(path), replace(FP32, quantize=quantize))) as at:
        await trio.sleep(FIRST_S + 1)
        at.merges = 2
        await at.hosting.switch(moved(path, 0.2), "r2")
        await trio.sleep(PROBE_MERGED_S + 2 * LOOK_EVERY_S)
        (probed,) = at.of(Probed)
        assert probed.rounds == 2
        assert probed.answers < 0.9
        assert probed.embeddings < 0.999
        await at.hosting.switch(moved(path, 0.0), "r3")
        await trio.sleep(PROBE_MERGED_S + 2 * LOOK_EVERY_S)
        back = at.of(Probed)[-1]
        assert back == Probed(rounds=2, answers=1.0, embeddings=1.0), "the weights before agree wholly again"
    before, _ = await looked(tmp_path / "a", Runtime.load(str(path), replace(FP32, quantize=quantize)))
    save_causal(tmp_path / "other", seed=1)
    after, _ = await looked(tmp_path / "b", Runtime.load(str(tmp_path / "other"), replace(FP32, quantize=quantize)))
    assert before is not None
    assert after is not None
    assert before.nll_nats != after.nll_nats
    assert before.bins != after.bins


@pytest.mark.slow
async def test_a_real_encoder_and_one_beside_a_model(path: Path, tmp_path: Path, autojump_clock: MockClock) -> None:
    save_encoder(tmp_path / "bert")
    for run in range(2):
        _, probed = await looked(tmp_path / "a", Runtime.load(str(tmp_path / "bert"), FP32))
        assert probed == (None if run == 0 else Probed(rounds=0, answers=None, embeddings=1.0))
    both = replace(FP32, embedding_name=str(tmp_path / "bert"))
    for run in range(2):
        _, probed = await looked(tmp_path / "b", Runtime.load(str(path), both))
        assert probed == (None if run == 0 else Probed(rounds=0, answers=1.0, embeddings=1.0))


@pytest.mark.slow
async def test_probes_have_no_part_in_uncertainty(path: Path, tmp_path: Path, autojump_clock: MockClock) -> None:
    """They are private; and a client's answer has."""
    async with world(tmp_path, Runtime.load(str(path), FP32)) as at:
        await trio.sleep(FIRST_S + 5)
        told = at.hosting.statistics().openness
        assert told is not None
        assert (told.chosen > len(PROMPTS), told.tokens) == (True, 0)
        assert at.looks.generated() is None
        async with at.hosting.generate(work("hello", 5)) as items:
            async for _ in items:
                pass
        made = at.looks.generated()
        assert made is not None
        assert 1 <= made.tokens <= 5
        assert at.looks.generated() is None
