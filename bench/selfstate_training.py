"""Training only where the expected load leaves room, ablated; a part of bench/selfstate.py.

Rules: two members train in one process, real engines, real rounds, a tiny model; one of them serves users who come in
waves. Its load is looked at and foretold by the node's own predictor (node/prediction.py), in periods of PERIOD_S
instead of a minute and with STAY_S as much shorter, so that a wave is as many periods as a busy hour is to a node.
The same waves, once with and once without; what is told of a wave's busy part is told of all busy parts together.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bench.harness import Row, quantile
from node.consciousness import ConsciousnessState, SelfPrediction
from node.errors import RequestError
from node.expectations import expected
from node.facts import Happened
from node.hosting import Hosting
from node.memory import apply
from node.prediction import Expected, Prediction, Predictor, score
from node.training_pause import LoadRoom, PausePolicy
from node.work import Finished, GenerateWork, Piece, Sampling
from tests.tiny_models import save_causal
from tests.training_world import Trainee, World, world

PERIOD_S, LOOK_S, STAY_S = 2.0, 0.1, 4.0
WAVE_S = 24.0  # as long again without a request
TOKENS = 40
USERS = 4
SHAPE: dict[str, Any] = {"steps": 6, "rows": 16, "context": 64}


class Foretold:
    """A self-state of load alone, as node/self_sampler.py keeps it."""

    def __init__(self) -> None:
        self.state = ConsciousnessState(self_prediction_error=SelfPrediction())
        self.prediction: Prediction | None = None
        self._predictor = Predictor()

    async def run(self, hosting: Hosting) -> None:
        while True:
            looks = list[int]()
            with trio.move_on_after(PERIOD_S):
                while True:
                    looks.append(hosting.requests_running)
                    await trio.sleep(LOOK_S)
            measured = {"active_requests": sum(looks) / len(looks)}
            if self.prediction is not None and self.prediction.figures:
                self.state = apply(Happened(outcome=score(self.prediction, measured, 0)), self.state)
            self._predictor = self._predictor.observed(measured)
            self.prediction = self._predictor.predict(now_ms(), round(1000 * PERIOD_S))

    def active(self) -> Expected | None:
        """See node.self_wiring.Keeping."""
        return expected(self, "active_requests", now_ms())


def now_ms() -> int:
    """Of the clock that is at hand."""
    return round(1000 * trio.current_time())


@dataclass(slots=True, kw_only=True)
class Seen:
    """Of the node that serves. rounds and steps: by whether its users were there."""

    first_token_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    rounds: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    steps: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    seconds: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    failed: int = 0

    def add(self, other: Seen) -> None:
        """The same of another run."""
        self.first_token_s += other.first_token_s
        self.answer_s += other.answer_s
        self.failed += other.failed
        for is_busy in (True, False):
            self.rounds[is_busy] += other.rounds[is_busy]
            self.steps[is_busy] += other.steps[is_busy]
            self.seconds[is_busy] += other.seconds[is_busy]


async def ask(hosting: Hosting, seen: Seen, number: int) -> float:
    """One request to its end; how long it took."""
    began, first = trio.current_time(), False
    work = GenerateWork(
        request_id=f"r{number}", text="Once upon a time", sampling=Sampling(max_tokens=TOKENS, seed=number)
    )
    async with hosting.generate(work) as items:
        async for item in items:
            if isinstance(item, RequestError):
                seen.failed += 1
            elif isinstance(item, Piece) and not first:
                first = True
                seen.first_token_s.append(trio.current_time() - began)
            elif isinstance(item, Finished):
                seen.answer_s.append(trio.current_time() - began)
    return trio.current_time() - began


async def user(hosting: Hosting, seen: Seen, rng: random.Random) -> None:
    """Asks, and thinks about as long as an answer takes."""
    while True:
        took_s = await ask(hosting, seen, rng.randrange(1 << 30))
        await trio.sleep(rng.expovariate(1.0 / max(took_s, 0.02)))


async def waves(one: Trainee, seconds: float) -> Seen:
    """Users who come and go, and what was done meanwhile."""
    seen, end, is_busy = Seen(), trio.current_time() + seconds, False
    while trio.current_time() < end:
        is_busy = not is_busy
        began, rounds, steps = trio.current_time(), one.round, one.steps
        with trio.move_on_after(WAVE_S):
            async with trio.open_nursery() as nursery:
                for number in range(USERS if is_busy else 0):
                    nursery.start_soon(user, one.hosting, seen, random.Random(number))
                await trio.sleep_forever()
        seen.seconds[is_busy] += trio.current_time() - began
        seen.rounds[is_busy] += one.round - rounds
        seen.steps[is_busy] += one.steps - steps
    return seen


async def trained(place: Path, model: Path, seconds: float, *, reads: bool) -> Seen:
    """Two members; the first one serves."""
    foretold = Foretold()
    policy = PausePolicy(expects=foretold.active) if reads else PausePolicy()
    async with world(place, model) as members:
        one = await _begun(members, policy)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(foretold.run, one.hosting)
            seen = await waves(one, seconds)
            nursery.cancel_scope.cancel()
    return seen


async def _begun(members: World, policy: PausePolicy) -> Trainee:
    """Both in their first rounds."""
    one, two = await members.start(0, policy=policy), await members.start(1)
    await one.begin(founders=members.peers(1), **SHAPE)
    await two.join()
    await members.rounds(2)
    one.session.wishes.load = LoadRoom(stay_s=STAY_S)
    return one


def compared(seconds: float, repeats: int) -> tuple[Seen, Seen]:
    """With and without, in turn, so that what else this machine does meanwhile falls on both."""
    found = {True: Seen(), False: Seen()}
    with tempfile.TemporaryDirectory(prefix="openagi-selfstate-") as folder:
        model = Path(folder) / "tiny"
        save_causal(model)
        for repeat in range(repeats):
            for reads in (True, False) if repeat % 2 == 0 else (False, True):
                place = Path(folder) / f"{repeat}-{reads}"
                place.mkdir()
                found[reads].add(trio.run(partial(trained, place, model, seconds, reads=reads)))
    return found[True], found[False]


def rows(seconds: float, repeats: int) -> Iterator[Row]:
    """The figures; the rival is the same node that trains whatever is expected."""
    used, plain = (figures(seen) for seen in compared(seconds, repeats))
    for name, (value, unit, is_higher) in used.items():
        yield Row(
            figure=f"training_{name}",
            value=value,
            unit=unit,
            better="higher" if is_higher else "lower",
            rival="trains whatever is expected",
            rival_value=plain[name][0],
        )


def figures(seen: Seen) -> dict[str, tuple[float, str, bool]]:
    """name -> value, unit, whether more is better."""

    def ms(values: list[float], share: float) -> float:
        return 1_000 * quantile(values, share)

    busy, quiet = seen.seconds[True], seen.seconds[False]
    return {
        "first_token_p50_ms": (ms(seen.first_token_s, 0.5), "ms to the first token, p50", False),
        "first_token_p95_ms": (ms(seen.first_token_s, 0.95), "ms to the first token, p95", False),
        "answer_p95_ms": (ms(seen.answer_s, 0.95), "ms to the last token, p95", False),
        "answers_s": (len(seen.answer_s) / busy, "answers a second while users are there", True),
        "round_busy_s": (busy / max(1, seen.rounds[True]), "s a round while users are there", False),
        "round_quiet_s": (quiet / max(1, seen.rounds[False]), "s a round while they are not", False),
        "steps_busy": (seen.steps[True] / busy, "steps a second here while users are there", True),
        "steps_quiet": (seen.steps[False] / quiet, "steps a second here while they are not", True),
    }
